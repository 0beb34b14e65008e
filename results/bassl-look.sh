# Which fusion to have by default: judged on held-out training images at batch 64, on seeds that no other
# table uses. Two seeds of every kind; three more of the plain framework and of the two kinds whose mean probe
# over the first two seeds is best. Cells: five minutes of one thread; probes on a tenth of the labels.
set -e
run() {  # run NAME FLAGS...
  out=runs/bassl-look/$1-$seed; shift
  python bassl.py --dataset cifar10 --recipe small --limit 5000 --epochs 5 --batch 64 --knn-every 0 \
    --seed $seed --out $out "$@"
  python linear_probe.py --backbone $out/backbone.pt --split held-out --fraction 0.1
}
for seed in 10 11; do
  run simclr      --layers 0
  run adversarial --fuse adversarial
  run reduced     --fuse adversarial --reduce 8
  run ramp        --fuse adversarial --gate 0.3 --ramp
  run one         --fuse one --gate 0.15
  run partner     --fuse partner
  run shared      --fuse shared
done
for seed in 12 13 14; do
  run simclr      --layers 0
done
python results/tables.py bassl-look

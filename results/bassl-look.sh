# Which fusion to have by default: judged on held-out training images at batch 64, on seeds that no other
# table uses. Two seeds of every kind; three more of the plain framework and of the two kinds whose mean probe
# over the first two seeds is best. Cells: five minutes of one thread; probes on a tenth of the labels.
# The first round had four kinds more, which bassl.py has no longer; with the bassl.py of commit c12b751:
#   run reduced --fuse adversarial --reduce 8          # a bottleneck over the batch axis
#   run ramp    --fuse adversarial --gate 0.3 --ramp   # the gate grows from 0 to 0.3 over the run
#   run partner --fuse partner                         # the first view mixed with one other image's
#   run shared  --fuse shared                          # the same, the partner has its share of the target
set -e
run() {  # run NAME FLAGS...
  out=runs/bassl-look/$1-$seed; shift
  python bassl.py --dataset cifar10 --recipe small --limit 5000 --epochs 5 --batch 64 --knn-every 0 \
    --seed $seed --out $out "$@"
  python linear_probe.py --backbone $out/backbone.pt --split held-out --fraction 0.1
}
for seed in 10 11 12 13 14; do
  run simclr      --layers 0
  run one         --fuse one
  run adversarial --fuse adversarial
done
python results/tables.py bassl-look

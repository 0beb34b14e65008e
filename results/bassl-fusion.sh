# Which fusion: each kind and depth on real pairs, three seeds, all with gates held at 0.15; plain once more
# with a gate that is learned, as the paper's layer would; and the unpaired control, its gate held open.
# Cells: two minutes of one thread with bf16, five without; probes on a tenth of the labels.
set -e
run() {  # run NAME FLAGS...
  out=runs/bassl-fusion/$1; shift
  python bassl.py --dataset cifar10 --recipe small --limit 5000 --epochs 5 --knn-every 0 --out $out "$@"
  python linear_probe.py --backbone $out/backbone.pt --fraction 0.1
}
for seed in 0 1 2; do
  run simclr-$seed --layers 0 --seed $seed
  run learned-$seed --fuse plain --gate 0 --seed $seed
  for layers in 1 2 3; do
    run plain-$layers-$seed       --fuse plain --layers $layers --seed $seed
    run shuffled-$layers-$seed    --fuse shuffled --layers $layers --seed $seed
    run one-$layers-$seed         --fuse one --layers $layers --seed $seed
    run adversarial-$layers-$seed --fuse adversarial --layers $layers --seed $seed
  done
done
for fuse in plain one shuffled adversarial; do
  run $fuse-unpaired --fuse $fuse --gate 3 --unpaired
done
python results/tables.py bassl-fusion

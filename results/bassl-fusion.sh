# Which fusion: each kind and depth on real pairs, three seeds; and the unpaired control, its gate held open.
set -e
for seed in 0 1 2; do
  for fuse in plain one shuffled adversarial; do
    for layers in 0 1 2 3; do
      if [ $layers = 0 ] && [ $fuse != plain ]; then continue; fi
      out=runs/bassl-fusion/$fuse-$layers-$seed
      python bassl.py --dataset cifar10 --limit 12500 --fuse $fuse --layers $layers --seed $seed --out $out
      python linear_probe.py --backbone $out/backbone.pt
    done
  done
done
for fuse in plain one shuffled adversarial; do
  out=runs/bassl-fusion/$fuse-unpaired
  python bassl.py --dataset cifar10 --limit 12500 --fuse $fuse --gate 3 --unpaired --out $out
  python linear_probe.py --backbone $out/backbone.pt
done
python results/tables.py bassl-fusion

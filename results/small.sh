# SimCLR by the small recipe against the small set-up before it (32 px, ImageNet stem) in about the same
# minutes, three seeds; the first of the new ones is make cifar10's.
set -e
for seed in 0 1 2; do
  out=runs/small/before-$seed
  python bassl.py --dataset cifar10 --recipe small --layers 0 --view 32 --stem imagenet --epochs 4 \
    --seed $seed --out $out
  python linear_probe.py --backbone $out/backbone.pt
  out=runs/methods/seed-$seed/simclr
  if [ $seed = 0 ]; then out=runs/cifar10/simclr; fi
  python bassl.py --dataset cifar10 --recipe small --layers 0 --seed $seed --out $out
  python linear_probe.py --backbone $out/backbone.pt
done
python results/tables.py small runs/small runs/cifar10/simclr runs/methods/seed-*/simclr

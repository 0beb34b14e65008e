# SimCLR by the small recipe of two epochs against the small set-up before it (32 px, ImageNet stem) in about
# the same minutes, three seeds.
set -e
for seed in 0 1 2; do
  out=runs/small/before-$seed
  python bassl.py --dataset cifar10 --recipe small --layers 0 --view 32 --stem imagenet --epochs 4 \
    --seed $seed --out $out
  python linear_probe.py --backbone $out/backbone.pt
  out=runs/small/after-$seed
  python bassl.py --dataset cifar10 --recipe small --layers 0 --epochs 2 --seed $seed --out $out
  python linear_probe.py --backbone $out/backbone.pt
done
python results/tables.py small

# The small recipe as it stands on CIFAR-10: an untrained network and six methods, three seeds.
set -e
for seed in 0 1 2; do
  out=runs/methods
  python linear_probe.py --random --dataset cifar10 --seed $seed --out $out/random-$seed
  python bassl.py --dataset cifar10 --layers 0 --seed $seed --out $out/simclr-$seed
  python bassl.py --dataset cifar10 --layers 0 --framework moco --seed $seed --out $out/moco-$seed
  python bassl.py --dataset cifar10 --layers 0 --framework byol --seed $seed --out $out/byol-$seed
  python bassl.py --dataset cifar10 --seed $seed --out $out/bassl-$seed
  python npid_distill.py --dataset cifar10 --seed $seed --out $out/npid-$seed
  for method in simclr moco byol bassl npid; do
    python linear_probe.py --backbone $out/$method-$seed/backbone.pt
  done
done
python results/tables.py methods

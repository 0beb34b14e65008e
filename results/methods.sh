# An untrained network and five methods, three seeds: the small recipe of two epochs on CIFAR-10, and cells on
# CIFAR-100, a quarter of the images, with probes on a tenth of the labels.
set -e
for seed in 0 1 2; do
  out=runs/methods/seed-$seed
  python linear_probe.py --random --arch resnet10 --dataset cifar10 --seed $seed --out $out/random
  small="--dataset cifar10 --recipe small --seed $seed"
  python bassl.py $small --epochs 2 --layers 0 --out $out/simclr
  python bassl.py $small --epochs 2 --layers 0 --framework moco --out $out/bassl-moco
  python bassl.py $small --epochs 2 --layers 0 --framework byol --out $out/bassl-byol
  python bassl.py $small --epochs 2 --out $out/bassl
  python npid_distill.py $small --epochs 32 --out $out/npid
  for method in simclr bassl-moco bassl-byol bassl npid; do
    python linear_probe.py --backbone $out/$method/backbone.pt
  done
done
cell() {  # cell NAME SCRIPT FLAGS...
  out=runs/methods/cifar100-$1-$seed; shift
  python "$@" --dataset cifar100 --recipe small --knn-every 0 --seed $seed --out $out
  python linear_probe.py --backbone $out/backbone.pt --fraction 0.1
}
for seed in 0 1 2; do
  python linear_probe.py --random --arch resnet10 --dataset cifar100 --fraction 0.1 --seed $seed \
    --out runs/methods/cifar100-random-$seed
  cell simclr bassl.py --limit 12500 --epochs 2 --layers 0
  cell moco   bassl.py --limit 12500 --epochs 2 --layers 0 --framework moco
  cell byol   bassl.py --limit 12500 --epochs 2 --layers 0 --framework byol
  cell bassl  bassl.py --limit 12500 --epochs 2
  cell npid   npid_distill.py --epochs 8
done
python results/tables.py methods

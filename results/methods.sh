# An untrained network and five methods, three seeds: the small recipe on CIFAR-10, 10 to 16 CPU-core minutes
# with bf16 a run; and on CIFAR-100 a quarter of the images, three to five minutes, with probes on a tenth of
# the labels. CIFAR-10 on a laptop is seed 0 of it, and SimCLR for twice as long.
set -e
for seed in 0 1 2; do
  out=runs/methods/seed-$seed
  python linear_probe.py --random --arch resnet10 --dataset cifar10 --seed $seed --out $out/random
  small="--dataset cifar10 --recipe small --seed $seed"
  python bassl.py $small --layers 0 --out $out/simclr
  python bassl.py $small --out $out/bassl
  python npid_distill.py $small --out $out/npid
  python bassl.py $small --layers 0 --framework moco --out $out/bassl-moco
  python bassl.py $small --layers 0 --framework byol --out $out/bassl-byol
  for method in simclr bassl npid bassl-moco bassl-byol; do
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
  cell simclr bassl.py --limit 12500 --layers 0
  cell bassl  bassl.py --limit 12500
  cell npid   npid_distill.py --epochs 12
  cell moco   bassl.py --limit 12500 --layers 0 --framework moco
  cell byol   bassl.py --limit 12500 --layers 0 --framework byol
done
python results/tables.py methods

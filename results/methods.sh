# The small recipe as it stands on CIFAR-10: an untrained network and five methods, three seeds; the runs of
# the first seed are make cifar10's.
set -e
for seed in 0 1 2; do
  out=runs/methods/seed-$seed
  if [ $seed = 0 ]; then out=runs/cifar10; fi
  python linear_probe.py --random --dataset cifar10 --seed $seed --out $out/random
  python bassl.py --dataset cifar10 --layers 0 --seed $seed --out $out/simclr
  python bassl.py --dataset cifar10 --layers 0 --framework moco --seed $seed --out $out/bassl-moco
  python bassl.py --dataset cifar10 --layers 0 --framework byol --seed $seed --out $out/bassl-byol
  python bassl.py --dataset cifar10 --seed $seed --out $out/bassl
  python npid_distill.py --dataset cifar10 --seed $seed --out $out/npid
  for method in simclr bassl-moco bassl-byol bassl npid; do
    python linear_probe.py --backbone $out/$method/backbone.pt
  done
done
python results/tables.py methods runs/methods runs/cifar10

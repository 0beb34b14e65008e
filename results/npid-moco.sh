# NPID against MoCo v2 in about the same minutes (MoCo sees two views and a target network's two): over shares
# of the images and over networks. Accuracy over minutes and epochs is the online kNN in the logs.
set -e
run() {  # run NAME SCRIPT FLAGS...
  out=runs/npid-moco/$1-$seed; shift
  python "$@" --dataset cifar10 --knn-every 1 --seed $seed --out $out
  python linear_probe.py --backbone $out/backbone.pt
}
moco="bassl.py --layers 0 --framework moco"
for seed in 0 1 2; do
  run npid-5000  npid_distill.py --limit 5000 --epochs 32
  run moco-5000  $moco --limit 5000 --epochs 13
  run npid-12500 npid_distill.py --limit 12500 --epochs 13
  run moco-12500 $moco --limit 12500 --epochs 5
  run npid-25000 npid_distill.py --limit 25000 --epochs 7
  run moco-25000 $moco --limit 25000 --epochs 3
  run npid-50000 npid_distill.py --limit 50000 --epochs 3
  run moco-50000 $moco --limit 50000 --epochs 1
  for arch in resnet18 resnet34; do
    run npid-$arch npid_distill.py --limit 5000 --epochs 8 --arch $arch
    run moco-$arch $moco --limit 5000 --epochs 3 --arch $arch
  done
done
python results/tables.py npid-moco

# What else was tried for the small recipe, SimCLR, judged on held-out training images.
set -e
run() {  # run NAME SCRIPT FLAGS...
  out=runs/tried/$1; shift
  python "$@" --dataset cifar10 --recipe small --knn-every 0 --out $out
  python linear_probe.py --backbone $out/backbone.pt --split held-out --fraction 0.05
}
simclr="bassl.py --layers 0 --epochs 1"
run recipe    $simclr --limit 16384
run batch-64  $simclr --limit 16384 --batch 64 --lr 0.008
run cooler    $simclr --limit 16384 --temperature 0.1
run warmup    $simclr --limit 16384 --warmup 0.1
run sgd       $simclr --limit 16384 --optimizer sgd --lr 0.12
run stem      $simclr --limit 32768 --stem imagenet --view 32
run resnet18  $simclr --limit 8192 --arch resnet18
run multicrop aug_study.py --methods simclr --augs multicrop --epochs 1 --limit 16384
python results/tables.py tried

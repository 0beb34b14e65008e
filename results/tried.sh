# What else was tried for the small recipe, judged on held-out training images.
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
run multicrop aug_study.py --methods simclr --augs multicrop --epochs 1 --limit 16384
run npid-2560  npid_distill.py --limit 2560 --epochs 20
run npid-5120  npid_distill.py --limit 5120 --epochs 10
run npid-10240 npid_distill.py --limit 10240 --epochs 5
python results/tables.py tried

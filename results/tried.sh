# What else was tried for the small recipe, judged on held-out training images. First one seed on few images;
# then, with the faster step, three seeds of what might change a default.
set -e
run() {  # run NAME FRACTION SCRIPT FLAGS...
  out=runs/tried/$1; fraction=$2; shift 2
  python "$@" --recipe small --knn-every 0 --out $out
  python linear_probe.py --backbone $out/backbone.pt --split held-out --fraction $fraction
}
simclr="bassl.py --dataset cifar10 --layers 0"
npid="npid_distill.py --dataset cifar10"
run recipe    0.05 $simclr --epochs 1 --limit 16384
run batch-64  0.05 $simclr --epochs 1 --limit 16384 --batch 64 --lr 0.008
run cooler    0.05 $simclr --epochs 1 --limit 16384 --temperature 0.1
run warmup    0.05 $simclr --epochs 1 --limit 16384 --warmup 0.1
run multicrop 0.05 aug_study.py --dataset cifar10 --methods simclr --augs multicrop --epochs 1 --limit 16384
run npid-2560  0.05 $npid --limit 2560 --epochs 20
run npid-5120  0.05 $npid --limit 5120 --epochs 10
run npid-10240 0.05 $npid --limit 10240 --epochs 5
for seed in 0 1 2; do
  run simclr-$seed      0.2 $simclr --limit 25000 --epochs 4 --seed $seed
  run simclr-slow-$seed 0.2 $simclr --limit 25000 --epochs 4 --lr 0.002 --seed $seed
  run npid-$seed        0.2 $npid --limit 5120 --epochs 20 --seed $seed
  run npid-10240-$seed  0.2 $npid --limit 10240 --epochs 10 --seed $seed
  run npid-fast-$seed   0.2 $npid --limit 5120 --epochs 20 --lr 1.0 --seed $seed
done
for seed in 0 1; do
  run simclr-cool-$seed 0.2 $simclr --limit 25000 --epochs 4 --temperature 0.1 --seed $seed
done
run simclr-fast-0 0.2 $simclr --limit 25000 --epochs 4 --lr 0.008
run npid-slow-0   0.2 $npid --limit 5120 --epochs 20 --lr 0.25
python results/tables.py tried

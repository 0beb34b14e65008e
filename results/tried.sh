# What else was tried for the small recipe, SimCLR, judged on held-out training images.
set -e
run() {  # run NAME FLAGS...
  out=runs/tried/$1; shift
  python bassl.py --dataset cifar10 --recipe small --layers 0 --limit 16384 --epochs 1 --knn-every 0 \
    --out $out "$@"
  python linear_probe.py --backbone $out/backbone.pt --split held-out --fraction 0.05
}
run recipe
run batch-64 --batch 64 --lr 0.008
run cooler --temperature 0.1
run warmup --warmup 0.1
run sgd --optimizer sgd --lr 0.12
run stem --stem imagenet --view 32 --epochs 2
run resnet18 --arch resnet18 --limit 8192
python results/tables.py tried

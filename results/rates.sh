# The small recipe's rates: a short sweep a method, judged on held-out training images.
set -e
run() {  # run NAME SCRIPT FLAGS...
  out=runs/rates/$1; shift
  python "$@" --dataset cifar10 --recipe small --knn-every 0 --out $out
  python linear_probe.py --backbone $out/backbone.pt --split held-out --fraction 0.05
}
for lr in 0.002 0.004 0.008; do
  for method in simclr moco byol simsiam swav barlow vicreg dino; do
    run $method-$lr aug_study.py --methods $method --augs simclr --limit 8192 --epochs 1 --lr $lr
  done
done
for method in moco simsiam barlow vicreg; do  # the lowest was the best of three
  run $method-0.001 aug_study.py --methods $method --augs simclr --limit 8192 --epochs 1 --lr 0.001
done
run vicreg-0.0005 aug_study.py --methods vicreg --augs simclr --limit 8192 --epochs 1 --lr 0.0005
for lr in 0.25 0.5 1.0; do
  run npid-$lr npid_distill.py --limit 2560 --epochs 6 --lr $lr
done
python results/tables.py rates

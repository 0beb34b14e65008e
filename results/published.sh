# The published rows at full size, the most telling first: for one GPU.
# About seven hours of one H100, by the rates of results/bench/gpu.jsonl and the networks' arithmetic; of
# them the first two took a quarter of one, with ARGS="--compile --knn-every 0".
#   MINUTES=9 bash results/published.sh      # a run saves and stops after 9 minutes, with status 3;
#                                            # the same line goes on, and does nothing when all is done
# ARGS and PROBE: further flags of every pretraining and of every probe, to try it out, as
#   ARGS="--epochs 1 --limit 512 --batch 64 --view 16" PROBE="--epochs 1 --fraction 0.01"
set -e
run() {  # run NAME SCRIPT FLAGS...
  out=runs/published/$1; shift
  python "$@" --minutes "${MINUTES:-0}" --out $out $ARGS
  python linear_probe.py --backbone $out/backbone.pt $PROBE
}
run cifar100-npid     npid_distill.py --dataset cifar100 --recipe cifar
run cifar100-moco     bassl.py --dataset cifar100 --recipe cifar --layers 0 --framework moco
run cifar10-bassl     bassl.py --dataset cifar10 --recipe cifar
run cifar10-simclr    bassl.py --dataset cifar10 --recipe cifar --layers 0
run tinyimagenet-npid npid_distill.py --dataset tinyimagenet --recipe cifar
run tinyimagenet-moco bassl.py --dataset tinyimagenet --recipe cifar --layers 0 --framework moco
run imagenet100-simclr bassl.py --dataset imagenet100 --layers 0
run imagenet100-bassl  bassl.py --dataset imagenet100
python results/tables.py published

# NPID against MoCo v2 in about the same minutes (MoCo's step sees two views, its target both again): over
# shares of the images, NPID up to a third more, and over networks, MoCo a tenth more; three seeds. Three
# minutes of one thread with bf16, seven without; ResNet-34 four, all images five to six.
# Probes on a tenth of the labels.
set -e
run() {  # run NAME SCRIPT FLAGS...
  out=runs/npid-moco/$1-$seed; shift
  python "$@" --dataset cifar10 --recipe small --knn-every 0 --seed $seed --out $out
  python linear_probe.py --backbone $out/backbone.pt --fraction 0.1
}
moco="bassl.py --layers 0 --framework moco"
for seed in 0 1 2; do
  run npid-5000  npid_distill.py --limit 5000 --epochs 13
  run moco-5000  $moco --limit 5000 --epochs 6
  run npid-12500 npid_distill.py --limit 12500 --epochs 5
  run moco-12500 $moco --limit 12500 --epochs 2
  run npid-25000 npid_distill.py --limit 25000 --epochs 2
  run moco-25000 $moco --limit 25000 --epochs 1
  run npid-50000 npid_distill.py --limit 0 --epochs 2
  run moco-50000 $moco --limit 0 --epochs 1
  run npid-resnet18 npid_distill.py --limit 5000 --epochs 6 --arch resnet18
  run moco-resnet18 $moco --limit 5000 --epochs 3 --arch resnet18
  run npid-resnet34 npid_distill.py --limit 5000 --epochs 4 --arch resnet34
  run moco-resnet34 $moco --limit 5000 --epochs 2 --arch resnet34
done
python results/tables.py npid-moco

# NPID against MoCo v2: over minutes and epochs (online kNN in the logs), shares of the images, networks.
set -e
for seed in 0 1 2; do
  for limit in 5000 12500 25000 50000; do
    out=runs/npid-moco/npid-$limit-$seed
    python npid_distill.py --dataset cifar10 --limit $limit --knn-every 1 --seed $seed --out $out
    python linear_probe.py --backbone $out/backbone.pt
    out=runs/npid-moco/moco-$limit-$seed
    python bassl.py --dataset cifar10 --framework moco --layers 0 --limit $limit --knn-every 1 \
      --seed $seed --out $out
    python linear_probe.py --backbone $out/backbone.pt
  done
  for arch in resnet18 resnet34; do
    out=runs/npid-moco/npid-$arch-$seed
    python npid_distill.py --dataset cifar10 --limit 5000 --arch $arch --knn-every 1 --seed $seed --out $out
    python linear_probe.py --backbone $out/backbone.pt
    out=runs/npid-moco/moco-$arch-$seed
    python bassl.py --dataset cifar10 --framework moco --layers 0 --limit 5000 --arch $arch \
      --seed $seed --out $out
    python linear_probe.py --backbone $out/backbone.pt
  done
done
python results/tables.py npid-moco

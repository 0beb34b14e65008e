# NPID against MoCo v2 on the same images, two seeds: accuracy over minutes and epochs is the online kNN of
# the logs. Twelve minutes of one thread each with bf16, half an hour without.
set -e
for seed in 0 1; do
  for dataset in cifar10 cifar100; do
    out=runs/npid-long/$dataset
    python npid_distill.py --dataset $dataset --recipe small --limit 12500 --epochs 22 --knn-every 2 \
      --seed $seed --out $out-npid-$seed
    python bassl.py --layers 0 --framework moco --dataset $dataset --recipe small --limit 12500 --epochs 9 \
      --knn-every 1 --seed $seed --out $out-moco-$seed
    for method in npid moco; do
      python linear_probe.py --backbone $out-$method-$seed/backbone.pt
    done
  done
done
python results/tables.py npid-long

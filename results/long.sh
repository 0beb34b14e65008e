# Five methods on CIFAR-10 for 41 to 49 CPU-core minutes with bf16 each (NPID 50 and 55), two seeds: accuracy
# over minutes and over images is the online kNN of the logs. NPID sees each image as often as in its recipe,
# and more images.
set -e
for seed in 0 1; do
  out=runs/long/seed-$seed
  small="--dataset cifar10 --recipe small --seed $seed"
  python bassl.py $small --epochs 15 --layers 0 --knn-every 1 --out $out/simclr
  python bassl.py $small --epochs 15 --knn-every 1 --out $out/bassl
  python npid_distill.py $small --limit 22528 --knn-every 3 --out $out/npid
  python bassl.py $small --epochs 12 --layers 0 --framework moco --knn-every 1 --out $out/bassl-moco
  python bassl.py $small --epochs 12 --layers 0 --framework byol --knn-every 1 --out $out/bassl-byol
  for method in simclr bassl npid bassl-moco bassl-byol; do
    python linear_probe.py --backbone $out/$method/backbone.pt
  done
done
python results/tables.py long

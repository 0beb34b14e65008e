# NPID against MoCo v2 on the same images, two budgets, two seeds: accuracy over minutes and epochs is the
# online kNN of the logs. Of one thread with bf16, 12 (MoCo v2) and 15 minutes, then 22 each; without bf16 an
# hour and more.
set -e
for epochs in "22 9" "32 17"; do  # NPID's, MoCo's
  npid=${epochs% *}
  moco=${epochs#* }
  for seed in 0 1; do
    for dataset in cifar10 cifar100; do
      out=runs/npid-long/$dataset-$npid
      python npid_distill.py --dataset $dataset --recipe small --limit 12500 --epochs $npid --knn-every 2 \
        --seed $seed --out $out-npid-$seed
      python bassl.py --layers 0 --framework moco --dataset $dataset --recipe small --limit 12500 \
        --epochs $moco --knn-every 1 --seed $seed --out $out-moco-$seed
      for method in npid moco; do
        python linear_probe.py --backbone $out-$method-$seed/backbone.pt
      done
    done
  done
done
python results/tables.py npid-long

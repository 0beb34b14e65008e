# The fusion in front of MoCo, BYOL and SimSiam, three seeds. (Published: up to +1.25 on ImageNet-100.) Cells:
# SimSiam trains for two minutes of one thread with bf16, five without; probes on a tenth of the labels.
set -e
for seed in 0 1 2; do
  for framework in moco byol simsiam; do
    for layers in 0 1; do
      out=runs/bassl-plug/$framework-l$layers-$seed
      python bassl.py --dataset cifar100 --recipe small --limit 5000 --epochs 5 --knn-every 0 \
        --framework $framework --layers $layers --seed $seed --out $out
      python linear_probe.py --backbone $out/backbone.pt --fraction 0.1
    done
  done
done
python results/tables.py bassl-plug

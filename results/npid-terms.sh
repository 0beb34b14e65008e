# NPID and its terms, one added at a time, three seeds. Cells: two minutes of one thread with bf16,
# five without; probes on a tenth of the labels.
set -e
run() {  # run NAME FLAGS...
  out=runs/npid-terms/$1-$seed; shift
  python npid_distill.py --dataset cifar10 --recipe small --epochs 8 --knn-every 0 --seed $seed --out $out \
    "$@"
  python linear_probe.py --backbone $out/backbone.pt --fraction 0.1
}
for seed in 0 1 2; do
  run 1-npid         --init random --update ema --lambda-kl 0 --cutmix 0
  run 2-calibration  --update ema --lambda-kl 0 --cutmix 0
  run 3-gradient     --lambda-kl 0 --cutmix 0
  run 4-distillation --cutmix 0
  run 5-cutmix       --cutmix 0.5
done
python results/tables.py npid-terms

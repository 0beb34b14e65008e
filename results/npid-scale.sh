# Are NPID's terms too weak or too strong? The bank's momentum and the weight of the distillation around their
# defaults, judged on held-out training images, two seeds that no other table of NPID uses. Cells as in
# npid-terms.sh. With --temper-kl the distillation divides its cosines by tau, as a literal reading has it.
set -e
run() {  # run NAME FLAGS...
  out=runs/npid-scale/$1-$seed; shift
  python npid_distill.py --dataset cifar10 --recipe small --epochs 8 --knn-every 0 --seed $seed --out $out \
    "$@"
  python linear_probe.py --backbone $out/backbone.pt --split held-out --fraction 0.1
}
for seed in 10 11; do
  run 1-average       --lambda-kl 0 --update ema
  run 2-gradient-0.25 --lambda-kl 0 --bank-momentum 0.25
  run 2-gradient-0.5  --lambda-kl 0
  run 2-gradient-0.75 --lambda-kl 0 --bank-momentum 0.75
  run 2-gradient-0.9  --lambda-kl 0 --bank-momentum 0.9
  run 3-kl-20         --lambda-kl 20
  run 3-kl-100        --lambda-kl 100
  run 3-kl-400        --lambda-kl 400
  run 3-tempered-20   --lambda-kl 20 --temper-kl
done
python results/tables.py npid-scale

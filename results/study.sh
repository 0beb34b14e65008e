# Four methods x three augmentations, both switches, a larger backbone; three seeds. Cells: SimCLR trains for
# two minutes of one thread with bf16, five without; probes on a tenth of the labels.
set -e
run() {  # run NAME FLAGS...
  out=runs/study/$1-$seed; shift
  python aug_study.py --dataset cifar10 --recipe small --limit 12500 --epochs 2 --knn-every 0 \
    --seed $seed --out $out "$@"
  python linear_probe.py --backbone $out/backbone.pt --fraction 0.1
}
for seed in 0 1 2; do
  for method in simclr moco byol barlow; do
    for augs in simclr byol multicrop; do
      run $method-$augs --methods $method --augs $augs
    done
    run $method-resnet18 --methods $method --augs simclr --arch resnet18
  done
  run simclr-predictor --methods simclr --augs simclr --predictor on
  run simclr-momentum  --methods simclr --augs simclr --momentum on
  run byol-predictor   --methods byol --augs simclr --predictor off
  run byol-momentum    --methods byol --augs simclr --momentum off
done
python results/tables.py study
python results/tables.py --effects results/study.jsonl

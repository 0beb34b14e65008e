# BA-SSL's own question: accuracy over batch size, with and without fusion, at equal images; five seeds.
set -e
for seed in 0 1 2 3 4; do
  for batch in 32 64 128; do
    for layers in 0 1; do
      out=runs/bassl-batch/b$batch-l$layers-$seed
      python bassl.py --dataset cifar10 --limit 12500 --batch $batch --layers $layers --seed $seed --out $out
      python linear_probe.py --backbone $out/backbone.pt
    done
  done
done
python results/tables.py bassl-batch

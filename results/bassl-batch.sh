# BA-SSL's own question: accuracy over batch size, with and without fusion, at equal images; ten seeds,
# of which the committed rows have the first three from a second processor too.
# Cells: two to four CPU-core minutes with bf16; probes on a tenth of the labels.
set -e
for seed in 0 1 2 3 4 5 6 7 8 9; do
  for batch in 32 64 128; do
    for layers in 0 1; do
      out=runs/bassl-batch/b$batch-l$layers-$seed
      python bassl.py --dataset cifar10 --recipe small --limit 10000 --epochs 5 --knn-every 0 --batch $batch \
        --layers $layers --seed $seed --out $out
      python linear_probe.py --backbone $out/backbone.pt --fraction 0.1
    done
  done
done
python results/tables.py bassl-batch

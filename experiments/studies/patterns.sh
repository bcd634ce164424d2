#!/bin/sh
# What the pattern of a tokenizer does to bits per byte of a model that reads a text once: the
# question of docs/LOG.md, "the pattern of a tokenizer". FILE is the text; any setting may follow:
#
#     sh experiments/studies/patterns.sh novel.txt --seeds=3 --out=out/patterns-novel
#     python -c "import random; r = random.Random(0).randrange
#     for _ in range(50_000):
#         a, b = r(10 ** (1 + r(6))), r(10 ** (1 + r(6))); print(a, '+', b, '=', a + b)
#     " > sums.txt                  # the text of digits
set -e
file=$1
shift
data=data/patterns/$(basename "$file" | cut -d. -f1)
for pattern in gpt2 gpt4 o200k nanochat; do
    [ -e "$data-$pattern/meta.json" ] || {
        mkdir -p "$data-$pattern"
        python bpe.py train "$file" --vocab-size=2048 --pattern=$pattern --no-held-out \
            --out="$data-$pattern.json"
        python -m data.corpus --from="$file" --tokenizer="$data-$pattern.json" --validation=0.1 \
            --out="$data-$pattern"
    }
done
python -m experiments.compare demo --name=patterns --data="$data-gpt2" --max_steps=0 --epochs=1 \
    --batch_tokens=1024 --micro_batch=16 --compile=off --warmup_steps=20 \
    --model.block_size=64 --model.n_layer=2 --model.n_head=2 --model.n_embd=64 \
    --variant="data=$data-gpt4 epochs=1" --variant="data=$data-o200k epochs=1" \
    --variant="data=$data-nanochat epochs=1" "$@"

#!/bin/sh
# Rates, schedules and settings of Muon on text that does not repeat: the question of docs/LOG.md,
# "which recipe". FOLDER holds texts; any setting may follow:
#
#     python -m data.corpus --from=FOLDER --tokenizer=bytes --out=data/novels
#     sh experiments/studies/recipe.sh --data=novels --seeds=3
set -e

M="optim.optimizer=muon schedule=linear min_learning_rate=0 learning_rate=1e-2"
python -m experiments.compare shakespeare --name=recipe --max_steps=500 --warmup_steps=25 \
    --eval_tokens=262144 --compile=off --optim.optimizer=adamw --optim.beta2=0.99 \
    --schedule=cosine --learning_rate=2e-3 --min_learning_rate=1e-4 \
    --variant="schedule=linear min_learning_rate=0 learning_rate=6e-3" --variant="$M" \
    --variant="$M optim.embedding_lr=2" --variant="$M optim.embedding_lr=0.5" \
    --variant="$M weight_decay=0" --variant="$M optim.muon_warmup=100" \
    --variant="$M schedule=wsd optim.decay_share=0.5" "$@"

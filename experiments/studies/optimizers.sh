#!/bin/sh
# Muon and GaLore against AdamW, each at its own best learning rate: the question of docs/LOG.md,
# "Muon against AdamW at equal tokens". Any setting may follow:
#
#     sh experiments/studies/optimizers.sh --data=novels --seeds=3
set -e

compare() {
    python -m experiments.compare demo --out=out/optimizers --max_steps=1500 --warmup_steps=50 \
        --optim.optimizer=adamw --schedule=cosine --learning_rate=2e-3 --min_learning_rate=2e-4 \
        --model.n_head=6 --model.n_embd=192 "$@"
}

compare --name=optimizers --set=optim.optimizer=muon,galore \
    --tune=learning_rate=1e-3,2e-3,4e-3,8e-3,1.6e-2 "$@"

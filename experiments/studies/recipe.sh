#!/bin/sh
# Rates, schedules and settings of Muon on text that does not repeat: the question of docs/LOG.md,
# "which recipe"; in how many steps and minutes, and at ten times the parameters. FOLDER holds texts;
# any setting may follow:
#
#     python -m data.corpus --from=FOLDER --tokenizer=bytes --out=data/novels
#     sh experiments/studies/recipe.sh recipes|steps|minutes|size --data=novels --seeds=3
set -e

M="optim.optimizer=muon schedule=linear min_learning_rate=0 learning_rate=1e-2"
part=${1:-}
shift $(($# > 0))
compare() {
    python -m experiments.compare shakespeare --name="recipe-$part" --warmup_steps=25 \
        --eval_tokens=262144 --compile=off --optim.optimizer=adamw --optim.beta2=0.99 \
        --schedule=cosine --learning_rate=2e-3 --min_learning_rate=1e-4 "$@"
}
every_recipe() {
    compare --variant="$M" --variant="$M optim.embedding_lr=2" --variant="$M optim.embedding_lr=0.5" \
        --variant="$M weight_decay=0" --variant="$M optim.muon_warmup=100" \
        --variant="$M schedule=wsd optim.decay_share=0.5" "$@"
}
lower="learning_rate=1e-3 min_learning_rate=5e-5"
zero="schedule=linear min_learning_rate=0"

case $part in
recipes)
    every_recipe --max_steps=500 --variant="$zero learning_rate=6e-3" "$@" ;;
steps)
    compare --max_steps=500 --variant="$lower" \
        --variant="learning_rate=4e-3 min_learning_rate=2e-4" \
        --variant="$M max_steps=225 warmup_steps=11" \
        --variant="$M max_steps=150 warmup_steps=8" "$@" ;;
minutes)
    compare --max_steps=250 --equal=minutes --variant="$lower" --variant="$M" "$@" ;;
size)
    every_recipe --max_steps=250 --eval_tokens=131072 --model.n_layer=6 --model.n_head=6 \
        --model.n_embd=384 --variant="$lower" --variant="$zero learning_rate=1e-3" \
        --variant="$zero learning_rate=3e-3" "$@" ;;
*)
    echo "recipe.sh: name what to run: recipes, steps, minutes or size" >&2
    exit 2 ;;
esac

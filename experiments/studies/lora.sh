#!/bin/sh
# What LoRA's settings change once each has its own learning rate: docs/LOG.md, "nine variants of
# LoRA" and "LoRA's other settings". BASE is a run on other text than the reviews; any setting of
# train.py may follow, and for each call a folder of its own, --out=FOLDER, so that no report takes
# another's place:
#
#     sh experiments/studies/lora.sh variants --init_from=BASE --lora.target_modules=c_attn
#     sh experiments/studies/lora.sh variants --init_from=BASE --lora.target_modules=all-linear
#     sh experiments/studies/lora.sh settings --init_from=BASE --lora.target_modules=c_attn
#     sh experiments/studies/lora.sh epochs --init_from=BASE --data=FEW_REVIEWS
#     sh experiments/studies/lora.sh published            # a published study's 17, on gpt2-medium
set -e
part=${1:-}
shift $(($# > 0))
published() {
    python -m experiments.compare gpt2-imdb-lora --out=out/lora-published --lora.alpha=1 "$@"
}
compare() {
    python -m experiments.compare lora-demo --out=out/lora --data=imdb --epochs=0 --max_steps=50 \
        --batch_tokens=512 --micro_batch=4 --lora.r=4 --lora.alpha=16 --eval_tokens=16384 \
        --tune_seeds=1 "$@"
}
rates=learning_rate=4e-3,8e-3,1.6e-2,3.2e-2,6.4e-2

case $part in
published)
    published --name=rank --set=lora.r=1,2,8,16 "$@"
    published --name=alpha --set=lora.alpha=0.25,0.5,2,4,8,16 "$@"
    published --name=dropout --set=lora.dropout=0,0.025,0.1,0.15,0.2,0.3 "$@" ;;
variants)
    compare --name=variants --seeds=5 --variant=lora.use_rslora=true --variant=lora.use_dora=true \
        --variant=lora.init=pissa --variant=lora.init=olora --variant=lora.quantize=nf4 \
        --variant="lora.init=loftq lora.quantize=nf4" --variant=optim.lora_plus_ratio=16 \
        --variant="lora=none optim.optimizer=galore optim.galore_rank=4" --variant=lora=none \
        --tune=learning_rate=2.5e-4,5e-4,1e-3,2e-3,4e-3,8e-3,1.6e-2,3.2e-2 "$@" ;;
settings)
    compare --name=alpha --seeds=3 --set=lora.alpha=1,4,64 \
        --tune=learning_rate=2e-3,4e-3,8e-3,1.6e-2,3.2e-2,6.4e-2,0.128 "$@"
    compare --name=rank --seeds=3 --set=lora.r=1,16,64 --tune=$rates "$@"
    compare --name=targets --seeds=3 --tune=$rates \
        --set=lora.target_modules=c_attn.q+c_attn.k,c_attn.q+c_attn.v,c_attn+attn.c_proj "$@"
    compare --name=batch --seeds=3 --variant=batch_tokens=256 --variant=batch_tokens=1024 \
        --variant=batch_tokens=2048 --variant="batch_tokens=1024 max_steps=50" \
        --variant="batch_tokens=2048 max_steps=50" --tune=$rates "$@"
    compare --name=others --seeds=3 --learning_rate=1.6e-2 --variant=lora.dropout=0.05 \
        --variant=lora.dropout=0.2 --variant=lora.bias=lora_only \
        --variant=lora.bias=all --variant=lora.modules_to_save=ln_f --variant=lora.layers=0,1 \
        --variant=lora.layers=2,3 --variant=micro_batch=1 --variant=micro_batch=2 \
        --variant=max_steps=25 --variant=max_steps=100 --variant=max_steps=200 "$@" ;;
epochs)
    compare --name=epochs --seeds=3 --max_steps=0 --epochs=1 --variant=epochs=0.5 \
        --variant=epochs=2 --variant=epochs=4 --variant=epochs=8 --tune=$rates "$@" ;;
*)
    echo "lora.sh: name what to run: published, variants, settings or epochs" >&2
    exit 2 ;;
esac

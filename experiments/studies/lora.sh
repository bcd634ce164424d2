#!/bin/sh
# Rank, alpha, dropout, variants and targets of LoRA, and what is only a learning rate: the question
# of docs/LOG.md, "LoRA: is a high alpha best, or only a larger step?". Any setting may follow:
#
#     sh experiments/studies/lora.sh --init_from=out/base --data=imdb --seeds=3
#
# The first three are the settings of a published study, with its c_attn and trained biases.
set -e

compare() {
    python -m experiments.compare lora-demo --out=out/lora --epochs=0 --max_steps=50 \
        --batch_tokens=512 --micro_batch=4 --lora.r=4 --lora.target_modules=c_attn "$@"
}
published() {
    compare --lora.alpha=1 --lora.dropout=0.05 --lora.bias=lora_only "$@"
}

published --name=rank --set=lora.r=1,2,8,16 "$@"
published --name=alpha --set=lora.alpha=0.25,0.5,2,4,8,16 "$@"
published --name=dropout --set=lora.dropout=0,0.025,0.1,0.15,0.2,0.3 "$@"

compare --name=alpha-at-its-rate --set=lora.alpha=1,4,16,64 \
    --tune=learning_rate=1e-3,4e-3,1.6e-2,6.4e-2,0.256 "$@"
compare --name=variants --variant=lora.use_rslora=true --variant=lora.use_dora=true \
    --variant=lora.init=pissa --variant=lora.init=olora --variant=optim.lora_plus_ratio=16 \
    --variant="lora.init=loftq lora.quantize=nf4" --variant=optim.optimizer=galore \
    --variant=lora=none --tune=learning_rate=2.5e-4,1e-3,4e-3,1.6e-2,6.4e-2 "$@"
compare --name=ranks --set=lora.r=1,4,16,64 --set=lora.use_rslora=false,true "$@"
compare --name=targets --set=lora.target_modules=c_attn.q+c_attn.k,c_attn+attn.c_proj,all-linear \
    --tune=learning_rate=1e-3,4e-3,1.6e-2,6.4e-2 "$@"
compare --name=length --set=max_steps=25,100,200 "$@"
compare --name=batch --set=batch_tokens=256,1024,2048 \
    --tune=learning_rate=1e-3,4e-3,1.6e-2,6.4e-2 "$@"
compare --name=accumulation --set=micro_batch=1,2 "$@"

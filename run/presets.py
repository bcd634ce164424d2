"""Named recipes for train.py: `python train.py NAME --key=value` starts from one and changes it.

Each states what to expect, on which machine, and "not measured" where nobody has.
"""
import difflib
from dataclasses import dataclass, field
from typing import Any

DEFAULT_PRESET = "demo"


@dataclass(frozen=True)
class Preset:
    """A recipe: what it is, what to expect (result, time, machine), its settings."""
    what: str
    expect: str
    settings: dict[str, Any] = field(default_factory=dict)

    def about(self, usage: str) -> str:
        """The head of `--help` for this preset."""
        names = "\n".join(f"  {name:18} {preset.what}" for name, preset in PRESETS.items())
        return (f"{usage.strip()}\n\npresets:\n{names}\n\n"
                f"the one chosen: {self.what}; {self.expect}\n")


def chosen_preset(words: list[str]) -> tuple[str, Preset, list[str]]:
    """The preset that a command line begins with, or the default: its name, it, the words left."""
    name = words[0] if words and not words[0].startswith("-") else DEFAULT_PRESET
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"there is no preset {name!r}; {hint}presets: {', '.join(PRESETS)}")
    return name, PRESETS[name], words[words[:1] == [name]:]


def follow(settings: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """A preset's settings without those that the `given` ones stand for: warmup and length are
    each said in one way, and the floor of the learning rate keeps its share of another peak."""
    settings = dict(settings)
    for pair in (("warmup_steps", "warmup_ratio"), ("max_steps", "epochs")):
        if given.keys() & set(pair):
            settings = {name: value for name, value in settings.items() if name not in pair}
    peak, floor = settings.get("learning_rate"), settings.get("min_learning_rate")
    if peak and floor and "learning_rate" in given:
        settings["min_learning_rate"] = float(f"{floor / peak * given['learning_rate']:.6g}")
    return settings


def _pretraining(n_layer: int, n_head: int, n_embd: int, learning_rate: float, micro_batch: int,
                 **more: Any) -> dict[str, Any]:
    """FineWeb-Edu in batches of 0.5 M tokens. As all gpt2 presets it leaves the order of sums to
    the GPU, which is faster; --deterministic=true asks for the same bits.

    Linear decay to zero, and three times the learning rates of GPT-3 (2005.14165, table 2.1): what
    was found for 124M (KellerJordan/modded-nanogpt, record of 2024-06), taken for the other sizes
    as a rule. For 124M GPT-3 used batches of 0.5 M tokens.
    """
    return dict(
        data="fineweb", max_steps=19073, batch_tokens=524288, micro_batch=micro_batch,
        learning_rate=learning_rate, min_learning_rate=0.0, schedule="linear", warmup_steps=250,
        eval_every=250, eval_tokens=10_485_760, hellaswag_every=1000, save_every=1000,
        sample_every=1000, deterministic=False,
        model=dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, vocab_multiple=128)) | more


# Of small networks Muon with a decay to zero was the best found (docs/LOG.md, "which recipe").
MUON = dict(learning_rate=1e-2, min_learning_rate=0.0, schedule="linear",
            optim=dict(optimizer="muon"))
SHAKESPEARE_CPU = dict(
    MUON, data="shakespeare", max_steps=2000, batch_tokens=12 * 64, micro_batch=12,
    warmup_steps=100, eval_every=500, save_every=1000, log_every=50, sample_tokens=400,
    model=dict(block_size=64, n_layer=4, n_head=4, n_embd=128, bias=False))

SFT_DEMO = dict(
    init_from="out/demo", data="pydocs", template="plain", epochs=2, batch_tokens=16 * 128,
    micro_batch=16, learning_rate=2e-3, min_learning_rate=2e-4, warmup_ratio=0.05, eval_every=200,
    save_every=200, log_every=20, sample_tokens=40, model=dict(block_size=128))
GPT2_CHAT = dict(
    init_from="gpt2", template="alpaca", epochs=3, batch_tokens=32 * 512, micro_batch=8,
    learning_rate=2e-5, min_learning_rate=2e-6, warmup_ratio=0.03, weight_decay=0.0,
    eval_every=200, save_every=200, sample_tokens=100, patience=3, deterministic=False,
    model=dict(block_size=512))
LORA = dict(learning_rate=1e-3, min_learning_rate=1e-4, weight_decay=0.0)

PRESETS = {
    "demo": Preset(
        "a small GPT on the documentation that Python carries; offline, for a first look",
        "validation loss 4.0 (1.74 bits per byte; Python 3.11) in minutes on 2 CPU cores",
        # It sees its text 3.3 times: five times the usual decay is worth 0.1 nats.
        dict(MUON, data="corpus", max_steps=1200, batch_tokens=16 * 128, micro_batch=16,
             weight_decay=0.5, warmup_steps=20, eval_every=300, save_every=300, log_every=20,
             sample_tokens=120, sample_prompt="Return the",
             model=dict(block_size=128, n_layer=4, n_head=4, n_embd=128))),
    "shakespeare": Preset(
        "tiny shakespeare by bytes, of the size and tokens of nanoGPT's recipe for a CPU",
        "validation loss 1.60 per byte in 3 minutes on 2 CPU cores; nanoGPT's own is 1.89",
        SHAKESPEARE_CPU),
    "shakespeare-gpu": Preset(
        "nanoGPT's recipe for a GPU: 6 layers, 384 wide, context 256",
        "predicted: validation loss 1.47 per byte, published for nanoGPT, in 3 minutes on one A100",
        dict(SHAKESPEARE_CPU, max_steps=5000, batch_tokens=64 * 256, micro_batch=64,
             learning_rate=1e-3, min_learning_rate=1e-4, schedule="cosine", optim=dict(beta2=0.99),
             model=dict(block_size=256, n_layer=6, n_head=6, n_embd=384, dropout=0.2,
                        bias=False))),
    "gpt2-124m": Preset(
        "GPT-2 124M on 5 B tokens of FineWeb-Edu, AdamW at a tuned rate",
        "predicted: validation loss 3.28 to 3.31, in 23 minutes and for $12 on 8 H100 "
        "(docs/scaling.md, Which recipe)", _pretraining(12, 12, 768, 1.8e-3, 32, max_steps=9536)),
    "gpt2-124m-muon": Preset(
        "the same on 3.25 B tokens, with Muon",
        "predicted: validation loss 3.28 to 3.31, in 15 minutes and for $8 on 8 H100 (likewise)",
        _pretraining(12, 12, 768, 1.8e-3, 32, max_steps=6200, warmup_steps=0, weight_decay=0.0,
                     schedule="wsd", optim=dict(optimizer="muon", embedding_lr=2.0,
                                                decay_share=0.29))),
    "gpt2-124m-gpt3": Preset(
        "the same on 10 B tokens, by GPT-3's recipe",
        "validation loss 3.29 and HellaSwag 29.9% are published for this recipe (build-nanogpt, "
        "llm.c: 94 minutes on 8 A100-80GB); predicted, not measured here",
        _pretraining(12, 12, 768, 6e-4, 32, min_learning_rate=6e-5, schedule="cosine",
                     warmup_steps=715)),
    "gpt2-350m": Preset(
        "GPT-2 medium, 350M, on 10 B tokens", "not measured",
        _pretraining(24, 16, 1024, 9e-4, 16)),
    "gpt2-774m": Preset(
        "GPT-2 large, 774M, likewise", "not measured", _pretraining(36, 20, 1280, 7.5e-4, 8)),
    "gpt2-1558m": Preset(
        "GPT-2 XL, 1558M, likewise", "not measured", _pretraining(48, 25, 1600, 6e-4, 4)),
    "sft-demo": Preset(
        "the demo run learns to answer questions on Python's documentation; offline, after demo",
        "validation loss of the answers from 4.1 (training, step 20) to 3.4, in minutes on 2 CPU "
        "cores", SFT_DEMO),
    "lora-demo": Preset(
        "the same with an adapter of rank 8 on all linear layers; offline, after demo",
        "validation loss of the answers 3.45 after 150 steps (three seeds), 3.49 at rate 1e-3; "
        "the rate is a study's best on a base of this size (docs/LOG.md, nine variants of LoRA)",
        dict(SFT_DEMO, learning_rate=8e-3, min_learning_rate=8e-4, weight_decay=0.0,
             lora=dict(r=8, target_modules=("all-linear",)))),
    "imdb-demo": Preset(
        "the demo run learns whether a film review is positive; after demo and python -m data.imdb "
        "--task=classes [--from=FILES]",
        "accuracy 0.72 on 1,000 reviews after 5,000 twice, in about 5 minutes on one busy CPU "
        "core; from a demo that AdamW had trained, not measured from today's",
        dict(init_from="out/demo", data="imdb_classes", pooling="mean", epochs=2,
             batch_tokens=32 * 128, micro_batch=32, learning_rate=1.5e-3, min_learning_rate=1e-4,
             warmup_ratio=0.05, eval_every=100, save_every=200, log_every=20,
             model=dict(block_size=128))),
    "gpt2-alpaca": Preset(
        "GPT-2 124M on Stanford Alpaca, all weights", "not measured",
        dict(GPT2_CHAT, data="alpaca")),
    "gpt2-alpaca-lora": Preset(
        "GPT-2 124M on Stanford Alpaca, an adapter of rank 8 on all linear layers", "not measured",
        dict(GPT2_CHAT, **LORA, data="alpaca",
             lora=dict(r=8, alpha=16.0, target_modules=("all-linear",)))),
    "gpt2-imdb-lora": Preset(
        "GPT-2 medium on IMDB reviews as texts, an adapter of rank 4: a published study's best",
        "not measured; as many parameters train as in the study, 466,944; its loss on its training "
        "reviews ended at 3.59; experiments/studies/lora.sh runs its 17 settings",
        dict(LORA, init_from="gpt2-medium", data="imdb", epochs=1, batch_tokens=16 * 512,
             micro_batch=8, warmup_ratio=0.03, eval_every=200, eval_tokens=200_000, save_every=200,
             deterministic=False, model=dict(block_size=512),
             lora=dict(r=4, alpha=16.0, dropout=0.05, bias="lora_only"))),
}

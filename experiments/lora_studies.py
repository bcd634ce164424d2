"""The settings of a LoRA study, study by study: what experiments/lora_sweep.py trains.

    for setting in STUDIES["original"](base): ...       # base: the Setting that they vary

    base       the model as it is, for comparison
    original   17 settings of a published study: r 1 ... 16 at alpha 1, alpha 0.25 ... 16 at r 4,
               dropout 0 ... 0.3; c_attn, its bias trained too
    grid       alpha x learning rate; nothing but A and B trained, no dropout
    variants   rsLoRA, DoRA, PiSSA, OLoRA, LoRA+ and full training, each at several learning rates
    ranks      LoRA and rsLoRA, rank 1 ... 64 at the same alpha and learning rate
    targets    q and k, c_attn, all of attention, all linear layers; likewise
    budget     learning rate, epochs, batch and accumulation, each varied with the rest fixed

Papers: lora.py. The published study is a table of final losses on IMDB reviews and Alpaca with one
seed, and concludes that a high alpha is best.
"""
import dataclasses
from dataclasses import dataclass
from typing import Any, Callable, Iterator

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {}, "rslora": {"lora.use_rslora": True}, "dora": {"lora.use_dora": True},
    "pissa": {"lora.init": "pissa"}, "olora": {"lora.init": "olora"},
    "lora+": {"optim.lora_plus_ratio": 16.0}, "full": {}}


@dataclass(frozen=True)
class Setting:
    """One point of a study, as the CSV has it."""
    study: str
    learning_rate: float
    batch: int                          # sequences of a step
    micro_batch: int                    # of them at once
    epochs: float
    variant: str = "lora"
    r: int = 4
    alpha: float = 1.0
    dropout: float = 0.05
    targets: str = "c_attn"
    bias: str = "lora_only"

    @property
    def name(self) -> str:
        """A folder's name that no other setting has; the study is not in it."""
        adapter = "" if self.variant == "full" else \
            f"_r{self.r}_a{self.alpha:g}_d{self.dropout:g}_{self.targets}_{self.bias}"
        return (f"{self.variant}{adapter}_lr{self.learning_rate:g}_e{self.epochs:g}_"
                f"b{self.batch}_m{self.micro_batch}")


def original(base: Setting) -> Iterator[Setting]:
    for r in (1, 2, 4, 8, 16):
        yield dataclasses.replace(base, r=r)
    for alpha in (0.25, 0.5, 2.0, 4.0, 8.0, 16.0):
        yield dataclasses.replace(base, alpha=alpha)
    for dropout in (0.0, 0.025, 0.1, 0.15, 0.2, 0.3):
        yield dataclasses.replace(base, dropout=dropout)


def pure(base: Setting) -> Setting:
    """The best alpha of the original, and nothing but A and B trained."""
    return dataclasses.replace(base, alpha=16.0, dropout=0.0, bias="none")


def rates(base: Setting, exponents: range) -> list[float]:
    """Learning rates a factor of 4 apart around the base's."""
    return [float(f"{base.learning_rate * 4.0 ** i:.3g}") for i in exponents]


def grid(base: Setting) -> Iterator[Setting]:
    for alpha in (1.0, 4.0, 16.0, 64.0):
        for lr in rates(base, range(-1, 5)):
            yield dataclasses.replace(pure(base), alpha=alpha, learning_rate=lr)


def variants(base: Setting) -> Iterator[Setting]:
    for variant in VARIANTS:
        for lr in rates(base, range(0, 3)):
            yield dataclasses.replace(pure(base), variant=variant, learning_rate=lr)


def ranks(base: Setting) -> Iterator[Setting]:
    for variant in ("lora", "rslora"):
        for r in (1, 4, 16, 64):
            yield dataclasses.replace(pure(base), variant=variant, r=r)


def targets(base: Setting) -> Iterator[Setting]:
    for names in ("c_attn.q+c_attn.k", "c_attn", "c_attn+attn.c_proj", "all-linear"):
        for lr in rates(base, range(0, 3)):
            yield dataclasses.replace(pure(base), targets=names, learning_rate=lr)


def budget(base: Setting) -> Iterator[Setting]:
    start = pure(base)
    for lr in rates(base, range(-1, 4)):
        yield dataclasses.replace(start, learning_rate=lr)
    for epochs in (0.5, 2.0, 4.0):
        yield dataclasses.replace(start, epochs=base.epochs * epochs)
    for times in (0.5, 2, 4):
        batch = max(1, round(base.batch * times))
        yield dataclasses.replace(start, batch=batch, micro_batch=batch)
    for micro_batch in (base.batch // 2, base.batch // 4):
        yield dataclasses.replace(start, micro_batch=max(1, micro_batch))


def untrained(base: Setting) -> Iterator[Setting]:
    """A step at learning rate zero: what it evaluates is the model as it came."""
    yield dataclasses.replace(base, learning_rate=0.0, epochs=1e-6)


STUDIES: dict[str, Callable[[Setting], Iterator[Setting]]] = {
    "base": untrained, "original": original, "grid": grid, "variants": variants, "ranks": ranks,
    "targets": targets, "budget": budget}

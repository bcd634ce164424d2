"""The training loop: one for pretraining and fine-tuning, for one CPU and for many GPUs.

    python train.py                                  the preset `demo`: offline, minutes on a laptop
    python train.py shakespeare --max_steps=500      any preset, any setting
    torchrun --nproc_per_node=8 train.py gpt2-124m   the same code, a process for each GPU
    python train.py --help                           every setting; the presets are in presets.py

    summary = train(TrainConfig(data="corpus", max_steps=100))        # from a notebook

The same command run again goes on where it stopped. What is where: a run's folder in report.py,
batches in data/loader.py, the network in model.py. Two things are exact here that are usually
approximate: the batch of step s depends on (data, seed, s) only, and a step's loss is the sum of
its token losses over its number of labelled tokens, over all micro-batches and ranks.
"""
import dataclasses
import difflib
import importlib
import math
import threading
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn.parallel import DistributedDataParallel

import checkpoint

import report
import sample
from bpe import Tokenizer
from config import flatten, option, parse, run_command
from data import loader, shards
from device import autocast, pick_dtype
from eval import hellaswag
from eval.loss import evaluate_loss, token_lengths
from launch import Processes, compiled, processes, stop_signals
from model import GPT, GPTConfig
from optim import OptimConfig, learning_rate, make_optimizer
from presets import DEFAULT_PRESET, PRESETS

SMALL_DATA = ("corpus", "shakespeare")      # made within a minute when a run asks for them
EVALUATION_TOKENS = 4096                    # at once, at least: small micro-batches would be slow


@dataclass(frozen=True)
class TrainConfig:
    out: str = option("out/run", "folder of the run; a run that is there goes on")
    data: str = option("corpus", "data set: a name under data/ or a folder of token shards")
    init_from: str = option("scratch", "scratch, gpt2, gpt2-medium, ..., a Hugging Face folder or "
                                       "a run: where the weights of a new run come from")
    seed: int = option(0, "of weights, batch order and dropout")
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = option(
        "auto", "of matrix products; auto is bfloat16 where the hardware has it, else float32")
    compile: Literal["auto", "on", "off"] = option(
        "auto", "torch.compile; auto: where there is a compiler and the run is long enough to pay")
    max_steps: int = option(0, "optimizer steps")
    epochs: float = option(0.0, "passes over the training data; where given, instead of max_steps")
    batch_tokens: int = option(524288, "tokens of a step, over all ranks and micro-batches")
    micro_batch: int = option(16, "sequences in memory at once on each rank, at most")
    learning_rate: float = option(6e-4, "peak learning rate")
    min_learning_rate: float = option(6e-5, "floor of the schedule")
    schedule: Literal["cosine", "linear", "constant", "wsd", "polynomial"] = option(
        "cosine", "after warmup; wsd is warmup-stable-decay")
    warmup_steps: int = option(0, "steps of linear warmup")
    warmup_ratio: float = option(0.0, "the same as a share of all steps; one of the two")
    weight_decay: float = option(0.1, "of matrices and embeddings; gains and biases have none")
    grad_clip: float = option(1.0, "largest norm of the gradient; 0: no clipping")
    recompute_activations: bool = option(False, "activation checkpointing: less memory, more time")
    eval_every: int = option(250, "steps between evaluations; 0: only at the end")
    eval_tokens: int = option(0, "tokens of an evaluation, spread over the split; 0: all")
    hellaswag_every: int = option(0, "steps between HellaSwag evaluations; 0: never")
    hellaswag_file: str = option("", "local HellaSwag file; empty: downloaded once")
    sample_every: int = option(0, "steps between samples; 0: only at the end")
    sample_tokens: int = option(128, "tokens of a sample; 0: no samples")
    sample_prompt: str = option("", "what a sample continues; empty: the start of a document")
    save_every: int = option(500, "steps between checkpoints; 0: only at the end")
    keep_last: int = option(2, "checkpoints kept: last.pt, last.1.pt, ...")
    log_every: int = option(10, "steps between looks at the device; each step is logged")
    max_minutes: float = option(0.0, "save and stop after this time; 0: no limit")
    report_to: Literal["none", "tensorboard"] = option("none", "besides log.jsonl and the screen")
    dry_run: bool = option(False, "say what would happen, in seconds, and train nothing")
    model: GPTConfig = option(GPTConfig(), "the network")
    optim: OptimConfig = option(OptimConfig(), "the optimizer")

    def __post_init__(self):
        for name in ("batch_tokens", "micro_batch", "log_every", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("max_steps", "epochs", "warmup_steps", "grad_clip", "eval_every", "save_every",
                     "weight_decay", "learning_rate", "min_learning_rate", "sample_tokens",
                     "max_minutes", "eval_tokens", "hellaswag_every", "sample_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if not self.max_steps and not self.epochs:
            raise ValueError("max_steps=0 and epochs=0: nothing to do; give one of them")
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError("warmup_steps and warmup_ratio are both given; give one")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio={self.warmup_ratio} is not in [0, 1]")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(f"min_learning_rate={self.min_learning_rate} is above "
                             f"learning_rate={self.learning_rate}; lower it, or raise the peak")


@dataclass(frozen=True)
class Data:
    """A prepared data set, and the tokenizer that made it where that is known."""
    meta: dict[str, Any]
    fingerprint: str
    tokenizer: Tokenizer | None
    train: shards.Tokens
    val: shards.Tokens

    @cached_property
    def lengths(self) -> torch.Tensor | None:
        return token_lengths(self.tokenizer) if self.tokenizer else None

    def validation(self, config: TrainConfig, world: Processes):
        """This rank's share of the validation split, as batches."""
        block_size = config.model.block_size
        return loader.evaluation_batches(
            self.val, block_size, max(config.micro_batch, EVALUATION_TOKENS // block_size),
            config.eval_tokens, world.rank, world.size)


def open_data(name: str, world: Processes) -> Data:
    """Open a data set; the two small ones are made on the spot if they are not there yet."""
    try:
        folder = shards.find(name)
    except FileNotFoundError:
        if name not in SMALL_DATA:
            raise
        if world.rank == 0:
            importlib.import_module(f"data.{name}").prepare()
    world.wait()
    folder = shards.find(name)
    meta, file = shards.read_meta(folder), folder / "tokenizer.json"
    tokenizer = Tokenizer.load(file) if file.exists() else None
    if tokenizer and meta["tokenizer_hash"] not in (None, tokenizer.hash):
        raise ValueError(f"{file} is not the tokenizer that made the shards beside it; "
                         f"prepare the data again")
    return Data(meta, shards.fingerprint(folder), tokenizer, shards.open_split(folder, "train"),
                shards.open_split(folder, "val"))


def base_model(config: TrainConfig, data: Data) -> tuple[GPT, TrainConfig]:
    """The network before training, and the config with the shape that it really has."""
    vocab_size, asked = data.meta["vocab_size"], config.model
    if config.init_from == "scratch":
        if asked.vocab_size not in (vocab_size, GPTConfig.vocab_size):
            raise ValueError(f"model.vocab_size={asked.vocab_size}, but the tokenizer of "
                             f"{config.data} has {vocab_size}; leave it out, training takes that")
        shape = dataclasses.replace(asked, vocab_size=vocab_size)
        with torch.device("meta" if config.dry_run else "cpu"):
            return GPT(shape), dataclasses.replace(config, model=shape)
    model, tokenizer = sample.load_model(config.init_from, dropout=asked.dropout)
    for field in dataclasses.fields(GPTConfig):
        value, has = getattr(asked, field.name), getattr(model.config, field.name)
        if value not in (field.default, has):
            raise ValueError(f"model.{field.name}={value}, but {config.init_from} has {has}; "
                             f"leave it out, init_from brings the shape")
    other = tokenizer and data.tokenizer and tokenizer.hash != data.tokenizer.hash
    if other or model.config.vocab_size != vocab_size:
        raise ValueError(f"{config.data} was made with another tokenizer than "
                         f"{config.init_from}'s; prepare it with --tokenizer={config.init_from}")
    return model, dataclasses.replace(config, model=model.config)


def hellaswag_items(config: TrainConfig, data: Data) -> list[hellaswag.Item]:
    """What the loop evaluates on; nothing where it does not."""
    if not config.hellaswag_every:
        return []
    if data.tokenizer is None:
        raise ValueError(f"hellaswag_every={config.hellaswag_every} needs a tokenizer, and "
                         f"{config.data} has none; put its tokenizer.json there")
    return hellaswag.load_items(config.hellaswag_file or None)


def counted(config: TrainConfig, batches: loader.WindowLoader) -> TrainConfig:
    """The config with epochs and warmup_ratio turned into steps."""
    steps = math.ceil(config.epochs * batches.windows / batches.per_step) or config.max_steps
    warmup = config.warmup_steps or round(config.warmup_ratio * steps)
    return dataclasses.replace(config, max_steps=steps, epochs=0.0, warmup_steps=warmup,
                               warmup_ratio=0.0)


def open_run(out: Path, config: TrainConfig, data: Data, world: Processes) -> dict[str, Any] | None:
    """Make the run's folder, or return the checkpoint of the same run that is there."""
    if world.rank == 0:
        try:
            out.mkdir(parents=True, exist_ok=True)
            (out / "log.jsonl").open("a").close()
        except OSError as error:
            raise PermissionError(f"out={out} cannot be written: {error.strerror}; choose another "
                                  f"--out") from None
    world.wait()
    state = checkpoint.load_last(out)
    if state:
        there, here = flatten(state["config"]), flatten(dataclasses.asdict(config))
        there["data"], here["data"] = state["data"], data.fingerprint
        for name in here:
            if there.get(name) != here[name] and (name in ("data", "seed", "batch_tokens")
                                                  or name.startswith("model.")):
                raise ValueError(f"{out} holds a run with {name}={there.get(name)}, this one has "
                                 f"{name}={here[name]}; choose another --out, or delete {out}")
        if state["step"] >= config.max_steps:
            return state                                            # finished, to be left alone
    if world.rank == 0:
        report.write_json(out / "config.json", dataclasses.asdict(config))
        report.write_json(out / "run.json", report.provenance(world.device, world.size,
                                                              data.fingerprint))
        if data.tokenizer:
            data.tokenizer.save(out / "tokenizer.json")
    return state


def train(config: TrainConfig) -> dict[str, Any]:
    """Train, or go on with the run in config.out. Returns the run's summary, as in run.json."""
    with processes(config.device) as world, stop_signals() as stop:
        return _train(config, world, stop)


def _train(config: TrainConfig, world: Processes, stop: threading.Event) -> dict[str, Any]:
    device, dtype, out = world.device, pick_dtype(config.dtype, world.device), Path(config.out)
    torch.manual_seed(config.seed)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")      # TF32 for what autocast leaves in float32

    # Data, then base weights -> optimizer -> resume -> DDP -> compile.
    data = open_data(config.data, world)
    model, config = base_model(config, data)
    batches = loader.WindowLoader(data.train, config.model.block_size, config.batch_tokens,
                                  config.micro_batch, config.seed, world.rank, world.size,
                                  pin=device.type == "cuda")
    config = counted(config, batches)
    if config.dry_run:
        return report.dry_run(config, model, batches, data.tokenizer, world.rank, world.size, dtype)
    items = hellaswag_items(config, data)               # now, so that it cannot fail days later
    state = open_run(out, config, data, world)
    if state and state["step"] >= config.max_steps:
        return report.finished(out, world.rank)
    model.to(device)
    model.recompute_activations = config.recompute_activations
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(model, config.optim, config.learning_rate, config.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step, best_loss = 0, float("inf")
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        step, best_loss = state["step"], state["best_loss"]
        state = None                                    # as large as all the above
    # `model` stays the plain module: it is evaluated, sampled and saved. `network` is trained.
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True) if world.size > 1 else None
    work = (config.max_steps - step) * config.batch_tokens / world.size * model.flops_per_token()
    network = compiled(ddp or model, config.compile, next(batches.batches(0)), work, world, dtype)

    log = report.RunLog(out, config, step, model.flops_per_token(), device, world.rank, world.size)
    log.say(f"{out}: {'from' if step == 0 else 'going on at'} step {step} of {config.max_steps}, "
            f"{model.num_params():,} parameters, {config.batch_tokens:,} tokens a step, "
            f"{world.size} x {report.device_name(device)}, {str(dtype).removeprefix('torch.')}"
            + (", compiled" if network is not (ddp or model) else ""))
    began, stopping, figures = time.monotonic(), False, {}
    while step < config.max_steps and not stopping:
        lr = learning_rate(step, config.schedule, config.max_steps, config.warmup_steps,
                           config.learning_rate, config.min_learning_rate, config.optim)
        for group in optimizer.param_groups:
            group["lr"] = lr
        # Dropout of a step depends on (seed, step, rank) only, as its batch does: nothing random
        # has to be saved to resume exactly.
        torch.manual_seed((config.seed * 1_000_003 + step) * world.size + world.rank)
        labels = batches.labels(step)
        loss = torch.zeros((), device=device)
        for i, (x, y) in enumerate(batches.batches(step)):
            if ddp:         # all-reduce with the last micro-batch only; to be set before forward
                ddp.require_backward_grad_sync = i == batches.accumulation - 1
            with autocast(device, dtype):
                _, nats = network(x.to(device, non_blocking=True), y.to(device, non_blocking=True),
                                  reduction="sum")
            # DDP averages over ranks; with this factor the average is sum / labels.
            scaler.scale(nats * (world.size / labels)).backward()
            loss += nats.detach() / labels
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(trainable, config.grad_clip or float("inf"))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        log.step(step, lr, loss, norm)

        def due(every: int) -> bool:
            return step == config.max_steps or (every > 0 and step % every == 0)

        evaluate, save = due(config.eval_every), due(config.save_every)
        if due(config.log_every) or evaluate or save:
            late = config.max_minutes and time.monotonic() - began > 60 * config.max_minutes
            stopping = log.flush(stop=stop.is_set() or bool(late)) and step < config.max_steps
        if evaluate:
            figures = evaluate_loss(model, data.validation(config, world), device, data.lengths,
                                    dtype)
            log.evaluation(step, figures)
            if figures["loss"] < best_loss:
                best_loss = figures["loss"]
                if world.rank == 0:
                    checkpoint.save(out / "best.pt", {"step": step, "model": model.state_dict(),
                                                      "config": dataclasses.asdict(config),
                                                      "val_loss": best_loss})
        if config.hellaswag_every and due(config.hellaswag_every):
            log.evaluation(step, hellaswag.evaluate(model, data.tokenizer, items, dtype=dtype))
        if config.sample_tokens and due(config.sample_every) and data.tokenizer and world.rank == 0:
            with autocast(device, dtype):
                log.sample(step, sample.continue_text(model, data.tokenizer, config.sample_prompt,
                                                      config.sample_tokens, seed=config.seed))
        if (save or stopping) and world.rank == 0:
            checkpoint.save_last(out, {
                "step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(), "best_loss": best_loss,
                "config": dataclasses.asdict(config), "data": data.fingerprint,
            }, keep=config.keep_last)
        if evaluate or save:
            log.lap(training=False)
    log.close()
    summary = report.finish(out, log, figures, best_loss, step, data.meta)
    if stopping:
        log.say(f"stopped and saved at step {step}; to go on: {report.this_command()}")
    else:
        log.say(f"draw its curve: {report.this_python()} -m experiments.plots {out} "
                f"--out={out}/curve.png")
    return summary


def main(words: list[str]) -> None:
    name = words[0] if words and not words[0].startswith("-") else DEFAULT_PRESET
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"there is no preset {name!r}; {hint}presets: {', '.join(PRESETS)}")
    config = parse(TrainConfig, words[words[:1] == [name]:], "train.py [PRESET]",
                   {"out": f"out/{name}", **PRESETS[name].settings}, PRESETS[name].about(__doc__))
    train(config)


if __name__ == "__main__":
    run_command(main)

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
import contextlib
import dataclasses
import difflib
import importlib
import math
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn as nn

from run import checkpoint
from run import watch as faults
import lora
from run import log as report
import sample
from run.classifier import Classifier, Pooling
from run.config import flatten, parse, run_command
from data import chat, sets, shards
from run.device import autocast, pick_dtype
from eval import hellaswag
from eval.fit import fit_report
from eval.loss import evaluate_loss, token_lengths
from run.processes import Processes, processes, repeatable, stop_signals
from fast.linear import use_fast_products
from lora import LoRAConfig
from model import GPT, GPTConfig
from optim import OptimConfig, learning_rate, make_optimizer
from run.parallel import Parallel, compiled, full
from run.load import grow_embedding, load_base
from run.presets import DEFAULT_PRESET, PRESETS

SMALL_DATA = ("corpus", "shakespeare", "pydocs")    # made within a minute when a run asks for them
FIT_TOKENS = 20_000         # of each split that the fit report reads
SAME = ("data", "seed", "batch_tokens", "init_from", "base", "packing", "pooling", "model.",
        "lora.")


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a run, as `python train.py --help` lists it. ValueError for what cannot be.
    """
    out: str = "out/run"  # folder of the run; a run that is there goes on
    data: str = "corpus"  # data set: a name under data/ or a folder, of token shards, conversations
        # or texts with classes
    init_from: str = "scratch"  # scratch, gpt2, gpt2-medium, ..., a Hugging Face folder or a run:
        # where the weights of a new run come from
    seed: int = 0  # of weights, batch order and dropout
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # of matrix products; auto is
        # bfloat16 where the hardware has it, else float32
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto: where there is a compiler
        # and the run is long enough to pay
    deterministic: bool = True  # the same bits each time, where PyTorch knows a way
    shard: Literal["none", "fsdp", "zero2"] = "none"  # split over the ranks: nothing; weights,
        # gradients and optimizer state; the last two
    max_steps: int = 0  # optimizer steps
    epochs: float = 0.0  # passes over the training data; where given, instead of max_steps
    batch_tokens: int = 524288  # tokens of a step, over all ranks and micro-batches
    micro_batch: int = 16  # sequences in memory at once on each rank, at most
    learning_rate: float = 6e-4  # peak learning rate
    min_learning_rate: float = 6e-5  # floor of the schedule
    schedule: Literal["cosine", "linear", "constant", "wsd", "polynomial"] = "cosine"
        # after warmup; wsd is warmup-stable-decay
    warmup_steps: int = 0  # steps of linear warmup
    warmup_ratio: float = 0.0  # the same as a share of all steps; one of the two
    weight_decay: float = 0.1  # of matrices and embeddings; gains and biases have none
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no clipping
    recompute_activations: bool = False  # activation checkpointing: less memory, more time
    template: str = "plain"  # how conversations are written: alpaca, plain, chatml, llama3 or none
    labels: Literal["all", "last"] = "all"  # which answers of a conversation are learned
    packing: bool = False  # several conversations in a row, instead of padding
    pooling: Pooling = "last"  # what a classifier reads: the last token's state, or the mean
    eval_every: int = 250  # steps between evaluations; 0: only at the end
    eval_tokens: int = 0  # tokens of an evaluation, spread over the split; 0: all
    patience: int = 0  # evaluations without a lower loss before the run ends; 0: no end
    hellaswag_every: int = 0  # steps between HellaSwag evaluations; 0: never
    hellaswag_file: str = ""  # local HellaSwag file; empty: downloaded once
    sample_every: int = 0  # steps between samples; 0: only at the end
    sample_tokens: int = 128  # tokens of a sample; 0: no samples
    sample_prompt: str = ""  # what a sample continues; empty: the start of a document
    save_every: int = 500  # steps between checkpoints; 0: only at the end
    keep_last: int = 2  # checkpoints kept: last.pt, last.1.pt, ...
    milestone_every: int = 0  # steps between checkpoints that stay: step_0001000.pt, ...; a
        # multiple of save_every; 0: none
    save_total_limit: int = 0  # milestones that stay, the newest; 0: all
    max_failed_saves: int = 3  # checkpoints in a row that may fail before the run stops
    max_bad_steps: int = 10  # steps in a row with a loss or gradient that is not finite before the
        # run stops; none of them is applied
    skip_spikes: float = 0.0  # skip a step whose loss is so many standard deviations above the last
        # 100; 0: never
    timeout_minutes: float = 30.0  # how long ranks wait for one that hangs
    log_every: int = 10  # steps between looks at the device; each step is logged
    max_minutes: float = 0.0  # save and stop after this time; 0: no limit
    report_to: Literal["none", "tensorboard"] = "none"  # besides log.jsonl and the screen
    dry_run: bool = False  # say what would happen, in seconds, and train nothing
    model: GPTConfig = GPTConfig()  # the network
    lora: LoRAConfig | None = None  # train an adapter instead of all weights
    optim: OptimConfig = OptimConfig()  # the optimizer

    def __post_init__(self):
        for name in ("batch_tokens", "micro_batch", "log_every", "keep_last", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("max_steps", "epochs", "warmup_steps", "grad_clip", "eval_every", "save_every",
                     "weight_decay", "learning_rate", "min_learning_rate", "sample_tokens",
                     "max_minutes", "eval_tokens", "hellaswag_every", "sample_every",
                     "patience", "milestone_every", "save_total_limit", "max_failed_saves",
                     "skip_spikes"):
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
        if self.lora and self.init_from == "scratch":
            raise ValueError("lora on init_from=scratch would adapt random weights; name a model, "
                             "--init_from=RUN or gpt2, or leave lora out")
        if self.timeout_minutes <= 0:
            raise ValueError(f"timeout_minutes={self.timeout_minutes} must be above 0")
        if self.milestone_every and (not self.save_every or self.milestone_every % self.save_every):
            raise ValueError(f"milestone_every={self.milestone_every} is no multiple of "
                             f"save_every={self.save_every}; a milestone is a checkpoint that "
                             f"stays")


def prepared(name: str, world: Processes) -> Path:
    """The folder of a data set, its files verified; a small one is made if it is not there yet."""
    try:
        folder = shards.find(name)
    except FileNotFoundError:
        if name not in SMALL_DATA:
            raise
        if world.rank == 0:
            importlib.import_module(f"data.{name}").prepare()
    world.wait()
    folder = shards.find(name)
    if world.rank == 0 and sets.kind(folder) == "tokens":
        shards.verify(folder, cached=True)
    world.wait()
    return folder


def base_and_data(config: TrainConfig, world: Processes):
    """The network before training, the data, and the config with the shape that it really has."""
    folder, asked = prepared(config.data, world), config.model
    kind = sets.kind(folder)
    if config.init_from == "scratch":
        if kind != "tokens":
            what = {"chat": "conversations", "classes": "texts with classes"}[kind]
            raise ValueError(f"data={config.data} holds {what}, and init_from=scratch has no words "
                             f"yet; name a model that writes, --init_from=RUN or gpt2")
        data = sets.TokenSet(folder)
        if asked.vocab_size not in (data.vocab_size, GPTConfig.vocab_size):
            raise ValueError(f"model.vocab_size={asked.vocab_size}, but the tokenizer of "
                             f"{config.data} has {data.vocab_size}; leave it out, training takes "
                             f"that")
        shape = dataclasses.replace(asked, vocab_size=data.vocab_size)
        with torch.device("meta" if config.dry_run else "cpu"):
            model = use_fast_products(GPT(shape))
        return model, data, dataclasses.replace(config, model=shape, template="")

    crop = asked.block_size if asked.block_size != GPTConfig.block_size else None
    model, tokenizer = load_base(config.init_from, asked.dropout, crop)
    for field in dataclasses.fields(GPTConfig):
        value, has = getattr(asked, field.name), getattr(model.config, field.name)
        if value not in (field.default, has):
            raise ValueError(f"model.{field.name}={value}, but {config.init_from} has {has}; "
                             f"leave it out, init_from brings the shape")
    if kind != "tokens" and tokenizer is None:
        raise ValueError(f"{config.init_from} has no tokenizer to read {config.data} with; put its "
                         f"tokenizer.json there")
    if kind == "classes":
        data = sets.ClassSet(folder, tokenizer, model.config.block_size)
        model, config = Classifier(model, data.classes, config.pooling), for_classes(config)
    elif kind == "chat":
        tokenizer = chat.extend_tokenizer(tokenizer, config.template)
        grow_embedding(model, tokenizer.vocab_size)
        data = sets.ChatSet(folder, tokenizer, config.template, model.config.block_size,
                            config.labels)
    else:
        data = sets.TokenSet(folder)
        other = tokenizer and data.tokenizer and tokenizer.hash != data.tokenizer.hash
        if other or model.config.vocab_size != data.vocab_size:
            raise ValueError(f"{config.data} was made with another tokenizer than "
                             f"{config.init_from}'s; prepare it with --tokenizer="
                             f"{config.init_from}")
    return model, data, dataclasses.replace(config, model=model.config, template=data.template)


def for_classes(config: TrainConfig) -> TrainConfig:
    """A classifier writes nothing. Its head is new, so it trains in full beside an adapter."""
    if config.hellaswag_every:
        raise ValueError(f"hellaswag_every={config.hellaswag_every} asks for a model that writes, "
                         f"and {config.data} makes a classifier; leave it out")
    adapter = config.lora
    if adapter and "head" not in adapter.modules_to_save:
        adapter = dataclasses.replace(adapter, modules_to_save=(*adapter.modules_to_save, "head"))
    return dataclasses.replace(config, lora=adapter, sample_tokens=0)


def hellaswag_items(config: TrainConfig, data: Any) -> list[hellaswag.Item]:
    """What the loop evaluates on; nothing where it does not."""
    if not config.hellaswag_every:
        return []
    if data.tokenizer is None:
        raise ValueError(f"hellaswag_every={config.hellaswag_every} needs a tokenizer, and "
                         f"{config.data} has none; put its tokenizer.json there")
    return hellaswag.load_items(config.hellaswag_file or None)


def counted(config: TrainConfig, batches: Any) -> TrainConfig:
    """The config with epochs and warmup_ratio turned into steps."""
    steps = config.epochs * batches.rows_per_epoch / batches.rows_per_step
    steps = math.ceil(steps) or config.max_steps
    warmup = config.warmup_steps or round(config.warmup_ratio * steps)
    return dataclasses.replace(config, max_steps=steps, epochs=0.0, warmup_steps=warmup,
                               warmup_ratio=0.0)


def claim(out: Path, keep_last: int, world: Processes, held: contextlib.ExitStack) -> None:
    """Make the run's folder, and hold it against other runs for as long as this one lasts."""
    if world.rank == 0:
        try:
            out.mkdir(parents=True, exist_ok=True)
            (out / "log.jsonl").open("a").close()
            held.enter_context(faults.locked(out))
            checkpoint.settle(out, keep_last)
        except OSError as error:
            raise PermissionError(f"out={out} cannot be written: {error.strerror}; choose another "
                                  f"--out") from None
    world.wait()


def open_run(out: Path, config: TrainConfig, data: Any, base: str, world: Processes
             ) -> dict[str, Any] | None:
    """The checkpoint of the same run, if there is one in the folder; else the start of a new."""
    state = checkpoint.load_last(out)
    if state:
        there, here = flatten(state["config"]), flatten(dataclasses.asdict(config))
        there.update(data=state["data"], base=state["base"])
        here.update(data=data.fingerprint, base=base)
        for name in {**there, **here}:
            if there.get(name) != here.get(name) and (
                    name in SAME or name.startswith(tuple(part for part in SAME if "." in part))):
                raise ValueError(f"{out} holds a run with {name}={there.get(name)}, this one has "
                                 f"{name}={here.get(name)}; choose another --out, or delete {out}")
        if finished(state, config):
            return state                                            # to be left alone
        report.changes(there, here, world.rank)
    if world.rank == 0:
        report.write_json(out / "config.json", dataclasses.asdict(config))
        report.write_json(out / "run.json", report.provenance(world.device, world.size,
                                                              data.fingerprint))
        if data.tokenizer:
            data.tokenizer.save(out / "tokenizer.json")
    return state


def finished(state: dict[str, Any], config: TrainConfig) -> bool:
    """Whether a run has taken its steps, or has not improved for `patience` evaluations."""
    return state["step"] >= config.max_steps or 0 < config.patience <= state["stale"]


def train(config: TrainConfig) -> dict[str, Any]:
    """Train, or go on with the run in config.out. Returns the run's summary, as in run.json.

    Losses in it are in nats per token. ValueError for settings that do not fit each other, the data
    or the run that is there; before anything is written.
    """
    with (processes(config.device, 1.2 * config.timeout_minutes) as world, stop_signals() as stop,
          repeatable(config.deterministic), contextlib.ExitStack() as held):
        return _train(config, world, stop, held)


def _train(config: TrainConfig, world: Processes, stop: threading.Event,
           held: contextlib.ExitStack) -> dict[str, Any]:
    device, dtype, out = world.device, pick_dtype(config.dtype, world.device), Path(config.out)
    torch.manual_seed(config.seed)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")      # TF32 for what autocast leaves in float32

    # Data and base weights -> LoRA, quantised -> DDP or FSDP -> optimizer -> resume -> compile.
    model, data, config = base_and_data(config, world)
    batches = data.loader(config, world, pin=device.type == "cuda")
    config = counted(config, batches)
    faults.agree(world, {**flatten(dataclasses.asdict(config)), "data": data.fingerprint,
                         "code": faults.code_hash(report.REPOSITORY), "torch": torch.__version__})
    weights = nn.Module.state_dict, nn.Module.load_state_dict       # what a checkpoint holds
    base = ""
    if config.lora:
        weights = lora.trainable_state, lora.load_trainable_state
        lora.add_lora(model, config.lora)
        base = model.adapters.base_hash
    if config.dry_run:
        return report.dry_run(config, model, batches, data, world, dtype)
    items = hellaswag_items(config, data)               # now, so that it cannot fail days later
    claim(out, config.keep_last, world, held)
    state = open_run(out, config, data, base, world)
    if state and finished(state, config):
        return report.finished(out, world.rank)
    model.to(device)
    model.recompute_activations = config.recompute_activations
    parallel = Parallel(model, world, config.shard, dtype, *weights)
    trainable = [p for p in model.parameters() if p.requires_grad]
    lengths = token_lengths(data.tokenizer) if data.tokenizer else None
    optimizer = make_optimizer(model, config.optim, config.learning_rate, config.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    step, best_loss, stale, recent = 0, math.inf, 0, []
    if state:
        parallel.load(optimizer, state)
        scaler.load_state_dict(state["scaler"])
        step, best_loss = state["step"], state["best_loss"]
        stale, recent = state["stale"], state["recent"]
        state = None                                    # as large as all the above
    # Of the whole run, not of what is left: one that goes on has to compute as it did before.
    work = config.max_steps * config.batch_tokens / world.size * model.flops_per_token()
    network = compiled(parallel, config.compile, batches, work, world, dtype)

    saver = checkpoint.Saver(out, config.keep_last, config.save_total_limit,
                             config.max_failed_saves)
    watch = held.enter_context(faults.Watch(world, config.timeout_minutes))
    log = report.RunLog(out, config, step, model.flops_per_token(), device, world, recent)
    log.say(f"{out}: {'from' if step == 0 else 'going on at'} step {step} of {config.max_steps}, "
            f"{model.num_params():,} parameters, {config.batch_tokens:,} tokens a step, "
            f"{world.size} x {report.device_name(device)}, {str(dtype).removeprefix('torch.')}"
            + (", compiled" if network is not parallel.network else ""))
    if data.template:
        log.say(f"{data.train.summary()}; {batches.wasted:.1%} of what is computed is padding")
    began, stopping, early, figures = time.monotonic(), False, False, {}
    while step < config.max_steps and not stopping and not early:
        lr = learning_rate(step, config.schedule, config.max_steps, config.warmup_steps,
                           config.learning_rate, config.min_learning_rate, config.optim)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        # Dropout of a step depends on (seed, step, rank) only, as its batch does: nothing random
        # has to be saved to resume exactly.
        torch.manual_seed((config.seed * 1_000_003 + step) * world.size + world.rank)
        watch.at(step, "computing")
        labels = max(1, batches.labels(step))
        loss = torch.zeros((), device=device)
        for i, batch in enumerate(batches.batches(step)):
            last = i == batches.accumulation - 1
            parallel.sync(last)
            with autocast(device, dtype):
                _, nats = network(*(part.to(device, non_blocking=True) for part in batch),
                                  reduction="sum")
            # Ranks are averaged; with this factor the average is sum / labels. A loss that is not
            # finite makes every gradient NaN, so that all ranks come to know of it.
            weight = torch.where(nats.isfinite(), world.size / labels, math.nan)
            if last:
                watch.at(step, "reducing")
            nats.backward(scaler.scale(weight))
            loss += nats.detach() / labels
        scaler.unscale_(optimizer)
        norm = full(torch.nn.utils.clip_grad_norm_(trainable, config.grad_clip or math.inf))
        skip = ~norm.isfinite()
        if config.skip_spikes:                          # all ranks must decide alike
            skip |= log.spikes.score(world.sum(loss.clone()).item()) > config.skip_spikes
        update(optimizer, scaler, skip)
        optimizer.zero_grad(set_to_none=True)
        step += 1
        log.step(step, lr, loss, norm, skip)

        def due(every: int) -> bool:
            return step == config.max_steps or (every > 0 and step % every == 0)

        evaluate, save, best = due(config.eval_every), due(config.save_every), False
        if due(config.log_every) or evaluate or save:
            late = config.max_minutes and time.monotonic() - began > 60 * config.max_minutes
            stopping = log.flush(stop=stop.is_set() or bool(late)) and step < config.max_steps
            saver.check()
            if log.bad_steps >= config.max_bad_steps:
                saver.wait()
                raise FloatingPointError(report.bad_steps(out, log.bad_steps, step, batches))
        watch.at(step, "evaluating")
        sampling = config.sample_tokens and data.tokenizer and (
            due(config.sample_every) or bool(data.prompts) and evaluate)
        scoring = config.hellaswag_every and due(config.hellaswag_every)
        plain = parallel.whole() if evaluate or scoring or sampling else None
        if evaluate:
            figures = evaluate_loss(plain, data.validation(config, world), device, lengths, dtype)
            log.evaluation(step, figures)
            best, best_loss = figures["loss"] < best_loss, min(figures["loss"], best_loss)
            stale = 0 if best else stale + 1
            early = 0 < config.patience <= stale
        if scoring:
            log.evaluation(step, hellaswag.evaluate(plain, data.tokenizer, items, dtype=dtype))
        if sampling and world.rank == 0:
            with autocast(device, dtype):
                log.sample(step, written(plain, data, config))
        plain = None                                    # under FSDP it is a copy
        save |= stopping or early
        if save or best:
            watch.at(step, "saving")
            state = {"step": step, **parallel.state(optimizer), "scaler": scaler.state_dict(),
                     "best_loss": best_loss, "stale": stale, "recent": log.spikes.recent,
                     "config": dataclasses.asdict(config), "data": data.fingerprint, "base": base}
            if world.rank == 0:
                saver.save(state, last=save, best=best, milestone=config.milestone_every > 0
                           and step % config.milestone_every == 0)
            state = None
        if evaluate or save:
            log.lap(training=False)
    saver.close()
    if data.template and not stopping:
        plain = parallel.whole()
        if world.rank == 0:
            fit = fit_report(plain, data.train, data.val, limit=FIT_TOKENS, dtype=dtype)
            log.say(f"the model {fit['verdict']}")
            figures = {**figures, "fit": fit}
    log.close()
    summary = report.finish(out, log, figures, best_loss, step, data.unigram_entropy)
    if early:
        log.say(f"ended at step {step}: {stale} evaluations without a lower loss; best.pt has "
                f"validation loss {best_loss:.4f}")
    if stopping:
        log.say(f"stopped and saved at step {step}; to go on: {report.this_command()}")
    else:
        log.say(f"draw its curve: {report.this_python()} -m experiments.plots {out} "
                f"--out={out}/curve.png")
    return summary


def written(model: GPT, data: Any, config: TrainConfig) -> str:
    """What the model writes: answers to the data's prompts, or a text."""
    if not data.prompts:
        return sample.continue_text(model, data.tokenizer, config.sample_prompt,
                                    config.sample_tokens, seed=config.seed)
    return "\n".join(
        f"> {prompt[-1]['content']}\n" + sample.chat_reply(
            model, data.tokenizer, prompt, data.template, config.sample_tokens, temperature=0)
        for prompt in data.prompts)


def update(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
           skip: torch.Tensor) -> None:
    """Take the optimizer's step, except where `skip` (a bool on the device) says not to."""
    if getattr(optimizer, "_step_supports_amp_scaling", False) and not scaler.is_enabled():
        optimizer.found_inf = skip.float()              # read by the fused kernel: no wait for it
        optimizer.step()
    elif not skip:
        scaler.step(optimizer)
    scaler.update()                                     # float16: it learns from overflows


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

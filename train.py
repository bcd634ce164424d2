"""The training loop: one for pretraining and fine-tuning, for one CPU and for many GPUs.

    python train.py                                  the preset `demo`: offline, minutes on a laptop
    python train.py shakespeare --max_steps=500      any preset, any setting
    torchrun --nproc_per_node=8 train.py gpt2-124m   the same code, a process for each GPU
    python train.py --help                           every setting; presets are in run/presets.py

    summary = train(TrainConfig(data="corpus", max_steps=100))        # from a notebook
    summary["val_loss"]

The same command run again goes on where it stopped. The settings come first, then `train`, whose
loop is the core of the project; notebooks/03_training.ipynb has it in 20 lines (`fit`). What stands
around the loop is in run/, batches in data/, the network in model.py. Two things are exact here
that are usually approximate: the batch of step s depends on (data, seed, s) only, and a step's loss
is the sum of its token losses over its number of labelled tokens, over all micro-batches and ranks.
"""
if __name__ == "__main__":
    from run.config import interruptible
    interruptible()
import dataclasses
import math
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from data.sets import find_or_make, open_data
from eval import hellaswag
from eval.fit import fit_report
from eval.loss import evaluate_data
from fast.attention import any_shape
from fast.linear import use_fast_products
from lora import LoRAConfig, add_lora, say
from model import GPTConfig
from optim import SCHEDULES, OptimConfig, learning_rate, make_optimizer, take_step
from run import plan, resume
from run.checkpoint import Saver
from run.classifier import Pooling
from run.config import check_finite, flatten, parse, run_command
from run.device import autocast, pick_dtype, settled
from run.inside import Inside
from run.load import load_start, model_for
from run.log import RunLog
from run.parallel import Parallel, compiled, full
from run.presets import chosen_preset, follow
from run.profile import SKIPPED, Profiler
from run.processes import Processes, StopRequest, deterministic, processes, stop_signals
from run.watch import Watch, check_same_start, code_hash
from sample import preview


@dataclass(frozen=True)
class TrainConfig:
    """Every setting of a run, as `train.py --help` lists it. ValueError for what cannot be."""
    out: str = "out/run"  # folder of the run; a run that is there goes on
    data: str = "corpus"  # data set: a name under data/ or a folder, of token shards, conversations
        # or texts with classes; several of tokens by weight: fineweb:0.7,mine:0.3
    init_from: str = "scratch"  # scratch, gpt2, gpt2-medium, ..., a Hugging Face folder or a run:
        # where the weights of a new run come from
    seed: int = 0  # of weights, batch order and dropout
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # of matrix products; auto is
        # bfloat16 where the hardware has it, else float16 on GPUs, else float32
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto: where it works and pays
    deterministic: bool = True  # the same bits each time; on a GPU it costs speed
    shard: Literal["none", "fsdp", "zero2"] = "none"  # split over the ranks: nothing; weights,
        # gradients and optimizer state; the last two
    max_steps: int = 0  # optimizer steps
    epochs: float = 0.0  # passes over the training data; where given, instead of max_steps
    batch_tokens: int = 524288  # tokens of a step, over all ranks and micro-batches, with padding
    micro_batch: int = 16  # sequences in memory at once on each rank, at most
    learning_rate: float = 6e-4  # peak learning rate
    min_learning_rate: float = 6e-5  # floor of the schedule; keeps its share of another peak
    schedule: Literal[tuple(SCHEDULES)] = "cosine"  # after warmup; wsd is warmup-stable-decay
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
    skip_spikes: float = 0.0  # skip steps with a loss so many sigmas above the last 100; 0: never
    timeout_minutes: float = 30.0  # how long ranks wait for one that hangs
    log_every: int = 10  # steps between looks at the device, or 10 seconds; each step is logged
    max_minutes: float = 0.0  # save and stop after this time; 0: no limit
    report_to: Literal["none", "tensorboard"] = "none"  # besides log.jsonl and the screen
    watch_every: int = 0  # steps between looks inside the blocks (run/inside.py); 0: never
    profile: int = 0  # steps whose time is told by parts (run/profile.py); 0: none
    dry_run: bool = False  # say what would happen, in seconds, and train nothing
    model: GPTConfig = GPTConfig()  # the network
    lora: LoRAConfig | None = None  # train an adapter instead of all weights
    optim: OptimConfig = OptimConfig()  # the optimizer

    def __post_init__(self):
        for name, value in flatten(dataclasses.asdict(self)).items():
            check_finite(name, value)
        for name, value in vars(self).items():
            least = int(name in ("batch_tokens", "micro_batch", "log_every", "keep_last",
                                 "max_bad_steps"))
            if isinstance(value, (int, float)) and value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        for name, most in (("seed", 2**32 - 1), ("keep_last", 100), ("batch_tokens", 2**32),
                           ("warmup_ratio", 1)):
            if getattr(self, name) > most:
                raise ValueError(f"{name}={getattr(self, name)} must be at most {most}")
        if not self.out:
            raise ValueError("out is empty; give --out=FOLDER")
        if not self.max_steps and not self.epochs:
            raise ValueError("max_steps=0 and epochs=0: nothing to do; give one of them")
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError("warmup_steps and warmup_ratio are both given; give one")
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(f"min_learning_rate={self.min_learning_rate} is above "
                             f"learning_rate={self.learning_rate}; lower it, or raise the peak")
        if self.lora and self.init_from == "scratch":
            raise ValueError("lora on init_from=scratch would adapt random weights; name a model")
        if self.shard != "none" and self.optim.optimizer == "galore":
            raise ValueError(f"shard={self.shard} splits matrices, and optim.optimizer=galore "
                             f"decomposes whole ones; leave one of the two out")
        if 0 < self.max_steps < SKIPPED + self.profile and self.profile:
            raise ValueError(f"profile={self.profile} begins after {SKIPPED} steps, and max_steps="
                             f"{self.max_steps}; take fewer")
        if self.timeout_minutes <= 0:
            raise ValueError(f"timeout_minutes={self.timeout_minutes} must be above 0")
        if self.milestone_every and (not self.save_every or self.milestone_every % self.save_every):
            raise ValueError(f"milestone_every={self.milestone_every} is no multiple of "
                             f"save_every={self.save_every}; a milestone is a save that stays")


def train(config: TrainConfig) -> dict[str, Any]:
    """Train, or go on with the run in config.out. Returns the run's summary: its folder, how it was
    made, and its last figures, losses in nats per token.

    ValueError for settings that do not fit each other, the data or the run that is there; before
    anything is written. A run that a signal stopped has the signal's number under "stopped_by".
    """
    with (processes(config.device, 1.2 * config.timeout_minutes) as world, stop_signals() as stop,
          deterministic(config.deterministic, world.device), ExitStack() as held):
        return _train(config, world, stop, held)


def _train(config: TrainConfig, world: Processes, stop: StopRequest, held: ExitStack) -> dict:
    device, dtype, out = world.device, pick_dtype(config.dtype, world.device), Path(config.out)
    torch.manual_seed(config.seed)                      # below: TF32 for what autocast leaves
    torch.set_float32_matmul_precision("high" if device.type == "cuda" else "highest")
    # Data and base weights -> LoRA, quantised -> DDP or FSDP -> optimizer -> resume -> compile.
    folder = find_or_make(config.data, world, config.dry_run)
    start, tokenizer = load_start(config)
    data = open_data(folder, config, tokenizer, start.config.block_size if start
                     else config.model.block_size)
    model = use_fast_products(model_for(data, start, config))
    config = resume.with_shape(config, model, data, world.rank)
    batches = data.loader(config, world, pin=device.type == "cuda")
    config = resume.with_step_counts(config, batches)
    check_same_start(world, {**flatten(dataclasses.asdict(config)), "data": data.fingerprint,
                             "code": code_hash(), "torch": torch.__version__})
    if config.lora:
        add_lora(model, config.lora)
        say(plan.first_step(model, config.lora, config.learning_rate * config.optim.lora_plus_ratio))
    # Read now, so that a missing file cannot end the run days later.
    items = hellaswag.items_of_run(config, data.tokenizer)
    if config.dry_run:
        return plan.dry_run(config, model, batches, data, world, dtype)
    resume.hold_folder(out, config.keep_last, world, held)
    base = model.adapters.base_hash if config.lora else ""
    state, progress = resume.find_checkpoint(out, config, data, base, world)
    if progress.finished(config):
        return resume.finished_summary(out, world.rank)
    resume.write_start(out, config, data, world)
    model.to(device)
    model.recompute_activations = config.recompute_activations
    parallel = Parallel(model, world, config.shard, dtype)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(model, config.optim, config.learning_rate, config.weight_decay,
                               dtype)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if state:
        parallel.load(optimizer, state, out)
        scaler.load_state_dict(state["scaler"] or scaler.state_dict())
    state = None                                        # as large as all the above
    # Of the whole run, not of what is left: one that goes on has to compute as it did before.
    work = config.max_steps * config.batch_tokens / world.size * model.flops_per_token()
    held.enter_context(any_shape(not batches.one_shape))
    network = compiled(parallel, config.compile, batches, work, world, dtype)
    fixed = parallel.same_when_evaluated(network, batches) and not config.packing
    step, ended, figures = progress.step, "", {}
    saver = Saver(out, config.keep_last, config.save_total_limit, config.max_failed_saves,
                  progress.best_loss)
    watch = held.enter_context(Watch(world, config.timeout_minutes))
    log = RunLog(out, config, step, model.flops_per_token(), batches, world, progress.recent)
    log.begin(model.num_params(), dtype, network is not parallel.network)
    inside = Inside(parallel.model, config, world, dtype, log)
    profiler = Profiler(out, config, step, log)
    if data.template:
        log.say(data.train.summary())
    held.enter_context(settled(device))
    began = time.monotonic()

    def due(every: int) -> bool:
        return step == config.max_steps or (every > 0 and step % every == 0)

    while step < config.max_steps and not ended:
        lr = learning_rate(step, config.schedule, config.max_steps, config.warmup_steps,
                           config.learning_rate, config.min_learning_rate, config.optim)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        # Dropout of a step depends on (seed, step, rank) only, as its batch does: nothing random
        # has to be saved to resume exactly.
        torch.manual_seed((config.seed * 1_000_003 + step) * world.size + world.rank)
        watch.at(step, "computing")
        labels = max(1, batches.labels(step))           # of all micro-batches and ranks
        loss = torch.zeros((), device=device)
        for i, batch in enumerate(profiler.batches(batches.batches(step))):
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
        with inside.look(step + 1, lr, batch):
            take_step(optimizer, scaler, skip)
        optimizer.zero_grad(set_to_none=True)
        step += 1
        log.step(step, lr, loss, norm, skip)
        profiler.step(step)

        evaluating, saving, better = due(config.eval_every), due(config.save_every), False
        scoring = config.hellaswag_every > 0 and due(config.hellaswag_every)
        sampling = config.sample_tokens and data.tokenizer and (
            due(config.sample_every) or bool(data.prompts) and evaluating)
        if due(log.every) or evaluating or scoring or sampling or saving:
            late = 0 < config.max_minutes < (time.monotonic() - began) / 60
            late, stopped = log.flush(late, stop.is_set())
            if (late or stopped) and step < config.max_steps:
                ended = "signal" if stopped else "max_minutes"
            saver.check()
            if log.bad_steps >= config.max_bad_steps:
                saver.wait()
                raise FloatingPointError(resume.about_bad_steps(out, log.bad_steps, step, batches))
        watch.at(step, "evaluating")
        if evaluating or scoring or sampling:
            whole = parallel.whole()
            if evaluating:
                figures = evaluate_data(whole, data, config, world, dtype, fixed)
                log.evaluation(step, figures)
                saver.wait()                            # is best.pt the one before, or the new one?
                better = figures["loss"] < world.from_first(saver.best_loss)
                progress.stale = 0 if better else progress.stale + 1
                if 0 < config.patience <= progress.stale:
                    ended = "patience"
            if scoring:
                log.evaluation(step, hellaswag.evaluate(whole, data.tokenizer, items, dtype=dtype))
            if sampling and world.rank == 0:
                with autocast(device, dtype):
                    log.sample(step, preview(whole, data, config))
            del whole                                   # under FSDP it is a copy
        saving |= bool(ended)
        if saving or better:
            watch.at(step, "saving")
            saver.wait()
            parallel.check_finite(world)
            state = {"step": step, **parallel.state(optimizer), "scaler": scaler.state_dict(),
                     "best_loss": figures["loss"] if better else saver.best_loss,
                     "stale": progress.stale, "recent": log.spikes.recent,
                     "threads": torch.get_num_threads(), "config": dataclasses.asdict(config),
                     "data": data.fingerprint, "base": base}
            if world.rank == 0:
                log.sync()
                milestone = config.milestone_every > 0 and step % config.milestone_every == 0
                saver.save(state, last=saving, best=better, milestone=milestone)
            state = None
        if evaluating or scoring or sampling or saving:
            log.lap(training=False)
    saver.close()
    progress.step, progress.best_loss = step, world.from_first(saver.best_loss)
    if data.template and ended in ("", "patience"):
        whole = parallel.whole()
        if world.rank == 0:
            fit = fit_report(whole, data.train, data.val, limit=20_000, dtype=dtype)    # tokens
            log.say(f"the model {fit['verdict']}")
            figures = {**figures, "fit": fit}
    log.close()
    return resume.finish(out, log, data, progress, figures, ended, stop.number)


def main(words: list[str]) -> None:
    name, preset, words = chosen_preset(words)
    config = parse(TrainConfig, words, "train.py [PRESET]",
                   {"out": f"out/{name}", **preset.settings}, preset.about(__doc__), follow)
    summary = train(config)
    if "stopped_by" in summary:                         # `train.py && next` must not go on
        raise SystemExit(128 + summary["stopped_by"])


if __name__ == "__main__":
    run_command(main)

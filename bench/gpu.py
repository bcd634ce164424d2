"""All that is to be known of a GPU, in one command of at most ten minutes.

    python -m bench.gpu [--nanogpt=CHECKOUT] [--build_nanogpt=CHECKOUT]
    python -m bench.gpu --device=cpu --tiny             to try it

Parts, the most important first: limits of products and memory; steps beside peers; two strict runs,
and a killed one, bit for bit; graph breaks, recompilations, host waits; generation; a checkpoint's
stop; optimizers; adapters beside PEFT; HellaSwag. Each has its share of --minutes, and what it
leaves is the next one's. bench/results/gpu-CARD.json is written after each part, so that a run that
is cut keeps what it has. A contestant has the best of the micro-batches that fit.
"""
import importlib.util
import multiprocessing
import re
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Literal

import torch

from bench import kills, lora, saves, versus_peers
from bench.machine import (Row, machine_state, matmul_peak, memory_bandwidth, publish, seconds,
                           table, where)
from bench.peers import LOOSE, OURS, PEERS, SHAPES, our_step, random_batch
from eval.hellaswag import Question, score_questions
from model import GPT
from optim import OptimConfig, make_optimizer, take_step
from run.config import parse, run_command
from run.device import device_name, has_compiler, peak_flops, pick_device, pick_dtype
from run.processes import deterministic

MICRO_BATCHES = (64, 32, 16, 8, 4)


@dataclass(frozen=True)
class GPUConfig:
    device: str = "auto"  # auto, cpu, cuda
    minutes: float = 10.0  # for all parts together
    tiny: bool = False  # tiny networks, all in one process, not compiled: to try the benchmark
    parts: tuple[Literal["limits", "steps", "exact", "waits", "generation", "saves", "optimizers",
                         "larger", "adapters", "hellaswag"], ...] = ()  # empty: all
    nanogpt: str = ""  # a checkout of nanoGPT; empty: without it
    build_nanogpt: str = ""  # a checkout of build-nanogpt; empty: without it
    save: bool = True  # write bench/results/gpu-CARD.json


@dataclass(frozen=True)
class Place:
    """Where a part measures, and until when."""
    config: GPUConfig
    kind: str                                           # cpu or cuda
    dtype: str                                          # of the products
    until: float                                        # of time.monotonic

    @property
    def shape(self) -> str:
        return "tiny" if self.config.tiny else "124M"

    @property
    def mode(self) -> str:
        return "compiled" if has_compiler(torch.device(self.kind)) and not self.config.tiny \
            else "eager"

    def measured(self, function: Callable[..., Row], *given: Any) -> Row:
        """What function(*given) returns, in a process of its own that ends with the part's time; a
        row that says why where there is none."""
        try:
            if self.config.tiny:
                return function(*given)
            with multiprocessing.get_context("spawn").Pool(1) as pool:      # which ends it, too
                return pool.apply_async(function, given).get(max(1, self.until - time.monotonic()))
        except multiprocessing.TimeoutError:
            return {"missing": "no time was left"}
        except Exception as error:                      # whatever a card may not be able to do
            return {"missing": f"{type(error).__name__}: {str(error)[:200]}"}


def measure_limits(kind: str, dtype: str) -> Row:
    device = pick_device(kind)
    return {"what": device_name(device), **{
        f"TFLOP/s in {name}": matmul_peak(device, getattr(torch, name)) / 1e12
        for name in dict.fromkeys((dtype, "float32"))}, "GB/s": memory_bandwidth(device) / 1e9}


def step_row(place: Place, shape: str, who: str) -> Row:
    """A contestant's best of the micro-batches that fit: the first, and of 124M smaller ones while
    they are faster."""
    checkout = {"nanoGPT": place.config.nanogpt, "build-nanogpt": place.config.build_nanogpt}
    best: Row = {}
    for micro_batch in (2,) if place.config.tiny else MICRO_BATCHES:
        row = place.measured(versus_peers.measure, shape, who, place.dtype, place.mode, place.kind,
                             1 if place.config.tiny else 5, micro_batch, checkout.get(who, ""))
        faster = row.get("tokens_per_s", 0) > best.get("tokens_per_s", 0)
        best = row if faster or not best else best
        if "missing" in row and "memory" not in row["missing"] or \
                "missing" not in row and (shape != "124M" or not faster):
            break
    if "missing" in best:
        return {"what": shape, "who": who, **best}
    peak = peak_flops(torch.device(place.kind))
    return {"what": shape, **{key: best[key] for key in (
        "who", "mode", "micro_batch", "ms", "tokens_per_s", "memory_mib")},
        "of_products": best["tokens_per_s"] * best["work"] / best["limit"],
        **({"mfu": best["tokens_per_s"] * best["work"] / peak} if peak else {})}


def steps(place: Place) -> Iterator[Row]:
    here = {"nanoGPT": place.config.nanogpt, "build-nanogpt": place.config.build_nanogpt,
            "transformers": importlib.util.find_spec("transformers")}
    for who in (LOOSE, OURS, *PEERS):
        if here.get(who, True):
            yield step_row(place, place.shape, who)


def larger(place: Place) -> Iterator[Row]:
    for shape in () if place.config.tiny else ("350M", "1558M"):
        for who in (LOOSE, "nanoGPT") if place.config.nanogpt else (LOOSE,):
            yield step_row(place, shape, who)


def exact(place: Place) -> Iterator[Row]:
    """Runs of 50 steps in this precision, strict: two in peace and one that is killed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        large = not place.config.tiny
        settings = {**kills.settings_of("pretraining", folder), "device": place.kind,
                    "max_steps": 50, "dtype": place.dtype, "deterministic": True,
                    "compile": "on" if place.mode == "compiled" else "off",
                    **(dict(batch_tokens=16 * 256, micro_batch=8, model=dict(
                        block_size=256, n_layer=4, n_head=8, n_embd=512, dropout=0.1))
                       if large else {})}

        def start(out: str) -> Any:
            return kills.start(kills.run, 1, {**settings, "out": str(folder / out)})[0]

        for out in ("one", "two", "killed"):
            process = start(out)
            if out == "killed":
                while process.is_alive() and not (folder / out / "last.pt").exists():
                    time.sleep(0.01)
                process.kill()
                process.join()
                process = start(out)
            process.join(max(1, place.until - time.monotonic()))
            if process.exitcode != 0:
                process.kill()
                said = (folder / f"{out}.txt").read_text().splitlines() or [""]
                yield {"what": out, "missing": f"exit code {process.exitcode}: {said[-1][:200]}"}
                return
            if out != "one":
                wrong = kills.differences(folder / "one", folder / out)
                yield {"what": f"{out} against one in peace, 50 steps", "differences": len(wrong),
                       "first": wrong[0] if wrong else ""}


def measure_waits(shape: str, kind: str, dtype: str, mode: str, micro_batch: int) -> Row:
    """Graphs, breaks and recompilations of our strict step, and where the host waits in 5 steps."""
    from torch._dynamo.utils import counters
    device, config = pick_device(kind), SHAPES[shape][0]
    with deterministic(True, device):
        counters.clear()
        run = our_step(config, *random_batch(config, micro_batch, device), device,
                       getattr(torch, dtype), mode)
        run.step()
        graphs = counters["stats"]["unique_graphs"]
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            if kind == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
            for _ in range(5):
                run.step()
            if kind == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    waits = [one for one in found if "called a synchronizing" in str(one.message)]
    return {"what": shape, "mode": mode, "graphs": graphs,
            "graph_breaks": sum(counters["graph_break"].values()),
            "recompilations": counters["stats"]["unique_graphs"] - graphs, "host_waits": len(waits),
            "first": f"{Path(waits[0].filename).name}:{waits[0].lineno}" if waits else ""}


def generation(place: Place) -> Iterator[Row]:
    for what in ("generate-tiny",) if place.config.tiny else ("generate", "generate-32"):
        for who, mode in {(OURS, "recorded"): 0, (OURS, f"recorded {place.mode}"): 0,
                          (OURS, "eager"): 0, ("transformers", "eager"): 0}:
            if who == OURS or importlib.util.find_spec("transformers"):
                row = place.measured(versus_peers.measure, what, who, place.dtype, mode, place.kind,
                                     1 if place.config.tiny else 3)
                yield row if "missing" in row else {
                    "what": what, "who": who, "mode": mode, "tokens_per_s": row["tokens_per_s"],
                    "memory_mib": row["memory_mib"],
                    "of_bandwidth": row["tokens_per_s"] * row["work"] / row["limit"]}


def measure_saves(shape: str, kind: str, compile: str) -> Row:
    device = pick_device(kind)
    with tempfile.TemporaryDirectory() as folder:
        row = saves.measure(saves.SavesConfig(shape=shape, repeats=2, compile=compile), device,
                            Path(folder))
    return {"what": shape, "GB": row["bytes"] / 1e9,
            **{f"{name}, ms": 1000 * taken for name, taken in row["seconds"].items()}}


def measure_optimizer(shape: str, kind: str, name: str) -> Row:
    device = pick_device(kind)
    with device:
        model = GPT(SHAPES[shape][0])
    optimizer = make_optimizer(model, OptimConfig(optimizer=name), 1e-4, 0.1)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    scaler = torch.amp.GradScaler(kind, enabled=False)
    keep = torch.zeros((), dtype=torch.bool, device=device)
    return {"what": shape, "optimizer": name,
            "ms": 1000 * seconds(lambda: take_step(optimizer, scaler, keep), device)}


def adapters(place: Place) -> Iterator[Row]:
    config = lora.LoRABenchConfig(shape=place.shape, batch=2 if place.config.tiny else 32,
                                  repeats=1 if place.config.tiny else 5, device=place.kind)
    for variant in ("lora", "dora", "qlora"):
        for side in lora.SIDES[:2] if importlib.util.find_spec("peft") else ("ours",):
            row = place.measured(lora.measure, variant, side, config)
            yield {"what": variant, "side": side, **row}


def measure_hellaswag(shape: str, kind: str, dtype: str, items: int) -> Row:
    """Items as long as HellaSwag's are on average, of random tokens."""
    device, config = pick_device(kind), SHAPES[shape][0]
    with device:
        model = GPT(config)
    ids = torch.randint(config.vocab_size, (items, 160 if shape != "tiny" else 32)).tolist()
    end = len(ids[0]) // 6                              # four endings of it
    questions = [Question(tuple(row[4 * end:]), [row[j * end:(j + 1) * end] for j in range(4)],
                          list(range(4 * i, 4 * i + 4))) for i, row in enumerate(ids)]
    taken = seconds(lambda: score_questions(model, questions, dtype=getattr(torch, dtype)), device,
                    2)
    return {"what": shape, "items": items, "items_per_s": items / taken}


PARTS: dict[str, tuple[Callable[[Place], Iterable[Row]], float]] = {     # and share of the time
    "limits": (lambda on: [on.measured(measure_limits, on.kind, on.dtype)], 0.03),
    "steps": (steps, 0.37), "exact": (exact, 0.1),
    "waits": (lambda on: [on.measured(measure_waits, on.shape, on.kind, on.dtype, on.mode,
                                      2 if on.config.tiny else 16)], 0.05),
    "generation": (generation, 0.12),
    "saves": (lambda on: [on.measured(measure_saves, on.shape, on.kind,
                                      "on" if on.mode == "compiled" else "off")], 0.06),
    "optimizers": (lambda on: [on.measured(measure_optimizer, on.shape, on.kind, name)
                               for name in ("adamw", "muon")], 0.03),
    "larger": (larger, 0.12), "adapters": (adapters, 0.08),
    "hellaswag": (lambda on: [on.measured(measure_hellaswag, on.shape, on.kind, on.dtype,
                                          8 if on.config.tiny else 2000)], 0.04)}


def report(found: dict[str, Any]) -> str:
    parts = [f"`python -m bench.gpu`, {where(found)}:"]
    for part in dict.fromkeys(row["part"] for row in found["rows"]):
        rows = [{key: f"{value:,.4g}" if isinstance(value, float) else str(value)
                 for key, value in row.items() if key != "part"}
                for row in found["rows"] if row["part"] == part]
        parts.append(f"{part}:\n\n" + table(" | ".join(dict.fromkeys(
            f"{key}={key}" if "=" not in key else key for row in rows for key in row)), rows))
    return "\n\n".join(parts)


def main(words: list[str]) -> None:
    config = parse(GPUConfig, words, "python -m bench.gpu", about=__doc__)
    device = pick_device(config.device)
    dtype = str(pick_dtype("auto", device)).removeprefix("torch.")
    name = "gpu-" + re.sub(r"\W+", "-", device_name(device)).strip("-")
    began, rows, share, states = time.monotonic(), [], 0.0, [machine_state(device)]
    for part, (measure, its_share) in PARTS.items():
        share += its_share
        if config.parts and part not in config.parts:
            continue
        place = Place(config, device.type, dtype, began + 60 * config.minutes * share)
        new = [{"part": part, **row} for row in measure(place)]
        rows += new
        print(report({"date": part, "processor": f"{time.monotonic() - began:.0f} s",
                      "device": device_name(device), "rows": new}), flush=True)
        publish(lambda found: "", name, config.save, device, rows, states, minutes=config.minutes)
    states.append(machine_state(device))
    publish(lambda found: "", name, config.save, device, rows, states, minutes=config.minutes)


if __name__ == "__main__":
    run_command(main)

"""Does extending a tokenizer pay? A base goes on with novels, with its tokenizer or a wider one.

    python -m experiments.studies.extending --novels=FOLDER [--seeds=3] [--out=out/extending]

The base is a small GPT on Python's documentation (vocabulary 4,096) after --base_steps. Its
tokenizer is extended to 8,192 on the novels' training part. Both then train with equal CPU time:
each gets the steps that `--seconds` of it have room for, by the time of a step in short runs taken
in turn, on one thread.
In: a folder of .txt. Out: RESULTS/extending.json and a table: bits per byte of the novel that is
held out, before and after, and of the documentation.
"""
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bpe import Tokenizer
from data.corpus import CorpusConfig, prepare, split_documents
from data.texts import find_files, read_documents
from formats.files import write_json
from run.config import build, parse, run_command
from train import TrainConfig, train

RESULTS = Path(__file__).parent.parent / "results"
VALIDATION, PACE_STEPS, PACE_RUNS = 0.05, 10, 3
SETTINGS = dict(batch_tokens=16 * 64, micro_batch=16, eval_tokens=50_000, eval_every=0,
                save_every=0, sample_tokens=0, compile="off", device="cpu", log_every=100,
                dtype="float32", learning_rate=3e-3, min_learning_rate=3e-4, warmup_steps=20,
                model=dict(block_size=64, n_layer=2, n_head=2, n_embd=64))


@dataclass(frozen=True)
class ExtendingConfig:
    novels: str = ""  # folder of .txt, one a document
    seeds: int = 3  # of each, 0, 1, ...
    base_steps: int = 400  # of the model that goes on
    seconds: float = 10.0  # CPU time of a run's steps
    vocab_size: int = 8192  # of the extended tokenizer
    out: str = "out/extending"  # folder of data and runs


def texts_and_tokenizers(config: ExtendingConfig, folder: Path) -> dict[str, Path]:
    """The data sets by name, each prepared once; and the extended tokenizer, beside them."""
    prepared, wide = {}, folder / "wide.json"

    def have(name: str, **settings: Any) -> None:
        prepared[name] = folder / name
        if not (folder / name / "meta.json").exists():
            prepare(CorpusConfig(out=str(folder / name), validation=VALIDATION, **settings))
    have("docs")
    narrow = folder / "docs" / "tokenizer.json"
    if not wide.exists():
        documents = list(read_documents(find_files(config.novels)))
        train_part, _ = split_documents(documents, VALIDATION)
        Tokenizer.load(narrow).extend(train_part, config.vocab_size).save(wide)
    have("novels", from_=config.novels, tokenizer=str(narrow))
    have("novels-wide", from_=config.novels, tokenizer=str(wide))
    have("docs-wide", tokenizer=str(wide))
    return prepared


def run(data: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """A run's summary; of one that has ended, the one that is there."""
    return train(build(TrainConfig, {**SETTINGS, "data": str(data), "out": str(out), **changes}))


def seconds_a_step(data: dict[str, Path], base: Path, folder: Path) -> dict[str, float]:
    """CPU seconds of a step with each tokenizer: the difference of long and short runs, in turn."""
    found: dict[str, list[float]] = {"novels": [], "novels-wide": []}
    for number in range(PACE_RUNS):
        for name, times in found.items():
            taken = []
            for steps in (1, 1 + PACE_STEPS):
                start = time.process_time()
                run(data[name], folder / f"pace-{name}-{number}-{steps}", init_from=str(base),
                    max_steps=steps, eval_tokens=1, seed=number,
                    warmup_steps=0)
                taken.append(time.process_time() - start)
            times.append((taken[1] - taken[0]) / PACE_STEPS)
    return {name: statistics.median(times) for name, times in found.items()}


def main(words: list[str]) -> None:
    config = parse(ExtendingConfig, words, "python -m experiments.studies.extending", about=__doc__)
    torch.set_num_threads(1)
    folder = Path(config.out)
    data = texts_and_tokenizers(config, folder)
    base = folder / "base"
    run(data["docs"], base, max_steps=config.base_steps)
    pace = seconds_a_step(data, base, folder)
    steps = {name: int(config.seconds / pace[name]) for name in pace}
    rows = []
    for name, docs in (("novels", "docs"), ("novels-wide", "docs-wide")):
        still = dict(init_from=str(base), max_steps=1, learning_rate=0.0, min_learning_rate=0.0,
                     warmup_steps=0)
        before = run(data[name], folder / f"{name}-before", **still)
        old_text = run(data[docs], folder / f"{docs}-before", **still)
        for seed in range(config.seeds):
            end = run(data[name], folder / f"{name}-{seed}", init_from=str(base), seed=seed,
                      max_steps=steps[name])
            rows.append({"data": name, "seed": seed, "steps": steps[name],
                         "seconds_a_step": round(pace[name], 4), "loss": end["val_loss"],
                         "bits_per_byte": end["val_bits_per_byte"],
                         "before": before["val_bits_per_byte"],
                         "old_text_loss": old_text["val_loss"],
                         "old_text_bits_per_byte": old_text["val_bits_per_byte"]})
    write_json(RESULTS / "extending.json", {"rows": rows}, indent=1)
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    run_command(main)

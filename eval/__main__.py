"""All evaluations of a model, or of several side by side, in one table.

    python -m eval out/demo                     a run: its data's validation split, HellaSwag
    python -m eval out/a out/b gpt2 --limit=0 --tokens=0        every item and token
    python -m eval FOLDER --data=book.txt --imdb_file=test.jsonl --lambada_file=test.jsonl

What has no file here is left out, and said so. A classifier has a loss and an accuracy only. Of a
run the figures are also kept, in its eval.json. Losses of models with different tokenizers do not
compare; bits per byte do. Of conversations those answers are scored that the run has learned.
"""
if __name__ == "__main__":
    from run.config import interruptible
    interruptible()
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from eval import hellaswag, imdb, lambada, loss
from eval.scoring import spread
from formats.files import write_json
from run.config import parse, run_command
from run.device import pick_device, pick_dtype
from run.load import is_run, load_model, needs_tokenizer, run_settings


@dataclass(frozen=True)
class EvalConfig:
    data: str = ""  # of the loss, as in eval.loss; empty: what a run was trained on
    template: str = ""  # of chat data; empty: the one that the run was trained with
    hellaswag_file: str = ""  # local HellaSwag file; empty: the official one, downloaded once
    imdb_file: str = ""  # JSONL of reviews {text, label}; empty: left out
    lambada_file: str = ""  # JSONL of passages {text}; empty: left out
    limit: int = 1000  # so many items of each task, spread over its file; 0 is all
    tokens: int = 100_000  # tokens of the loss, spread over the split; 0 is all
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"  # precision

    def __post_init__(self):
        for name in ("limit", "tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0, which is all")


def load_tasks(config: EvalConfig) -> dict[str, list[Any]]:
    """{task: its items}, read once for all models; without a file, a task has none."""
    try:
        items = hellaswag.load_items(config.hellaswag_file or None)
    except FileNotFoundError as error:
        if config.hellaswag_file:
            raise
        print(f"HellaSwag is left out: {error}", file=sys.stderr)
        items = []
    tasks = {"hellaswag": items,
             "imdb": imdb.load_reviews(config.imdb_file) if config.imdb_file else [],
             "lambada": lambada.load_passages(config.lambada_file) if config.lambada_file else []}
    return {name: spread(items, config.limit) for name, items in tasks.items()}


def evaluate(name: str, model: Any, tokenizer: Any, tasks: dict[str, list[Any]],
             config: EvalConfig) -> dict[str, Any]:
    """{task: what its own evaluation returns}, with the number of parameters and the context."""
    dtype = pick_dtype(config.dtype, next(model.parameters()).device)
    found: dict[str, Any] = {"parameters": model.num_params(),
                             "block_size": model.config.block_size}
    data = config.data or run_settings(name).get("data", "")
    if data:
        how = loss.LossConfig(model=name, data=data, dtype=config.dtype,
                              template=config.template, limit=config.tokens)
        try:
            found["loss"] = {"data": data, **loss.measure(model, tokenizer, how)}
        except FileNotFoundError as error:
            if config.data:
                raise
            print(f"{name}: its loss is left out: {error}", file=sys.stderr)
    if getattr(model, "classes", 0):                                # it has no words
        return found
    if tasks["imdb"]:
        found["imdb"] = imdb.evaluate(model, tokenizer, tasks["imdb"], dtype=dtype)
    for style in get_args(hellaswag.Style) if tasks["hellaswag"] else ():
        found[f"hellaswag_{style}"] = hellaswag.evaluate(
            model, tokenizer, tasks["hellaswag"], style, dtype=dtype, progress=True)
    if tasks["lambada"]:
        found["lambada"] = lambada.evaluate(model, tokenizer, tasks["lambada"], dtype=dtype)
    return found


def rows_of(found: dict[str, Any]) -> dict[str, str]:
    """The lines of the table for one model: label -> figure."""
    rows = {"parameters": f"{found['parameters']:,}", "context": f"{found['block_size']:,}"}
    if figures := found.get("loss"):
        rows["loss on"] = ",".join(Path(part).name for part in figures["data"].split(","))
        rows.update({key.replace("_", " "): f"{figures[key]:.4f}"
                     for key in ("loss", *(key for key in figures if key.startswith("loss/")),
                                 "perplexity", "bits_per_byte", "accuracy") if key in figures})
    for task in ("hellaswag_completion", "hellaswag_harness", "lambada", "imdb"):
        for metric in ("acc", "acc_norm"):
            if metric in found.get(task, {}):
                low, high = found[task][f"{metric}_interval"]
                rows[f"{task.replace('_', ' ')} {metric}"] = (
                    f"{found[task][metric]:.4f} ({low:.3f} to {high:.3f})")
        if task in found:
            n, cut = found[task]["n"], found[task]["cut"]
            rows[f"{task.replace('_', ' ')} items"] = f"{n:,}" + f", {cut:,} cut" * bool(cut)
    if "lambada" in found:
        rows["lambada perplexity"] = f"{found['lambada']['perplexity']:.2f}"
    return rows


def table(results: dict[str, dict[str, Any]]) -> str:
    """One column for each model, one line for each figure that any of them has."""
    columns = {name: rows_of(found) for name, found in results.items()}
    labels = list(dict.fromkeys(label for rows in columns.values() for label in rows))
    lines = [["", *columns]] + [[label, *(rows.get(label, "-") for rows in columns.values())]
                                for label in labels]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
                     for line in lines)


def main(words: list[str]) -> None:
    names = list(itertools.takewhile(lambda word: not word.startswith("-"), words))
    config = parse(EvalConfig, words[len(names):], "python -m eval RUN|FOLDER|gpt2 [MORE...]",
                   about=__doc__)
    if not names:
        raise ValueError("no model given; name runs or folders: python -m eval out/demo")
    device, tasks, results = pick_device(config.device), load_tasks(config), {}
    for name in dict.fromkeys(names):
        model, tokenizer = load_model(name, device)
        results[name] = evaluate(name, model, needs_tokenizer(tokenizer, name), tasks, config)
        if is_run(name):
            write_json(Path(name) / "eval.json", results[name])
    print(table(results))


if __name__ == "__main__":
    run_command(main)

"""HellaSwag against EleutherAI's lm-evaluation-harness: the same model, items and decisions.

    pip install -c constraints.txt lm-eval
    python -m bench.lm_eval --model=RUN|FOLDER|gpt2 [--hellaswag_file=FILE] [--limit=N]

The model is exported to a folder that transformers loads; the harness scores it by its own task
"hellaswag", whose data is replaced by the file; we score it by --style=harness. Both in float32.
Items are compared one by one: the sums of the four endings, and what acc, acc_norm choose. With a
file it works offline. Writes bench/results/lm_eval.json.
"""
import os
import tempfile
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from bench.machine import publish, table, where
from eval.hellaswag import Scores, score
from eval.hellaswag_items import load_items, official_file
from run.config import parse, run_command
from run.device import pick_device
from run.export import export
from run.load import load_writer

TASK = """include: {hellaswag}
task: hellaswag_file
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}}}}}
training_split: null
"""


@dataclass(frozen=True)
class LMEvalConfig:
    model: str = "gpt2"  # a run (out/demo), a Hugging Face folder, or gpt2, gpt2-medium
    hellaswag_file: str = ""  # local file of official records; empty: theirs, downloaded once
    limit: int = 0  # the first so many items; 0 is all
    batch_size: int = 16  # rows at a time of the harness
    device: str = "cpu"  # cpu, cuda, cuda:N


def harness_scores(folder: Path, config: LMEvalConfig, limit: int) -> tuple[torch.Tensor, dict]:
    """The harness's sums (N, 4) and, for each metric, whether each item is right (N,)."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    try:
        import lm_eval.tasks
    except ModuleNotFoundError:
        raise ModuleNotFoundError("the comparison needs the harness: "
                                  "pip install -c constraints.txt lm-eval") from None
    theirs = Path(lm_eval.tasks.__file__).parent / "hellaswag" / "hellaswag.yaml"
    (folder / "task.yaml").write_text(TASK.format(hellaswag=theirs,
                                                  file=Path(config.hellaswag_file).resolve()))
    manager = lm_eval.tasks.TaskManager(include_path=str(folder))
    found = lm_eval.simple_evaluate(
        "hf", dict(pretrained=str(folder), dtype="float32"), ["hellaswag_file"], limit=limit,
        batch_size=config.batch_size, device=config.device, task_manager=manager,
        bootstrap_iters=0)
    samples = sorted(found["samples"]["hellaswag_file"], key=lambda sample: sample["doc_id"])
    sums = torch.tensor([[answer[0] for answer in sample["filtered_resps"]] for sample in samples],
                        dtype=torch.float64)
    right = {name: torch.tensor([sample[name] == 1 for sample in samples])
             for name in ("acc", "acc_norm")}
    return sums, right


def compare(sums: torch.Tensor, theirs: dict[str, torch.Tensor], ours: Scores,
            labels: torch.Tensor) -> dict[str, Any]:
    """Both accuracies, on how many items they differ, and the largest difference of sums."""
    row: dict[str, Any] = {"items": len(labels), "cut": int(ours.cut.sum())}
    choices = ours.decisions("harness")
    for name, right in theirs.items():
        mine = choices[name] == labels
        row[name] = {"harness": right.double().mean().item(), "ours": mine.double().mean().item(),
                     "items_that_differ": int((mine != right).sum())}
    row["largest_difference_of_sums"] = float((sums - ours.sums).abs().max())
    return row


def measure(config: LMEvalConfig) -> dict[str, Any]:
    config = replace(config, hellaswag_file=config.hellaswag_file or str(official_file()))
    items = load_items(config.hellaswag_file)[:config.limit or None]
    model, tokenizer = load_writer(config.model, pick_device(config.device))
    with tempfile.TemporaryDirectory() as name:
        export(config.model, name)
        sums, right = harness_scores(Path(name), config, len(items))
    labels = torch.tensor([item.label for item in items])
    return {"parameters": model.num_params(), "vocab_size": tokenizer.vocab_size,
            **compare(sums, right, score(model, tokenizer, items, "harness"), labels)}


def report(found: dict[str, Any]) -> str:
    row = found["rows"][0]
    return (f"`python -m bench.lm_eval`, {where(found)}, lm-evaluation-harness {found['lm_eval']}: "
            f"{row['items']:,} items, {row['parameters']:,} parameters, sums differ by at most "
            f"{row['largest_difference_of_sums']:.1e} nats.\n\n" + table(
                "metric | harness:.4f | ours:.4f | items that differ=items_that_differ:d",
                ({"metric": name, **row[name]} for name in ("acc", "acc_norm"))))


def main(words: list[str]) -> None:
    config = parse(LMEvalConfig, words, "python -m bench.lm_eval", about=__doc__)
    publish(report, "lm_eval", True, pick_device(config.device), [measure(config)], [],
            lm_eval=version("lm-eval"))


if __name__ == "__main__":
    run_command(main)

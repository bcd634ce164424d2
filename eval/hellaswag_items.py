"""HellaSwag's items: from a file to the tokens that are scored (eval/hellaswag.py).

In: JSONL of official records {activity_label, ctx, ctx_a, ctx_b, endings, label}, or the text form
{query, endings, label}. Styles and references: eval/hellaswag.py.
"""
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist

from data.texts import check_characters, read_objects
from formats.download import download

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"
FILE = Path(__file__).parents[1] / "data" / "hellaswag" / "hellaswag_val.jsonl"

ENDINGS = 4
LABELS = (*range(ENDINGS), *map(str, range(ENDINGS)))

Style = Literal["completion", "harness"]


@dataclass(frozen=True)
class Item:
    """A context and four endings; `label` is the right one's index."""
    context: str                # of the style "completion"
    harness_context: str        # of the style "harness", still with its marks
    endings: tuple[str, ...]
    label: int


def load_items(path: str | Path | None = None) -> list[Item]:
    """The items of a JSONL file: official records, or {"query", "endings", "label"}.

    None is the official validation file, downloaded once. In a process group all ranks must call.
    """
    path = official_file() if path is None else path
    return [_item(record, place) for place, record in read_objects(path)]


def items_of_run(config: Any, tokenizer: Any) -> list[Item]:
    """What a run is evaluated on, by the settings of train.py; nothing with hellaswag_every=0. A
    dry run reads a file that is named, and downloads none."""
    file, every = config.hellaswag_file, config.hellaswag_every
    if not every or config.dry_run and not file:
        return []
    if tokenizer is None and not config.dry_run:
        raise ValueError(f"hellaswag_every={every} needs a tokenizer, and {config.data} has none; "
                         f"put its tokenizer.json there")
    return load_items(file or None)


def official_file() -> Path:
    """The official validation file, downloaded once; in a process group all ranks must call."""
    instead = "--hellaswag_file=FILE; or, in training, --hellaswag_every=0"
    if not dist.is_initialized():
        return download(URL, FILE, SHA256, instead)
    first = int(os.environ.get("LOCAL_RANK", dist.get_rank())) == 0     # one process a machine
    if first:
        download(URL, FILE, SHA256, instead)
    dist.barrier()
    return FILE


def _item(record: dict[str, Any], place: str) -> Item:
    names = ("query",) if "query" in record else ("ctx", "activity_label", "ctx_a", "ctx_b")
    for name in names:
        if not isinstance(record.get(name), str):
            raise ValueError(f"{place} has no text {name!r}; an item has ctx, activity_label, "
                             f"ctx_a and ctx_b, or query")
    endings, label = record.get("endings"), record.get("label")
    if not (isinstance(endings, list) and len(endings) == ENDINGS
            and all(isinstance(ending, str) for ending in endings)):
        raise ValueError(f"{place}: endings is not a list of {ENDINGS} texts")
    if label not in LABELS or isinstance(label, (bool, float)):     # Hugging Face's copy has texts
        raise ValueError(f"{place}: label is {label!r:.50}, not 0 to {ENDINGS - 1}")
    context = record[names[0]]
    if not context.strip():
        raise ValueError(f"{place}: {names[0]} is empty")
    harness = context if "query" in record else (
        f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}")
    check_characters("".join((context, harness, *endings)), place)
    return Item(context, harness, tuple(endings), int(label))


def without_marks(text: str) -> str:
    """The harness's cleaning: WikiHow's " [title]" is a full stop, other [marks] are nothing."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def prepare(tokenizer: Any, item: Item,
            style: Style) -> tuple[list[int], list[list[int]], tuple[str, ...]]:
    """Token ids of the context, of each ending with its space, and the endings as texts."""
    encode = tokenizer.encode
    if style == "completion":
        ids, endings = encode(item.context), item.endings
        ending_ids = [encode(" " + ending) for ending in endings]
    else:
        # The harness gives spaces at the context's end to the endings, and encodes both together.
        context = without_marks(item.harness_context)
        endings = tuple(without_marks(ending) for ending in item.endings)
        ids = encode(context.rstrip())
        ending_ids = [encode(f"{context} {ending}")[len(ids):] for ending in endings]
    if not ids or not all(ending_ids):
        raise ValueError(f"style {style} leaves no token of the context or of an ending of "
                         f"{item.context[:60]!r}")
    return ids, ending_ids, endings

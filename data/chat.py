"""Chat: conversations into samples whose labels are what the assistant says, and nothing else.

    samples = load_samples(folder, "train", tokenizer, "chatml", block_size=1024)

    python -m data.chat prepare FILE... --out=data/mine     conversations of any known format
    python -m data.chat --from=PATH --out=data/mine         the same
    python -m data.chat inspect FILE|NAME [--tokenizer=gpt2|RUN] [--template=chatml]

How a conversation is written (render, render_prompt): data/templates.py. Formats of files:
data/conversations.py. What inspect shows: data/inspect_chat.py. Batches: data/samples.py.
"""
import re
from array import array
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bpe import Tokenizer
from data import conversations, inspect_chat
from data.prepared import DATA, read_split
from data.samples import Samples
from data.templates import Labels, chosen_spans, cut, encode, extend_tokenizer
from data.templates import find_template, render, render_prompt  # noqa: F401 (for users of chat)
from data.texts import RECORDS, find_files
from run.config import parse, run_command


def load_samples(folder: str | Path, split: str, tokenizer: Tokenizer, template: str,
                 block_size: int, labels: Labels = "all") -> Samples:
    """Render a split of prepared chat data for a model of block_size positions.

    A sample ends with its last label. One that is too long loses whole turns at its end; if even
    the first turn is too long, that one's answer is cut; if no label would be left, the sample is
    dropped. `counts` of the result says how often.
    """
    if extend_tokenizer(tokenizer, template) is not tokenizer:
        raise ValueError(f"the tokenizer lacks special tokens of template={template}; use "
                         f"data.chat.extend_tokenizer, and grow_embedding for the model")
    flat, labelled, offsets, counts = array("i"), bytearray(), [0], Counter()
    for record in read_split(Path(folder), "chat", split):
        counts["records"] += 1
        ids, spans = encode(record["messages"], tokenizer, template)
        spans, whole = cut(spans, block_size + 1)       # the last id is a target only
        if not spans:
            counts["dropped"] += 1
            continue
        counts["kept"] += 1
        counts["truncated"] += not whole
        end = spans[-1][1]
        flat.extend(ids[:end])
        offsets.append(len(flat))
        mask = bytearray(end)
        for start, stop in chosen_spans(spans, labels):
            mask[start:stop] = b"\1" * (stop - start)
        labelled += mask
    if not counts["kept"]:
        raise ValueError(f"{folder}/{split}.jsonl has no sample that fits "
                         f"block_size={block_size}")
    return Samples(np.array(flat, np.int32), np.frombuffer(labelled, np.bool_),
                   np.array(offsets, np.int64), block_size, dict(counts))


@dataclass(frozen=True)
class ChatConfig:
    from_: str = ""  # a .json or .jsonl file, or a folder of them; several by comma
    out: str = ""  # folder of the data set; empty: data/chat
    tokenizer: str = ""  # gpt2 or a tokenizer's path, to count tokens with; may be empty
    validation: float = 0.05  # share of the conversations that validates


def prepare(config: ChatConfig) -> Path:
    """Conversations from files of any known format into a data set."""
    folder = Path(config.out or DATA / "chat")
    found, dropped = conversations.read(find_files(config.from_, RECORDS))
    if not found:
        raise ValueError(f"{config.from_} holds no conversation that can be used; nothing was "
                         f"written")
    conversations.write_conversations(folder, found, config.from_, config.validation, dropped,
                                      tokenizer=config.tokenizer)
    return folder


def main(words: list[str]) -> None:
    command = words[0] if words[:1] in (["prepare"], ["inspect"]) else ""
    words = words[1:] if command else words
    count = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    names, flags = words[:count], words[count:]
    if command == "inspect":
        inspect_chat.main(names, flags)
        return
    if names and any(re.match("--from(=|$)", flag) for flag in flags):
        raise ValueError(f"files are named twice, {', '.join(names)} and by --from; give one of "
                         f"the two")
    base = {"from_": ",".join(names)} if names else {}
    prepare(parse(ChatConfig, flags, "python -m data.chat [prepare] FILE...", base, __doc__))


if __name__ == "__main__":
    run_command(main)

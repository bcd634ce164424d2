"""Questions and answers that are always there: Python's own documentation, asked about.

    python -m data.pydocs                       about 8,000 conversations, no network, no file

What has a docstring in the standard library is asked about in one of several ways; the answer is
the summary, the docstring's first paragraph. A quarter goes on to a second question. Which way a
name is asked about depends on the name only, so the data are the same for the same Python.
"""
import hashlib
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.conversations import write_conversations
from data.corpus import library_docstrings
from data.prepared import DATA
from run.config import parse, run_command

LONGEST = 400           # characters of an answer; a longer first paragraph is no summary
REPEATED = 3            # answers given more often ("Internal function.") say too little

FUNCTION = ["What does `{head}` do?", "What is `{name}` for? Its signature is `{head}`.",
            "Explain `{head}` in a sentence.", "In Python, what is the use of `{head}`?"]
CLASS = ["What is the class `{name}` for?", "What does `{name}` stand for?",
         "Describe the class `{name}` of Python's library."]
MODULE = ["What is the module `{name}` for?", "What would I import `{name}` for?"]
TASK = "Say what this function of Python's library does."           # with the function as input


@dataclass(frozen=True)
class PydocsConfig:
    validation: float = 0.05  # share of the conversations that validates
    out: str = ""  # folder of the data set; empty: data/pydocs


def questions() -> list[dict[str, Any]]:
    """A conversation about everything that is documented, in the order of the files."""
    entries = []
    for module, texts in library_docstrings():
        for text in texts:
            head, _, body = text.partition("\n\n")
            paragraphs = tuple(" ".join(part.split()) for part in body.split("\n\n"))
            entries.append((module, head, paragraphs))
    counts = Counter(paragraphs[0] for _, _, paragraphs in entries)
    return [{"messages": conversation(module, head, paragraphs)}
            for module, head, paragraphs in dict.fromkeys(entries)
            if 10 <= len(paragraphs[0]) <= LONGEST and counts[paragraphs[0]] <= REPEATED]


def conversation(module: str, head: str, paragraphs: tuple[str, ...]) -> list[dict[str, str]]:
    """One or two questions about a name, and their answers. head: "json.dumps(obj)"."""
    draw = int.from_bytes(hashlib.sha256(head.encode()).digest()[:4], "big")
    name, _, arguments = head.partition("(")
    ways = FUNCTION + [TASK] if arguments else MODULE if name == module else CLASS
    way = ways[draw % len(ways)]
    first = {"role": "user", "content": way.format(name=name, head=head)}
    if way == TASK:
        first = {"role": "user", "content": f"{TASK}\n\n{head}", "input": head}
    messages = [first, {"role": "assistant", "content": paragraphs[0]}]
    if draw // 64 % 4:
        return messages
    if len(paragraphs) > 1 and 10 <= len(paragraphs[1]) <= LONGEST:
        more, answer = "Tell me more.", paragraphs[1]
    elif arguments:
        more, answer = "Which arguments does it take?", f"`({arguments}`"
    elif name != module:
        more, answer = "Which module is it in?", f"`{module}`"
    else:
        return messages
    return [*messages, {"role": "user", "content": more}, {"role": "assistant", "content": answer}]


def prepare(config: PydocsConfig = PydocsConfig()) -> Path:
    """Questions on Python's documentation as a set of conversations; returns its folder."""
    folder = Path(config.out or DATA / "pydocs")
    print("asking about the documentation of this Python")
    source = f"documentation of Python {sys.version.split()[0]}"
    write_conversations(folder, questions(), source, config.validation)
    return folder


def main(words: list[str]) -> None:
    prepare(parse(PydocsConfig, words, "python -m data.pydocs", about=__doc__))


if __name__ == "__main__":
    run_command(main)

"""A corpus that is always there: the documentation inside every Python; or any text of yours.

    python -m data.corpus                               docstrings and topics, about 2.3 MB
    python -m data.corpus --code                        and the sources, about 13 MB
    python -m data.corpus --from=PATH                   a file or folder of .txt and .jsonl
    python -m data.corpus --from=PATH --tokenizer=gpt2 --out=data/mine

Documents: each module's docstrings together (and its source, with --code) and each help topic of
pydoc; of your text, each .txt file and each line of a .jsonl file ({"text": ...}). The hash of a
document says whether it trains or validates; a single document is cut at a line end. Everything is
in memory here; for many gigabytes, use data/fineweb.py --from.
"""
import ast
import functools
import gc
import importlib
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator

import numpy as np

from bpe import END_OF_TEXT, Tokenizer
from data.prepared import DATA, split_by_hash
from data.texts import find_files, read_documents
from data.writer import ShardWriter
from formats.gpt2 import OPENAI, download
from run.config import parse, run_command

LIBRARY = Path(sysconfig.get_paths()["stdlib"])


@dataclass(frozen=True)
class CorpusConfig:
    from_: str = ""  # file or folder of .txt and .jsonl; empty: Python's own documentation
    code: bool = False  # add the sources of the standard library
    tokenizer: str = ""  # gpt2, bytes, a tokenizer's path, USER/NAME of the hub; empty: train one
    vocab_size: int = 4096  # of the tokenizer that is trained
    validation: float = 0.05  # share of the bytes that validates
    shard_tokens: int = 100_000_000  # tokens of a shard
    out: str = ""  # folder of the shards; empty: data/corpus

    def __post_init__(self):
        if self.code and self.from_:
            raise ValueError(f"code=true adds Python's sources to its documentation, and from="
                             f"{self.from_} is other text; give one of the two")
        if self.tokenizer and self.vocab_size != CorpusConfig.vocab_size:
            raise ValueError(f"vocab_size={self.vocab_size} is of a tokenizer that is trained, and "
                             f"tokenizer={self.tokenizer} is there already; give one of the two")
        if not 0 < self.validation < 1 or self.shard_tokens < 1:
            raise ValueError(f"validation={self.validation} must be in (0, 1), shard_tokens="
                             f"{self.shard_tokens} at least 1")


def documentation() -> list[str]:
    """Docstrings of the standard library, a document a module, and pydoc's help topics.

    Deterministic for a Python version; tests are left out.
    """
    topics = importlib.import_module("pydoc_data.topics").topics
    return (["\n\n".join(texts) + "\n" for _, texts in library_docstrings()]
            + [topics[name].strip() + "\n" for name in sorted(topics)])


@functools.cache
def library_docstrings() -> list[tuple[str, list[str]]]:
    """(name, docstrings) of the standard library's modules that have some, in a fixed order.

    Read from the source text; nothing is imported or run.
    """
    found, collected = [], gc.isenabled()
    gc.disable()                                # half of the time would go into trees as they grow
    try:
        for path in library_files():
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):   # templates, and files that are wrong on purpose
                continue
            name = ".".join(path.relative_to(LIBRARY).with_suffix("").parts)
            name = name.removesuffix(".__init__")
            if texts := list(docstrings(tree, name)):
                found.append((name, texts))
    finally:
        if collected:
            gc.enable()
    return found


def docstrings(node: Any, name: str) -> Iterator[str]:
    """Every docstring of a module under the name of what it documents, in the order of the file."""
    text = ast.get_docstring(node)
    if text and text.strip():
        signature = f"({ast.unparse(node.args)})" if hasattr(node, "args") else ""
        yield f"{name}{signature}\n\n{text}"
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from docstrings(child, f"{name}.{child.name}")


def sources() -> list[str]:
    """The standard library's own code, a document a file."""
    return [text for path in library_files()
            if (text := path.read_text(encoding="utf-8", errors="replace")).strip()]


def library_files() -> list[Path]:
    """The .py files of the standard library in a fixed order; no tests, no installed packages."""
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = [path for path in LIBRARY.rglob("*.py")
             if not skipped & set(path.relative_to(LIBRARY).parts)]
    return sorted(files, key=lambda path: path.as_posix())


def split_documents(documents: list[str], validation: float) -> tuple[list[str], list[str]]:
    """Training and validation documents; a single document is cut at a line end."""
    if len(documents) > 1:
        return split_by_hash(documents, validation, str, len)
    text = documents[0]
    cut = text.rfind("\n", 0, int(len(text) * (1 - validation))) + 1
    if not 0 < cut < len(text):
        raise ValueError(f"the only document has no line end to cut it at validation={validation}; "
                         f"give more text, or text with line ends")
    return [text[:cut]], [text[cut:]]


def write_shards(folder: Path, train: list[str], val: list[str], tokenizer: Tokenizer,
                 source: str, shard_tokens: int = 100_000_000) -> dict[str, Any]:
    """Encode documents, each behind an end-of-text token, into shards. Returns meta.json."""
    if tokenizer.eot is None and len(train) > 1:
        print(f"note: this tokenizer has no {END_OF_TEXT}, so nothing stands between documents")
    writer = ShardWriter(folder, tokenizer, source, shard_tokens)
    for split, documents in (("train", train), ("val", val)):
        for ids in tokenizer.encode_corpus(documents):
            writer.add(split, behind_end_of_text(tokenizer, ids))
    meta = writer.finish()
    print_summary(folder, meta)
    return meta


def behind_end_of_text(tokenizer: Tokenizer, ids: np.ndarray) -> np.ndarray:
    """A document's ids behind an end-of-text token, if the tokenizer has one."""
    return ids if tokenizer.eot is None else np.append(np.array([tokenizer.eot], ids.dtype), ids)


def print_summary(folder: Path, meta: dict[str, Any]) -> None:
    """Say in a line what a folder of shards holds."""
    train, val = (meta["splits"].get(split, {}).get("tokens", 0) for split in ("train", "val"))
    here = Path(folder).absolute()
    name = here.relative_to(Path.cwd()) if here.is_relative_to(Path.cwd()) else folder
    print(f"{name}: {train:,} tokens to train on, {val:,} to validate, {meta['documents']:,} "
          f"documents, vocabulary {meta['vocab_size']:,}, unigram entropy "
          f"{meta['unigram_entropy']:.3f} nats")


def named_tokenizer(name: str) -> Tokenizer:
    """"gpt2", "bytes" (256 ids and no merge), a tokenizer's path, or a hub model's by its name."""
    if name == "bytes":
        return Tokenizer([], special_tokens=())
    if name in OPENAI or Path(name).exists():           # GPT-2 has one in all sizes
        return Tokenizer.load(name if Path(name).exists() else "gpt2")
    if name.count("/") != 1 or name.endswith(".json"):
        raise FileNotFoundError(f"tokenizer={name}: there is no such file or folder; allowed are "
                                f"gpt2, bytes, a tokenizer's file, a folder or run that holds one, "
                                f"and USER/NAME of the Hugging Face hub")
    return Tokenizer.load(download(name, weights=False))


def prepare(config: CorpusConfig = CorpusConfig()) -> Path:
    """Collect the documents, train a tokenizer on those of training, write the shards."""
    folder = Path(config.out or DATA / "corpus")
    if config.from_:
        documents, source = list(read_documents(find_files(config.from_))), config.from_
    else:
        print("collecting the documentation of this Python")
        documents = documentation() + (sources() if config.code else [])
        source = f"documentation{' and sources' if config.code else ''} of Python " \
                 f"{sys.version.split()[0]}"
    if not documents:
        raise ValueError(f"{source} holds no text")
    train, val = split_documents(documents, config.validation)
    if config.tokenizer:
        tokenizer = named_tokenizer(config.tokenizer)
    else:
        tokenizer = Tokenizer.train(train, config.vocab_size, progress=sys.stderr.isatty())
    write_shards(folder, train, val, tokenizer, source, config.shard_tokens)
    return folder


def main(words: list[str]) -> None:
    prepare(parse(CorpusConfig, words, "python -m data.corpus", about=__doc__))


if __name__ == "__main__":
    run_command(main)

"""Conversations from files: whatever shape they come in, they leave as messages.

    {"messages": [{"role": "system|user|assistant", "content": "..."}]}         format messages
    {"instruction": "...", "input": "...", "output": "..."}                     alpaca
    {"conversation": [{"system": "...", "input": "...", "output": "..."}]}      conversation
    {"conversations": [{"from": "human|gpt|system", "value": "..."}]}           sharegpt

JSONL, or a JSON array of them. A conversation may open with a system message; then user and
assistant take turns. Alpaca's input is joined to its instruction by a blank line, and kept beside
it as well, so that the alpaca template can part them again: {"role": "user", "content":
"instruction\\n\\ninput", "input": "input"}.

    conversations, dropped = read(files, format="auto", on_error="skip")
    write_dataset(folder, conversations, source, validation=0.05, dropped=dropped)

A data set is a folder with train.jsonl and val.jsonl, a {"messages": [...]} a line, and meta.json,
which is written last. It knows no tokenizer and no template; data/chat.py brings them together.
"""
import hashlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator

from bpe import find_tokenizer
from data.shards import read_json, write_file, write_json

Message = dict[str, str]
FORMAT_VERSION = 1
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
            "assistant": "assistant", "bing": "assistant", "bard": "assistant", "system": "system"}
SHOWN = 20              # broken records that are reported one by one; the others are counted


def check_messages(messages: Any) -> None:
    """ValueError "reason: detail" for what is no conversation, or would be no use as one."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("no conversation: messages must be a list with something in it")
    expected = ("system", "user")
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"no text: message {i + 1} needs a role and a content, both text")
        role, content = message.get("role"), message["content"]
        if role not in expected:
            raise ValueError(f"wrong role order: message {i + 1} is of {role!r}, expected "
                             f"{' or '.join(expected)}")
        if not content.strip():
            raise ValueError(f"empty {'answer' if role == 'assistant' else role + ' message'}: "
                             f"message {i + 1} says nothing")
        if not content.isascii():
            try:
                content.encode()
            except UnicodeEncodeError as error:                     # JSON can spell "\ud800"
                raise ValueError(f"half a surrogate pair: \\u{ord(content[error.start]):04x} in "
                                 f"message {i + 1} is no character") from None
        if message.get("input") and not content.endswith("\n\n" + message["input"]):
            raise ValueError(f"no input: the content of message {i + 1} does not end with a blank "
                             f"line and its input")
        expected = ("assistant",) if role == "user" else ("user",)
    if len(messages) == 1 and messages[0]["role"] == "system":
        raise ValueError("no question: there is only a system message")


# ---------------------------------------------------------------------------- formats to messages

def from_messages(record: dict[str, Any]) -> list[Message]:
    """{messages: [{role, content}]}, the form that all are brought into."""
    return [{key: message[key] for key in ("role", "content", "input") if message.get(key)
             is not None} if isinstance(message, dict) else message for message in
            _list(record, "messages")]


def from_alpaca(record: dict[str, Any]) -> list[Message]:
    """{instruction, input, output}: one question, one answer."""
    question, more = record["instruction"], record.get("input") or ""
    user = {"role": "user", "content": question}
    if isinstance(question, str) and isinstance(more, str) and more.strip():
        user = {"role": "user", "content": f"{question}\n\n{more}", "input": more}
    elif more and not isinstance(more, str):
        raise ValueError("no text: the input is none")
    return [*_system(record), user, {"role": "assistant", "content": record["output"]}]


def from_conversation(record: dict[str, Any]) -> list[Message]:
    """{conversation: [{system, input, output}]}: a question and its answer a turn."""
    messages: list[Message] = []
    for turn in _list(record, "conversation"):
        if not messages:
            messages += _system(turn)
            first = turn.get("system")
        elif turn.get("system") not in (None, "", first):
            raise ValueError("wrong role order: a later turn has another system message")
        messages += [{"role": "user", "content": turn["input"]},
                     {"role": "assistant", "content": turn["output"]}]
    return messages


def from_sharegpt(record: dict[str, Any]) -> list[Message]:
    """{conversations: [{from, value}]}, with the speakers' names of ShareGPT."""
    return [*_system(record), *({"role": SPEAKERS.get(turn["from"], turn["from"]),
                                 "content": turn["value"]}
                                for turn in _list(record, "conversations"))]


FORMATS: dict[str, tuple[str, Callable[[dict[str, Any]], list[Message]]]] = {
    "messages": ("messages", from_messages),                # name: the key that tells it, reader
    "alpaca": ("instruction", from_alpaca),
    "conversation": ("conversation", from_conversation),
    "sharegpt": ("conversations", from_sharegpt),
}


def convert(record: Any, format: str = "auto") -> list[Message]:
    """The messages of a record; ValueError "reason: detail" if it is broken."""
    if not isinstance(record, dict):
        raise ValueError("no record: it is no JSON object")
    if format == "auto":
        format = next((name for name, (key, _) in FORMATS.items() if key in record), "")
        if not format:
            raise ValueError(f"no known format: keys {', '.join(map(str, record))[:80]}")
    try:
        messages = FORMATS[format][1](record)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not of format {format}: {type(error).__name__} {error}") from None
    check_messages(messages)
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no answer: nobody answers in this conversation")
    return messages


def _system(record: dict[str, Any]) -> list[Message]:
    return [{"role": "system", "content": record["system"]}] if record.get("system") else []


def _list(record: dict[str, Any], key: str) -> list[Any]:
    if not isinstance(record[key], list):
        raise ValueError(f"no conversation: {key} is no list")
    return record[key]


# ------------------------------------------------------------------------------ files to records

def find_files(names: Iterable[str | Path]) -> list[Path]:
    """The .json and .jsonl files of these names, folders searched below."""
    files: list[Path] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            files += sorted(p for p in path.rglob("*") if p.suffix in (".json", ".jsonl"))
        elif path.is_file():
            files.append(path)
        else:
            raise FileNotFoundError(f"there is no file or folder {path}")
    if not files:
        raise FileNotFoundError(f"there is no .json or .jsonl file in {', '.join(map(str, names))}")
    return files


def read_records(path: Path) -> Iterator[tuple[int, Any]]:
    """(line, record) of a JSON array, a single object, or JSONL. A broken line of JSONL comes as a
    ValueError in place of its record; a broken array cannot be read on and raises it."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: byte {error.start} is "
                         f"0x{error.object[error.start]:02x}; convert it first") from None
    if text.lstrip()[:1] == "[":
        yield from _read_array(path, text)
        return
    try:
        yield 1, json.loads(text)                                   # one object, on several lines
        return
    except (ValueError, RecursionError):
        pass                                                        # a line each, then
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:           # nested too deep is no JSON
                yield number, ValueError(f"no JSON: {error}")


def _read_array(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    decoder, line, counted = json.JSONDecoder(), 1, 0
    at = _skip(text, text.index("[") + 1)
    while text[at:at + 1] != "]":
        line, counted = line + text.count("\n", counted, at), at
        try:
            record, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: after line {line} is no JSON: {error}") from None
        yield line, record
        at = _skip(text, at)
        if text[at:at + 1] == ",":
            at = _skip(text, at + 1)
        elif text[at:at + 1] != "]":
            raise ValueError(f"{path}: the array breaks off after the record in line {line}")


def _skip(text: str, at: int) -> int:
    while text[at:at + 1] in (" ", "\n", "\r", "\t"):
        at += 1
    return at


def read(files: Iterable[Path], format: str = "auto", on_error: str = "skip"
         ) -> tuple[list[dict[str, Any]], Counter[str]]:
    """All conversations of the files, {"messages": ...} each, and how many were dropped why.

    A broken record is reported on stderr with its line; on_error="refuse" raises it instead. What a
    record says of its "task" (or "category") is kept, for data/inspect_chat.py.
    """
    conversations, dropped = [], Counter()
    for path in files:
        for line, record in read_records(path):
            try:
                if isinstance(record, ValueError):
                    raise record
                conversation: dict[str, Any] = {"messages": convert(record, format)}
            except ValueError as error:
                if on_error == "refuse":
                    raise ValueError(f"{path}:{line}: {error}; correct it, or leave out broken "
                                     f"records with --on_error=skip") from None
                dropped[str(error).partition(":")[0]] += 1
                if sum(dropped.values()) <= SHOWN:
                    print(f"{path}:{line}: {error}; skipped", file=sys.stderr)
                continue
            task = record.get("task") or record.get("category")
            if isinstance(task, str):
                conversation["task"] = task
            conversations.append(conversation)
    if sum(dropped.values()) > SHOWN:
        print(f"... and {sum(dropped.values()) - SHOWN:,} more", file=sys.stderr)
    return conversations, dropped


# ------------------------------------------------------------------------------ records to a folder

def spell(conversation: dict[str, Any]) -> str:
    """A conversation as a line of JSON."""
    return json.dumps(conversation, ensure_ascii=False)


def split(conversations: list[dict[str, Any]], validation: float
          ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and validation. The hash of its text decides where a conversation goes, so equal
    ones stay together and the order of the file does not matter."""
    if not 0 < validation < 1:
        raise ValueError(f"validation={validation} is not in (0, 1)")
    keys = [hashlib.sha256(spell(c["messages"]).encode()).digest() for c in conversations]
    counts = Counter(keys)
    if len(counts) < 2:
        raise ValueError(f"there are {len(counts)} different conversations; at least 2 are needed, "
                         f"one to train on and one to validate")
    chosen, size = set(), 0
    for key in sorted(counts)[:-1]:
        if size >= validation * len(keys):
            break
        chosen.add(key)
        size += counts[key]
    return ([c for c, key in zip(conversations, keys) if key not in chosen],
            [c for c, key in zip(conversations, keys) if key in chosen])


def write_dataset(folder: str | Path, conversations: list[dict[str, Any]], source: str,
                  validation: float = 0.05, dropped: dict[str, int] | None = None,
                  val: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Write train.jsonl, val.jsonl and, last, meta.json; return the latter.

    `val` are the validation records where the data bring their own.
    """
    train, val = split(conversations, validation) if val is None else (conversations, val)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.json").unlink(missing_ok=True)                  # from here on it is incomplete
    splits = {}
    for name, part in (("train", train), ("val", val)):
        data = "".join(spell(c) + "\n" for c in part).encode()
        write_file(folder / f"{name}.jsonl", lambda file: file.write(data))
        splits[name] = {"records": len(part), "sha256": hashlib.sha256(data).hexdigest()}
    dropped = dict(dropped or {})
    meta = {"version": FORMAT_VERSION, "kind": "chat", "source": source, "splits": splits,
            "read": len(train) + len(val) + sum(dropped.values()), "dropped": dropped}
    write_json(folder / "meta.json", meta)
    print(f"{folder}: {len(train):,} conversations to train on, {len(val):,} to validate"
          + "".join(f"; dropped {n:,}: {reason}" for reason, n in sorted(dropped.items())))
    return meta


def count_tokens(folder: Path, name: str) -> None:
    """Print how long a data set's text is in tokens of "gpt2" or of a tokenizer's path."""
    tokenizer = find_tokenizer(name)
    for split in ("train", "val"):
        talks = (json.loads(line)["messages"] for line in read_split(folder, split))
        counts = Counter()
        for message in (message for talk in talks for message in talk):
            counts[message["role"]] += len(tokenizer.encode(message["content"]))
        print(f"{split}: {counts.total():,} tokens of {name} without a template, "
              f"{counts['assistant']:,} of them in answers")


def read_meta(folder: Path) -> dict[str, Any]:
    """meta.json of prepared chat data; ValueError if the folder is something else."""
    path = folder / "meta.json"
    if not path.exists():
        raise FileNotFoundError(f"there is no prepared chat data in {folder}; make it with: "
                                f"python -m data.chat prepare FILE... --out={folder}")
    meta = read_json(path)
    if meta.get("kind") != "chat":
        raise ValueError(f"{folder} holds no chat data (meta.json has no kind \"chat\"); "
                         f"conversations are prepared with: python -m data.chat prepare")
    if meta.get("version") != FORMAT_VERSION:
        raise ValueError(f"{path} has version {meta.get('version')!r}, this code reads "
                         f"{FORMAT_VERSION}; prepare the data again")
    splits = meta.get("splits")
    if not isinstance(splits, dict) or not all(isinstance(facts, dict) and "sha256" in facts
                                               for facts in splits.values()):
        raise ValueError(f"{path} is damaged: its splits have no checksums; prepare the data again")
    return meta


def read_split(folder: Path, split: str) -> list[str]:
    """The lines of "train" or "val", as prepared: a changed file is refused."""
    facts = read_meta(folder)["splits"].get(split)
    path = folder / f"{split}.jsonl"
    if facts is None or not path.exists():
        raise FileNotFoundError(f"{folder} has no {split}.jsonl; prepare the data again")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != facts["sha256"]:
        raise ValueError(f"{path} differs from its checksum in meta.json; after a change, prepare "
                         f"it again: python -m data.chat prepare {path} --out=FOLDER")
    return data.decode().split("\n")[:-1]


def first_question(line: str) -> list[Message]:
    """The messages of a prepared line up to the first one that is to be answered."""
    messages = json.loads(line)["messages"]
    end = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    return messages[:end]

"""Conversations from files: whatever shape they come in, they leave as messages.

    {"messages": [{"role": "system|user|assistant", "content": "..."}]}         format messages
    {"instruction": "...", "input": "...", "output": "...", "history": [...]}   alpaca
    {"conversation": [{"system": "...", "input": "...", "output": "..."}]}      conversation
    {"conversations": [{"from": "human|gpt|system", "value": "..."}]}           sharegpt

JSONL, or a JSON array of them. A conversation may open with a system message; then user and
assistant take turns. Alpaca's input is joined to its instruction by a blank line, and kept beside
it as well, so that the alpaca template can part them again: {"role": "user", "content":
"instruction\\n\\ninput", "input": "input"}.

Its history is a list of [question, answer] from before. An answer that is not to be learned says
"weight": 0 (OpenAI), or its format's own word for that; so it does as a message.

    conversations, dropped = read(files)
    write_conversations(folder, conversations, source, validation=0.05, dropped=dropped)

A data set (data/prepared.py) knows no tokenizer and no template; data/chat.py brings them together.
"""
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any, Callable, Iterable

from bpe import Tokenizer
from data.prepared import split_by_hash, write_dataset
from data.texts import check_characters, read_records

Message = dict[str, Any]
SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
            "assistant": "assistant", "bing": "assistant", "bard": "assistant", "system": "system"}
WEIGHTS = ("weight", "loss", "train", "output_with_loss")       # of OpenAI, swift, axolotl, xtuner
UNREAD = ("tools", "tool_calls", "functions", "function_call", "images")    # they change an answer
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
        check_characters(content, f"no text: message {i + 1}")
        more = message.get("input") or ""
        if more and not (isinstance(more, str) and content.endswith("\n\n" + more)):
            raise ValueError(f"no input: the content of message {i + 1} does not end with a blank "
                             f"line and its input")
        expected = ("assistant",) if role == "user" else ("user",)
    if len(messages) == 1 and messages[0]["role"] == "system":
        raise ValueError("no question: there is only a system message")


# ---------------------------------------------------------------------------- formats to messages

def from_messages(record: dict[str, Any]) -> list[Message]:
    """{messages: [{role, content}]}, the form that all are brought into."""
    return [*_system(record), *(
        {**{key: message[key] for key in ("role", "content", "input") if message.get(key)
            is not None}, **_weight(message)} if isinstance(message, dict) else message for message
        in _list(record, "messages"))]


def from_alpaca(record: dict[str, Any]) -> list[Message]:
    """{instruction, input, output}: one question, one answer, after those of its history."""
    question, more = record["instruction"], record.get("input") or ""
    user = {"role": "user", "content": question}
    if isinstance(question, str) and isinstance(more, str) and more.strip():
        user = {"role": "user", "content": f"{question}\n\n{more}", "input": more}
    elif more and not isinstance(more, str):
        raise ValueError("no text: the input is none")
    past = record.get("history") or []
    if not isinstance(past, list) or any(not isinstance(turn, list) or len(turn) != 2
                                         for turn in past):
        raise ValueError("no history: it must be a list of [question, answer]")
    return [*_system(record),
            *({"role": role, "content": content} for turn in past
              for role, content in zip(("user", "assistant"), turn)),
            user, {"role": "assistant", "content": record["output"]}]


def from_conversation(record: dict[str, Any]) -> list[Message]:
    """{conversation: [{system, input, output}]}: a question and its answer a turn."""
    messages: list[Message] = []
    for turn in _list(record, "conversation"):
        if not messages:
            messages += _system(turn) or _system(record)
            first = turn.get("system")
        elif turn.get("system") not in (None, "", first):
            raise ValueError("wrong role order: a later turn has another system message")
        messages += [{"role": "user", "content": turn["input"]},
                     {"role": "assistant", "content": turn["output"], **_weight(turn)}]
    return messages


def from_sharegpt(record: dict[str, Any]) -> list[Message]:
    """{conversations: [{from, value}]}, with the speakers' names of ShareGPT."""
    return [*_system(record), *({"role": SPEAKERS.get(turn["from"], turn["from"]),
                                 "content": turn["value"], **_weight(turn)}
                                for turn in _list(record, "conversations"))]


FORMATS: dict[str, Callable[[dict[str, Any]], list[Message]]] = {       # by the key that tells it
    "messages": from_messages, "instruction": from_alpaca, "conversation": from_conversation,
    "conversations": from_sharegpt}


def convert(record: Any) -> list[Message]:
    """The messages of a record; ValueError "reason: detail" if it is broken."""
    if not isinstance(record, dict):
        raise ValueError("no record: it is no JSON object")
    key = next((key for key in FORMATS if key in record), "")
    if not key:
        raise ValueError(f"no known format: keys {', '.join(map(str, record))!r:.80}")
    try:
        messages = FORMATS[key](record)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not of the format that has {key!r}: {type(error).__name__} {error}"
                         ) from None
    for part in (record, *(record[key] if isinstance(record[key], list) else ())):
        for name in UNREAD:
            if isinstance(part, dict) and part.get(name) not in (None, "", "[]", []):
                raise ValueError(f"no plain text: {name} is not read, and answers depend on it")
    if record.get("label") is False or record.get("kto_tag") is False:          # of KTO
        raise ValueError("unwanted answer: the record's label is false")
    check_messages(messages)
    if not any(message["role"] == "assistant" and message.get("weight", 1) for message in messages):
        raise ValueError("no answer: nobody answers in this conversation, or all with weight 0")
    return messages


def _system(record: dict[str, Any]) -> list[Message]:
    return [{"role": "system", "content": record["system"]}] if record.get("system") else []


def _weight(turn: dict[str, Any]) -> dict[str, int]:
    """{"weight": 0} of an answer that is not to be learned."""
    for name in WEIGHTS:
        if turn.get(name) not in (None, 0, 1):
            raise ValueError(f"no weight: {name}={turn[name]!r:.40} is neither 0 nor 1")
    return {"weight": 0} if any(turn.get(name) == 0 for name in WEIGHTS) else {}


def _list(record: dict[str, Any], key: str) -> list[Any]:
    if not isinstance(record[key], list):
        raise ValueError(f"no conversation: {key} is no list")
    return record[key]


# ------------------------------------------------------------------------- files to conversations

def read(files: Iterable[Path]) -> tuple[list[dict[str, Any]], Counter[str]]:
    """All conversations of the files, {"messages": ...} each, and how many were dropped why.

    A broken record is reported on stderr with its place.
    """
    conversations, dropped = [], Counter()
    for path in files:
        for place, record in read_records(path):
            try:
                if isinstance(record, ValueError):
                    raise record
                conversations.append({"messages": convert(record)})
            except ValueError as error:
                dropped[str(error).partition(":")[0]] += 1
                if sum(dropped.values()) <= SHOWN:
                    print(f"{place}: {error}; skipped", file=sys.stderr)
    if sum(dropped.values()) > SHOWN:
        print(f"... and {sum(dropped.values()) - SHOWN:,} more", file=sys.stderr)
    return conversations, dropped


# ---------------------------------------------------------------------- conversations to a data set

def split(conversations: list[dict[str, Any]], validation: float
          ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and validation, by the hash of a conversation's messages."""
    return split_by_hash(conversations, validation,
                         lambda found: json.dumps(found["messages"], ensure_ascii=False))


def write_conversations(folder: str | Path, conversations: list[dict[str, Any]], source: str,
                        validation: float = 0.05, dropped: dict[str, int] | None = None,
                        val: list[dict[str, Any]] | None = None, tokenizer: str = ""
                        ) -> dict[str, Any]:
    """Write a data set and return its meta.json. `val`: where the data bring their own; tokenizer:
    gpt2 or a path, to count tokens with."""
    train, val = split(conversations, validation) if val is None else (conversations, val)
    dropped = dict(dropped or {})
    meta = write_dataset(folder, "chat", {"train": train, "val": val}, source, dropped=dropped,
                         read=len(train) + len(val) + sum(dropped.values()))
    print(f"{folder}: {len(train):,} conversations to train on, {len(val):,} to validate"
          + "".join(f"; dropped {n:,}: {reason}" for reason, n in sorted(dropped.items())))
    encode = Tokenizer.load(tokenizer).encode if tokenizer else None
    for name, part in (("train", train), ("val", val)) if encode else ():
        counts: Counter[str] = Counter()
        for message in (message for record in part for message in record["messages"]):
            counts[message["role"]] += len(encode(message["content"]))
        print(f"{name}: {counts.total():,} tokens of {tokenizer} without a template, "
              f"{counts['assistant']:,} of them in answers")
    return meta

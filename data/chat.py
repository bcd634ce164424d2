"""Chat: conversations into token ids, with labels on what the assistant says and nowhere else.

    ids, labels = render(messages, tokenizer, "chatml")     # labels: the id, or -100 for no label
    ids = render_prompt(messages, tokenizer, "chatml")      # up to where the answer begins
    samples = load_samples(folder, "train", tokenizer, "chatml", block_size=1024)

    python -m data.chat prepare FILE... --out=data/mine     conversations of any known format
    python -m data.chat --from=PATH --out=data/mine         the same
    python -m data.chat inspect FILE|NAME [--tokenizer=gpt2] [--template=chatml]

An answer's label covers its text and the token that ends it, in every turn. Text is encoded in
stretches that end where an answer begins or ends, so the prompt's ids are a prefix of the whole
conversation's. Special tokens come from the template alone, by id: a message that spells one is
encoded as ordinary text. Formats of files: data/conversations.py; batches: data/samples.py.

Published templates: Stanford Alpaca (alpaca), DeepSeek LLM (plain), OpenAI's ChatML, Llama 3.
"""
import dataclasses
import hashlib
import json
import re
from array import array
from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Iterator, Literal

import numpy as np

from bpe import END_OF_TEXT, Tokenizer
from run.config import parse, run_command
from data import conversations
from data.conversations import Message, check_messages
from data.samples import IGNORE, Samples
from data.shards import DATA

Labels = Literal["all", "last"]
SPECIAL = re.compile(r"<\|\w+\|>")
PARTS = re.compile(r"(<\|\w+\|>|\{content\}|\{input\})")


@dataclass(frozen=True)
class Template:
    """How a conversation is written: {content} is a message's text, <|...|> a special token."""
    user: str
    opening: str                # of an answer; a prompt ends with it
    end: str                    # the special token that ends an answer, and has a label
    answer: str = "{content}"   # between the two
    after: str = ""             # behind the end of each answer
    start: str = ""             # before everything
    system: str = "{content}"
    again: str = ""             # before a user's message that follows an answer
    user_input: str = ""        # a user's message that came with an input: {content} and {input}
    default: str = ""           # a system message where there is none
    default_input: str = ""     # the same where the first question has an input

    @cached_property
    def special_tokens(self) -> list[str]:
        """Its <|...|>, each once, in order."""
        text = "".join(dataclasses.astuple(self))
        return list(dict.fromkeys(SPECIAL.findall(text)))


BELOW = "Below is an instruction that describes a task"
APPROPRIATELY = "Write a response that appropriately completes the request."
TEMPLATES = {
    "alpaca": Template(
        default=f"{BELOW}. {APPROPRIATELY}",
        default_input=f"{BELOW}, paired with an input that provides further context. "
                      f"{APPROPRIATELY}",
        system="{content}\n\n",
        user="### Instruction:\n{content}\n\n",
        user_input="### Instruction:\n{content}\n\n### Input:\n{input}\n\n",
        opening="### Response:", end=END_OF_TEXT, again="\n\n"),
    "plain": Template(
        start=END_OF_TEXT, system="{content}\n\n", user="User: {content}\n\n",
        opening="Assistant:", answer=" {content}", end=END_OF_TEXT),
    "chatml": Template(
        system="<|im_start|>system\n{content}<|im_end|>\n",
        user="<|im_start|>user\n{content}<|im_end|>\n",
        opening="<|im_start|>assistant\n", end="<|im_end|>", after="\n"),
    "llama3": Template(
        start="<|begin_of_text|>",
        system="<|start_header_id|>system<|end_header_id|>\n\n{content}<|eot_id|>",
        user="<|start_header_id|>user<|end_header_id|>\n\n{content}<|eot_id|>",
        opening="<|start_header_id|>assistant<|end_header_id|>\n\n", end="<|eot_id|>"),
    "none": Template(user="{content}", opening="", end=END_OF_TEXT),
}


def find_template(name: str) -> Template:
    """A template by its name. ValueError lists the names."""
    if name not in TEMPLATES:
        raise ValueError(f"template={name!r} is unknown; choose {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


# ----------------------------------------------------------------------------------- the renderer

def render(messages: list[Message], tokenizer: Tokenizer, template: str,
           labels: Labels = "all") -> tuple[list[int], list[int]]:
    """A conversation as ids and labels, equally long: labels[t] is ids[t] in answers, else -100.

    labels="last" is for learning the last answer only. A special token that the tokenizer lacks has
    the id that `extend_tokenizer` gives it. ValueError for what is no conversation.
    """
    ids, spans = encode(messages, tokenizer, template)
    found = [IGNORE] * len(ids)
    for start, end in chosen_spans(spans, labels):
        found[start:end] = ids[start:end]
    return ids, found


def render_prompt(messages: list[Message], tokenizer: Tokenizer, template: str) -> list[int]:
    """The ids that an answer to `messages` follows; those end with a user's message."""
    ids, _ = encode(messages, tokenizer, template, prompt=True)
    return ids


def chosen_spans(spans: list[tuple[int, int]], labels: Labels) -> list[tuple[int, int]]:
    """The answers to learn: all, or the last."""
    if labels not in ("all", "last"):
        raise ValueError(f"labels={labels!r} is unknown; choose all or last")
    return spans if labels == "all" else spans[-1:]


def encode(messages: list[Message], tokenizer: Tokenizer, template: str, prompt: bool = False
           ) -> tuple[list[int], list[tuple[int, int]]]:
    """The ids of a conversation, and where its answers (with their end tokens) stand in them."""
    check_messages(messages)
    if prompt and messages[-1]["role"] != "user":
        raise ValueError(f"a prompt ends with a user's message, not with one of "
                         f"{messages[-1]['role']!r}; leave the last one out")
    special = special_ids(tokenizer, template)
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    text, in_answer, start = [], False, 0       # the stretch that is not encoded yet
    for part, is_special, is_answer in pieces(messages, find_template(template), prompt):
        if text and (is_special or is_answer != in_answer):
            ids += tokenizer.encode("".join(text))
            text = []
        if is_answer and not in_answer:
            start = len(ids)
        elif in_answer and not is_answer:
            spans.append((start, len(ids)))
        in_answer = is_answer
        if is_special:
            ids.append(special[part])
        else:
            text.append(part)
    if text:
        ids += tokenizer.encode("".join(text))
    if in_answer:
        spans.append((start, len(ids)))
    return ids, spans


def pieces(messages: list[Message], t: Template, prompt: bool
           ) -> Iterator[tuple[str, bool, bool]]:
    """The text of a conversation in order: (text, is it a special token, is it of an answer)."""
    yield from filled(t.start)
    if messages[0]["role"] == "user" and t.default:
        default = t.default_input if messages[0].get("input") else t.default
        yield from filled(t.system, default)
    for i, message in enumerate(messages):
        content, more = message["content"], message.get("input") or ""
        if message["role"] == "system":
            yield from filled(t.system, content)
        elif message["role"] == "assistant":
            yield from filled(t.opening)
            yield from filled(t.answer, content, answer=True)
            yield t.end, True, True
            yield from filled(t.after)
        else:
            if i and messages[i - 1]["role"] == "assistant":
                yield from filled(t.again)
            if more and t.user_input:
                yield from filled(t.user_input, content.removesuffix("\n\n" + more), more)
            else:
                yield from filled(t.user, content)
    if prompt:
        yield from filled(t.opening)


def filled(pattern: str, content: str = "", more: str = "", answer: bool = False
           ) -> Iterator[tuple[str, bool, bool]]:
    """A pattern with a message's text in its places; triples as in `pieces`."""
    for part, is_special in parts_of(pattern):
        if part == "{content}":
            yield content, False, answer
        elif part == "{input}":
            yield more, False, answer
        else:
            yield part, is_special, answer


@lru_cache
def parts_of(pattern: str) -> list[tuple[str, bool]]:
    """Special tokens, places for text, and what is between."""
    return [(part, bool(SPECIAL.fullmatch(part))) for part in PARTS.split(pattern) if part]


# ------------------------------------------------------------------- special tokens and their rows

def special_ids(tokenizer: Tokenizer, template: str) -> dict[str, int]:
    """The ids of a template's special tokens; those the tokenizer lacks follow its own."""
    ids, missing = {}, 0
    for name in find_template(template).special_tokens:
        ids[name] = tokenizer.special_tokens.get(name, tokenizer.vocab_size + missing)
        missing += name not in tokenizer.special_tokens
    return ids


def extend_tokenizer(tokenizer: Tokenizer, template: str) -> Tokenizer:
    """A tokenizer that has the template's special tokens: itself if it has them already."""
    missing = [name for name in find_template(template).special_tokens
               if name not in tokenizer.special_tokens]
    return tokenizer.add_special_tokens(missing) if missing else tokenizer


# ------------------------------------------------------------------------------- folder to samples

def load_samples(folder: str | Path, split: str, tokenizer: Tokenizer, template: str,
                 block_size: int, labels: Labels = "all", on_error: str = "skip") -> Samples:
    """Render a split of prepared chat data for a model of block_size positions.

    A sample ends with its last label. One that is too long loses whole turns at its end; if even
    the first turn is too long, that one's answer is cut; if no label would be left, the sample is
    dropped, or refused with on_error="refuse". `counts` of the result says how often.
    """
    if extend_tokenizer(tokenizer, template) is not tokenizer:
        raise ValueError(f"the tokenizer lacks special tokens of template={template}; use "
                         f"data.chat.extend_tokenizer, and run.load.grow_embedding for the model")
    path = Path(folder) / f"{split}.jsonl"
    flat, labelled, offsets, counts = array("i"), bytearray(), [0], Counter()
    for number, line in enumerate(conversations.read_split(Path(folder), split), 1):
        counts["records"] += 1
        ids, spans = encode(json.loads(line)["messages"], tokenizer, template)
        spans, whole = cut(spans, block_size + 1)       # the last id is a target only
        if not spans:
            if on_error == "refuse":
                raise ValueError(f"{path}:{number}: the question fills block_size={block_size}, no "
                                 f"label is left; remove it, or use --on_error=skip")
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
        raise ValueError(f"{path} has no sample that fits block_size={block_size}")
    return Samples(np.array(flat, np.int32), np.frombuffer(labelled, np.bool_),
                   np.array(offsets, np.int64), block_size, dict(counts))


def cut(spans: list[tuple[int, int]], limit: int) -> tuple[list[tuple[int, int]], bool]:
    """The answers that fit into `limit` ids, and whether those are all of them, whole."""
    fitting = [span for span in spans if span[1] <= limit]
    if not fitting and spans[0][0] < limit:
        fitting = [(spans[0][0], limit)]
    return fitting, fitting == spans


def fingerprint(folder: str | Path, tokenizer: Tokenizer, template: str,
                labels: Labels = "all") -> str:
    """What identifies rendered chat data: its content, tokenizer, template and labels; 16 hex."""
    splits = conversations.read_meta(Path(folder))["splits"]
    facts = [{name: facts["sha256"] for name, facts in splits.items()}, tokenizer.hash,
             dataclasses.asdict(find_template(template)), labels]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


# ------------------------------------------------------------------------------- the command line

@dataclass(frozen=True)
class ChatConfig:
    from_: str = ""  # a .json or .jsonl file, or a folder of them; several by comma
    out: str = ""  # folder of the data set; empty: data/chat
    format: Literal["auto", "messages", "alpaca", "conversation", "sharegpt"] = "auto"
        # of the records; auto: told by their keys
    on_error: Literal["skip", "refuse"] = "skip"  # what to do with a broken record
    tokenizer: str = ""  # gpt2 or a tokenizer's path, to count tokens with; the data know none, so
        # this is optional
    validation: float = 0.05  # share of the conversations that validates


def prepare(config: ChatConfig) -> Path:
    """Conversations from files of any known format into a data set."""
    folder = Path(config.out or DATA / "chat")
    if not config.from_:
        raise ValueError("no source given; name files of conversations: python -m data.chat "
                         "prepare FILE... (pairs that need no file: python -m data.pydocs)")
    files = conversations.find_files(config.from_.split(","))
    found, dropped = conversations.read(files, config.format, config.on_error)
    if not found:
        raise ValueError(f"{config.from_} holds no conversation that can be used; nothing was "
                         f"written")
    conversations.write_dataset(folder, found, config.from_, config.validation, dropped)
    if config.tokenizer:
        conversations.count_tokens(folder, config.tokenizer)
    return folder


def main(words: list[str]) -> None:
    command = words[0] if words[:1] in (["prepare"], ["inspect"]) else ""
    words = words[1:] if command else words
    flags = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    names, flags = words[:flags], words[flags:]
    if command == "inspect":
        from data import inspect_chat
        inspect_chat.main(names, flags)
        return
    base = {"source": ",".join(names)} if names else {}
    prepare(parse(ChatConfig, flags, "python -m data.chat [prepare] FILE...", base, __doc__))


if __name__ == "__main__":
    run_command(main)

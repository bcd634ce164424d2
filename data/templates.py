"""Chat templates: conversations into token ids, and which of those an answer is made of.

    ids, labels = render(messages, tokenizer, "chatml")     # labels: the id, or -100 for no label
    ids = render_prompt(messages, tokenizer, "chatml")      # up to where the answer begins

An answer's label covers its text and the token that ends it, in every turn; one of "weight": 0 has
none. Text is encoded in stretches that end where an answer begins or ends, so the prompt's ids are
a prefix of the whole conversation's. Special tokens come from the template alone, by id: a message
that spells one is encoded as ordinary text.

Published templates: Stanford Alpaca (alpaca), DeepSeek LLM (plain), OpenAI's ChatML, Llama 3.
"""
import dataclasses
import re
from dataclasses import dataclass
from functools import cached_property
from itertools import count, groupby
from typing import Iterator, Literal

from bpe import END_OF_TEXT, Tokenizer
from data.conversations import Message, check_messages
from model import IGNORE

Labels = Literal["all", "last"]
SPECIAL = re.compile(r"<\|\w+\|>")
PARTS = re.compile(r"(<\|\w+\|>|\{(?:content|trimmed|input)\})")


@dataclass(frozen=True)
class Template:
    """How a conversation is written. {content} is a message's text, {trimmed} the same without
    outer spaces, <|...|> a special token."""
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
        system="<|start_header_id|>system<|end_header_id|>\n\n{trimmed}<|eot_id|>",
        user="<|start_header_id|>user<|end_header_id|>\n\n{trimmed}<|eot_id|>",
        opening="<|start_header_id|>assistant<|end_header_id|>\n\n", answer="{trimmed}",
        end="<|eot_id|>"),
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
    """The answers to learn: all of a weight above 0, or the last of those."""
    if labels not in ("all", "last"):
        raise ValueError(f"labels={labels!r} is unknown; choose all or last")
    return spans if labels == "all" else spans[-1:]


def cut(spans: list[tuple[int, int]], limit: int) -> tuple[list[tuple[int, int]], bool]:
    """The answers that fit into `limit` ids, and whether those are all of them, whole."""
    fitting = [span for span in spans if span[1] <= limit]
    if not fitting and spans and spans[0][0] < limit:
        fitting = [(spans[0][0], limit)]
    return fitting, fitting == spans


def encode(messages: list[Message], tokenizer: Tokenizer, template: str, prompt: bool = False
           ) -> tuple[list[int], list[tuple[int, int]]]:
    """The ids of a conversation, and where its answers (with their end tokens) stand in them, but
    for answers of weight 0."""
    check_messages(messages)
    if prompt and messages[-1]["role"] != "user":
        raise ValueError(f"a prompt ends with a user's message, not with one of "
                         f"{messages[-1]['role']!r}; leave the last one out")
    t, new = find_template(template), count(tokenizer.vocab_size)
    special = {**tokenizer.special_tokens, **dict(zip(missing_tokens(tokenizer, template), new))}
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    for is_answer, turn in groupby(pieces(messages, t, prompt), key=lambda piece: piece[2]):
        start = len(ids)
        for is_special, parts in groupby(turn, key=lambda piece: piece[1]):
            words = [part for part, *_ in parts]
            if is_special:
                ids += [special[word] for word in words]
            elif t.answer == "{trimmed}" and not is_answer and "".join(words).isspace():
                ids += encode_before_word("".join(words), tokenizer)    # the opening's line ends
            else:
                ids += tokenizer.encode("".join(words))
        if is_answer:
            spans.append((start, len(ids)))
    answers = (message for message in messages if message["role"] == "assistant")
    return ids, [span for span, answer in zip(spans, answers) if answer.get("weight", 1)]


def encode_before_word(space: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of line ends where a word follows: GPT-2's pattern cuts "\n\n" in two there only.

    So an opening has the ids that it has in the whole text. Where a tokenizer joins line ends and
    words to one token, an answer could not be parted from it; there the line ends are alone.
    """
    ids, word = tokenizer.encode(space + "x"), tokenizer.encode("x")
    return ids[:-1] if ids[-1:] == word else tokenizer.encode(space)


def pieces(messages: list[Message], t: Template, prompt: bool) -> Iterator[tuple[str, bool, bool]]:
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
    texts = {"{content}": content, "{trimmed}": content.strip(), "{input}": more}
    for part in PARTS.split(pattern):
        if part:
            yield texts.get(part, part), bool(SPECIAL.fullmatch(part)), answer


# -------------------------------------------------------------------------------- special tokens

def missing_tokens(tokenizer: Tokenizer, template: str) -> list[str]:
    """The template's special tokens that a tokenizer lacks; their ids will follow its own."""
    return [name for name in find_template(template).special_tokens
            if name not in tokenizer.special_tokens]


def extend_tokenizer(tokenizer: Tokenizer, template: str) -> Tokenizer:
    """A tokenizer that has the template's special tokens: itself if it has them already."""
    missing = missing_tokens(tokenizer, template)
    return tokenizer.add_special_tokens(missing) if missing else tokenizer

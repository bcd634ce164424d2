"""Text to pieces: what a pattern cuts out of a text, as tiktoken cuts it.

The plain form of `split(pattern, text)` is regex.findall(pattern, text). Two things are added. A
pattern that would lose characters is refused. And letters newer than the Unicode version of
`regex` or of tiktoken's engine (some thousand since 2024) are taken for what tiktoken takes them
for, so that a tokenizer is trained on the pieces that it will encode.

References: GPT-2's pattern, Radford et al. 2019; those of GPT-4 and o200k, tiktoken; nanochat's.
"""
import functools
import itertools
import math
from typing import Callable, Iterable

import numpy as np
import regex
import tiktoken

GPT2_PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
GPT4_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+")
O200K_PATTERN = (       # of GPT-4o: a new piece at a capital letter, and marks belong to words
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
NANOCHAT_PATTERN = GPT4_PATTERN.replace("{1,3}", "{1,2}")       # two digits a piece, not three
NO_PATTERN = r"[\s\S]+"    # the whole text is one piece
PATTERNS = {"gpt2": GPT2_PATTERN, "gpt4": GPT4_PATTERN, "o200k": O200K_PATTERN,
            "nanochat": NANOCHAT_PATTERN, "none": NO_PATTERN}

# What these patterns tell apart, each with an example; everything else is like U+0378, unassigned.
CLASSES = ((r"\p{Lu}\p{Lt}", "A"), (r"\p{Ll}", "a"), (r"\p{Lm}\p{Lo}", "中"), (r"\p{N}", "²"),
           (r"\s", " "), (r"\p{M}", "\u0301"))
LETTER, NUMBER, SPACE = 1, 2, 3   # the kinds of characters for GPT-2's; 0 is everything else
POINTS = np.concatenate((np.arange(0xD800), np.arange(0xE000, 0x40000))).astype("<u4")
# Every ASCII character and one or two characters of each other kind, between letters: a pattern
# that loses a character loses one of these.
PROBE = "a".join([chr(i) for i in (*range(33, 128), *range(33))] + list(
    "éǅʰ中\u0301\u0903\u20dd٣Ⅷ²‿–‘’“”«§€¨©\u00a0\u2028\u2029\u3000\u200d\ue000\U0001f600"))


def split(pattern: str, text: str) -> list[str]:
    """The pieces of a text, which joined are the text: regex.findall(pattern, text).

    ValueError if the pattern is no regex or loses characters, with an example.
    """
    compiled = compile_pattern(pattern)
    if text.isascii():
        return find_all(compiled, text)
    shown = as_text(shown_as()[as_codes(text)])
    pieces = find_all(compiled, shown)
    if shown != text:
        ends = list(itertools.accumulate(map(len, pieces)))
        pieces = [text[i:j] for i, j in zip([0] + ends, ends)]
    return pieces


def find_all(compiled: regex.Pattern, text: str) -> list[str]:
    """The matches in a text; ValueError, with the place, if they are not the whole text."""
    pieces = compiled.findall(text)
    if sum(map(len, pieces)) != len(text) or "" in pieces:
        end = 0
        for match in compiled.finditer(text):
            if match.start() != end or match.end() == end:
                break
            end = match.end()
        raise ValueError(f"pattern={compiled.pattern!r} drops {text[end:end + 1]!r} (it matches "
                         "nothing there); every character must fall into a piece: add |[\\s\\S]")
    return pieces


@functools.lru_cache
def compile_pattern(pattern: str) -> regex.Pattern:
    """The compiled pattern; ValueError if it cannot cut texts into pieces."""
    repeats = [int(number) for pair in regex.findall(r"\{(\d*),?(\d*)\}", pattern)
               for number in pair if number]
    if math.prod(max(number, 1) for number in repeats) > 10_000:     # as in ((a{99}){99}){99}
        raise ValueError(f"pattern={pattern!r:.80} repeats a part more than 10,000 times, which "
                         "takes gigabytes to compile")
    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"pattern={pattern!r} is not a regular expression: {error}; allowed: "
                         f"{', '.join(PATTERNS)} or a regex of the `regex` module") from None
    if compiled.groups:
        raise ValueError(f"pattern={pattern!r} has capturing groups; write (?:...) for (...)")
    if pattern not in PATTERNS.values():
        find_all(compiled, PROBE)
    return compiled


def check_surrogates(text: str) -> None:
    """ValueError, with its place, if the text has a lone surrogate."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text has a lone surrogate, U+{ord(text[error.start]):04X} at character "
                f"{error.start}, which no UTF-8 can hold; clean it with "
                "text.encode('utf-8', 'replace').decode()") from None


# -------------------------------------------------------------- two versions of Unicode, one split

@functools.cache
def classes() -> tuple[np.ndarray, np.ndarray]:
    """The class of every code point as tiktoken knows it (Unicode has letters up to U+3FFFF), and
    the doubtful ones, which `regex`, of another Unicode version, takes for another."""
    table, every = np.zeros(0x110000, np.uint8), as_text(POINTS)
    for i, (members, _) in enumerate(CLASSES, 1):
        table[as_codes("".join(regex.findall(f"[{members}]+", every)))] = i
    by_regex = table.copy()
    seen = by_regex[POINTS]         # tiktoken is asked for the differences: it is slow to write
    for sign in ("^", ""):                              # lost by a class, then found for one
        for i, (members, _) in enumerate(CLASSES, 1):
            only = tiktoken.Encoding("class", pat_str=f"[{sign}{members}]+", special_tokens={},
                                     mergeable_ranks={bytes([b]): b for b in range(256)})
            among = as_text(POINTS[seen == i if sign else seen != i])
            table[as_codes(bytes(only.encode_ordinary(among)).decode())] = 0 if sign else i
    return table, np.flatnonzero(table != by_regex)


def as_text(codes: np.ndarray) -> str:
    """Code points as text."""
    return codes.tobytes().decode("utf-32-le")


def as_codes(text: str) -> np.ndarray:
    """Text as code points."""
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


@functools.cache
def kinds() -> np.ndarray:
    """The kind of every code point: letter, number, space or other, as tiktoken knows it."""
    return np.array([0, LETTER, LETTER, LETTER, NUMBER, SPACE, 0], np.uint8)[classes()[0]]


@functools.cache
def shown_as() -> np.ndarray:
    """For each code point one that `regex` takes for the class that tiktoken knows it by: itself,
    or of a doubtful one an example."""
    table, (known, points) = np.arange(0x110000, dtype="<u4"), classes()
    examples = np.array([ord(example) for example in ("\u0378", *(char for _, char in CLASSES))])
    table[points] = examples[known[points]]
    return table

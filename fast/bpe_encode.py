"""Encoding by tiktoken, in Rust: the ids of `bpe.encode_slowly`, and ids of any text at all."""
import re
from typing import Iterable

import numpy as np
import tiktoken

from fast.bpe_pieces import GPT2_PATTERN, NO_PATTERN, check_surrogates, split

# GPT-2's pattern as tiktoken writes it, the same pieces with less backtracking: an ending such as
# 's or 'll, else letters, digits or other signs, each with one space before, else white space.
TIKTOKEN_GPT2 = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s")


def make_encoding(name: str, pattern: str, token_bytes: list[bytes], special_tokens: dict[str, int]
                  ) -> tiktoken.Encoding:
    """A tiktoken.Encoding from the bytes of every id (b"" for special tokens).

    ValueError for a pattern that its regex engine does not read.
    """
    ranks = {token: i for i, token in enumerate(token_bytes) if token}
    written = TIKTOKEN_GPT2 if pattern == GPT2_PATTERN else pattern
    try:
        return tiktoken.Encoding(name, pat_str=written, mergeable_ranks=ranks,
                                 special_tokens=special_tokens)
    except ValueError as error:
        raise ValueError(f"pattern={pattern!r} is not one that tiktoken's regex engine reads: "
                         f"{error}") from None


def encode_with_tiktoken(encoding: tiktoken.Encoding, text: str,
                         allowed_special: Iterable[str] | str = (), as_array: bool = False
                         ) -> list[int] | np.ndarray:
    """The ids of a text; special tokens only where `allowed_special` (names, or "all") says.
    as_array: spares a list of them.

    The plain form is bpe.encode_slowly over the pieces of the text. ValueError for a lone
    surrogate, and for a name that is no special token.
    """
    if allowed_special:
        return encode_with_specials(encoding, text, allowed_special)
    check_surrogates(text)
    try:
        return (encoding.encode_to_numpy(text, disallowed_special=()) if as_array else
                encoding.encode_ordinary(text))
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
    # tiktoken's regex engine gives up after a million steps back, as in a run of a million spaces
    # before a word; so split in Python, and let it merge piece by piece.
    whole = tiktoken.Encoding(encoding.name, pat_str=NO_PATTERN, special_tokens={},
                              mergeable_ranks=encoding._mergeable_ranks)
    return [i for piece in split(encoding._pat_str, text) for i in whole.encode_ordinary(piece)]


def encode_with_specials(encoding: tiktoken.Encoding, text: str,
                         allowed: Iterable[str] | str) -> list[int]:
    """The same, the text cut at special tokens; where two of them fit, at the longer one."""
    specials = encoding._special_tokens
    if isinstance(allowed, str):
        allowed = specials if allowed == "all" else [allowed]
    allowed = sorted(allowed, key=len, reverse=True)
    for name in allowed:
        if name not in specials:
            raise ValueError(f"allowed_special={name!r} is not a special token; allowed: "
                             f"{', '.join(specials) or 'none, there are none'}")
    parts = re.split(f"({'|'.join(map(re.escape, allowed))})", text) if allowed else [text]
    ids = []
    for i, part in enumerate(parts):        # every other part is a special token
        ids += [specials[part]] if i % 2 else encode_with_tiktoken(encoding, part)
    return ids


def encode_pieces(encoding: tiktoken.Encoding, pieces: dict[bytes, int]
                  ) -> dict[tuple[int, ...], int]:
    """Pieces as the ids that they are encoded to, with their counts; those of one id are left out,
    for no pair is in them."""
    words = ((tuple(encoding._encode_single_piece(piece)), n) for piece, n in pieces.items())
    return {ids: n for ids, n in words if len(ids) > 1}

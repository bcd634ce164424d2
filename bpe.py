"""Byte-level byte pair encoding (BPE): train, encode, decode, save, exchange.

A tokenizer turns text into integers and back. BPE starts from the 256 bytes, so nothing is ever
unknown, and learns `merges` from a corpus: it replaces the most frequent pair of neighbouring
tokens by a new token, again and again. Common words end up as one token, rare ones as several.

Before that, a regular expression (the `pattern`) cuts the text into pieces; merges never cross
pieces, so "dog", "dog." and "dog!" share one token for the word, whatever stands beside it:

    >>> split(compile_pattern(GPT2_PATTERN), "I've 12 dogs, a dog!")
    ['I', "'ve", ' 12', ' dogs', ',', ' a', ' dog', '!']

The whole algorithm is `train_slowly` and `encode_slowly` below. The rest of this file is the
tokenizer around it and its command line; bpe_train.py is the same training made fast, tiktoken
the same encoding; bpe_files.py reads and writes the files of others.

In: text, as files or strings. Out: a Tokenizer, kept in a readable tok.json.

    python bpe.py train FILE... --vocab-size=32000 --out=tok.json [--pattern=gpt2|gpt4|none|REGEX]
    python bpe.py encode --tokenizer=tok.json < text > ids
    python bpe.py decode --tokenizer=tok.json < ids > text
    python bpe.py compare FILE... --tokenizer=gpt2 --tokenizer=tok.json

    >>> tok = Tokenizer.train(["aaabdaaabac"], 259, special_tokens=())
    >>> tok.merges, tok.encode("aaabdaaabac")
    ([(97, 97), (97, 98), (256, 257)], [258, 100, 258, 97, 99])

Ids: 0..255 are the bytes, 256 + i is what merge i makes, special tokens come last. Tokenizers of
others may put their bytes in another order (GPT-2) or their special tokens first (Hugging Face).

References: BPE for text, Sennrich et al. 2016, arXiv 1508.07909. Byte level and the pattern:
GPT-2, Radford et al. 2019.
"""
import argparse
import hashlib
import json
import math
import os
import re
import sys
import time
import unicodedata
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Iterable, Iterator, Sequence

import numpy as np
import tiktoken
from tqdm import tqdm

from formats.tokenizer import has_gpt2  # noqa: F401 (for users of bpe)
from formats.files import read_json, write_text
from formats.tokenizer import (find_gpt2, from_gpt2_folder, from_hugging_face, from_ranks, readable,
                               write_hugging_face)
from fast.bpe import GPT4_PATTERN  # noqa: F401 (for users of bpe)
from fast.bpe import (BLOCK, GPT2_PATTERN, NO_PATTERN, PATTERNS, SAFE_PATTERNS, check_surrogates,
                       compile_pattern, count_pieces, file_sizes, learn_merges, read_blocks, split)

END_OF_TEXT = "<|endoftext|>"
FORMAT, VERSION = "oneloop-bpe", 1   # of tok.json
MOST_IDS = 1 << 22      # 16 times the largest vocabulary in use; what damaged files claim is more
# What numbers in the place of texts, missing keys and the like raise while a file is read.
WRONG_TYPES = (AttributeError, IndexError, KeyError, OverflowError, RecursionError, TypeError)
# GPT-2's pattern as tiktoken writes it, the same pieces with less backtracking: an ending such as
# 's or 'll, else letters, digits or other signs, each with one space before, else white space.
TIKTOKEN_GPT2 = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s")


# ------------------------------------------------------------------------- 1. the specification

def train_slowly(pieces: dict[bytes, int], num_merges: int, min_frequency: int = 1
                 ) -> list[tuple[int, int]]:
    """The definition of BPE training. `pieces` maps bytes to counts; `learn_merges` is equal.

    >>> train_slowly({b"hug": 10, b"pug": 5, b"hugs": 5}, 2)     # "ug" is in 20 words, then h + ug
    [(117, 103), (104, 256)]
    """
    words = {piece: list(piece) for piece in pieces}
    merges = []
    for new in range(256, 256 + num_merges):
        counts = Counter()
        for piece, word in words.items():
            for pair in zip(word, word[1:]):
                counts[pair] += pieces[piece]
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))   # ties: the smaller pair
        if counts[best] < min_frequency:
            break
        merges.append(best)
        words = {piece: merge(word, best, new) for piece, word in words.items()}
    return merges


def encode_slowly(words: Iterable[Sequence[int]], made: dict[tuple[int, int], int]) -> list[int]:
    """The definition of BPE encoding: within a word, apply the earliest merge, until none fits.

    words: the pieces, each as the ids of its bytes; made: {pair: the id that its merge makes}.

    >>> encode_slowly([b"hugs", b"pugs"], {(117, 103): 256, (104, 256): 257})
    [257, 115, 112, 256, 115]
    """
    ids = []
    for word in words:
        while pairs := [pair for pair in zip(word, word[1:]) if pair in made]:
            earliest = min(pairs, key=made.get)
            word = merge(word, earliest, made[earliest])
        ids += word
    return ids


def merge(word: Sequence[int], pair: tuple[int, int], new: int) -> list[int]:
    """Replace each `pair` by `new`, left to right: merge([7, 7, 7], (7, 7), 8) is [8, 7]."""
    out, i = [], 0
    while i < len(word):
        if tuple(word[i:i + 2]) == pair:
            out.append(new)
            i += 2
        else:
            out.append(word[i])
            i += 1
    return out


# ---------------------------------------------------------------------------- 2. the tokenizer

class Tokenizer:
    """Merges, pattern and special tokens; everything else follows from them.

    Text is always encoded as ordinary text. A special token comes out only when it is allowed
    by name, tok.encode(text, allowed_special=("<|endoftext|>",)), or put in by its id, tok.eot:
    what a user types can never end a document.
    """

    def __init__(self, merges: Iterable[Sequence[int]], pattern: str = GPT2_PATTERN,
                 special_tokens: Iterable[str] | dict[str, int] = (END_OF_TEXT,),
                 byte_ids: Iterable[int] = range(256), first_merge: int = 256):
        """`special_tokens` is a dict name -> id, or names whose ids follow the merges.

        byte_ids[b] is the id of byte b; merge i makes id first_merge + i. Both are the plain
        ones unless the tokenizer was made elsewhere (GPT-2's id 0 is "!").
        ValueError if pattern, special tokens, byte_ids or merges cannot be those of a BPE.
        """
        self._compiled = compile_pattern(pattern)
        self.pattern = pattern
        self.merges = [(int(a), int(b)) for a, b in merges]
        self.byte_ids, self.first_merge = tuple(byte_ids), first_merge
        after = max(first_merge + len(self.merges), 256)
        self.special_tokens = check_specials(special_tokens, after)
        self.token_bytes = self._spell()
        self.vocab_size = len(self.token_bytes)
        self.eot = self.special_tokens.get(END_OF_TEXT)
        self._encoding = self._hash = None

    def _spell(self) -> list[bytes]:
        """The bytes of every id; b"" for special tokens (and ids that nothing has)."""
        end = self.first_merge + len(self.merges)
        spelled = {i: bytes([b]) for b, i in enumerate(self.byte_ids)}
        if len(spelled) != 256 or max(spelled) >= self.first_merge:
            raise ValueError("byte_ids must be 256 different ids under "
                             f"first_merge={self.first_merge}")
        for i, (a, b) in enumerate(self.merges, self.first_merge):
            if a not in spelled or b not in spelled:
                raise ValueError(f"merges[{i - self.first_merge}]=({a}, {b}) uses an id that no "
                                 "byte or earlier merge has")
            spelled[i] = spelled[a] + spelled[b]
        if len(set(spelled.values())) != len(spelled):
            raise ValueError("two merges make the same token; no BPE trainer does that")
        for name, i in self.special_tokens.items():
            if i in spelled:
                raise ValueError(f"special token {name!r} has id {i}, which a byte or merge has")
        size = max([end, 256, *(i + 1 for i in self.special_tokens.values())])
        if size > MOST_IDS:
            raise ValueError(f"id {size - 1} is beyond the {MOST_IDS:,} ids that are allowed")
        return [spelled.get(i, b"") for i in range(size)]

    # -------------------------------------------------------------------------- where they are from

    @classmethod
    def train(cls, texts: Iterable[str] | str, vocab_size: int, pattern: str = GPT2_PATTERN,
              special_tokens: Iterable[str] = (END_OF_TEXT,), min_frequency: int = 1,
              num_proc: int | None = None, progress: bool = False) -> "Tokenizer":
        """Learn merges from texts, which are read once and not kept.

        vocab_size: 256 bytes + merges + special tokens; pattern: a name in PATTERNS or a regex;
        min_frequency: stop, with a warning, when no pair is as frequent; num_proc: counting
        processes, None is one per core. ValueError for what cannot serve.
        """
        pattern = PATTERNS.get(pattern, pattern)
        special_tokens = tuple(check_specials(special_tokens, 256))
        count_merges(vocab_size, special_tokens, min_frequency)
        texts = [texts] if isinstance(texts, str) else texts
        texts = tqdm(texts, desc="counting", unit="text", disable=None if progress else True)
        pieces = count_pieces(texts, pattern, num_proc)
        return cls.from_pieces(pieces, vocab_size, pattern, special_tokens, min_frequency, progress)

    @classmethod
    def from_pieces(cls, pieces: dict[bytes, int], vocab_size: int, pattern: str = GPT2_PATTERN,
                    special_tokens: Sequence[str] = (END_OF_TEXT,), min_frequency: int = 1,
                    progress: bool = False) -> "Tokenizer":
        """Learn merges from `count_pieces`' counts; the rest is as in `train`."""
        num_merges = count_merges(vocab_size, special_tokens, min_frequency)
        merges = learn_merges(pieces, num_merges, min_frequency, progress)
        if len(merges) < num_merges:
            warnings.warn(f"stopped after {len(merges):,} of {num_merges:,} merges: no pair is "
                          f"left that occurs {min_frequency} or more times", stacklevel=3)
        return cls(merges, pattern, special_tokens)

    @classmethod
    def gpt2(cls, folder: str | Path | None = None) -> "Tokenizer":
        """GPT-2's own tokenizer; its two files are downloaded once unless a folder holds them."""
        return cls.load(folder or find_gpt2())

    def add_special_tokens(self, names: Iterable[str]) -> "Tokenizer":
        """A new tokenizer with more special tokens, their ids after all existing ones.

        ValueError for a name that exists already, is empty or is given twice.
        """
        more = check_specials(names, self.vocab_size)
        for name in more:
            if name in self.special_tokens:
                raise ValueError(f"special token {name!r} exists already, as id "
                                 f"{self.special_tokens[name]}")
        return Tokenizer(self.merges, self.pattern, {**self.special_tokens, **more},
                         self.byte_ids, self.first_merge)

    # ------------------------------------------------------------------------ text to ids and back

    def encode_slowly(self, text: str) -> list[int]:
        """The ids that `encode` gives, by the definition."""
        made = {pair: i for i, pair in enumerate(self.merges, self.first_merge)}
        return encode_slowly(([self.byte_ids[byte] for byte in piece.encode()]
                              for piece in split(self._compiled, text)), made)

    def encode(self, text: str, allowed_special: Iterable[str] | str = ()) -> list[int]:
        """Ids of a text; special tokens only where `allowed_special` (names, or "all") says.

        ValueError for a lone surrogate, and for a name that is no special token.
        """
        if allowed_special:
            return self._encode_with(allowed_special, text)
        check_surrogates(text)
        encoding = self.to_tiktoken()
        try:
            return encoding.encode_ordinary(text)
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
        # tiktoken's regex engine gives up after a million steps back, as in a run of a million
        # spaces before a word; so split in Python, and let it merge piece by piece.
        whole = self._as_tiktoken(NO_PATTERN)
        return [i for piece in split(self._compiled, text) for i in whole.encode_ordinary(piece)]

    def _encode_with(self, allowed: Iterable[str] | str, text: str) -> list[int]:
        if isinstance(allowed, str):
            allowed = self.special_tokens if allowed == "all" else [allowed]
        allowed = list(allowed)
        for name in allowed:
            if name not in self.special_tokens:
                raise ValueError(f"allowed_special={name!r} is not a special token; allowed: "
                                 f"{', '.join(self.special_tokens) or 'none, there are none'}")
        if not allowed:
            return self.encode(text)
        longest_first = sorted(allowed, key=len, reverse=True)
        parts = re.split(f"({'|'.join(map(re.escape, longest_first))})", text)
        ids = []
        for i, part in enumerate(parts):   # every other part is a special token
            ids += [self.special_tokens[part]] if i % 2 else self.encode(part)
        return ids

    def encode_batch(self, texts: Iterable[str], num_threads: int | None = None
                     ) -> list[list[int]]:
        """Ids of each text, special tokens as ordinary text, in threads (None: one per core)."""
        with ThreadPoolExecutor(num_threads or os.cpu_count()) as pool:
            return list(pool.map(self.encode, texts))

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of any bytes: what is valid UTF-8 as text, each other byte as itself."""
        ids = []
        text = data.decode("utf-8", "surrogateescape")   # invalid byte 0xff is then U+DCFF
        for i, part in enumerate(re.split("([\udc80-\udcff]+)", text)):
            if i % 2:
                ids += [self.byte_ids[ord(char) - 0xDC00] for char in part]
            else:
                ids += self.encode(part)
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids; special tokens as their names. ValueError for an id that has none."""
        names = {i: name.encode() for name, i in self.special_tokens.items()}
        out = []
        for i in ids:
            token = self.token_bytes[i] if 0 <= i < self.vocab_size else b""
            token = token or names.get(int(i))
            if not token:
                raise ValueError(f"id {i} is not in the vocabulary; allowed: 0 to "
                                 f"{self.vocab_size - 1}")
            out.append(token)
        return b"".join(out)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    # ---------------------------------------------------------------------------------- in and out

    @property
    def _state(self) -> dict[str, Any]:
        """What a tokenizer is, in JSON; a token's spelling stands beside its merge, to read."""
        spell = [readable(token) for token in self.token_bytes]
        return {"pattern": self.pattern, "special_tokens": self.special_tokens,
                "byte_ids": list(self.byte_ids), "first_merge": self.first_merge,
                "merges": [[a, b, spell[i]] for i, (a, b) in
                           enumerate(self.merges, self.first_merge)]}

    @property
    def hash(self) -> str:
        """sha256 over pattern, merges and special tokens: equal means the same ids."""
        if self._hash is None:
            state = json.dumps(self._state, sort_keys=True)
            self._hash = hashlib.sha256(state.encode()).hexdigest()
        return self._hash

    def save(self, path: str | Path) -> None:
        """tok.json: readable, one merge a line, with a checksum; written whole or not at all."""
        state = self._state
        merges = ",\n".join(json.dumps(row, ensure_ascii=False) for row in state.pop("merges"))
        head = {"format": FORMAT, "version": VERSION, "sha256": self.hash, **state}
        lines = [f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}"
                 for key, value in head.items()]
        write_text(path, "{\n" + ",\n".join(lines) + f',\n"merges": [\n{merges}\n]}}\n')

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read our tok.json, a Hugging Face tokenizer.json, or a folder with one of them or with
        GPT-2's files (vocab.bpe and encoder.json, or merges.txt and vocab.json).

        FileNotFoundError if there is none; ValueError for a file that was changed or truncated,
        is of another version or kind, or would not give the ids that its maker gives.
        """
        path = Path(path)
        if path.is_dir():
            files = [path / name for name in ("tok.json", "tokenizer.json")]
            path = next((file for file in files if file.is_file()), path)
        try:
            if path.is_dir():
                return cls._from_file(path, **from_gpt2_folder(path))
            data = read_json(path)
            if isinstance(data, dict) and "model" in data:
                return cls._from_file(path, **from_hugging_face(data, path, PATTERNS))
        except WRONG_TYPES as error:
            raise ValueError(f"{path} was changed or damaged: {error!r:.200}") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"{path} is neither our tok.json nor a Hugging Face tokenizer.json")
        if data.get("version") != VERSION:
            raise ValueError(f"{path} has version {data.get('version')!r:.50}; this code reads "
                             f"version {VERSION}: train again or use the code that wrote it")
        try:
            check_lengths(data["merges"], data["first_merge"])
            check_repeats(data["pattern"])
            tok = cls([row[:2] for row in data["merges"]], data["pattern"],
                      data["special_tokens"], data["byte_ids"], data["first_merge"])
            intact = {**tok._state, "format": FORMAT, "version": VERSION, "sha256": tok.hash}
        except (ValueError, *WRONG_TYPES) as error:
            raise ValueError(f"{path} was changed or damaged: {error!r:.200}") from None
        if data != intact:
            raise ValueError(f"{path} was changed after it was written: its checksum does not fit")
        return tok

    @classmethod
    def _from_file(cls, path: Path, **arguments: Any) -> "Tokenizer":
        """A tokenizer of others; what is wrong with it is said with the file's name."""
        try:
            check_repeats(arguments.get("pattern", GPT2_PATTERN))
            return cls(**arguments)
        except ValueError as error:
            raise ValueError(f"{path} is no BPE that can be read: {error!s:.300}") from None

    def to_tiktoken(self) -> tiktoken.Encoding:
        """The same tokenizer as a tiktoken.Encoding, which is what encodes, in Rust.

        ValueError for a pattern that its regex engine does not read.
        """
        if self._encoding is None:
            gpt2 = self.pattern == GPT2_PATTERN
            self._encoding = self._as_tiktoken(TIKTOKEN_GPT2 if gpt2 else self.pattern)
        return self._encoding

    def _as_tiktoken(self, pattern: str) -> tiktoken.Encoding:
        ranks = {token: i for i, token in enumerate(self.token_bytes) if token}
        try:
            return tiktoken.Encoding(f"oneloop-{self.hash[:8]}", pat_str=pattern,
                                     mergeable_ranks=ranks, special_tokens=self.special_tokens)
        except ValueError as error:
            raise ValueError(f"pattern={pattern!r} is not one that tiktoken's regex engine "
                             f"reads: {error}") from None

    @classmethod
    def from_tiktoken(cls, encoding: tiktoken.Encoding) -> "Tokenizer":
        """The same tokenizer as a tiktoken.Encoding; ValueError if that was not made by BPE."""
        pattern = encoding._pat_str
        return cls(**from_ranks(encoding._mergeable_ranks, encoding.name),
                   pattern=GPT2_PATTERN if pattern == TIKTOKEN_GPT2 else pattern,
                   special_tokens=dict(encoding._special_tokens))

    def save_pretrained(self, folder: str | Path) -> None:
        """tokenizer.json and tokenizer_config.json for Hugging Face's AutoTokenizer."""
        write_hugging_face(folder, self.merges, self.token_bytes, self.special_tokens,
                           pattern=None if self.pattern == GPT2_PATTERN else self.pattern,
                           end=None if self.eot is None else END_OF_TEXT)


def find_tokenizer(name: str | Path) -> Tokenizer:
    """The tokenizer of a name that a user gives: gpt2, a file or a folder; errors as in `load`."""
    return Tokenizer.gpt2() if name == "gpt2" else Tokenizer.load(name)


def check_lengths(merges: list[list[Any]], first_merge: int) -> None:
    """ValueError where a merge makes more bytes than its spelling in the file can hold.

    A merge can double a token, so a few damaged lines could ask for more memory than there is.
    """
    sizes: dict[int, int] = {}
    for i, (a, b, spelling) in enumerate(merges, first_merge):
        sizes[i] = sizes.get(a, 1) + sizes.get(b, 1)
        if sizes[i] > 4 * len(spelling):                # a character has up to four bytes
            raise ValueError(f"merges[{i - first_merge}] does not make {spelling!r:.50}")


def check_repeats(pattern: str) -> None:
    """ValueError for repeats such as ((a{99}){99}){99}, which take gigabytes to compile."""
    counts = [int(number) for pair in re.findall(r"\{(\d*),?(\d*)\}", pattern)
              for number in pair if number]
    if math.prod(max(count, 1) for count in counts) > 10_000:
        raise ValueError(f"pattern={pattern!r:.80} repeats a part more than 10,000 times")


def count_merges(vocab_size: int, special_tokens: Sequence[str], min_frequency: int) -> int:
    """How many merges fill the vocabulary; ValueError if it has no room for the other ids."""
    least = 256 + len(special_tokens)
    if vocab_size < least:
        raise ValueError(f"vocab_size={vocab_size} is under 256 bytes + {len(special_tokens)} "
                         f"special tokens; give at least {least}")
    if min_frequency < 1:
        raise ValueError(f"min_frequency={min_frequency} is not allowed; give at least 1")
    return vocab_size - least


def check_specials(names: Iterable[str] | dict[str, int], first_id: int) -> dict[str, int]:
    """Names (or name -> id) of special tokens as a dict; duplicates and empty ones are refused."""
    if isinstance(names, str):
        raise ValueError(f"special_tokens={names!r} is one string; give a list of names")
    names = names if isinstance(names, dict) else tuple(names)
    for name in names:
        if not isinstance(name, str) or not name:
            raise ValueError(f"special token {name!r} is empty or not a string; give it a name")
    if isinstance(names, dict):
        if len(set(names.values())) != len(names):
            raise ValueError(f"two special tokens share an id: {names}")
        return dict(names)
    for name, count in Counter(names).items():
        if count > 1:
            raise ValueError(f"special token {name!r} is given twice; each name may stand once")
    return {name: i for i, name in enumerate(names, first_id)}


# ------------------------------------------------------------------------- 3. the command line

def train_command(args: argparse.Namespace) -> None:
    pattern = PATTERNS.get(args.pattern, args.pattern)
    special = check_specials(args.special or [END_OF_TEXT], 256)
    count_merges(args.vocab_size, special, args.min_frequency)
    compile_pattern(pattern)
    if not Path(args.out).parent.is_dir():
        raise FileNotFoundError(f"no such folder: {Path(args.out).parent}, for --out={args.out}")
    size = sum(file_sizes(args.files))
    held_out, start = [], time.time()

    def training_blocks() -> Iterator[str]:
        """Nine of ten blocks; the tenth is kept to measure on, some 8 MB at most."""
        blocks = read_blocks(args.files, pattern, args.errors, min(BLOCK, max(size // 50, 1)))
        with tqdm(total=size, desc="counting", unit="B", unit_scale=True,
                  disable=None) as bar:   # None: only on a terminal
            for i, text in enumerate(blocks):
                bar.update(len(text.encode()))
                if i % 10 == 9 and len(held_out) < 32 and not args.no_held_out:
                    held_out.append(text)
                else:
                    yield text

    pieces = count_pieces(training_blocks(), pattern, args.num_proc)
    with warnings.catch_warnings(record=True) as caught:   # a line each, not Python's two
        warnings.simplefilter("always")
        tok = Tokenizer.from_pieces(pieces, args.vocab_size, pattern, tuple(special),
                                    args.min_frequency, progress=True)
    for warning in caught:
        print(f"bpe.py: {warning.message}", file=sys.stderr)
    tok.save(args.out)
    print(f"{size:,} bytes, {len(pieces):,} distinct pieces, vocabulary {tok.vocab_size:,}, "
          f"{time.time() - start:.1f} s: {args.out}")
    if held_out:
        held = sum(len(text.encode()) for text in held_out)
        tokens = sum(map(len, tok.encode_batch(held_out)))
        print(f"held-out text: {held:,} bytes, {held / tokens:.3f} bytes per token")
    made = [f"[{readable(token)}]" for token in tok.token_bytes[256:256 + len(tok.merges)]]
    print("first merges:  ", *made[:10])
    print("last merges:   ", *made[-10:])
    print("longest tokens:", *sorted(made, key=len)[:-6:-1])


def encode_command(args: argparse.Namespace) -> None:
    print(*find_tokenizer(args.tokenizer).encode_bytes(sys.stdin.buffer.read()))


def decode_command(args: argparse.Namespace) -> None:
    words = sys.stdin.read().split()
    for word in words:
        if not word.isdecimal():
            raise ValueError(f"{word!r} is not an id; give whole numbers separated by spaces")
    data = find_tokenizer(args.tokenizer).decode_bytes(map(int, words))
    sys.stdout.buffer.write(data)


def compare_command(args: argparse.Namespace) -> None:
    toks = {name: find_tokenizer(name) for name in args.tokenizer or ["gpt2"]}
    rows, totals = [], {}
    for path in dict.fromkeys(args.files):   # each file once
        language, counts = compare_file(path, toks.values(), args.errors)
        rows.append((path, language, counts))
        totals[language] = totals.get(language, 0) + counts
    if len(rows) > 1:
        rows += [(f"all {language}", language, counts) for language, counts in totals.items()]
    head = ["file", "language (script)", "bytes"]
    for name in toks:
        head += [f"{name}: tokens", "bytes/token", "split characters"]
    table = [head, ["---"] * 3 + ["---:"] * (len(head) - 3)]
    for name, language, counts in rows:
        (size, characters), *figures = counts.tolist()
        table.append([name, language, f"{size:,}"])
        for tokens, characters_split in figures:
            table[-1] += [f"{tokens:,}", f"{size / tokens:.2f}",
                          f"{characters_split / characters:.1%}"]
    for row in table:
        print("| " + " | ".join(row) + " |")


def compare_file(path: str, toks: Iterable[Tokenizer], errors: str) -> tuple[str, np.ndarray]:
    """The language, and rows of counts: (bytes, characters), then for each tokenizer (tokens,
    characters that are split across tokens)."""
    counts, letters = np.zeros((1 + len(toks), 2), np.int64), Counter()
    pattern = next((tok.pattern for tok in toks if tok.pattern not in SAFE_PATTERNS), GPT2_PATTERN)
    for text in read_blocks([path], pattern, errors):
        data = text.encode()
        counts[0] += len(data), len(text)
        letters.update(unicodedata.name(char, "?").split()[0]
                       for char in text[:2000] if char.isalpha())
        starts = np.frombuffer(data, np.uint8) & 0xC0 != 0x80     # bytes that start a character
        for i, tok in enumerate(toks, 1):
            ids = tok.encode(text)
            ends = np.cumsum([len(tok.token_bytes[j]) for j in ids])[:-1]
            inside = ends[~starts[ends]]                          # a token ends inside a character
            counts[i] += len(ids), len(np.unique(starts.cumsum()[inside]))
    return letters.most_common(1)[0][0] if letters else "none", counts


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line, as all of ours are."""

    def error(self, message: str) -> None:
        """One line on stderr, exit code 2."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The words of a command line; `run` is the function of its command."""
    parser = Parser(prog="bpe.py", description=__doc__.split("\n")[0],
                    epilog="all options: python bpe.py COMMAND --help")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser("train", help="learn merges from text files")
    train.set_defaults(run=train_command)
    train.add_argument("--vocab-size", type=int, required=True,
                       help="256 bytes + merges + special tokens")
    train.add_argument("--out", required=True, help="the tok.json to write")
    train.add_argument("--pattern", default="gpt2",
                       help="gpt2, gpt4, none, or a regex (default gpt2)")
    train.add_argument("--special", action="append", metavar="TOKEN",
                       help=f"a special token, repeatable (default {END_OF_TEXT})")
    train.add_argument("--min-frequency", type=int, default=1,
                       help="stop when the most frequent pair is rarer (default 1)")
    train.add_argument("--num-proc", type=int, help="counting processes (default: all cores)")
    train.add_argument("--no-held-out", action="store_true",
                       help="train on everything; else a tenth is kept to measure compression on")
    encode = commands.add_parser("encode", help="bytes on stdin to ids on stdout")
    encode.set_defaults(run=encode_command)
    decode = commands.add_parser("decode", help="ids on stdin to bytes on stdout")
    decode.set_defaults(run=decode_command)
    compare = commands.add_parser("compare", help="tokens and compression, per file and language")
    compare.set_defaults(run=compare_command)
    for command in (train, compare):
        command.add_argument("files", nargs="+", metavar="FILE", help="UTF-8 text files")
        command.add_argument("--errors", choices=("strict", "replace"), default="strict",
                             help="what to do with bytes that are not UTF-8 (default strict)")
    for command in (encode, decode):
        command.add_argument("--tokenizer", default="gpt2",
                             help="gpt2, a file or a folder (default gpt2)")
    compare.add_argument("--tokenizer", action="append",
                         help="gpt2, a file or a folder; repeatable (default gpt2)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run a command; the exit code is 2 for bad input, with one line on stderr."""
    args = parse(argv)
    try:
        args.run(args)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"bpe.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bpe.py: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

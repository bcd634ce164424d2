"""Byte-level byte pair encoding (BPE): train, encode, decode, save, exchange.

A tokenizer turns text into integers and back. BPE starts from the 256 bytes, so nothing is ever
unknown, and learns `merges` from a corpus: it replaces the most frequent pair of neighbouring
tokens by a new token, again and again. Common words end up as one token, rare ones as several.

Before that, a regular expression (the `pattern`) cuts the text into pieces; merges never cross
pieces, so "dog", "dog." and "dog!" share one token for the word, whatever stands beside it:

    >>> split(GPT2_PATTERN, "I've 12 dogs, a dog!")
    ['I', "'ve", ' 12', ' dogs', ',', ' a', ' dog', '!']

The whole algorithm is `train_slowly` and `encode_slowly` below; the rest of this file is the
tokenizer around it and its commands. Ids 0..255 are the bytes, 256 + i is what merge i makes,
special tokens come last (in one that was extended, before what was added). fast/bpe_*.py compute
the same in less time: `split` is regex.findall, `count_pieces` a Counter of pieces, `learn_merges`
is train_slowly, and tiktoken encodes. What is made of text is kept in a readable tok.json.

    python bpe.py train FILE... --vocab-size=32000 --out=tok.json [--pattern=gpt2|gpt4|REGEX]
    python bpe.py extend FILE... --tokenizer=gpt2 --vocab-size=60000 --out=tok.json
    python bpe.py encode --tokenizer=tok.json < text > ids
    python bpe.py decode --tokenizer=tok.json < ids > text
    python bpe.py compare FILE... --tokenizer=gpt2 --tokenizer=tok.json [--html=page.html]

    >>> tok = Tokenizer.train(["aaabdaaabac"], 259, special_tokens=())
    >>> tok.merges, tok.encode("aaabdaaabac")
    ([(97, 97), (97, 98), (256, 257)], [258, 100, 258, 97, 99])

References: Sennrich et al. 2016, arXiv 1508.07909 (BPE for text); Radford et al. 2019 (GPT-2).
"""
import argparse
import functools
import os
import re
import signal
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, Iterable, Iterator, Mapping, Sequence

if __name__ == "__main__":                      # Ctrl-C while the rest is imported
    signal.signal(signal.SIGINT, lambda *_: os._exit(os.write(2, b"bpe.py: interrupted\n") and 130))

import numpy as np
import tiktoken

from fast.bpe_commands import learn, parse
from fast.bpe_compare import compare_tokenizers
from fast.bpe_corpus import encode_corpus
from fast.bpe_counts import count_pieces
from fast.bpe_encode import encode_pieces, encode_with_tiktoken, make_encoding
from fast.bpe_merges import learn_merges
from fast.bpe_pieces import GPT2_PATTERN, PATTERNS, split
from formats import tokenizer as files
from formats.tokenizer import readable

END_OF_TEXT = "<|endoftext|>"


# --------------------------------------------------------------------------- 1. the definition

def train_slowly(pieces: dict[Sequence[int], int], num_merges: int, min_frequency: int = 1,
                 ids: Sequence[int] = range(256, sys.maxsize), tie: str = "ids"
                 ) -> list[tuple[int, int]]:
    """The definition of BPE training; `learn_merges` is equal.

    pieces: how often each occurs, as bytes or as ids; ids: what the merges make, in their order.
    Of pairs that are as frequent the smaller one is merged; with tie="bytes", as in Stanford's
    CS336, the one whose two tokens are lexicographically larger in bytes.

    >>> train_slowly({b"hug": 10, b"pug": 5, b"hugs": 5}, 2)     # "ug" is in 20 words, then h + ug
    [(117, 103), (104, 256)]
    """
    words, merges = {piece: list(piece) for piece in pieces}, []
    spelled = {i: bytes([i]) for i in range(256)} if tie == "bytes" else {}
    for new in ids[:num_merges]:
        counts = Counter()
        for piece, word in words.items():
            for pair in zip(word, word[1:]):
                counts[pair] += pieces[piece]
        if not counts:
            break
        best = (max(counts, key=lambda pair: (counts[pair], [spelled[i] for i in pair])) if spelled
                else min(counts, key=lambda pair: (-counts[pair], pair)))
        if counts[best] < min_frequency:
            break
        merges.append(best)
        spelled |= {new: spelled[best[0]] + spelled[best[1]]} if spelled else {}
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


def extend_slowly(pieces: dict[Sequence[int], int], made: dict[tuple[int, int], int],
                  num_merges: int, min_frequency: int, ids: Sequence[int]) -> list[tuple[int, int]]:
    """The definition of going on after the merges in `made`, on pieces as those leave them. No
    new merge can make an old one fit again, so together they are one list of merges.

    >>> extend_slowly({b"hugs": 5, b"mugs": 2}, {(117, 103): 256}, 2, 1, [257, 258])
    [(256, 115), (104, 257)]
    """
    left = {tuple(encode_slowly([piece], made)): count for piece, count in pieces.items()}
    return train_slowly(left, num_merges, min_frequency, ids)


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

    Text is encoded as ordinary text. A special token comes out only where `allowed_special` names
    it, or is put in by its id, tok.eot: what a user types can never end a document.
    """

    def __init__(self, merges: Iterable[Sequence[int]], pattern: str = GPT2_PATTERN,
                 special_tokens: Iterable[str] | dict[str, int] = (END_OF_TEXT,),
                 byte_ids: Iterable[int] = range(256), first_merge: int = 256):
        """`special_tokens` is a dict name -> id, or names whose ids follow the merges;
        byte_ids[b] is the id of byte b; merges make the ids from first_merge on that no special
        token has. Both are plain unless the tokenizer was made elsewhere (GPT-2's id 0 is "!").
        ValueError if pattern, special tokens, byte_ids or merges cannot be those of a BPE.
        """
        split(pattern, "")      # refuses a pattern that cannot serve
        self.pattern = pattern
        self.merges = [(int(a), int(b)) for a, b in merges]
        self.byte_ids, self.first_merge = tuple(byte_ids), first_merge
        after = max(first_merge + len(self.merges), 256)
        self.special_tokens = files.number_specials(special_tokens, after)
        self.merge_ids = files.number_merges(first_merge, len(self.merges), self.special_tokens)
        self.token_bytes = files.spell(self.merges, self.merge_ids, self.special_tokens,
                                       self.byte_ids)
        self.vocab_size = len(self.token_bytes)
        self.eot = self.special_tokens.get(END_OF_TEXT)
        self._encoding = None

    @classmethod
    def train(cls, texts: Iterable[str] | str | Mapping[bytes, int], vocab_size: int,
              pattern: str = GPT2_PATTERN, special_tokens: Iterable[str] = (END_OF_TEXT,),
              min_frequency: int = 1, num_proc: int | None = None, progress: bool = False,
              tie: str = "ids") -> "Tokenizer":
        """Learn merges from texts, which are read once and not kept, or from their `count_pieces`.

        vocab_size: 256 bytes + merges + special tokens; pattern: a name in PATTERNS or a regex;
        min_frequency: stop, with a warning, when no pair is as frequent; num_proc: counting
        processes, None is one per core; tie: as in train_slowly. ValueError for what cannot serve.
        """
        pattern = PATTERNS.get(pattern, pattern)
        special_tokens = list(files.number_specials(special_tokens, 256))
        num_merges = files.count_merges(vocab_size, special_tokens, min_frequency)
        ids = range(256, 256 + num_merges)
        merges = cls([], pattern, ())._learn(texts, ids, 0, min_frequency, num_proc, progress,
                                             tie)
        return cls(merges, pattern, special_tokens)

    def extend(self, texts: Iterable[str] | str | Mapping[bytes, int], vocab_size: int,
               min_frequency: int = 1, num_proc: int | None = None, progress: bool = False
               ) -> "Tokenizer":
        """A tokenizer with more merges, learned from new texts as the merges here leave them.

        Every id stays what it is, special tokens' too: GPT-2's 50,256 stays <|endoftext|>, and new
        merges make 50,257 and on. No text costs more tokens than before. Arguments as in `train`;
        ValueError for what cannot serve, and for texts without a new pair.
        """
        ids = files.number_new_merges(self, vocab_size, min_frequency)
        merges = self._learn(texts, ids, 1, min_frequency, num_proc, progress)
        return Tokenizer(self.merges + merges, self.pattern, self.special_tokens, self.byte_ids,
                         self.first_merge)

    def _learn(self, texts: Iterable[str] | str | Mapping[bytes, int], ids: Sequence[int],
               least: int, min_frequency: int, num_proc: int | None, progress: bool,
               tie: str = "ids") -> list[tuple[int, int]]:
        """The merges that follow those here and make these ids: those of extend_slowly."""
        pieces = texts if isinstance(texts, Mapping) else count_pieces(
            [texts] if isinstance(texts, str) else texts, self.pattern, num_proc, progress)
        if (self.merges, self.byte_ids) != ([], tuple(range(256))):     # else they are ids already
            pieces = encode_pieces(self.to_tiktoken(), pieces)
        merges = learn_merges(pieces, len(ids), min_frequency, progress, ids, tie)
        files.check_learned(len(merges), len(ids), least, min_frequency)
        return merges

    @classmethod
    def gpt2(cls, folder: str | Path | None = None) -> "Tokenizer":
        """GPT-2's own tokenizer; its two files are downloaded once unless a folder holds them."""
        return cls.load(folder or files.gpt2_folder())

    def add_special_tokens(self, names: Iterable[str]) -> "Tokenizer":
        """A new tokenizer with more special tokens, their ids after all existing ones; ValueError
        for a name that exists already, is empty or is given twice."""
        specials = files.number_specials(names, self.vocab_size, self.special_tokens)
        return Tokenizer(self.merges, self.pattern, specials, self.byte_ids, self.first_merge)

    # ------------------------------------------------------------------------ text to ids and back

    def encode_slowly(self, text: str) -> list[int]:
        """The ids that `encode` gives, by the definition."""
        made = dict(zip(self.merges, self.merge_ids))
        return encode_slowly(([self.byte_ids[byte] for byte in piece.encode()]
                              for piece in split(self.pattern, text)), made)

    def encode(self, text: str, allowed_special: Iterable[str] | str = ()) -> list[int]:
        """Ids of a text; special tokens only where `allowed_special` (names, or "all") says.

        ValueError for a lone surrogate, and for a name that is no special token.
        """
        return encode_with_tiktoken(self.to_tiktoken(), text, allowed_special)

    def encode_corpus(self, texts: Iterable[str], num_threads: int | None = None
                      ) -> Iterator[np.ndarray]:
        """Ids of each text as an array, special tokens as ordinary text; for many texts or long
        ones, which are read as ids are taken, and encoded in threads (None: one per core)."""
        return encode_corpus(self.to_tiktoken(), self.pattern, texts, num_threads)

    def encode_batch(self, texts: Iterable[str], num_threads: int | None = None
                     ) -> list[list[int]]:
        """The same as lists of lists."""
        return [ids.tolist() for ids in self.encode_corpus(texts, num_threads)]

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of any bytes: what is valid UTF-8 as text, each other byte as itself."""
        text = data.decode("utf-8", "surrogateescape")   # invalid byte 0xff is then U+DCFF
        parts, ids = re.split("([\udc80-\udcff]+)", text), []
        for known, wrong in zip(self.encode_batch(parts[::2]), [*parts[1::2], ""]):
            ids += known + [self.byte_ids[ord(c) - 0xDC00] for c in wrong]
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of ids; special tokens as their names. ValueError for an id that has none."""
        names = {i: name.encode() for name, i in self.special_tokens.items()}
        ids, spelled, size = list(ids), self.token_bytes, self.vocab_size
        out = [(spelled[i] if 0 <= i < size else b"") or names.get(int(i), b"") for i in ids]
        if b"" in out:
            i = ids[out.index(b"")]
            raise ValueError(f"id {i} is not in the vocabulary; allowed: 0 to {size - 1}")
        return b"".join(out)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    # ---------------------------------------------------------------------------------- in and out

    def _state(self) -> dict[str, Any]:
        """What a tokenizer is, in JSON; a token's spelling stands beside its merge, to read."""
        return {"pattern": self.pattern, "special_tokens": self.special_tokens,
                "byte_ids": list(self.byte_ids), "first_merge": self.first_merge,
                "merges": [[a, b, readable(self.token_bytes[i])]
                           for i, (a, b) in zip(self.merge_ids, self.merges)]}

    @functools.cached_property
    def hash(self) -> str:
        """sha256 over pattern, merges and special tokens: equal means the same ids."""
        return files.checksum(self._state())

    def save(self, path: str | Path) -> None:
        """tok.json: readable, one merge a line, with a checksum; written whole or not at all."""
        files.write(path, self._state())

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read our tok.json, a Hugging Face tokenizer.json, or a folder with one of them or with
        GPT-2's files (vocab.bpe and encoder.json, or merges.txt and vocab.json); "gpt2" is GPT-2's.

        FileNotFoundError if there is none; ValueError for what would not give its maker's ids.
        """
        with files.errors_named(path := files.find(path)):
            data = files.read(path)
            return cls([row[:2] for row in data.pop("merges")], **data)

    def to_tiktoken(self) -> tiktoken.Encoding:
        """The same as a tiktoken.Encoding, which encodes in Rust; ValueError for a pattern that its
        regex engine does not read."""
        if self._encoding is None:
            self._encoding = make_encoding(f"oneloop-{self.hash[:8]}", self.pattern,
                                           self.token_bytes, self.special_tokens)
        return self._encoding

    @classmethod
    def from_tiktoken(cls, encoding: tiktoken.Encoding) -> "Tokenizer":
        """The same tokenizer as a tiktoken.Encoding; ValueError if that was not made by BPE."""
        return cls(**files.from_tiktoken(encoding))

    def save_pretrained(self, folder: str | Path) -> None:
        """tokenizer.json and tokenizer_config.json for Hugging Face's AutoTokenizer."""
        files.write_hugging_face(folder, self.merges, self.token_bytes, self.special_tokens,
                                 self.pattern, None if self.eot is None else END_OF_TEXT)


# ------------------------------------------------------------------------- 3. the command line

def train_command(args: argparse.Namespace) -> None:
    """Learn merges from text files."""
    pattern, special = PATTERNS.get(args.pattern, args.pattern), args.special or [END_OF_TEXT]
    Tokenizer([], pattern, special)             # what is wrong is said before the text is read
    files.count_merges(args.vocab_size, special, args.min_frequency)
    learn(args, pattern, lambda pieces: Tokenizer.train(
        pieces, args.vocab_size, pattern, special, args.min_frequency, progress=True, tie=args.tie))


def extend_command(args: argparse.Namespace) -> None:
    """Learn more merges, after those that a tokenizer has, from new text files."""
    old = Tokenizer.load(args.tokenizer)
    if PATTERNS.get(args.pattern, args.pattern) not in (None, old.pattern):
        raise ValueError(f"pattern={args.pattern} is not that of {args.tokenizer}, and new merges "
                         f"follow old ones within the same pieces; leave it out, or train anew")
    files.number_new_merges(old, args.vocab_size, args.min_frequency)
    learn(args, old.pattern, lambda pieces: old.extend(
        pieces, args.vocab_size, args.min_frequency, progress=True), old)


def encode_command(args: argparse.Namespace) -> None:
    """Bytes on stdin to ids on stdout."""
    print(*Tokenizer.load(args.tokenizer).encode_bytes(sys.stdin.buffer.read()))


def decode_command(args: argparse.Namespace) -> None:
    """Ids on stdin to bytes on stdout."""
    words = sys.stdin.read().split()
    if wrong := [word for word in words if not word.isdecimal()]:
        raise ValueError(f"{wrong[0]!r} is not an id; give whole numbers separated by spaces")
    sys.stdout.buffer.write(Tokenizer.load(args.tokenizer).decode_bytes(map(int, words)))


def compare_command(args: argparse.Namespace) -> None:
    """Compression per file and language, and what the vocabulary is used for."""
    toks = {name: Tokenizer.load(name) for name in args.tokenizer or ["gpt2"]}
    for head, *rows in compare_tokenizers(args.files, toks, args.errors, args.html):
        print(*(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)), sep="\n")


COMMANDS = train_command, extend_command, encode_command, decode_command, compare_command


def main(argv: list[str] | None = None) -> int:
    """Run a command; the exit code is 2 for bad input, with one line on stderr."""
    args = parse(argv, __doc__, COMMANDS)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"bpe.py: {message}", file=sys.stderr)
            return args.run(args) or 0
    except (ValueError, OSError, RuntimeError) as error:
        print(f"bpe.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bpe.py: interrupted; nothing was written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())

"""How well tokenizers compress files, counted in numpy: tokens, and characters that they cut."""
import itertools
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any, Iterable, Iterator

import numpy as np

from fast.bpe_counts import SAFE_PATTERNS, read_blocks


def compare_tokenizers(paths: Iterable[str | Path], toks: dict[str, Any], errors: str = "strict"
                       ) -> Iterator[list[str]]:
    """The rows of a table: for each file, and for all files of a script together, its bytes, and
    of each of the named tokenizers tokens, bytes per token and the share of split characters."""
    rows, totals = [], Counter()
    for path in dict.fromkeys(paths):   # each file once
        script, counts = count_file(path, toks.values(), errors)
        rows.append((str(path), script, counts))
        totals[script] += counts
    if len(rows) > 1:
        rows += [(f"all {script}", script, counts) for script, counts in totals.items()]
    figures = [f"{name}: tokens | bytes/token | split characters".split(" | ") for name in toks]
    yield ["file", "language (script)", "bytes", *itertools.chain(*figures)]
    yield ["---"] * 3 + ["---:"] * 3 * len(toks)
    for name, script, ((size, characters), *counts) in rows:
        yield [name, script, f"{size:,}", *(cell for tokens, cut in counts for cell in (
            f"{tokens:,}", f"{size / tokens:.2f}", f"{cut / characters:.1%}"))]


def count_file(path: str | Path, toks: Iterable[Any], errors: str) -> tuple[str, np.ndarray]:
    """The script of most letters, and rows of counts: (bytes, characters), then for each
    tokenizer (tokens, characters whose bytes are in more than one token)."""
    counts, letters = np.zeros((1 + len(toks), 2), np.int64), Counter()
    cuts = list(SAFE_PATTERNS)
    pattern = max((tok.pattern for tok in toks),        # the one that allows the fewest cuts
                  key=lambda pattern: cuts.index(pattern) if pattern in cuts else len(cuts))
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

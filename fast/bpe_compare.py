"""How well tokenizers compress files, counted in numpy: tokens, and characters that they cut."""
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any, Iterable

import numpy as np

from fast.bpe_counts import SAFE_PATTERNS, read_blocks


def compare_tokenizers(paths: Iterable[str | Path], toks: dict[str, Any], errors: str = "strict"
                       ) -> list[list[str]]:
    """The rows of a table: for each file, and for all files of a script together, its bytes, and
    of each of the named tokenizers tokens, bytes per token and the share of split characters."""
    rows, totals = [], {}
    for path in dict.fromkeys(paths):   # each file once
        script, counts = count_file(path, toks.values(), errors)
        rows.append((str(path), script, counts))
        totals[script] = totals.get(script, 0) + counts
    if len(rows) > 1:
        rows += [(f"all {script}", script, counts) for script, counts in totals.items()]
    head = ["file", "language (script)", "bytes"]
    for name in toks:
        head += [f"{name}: tokens", "bytes/token", "split characters"]
    table = [head, ["---"] * 3 + ["---:"] * (len(head) - 3)]
    for name, script, counts in rows:
        (size, characters), *figures = counts.tolist()
        table.append([name, script, f"{size:,}"])
        for tokens, characters_split in figures:
            table[-1] += [f"{tokens:,}", f"{size / tokens:.2f}",
                          f"{characters_split / characters:.1%}"]
    return table


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

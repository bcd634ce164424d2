"""How well tokenizers compress files, counted in numpy; as tables, and as a page without scripts.

Of each file and kind of text: tokens, bytes per token, characters that are split. Of each
vocabulary: tokens that the files never use, and those among them that only build others; the
longest ones. The page shows a sentence of each file as every tokenizer cuts it, too.
"""
import html
import itertools
import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterable

import numpy as np

from fast.bpe_counts import SAFE_PATTERNS, read_blocks
from formats.files import write_text
from formats.tokenizer import readable

SOURCES = {".py", ".c", ".h", ".cc", ".cpp", ".cu", ".go", ".java", ".js", ".ts", ".rs", ".sh"}
SAMPLE, LONGEST, SHOWN = 120, 10, 300       # characters of a sentence; tokens in a list
STYLE = """body{font:15px/1.5 sans-serif;max-width:70em;margin:2em auto}td,th{padding:2px 10px;
text-align:right}td:first-child,th:first-child{text-align:left}code{white-space:pre-wrap}
.t0{background:#cde8ff}.t1{background:#ffe3b8}.t2{background:#d5f2cf}.t3{background:#f3d6f5}
.cut{outline:2px solid #c00}.part{color:#888}"""
Table = list[list[str]]                     # the first row is the head


@dataclass
class Found:
    """What was counted of some files. rows: (bytes, characters), then for each tokenizer (tokens,
    characters whose bytes are in more than one token)."""
    name: str
    kind: str
    rows: np.ndarray
    used: list[np.ndarray]                  # how often each id of each tokenizer
    sample: str = field(default="")


def compare_tokenizers(paths: Iterable[str | Path], toks: dict[str, Any], errors: str = "strict",
                       page: str = "") -> list[Table]:
    """Two tables: of each file, and of all of a kind, how well it is compressed; of each of the
    named tokenizers, what its tokens are for. page: a file for both, and more, in HTML."""
    found = [count_file(path, list(toks.values()), errors) for path in dict.fromkeys(paths)]
    kinds = {one.kind: [other for other in found if other.kind == one.kind] for one in found}
    sums = [Found(f"all {kind}", kind, sum(one.rows for one in of), [])
            for kind, of in kinds.items() if len(found) > 1]
    figures = [cell for name in toks for cell in (f"{name}: tokens", "bytes/token",
                                                  "split characters")]
    texts = [["file", "language (script) or code", "bytes", *figures]]
    for one in found + sums:
        (size, characters), *counts = one.rows
        cells = ((f"{tokens:,}", f"{size / tokens:.2f}", f"{cut / characters:.1%}")
                 for tokens, cut in counts)
        texts.append([one.name, one.kind, f"{size:,}", *itertools.chain(*cells)])
    used = [sum(one.used[i] for one in found) for i in range(len(toks))]
    vocabularies = [["tokenizer", "tokens", "used", "unused", "of these only parts of used ones",
                     "longest"]]
    for (name, tok), counts in zip(toks.items(), used):
        unused, parts = unused_tokens(tok, counts)
        longest = max((token for token in tok.token_bytes if token), key=len)
        vocabularies.append([name, f"{tok.vocab_size:,}", f"{np.count_nonzero(counts):,}",
                             f"{len(unused):,}", f"{len(parts):,}", readable(longest)[:40]])
    if page:
        write_text(page, make_page(texts, vocabularies, found, toks, used))
    return [texts, vocabularies]


def count_file(path: str | Path, toks: list[Any], errors: str) -> Found:
    """What each tokenizer makes of a file; its kind is code, or the script of most letters."""
    rows, letters, sample = np.zeros((1 + len(toks), 2), np.int64), Counter(), ""
    used = [np.zeros(tok.vocab_size, np.int64) for tok in toks]
    cuts = list(SAFE_PATTERNS)
    pattern = max((tok.pattern for tok in toks),        # the one that allows the fewest cuts
                  key=lambda pattern: cuts.index(pattern) if pattern in cuts else len(cuts))
    for text in read_blocks([path], pattern, errors):
        data = text.encode()
        sample = sample or max(text[:20 * SAMPLE].split("\n"), key=len)[:SAMPLE]
        rows[0] += len(data), len(text)
        letters.update(unicodedata.name(char, "?").split()[0]
                       for char in text[:2000] if char.isalpha())
        starts = np.frombuffer(data, np.uint8) & 0xC0 != 0x80     # bytes that start a character
        for i, tok in enumerate(toks):
            ids = tok.encode(text)
            ends = np.cumsum([len(tok.token_bytes[j]) for j in ids])[:-1]
            inside = ends[~starts[ends]]                          # a token ends inside a character
            rows[i + 1] += len(ids), len(np.unique(starts.cumsum()[inside]))
            used[i] += np.bincount(ids, minlength=tok.vocab_size)
    kind = ("code" if Path(path).suffix in SOURCES
            else letters.most_common(1)[0][0] if letters else "none")
    return Found(str(path), kind, rows, used, sample)


def unused_tokens(tok: Any, counts: np.ndarray) -> tuple[list[int], set[int]]:
    """The ids of bytes and merges that were never counted, and those among them that a counted
    token is made of, by however many merges."""
    needed = set(np.flatnonzero(counts).tolist())
    for i, pair in zip(tok.merge_ids[::-1], tok.merges[::-1]):
        if i in needed:
            needed.update(pair)
    unused = [i for i, token in enumerate(tok.token_bytes) if token and not counts[i]]
    return unused, needed.intersection(unused)


# -------------------------------------------------------------------------------------- the page

def make_page(texts: Table, vocabularies: Table, found: list[Found], toks: dict[str, Any],
              used: list[np.ndarray]) -> str:
    """The tables, the sentences in colour, and lists of tokens."""
    body = ["<h1>Tokenizers compared</h1>", html_table(texts), "<h2>Sentences</h2>"
            "<p>Outlined in red: tokens that hold a part of a character.</p>"]
    for one in found:
        body.append(f"<h3>{html.escape(one.name)}</h3>")
        body += [f"<p>{html.escape(name)}, {len(ids := tok.encode(one.sample))} tokens:<br><code>"
                 f"{coloured(tok, ids)}</code></p>" for name, tok in toks.items()]
    body += ["<h2>Vocabularies</h2>", html_table(vocabularies),
             "<p>Unused tokens in grey are parts that only build others.</p>"]
    for (name, tok), counts in zip(toks.items(), used):
        unused, parts = unused_tokens(tok, counts)
        longest = sorted(filter(None, tok.token_bytes), key=len)[:-LONGEST - 1:-1]
        body += [f"<h3>{html.escape(name)}</h3><p>longest: ", listed(longest), "</p><p>unused",
                 f" (the first {SHOWN:,})" if len(unused) > SHOWN else "", ": ",
                 listed([tok.token_bytes[i] for i in unused[:SHOWN]],
                        [i in parts for i in unused[:SHOWN]]), "</p>"]
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Tokenizers compared'
            f"</title><style>{STYLE}</style>\n" + "\n".join(body) + "\n</html>\n")


def coloured(tok: Any, ids: list[int]) -> str:
    """A sentence as its tokens, each in the next colour."""
    spans = []
    for i, token in enumerate(tok.token_bytes[j] for j in ids):
        try:
            text, cut = token.decode(), ""
        except UnicodeDecodeError:
            text, cut = readable(token), " cut"
        spans.append(f'<span class="t{i % 4}{cut}">{html.escape(text)}</span>')
    return "".join(spans)


def listed(tokens: list[bytes], grey: Iterable[bool] = ()) -> str:
    """Tokens in a row."""
    grey = [*grey] or [False] * len(tokens)
    shown = [(html.escape(readable(token)), "part" if part else "t0")
             for token, part in zip(tokens, grey)]
    return " ".join(f'<code class="{look}">{text}</code>' for text, look in shown)


def html_table(rows: Table) -> str:
    """A table in HTML."""
    return "<table>" + "\n".join(
        "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"
        for row, tag in zip(rows, ["th"] + ["td"] * len(rows))) + "</table>"

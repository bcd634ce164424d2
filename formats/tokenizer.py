"""Tokenizer files: our tok.json, GPT-2's two, Hugging Face's tokenizer.json, tiktoken's ranks.

Those of others hold the same thing in different spellings. GPT-2 and Hugging Face write a token as
printable characters, one per byte, so "Ġthe" is " the" (`BYTE_TO_CHAR`); their merges are pairs of
such spellings. tiktoken keeps the bytes of each token and its id, and no merges.

In: a file's content. Out: a dict of what makes a byte-level BPE: its merges, pattern,
special_tokens, byte_ids (the id of each byte) and first_merge (the id that merge 0 makes).
ValueError, with the reason, for a file that holds anything that would silently change ids. And the
way back, for Hugging Face.
"""
import contextlib
import itertools
import json
import math
import os
import warnings
from pathlib import Path
from typing import Any, Iterable, Iterator, Sequence

import regex
import tiktoken

from fast.bpe_encode import TIKTOKEN_GPT2
from fast.bpe_pieces import GPT2_PATTERN, NO_PATTERN
from formats.files import read_json, write_json, write_text

GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"}
FORMAT, VERSION = "oneloop-bpe", 1              # of our tok.json
MOST_IDS, MOST_BYTES = 1 << 22, 1 << 28         # what damaged files claim is more
# What numbers in the place of texts, missing keys and the like raise while a file is read.
WRONG_TYPES = (AttributeError, IndexError, KeyError, OverflowError, RecursionError, TypeError)


# ------------------------------------------------------------------------------ files and folders

def find(name: str | Path) -> Path:
    """The file to read: of a folder its tok.json or tokenizer.json, else the folder itself; of
    "gpt2", where there is no such folder, that of GPT-2's two files."""
    path = gpt2_folder() if name == "gpt2" and not Path(name).exists() else Path(name)
    files = [path / name for name in ("tok.json", "tokenizer.json")] if path.is_dir() else []
    return next((file for file in files if file.is_file()), path)


def read(path: Path) -> dict[str, Any]:
    """The tokenizer in our tok.json, a tokenizer.json or a folder with GPT-2's files."""
    if path.is_dir():
        return read_gpt2(path)
    data = read_json(path)
    if "model" in data:
        return from_hugging_face(data)
    if "format" not in data:
        raise ValueError(f"{path} is neither our tok.json nor a Hugging Face tokenizer.json")
    made = data.pop("format"), data.pop("version", None), data.pop("sha256", None)
    if made[:2] != (FORMAT, VERSION):
        raise ValueError(f"{path} has version {made[1]!r:.50}; this code reads version {VERSION}: "
                         f"train again or use the code that wrote it")
    if made[2] != checksum(data):
        raise ValueError(f"{path} was changed: its checksum does not fit")
    return data


def write(path: str | Path, state: dict[str, Any]) -> None:
    """Our tok.json of what a tokenizer is: a merge a line, with a checksum; whole or not at all."""
    head = {"format": FORMAT, "version": VERSION, "sha256": checksum(state), **state}
    merges = [json.dumps(row, ensure_ascii=False) for row in head.pop("merges")]
    lines = [f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)},\n"
             for key, value in head.items()]
    write_text(path, "".join(["{\n", *lines, '"merges": [\n', ",\n".join(merges), "\n]}\n"]))


@contextlib.contextmanager
def errors_named(path: Path) -> Iterator[None]:
    """What is wrong with a file becomes a ValueError with its name."""
    try:
        yield
    except WRONG_TYPES as error:
        raise ValueError(f"{path} was changed or damaged: {error!r:.200}") from None
    except ValueError as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path} cannot be read exactly: {error!s:.300}") from None


# --------------------------------------------------------------------- what a tokenizer has to be

def number_merges(first_merge: int, count: int, special_tokens: dict[str, int]) -> list[int]:
    """The ids that so many merges make: from first_merge on, past those of special tokens."""
    taken = set(special_tokens.values())
    ids = (i for i in itertools.count(first_merge) if i not in taken)
    return list(itertools.islice(ids, count))


def number_new_merges(tok: Any, vocab_size: int, min_frequency: int) -> list[int]:
    """The ids of the merges that make a tokenizer one of `vocab_size`. ValueError if there are
    none, or if what it has cannot be gone on from."""
    if vocab_size <= tok.vocab_size:
        raise ValueError(f"vocab_size={vocab_size} leaves nothing to learn: the tokenizer has "
                         f"{tok.vocab_size}; give more than that")
    count_merges(vocab_size, (), min_frequency)
    ranks = {tok.token_bytes[i]: i for i in (*tok.byte_ids, *tok.merge_ids)}
    if from_ranks(ranks, "the tokenizer", tok.special_tokens)["merges"] != tok.merges:
        raise ValueError("the tokenizer's merges are not in the order in which they apply, so none "
                         "can follow them; train a new one")
    count = vocab_size - tok.first_merge - sum(i >= tok.first_merge
                                               for i in tok.special_tokens.values())
    return number_merges(tok.first_merge, count, tok.special_tokens)[len(tok.merges):]


def spell(merges: Sequence[tuple[int, int]], merge_ids: Sequence[int],
          special_tokens: dict[str, int], byte_ids: Sequence[int]) -> list[bytes]:
    """The bytes of every id: those of merge (a, b) are those of a and b. b"" for special tokens
    and for ids that nothing has. ValueError if these cannot be the merges and ids of a BPE."""
    spelled = {i: bytes([b]) for b, i in enumerate(byte_ids)}
    if len(spelled) != 256 or merge_ids and max(spelled) >= merge_ids[0]:
        raise ValueError("byte_ids must be 256 different ids under those of the merges")
    total = 0
    for i, (new, (a, b)) in enumerate(zip(merge_ids, merges)):
        if a not in spelled or b not in spelled:
            raise ValueError(f"merges[{i}]=({a}, {b}) uses an id that no byte or earlier merge has")
        total += len(spelled[a]) + len(spelled[b])
        if total > MOST_BYTES:                          # each merge can double the longest token
            raise ValueError(f"merges[:{i + 1}] make tokens of more than {MOST_BYTES:,} bytes")
        spelled[new] = spelled[a] + spelled[b]
    if len(set(spelled.values())) != len(spelled):
        raise ValueError("two merges make the same token; no BPE trainer does that")
    for name, i in special_tokens.items():
        if i in spelled:
            raise ValueError(f"special token {name!r} has id {i}, which a byte has")
    size = max([255, *spelled, *special_tokens.values()]) + 1
    if size > MOST_IDS:
        raise ValueError(f"id {size - 1} is beyond the {MOST_IDS:,} ids that are allowed")
    return [spelled.get(i, b"") for i in range(size)]


def number_specials(names: Iterable[str] | dict[str, int], first_id: int,
                    before: dict[str, int] | None = None) -> dict[str, int]:
    """{name: id} of special tokens: those `before`, then names with ids from first_id on.

    ValueError for a name that is empty or given twice, or an id that two of them share.
    """
    if isinstance(names, str):
        raise ValueError(f"special_tokens={names!r} is one string; give a list of names")
    numbered = dict(before or {})
    pairs = names.items() if isinstance(names, dict) else zip(names, itertools.count(first_id))
    for name, i in pairs:
        if not isinstance(name, str) or not name:
            raise ValueError(f"special token {name!r} is empty or not a string; give it a name")
        if name in numbered:
            raise ValueError(f"special token {name!r} exists already, as id {numbered[name]}"
                             if name in (before or {}) else f"special token {name!r} is given "
                             "twice; each name may stand once")
        numbered[name] = i
    if len(set(numbered.values())) != len(numbered):
        raise ValueError(f"two special tokens share an id: {numbered}")
    return numbered


def checksum(state: dict[str, Any]) -> str:
    """The sha256 of what a tokenizer is; that of a damaged file is another."""
    import hashlib      # here: OpenSSL takes 4 MB, a twentieth of what training takes on 20 MB
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def count_merges(vocab_size: int, special_tokens: Sequence[str], min_frequency: int) -> int:
    """How many merges fill the vocabulary; ValueError if it has no room for the other ids."""
    least = 256 + len(special_tokens)
    if vocab_size < least:
        raise ValueError(f"vocab_size={vocab_size} is under 256 bytes + {len(special_tokens)} "
                         f"special tokens; give at least {least}")
    if vocab_size > MOST_IDS:
        raise ValueError(f"vocab_size={vocab_size} is above {MOST_IDS}, the most ids that a "
                         f"tokenizer's file may have")
    if min_frequency < 1:
        raise ValueError(f"min_frequency={min_frequency} is not allowed; give at least 1")
    return vocab_size - least


def check_learned(count: int, wanted: int, least: int, min_frequency: int) -> None:
    """A warning where pairs ran out before so many merges as wanted; ValueError under the least."""
    if count < least:
        raise ValueError(f"the texts have no pair of tokens that occurs {min_frequency} or more "
                         f"times, so there is nothing to learn; give more text, or other text")
    if count < wanted:
        warnings.warn(f"stopped after {count:,} of {wanted:,} merges: no pair is left that occurs "
                      f"{min_frequency} or more times", stacklevel=4)


# ---------------------------------------------------------------------------- spelling of tokens

# GPT-2's printable character for each byte, as its files and Hugging Face's spell tokens: visible
# Latin-1 characters stand for themselves, the others move up to U+0100 and on.
VISIBLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
HIDDEN = sorted({*range(256)} - {*VISIBLE})
BYTE_TO_CHAR = {b: chr(b) for b in VISIBLE} | {b: chr(256 + i) for i, b in enumerate(HIDDEN)}
CHAR_TO_BYTE = {char: b for b, char in BYTE_TO_CHAR.items()}


def readable(token: bytes) -> str:
    """A token for people: text where it is text, \\x.. where it is not."""
    text = token.decode("utf-8", "backslashreplace")
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def from_vocab(vocab: dict[str, int], merges: Iterable[tuple[str, str]], specials: dict[str, int]
               ) -> dict[str, Any]:
    """Merges, special tokens and ids of bytes from the ids and merges of spellings."""
    for token, i in [*vocab.items(), *specials.items()]:
        if type(i) is not int or i < 0:
            raise ValueError(f"token {token!r:.50} has the id {i!r:.50}")
    try:
        byte_ids = [vocab[BYTE_TO_CHAR[b]] for b in range(256)]
        pairs = [(vocab[a], vocab[b]) for a, b in merges]
        made = [vocab[a + b] for a, b in merges]
    except (KeyError, ValueError) as error:
        raise ValueError(f"it is no byte-level BPE: its vocabulary lacks {error!s:.80}") from None
    first = made[0] if made else max(256, max(byte_ids) + 1)
    for i, (has, due) in enumerate(zip(made, number_merges(first, len(made), specials))):
        if has != due:
            raise ValueError(f"its merges are not in the order of their ids: merge {i} makes id "
                             f"{has}, where {due} is due")
    extra = set(vocab) - set(specials) - set(CHAR_TO_BYTE) - {a + b for a, b in merges}
    if extra:
        raise ValueError(f"token {min(extra)!r:.80} is no byte, merge or special token")
    return {"merges": pairs, "special_tokens": specials, "byte_ids": byte_ids, "first_merge": first}


# --------------------------------------------------------------------------------- GPT-2's files

def gpt2_folder() -> Path:
    """The folder of GPT-2's two files, in the cache; they are downloaded if it lacks them.

    FileNotFoundError if that fails; ValueError if a file is not what OpenAI published.
    """
    from formats.download import download       # here: HTTP takes a tenth of `import bpe`
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "oneloop" / "gpt2"
    for name, sha256 in GPT2_SHA256.items():
        download(GPT2_URL + name, folder / name, sha256,
                 f"put vocab.bpe and encoder.json into {folder}")
    return folder


def read_gpt2(folder: Path) -> dict[str, Any]:
    """A tokenizer from GPT-2's two files under either of their names.

    FileNotFoundError if the folder has neither.
    """
    for vocab_name, merges_name in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
        if (folder / vocab_name).is_file() and (folder / merges_name).is_file():
            break
    else:
        raise FileNotFoundError(f"{folder} holds no tok.json, tokenizer.json, or GPT-2 files "
                                "(vocab.bpe and encoder.json, or merges.txt and vocab.json)")
    vocab, added = read_json(folder / vocab_name), folder / "added_tokens.json"
    if added.is_file() and not read_json(added).items() <= vocab.items():
        raise ValueError(f"{added} does not say which of its tokens are special;"
                         f" transformers writes a tokenizer.json, which does, by AutoTokenizer"
                         f".from_pretrained(FOLDER).save_pretrained(FOLDER)")
    try:
        lines = (folder / merges_name).read_text(encoding="utf-8").split("\n")
        merges = [(a, b) for line in lines if line and not line.startswith("#version")
                  for a, b in [line.split(" ")]]
    except ValueError as error:
        raise ValueError(f"{merges_name} is damaged, each line is a merge of two tokens: {error}"
                         ) from None
    made = {a + b for a, b in merges}
    specials = {token: i for token, i in vocab.items()
                if token not in made and token not in CHAR_TO_BYTE}
    return {**from_vocab(vocab, merges, specials), "pattern": GPT2_PATTERN}


# ---------------------------------------------------------------------------------- Hugging Face

def from_hugging_face(data: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer from the content of a tokenizer.json."""
    model, pre = data["model"], data.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    splits = [step for step in steps if step.get("type") == "Split"]
    levels = [step for step in steps if step.get("type") == "ByteLevel"]
    problems = [
        (model.get("type", "BPE") != "BPE", f"its model is {model.get('type')}, not BPE"),
        (data.get("normalizer"), "it normalizes text, so decoding would not give the text back"),
        (len(levels) != 1 or len(splits) + 1 != len(steps) or len(splits) > 1,
         "its pre-tokenizer is not byte-level with at most one split"),
        (levels and levels[0].get("add_prefix_space"), "it puts a space before the text"),
        (splits and (splits[0].get("behavior") != "Isolated" or splits[0].get("invert")
                     or levels[0].get("use_regex", True)), "it splits text in an unusual way"),
        (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
         or model.get("byte_fallback"), "it marks parts of words, so it is not byte-level"),
    ]
    for found, reason in problems:
        if found:
            raise ValueError(reason)
    if splits:
        found = splits[0]["pattern"]
        pattern = (from_oniguruma(found["Regex"]) if found.get("Regex") else
                   regex.escape(found["String"]))
    else:
        pattern = GPT2_PATTERN if levels[0].get("use_regex", True) else NO_PATTERN
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    added = data.get("added_tokens", [])
    specials = {token["content"]: token["id"] for token in added}
    for token in added:
        if token.get("special") is False:
            raise ValueError(f"its added token {token['content']!r:.80} is not special: it would "
                             f"be found in all text, and here none is; where no text has it, set "
                             f"its \"special\" to true in the file")
    after = data.get("post_processor") or {}
    puts = [token["SpecialToken"]["id"] for step in after.get("processors", [after])
            for token in step.get("single", []) if "SpecialToken" in token]
    if puts:
        warnings.warn(f"its tokenizer.json puts {', '.join(puts)} around each text; here a text "
                      f"is encoded as it is", stacklevel=4)
    found = from_vocab(model["vocab"], merges, specials)
    ids = number_merges(found["first_merge"], len(merges), specials)
    # with ignore_merges a piece that is a token is taken whole there, too
    if not model.get("ignore_merges") and (odd := unmade(found["merges"], ids)):
        raise ValueError(f"its merges make {merges[ids.index(odd[0])]} of no text: earlier ones "
                         f"take its bytes, so ids would depend on who encodes")
    return {**found, "pattern": pattern}


def unmade(merges: list[tuple[int, int]], ids: list[int]) -> list[int]:
    """The tokens that encoding their own bytes does not give: an earlier merge reaches across the
    two parts. Hugging Face never writes such a token, tiktoken does where it is a whole piece.

    merges: "ab", "bc", and "abc" of "a" and "bc". Of "abc" the first one makes "ab", "c":

        unmade([(97, 98), (98, 99), (97, 257)], [256, 257, 258]) is [258]
    """
    made, parts = dict(zip(merges, ids)), dict(zip(ids, merges))

    def edge(i: int, side: int) -> list[tuple[int, float]]:
        """What stands at an edge of a token as it is made, and the merge that ends each."""
        found = [(i, math.inf)]
        while i in parts:
            found.append((parts[i][side], i))
            i = parts[i][side]
        return found
    # Of equal pairs the left one is merged: it goes on across, but not from within the left part.
    return [new for new, (a, b) in zip(ids, merges)
            if any(made.get((x, y), new) < min(new, x_ends, y_ends + 0.5)
                   for x, x_ends in edge(a, 1) for y, y_ends in edge(b, 0))]


def write_hugging_face(folder: str | Path, merges: list[tuple[int, int]], token_bytes: list[bytes],
                       special_tokens: dict[str, int], pattern: str, end: str | None) -> None:
    """Write the tokenizer.json and tokenizer_config.json that AutoTokenizer loads.

    token_bytes: the bytes of each id; end: the special token that begins and ends documents, if
    there is one. ValueError if a special token's name is another token's spelling there.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    spell = ["".join(BYTE_TO_CHAR[b] for b in token) for token in token_bytes]
    vocab = {token: i for i, token in enumerate(spell) if token}
    if both := sorted(vocab.keys() & special_tokens.keys()):
        raise ValueError(f"special token {both[0]!r} is spelled as token {vocab[both[0]]} is, and "
                         f"Hugging Face's file has one id for both; give it a name such as "
                         f"'<|{both[0]}|>'")
    vocab |= special_tokens
    gpt2 = pattern == GPT2_PATTERN          # which ByteLevel has built in
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": gpt2}
    pre_tokenizer = byte_level if gpt2 else {
        "type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": to_oniguruma(pattern)}, "behavior": "Isolated",
             "invert": False}, byte_level]}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    by_id = sorted(special_tokens.items(), key=lambda item: item[1])
    data = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": name, **flags, "special": True}
                         for name, i in by_id],
        "normalizer": None, "pre_tokenizer": pre_tokenizer, "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": vocab, "merges": [[spell[a], spell[b]] for a, b in merges]}}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": int(1e30),
              "clean_up_tokenization_spaces": False}
    if end is not None:
        config.update(bos_token=end, eos_token=end, unk_token=end)
    write_json(folder / "tokenizer.json", data, indent=1, ensure_ascii=False)
    write_json(folder / "tokenizer_config.json", config, indent=1)


# Hugging Face's engine, Oniguruma, reads x{1,3}+ as (?:x{1,3})+. Elsewhere it is possessive: what
# it has taken is never given back, which Oniguruma writes as (?>x{1,3}).
ITEM = r"\\[pPx]\{[^}]*\}|\\.|\[\^?\]?(?:\\.|[^]\\])*\]|."            # what a count may follow
COUNT = r"\{(?:\d+,?\d*|,\d+)\}"


def to_oniguruma(pattern: str) -> str:
    """A pattern of ours as Hugging Face reads it."""
    return _rewrite_counts(pattern, "(?>", ")")


def from_oniguruma(pattern: str) -> str:
    """A pattern of Hugging Face as the engines here read it."""
    return regex.sub(rf"(?s)\(\?>((?:{ITEM}){COUNT})\)", r"\1+",
                     _rewrite_counts(pattern, "(?:", ")+"))


def _rewrite_counts(pattern: str, before: str, after: str) -> str:
    """Every x{1,3}+ as x{1,3} between two texts; ValueError where x is a group."""
    def written(match: regex.Match) -> str:
        item, count = match.groups()
        if count and item in ")]":
            raise ValueError(f"pattern={pattern!r:.200} has a group with {count}+, which Hugging "
                             f"Face and other engines read differently; write (?>...) or (?:...)+")
        return f"{before}{item}{count}{after}" if count else match[0]
    return regex.sub(rf"(?s)({ITEM})(?:({COUNT})\+)?", written, pattern)


# -------------------------------------------------------------------------------------- tiktoken

def from_tiktoken(encoding: tiktoken.Encoding) -> dict[str, Any]:
    """A tokenizer from a tiktoken.Encoding; ValueError if that was not made by BPE."""
    pattern = encoding._pat_str
    specials = dict(encoding._special_tokens)
    return {**from_ranks(encoding._mergeable_ranks, encoding.name, specials),
            "pattern": GPT2_PATTERN if pattern == TIKTOKEN_GPT2 else pattern,
            "special_tokens": specials}


def from_ranks(ranks: dict[bytes, int], name: str, specials: dict[str, int]) -> dict[str, Any]:
    """Merges and ids of bytes from tiktoken's ranks (bytes -> id), which have no merges.

    A token's merge is the pair that is left of it when only the earlier merges are known.
    ValueError, with the `name` of the encoding, if the tokens were not made by BPE.
    """
    tokens = sorted(ranks, key=ranks.get)
    byte_ids = [ranks[bytes([b])] for b in range(256)]
    made = {}   # pair -> the id that its merge makes
    for token in tokens[256:]:
        word = [byte_ids[b] for b in token]
        while len(word) > 2:
            known = [(made[pair], i) for i, pair in enumerate(zip(word, word[1:])) if pair in made]
            if not known:
                raise ValueError(f"token {token!r} of {name} is not made of two earlier ones, so "
                                 "this is no BPE")
            new, i = min(known)
            word[i:i + 2] = [new]
        made[tuple(word)] = ranks[token]
    first = min(made.values(), default=256)
    if list(made.values()) != number_merges(first, len(tokens) - 256, specials):
        raise ValueError(f"the ids of {name} have gaps that are no special tokens; those are not "
                         f"read")
    return {"merges": list(made), "byte_ids": byte_ids, "first_merge": first}

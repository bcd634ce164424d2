"""Tokenizer files of others: GPT-2's two files, Hugging Face's tokenizer.json, tiktoken's ranks.

They hold the same thing in different spellings. GPT-2 and Hugging Face write a token as printable
characters, one per byte, so "Ġthe" is " the" (`BYTE_TO_CHAR`); their merges are pairs of such
spellings. tiktoken keeps the bytes of each token and its id, and no merges.

In: a file or its contents. Out: the arguments of `bpe.Tokenizer` as a dict; a file that holds
anything that would silently change ids is refused. And the way back, for Hugging Face.
"""
import json
import os
from pathlib import Path
from typing import Any, Iterable

import regex

from formats.download import download
from formats.files import read_json, write_text

GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_SHA256 = {
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"}


# ---------------------------------------------------------------------------- spelling of tokens

def byte_to_char() -> dict[int, str]:
    """GPT-2's printable character for each byte, as its files and Hugging Face's spell tokens:
    visible Latin-1 characters stand for themselves, the others move up to U+0100 and on."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in visible]
    return {**{b: chr(b) for b in visible}, **{b: chr(256 + i) for i, b in enumerate(hidden)}}


BYTE_TO_CHAR = byte_to_char()
CHAR_TO_BYTE = {char: b for b, char in BYTE_TO_CHAR.items()}


def readable(token: bytes) -> str:
    """A token for people: text where it is text, \\x.. where it is not."""
    text = token.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def from_vocab(vocab: dict[str, int], merges: Iterable[tuple[str, str]], specials: dict[str, int],
               path: str | Path) -> dict[str, Any]:
    """Tokenizer arguments, but for the pattern, from ids and merges of spellings."""
    for token, i in [*vocab.items(), *specials.items()]:
        if type(i) is not int or i < 0:
            raise ValueError(f"{path} is damaged: token {token!r:.50} has the id {i!r:.50}")
    try:
        byte_ids = [vocab[BYTE_TO_CHAR[b]] for b in range(256)]
        pairs = [(vocab[a], vocab[b]) for a, b in merges]
        made = [vocab[a + b] for a, b in merges]
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is no byte-level BPE: its vocabulary lacks {error!s:.80}"
                         ) from None
    first = made[0] if made else max(256, max(byte_ids) + 1)
    if made != list(range(first, first + len(made))):
        raise ValueError(f"{path}: the ids of its merges are not consecutive, which is not "
                         "supported")
    extra = set(vocab) - set(specials) - set(CHAR_TO_BYTE) - {a + b for a, b in merges}
    if extra:
        raise ValueError(f"{path}: token {min(extra)!r:.80} is no byte, merge or special token")
    return {"merges": pairs, "special_tokens": specials, "byte_ids": byte_ids,
            "first_merge": first}


# --------------------------------------------------------------------------------- GPT-2's files

def gpt2_folder() -> Path:
    """Where GPT-2's two files are or shall be: beside the repository, else in the cache."""
    shared = Path(os.environ.get("ONELOOP_SHARED",
                                 Path(__file__).resolve().parent.parent / "shared/data"))
    if (shared / "gpt2_vocab").is_dir():
        return shared / "gpt2_vocab"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "oneloop" / "gpt2"


def has_gpt2() -> bool:
    """Whether GPT-2's two files are here, so that nothing has to be downloaded."""
    return all((gpt2_folder() / name).is_file() for name in GPT2_SHA256)


def find_gpt2() -> Path:
    """The folder of GPT-2's two files, after downloading them once if need be.

    FileNotFoundError if that fails; ValueError if what comes is not what OpenAI published.
    """
    folder = gpt2_folder()
    for name, sha256 in GPT2_SHA256.items():
        if (folder / name).is_file():
            continue
        download(GPT2_URL + name, folder / name, sha256,
                 f"put vocab.bpe and encoder.json into {folder}")
    return folder


def from_gpt2_folder(folder: Path) -> dict[str, Any]:
    """Tokenizer arguments from GPT-2's two files under either of their names; its pattern is the
    default one. FileNotFoundError if the folder has neither."""
    for vocab_name, merges_name in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
        if (folder / vocab_name).is_file() and (folder / merges_name).is_file():
            break
    else:
        raise FileNotFoundError(f"{folder} holds no tok.json, tokenizer.json, or GPT-2 files "
                                "(vocab.bpe and encoder.json, or merges.txt and vocab.json)")
    vocab = read_json(folder / vocab_name)
    try:
        lines = (folder / merges_name).read_text(encoding="utf-8").split("\n")
        merges = [(a, b) for line in lines if line and not line.startswith("#version")
                  for a, b in [line.split(" ")]]
    except ValueError as error:
        raise ValueError(f"{folder / merges_name} is damaged, each line is a merge of two tokens: "
                         f"{error}") from None
    made = {a + b for a, b in merges}
    specials = {token: i for token, i in vocab.items()
                if token not in made and token not in CHAR_TO_BYTE}
    return from_vocab(vocab, merges, specials, folder / vocab_name)


# ---------------------------------------------------------------------------------- Hugging Face

def from_hugging_face(data: dict[str, Any], path: str | Path,
                      patterns: dict[str, str]) -> dict[str, Any]:
    """Tokenizer arguments from the contents of a tokenizer.json.

    patterns: those of "gpt2", which ByteLevel has built in, and "none".
    ValueError, with the reason, for what would change ids silently.
    """
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
            raise ValueError(f"{path} cannot be read exactly: {reason}")
    if splits:
        pattern = splits[0]["pattern"].get("Regex") or regex.escape(splits[0]["pattern"]["String"])
    else:
        pattern = patterns["gpt2" if levels[0].get("use_regex", True) else "none"]
    merges = [tuple(m.split(" ") if isinstance(m, str) else m) for m in model["merges"]]
    specials = {token["content"]: token["id"] for token in data.get("added_tokens", [])}
    return {**from_vocab(model["vocab"], merges, specials, path), "pattern": pattern}


def write_hugging_face(folder: str | Path, merges: list[tuple[int, int]], token_bytes: list[bytes],
                       special_tokens: dict[str, int], pattern: str | None, end: str | None
                       ) -> None:
    """Write the tokenizer.json and tokenizer_config.json that AutoTokenizer loads.

    token_bytes: the bytes of each id; pattern: None is GPT-2's, which ByteLevel has built in;
    end: the special token that begins and ends documents, if there is one.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    spell = ["".join(BYTE_TO_CHAR[b] for b in token) for token in token_bytes]
    vocab = {token: i for i, token in enumerate(spell) if token} | special_tokens
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": pattern is None}
    pre_tokenizer = byte_level if pattern is None else {
        "type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
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
    write_text(folder / "tokenizer.json", json.dumps(data, ensure_ascii=False, indent=1))
    write_text(folder / "tokenizer_config.json", json.dumps(config, indent=1))


# -------------------------------------------------------------------------------------- tiktoken

def from_ranks(ranks: dict[bytes, int], name: str) -> dict[str, Any]:
    """Tokenizer arguments from tiktoken's ranks (bytes -> id), which have tokens but no merges.

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
    if list(made.values()) != list(range(first, first + len(tokens) - 256)):
        raise ValueError(f"the ids of {name} have gaps; only gap-free ones are read")
    return {"merges": list(made), "byte_ids": byte_ids, "first_merge": first}

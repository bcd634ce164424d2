"""Tokenizer files: ours keep everything and notice changes, others' give the same ids."""
import hashlib
import json
import random

import pytest

import bpe
from bpe import Tokenizer
from formats import tokenizer as bpe_files

TEXT = ("It's 2024, isn't it? We'll see: naïve café 中文中文 \U0001f600\U0001f600  \n\t x  = 10\n"
        "the cat and the hat and the bat <|endoftext|> 12345 ") * 3
CL100K = (      # as tiktoken has it now: {1,3}+ gives nothing back
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s")
PATTERNS = [*bpe.PATTERNS.values(), r"\w+|\s|[^\w\s]+", CL100K,
            r"\{{1,2}+|[\]{1,2}+]{2}+|c{2,}+|[\s\S]"]


@pytest.fixture(params=PATTERNS, ids=[*bpe.PATTERNS, "own", "cl100k", "counts"])
def tok(request):
    return Tokenizer.train([TEXT], 290, pattern=request.param,
                           special_tokens=("<|endoftext|>", "<|two words é|>"))


@pytest.fixture
def small():
    return Tokenizer.train([TEXT], 290)


def same(a, b):
    assert (a.pattern, a.merges, a.special_tokens, a.token_bytes, a.hash, a.eot) == (
        b.pattern, b.merges, b.special_tokens, b.token_bytes, b.hash, b.eot)
    assert a.encode(TEXT) == b.encode(TEXT)
    assert a.encode(TEXT, allowed_special="all") == b.encode(TEXT, allowed_special="all")


def test_save_and_load_keep_the_pattern_the_specials_and_every_id(tok, tmp_path):
    tok.save(tmp_path / "tok.json")
    same(Tokenizer.load(tmp_path / "tok.json"), tok)
    same(Tokenizer.load(tmp_path), tok)
    assert [path.name for path in tmp_path.iterdir()] == ["tok.json"]


def test_the_hash_tells_tokenizers_apart(tok):
    others = [Tokenizer(tok.merges[:-1], tok.pattern), Tokenizer(tok.merges, r"[\s\S]"),
              Tokenizer(tok.merges, tok.pattern, ()), Tokenizer(tok.merges, tok.pattern, ("<x>",))]
    assert len({tok.hash, *(other.hash for other in others)}) == 5 and len(tok.hash) == 64


def test_a_tokenizer_of_bytes_alone_is_kept(tmp_path):
    tok = Tokenizer([], special_tokens=())
    tok.save(tmp_path / "tok.json")
    same(Tokenizer.load(tmp_path / "tok.json"), tok)
    same(Tokenizer.from_tiktoken(tok.to_tiktoken()), tok)
    tok.save_pretrained(tmp_path / "hf")
    same(Tokenizer.load(tmp_path / "hf"), tok)


def test_the_file_can_be_read_by_people(small, tmp_path):
    small.save(tmp_path / "tok.json")
    lines = (tmp_path / "tok.json").read_text(encoding="utf-8").splitlines()
    a, b = small.merges[0]
    assert json.dumps([a, b, bpe_files.readable(small.token_bytes[256])]) + "," in lines
    assert len(lines) < len(small.merges) + 15


def test_tokens_are_spelled_for_people():
    tokens = b" a", b"\n\t", "é中".encode(), b"\xe4\xb8"
    assert [*map(bpe_files.readable, tokens)] == [" a", "\\n\\t", "é中", "\\xe4\\xb8"]


def change(data, key):
    if key == "merges":
        data["merges"][3][0] += 1
    elif key == "spelling":
        data["merges"][3][2] += "x"
    elif key == "special_tokens":
        data["special_tokens"] = {"<|end|>": 289}
    elif key == "missing":
        del data["pattern"]
    else:
        data[key] = {"pattern": r"[\s\S]", "sha256": "0" * 64, "byte_ids": [1] * 256}[key]


@pytest.mark.parametrize("key", ["merges", "spelling", "special_tokens", "pattern", "sha256",
                                 "missing", "byte_ids"])
def test_a_changed_file_is_noticed(small, tmp_path, key):
    path = tmp_path / "tok.json"
    small.save(path)
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data, key)
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ValueError, match="tok.json was changed"):
        Tokenizer.load(path)


def test_truncated_and_foreign_files_and_other_versions_are_refused(small, tmp_path):
    path = tmp_path / "tok.json"
    small.save(path)
    text = path.read_text(encoding="utf-8")
    for content, message in [(text[:len(text) // 2], "is truncated or not JSON"),
                             ("", "is truncated or not JSON"),
                             (text.replace('"version": 1', '"version": 2'), "has version 2; .* 1"),
                             ("[1, 2]", "holds a list, not an object"),
                             ("{}", "is neither our tok.json nor")]:
        path.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            Tokenizer.load(path)
    with pytest.raises(FileNotFoundError, match="no such file: .*none.json"):
        Tokenizer.load(tmp_path / "none.json")
    with pytest.raises(FileNotFoundError, match="holds no tok.json, tokenizer.json, or GPT-2"):
        path.unlink()
        Tokenizer.load(tmp_path)


def test_tiktoken_gives_the_same_ids_and_comes_back(tok):
    encoding = tok.to_tiktoken()
    assert encoding.encode_ordinary(TEXT) == tok.encode(TEXT) and encoding.n_vocab == tok.vocab_size
    same(Tokenizer.from_tiktoken(encoding), tok)


def test_tiktoken_gives_back_tokens_whose_ids_begin_after_special_ones():
    """The largest id is then above the number of tokens, here by 40."""
    merges = [(137, 138), (139, 140), (296, 297), (72, 298)]
    tok = Tokenizer(merges, special_tokens={f"<{i}>": i for i in range(40)},
                    byte_ids=range(40, 296), first_merge=296)
    assert tok.token_bytes[299] == b" abcd"
    same(Tokenizer.from_tiktoken(tok.to_tiktoken()), tok)


def test_autotokenizer_gives_the_same_ids(tok, tmp_path):
    transformers = pytest.importorskip("transformers", reason="a development extra")
    tok.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(TEXT)["input_ids"] == tok.encode(TEXT, allowed_special="all")
    plain = TEXT.replace("<|endoftext|>", "")
    ids = theirs(plain)["input_ids"]
    assert ids == tok.encode(plain) and theirs.decode(ids) == plain
    assert len(theirs) == tok.vocab_size and theirs.eos_token_id == tok.eot
    same(Tokenizer.load(tmp_path), tok)


def test_three_digits_that_give_nothing_back_are_three_digits_to_autotokenizer(tmp_path):
    """The one merge, 34, would cross from the third digit of 1234 to the fourth."""
    transformers = pytest.importorskip("transformers", reason="a development extra")
    tok = Tokenizer([(ord("3"), ord("4"))], CL100K)
    tok.save_pretrained(tmp_path)
    ids = transformers.AutoTokenizer.from_pretrained(tmp_path)("34 1234 123456")["input_ids"]
    assert ids == tok.encode("34 1234 123456") == [256, *b" 1234 123456"]


def test_a_pattern_that_hugging_face_would_read_differently_is_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"has a group with \{2\}\+, which Hugging Face"):
        Tokenizer([], r"(?:ab){2}+|[\s\S]").save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_special_token_that_is_another_tokens_spelling_is_not_written(tmp_path):
    """Its id would stand for both there: all text with that token would have other ids."""
    tok = Tokenizer([(ord("a"), ord("b"))], special_tokens=["ab", "<|ab|>"])
    with pytest.raises(ValueError, match="special token 'ab' is spelled as token 256 is"):
        tok.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("specials", [[], ["<|endoftext|>", "<pad>"]])
@pytest.mark.parametrize("pattern", [None, bpe.PATTERNS["gpt4"],
                                     r"\p{N}{1,3}+|[^\p{N}]{1,2}"])      # all digits, by theirs
def test_a_tokenizer_trained_by_hugging_face_keeps_its_ids(tmp_path, specials, pattern):
    """Theirs put special tokens first and order the bytes in their own way."""
    tokenizers = pytest.importorskip("tokenizers", reason="a development extra")
    pre = tokenizers.pre_tokenizers
    level = pre.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE())
    theirs.pre_tokenizer = level if pattern is None else pre.Sequence(
        [pre.Split(tokenizers.Regex(pattern), "isolated"), level])
    theirs.train_from_iterator([TEXT], tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=specials, show_progress=False,
        initial_alphabet=pre.ByteLevel.alphabet()))
    theirs.save(str(tmp_path / "tokenizer.json"))
    tok = Tokenizer.load(tmp_path / "tokenizer.json")
    assert tok.vocab_size == theirs.get_vocab_size()
    assert tok.special_tokens == {name: i for i, name in enumerate(specials)}
    text = TEXT.replace("<|endoftext|>", "")
    assert tok.encode(text) == theirs.encode(text).ids == tok.encode_slowly(text)
    assert tok.decode(tok.encode(text)) == text
    assert tok.encode(TEXT, allowed_special="all") == theirs.encode(TEXT).ids
    tok.save(tmp_path / "tok.json")
    same(Tokenizer.load(tmp_path / "tok.json"), tok)
    same(Tokenizer.from_tiktoken(tok.to_tiktoken()), tok)
    tok.save_pretrained(tmp_path / "again")
    same(Tokenizer.load(tmp_path / "again"), tok)


@pytest.mark.parametrize("change, reason", [
    (lambda d: d["model"].update(type="WordPiece"), "its model is WordPiece, not BPE"),
    (lambda d: d.update(normalizer={"type": "NFC"}), "it normalizes text"),
    (lambda d: d.update(pre_tokenizer={"type": "Whitespace"}), "not byte-level"),
    (lambda d: d["pre_tokenizer"].update(add_prefix_space=True), "a space before the text"),
    (lambda d: d["model"].update(end_of_word_suffix="</w>"), "not byte-level"),
    (lambda d: d["model"]["vocab"].pop("Ġ"), "no byte-level BPE: its vocabulary lacks 'Ġ'"),
    (lambda d: d["model"]["vocab"].update(unreachable=290), "'unreachable' is no byte, merge or"),
    (lambda d: d["model"]["merges"].pop(0), "not consecutive|is no byte, merge or"),
    (lambda d: d.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": r"(?:ab){1,3}+|[\s\S]"}, "behavior": "Isolated",
         "invert": False}, {**d["pre_tokenizer"], "use_regex": False}]}),
     r"has a group with \{1,3\}\+"),
    (lambda d: d["added_tokens"].append({"id": 290, "content": "    ", "special": False}),
     "its added token '    ' is not special: it would be found in all text"),
])
def test_a_hugging_face_file_that_would_change_ids_is_refused(small, tmp_path, change, reason):
    small.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ValueError, match=reason):
        Tokenizer.load(path)


def test_tokens_that_their_own_merges_do_not_make_are_found():
    """Against the definition, on merges at random, few bytes and so many runs of one."""
    rng, found = random.Random(0), 0
    for _ in range(300):
        merges, spelled = [], {i: bytes([i]) for i in (97, 98, 99)}
        for new in range(256, 256 + rng.randint(1, 9)):
            a, b = rng.choices([*spelled], k=2)
            if spelled[a] + spelled[b] not in spelled.values():
                merges.append((a, b))
                spelled[255 + len(merges)] = spelled[a] + spelled[b]
        ids = list(range(256, 256 + len(merges)))
        made = dict(zip(merges, ids))
        wrong = [i for i in ids if bpe.encode_slowly([spelled[i]], made) != [i]]
        # Parts that are not made themselves come with what is made of them, or hide it.
        assert bpe_files.unmade(merges, ids)[:1] == wrong[:1]
        found += bool(wrong)
    assert 50 < found < 250


def test_a_hugging_face_file_whose_ids_depend_on_who_encodes_is_refused(tmp_path):
    """tiktoken finds "abc" whole in its table; Hugging Face merges "ab", and then nothing."""
    Tokenizer([(97, 98), (98, 99), (97, 257)]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"its merges make \('a', 'bc'\) of no text"):
        Tokenizer.load(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(path.read_text().replace('"ignore_merges": false', '"ignore_merges": true'))
    assert Tokenizer.load(tmp_path).encode("abc") == [258]      # as Hugging Face then does, too


def test_a_token_that_a_hugging_face_file_puts_before_each_text_is_said(small, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    small.save_pretrained(tmp_path)
    path = str(tmp_path / "tokenizer.json")
    theirs = tokenizers.Tokenizer.from_file(path)
    name, i = next(iter(small.special_tokens.items()))
    theirs.post_processor = tokenizers.processors.Sequence([
        tokenizers.processors.ByteLevel(),
        tokenizers.processors.TemplateProcessing(f"{name} $A", special_tokens=[(name, i)])])
    theirs.save(path)
    assert theirs.encode("hello").ids == [i, *small.encode("hello")]
    with pytest.warns(UserWarning, match="endoftext.* around each text"):
        assert Tokenizer.load(path).encode("hello") == small.encode("hello")


def test_gpt2s_files_are_read_under_either_name(small, tmp_path):
    small.save_pretrained(tmp_path / "hf")
    model = json.loads((tmp_path / "hf" / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    merges = "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in model["merges"])
    for names in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
        folder = tmp_path / names[0]
        folder.mkdir()
        (folder / names[0]).write_text(json.dumps(model["vocab"]), encoding="utf-8")
        (folder / names[1]).write_text(merges, encoding="utf-8")
        same(Tokenizer.load(folder), small)
        same(Tokenizer.gpt2(folder), small)


def test_tokens_that_stand_beside_gpt2s_files_are_not_left_out(small, tmp_path):
    small.save_pretrained(tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
    (tmp_path / "added_tokens.json").write_text(json.dumps(small.special_tokens))    # no new one
    same(Tokenizer.load(tmp_path), small)
    (tmp_path / "added_tokens.json").write_text('{"<|im_end|>": 290}')
    with pytest.raises(ValueError, match="added_tokens.json does not say which"):
        Tokenizer.load(tmp_path)


def test_gpt2_goes_through_every_format(gpt2_vocab, tmp_path):
    tok = Tokenizer.gpt2(gpt2_vocab)
    tok.save(tmp_path / "tok.json")
    tok.save_pretrained(tmp_path)
    for again in (Tokenizer.load(tmp_path / "tok.json"), Tokenizer.from_tiktoken(tok.to_tiktoken()),
                  Tokenizer.load(tmp_path / "tokenizer.json")):
        same(again, tok)
    assert tok.token_bytes[0] == b"!" and tok.decode([31373, 995]) == "hello world"


def test_gpt2_is_downloaded_once_and_checked(monkeypatch, tmp_path):
    """From a folder instead of the internet; download.py has its own tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(bpe_files, "GPT2_URL", tmp_path.as_uri() + "/")
    with pytest.raises(FileNotFoundError, match="cannot download .*vocab.bpe .*: put vocab.bpe "):
        Tokenizer.gpt2()
    for name in bpe_files.GPT2_SHA256:
        (tmp_path / name).write_bytes(b"something else")
    with pytest.raises(ValueError, match="vocab.bpe gave a file with the checksum"):
        Tokenizer.gpt2()
    assert not list(tmp_path.glob("cache/**/vocab.bpe"))
    sha256 = hashlib.sha256(b"something else").hexdigest()
    monkeypatch.setattr(bpe_files, "GPT2_SHA256", dict.fromkeys(bpe_files.GPT2_SHA256, sha256))
    folder = bpe_files.gpt2_folder()
    assert (folder / "vocab.bpe").read_bytes() == b"something else"
    for name in bpe_files.GPT2_SHA256:
        (tmp_path / name).unlink()
    assert bpe_files.gpt2_folder() == folder


def test_merges_that_double_a_token_again_and_again_are_refused():
    with pytest.raises(ValueError, match="make tokens of more than 268,435,456 bytes"):
        Tokenizer([(97, 97)] + [(i, i) for i in range(256, 320)])


def test_gpt2_is_a_name_where_no_folder_has_it(gpt2_in_cache, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Tokenizer.load("gpt2").vocab_size == Tokenizer.gpt2().vocab_size == 50257
    small.save_pretrained("gpt2")
    same(Tokenizer.load("gpt2"), small)
    assert Tokenizer.gpt2().vocab_size == 50257

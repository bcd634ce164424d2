"""bpe.py computes what its specification says, and what rustbpe and tiktoken compute."""
import doctest
import multiprocessing
import os
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

import bpe
from bpe import Tokenizer, train_slowly
from fast import bpe_corpus, bpe_counts, bpe_encode, bpe_merges, bpe_pieces, bpe_table
from fast.bpe_counts import count_pieces
from fast.bpe_merges import learn_merges
from fast.bpe_pieces import GPT2_PATTERN, GPT4_PATTERN, O200K_PATTERN, split

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is a development extra")
from hypothesis import given, settings
from hypothesis import strategies as st  # noqa: E402

examples = settings(max_examples=100, deadline=None)

# Few different characters, so that pairs repeat, overlap and tie; apostrophes and spaces, which
# the GPT-2 pattern treats apart; characters of every width in UTF-8 and of every kind.
dense = st.text(alphabet="ab '\nsl", max_size=60)
anything = st.text(max_size=60) | st.text(alphabet="aé中 \u3000\U0001f600'1²\t\u0301\u0558.",
                                          max_size=40)
texts = st.lists(dense | anything, max_size=6)
patterns = st.sampled_from([*bpe.PATTERNS.values(), r"\w+|\W", r"[\s\S]{1,3}"])


def naive_pieces(texts, pattern):
    return Counter(piece.encode() for text in texts for piece in split(pattern, text))


def reference_gpt2(folder):
    """tiktoken's own GPT-2, built from the files rather than downloaded."""
    ranks = data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"),
                                            str(folder / "encoder.json"))
    return tiktoken.Encoding("gpt2", pat_str=bpe_encode.TIKTOKEN_GPT2, mergeable_ranks=ranks,
                             special_tokens={"<|endoftext|>": 50256}, explicit_n_vocab=50257)


def test_the_example_in_the_docstring_holds():
    assert doctest.testmod(bpe).failed == 0 and doctest.testmod(bpe).attempted > 0


@examples
@given(texts, patterns, st.integers(0, 30), st.integers(1, 3), st.sampled_from([1, 2, 4000]))
def test_merges_equal_the_slow_trainer(texts, pattern, num_merges, min_frequency, size):
    """However often pairs are indexed again."""
    pieces = naive_pieces(texts, pattern)
    index = bpe_merges.Corpus.index
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe_merges.Corpus, "index", lambda self, least: index(self, least, size))
        fast = learn_merges(pieces, num_merges, min_frequency)
    assert fast == train_slowly(pieces, num_merges, min_frequency)


def test_overlapping_runs_merge_left_to_right():
    assert bpe.merge([7] * 5, (7, 7), 8) == [8, 8, 7]
    for pieces in ({b"aaaaaaa": 3, b"aaa": 2, b"baab": 1}, {b"aaaa": 3, b"xy": 4}):
        assert learn_merges(pieces, 5) == train_slowly(pieces, 5)


@examples
@given(st.dictionaries(st.text("abcdefgh", max_size=15).map(str.encode), st.integers(1, 30),
                       max_size=30), st.sampled_from(["ids", "bytes"]))
def test_merges_that_are_made_together_equal_those_made_one_by_one(pieces, tie):
    assert learn_merges(pieces, 40, tie=tie) == train_slowly(pieces, 40, tie=tie)


def test_ties_go_to_the_smaller_pair():
    assert learn_merges({b"xy": 2, b"ab": 2, b"ac": 2}, 3) == [(97, 98), (97, 99), (120, 121)]


@examples
@given(texts)
def test_splitting_in_numpy_equals_the_regex(texts):
    assert count_pieces(texts, GPT2_PATTERN) == naive_pieces(texts, GPT2_PATTERN)


@pytest.mark.parametrize("texts", [
    ["it's I'd we'll they've you're don't i'm 'll 've 're 's"], ["x'street x'vest x'ready 'lll"],
    [" 's", "\n's", "''s", "'S 'LL", "'l", "'v", "'r", "'"], ["a'", "s"], ["a'l", "l"], ["a ", "b"],
    ["a  b", "a   b", " \n b", "\n\n", "a\u3000\u3000b", "a \u3000b", "a\u3000 b"]])
def test_apostrophes_and_spaces_are_split_as_the_regex_does(texts):
    assert count_pieces(texts, GPT2_PATTERN) == naive_pieces(texts, GPT2_PATTERN)


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="abA1 \n.'s\u3000中é\u0301\u0558!/", max_size=400),
       st.sampled_from(list(bpe_counts.SAFE_PATTERNS)), st.integers(1, 20))
def test_blocks_split_as_the_whole_text(tmp_path_factory, text, pattern, block):
    path = tmp_path_factory.getbasetemp() / "blocks.txt"
    path.write_bytes((text or "a").encode())
    blocks = list(bpe_counts.read_blocks([path], pattern, block=block))
    whole = naive_pieces([text or "a"], pattern)
    assert "".join(blocks) == (text or "a")
    assert naive_pieces(blocks, pattern) == whole
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe_counts, "BLOCK", block)
        assert count_pieces([text or "a"], pattern, num_proc=1) == whole


@pytest.mark.parametrize("pattern", [GPT2_PATTERN, GPT4_PATTERN])
def test_processes_count_as_one_does(monkeypatch, pattern):
    monkeypatch.setattr(bpe_counts, "BLOCK", 1000)
    text = "It's one loop, 中文也行。 for x in range(10):\n\tprint('x')\n" * 1000
    assert count_pieces([text], pattern, num_proc=2) == naive_pieces([text], pattern)


def test_an_interrupted_count_leaves_no_process(monkeypatch):
    monkeypatch.setattr(bpe_counts, "BLOCK", 1000)

    def texts():
        for _ in range(50):
            yield "some words " * 100
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        count_pieces(texts(), GPT2_PATTERN, num_proc=2)
    assert not multiprocessing.active_children()


def test_a_killed_process_is_noticed(monkeypatch):
    monkeypatch.setattr(bpe_counts, "BLOCK", 1000)
    monkeypatch.setattr(bpe_counts, "count_worker", lambda *args: os._exit(9))
    with pytest.raises(RuntimeError, match="killed"):
        count_pieces(["some words " * 100] * 50, GPT2_PATTERN, num_proc=2)


@pytest.mark.parametrize("corpus,most,vocab_size", [
    ("mix", 60_000, 8000), *(pytest.param(corpus, None, 32000, marks=pytest.mark.slow)
                             for corpus in ("novels", "chinese", "mix"))])
def test_merges_equal_rustbpe(shared, corpus, most, vocab_size):
    """The first `most` characters of each file."""
    rustbpe = pytest.importorskip("rustbpe", reason="rustbpe is a development extra")
    paths = {"novels": sorted(shared.glob("novels/*.txt")),
             "chinese": sorted(shared.glob("chinese/*.txt"))}
    paths["mix"] = (paths["novels"][:3] + paths["chinese"][:1] + [Path(bpe.__file__)]
                    + sorted(shared.glob("multilingual/**/*.txt"))
                    + sorted(shared.glob("alpaca/*.json")))
    documents = [path.read_text(encoding="utf-8")[:most] for path in paths[corpus]]
    ours = Tokenizer.train(documents, vocab_size, special_tokens=())
    theirs = rustbpe.Tokenizer()
    theirs.train_from_iterator(iter(documents), vocab_size, pattern=GPT2_PATTERN)
    expected = sorted(theirs.get_mergeable_ranks(), key=lambda item: item[1])
    assert ours.token_bytes == [bytes(token) for token, _ in expected]


@settings(max_examples=100, deadline=None)
@given(st.lists(dense | anything, max_size=6), st.integers(1, 40), st.sampled_from([1, 3]),
       st.sampled_from([2, 1 << 17]), patterns)
def test_a_corpus_gives_the_ids_of_each_text(texts, block, threads, most, pattern):
    """Cut into blocks of any size, in threads, and with tables that are full after two pieces or
    grow from two rows."""
    tok = Tokenizer([(97, 98), (32, 256), (228, 184), (32, 32), (97, 97)], pattern)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe_counts, "BLOCK", block)
        patch.setattr(bpe_corpus, "BLOCK", block)
        patch.setattr(bpe_corpus, "MOST", most)
        patch.setattr(bpe_table, "SLOTS", 2)
        found = [ids.tolist() for ids in tok.encode_corpus(iter(texts), threads)]
        counted = count_pieces(texts, pattern, num_proc=1)
    assert found == [tok.encode_slowly(text) for text in texts]
    assert counted == naive_pieces(texts, pattern)


@settings(max_examples=60, deadline=None)
@given(st.lists(dense | anything, max_size=5), st.lists(dense | anything, max_size=5))
def test_what_two_processes_counted_is_added(here, there):
    """Tables that grow from two slots; pieces of any length, with bytes 0 in them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe_table, "SLOTS", 2)
        one, other = (bpe_counts.count_batches([[(text, True)] for text in texts], GPT2_PATTERN)
                      for texts in (here, there))
        patch.setattr(bpe_table, "MANY", 3)
        for part in other.parts():
            one.update(part)
    pieces = one.pieces()
    assert dict(pieces) == naive_pieces([*here, *there], GPT2_PATTERN)
    assert list(one.pieces(len(pieces) // 2)) == list(pieces)[len(pieces) // 2:]


def test_pieces_that_share_a_slot_or_hold_the_mark_keep_their_ids(monkeypatch):
    """With all pieces in one slot of the table; U+10FFFF parts pieces where they are encoded."""
    monkeypatch.setattr(bpe_table, "FACTORS", np.zeros(2, np.uint64))
    tok = Tokenizer([(97, 98)])
    text = "".join(f" {word}{end}" for word in ("ab", "abab", "c" * 15, "c" * 16, "d" * 40)
                   for end in ("", "1", "\U0010ffff", "é")) * 2
    assert next(tok.encode_corpus([text])).tolist() == tok.encode_slowly(text)
    assert count_pieces([text], GPT2_PATTERN) == naive_pieces([text], GPT2_PATTERN)


def test_a_corpus_is_read_as_its_ids_are_taken():
    read = []

    def texts():
        for i in range(1000):
            read.append(i)
            yield "some words " * 10_000
    next(Tokenizer([]).encode_corpus(texts(), 1))
    assert len(read) < 100


def texts_in(folder):
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            yield path.read_text(encoding="latin-1")


def test_gpt2_gives_tiktokens_ids(shared, gpt2_vocab):
    tok, reference = Tokenizer.gpt2(gpt2_vocab), reference_gpt2(gpt2_vocab)
    assert (tok.vocab_size, tok.eot) == (50257, 50256)
    for text in texts_in(shared):
        ids = reference.encode_ordinary(text[:30_000])
        assert tok.encode(text[:30_000]) == ids == tok.encode_batch([text[:30_000]])[0]


@pytest.mark.slow
def test_gpt2_gives_tiktokens_ids_on_whole_files(shared, gpt2_vocab):
    tok, reference = Tokenizer.gpt2(gpt2_vocab), reference_gpt2(gpt2_vocab)
    for text in texts_in(shared):
        assert tok.encode(text) == reference.encode_ordinary(text) == tok.encode_batch([text])[0]


@pytest.fixture(scope="module")
def toks():
    """A tokenizer for each kind of pattern, with merges over several alphabets."""
    text = "It's 2024, isn't it? naïve café 中文中文 日本 \U0001f600\U0001f600  \n\t x = 10\n" * 3
    return {name: Tokenizer.train([text], 287, pattern=pattern)
            for name, pattern in [*bpe.PATTERNS.items(), ("own", r"\w+|\s|[^\w\s]+")]}


@pytest.mark.parametrize("name", ["gpt2", "gpt4", "o200k", "none", "own"])
def test_round_trips_and_the_slow_encoder_agrees(toks, name):
    tok = toks[name]

    @examples
    @given(st.text() | st.text(alphabet="It's2 024,中文\U0001f600 \n\té\u0558"), st.binary())
    def holds(text, data):
        ids = tok.encode(text)
        assert ids == tok.encode_slowly(text) == tok.encode_batch([text])[0]
        assert tok.decode(ids) == text
        assert tok.decode_bytes(tok.encode_bytes(data)) == data

    holds()


def test_the_slow_encoder_agrees_on_24_languages(shared, gpt2_vocab):
    tok = Tokenizer.gpt2(gpt2_vocab)
    for path in sorted(shared.glob("multilingual/udhr/*.txt")):
        text = path.read_text(encoding="utf-8")[:3000]
        assert tok.encode_slowly(text) == tok.encode(text), path.name


def test_o200k_is_the_pattern_that_tiktoken_publishes(monkeypatch):
    from tiktoken_ext import openai_public
    monkeypatch.setattr(openai_public, "load_tiktoken_bpe", lambda *args, **kwargs: {})
    assert bpe.PATTERNS["o200k"] == openai_public.o200k_base()["pat_str"]
    assert split(O200K_PATTERN, "I'VE 12345 camelCase/words\n") == [
        "I'VE", " ", "123", "45", " camel", "Case", "/words", "\n"]


def test_letters_newer_than_tiktokens_unicode_are_split_as_tiktoken_does(toks):
    """`regex` and tiktoken know different versions of Unicode; the same pieces all the same."""
    every = map(chr, bpe_pieces.POINTS.tolist())
    seen = {char for char in every if bpe_pieces.regex.match(r"\p{L}", char)}
    known = {chr(i) for i in (bpe_pieces.kinds() == bpe_pieces.LETTER).nonzero()[0]}
    for char in sorted(seen ^ known)[:200]:
        text = f"a{char}a {char}a 1{char}"
        assert count_pieces([text], GPT2_PATTERN) == naive_pieces([text], GPT2_PATTERN)
        for name in ("gpt4", "o200k"):
            assert toks[name].encode(text) == toks[name].encode_slowly(text)


def test_a_lone_surrogate_is_refused_with_its_place(toks):
    for call in (toks["gpt2"].encode, lambda text: toks["gpt2"].encode_batch([text]),
                 lambda text: Tokenizer.train([text], 300)):
        with pytest.raises(ValueError, match=r"lone surrogate, U\+D800 at character 2"):
            call("ab\ud800c")


def test_user_text_never_becomes_a_special_token(toks):
    tok = toks["gpt2"]
    text = "a<|endoftext|>b"
    assert tok.eot not in tok.encode(text) and tok.eot not in tok.encode_batch([text])[0]
    assert tok.decode(tok.encode(text)) == text
    for allowed in (["<|endoftext|>"], "all"):
        assert tok.encode(text, allowed_special=allowed) == [97, tok.eot, 98]
    assert tok.decode([97, tok.eot, 98]) == text
    with pytest.raises(ValueError, match="'<|pad|>' is not a special token"):
        tok.encode(text, allowed_special=["<|pad|>"])


def test_of_two_special_tokens_that_fit_the_longer_one_is_taken():
    tok = Tokenizer([], special_tokens=("<|a|>", "<|a|>b", "<|"))
    assert tok.encode("x<|a|>b<|a|>", allowed_special="all") == [120, 257, 256]
    assert tok.encode("<|a|>b", allowed_special="<|a|>") == [256, 98]


def test_text_that_tiktokens_regex_gives_up_on_is_encoded_all_the_same(toks, capfd):
    """A million spaces before a word overflow the stack of its engine, which says so on stderr."""
    tok = toks["gpt2"]
    text = " " * 1_001_000 + "is  it"
    ids = tok.encode(text)
    assert tok.decode(ids) == text and ids[-10:] == tok.encode(text[-5000:])[-10:]
    assert tok.encode_batch([text, "it"]) == [ids, tok.encode("it")]
    assert tok.encode(f"{text}<|endoftext|>", allowed_special="all") == [*ids, tok.eot]
    capfd.readouterr()


def test_added_special_tokens_follow_all_ids_and_change_nothing_else(toks):
    tok = toks["gpt2"]
    more = tok.add_special_tokens(["<|user|>", "<|pad|>"])
    assert more.special_tokens == {"<|endoftext|>": 286, "<|user|>": 287, "<|pad|>": 288}
    assert more.vocab_size == 289 and tok.vocab_size == 287 and more.hash != tok.hash
    assert more.encode("naïve <|user|>") == tok.encode("naïve <|user|>")
    for names in (["<|endoftext|>"], ["x", "x"], [""]):
        with pytest.raises(ValueError, match="special token"):
            tok.add_special_tokens(names)


def test_every_id_has_its_bytes(toks):
    tok = toks["gpt4"]
    assert len(tok.token_bytes) == tok.vocab_size and tok.token_bytes[tok.eot] == b""
    spelled = [token for token in tok.token_bytes if token]
    assert len(set(spelled)) == len(spelled)
    for i, (a, b) in enumerate(tok.merges, 256):
        assert tok.token_bytes[i] == tok.token_bytes[a] + tok.token_bytes[b]


def test_a_vocabulary_of_bytes_alone_works():
    tok = Tokenizer.train(["héllo"], 256, special_tokens=())
    assert (tok.vocab_size, tok.merges, tok.eot) == (256, [], None)
    assert tok.encode("hé") == list("hé".encode()) == tok.encode_slowly("hé")
    assert tok.decode(tok.encode("hé")) == "hé" and tok.encode("") == [] and tok.decode([]) == ""


def test_unknown_ids_are_refused(toks):
    for i in (-1, 287):
        with pytest.raises(ValueError, match=f"id {i} is not in the vocabulary; .* 0 to 286"):
            toks["gpt2"].decode([97, i])


def test_training_stops_with_a_message_when_pairs_run_out():
    with pytest.warns(UserWarning, match="stopped after 2 of 43 merges"):
        tok = Tokenizer.train(["abc"], 300)
    assert tok.special_tokens == {"<|endoftext|>": 258}
    with pytest.warns(UserWarning, match="occurs 3 or more times"):
        assert len(Tokenizer.train(["abab ab ac"], 300, min_frequency=3).merges) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Tokenizer.train("abc", 259)       # one str is one text, and two merges are all there are


@pytest.mark.parametrize("arguments, message", [
    ({"vocab_size": 256}, "vocab_size=256 is under 256 bytes \\+ 1 special tokens; .* 257"),
    ({"min_frequency": 0}, "min_frequency=0 is not allowed; give at least 1"),
    ({"special_tokens": ["a", "a"]}, "special token 'a' is given twice"),
    ({"special_tokens": [""]}, "special token '' is empty"),
    ({"special_tokens": "<|endoftext|>"}, "is one string; give a list of names"),
    ({"pattern": "(unclosed"}, "is not a regular expression: missing \\)"),
    ({"pattern": "(a)|."}, "capturing groups"),
    ({"pattern": r"\w+|\s+"}, "drops '!'"),
    ({"pattern": r"[\s\S]*"}, "matches nothing there"),
    ({"pattern": r"[^\U0001f4a9]"}, "drops '\U0001f4a9'"),
])
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer.train(["some text \U0001f4a9"], **{"vocab_size": 300, **arguments})


def test_pattern_none_refuses_a_text_that_is_too_long_for_one_piece(monkeypatch):
    monkeypatch.setattr(bpe_counts, "MAX_PIECE", 1000)
    with pytest.raises(ValueError, match="a piece has 2,000 bytes; allowed are 1,000, because"):
        Tokenizer.train(["ab" * 1000], 300, pattern="none")
    tok = Tokenizer.train(["ab" * 100], 258, pattern="none", special_tokens=())
    assert tok.merges[0] == (97, 98)


# ---- ties by bytes, and patterns, each against its reference

@examples
@given(texts, patterns, st.integers(0, 30), st.integers(1, 3), st.sampled_from([1, 2, 4000]))
def test_merges_with_ties_by_bytes_equal_the_slow_trainer(texts, pattern, num, least, size):
    pieces = naive_pieces(texts, pattern)
    index = bpe_merges.Corpus.index
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bpe_merges.Corpus, "index", lambda self, least: index(self, least, size))
        fast = learn_merges(pieces, num, least, tie="bytes")
    assert fast == train_slowly(pieces, num, least, tie="bytes")


def test_ties_by_bytes_go_to_the_larger_bytes():
    """A longer token is larger than its beginning: (" b", "c") before (" ", "bd")."""
    pieces = {b"xy": 2, b"ab": 2, b"ac": 2}
    assert learn_merges(pieces, 3, tie="bytes") == [(120, 121), (97, 99), (97, 98)]
    assert train_slowly(pieces, 3, tie="bytes") == [(120, 121), (97, 99), (97, 98)]


def test_ties_by_bytes_give_the_reference_merges_of_stanfords_course(shared):
    """CS336, assignment 1: a vocabulary of 500 with one special token."""
    folder = shared / "bpe_reference"
    text = (folder / "corpus.en").read_text(encoding="utf-8")
    tok = Tokenizer.train(text, 500, tie="bytes")
    lines = (folder / "train-bpe-reference-merges.txt").read_text(encoding="utf-8").splitlines()
    expected = [tuple(bytes(bpe.files.CHAR_TO_BYTE[char] for char in token)
                      for token in line.split(" ")) for line in lines]
    assert [(tok.token_bytes[a], tok.token_bytes[b]) for a, b in tok.merges] == expected


def published_patterns():
    """Where tiktoken has them, from there; nanochat's as in its tokenizer.py."""
    from tiktoken_ext import openai_public
    with pytest.MonkeyPatch.context() as patch:
        for name in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
            patch.setattr(openai_public, name, lambda *args, **kwargs: {})
        made = {"gpt2": openai_public.gpt2, "gpt4": openai_public.cl100k_base,
                "o200k": openai_public.o200k_base}
        patterns = {name: make()["pat_str"] for name, make in made.items()}
    return patterns | {"nanochat": (
        r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"""
        r"""| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+""")}


def test_patterns_cut_texts_as_the_published_ones_do(shared, size=30_000):
    """By the `regex` package; 30,000 characters of each file. White space at the end is left out:
    newer versions of tiktoken cut it in another way than GPT-4's pattern did first."""
    for name, pattern in published_patterns().items():
        published = bpe_pieces.regex.compile(pattern)
        for text in texts_in(shared):
            text = text[:size].rstrip()
            assert split(bpe.PATTERNS[name], text) == published.findall(text), name


@pytest.mark.slow
def test_patterns_cut_whole_files_as_the_published_ones_do(shared):
    test_patterns_cut_texts_as_the_published_ones_do(shared, size=None)

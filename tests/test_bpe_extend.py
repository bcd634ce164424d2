"""Extending a tokenizer: new merges after the old ones, and every old id as it was."""
import json
import warnings
from collections import Counter

import pytest

import bpe
from bpe import Tokenizer
from fast.bpe_pieces import split
from tests.test_bpe import reference_gpt2

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is a development extra")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

dense = st.lists(st.text(alphabet="ab '\nsl中é", max_size=60), max_size=5)
ENGLISH = "It's one loop that reads all of the text, and that's what it does in 12 steps.\n" * 30
CHINESE = "中文也行，中文文本也行。文字也行。\n" * 30


@settings(max_examples=100, deadline=None)
@given(dense, dense, st.integers(0, 12), st.integers(1, 12), st.integers(1, 2),
       st.sampled_from(["gpt2", "gpt4", "none"]), st.permutations(range(97, 101)))
def test_extending_equals_its_definition(old, new, before, more, least, pattern, letters):
    """Also where bytes have other ids than their own, as GPT-2's have (here those of a to d)."""
    byte_ids = [*range(97), *letters, *range(101, 256)]

    def pieces(texts):
        return Counter(tuple(byte_ids[byte] for byte in piece.encode())
                       for text in texts for piece in split(bpe.PATTERNS[pattern], text))
    tok = Tokenizer(bpe.train_slowly(pieces(old), before), bpe.PATTERNS[pattern],
                    byte_ids=byte_ids)
    slow = bpe.extend_slowly(pieces(new), dict(zip(tok.merges, tok.merge_ids)), more, least,
                             range(tok.vocab_size, 1000))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")             # of merges that run out
        if not slow:
            with pytest.raises(ValueError, match="so there is nothing to learn"):
                tok.extend(new, tok.vocab_size + more, least)
            return
        wide = tok.extend(new, tok.vocab_size + more, least)
    assert wide.merges == tok.merges + slow
    for text in old + new:
        ids = wide.encode(text)
        assert ids == wide.encode_slowly(text) and wide.decode(ids) == text
        assert len(ids) <= len(tok.encode(text))


def test_new_merges_take_the_ids_that_nothing_has_and_every_format_takes_them(tmp_path):
    """A special token keeps its id, so it lies between the old merges and the new ones."""
    transformers = pytest.importorskip("transformers", reason="a development extra")
    old = Tokenizer.train(ENGLISH, 280).add_special_tokens(["<|user|>"])
    wide = old.extend(CHINESE, 290)
    assert wide.special_tokens == old.special_tokens == {"<|endoftext|>": 279, "<|user|>": 280}
    assert wide.merge_ids == [*range(256, 279), *range(281, 290)] and wide.vocab_size == 290
    assert wide.token_bytes[:279] == old.token_bytes[:279] and wide.eot == 279
    text = ENGLISH + CHINESE
    wide.save(tmp_path / "tok.json")
    wide.save_pretrained(tmp_path / "hf")
    for again in (Tokenizer.load(tmp_path / "tok.json"), Tokenizer.load(tmp_path / "hf"),
                  Tokenizer.from_tiktoken(wide.to_tiktoken())):
        assert again.hash == wide.hash and again.encode(text) == wide.encode(text)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs(text)["input_ids"] == wide.encode(text) and len(theirs) == 290
    assert theirs("<|endoftext|>")["input_ids"] == [279] == [theirs.eos_token_id]
    assert wide.to_tiktoken().n_vocab == 290
    again = wide.extend("zzz zzz", 291)                 # and again
    assert again.merges == wide.merges + [(122, 122)] and again.encode(text) == wide.encode(text)


def test_ids_that_nothing_has_are_filled_first():
    old = Tokenizer([(97, 98)], special_tokens={"<|end|>": 258})
    wide = old.extend("xyz xyz", 260)
    assert wide.merge_ids == [256, 257, 259] and wide.vocab_size == 260


def test_gpt2_extended_on_chinese_compresses_as_a_new_one_and_english_as_before(
        shared, gpt2_vocab, tmp_path):
    """2,000 tokens more, of a twentieth of two novels; every tenth line is kept to measure."""
    lines = [line for path in sorted(shared.glob("chinese/*.txt"))
             for line in path.read_text(encoding="utf-8").split("\n")][::20]
    held_out = "\n".join(lines[::10])
    train = "\n".join(line for i, line in enumerate(lines) if i % 10)
    gpt2 = Tokenizer.gpt2(gpt2_vocab)
    wide, fresh = gpt2.extend(train, 52257), Tokenizer.train(train, 2257)
    assert (wide.eot, wide.vocab_size) == (50256, 52257)
    assert wide.token_bytes[:50257] == gpt2.token_bytes
    assert len(wide.encode(held_out)) <= len(fresh.encode(held_out)) / 0.95
    english = (shared / "shakespeare" / "input.txt").read_text(encoding="utf-8")[:200_000]
    assert len(wide.encode(english)) <= len(gpt2.encode(english))
    assert wide.encode("hello world") == reference_gpt2(gpt2_vocab).encode("hello world")
    wide.save_pretrained(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.hash == wide.hash and again.encode(held_out) == wide.encode(held_out)


@pytest.fixture
def files(tmp_path):
    Tokenizer.train(ENGLISH, 280).save(tmp_path / "old.json")
    for name, data in {"zh.txt": CHINESE, "en.txt": "It's one", "bad.txt": b"text \xff\n"}.items():
        (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return tmp_path


def extend(files, name, *options):
    return bpe.main(["extend", str(files / name), f"--tokenizer={files / 'old.json'}",
                     f"--out={files / 'new.json'}", *options])


def test_the_command_extends_and_says_what_it_gained(files, capsys):
    assert extend(files, "zh.txt", "--vocab-size=290") == 0
    printed = capsys.readouterr().out
    assert "vocabulary 290" in printed and "first merges:   [" in printed
    now, before = printed.split("held-out text: ")[1].split("\n")[0].split(", before ")
    assert float(now.split()[-4]) > 2 * float(before.split()[0])
    expected = Tokenizer.load(files / "old.json").extend(CHINESE, 290)
    assert extend(files, "zh.txt", "--vocab-size=290", "--no-held-out") == 0
    assert Tokenizer.load(files / "new.json").hash == expected.hash


@pytest.mark.parametrize("name, options, message", [
    ("zh.txt", ["--vocab-size=270"],
     "vocab_size=270 leaves nothing to learn: the tokenizer has 280"),
    ("zh.txt", ["--vocab-size=290", "--pattern=gpt4"], "pattern=gpt4 is not that of "),
    ("zh.txt", ["--vocab-size=290", "--min-frequency=0"], "min_frequency=0 is not allowed"),
    ("en.txt", ["--vocab-size=290", "--no-held-out", "--min-frequency=9"],
     "no pair of tokens that occurs 9 or more times, so there is nothing to learn"),
    ("bad.txt", ["--vocab-size=290"], "bad.txt is not UTF-8: byte 0xff at offset 5"),
    ("zh.txt", ["--vocab-size=99999999"], "vocab_size=99999999 is above 4194304"),
])
def test_what_cannot_be_extended_is_one_line(files, capsys, name, options, message):
    assert extend(files, name, *options) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (files / "new.json").exists()


def test_the_tokenizers_own_pattern_may_be_named(files):
    assert extend(files, "zh.txt", "--vocab-size=290", "--pattern=gpt2") == 0


def test_a_tokenizer_whose_merges_are_out_of_order_is_not_extended(files, tmp_path, capsys):
    """bc is merged before ab, so abc is never made of ab and c; and ids that do not follow merges,
    as in some files of Hugging Face's."""
    Tokenizer([(98, 99), (97, 98), (257, 99)]).save(files / "old.json")
    assert extend(files, "zh.txt", "--vocab-size=290") == 2
    error = capsys.readouterr().err
    assert "are not in the order in which they apply" in error and error.count("\n") == 1
    Tokenizer([(97, 98), (120, 121)]).save_pretrained(tmp_path / "hf")
    path = tmp_path / "hf" / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    data["model"]["merges"].reverse()
    path.write_text(json.dumps(data), encoding="utf-8")
    assert bpe.main(["extend", str(files / "zh.txt"), f"--tokenizer={path}", "--vocab-size=290",
                     f"--out={files / 'new.json'}"]) == 2
    error = capsys.readouterr().err
    assert "not in the order of their ids: merge 1 makes id 256, where 259 is due" in error
    assert error.count("\n") == 1


# ---- the model that follows

@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A run on English, and the folders of English and Chinese by an extension of its tokenizer."""
    from data.corpus import CorpusConfig, prepare
    folder = tmp_path_factory.mktemp("grown")
    english = "".join(f"line {i * i % 97} of the text, {'odd' if i % 2 else 'even'}\n"
                      for i in range(600))
    old = Tokenizer.train(english, 290, special_tokens=())
    old.save(folder / "old.json")
    old.extend(CHINESE, 300).save(folder / "wide.json")
    for name, text, tok in (("en", english, "old"), ("en-wide", english, "wide"),
                            ("zh", CHINESE * 3, "old"), ("zh-wide", CHINESE * 3, "wide")):
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
        prepare(CorpusConfig(from_=str(folder / f"{name}.txt"), out=str(folder / name),
                             tokenizer=str(folder / f"{tok}.json"), validation=0.2))
    run(folder, "en", "base", init_from="scratch", max_steps=120,
        model=dict(block_size=32, n_layer=1, n_head=2, n_embd=32))
    return folder


def run(folder, data, out, **changes):
    from run.config import build
    from train import TrainConfig, train
    return train(build(TrainConfig, {**dict(
        data=str(folder / data), out=str(folder / out), init_from=str(folder / "base"),
        max_steps=1, batch_tokens=16 * 32, micro_batch=16, learning_rate=1e-2,
        min_learning_rate=0.0, eval_every=0, save_every=0, dtype="float32", device="cpu",
        compile="off", sample_tokens=0), **changes}))


def test_new_rows_are_the_mean_of_their_parts_and_the_head_stays_tied(grown):
    from run.load import load_model
    base, old = load_model(grown / "base")
    run(grown, "zh-wide", "still", learning_rate=0.0)
    model, wide = load_model(grown / "still")
    rows, new = base.transformer.wte.weight, model.transformer.wte.weight
    assert model.config.vocab_size == 300 and model.lm_head.weight is new
    assert new[:290].equal(rows[:290])
    for i in range(290, 300):
        parts = old.encode_bytes(wide.token_bytes[i])
        assert len(parts) > 1 and new[i].allclose(rows[parts].mean(0), atol=1e-6)


def test_the_first_loss_on_old_text_is_that_of_the_base_and_new_text_is_no_dearer(grown):
    """Nats a token of the same English, 0.05: what new tokens take of the probability. Chinese in
    bits per byte, for fewer tokens spell it."""
    base = run(grown, "en", "base-en", learning_rate=0.0)["val_loss"]
    wide = run(grown, "en-wide", "wide-en", learning_rate=0.0)["val_loss"]
    assert base <= wide <= base + 0.05
    before = run(grown, "zh", "base-zh", learning_rate=0.0)["val_bits_per_byte"]
    assert run(grown, "zh-wide", "wide-zh", learning_rate=0.0)["val_bits_per_byte"] <= before


def test_an_adapter_on_a_grown_model_comes_back(grown):
    """Its base is grown again when it is loaded."""
    import torch

    from data import loader, shards
    from eval.loss import evaluate_loss
    from run.load import load_model
    summary = run(grown, "zh-wide", "adapter", max_steps=5, lora={"r": 2})
    model, tokenizer = load_model(grown / "adapter")
    assert tokenizer.vocab_size == model.config.vocab_size == 300
    batches = loader.evaluation_batches(shards.open_split(grown / "zh-wide", "val"), 32, 128)
    loss = evaluate_loss(model, batches, torch.device("cpu"))["loss"]
    assert loss == pytest.approx(summary["val_loss"], 1e-5)

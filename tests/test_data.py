"""From text to batches: every document is somewhere, every token is served once."""
import hashlib
import json
import os
import sys

import numpy as np
import pytest
import torch

import ranks
from bpe import Tokenizer
from data import conversations, corpus, loader, shards
from data.corpus import (CorpusConfig, docstrings, documentation, named_tokenizer, prepare,
                         split_documents, write_shards)
from data.sets import TokenSet
from data.shakespeare import ShakespeareConfig
from data.shakespeare import prepare as prepare_shakespeare
from data.texts import find_files, read_documents
from data.writer import ShardWriter, unigram_entropy
from model import IGNORE

BYTES = Tokenizer([], special_tokens=())


def row(n):
    """A split of the ids 0..n-1, in three shards."""
    return shards.Tokens([np.arange(a, b, dtype=np.uint32)
                          for a, b in ((0, n // 3), (n // 3, n // 2), (n // 2, n))])


# ---- shards

def test_a_read_crosses_shards_as_if_there_was_one():
    tokens = row(100)
    for start, stop in ((0, 100), (20, 60), (33, 34), (49, 51), (95, 120), (100, 105)):
        assert tokens.read(start, stop).tolist() == list(range(start, min(stop, 100)))


def test_documents_come_back_from_their_shards_whole_and_in_order(tmp_path):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 256, size=rng.integers(1, 50)) for _ in range(100)]
    writer = ShardWriter(tmp_path, BYTES, "test", shard_tokens=300)
    for i, ids in enumerate(documents):
        writer.add("val" if i % 10 == 0 else "train", ids)
    meta = writer.finish()
    for split, expected in (("train", [d for i, d in enumerate(documents) if i % 10]),
                            ("val", documents[::10])):
        tokens = shards.open_split(tmp_path, split)
        assert np.array_equal(tokens.read(0, len(tokens)), np.concatenate(expected))
        assert all(len(shard) >= 300 for shard in tokens.shards[:-1])
    assert len(meta["splits"]["train"]["files"]) > 2
    shards.verify(tmp_path)


def test_unigram_entropy_has_its_hand_worked_value():
    # frequencies 1/2, 1/4, 1/4: 1.5 bits
    found = unigram_entropy([np.array([0, 0, 5], np.uint16), np.array([9], np.uint16)], 2)
    assert found == pytest.approx(1.5 * np.log(2))


@pytest.mark.parametrize("damage,message", [
    (lambda p: p.unlink(), "train_0000.npy is missing"),
    (lambda p: p.write_bytes(p.read_bytes()[:-10]),
     "train_0000.npy is truncated or damaged .*greater than file size"),
    (lambda p: p.write_bytes(p.read_bytes() + b"x"), "its header says .* so it is damaged"),
    (lambda p: p.write_bytes(b""), "train_0000.npy is truncated or damaged"),
    (lambda p: np.save(p, np.zeros(10, np.float64)), "holds float64 of shape .10,., not"),
    (lambda p: np.save(p, np.zeros((3, 2), np.uint16)), "shape .3, 2., not one row of"),
    (lambda p: np.save(p, np.zeros(7, np.uint16)), "holds 7 ids, meta.json says 4,991"),
    (lambda p: p.write_bytes(p.read_bytes().replace(b"(4991,", b"(999999999991,", 1)),
     "train_0000.npy is truncated or damaged"),
    (lambda p: p.write_bytes(p.read_bytes().replace(b"(4991,), }          ",
                                                    b"(999999999991,), }  ", 1)),
     "train_0000.npy is truncated or damaged .*greater than file size"),
    (lambda p: np.save(p, np.array([{}])), "truncated or damaged .*Python objects"),
])
def test_a_damaged_shard_is_named(dataset, damage, message):
    damage(dataset / "train_0000.npy")
    for read in (lambda: shards.open_split(dataset, "train"), lambda: shards.verify(dataset)):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            read()


def forge(dataset, ids):
    """Put ids into the training shard, with a checksum that fits."""
    np.save(dataset / "train_0000.npy", ids)
    meta = json.loads((dataset / "meta.json").read_text())
    meta["splits"]["train"]["files"]["train_0000.npy"]["sha256"] = hashlib.sha256(ids).hexdigest()
    (dataset / "meta.json").write_text(json.dumps(meta))


def test_verify_finds_a_changed_token_and_an_id_beyond_the_vocabulary(dataset, monkeypatch):
    monkeypatch.setattr(shards, "CHUNK", 64)            # many chunks
    ids = np.load(dataset / "train_0000.npy")
    shards.verify(dataset)
    ids[17] ^= 1
    np.save(dataset / "train_0000.npy", ids)
    with pytest.raises(ValueError, match="train_0000.npy differs from its checksum; delete"):
        shards.verify(dataset)
    ids[[4000, 4600]] = 300
    np.save(dataset / "train_0000.npy", ids)
    with pytest.raises(ValueError, match="differs from its checksum; id 300 at position 4000 is"):
        shards.verify(dataset)
    forge(dataset, ids)
    with pytest.raises(ValueError, match="has id 300 at position 4000; the vocabulary ends at 255"):
        shards.verify(dataset)


def test_a_file_is_read_again_only_when_it_has_changed(dataset, monkeypatch):
    read, verify_one = [], shards._verify
    monkeypatch.setattr(shards, "_verify", lambda path, *rest: read.append(path.name)
                        or verify_one(path, *rest))

    def read_by(**settings):
        read.clear()
        shards.verify(dataset, **settings)
        return sorted(read)

    both, stamp = ["train_0000.npy", "val_0000.npy"], dataset / ".verified.json"
    assert read_by(cached=True) == both
    assert read_by(cached=True) == []
    assert read_by() == both                                        # on demand: always
    ids = np.load(dataset / "train_0000.npy")
    np.save(dataset / "train_0000.npy", ids)                        # equal, but written anew
    os.utime(dataset / "train_0000.npy", ns=(0, 1))
    assert read_by(cached=True) == ["train_0000.npy"]
    for damaged in ("", "[" * 100_000, "[1]", '{"train_0000.npy": 3, "val_0000.npy": null}'):
        stamp.write_text(damaged)
        assert read_by(cached=True) == both


def test_a_stamp_is_for_the_vocabulary_that_was_checked(dataset):
    shards.verify(dataset, cached=True)
    meta = json.loads((dataset / "meta.json").read_text())
    (dataset / "meta.json").write_text(json.dumps({**meta, "vocab_size": 60}))
    with pytest.raises(ValueError, match="the vocabulary ends at 59"):
        shards.verify(dataset, cached=True)


def test_damage_that_keeps_size_is_found_although_a_stamp_is_there(dataset):
    shards.verify(dataset, cached=True)
    path = dataset / "val_0000.npy"
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(ValueError, match="val_0000.npy differs from its checksum"):
        shards.verify(dataset, cached=True)


def test_a_stamp_that_cannot_be_written_is_no_error(dataset):
    (dataset / ".verified.json").mkdir()                # even root cannot write a file over it
    for _ in range(2):
        shards.verify(dataset, cached=True)
    assert not list(dataset.glob("*.tmp"))


def test_processes_that_verify_at_once_leave_a_whole_stamp(dataset):
    assert ranks.exit_codes(ranks.verifying, 3, dataset, 30) == [0, 0, 0]
    assert sorted(json.loads((dataset / ".verified.json").read_text())) == [
        "train_0000.npy", "val_0000.npy"]
    assert not list(dataset.glob("*.tmp"))


def test_another_tokenizer_beside_the_shards_is_named(dataset):
    Tokenizer.train(["other text"], 260).save(dataset / "tokenizer.json")
    with pytest.raises(ValueError, match="tokenizer.json is not the tokenizer that made the sha"):
        TokenSet(dataset)


@pytest.mark.parametrize("change,message", [
    (lambda m: m.update(vocab_size="256"), "vocab_size is '256'"),
    (lambda m: m.update(vocab_size=0), "vocab_size is 0"),
    (lambda m: m.pop("tokenizer_hash"), "tokenizer_hash is no text"),
    (lambda m: m.update(unigram_entropy=float("nan")), "unigram_entropy is nan"),
    (lambda m: m.update(splits=[]), "it names no splits"),
    (lambda m: m["splits"].update(val=3), "split 'val' has no files"),
    (lambda m: m["splits"]["val"].update(tokens=1), "val have not the 1 tokens"),
    (lambda m: m["splits"]["val"]["files"].update({"../up.npy": {}}), "of 'val' is '../up.npy'"),
    (lambda m: m["splits"].update(val=m["splits"]["train"]), "shard 0 of 'val' is 'train_0000"),
    (lambda m: m["splits"].update(other=m["splits"]["train"]), "'other' is no split"),
    (lambda m: m["splits"]["val"]["files"].update({"val_0000.npy": {"tokens": -1}}), "no tokens"),
])
def test_a_meta_json_that_nothing_writes_is_named(dataset, change, message):
    meta = json.loads((dataset / "meta.json").read_text())
    change(meta)
    (dataset / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=f"meta.json is damaged: .*{message}"):
        shards.open_split(dataset, "train")


def test_chat_data_are_not_taken_for_token_shards(tmp_path):
    talk = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    conversations.write_conversations(tmp_path, [talk] * 3, "test", val=[talk])
    with pytest.raises(ValueError, match="holds 'chat' data, not token shards"):
        shards.verify(tmp_path)


def test_a_folder_without_its_last_file_is_not_a_data_set(dataset):
    (dataset / "meta.json").unlink()
    with pytest.raises(FileNotFoundError, match="no prepared data set"):
        shards.find(dataset)


def write_bin(path, ids, magic=20240520, version=1, count=None):
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(ids, np.uint16).tobytes())


def test_shards_of_llm_c_are_read(tmp_path):
    write_bin(tmp_path / "fineweb_val_000000.bin", range(50))
    write_bin(tmp_path / "fineweb_train_000001.bin", range(100))
    write_bin(tmp_path / "fineweb_train_000002.bin", range(100, 130))
    assert shards.find(tmp_path) == tmp_path
    assert shards.read_meta(tmp_path)["vocab_size"] == 50257
    shards.verify(tmp_path)
    train = shards.open_split(tmp_path, "train")
    assert train.read(0, 200).tolist() == list(range(130))
    assert len(shards.open_split(tmp_path, "val")) == 50


@pytest.mark.parametrize("settings,message", [
    (dict(magic=1), "magic 20240520"), (dict(version=2), "version 1"),
    (dict(count=51), "truncated or damaged .*greater than file size"),
    (dict(count=49), "1,124 bytes; its header says 1,122"),
])
def test_a_wrong_bin_shard_is_named(tmp_path, settings, message):
    write_bin(tmp_path / "x_train_0.bin", range(50), **settings)
    with pytest.raises(ValueError, match=message):
        shards.open_split(tmp_path, "train")


def test_an_id_in_a_bin_shard_that_gpt2_does_not_have_is_named(tmp_path):
    write_bin(tmp_path / "x_train_0.bin", [5, 50256])
    write_bin(tmp_path / "x_val_0.bin", [5])
    shards.verify(tmp_path, cached=True)
    write_bin(tmp_path / "x_train_0.bin", [5, 50257])
    os.utime(tmp_path / "x_train_0.bin", ns=(0, 1))
    with pytest.raises(ValueError, match="x_train_0.bin has id 50257 at position 1; .* 50256"):
        shards.verify(tmp_path, cached=True)


def test_the_fingerprint_changes_with_the_data_only(dataset, tmp_path):
    first = shards.fingerprint(dataset)
    assert first == shards.fingerprint(dataset)
    write_shards(tmp_path / "other", ["abc\n" * 100], ["abd\n" * 10], BYTES, "other")
    assert shards.fingerprint(tmp_path / "other") != first


def test_the_fingerprint_of_bin_shards_is_that_of_their_content(tmp_path):
    def written(ids, changed):
        write_bin(tmp_path / "x_train_0.bin", ids)
        os.utime(tmp_path / "x_train_0.bin", ns=(0, changed))
        return shards.fingerprint(tmp_path)

    write_bin(tmp_path / "x_val_0.bin", [5])
    found = [written([1, 2, 3], 1), written([1, 2, 4], 2), written([1, 2, 3], 3)]
    assert found[0] == found[2] != found[1]             # of the same length and name
    (tmp_path / ".verified.json").unlink()
    assert shards.fingerprint(tmp_path) == found[0]
    old = {"size": 1030, "mtime_ns": 3, "sha256": None, "vocab_size": 50257}
    (tmp_path / ".verified.json").write_text(json.dumps({"x_train_0.bin": old}))
    assert shards.fingerprint(tmp_path) == found[0]     # a stamp from before it had checksums


# ---- documents

def test_documents_of_txt_and_jsonl_files(tmp_path):
    (tmp_path / "a.txt").write_text("first\n")
    (tmp_path / "b.jsonl").write_text('{"text": "second"}\n\n{"text": "thïrd", "id": 3}\n')
    (tmp_path / "c.txt").write_text("   \n")
    (tmp_path / "ignored.md").write_text("no")
    assert list(read_documents(find_files(tmp_path))) == ["first\n", "second", "thïrd"]
    (tmp_path / "D.JSONL").write_text('{"text": "fourth"}\n')
    (tmp_path / "e.ndjson").write_text('{"text": "fifth"}\n')
    (tmp_path / "f.json").write_text('[{"text": "sixth"},\n "seventh"]')      # no source of JSON
    (tmp_path / "g.json").write_text('{"text": "eighth"}\n{"text": "ninth"}\n')
    named = ",".join(str(tmp_path / name) for name in ("D.JSONL", "e.ndjson", "f.json", "g.json"))
    assert list(read_documents(find_files(named))) == [
        "fourth", "fifth", "sixth", "seventh", "eighth", "ninth"]
    assert tmp_path / "D.JSONL" in find_files(tmp_path)
    assert find_files(f"{tmp_path},{tmp_path / 'a.txt'}") == find_files(tmp_path)


def test_documents_that_are_parted_by_a_spelled_end_of_text_are_one_and_that_is_said(
        tmp_path, capsys):
    (tmp_path / "stories.txt").write_text("One.\n<|endoftext|>\nTwo.\n<|endoftext|>\nThree.\n")
    for _ in range(2):
        assert len(list(read_documents(find_files(tmp_path)))) == 1
    assert capsys.readouterr().err == (
        f"warning: {tmp_path}/stories.txt spells <|endoftext|>, which is read as any other text "
        f"and parts no documents; write a document a line of a .jsonl file, without it\n")


@pytest.mark.parametrize("name,content,message", [
    ("a.txt", b"good \xff bad", "a.txt is not UTF-8: byte 5 is 0xff"),
    ("a.jsonl", b'{"text": "x"}\n{"text": }\n', "a.jsonl, line 2 is no JSON"),
    ("a.jsonl", b'{"content": "x"}\n', "a.jsonl, line 1 is no"),
    ("A.JSONL", b'{"content": "x"}\n', "A.JSONL, line 1 is no"),
    ("a.txt", b"", "holds no text"),
])
def test_a_bad_text_file_is_named_with_the_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        prepare(CorpusConfig(from_=str(tmp_path), tokenizer="bytes", out=str(tmp_path / "out")))


@pytest.mark.parametrize("given, message", [
    (dict(from_="text", code=True), "from=text is other text"),
    (dict(tokenizer="gpt2", vocab_size=300), "vocab_size=300 is of a tokenizer that is trained"),
    (dict(validation=1.2), r"validation=1.2 must be in \(0, 1\)"),     # would train on a fifth less
    (dict(shard_tokens=0), "shard_tokens=0 at least 1")])
def test_settings_of_a_corpus_that_cannot_be_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        CorpusConfig(**given)


def test_a_tokenizer_is_read_from_the_hub_by_name_without_the_weights(tmp_path, monkeypatch):
    """A folder stands for the hub."""
    hub = pytest.importorskip("huggingface_hub")
    tokenizer, asked = Tokenizer.train(["a text of the hub"], 260), []
    tokenizer.save_pretrained(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", lambda name, allow_patterns: (
        asked.append((name, allow_patterns)), str(tmp_path))[1])
    assert named_tokenizer("somebody/model").hash == tokenizer.hash
    assert asked == [("somebody/model", ["tokenizer.json", "vocab.json", "merges.txt",
                                         "added_tokens.json"])]
    for name in ("nowhere", "some/tok.json", "a/b/c"):
        with pytest.raises(FileNotFoundError, match=f"tokenizer={name}: .* USER/NAME of the Hugg"):
            named_tokenizer(name)


def test_documents_are_split_whole_and_the_same_way_each_time():
    documents = [f"document {i} " * (i % 7 + 1) for i in range(300)]
    train, val = split_documents(documents, 0.1)
    assert sorted(train + val) == sorted(documents)
    share = sum(map(len, val)) / sum(map(len, documents))
    assert 0.1 <= share < 0.11
    again = split_documents(documents[::-1], 0.1)
    assert sorted(again[1]) == sorted(val)              # by content, not by position
    assert split_documents(["a", "b"], 0.9)[0]          # something is always left to train on


def test_a_single_document_is_cut_at_a_line_end():
    train, val = split_documents(["line\n" * 100], 0.1)
    assert (train, val) == (["line\n" * 90], ["line\n" * 10])
    with pytest.raises(ValueError, match="no line end"):
        split_documents(["x" * 100], 0.1)


def test_the_embedded_corpus_is_english_prose_and_deterministic(monkeypatch):
    documents = documentation()
    size = sum(len(text.encode()) for text in documents)
    assert 1.5e6 < size < 4e6 and len(documents) > 300
    some = corpus.library_files()[:30]
    monkeypatch.setattr(corpus, "library_files", lambda: some)
    assert corpus.library_docstrings.__wrapped__() == corpus.library_docstrings.__wrapped__() \
        == corpus.library_docstrings()[:len(corpus.library_docstrings.__wrapped__())]
    text = "\n".join(documents)
    assert "json.dumps(obj, *, skipkeys=False" in text and "Serialize ``obj`` to a JSON" in text
    letters = sum(c.isascii() and (c.isalpha() or c.isspace()) for c in text)
    assert letters / len(text) > 0.8
    assert not any(name in sys.modules for name in ("turtledemo", "idlelib.pyshell"))  # only read


def test_docstrings_stand_under_the_names_of_what_they_document():
    import ast
    tree = ast.parse('"""M."""\nclass A:\n  """Of A."""\n  def f(self, x=1):\n    """Of f."""\n'
                     'def g():\n  pass\nasync def h(*, y): "Of h."\n')
    assert list(docstrings(tree, "m")) == ["m\n\nM.", "m.A\n\nOf A.", "m.A.f(self, x=1)\n\nOf f.",
                                           "m.h(*, y)\n\nOf h."]


def test_prepared_text_decodes_to_the_documents(tmp_path):
    lines = [f"This is document number {i}, <|endoftext|> and all." for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    folder = prepare(CorpusConfig(from_=str(tmp_path / "a.jsonl"), vocab_size=300,
                                  out=str(tmp_path / "out")))
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    found = []
    for split in ("train", "val"):
        tokens = shards.open_split(folder, split)
        ids = tokens.read(0, len(tokens))
        starts = np.flatnonzero(ids == tokenizer.eot)   # one before each document, none inside
        found += [tokenizer.decode(part[1:].tolist()) for part in np.split(ids, starts[1:])]
    assert sorted(found) == sorted(lines)


def test_tiny_shakespeare_is_split_as_its_published_losses_were(shared, tmp_path):
    folder = prepare_shakespeare(ShakespeareConfig(
        from_=str(shared / "shakespeare" / "input.txt"), out=str(tmp_path)))
    assert len(shards.open_split(folder, "train")) == 1_003_854     # nanoGPT's counts
    assert len(shards.open_split(folder, "val")) == 111_540
    with pytest.raises(ValueError, match="is not tiny shakespeare"):
        (tmp_path / "x.txt").write_text("x")
        prepare_shakespeare(ShakespeareConfig(from_=str(tmp_path / "x.txt"), out=str(tmp_path)))


# ---- batches

@pytest.mark.parametrize("n", [101, 102, 110, 111])
def test_every_token_is_a_target_exactly_once_per_epoch(n):
    batches = loader.WindowLoader(row(n), 10, batch_tokens=20, micro_batch=2, seed=3)
    served, seen, step = batches.rows_per_epoch, [], 0
    assert served == -(-(n - 1) // 10)
    position = 0
    while position < 2 * served:                        # two epochs, the last step may reach on
        for x, y in batches.batches(step):
            for inputs, targets in zip(x, y):
                if position < 2 * served:
                    kept = targets != IGNORE
                    assert torch.equal(targets[kept], inputs[kept] + 1)
                    seen.append(targets[kept].tolist())
                position += 1
        step += 1
    for epoch in (seen[:served], seen[served:]):
        assert sorted(sum(epoch, [])) == list(range(1, n))
    assert seen[:served] != seen[served:]               # shuffled anew
    assert sorted(seen[:served]) == sorted(seen[served:])


@pytest.mark.parametrize("world,micro", [(1, 8), (1, 4), (1, 1), (2, 4), (2, 1), (4, 2), (8, 16)])
def test_a_steps_windows_do_not_depend_on_ranks_or_micro_batches(world, micro):
    def windows(step, world, micro):
        found = []
        for rank in range(world):
            batches = loader.WindowLoader(row(500), 10, 80, micro, seed=5, rank=rank, world=world)
            for x, _ in batches.batches(step):
                found += x[:, 0].tolist()
        return sorted(found)
    for step in (0, 3, 6, 7, 40):
        assert windows(step, world, micro) == windows(step, 1, 8)


def test_labels_are_counted_as_they_are_served():
    batches = loader.WindowLoader(row(66), 10, 40, 2, seed=1)
    for step in range(12):
        served = sum(int((y != IGNORE).sum()) for _, y in batches.batches(step))
        assert batches.labels(step) == batches.tokens_at(step) == served
        assert batches.tokens_before(step + 1) == batches.tokens_before(step) + served
    assert any(batches.labels(step) < 40 for step in range(12))     # the short window came


def test_batches_are_a_pure_function_of_data_seed_and_step():
    a, b = (loader.WindowLoader(row(300), 10, 40, 2, seed=1) for _ in range(2))
    for step in range(5):
        list(a.batches(step))                           # b has not served what came before
    assert all(torch.equal(x, u) and torch.equal(y, v)
               for (x, y), (u, v) in zip(a.batches(20), b.batches(20)))
    other = loader.WindowLoader(row(300), 10, 40, 2, seed=2)
    assert not all(torch.equal(x, u) for (x, _), (u, _) in zip(a.batches(20), other.batches(20)))


def test_evaluation_covers_the_split_once_whatever_the_ranks():
    for world in (1, 2, 3):
        targets = [y[y != IGNORE] for rank in range(world)
                   for _, y in loader.evaluation_batches(row(77), 10, 3, None, rank, world)]
        assert sorted(torch.cat(targets).tolist()) == list(range(1, 77))
    some = loader.evaluation_batches(row(1001), 10, 3, limit=50)
    limited = torch.cat([y[y != IGNORE] for _, y in some])
    assert len(limited) == 50 and limited.min() < 20 and limited.max() > 980    # spread


@pytest.mark.parametrize("arguments,message", [
    ((100, 40, 1, 1), r"try batch_tokens=80 or 120"),
    ((40, 40, 3, 2), r"3 x 40 x 2 = 240; try batch_tokens=240"),
    ((39, 40, 3, 1), r"try batch_tokens=120"),
])
def test_a_step_that_does_not_divide_gets_the_nearest_that_does(arguments, message):
    batch_tokens, block_size, micro, world = arguments
    with pytest.raises(ValueError, match=message):
        loader.divide_step(batch_tokens, micro, block_size, world)


def test_a_context_longer_than_the_data_is_refused():
    with pytest.raises(ValueError, match="block_size=100 is longer than the data, which has 100"):
        loader.WindowLoader(row(100), 100, 100, 1)

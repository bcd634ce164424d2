"""data/fineweb.py: what goes in comes out once and in order, whatever interrupts it."""
import json
import random
import sys
import types

import numpy as np
import pytest

from bpe import Tokenizer
from data import fineweb, shards
from data.fineweb import FinewebConfig, prepare
from fast import bpe_corpus

SHARD_TOKENS = 3000


@pytest.fixture
def texts():
    """Documents of very different length, some with what looks like a special token."""
    rng = random.Random(0)
    words = ["alpha", "<|endoftext|>", "naïve", "中文", "\n", "🙂", "the", "of", "1234"]
    return [f"document {i}: " + " ".join(rng.choices(words, k=rng.choice([1, 20, 60])))
            for i in range(300)]


@pytest.fixture
def tokenizer(tmp_path):
    path = tmp_path / "tok.json"
    Tokenizer.train(["the alpha of the document: naïve document"], 270).save(path)
    return path


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text, "id": i}) + "\n"
                            for i, text in enumerate(texts)))
    return path


def shards_of(folder):
    """Everything that counts in a data set: the shards' bytes and meta.json's."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def identity(folder):
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns)
            for path in folder.glob("*.npy")}


def documents_of(folder, tokenizer):
    """The documents, read back from the shards."""
    tok = Tokenizer.load(tokenizer)
    tokens = [shards.open_split(folder, split) for split in ("val", "train")]
    ids = np.concatenate([part.read(0, len(part)) for part in tokens])
    starts = np.flatnonzero(ids == tok.eot)
    assert starts[0] == 0
    return [tok.decode(part[1:]) for part in np.split(ids, starts[1:])]


def config(source, tokenizer, out, **settings):
    return FinewebConfig(from_=str(source), tokenizer=str(tokenizer), out=str(out),
                         **{"shard_tokens": SHARD_TOKENS, **settings})


def test_every_document_is_there_once_and_in_order(tmp_path, texts, tokenizer):
    source = write_jsonl(tmp_path / "in.jsonl", texts)
    folder = prepare(config(source, tokenizer, tmp_path / "out"))
    assert documents_of(folder, tokenizer) == texts
    meta = shards.read_meta(folder)
    files = meta["splits"]["train"]["files"]
    assert len(files) > 3 and meta["documents"] == len(texts)
    assert all(facts["tokens"] >= SHARD_TOKENS for facts in list(files.values())[:-1])
    assert all(np.load(folder / name).dtype == np.uint16 for name in files)
    shards.verify(folder)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_documents_keep_their_order_whatever_the_threads_and_the_groups(
        monkeypatch, texts, tokenizer, threads):
    monkeypatch.setattr(bpe_corpus, "BLOCK", 50)    # characters: many tasks
    monkeypatch.setattr(bpe_corpus, "AHEAD", 4)     # and few of them at once
    tok = Tokenizer.load(tokenizer)
    rows = list(fineweb.encode_all(tok, iter(texts), threads))
    assert [ids.tolist() for _, ids in rows] == [[tok.eot] + tok.encode(text) for text in texts]
    assert [size for size, _ in rows] == [len(text.encode()) for text in texts]


def test_reading_stays_a_bounded_way_ahead_of_writing(monkeypatch, tokenizer):
    monkeypatch.setattr(bpe_corpus, "BLOCK", 100)
    monkeypatch.setattr(bpe_corpus, "AHEAD", 10)
    read = 0

    def long_source():
        nonlocal read
        for read in range(1, 10_000):
            yield "x" * 50

    encoded = fineweb.encode_all(Tokenizer.load(tokenizer), long_source(), 2)
    for done in range(200):
        next(encoded)
        assert read - done <= (2 * 1000 + 2 * 100) / 50
    encoded.close()


def test_a_complete_data_set_is_left_alone(tmp_path, texts, tokenizer, capsys):
    settings = config(write_jsonl(tmp_path / "in.jsonl", texts), tokenizer, tmp_path / "out")
    before = identity(prepare(settings))
    prepare(settings)
    assert "complete" in capsys.readouterr().out
    assert identity(tmp_path / "out") == before


def test_another_data_set_is_refused_and_not_overwritten(tmp_path, texts, tokenizer):
    source = write_jsonl(tmp_path / "in.jsonl", texts)
    before = identity(prepare(config(source, tokenizer, tmp_path / "out")))
    for change in ({"tokenizer": "bytes"}, {"shard_tokens": 99}):
        with pytest.raises(ValueError, match="another --out"):
            prepare(FinewebConfig(**{**vars(config(source, tokenizer, tmp_path / "out")),
                                     **change}))
    write_jsonl(source, texts + ["one more"])
    with pytest.raises(ValueError, match="another --out"):
        prepare(config(source, tokenizer, tmp_path / "out"))
    assert identity(tmp_path / "out") == before


def test_jsonl_txt_and_parquet_give_the_same_shards(tmp_path, texts, tokenizer):
    parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow = pytest.importorskip("pyarrow")
    (tmp_path / "txt").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "txt" / f"{i:04d}.txt").write_bytes(text.encode())
    parquet.write_table(pyarrow.table({"id": list(range(len(texts))), "text": texts}),
                        tmp_path / "in.parquet")
    sources = [write_jsonl(tmp_path / "in.jsonl", texts), tmp_path / "txt", tmp_path / "in.parquet"]
    contents = []
    for i, source in enumerate(sources):
        folder = prepare(config(source, tokenizer, tmp_path / f"out{i}"))
        assert documents_of(folder, tokenizer) == texts
        contents.append({name: content for name, content in shards_of(folder).items()
                         if name.endswith(".npy")})
    assert contents[0] == contents[1] == contents[2]


def test_several_sources_follow_each_other(tmp_path, texts, tokenizer):
    a = write_jsonl(tmp_path / "a.jsonl", texts[:200])
    b = write_jsonl(tmp_path / "b.jsonl", texts[200:])
    folder = prepare(config(f"{b},{a}", tokenizer, tmp_path / "out"))
    assert documents_of(folder, tokenizer) == texts[200:] + texts[:200]


def test_a_large_source_validates_on_one_shard(tmp_path, texts):
    tokens = [len(text.encode()) for text in texts]
    source = write_jsonl(tmp_path / "in.jsonl", texts)
    folder = prepare(config(source, "bytes", tmp_path / "out", shard_tokens=500))
    val = shards.read_meta(folder)["splits"]["val"]
    expected = next(n for n in range(300) if sum(tokens[:n]) >= 500)
    assert val["tokens"] == sum(tokens[:expected]) and len(val["files"]) == 1
    assert val["tokens"] <= 0.05 * sum(tokens)


def test_a_small_source_validates_on_a_twentieth_of_its_text(tmp_path, texts):
    tokens = [len(text.encode()) for text in texts]
    source = write_jsonl(tmp_path / "in.jsonl", texts)
    folder = prepare(config(source, "bytes", tmp_path / "out", shard_tokens=100_000_000))
    val = shards.read_meta(folder)["splits"]["val"]["tokens"]
    expected = next(n for n in range(300) if sum(tokens[:n + 1]) > 0.05 * sum(tokens))
    assert val == sum(tokens[:expected]) and val > 0


def test_two_documents_are_one_for_each_split(tmp_path):
    source = write_jsonl(tmp_path / "in.jsonl", ["validates", "trains"])
    folder = prepare(config(source, "bytes", tmp_path / "out"))
    splits = shards.read_meta(folder)["splits"]
    assert (splits["val"]["tokens"], splits["train"]["tokens"]) == (9, 6)


@pytest.mark.parametrize("line, said", [
    ("{broken", "line 3 is no JSON"),
    ('{"body": "no text"}', 'line 3 is no {"text"'),
    ('["text"]', 'line 3 is no {"text"'),
    ('{"text": 7}', 'line 3 is no {"text"'),
    ('{"text": "half \\ud83d"}', "line 3 has half a surrogate pair"),
])
def test_a_bad_line_is_named_before_anything_is_written(tmp_path, line, said):
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "good"}\n{"text": "too"}\n' + line + "\n")
    with pytest.raises(ValueError) as error:
        prepare(config(source, "bytes", tmp_path / "out"))
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_bad_sources_say_what_to_do(tmp_path, texts):
    empty, single = tmp_path / "empty.txt", tmp_path / "single.txt"
    empty.write_text(" \n")
    single.write_text("only one")
    for source, kind, said in [
            (empty, ValueError, "0 documents"), (single, ValueError, "data.corpus"),
            (tmp_path / "none.jsonl", FileNotFoundError, "none.jsonl")]:
        with pytest.raises(kind, match=said):
            prepare(config(source, "bytes", tmp_path / "out"))
    with pytest.raises(ValueError, match="shard_tokens=0"):
        FinewebConfig(shard_tokens=0)
    with pytest.raises(ValueError, match="subset=CC-MAIN-2024-10 is of the hub"):
        FinewebConfig(from_="folder", subset="CC-MAIN-2024-10")
    torn = tmp_path / "torn.parquet"
    torn.write_bytes(b"PAR1")
    pytest.importorskip("pyarrow")
    with pytest.raises(ValueError, match="no parquet"):
        prepare(config(torn, "bytes", tmp_path / "out"))


class Rows:
    """What data/fineweb.py asks of a datasets.Dataset."""

    def __init__(self, texts):
        self.texts = texts

    def __len__(self):
        return len(self.texts)

    def select_columns(self, names):
        assert names == ["text"]
        return self

    def skip(self, n):
        return Rows(self.texts[n:])

    def iter(self, batch_size):
        for i in range(0, len(self.texts), batch_size):
            yield {"text": self.texts[i:i + batch_size]}


def test_the_hub_gives_the_same_shards_as_a_local_copy(tmp_path, monkeypatch, texts):
    asked = []

    def load_dataset(path, name, split, num_proc):
        asked.append((path, name, split))
        return Rows(texts)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    hub = prepare(FinewebConfig(tokenizer="bytes", shard_tokens=500, out=str(tmp_path / "hub")))
    local = prepare(config(write_jsonl(tmp_path / "in.jsonl", texts), "bytes", tmp_path / "local",
                           shard_tokens=500))
    assert asked == [("HuggingFaceFW/fineweb-edu", "sample-10BT", "train")]
    assert [path.read_bytes() for path in sorted(hub.glob("*.npy"))] == \
        [path.read_bytes() for path in sorted(local.glob("*.npy"))]


def test_rows_of_the_hub_are_skipped_by_number_blank_ones_too():
    rows = Rows(["a", "", "b", None, "c"])
    assert list(fineweb.hub_documents(rows, 0)) == ["a", "", "b", "", "c"]
    assert list(fineweb.hub_documents(rows, 3)) == ["", "c"]


def test_without_the_extra_the_error_names_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r'\.\[datasets\]'):
        prepare(FinewebConfig(tokenizer="bytes", out=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()

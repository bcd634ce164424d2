"""Data sets as the loop opens them; texts with classes from their files to their samples."""
import json
from types import SimpleNamespace

import pytest

from bpe import Tokenizer
from data import imdb, labels, prepared, sets, texts
from data.conversations import write_conversations as write_chats
from model import IGNORE
from run.config import build

BYTES = Tokenizer([], special_tokens=())
CONFIG = SimpleNamespace(model=SimpleNamespace(block_size=16), batch_tokens=4 * 16, micro_batch=2,
                         seed=0, packing=False, eval_tokens=0)
WORLD = SimpleNamespace(rank=0, size=1)
TOPICS = [("the cat sat", "pets"), ("a rainy day, and then a long night", "weather"),
          ("two dogs", "pets"), ("stocks fell", "money"), ("sun", "weather"), ("a cat", "pets"),
          ("gold", "money"), ("snow, much snow", "weather")]


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def examples_of(folder, split):
    return [(record["text"], record["label"])
            for record in prepared.read_split(folder, "classes", split)]


@pytest.fixture
def topics(tmp_path):
    source = write(tmp_path / "topics.jsonl", [{"text": text, "label": label}
                                               for text, label in TOPICS])
    return labels.prepare(labels.LabelsConfig(from_=source, out=str(tmp_path / "topics"),
                                              validation=0.3))


def test_every_text_keeps_its_label_and_equal_texts_stay_together(tmp_path):
    records = [{"text": f"text {i % 30}", "label": f"class {i % 3}"} for i in range(90)]
    out = labels.prepare(labels.LabelsConfig(from_=write(tmp_path / "a.json", records),
                                             out=str(tmp_path / "out"), validation=0.2))
    meta = prepared.read_meta(out, "classes")
    assert meta["kind"] == sets.kind(out) == "classes"
    assert meta["labels"] == ["class 0", "class 1", "class 2"]
    train, val = (examples_of(out, split) for split in ("train", "val"))
    found = [(text, meta["labels"][label]) for text, label in train + val]
    assert sorted(found) == sorted((record["text"], record["label"]) for record in records)
    assert not {text for text, _ in train} & {text for text, _ in val}
    assert 0.1 < len(val) / 90 < 0.3


def test_files_with_test_in_their_name_validate_and_numbers_sort_as_numbers(tmp_path):
    write(tmp_path / "a.jsonl", [{"text": f"a{i}", "label": i} for i in (10, 9, 2)])
    write(tmp_path / "a_test.jsonl", [{"text": "b", "label": 9}])
    out = labels.prepare(labels.LabelsConfig(from_=str(tmp_path), out=str(tmp_path / "out")))
    assert prepared.read_meta(out, "classes")["labels"] == ["2", "9", "10"]
    assert examples_of(out, "train") == [("a10", 2), ("a9", 1), ("a2", 0)]
    assert examples_of(out, "val") == [("b", 1)]
    for name, held_out in (("test", True), ("Val_2", True), ("x-dev", True), ("testset", True),
                           ("latest", False), ("values", False), ("device", False)):
        assert texts.is_held_out(tmp_path / f"{name}.jsonl") == held_out, name


def test_a_sample_is_a_texts_end_with_its_class_as_the_only_target(topics):
    data = sets.ClassSet(topics, BYTES, 16)
    examples = examples_of(topics, "train")
    assert (data.classes, data.names) == (3, ("money", "pets", "weather"))
    for i, (text, label) in enumerate(examples):
        x, y = data.train.read(i)
        assert bytes(x.tolist()).decode() == text[-16:]
        assert y.tolist() == [IGNORE] * (len(x) - 1) + [label]
    cut = sum(len(text) > 16 for text, _ in examples)
    assert data.train.counts == {"records": len(examples), "kept": len(examples), "dropped": 0,
                                 "truncated": cut}


@pytest.mark.parametrize("packing", [False, True])
def test_the_loader_and_the_validation_serve_every_class(topics, packing):
    data = sets.ClassSet(topics, BYTES, 16)
    batches = data.loader(SimpleNamespace(**{**vars(CONFIG), "packing": packing}), WORLD)
    steps = range(0, -(-batches.rows_per_epoch // batches.rows_per_step))
    served = [label for step in steps for _, y, *_ in batches.batches(step)
              for label in y[y != IGNORE].tolist()]
    wanted = [label for _, label in examples_of(topics, "train")]
    assert len(served) >= len(wanted) and set(served) == set(wanted)
    found = [label for _, y in data.validation(CONFIG, WORLD) for label in y[y >= 0].tolist()]
    assert sorted(found) == sorted(label for _, label in examples_of(topics, "val"))


def test_every_data_set_answers_what_the_loop_asks(dataset, topics, tmp_path):
    talk = {"messages": [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "1"}]}
    other = {"messages": [{"role": "user", "content": "2?"}, {"role": "assistant", "content": "2"}]}
    write_chats(tmp_path / "chats", [talk, other], "x", validation=0.5)
    tokenizer = Tokenizer([], special_tokens=("<|endoftext|>",))
    found = [sets.TokenSet(dataset), sets.ChatSet(tmp_path / "chats", tokenizer, "plain", 64),
             sets.ClassSet(topics, BYTES, 16)]
    assert [sets.kind(folder) for folder in (dataset, tmp_path / "chats", topics)] == [
        "tokens", "chat", "classes"]
    assert [data.classes for data in found] == [0, 0, 3]
    assert [data.template for data in found] == ["", "plain", ""]
    assert [len(data.prompts) for data in found] == [0, 1, 0]
    for data in found:
        assert data.vocab_size == data.tokenizer.vocab_size and len(data.fingerprint) == 16
        assert data.unigram_entropy is None or data.unigram_entropy > 0


def test_a_fingerprint_tells_texts_classes_and_tokenizers_apart(topics, tmp_path):
    other = Tokenizer([], special_tokens=("<|endoftext|>",))
    found = [sets.ClassSet(topics, tok, 16).fingerprint for tok in (BYTES, BYTES, other)]
    for name, label in (("text", "pets"), ("label", "beasts")):
        records = [{"text": text.replace("dogs", "cats") if name == "text" else text,
                    "label": label if kind == "pets" else kind} for text, kind in TOPICS]
        out = labels.prepare(labels.LabelsConfig(
            from_=write(tmp_path / f"{name}.jsonl", records), out=str(tmp_path / name),
            validation=0.3))
        found.append(sets.ClassSet(out, BYTES, 16).fingerprint)
    assert found[0] == found[1] and len(set(found)) == 4


def test_reviews_become_texts_of_two_classes(tmp_path):
    source = write(tmp_path / "reviews.jsonl", [
        {"text": f"Film {i}.<br />End.", "label": i % 2} for i in range(40)])
    out = imdb.prepare(build(imdb.ImdbConfig, dict(from_=source, task="classes",
                                                   out=str(tmp_path / "out"))))
    assert prepared.read_meta(out, "classes")["labels"] == ["negative", "positive"]
    found = examples_of(out, "train") + examples_of(out, "val")
    assert sorted(found) == sorted((f"Film {i}.\nEnd.", i % 2) for i in range(40))


@pytest.mark.parametrize("lines,message", [
    (['{"text": "a"}'], "r.jsonl, line 2 has no label"),
    (['{"text": "a", "label": true}'], "r.jsonl, line 2 has no label"),
    (['{"text": "a", "label": 0.5}'], "r.jsonl, line 2 has no label"),
    (['{"text": "a", "label": ""}'], "r.jsonl, line 2 has no label"),
    (["[1]"], "r.jsonl, line 2 is no JSON object"), (["{"], "r.jsonl, line 2 is no JSON"),
    (['{"text": " ", "label": "x"}'], "r.jsonl, line 2 has no text"),
    (['{"text": 3, "label": "x"}'], "r.jsonl, line 2 has no text"),
    (['{"text": "\\ud800", "label": "x"}'], "r.jsonl, line 2: text has half a surrogate pair"),
    (['{"text": "b", "label": 1}'], "has words and numbers for labels"),
    ([], "there are 1 different texts"), (['{"text": "b", "label": "x"}'], "has 1 different label"),
])
def test_a_record_that_cannot_be_used_is_named_by_its_line(tmp_path, lines, message):
    path = tmp_path / "r.jsonl"
    path.write_text("\n".join(['{"text": "a", "label": "x"}', *lines]))
    with pytest.raises(ValueError, match=message):
        labels.prepare(labels.LabelsConfig(from_=str(path), out=str(tmp_path / "out")))
    assert not (tmp_path / "out" / "meta.json").exists()


def test_a_changed_or_foreign_folder_is_refused(topics, tmp_path):
    with pytest.raises(FileNotFoundError, match="no data set of texts with classes in"):
        prepared.read_meta(tmp_path, "classes")
    (topics / "val.jsonl").write_text('{"text": "sun", "label": 0}\n')
    with pytest.raises(ValueError, match="val.jsonl differs from its checksum"):
        sets.ClassSet(topics, BYTES, 16)
    (topics / "train.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="has no train.jsonl"):
        sets.ClassSet(topics, BYTES, 16)
    (topics / "meta.json").write_text('{"kind": "chat", "version": 1}')
    with pytest.raises(ValueError, match="holds 'chat' data, not texts with classes"):
        prepared.read_meta(topics, "classes")


def test_the_command_says_what_it_needs(tmp_path):
    source = write(tmp_path / "a.jsonl", [dict(text=c, label=c) for c in "ab"])
    words = [f"--from={source}", f"--out={tmp_path / 'out'}"]
    for wrong, message in [([], "no source given"), ([*words, "--validation=1"], "validation=1.0 is not in")]:
        with pytest.raises(ValueError, match=message):
            labels.main(wrong)
    labels.main(words)
    assert prepared.read_meta(tmp_path / "out", "classes")["labels"] == ["a", "b"]

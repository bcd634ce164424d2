"""The data study: its runs differ in what they say they differ in, and in nothing else."""
import json

import pytest

from bpe import Tokenizer
from run.config import build
from data import chat, corpus, pydocs
from data.templates import TEMPLATES
from experiments import chat_data
from experiments.chat_data import Asked, DataConfig, as_samples, pair, studies
from run.presets import PRESETS
from train import TrainConfig, train

COUNT = 64
TOKENIZER = Tokenizer([])                               # bytes
SEEN = [(f"a.f{i}(x)", "Do it." if i % 2 else f"Return the number {i} of them all.")
        for i in range(2 * COUNT)]
UNSEEN = [(f"b.g{i}(y)", f"Give {i} of {'many ' * (i % 2) * 9}things.") for i in range(8)]
STUDIES = {name: (arms, tests) for name, arms, tests in studies(SEEN, UNSEEN, COUNT)}


def answers(talks):
    return [message["content"] for talk in talks for message in talk
            if message["role"] == "assistant"]


def test_every_study_is_there_and_asks_of_nothing_that_was_trained_on():
    assert tuple(STUDIES) == chat_data.STUDIES
    for arms, tests in STUDIES.values():
        trained = {head for arm in arms for talk in arm.talks for message in talk
                   for head, _ in SEEN if head in message["content"]}
        asked = [message["content"] for test in tests.values() for talk in test.talks
                 for message in talk]
        assert trained and not any(head in content for head in trained for content in asked)


def test_arms_of_a_study_have_the_same_conversations_but_for_what_it_varies():
    base = STUDIES["labels"][0][0].talks
    assert len(base) == COUNT and answers(base) == [answer for _, answer in SEEN[:COUNT]]
    assert all(arm.talks == base for arm in STUDIES["rates"][0])
    all_turns, last = STUDIES["turns"][0]
    assert all_turns.talks == last.talks and answers(last.talks) == answers(base)
    assert [len(arm.talks) for arm in STUDIES["repeats"][0]] == [64, 16, 4, 1]
    assert [answers(arm.talks).count(chat_data.SAME) for arm in STUDIES["same"][0]] == [0, 7, 32]
    assert len({talk[0]["content"].split("`")[0] for talk in base}) == len(pydocs.FUNCTION)
    one_way = STUDIES["wording"][0][1].talks
    assert len({talk[0]["content"].split("`")[0] for talk in one_way}) == 1
    assert answers(one_way) == answers(base)
    both, short, long = (answers(arm.talks) for arm in STUDIES["lengths"][0])
    assert len(both) == len(short) == len(long)
    assert max(map(len, short)) < min(map(len, long)) and set(both) & set(short) and set(both) & \
        set(long)
    systems = [sum(talk[0]["role"] == "system" for talk in arm.talks)
               for arm in STUDIES["system"][0]]
    assert systems == [0, COUNT, COUNT // 2]
    single, switch = STUDIES["topics"][0]
    assert answers(single.talks) == answers(switch.talks) and len(switch.talks) == COUNT // 2


def test_a_conversation_as_one_text_has_the_same_ids_and_labels_on_all_but_the_frame():
    talk = pair("json.dumps(obj)", "Serialise it.")
    TEMPLATES["whole"] = chat_data.WHOLE
    ids, _ = chat.render(talk, TOKENIZER, "plain")
    same, labels = chat.render(chat_data.whole(talk), TOKENIZER, "whole")
    assert same == ids
    frame = 1 + len(TOKENIZER.encode("User:"))          # the start, which nothing predicts, and it
    assert [label >= 0 for label in labels] == [i >= frame for i in range(len(ids))]


def test_samples_of_a_test_have_the_labels_of_its_answers():
    talk = pair("a(b)", "Yes.") + pair("c(d)", "No.")
    for labels, expected in (("all", ["Yes.", "No."]), ("last", ["No."])):
        _, y = as_samples(Asked([talk], labels), TOKENIZER, 256).read(0)
        spelled = TOKENIZER.decode([int(token) for token in y if token >= 0])
        assert spelled == "".join(f" {answer}<|endoftext|>" for answer in expected)


def test_a_study_runs_goes_on_and_prints_what_it_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    talks = [{"messages": pair(f"m.f{i}(x)", f"Give {i}.")} for i in range(200)]
    monkeypatch.setattr(chat_data.pydocs, "questions", lambda: talks)
    text = "User: What does `m.f(x)` do?\n\nAssistant: Give it.\n" * 99
    corpus.write_shards(tmp_path / "d", [text], [text], Tokenizer.train([text], 280), "test")
    train(build(TrainConfig, {**PRESETS["demo"].settings, "data": str(tmp_path / "d"),
                              "out": "base", "max_steps": 1, "sample_tokens": 0, "compile": "off",
                              "model": dict(block_size=128, n_layer=1, n_head=1, n_embd=8)}))
    words = ["--init_from=base", "--seeds=1", "--steps=4", "--study=labels,repeats"]
    capsys.readouterr()
    chat_data.main(words)
    first = capsys.readouterr().out
    rows = json.loads((tmp_path / "out/chat_data/results.json").read_text())["rows"]
    assert [(row["study"], row["arm"]) for row in rows if row["test"] == "answers"] == [
        ("labels", "base"), ("labels", "whole"), ("repeats", "base"), ("repeats", "repeats_4"),
        ("repeats", "repeats_16"), ("repeats", "repeats_64")]
    assert "| whole | " in first and "| repeats_16 | " in first
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("last.pt")}
    chat_data.main(words)                               # finished runs are left alone
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("last.pt")} == stamps
    assert capsys.readouterr().out == first


@pytest.mark.parametrize("settings, message", [
    ({"study": ("rate",)}, "study=rate is unknown; choose rates"),
    ({"steps": 3}, "steps=3 must be at least 4"),
    ({"seeds": 0}, "seeds=0 must be at least 1")])
def test_a_study_with_wrong_settings_says_so(settings, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**settings)


def test_too_few_questions_are_refused():
    with pytest.raises(ValueError, match="128 questions to train on, and a run asks 129"):
        next(studies(SEEN, UNSEEN, 129))

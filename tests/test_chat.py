"""Conversations: from files of any format to ids and labels, exactly and reversibly."""
import json
import re
from collections import Counter

import numpy as np
import pytest
import torch

from bpe import Tokenizer
from data import alpaca, chat, conversations, imdb, inspect_chat, prepared, pydocs, shards
from data.chat import load_samples, render, render_prompt
from data.conversations import convert, read, write_conversations
from data.sets import ChatSet
from data.templates import TEMPLATES, extend_tokenizer
from data.texts import read_records
from model import GPT, IGNORE, GPTConfig
from run.config import build
from run.load import grow_embedding

TOKENIZER = Tokenizer.train(["What is this? It is a test of the thing.\n\n### Response: a b c "
                             "User: Assistant: hello there"] * 3, 300)
LINES = Tokenizer.train(["end.\n\n \n\n"] * 3, 258)     # has "\n\n", which words part: "\n", "\n"
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is this?"},
        {"role": "assistant", "content": "A test."}, {"role": "user", "content": "Of what?"},
        {"role": "assistant", "content": " Of the thing\n"}]
ALPACA = {"instruction": "Add the numbers.\n\nAll of them.", "input": "1 and 2", "output": "3"}


def shown(ids, template, tokenizer=TOKENIZER):
    return extend_tokenizer(tokenizer, template).decode(ids)


def user(content):
    return [{"role": "user", "content": content}]


# ---- templates

def test_alpaca_is_its_two_published_prompts():
    end = "<|endoftext|>"
    ids, _ = render(convert(ALPACA), TOKENIZER, "alpaca")
    assert shown(ids, "alpaca") == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
        "Add the numbers.\n\nAll of them.\n\n### Input:\n1 and 2\n\n### Response:3" + end)
    ids, _ = render(convert({**ALPACA, "input": ""}), TOKENIZER, "alpaca")
    assert shown(ids, "alpaca") == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nAdd the numbers.\n\nAll of them.\n\n"
        "### Response:3" + end)


def test_llama3_is_its_published_string():
    talk = [{"role": "user", "content": "Hi there!"},
            {"role": "assistant", "content": "Nice to meet you!"},
            {"role": "user", "content": "Can I ask a question?"}]
    expected = ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi there!<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\nNice to meet you!<|eot_id|>"
                "<|start_header_id|>user<|end_header_id|>\n\nCan I ask a question?<|eot_id|>")
    assert shown(render(talk, TOKENIZER, "llama3")[0], "llama3") == expected
    assert shown(render_prompt(talk, TOKENIZER, "llama3"), "llama3") == (
        expected + "<|start_header_id|>assistant<|end_header_id|>\n\n")


@pytest.mark.parametrize("tokenizer", [TOKENIZER, LINES], ids=["words", "line ends"])
def test_llama3_has_the_ids_of_its_whole_published_string(tokenizer):
    """As its template in transformers writes it: content | trim, and all of it encoded at once."""
    talk = [{"role": "system", "content": "\n Be brief. "}, *user("  What is this?\n\n"),
            {"role": "assistant", "content": " \n\nA test. "}, *user("Of\n\nwhat?"),
            {"role": "assistant", "content": "\"Of\n\nthe thing\n"}]
    whole = "<|begin_of_text|>" + "".join(
        f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n{m['content'].strip()}<|eot_id|>"
        for m in talk)
    more = extend_tokenizer(tokenizer, "llama3")
    ids, labels = render(talk, tokenizer, "llama3")
    assert ids == more.encode(whole, allowed_special="all")
    assert more.decode([y for y in labels if y != IGNORE]) == (
        'A test.<|eot_id|>"Of\n\nthe thing<|eot_id|>')
    for turn in (2, 4):
        prompt = render_prompt(talk[:turn], tokenizer, "llama3")
        assert ids[:len(prompt)] == prompt and labels[len(prompt)] != IGNORE


def test_plain_and_chatml_and_none_have_their_hand_worked_strings():
    assert shown(render(TALK[:3], TOKENIZER, "plain")[0], "plain") == (
        "<|endoftext|>Be brief.\n\nUser: What is this?\n\nAssistant: A test.<|endoftext|>")
    assert shown(render_prompt(TALK[:2], TOKENIZER, "plain"), "plain").endswith("\n\nAssistant:")
    assert shown(render(TALK[:3], TOKENIZER, "chatml")[0], "chatml") == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is this?<|im_end|>\n"
        "<|im_start|>assistant\nA test.<|im_end|>\n")
    assert shown(render(TALK[1:3], TOKENIZER, "none")[0], "none") == (
        "What is this?A test.<|endoftext|>")


def test_a_system_message_replaces_alpacas_preamble_and_later_turns_have_none():
    assert shown(render(TALK, TOKENIZER, "alpaca")[0], "alpaca") == (
        "Be brief.\n\n### Instruction:\nWhat is this?\n\n### Response:A test.<|endoftext|>\n\n"
        "### Instruction:\nOf what?\n\n### Response: Of the thing\n<|endoftext|>")


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_message_that_spells_special_tokens_is_ordinary_text(template):
    tokenizer = extend_tokenizer(TOKENIZER, template)
    names = "".join(TEMPLATES[template].special_tokens) + "{content}{input}"
    talk = [*user(names), {"role": "assistant", "content": names}]
    plain = [*user("x"), {"role": "assistant", "content": "x"}]
    special = set(tokenizer.special_tokens.values())
    found, expected = (sum(i in special for i in render(messages, tokenizer, template)[0])
                       for messages in (talk, plain))
    assert found == expected
    assert tokenizer.decode(render(talk, tokenizer, template)[0]).count(names) == 2


# ---- labels

@pytest.mark.parametrize("template", TEMPLATES)
def test_the_labels_are_the_answers_and_their_end_tokens(template):
    t, tokenizer = TEMPLATES[template], extend_tokenizer(TOKENIZER, template)
    ids, labels = render(TALK, tokenizer, template)
    assert len(ids) == len(labels) and all(y in (IGNORE, x) for x, y in zip(ids, labels))
    spelled = tokenizer.decode([y for y in labels if y != IGNORE])
    space = " " if template == "plain" else ""
    second = "Of the thing" if template == "llama3" else f"{space} Of the thing\n"
    assert spelled == f"{space}A test.{t.end}{second}{t.end}"
    last = render(TALK, tokenizer, template, labels="last")[1]
    assert tokenizer.decode([y for y in last if y != IGNORE]) == second + t.end


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_prompt_is_a_prefix_of_the_conversation_and_ends_where_labels_begin(template):
    """Answers begin with spaces and line ends, which would merge with the prompt's last token."""
    for answer in ("A", " A", "\nA", "\n\nA", "  \n A", "問"):
        talk = [*TALK[:-1], {"role": "assistant", "content": answer}]
        ids, labels = render(talk, TOKENIZER, template)
        for turn in (2, 4):
            prompt = render_prompt(talk[:turn], TOKENIZER, template)
            assert ids[:len(prompt)] == prompt
            assert labels[len(prompt) - 1] == IGNORE != labels[len(prompt)]


def test_the_prefix_property_holds_over_real_conversations(shared):
    tokenizer = Tokenizer.load(shared / "gpt2_vocab")
    files = [shared / "alpaca/alpaca_3796.json", shared / "multiturn/emollm_400.json"]
    found, _ = read(files)
    for template in TEMPLATES:
        for conversation in found[::97]:
            messages = conversation["messages"]
            ids, labels = render(messages, tokenizer, template)
            for i, message in enumerate(messages):
                if message["role"] == "user":
                    prompt = render_prompt(messages[:i + 1], tokenizer, template)
                    assert ids[:len(prompt)] == prompt and labels[len(prompt)] != IGNORE


def test_all_answers_in_one_sample_have_the_loss_of_one_sample_an_answer():
    tokenizer = extend_tokenizer(TOKENIZER, "chatml")
    model = GPT(GPTConfig(block_size=128, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2,
                          n_embd=16))

    def nats(messages, labels):
        ids, y = (torch.tensor([row]) for row in render(messages, tokenizer, "chatml", labels))
        return model(ids[:, :-1], y[:, 1:], reduction="sum")[1].item(), (y != IGNORE).sum().item()

    whole, count = nats(TALK, "all")
    parts = [nats(TALK[:turn], "last") for turn in (3, 5)]
    assert count == sum(n for _, n in parts)
    assert whole == pytest.approx(sum(part for part, _ in parts), rel=1e-5)     # float32


def test_what_is_no_conversation_is_refused():
    for messages, reason in (
            ([], "no conversation"), ([{"role": "user"}], "no text"),
            ([TALK[2]], "wrong role order"), (TALK[1:2] * 2, "wrong role order"),
            (TALK[:1], "no question"), ([*TALK[:2], TALK[0]], "wrong role order"),
            ([*user("a"), {"role": "assistant", "content": " \n"}], "empty answer"),
            (user(""), "empty user message"), (user("\ud800"), "half a surrogate pair"),
            ([{"role": "user", "content": "a b", "input": "b"}], "no input")):
        with pytest.raises(ValueError, match=reason):
            render(messages, TOKENIZER, "plain")
    with pytest.raises(ValueError, match="a prompt ends with a user's message"):
        render_prompt(TALK, TOKENIZER, "plain")
    with pytest.raises(ValueError, match="choose alpaca, plain"):
        render(TALK, TOKENIZER, "vicuna")
    with pytest.raises(ValueError, match="choose all or last"):
        render(TALK, TOKENIZER, "plain", labels="first")


# ---- new tokens

def test_new_tokens_follow_the_old_ones_and_none_is_added_twice():
    more = extend_tokenizer(TOKENIZER, "chatml")
    assert more.special_tokens == {"<|endoftext|>": 299, "<|im_start|>": 300, "<|im_end|>": 301}
    assert extend_tokenizer(more, "chatml") is more
    assert extend_tokenizer(TOKENIZER, "plain") is TOKENIZER
    assert render(TALK, TOKENIZER, "chatml") == render(TALK, more, "chatml")


@pytest.mark.parametrize("multiple", [1, 64])
def test_a_grown_embedding_keeps_the_old_tokens_and_stays_tied(multiple):
    model = GPT(GPTConfig(block_size=8, vocab_size=100, n_layer=1, n_head=1, n_embd=8,
                          vocab_multiple=multiple))
    idx = torch.randint(100, (2, 8))
    before, old = model(idx)[0], model.transformer.wte.weight.detach().clone()
    assert grow_embedding(model, 130) is model
    weight = model.transformer.wte.weight
    assert model.config.vocab_size == 130 and len(weight) == model.config.padded_vocab_size
    assert torch.equal(weight[:100], old[:100]) and model.lm_head.weight is weight
    assert torch.allclose(weight[100:], old[:100].mean(0).expand(len(weight) - 100, -1))
    logits, _ = model(idx)
    assert logits.shape[-1] == 130
    # another width of the same product may be summed in another order: float32 rounding
    assert torch.allclose(logits[..., :100], before, atol=1e-6)
    copy = GPT(model.config)
    copy.load_state_dict(model.state_dict())
    assert torch.equal(copy(idx)[0], logits)
    with pytest.raises(ValueError, match="can only grow"):
        grow_embedding(model, 99)


# ---- formats

def test_all_formats_give_the_same_messages():
    expected = [TALK[0], *TALK[1:]]
    for record in (
            {"messages": expected},
            {"conversation": [{"system": "Be brief.", "input": "What is this?",
                               "output": "A test."},
                              {"input": "Of what?", "output": " Of the thing\n"}]},
            {"conversations": [{"from": {"user": "human", "assistant": "gpt"}.get(
                m["role"], m["role"]), "value": m["content"]} for m in expected]},
            {"system": "Be brief.", "conversations": [
                {"from": m["role"], "value": m["content"]} for m in expected[1:]]}):
        assert convert(record) == expected
    assert convert(ALPACA)[0]["content"] == "Add the numbers.\n\nAll of them.\n\n1 and 2"


def test_the_history_of_an_alpaca_record_comes_before_its_question():
    history = [["What is this?", "A test."], ["Who says so?", "I do."]]
    found = convert({"instruction": "Of what?", "output": "It.", "system": "Be brief.",
                     "history": history})
    assert [m["content"] for m in found] == ["Be brief.", *history[0], *history[1], "Of what?",
                                             "It."]
    assert [m["role"] for m in found] == ["system", *["user", "assistant"] * 3]
    for nothing in ([], None):
        assert convert({**ALPACA, "history": nothing}) == convert(ALPACA)


@pytest.mark.parametrize("template", TEMPLATES)
def test_an_answer_of_weight_0_has_no_label_and_the_same_ids(template, tmp_path):
    """OpenAI's "weight", and what swift, axolotl and xtuner call the same."""
    first = [{**TALK[1], "weight": 1}, {**TALK[2], "weight": 0}, *TALK[3:]]
    turns = [{"input": "What is this?", "output": "A test.", "output_with_loss": False},
             {"input": "Of what?", "output": " Of the thing\n", "output_with_loss": True}]
    for record in ({"messages": first, "system": "Be brief."},
                   {"messages": [TALK[0], TALK[1], {**TALK[2], "loss": False}, *TALK[3:]]},
                   {"conversation": turns, "system": "Be brief."},
                   {"system": "Be brief.", "conversations": [
                       {"from": m["role"], "value": m["content"], "train": m is not TALK[2]}
                       for m in TALK[1:]]}):
        messages = convert(record)
        ids, labels = render(messages, TOKENIZER, template)
        assert (ids, labels) == render(TALK, TOKENIZER, template, labels="last")
    tokenizer = extend_tokenizer(TOKENIZER, template)
    write_conversations(tmp_path, [{"messages": messages}], "test", val=pairs(1))
    samples = load_samples(tmp_path, "train", tokenizer, template, 256)
    assert samples.label_counts.tolist() == [sum(y != IGNORE for y in labels)]
    report = inspect_chat.examine([{"messages": messages}], TOKENIZER, template, 256)
    assert report["answers"] == 1 and report["repeated answers"] == 0


@pytest.mark.parametrize("record,reason", [
    ({"instruction": "a", "output": "b", "history": ["cd"]}, "no history"),
    ({"instruction": "a", "output": "b", "history": [["c", ""]]}, "empty answer"),
    ({"messages": [TALK[1], {**TALK[2], "weight": 0}]}, "no answer"),
    ({"messages": [TALK[1], {**TALK[2], "weight": 0.5}]}, "no weight"),
    ({"messages": [{**TALK[1], "input": 5}, TALK[2]]}, "no input"),
    ({"messages": TALK, "label": False}, "unwanted answer"),
    ({"messages": TALK, "tools": [{"name": "search"}]}, "no plain text"),
    ({"messages": [*TALK[:4], {**TALK[4], "tool_calls": [{}]}]}, "no plain text"),
    ({"instruction": "a", "output": ""}, "empty answer"),
    ({"instruction": "a", "output": 7}, "no text"),
    ({"instruction": "a", "input": ["b"], "output": "c"}, "no text"),
    ({"instruction": "a"}, "not of the format that has 'instruction'"),
    ({"question": "a"}, "no known format"), ([1], "no record"),
    ({"messages": TALK[:2]}, "no answer"), ({"messages": "hi"}, "no conversation"),
    ({"conversations": [{"from": "gpt", "value": "I begin."}]}, "wrong role order"),
    ({"conversation": ["a"]}, "not of the format that has 'conversation'"),
    ({"conversation": [{"system": "a", "input": "b", "output": "c"},
                       {"system": "d", "input": "e", "output": "f"}]}, "wrong role order"),
])
def test_a_broken_record_has_a_reason(record, reason):
    with pytest.raises(ValueError, match=reason):
        convert(record)


def test_broken_records_are_named_by_line_and_skipped(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n\n{"instruction": "c", "output": ""}\n'
                    '{"instruct\n{"instruction": "d", "output": "e"}\n')
    found, dropped = read([path])
    assert [c["messages"][1]["content"] for c in found] == ["b", "e"]
    assert dropped == {"empty answer": 1, "no JSON": 1}
    err = capsys.readouterr().err
    assert f"{path}, line 3: empty answer" in err and f"{path}, line 4: no JSON" in err


def test_records_of_an_array_have_their_number(tmp_path):
    path = tmp_path / "a.json"
    records = [{"instruction": f"line\n{i}", "output": "x"} for i in range(4)]
    path.write_text("[\n" + ",\n\n".join(json.dumps(r, indent=1) for r in records) + "\n]\n")
    assert list(read_records(path)) == [(f"{path}, record {i}", record)
                                        for i, record in enumerate(records, 1)]
    path.write_text(json.dumps(records[0], indent=1))
    assert list(read_records(path)) == [(f"{path}, line 1", records[0])]
    for broken in ('[{"a": 1},\n {"b": 2} {"c": 3}]', '[{"a": 1},\n {"b": 2'):
        path.write_text(broken)
        with pytest.raises(ValueError, match="a.json is no JSON: .*line 2"):
            list(read_records(path))
    path.write_bytes(b'{"instruction": "\xff"}')
    with pytest.raises(ValueError, match="not UTF-8"):
        list(read_records(path))


# ---- data sets

def pairs(n, prefix=""):
    return [{"messages": [*user(f"{prefix}{i}?"), {"role": "assistant", "content": f"{i}" * 3}]}
            for i in range(n)]


def lines(folder, split):
    return [json.dumps(record) for record in prepared.read_split(folder, "chat", split)]


def fingerprint(folder, tokenizer, template, labels="all"):
    tokenizer = extend_tokenizer(tokenizer, template)
    return ChatSet(folder, tokenizer, template, 256, labels).fingerprint


def test_a_data_set_holds_every_conversation_once_and_equal_ones_on_one_side(tmp_path):
    given = pairs(40) * 3
    meta = write_conversations(tmp_path, given, "test", validation=0.2)
    train, val = (lines(tmp_path, split) for split in ("train", "val"))
    assert not set(train) & set(val) and len(set(train) | set(val)) == 40
    assert len(train) == 96 and len(val) == 24 == meta["splits"]["val"]["records"]
    again = tmp_path / "again"
    write_conversations(again, given[::-1], "test", validation=0.2)
    assert set(lines(again, "val")) == set(val)


def test_a_changed_or_foreign_data_set_is_refused(tmp_path):
    write_conversations(tmp_path, pairs(9), "test")
    path = tmp_path / "train.jsonl"
    path.write_text(path.read_text().replace("1", "2"))
    with pytest.raises(ValueError, match="differs from its checksum"):
        load_samples(tmp_path, "train", TOKENIZER, "plain", 64)
    (tmp_path / "meta.json").write_text('{"version": 1, "vocab_size": 256}')
    with pytest.raises(ValueError, match="holds 'tokens' data, not conversations; .* data.chat"):
        fingerprint(tmp_path, TOKENIZER, "plain")
    with pytest.raises(FileNotFoundError, match="prepare FILE"):
        fingerprint(tmp_path / "none", TOKENIZER, "plain")
    with pytest.raises(ValueError, match="at least 2 are needed"):
        write_conversations(tmp_path, pairs(1) * 5, "test")


def test_the_fingerprint_changes_with_whatever_changes_the_samples(tmp_path):
    for name, n in (("a", 9), ("b", 10)):
        write_conversations(tmp_path / name, pairs(n), "test")
    a = fingerprint(tmp_path / "a", TOKENIZER, "plain")
    others = [fingerprint(tmp_path / "b", TOKENIZER, "plain"),
              fingerprint(tmp_path / "a", extend_tokenizer(TOKENIZER, "chatml"), "plain"),
              fingerprint(tmp_path / "a", TOKENIZER, "alpaca"),
              fingerprint(tmp_path / "a", TOKENIZER, "plain", labels="last")]
    assert len({a, *others}) == 5 and a == fingerprint(tmp_path / "a", TOKENIZER, "plain")
    assert len(a) == 16 and int(a, 16)


@pytest.mark.parametrize("template", TEMPLATES)
def test_samples_are_the_renderings_up_to_their_last_label(tmp_path, template):
    talks = [{"messages": TALK}, {"messages": convert(ALPACA)}, *pairs(5)]
    write_conversations(tmp_path, talks, "test", validation=0.1)
    tokenizer = extend_tokenizer(TOKENIZER, template)
    for labels in ("all", "last"):
        samples = load_samples(tmp_path, "train", tokenizer, template, 256, labels)
        for i, record in enumerate(prepared.read_split(tmp_path, "chat", "train")):
            ids, marks = render(record["messages"], tokenizer, template, labels)
            end = max(t for t, mark in enumerate(marks) if mark != IGNORE)
            x, y = samples.read(i)
            assert x.tolist() == ids[:end] and y.tolist() == marks[1:end + 1]
            assert samples.label_counts[i] == sum(mark != IGNORE for mark in marks)
        assert len(samples) == 6


def test_what_is_too_long_loses_turns_then_the_answers_end_then_itself(tmp_path):
    long = [*user("abc"), {"role": "assistant", "content": "d" * 30},
            *user("e"), {"role": "assistant", "content": "f" * 30}]
    tokenizer = Tokenizer([], special_tokens=("<|endoftext|>",))        # a byte a token
    write_conversations(tmp_path, [{"messages": long}, *pairs(3)], "test", val=pairs(1))

    def first(block_size, labels="all"):
        samples = load_samples(tmp_path, "train", tokenizer, "none", block_size, labels)
        _, y = samples.read(0)
        return tokenizer.decode(y[y != IGNORE]), samples.counts

    end = "<|endoftext|>"
    assert first(65)[0] == "d" * 30 + end + "f" * 30 + end              # 66 ids in all
    assert first(64) == ("d" * 30 + end, {"records": 4, "kept": 4, "truncated": 1})
    assert first(64, "last")[0] == "d" * 30 + end                       # not without a label
    assert first(33)[0] == "d" * 30 + end
    assert first(32)[0] == "d" * 30
    assert first(5)[0] == "ddd"
    talks = [{"messages": [*user("q" * 7), {"role": "assistant", "content": "a"}]}, *pairs(3)]
    write_conversations(tmp_path, talks, "test", val=pairs(1))
    assert first(6) == ("000" + end, {"records": 4, "kept": 3, "dropped": 1, "truncated": 0})
    with pytest.raises(ValueError, match="no sample that fits block_size=1"):
        load_samples(tmp_path, "train", tokenizer, "none", 1)


def test_a_tokenizer_without_the_templates_tokens_is_refused_for_training(tmp_path):
    write_conversations(tmp_path, pairs(9), "test")
    with pytest.raises(ValueError, match="extend_tokenizer"):
        load_samples(tmp_path, "train", TOKENIZER, "llama3", 64)


# ---- the data sets that are shipped

def test_python_answers_for_itself_without_repeating_a_pair():
    found = pydocs.questions()
    assert len(found) > 5000
    texts = [json.dumps(c) for c in found]
    assert len(set(texts)) == len(texts)
    assert {len(c["messages"]) for c in found} == {2, 4}
    for c in found:
        conversations.check_messages(c["messages"])
    summaries = Counter(c["messages"][1]["content"] for c in found)
    assert max(summaries.values()) <= pydocs.REPEATED
    answers = {c["messages"][1]["content"] for c in found
               if "json.dumps(" in c["messages"][0]["content"]}
    assert answers == {"Serialize ``obj`` to a JSON formatted ``str``."}
    asked = pydocs.conversation("m", "m.f(x)", ("Return x, doubled.",))
    assert "m.f(x)" in asked[0]["content"] and asked[1]["content"] == "Return x, doubled."


def test_alpaca_is_read_from_a_file(tmp_path):
    records = [{"instruction": f"do {i}", "input": "", "output": "x" if i else ""}
               for i in range(30)]
    (tmp_path / "mine.json").write_text(json.dumps(records))
    alpaca.prepare(build(alpaca.AlpacaConfig, dict(from_=str(tmp_path / "mine.json"),
                                                   out=str(tmp_path / "out"))))
    meta = prepared.read_meta(tmp_path / "out", "chat")
    assert meta["dropped"] == {"empty answer": 1} and meta["read"] == 30


def reviews(folder):
    for split in ("train", "test"):
        for kind, word in (("pos", "good"), ("neg", "bad")):
            (folder / split / kind).mkdir(parents=True)
            for i in range(6):
                (folder / split / kind / f"{i}_7.txt").write_text(
                    f"A {word} film, {split} {i}.<br /><br />Really.")
    return folder


def test_reviews_become_text_or_questions_from_folders_and_from_jsonl(tmp_path):
    folder = reviews(tmp_path / "aclImdb")
    file = tmp_path / "r.jsonl"
    file.write_text("".join(json.dumps({"text": f"Film {i}.", "label": i % 2}) + "\n"
                            for i in range(20)))
    for source, counts in ((folder, (12, 12)), (file, (19, 1))):
        out = imdb.prepare(build(imdb.ImdbConfig, dict(from_=str(source), task="sentiment",
                                                       out=str(tmp_path / "out"))))
        splits = prepared.read_meta(out, "chat")["splits"]
        assert (splits["train"]["records"], splits["val"]["records"]) == counts
    messages = list(prepared.read_split(out, "chat", "train"))[1]["messages"]
    assert messages[0]["input"].startswith("Film") and messages[1]["content"] in ("positive",
                                                                                  "negative")
    out = imdb.prepare(build(imdb.ImdbConfig, dict(from_=str(folder), tokenizer="bytes",
                                                   out=str(tmp_path / "text"))))
    val = shards.open_split(out, "val")
    text = bytes(val.read(0, len(val)).astype(np.uint8)).decode()
    assert text.count("film, test") == 12 and "<br" not in text and ".\n\nReally." in text
    file.write_text('{"text": "a", "label": "good"}\n')
    with pytest.raises(ValueError, match="r.jsonl, line 1: label is 'good', not 0 or 1"):
        imdb.prepare(build(imdb.ImdbConfig, dict(from_=str(file))))


# ---- commands

def test_the_commands_prepare_and_inspect(tmp_path, capsys):
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(c) + "\n" for c in
                            [*pairs(30), {"messages": TALK}, {"instruction": "a", "output": ""}]))
    chat.main([str(file), f"--out={tmp_path / 'out'}"])
    chat.main([f"--from={file}", f"--out={tmp_path / 'same'}"])
    TOKENIZER.save(tmp_path / "tok.json")
    chat.main(["prepare", str(file), f"--out={tmp_path / 'third'}", "--validation=0.5",
               f"--tokenizer={tmp_path / 'tok.json'}"])
    out = capsys.readouterr().out
    assert "dropped 1: empty answer" in out
    answers = [len(TOKENIZER.encode(m["content"])) for c in [*pairs(30), {"messages": TALK}]
               for m in c["messages"] if m["role"] == "assistant"]
    counted = re.findall(r"([\d,]+) of them in answers", out)
    assert sum(int(n.replace(",", "")) for n in counted) == sum(answers)
    assert fingerprint(tmp_path / "out", TOKENIZER, "plain") == fingerprint(
        tmp_path / "same", TOKENIZER, "plain") != fingerprint(tmp_path / "third", TOKENIZER,
                                                              "plain")
    for name in (file, tmp_path / "out"):
        chat.main(["inspect", str(name), "--block_size=16"])
        shown = capsys.readouterr().out
        assert "prompts" in shown and "answers" in shown and "1 with a system message" in shown
    for words, message in ((["prepare"], "no source given; name files"),
                           (["prepare", str(file), "--from=b"], "named twice"),
                           ([str(tmp_path / "no.json")], "there is no file"),
                           (["inspect"], "name a file")):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            chat.main(words)


def test_inspection_counts_what_it_says():
    talks = [*pairs(3), {"messages": TALK}, *pairs(1, "again ")]
    longest = len(render(TALK, TOKENIZER, "plain")[0])
    report = inspect_chat.examine(talks, TOKENIZER, "plain", block_size=longest - 2)
    assert report["conversations"] == 5 and report["answers"] == 6
    assert report["repeated answers"] == 1                      # "000" twice
    assert report["several turns"] == 1 and report["system message"] == 1
    half = [*TALK[:2], {**TALK[2], "weight": 0}, *TALK[3:]]     # one of the two is learned
    report_of_half = inspect_chat.examine([{"messages": half}], TOKENIZER, "plain", longest)
    assert report_of_half["several turns"] == report_of_half["answers"] == 1
    assert report["truncated"] == 1 and report["unlabelled"] == 0
    tiny = inspect_chat.examine(talks, TOKENIZER, "plain", block_size=3)
    assert tiny["unlabelled"] == 5


def test_inspection_takes_the_block_size_of_the_run_whose_tokenizer_it_is_given(tmp_path, capsys):
    file, run = tmp_path / "a.jsonl", tmp_path / "run"
    talk = [*user("q"), {"role": "assistant", "content": "a" * 200}]
    file.write_text(json.dumps({"messages": talk}))
    run.mkdir()
    TOKENIZER.save(run / "tokenizer.json")
    (run / "run.json").write_text("{}")
    (run / "config.json").write_text('{"model": {"block_size": 128}, "data": "x"}')
    for words, said in ((["--tokenizer=bytes"], "block_size=1024: 0.0% truncated"),
                        ([f"--tokenizer={run}"], "block_size=128: 100.0% truncated"),
                        ([f"--tokenizer={run}", "--block_size=999"], "block_size=999: 0.0% trunc")):
        chat.main(["inspect", str(file), *words])
        assert said in capsys.readouterr().out


def test_no_control_character_of_the_data_reaches_the_terminal(tmp_path, capsys):
    file, bad = tmp_path / "a.jsonl", "\x1b[31m red \x9b2J\x07\r\x00\x7f"
    talk = [*user(f"{bad}?\n\ttab 🙂"), {"role": "assistant", "content": bad}]
    file.write_text("".join(json.dumps(record) + "\n" for record in (
        {"messages": talk}, {"messages": talk}, {bad: 1})))
    chat.main(["inspect", str(file)])
    shown = "".join(capsys.readouterr())
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown)
    assert r"\x1b[31m red \x9b2J\x07\x0d\x00\x7f" in shown and "?\n\ttab 🙂" in shown


def test_real_conversations_prepare_and_say_what_was_dropped(shared, tmp_path):
    for name, records, dropped in (("alpaca/alpaca_3796.json", 3796, {"empty answer": 4}),
                                   ("alpaca/alpaca_zh_1000.json", 1000, {}),
                                   ("multiturn/emollm_400.json", 400, {})):
        out = tmp_path / name
        chat.main([str(shared / name), f"--out={out}"])
        meta = prepared.read_meta(out, "chat")
        assert meta["dropped"] == dropped and meta["read"] == records


@pytest.mark.parametrize("damage", ["[" * 100_000, "{", "[]", '{"kind": "chat", "version": 1}',
                                    '{"kind": "chat", "version": 1, "splits": {"train": 3}}'])
def test_a_damaged_meta_of_chat_data_is_one_clear_line(tmp_path, damage):
    (tmp_path / "meta.json").write_text(damage)
    with pytest.raises(ValueError, match="damaged|truncated or not JSON|not conversations"):
        prepared.read_split(tmp_path, "chat", "train")

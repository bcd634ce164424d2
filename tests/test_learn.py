"""Exercises: the project's bodies are right in them, missing and wrong ones are told apart by name,
and the plain definitions are what the project computes."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from torch.nn import functional as F

import bpe
import learn.__main__ as learn
from data import shards
from data.loader import WindowLoader
from eval import hellaswag
from eval.hellaswag_items import Item, prepare
from fast.cross_entropy import IGNORE, linear_cross_entropy
from learn import plain
from learn.exercises import EXERCISES, tiny
from learn.source import changed, function_at, replaced, solution, stub
from model import GPT, GPTConfig
from run.config import build
from train import TrainConfig, train

REPOSITORY = Path(__file__).parent.parent
NAMES = list(EXERCISES)
MISTAKES = [(name, mistake) for name in NAMES for mistake in EXERCISES[name].mistakes]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Answers are written into a folder of the test's."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "exercises"


def write(name, body=None):
    """The stub of an exercise, or with a function in the place of its own; returns the file."""
    path = learn.FOLDER / f"{name}.py"
    path.unlink(missing_ok=True)
    learn.start(EXERCISES[name], path)
    if body is not None:
        head, _, _ = path.read_text(encoding="utf-8").partition("\ndef ")
        path.write_text(head + "\n" + body, encoding="utf-8")
    return path


def answer(name, body=None):
    """What check says of it."""
    return learn.trouble(EXERCISES[name], write(name, body))


@pytest.mark.parametrize("name", NAMES)
def test_the_projects_own_body_is_right_and_without_it_exactly_its_own_check_fails(name):
    """Right where all the others are missing; failing where all the others are there."""
    for other in NAMES:
        write(other)
    assert answer(name, solution(EXERCISES[name].source)) == ""
    for other in NAMES:
        write(other, solution(EXERCISES[other].source))
    assert "NotImplementedError: the body is yours" in answer(name)
    assert answer(name, solution(EXERCISES[name].source)) == ""     # and the project is unharmed


@pytest.mark.parametrize("name,mistake", MISTAKES, ids=[" ".join(pair) for pair in MISTAKES])
def test_a_typical_mistake_is_named(name, mistake):
    exercise, text = EXERCISES[name], solution(EXERCISES[name].source)
    swaps = exercise.mistakes[mistake]
    for old, new in zip(swaps[::2], swaps[1::2]):
        assert old in text and old != new
        text = text.replace(old, new)
    said = answer(name, text)
    assert said.endswith(f"That is what comes out when {mistake}."), said


ATTENTION = '''
def forward(self, x, mask=None, cache=None):
    B, T, C = x.shape
    D = C // self.n_head
    q, k, v = [part.reshape(B, T, self.n_head, D).transpose(1, 2)
               for part in self.c_attn(x).chunk(3, dim=-1)]
    past = cache[2] if cache else 0
    if cache:
        cache[0][:, :, past:past + T] = k
        cache[1][:, :, past:past + T] = v
        k, v = cache[0][:, :, :past + T], cache[1][:, :, :past + T]
    scores = q @ k.transpose(-1, -2) SCALE
    seen = torch.ones(T, past + T).tril(past).bool() if mask is None else mask
    y = scores.masked_fill(~seen, -1e9).softmax(-1) @ v
    return self.c_proj(y.transpose(1, 2).flatten(2))
'''
ADAMW = '''
def adamw(gradient, state, config, skip):
    if skip:
        return gradient
    state["n"] = state.get("n", 0) + 1
    state["m"] = config.beta1 * state.get("m", 0) + (1 - config.beta1) * gradient
    state["v"] = config.beta2 * state.get("v", 0) + (1 - config.beta2) * gradient ** 2
    return (state["m"] FIRST) / ((state["v"] SECOND) ** 0.5 + config.eps)
'''
ACCUMULATE = '''
def accumulate(model, micro_batches):
    count = sum((y >= 0).sum().item() for _, y in micro_batches)
    total = 0
    for x, y in micro_batches:
        loss = model(x, y, reduction=MEAN)[1] DIVIDED
        loss.backward()
        total += loss.item()
    return total
'''
CROSS_ENTROPY = '''
def cross_entropy(logits, targets):
    p = (logits SHIFTED).exp()
    p = p / p.sum(1, keepdim=True)
    nats, gradient = torch.zeros(len(p)), torch.zeros_like(p)
    for i, t in enumerate(targets.tolist()):
        if t != IGNORE:
            nats[i] = logits[i].logsumexp(0) - logits[i, t]
            gradient[i] = p[i]
            gradient[i, t] -= 1
    return nats, gradient
'''
TOP_P = '''
def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    if temperature == 0:
        return logits.max(-1).indices
    logits = logits / temperature
    if top_k:
        least = logits.sort(-1, descending=True).values[:, top_k - 1:top_k]
        logits = torch.where(logits < least, -torch.inf, logits)
    p = logits.softmax(-1)
    if top_p:
        p, order = p.sort(-1, descending=True)
        total = p.cumsum(-1)
        p = torch.zeros_like(p).scatter(-1, order, torch.where(BEFORE >= top_p, 0.0, p))
    return torch.multinomial(p, 1, generator=generator).squeeze(1)
'''
STUDENTS = {        # right answers by other means, and the same with an error that has a name
    "attention": (ATTENTION, {"SCALE": "/ D ** 0.5"}, {"SCALE": ""}, "not divided by sqrt(D)"),
    "adamw": (ADAMW, {"FIRST": "/ (1 - config.beta1 ** state['n'])",
                      "SECOND": "/ (1 - config.beta2 ** state['n'])"},
              {"FIRST": "", "SECOND": ""}, "there is no bias correction"),
    "accumulate": (ACCUMULATE, {"MEAN": "'sum'", "DIVIDED": "/ count"},
                   {"MEAN": "'mean'", "DIVIDED": "/ len(micro_batches)"}, "a mean of means"),
    "cross_entropy": (CROSS_ENTROPY, {"SHIFTED": "- logits.amax(1, keepdim=True)"},
                      {"SHIFTED": ""}, "is nan instead of 1"),
    "top_p": (TOP_P, {"BEFORE": "total - p"}, {"BEFORE": "total"}, "that crosses top_p is dropped"),
}


@pytest.mark.parametrize("name", STUDENTS)
def test_a_students_answer_is_right_and_its_error_named_whatever_it_is_written_like(name):
    text, right, wrong, message = STUDENTS[name]
    for words, expected in ((right, ""), (wrong, message)):
        body = text
        for old, new in words.items():
            body = body.replace(old, new)
        said = answer(name, body)
        assert expected in said and bool(said) == bool(expected), said


@pytest.mark.parametrize("body,said", [
    ("def merge(word, pair, new)\n    return word\n", "bpe_merge.py, line 11: def merge(word, "),
    ("def merge(word, pair, new):\n    return word[pair]\n", "bpe_merge.py, line 12: return word["),
    ("def merge(word, pair, new):\n    word\n", "gave None, which is no tensor and no list"),
    ("def merge(word, pair, new):\n    return word\n",
     "shape is (6,), not (4,)\n  yours   1 2 3 1 2 1\n  wanted  9 3 9 1"),
    ("def merged(word, pair, new):\n    return word\n", "bpe_merge.py has no function merge"),
    ("def merge(word, pair, new):\n    raise SystemExit\n", "line 12: raise SystemExit"),
    ("def merge(word):\n    return word\n", "TypeError: merge() takes 1 positional argument but")])
def test_what_a_reader_can_get_wrong_is_said_with_its_line(body, said):
    assert said in answer("bpe_merge", body)
    assert answer("bpe_merge", solution("bpe.py:merge")) == ""


def test_a_result_that_the_project_cannot_use_names_the_place_in_the_project():
    text = solution("learn/plain.py:layer_norm").replace("return x if", "return None if x.dim() > 2"
                                                         " else x if")
    said = answer("layer_norm", text)
    assert "stopped at: logits of a GPT\n  what your function gave does not fit in model.py" in said


def test_an_endless_loop_is_ended_and_its_line_said():
    """In a process of its own, which it ends."""
    write("bpe_merge", "def merge(word, pair, new):\n    while True:\n        word = word\n")
    code = "import learn.__main__ as m\nm.LEAST = 0.2\nm.run_command(m.main)"
    run = subprocess.run([sys.executable, "-c", code, "check", "bpe_merge"], capture_output=True,
                         env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, text=True, timeout=300)
    assert run.returncode == 1 and run.stderr == "" and len(run.stdout.splitlines()) == 2, run
    assert "an endless loop? It still runs after" in run.stdout
    assert re.search(r"at exercises.bpe_merge\.py, line 1[23]$", run.stdout.strip())


def test_commands_from_first_to_last(capsys):
    def command(*words):
        learn.main(list(words))
        return capsys.readouterr().out

    assert command("list").splitlines()[0].startswith(" 1  bpe_merge ")
    with pytest.raises(ValueError, match="there is no exercises.bpe_merge.py; python -m learn"):
        command("check", "bpe_merge")
    command("start", "bpe-merge")
    path = learn.FOLDER / "bpe_merge.py"
    path.write_text(path.read_text().replace("raise NotImpl", "return [9, 3, 9, 1]  # "))
    mine = path.read_text()
    with pytest.raises(SystemExit, match="1"):
        command("check", "bpe_merge")
    assert "1 of 3 checks are right, then differs: merge([7, 7, 7], (7, 7), 9)\n" in (
        capsys.readouterr().out)
    with pytest.raises(ValueError, match="is there and was left as it is"):
        command("start", "bpe_merge")
    assert path.read_text() == mine and " 1* bpe_merge" in command("list")
    write("bpe_merge", solution("bpe.py:merge"))
    assert command("check", "bpe_merge").startswith("bpe_merge: all checks are right.")


@pytest.mark.parametrize("words,said", [
    (["chek", "top_p"], "there is no command 'chek'; did you mean check?"),
    (["check", "atention"], "there is no exercise 'atention'; did you mean attention?"),
    (["start", "zzz"], "there is no exercise 'zzz'; choose bpe_merge, bpe_encode"),
    (["start"], "start which exercise? python -m learn list shows them"),
    (["list", "top_q"], "did you mean top_p?"),
    (["check", "top_p", "adamw"], "'adamw' is one word too many")])
def test_a_wrong_word_is_one_line_that_says_what_was_meant(words, said):
    with pytest.raises(ValueError) as error:
        learn.main(words)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_hint_solution_and_help_are_printed(capsys):
    for words in (["hint", "top_p"], ["solution", "top_p"], ["--help"], []):
        learn.main(words)
    said = capsys.readouterr().out
    assert "# model.py:sample_token\ndef sample_token(" in said and said.count("learn start") == 2


def test_a_stub_has_signature_docstring_and_what_the_body_needs_but_no_body():
    text = stub("lora.py:merged_weight")
    assert text.startswith("import torch\n\nfrom lora import LowRank, factors, nn, rescaled, spre")
    assert '"""The weight W + share * s B A' in text and "for change" not in text
    exec(text, {})
    assert solution("lora.py:merge_lora").startswith("def merge_lora(")     # no decorator


def test_what_is_replaced_is_replaced_for_everyone_and_comes_back():
    _, merge = function_at("bpe.py:merge")
    code = merge.__code__
    with pytest.raises(ZeroDivisionError), replaced(merge, lambda *words: 1 / 0):
        bpe.train_slowly({b"aa": 1}, 1)
    assert merge.__code__ is code and merge([7, 7, 7], (7, 7), 8) == [8, 7]
    other = changed("bpe.py:merge", ("out.append(new)", "out.append(-new)"))
    assert other([1, 2], (1, 2), 3) == [-3]


# ---- the plain definitions: what the project computes; tolerances are rounding in float32

def test_layer_norm_is_pytorchs():
    x, weight, bias = torch.randn(2, 3, 8) * 3 + 1, torch.randn(8), torch.randn(8)
    for words in ((), (weight,), (weight, bias), (weight, None, 0.1)):
        torch.testing.assert_close(plain.layer_norm(x, (8,), *words),
                                   F.layer_norm(x, (8,), *words), atol=1e-5, rtol=1e-5)


def test_cross_entropy_is_that_of_the_head():
    x, head = torch.randn(40, 16), nn.Linear(16, 30, bias=False)
    targets = torch.randint(30, (40,))
    targets[5:9] = IGNORE
    loss = linear_cross_entropy(x, head, targets, 30)
    nats, gradient = plain.cross_entropy(head(x).detach(), targets)
    torch.testing.assert_close(nats.sum(), loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.T @ x, torch.autograd.grad(loss, head.weight)[0],
                               rtol=1e-4, atol=1e-5)


def test_accumulate_is_a_step_of_the_loop(dataset):
    """The first logged loss of a run whose last window is shorter than the others."""
    settings = dict(data=str(dataset), max_steps=2, micro_batch=1, eval_every=0, save_every=0,
                    sample_tokens=0, compile="off", device="cpu", dtype="float32", seed=3,
                    model=dict(n_layer=1, n_head=2, n_embd=16, block_size=1024),
                    batch_tokens=5 * 1024, out="out/run")
    train(build(TrainConfig, settings))
    log = [json.loads(line) for line in Path("out/run/log.jsonl").read_text().splitlines()]
    torch.manual_seed(3)
    model = GPT(GPTConfig(**settings["model"], vocab_size=256))
    loader = WindowLoader(shards.open_split(dataset, "train"), 1024, 5 * 1024, 1, seed=3)
    batches = list(loader.batches(0))
    assert len({int((y != IGNORE).sum()) for _, y in batches}) == 2
    loss = plain.accumulate(model, batches)
    assert loss.item() == pytest.approx(log[0]["loss"], rel=1e-5)
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert norm.item() == pytest.approx(log[0]["grad_norm"], rel=1e-4)


def test_ending_score_is_what_hellaswag_adds_up():
    model, tok = tiny(vocab_size=257, block_size=64), bpe.Tokenizer([])
    items = [Item("The cat", "", ("eats", "sleeps a lot", "is", "x"), 1)]
    context, endings, _ = prepare(tok, items[0], "completion")
    with torch.no_grad():
        found = torch.stack([plain.ending_score(model, context, ending) for ending in endings])
    torch.testing.assert_close(hellaswag.score(model, tok, items).sums[0].float(), found,
                               rtol=1e-5, atol=1e-4)

"""Mixtures of data sets: --data=a:0.7,b:0.3."""
import json
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies

from data.corpus import CorpusConfig, prepare
from data.loader import MixtureLoader, WindowLoader, deal
from data.sets import TokenSet, mixture_of
from data.shards import Tokens
from eval import __main__ as command
from eval import loss as loss_command
from eval.loss import evaluate_loss, token_lengths
from run.config import build
from run.load import load_model
from run.log import read_log
from train import TrainConfig, train

TINY = {"max_steps": 8, "batch_tokens": 128, "micro_batch": 2, "warmup_steps": 2, "eval_every": 4,
        "save_every": 4, "sample_tokens": 0, "log_every": 1, "learning_rate": 1e-2,
        "min_learning_rate": 1e-3,
        "model": {"block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 32}}


def tokens(first, count):
    return Tokens([np.arange(first, first + count, dtype=np.uint16)])


def mixed(sizes, weights, **world):
    """Sources of these sizes, whose tokens say which they are: 0.., 10000.., 20000.. ."""
    return MixtureLoader([WindowLoader(tokens(10_000 * i, size), 4, 32, 2, seed=3, **world)
                          for i, size in enumerate(sizes)], weights)


@settings(max_examples=200, deadline=None)
@given(strategies.lists(strategies.integers(1, 50), min_size=1, max_size=5),
       strategies.integers(0, 10**9))
def test_each_source_gets_its_share_of_the_first_rows_within_a_row_a_source(weights, start):
    weights = [Fraction(weight) for weight in weights]
    numbers = np.arange(start, start + 300)
    source, place = deal(numbers, weights)
    for i, weight in enumerate(weights):
        share = float(weight / sum(weights))
        had = place[source == i]
        assert (np.diff(had) == 1).all()                # none is left out, none served twice
        assert (abs(had - share * numbers[source == i]) <= len(weights)).all()


def test_a_row_is_dealt_alike_alone_and_among_others():
    weights = [Fraction(7, 10), Fraction(2, 10), Fraction(1, 10)]
    source, place = deal(np.arange(1000), weights)
    for n in (0, 1, 9, 500, 999):
        assert [a[0] for a in deal(np.array([n]), weights)] == [source[n], place[n]]
    assert np.bincount(source).tolist() == [700, 200, 100]


def test_weights_of_many_digits_are_dealt_right_far_into_a_run():
    """Their products are beyond 64 bits: 0.123457 to 1 / 999983 to 7, at row 10^9."""
    weights = [Fraction("0.123457"), Fraction(1, 999983), Fraction(7)]
    numbers = np.arange(10**9, 10**9 + 1000)
    source, place = deal(numbers, weights)
    for i, weight in enumerate(weights):            # each share is off by 10^-9, a row here
        had = float(weight / sum(weights)) * numbers[source == i]
        assert (abs(place[source == i] - had) <= 2 * len(weights)).all()
    weights = [Fraction(1), Fraction(1, 10**7)]     # a share that is nearly all: not rounded to it
    assert abs(deal(np.array([10**9]), weights)[1][0] - 10**9 / (1 + 1e-7)) <= 4


def test_every_window_of_a_source_comes_once_before_any_comes_twice():
    loader, seen = mixed([401, 81], [0.75, 0.25]), [[], []]     # 100 and 20 windows
    for step in range(loader.rows_per_epoch // loader.rows_per_step):   # 80 rows: 60 and 20
        for x, y in loader.batches(step):
            for row, target in zip(x, y):
                seen[int(row[0]) // 10_000].append(int(row[0]) % 10_000)
                assert torch.equal(target[:-1], row[1:]) and int(target[-1]) == int(row[-1]) + 1
    assert loader.rows_per_epoch == 80
    assert sorted(seen[1]) == list(range(0, 80, 4))             # the smallest source, all of it
    assert len(seen[0]) == len(set(seen[0])) == 60


def test_ranks_and_micro_batches_divide_the_rows_of_one_process_and_labels_are_counted():
    sizes, weights = [42, 31, 50], [0.5, 0.3, 0.2]              # whose last windows are short
    alone = mixed(sizes, weights)
    for step in (0, 3, 11):
        whole = torch.cat([x for x, _ in alone.batches(step)])
        parts = [[x for x, _ in mixed(sizes, weights, rank=rank, world=2).batches(step)]
                 for rank in range(2)]
        assert torch.equal(torch.cat([x for pair in zip(*parts) for x in pair]), whole)
        assert alone.tokens_before(step + 1) - alone.tokens_before(step) == alone.labels(step)
        assert alone.labels(step) == sum(int((y >= 0).sum()) for _, y in alone.batches(step))
    assert "shard 0 at token" in alone.where(0)


@pytest.fixture
def two(tmp_path):
    """Two small data sets with bytes as tokens."""
    for name, text in (("a", "abcabcabd\n" * 700), ("b", "0123456789\n" * 300)):
        (tmp_path / f"{name}.txt").write_text(text)
        prepare(CorpusConfig(from_=str(tmp_path / f"{name}.txt"), tokenizer="bytes",
                             validation=0.2, out=str(tmp_path / name)))
    return tmp_path


def of(two, out, data=None, **more):
    data = data or f"{two / 'a'}:0.7,{two / 'b'}:0.3"
    return build(TrainConfig, {**TINY, "data": data, "out": str(two / out), **more})


def test_a_mixture_is_evaluated_by_source(two):
    train(of(two, "whole"))
    whole = read_log(two / "whole" / "log.jsonl")
    final = [line for line in whole if "val_loss" in line][-1]
    model, tokenizer = load_model(two / "whole", which="last.pt")
    world = type("World", (), {"rank": 0, "size": 1})
    each = {name: evaluate_loss(model, TokenSet(two / name).validation(of(two, "whole"), world),
                                torch.device("cpu"), token_lengths(tokenizer))
            for name in ("a", "b")}
    for name, found in each.items():            # the run's own dtype is float32 or bfloat16
        assert final[f"val_loss/{two / name}"] == pytest.approx(found["loss"], rel=2e-2)
    a, b = (final[f"val_loss/{two / name}"] for name in ("a", "b"))
    assert final["val_loss"] == pytest.approx(0.7 * a + 0.3 * b, rel=1e-6)
    bytes_a, bytes_b = (found["loss"] / found["bits_per_byte"] for found in each.values())
    assert final["bits_per_byte"] == pytest.approx(
        (0.7 * a + 0.3 * b) / (0.7 * bytes_a + 0.3 * bytes_b), rel=1e-6)


def test_a_run_on_a_mixture_is_evaluated_later_as_in_training(two, monkeypatch, capsys):
    data = of(two, "run").data
    summary = train(of(two, "run", dtype="float32"))
    monkeypatch.setattr(command.hellaswag, "load_items", lambda path: [])
    command.main([str(two / "run"), "--tokens=0", "--device=cpu", "--dtype=float32"])
    shown = capsys.readouterr().out
    found = json.loads((two / "run" / "eval.json").read_text())["loss"]
    assert found["data"] == data and "a:0.7,b:0.3" in shown and f"loss/{two / 'a'}" in shown
    for key in ("loss", "bits_per_byte", f"loss/{two / 'a'}", f"loss/{two / 'b'}", "tokens"):
        assert found[key] == pytest.approx(summary[f"val_{key}"], rel=1e-5)     # other batches
    with pytest.raises(ValueError, match="--stride is for .*; .* holds a mixture: leave it out"):
        loss_command.main([f"--model={two / 'run'}", f"--data={data}", "--stride=8"])


def test_a_mixture_goes_on_as_if_it_had_not_been_stopped(two):
    train(of(two, "whole", schedule="constant"))
    train(of(two, "parts", schedule="constant", max_steps=4))
    train(of(two, "parts", schedule="constant"))
    whole, parts = (read_log(two / name / "log.jsonl") for name in ("whole", "parts"))
    losses = [[(line["step"], line["loss"]) for line in lines if "loss" in line]
              for lines in (whole, parts)]
    assert losses[0] == losses[1] and len(losses[0]) == 8
    with pytest.raises(ValueError, match="holds a run with data="):
        train(of(two, "parts", f"{two / 'a'}:0.6,{two / 'b'}:0.4", max_steps=9))


@pytest.mark.parametrize("name", ["a:0.7,b", "a:0.7,b:0", "a:0.7,b:-1", "a:1,b:nan", "a:1,a:2",
                                  "a:x,b:1", ":1,b:1"])
def test_a_wrong_mixture_is_one_line(name):
    with pytest.raises(ValueError, match="is not NAME:WEIGHT with a weight above 0"):
        mixture_of(name)


def test_sources_that_are_not_there_or_do_not_fit_are_named(two):
    with pytest.raises(FileNotFoundError, match="no prepared data set in .*nowhere"):
        train(of(two, "run", f"{two / 'a'}:1,nowhere:1"))
    prepare(CorpusConfig(from_=str(two / "b.txt"), vocab_size=260, out=str(two / "other")))
    with pytest.raises(ValueError, match="other were made with different tokenizers"):
        train(of(two, "run", f"{two / 'a'}:1,{two / 'other'}:1"))
    assert not (two / "run").exists()

"""Batches of conversations: the same samples and labels in a step, however the work is shared."""
import itertools
from collections import Counter

import numpy as np
import pytest
import torch

from data.samples import MULTIPLE, SampleLoader, Samples, pack
from model import GPT, IGNORE, GPTConfig

BLOCK = 48


def some_samples(n=50, seed=0, longest=BLOCK):
    """Samples of random lengths whose first third has no label; ids tell the sample: id // 100."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, longest + 2, size=n)
    ids = np.concatenate([100 * i + np.arange(length) for i, length in enumerate(lengths)])
    labelled = np.concatenate([np.arange(length) >= max(1, length // 3) for length in lengths])
    return Samples(ids.astype(np.int32), labelled, np.concatenate([[0], np.cumsum(lengths)]), BLOCK)


def pairs_of(batches):
    """Every (input, target) that has a label."""
    return Counter(pair for x, y, *_ in batches
                   for pair in zip(x[y != IGNORE].tolist(), y[y != IGNORE].tolist()))


def all_batches(samples, step, world, micro_batch, **settings):
    return [batch for rank in range(world)
            for batch in SampleLoader(samples, BLOCK, 16 * BLOCK, micro_batch, rank=rank,
                                      world=world, **settings).batches(step)]


def test_a_step_has_the_same_labels_whatever_the_ranks_micro_batches_and_packing():
    samples = some_samples()
    for packing in (False, True):
        for step in (0, 1, 5, 40):
            one = SampleLoader(samples, BLOCK, 16 * BLOCK, 16, packing=packing)
            expected = pairs_of(one.batches(step))
            assert expected.total() == one.labels(step)
            for world, micro_batch in itertools.product((1, 2, 4), (1, 2, 4)):
                found = pairs_of(all_batches(samples, step, world, micro_batch, packing=packing))
                assert found == expected
            rows = one.order(step)
            whole = Counter()
            for i in itertools.chain.from_iterable(one.rows[row] for row in rows):
                x, y = samples.read(i)
                whole += Counter(zip(x[y != IGNORE].tolist(), y[y != IGNORE].tolist()))
            assert whole == expected


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("n,per_step", [(50, 8), (48, 8), (5, 8), (17, 4), (200, 3)])
def test_every_sample_is_served_once_an_epoch(n, per_step, packing):
    """Also where epochs end within a step, and where a step is longer than an epoch."""
    loader = SampleLoader(some_samples(n), BLOCK, per_step * BLOCK, 1, seed=3, packing=packing)
    steps = -(-3 * loader.rows_per_epoch // per_step)
    served = np.concatenate([loader.order(step) for step in range(steps)])
    counts = np.bincount(served, minlength=loader.rows_per_epoch)
    assert counts.min() >= 3 and counts.sum() - 3 * loader.rows_per_epoch < per_step
    if n % per_step == 0 and not packing:
        epochs = served.reshape(3, n)
        assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
        assert not np.array_equal(epochs[0], epochs[1])
    assert sorted(itertools.chain.from_iterable(loader.rows)) == list(range(n))


def test_another_seed_is_another_order_and_the_order_needs_no_history():
    samples = some_samples()
    a, b = (SampleLoader(samples, BLOCK, 8 * BLOCK, 8, seed=seed) for seed in (0, 1))
    steps = [a.order(step).tolist() for step in range(20)]
    assert steps != [b.order(step).tolist() for step in range(20)]
    assert [a.order(step).tolist() for step in reversed(range(20))] == steps[::-1]


def test_a_step_has_rows_of_similar_length_and_the_steps_are_shuffled_in_every_epoch():
    samples = some_samples(403)
    loader = SampleLoader(samples, BLOCK, 8 * BLOCK, 8)
    for epoch in range(3):
        own = range(-(-epoch * 403 // 8), (epoch + 1) * 403 // 8)       # not shared with another
        lengths = samples.lengths[np.stack([loader.order(step) for step in own])]
        assert np.mean(lengths.max(1) - lengths.min(1)) < samples.lengths.max() / 8
        middles = np.median(lengths, axis=1)[:16]       # of the first group of steps
        assert middles.tolist() != sorted(middles)


def test_a_label_on_a_first_token_counts_nowhere_as_nothing_predicts_it():
    samples = some_samples(8)
    samples = Samples(samples.ids, np.ones_like(samples.labelled), samples.offsets, BLOCK)
    for packing in (False, True):
        loader = SampleLoader(samples, BLOCK, 4 * BLOCK, 4, packing=packing)
        for step in range(3):
            assert loader.labels(step) == pairs_of(loader.batches(step)).total()


@pytest.mark.parametrize("packing", [False, True])
def test_tokens_are_counted_as_they_are_read_without_padding(packing):
    samples = some_samples(50)
    samples.ids += 1                                    # 0 is padding
    loader = SampleLoader(samples, BLOCK, 8 * BLOCK, 4, packing=packing)
    before = 0
    for step in range(16):                              # epochs end within
        assert loader.tokens_before(step) == before
        count = sum(int((x != 0).sum()) for x, *_ in loader.batches(step))
        assert loader.tokens_at(step) == count
        before += count
    epoch = loader.tokens_per_step / loader.rows_per_step * loader.rows_per_epoch
    assert epoch == pytest.approx(samples.lengths.sum())


def test_padding_reaches_to_the_longest_of_a_micro_batch_and_has_no_label():
    samples = some_samples(50)
    loader = SampleLoader(samples, BLOCK, 16 * BLOCK, 4)
    for step in range(12):                              # epochs end within some of them
        longest = [max(samples.lengths[i] for i in x[:, 0].numpy() // 100)
                   for x, _ in loader.batches(step)]
        assert longest == sorted(longest)
        assert [x.shape[1] for x, _ in loader.batches(step)] == [
            min(-(-length // MULTIPLE) * MULTIPLE, BLOCK) for length in longest]
    for rank in range(2):
        for x, y in SampleLoader(samples, BLOCK, 16 * BLOCK, 4, rank=rank, world=2).batches(0):
            for row, targets in zip(x, y):
                inputs, expected = samples.read(int(row[0]) // 100)
                assert row[:len(inputs)].tolist() == inputs.tolist()
                assert targets[:len(inputs)].tolist() == expected.tolist()
                assert not row[len(inputs):].any() and (targets[len(inputs):] == IGNORE).all()


def test_packed_rows_are_full_length_and_their_positions_restart_with_each_sample():
    samples = some_samples(40)
    loader = SampleLoader(samples, BLOCK, 4 * BLOCK, 2, packing=True)
    for step in range(loader.rows_per_epoch // 4):
        for x, y, positions in loader.batches(step):
            assert x.shape == y.shape == positions.shape == (2, BLOCK)
            assert positions.min() == 0 and positions.max() < BLOCK
            for row, targets, places in zip(x, y, positions):
                starts = (places == 0).nonzero()[:, 0].tolist()
                for start, end in zip(starts, [*starts[1:], BLOCK]):
                    assert places[start:end].tolist() == list(range(end - start))
                    if (targets[start:end] == IGNORE).all():
                        assert end == BLOCK and not row[start:].any()       # the padding
                    else:
                        inputs, expected = samples.read(int(row[start]) // 100)
                        assert row[start:end].tolist() == inputs.tolist()
                        assert targets[start:end].tolist() == expected.tolist()


def wasted(batches):
    """The share of padding in an epoch's whole steps: of inputs without a token (ids begin at 1)."""
    steps = range(max(1, batches.rows_per_epoch // batches.rows_per_step))
    inputs = torch.cat([x.flatten() for step in steps for x, *_ in batches.batches(step)])
    return (inputs == 0).float().mean().item()


def test_packing_fits_and_wastes_less():
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = rng.integers(1, 33, size=rng.integers(1, 200))
        rows = pack(lengths, 32)
        assert sorted(itertools.chain.from_iterable(rows)) == list(range(len(lengths)))
        sums = [lengths[row].sum() for row in rows]
        assert max(sums) <= 32
        assert sum(total <= 16 for total in sums) <= 1          # two such rows would be one
    assert pack(np.array([5, 3, 4, 2, 2]), 8) == [[0, 1], [2, 3, 4]]        # best fit, by hand
    samples = some_samples(200)
    padded, packed = (wasted(SampleLoader(samples, BLOCK, 8 * BLOCK, 8, packing=packing))
                      for packing in (False, True))
    assert packed < 0.1
    everything = 1 - sum(samples.lengths) / (BLOCK * len(samples))      # padded to block_size
    assert packed < padded < 0.7 * everything           # rounding up to 16 of 48 is most of that


def gradients(model, batches, labels):
    model.zero_grad(set_to_none=True)
    total = 0.0
    for x, y, *positions in batches:
        _, nats = model(x, y, *positions, reduction="sum")
        (nats / labels).backward()
        total += nats.item() / labels
    return total, torch.cat([p.grad.flatten() for p in model.parameters()])


def test_gradients_do_not_depend_on_accumulation_ranks_padding_or_packing():
    samples = some_samples(16)
    samples.ids %= 97
    torch.manual_seed(1)
    model = GPT(GPTConfig(block_size=BLOCK, vocab_size=97, n_layer=2, n_head=2, n_embd=16))
    epoch = SampleLoader(samples, BLOCK, 16 * BLOCK, 16)        # one step is one epoch
    labels = epoch.labels(0)
    loss, expected = gradients(model, epoch.batches(0), labels)
    for world, micro_batch in ((1, 1), (1, 4), (2, 2), (4, 1)):
        found_loss, found = gradients(model, all_batches(samples, 0, world, micro_batch), labels)
        # float32 sums of 600 terms in another order: 1e-6 of the largest, with a margin
        assert found_loss == pytest.approx(loss, rel=1e-5)
        assert torch.allclose(found, expected, atol=1e-5 * expected.abs().max())
    packed = SampleLoader(samples, BLOCK, len(pack(samples.lengths, BLOCK)) * BLOCK, 99,
                          packing=True)
    assert packed.labels(0) == labels
    found_loss, found = gradients(model, packed.batches(0), labels)
    assert found_loss == pytest.approx(loss, rel=1e-5)
    assert torch.allclose(found, expected, atol=1e-5 * expected.abs().max())


def test_a_micro_batch_without_labels_adds_nothing_and_breaks_nothing():
    samples = some_samples(4)
    samples.ids %= 97
    start, end = samples.offsets[1:3]
    samples.labelled[start:end] = False
    samples = Samples(samples.ids, samples.labelled, samples.offsets, BLOCK)
    model = GPT(GPTConfig(block_size=BLOCK, vocab_size=97, n_layer=1, n_head=1, n_embd=8))
    loader = SampleLoader(samples, BLOCK, 4 * BLOCK, 1)
    batches = list(loader.batches(0))
    assert sum((y == IGNORE).all().item() for _, y in batches) == 1
    assert loader.labels(0) == sum((y != IGNORE).sum().item() for _, y in batches)
    loss, found = gradients(model, batches, loader.labels(0))
    rest = [batch for batch in batches if not (batch[1] == IGNORE).all()]
    expected_loss, expected = gradients(model, rest, loader.labels(0))
    assert loss == expected_loss and torch.equal(found, expected) and found.isfinite().all()


def test_validation_reads_every_sample_once_over_all_ranks():
    samples = some_samples(23)
    whole = pairs_of(samples.evaluation_batches(4))
    assert whole.total() == samples.label_counts.sum()
    shares = [pairs_of(samples.evaluation_batches(4, rank=rank, world=3)) for rank in range(3)]
    assert sum(shares, Counter()) == whole
    few = list(samples.evaluation_batches(4, limit=100))
    tokens = sum((x > 0).sum().item() for x, _ in few)
    assert 50 < tokens < 200
    assert few[0][0].shape[1] >= few[-1][0].shape[1]


def test_settings_that_cannot_serve_are_refused():
    samples = some_samples(20)
    with pytest.raises(ValueError, match="try batch_tokens="):
        SampleLoader(samples, BLOCK, 7 * BLOCK, 2)
    with pytest.raises(ValueError, match="block_size=16 is below the longest sample"):
        SampleLoader(samples, 16, 64, 2)
    with pytest.raises(ValueError, match="samples must be of 2 to"):
        Samples(np.zeros(1, np.int32), np.ones(1, bool), np.array([0, 1]), 8)

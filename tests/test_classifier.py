"""The classifier against pooling by hand, transformers, and its own rows alone."""
import pytest
import torch
from torch.nn import functional as F

from classifier import Classifier
from model import IGNORE, GPT, GPTConfig

LENGTHS = (5, 16, 1, 9)


def small(pooling="last", classes=3):
    torch.manual_seed(0)
    model = Classifier(GPT(GPTConfig(16, 50, 2, 2, 16)), classes, pooling).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 if p.dim() == 1 else 15)
    return model


def batch(pad=0):
    """Rows of several lengths, padded behind, each with its class at its last token."""
    idx, targets = torch.full((4, 16), pad), torch.full((4, 16), IGNORE)
    generator = torch.Generator().manual_seed(1)
    for row, length in enumerate(LENGTHS):
        idx[row, :length] = torch.randint(50, (length,), generator=generator)
        targets[row, length - 1] = row % 3
    return idx, targets


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_logits_are_the_head_on_the_last_or_the_mean_hidden_state_of_the_real_tokens(pooling):
    model, (idx, targets) = small(pooling), batch()
    logits, loss = model(idx, targets)
    for row, length in enumerate(LENGTHS):
        x = model.gpt.features(idx[row:row + 1, :length])[0]        # (length, C)
        vector = x[-1] if pooling == "last" else x.sum(0) / length
        torch.testing.assert_close(logits[row], model.head.weight @ vector, rtol=0, atol=1e-5)
        torch.testing.assert_close(model(idx[row:row + 1, :length])[0][0], logits[row],
                                   rtol=0, atol=1e-5)
    expected = F.cross_entropy(logits, torch.tensor([0, 1, 2, 0]))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(model(idx, targets, reduction="sum")[1], 4 * expected)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_padding_does_not_change_the_logits(pooling):
    model = small(pooling)
    assert torch.equal(model(*batch(pad=0))[0], model(*batch(pad=49))[0])


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_samples_in_one_row_are_classified_as_if_each_were_alone(pooling):
    model, (idx, targets) = small(pooling), batch()
    alone, _ = model(idx, targets)
    rows = [0, 2, 3]                                                # 5 + 1 + 9 tokens, one padded
    packed = torch.cat([idx[row, :LENGTHS[row]] for row in rows] + [torch.tensor([7])])[None]
    marks = torch.cat([targets[row, :LENGTHS[row]] for row in rows] + [torch.tensor([IGNORE])])
    positions = torch.cat([torch.arange(n) for n in (5, 1, 9, 1)])[None]
    found, loss = model(packed, marks[None], positions, reduction="sum")
    torch.testing.assert_close(found, alone[rows], rtol=0, atol=1e-5)
    torch.testing.assert_close(loss, F.cross_entropy(alone[rows], torch.tensor([0, 2, 0]),
                                                     reduction="sum"))


def test_the_last_token_gives_the_logits_of_transformers():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2ForSequenceClassification(transformers.GPT2Config(
        n_positions=16, vocab_size=50, n_layer=2, n_head=2, n_embd=16, num_labels=3,
        pad_token_id=49)).eval()
    model, (idx, targets) = small(), batch(pad=49)
    idx[idx == 49] = 48
    for row, length in enumerate(LENGTHS):
        idx[row, length:] = 49                          # they find the end by the padding
    state = {name: p.t() if name.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight")) else p
             for name, p in model.gpt.transformer.state_dict().items()}
    theirs.transformer.load_state_dict(state)
    theirs.score.weight.data.copy_(model.head.weight)
    with torch.no_grad():
        torch.testing.assert_close(model(idx, targets)[0], theirs(idx).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_eight_samples_are_learned_by_heart(pooling):
    torch.manual_seed(0)
    model = Classifier(GPT(GPTConfig(16, 50, 2, 2, 16)), 2, pooling)
    idx, targets = torch.randint(50, (8, 16)), torch.full((8, 16), IGNORE)
    targets[:, -1] = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        _, loss = model(idx, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.05
    assert torch.equal(model(idx)[0].argmax(1), targets[:, -1])


def test_a_batch_without_labels_has_loss_zero_and_gradients_of_zero():
    model = small()
    logits, loss = model(batch()[0], torch.full((4, 16), IGNORE))
    loss.backward()
    assert logits.shape == (0, 3) and loss == 0
    assert not any(p.grad.any() for p in model.parameters())


def test_its_state_goes_out_and_in():
    model, other = small(), Classifier(GPT(GPTConfig(16, 50, 2, 2, 16)), 3)
    idx, targets = batch()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(idx, targets)[0], model(idx, targets)[0])
    assert other.gpt.lm_head.weight is other.gpt.transformer.wte.weight
    assert model.num_params() == model.gpt.num_params() + 3 * 16
    model.recompute_activations = True
    assert model.gpt.recompute_activations


@pytest.mark.parametrize("settings,message", [
    (dict(classes=1), "classes=1 must be at least 2"),
    (dict(pooling="first"), "pooling='first' is unknown; choose last or mean")])
def test_a_wrong_setting_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Classifier(GPT(GPTConfig(16, 50, 1, 1, 8)), **settings)

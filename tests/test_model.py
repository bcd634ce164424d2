"""GPT-2 against its definition and against recorded activations."""
import base64
import json
import math

import pytest
import torch
from torch.nn import functional as F

import model as network
from fast.decoding import compile_blocks
from fast.linear import use_fast_products
from model import GPT, IGNORE, SIZES, GPTConfig, sample_token
from run.classifier import Classifier

TINY = GPTConfig(block_size=16, vocab_size=61, n_layer=3, n_head=4, n_embd=32)


def tiny(**changes):
    torch.manual_seed(1)
    return GPT(GPTConfig(**{**vars(TINY), **changes})).eval()


def randomised(model, std=0.1):
    """Larger random weights, biases and gains, so that nothing hides behind zeros and ones."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(std * torch.randn_like(p))
    return model


@pytest.mark.parametrize("name,count", [("gpt2", 124_439_808), ("gpt2-medium", 354_823_168),
                                        ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)])
def test_parameter_counts_are_those_of_gpt2(name, count):
    with torch.device("meta"):
        assert GPT(GPTConfig(**SIZES[name])).num_params() == count
        assert GPT(GPTConfig(**SIZES[name], vocab_multiple=128)).num_params() == count


def test_embedding_and_head_are_one_tensor():
    model = tiny()
    assert model.lm_head.weight is model.transformer.wte.weight


def test_init_has_gpt2s_standard_deviations():
    model = GPT(GPTConfig(block_size=64, vocab_size=500, n_layer=8, n_head=4, n_embd=128))
    for name, p in model.named_parameters():
        if p.dim() == 2:                # the smallest holds 8,192 numbers: 3% is four deviations
            expected = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
            assert p.std().item() == pytest.approx(expected, rel=0.03), name
        else:
            assert torch.all(p == (1 if "ln_" in name and name.endswith("weight") else 0)), name


def test_loss_at_init_is_near_the_log_of_the_vocabulary():
    model = tiny(vocab_size=1000)
    idx = torch.randint(1000, (8, 17))
    _, loss = model(idx[:, :-1], idx[:, 1:])
    assert loss.item() == pytest.approx(math.log(1000), abs=0.05)


def test_a_token_sees_nothing_after_it():
    model = randomised(tiny())
    idx = torch.randint(61, (2, 16))
    changed = idx.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 61
    before, after = model(idx)[0], model(changed)[0]
    torch.testing.assert_close(before[:, :9], after[:, :9], rtol=0, atol=1e-6)
    assert not torch.allclose(before[:, 9], after[:, 9], atol=1e-3)


@pytest.mark.parametrize("changes", [{}, {"bias": False}, {"vocab_multiple": 64}])
def test_forward_equals_the_formulas_written_out(changes):
    """Attention as a softmax over a masked matrix, LayerNorm and GELU by their definitions."""
    model = randomised(tiny(**changes))
    w = {name: p.detach() for name, p in model.named_parameters()}
    idx = torch.randint(61, (2, 11))

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * w[name + ".weight"] + w.get(name + ".bias", 0)

    def linear(x, name):
        return x @ w[name + ".weight"].T + w.get(name + ".bias", 0)

    x = w["transformer.wte.weight"][idx] + w["transformer.wpe.weight"][:11]
    for i in range(3):
        h = f"transformer.h.{i}."
        q, k, v = linear(norm(x, h + "ln_1"), h + "attn.c_attn").split(32, -1)
        heads = []
        for j in range(4):
            part = slice(8 * j, 8 * j + 8)
            score = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(8)
            score = score.masked_fill(torch.ones(11, 11).triu(1).bool(), -math.inf)
            heads.append(score.softmax(-1) @ v[..., part])
        x = x + linear(torch.cat(heads, -1), h + "attn.c_proj")
        y = linear(norm(x, h + "ln_2"), h + "mlp.c_fc")
        y = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
        x = x + linear(y, h + "mlp.c_proj")
    expected = norm(x, "transformer.ln_f") @ w["transformer.wte.weight"][:61].T
    # float32 sums in another order: 1e-4 on logits of size 10
    torch.testing.assert_close(model(idx)[0], expected, rtol=0, atol=1e-4)
    targets = torch.randint(61, (2, 11))
    loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model(idx, targets)[1], loss, rtol=1e-5, atol=0)


def test_ignored_targets_count_for_nothing():
    model = randomised(tiny())
    idx, targets = torch.randint(61, (2, 8)), torch.randint(61, (2, 8))
    targets[0, :5] = IGNORE
    logits = model(idx)[0]
    kept = targets != IGNORE
    expected = F.cross_entropy(logits[kept], targets[kept])
    torch.testing.assert_close(model(idx, targets)[1], expected)
    torch.testing.assert_close(model(idx, targets, reduction="sum")[1], expected * kept.sum())


def test_a_batch_without_labels_has_loss_zero_and_gradient_zero():
    model = randomised(tiny())
    _, loss = model(torch.randint(61, (2, 8)), torch.full((2, 8), IGNORE))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("network", [tiny(), Classifier(tiny(), 2)])
def test_a_reduction_that_there_is_not_is_refused(network):
    """PyTorch has "none", a loss for each token, of which a sum would be taken for the loss."""
    idx = torch.zeros(1, 8, dtype=torch.long)
    with pytest.raises(ValueError, match="reduction='none' is unknown; choose mean or sum"):
        network(idx, idx, reduction="none")


def test_padded_ids_are_neither_scored_nor_sampled():
    plain, padded = tiny(), tiny(vocab_multiple=64)
    state = plain.state_dict()
    with torch.no_grad():
        for name, p in padded.state_dict().items():
            p[:len(state[name])] = state[name]
        padded.transformer.wte.weight[61:] = 50.0       # would win every argmax and every softmax
    idx, targets = torch.randint(61, (2, 8)), torch.randint(61, (2, 8))
    assert padded(idx)[0].shape == (2, 8, 61)
    torch.testing.assert_close(padded(idx)[0], plain(idx)[0])
    torch.testing.assert_close(padded(idx, targets)[1], plain(idx, targets)[1])
    assert padded.generate(idx, 30, temperature=5.0).max() < 61


def test_recomputed_activations_give_the_same_gradients():
    plain, recomputed = tiny(dropout=0.1).train(), tiny(dropout=0.1).train()
    recomputed.recompute_activations = True
    idx = torch.randint(61, (2, 16))
    for model in (plain, recomputed):
        torch.manual_seed(3)                            # the same dropout
        model(idx, idx)[1].backward()
    for (name, p), q in zip(plain.named_parameters(), recomputed.parameters()):
        torch.testing.assert_close(p.grad, q.grad, msg=name)


# ---- generation

def test_greedy_with_cache_equals_greedy_without_also_beyond_the_context():
    model = randomised(tiny())
    idx = torch.randint(61, (3, 5))
    expected = idx
    for _ in range(30):                                 # 5 + 30 tokens, block_size is 16
        logits = model(expected[:, -16:])[0][:, -1]
        expected = torch.cat([expected, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(model.generate(idx, 30, temperature=0), expected)


@pytest.mark.parametrize("rows,lower", [
    pytest.param(rows, lower, id=f"{rows}-{'autocast' if lower else 'float32'}",
                 marks=[pytest.mark.slow] * ((rows, lower) != (1, False)))      # compiles C++
    for rows in (1, 3) for lower in (False, True)])
def test_compiled_generation_equals_uncompiled_with_a_graph_for_each_kind_of_pass(rows, lower):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = use_fast_products(randomised(tiny(block_size=32, n_layer=3)))  # as sample.py does
    idx = torch.randint(61, (rows, 5))
    plain = model.generate(idx, 20, temperature=0)

    def by_token():
        cache = model.new_cache(rows)
        return torch.stack([model.next_logits(part, cache) for part in idx.split(1, dim=1)])

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=lower):
        expected = by_token()
        compile_blocks(model)
        found = by_token()
    # In bfloat16 the products of one row are more exact compiled than not: 8 bits, three layers.
    torch.testing.assert_close(found, expected, rtol=0, atol=0.1 if lower else 1e-4)
    if not lower:
        assert torch.equal(model.generate(idx, 20, temperature=0), plain)
    # A block for the prompt, the first token, the others; the head: however many tokens and layers.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6


@pytest.mark.parametrize("cuts", [[1] * 16, [5, 1, 7, 3], [16], [1, 15]])
def test_cached_logits_equal_those_of_the_full_forward_at_every_position(cuts):
    model = randomised(tiny())
    idx = torch.randint(61, (2, 16))
    cache = model.new_cache(2)
    parts = [model(part, cache=cache)[0] for part in idx.split(cuts, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(idx)[0], rtol=0, atol=1e-4)


def test_rows_of_a_batch_do_not_touch_each_other():
    model = randomised(tiny())
    idx = torch.randint(61, (4, 6))
    together = model.generate(idx, 20, temperature=0)
    for row in range(4):
        assert torch.equal(model.generate(idx[row:row + 1], 20, temperature=0)[0], together[row])


@pytest.mark.parametrize("asked", [1, 4, 16])
def test_each_row_ends_at_its_first_stop_id(asked, monkeypatch):
    monkeypatch.setitem(network.STOPS_ASKED, "cpu", asked)
    model = randomised(tiny())
    idx = torch.randint(61, (4, 6))
    free = model.generate(idx, 20, temperature=0)
    stop = free[0, 9].item()
    stopped = model.generate(idx, 20, temperature=0, stop_ids=[stop])
    for row in range(4):
        new = free[row, 6:].tolist()
        end = new.index(stop) + 1 if stop in new else len(new)
        expected = (new[:end] + [stop] * 20)[:stopped.size(1) - 6] if stop in new else new
        assert stopped[row, 6:].tolist() == expected
    first = free[0, 6:].tolist().index(stop)            # columns after the last end are left out
    assert model.generate(idx[:1], 20, temperature=0, stop_ids=[stop]).size(1) == 6 + first + 1


def test_generation_repeats_with_its_generator_and_leaves_the_mode_alone():
    model = tiny().train()
    idx = torch.randint(61, (2, 3))
    a, b = (model.generate(idx, 20, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(a, b) and model.training and a.shape == (2, 23)


def test_sampling_draws_from_the_distribution_that_its_settings_describe():
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    def share(**settings):
        torch.manual_seed(0)
        drawn = sample_token(logits.expand(20000, 4), **settings)
        return torch.bincount(drawn, minlength=4) / 20000
    # 20,000 draws: the standard deviation of a share is at most 0.0036
    p = logits[0].softmax(-1)
    torch.testing.assert_close(share(), p, rtol=0, atol=0.015)
    torch.testing.assert_close(share(temperature=2.0), (logits[0] / 2).softmax(-1),
                               rtol=0, atol=0.015)
    torch.testing.assert_close(share(top_k=2), torch.tensor([p[0], p[1], 0, 0]) / p[:2].sum(),
                               rtol=0, atol=0.015)
    # p = .644 .237 .087 .032: the first two reach 0.7
    torch.testing.assert_close(share(top_p=0.7), share(top_k=2), rtol=0, atol=0.015)
    assert share(top_p=0.5).tolist() == share(top_k=1).tolist() == [1, 0, 0, 0]
    assert torch.equal(share(top_k=0), share())         # as in sample.py


@pytest.mark.parametrize("settings,message", [
    (dict(n_embd=770), "n_embd=770 is not divisible by n_head=12; try 768"),
    (dict(n_layer=0), "n_layer=0 must be at least 1"),
    (dict(dropout=1.0), "dropout=1.0 is not in"),
])
def test_a_wrong_shape_is_refused_with_the_fix(settings, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**settings)


def test_a_sequence_longer_than_the_context_is_refused():
    with pytest.raises(ValueError, match="17 tokens is longer than block_size=16"):
        tiny()(torch.zeros(1, 17, dtype=torch.long))


def test_recorded_activations_of_a_trained_gpt_are_reproduced(shared):
    """llm-viz's sorting GPT: every block's output and the logits, as its author recorded them."""
    def tensors(name):
        stored = json.loads((shared / "gpt_nano_sort" / f"gpt-nano-sort-{name}.json").read_text())
        return {key: torch.frombuffer(bytearray(base64.b64decode(entry["data"])),
                                      dtype=torch.float32).view(entry["shape"])
                for key, entry in stored.items() if key != "config"}
    weights, recorded = tensors("model"), tensors("t0-partials")
    model = GPT(GPTConfig(block_size=11, vocab_size=3, n_layer=3, n_head=3, n_embd=48)).eval()
    model.lm_head.weight = torch.nn.Parameter(torch.empty(3, 48))       # its head is not tied
    model.load_state_dict({name: w for name, w in weights.items()
                           if not name.endswith(".attn.bias")})         # the causal mask
    outputs = {}
    for i, block in enumerate(model.transformer.h):
        block.register_forward_hook(
            lambda module, args, out, name=f"block{i}": outputs.update({name: out}))
    model.transformer.ln_f.register_forward_hook(lambda module, args, out: outputs.update(ln_f=out))
    with torch.no_grad():
        outputs["lm_head"] = model(recorded["idx"].long())[0]
    for name, out in outputs.items():
        torch.testing.assert_close(out, recorded[name], rtol=0, atol=1e-5, msg=name)
    assert len(outputs) == 5


def test_samples_in_one_row_are_computed_as_if_each_were_alone():
    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=8))
    lengths = (5, 1, 7)
    idx = torch.randint(50, (2, sum(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
    together, _ = model(idx, positions=positions)
    alone = torch.cat([model(part)[0] for part in idx.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)  # float32, another order of sums

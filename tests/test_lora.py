"""LoRA: counts, starts, gradients, merging, several adapters, and what is refused.

Files and PEFT are in test_lora_files.py.
"""
import copy
import dataclasses
import gc
import json
import math
import re

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lora
from fast.nf4 import NF4Linear, nf4_rounded
from lora import (LoRAConfig, adapted_layers, add_lora, base_parameters, describe, disable_lora,
                  initial_factors, merge_lora, merged_weight, row_lengths, set_adapter, unload_lora,
                  unmerge_lora, weight_of)
from model import GPT, IGNORE, GPTConfig
from optim import OptimConfig, make_optimizer
from run.checkpoint import load_trainable_state, trainable_state
from run.classifier import Classifier
from run.config import build, parse
from run.plan import first_step

SHAPE = GPTConfig(block_size=16, vocab_size=53, n_layer=3, n_head=2, n_embd=32)
VARIANTS = {
    "lora": {}, "rslora": dict(use_rslora=True), "dora": dict(use_dora=True),
    "gaussian": dict(init="gaussian"), "pissa": dict(init="pissa"), "olora": dict(init="olora"),
    "pissa dora": dict(init="pissa", use_dora=True),
    "parts": dict(target_modules=("c_attn.q", "c_attn.v")),
    "parts dora": dict(target_modules=("c_attn.q", "c_attn.v"), use_dora=True),
    "all": dict(target_modules="all-linear", bias="all", modules_to_save=("ln_f",)),
    "tied": dict(modules_to_save=("wte",)),
}
QUANTISED = {
    "qlora": dict(quantize="nf4"), "qdora": dict(quantize="nf4", use_dora=True),
    "qpissa": dict(quantize="nf4", init="pissa"), "loftq": dict(quantize="nf4", init="loftq"),
    "qpissa dora": dict(quantize="nf4", init="pissa", use_dora=True),
}


def gpt(seed=0, shape=SHAPE):
    torch.manual_seed(seed)
    return GPT(shape)


def ids(seed=0):
    return torch.randint(SHAPE.vocab_size, (2, 16), generator=torch.Generator().manual_seed(seed))


def shake(model, size=0.05, seed=1):
    """Move everything that trains, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.data += size * torch.randn(p.shape, generator=generator)
    return model


def logits(model):
    return model(ids())[0].detach()


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


# ------------------------------------------------------------------------------------------------
# Sizes and starts

@pytest.mark.parametrize("classes", [0, 3])
@pytest.mark.parametrize("adapted", [False, True])
def test_operations_are_those_that_pytorch_counts(classes, adapted):
    """To 10%: PyTorch counts no attention on a CPU, 2% here, and the first c_attn, whose input
    needs no gradient, 3% of what is left where weights are frozen; at 6 for each it would be 34%.
    """
    model = gpt(shape=GPTConfig(8, 256, n_layer=3, n_head=2, n_embd=64, bias=False))
    model = Classifier(model, classes) if classes else model
    if adapted:
        add_lora(model, LoRAConfig(r=2, target_modules=("all-linear",), modules_to_save=(
            "head",) * bool(classes)), quiet=True)
    idx = torch.randint(256, (4, 8))
    targets = torch.cat([torch.full((4, 7), IGNORE), idx[:, :1] % 3], 1) if classes else idx
    with FlopCounterMode(display=False) as counter:
        model(idx, targets)[1].backward()
    assert counter.get_total_flops() == pytest.approx(32 * model.flops_per_token(), rel=0.1)


@pytest.mark.parametrize("r,count", [(1, 172_032), (2, 270_336), (4, 466_944), (8, 860_160),
                                     (16, 1_646_592)])
def test_counts_of_the_published_study_on_gpt2_medium(r, count):
    with torch.device("meta"):
        model = GPT(GPTConfig(n_layer=24, n_head=16, n_embd=1024))
    add_lora(model, LoRAConfig(r=r, target_modules=("c_attn",), bias="lora_only"))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    assert f"trainable {count:,} of" in describe(model)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_starts_bit_identical_to_its_base(variant, dtype):
    model = gpt()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        before = logits(model)
        add_lora(model, LoRAConfig(r=4, dropout=0.5, **VARIANTS[variant]))
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("variant", QUANTISED)
def test_a_quantised_model_starts_as_its_dequantised_base(variant):
    """Merged or not, the start is W as NF4 holds it; float32 rounding of a few sums apart."""
    model = add_lora(gpt(), LoRAConfig(r=4, **QUANTISED[variant]))
    start = logits(model)
    with disable_lora(model):
        torch.testing.assert_close(logits(model), start, rtol=1e-5, atol=1e-6)
    plain = gpt()
    for name, layer in model.named_modules():
        if isinstance(layer, NF4Linear):
            where = name.replace(".base_layer", "")
            plain.get_submodule(where).weight.data = layer.dequantize()
    torch.testing.assert_close(logits(plain), start, rtol=1e-5, atol=1e-6)
    assert (logits(gpt()) - start).abs().max() > 1e-3               # NF4 is not for free


@pytest.mark.parametrize("variant", VARIANTS)
def test_disabling_gives_back_the_original_model(variant):
    before = logits(gpt())
    model = shake(add_lora(gpt(), LoRAConfig(r=4, **VARIANTS[variant])))
    after = logits(model)
    assert (after - before).abs().max() > 1e-3
    with disable_lora(model):
        assert torch.equal(logits(model), before)
        assert all(".lora_adapters." in name for name in trainable(model))      # it is frozen
    assert torch.equal(logits(model), after)
    assert torch.equal(logits(unload_lora(model)), before)
    assert list(model.state_dict()) == list(gpt().state_dict())


def test_adapters_are_the_same_for_the_same_seed():
    states = []
    for seed in (3, 3, 4):
        model = gpt()
        torch.manual_seed(seed)
        states.append(trainable_state(add_lora(model, LoRAConfig())))
    first, second, third = states
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], third[key]) for key in first)


# ------------------------------------------------------------------------------------------------
# Forward, against the formulas

def direct(x, W, b, part, config):
    """h = m (W + s B A) / |W + s B A| x + b, with B A - B0 A0 for B A where it starts elsewhere."""
    BA = part.lora_B @ part.lora_A
    if hasattr(part, "initial_A"):
        BA = BA - part.initial_B @ part.initial_A
    W = W + part.scale * BA
    if config.use_dora:
        W = part.lora_magnitude[:, None] * W / W.norm(dim=1, keepdim=True).detach()
    return x @ W.t() + b


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora", "pissa", "olora", "pissa dora"])
def test_a_layer_and_its_gradients_equal_the_direct_formula(variant):
    config = LoRAConfig(r=3, alpha=5, target_modules=("0",), **VARIANTS[variant])
    model = nn.Sequential(nn.Linear(10, 7))
    W, b = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    shake(add_lora(model, config), 0.3)
    part = model[0].lora_adapters["default"]["whole"]
    assert part.scale == (5 / math.sqrt(3) if config.use_rslora else 5 / 3)
    x = torch.randn(4, 6, 10, requires_grad=True)
    weight, wanted = torch.randn(4, 6, 7), [x, *(p for p in part.parameters())]
    results = []
    for out in (model(x), direct(x, W, b, part, config)):
        results.append([out, *torch.autograd.grad((out * weight).sum(), wanted)])
    assert len(results[0]) == (5 if config.use_dora else 4)
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)      # other orders of summation


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_doras_norm_without_forming_the_product_equals_the_direct_one(init):
    model = nn.Sequential(nn.Linear(40, 24))
    shake(add_lora(model, LoRAConfig(r=4, target_modules=("0",), use_dora=True, init=init)), 0.5)
    layer = model[0]
    part = layer.lora_adapters["default"]["whole"]
    A, B = lora.factors(part)
    expected = (layer.base_layer.weight + part.scale * B @ A).norm(dim=1)
    torch.testing.assert_close(row_lengths(part, layer.base_layer), expected, rtol=1e-5, atol=0)


def test_dropout_acts_on_the_adapter_only_and_only_in_training():
    model = nn.Sequential(nn.Linear(8, 8))
    shake(add_lora(model, LoRAConfig(r=2, target_modules=("0",), dropout=0.5)))
    x = torch.ones(4000, 8)
    with disable_lora(model):
        base = model(x)
    clean, noisy = model.eval()(x), model.train()(x)
    assert torch.equal(clean, model.eval()(x)) and not torch.equal(clean, noisy)
    change, expected = (noisy - base).mean(dim=0), (clean - base)[0]
    torch.testing.assert_close(change, expected, rtol=0, atol=0.05)     # mean of 4000 rows


def test_a_part_of_c_attn_changes_its_third_alone():
    model = shake(add_lora(gpt(), LoRAConfig(r=4, target_modules=("c_attn.q", "c_attn.v"))))
    layer, C = model.transformer.h[0].attn.c_attn, SHAPE.n_embd
    x = torch.randn(5, C)
    change = (layer(x) - layer.base_layer(x)).split(C, dim=1)
    assert change[0].abs().min() > 0 and change[2].abs().min() > 0
    assert torch.equal(change[1], torch.zeros(5, C))
    assert {len(part.lora_B) for part in layer.lora_adapters["default"].values()} == {C}


# ------------------------------------------------------------------------------------------------
# Inits

def factors(W, r, scale, init):
    linear = nn.Linear(W.size(1), W.size(0))
    linear.weight.data.copy_(W)
    A, B = initial_factors(linear, slice(None), r, scale, init)
    return A, torch.zeros(len(W), r) if B is None else B


def test_pissa_takes_the_largest_singular_values_and_olora_the_first_directions():
    W = torch.randn(12, 20)
    A, B = factors(W, 3, 2.0, "pissa")
    S = torch.linalg.svdvals(W)
    torch.testing.assert_close(torch.linalg.svdvals(2.0 * B @ A)[:3], S[:3], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((W - 2.0 * B @ A).norm(), S[3:].norm(), rtol=1e-4, atol=1e-4)
    A, B = factors(W, 3, 2.0, "olora")
    torch.testing.assert_close(B.t() @ B, torch.eye(3), rtol=0, atol=1e-5)
    # the first 3 columns of W are combinations of B's columns
    torch.testing.assert_close(B @ A[:, :3], W[:, :3], rtol=1e-4, atol=1e-4)


def test_random_inits_have_their_spread():
    W = torch.empty(5, 400)
    A, B = factors(W, 50, 1.0, "kaiming")
    assert A.abs().max() <= 1 / 20 and A.std().item() == pytest.approx(1 / 20 / 3**0.5, rel=0.02)
    assert not B.any() and B.shape == (5, 50)
    A, B = factors(W, 50, 1.0, "gaussian")
    assert A.std().item() == pytest.approx(1 / 50, rel=0.02) and not B.any()


def test_loftq_and_qpissa_lose_less_than_plain_quantisation():
    W = torch.randn(64, 96) @ torch.diag(torch.linspace(0, 2, 96))
    plain = (W - nf4_rounded(W)).norm()
    errors = {}
    for init in ("pissa", "loftq"):
        A, B = factors(W, 8, 1.0, init)
        errors[init] = (W - nf4_rounded(W - B @ A) - B @ A).norm()
    assert errors["loftq"] < errors["pissa"] < plain


def test_with_nf4_what_the_adapter_starts_with_is_not_quantised():
    """PiSSA on one large direction and small noise: NF4 has only the noise to lose. LoftQ on
    columns of growing size."""
    large = 1 + 0.05 * torch.randn(64, 64)
    growing = torch.randn(64, 64) * torch.linspace(0, 2, 64)
    for init, W, share in (("pissa", large, 0.5), ("loftq", growing, 0.9)):
        errors = {}
        for name in ("kaiming", init):
            model = nn.Sequential(nn.Linear(64, 64))
            model[0].weight.data.copy_(W)
            add_lora(model, LoRAConfig(r=8, target_modules=("0",), init=name, quantize="nf4"))
            errors[name] = ((model[0].base_layer.dequantize() - W).norm() / W.norm()).item()
        assert errors[init] < share * errors["kaiming"], errors


# ------------------------------------------------------------------------------------------------
# Training

@pytest.mark.parametrize("variant", [*VARIANTS, *QUANTISED])
@pytest.mark.parametrize("recompute", [False, True])
def test_every_b_moves_in_the_first_step_and_nothing_frozen_does(variant, recompute):
    model = add_lora(gpt(), LoRAConfig(r=4, **{**VARIANTS, **QUANTISED}[variant]))
    model.recompute_activations = recompute
    before = copy.deepcopy(model.state_dict())
    train = trainable(model)
    other_name = {"lm_head.weight"} if "transformer.wte.weight" in train else set()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        model.train()(ids(), ids(1))[1].backward()
    optimizer.step()
    moved = {key for key, value in model.state_dict().items()
             if not torch.equal(value, before[key])} - other_name
    assert {name for name in train if name.endswith("lora_B")} <= moved <= train
    assert any(name.endswith("lora_B") for name in moved)


def test_recomputed_activations_give_the_same_gradients():
    grads = []
    for recompute in (False, True):
        model = shake(add_lora(gpt(), LoRAConfig(r=4, dropout=0.3, use_dora=True)))
        model.recompute_activations = recompute
        torch.manual_seed(5)
        model(ids(), ids(1))[1].backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("variant", ["lora", "dora", "pissa", "parts dora", "qlora", "qdora"])
def test_a_layer_compiles_whole_and_training_does_not_recompile(variant):
    model = add_lora(gpt(), LoRAConfig(r=4, dropout=0.1, **{**VARIANTS, **QUANTISED}[variant]))
    layer = model.transformer.h[0].attn.c_attn
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=False)
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
    x = torch.randn(2, 16, SHAPE.n_embd)
    for _ in range(3):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            out = compiled(x)
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(out, layer(x))
        out.float().square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(graphs) == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("variant", [*VARIANTS, *QUANTISED])
def test_a_checkpoint_holds_the_adapter_alone_and_rebuilds_the_model(variant):
    config = LoRAConfig(r=4, **{**VARIANTS, **QUANTISED}[variant])
    model = shake(add_lora(gpt(), config))
    state = {key: tensor.clone() for key, tensor in trainable_state(model).items()}
    assert {key for key in state if key.endswith(("wte.weight", "wpe.weight", "lm_head.weight"))
            } == ({"transformer.wte.weight"} if variant == "tied" else set())
    torch.manual_seed(99)
    other = add_lora(gpt(), config)
    load_trainable_state(other, state)
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("variant", ["qpissa", "qpissa dora", "loftq"])
def test_a_checkpoint_does_not_rely_on_the_same_decomposition(variant, monkeypatch):
    """Another machine's SVD may differ, and with it the codes of what is left."""
    config = LoRAConfig(r=4, **QUANTISED[variant])
    model = shake(add_lora(gpt(), config))
    state = {key: tensor.clone() for key, tensor in trainable_state(model).items()}

    def other_svd(weight, r, scale):
        return torch.randn(r, weight.size(1)), torch.randn(weight.size(0), r)

    monkeypatch.setattr(lora, "largest_directions", other_svd)
    other = add_lora(gpt(), config)
    assert not torch.equal(logits(other), logits(model))
    load_trainable_state(other, state)
    assert torch.equal(logits(other), logits(model))


def test_a_checkpoint_of_other_settings_is_refused():
    state = trainable_state(add_lora(gpt(), LoRAConfig(r=4)))
    for other, words in ((LoRAConfig(r=2), "(4, 32)"),
                         (LoRAConfig(r=4, use_dora=True), "magnitude"),
                         (LoRAConfig(r=4, layers=(0,)), "has no tensor")):
        with pytest.raises(ValueError, match="other model or lora settings") as error:
            load_trainable_state(add_lora(gpt(), other), state)
        assert words in str(error.value)


@pytest.mark.parametrize("variant", ["lora", "dora", "all", "qpissa"])
def test_ddp_finds_every_trainable_parameter_used(variant, tmp_path):
    """With an unused one, DDP refuses the second step."""
    model = shake(add_lora(gpt(), LoRAConfig(r=4, **{**VARIANTS, **QUANTISED}[variant])))
    model(ids(), ids(1))[1].backward()
    expected = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        network = torch.nn.parallel.DistributedDataParallel(model)
        for _ in range(2):
            model.zero_grad()
            network(ids(), ids(1))[1].backward()
        found = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(torch.equal(a, b) for a, b in zip(expected, found))
        del network
    finally:
        gc.collect()                    # DDP in a reference cycle would hold the group
        torch.distributed.destroy_process_group()


def test_a_copied_model_has_adapters_of_its_own():
    model = add_lora(gpt(), LoRAConfig(r=4, bias="all"))
    other = copy.deepcopy(model)
    shake(other)
    assert torch.equal(logits(model), logits(gpt()))
    with disable_lora(other):
        assert torch.equal(logits(other), logits(gpt()))


def test_settings_come_back_from_json_and_from_the_command_line():
    config = LoRAConfig(r=4, layers=(0, 1), rank_pattern={"c_fc": 2, "h.1.attn.c_attn": 3},
                        alpha_pattern={"c_fc": 1.5}, target_modules=("c_attn", "c_fc"))
    assert build(LoRAConfig, json.loads(json.dumps(dataclasses.asdict(config)))) == config
    assert parse(LoRAConfig, ["--r=4", "--layers=0,1", "--rank_pattern=c_fc:2,h.1.attn.c_attn:3",
                              "--alpha_pattern=c_fc:1.5", "--target_modules=c_attn,c_fc"],
                 "test") == config


# ------------------------------------------------------------------------------------------------
# Merging

@pytest.mark.parametrize("variant", [*VARIANTS, *QUANTISED])
def test_merged_weights_compute_the_same_and_unmerging_restores_every_bit(variant, capsys):
    model = shake(add_lora(gpt(), LoRAConfig(r=4, **{**VARIANTS, **QUANTISED}[variant])))
    before, after = copy.deepcopy(model.state_dict()), logits(model)
    difference = merge_lora(model, ids())
    # float32 sums in another order
    torch.testing.assert_close(logits(model), after, rtol=1e-4, atol=1e-5)
    printed = capsys.readouterr().out
    assert f"logits differ by at most {difference:.3g}" in printed
    assert ("dequantised" in printed) == (variant in QUANTISED)
    unmerge_lora(model)
    state = model.state_dict()
    assert list(state) == list(before) and all(torch.equal(state[k], before[k]) for k in state)
    assert torch.equal(logits(model), after)


def test_merging_adds_in_float32_and_rounds_once():
    model = nn.Sequential(nn.Linear(16, 16)).bfloat16()
    W = model[0].weight.detach().clone()
    shake(add_lora(model, LoRAConfig(r=2, alpha=0.02, target_modules=("0",))), 0.3)
    part = model[0].lora_adapters["default"]["whole"]
    exact = W.float() + part.scale * part.lora_B @ part.lora_A
    rounding = merge_lora(model)
    assert torch.equal(model[0].lora_merged.weight, exact.bfloat16())
    assert rounding == (exact.bfloat16().float() - exact).abs().max().item() > 0


def test_train_and_eval_merge_nothing_and_a_merged_model_refuses_to_switch():
    model = shake(add_lora(gpt(), LoRAConfig()))
    weight = model.transformer.h[0].attn.c_attn.base_layer.weight
    before = weight.clone()
    model.eval()
    model.train()
    assert torch.equal(model.transformer.h[0].attn.c_attn.base_layer.weight, before)
    merge_lora(model)
    merged = logits(model)
    model.eval()
    model.train()
    assert torch.equal(logits(model), merged)
    for refused in (merge_lora, lambda model: set_adapter(model, "default"),
                    lambda model: disable_lora(model).__enter__(),
                    lambda model: add_lora(model, LoRAConfig(), "other")):
        with pytest.raises(ValueError, match="unmerge_lora"):
            refused(model)
    unmerge_lora(model)
    with pytest.raises(ValueError, match="no adapter is merged"):
        unmerge_lora(model)


@pytest.mark.parametrize("config", [LoRAConfig(r=4, bias="all", use_dora=True),
                                    LoRAConfig(r=4, quantize="nf4")])
def test_a_merged_model_becomes_a_plain_one(config):
    """All of it: of a quantised one the layers without an adapter too."""
    model = shake(add_lora(gpt(), config))
    after = logits(model)
    merge_lora(model)
    plain = gpt(seed=5)
    plain.load_state_dict(unload_lora(model).state_dict())
    torch.testing.assert_close(logits(plain), after, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------
# Several adapters

def two_adapters():
    model = add_lora(gpt(), LoRAConfig(r=4, bias="lora_only"), "a")
    shake(model, seed=1)
    add_lora(model, LoRAConfig(r=2, target_modules=("c_fc", "c_attn"), modules_to_save=("ln_f",)),
             "b")
    return shake(model, seed=2)


def test_switching_computes_with_the_chosen_adapter_alone():
    model = two_adapters()
    in_b = logits(model)
    set_adapter(model, "a")
    in_a = logits(model)
    assert (in_a - in_b).abs().max() > 1e-3
    with disable_lora(model):
        assert torch.equal(logits(model), logits(gpt()))
    set_adapter(model, "b")
    assert torch.equal(logits(model), in_b)
    set_adapter(model, "a")
    assert torch.equal(logits(model), in_a)


def test_switching_leaves_no_stale_requires_grad():
    model = two_adapters()
    seen = {}
    for names, train in (("a", None), ("b", None), ("a", ()), (("a", "b"), None), ("b", "b"),
                         ("a", None)):
        set_adapter(model, names, train)
        seen[names, train] = trainable(model)
        wanted = names if train is None else train
        for name, p in model.named_parameters():
            for adapter in "ab":
                if f".lora_adapters.{adapter}." in name:
                    assert p.requires_grad == (adapter in wanted), (names, train, name)
    biases = {name for name in seen["a", None] if name.endswith("c_attn.base_layer.bias")}
    assert len(biases) == SHAPE.n_layer and not biases & seen["b", None]
    assert {"transformer.ln_f.weight", "transformer.ln_f.bias"} <= seen["b", None] - seen["a", None]
    assert not seen["a", ()]
    with disable_lora(model):           # the base's own biases stay frozen
        assert trainable(model) == seen["a", None] - biases
    assert trainable(model) == seen["a", None]


def test_a_share_that_is_no_number_is_refused_and_nothing_switched():
    model = two_adapters()
    before = model.adapters.active
    with pytest.raises(ValueError, match="the share of the adapter 'a' is nan; give a finite"):
        set_adapter(model, {"b": 1.0, "a": math.nan})
    assert model.adapters.active == before


def test_a_mixture_is_linear_in_weights_and_biases():
    model = two_adapters()
    weights = {}
    for names in ("a", "b", {"a": 0.3, "b": 0.7}):
        set_adapter(model, names)
        merge_lora(model)
        weights[str(names)] = {k: v.clone() for k, v in base_parameters(model).items()}
        weights[str(names)].update((f"{name}.weight", layer.lora_merged.weight) for name, layer
                                   in adapted_layers(model).items() if layer.lora_merged)
        unmerge_lora(model)
    base = dict(gpt().named_parameters())
    for key, mixed in weights["{'a': 0.3, 'b': 0.7}"].items():
        expected = base[key] + 0.3 * (weights["a"][key] - base[key]) \
            + 0.7 * (weights["b"][key] - base[key])
        torch.testing.assert_close(mixed, expected, rtol=1e-5, atol=1e-6)


def llama():
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=53, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
        tie_word_embeddings=False))


def test_all_linear_and_nf4_leave_out_a_head_that_is_not_tied():
    model = add_lora(llama(), LoRAConfig(target_modules="all-linear", quantize="nf4"))
    assert len(adapted_layers(model)) == 14 and isinstance(model.lm_head, nn.Linear)
    assert names(add_lora(llama(), LoRAConfig(target_modules=("lm_head",)))) == ["lm_head"]


def test_another_shape_of_model_llama_like():
    model = llama()
    before = model(ids()).logits
    add_lora(model, LoRAConfig(r=4, target_modules=(
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")))
    assert len(adapted_layers(model)) == 14
    assert torch.equal(model(ids()).logits, before)
    model(ids(), labels=ids()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    shake(model)
    after = model(ids()).logits
    merge_lora(model, ids())
    torch.testing.assert_close(unload_lora(model)(ids()).logits, after, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------
# Which layers, and what is refused

def names(model):
    return [name.removeprefix("transformer.") for name in adapted_layers(model)]


def test_targets_by_name_end_regex_and_all_linear():
    for target, expected in (
            ("transformer.h.1.attn.c_proj", ["h.1.attn.c_proj"]),
            ("mlp.c_proj", [f"h.{i}.mlp.c_proj" for i in range(3)]),
            (r".*h\.[02]\.attn\..*", [f"h.{i}.attn.{n}" for i in (0, 2)
                                      for n in ("c_attn", "c_proj")]),
            ("all-linear", [f"h.{i}.{n}" for i in range(3) for n in
                            ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")])):
        assert names(add_lora(gpt(), LoRAConfig(target_modules=target))) == expected
    model = add_lora(gpt(), LoRAConfig(target_modules=("c_attn", "c_fc"), layers=(1,)))
    assert names(model) == ["h.1.attn.c_attn", "h.1.mlp.c_fc"]


def test_what_matched_is_printed(capsys):
    add_lora(gpt(), LoRAConfig(target_modules="all-linear"))
    assert "3 x transformer.h.*.mlp.c_fc" in capsys.readouterr().out


def test_rank_and_alpha_patterns():
    model = add_lora(gpt(), LoRAConfig(r=4, alpha=8, target_modules=("c_attn", "c_fc"),
                                       rank_pattern={"c_fc": 2, r"h\.1\.attn\.c_attn": 6},
                                       alpha_pattern={"c_fc": 16}))
    found = {name: (len(part.lora_A), part.scale) for name, layer in adapted_layers(model).items()
             for part in layer.lora_adapters["default"].values()}
    assert found["transformer.h.0.mlp.c_fc"] == (2, 8.0)
    assert found["transformer.h.1.attn.c_attn"] == (6, 8 / 6)
    assert found["transformer.h.2.attn.c_attn"] == (4, 2.0)


@pytest.mark.parametrize("settings,words", [
    (dict(r=0), "lora.r=0 must be a whole number above 0; for full training, leave"),
    (dict(alpha=0), "lora.alpha=0 must be a finite number above 0; for full training, leave"),
    (dict(dropout=1.0), "lora.dropout=1.0 must be in [0, 1)"),
    (dict(init="pisa"), "lora.init='pisa' is unknown; choose kaiming"),
    (dict(quantize="int8"), "lora.quantize='int8' is unknown; choose none, nf4"),
    (dict(init="loftq"), "add lora.quantize=nf4"),
    (dict(rank_pattern={"c_attn": 0}), "lora.rank_pattern={'c_attn': 0} must be whole"),
    (dict(target_modules=("c_atn",)), "'c_atn' matches no linear layer; did you mean c_attn"),
    (dict(target_modules=("wpe",)), "'wpe' matches no linear layer; did you mean"),
    (dict(target_modules=("ln_1",)), "'ln_1' matches no linear layer"),
    (dict(target_modules=("lm_head",)), "lm_head shares its weight with transformer.wte"),
    (dict(target_modules=("wte",)), "'wte' matches no linear layer"),
    (dict(target_modules=("c_attn(",)), "neither a module nor a regular expression"),
    (dict(modules_to_save=("lm_head",)), "lm_head shares its weight with transformer.wte"),
    (dict(modules_to_save=("ln_9",)), "'ln_9' matches no module; did you mean ln_"),
    (dict(modules_to_save=("attn",)), "holds the adapted layer transformer.h.0.attn.c_attn"),
    (dict(layers=(7,)), "no target is in block 7"),
    (dict(layers=()), "layers=() choose no layer"), (dict(target_modules=()), "choose no layer"),
    (dict(rank_pattern={"c_fc": 2}), "lora.rank_pattern: 'c_fc' matches no adapted layer"),
    (dict(alpha_pattern={"q": 2.0}), "lora.alpha_pattern: 'q' matches no adapted layer"),
    (dict(init="pissa", r=64), "lora.r=64 is above the 32 directions"),
])
def test_bad_settings_are_refused_in_one_line_and_change_nothing(settings, words):
    model = gpt()
    with pytest.raises(ValueError) as error:
        add_lora(model, LoRAConfig(**settings))
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not adapted_layers(model) and all(p.requires_grad for p in model.parameters())


def test_a_packed_weight_takes_lora_but_no_variant_that_reads_it():
    class Packed(nn.Linear):
        """Like bitsandbytes' Linear4bit: a linear layer whose weight is a row of bytes."""
        def __init__(self, linear):
            super().__init__(linear.in_features, linear.out_features)
            self.inner = [linear]
            self.weight = nn.Parameter(torch.zeros(40, 1, dtype=torch.uint8), requires_grad=False)

        def forward(self, x):
            return self.inner[0](x)

    for settings in (dict(use_dora=True), dict(init="pissa")):
        model = nn.Sequential(Packed(nn.Linear(8, 8)))
        with pytest.raises(ValueError, match="Packed with torch.uint8 weights cannot be read"):
            add_lora(model, LoRAConfig(target_modules=("0",), **settings))
    linear = nn.Linear(8, 8)
    model = add_lora(nn.Sequential(Packed(linear)), LoRAConfig(target_modules=("0",)))
    x = torch.randn(2, 8)
    assert torch.equal(model(x), linear(x))


def test_adapters_that_are_not_there_are_refused():
    model = gpt()
    with pytest.raises(ValueError, match="the model has no adapter"):
        set_adapter(model, "default")
    add_lora(model, LoRAConfig(use_dora=True))
    with pytest.raises(ValueError, match="there is no adapter 'other'; there are default"):
        set_adapter(model, "other")
    with pytest.raises(ValueError, match="there is an adapter 'default' already"):
        add_lora(model, LoRAConfig())
    with pytest.raises(ValueError, match="not linear in its factors"):
        set_adapter(model, {"default": 0.5})
    add_lora(model, LoRAConfig(), "b")
    with pytest.raises(ValueError, match="a run trains one adapter"):
        trainable_state(model)


def test_quantising_takes_all_linear_layers_but_the_head():
    model = add_lora(gpt(), LoRAConfig(quantize="nf4", modules_to_save=("h.1.mlp",)))
    packed = [name for name, module in model.named_modules() if isinstance(module, NF4Linear)]
    assert len(packed) == 4 * SHAPE.n_layer - 2 and not any("h.1.mlp" in name for name in packed)
    assert isinstance(model.lm_head, nn.Linear)
    assert weight_of(model.transformer.h[0].mlp.c_fc).shape == (128, 32)
    with pytest.raises(ValueError, match="the base has adapters already"):
        add_lora(add_lora(gpt(), LoRAConfig()), LoRAConfig(quantize="nf4"), "b")


def test_the_contract_is_importable_from_lora():
    for name in ("LoRAConfig", "add_lora", "merge_lora", "unmerge_lora", "save_lora", "load_lora",
                 "set_adapter", "disable_lora"):
        assert name in lora.__all__ and hasattr(lora, name)


@pytest.mark.parametrize("config", [LoRAConfig(r=8), LoRAConfig(r=8, use_rslora=True),
                                    LoRAConfig(r=4, init="pissa", target_modules=("c_fc",))])
def test_a_first_step_moves_the_weights_as_far_as_is_said_and_as_far_at_the_rates_that_are(
        config):
    """Means over random entries: 10% for signs that are shared, and for the two digits of rates."""
    def merged(layer):
        return merged_weight(layer.base_layer, layer.changes({"default": 1.0})).detach()

    def moved(config, rate):
        torch.manual_seed(0)
        model = GPT(GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=128))
        add_lora(model, config)
        said = first_step(model, config, rate)
        optimizer = make_optimizer(model, OptimConfig(), rate, weight_decay=0.0)
        layers = adapted_layers(model).values()
        before = [merged(layer) for layer in layers]
        idx = torch.randint(64, (4, 16))
        model(idx, idx)[1].backward()
        optimizer.step()
        found = [((merged(layer) - old).square().mean() / old.square().mean()).sqrt().item()
                 for old, layer in zip(before, layers)]
        return sum(found) / len(found), said

    size, said = moved(config, 1e-3)
    assert float(re.search(r"by ([\d.]+)% of", said)[1]) == pytest.approx(100 * size, rel=0.1)
    if config.init == "kaiming":
        r, wider, alpha, higher = map(float, re.search(
            r"as far at r=(\d+) with ([\d.e-]+), at alpha=(\d+) with ([\d.e-]+)$", said).groups())
        for other, rate in ((dict(r=int(r)), wider), (dict(alpha=alpha), higher)):
            found, _ = moved(dataclasses.replace(config, **other), rate)
            assert found == pytest.approx(size, rel=0.1)

"""Schedules and optimizer steps against hand-worked values; weight decay where it belongs."""
import io
import math
from typing import get_args, get_type_hints

import pytest
import torch
from torch.utils._pytree import tree_leaves

from lora import LoRAConfig, add_lora
from model import GPT, GPTConfig
from optim import (RULES, SCHEDULES, OptimConfig, adamw, five_steps, learning_rate, make_optimizer,
                   muon, parameter_groups, take_step)
from run.config import parse
from run.plan import optimizer_memory
from train import TrainConfig

SHAPE = GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=8)


@pytest.mark.parametrize("schedule,expected", [
    # 10 steps, 2 of warmup, peak 1, floor 0.2: steps 0, 1, 2, 4, 6 and 9; done is (step - 2) / 8
    ("cosine", [0.5, 1, 1, 0.2 + 0.4 * (1 + math.cos(math.pi / 4)), 0.6,
                0.2 + 0.4 * (1 + math.cos(math.pi * 7 / 8))]),
    ("linear", [0.5, 1, 1, 0.8, 0.6, 0.3]),
    ("constant", [0.5, 1, 1, 1, 1, 1]),
    ("wsd", [0.5, 1, 1, 1, 1, 0.2 + 0.8 * 0.125 / 0.5]),    # decays in the last half
    ("polynomial", [0.5, 1, 1, 0.2 + 0.8 * 0.75**2, 0.4, 0.2 + 0.8 * 0.125**2]),
    ("exponential", [0.5, 1, 1, 0.2 + 0.8 * 0.5, 0.2 + 0.8 * 0.25, 0.2 + 0.8 * 0.5 ** 3.5]),
])
def test_schedules_have_their_hand_worked_values(schedule, expected):
    config = OptimConfig(power=2.0, decay_share=0.5, decay_to=0.5 ** 4)     # halved each 2 steps
    found = [learning_rate(step, schedule, 10, 2, 1.0, 0.2, config) for step in (0, 1, 2, 4, 6, 9)]
    assert found == pytest.approx(expected)


def test_the_exponential_schedule_multiplies_by_one_factor_where_the_floor_is_0():
    rates = [learning_rate(step, "exponential", 8, 0, 1.0, 0.0) for step in range(8)]
    assert [b / a for a, b in zip(rates, rates[1:])] == pytest.approx(7 * [0.01 ** (1 / 8)])
    with pytest.raises(ValueError, match="optim.decay_to=0 is not in"):
        OptimConfig(decay_to=0)


def test_only_matrices_and_embeddings_decay_and_each_parameter_is_in_one_group():
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=2, n_head=2, n_embd=8))
    decayed, plain = parameter_groups(model, 0.1)
    assert {p.dim() for p in decayed["params"]} == {2} and decayed["weight_decay"] == 0.1
    assert {p.dim() for p in plain["params"]} == {1} and plain["weight_decay"] == 0.0
    assert len({*decayed["params"], *plain["params"]}) == len(list(model.parameters()))


def test_a_step_equals_adamw_written_out():
    model = torch.nn.Linear(3, 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, OptimConfig(beta1=0.9, beta2=0.95), 1e-2, 0.1)
    model(torch.ones(1, 3)).square().sum().backward()
    optimizer.step()
    for name, p in model.named_parameters():
        decay = 0.1 if name == "weight" else 0.0
        # first step: mean g, mean square g^2 after bias correction, so the step is g / |g|
        expected = before[name] * (1 - 1e-2 * decay) - 1e-2 * p.grad / (p.grad.abs() + 1e-8)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------------------------------
# LoRA+, GaLore, Muon

def test_lora_plus_gives_b_a_multiple_of_the_learning_rate_of_a():
    model = add_lora(GPT(SHAPE), LoRAConfig(r=2, bias="lora_only"))
    slow, plain, fast = parameter_groups(model, 0.1, lora_plus_ratio=16.0)
    named = {p: name for name, p in model.named_parameters()}
    assert {named[p].rpartition(".")[2] for p in slow["params"]} == {"lora_A"}
    assert {named[p].rpartition(".")[2] for p in fast["params"]} == {"lora_B"}
    assert [group["lr_scale"] for group in (slow, plain, fast)] == [1.0, 1.0, 16.0]
    optimizer = make_optimizer(model, OptimConfig(lora_plus_ratio=16.0), 1e-3, 0.0)
    before = {p: p.detach().clone() for group in optimizer.param_groups for p in group["params"]}
    for p in before:
        p.grad = torch.ones_like(p)
    optimizer.step()                        # the first step of AdamW is the learning rate
    for group in optimizer.param_groups:
        for p in group["params"]:
            torch.testing.assert_close(before[p] - p, torch.full_like(p, 1e-3 * group["lr_scale"]),
                                       rtol=1e-3, atol=1e-7)


def test_every_group_says_its_lr_scale():
    for name in ("adamw", "galore", "muon"):
        optimizer = make_optimizer(GPT(SHAPE), OptimConfig(optimizer=name), 1e-3, 0.1)
        groups = optimizer.param_groups
        assert all(group["lr_scale"] == 1.0 and group["lr"] == 1e-3 for group in groups)


@pytest.mark.parametrize("optimizer", ["galore", "muon"])
def test_matrices_of_linear_layers_are_apart_and_each_parameter_is_in_one_group(optimizer):
    model = GPT(SHAPE)
    groups = make_optimizer(model, OptimConfig(optimizer=optimizer), 1e-3, 0.1).param_groups
    named = {p: name for name, p in model.named_parameters()}
    found = {named[p] for group in groups if group["rule"] == optimizer for p in group["params"]}
    assert found == {f"transformer.h.{i}.{layer}.weight" for i in range(2) for layer in
                     ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    everything = [p for group in groups for p in group["params"]]
    assert len(everything) == len(set(everything)) == len(named)
    decays = {named[p]: group["weight_decay"] for group in groups for p in group["params"]}
    assert all(decays[name] == (0.1 if p.dim() == 2 else 0.0) for p, name in named.items())


def steps(optimizer_name, shape, gradients, lr=0.1, weight_decay=0.5, dtype=torch.float32,
          **settings):
    """The weight of a linear layer before and after steps with these gradients."""
    model = torch.nn.Linear(shape[1], shape[0], bias=False)
    before = model.weight.detach().clone()
    optimizer = make_optimizer(model, OptimConfig(optimizer=optimizer_name, **settings), lr,
                               weight_decay, dtype)
    for gradient in gradients:
        model.weight.grad = gradient.clone()
        optimizer.step()
    return before, model.weight.detach(), optimizer.state[model.weight]


@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_a_galore_step_is_adamws_in_the_largest_singular_directions(shape):
    gradient = torch.randn(shape)
    before, after, state = steps("galore", shape, [gradient], galore_rank=2, galore_scale=0.25)
    U, S, V = torch.linalg.svd(gradient)
    # AdamW's first step is the sign of its gradient: here of U^T G, or of G V
    update = U[:, :2] @ (U[:, :2].t() @ gradient).sign() if shape[0] < shape[1] \
        else (gradient @ V[:2].t()).sign() @ V[:2]
    expected = before * (1 - 0.1 * 0.5) - 0.1 * 0.25 * update
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)
    assert state["mean"].numel() == state["square"].numel() == 2 * 10      # not 6 * 10


def test_galore_takes_new_directions_after_its_interval():
    gradients = [torch.randn(4, 6) for _ in range(3)]
    bases = [steps("galore", (4, 6), gradients[:n], galore_rank=2, galore_every=2)[2]["basis"]
             for n in (1, 2, 3)]
    assert not torch.equal(bases[1], bases[2])
    U = torch.linalg.svd(gradients[2])[0][:, :2]
    torch.testing.assert_close(bases[2].abs(), U.abs(), rtol=1e-4, atol=1e-5)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@DTYPES
@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_a_muon_step_is_nearly_orthogonal_and_pytorchs(shape, dtype):
    gradients = [torch.randn(shape) for _ in range(3)]
    before, after, _ = steps("muon", shape, gradients[:1], weight_decay=0.0, dtype=dtype)
    values = torch.linalg.svdvals((before - after) / (0.1 * 0.2 * math.sqrt(max(shape))))
    assert values.min() > 0.6 and values.max() < 1.25       # Jordan's coefficients: 0.7 to 1.2
    before, after, _ = steps("muon", shape, gradients, dtype=dtype)
    theirs = torch.nn.Parameter(before.clone())
    reference = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.5, momentum=0.95,
                                 adjust_lr_fn="match_rms_adamw")
    for gradient in gradients:
        theirs.grad = gradient.clone()
        reference.step()
    # PyTorch iterates in bfloat16, 3 digits; each step moves an entry by about 0.1 * 0.2. Where we
    # do too, both are that far from float32.
    torch.testing.assert_close(after, theirs.detach(), rtol=0,
                               atol=2e-3 if dtype == torch.float32 else 5e-3)


@DTYPES
@pytest.mark.parametrize("shape", [(3, 6, 10), (2, 4, 16), (3, 32, 128)])
def test_muons_five_steps_of_wide_and_narrow_matrices_are_those_of_the_definition(shape, dtype):
    x = torch.randn(shape)
    expected = x.double() / x.double().norm(dim=(1, 2), keepdim=True)
    for _ in range(5):
        square = expected @ expected.mT
        expected = 3.4445 * expected + (-4.7750 * square + 2.0315 * square @ square) @ expected
    # entries are at most 1; five steps in float32, 7 digits, grow the smallest values 500 times
    # in bfloat16 with its 3 digits, each step to within a hundredth
    found = five_steps(x, dtype)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected.float(), rtol=0,
                               atol=2e-5 if dtype == torch.float32 else 5e-2)


def test_adamw_written_out_equals_pytorchs():
    weight, state, config = torch.nn.Parameter(torch.randn(4, 6)), {}, OptimConfig()
    expected, no = weight.detach().clone(), torch.tensor(False)
    theirs = torch.optim.AdamW([weight], 1e-2, (config.beta1, config.beta2), weight_decay=0.1)
    for _ in range(3):
        weight.grad = torch.randn(4, 6)
        theirs.step()
        expected -= 1e-2 * (0.1 * expected + adamw(weight.grad, state, config, no))
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-5, atol=1e-6)


def test_what_takes_no_rule_takes_pytorchs_adamw_bit_for_bit():
    model, other = GPT(SHAPE), GPT(SHAPE)
    other.load_state_dict(model.state_dict())
    ours = make_optimizer(model, OptimConfig(optimizer="muon", embedding_lr=2.0), 1e-2, 0.1)
    theirs = make_optimizer(other, OptimConfig(embedding_lr=2.0), 1e-2, 0.1)
    for _ in range(3):
        for p, q in zip(model.parameters(), other.parameters()):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    for (name, p), q in zip(model.named_parameters(), other.named_parameters()):
        assert torch.equal(p, q[1]) == ("c_" not in name or "bias" in name), name


def first_update(model, config, name, weight_decay=0.0):
    """How one step at the learning rate 1, with random gradients, changes a parameter."""
    torch.manual_seed(0)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    p = model.get_parameter(name)
    before = p.detach().clone()
    make_optimizer(model, config, 1.0, weight_decay).step()
    return before - p.detach()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_embeddings_have_a_learning_rate_of_their_own(optimizer):
    for name, ratio in (("transformer.wte.weight", 3.0), ("transformer.wpe.weight", 3.0),
                        ("transformer.ln_f.weight", 1.0),
                        ("transformer.h.0.mlp.c_fc.weight", 1.0)):
        plain, own = (first_update(GPT(SHAPE), OptimConfig(optimizer, embedding_lr=ratio), name)
                      for ratio in (1.0, 3.0))
        torch.testing.assert_close(own, ratio * plain, rtol=1e-5, atol=1e-6)


def test_muon_takes_queries_keys_and_values_each_by_itself():
    config, name = OptimConfig("muon"), "transformer.h.1.attn.c_attn.weight"
    model = GPT(SHAPE)
    update = first_update(model, config, name)
    gradient = model.get_parameter(name).grad                           # (3C, C)
    for part, theirs in zip(update.chunk(3), gradient.chunk(3)):
        alone = torch.nn.Linear(8, 8, bias=False)
        alone.weight.grad = theirs.clone()
        before = alone.weight.detach().clone()
        make_optimizer(alone, config, 1.0, 0.0).step()
        torch.testing.assert_close(part, before - alone.weight.detach(), rtol=1e-5, atol=1e-6)
        values = torch.linalg.svdvals(part) / (0.2 * math.sqrt(8))
        assert values.min() > 0.3 and values.max() < 1.25   # one alone; of all rows together 0.58


def test_muons_matrices_have_a_weight_decay_of_their_own():
    config = OptimConfig("muon", muon_weight_decay=0.5)
    for name, decay in (("transformer.h.0.mlp.c_fc.weight", 0.5), ("transformer.wte.weight", 0.1)):
        torch.manual_seed(1)
        model = GPT(SHAPE)
        weight = model.get_parameter(name).detach().clone()
        torch.manual_seed(1)
        plain = first_update(GPT(SHAPE), OptimConfig("muon"), name)
        found = first_update(model, config, name, weight_decay=0.1)
        torch.testing.assert_close(found - plain, decay * weight, rtol=1e-4, atol=1e-5)


def test_muons_momentum_rises_from_085_over_its_warmup():
    """Of equal gradients g the mean after n steps is (1 - product of the n decays) g."""
    state, config, left = {}, OptimConfig("muon", muon_warmup=4), 1.0
    for step in range(1, 7):
        decay = 0.85 + 0.1 * min(step / 4, 1)
        left *= decay
        found = muon(torch.ones(2, 2), state, config, torch.tensor(False))
        assert state["mean"].flatten().tolist() == pytest.approx(4 * [1 - left])
        assert found.flatten().tolist() == pytest.approx(4 * [1 - decay * left])


@pytest.mark.parametrize("optimizer", ["adamw", "galore", "muon"])
def test_a_dry_run_counts_what_the_optimizer_remembers(optimizer):
    config, model = OptimConfig(optimizer=optimizer, galore_rank=3), GPT(SHAPE)
    idx = torch.randint(11, (4, 8))
    trained = make_optimizer(model, config, 1e-2, 0.1)
    model(idx, idx)[1].backward()
    trained.step()
    held = sum(t.untyped_storage().nbytes() for state in trained.state.values()
               for t in state.values() if isinstance(t, torch.Tensor) and t.dim())
    assert held == optimizer_memory(model, config)


@pytest.mark.parametrize("optimizer", ["adamw", "galore", "muon"])
def test_a_loaded_optimizer_continues_exactly(optimizer):
    config = OptimConfig(optimizer=optimizer, galore_rank=3, galore_every=2)
    idx = torch.randint(11, (4, 8))

    def train(model, state, count):
        optimizer = make_optimizer(model, config, 1e-2, 0.1)
        if state:
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            optimizer.load_state_dict(torch.load(file, weights_only=True))
        for _ in range(count):
            model(idx, idx)[1].backward()
            optimizer.step()
            optimizer.zero_grad()
        return model, optimizer.state_dict()

    torch.manual_seed(0)
    whole, _ = train(GPT(SHAPE), None, 5)
    torch.manual_seed(0)
    half, state = train(GPT(SHAPE), None, 3)
    torch.manual_seed(123)                              # nothing random outside the state
    resumed, _ = train(half, state, 2)
    for a, b in zip(whole.parameters(), resumed.parameters()):
        assert torch.equal(a, b)


class OnDevice:
    """A bool of an accelerator: whoever asks for its value waits for the device."""
    waits = 0

    def __init__(self, value, kind="cpu"):
        self.value, self.device = torch.tensor(value), torch.device(kind)

    def float(self):
        return self.value.float()

    def __bool__(self):
        OnDevice.waits += 1
        return bool(self.value)


def skipping_steps(name, gradients, skips, kind="cpu", galore_every=100):
    """The weights and the optimizer's state after these steps, some of them skipped."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 4)
    config = OptimConfig(optimizer=name, galore_rank=2, galore_every=galore_every)
    optimizer = make_optimizer(layer, config, 0.1, 0.5)
    for gradient, skip in zip(gradients, skips):
        layer.weight.grad = gradient.clone()
        layer.bias.grad = gradient[:, 0].clone()
        take_step(optimizer, torch.amp.GradScaler("cpu", enabled=False), OnDevice(skip, kind))
    return [p.detach() for p in layer.parameters()], optimizer.state_dict()["state"]


@pytest.mark.parametrize("name", ["adamw", "galore", "muon"])
def test_a_skipped_step_changes_nothing_and_is_not_waited_for(name):
    """The first, and some among others."""
    good = [torch.randn(4, 6) for _ in range(4)]
    bad = torch.full((4, 6), math.nan)
    OnDevice.waits = 0
    found = skipping_steps(name, [bad, good[0], bad, good[1], bad, good[2], good[3]],
                           [True, False, True, False, True, False, False])
    assert OnDevice.waits == 0
    found, expected = tree_leaves(found), tree_leaves(skipping_steps(name, good, 4 * [False]))
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        if isinstance(one, torch.Tensor):               # of GaLore also a count of all steps
            assert torch.equal(one, other)


def test_galore_takes_no_directions_of_a_gradient_that_is_skipped():
    """Those of the third step, which is skipped, are taken in the fourth."""
    good = [torch.randn(4, 6) for _ in range(3)]
    gradients = [*good[:2], torch.full((4, 6), math.nan), good[2]]
    found = skipping_steps("galore", gradients, [False, False, True, False], galore_every=2)
    expected = skipping_steps("galore", good, 3 * [False], galore_every=2)
    for one, other in zip(tree_leaves(found), tree_leaves(expected)):
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(other))


def test_where_the_fused_kernel_ignores_it_a_skipped_step_is_not_taken(monkeypatch):
    """PyTorch's AdamW for Apple's GPUs does not read found_inf."""
    fused = torch.optim.AdamW.step

    def deaf(self):
        self.found_inf.zero_()
        fused(self)
    monkeypatch.setattr(torch.optim.AdamW, "step", deaf)
    good = torch.randn(4, 6)
    (found, _), (expected, _) = (skipping_steps("adamw", *steps, kind="mps") for steps in (
        ([good, torch.full((4, 6), math.nan)], [False, True]), ([good], [False])))
    for one, other in zip(found, expected):
        assert torch.equal(one, other)


def test_a_float16_run_skips_what_overflowed_without_a_wait():
    """The scaler learns of it by `update`, as it would by its own `step`."""
    layer = torch.nn.Linear(2, 2)
    optimizer = make_optimizer(layer, OptimConfig(), 0.1, 0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    scaler.scale(torch.ones(()))                        # as a loss would be
    before = [p.detach().clone() for p in layer.parameters()]
    scales = []
    for value in (math.inf, 1.0, 1.0):
        for p in layer.parameters():
            p.grad = torch.full_like(p, value)
        scaler.unscale_(optimizer)
        take_step(optimizer, scaler, OnDevice(not math.isfinite(value)))
        scales.append(scaler.get_scale())
        changed = not all(map(torch.equal, before, layer.parameters()))
        assert changed == math.isfinite(value) or len(scales) > 1
    assert scales == [4.0, 4.0, 8.0]                    # halved, then doubled after two good steps


@pytest.mark.parametrize("optimizer", ["galore", "muon"])
def test_it_learns(optimizer):
    torch.manual_seed(0)
    model, idx = GPT(SHAPE), torch.randint(11, (4, 8))
    start = model(idx, idx)[1].item()
    config = OptimConfig(optimizer=optimizer, galore_rank=4, galore_every=10, galore_scale=1.0)
    optimizer = make_optimizer(model, config, 1e-2, 0.0)
    for _ in range(40):
        loss = model(idx, idx)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.5 * start


def test_a_new_rule_and_a_new_schedule_are_named_once(monkeypatch):
    """Lion (Chen et al. 2023) in a line, from the command line to the weights."""
    monkeypatch.setitem(RULES, "lion",
                        lambda gradient, state, config, skip: gradient.sign())
    with pytest.raises(ValueError, match="'sgd' is unknown; choose adamw, galore, muon or lion"):
        OptimConfig(optimizer="sgd")
    config = parse(TrainConfig, ["--optim.optimizer=lion", "--max_steps=1"], "train.py")
    layer = torch.nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    optimizer = make_optimizer(layer, config.optim, 0.1, 0.0)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(layer.weight.detach(), before - 0.1)
    monkeypatch.setitem(SCHEDULES, "half", lambda done, config: 0.5)
    assert learning_rate(3, "half", 10, 0, 1.0, 0.0) == 0.5
    with pytest.raises(ValueError, match="schedule='none' is unknown; choose cosine, .*, half"):
        learning_rate(3, "none", 10, 0, 1.0, 0.0)
    assert {"cosine", "wsd"} < set(get_args(get_type_hints(TrainConfig)["schedule"])) < {*SCHEDULES}


@pytest.mark.parametrize("settings,words", [
    (dict(optimizer="sgd"), "optim.optimizer='sgd' is unknown; choose adamw, galore or muon"),
    (dict(lora_plus_ratio=0), "optim.lora_plus_ratio=0 must be positive"),
    (dict(galore_rank=0), "optim.galore_rank=0 must be positive"),
    (dict(muon_momentum=1.0), "optim.muon_momentum=1.0 is not in [0, 1)"),
    (dict(power=-2.0), "optim.power=-2.0 must be at least 0"),      # would rise without end
    (dict(muon_weight_decay=-0.1), "optim.muon_weight_decay=-0.1 must be at least 0"),
])
def test_wrong_optimizer_settings_are_refused(settings, words):
    with pytest.raises(ValueError) as error:
        OptimConfig(**settings)
    assert str(error.value) == words

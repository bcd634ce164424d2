"""Schedules against hand-worked values; weight decay where it belongs."""
import math

import pytest
import torch

from model import GPT, GPTConfig
from optim import OptimConfig, learning_rate, make_optimizer, parameter_groups


@pytest.mark.parametrize("schedule,expected", [
    # 10 steps, 2 of warmup, peak 1, floor 0.2: steps 0, 1, 2, 4, 6 and 9; done is (step - 2) / 8
    ("cosine", [0.5, 1, 1, 0.2 + 0.4 * (1 + math.cos(math.pi / 4)), 0.6,
                0.2 + 0.4 * (1 + math.cos(math.pi * 7 / 8))]),
    ("linear", [0.5, 1, 1, 0.8, 0.6, 0.3]),
    ("constant", [0.5, 1, 1, 1, 1, 1]),
    ("wsd", [0.5, 1, 1, 1, 1, 0.2 + 0.8 * 0.125 / 0.5]),    # decays in the last half
    ("polynomial", [0.5, 1, 1, 0.2 + 0.8 * 0.75**2, 0.4, 0.2 + 0.8 * 0.125**2]),
])
def test_schedules_have_their_hand_worked_values(schedule, expected):
    config = OptimConfig(power=2.0, decay_share=0.5)
    found = [learning_rate(step, schedule, 10, 2, 1.0, 0.2, config) for step in (0, 1, 2, 4, 6, 9)]
    assert found == pytest.approx(expected)


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

"""The head's loss in pieces against the same written out in float64."""
import itertools

import pytest
import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fast import cross_entropy
from fast.cross_entropy import IGNORE, linear_cross_entropy, plain
from fast.linear import FastLinear, use_fast_products

BFLOAT16 = torch.bfloat16


def case(rows=96, channels=32, width=70, vocab_size=65, ignored=slice(5, 9)):
    torch.manual_seed(0)
    head = nn.Linear(channels, width, bias=False)
    nn.init.normal_(head.weight, std=0.5)
    x = torch.randn(rows, channels, requires_grad=True)
    targets = torch.randint(vocab_size, (rows,))
    targets[ignored] = IGNORE
    return x, head, targets, vocab_size


def results(function, x, head, targets, vocab_size, dtype=torch.float32, factor=0.3):
    """The loss and both gradients."""
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        loss = function(x, head, targets, vocab_size)
    return loss, *torch.autograd.grad(loss * factor, (x, head.weight))


def written_out(x, head, targets, vocab_size, factor=0.3):
    x, weight = (tensor.detach().double().requires_grad_() for tensor in (x, head.weight))
    loss = F.cross_entropy((x @ weight.T)[:, :vocab_size], targets, ignore_index=IGNORE,
                           reduction="sum")
    return loss, *torch.autograd.grad(loss * factor, (x, weight))


def error(found, reference):
    return ((found.double() - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("at_once,compiled", [
    pytest.param(2**25, False, id="one piece-eager"), pytest.param(3000, False, id="three-eager"),
    pytest.param(2**25, True, id="one piece-compiled", marks=pytest.mark.slow),     # compiles C++
    pytest.param(3000, True, id="three-compiled")])
def test_loss_and_gradients_equal_the_formula(at_once, compiled, monkeypatch):
    monkeypatch.setitem(cross_entropy.LOGITS_AT_ONCE, "cpu", at_once)
    torch._dynamo.reset()
    function = torch.compile(linear_cross_entropy) if compiled else linear_cross_entropy
    for found, reference in zip(results(function, *case()), written_out(*case())):
        assert error(found, reference) < 2e-6           # float32 sums of 96 x 65 terms


def test_the_gpu_s_form_computes_the_same(monkeypatch):
    """Its comparison instead of a scatter, its columns padded; here on the CPU."""
    expected = results(linear_cross_entropy, *case())
    monkeypatch.setattr(cross_entropy, "SCATTERS", set())
    assert all(map(torch.equal, results(linear_cross_entropy, *case()), expected))
    monkeypatch.setitem(cross_entropy.COLUMNS, "cpu", 64)
    for found, reference in zip(results(linear_cross_entropy, *case()), written_out(*case())):
        assert error(found, reference) < 2e-6           # as above: other sums, as exact


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The CPU computes the head's loss by the GPU's form."""
    monkeypatch.setitem(cross_entropy.COLUMNS, "cpu", cross_entropy.COLUMNS["cuda"])
    monkeypatch.setattr(cross_entropy, "SCATTERS",
                        {"cpu"} if "cuda" in cross_entropy.SCATTERS else set())


@pytest.mark.parametrize("rows", [50257, 50304])
def test_the_gpus_products_are_aligned_and_nothing_is_scattered(rows, as_on_a_gpu):
    """Tensor cores want strides that are multiples of 8 numbers; GPT-2 has 50,257 tokens."""
    strides, names = [], []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function.__name__)
            if function is torch.ops.aten.mm.default:
                strides.extend(max(factor.stride()) for factor in args)
            return function(*args, **(kwargs or {}))

    with Record():
        results(linear_cross_entropy, *case(rows=32, channels=8, width=rows, vocab_size=50257))
    assert len(strides) == 6 and not any(stride % 8 for stride in strides)  # 3 products
    assert not [name for name in names if "scatter" in name]


@pytest.mark.parametrize("at_once", [2**25, 3000], ids=["one piece", "three pieces"])
def test_bfloat16_is_as_exact_as_the_plain_form(at_once, monkeypatch):
    monkeypatch.setitem(cross_entropy.LOGITS_AT_ONCE, "cpu", at_once)
    exact = written_out(*case())
    pieces, whole = (results(f, *case(), BFLOAT16) for f in (linear_cross_entropy, plain))
    for ours, theirs, reference in zip(pieces, whole, exact):
        assert error(ours, reference) < 1.2 * error(theirs, reference)  # other roundings, as large


def test_the_gradient_of_a_sure_prediction_is_not_rounded_away():
    head = nn.Linear(2, 2, bias=False)
    head.weight.data = torch.tensor([[8.0, 0.0], [0.0, 0.0]])
    x = torch.tensor([[1.0, 0.0]], requires_grad=True)  # p = sigmoid(8), 1 in bfloat16
    _, dx, _ = results(linear_cross_entropy, x, head, torch.tensor([0]), 2, BFLOAT16, factor=1.0)
    assert dx[0, 0].item() == pytest.approx(-8 / (1 + torch.tensor(8.0).exp().item()), rel=0.01)


@pytest.mark.parametrize("at_once", [2**25, 3000], ids=["one piece", "three pieces"])
def test_float16_is_as_exact_as_the_plain_form_under_a_scaler(at_once, monkeypatch):
    monkeypatch.setitem(cross_entropy.LOGITS_AT_ONCE, "cpu", at_once)
    factor = 2.0**10                                    # a good one, which a GradScaler would find
    pieces, whole = (results(f, *case(), torch.float16, factor)
                     for f in (linear_cross_entropy, plain))
    for ours, theirs, reference in zip(pieces, whole, written_out(*case(), factor)):
        assert error(ours, reference) < 1.2 * error(theirs, reference)  # other roundings, as large


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_float16_neither_overflows_nor_loses_what_is_small(factor):
    """Sums of 6,000 rows of one target, and a token of probability 1e-8 in each: written plainly,
    one or the other is beyond float16, whatever the factor."""
    head = nn.Linear(1, 3, bias=False)
    head.weight.data = torch.tensor([[0.0], [0.0], [-1.125]])       # a logit of -18
    x, targets = torch.full((6000, 1), 16.0, requires_grad=True), torch.zeros(6000, dtype=int)
    loss, dx, dweight = results(linear_cross_entropy, x, head, targets, 3, torch.float16, factor)
    _, dx64, dweight64 = written_out(x, head, targets, 3, factor)
    assert error(dx, dx64) < 0.01                       # 1,024 p is 131 of its smallest steps
    assert error(dweight[2], dweight64[2]) < 0.01
    assert error(dweight, dweight64) < 0.002            # it rounds to 1 in 2,048


def test_rows_without_a_label_and_padded_columns_have_no_gradient():
    _, dx, dweight = results(linear_cross_entropy, *case())
    assert not dx[5:9].any() and dx[[4, 9]].any(dim=1).all()
    assert not dweight[65:].any() and dweight[:65].any(dim=1).all()


def test_without_any_label_loss_and_gradients_are_zero():
    for found in results(linear_cross_entropy, *case(ignored=slice(None))):
        assert not found.any()


@pytest.mark.parametrize("frozen", ["x", "head"])
def test_what_is_frozen_gets_no_gradient_and_costs_no_product(frozen):
    x, head, targets, vocab_size = case()
    (x if frozen == "x" else head.weight).requires_grad_(False)
    with torch.profiler.profile() as profile:
        loss = linear_cross_entropy(x, head, targets, vocab_size)
    products = sum(event.count for event in profile.key_averages()
                   if event.key in ("aten::mm", "aten::conv2d"))
    assert products == 2                                # logits, and one gradient
    loss.backward()
    assert (x.grad is None) == (frozen == "x") and (head.weight.grad is None) == (frozen == "head")


def test_without_gradients_only_the_logits_are_computed():
    with torch.no_grad(), torch.profiler.profile() as profile:
        linear_cross_entropy(*case())
    assert sum(event.count for event in profile.key_averages()
                   if event.key in ("aten::mm", "aten::conv2d")) == 1


def test_a_head_with_a_product_of_its_own_is_multiplied_by_that(monkeypatch):
    rows = []
    monkeypatch.setattr(FastLinear, "product", staticmethod(
        lambda x, weight: rows.append(len(x)) or F.linear(x, weight)))
    x, head, targets, vocab_size = case()
    for found, reference in zip(results(linear_cross_entropy, x, use_fast_products(head), targets,
                                        vocab_size), results(linear_cross_entropy, *case())):
        assert torch.equal(found, reference)
    assert rows == [96, 96, 70]                         # logits, gradients of x and of the weight


def test_a_head_that_is_more_than_a_weight_is_computed_as_it_is():
    x, head, targets, vocab_size = case()
    tempered = nn.Sequential(head, nn.Tanh())
    found = linear_cross_entropy(x, tempered, targets, vocab_size)
    reference = F.cross_entropy(torch.tanh(F.linear(x, head.weight))[:, :vocab_size], targets,
                                reduction="sum", ignore_index=IGNORE)
    assert error(found, reference.double()) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16], ids=str)
def test_it_holds_the_memory_that_is_counted(dtype, monkeypatch):
    """Bytes allocated and not freed, by PyTorch's own account. Beside what is counted there are the
    head's weight in bfloat16, a piece's part of its gradient and the gradient of x."""
    monkeypatch.setitem(cross_entropy.LOGITS_AT_ONCE, "cpu", 2**20)
    N, C, V = 2048, 16, 4096                            # eight pieces
    x, head = torch.randn(N, C, requires_grad=True), nn.Linear(C, V, bias=False)
    targets = torch.randint(V, (N,))
    with torch.autocast("cpu", BFLOAT16, enabled=dtype == BFLOAT16), \
            torch.profiler.profile(profile_memory=True) as profile:
        linear_cross_entropy(x, head, targets, V)
    changes = sorted((event.start_ns(), event.nbytes())
                     for event in profile.profiler.kineto_results.events()
                     if event.name() == "[memory]")
    height = max(itertools.accumulate(size for _, size in changes))
    counted = cross_entropy.head_memory(N, C, V, "cpu")
    assert counted == 12 * 2**20 + 4 * C * V
    assert 0.85 * counted < height < 1.15 * counted

"""Linear layers: equal to F.linear whichever product is taken, and the fast one is taken."""
import copy

import pytest
import torch
from torch.nn import functional as F

from fast import linear as module
from fast.attention import attend
from fast.linear import (FEW_ROWS, FastLinear, linear, pack_weights, packed_weights,
                         use_fast_products)
from lora import LoRAConfig, add_lora
from model import GPT, GPTConfig

SHAPES = [(1, 8), (FEW_ROWS - 1, 8), (FEW_ROWS, 8), (5, 30, 8)]         # of x


@pytest.fixture(params=[True, False], ids=["slow MKL", "fast MKL"])
def slow(request, monkeypatch):
    monkeypatch.setattr(module, "MKL_IS_SLOW", request.param)
    monkeypatch.setattr(module, "MKL_IS_FOREIGN", request.param)
    return request.param


def results(function, *tensors, dtype=torch.float32):
    """y, and the gradients of a weighted sum of it."""
    tensors = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
    y = function(*tensors)
    weights = torch.arange(y.numel(), device=y.device).view(y.shape).cos().to(y.dtype)
    return y, *torch.autograd.grad((y * weights).sum(), tensors)


@pytest.mark.parametrize("shape,compiled", [
    *((shape, False) for shape in SHAPES), (SHAPES[2], True),
    *(pytest.param(shape, True, marks=pytest.mark.slow) for shape in SHAPES if shape != SHAPES[2])],
    ids=lambda value: {True: "compiled", False: "eager"}.get(value, str(value)))    # seconds of C++
def test_values_and_gradients_are_those_of_float64(shape, compiled, slow):
    torch.manual_seed(0)
    torch._dynamo.reset()
    function = torch.compile(linear) if compiled else linear
    for with_bias in (True, False):
        tensors = [torch.randn(shape), torch.randn(8, 6).T, torch.randn(6)][:2 + with_bias]
        reference = results(F.linear, *tensors, dtype=torch.float64)
        for found, expected in zip(results(function, *tensors), reference):
            assert found.shape == expected.shape and found.dtype == torch.float32
            # float32 sums of up to 150 products
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_autocast_has_its_own_dtype(shape, slow):
    x, layer = torch.randn(shape), FastLinear(8, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        assert y.dtype == torch.bfloat16 and torch.equal(y, F.linear(x, layer.weight, layer.bias))


def calls(function, *arguments):
    """How often each of PyTorch's operations ran."""
    with torch.no_grad(), torch.profiler.profile() as profile:
        function(*arguments)
    return {event.key: event.count for event in profile.key_averages()}


def products(function, *arguments):
    counts = calls(function, *arguments)
    return counts.get("aten::addmm", 0), counts.get("aten::conv2d", 0)


def test_many_rows_are_a_convolution_where_mkl_is_slow(slow):
    layer = FastLinear(8, 6)
    assert products(layer, torch.randn(FEW_ROWS, 8)) == ((0, 1) if slow else (1, 0))
    assert products(layer, torch.randn(FEW_ROWS - 1, 8)) == (1, 0)
    assert products(layer.double(), torch.randn(FEW_ROWS, 8).double()) == (1, 0)


def test_the_compiler_makes_its_own_product_for_one_row_and_leaves_more_rows_alone():
    layer = FastLinear(8, 6)
    for rows, expected in ((1, (0, 0)), (2, (1, 0))):
        torch._dynamo.reset()
        compiled, x = torch.compile(layer), torch.randn(rows, 8)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), layer(x))
        assert products(compiled, x) == expected


def test_a_model_computes_by_fast_products_with_the_parameters_that_it_had():
    class Tempered(torch.nn.Linear):
        """Computes something of its own."""

    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Sequential(torch.nn.Linear(8, 6)),
                                Tempered(6, 6))
    model[1][0].weight = model[0].weight                # tied, as a head is
    before = dict(model.named_parameters(remove_duplicate=False))
    assert use_fast_products(model) is model and use_fast_products(model) is model
    after = dict(copy.deepcopy(model).named_parameters(remove_duplicate=False))
    assert before.keys() == after.keys() and after["0.weight"] is after["1.0.weight"]
    assert all(p is before[name] for name, p in model.named_parameters(remove_duplicate=False))
    assert [type(module) for module in (model[0], model[1][0], model[2])] == [
        FastLinear, FastLinear, Tempered]
    assert isinstance(model[0], torch.nn.Linear)        # what LoRA and NF4 look for


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
@pytest.mark.parametrize("rows", [1, FEW_ROWS])
@pytest.mark.parametrize("with_bias", [True, False])
def test_few_rows_of_a_large_weight_are_onednns_where_no_gradient_is_wanted(rows, with_bias, slow,
                                                                            monkeypatch):
    """Equal to float64 up to the rounding of 8 products; rows and weight of any strides."""
    monkeypatch.setattr(module, "LARGE", 48)
    x, weight, bias = torch.randn(2, rows, 8)[1:], torch.randn(6, 16)[:, ::2], torch.randn(6)
    tensors = [x, weight, bias][:2 + with_bias]
    with torch.no_grad():
        y = linear(*tensors)
        expected = F.linear(*(tensor.double() for tensor in tensors))
    assert y.shape == (1, rows, 6)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    counts, own = calls(linear, *tensors), "mkldnn::_linear_pointwise"
    assert (own in counts) == slow
    assert (own in calls(linear, torch.randn(FEW_ROWS + 1, 8), weight)) == slow
    assert linear(torch.randn(0, 8), weight).shape == (0, 6)
    assert own not in calls(linear, x, weight[:5]) and own not in calls(linear, x.double(),
                                                                        weight.double())
    weight.requires_grad_()
    linear(x, weight).sum().backward()                  # with a gradient: PyTorch's own
    torch.testing.assert_close(weight.grad, x.sum((0, 1)).expand(6, 8))


@pytest.mark.parametrize("adapter", [None, {}, {"use_dora": True}, {"quantize": "nf4"}], ids=str)
def test_a_model_attends_by_it_and_packed_weights_give_the_same_logits(adapter):
    """Within a twentieth of the logits' deviation of autocast's: the products are the same, bfloat16
    rounds their sums in another order."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(32, 64, n_layer=2, n_head=2, n_embd=32))
    if adapter is not None:
        add_lora(model, LoRAConfig(r=2, **adapter))
    model = use_fast_products(model).eval()
    assert model.transformer.h[0].attn.attend is attend
    idx = torch.randint(64, (3, 9))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain, cache = [], model.new_cache(3)
        for part in idx.split([6, 1, 1, 1], dim=1):
            plain.append(model.next_logits(part, cache))
        packed, cache = pack_weights(copy.deepcopy(model)), model.new_cache(3)
        found = [packed.next_logits(part, cache) for part in idx.split([6, 1, 1, 1], dim=1)]
    weights = dict(model.named_parameters())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), packed_weights(model):
        for one, other in zip(found, [model.next_logits(idx[:, :T]) for T in (6, 7, 8, 9)]):
            torch.testing.assert_close(one, other, rtol=0, atol=float(other.std()) / 20)
        assert model.lm_head.weight.is_mkldnn == packed.lm_head.weight.is_mkldnn
    assert all(weights[name] is p for name, p in model.named_parameters())
    with packed_weights(model):                         # float32 stays
        assert not model.lm_head.weight.is_mkldnn
    can = torch.backends.mkl.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert can == packed.lm_head.weight.is_mkldnn
    for one, other in zip(found, plain):
        assert one.std() > 0.1
        torch.testing.assert_close(one, other, rtol=0, atol=float(other.std()) / 20)
    assert not model.lm_head.weight.is_mkldnn

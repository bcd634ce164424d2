"""Attention on a CPU: as far from float64 as PyTorch's in bfloat16, whichever way is taken."""
import pytest
import torch
from torch.nn import functional as F

from fast import attention as module
from fast import processor
from fast.attention import (FEW_QUERIES, MASKED_QUERIES, attend, causal_attention, pieces)
from tests.test_linear import calls, results


@pytest.fixture(params=[True, False], ids=["slow MKL", "fast MKL"])
def slow(request, monkeypatch):
    monkeypatch.setattr(module, "MKL_IS_FOREIGN", request.param)
    monkeypatch.setattr(module, "HAS_BFLOAT16", request.param)
    return request.param


def tensors_of(B, H, T, D, size=1.0):
    """q, k and v as a model has them: in bfloat16, of one tensor (B, T, 3 H D)."""
    torch.manual_seed(0)
    together = (size * torch.randn(B, T, 3 * H * D)).bfloat16()
    return [part.view(B, T, H, D).transpose(1, 2) for part in together.split(H * D, dim=2)]


def plain(*tensors):
    return F.scaled_dot_product_attention(*tensors, is_causal=True)


@pytest.mark.parametrize("shape", [(1, 2, 1, 16), (2, 3, 65, 16), (2, 3, 300, 24), (1, 2, 1100, 8)],
                         ids=str)
@pytest.mark.parametrize("scores", [2**13, 2**20], ids=["many pieces", "large pieces"])
def test_causal_attention_is_as_close_to_float64_as_pytorchs(shape, scores, monkeypatch):
    """What is rounded to bfloat16 once is 2^-9 off at most, 0.11% in the mean square; two roundings
    or three in turn, 0.4%. PyTorch's own has up to 0.36%. Scores of deviation 4 for both."""
    monkeypatch.setattr(module, "SCORES_AT_ONCE", scores)
    tensors = tensors_of(*shape, size=2.0)
    exact = results(plain, *tensors, dtype=torch.float64)
    for found, expected in zip(results(causal_attention, *tensors, dtype=torch.bfloat16), exact):
        assert found.dtype == torch.bfloat16 and found.shape == expected.shape
        assert (found.double() - expected).norm() <= 4e-3 * expected.norm() + 1e-12


def test_it_sees_no_later_token():
    q, k, v = tensors_of(1, 2, 130, 16)
    before = causal_attention(q, k, v)
    k[:, :, 100:], v[:, :, 100:] = 1e4, 7.0
    after = causal_attention(q, k, v)
    assert torch.equal(before[:, :, :100], after[:, :, :100])
    assert not torch.equal(before[:, :, 100], after[:, :, 100])


@pytest.mark.parametrize("N, T", [(1, 1), (6, 65), (48, 256), (24, 1000), (24, 1024), (1, 5000)])
def test_pieces_cover_every_query_of_every_head_once(N, T):
    found, largest = torch.zeros(N, T, dtype=torch.long), 0
    for heads, rows, seen in pieces(N, T):
        found[heads, rows] += 1
        assert seen == slice(rows.stop)
        largest = max(largest, len(range(N)[heads]) * (rows.stop - rows.start) * rows.stop)
    assert (found == 1).all()
    assert largest <= max(module.SCORES_AT_ONCE, 256 * T)


@pytest.mark.parametrize("B", [1, 2])
def test_pytorchs_own_checks_of_an_operation_pass(B):
    """Shapes without data, gradients, tracing: what torch.compile needs."""
    tensors = [tensor.detach().requires_grad_() for tensor in tensors_of(B, 2, 70, 16)]
    torch.library.opcheck(causal_attention, tensors)


def test_oneDNNs_precision_and_autocast_are_what_they_were():
    setting = torch.backends.mkldnn.matmul
    before = setting.fp32_precision
    q, k, v = tensors_of(1, 2, 70, 16)
    with torch.autocast("cpu", torch.bfloat16):
        found = causal_attention(q, k, v)
        with pytest.raises(RuntimeError):
            causal_attention(q, k[..., :8], v)
        assert torch.is_autocast_enabled("cpu")
    assert setting.fp32_precision == before
    assert torch.equal(found, causal_attention(q, k, v))


@pytest.mark.parametrize("tokens, autocast", [(1, False), (1, True), (FEW_QUERIES, True)])
def test_attention_of_few_bfloat16_queries_is_that_of_float32_rounded_once(tokens, autocast, slow):
    tensors = [torch.randn(2, 3, T, 16).bfloat16() for T in (tokens, 140, 140)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = results(lambda *inputs: attend(*inputs, is_causal=tokens > 1, dropout_p=0.0),
                        *tensors, dtype=torch.bfloat16)
    dtype = torch.float32 if slow else torch.bfloat16
    expected = results(lambda *inputs: F.scaled_dot_product_attention(
        *(part.to(dtype) for part in inputs), is_causal=tokens > 1).bfloat16(), *tensors,
        dtype=torch.bfloat16)
    for one, other in zip(found, expected):
        assert torch.equal(one, other)
    mask = torch.zeros(tokens, 140, dtype=torch.bfloat16)
    assert attend(*tensors, attn_mask=mask).dtype == torch.bfloat16
    assert attend(*(tensor.float() for tensor in tensors)).dtype == torch.float32


@pytest.mark.parametrize("tokens, masked", [(1, False), (7, "bool"), (7, "float"), (3, False)])
def test_few_queries_of_many_sequences_are_as_close_to_float64(tokens, masked, slow):
    """Weights are rounded to bfloat16, and what comes out: 0.11% in the mean square each."""
    q = tensors_of(16, 3, tokens, 16, size=2.0)[0]
    _, k, v = tensors_of(16, 3, 40, 16, size=2.0)
    mask = torch.ones(tokens, 40, dtype=torch.bool).tril(40 - tokens) if masked else None
    if masked == "float":
        mask = torch.zeros(tokens, 40).masked_fill(~mask, -torch.inf).bfloat16()
    own = mask if mask is None or masked == "bool" else mask.double()
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=own)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = attend(q, k, v, attn_mask=mask)
        names = calls(lambda: attend(q, k, v, attn_mask=mask))
    assert ("aten::scaled_dot_product_attention" in names) != slow
    assert found.dtype == torch.bfloat16
    assert (found.double() - exact).norm() <= 4e-3 * exact.norm()
    kept = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
    assert attend(*kept, attn_mask=mask).requires_grad


def test_pieces_are_for_what_is_causal_alone_and_slow_otherwise(slow):
    own = "oneloop::causal_attention"
    q, k, v = tensors_of(1, 2, FEW_QUERIES + 1, 16)
    assert (own in calls(lambda: attend(q, k, v, is_causal=True))) == slow
    mask = torch.ones(q.size(2), q.size(2), dtype=torch.bool).tril()
    longer = tensors_of(1, 2, MASKED_QUERIES + 1, 16)
    for ways in (dict(), dict(is_causal=True, dropout_p=0.1), dict(attn_mask=mask),
                 dict(is_causal=True, scale=1.0)):
        assert own not in calls(lambda: attend(q, k, v, **ways))
    assert own not in calls(lambda: attend(q, *longer[1:], is_causal=True))
    assert own not in calls(lambda: attend(q[:, :, 1:], k[:, :, 1:], v[:, :, 1:], is_causal=True))
    assert own not in calls(lambda: attend(q.float(), k.float(), v.float(), is_causal=True))


def test_who_patches_or_watches_pytorchs_function_is_asked(monkeypatch):
    monkeypatch.setattr(module, "MKL_IS_FOREIGN", True)
    monkeypatch.setattr(module, "HAS_BFLOAT16", True)
    tensors, seen = tensors_of(1, 2, FEW_QUERIES + 1, 16), []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **kwargs or {})
    with Watch():
        attend(*tensors, is_causal=True)
    assert F.scaled_dot_product_attention in seen
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **settings: v + 1)
    assert torch.equal(attend(*tensors, is_causal=True), tensors[2] + 1)


@pytest.mark.parametrize("about, foreign", [
    ("vendor_id: AuthenticAMD\nflags: avx2 avx512f", True),
    ("vendor_id: GenuineIntel\nflags: avx2 avx512f", False), ("", False)])
def test_mkl_is_left_on_intels_processors_and_on_unknown_ones(about, foreign):
    assert processor.mkl_is_foreign(about) == (foreign and torch.backends.mkl.is_available()
                                               and torch.backends.mkldnn.is_available())


def test_a_processor_that_says_nothing_is_unknown(monkeypatch):
    def open_(path):
        raise FileNotFoundError(path)
    assert not processor.MKL_IS_SLOW or (processor.MKL_IS_FOREIGN
                                         and "avx512f" in processor.processor())
    monkeypatch.setattr(processor, "open", open_, raising=False)
    assert processor.processor() == ""

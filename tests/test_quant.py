"""NF4 against hand-worked blocks and bitsandbytes; its memory; its gradient."""
import pytest
import torch
from torch import nn

from fast.nf4 import BLOCK, LEVELS, NF4Linear, dynamic_levels, nf4_rounded
from lora import LoRAConfig, add_lora
from model import GPT, GPTConfig
from run.plan import held_memory


def quantised(out, size, bias=True, std=0.02):
    linear = nn.Linear(size, out, bias=bias)
    nn.init.normal_(linear.weight, std=std)
    return linear, NF4Linear(linear)


def test_a_hand_worked_block():
    """Largest value 2: the scale. 1.0 / 2 lies between 0.4407 and 0.5626, nearer to the first."""
    linear = nn.Linear(BLOCK, 1, bias=False)
    linear.weight.data.zero_()
    linear.weight.data[0, :4] = torch.tensor([2.0, -2.0, 1.0, 0.01])
    layer = NF4Linear(linear)
    # codes of the first four: 15, 0, 12 and 7 (0.005 is nearest to 0), then zeros
    assert layer.codes[:3].tolist() == [15 * 16 + 0, 12 * 16 + 7, 7 * 16 + 7]
    expected = 2 * torch.tensor([1.0, -1.0, LEVELS[12], 0.0])
    torch.testing.assert_close(layer.dequantize()[0, :4], expected, rtol=1e-6, atol=0)


def test_the_error_of_a_weight_is_at_most_half_a_step_of_its_block():
    linear, layer = quantised(48, 256)
    largest = linear.weight.view(-1, BLOCK).abs().amax(dim=1, keepdim=True)
    # The widest step is from -1 to -0.696. Double quantisation moves a scale by up to 0.007 of the
    # largest deviation in its 256, here less than 1% of it.
    error = (layer.dequantize() - linear.weight).view(-1, BLOCK).abs()
    assert (error <= largest * (0.304 / 2 + 0.01)).all()
    assert error.max() > 0.05 * largest.max()           # and it is no copy


@pytest.mark.parametrize("shape", [(100, 192), (33, 70), (768, 2304)])
def test_codes_are_those_of_bitsandbytes(shape):
    bnb = pytest.importorskip("bitsandbytes.functional")
    linear, layer = quantised(*shape)
    codes, state = bnb.quantize_4bit(linear.weight.data, blocksize=BLOCK, quant_type="nf4",
                                     compress_statistics=True)
    assert torch.equal(dynamic_levels(), bnb.create_dynamic_map())
    assert torch.equal(layer.codes[:len(codes)], codes.flatten())
    torch.testing.assert_close(layer.scale_mean, state.offset, rtol=1e-6, atol=0)
    torch.testing.assert_close(layer.scale_scales, state.state2.absmax, rtol=1e-6, atol=0)
    # Its CPU code does not always take the nearest level of a scale: one in 500 is the next one.
    steps = (layer.scale_codes.int() - state.absmax.int()).abs()
    assert steps.max() <= 1 and steps.float().mean() < 0.01


def test_linear_weights_of_gpt2_xl_take_less_than_055_bytes():
    total = held = 0
    with torch.device("meta"):
        for out, size in ((4800, 1600), (1600, 1600), (6400, 1600), (1600, 6400)):
            layer = NF4Linear(nn.Linear(size, out, bias=False))
            held += sum(buffer.numel() * buffer.element_size() for buffer in layer.buffers())
            total += out * size
    assert held / total <= 0.55
    assert held / total == pytest.approx((4 + 8 / 64 + 32 / (64 * 256)) / 8, rel=0.01)


def test_output_and_gradient_are_those_of_the_dequantised_weight():
    linear, layer = quantised(24, 70)
    linear.weight.data.copy_(layer.dequantize())
    x = torch.randn(3, 5, 70, requires_grad=True)
    y = torch.randn(3, 5, 24)
    results = []
    for module in (linear, layer):
        out = module(x)
        results.append((out, *torch.autograd.grad((out * y).sum(), (x, linear.bias))))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)      # float32 sums of 70 products


def test_backward_keeps_no_dequantised_weight():
    _, layer = quantised(64, 128)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(4, 128, requires_grad=True))
    own = {buffer.data_ptr() for buffer in layer.buffers()}
    assert kept and {t.data_ptr() for t in kept} <= own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_works_under_autocast_and_compiles_without_a_graph_break(dtype):
    _, layer = quantised(32, 64)
    x = torch.randn(2, 64, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        a, b = layer(x), compiled(x)
    assert a.dtype == b.dtype == dtype and torch.equal(a, b)
    assert torch.equal(*(torch.autograd.grad(out.sum(), x)[0] for out in (a, b)))


def test_what_is_taken_off_before_quantising_is_added_again():
    linear, plain = quantised(64, 64)
    linear.weight.data += 0.5                                       # a large direction: rank one
    B, A = torch.full((64, 1), 0.5), torch.ones(1, 64)
    layer = NF4Linear(linear, (B, A))
    torch.testing.assert_close(layer.dequantize(), plain.dequantize() + 0.5, rtol=0, atol=1e-6)
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), x @ layer.dequantize().t() + linear.bias,
                               rtol=1e-5, atol=1e-5)
    worse = (nf4_rounded(linear.weight) - linear.weight).norm()
    assert (layer.dequantize() - linear.weight).norm() < 0.2 * worse


def test_a_layer_comes_back_from_its_state():
    _, layer = quantised(24, 64)
    _, other = quantised(24, 64)
    assert not torch.equal(layer.dequantize(), other.dequantize())
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer.dequantize(), other.dequantize())


def test_packed_weights_count_as_parameters_and_operations_and_take_their_bytes():
    shape = GPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=64)
    plain, packed = (add_lora(GPT(shape), LoRAConfig(r=2, quantize=how), quiet=True)
                     for how in ("none", "nf4"))
    assert packed.num_params() == plain.num_params()
    assert packed.flops_per_token() == plain.flops_per_token()
    # 2 blocks of 12 C^2 weights: 4 bytes, or a half, a scale's byte for 64 of them, 4 bytes for 256
    # scales, and in each of 8 layers two tables, 256 x 2 and 256 numbers, and a mean
    weights = 2 * 12 * 64 * 64
    layers = 2 * [3 * 64 * 64, 64 * 64, 4 * 64 * 64, 4 * 64 * 64]
    coarse = sum(-(-count // (64 * 256)) for count in layers)
    saved = 4 * weights - (weights // 2 + weights // 64 + 4 * coarse + 8 * 4 * (3 * 256 + 1))
    assert held_memory(plain, "none", 1) - held_memory(packed, "none", 1) == saved
    assert held_memory(packed, "fsdp", 8) > sum(b.nbytes for b in packed.buffers())

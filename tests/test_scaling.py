"""docs/scaling.md: its tables are what the formulas here give, and the formulas what the code does.

N parameters, n GPUs, A micro-batches of a step on each GPU.
"""
import json
from pathlib import Path

import pytest
import torch

from bench.machine import RESULTS
from bench.peers import SHAPES as STEP_SHAPES
from data import shards
from data.loader import divide_step
from fast import attention
from fast.cross_entropy import head_memory
from fast.linear import use_fast_products
from model import GPT, GPTConfig
from optim import OptimConfig, make_optimizer
from ranks import exit_codes
from run import plan
from run.config import build
from run.device import PEAK_FLOPS, autocast
from run.parallel import Parallel, is_split, lower_stream
from run.plan import GRADIENTS, MOMENTS, WEIGHTS
from run.presets import PRESETS
from run.processes import processes
from train import TrainConfig, train

PAGE = (Path(__file__).parent.parent / "docs" / "scaling.md").read_text(encoding="utf-8")
TINY = dict(block_size=16, vocab_size=128, n_layer=3, n_head=2, n_embd=32)
COPY = 2                    # bytes a parameter of the bfloat16 weights that FSDP gathers
PEAK, PRICE, NVLINK, ADAPTER = PEAK_FLOPS["H100"], 2.0, 450e9, 50e9       # assumed on the page


class Shape:
    """A network, and how many tokens it trains on at once."""

    def __init__(self, name, config, batch_tokens=0, micro_batch=0):
        self.name, self.config = name, config
        self.batch_tokens, self.micro_batch = batch_tokens, micro_batch
        with torch.device("meta"):
            self.model = model = GPT(config)
        self.N = sum(p.numel() for p in model.parameters())         # padded rows included
        self.counted, self.flops = model.num_params(), model.flops_per_token()
        self.block = sum(p.numel() for p in model.transformer.h[0].parameters())

    def state(self, shard, n, accumulate, size=2):
        """Weights, gradients, optimizer state and copies on one GPU in the middle of a step."""
        return plan.state_memory(self.model, shard, n, accumulate, size)

    def evaluating(self, n):
        """On one GPU of a sharded run: every rank gathers the weights."""
        return ((WEIGHTS + MOMENTS) / n + WEIGHTS) * self.N

    def head(self, tokens, device="cuda"):
        return head_memory(tokens, self.config.n_embd, self.config.padded_vocab_size, device)

    def blocks(self, tokens, recompute=False, dtype="bfloat16", device="cuda"):
        """Activations up to the head's input, whose last are those of ln_f and lm_head."""
        size = 2 if dtype == "bfloat16" else 4
        return plan.block_memory(self.model, tokens, size, size if device == "cuda" else 4,
                                 recompute)


def sent_bytes(N, shard, n, accumulation):
    """What each GPU sends in a step, and receives, in rings over all GPUs.

    DDP reduces float32 gradients once. FSDP gathers bfloat16 weights for each micro-batch, twice
    where they are given up between forward and backward, and reduces once, in float32.
    """
    if shard == "none":
        return 2 * (n - 1) / n * GRADIENTS * N
    gathers = accumulation * (2 if shard == "fsdp" else 1)
    return (n - 1) / n * (gathers * COPY + GRADIENTS) * N


def shapes():
    found = [Shape(name, build(GPTConfig, s["model"]), s["batch_tokens"], s["micro_batch"])
             for name in ("gpt2-124m", "gpt2-350m", "gpt2-774m", "gpt2-1558m")
             for s in [PRESETS[name].settings]]
    large = GPTConfig(2048, n_layer=32, n_head=32, n_embd=4096, vocab_multiple=128)
    return [*found, Shape("GPT-3 6.7B's", large, 2**21, 2)]         # 2005.14165, table 2.1


def rows_of(name):
    """The cells of a table of the page, without its head."""
    lines = PAGE.split(f"<!-- {name} -->\n")[1].split("\n<!--")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def gb(*counts):
    return [f"{count / 1e9:,.1f}" for count in counts]


def expected_tables():
    """Name of a table -> the rows that the formulas give."""
    every = shapes()
    found = {name: [] for name in ("shapes", "memory", "limits", "activations", "check",
                                   "communication", "speed", "chinchilla", "data")}
    for s in every:
        c, tokens = s.config, s.micro_batch * s.config.block_size
        found["shapes"].append([
            s.name, *map(str, (c.n_layer, c.n_embd, c.block_size)), f"{s.counted:,}",
            f"{s.flops / 1e9:.3g}", f"{s.batch_tokens:,}"])
        found["memory"].append([s.name, *gb(
            s.state("none", 8, True), *(s.state(shard, 8, more) for shard in ("zero2", "fsdp")
                                        for more in (False, True)), s.evaluating(8))])
        kept, less, head = s.blocks(tokens), s.blocks(tokens, recompute=True), s.head(tokens)
        found["activations"].append([s.name, f"{s.micro_batch} x {c.block_size}", *gb(
            kept, less, head, kept + head, less + head, kept + head + s.state("none", 8, True))])
        for nodes in (1, 2, 4, 8, 16):
            n = 8 * nodes
            A, micro = divide_step(s.batch_tokens, s.micro_batch, c.block_size, n)
            compute = s.flops * s.batch_tokens / (n * PEAK * 0.4)
            speed = NVLINK if nodes == 1 else 8 * ADAPTER       # a node's adapters work together
            times = [sent_bytes(s.N, shard, n, A) / speed for shard in ("none", "zero2", "fsdp")]
            found["communication"].append(
                [s.name if nodes == 1 else "", str(n), f"{A} x {micro}", f"{1000 * compute:,.0f}",
                 *(f"{1000 * time:,.1f}" for time in times),
                 *(f"{time / compute:.0%}" for time in times[::2])])
        for mfu in (0.3, 0.4, 0.5):
            speed = 8 * PEAK * mfu / s.flops
            hours = [tokens / speed / 3600 for tokens in (10e9, 100e9)]
            found["speed"].append([s.name if mfu == 0.3 else "", f"{mfu:.0%}", f"{speed:,.0f}", *(
                cell for time in hours for cell in (f"{time:,.1f}", f"{8 * time * PRICE:,.0f}"))])
        tokens = 20 * s.counted
        hours = tokens * s.flops / (8 * PEAK * 0.4) / 3600
        found["chinchilla"].append([
            s.name, f"{tokens / 1e9:.1f}", f"{tokens / s.batch_tokens:,.0f}",
            f"{tokens * s.flops:.2g}", f"{hours:,.1f}", f"{8 * hours * PRICE:,.0f}",
            f"{10e9 / s.counted:,.1f}"])
    for memory in (80e9, 141e9):                        # a tenth left free, 14 GB of activations
        s = every[-1]
        ways = [("none", 8, True), ("fsdp", 8, True), ("fsdp", 8, False), ("fsdp", 64, False)]
        found["limits"].append([f"{memory / 1e9:.0f}", *gb(
            *((0.9 * memory - 14e9) / s.state(*way) * s.N for way in ways),
            *(0.9 * memory / s.evaluating(n) * s.N for n in (8, 64)))])
    for row in json.loads((RESULTS / "step-cpu.json").read_text())["rows"]:
        if row["mode"] == "eager":
            s, dtype = Shape("", STEP_SHAPES[row["shape"]][0]), row["dtype"]
            tokens = row["micro_batch"] * s.config.block_size
            derived = s.state("none", 1, False, 2 if dtype == "bfloat16" else 4) + s.blocks(
                tokens, dtype=dtype, device="cpu") + s.head(tokens, "cpu")
            found["check"].append([f"{row['shape']}, {row['micro_batch']} x {s.config.block_size}",
                                   dtype, f"{derived / 2**20:,.0f}", f"{row['memory_mib']:,}"])
    for name, tokens in (("10B", 10e9), ("100B", 100e9), ("1T", 1e12)):
        text = tokens * 4.59                            # bytes of text a token; 30 MB/s encoded
        found["data"].append([name, f"{text / 1e9:,.0f}", f"{2 * tokens / 1e9:,.0f}",
                              f"{tokens / 100e6:,.0f}", f"{text / 30e6 / 3600:,.1f}",
                              f"{8 * tokens / GPTConfig.block_size / 1e9:.2f}"])    # int64 a window
    return found


def test_the_tables_are_what_the_formulas_give():
    for name, rows in expected_tables().items():
        assert rows_of(name) == rows, name


def test_hand_worked_figures_of_124m():
    shape = shapes()[0]
    N = 124_439_808 + 47 * 768                          # padded to 50,304 rows
    assert shape.N == N and shape.block == 7_087_872
    assert shape.state("none", 8, True) == 18 * N and shape.state("none", 8, True, 4) == 16 * N
    root, block = N - 12 * 7_087_872, 7_087_872         # 16 / 8 + 4 of all, 2 of what is gathered
    assert shape.state("fsdp", 8, True) == 6 * N + 2 * (root + 2 * block)
    assert shape.state("fsdp", 8, False) == 2 * N + (2 + 4) * root + 2 * (root + 2 * block)
    assert shape.state("zero2", 8, True) == 8 * N
    assert sent_bytes(N, "none", 8, 2) == 7 * N                         # 2 x 7/8 x 4
    assert sent_bytes(N, "fsdp", 2, 3) == 8 * N                         # 1/2 x (3 x 2 x 2 + 4)
    assert sent_bytes(N, "zero2", 2, 3) == 5 * N                        # 1/2 x (3 x 2 + 4)
    # 12 layers x 768 channels x 32 and two last inputs; 12 a logit, 4 a weight of the head
    assert shape.head(1) == 12 * 50304 + 4 * 50304 * 768
    assert shape.blocks(1) == 32 * 12 * 768 + 4 * 768
    assert shape.blocks(1, recompute=True) == (2 * 12 + 36) * 768
    assert shape.blocks(1, device="cpu") == 36 * 12 * 768 + 6 * 768     # its stream is in float32
    assert shape.flops == 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 1024


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_backward_keeps_the_activations_that_are_counted(dtype, recompute, device, monkeypatch):
    """The difference of two depths, so that only blocks are counted."""
    B, T, C = 2, 128, 128
    monkeypatch.setattr(attention, "MASKED_QUERIES", 0)     # of few, some CPUs keep float32

    def network(layers):
        return GPT(GPTConfig(block_size=T, vocab_size=64, n_layer=layers, n_head=2, n_embd=C))

    def kept(layers):
        model = use_fast_products(network(layers))      # as train.py has it
        model.recompute_activations = recompute
        if device == "cuda" and dtype == "bfloat16":    # what Parallel does there, computed here
            lower_stream(model, torch.bfloat16)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        found = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            # Copies of weights are counted with the weights; rows of B x T tokens are activations.
            if storage.data_ptr() not in own and tensor.numel() % (B * T) == 0 and tensor.dim() > 1:
                if {B, B * T} & {tensor.size(0), tensor.size(-1)}:      # last: of a convolution
                    found[storage.data_ptr()] = (storage.nbytes(), tensor)
            return tensor
        idx = torch.zeros(B, T, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), \
                autocast(torch.device("cpu"), getattr(torch, dtype)):
            model(idx, idx)
        return sum(size for size, _ in found.values())
    a_block = (kept(4) - kept(2)) / 2 / (B * T * C)
    size = getattr(torch, dtype).itemsize
    two, four = (plan.block_memory(network(layers), B * T, size, size if device == "cuda" else 4,
                                   recompute) for layers in (2, 4))
    counted = (four - two) / 2 / (B * T * C)
    # Above it: means and deviations of two LayerNorms, and attention's 2 sums; 24 / 128 bytes.
    assert counted <= a_block <= counted + 0.2


def exchange(out):
    """Bytes of the tensors that 2 ranks exchange in a step, and of what each gathers to save."""
    from torch.utils._python_dispatch import TorchDispatchMode
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            if (name := str(function)).startswith("c10d.") and "barrier" not in name:
                flat = torch.utils._pytree.tree_leaves((arguments, keywords))
                sizes.append((name, max(t.nbytes for t in flat if isinstance(t, torch.Tensor))))
            return function(*arguments, **(keywords or {}))

    found = []
    with processes("cpu") as world:
        for shard in ("none", "zero2", "fsdp"):
            for accumulation in (1, 3):
                torch.manual_seed(0)
                model = GPT(GPTConfig(**TINY))
                parallel = Parallel(model, world, shard, torch.bfloat16)
                optimizer = torch.optim.AdamW(model.parameters())
                idx = torch.zeros(2, 16, dtype=torch.long)
                sizes.clear()
                with Sizes():
                    for i in range(accumulation):
                        parallel.sync(i == accumulation - 1)
                        with autocast(world.device, torch.bfloat16):
                            _, loss = parallel.network(idx, idx)
                        loss.backward()
                sent = sum(size * (1 if "allreduce" in name else 0.5) for name, size in sizes)
                optimizer.step()
                held = [*model.parameters(), *(p.grad for p in model.parameters()),
                        *(t for s in optimizer.state.values() for t in s.values() if t.dim())]
                held = sum((t.to_local() if is_split(t) else t).nbytes for t in held)
                leaves = torch.utils._pytree.tree_leaves(parallel.state(optimizer))
                whole = {t.data_ptr(): t.nbytes for t in leaves if isinstance(t, torch.Tensor)
                         and t.dim()}
                found.append((shard, accumulation, sent, sum(whole.values()), held))
        Path(out, f"{world.rank}.json").write_text(json.dumps(found))


def test_two_ranks_hold_exchange_and_gather_what_is_counted(tmp_path):
    assert exit_codes(exchange, 2, str(tmp_path)) == [0, 0]
    with torch.device("meta"):
        model = GPT(GPTConfig(**TINY))
    N = sum(p.numel() for p in model.parameters())
    for rank in range(2):
        for shard, accumulation, sent, whole, held in json.loads(
                (tmp_path / f"{rank}.json").read_text()):
            assert held == plan.held_memory(model, shard, 2), (shard, accumulation)
            assert sent == sent_bytes(N, shard, 2, accumulation), (shard, accumulation)
            counted = (WEIGHTS + MOMENTS) * N
            assert whole == (counted if rank == 0 or shard == "none" else 0), shard


def test_a_dry_run_without_data_says_the_memory_of_the_tables_and_time_cost_and_disk(
        tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shards, "DATA", tmp_path)       # nothing is prepared
    for name, row in zip(("gpt2-124m-gpt3", "gpt2-1558m"), (0, 3)):
        train(build(TrainConfig, {**PRESETS[name].settings, "dry_run": True,
                                  "out": str(tmp_path / "run")}))
        text = capsys.readouterr().out
        ddp, _, zero2, _, fsdp, _ = rows_of("memory")[row][1:]
        assert f"{ddp} with --shard=none, {zero2} with --shard=zero2, {fsdp} with --sh" in text
        together = rows_of("activations")[row][5]
        assert f"{ddp} GB weights, gradients, optimizer and copies, {together} GB activations" in text
        assert "1.00 passes over 9,765,625 rows" in text and "python -m data.fineweb makes" in text
        assert "disk: 28.5 GB download, 45.9 GB unpacked beside it, 20.0 GB token shards" in text
    hours = rows_of("speed")[10][3]                     # of 8 H100 at 40%; 72.17 in all
    assert f"H100,  80 GB: 72.2 hours on 1, {hours} on 8; $288 at $3.99 an hour" in text
    assert not (tmp_path / "run").exists()


def test_a_dry_run_of_a_sharded_run_counts_its_shard(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shards, "DATA", tmp_path)
    train(build(TrainConfig, {**PRESETS["gpt2-1558m"].settings, "dry_run": True, "shard": "fsdp"}))
    assert "9.6 GB weights, gradients, optimizer and copies, 12.9 GB act" in capsys.readouterr().out


def muon_steps(out):
    """The weights after three steps of Muon on each rank, with copies and split."""
    with processes("cpu") as world:
        for shard in ("none", "zero2", "fsdp")[:3 if world.size > 1 else 1]:
            torch.manual_seed(0)
            parallel = Parallel(GPT(GPTConfig(**TINY)), world, shard, torch.float32)
            optimizer = make_optimizer(parallel.model, OptimConfig("muon"), 0.01, 0.1)
            for _ in range(3):
                idx = torch.randint(TINY["vocab_size"], (2, 16))        # on all ranks the same
                parallel.sync(True)
                parallel.network(idx, idx)[1].backward()
                optimizer.step()
                optimizer.zero_grad()
            path = Path(out, f"{world.size}-{world.rank}-{shard}")
            torch.save(parallel.whole().state_dict(), path)


def test_muon_divided_over_ranks_equals_muon_undivided(tmp_path):
    """Four ranks share stacks of 12 and of 6 matrices; of the second the last rank has none."""
    for size in (1, 4):
        assert exit_codes(muon_steps, size, str(tmp_path)) == size * [0]
    alone = torch.load(tmp_path / "1-0-none", weights_only=True)
    for shard in ("none", "zero2", "fsdp"):
        first, *others = (torch.load(tmp_path / f"4-{rank}-{shard}", weights_only=True)
                          for rank in range(4))
        for name, weight in alone.items():
            # gradients are means over ranks, and products of fewer matrices round in another way
            torch.testing.assert_close(first[name], weight, rtol=0, atol=1e-6)
            assert all(torch.equal(first[name], other[name]) for other in others), name


@pytest.mark.parametrize("shard", ["fsdp", "zero2"])
def test_galore_is_refused_where_shard_splits_its_matrices(shard):
    with pytest.raises(ValueError, match=f"shard={shard} splits .* optim.optimizer=galore "):
        TrainConfig(max_steps=1, shard=shard, optim=OptimConfig("galore"))

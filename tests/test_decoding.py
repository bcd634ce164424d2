"""Recorded steps: the ids of the plain ones; what cannot be recorded is said, and costs nothing."""
import contextlib
import copy

import pytest
import torch

from fast import decoding
from fast.decoding import StaticCache, compile_blocks, record_steps
from lora import LoRAConfig, add_lora
from model import GPT, GPTConfig
from sample import Chat

FLOAT32 = torch.float32


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=61, n_layer=3, n_head=2, n_embd=16))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


GREEDY, DRAWN = dict(temperature=0), dict(temperature=1.2, top_k=20)


@pytest.mark.parametrize("changed,settings,rows", [
    *((changed, settings, rows) for changed in ("", "an adapter") for settings in (GREEDY, DRAWN)
      for rows in (1, 3)),
    # a minute of C++ compilation; of plain steps tests/test_model.py compiles one in `make test`
    *(pytest.param("compiled", settings, rows, marks=pytest.mark.slow)
      for settings in (GREEDY, DRAWN) for rows in (1, 3))], ids=str)
def test_static_steps_give_the_ids_of_plain_ones(model, rows, settings, changed):
    """Beyond the context too, where there is no cache."""
    if changed == "an adapter":
        add_lora(model, LoRAConfig(r=2, init="gaussian", target_modules=("c_attn", "c_fc")))
    idx = torch.randint(61, (rows, 5))

    def ids(model):
        return model.generate(idx, 40, stop_ids=[7], generator=torch.Generator().manual_seed(1),
                              **settings)
    plain = ids(copy.deepcopy(model))
    if changed == "compiled":
        torch._dynamo.reset()
        compile_blocks(model)
    assert torch.equal(ids(record_steps(model, FLOAT32)), plain)
    assert isinstance(model.new_cache(1), StaticCache)


def test_a_chat_that_forgets_goes_by_static_steps_too(model):
    plain, static = (Chat.__new__(Chat) for _ in range(2))
    for chat, network in ((plain, copy.deepcopy(model)), (static, record_steps(model, FLOAT32))):
        vars(chat).update(model=network, cache=None, known=[], temperature=0, top_k=None, top_p=1.0,
                          device=torch.device("cpu"), generator=None)
    for prompt in ([3, 1, 4, 1, 5], [3, 1, 4, 9], [3, 1, 4, 9, 2, 6, 5, 3, 5]):
        assert [token for token, _ in zip(static.new_tokens(prompt), range(12))] == \
               [token for token, _ in zip(plain.new_tokens(prompt), range(12))]


def test_weights_are_put_into_autocasts_dtype_without_a_change_of_the_logits(model):
    idx = torch.randint(61, (2, 5))

    def logits(model):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            return model.next_logits(idx, model.new_cache(2))
    plain = logits(copy.deepcopy(model))
    assert torch.equal(logits(record_steps(model, torch.bfloat16)), plain)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert model.transformer.wte.weight.dtype == FLOAT32


class Graph:
    """Stands in for a CUDA graph: it computes the step anew."""
    def __init__(self, right):
        self.right = right

    def replay(self):
        new = self.model._step(self.cache)
        self.cache.logits.copy_(new if self.right else -new)


@pytest.mark.parametrize("right", [True, False, None])
def test_a_graph_is_used_where_it_gives_what_the_plain_step_gives(model, monkeypatch, capsys,
                                                                  right):
    """Another is said and not used; None: it cannot be recorded at all."""
    idx = torch.randint(61, (2, 5))
    plain = copy.deepcopy(model).generate(idx, 20, temperature=0)
    record_steps(model, FLOAT32)
    new_cache, made = model.new_cache, []

    def noted(*given):
        made.append(new_cache(*given))
        return made[-1]

    def graph():
        graph = Graph(right)
        graph.model, graph.cache = model, made[-1]
        return graph
    monkeypatch.setattr(decoding, "on_a_gpu", lambda idx: True)
    monkeypatch.setattr(model, "new_cache", noted)
    if right is not None:
        monkeypatch.setattr(torch.cuda, "CUDAGraph", graph)
        monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    assert torch.equal(model.generate(idx, 20, temperature=0), plain)
    said = capsys.readouterr().err
    assert said.startswith("" if right else "warning: a step could not be recorded as a CUDA graph")
    assert bool(said) != bool(right) and said.count("\n") == (not right)
    assert (made[0].graph is not None) == bool(right)

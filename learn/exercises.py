"""The exercises: what each asks for, and how an answer is tried inside the project.

A trial yields (what, value): calls of the project, made once with its own function and once with
the reader's in its place; its docstring is the title and the definition in words. A mistake is what
comes out where words of the source are exchanged (old, new, old, new ...), so that a wrong answer
is known by its numbers. One more exercise is one more of each.
"""
from dataclasses import dataclass
from typing import Any, Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bpe
import lora
import optim
from data import chat, loader
from data.shards import Tokens
from eval import hellaswag
from eval.hellaswag_items import Item
from fast.cross_entropy import IGNORE, linear_cross_entropy
from learn import plain
from learn.source import replaced
from model import GPT, GPTConfig, sample_token

Trial = Iterator[tuple[str, Any]]
IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])              # (B, T)
TARGETS = torch.tensor([[1, 4, 1, 5, 9], [IGNORE, IGNORE, 5, 3, IGNORE]])


def tiny(**changes: int) -> GPT:
    """A GPT of two small blocks, its weights so large that a wrong formula shows."""
    torch.manual_seed(0)
    sizes = dict(block_size=32, vocab_size=11, n_layer=2, n_head=2, n_embd=8)
    model = GPT(GPTConfig(**{**sizes, **changes})).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model


def bpe_merge() -> Trial:
    """Replace a pair of neighbouring tokens by a new token

    Go through the word from left to right. Where the next two tokens are the pair, write the new
    token and go on behind both; else keep the token."""
    for word, pair in (([1, 2, 3, 1, 2, 1], (1, 2)), ([7, 7, 7], (7, 7))):
        yield f"merge({word}, {pair}, 9)", bpe.merge(word, pair, 9)
    yield "merges of train_slowly", bpe.train_slowly({b"hugs": 5, b"aaaa": 2, b"pug": 3}, 5)


def bpe_encode() -> Trial:
    """Encode words by the merges that were learned

    made[pair] is the id that a merge makes; a smaller one was learned earlier. In each word, take
    the earliest merge that fits, `merge` it everywhere, look again, until none fits."""
    made = {(98, 99): 256, (97, 98): 257, (98, 100): 258}
    yield "abc and abd, where bc was learned first, then ab, then bd", bpe.encode_slowly(
        [b"abc", b"abd"], made)
    tok = bpe.Tokenizer(bpe.train_slowly({b"hugs": 5, b" pugs": 4, b" bugs": 3, b" hub": 2}, 8))
    yield "a sentence, by a Tokenizer", tok.encode_slowly("hugs hub bugs, pugs and mugs")


def windows() -> Trial:
    """Inputs and targets of a batch

    Window w has the T = block_size tokens from w * T on as inputs, and the tokens one further on as
    targets. tokens.read(start, stop) gives fewer at the end of the data: there inputs are filled up
    with 0, targets with IGNORE."""
    tokens = Tokens([np.arange(10, 16, dtype=np.uint16), np.arange(16, 24, dtype=np.uint16)])
    for name, part in zip(("inputs", "targets"), loader.read_windows(tokens, np.arange(3), 5)):
        yield f"{name} of windows 0, 1, 2 of the ids 10 to 23, T = 5", part.flatten()
    batches = loader.WindowLoader(tokens, 4, batch_tokens=8, micro_batch=1).batches(0)
    yield "a step of WindowLoader", torch.stack([torch.cat(batch) for batch in batches])


def layer_norm() -> Trial:
    """Normalise each row of activations

    A row is the last dimension of x. Subtract its mean; divide by the root of (variance + eps),
    where the variance is the mean square of what is left; then weight and bias, which may be None.
    """
    torch.manual_seed(0)
    x, weight, bias = torch.randn(3, 8) * 4 + 2, torch.randn(8), torch.randn(8)
    yield "3 rows of 8", F.layer_norm(x, (8,), weight, bias)
    yield "rows that hardly vary, so that eps counts", F.layer_norm(x / 1000, (8,), weight, bias)
    yield "without a bias", F.layer_norm(x, (8,), weight, None)
    yield "logits of a GPT", tiny()(IDS)[0]


def attention() -> Trial:
    """Causal self-attention, with heads and a cache

    self.c_attn makes q, k and v of x, one behind the other (C to 3C); each is cut into self.n_head
    heads of D channels. In each head a token takes the mean of the values of tokens up to itself,
    with weights softmax(q k^T / sqrt(D)). Heads side by side again, then self.c_proj. A mask says
    instead what a row may see. A cache is (keys, values, past): write the new k and v behind the
    `past` ones that are in it, and attend to all of them. Dropout is not tried."""
    model = tiny()
    yield "2 x 5 tokens through one layer", model.transformer.h[0].attn(torch.randn(2, 5, 8))
    yield "logits of a GPT", model(IDS)[0]
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]])
    yield "two texts in a row, by a mask", model(IDS, positions=positions)[0]
    cache = model.new_cache(2)
    for start, end in ((0, 2), (2, 4), (4, 5)):
        yield (f"logits of tokens {start} to {end - 1}, the ones before in a cache",
               model(IDS[:, start:end], cache=cache)[0])


def cross_entropy() -> Trial:
    """The loss of a language model, and its gradient

    Derive the gradient by hand: it is short. Logits may be large, and exp(1000) is inf."""
    torch.manual_seed(0)
    logits, targets = torch.randn(10, 11), TARGETS.flatten()
    for name, factor in (("10 rows", 1), ("10 rows of logits up to 700", 300)):
        nats, gradient = plain.cross_entropy(logits * factor, targets)
        yield f"nats of {name}, some without label", nats
        yield f"gradient of {name}", gradient
    model = tiny()
    with replaced(linear_cross_entropy, head_loss):
        model(IDS, TARGETS)[1].backward()
    yield "gradient of a GPT's token table", model.lm_head.weight.grad


def head_loss(x: Tensor, head: nn.Module, targets: Tensor, vocab_size: int) -> Tensor:
    """linear_cross_entropy by plain.cross_entropy: its loss, with the gradient that it gives."""
    logits = head(x)[:, :vocab_size]
    nats, gradient = plain.cross_entropy(logits.detach(), targets)
    through = (logits * gradient).sum()
    return through + (nats.sum() - through).detach()


def accumulate() -> Trial:
    """One step's gradient from micro-batches of unequal size

    The loss of a step is the mean over the labelled tokens of all its micro-batches. One of them is
    in memory at once: model(x, y, reduction="sum") is (None, sum of its losses), of which
    .backward() adds the gradient to what is there."""
    one, none = torch.full_like(TARGETS, IGNORE), torch.full_like(TARGETS, IGNORE)
    one[0, 2] = 7
    model = tiny()
    yield "loss of micro-batches with 7, 1 and 0 labels", plain.accumulate(
        model, [(IDS, TARGETS), (IDS.flip(0), one), (IDS, none)])
    yield "gradient of the token table", model.lm_head.weight.grad.clone()
    batches = loader.WindowLoader(Tokens([np.arange(20) % 11]), 8, batch_tokens=24, micro_batch=1)
    yield "a step of WindowLoader", plain.accumulate(model, list(batches.batches(0)))


def schedule() -> Trial:
    """The learning rate of each step

    Step s of w warmup steps has peak * (s + 1) / w. Behind warmup, `done` is the share of the other
    steps that is over: 0 at the first of them. SCHEDULES[schedule](done, config) is how far above
    the floor the rate is: 1 at the peak, 0 at the floor. (An unknown schedule is not tried.)"""
    for name, warmup in (("cosine", 3), ("cosine", 0), ("linear", 10)):
        yield f"{name}, steps 0 to 9 with {warmup} of warmup, peak 2, floor 1", [
            optim.learning_rate(step, name, 10, warmup, 2.0, 1.0) for step in range(10)]


def adamw() -> Trial:
    """AdamW: a gradient becomes an update

    Keep in `state`, by names of yours, the running mean of gradients (decay config.beta1) and of
    their squares (beta2), from zero on: both are too small at first, by 1 - beta ** steps; divide
    by that. The update is the mean / (root of the mean square + config.eps). Where `skip`, a bool
    tensor, is true, the gradient may be NaN and the state stays as it is."""
    torch.manual_seed(0)
    state, config, no = {}, optim.OptimConfig(eps=0.01), torch.tensor(False)
    for step in (1, 2, 3):
        yield f"update {step}", optim.adamw(torch.randn(4) / step, state, config, no)
    optim.adamw(torch.full((4,), torch.nan), state, config, ~no)
    yield "update 4, after a NaN to skip", optim.adamw(torch.ones(4), state, config, no)
    model = tiny()
    model(IDS, TARGETS)[1].backward()
    optim.make_optimizer(model, optim.OptimConfig("galore"), 0.1, weight_decay=0.1).step()
    yield "a GPT's weight after a step of GaLore", model.transformer.h[0].mlp.c_fc.weight


def newton_schulz() -> Trial:
    """The step that Muon takes five times, towards an orthogonal matrix

    X becomes P X, where P = a I + b S + c S^2 of S = X X^T, with a = 3.4445, b = -4.7750 and
    c = 2.0315. Make P of each S of a stack (k, n, n)."""
    torch.manual_seed(0)
    gradient = torch.randn(3, 5)
    scaled = gradient / gradient.norm()
    yield "P of X (3, 5)", optim.newton_schulz((scaled @ scaled.mT)[None])
    yield "Muon's update", optim.orthogonal([gradient], [1])[0]


def top_p() -> Trial:
    """Draw the next token: temperature, top-k, top-p

    Temperature 0 takes the likeliest. Else divide the logits by it; keep the top_k largest; of
    their softmax keep the likeliest tokens, as few as together have probability top_p or more; draw
    one of these. top_k and top_p may be None."""
    logits = torch.tensor([0.06, 0.4, 0.04, 0.3, 0.2]).log().expand(9999, 5)
    yield "the likeliest of 2 rows, by temperature=0", sample_token(logits[:2], temperature=0)
    for settings in ({"temperature": 2.0}, {"top_k": 3}, {"top_p": 0.65},
                     {"temperature": 0.5, "top_p": 0.5}):
        generator = torch.Generator().manual_seed(0)
        ids = sample_token(logits, **settings, generator=generator)
        yield f"tokens drawn from p = 0.06 0.4 0.04 0.3 0.2 with {settings}", ids.unique()
        yield f"their shares with {settings}", (ids.bincount() / len(ids) * 10).round() / 10
    yield "greedy text, by top_p", tiny().generate(IDS, 6, top_p=1e-6)


def labels() -> Trial:
    """Which tokens of a conversation are learned

    encode(messages, tokenizer, template) gives the ids and the spans (start, end) of answers, the
    tokens that end them included; chosen_spans(spans, labels) those to learn. A label is the id at
    the same place, or IGNORE: the shift by one comes later, when batches are made."""
    talk = [{"role": role, "content": text} for role, text in (
        ("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "1+1?"),
        ("assistant", "2"))]
    for template, which in (("plain", "all"), ("plain", "last"), ("chatml", "all")):
        tok = chat.extend_tokenizer(bpe.Tokenizer([]), template)
        for name, part in zip(("ids", "labels"), chat.render(talk, tok, template, which)):
            yield f"{name} of five messages, template {template}, labels={which}", part


def adapted() -> tuple[GPT, nn.Module]:
    """A GPT with half of an adapter that has learned something, and one of its layers."""
    model = lora.add_lora(tiny(), lora.LoRAConfig(r=2, alpha=6, target_modules=(
        "c_attn.q", "c_attn.v", "c_proj")), quiet=True)
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    lora.set_adapter(model, {"default": 0.5})
    return model, model.transformer.h[0].attn.c_attn


def lora_layer() -> Trial:
    """A low-rank change of what a frozen layer gives

    To `out` add dropout(x) A^T B^T, times self.scale (alpha / r) and times `share` (of a mixture).
    A is self.lora_A (R, in), B self.lora_B (rows, R); spread(B, self.rows, out.size(-1)) is B with
    zeros for rows of the layer that do not change. Dropout (self.dropout) is not tried."""
    model, layer = adapted()
    x, out = torch.randn(2, 5, 8), torch.randn(2, 5, 24)
    for (change, share), part in zip(layer.changes(layer.active), "qv"):
        yield f"c_attn.{part}, half of its change", change(x, out, share)
    yield "logits of a GPT with an adapter", model(IDS)[0]


def lora_merge() -> Trial:
    """The weight of a layer with its adapters in it

    weight_of(base), plus share * scale * B A of each (change, share). factors(change) gives A (R,
    in) and B (rows, R); spread as in lora_layer. DoRA (change.lora_magnitude) is not tried."""
    model, layer = adapted()
    yield "c_attn with half of the changes of q and v", lora.merged_weight(
        layer.base_layer, layer.changes(layer.active))
    with replaced(lora.say, str):
        lora.merge_lora(model)
    yield "logits of a GPT with a merged adapter", model(IDS)[0]


def hellaswag_score() -> Trial:
    """How likely is an ending after its context?

    model(ids (1, T)) is (logits (1, T, V), None). Run it once on both, and add up log softmax(
    logits)[token] over the ending's tokens, each at the position that predicts it."""
    model, tok = tiny(vocab_size=257, block_size=64), bpe.Tokenizer([])
    yield "ending [70, 8, 9] after [4, 50]", plain.ending_score(model, [4, 50], [70, 8, 9])
    items = [Item(f"A {animal}", "", ("eats", "sleeps", "is green", "x"), 1)
             for animal in ("cat", "dog", "frog", "horse")]
    with replaced(hellaswag.score_batch, score_batch):
        found = hellaswag.evaluate(model, tok, items)
    yield "accuracy on 4 items", found["acc"]


def score_batch(model: GPT, batch: list[hellaswag.Question], sums: Tensor) -> None:
    """hellaswag.score_batch by plain.ending_score, an ending at a time."""
    for question in batch:
        for ending, slot in zip(question.endings, question.slots):
            sums[slot] = plain.ending_score(model, list(question.context), ending)


@dataclass(frozen=True)
class Exercise:
    """A function to write: it is cut from `source`, and tried in its place or in `place`."""
    trial: Callable[[], Trial]
    source: str
    minutes: int
    hint: str
    mistakes: dict[str, tuple[str, ...]]
    place: Callable | None = None


EXERCISES = {exercise.trial.__name__: exercise for exercise in (
    Exercise(bpe_merge, "bpe.py:merge", 10,
             "A while loop with an index, which moves on by 2 behind a pair and else by 1.",
             {"a token is part of two pairs": ("i += 2", "i += 1"),
              "the last token is lost": ("i < len(word)", "i < len(word) - 1")}),
    Exercise(bpe_encode, "bpe.py:encode_slowly", 15,
             "min(pairs, key=made.get) is the earliest of the pairs that are in `made`.",
             {"the first pair that fits is merged, not the earliest": (
                 "min(pairs, key=made.get)", "pairs[0]"),
              "the latest merge comes first": ("min(", "max(")}),
    Exercise(windows, "data/loader.py:read_windows", 15,
             "Of ids = tokens.read(start, start + T + 1): inputs ids[:-1], targets ids[1:].",
             {"targets are the inputs, not one further on": ("ids[1:]", "ids[:-1]"),
              "targets are filled up with 0, which is a token": ("IGNORE", "0"),
              "windows begin T + 1 apart, so that some tokens are never a target": (
                  "* block_size", "* (block_size + 1)")}),
    Exercise(layer_norm, "learn/plain.py:layer_norm", 10,
             "x.mean(-1, keepdim=True) can be subtracted from x.",
             {"the variance is divided by C - 1": (
                 "square().mean(-1, keepdim=True)", "square().sum(-1, keepdim=True) / 7"),
              "eps is added to the root, not under it": (" + eps).sqrt()", ").sqrt() + eps"),
              "the mean is not subtracted (RMSNorm)": ("(x - mean)", "x")}, F.layer_norm),
    Exercise(attention, "model.py:CausalSelfAttention.forward", 40,
             "part.view(B, T, H, D).transpose(1, 2) of each part of self.c_attn(x).split(C, dim=2);"
             "\nthen q @ k.transpose(2, 3) is (B, H, T, T). Or F.scaled_dot_product_attention.",
             {"scores are not divided by sqrt(D)": ("is_causal=", "scale=1.0, is_causal="),
              "scores are divided by sqrt(C) instead of sqrt(D)": (
                  "is_causal=", "scale=C ** -0.5, is_causal="),
              "a token sees later ones": ("mask is None and not past", "False"),
              "heads are joined without going back to (B, T, H, D)": ("y.transpose(1, 2)", "y")}),
    Exercise(cross_entropy, "learn/plain.py:cross_entropy", 30,
             "nats: logsumexp(logits) - logits[target]. Gradient: softmax, less 1 at the target.",
             {"exp overflows: logsumexp does not": ("logsumexp(-1)", "exp().sum(-1).log()"),
              "the gradient lacks the -1 at the target": ("-= 1", "-= 0"),
              "rows without label count": ("* labelled[:, None]", "", "* labelled", "")}),
    Exercise(accumulate, "learn/plain.py:accumulate", 20,
             "Count the labels of all micro-batches first, then divide each sum by that.",
             {"it is a mean of means: a micro-batch with few labels weighs too much": (
                 "/ labels", "/ (y != IGNORE).sum().clamp(1) / len(micro_batches)"),
              "means of micro-batches are added up": (
                  "/ labels", "/ (y != IGNORE).sum().clamp(1)")}),
    Exercise(schedule, "optim.py:learning_rate", 10,
             "done = (step - warmup_steps) / (max_steps - warmup_steps); beware of 0 / 0.",
             {"warmup starts at zero, which wastes a step": ("(step + 1)", "step"),
              "steps of warmup count as steps of the schedule": ("step - warmup_steps", "step"),
              "the floor is missing": ("floor + (peak - floor)", "peak")}),
    Exercise(adamw, "optim.py:adamw", 30,
             "follow(mean, value, decay, skip) moves a running mean in place, and returns it.",
             {"there is no bias correction": (" / (1 - config.beta2 ** steps)", "",
                                              " / (1 - config.beta1 ** steps)", ""),
              "the mean has no bias correction": (" / (1 - config.beta1 ** steps)", ""),
              "the mean square has no bias correction": (" / (1 - config.beta2 ** steps)", "")}),
    Exercise(newton_schulz, "optim.py:newton_schulz", 10,
             "S^2 is S @ S; a I is a on the diagonal of each matrix, or a * torch.eye(n).",
             {"S is squared entry by entry": (
                 "torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)",
                 "-4.7750 * square + 2.0315 * square * square"),
              "the last term is missing": ("alpha=2.0315", "alpha=0")}),
    Exercise(top_p, "model.py:sample_token", 30,
             "Sorted: a token stays where those before it have less than top_p together.",
             {"the token that crosses top_p is dropped": ("ordered.cumsum(dim=-1) - ordered",
                                                          "ordered.cumsum(dim=-1)"),
              "the mask is in sorted order, not that of the tokens": (
                  ".scatter(-1, order, cut)", ""),
              "logits are multiplied by the temperature": ("logits / temp", "logits * temp")}),
    Exercise(labels, "data/templates.py:render", 15,
             "Begin with [IGNORE] * len(ids), and copy ids into each chosen span.",
             {"questions are learned too": ("[IGNORE] * len(ids)", "list(ids)"),
              "labels are shifted by one already": ("found[start:end]", "found[start - 1:end - 1]"),
              "an answer's end has no label, so that none is learned": ("end]", "end - 1]"),
              "all answers are learned where only the last one is wanted": (
                  "chosen_spans(spans, labels)", "spans")}),
    Exercise(lora_layer, "lora.py:LowRank.forward", 15,
             "F.linear(x, A) is x @ A.T: down to R channels, scale there, then up.",
             {"the scale alpha / r is missing": ("self.scale * share", "share"),
              "the share is missing": ("self.scale * share", "self.scale")}),
    Exercise(lora_merge, "lora.py:merged_weight", 15,
             "Shapes say the order: (out, R) @ (R, in).",
             {"the scale alpha / r is missing": ("change.scale * ", ""),
              "the share is missing": ("share * change", "change")}),
    Exercise(hellaswag_score, "learn/plain.py:ending_score", 20,
             "Logits at position t predict token t + 1.",
             {"the context is scored too": ("len(context) - 1", "0"),
              "a token is looked up where it stands, not where it is predicted": (
                  "[None, :-1]", "[None]", "[first:]", "[first + 1:]"),
              "it is the mean over tokens, not their sum": (".sum()", ".mean()")}))}

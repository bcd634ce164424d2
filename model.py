"""GPT-2, by hand: token ids in, logits and loss out.

    model = GPT(GPTConfig(n_layer=12, n_head=12, n_embd=768))
    logits, _ = model(idx)                         # idx (B, T) -> logits (B, T, V)
    _, loss = model(idx, targets)                  # targets (B, T), -100 where there is no label
    ids = model.generate(idx, max_new_tokens=50)   # (B, T + 50)
    model = GPT.from_pretrained("gpt2")            # OpenAI's weights, or a Hugging Face folder
    model.save_pretrained("folder")                # and back

Shapes: B batch, T time, C channels (n_embd), H heads, D head size (C / H), V vocabulary.

References: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", and OpenAI's
code for it (github.com/openai/gpt-2); tensors are named as there and in Hugging Face's GPT2LMHead.
"""
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from fast.cross_entropy import IGNORE, linear_cross_entropy

__all__ = ["GPT", "GPTConfig", "KVCache", "SIZES", "sample_token"]      # what pydoc is to show

INIT_STD = 0.02
STOPS_ASKED = {"cpu": 1}    # tokens between looks for stop ids; to ask a GPU is to wait for it
SIZES = {               # parameters: 124,439,808  354,823,168  774,030,080  1,557,611,200
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600)}


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT. ValueError, with the nearest that fits, for one that cannot be."""
    block_size: int = 1024  # the longest context, in tokens
    vocab_size: int = 50257  # number of tokens; training takes it from the data's tokenizer
    n_layer: int = 12  # number of blocks
    n_head: int = 12  # attention heads of a block
    n_embd: int = 768  # channels; a multiple of n_head
    dropout: float = 0.0  # share of activations dropped: embeddings, attention, residuals
    bias: bool = True  # biases in linear layers and LayerNorms, as GPT-2 has them
    vocab_multiple: int = 1  # embedding rows are rounded up to a multiple of this (128: 50257 ->
        # 50304, faster on GPUs); the new ids are never scored or sampled

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "vocab_multiple"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.n_embd % self.n_head:
            near = max(1, round(self.n_embd / self.n_head)) * self.n_head
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}; "
                             f"try {near}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} is not in [0, 1)")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size rounded up to vocab_multiple."""
        return math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple


@dataclass
class KVCache:
    """Keys and values of the tokens that a model has read, so that each is computed once."""
    keys: Tensor                                                    # (layer, B, H, capacity, D)
    values: Tensor
    length: int = 0                     # tokens that are in it; GPT.features moves it on

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor, int]:
        return self.keys[layer], self.values[layer], self.length    # what a layer reads and fills


class CausalSelfAttention(nn.Module):
    """Each token takes a mix of the values of those up to itself, weighted by how its query fits
    their keys: softmax(q k^T / sqrt(D)) v, in each head."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k, v
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head, self.dropout = config.n_head, config.dropout

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: tuple | None = None) -> Tensor:
        """x (B, T, C) -> (B, T, C). mask: bool, True where row may see column; (B, 1, T, T), or
        (T, past + T) with a cache, which the new keys and values are added to."""
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
                   for part in self.c_attn(x).split(C, dim=2))      # (B, H, T, D) each
        past = 0
        if cache:
            keys, values, past = cache                              # (B, H, capacity, D) each
            keys[:, :, past:past + T], values[:, :, past:past + T] = k, v
            k, v = keys[:, :, :past + T], values[:, :, :past + T]
        # Without a mask, token i sees those up to itself; one new token after a past sees it all.
        attend = getattr(self, "attend", F.scaled_dot_product_attention)    # or fast/attention.py's
        y = attend(q, k, v, attn_mask=mask, is_causal=mask is None and not past,
                   dropout_p=self.dropout if self.training else 0.0)                # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    """Each token on its own, through 4 C channels: c_proj(gelu(c_fc(x)))."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        x = F.gelu(self.c_fc(x), approximate="tanh")                # (B, T, 4C); GPT-2 used tanh
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    """Attention, then the MLP, each added to its input and reading it through a LayerNorm."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: tuple | None = None) -> Tensor:
        """x (B, T, C) -> (B, T, C); mask and cache as in CausalSelfAttention."""
        x = x + self.attn(self.ln_1(x), mask, cache)                # (B, T, C)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2. `recompute_activations = True` saves memory and costs a second forward pass."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config, self.recompute_activations = config, False
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.padded_vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight           # tied: one tensor, two uses
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=INIT_STD)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        # The sum of all branches is to have the variance of one (GPT-2 paper, section 2.3).
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=INIT_STD / math.sqrt(2 * config.n_layer))

    def forward(self, idx: Tensor, targets: Tensor | None = None, positions: Tensor | None = None,
                reduction: str = "mean", cache: KVCache | None = None):
        """(logits (B, T, V), None) without targets, (None, loss) with them.

        idx: (B, T) int64 token ids. targets: (B, T) int64, IGNORE where there is no label. loss:
        cross-entropy in nats, `reduction` "mean" over the labelled tokens (0 when there is none) or
        "sum". positions: see `features`. With a cache, idx are the tokens that follow those in it.
        """
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction={reduction!r} is unknown; choose mean or sum")
        x = self.features(idx, positions, cache)                    # (B, T, C)
        if targets is None:
            return self.lm_head(x)[..., :self.config.vocab_size], None          # (B, T, V)
        # F.cross_entropy(lm_head(x), targets, reduction="sum"), without all logits at once
        loss = linear_cross_entropy(x.flatten(0, 1), self.lm_head, targets.flatten(),
                                    self.config.vocab_size)
        if reduction == "mean":
            loss = loss / (targets != IGNORE).sum().clamp(min=1)
        return None, loss

    def features(self, idx: Tensor, positions: Tensor | None = None,
                 cache: KVCache | None = None) -> Tensor:
        """The last hidden states, after the final LayerNorm: idx (B, T) -> (B, T, C). positions
        (B, T) are for rows of several samples: 0, 1, ... in each, and none sees the others."""
        T, past = idx.size(1), cache.length if cache else 0
        if past + T > self.config.block_size:
            raise ValueError(f"a sequence of {past + T} tokens is longer than "
                             f"block_size={self.config.block_size}; shorten it")
        mask = None
        if positions is not None:
            sample = (positions == 0).cumsum(dim=1)                 # (B, T): which of its row
            mask = (sample[:, None, :, None] == sample[:, None, None, :]).tril()    # (B, 1, T, T)
        else:
            positions = torch.arange(past, past + T, device=idx.device)
            if past and T > 1:
                mask = torch.ones(T, past + T, dtype=torch.bool, device=idx.device).tril(past)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)         # (B, T, C)
        x = F.dropout(x, self.config.dropout, self.training)
        for layer, block in enumerate(self.transformer.h):
            if self.recompute_activations and self.training:
                x = checkpoint(block, x, mask, use_reentrant=False)
            else:
                x = block(x, mask, cache[layer] if cache else None)
        if cache:
            cache.length += T
        return self.transformer.ln_f(x)

    @torch.no_grad()
    def generate(self, idx: Tensor, max_new_tokens: int, temperature: float = 1.0,
                 top_k: int | None = None, top_p: float | None = None,
                 stop_ids: Iterable[int] = (), generator: torch.Generator | None = None):
        """Continue idx (B, T) by max_new_tokens: (B, T + new) int64, dropout off.

        temperature 0 is greedy. top_k keeps the k likeliest tokens, top_p the likeliest ones that
        together have probability p. A row ends at its first stop id and repeats it from there; when
        all rows have ended, fewer columns come back. Beyond block_size the model sees the last
        block_size tokens: positions shift, so the cache is no use and a token costs a full pass.
        """
        if idx.dim() != 2 or idx.size(1) == 0:
            raise ValueError(f"idx has shape {tuple(idx.shape)}; generate needs (B, T) with T >= 1")
        if temperature < 0:
            raise ValueError(f"temperature={temperature} must be 0 (greedy) or more")
        was_training = self.training
        self.eval()
        (B, T), block_size = idx.shape, self.config.block_size
        stop_ids = sorted(stop_ids)
        stops = torch.tensor(stop_ids, dtype=torch.long, device=idx.device)
        ended = torch.zeros(B, dtype=torch.bool, device=idx.device)
        out = torch.cat([idx, idx.new_full((B, max_new_tokens), (stop_ids or [0])[0])], dim=1)
        cache = self.new_cache(B, min(block_size, T + max_new_tokens)) if T < block_size else None
        unread = idx[:, -block_size:]                               # what the cache has not seen
        for end in range(T, T + max_new_tokens):
            if cache is None or cache.length + unread.size(1) > block_size:
                cache, unread = None, out[:, max(0, end - block_size):end]
            logits = self.next_logits(unread, cache)                # (B, V)
            new = sample_token(logits, temperature, top_k, top_p, generator)
            out[:, end] = torch.where(ended, out[:, end - 1], new)  # (B,)
            unread = out[:, end:end + 1]
            if len(stops):
                ended |= torch.isin(out[:, end], stops)
                if (end - T) % STOPS_ASKED.get(idx.device.type, 16) == 0 and ended.all():
                    break
        self.train(was_training)
        unended = (~torch.isin(out[:, T:], stops)).any(dim=0).sum()         # columns
        return out[:, :T + 1 + unended] if len(stops) else out

    @sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
    def next_logits(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits (B, V), in float32, after idx (B, T). No cuDNN: it plans for each new length."""
        x = self.features(idx, cache=cache)[:, -1]                  # (B, C): only the last token
        return self.lm_head(x)[:, :self.config.vocab_size].float()

    def new_cache(self, batch_size: int, capacity: int | None = None) -> KVCache:
        """An empty cache for `capacity` tokens (default block_size) of `batch_size` sequences."""
        c, weight = self.config, self.transformer.wte.weight
        shape = (c.n_layer, batch_size, c.n_head, capacity or c.block_size, c.n_embd // c.n_head)
        kind = weight.device.type                                   # keys come in autocast's dtype
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        return KVCache(weight.new_empty(shape, dtype=dtype), weight.new_empty(shape, dtype=dtype))

    def crop_context(self, block_size: int) -> None:
        """Shorten the context, in place: the last positions are left out."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(f"block_size={block_size} is not in 1 to {self.config.block_size}, "
                             f"the context of the model")
        wpe = self.transformer.wpe
        wpe.weight = nn.Parameter(wpe.weight.detach()[:block_size].clone())
        wpe.num_embeddings = block_size
        self.config = replace(self.config, block_size=block_size)

    def num_params(self) -> int:
        """Parameters, packed ones too (NF4), tied ones once, padded rows of the vocabulary not."""
        padding = (self.config.padded_vocab_size - self.config.vocab_size) * self.config.n_embd
        packed = [m.in_features * m.out_features for m in self.modules() if hasattr(m, "codes")]
        return sum(p.numel() for p in self.parameters()) + sum(packed) - padding

    def flops_per_token(self) -> int:
        """Operations to train on a token: 6 a weight of a matrix product, 4 of a frozen one, and
        12·n_layer·C·T for attention, not halved for being causal (PaLM, 2204.02311, appendix B)."""
        c, matmul = self.config, self.num_params() - self.transformer.wpe.weight.numel()
        trained = min(matmul, sum(p.numel() for p in self.parameters() if p.requires_grad))
        return 4 * matmul + 2 * trained + 12 * c.n_layer * c.n_embd * c.block_size

    @staticmethod
    def from_pretrained(name: str | Path, dropout: float = 0.0,
                        block_size: int | None = None) -> "GPT":
        """GPT-2 from the hub ("gpt2", "gpt2-medium", "user/name"), from a Hugging Face folder (both
        need the extra `hf`), or from llm.c's file ("gpt2_124M.bin"). block_size: a shorter context
        than the model's. A file that is no GPT-2, or damaged, is a ValueError."""
        from formats import gpt2
        config, tensors = gpt2.read(name)
        with torch.device("meta"):                                  # no init to be overwritten
            model = GPT(GPTConfig(**config, dropout=dropout))
        model.load_state_dict(tensors, assign=True)
        model.lm_head.weight = model.transformer.wte.weight
        if block_size is not None:
            model.crop_context(block_size)
        return model

    def save_pretrained(self, folder: str | Path, end: int | None = None) -> None:
        """Write config.json and model.safetensors, as transformers' GPT2LMHeadModel reads them.

        end: the token that ends documents. `python -m run.export` gives it, and writes a tokenizer.
        ValueError if the forward pass is not GPT-2's, so that the files would compute other logits.
        """
        from formats import gpt2
        c, device, was_training = self.config, self.lm_head.weight.device, self.training
        idx = torch.arange(min(16, c.block_size), device=device)[None] % c.vocab_size   # (1, T)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            logits, _ = self.eval()(idx)                            # what the files have to give
            self.train(was_training)
            gpt2.write(folder, asdict(c), self.state_dict(), end, idx, logits)


def sample_token(logits: Tensor, temperature: float = 1.0, top_k: int | None = None,
                 top_p: float | None = None, generator: torch.Generator | None = None):
    """One token id a row: logits (B, V) -> (B,) int64. See `GPT.generate` for the settings."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if top_k and top_k < logits.size(-1):                           # 0: all, as in sample.py
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.softmax(dim=-1).sort(dim=-1, descending=True)
        cut = ordered.cumsum(dim=-1) - ordered >= top_p             # likelier ones have top_p already
        logits = logits.masked_fill(cut.scatter(-1, order, cut), -math.inf)     # in ids' order
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]

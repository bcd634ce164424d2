"""A page on how a model reads a text: one file for a browser, which needs no network.

    python sample.py out/demo --prompt="Return the value of" --explain=page.html
    python sample.py out/sft-demo --prompt="What does len do?" --explain=page.html

It shows what the model expected at each token, where the loss comes from, what it would say after
each block (the logit lens) and what each head attends to; with an adapter all of it with and
without. A model that was trained on conversations answers first, and the page says which tokens
training would give a label. Figures are those of the model in float32, to 1e-6.

    figures = explain(model, tokenizer, ids, labelled)      # the page's figures, as it reads them

Shapes: T tokens, C channels, L layers, H heads, D head size, V vocabulary.
Reference: nostalgebraist 2020, "interpreting GPT: the logit lens".
"""
import base64
import contextlib
import json
import math
from pathlib import Path
from typing import Any, Sequence

import numpy as np
import torch
from torch import Tensor

from bpe import Tokenizer
from data.templates import extend_tokenizer, render_prompt
from eval.scoring import evaluating
from formats.files import write_text
from formats.tokenizer import readable
from lora import disable_lora
from model import GPT

TEMPLATE = Path(__file__).with_suffix(".html")
EXPECTED, LENS = 10, 5                  # tokens shown of the model's prediction, of a block's
MOST_BYTES = 2**24                      # of attention in a page; a browser takes more, slowly


def look_inside(model: GPT, idx: Tensor) -> list[Tensor]:
    """What a forward pass of idx (1, T) goes through: the logits (T, V) that the head would give
    after the embedding and after each block, the last ones the model's; attention (L, H, T, T)."""
    hidden, attention, T = [], [], idx.size(1)
    D = model.config.n_embd // model.config.n_head
    future = torch.ones(T, T, dtype=torch.bool, device=idx.device).triu(1)

    def keep_attention(module, inputs, output):
        q, k, _ = (part.view(T, -1, D).transpose(0, 1) for part in output[0].chunk(3, dim=1))
        scores = q @ k.transpose(1, 2) / math.sqrt(D)               # (H, T, T)
        attention.append(scores.masked_fill(future, -math.inf).softmax(-1))

    hooks = [block.attn.c_attn.register_forward_hook(keep_attention)
             for block in model.transformer.h]
    hooks += [block.register_forward_pre_hook(lambda module, inputs: hidden.append(inputs[0]))
              for block in model.transformer.h]
    try:
        logits, _ = model(idx)                                      # (1, T, V)
    finally:
        for hook in hooks:
            hook.remove()
    early = [model.lm_head(model.transformer.ln_f(x))[0, :, :model.config.vocab_size]
             for x in hidden]
    return [*early, logits[0], torch.stack(attention)]


def predictions(logits: Tensor, ids: Tensor, most: int) -> dict[str, list]:
    """Of each position of logits (T, V): the likeliest tokens as [id, probability, id, ...]; of all
    but the last also nats and rank of the token that follows."""
    logp = logits.double().log_softmax(-1)
    if not logp.isfinite().all():
        raise ValueError("the model's logits are not finite: its weights are damaged")
    best = logp.topk(min(most, logp.size(-1)))
    follows = logp[:-1].gather(1, ids[1:, None])                    # (T - 1, 1)
    return {"top": [[cell for i, p in zip(*row) for cell in (i, _short(p))]
                    for row in zip(best.indices.tolist(), best.values.exp().tolist())],
            "nats": [_short(-p) for p in follows[:, 0].tolist()],
            "rank": ((logp[:-1] > follows).sum(1) + 1).tolist()}


def _short(x: float) -> float:
    """Seven digits, which is what float32 has."""
    return float(f"{x:.7g}")


def packed(attention: Tensor) -> str:
    """The lower triangles of attention (L, H, T, T), each weight as three bytes: 2**24 - 1 is 1."""
    row, column = torch.tril_indices(*attention.shape[-2:])
    whole = (attention[:, :, row, column].double() * (2**24 - 1)).round().cpu().numpy()
    return base64.b64encode(whole.astype("<u4").view(np.uint8).reshape(-1, 4)[:, :3].tobytes()
                            ).decode()


def explain(model: GPT, tokenizer: Tokenizer, ids: Sequence[int],
            labelled: Sequence[bool] | None = None) -> dict[str, Any]:
    """The figures of a page on these ids; labelled: which of them count in the loss, default all.

    ValueError where they do not fit into the model's context, or their attention into a page.
    """
    c, T, adapted = model.config, len(ids), hasattr(model, "adapters")
    if T > c.block_size:
        raise ValueError(f"the prompt has {T:,} tokens and the model a context of "
                         f"block_size={c.block_size}; shorten it")
    size = (1 + adapted) * c.n_layer * c.n_head * 2                 # bytes of attention, by T**2
    if size * T * T > MOST_BYTES:
        raise ValueError(f"the attention of {c.n_layer * c.n_head} heads to {T:,} tokens makes a "
                         f"page of {size * T * T / 2**20:,.0f} MB; shorten the prompt to "
                         f"{math.isqrt(MOST_BYTES // size)} tokens")
    passes = {"with the adapter": contextlib.nullcontext, "without it": lambda: disable_lora(model)}
    views = []
    with evaluating(model) as device:
        idx = torch.tensor([ids], device=device)
        for name, switched in passes.items() if adapted else [("", contextlib.nullcontext)]:
            with switched():
                *early, last, attention = look_inside(model, idx)
            lens = [predictions(logits, idx[0], LENS) for logits in early]
            views.append({"name": name, "lens": [*lens, predictions(last, idx[0], EXPECTED)],
                          "attention": packed(attention)})
    special = {i: name for name, i in tokenizer.special_tokens.items()}
    shown = {*ids, *(i for view in views for layer in view["lens"] for top in layer["top"]
                     for i in top[::2])}
    words = {i: special.get(i) or readable(b"".join(tokenizer.token_bytes[i:i + 1])) or f"#{i}"
             for i in sorted(shown)}
    shape = (f"{c.n_layer} blocks of {c.n_head} heads, {c.n_embd} channels, vocabulary "
             f"{c.vocab_size:,}")
    return {"ids": list(ids), "labelled": list(labelled or [True] * T), "words": words,
            "special": sorted(shown & special.keys()), "shape": shape, "layers": c.n_layer,
            "heads": c.n_head, "views": views}


def answered(model: GPT, tokenizer: Tokenizer, template: str, config: Any
             ) -> tuple[list[int], list[bool]]:
    """The ids of a prompt with the model's answer, and which of them are the answer's."""
    if extend_tokenizer(tokenizer, template) is not tokenizer:
        raise ValueError(f"the model's tokenizer lacks special tokens of template={template}, so "
                         f"it was not trained with that; choose another --template")
    messages = [{"role": "system", "content": config.system}] * bool(config.system.strip())
    prompt = render_prompt([*messages, {"role": "user", "content": config.prompt}], tokenizer,
                           template)
    device, room = model.transformer.wte.weight.device, model.config.block_size - len(prompt)
    if room < 1:
        return prompt, [False] * len(prompt)                        # explain says what is wrong
    ids = model.generate(torch.tensor([prompt], device=device), min(room, config.max_new_tokens),
                         config.temperature, config.top_k or None, config.top_p,
                         tokenizer.special_tokens.values(),
                         torch.Generator(device).manual_seed(config.seed))[0].tolist()
    return ids, [i >= len(prompt) for i in range(len(ids))]


def write_page(model: GPT, tokenizer: Tokenizer, name: str, template: str, config: Any) -> None:
    """`python sample.py NAME --explain=FILE`; config: its settings. With a template, the prompt is
    a message that the model answers."""
    file = Path(config.explain)
    if not file.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {file.parent} for --explain={file}; make it")
    if template:
        ids, labelled = answered(model, tokenizer, template, config)
    else:
        ids, labelled = tokenizer.encode(config.prompt), None
    figures = {"model": name, "template": template, **explain(model, tokenizer, ids, labelled)}
    # Within a script, JSON can be ended by nothing but "</script" or "<!--": no text has a "<".
    # Everything is put into the page as text, by the page itself.
    data = json.dumps(figures, separators=(",", ":")).replace("<", "\\u003c")
    write_text(file, TEMPLATE.read_text(encoding="utf-8").replace("__DATA__", data, 1))
    print(f"{file}: {len(ids):,} tokens, {file.stat().st_size / 1e6:.2f} MB; open it in a browser")

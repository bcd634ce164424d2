"""The page of sample.py --explain: its figures are the model's, and what a reader does there."""
import base64
import dataclasses
import json
import math
import re

import pytest
import torch
from torch.nn import functional as F

import sample
from bpe import Tokenizer
from data.chat import render
from eval.explain import explain
from lora import LoRAConfig, add_lora, disable_lora
from model import GPT, GPTConfig, IGNORE
from run import checkpoint
from run.load import load_model
from tests.browser import open_page

TEXT = "the cat saw the other cat at home"
HOSTILE = "</script><img src=x onerror=alert(1)><!-- \u202e问"
QUESTION, ANSWER = "Who?", " The cat."


def make_run(folder, template="", tokenizer=None):
    """A run of a model with weights large enough to prefer something."""
    torch.manual_seed(0)
    tokenizer = tokenizer or Tokenizer.train([TEXT] * 9, 274)
    model = GPT(GPTConfig(block_size=96, vocab_size=tokenizer.vocab_size, n_layer=3, n_head=2,
                          n_embd=32))
    for p in model.parameters():
        p.data += 0.15 * torch.randn_like(p)
    folder.mkdir(parents=True)
    settings = {"model": dataclasses.asdict(model.config), "template": template}
    checkpoint.save(folder / "best.pt", {"model": model.state_dict(), "config": settings,
                                         "step": 1, "base": "", "best_loss": 1.0})
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "run.json").write_text("{}")
    tokenizer.save(folder / "tokenizer.json")
    return folder


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


def page_of(run, *words):
    """The file of a page, and the figures in it."""
    file = run.parent / "page.html"
    sample.main([str(run), f"--explain={file}", *words])
    data = re.search('<script id="data" type="application/json">(.*?)</script>', file.read_text())
    return file, json.loads(data[1])


def unpacked(text, layers, heads, T):
    """The attention of a page (L, H, T, T): each weight by hand, as three bytes of the lower
    triangles, row after row."""
    raw, found = base64.b64decode(text), torch.zeros(layers, heads, T, T, dtype=torch.float64)
    places = [(layer, h, r, c) for layer in range(layers) for h in range(heads) for r in range(T)
              for c in range(r + 1)]
    assert len(raw) == 3 * len(places)
    for i, place in enumerate(places):
        found[place] = int.from_bytes(raw[3 * i:3 * i + 3], "little") / (2**24 - 1)
    return found


def plainly(model, ids):
    """The same in float64, from the weights alone: logits after the embedding and each block
    (L + 1, T, V), attention (L, H, T, T), each position, head and weight on its own."""
    w = {name: p.double() for name, p in model.state_dict().items()}
    T, H, C = len(ids), model.config.n_head, model.config.n_embd
    D = C // H

    def norm(x, name):
        return F.layer_norm(x, (C,), w[name + ".weight"], w[name + ".bias"])

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def head(x):
        return norm(x, "transformer.ln_f") @ w["lm_head.weight"].T

    x = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][:T]
    logits, attention = [head(x)], torch.zeros(model.config.n_layer, H, T, T, dtype=torch.float64)
    for layer in range(model.config.n_layer):
        name = f"transformer.h.{layer}"
        q, k, v = linear(norm(x, f"{name}.ln_1"), f"{name}.attn.c_attn").split(C, dim=1)
        mixed = torch.zeros(T, C, dtype=torch.float64)
        for h in range(H):
            part = slice(h * D, (h + 1) * D)
            for t in range(T):
                scores = torch.stack([q[t, part] @ k[s, part] / math.sqrt(D) for s in range(t + 1)])
                attention[layer, h, t, :t + 1] = scores.exp() / scores.exp().sum()
                mixed[t, part] = attention[layer, h, t, :t + 1] @ v[:t + 1, part]
        x = x + linear(mixed, f"{name}.attn.c_proj")
        inner = F.gelu(linear(norm(x, f"{name}.ln_2"), f"{name}.mlp.c_fc"), approximate="tanh")
        x = x + linear(inner, f"{name}.mlp.c_proj")
        logits.append(head(x))
    return torch.stack(logits), attention


def check_view(view, logits, attention, ids):
    """1e-6: float32 has 7 digits, and so have the page's numbers."""
    layers, heads, T, _ = attention.shape
    assert (unpacked(view["attention"], layers, heads, T) - attention).abs().max() < 1e-6
    assert len(view["lens"]) == layers + 1
    for layer, found in enumerate(view["lens"]):
        p = logits[layer].double().softmax(-1)                      # (T, V)
        follow = p[torch.arange(T - 1), ids[1:]]
        assert torch.tensor(found["nats"]).double().neg().exp().sub(follow).abs().max() < 1e-6
        assert found["rank"] == (1 + (p[:-1] > follow[:, None]).sum(1)).tolist()
        for t, top in enumerate(found["top"]):
            assert top[::2] == p[t].topk(len(top) // 2).indices.tolist()
            assert (p[t].topk(len(top) // 2).values - torch.tensor(top[1::2])).abs().max() < 1e-6


def test_probabilities_lens_and_attention_are_the_models_to_1e_6(run):
    model, tokenizer = load_model(run)
    _, page = page_of(run, f"--prompt={TEXT}")
    ids = tokenizer.encode(TEXT)
    assert page["ids"] == ids and "".join(page["words"][str(i)] for i in ids) == TEXT
    with torch.no_grad():
        logits, attention = plainly(model, ids)
        check_view(page["views"][0], logits, attention, ids)
        mine = model(torch.tensor([ids]))[0][0].double().log_softmax(-1)
    nats = torch.tensor(page["views"][0]["lens"][-1]["nats"])
    assert (nats + mine[torch.arange(len(ids) - 1), ids[1:]]).abs().max() < 1e-6
    assert len(page["views"][0]["lens"][-1]["top"][0]) == 20 and page["template"] == ""


def test_an_adapter_is_shown_with_and_without_it(run):
    model, tokenizer = load_model(run)
    model.double()                      # so that merging below rounds nothing that counts
    ids = tokenizer.encode(TEXT)
    base, attention = plainly(model, ids)
    weights = {name: p.clone() for name, p in model.state_dict().items()}
    add_lora(model, LoRAConfig(r=2, target_modules=("all-linear",)), quiet=True)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.3)
    first, second = explain(model, tokenizer, ids)["views"]
    assert (first["name"], second["name"]) == ("with the adapter", "without it")
    check_view(second, base, attention, ids)
    plain = GPT(model.config).double()
    with torch.no_grad():
        for name, layer in model.named_modules():
            if hasattr(layer, "lora_adapters"):
                for change in layer.lora_adapters["default"].values():
                    weights[name + ".weight"] += change.scale * change.lora_B @ change.lora_A
    plain.load_state_dict(weights)
    check_view(first, *plainly(plain, ids), ids)
    with torch.no_grad(), disable_lora(model):      # and the model computes with it again
        off = model(torch.tensor([ids]))[0]
    assert not torch.allclose(off, model(torch.tensor([ids]))[0], atol=1e-2)


@pytest.fixture
def chat_run(tmp_path, monkeypatch):
    """A run with a template, whose model answers ANSWER."""
    generate = GPT.generate

    def answering(self, idx, *rest, **named):
        assert generate(self, idx, *rest, **named).size(1) > idx.size(1)    # such a call is one
        tokenizer = load_model(tmp_path / "run")[1]
        new = torch.tensor([[*tokenizer.encode(ANSWER), tokenizer.eot]])
        return torch.cat([idx, new], dim=1)

    monkeypatch.setattr(GPT, "generate", answering)
    return make_run(tmp_path / "run", "plain")


def test_the_labels_and_the_loss_of_a_chat_are_those_of_training(chat_run):
    model, tokenizer = load_model(chat_run)
    _, page = page_of(chat_run, f"--prompt={QUESTION}", "--system=Be kind.")
    ids, labels = render([{"role": "system", "content": "Be kind."},
                          {"role": "user", "content": QUESTION},
                          {"role": "assistant", "content": ANSWER.strip()}], tokenizer, "plain")
    assert page["ids"] == ids and page["template"] == "plain"
    assert page["labelled"] == [label != IGNORE for label in labels]
    with torch.no_grad():
        _, loss = model(torch.tensor([ids[:-1]]), torch.tensor([labels[1:]]))
    shown = [nats for nats, label in zip(page["views"][0]["lens"][-1]["nats"], labels[1:])
             if label != IGNORE]
    assert sum(shown) / len(shown) == pytest.approx(loss.item(), abs=1e-6)


def test_what_cannot_be_explained_says_why_in_one_line(run, tmp_path):
    page = f"--explain={tmp_path / 'page.html'}"
    for words, message in (
            ([str(run), page], "add --prompt=TEXT"),
            ([str(run), page, "--prompt=a", "--prompts=b"], "without --prompts"),
            ([str(run), page, "--prompt=" + "x" * 97], "97 tokens and the model a context of "
                                                       "block_size=96; shorten it"),
            ([str(run), page, "--template=plain", "--prompt=" + "x" * 97], "shorten it"),
            ([str(run), page, "--template=chatml", "--prompt=a"], "lacks special tokens"),
            ([str(tmp_path / "out" / "none"), page, "--prompt=a"], "there is no run in"),
            ([str(run), f"--explain={tmp_path}/none/a.html", "--prompt=a"], "there is no folder"),
            ([str(run), f"--explain={tmp_path}", "--prompt=a"], str(tmp_path))):
        with pytest.raises((ValueError, OSError), match=re.escape(message)) as error:
            sample.main(words)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "page.html").exists()


def test_a_page_has_a_size(tmp_path):
    """The demo's full context stays below 1 MB; what would be tens of MB is refused."""
    tokenizer = Tokenizer.train(["a b"] * 9, 258)
    model = GPT(GPTConfig(block_size=128, vocab_size=258, n_layer=4, n_head=4, n_embd=128))
    figures = explain(model, tokenizer, [i % 256 for i in range(128)])
    assert len(json.dumps(figures)) < 900_000
    model = GPT(GPTConfig(block_size=1024, vocab_size=258, n_layer=12, n_head=12, n_embd=12))
    with pytest.raises(ValueError, match="shorten the prompt to 241 tokens"):
        explain(model, tokenizer, [1] * 242)


# ---- what a reader does with it

def test_a_reader_points_clicks_and_types_and_sees_the_figures(run):
    model, tokenizer = load_model(run)
    file, page = page_of(run, f"--prompt={TEXT}")
    ids = tokenizer.encode(TEXT)
    T, words = len(ids), page["words"]
    attention = plainly(model, ids)[1]
    last = page["views"][0]["lens"][-1]
    with open_page(file) as browser:
        assert browser.run("document.title").startswith("How ")
        assert browser.run("document.querySelectorAll('#tokens button').length") == T + 1
        browser.move("#tokens button:nth-child(4)")                 # token 3, only pointed at
        detail = browser.text("#detail")
        assert f"loss {last['nats'][2]:.3f}" in detail and f"rank {last['rank'][2]}" in detail
        assert "Token 3" in detail and words[str(last["top"][2][0])].strip() in detail
        exact = browser.run("+document.querySelector('#detail td.bar').title")
        assert exact == pytest.approx(last["top"][2][1], abs=1e-6)
        browser.move("#title")
        assert f"Token {T - 1}" in browser.text("#detail")          # as before
        browser.click("#tokens button:nth-child(4)")
        assert "token 3, token 2" in browser.text("#row")
        assert browser.run("document.querySelector('#lens tr.at').dataset.t") == "3"
        for key, t in (("ArrowRight", 4), ("ArrowLeft", 3), ("End", T), ("Home", 0)):
            browser.press(key)
            assert browser.run("document.activeElement.dataset.t") == str(t)
        assert "Given" in browser.text("#detail")
        browser.press("Tab")                                        # one stop for all tokens
        assert browser.run("document.activeElement.closest('#heads') !== null")
        browser.press("ArrowDown")
        browser.press("ArrowRight")
        assert browser.text("#head").startswith("Block 1, head 1: on average ")
        browser.click("#heads button:nth-child(5)")
        mean = attention[2, 0].diagonal().mean().item()
        assert f"Block 2, head 0: on average {100 * mean:.1f}% to the token itself" in browser.text(
            "#head")
        side, corner = browser.run("[side / size, margin / size]")  # of a cell, of the first one
        browser.move("#map", corner + 2.5 * side, corner + 5.5 * side)
        shown = re.search(r"Token 5 .*\((0\.\d+)\) to token 2 ", browser.text("#cell"))
        assert float(shown[1]) == pytest.approx(attention[2, 0, 5, 2].item(), abs=1e-6)
        browser.click("#map", corner + 2.5 * side, corner + 5.5 * side)
        most = attention[2, 0, 5].argmax().item()
        assert browser.text("#weights tr").startswith(f"{most}\t")
        exact = browser.run("+document.querySelector('#weights td.bar').title")
        assert exact == pytest.approx(attention[2, 0, 5, most].item(), abs=1e-6)
        browser.click("#costs tbody tr:nth-child(2)")
        dear = sorted(range(1, T), key=lambda t: -last["nats"][t - 1])[1]
        assert f"Token {dear} " in browser.text("#detail")
        browser.click("#lens tbody tr:nth-child(2)")
        assert "Token 2 " in browser.text("#detail")
        mean = sum(last["nats"]) / (T - 1)
        assert f"{mean:.4f} nats" in browser.text("#loss")
        assert browser.errors == [] and browser.requests == [file.resolve().as_uri()]


def test_the_page_fits_a_telephone_and_paper(run):
    file, _ = page_of(run, f"--prompt={TEXT}")
    with open_page(file, width=360, height=640) as browser:
        assert browser.run("document.documentElement.scrollWidth") <= 360
        assert "Point at a token" in browser.text("body")
        browser.call("Emulation.setEmulatedMedia", media="print")
        assert "Point at a token" not in browser.text("body")       # nothing can be pointed at
        assert browser.run("[...document.querySelectorAll('.scroll')].every("
                           "e => getComputedStyle(e).overflow === 'visible')")
        paper = browser.call("Page.printToPDF", printBackground=False)["data"]
        assert base64.b64decode(paper).startswith(b"%PDF")


def test_an_adapter_and_the_labels_of_a_chat_can_be_seen_without_colour(chat_run, tmp_path):
    model, tokenizer = load_model(chat_run)
    add_lora(model, LoRAConfig(r=2), quiet=True)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_()
    file, page = page_of(chat_run, f"--prompt={QUESTION}")
    ids, labelled = page["ids"], page["labelled"]
    page |= explain(model, tokenizer, ids, labelled)
    written = re.sub('(type="application/json">).*?(</script>)',
                     lambda found: found[1] + json.dumps(page) + found[2], file.read_text())
    file.write_text(written)
    with open_page(file) as browser:
        borders = browser.run("[...document.querySelectorAll('#tokens button')].map("
                              "e => getComputedStyle(e).borderTopStyle)")
        assert borders == ["solid" if label else "dashed" for label in [*labelled, False]]
        counted = [t for t, label in enumerate(labelled) if label]
        for i in (0, 1, 0):
            browser.click(f"#views label:nth-of-type({i + 1}) input")
            for view, told in ((i, r"nats, perplexity"), (1 - i, r"\. The \d+ costliest")):
                nats = [page["views"][view]["lens"][-1]["nats"][t - 1] for t in counted]
                assert re.search(f"{sum(nats) / len(nats):.4f} ?{told}", browser.text("#loss"))
        browser.click("#tokens button:nth-child(3)")
        assert "No label" in browser.text("#detail")
        browser.click(f"#tokens button:nth-child({len(ids)})")
        assert "Training gives it a label" in browser.text("#detail")
        assert browser.errors == []


def test_text_and_names_of_html_stay_text(tmp_path):
    whole = Tokenizer.train([HOSTILE] * 9, 254 + len(HOSTILE.encode()), pattern="(?s).+")
    run = make_run(tmp_path / "<" / "script><img src=x onerror=alert(1)>", tokenizer=whole)
    file, page = page_of(run, f"--prompt={2 * HOSTILE}")
    assert page["ids"] == 2 * whole.encode(HOSTILE) and len(page["ids"]) == 2
    assert "<img" not in file.read_text() and file.read_text().count("</script>") == 2
    with open_page(file) as browser:
        assert browser.run("document.images.length") == 0
        assert browser.text("h1").endswith("</script><img src=x onerror=alert(1)> reads this")
        shown = browser.run("[...document.querySelectorAll('#tokens .word')].map("
                            "e => e.textContent)")
        assert shown[0].replace("·", " ").startswith("</script><img src=x onerror=alert(1)><!--")
        assert browser.errors == [] and len(browser.requests) == 1

"""HellaSwag: sums and decisions against a plain loop over transformers' logits."""
import hashlib
import json
import re

import pytest
import torch

import bpe
import ranks
from eval import hellaswag, hellaswag_items
from eval.hellaswag import evaluate, load_items, score
from eval.hellaswag_items import without_marks
from eval.scoring import wilson_interval
from model import GPT, GPTConfig
from run.config import settings_of
from run.load import load_model
from train import TrainConfig

COUNTS = {"acc": "correct", "acc_norm": "correct_norm", "acc_bytes": "correct_bytes"}
SUMS = 2e-4     # float32; sums are some hundred nats, of which one unit in the last place is 3e-5

def record(activity_label, ctx_a, ctx_b, label, *endings):
    return {"activity_label": activity_label, "ctx_a": ctx_a, "ctx_b": ctx_b, "label": label,
            "ctx": f"{ctx_a} {ctx_b}".strip(), "endings": list(endings)}


HOUR = "An hour, or two; that’s up to the eggs, to you, and to nobody in the whole wide world."
RECORDS = [
    record("Roof shingle removal", "A man is sitting on a roof.", "he", 3,
           "is using wrap to wrap a pair of skis.", "is ripping level tiles off.",
           "is holding a rubik's cube.", "starts pulling up roofing on a roof."),
    record("Food", "[header] How to peel a café's eggs [title] Boil.  [step] Wait [substeps]", "",
           0, "ten minutes. [title] Peel them.", "no.", "[substeps] " + HOUR, "!"),
    record("Canoeing", "Two women in a canoe are shown.", "the women", 1,
           "sit.", "paddle.", "run.", "swim down the river while they talk to a man."),
    record("Singing", "She sings.", "", 2, "Loud.", "She stops.", "The end.", "The end."),
]


@pytest.fixture(scope="module")
def tokenizer():
    return bpe.Tokenizer.train([json.dumps(RECORDS, ensure_ascii=False)], 300)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


@pytest.fixture
def items(file):
    return load_items(file)


def small_model(tokenizer, **settings):
    """A random model whose predictions are far from uniform: weights 10 times as large."""
    torch.manual_seed(0)
    settings = {"block_size": 128, "n_layer": 2, "n_head": 2, "n_embd": 32, **settings}
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, **settings)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 if p.dim() == 1 else 10)
    return model


def plain_sums(logits_of, tokenizer, items, style, block_size):
    """The definition: each ending alone, after its context, log-probabilities added up."""
    sums = torch.empty(len(items), 4, dtype=torch.float64)
    for n, item in enumerate(items):
        for i in range(4):
            context, ending = pair(item, i, style)
            context, ending = tokenizer.encode(context), tokenizer.encode(ending)
            ids = torch.tensor((context + ending)[-block_size - 1:])
            scored = min(len(ending), len(ids) - 1)
            found = logits_of(ids[None, :-1])[0].log_softmax(-1).gather(1, ids[1:, None])
            sums[n, i] = found[-scored:].double().sum()
    return sums


def pair(item, i, style):
    if style == "completion":
        return item.context, " " + item.endings[i]
    def clean(text):
        text = text.strip().replace(" [title]", ". ")
        while "[" in text:
            text = text[:text.index("[")] + text[text.index("]") + 1:]
        return text.replace("  ", " ")
    context = clean(item.harness_context)
    bare = context.rstrip()
    return bare, context[len(bare):] + " " + clean(item.endings[i])


def transformers_logits(model, folder):
    transformers = pytest.importorskip("transformers")
    model.save_pretrained(folder)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    return torch.no_grad()(lambda ids: theirs(ids).logits)


@pytest.mark.parametrize("style", ["completion", "harness"])
def test_sums_equal_transformers_logits(tokenizer, items, tmp_path, style):
    model = small_model(tokenizer, vocab_multiple=64)
    expected = plain_sums(transformers_logits(model, tmp_path), tokenizer, items, style, 128)
    torch.testing.assert_close(score(model, tokenizer, items, style).sums, expected,
                               atol=SUMS, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("style", ["completion", "harness"])
@pytest.mark.parametrize("trained", [False, True])
def test_sums_equal_transformers_logits_on_official_items(shared, tmp_path, style, trained):
    items = load_items(shared / "hellaswag" / "val_official_1000.jsonl")
    tokenizer = bpe.Tokenizer.gpt2(shared / "gpt2_vocab")
    model = small_model(tokenizer, block_size=256)
    if trained:
        overfit(model, tokenizer, [item.context for item in items[:64]])
    expected = plain_sums(transformers_logits(model, tmp_path), tokenizer, items, style, 256)
    scores = score(model, tokenizer, items, style)
    torch.testing.assert_close(scores.sums, expected, atol=1e-3, rtol=0)
    lengths = {"acc": 1, "acc_norm": scores.tokens if style == "completion" else scores.characters,
               "acc_bytes": scores.bytes}
    for name, choice in scores.decisions(style).items():
        assert torch.equal((expected / lengths[name]).argmax(1), choice)


def overfit(model, tokenizer, documents, steps=60):
    """A short training, so that the model's predictions are those of a language model."""
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 if p.dim() == 1 else 0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.tensor(tokenizer.encode("\n".join(documents)))
    ids = ids[:len(ids) // 64 * 64].view(-1, 64)
    for step in range(steps):
        batch = ids[torch.randint(len(ids), (8,))]
        _, loss = model(batch[:, :-1], batch[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.slow
def test_the_harness_itself_decides_the_same(shared, tmp_path):
    """EleutherAI's, installed and run on an exported model: acc and acc_norm item by item."""
    pytest.importorskip("lm_eval")
    from bench.lm_eval import LMEvalConfig, measure
    file = shared / "hellaswag" / "val_official_1000.jsonl"
    tokenizer = bpe.Tokenizer.train([item.context for item in load_items(file)], 1000)
    model = small_model(tokenizer, block_size=160)
    overfit(model, tokenizer, [item.context for item in load_items(file)], steps=100)
    model.save_pretrained(tmp_path)
    tokenizer.save(tmp_path / "tokenizer.json")
    row = measure(LMEvalConfig(model=str(tmp_path), hellaswag_file=str(file)))
    assert row["items"] == 1000 and row["cut"] > 0
    assert row["acc"]["items_that_differ"] == row["acc_norm"]["items_that_differ"] == 0
    assert row["largest_difference_of_sums"] < 1e-3                     # float32


@pytest.mark.parametrize("block_size", [64, 40, 16])
def test_items_that_do_not_fit_lose_tokens_on_the_left(tokenizer, items, block_size):
    model = small_model(tokenizer, block_size=block_size)
    scores = score(model, tokenizer, items)
    expected = plain_sums(torch.no_grad()(lambda ids: model(ids)[0]), tokenizer, items,
                          "completion", block_size)
    torch.testing.assert_close(scores.sums, expected, atol=SUMS, rtol=0)
    longest = [max(len(tokenizer.encode(item.context)) + len(tokenizer.encode(" " + ending))
                   for ending in item.endings) for item in items]
    assert scores.cut.tolist() == [length > block_size + 1 for length in longest]
    assert evaluate(model, tokenizer, items)["cut"] == sum(scores.cut.tolist()) > 0


def test_folders_written_here_and_by_transformers_give_the_same_figures(
        tokenizer, items, file, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    model, ours, theirs = small_model(tokenizer), tmp_path / "ours", tmp_path / "theirs"
    model.save_pretrained(ours)
    tokenizer.save_pretrained(ours)
    transformers.GPT2LMHeadModel.from_pretrained(ours).save_pretrained(theirs)
    transformers.AutoTokenizer.from_pretrained(ours).save_pretrained(theirs)
    shown = []
    for folder, flag in ((ours, "hellaswag_file"), (theirs, "file")):
        hellaswag.main([f"--model={folder}", f"--{flag}={file}", "--device=cpu", "--dtype=float32"])
        shown.append(capsys.readouterr().out.splitlines()[1:])          # the first names the model
    assert shown[0] == shown[1] and len(shown[0]) == 3
    result = evaluate(model, tokenizer, items)
    assert f"acc_norm  {result['acc_norm']:.4f}" in shown[0][1]


def test_padded_vocabulary_never_counts(tokenizer, items):
    plain, padded = small_model(tokenizer), small_model(tokenizer, vocab_multiple=128)
    with torch.no_grad():
        weight = padded.transformer.wte.weight
        plain.load_state_dict({**padded.state_dict(), **{name: weight[:tokenizer.vocab_size].clone()
                               for name in ("transformer.wte.weight", "lm_head.weight")}})
        weight[tokenizer.vocab_size:] = 1e3                         # would be the likeliest tokens
    expected = score(plain, tokenizer, items).sums
    torch.testing.assert_close(score(padded, tokenizer, items).sums, expected, atol=SUMS, rtol=0)


def test_batch_size_does_not_change_decisions(tokenizer, items):
    model = small_model(tokenizer)
    expected = score(model, tokenizer, items, batch_tokens=1)       # an item at a time
    for batch_tokens in (300, 1000, 100_000):
        scores = score(model, tokenizer, items, batch_tokens=batch_tokens)
        torch.testing.assert_close(scores.sums, expected.sums, atol=SUMS, rtol=0)
        for name, choice in scores.decisions("completion").items():
            assert torch.equal(choice, expected.decisions("completion")[name])


def test_acc_norm_is_per_token_or_per_character_and_acc_bytes_per_byte(tokenizer, items):
    model = small_model(tokenizer)
    scores = score(model, tokenizer, items, "harness")
    assert scores.characters[1].tolist() == [len("ten minutes.  Peel them."), 3, len(HOUR) + 1, 1]
    assert scores.bytes[1, 2] == scores.characters[1, 2] + 2        # the apostrophe has three bytes
    expected = (scores.sums / scores.characters).argmax(1)
    assert torch.equal(scores.decisions("harness")["acc_norm"], expected)
    scores = score(model, tokenizer, items)
    assert scores.tokens[0, 1] == len(tokenizer.encode(" is ripping level tiles off."))
    assert torch.equal(scores.decisions("completion")["acc_norm"],
                       (scores.sums / scores.tokens).argmax(1))


def test_harness_style_prepares_text_as_the_harness(items):
    assert items[0].harness_context == "Roof shingle removal: A man is sitting on a roof. He"
    assert without_marks(items[1].harness_context + "x") == (
        "Food: How to peel a café's eggs. Boil.  Wait x")      # 3 spaces become 2
    assert without_marks("[title] Do it [a] now ") == " Do it now"    # as it does


def test_counts_and_intervals_of_a_result(tokenizer, items):
    model = small_model(tokenizer).train()
    result, scores = evaluate(model, tokenizer, items), score(model, tokenizer, items)
    assert model.training
    labels = torch.tensor([item.label for item in items])
    for name, count in COUNTS.items():
        right = int((scores.decisions("completion")[name] == labels).sum())
        assert (result[count], result[name]) == (right, right / 4)
        assert result[f"{name}_interval"] == wilson_interval(right, 4)
    assert (result["style"], result["n"], result["cut"]) == ("completion", 4, 0)
    json.dumps(result)


def test_wilson_interval_by_hand():
    # 25 of 100: (25 + 1.9207 -+ 1.96 sqrt(25 * 75 / 100 + 0.9604)) / 103.8415
    assert wilson_interval(25, 100) == pytest.approx((0.17545, 0.34304), abs=1e-5)
    assert wilson_interval(0, 10)[0] == 0 and wilson_interval(10, 10)[1] == pytest.approx(1)


def test_bf16_flips_at_most_one_decision_in_a_hundred(shared):
    """Of a small trained model; measured with three seeds: 2 in 400 at most, of each metric."""
    items = load_items(shared / "hellaswag" / "val_official_1000.jsonl")[:400]
    tokenizer = bpe.Tokenizer.train([item.context for item in items], 1000)
    model = small_model(tokenizer, block_size=256)
    overfit(model, tokenizer, [item.context for item in items], steps=100)
    exact, rounded = score(model, tokenizer, items), score(model, tokenizer, items,
                                                           dtype=torch.bfloat16)
    assert 1e-3 < (exact.sums - rounded.sums).abs().mean() < 0.1        # it is another precision
    for name, choice in exact.decisions("completion").items():
        assert (rounded.decisions("completion")[name] != choice).float().mean() <= 0.01


def test_nothing_is_compiled(tokenizer, items):
    """A compiled module is scored by its plain methods: no recompilation for each length."""
    compiled = []
    model = small_model(tokenizer)
    wrapped = torch.compile(model, backend=lambda module, _: compiled.append(module) or module)
    assert torch.equal(score(wrapped, tokenizer, items).sums, score(model, tokenizer, items).sums)
    assert not compiled


def evaluate_as_rank(path, folder, file):
    """Evaluation within a process group; what it finds is a line of a file."""
    torch.distributed.init_process_group("gloo")
    found = evaluate(*load_model(folder, "cpu"), load_items(file))
    with open(path, "a") as lines:
        lines.write(json.dumps(found) + "\n")
    torch.distributed.barrier()         # gloo aborts at times where one leaves while others talk
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("number", [2, 3])
def test_ranks_give_the_counts_of_one(tokenizer, items, file, tmp_path, capsys, number):
    """4 items on 3 ranks are 2 + 1 + 1."""
    model = small_model(tokenizer)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model" / "tokenizer.json")
    capsys.readouterr()
    hellaswag.main([f"--model={tmp_path / 'model'}", f"--hellaswag_file={file}", "--dtype=float32",
                    "--device=cpu"])
    alone = capsys.readouterr().out
    given = tmp_path / "found", tmp_path / "model", file
    assert ranks.exit_codes(evaluate_as_rank, number, *given) == [0] * number
    result = evaluate(model, tokenizer, items)
    found = [json.loads(line) for line in (tmp_path / "found").read_text().splitlines()]
    assert found == [json.loads(json.dumps(result))] * number
    assert "4 HellaSwag items, style completion" in alone
    for name, count in COUNTS.items():
        assert f"{name:9} {result[name]:.4f}  ({result[count]} right)" in alone


def test_the_text_form_is_read(tokenizer, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"query": "Ab: one", "endings": ["a", "b", "c", "d"], "label": "2"}\n\n')
    item, = load_items(path)
    assert (item.context, item.harness_context, item.label) == ("Ab: one", "Ab: one", 2)


@pytest.mark.parametrize("change, message", [
    ({"label": 4}, "label is 4"), ({"label": None}, "label is None"),
    ({"label": True}, "label is True"),
    ({"endings": ["a"] * 3}, "endings is not a list of 4 texts"),
    ({"endings": ["a", "b", "c", 1]}, "endings is not a list of 4 texts"),
    ({"ctx": None}, "no text 'ctx'"), ({"ctx_b": 1}, "no text 'ctx_b'"),
    ({"ctx": " "}, "ctx is empty"),
])
def test_malformed_records_are_named_by_line(tmp_path, change, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(RECORDS[0]) + "\n" + json.dumps({**RECORDS[0], **change}) + "\n")
    with pytest.raises(ValueError, match=f"bad.jsonl, line 2.*{message}"):
        load_items(path)


@pytest.mark.parametrize("line, message", [
    (b"{", "line 3 is no JSON"), (b"[1, 2]", "line 3 is no JSON"), (b'"text"', "line 3 is no JSON"),
    (b'{"query": "\xff"}', "is not UTF-8: byte .* is 0xff")])
def test_lines_that_are_no_records_are_named(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(json.dumps(RECORDS[0]).encode() + b"\n\n" + line)
    with pytest.raises(ValueError, match=f"bad.jsonl.*{message}"):
        load_items(path)


def test_wrong_arguments_are_one_line(tokenizer, items, tmp_path):
    model = small_model(tokenizer)
    (tmp_path / "empty.jsonl").write_text("\n")
    for call, message in [
            (lambda: load_items(tmp_path / "none.jsonl"), "there is no file"),
            (lambda: load_items(tmp_path / "empty.jsonl"), "holds no records"),
            (lambda: evaluate(model, tokenizer, []), "no items"),
            (lambda: evaluate(model, None, items), "needs the model's tokenizer"),
            (lambda: evaluate(model, tokenizer, items, "eleuther"), "choose completion or harness"),
            (lambda: score(GPT(GPTConfig(16, 256, 1, 1, 8)), tokenizer, items), "the model 256"),
            (lambda: hellaswag.HellaSwagConfig(limit=-1), "limit=-1")]:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            call()


def test_the_download_is_made_once_and_checked(monkeypatch, tmp_path, file):
    monkeypatch.setattr(hellaswag_items, "URL", file.as_uri())
    monkeypatch.setattr(hellaswag_items, "FILE", tmp_path / "data" / "val.jsonl")
    with pytest.raises(ValueError, match="checksum"):
        load_items()
    monkeypatch.setattr(hellaswag_items, "SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    assert load_items() == load_items(file)
    file.unlink()
    assert len(load_items()) == 4


def test_the_hint_of_a_download_that_fails_names_flags_that_training_has(monkeypatch):
    hints = []
    monkeypatch.setattr(hellaswag_items, "download", lambda *arguments: hints.append(arguments[-1]))
    hellaswag_items.official_file()
    flags = re.findall(r"--(\w+)", hints[0])
    assert flags == ["hellaswag_file", "hellaswag_every"] and {*flags} <= {*settings_of(TrainConfig)}

"""LAMBADA and IMDB against one forward pass for each item, and by hand."""
import json
import math

import pytest
import torch
from torch.nn import functional as F

from bpe import Tokenizer
from data.labels import class_samples
from data.samples import SampleLoader
from eval import __main__ as command
from eval import hellaswag, imdb, lambada, loss
from eval.scoring import wilson_interval
from model import GPT, IGNORE, GPTConfig
from run.classifier import Classifier
from run.config import build
from run.load import load_base, load_model
from train import TrainConfig, train

REVIEWS = [("A fine film, and a good one.<br />Really good.", 1), ("Bad, bad, and long. Awful!", 0),
           ("Good good good", 1), ("This was a bad film " * 9 + "with a naïve end.", 0),
           ("good", 1), ("awful and bad", 0), ("A good end, good film", 1), ("bad film", 0)]
PASSAGES = ["the cat sat on the mat", "the dog sat on the doormat", "one two three four five six",
            "a b c d e", "one two three four five six seven eight nine ten eleven twelve thirteen"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([text for text, _ in REVIEWS] + PASSAGES, 290)


@pytest.fixture
def reviews(tmp_path):
    path = tmp_path / "reviews.jsonl"
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n"
                            for text, label in REVIEWS))
    return path


@pytest.fixture
def passages(tmp_path):
    path = tmp_path / "passages.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in PASSAGES))
    return path


def small(tokenizer, block_size=64, scale=10):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size, tokenizer.vocab_size, 2, 2, 32, vocab_multiple=64))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 if p.dim() == 1 else scale)
    return model


def taught(model, rows, steps=60):
    """The model after learning these rows of ids, all of one length or padded."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    targets = torch.tensor([row + [IGNORE] * (longest - len(row)) for row in rows])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        model(ids[:, :-1], targets[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def log_probs(model, ids, count):
    """(log-probability, is it the likeliest) of each of the last `count` ids."""
    ids = torch.tensor(ids[-model.config.block_size - 1:])
    logits = model(ids[None, :-1])[0][0, -count:]
    return [(row.log_softmax(-1)[id].item(), row.argmax() == id)
            for row, id in zip(logits, ids[-count:])]


# ---- LAMBADA

@pytest.mark.parametrize("block_size", [64, 8])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_last_words_are_scored_as_one_at_a_time(tokenizer, passages, block_size, batch_size):
    """By a model that has learned some of the passages, so that some words are right."""
    items = lambada.load_passages(passages)
    rows = [(tokenizer.encode(context), tokenizer.encode(word)) for context, word in items]
    model = small(tokenizer, block_size, scale=1)
    taught(model, [(context + word)[-block_size - 1:] for context, word in rows[:3]])
    found = lambada.evaluate(model.train(), tokenizer, items, batch_size)
    expected = [log_probs(model.eval(), context + word, len(word)) for context, word in rows]
    right = [all(is_likeliest for _, is_likeliest in word) for word in expected]
    nats = [-sum(logp for logp, _ in word) for word in expected]
    assert 0 < sum(right) < len(right)
    assert (found["n"], found["correct"], found["acc"]) == (5, sum(right), sum(right) / 5)
    assert found["acc_interval"] == wilson_interval(sum(right), 5)
    assert found["perplexity"] == pytest.approx(math.exp(sum(nats) / 5), rel=1e-4)
    assert found["cut"] == sum(len(c) + len(w) > block_size + 1 for c, w in rows)


def test_a_word_counts_only_with_all_its_tokens(tokenizer):
    class Fixed:
        """Says "ab" after anything: logits by position are those of the bytes of " ab"."""
        config, training = GPTConfig(8, tokenizer.vocab_size, 1, 1, 8), False
        parameters, eval = (lambda self: iter([torch.zeros(1)])), (lambda self: None)
        train = lm_head = staticmethod(lambda x: x)

        def features(self, ids):
            after = {ord("x"): ord(" "), ord(" "): ord("a"), ord("a"): ord("b")}
            said = torch.tensor([[after.get(int(id), 0) for id in row] for row in ids])
            return F.one_hot(said, tokenizer.vocab_size).float() * 50
    plain = Tokenizer([], special_tokens=())
    result = [lambada.evaluate(Fixed(), plain, [("x", word)])["acc"]
              for word in (" ab", " a", " ac", " bb", " aba")]
    assert result == [1, 1, 0, 0, 0]


def test_the_last_word_is_cut_off_with_its_space(passages):
    assert lambada.load_passages(passages)[0] == ("the cat sat on the", " mat")


# ---- IMDB, zero-shot

@pytest.mark.parametrize("block_size", [64, 48])
def test_answers_are_compared_after_the_prompt_as_one_at_a_time(tokenizer, reviews, block_size):
    model, items = small(tokenizer, block_size).train(), imdb.load_reviews(reviews)
    assert items[0].text == "A fine film, and a good one.\nReally good."
    found = imdb.evaluate(model, tokenizer, items)
    assert model.training
    before, after = tokenizer.encode("Review:"), tokenizer.encode("\nSentiment:")
    answers = [tokenizer.encode(" negative"), tokenizer.encode(" positive")]
    room = block_size + 1 - len(before) - len(after) - max(map(len, answers))
    confusion, cut = [[0, 0], [0, 0]], 0
    for item in items:
        text = tokenizer.encode(" " + item.text)
        cut += len(text) > room
        assert imdb.prompt(item, tokenizer, block_size + 1 - max(map(len, answers))) == (
            before + text[-room:] + after, len(text) > room)
        sums = [sum(logp for logp, _ in log_probs(model.eval(), before + text[-room:] + after
                                                  + answer, len(answer))) for answer in answers]
        confusion[item.label][sums[1] > sums[0]] += 1
    assert (found["confusion"], found["cut"]) == (confusion, cut)
    assert found["correct"] == confusion[0][0] + confusion[1][1]
    assert (found["n"], found["acc"]) == (8, found["correct"] / 8)
    assert found["acc_interval"] == wilson_interval(found["correct"], 8)
    assert 0 < cut < 8


def test_a_model_that_has_learned_the_answers_is_always_right(tokenizer, reviews):
    items = imdb.load_reviews(reviews)
    rows = [imdb.prompt(item, tokenizer, 50)[0] + tokenizer.encode(imdb.ANSWERS[item.label])
            for item in items]
    model = taught(small(tokenizer, scale=1), rows)
    assert imdb.evaluate(model, tokenizer, items)["confusion"] == [[4, 0], [0, 4]]


def test_a_context_without_room_for_a_review_is_refused(tokenizer, reviews):
    with pytest.raises(ValueError, match="leaves no room for a review"):
        imdb.evaluate(small(tokenizer, 16), tokenizer, imdb.load_reviews(reviews))


# ---- IMDB, classified

@pytest.mark.parametrize("packing", [False, True])
def test_a_classifier_learns_reviews_from_the_loader_of_conversations(tokenizer, reviews, packing):
    items = imdb.load_reviews(reviews)
    samples = class_samples(items, tokenizer, 48)
    inputs, targets = samples.read(3)                   # the longest loses its beginning
    assert inputs.tolist() == tokenizer.encode(items[3].text)[-48:]
    assert targets.tolist() == [IGNORE] * 47 + [0]
    model = Classifier(small(tokenizer, 48, scale=1), 2, "mean")
    loader = SampleLoader(samples, 48, 4 * 48, 2, packing=packing)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(30):
        labels = loader.labels(step)
        for x, y, *positions in loader.batches(step):
            (model(x, y, *positions, reduction="sum")[1] / labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = loss.evaluate_loss(model, samples.evaluation_batches(3), torch.device("cpu"))
    assert found["accuracy"] == 1 and found["tokens"] == 8
    assert found["loss"] < 0.2 and model.training


def test_loss_and_accuracy_of_a_classifier_by_hand(tokenizer, reviews):
    items = imdb.load_reviews(reviews)[:5]
    model = Classifier(small(tokenizer, 32)).eval()
    torch.nn.init.normal_(model.head.weight)            # a new one finds both equally likely
    rows = [tokenizer.encode(item.text) for item in items]
    logits = torch.cat([model(torch.tensor([row[-32:]]))[0] for row in rows])
    labels = torch.tensor([item.label for item in items])
    right = (logits.argmax(1) == labels).float().mean().item()
    samples = class_samples(items, tokenizer, 32)
    assert samples.counts["truncated"] == sum(len(row) > 32 for row in rows) > 0
    expected = F.cross_entropy(logits, labels).item()
    assert right not in (0, 1)
    assert loss.evaluate_loss(model, samples.evaluation_batches(2), torch.device("cpu"),
                              loss.token_lengths(tokenizer)) == {
        "loss": pytest.approx(expected, rel=1e-4), "accuracy": pytest.approx(right), "tokens": 5}


# ---- files and commands

@pytest.mark.parametrize("load", [imdb.load_reviews, lambada.load_passages])
@pytest.mark.parametrize("line,message", [
    (b"{", "line 2 is no JSON"), (b"[1]", "line 2 is no JSON object"),
    (b"\xff", "bad.jsonl is not UTF-8: byte 28 is 0xff"),
    (b'{"text": 1, "label": 1}', "line 2 has no text 'text'"),
    (b'{"text": " ", "label": 1}', "line 2 has no text 'text'"),
    (b'{"text": "a \\ud800", "label": 1}', "line 2: text has half a surrogate pair"),
    (b"[" * 100_000, "line 2 is no JSON")])
def test_malformed_records_are_named_by_line(tmp_path, load, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "a b", "label": 0}\n' + line + b"\n")
    with pytest.raises(ValueError, match=message):
        load(path)


def test_other_wrong_files_are_one_line(tmp_path):
    path = tmp_path / "bad.jsonl"
    for text, load, message in [
            ("", imdb.load_reviews, "holds no records"),
            ("\n", lambada.load_passages, "holds no records"),
            ('{"text": "alone"}', lambada.load_passages, "line 1 has a single word"),
            ('{"text": "a", "label": 2}', imdb.load_reviews, "label is 2, not 0 or 1"),
            ('{"text": "a", "label": true}', imdb.load_reviews, "has no label"),
            ('{"text": "a"}', imdb.load_reviews, "has no label")]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load(path)
    with pytest.raises(FileNotFoundError, match="there is no file "):
        imdb.load_reviews("")


# ---- all of them

@pytest.fixture
def run(dataset, tmp_path):
    train(build(TrainConfig, dict(
        data=str(dataset), out=str(tmp_path / "run"), max_steps=3, batch_tokens=512, micro_batch=8,
        device="cpu", dtype="float32", compile="off", sample_tokens=0,
        model=dict(block_size=64, n_layer=1, n_head=2, n_embd=16))))
    return tmp_path / "run"


@pytest.fixture
def hellaswag_file(tmp_path):
    path = tmp_path / "hellaswag.jsonl"
    path.write_text("".join(json.dumps({"query": f"What is {i}?", "label": i % 4,
                                        "endings": ["one", "two or so", "3", str(i)]}) + "\n"
                            for i in range(6)))
    return path


def test_one_table_and_the_runs_own_file_hold_what_each_evaluation_finds(
        run, hellaswag_file, reviews, passages, tmp_path, capsys):
    pytest.importorskip("safetensors")
    model, tokenizer = load_model(run)
    folder = tmp_path / "folder"
    model.save_pretrained(folder)
    tokenizer.save(folder / "tokenizer.json")
    capsys.readouterr()
    command.main([str(run), str(folder), f"--hellaswag_file={hellaswag_file}", f"--imdb_file={reviews}",
                  f"--lambada_file={passages}", "--limit=4", "--tokens=256", "--device=cpu",
                  "--dtype=float32"])
    shown = capsys.readouterr().out.splitlines()
    lines = {line[:32].strip(): line[32:].split() for line in shown}
    kept = json.loads((run / "eval.json").read_text())
    items = command.spread(hellaswag.load_items(hellaswag_file), 4)
    for style in ("completion", "harness"):
        found = hellaswag.evaluate(model, tokenizer, items, style)
        assert kept[f"hellaswag_{style}"] == json.loads(json.dumps(found))
        for metric in ("acc", "acc_norm"):              # the same for the run and for its folder
            figures = lines[f"hellaswag {style} {metric}"]
            assert figures[0] == f"{found[metric]:.4f}" and figures[:4] == figures[4:]
    assert kept["imdb"]["n"] == kept["lambada"]["n"] == 4
    assert lines["hellaswag completion items"] == ["4", "4"]
    assert kept["imdb"]["acc"] == imdb.evaluate(
        model, tokenizer, command.spread(imdb.load_reviews(reviews), 4))["acc"]
    expected = loss.measure(model, tokenizer, loss.LossConfig(
        data=kept["loss"]["data"], limit=256, dtype="float32"))
    assert {key: kept["loss"][key] for key in expected} == expected
    assert lines["bits per byte"] == [f"{expected['bits_per_byte']:.4f}", "-"]  # a folder has none
    assert shown[0].split() == [str(run), str(folder)]
    assert not (folder / "eval.json").exists()


def test_a_run_with_an_adapter_is_evaluated_as_its_merged_model_is(
        run, dataset, hellaswag_file, reviews, passages, tmp_path, capsys):
    pytest.importorskip("safetensors")
    adapted = tmp_path / "adapted"
    train(build(TrainConfig, dict(
        init_from=str(run), data=str(dataset), out=str(adapted), max_steps=6, batch_tokens=512,
        micro_batch=8, learning_rate=5e-2, min_learning_rate=5e-2, device="cpu", dtype="float32",
        compile="off", sample_tokens=0, lora=dict(r=2, target_modules=("all-linear",)))))
    model, tokenizer = load_base(adapted)
    model.save_pretrained(tmp_path / "merged")
    tokenizer.save(tmp_path / "merged" / "tokenizer.json")
    command.main([str(adapted), str(run), f"--hellaswag_file={hellaswag_file}", f"--imdb_file={reviews}",
                  f"--lambada_file={passages}", "--device=cpu", "--dtype=float32"])
    kept, base = (json.loads((folder / "eval.json").read_text()) for folder in (adapted, run))
    for task, found in (
            ("imdb", imdb.evaluate(model, tokenizer, imdb.load_reviews(reviews))),
            ("lambada", lambada.evaluate(model, tokenizer, lambada.load_passages(passages)))):
        assert (kept[task]["acc"], kept[task]["n"]) == (found["acc"], found["n"])
    assert kept["parameters"] > base["parameters"]
    assert kept["loss"]["loss"] != pytest.approx(base["loss"]["loss"], rel=1e-3)
    capsys.readouterr()
    for name in (adapted, tmp_path / "merged"):         # merged: other roundings of float32
        loss.main([f"--model={name}", f"--data={dataset}", "--device=cpu", "--dtype=float32"])
    figures = [float(line.split("loss ")[1].split()[0])
               for line in capsys.readouterr().out.splitlines()]
    assert figures == pytest.approx([kept["loss"]["loss"]] * 2, abs=2e-4)


def test_a_run_is_scored_on_the_answers_that_it_has_learned(run, monkeypatch):
    settings = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**settings, "labels": "last"}))
    monkeypatch.setattr(loss.shards, "find", str)
    monkeypatch.setattr(loss.chat, "load_samples", lambda *arguments: arguments[-1])
    for asked, found in (("", "last"), ("all", "all")):
        config = loss.LossConfig(model=str(run), labels=asked, template="plain")
        assert loss.open_chat(config, "val", None, 16) == found
    assert loss.open_chat(loss.LossConfig(template="plain"), "val", None, 16) == "all"


def test_a_limit_takes_items_from_all_of_a_file():
    """The halves of a file in order, as IMDB's is, and of one whose labels take turns; one of each
    third, the same each time; and all where there are no more."""
    assert command.spread([0] * 12500 + [1] * 12500, 1000).count(1) == 500
    assert 400 < command.spread([0, 1] * 12500, 1000).count(1) < 600
    few = command.spread(list("abcde"), 3)
    assert few == command.spread(list("abcde"), 3)
    assert few[0] == "a" and few[1] in "bc" and few[2] in "de"
    for limit in (0, 5, 9):
        assert command.spread(list("abcde"), limit) == list("abcde")


def test_all_is_without_limits(run, hellaswag_file):
    command.main([str(run), f"--hellaswag_file={hellaswag_file}", "--limit=0", "--tokens=0",
                  "--device=cpu"])
    kept = json.loads((run / "eval.json").read_text())
    assert kept["hellaswag_harness"]["n"] == 6 and kept["loss"]["tokens"] == 1008


def test_what_has_no_file_is_left_out_and_said_so(run, dataset, monkeypatch, capsys):
    monkeypatch.setattr(command.hellaswag, "load_items", missing)
    (dataset / "meta.json").unlink()
    command.main([str(run), "--device=cpu"])
    shown = capsys.readouterr()
    assert "HellaSwag is left out: there is none" in shown.err
    assert f"{run}: its loss is left out: there is no prepared data" in shown.err
    assert json.loads((run / "eval.json").read_text()).keys() == {"parameters", "block_size"}
    for words in ([str(run), "--hellaswag_file=none"], [str(run), f"--data={dataset}"]):
        with pytest.raises(FileNotFoundError):          # asked for, so not left out
            command.main([*words, "--device=cpu"])


def missing(path):
    raise FileNotFoundError("there is none")


def test_wrong_words_are_one_line(run):
    for words, message in [([], "no model given"), ([str(run), "--limit=-1"], "limit=-1 must be"),
                           ([str(run), "--limt=3"], "unknown setting --limt")]:
        with pytest.raises(ValueError, match=message):
            command.main(words)

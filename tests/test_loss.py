"""Loss on text and with overlapping windows, against loops that follow the definition."""
import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from bpe import Tokenizer
from data.chat import load_samples
from data.shards import Tokens
from eval import loss
from eval.loss import LossConfig, evaluate_loss, measure, strided_batches, text_tokens
from model import GPT, IGNORE, GPTConfig

CPU = torch.device("cpu")
TEXT = "Every token of a long text is scored once, naïvely or not. " * 3


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([TEXT], 280)


def random_model(vocab_size, block_size=16):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size, vocab_size, n_layer=2, n_head=2, n_embd=16)).eval()
    with torch.no_grad():
        for p in model.parameters():                    # so that context matters
            p.mul_(1 if p.dim() == 1 else 15)
    return model


@torch.no_grad()
def nats_one_by_one(model, ids, context):
    """Of token i after the tokens context(i) to i - 1, each by a forward pass of its own."""
    return [-model(ids[None, context(i):i])[0][0, -1].log_softmax(-1)[ids[i]].item()
            for i in range(1, len(ids))]


@pytest.mark.parametrize("length", [2, 10, 16, 17, 18, 30, 41])
@pytest.mark.parametrize("stride", [1, 5, 16])
def test_each_token_is_scored_once_after_the_context_that_the_stride_leaves(length, stride):
    model, ids = random_model(50), torch.randint(50, (length,))
    def window(i):              # the first that ends at or behind i, as one begins every `stride`
        return max(0, math.ceil((i - 16) / stride)) * stride
    expected = nats_one_by_one(model, ids, window)
    assert all(i - window(i) > 16 - stride for i in range(17, length))
    found = evaluate_loss(model, strided_batches(Tokens([ids.numpy()]), 16, stride, 3), CPU)
    assert found["tokens"] == length - 1
    assert found["loss"] == pytest.approx(np.mean(expected), rel=1e-5)      # float32


def test_a_stride_of_a_whole_window_is_no_overlap_and_a_smaller_one_sees_more():
    model, ids = random_model(50), torch.randint(50, (60,)).numpy()
    figures = [evaluate_loss(model, strided_batches(Tokens([ids]), 16, stride, 3), CPU)["loss"]
               for stride in (16, 4)]
    windows = loss.loader.evaluation_batches(Tokens([ids]), 16, 4)
    assert figures[0] == pytest.approx(evaluate_loss(model, windows, CPU)["loss"], rel=1e-6)
    assert figures[0] != pytest.approx(figures[1], rel=1e-3)


def test_a_limit_takes_windows_from_all_of_the_text():
    ids = np.arange(201) % 50
    batches = list(strided_batches(Tokens([ids]), 16, 4, 8, limit=20))
    x, y = (torch.cat(part) for part in zip(*batches))
    assert len(x) == 5 and x[0, 0] == 0 and y[-1, -1] != IGNORE
    assert (y >= 0).sum() == 16 + 4 * 4                 # the first scores all of its own


def test_nothing_to_evaluate_is_no_loss_of_zero():
    model, x = random_model(50), torch.zeros(1, 8, dtype=torch.long)
    for batches in ([], [(x, torch.full_like(x, IGNORE))]):
        with pytest.raises(ValueError, match="there is no label in what is to be evaluated"):
            evaluate_loss(model, batches, CPU)


@pytest.mark.parametrize("stride", [-1, 0, 17])
def test_a_stride_that_is_none_is_refused(stride):
    with pytest.raises(ValueError, match=f"stride={stride} "):
        next(strided_batches(Tokens([np.arange(40)]), 16, stride, 1))


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_text_files_are_scored_document_by_document_behind_an_end_token(tmp_path, tokenizer, kind):
    model, path = random_model(tokenizer.vocab_size), tmp_path / f"text.{kind}"
    documents = [TEXT, "another"] if kind == "jsonl" else [TEXT]
    path.write_text(TEXT if kind == "txt" else
                    "".join(json.dumps({"text": text}) + "\n" for text in documents))
    ids = torch.tensor([id for text in documents
                        for id in [tokenizer.eot, *tokenizer.encode(text)]])
    found = measure(model, tokenizer, LossConfig(data=str(path), stride=3, dtype="float32"))
    nats = nats_one_by_one(model, ids, lambda i: (i - 1) // 16 * 16)
    size = sum(len(text.encode()) for text in documents)        # the end tokens spell no bytes
    assert found["tokens"] == len(nats)
    assert found["loss"] == pytest.approx(np.mean(nats), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(np.mean(nats)), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / size, rel=1e-5)
    nats = nats_one_by_one(model, ids, lambda i: max(0, math.ceil((i - 16) / 3)) * 3)
    assert found["strided"]["loss"] == pytest.approx(np.mean(nats), rel=1e-5)
    assert found["strided"]["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / size,
                                                              rel=1e-5)


def test_the_command_shows_both_figures(tmp_path, tokenizer, capsys):
    pytest.importorskip("safetensors")
    random_model(tokenizer.vocab_size).save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model" / "tokenizer.json")
    (tmp_path / "text.txt").write_text(TEXT)
    words = [f"--model={tmp_path / 'model'}", f"--data={tmp_path / 'text.txt'}", "--device=cpu"]
    loss.main([*words, "--stride=4"])
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 2 and "text.txt: loss " in shown[0]
    assert shown[1].startswith("with 12 tokens of context or more (stride 4): loss ")
    loss.main(words)
    assert capsys.readouterr().out.splitlines() == shown[:1]


def test_what_cannot_be_scored_is_one_line(tmp_path, tokenizer):
    model = random_model(tokenizer.vocab_size)
    (tmp_path / "empty.txt").write_text(" ")
    (tmp_path / "text.txt").write_text(TEXT)
    for reader, name, message in [
            (tokenizer, "empty.txt", "has fewer than two tokens"),
            (None, "text.txt", "has no tokenizer.json"),
            (tokenizer, "none.txt", "there is no")]:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            measure(model, reader, LossConfig(data=str(tmp_path / name)))
    for name, value in (("batch_size", 0), ("stride", -1), ("limit", -1)):
        with pytest.raises(ValueError, match=f"{name}={value} must be at least"):
            LossConfig(**{name: value})


def test_documents_without_an_end_token_begin_with_their_text(tmp_path):
    plain = Tokenizer([], special_tokens=())
    (tmp_path / "a.txt").write_text("ab")
    assert text_tokens(str(tmp_path / "a.txt"), plain).read(0, 9).tolist() == [97, 98]


def test_damaged_shards_are_not_evaluated(dataset):
    model = random_model(256)
    tokenizer = Tokenizer([], special_tokens=())
    settings = LossConfig(data=str(dataset), limit=64)
    measure(model, tokenizer, settings)
    shard = next(dataset.glob("val*.npy"))
    data = bytearray(shard.read_bytes())
    data[-2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=f"{shard.name} differs from its checksum"):
        measure(model, tokenizer, settings)


# ---- texts with classes

@pytest.fixture
def topics(tmp_path):
    from data import labels
    (tmp_path / "topics.jsonl").write_text("".join(
        json.dumps({"text": f"{'xyz'[i % 3]} number {i}", "label": i % 3}) + "\n"
        for i in range(40)))
    return labels.prepare(labels.LabelsConfig(from_=str(tmp_path / "topics.jsonl"),
                                              out=str(tmp_path / "topics"), validation=0.3))


def classifier_of(tokenizer, classes=3):
    from run.classifier import Classifier
    model = Classifier(random_model(tokenizer.vocab_size), classes).eval()
    torch.nn.init.normal_(model.head.weight)
    return model


def test_a_classifier_is_scored_on_the_classes_of_texts(topics, tokenizer):
    model = classifier_of(tokenizer)
    records = [json.loads(line) for line in (topics / "val.jsonl").read_text().splitlines()]
    with torch.no_grad():
        logits = torch.cat([model(torch.tensor([tokenizer.encode(record["text"])[-16:]]))[0]
                            for record in records])
    answers = torch.tensor([record["label"] for record in records])
    found = measure(model, tokenizer, LossConfig(data=str(topics), dtype="float32", batch_size=3))
    expected = torch.nn.functional.cross_entropy(logits, answers).item()
    right = (logits.argmax(1) == answers).float().mean().item()
    assert found == {"loss": pytest.approx(expected, rel=1e-5), "tokens": len(records),
                     "accuracy": pytest.approx(right, rel=1e-6)}
    assert 0 < right < 1
    one = [measure(model, tokenizer, LossConfig(data=str(topics), split=split))["tokens"]
           for split in ("train", "val")]
    assert sum(one) == 40


def test_a_model_and_data_of_different_kinds_are_refused(topics, dataset, tokenizer):
    model, gpt = classifier_of(tokenizer), random_model(tokenizer.vocab_size)
    for one, data, changes, message in [
            (gpt, topics, {}, "gpt2 is no classifier, and .*topics holds texts with classes"),
            (model, dataset, {}, "gpt2 is a classifier, and .* holds token shards; name another"),
            (model, topics, dict(stride=4), "--stride is for text"),
            (model, topics, dict(fit=True), "--fit is for chat data"),
            (classifier_of(tokenizer, 2), topics, {}, r"among 2 classes, .* has 3 \(0, 1, 2\)")]:
        with pytest.raises(ValueError, match=message):
            measure(one, tokenizer, LossConfig(data=str(data), **changes))
    with pytest.raises(ValueError, match="has no tokenizer.json"):
        measure(model, None, LossConfig(data=str(topics)))


# ---- conversations

CHAT = [[{"role": "user", "content": f"What is {a} and {b}?"},
         {"role": "assistant", "content": f"It is {a + b}."},
         {"role": "user", "content": "Sure?"},
         {"role": "assistant", "content": "Yes." if a % 2 else "No, it is not."}]
        for a in range(5) for b in range(4)]


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    """A folder of chat data and a tokenizer with the template's special tokens."""
    from data import chat
    folder = tmp_path_factory.mktemp("chat")
    (folder / "all.jsonl").write_text("".join(
        json.dumps({"messages": messages}) + "\n" for messages in CHAT))
    chat.prepare(chat.ChatConfig(from_=str(folder / "all.jsonl"), out=str(folder / "data"),
                                 validation=0.2))
    tokenizer = Tokenizer.train(["What is 1 and 2? It is 3. Sure? Yes. No, it is not."] * 3, 280)
    return folder / "data", chat.extend_tokenizer(tokenizer, "chatml")


@pytest.fixture(scope="module")
def chat_model(conversations):
    """A model that has learned most of the training conversations."""
    from data import chat
    folder, tokenizer = conversations
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = GPT(GPTConfig(128, tokenizer.vocab_size, n_layer=2, n_head=2, n_embd=32))
    samples = chat.load_samples(folder, "train", tokenizer, "chatml", 128)
    x, y = samples.padded(np.arange(len(samples) // 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        model(x, y)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def split_of(folder, split):
    return [json.loads(line)["messages"]
            for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def test_chat_data_is_scored_on_its_answers(conversations, chat_model):
    from data import chat
    folder, tokenizer = conversations
    nats, size = [], 0
    for messages in split_of(folder, "val"):
        ids, labels = chat.render(messages, tokenizer, "chatml")
        nats += [nat for nat, label in zip(nats_one_by_one(chat_model, torch.tensor(ids),
                                                           lambda i: 0), labels[1:]) if label >= 0]
        size += sum(len(m["content"]) for m in messages if m["role"] == "assistant")
    found = measure(chat_model, tokenizer, LossConfig(data=str(folder), template="chatml",
                                                         dtype="float32"))
    assert found["tokens"] == len(nats)
    assert found["loss"] == pytest.approx(np.mean(nats), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(sum(nats) / math.log(2) / size, rel=1e-4)


def test_exact_match_is_what_generation_says_word_for_word(conversations, chat_model):
    """Each answer generated after the true turns before it, against the figure of one pass."""
    from data import chat
    folder, tokenizer = conversations
    end = tokenizer.special_tokens["<|im_end|>"]
    right, training = 0, split_of(folder, "train")
    for messages in training:
        said = []
        for turn in (1, 3):
            prompt = chat.render_prompt(messages[:turn], tokenizer, "chatml")
            new = chat_model.generate(torch.tensor([prompt]), 30, temperature=0, stop_ids=[end])
            said.append(tokenizer.decode(new[0, len(prompt):].tolist()))
        right += said == [messages[turn]["content"] + "<|im_end|>" for turn in (1, 3)]
    assert 0 < right < len(training)
    settings = LossConfig(data=str(folder), template="chatml", fit=True, dtype="float32",
                          batch_size=3)
    fit = measure(chat_model, tokenizer, settings)["fit"]
    assert fit["exact_match"] == right / len(training) and fit["samples"] == len(training)
    losses = [measure(chat_model, tokenizer, LossConfig(data=str(folder), split=split,
                                                        template="chatml", dtype="float32"))["loss"]
              for split in ("train", "val")]
    assert [fit["train_loss"], fit["val_loss"]] == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("figures,words", [
    ((2.0, 2.1, 0.49), "has not learned the training set: it answers 49%"),
    ((0.1, 0.7, 0.5), "has learned it but does not generalise: validation is 0.60 nats"),
    ((0.1, 0.5, 0.5), "fine: it answers 50%"),
])
def test_the_verdict_follows_its_thresholds(figures, words):
    from eval.fit import verdict
    assert verdict(*figures).startswith(words)


def test_the_command_reports_the_fit(conversations, chat_model, tmp_path, capsys):
    pytest.importorskip("safetensors")
    folder, tokenizer = conversations
    chat_model.save_pretrained(tmp_path)
    tokenizer.save(tmp_path / "tokenizer.json")
    loss.main([f"--model={tmp_path}", f"--data={folder}", "--fit", "--device=cpu",
               "--template=chatml"])
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 3 and "/val: loss " in shown[0] and "exact_match 0." in shown[1]
    assert "word for word" in shown[2] or "does not generalise" in shown[2]


def test_settings_of_the_wrong_data_are_refused(conversations, chat_model, dataset):
    folder, tokenizer = conversations
    for settings, message in [
            (dict(data=str(folder), stride=4), "--stride is for text"),
            (dict(data=str(dataset), fit=True), "--fit is for chat data"),
            (dict(data=str(dataset), labels="last"), "--labels is for chat data"),
            (dict(data=__file__, split="train"), "--split is for token shards, chat data, texts"),
            (dict(data=str(folder)), "was not trained on conversations; say how"),
            (dict(data=str(folder), template="alpine"), "template='alpine' is unknown")]:
        with pytest.raises(ValueError, match=message):
            measure(chat_model, tokenizer, LossConfig(**settings))
    with pytest.raises(ValueError, match="has no tokenizer.json"):
        measure(chat_model, None, LossConfig(data=str(folder)))


def test_a_loss_over_a_part_of_the_conversations_says_so(conversations, chat_model, capsys):
    folder, tokenizer = conversations
    for block_size, said in ((128, False), (48, True)):
        model = GPT(dataclasses.replace(chat_model.config, block_size=block_size))
        capsys.readouterr()
        found = measure(model, tokenizer, LossConfig(data=str(folder), template="chatml"))
        samples = load_samples(folder, "val", tokenizer, "chatml", block_size)
        assert (capsys.readouterr().err == f"{folder}/val: {samples.summary()}\n") == said
        assert found["tokens"] == samples.label_counts.sum()


def test_shards_of_gpt2s_tokens_are_for_no_other_tokenizer(conversations, chat_model, tmp_path):
    """llm.c's, which name no tokenizer; here all ids are in the model's vocabulary."""
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, 500
    (tmp_path / "val.bin").write_bytes(header.tobytes() + np.arange(500, dtype="<u2").tobytes())
    config = GPTConfig(block_size=64, vocab_size=500, n_layer=1, n_head=2, n_embd=8)
    with pytest.raises(ValueError, match="was made with another tokenizer than out/x's"):
        measure(GPT(config), conversations[1], LossConfig(model="out/x", data=str(tmp_path)))
    found = measure(GPT(config), None, LossConfig(data=str(tmp_path)))      # a run on such shards
    assert found["tokens"] == 499 and "bits_per_byte" not in found


def test_a_run_brings_its_template(conversations, chat_model, tmp_path):
    folder, tokenizer = conversations
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"template": "chatml"}')
    figures = [measure(chat_model, tokenizer, LossConfig(model=model, data=str(folder),
                                                         template=template))
               for model, template in ((str(tmp_path), ""), ("gpt2", "chatml"))]
    assert figures[0] == figures[1]


def test_the_host_waits_once_for_an_evaluation_and_compiles_one_shape(monkeypatch):
    """Told by the reads of tensors on the host, and by what goes through torch.compile."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=20, block_size=8, n_layer=1, n_head=2, n_embd=8))
    ids = torch.randint(20, (7, 9))
    batches = [(part[:, :-1], part[:, 1:]) for part in ids.split(2)]        # 2, 2, 2 and 1 rows
    with torch.no_grad():
        expected = sum(model(x, y, reduction="sum")[1].item() for x, y in batches) / (7 * 8)
    reads, compiled = [], []

    def counted(name):
        original = getattr(torch.Tensor, name)
        return lambda tensor: reads.append(name) or original(tensor)
    for name in ("item", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    monkeypatch.setattr(torch, "compile", lambda network, dynamic: lambda x, y, reduction: (
        compiled.append(len(x)) or network(x, y, reduction=reduction)))
    for compile in (False, True):
        reads.clear()
        assert evaluate_loss(model, batches, CPU, compile=compile)["loss"] == expected
        assert reads == ["tolist", "tolist"]            # of all batches, and of the ranks' sum
    assert compiled == [2, 2, 2]


def test_attention_of_changing_shapes_leaves_cudnn_out(monkeypatch):
    seen = []
    monkeypatch.setattr(GPT, "features", lambda self, *_, **__: seen.append(
        torch.backends.cuda.cudnn_sdp_enabled()) or torch.zeros(1, 1, 8))
    model = GPT(GPTConfig(vocab_size=20, block_size=8, n_layer=1, n_head=2, n_embd=8))
    model.next_logits(torch.zeros(1, 3, dtype=torch.long))
    x = torch.zeros(1, 4, dtype=torch.long)
    for compile in (False, True):
        monkeypatch.setattr(torch, "compile", lambda network, dynamic: network)
        evaluate_loss(model, [(x, x[:, :1])], CPU, compile=compile)
    assert seen == [False, False, True] and torch.backends.cuda.cudnn_sdp_enabled()

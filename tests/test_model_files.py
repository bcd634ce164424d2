"""Files of others: weights against transformers and a hand-written llm.c file, export, damage."""
import json
import shutil
import struct
from types import SimpleNamespace

import pytest
import torch

from bpe import Tokenizer
from lora import LoRAConfig, add_lora, merge_lora, unload_lora
from model import GPT, MLP, GPTConfig
from run import checkpoint, export
from run.config import build
from run.load import load_model
from sample import continue_text
from tests.test_model import TINY, randomised, tiny
from train import TrainConfig, train

pytest.importorskip("safetensors")

DOCUMENTS = [f"document {i} of many, {'odd' if i % 2 else 'even'}." for i in range(60)]


def hugging_face(**shape):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(2)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **shape))
    return randomised(model, 0.02).eval()


SMALL = dict(n_positions=32, vocab_size=101, n_layer=2, n_head=4, n_embd=48)


@pytest.mark.parametrize("shape", [
    SMALL, pytest.param(dict(n_positions=1024), id="124M", marks=pytest.mark.slow)])
def test_weights_of_transformers_give_the_same_logits_and_loss(tmp_path, shape):
    theirs = hugging_face(**shape)
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path).eval()
    idx = torch.randint(ours.config.vocab_size, (2, 32))
    with torch.no_grad():
        expected = theirs(idx, labels=idx)
        torch.testing.assert_close(ours(idx)[0], expected.logits, rtol=0, atol=1e-4)
        loss = ours(idx[:, :-1], idx[:, 1:])[1]
    torch.testing.assert_close(loss, expected.loss, rtol=1e-5, atol=0)
    assert ours.lm_head.weight is ours.transformer.wte.weight


@pytest.mark.parametrize("changes", [{}, {"bias": False}, {"vocab_multiple": 64}])
def test_our_weights_give_transformers_the_same_logits(tmp_path, changes):
    transformers = pytest.importorskip("transformers")
    ours = randomised(tiny(**changes))
    ours.save_pretrained(tmp_path)
    theirs, report = transformers.GPT2LMHeadModel.from_pretrained(tmp_path,
                                                                  output_loading_info=True)
    assert not any(report.values()), report
    idx = torch.randint(61, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(idx).logits, ours(idx)[0], rtol=0, atol=1e-4)
    again = GPT.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(idx)[0], ours(idx)[0], rtol=0, atol=1e-5)


# ---- a model that is no longer GPT-2

class Louder(GPT):
    """Its logits are twice as large."""

    def forward(self, *args, **settings):
        logits, loss = super().forward(*args, **settings)
        return (logits if logits is None else 2 * logits), loss


def untie(model):
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone() + 0.1)


@pytest.mark.parametrize("change,message", [
    (lambda model: setattr(model, "__class__", Louder), "computes other logits than the model"),
    (untie, "computes other logits than the model"),
    (lambda model: setattr(model.transformer.h[1], "ln_2", torch.nn.RMSNorm(32)),
     "computes other logits than the model"),
    (lambda model: add_lora(model, LoRAConfig(r=2)), "has to be merged and unloaded first"),
    (lambda model: model.register_buffer("gate", torch.ones(1)), "differs from GPT-2 in 'gate'"),
])
def test_a_model_that_the_files_would_not_give_back_is_not_written(tmp_path, change, message):
    model = randomised(tiny()).train()
    change(model)
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_model_file_whose_activation_was_edited_is_not_written(tmp_path, monkeypatch):
    """What a reader of the file would compare with is edited along, so the check is of its own."""
    monkeypatch.setattr(MLP, "forward", lambda self, x: self.c_proj(self.c_fc(x).relu().square()))
    with pytest.raises(ValueError, match="other logits than the model, by up to [0-9.e-]+ where"):
        tiny().train().save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gpt2_in_training_is_written_in_its_precision_and_stays_as_it_is(tmp_path, dtype):
    model = add_lora(randomised(tiny(dropout=0.5, vocab_multiple=64)), LoRAConfig(r=2), quiet=True)
    merge_lora(model)
    unload_lora(model)
    model = model.to(dtype).train()
    with torch.autocast("cpu", torch.bfloat16):
        model.save_pretrained(tmp_path)
    assert model.training
    for name, tensor in GPT.from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name][:len(tensor)].float()), name


def test_a_model_saved_without_its_head_is_read(tmp_path):
    theirs = hugging_face(**SMALL)
    theirs.transformer.save_pretrained(tmp_path)        # keys have no "transformer." in front
    idx = torch.randint(101, (1, 8))
    with torch.no_grad():
        torch.testing.assert_close(GPT.from_pretrained(tmp_path)(idx)[0], theirs(idx).logits,
                                   rtol=0, atol=1e-4)


@pytest.mark.parametrize("damage,message", [
    (lambda t: t.pop("transformer.h.1.ln_2.bias"), "has no tensor 'transformer.h.1.ln_2.bias'"),
    (lambda t: t.update({"transformer.h.5.x": torch.zeros(1)}), "'transformer.h.5.x' that GPT-2"),
    (lambda t: t.update({"transformer.wpe.weight": torch.zeros(15, 32)}),
     r"'transformer.wpe.weight' is \(15, 32\) in the file; config.json asks for \(16, 32\)"),
    (lambda t: t.update({"lm_head.weight": torch.zeros(61, 32)}), "GPT-2 ties them"),
    (lambda t: t.update({"lm_head.weight": torch.zeros(61, 32, dtype=torch.int8)}), "ties them"),
    (lambda t: t.update({"transformer.h.0.mlp.c_fc.weight": torch.zeros(4096)}),
     r"c_fc.weight' is \(4096,\) in the file"),
    (lambda t: t.update({"transformer.ln_f.bias": torch.zeros(32, dtype=torch.int8)}), "no float"),
])
def test_a_wrong_tensor_is_named(tmp_path, damage, message):
    safetensors = pytest.importorskip("safetensors.torch")
    tiny().save_pretrained(tmp_path)
    tensors = safetensors.load_file(tmp_path / "model.safetensors")
    damage(tensors)
    safetensors.save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("name,own,warned", [
    ("user/name", ["tokenizer.json"], False), ("user/name", ["vocab.json", "merges.txt"], False),
    ("user/name", [], True), ("gpt2-medium", [], False), ("folder", [], True),
    ("folder", ["tok.json"], False)])
def test_a_model_comes_with_its_own_tokenizer_and_gpt2s_is_never_assumed_unsaid(
        tmp_path, monkeypatch, capsys, name, own, warned):
    """A folder stands for the hub, of which only the files come that are asked for."""
    hub = pytest.importorskip("huggingface_hub")
    tiny(vocab_size=50257, n_embd=8, n_layer=1).save_pretrained(tmp_path / "folder")
    tokenizer = Tokenizer.train(DOCUMENTS, 300)
    tokenizer.save_pretrained(tmp_path / "hf")
    bpe = json.loads((tmp_path / "hf" / "tokenizer.json").read_text())["model"]
    tokenizer.save(tmp_path / "hf" / "tok.json")
    (tmp_path / "hf" / "vocab.json").write_text(json.dumps(bpe["vocab"]))
    (tmp_path / "hf" / "merges.txt").write_text("\n".join(map(" ".join, bpe["merges"])))
    for file in own:
        shutil.copy(tmp_path / "hf" / file, tmp_path / "folder")

    def snapshot_download(repository, allow_patterns):
        assert repository == {"gpt2-medium": "openai-community/gpt2-medium"}.get(name, name)
        (tmp_path / "cache").mkdir()
        for pattern in allow_patterns:
            for file in (tmp_path / "folder").glob(pattern):
                shutil.copy(file, tmp_path / "cache")
        return str(tmp_path / "cache")

    gpt2 = SimpleNamespace(vocab_size=50257, hash="GPT-2's")
    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr("run.load.Tokenizer.gpt2", lambda: gpt2)
    monkeypatch.chdir(tmp_path)
    assert load_model(name)[1].hash == (tokenizer if own else gpt2).hash
    said = capsys.readouterr().err
    assert (f"warning: {name} has no tokenizer; " in said) == warned and said.count("\n") == warned


def test_one_tensor_in_two_files_is_refused(tmp_path):
    """As with another precision of the model beside it: which of them would be read?"""
    tiny().save_pretrained(tmp_path)
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "model.fp16.safetensors")
    with pytest.raises(ValueError, match="has .*transformer.* in model.safetensors and in another"):
        GPT.from_pretrained(tmp_path)


def test_another_architecture_is_refused(tmp_path):
    tiny().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "activation_function": "relu"}))
    with pytest.raises(ValueError, match="activation_function is 'relu'; GPT-2 has 'gelu_new'"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("changes,message", [
    (dict(n_embd="32"), "n_embd is '32', no whole number"),
    (dict(n_layer=None), "n_layer is None, no whole number"),
    (dict(vocab_size=True), "vocab_size is True, no whole number"),
    (dict(n_head=0), "n_head is 0, no whole number"),
    (dict(n_head=5), "config.json: n_embd=32 is not divisible by n_head=5"),
    (dict(n_inner="x"), "n_inner is 'x'"),
    (dict(n_layer=10**9), "asks for n_layer=1000000000; the tensors are those of 3 blocks"),
    (dict(vocab_size=10**9), r"\(61, 32\) in the file; config.json asks for \(10{9}, 32\)"),
    (dict(n_embd=4 * 10**8), "config.json asks for"), (dict(n_head=10**4000), "n_head is 10{79}, "),
])
def test_a_config_that_cannot_be_is_refused_before_anything_is_made(tmp_path, changes, message):
    tiny().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=message) as caught:
        GPT.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000, b"1" * 5000])
def test_a_config_that_is_no_json_object_is_named(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ValueError, match="config.json (is truncated or not JSON|holds a)"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("keep", [0, 7, 8, 100, 5000, -1])
def test_truncated_safetensors_are_named(tmp_path, keep):
    tiny().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="model.safetensors is truncated or damaged"):
        GPT.from_pretrained(tmp_path)


def test_a_shorter_context_keeps_the_first_positions(tmp_path):
    whole = randomised(tiny())
    whole.save_pretrained(tmp_path)
    short, idx = GPT.from_pretrained(tmp_path, block_size=9).eval(), torch.randint(61, (2, 9))
    assert short.config.block_size == 9
    torch.testing.assert_close(short(idx)[0], whole(idx)[0])
    for wrong in (17, 0):
        with pytest.raises(ValueError, match=f"block_size={wrong} is not in 1 to 16, the context"):
            GPT.from_pretrained(tmp_path, block_size=wrong)


def test_a_model_can_be_saved_over_the_folder_that_it_came_from(tmp_path):
    model = randomised(tiny())
    model.save_pretrained(tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(2):
        GPT.from_pretrained(tmp_path).save_pretrained(tmp_path)
    for name, tensor in GPT.from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_a_model_does_not_change_with_the_file_that_it_was_read_from(tmp_path):
    randomised(tiny()).save_pretrained(tmp_path)
    model, file = GPT.from_pretrained(tmp_path), tmp_path / "model.safetensors"
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with open(file, "r+b") as open_file:                # in place, as rsync --inplace writes
        open_file.write(b"\1" * file.stat().st_size)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# ---- export

def learn_documents(tokenizer, end):
    """A model that has learned the documents, with this token behind each."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2,
                          n_embd=32, vocab_multiple=64))
    ids = [id for text in DOCUMENTS for id in [*tokenizer.encode(text), end]]
    ids = torch.tensor(ids[:len(ids) // 65 * 65]).view(-1, 65)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        model(ids[:, :-1], ids[:, 1:])[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def trained():
    """A model that has learned the documents and their ends, and its tokenizer."""
    tokenizer = Tokenizer.train(DOCUMENTS, 300)
    return learn_documents(tokenizer, tokenizer.eot), tokenizer


def test_an_exported_model_generates_in_transformers_what_it_does_here(trained, tmp_path):
    """Greedy text by transformers' pipeline, which ends where a document does."""
    transformers = pytest.importorskip("transformers")
    model, tokenizer = trained
    model.save_pretrained(tmp_path / "source")
    tokenizer.save(tmp_path / "source" / "tokenizer.json")
    export.main([str(tmp_path / "source"), f"--out={tmp_path / 'folder'}"])
    generate = transformers.pipeline("text-generation", str(tmp_path / "folder"), device="cpu")
    ended = 0
    for prompt in ("document 7", "docum", "many, ev", "of"):
        expected = continue_text(model, tokenizer, prompt, 50, temperature=0)
        (found,) = generate(prompt, max_new_tokens=50)
        assert found["generated_text"] == expected
        ended += len(tokenizer.encode(expected)) < len(tokenizer.encode(prompt)) + 50
    assert ended > 0                                    # at least one by its end token
    assert generate.model.get_input_embeddings().weight.shape[0] == tokenizer.vocab_size
    again, read = load_model(tmp_path / "folder")
    assert read.hash == tokenizer.hash
    idx = torch.tensor([tokenizer.encode(DOCUMENTS[3])])
    torch.testing.assert_close(again(idx)[0], model(idx)[0], rtol=0, atol=1e-5)


def test_an_exported_chat_run_ends_an_answer_where_its_template_does(tmp_path):
    """chatml's <|im_end|>, in transformers' generate; without a template <|endoftext|> alone."""
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer.train(DOCUMENTS, 300).add_special_tokens(["<|im_start|>", "<|im_end|>"])
    end = tokenizer.special_tokens["<|im_end|>"]
    model = learn_documents(tokenizer, end)
    tokenizer.save(tmp_path / "tokenizer.json")
    (tmp_path / "run.json").write_text("{}")
    for template, stops in (("chatml", [tokenizer.eot, end - 1, end]), ("", tokenizer.eot)):
        settings = {"model": vars(model.config), "template": template}
        checkpoint.save(tmp_path / "best.pt", {"model": model.state_dict(), "config": settings,
                                               "step": 60, "base": "", "best_loss": 1.0})
        (tmp_path / "config.json").write_text(json.dumps(settings))
        export.export(tmp_path, tmp_path / "folder")
        theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "folder")
        assert theirs.generation_config.eos_token_id == stops
        idx = torch.tensor([tokenizer.encode("document 7")])
        out = theirs.generate(idx, max_new_tokens=50)[0].tolist()
        if template:
            assert out == model.generate(idx, 50, 0, stop_ids=(end,))[0].tolist()
            assert out[-1] == end
        else:
            assert end in out[:-1]


@pytest.mark.parametrize("variant", [dict(), dict(use_dora=True), dict(init="pissa"),
                                     dict(block_size=24)])
def test_the_run_of_an_adapter_is_exported_merged(dataset, tmp_path, variant):
    """With its base known, or named; also one that has shortened its base's context."""
    context = variant.get("block_size", 32)
    variant = {key: value for key, value in variant.items() if key != "block_size"}
    settings = dict(data=str(dataset), max_steps=6, batch_tokens=256, micro_batch=8, device="cpu",
                    dtype="float32", compile="off", sample_tokens=0, learning_rate=2e-2)
    train(build(TrainConfig, {**settings, "out": str(tmp_path / "base"), "model": dict(
        block_size=32, n_layer=2, n_head=2, n_embd=16)}))
    train(build(TrainConfig, {**settings, "out": str(tmp_path / "run"), "init_from": str(
        tmp_path / "base"), "model": dict(block_size=context), "batch_tokens": 8 * context,
                                  "lora": dict(r=2, target_modules=("all-linear",), **variant)}))
    export.main([str(tmp_path / "run"), f"--out={tmp_path / 'folder'}"])
    export.main([str(tmp_path / "base"), f"--adapter={tmp_path / 'run'}",
                 f"--out={tmp_path / 'again'}"])
    (base, _), (run, _), (folder, _), (again, _) = (
        load_model(tmp_path / name) for name in ("base", "run", "folder", "again"))
    assert type(folder) is GPT and not hasattr(folder, "adapters")
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in folder.named_parameters())
    idx = torch.randint(base.config.vocab_size, (2, context))
    torch.testing.assert_close(folder(idx)[0], run(idx)[0], rtol=0, atol=1e-4)
    assert (folder(idx)[0] - base(idx)[0]).abs().max() > 0.01


def test_what_cannot_be_exported_is_one_line(tmp_path):
    tiny().save_pretrained(tmp_path / "bare")           # without a tokenizer
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    for words, message in [
            (["x"], "out is missing; give --out=FOLDER"), (["--out=x"], "say what to export"),
            ([str(tmp_path / "bare"), f"--out={tmp_path / 'out'}"], "no tokenizer.json"),
            ([str(tmp_path / "bare"), f"--out={tmp_path / 'run'}"], "is a run, whose tokenizer")]:
        with pytest.raises(ValueError, match=message):
            export.main(words)


# ---- llm.c

def llmc(model, path, version=3, padded=64):
    """Write llm.c's file with the layout spelled out, tensor by tensor."""
    c, w = model.config, model.state_dict()
    blocks = [[w[f"transformer.h.{i}.{name}"] for i in range(c.n_layer)] for name in (
        "ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight",
        "attn.c_proj.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias",
        "mlp.c_proj.weight", "mlp.c_proj.bias")]
    wte = torch.zeros(padded, c.n_embd)
    wte[:c.vocab_size] = w["transformer.wte.weight"]
    tensors = [wte, w["transformer.wpe.weight"], *sum(blocks, []), w["transformer.ln_f.weight"],
               w["transformer.ln_f.bias"]]
    numbers = torch.cat([tensor.flatten() for tensor in tensors])
    header = [20240326, version, c.block_size, c.vocab_size, c.n_layer, c.n_head, c.n_embd, padded]
    body = (numbers if version == 3 else numbers.bfloat16().view(torch.int16)).numpy().tobytes()
    path.write_bytes(struct.pack("256i", *header, *[0] * 248) + body)
    return path


@pytest.mark.parametrize("version,tolerance", [(3, 0), (5, 2**-8)])    # bfloat16 has 8 bits
def test_a_checkpoint_of_llmc_is_read(tmp_path, version, tolerance):
    model = randomised(tiny())
    found = GPT.from_pretrained(str(llmc(model, tmp_path / "gpt2.bin", version)), block_size=12)
    assert found.config == GPTConfig(**{**vars(TINY), "block_size": 12})
    for name, tensor in found.state_dict().items():
        expected = model.state_dict()[name][:len(tensor)]
        torch.testing.assert_close(tensor, expected, rtol=tolerance, atol=0, msg=name)
        assert tensor.dtype == torch.float32
    assert found.lm_head.weight is found.transformer.wte.weight


@pytest.mark.parametrize("position,value,message", [
    (0, 20240520, "has magic 20240520"), (1, 4, "and version 4"), (4, 2**31 - 1, "its header says"),
    (4, 2, "its header says"), (4, -1, "impossible sizes"), (7, 60, "impossible sizes"),
    (5, 5, "is not divisible by"), (6, 64, "its header says"), (None, 1, "its header says"),
    (None, 32_000, "is shorter than"),
])
def test_a_damaged_checkpoint_of_llmc_is_named(tmp_path, position, value, message):
    path = llmc(tiny(), tmp_path / "gpt2.bin")
    data = bytearray(path.read_bytes())
    if position is None:
        data = data[:-value] if value == 1 else data[:1000]
    else:
        data[4 * position:4 * position + 4] = struct.pack("i", value)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        GPT.from_pretrained(path)
    assert str(path) in str(caught.value)

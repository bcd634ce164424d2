"""Models by name, their text and their loss, from the command line."""
import re

import pytest
import torch

import checkpoint
import sample
from bpe import Tokenizer
from config import build
from data.corpus import CorpusConfig, prepare
from eval import loss
from sample import continue_text, load_model
from train import TrainConfig, train


@pytest.fixture
def run(tmp_path):
    """A short run on text with a trained tokenizer, which has an end-of-text token."""
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "document {i} of many"}}\n'
                                              for i in range(400)))
    data = prepare(CorpusConfig(source=str(tmp_path / "a.jsonl"), vocab_size=280,
                                out=str(tmp_path / "data")))
    train(build(TrainConfig, dict(
        data=str(data), out=str(tmp_path / "run"), max_steps=30, batch_tokens=512, micro_batch=16,
        learning_rate=1e-2, min_learning_rate=1e-3, device="cpu", dtype="float32", compile="off",
        sample_tokens=0, model=dict(block_size=32, n_layer=2, n_head=2, n_embd=32))))
    return tmp_path / "run"


def test_a_run_is_loaded_with_its_best_weights_and_its_tokenizer(run):
    model, tokenizer = load_model(run)
    best = checkpoint.load(run / "best.pt")
    assert torch.equal(model.transformer.wpe.weight, best["model"]["transformer.wpe.weight"])
    assert not model.training and tokenizer.decode(tokenizer.encode("document 7")) == "document 7"


def test_text_repeats_with_its_seed_ends_with_its_document_and_starts_without_a_prompt(run):
    model, tokenizer = load_model(run)
    text = continue_text(model, tokenizer, "document", 60, seed=3)
    assert text == continue_text(model, tokenizer, "document", 60, seed=3)
    assert text.startswith("document") and "<|endoftext|>" not in text
    assert "document" in continue_text(model, tokenizer, "", 60, temperature=0.3)


def test_a_prompt_that_spells_a_special_token_is_ordinary_text(run):
    model, tokenizer = load_model(run)
    text = continue_text(model, tokenizer, "<|endoftext|>", 5)
    assert text.startswith("<|endoftext|>")             # as text; the id would not be shown


def test_a_hugging_face_folder_gives_the_same_text_as_the_run(run, tmp_path):
    pytest.importorskip("safetensors")
    model, tokenizer = load_model(run)
    model.save_pretrained(tmp_path / "folder")
    tokenizer.save_pretrained(tmp_path / "folder")
    other, read = load_model(tmp_path / "folder")
    settings = dict(prompt="document", max_new_tokens=20, temperature=0)
    assert continue_text(other, read, **settings) == continue_text(model, tokenizer, **settings)


def test_the_commands_print_text_and_the_loss_that_training_saw(run, capsys):
    sample.main([str(run), "--prompt=document", "--samples=2", "--max_new_tokens=5"])
    assert capsys.readouterr().out.count("document") >= 2
    loss.main([f"--model={run}", f"--data={run.parent / 'data'}", "--dtype=float32"])
    shown = re.search(r"loss ([\d.]+).*bits_per_byte ([\d.]+)", capsys.readouterr().out)
    assert float(shown[1]) == pytest.approx(checkpoint.load(run / "best.pt")["val_loss"], abs=1e-4)
    assert 0 < float(shown[2]) < 8


def test_bytes_are_those_of_the_labelled_tokens_and_special_tokens_have_none():
    tokenizer = Tokenizer.train(["aaaa bbbb"] * 5, 262)
    lengths = loss.token_lengths(tokenizer)
    ids = tokenizer.encode("aaaa bbbb")
    assert lengths[ids].sum() == 9 and lengths[tokenizer.eot] == 0 and len(lengths) == 262


def test_data_of_another_tokenizer_is_refused(run, dataset):
    with pytest.raises(ValueError, match="was made with another tokenizer than"):
        loss.main([f"--model={run}", f"--data={dataset}"])
    with pytest.raises(FileNotFoundError, match="there is no run in out/none"):
        load_model("out/none")

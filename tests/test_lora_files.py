"""Adapters as files: to PEFT and back, what is in them, what is refused, exporting."""
import dataclasses
import json
import math

import pytest
import torch

from bpe import Tokenizer
from lora import LoRAConfig, add_lora, load_lora, merge_lora, save_lora, set_adapter, unload_lora
from model import GPT, GPTConfig
from run import checkpoint, export
from run.checkpoint import trainable_state
from run.load import add_adapter_of

pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file  # noqa: E402

SHAPE = GPTConfig(block_size=16, vocab_size=53, n_layer=3, n_head=2, n_embd=32)
BOTH = {                    # what PEFT and we have under the same names
    "lora": {},
    "rslora": dict(use_rslora=True),
    "dora": dict(use_dora=True),
    "bias": dict(bias="lora_only"),
    "all biases": dict(bias="all", use_dora=True),
    "modules": dict(modules_to_save=("ln_f", "c_fc")),
    "patterns": dict(target_modules=("c_attn", "c_fc"),
                     rank_pattern={"c_fc": 2, "h.1.attn.c_attn": 7},
                     alpha_pattern={"c_fc": 3}),
    "rslora patterns": dict(use_rslora=True, rank_pattern={"h.1.attn.c_attn": 7}),
    "c_proj": dict(target_modules=("c_proj", "c_attn"), layers=(0, 2)),
}
OURS = {                    # what becomes an ordinary LoRA in a file
    "pissa": dict(init="pissa"), "olora rslora": dict(init="olora", use_rslora=True),
    "pissa dora": dict(init="pissa", use_dora=True),
    "parts": dict(target_modules=("c_attn.q", "c_attn.v"), rank_pattern={"c_attn.q": 2}),
    "parts dora": dict(target_modules=("c_attn.q",), use_dora=True, bias="lora_only"),
    "all-linear": dict(target_modules="all-linear"), "tied": dict(modules_to_save=("wte",)),
}


def gpt(seed=0, shape=SHAPE):
    torch.manual_seed(seed)
    model = GPT(shape)
    for name, p in model.named_parameters():                # no zero biases: they would hide errors
        if p.dim() == 1:
            p.data += 0.1 * torch.randn_like(p)
    return model


def ids():
    return torch.randint(SHAPE.vocab_size, (2, 16), generator=torch.Generator().manual_seed(3))


def logits(model):
    out = model.eval()(ids())
    return (out.logits if hasattr(out, "logits") else out[0]).detach()


def shake(model):
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.2 * torch.randn(p.shape, generator=generator)
    return model


@pytest.fixture
def theirs(tmp_path):
    """transformers' GPT-2 with the weights of gpt()."""
    transformers = pytest.importorskip("transformers")
    gpt().save_pretrained(tmp_path / "base")
    return transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base")


def peft_config(r, alpha, settings):
    peft = pytest.importorskip("peft")
    names = dict(layers="layers_to_transform")
    lists = {names.get(key, key): list(value) if isinstance(value, tuple) else value
             for key, value in settings.items()}
    return peft.LoraConfig(**{"target_modules": ["c_attn"], "r": r, "lora_alpha": alpha,
                              "fan_in_fan_out": True, "task_type": "CAUSAL_LM", **lists})


@pytest.mark.parametrize("variant", [*BOTH, *OURS])
def test_an_adapter_from_here_gives_the_same_logits_in_peft(variant, theirs, tmp_path):
    peft = pytest.importorskip("peft")
    base = logits(gpt())
    model = shake(add_lora(gpt(), LoRAConfig(r=4, alpha=6, **{**BOTH, **OURS}[variant])))
    save_lora(model, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    assert (logits(model) - base).abs().max() > 1e-2
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("variant", BOTH)
def test_an_adapter_from_peft_gives_the_same_logits_here(variant, theirs, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = shake(peft.get_peft_model(theirs, peft_config(4, 6, BOTH[variant])))
    model.save_pretrained(tmp_path / "adapter")
    loaded = load_lora(gpt(), tmp_path / "adapter")
    assert (logits(model) - logits(gpt())).abs().max() > 1e-2
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("modules", [["wte"], ["wte", "lm_head"]])
def test_an_embedding_that_peft_trained_apart_from_the_head_is_refused(modules, theirs, tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(theirs, peft_config(4, 6, dict(modules_to_save=modules)))
    shake(model).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match="wte.weight and lm_head.weight are not equal"):
        load_lora(gpt(), tmp_path / "adapter")


def test_an_adapter_of_a_llama_goes_to_peft_and_back(tmp_path):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")

    def llama():
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=53, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32))

    config = LoRAConfig(r=4, target_modules="all-linear", use_dora=True, modules_to_save=("norm",))
    model = shake(add_lora(llama(), config))
    save_lora(model, tmp_path / "adapter")
    for loaded in (peft.PeftModel.from_pretrained(llama(), tmp_path / "adapter"),
                   load_lora(llama(), tmp_path / "adapter")):
        torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-4)


@pytest.mark.parametrize("variant", [*BOTH, *OURS])
def test_saved_and_loaded_adapters_compute_the_same(variant, tmp_path):
    model = shake(add_lora(gpt(), LoRAConfig(r=4, alpha=6, **{**BOTH, **OURS}[variant])))
    save_lora(model, tmp_path)
    loaded = load_lora(gpt(), tmp_path)
    # 2r instead of two times r, and parts as one layer: other orders of summation
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)
    if variant in BOTH:
        assert torch.equal(logits(loaded), logits(model))
        assert trainable_state(loaded).keys() == trainable_state(model).keys()
    save_lora(loaded, tmp_path / "again")
    assert torch.equal(logits(load_lora(gpt(), tmp_path / "again")), logits(loaded))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4"])
def test_an_adapter_that_changed_peft_s_base_is_refused_until_it_is_converted(init, theirs,
                                                                              tmp_path):
    """PEFT derives such a base anew, from the base it loads the adapter to; here it is as it is."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(theirs, peft_config(4, 6, dict(init_lora_weights=init)))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = init
    shake(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=f"init_lora_weights={init} changed the base too") as error:
        load_lora(gpt(), tmp_path / "plain")
    assert "path_initial_model_for_weight_conversion" in str(error.value)
    assert "\n" not in str(error.value)
    model.save_pretrained(tmp_path / "converted",
                          path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    torch.testing.assert_close(logits(load_lora(gpt(), tmp_path / "converted")), expected,
                               rtol=0, atol=1e-4)


@pytest.mark.parametrize("variant", [{}, dict(use_dora=True), dict(bias="all"),
                                     dict(target_modules=("c_attn.q", "c_fc"), init="gaussian"),
                                     dict(modules_to_save=("h.1.mlp",))])
def test_an_adapter_of_a_quantised_base_quantises_a_plain_one(variant, tmp_path, capsys):
    model = shake(add_lora(gpt(), LoRAConfig(r=4, alpha=6, quantize="nf4", **variant)))
    save_lora(model, tmp_path)
    loaded = load_lora(gpt(), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)
    load_lora(loaded, tmp_path, "again")                    # quantised already
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)
    save_lora(loaded, tmp_path / "again", "again")
    torch.testing.assert_close(logits(load_lora(gpt(), tmp_path / "again")), logits(model),
                               rtol=0, atol=1e-5)
    assert not capsys.readouterr().err
    with pytest.raises(ValueError, match="the base has adapters already"):
        load_lora(add_lora(gpt(), LoRAConfig()), tmp_path, "other")


@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_files_that_do_not_hold_the_quantised_base_say_so(init, tmp_path, capsys):
    save_lora(add_lora(gpt(), LoRAConfig(r=4, quantize="nf4", init=init)), tmp_path)
    load_lora(gpt(), tmp_path)
    warning, = capsys.readouterr().err.splitlines()
    assert f"was trained with init={init} on a base in nf4" in warning


def test_pissa_is_saved_as_an_ordinary_lora_of_twice_the_rank(tmp_path):
    save_lora(shake(add_lora(gpt(), LoRAConfig(r=4, alpha=6, init="pissa"))), tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["init_lora_weights"]) == (8, 12, True)


@pytest.mark.parametrize("a,b", [(0.3, 0.7), (0.0, 1.0), (-0.5, 1.0)])
def test_a_mixture_is_saved_as_one_adapter(tmp_path, a, b):
    model = shake(add_lora(gpt(), LoRAConfig(r=4, bias="all"), "a"))
    shake(add_lora(model, LoRAConfig(r=2, alpha=3, bias="all"), "b"))
    set_adapter(model, {"a": a, "b": b})
    save_lora(model, tmp_path, {"a": a, "b": b})
    torch.testing.assert_close(logits(load_lora(gpt(), tmp_path)), logits(model),
                               rtol=0, atol=1e-5)


def test_a_file_holds_the_adapter_and_what_changed_and_no_more(tmp_path):
    """r = 4 on c_attn (32, 96), 3 blocks: (32 + 96) * 4 * 3 numbers of 4 bytes, and a header."""
    save_lora(add_lora(gpt(), LoRAConfig(r=4)), tmp_path / "a")
    size = (tmp_path / "a" / "adapter_model.safetensors").stat().st_size
    assert 4 * (32 + 96) * 4 * 3 < size < 4 * (32 + 96) * 4 * 3 + 2000
    save_lora(add_lora(gpt(), LoRAConfig(r=4, bias="lora_only", modules_to_save=("ln_f",))),
              tmp_path / "b")
    more = (tmp_path / "b" / "adapter_model.safetensors").stat().st_size
    assert 4 * (3 * 96 + 2 * 32) <= more - size < 4 * (3 * 96 + 2 * 32) + 1000


def test_an_inactive_adapter_is_saved_with_its_own_biases(tmp_path):
    model = shake(add_lora(gpt(), LoRAConfig(r=4, bias="all"), "a"))
    alone = logits(model)
    shake(add_lora(model, LoRAConfig(r=4, bias="all"), "b"))
    save_lora(model, tmp_path, "a")
    assert torch.equal(logits(load_lora(gpt(), tmp_path)), alone)


def test_a_merged_model_saves_the_same_adapter(tmp_path):
    """Also another one than is merged, which reads the lengths of the base's rows."""
    model = shake(add_lora(gpt(), LoRAConfig(r=4, target_modules=("c_attn.q",), use_dora=True)))
    save_lora(model, tmp_path / "a")
    shake(add_lora(model, LoRAConfig(r=4), "other"))
    merge_lora(model)
    save_lora(model, tmp_path / "b")
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab"]
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])


def test_several_adapters_load_side_by_side_frozen_or_trainable(tmp_path):
    for seed, name in ((1, "a"), (2, "b")):
        save_lora(shake(add_lora(gpt(), LoRAConfig(r=seed))), tmp_path / name)
    model = load_lora(gpt(), tmp_path / "a", "a")
    assert not any(p.requires_grad for p in model.parameters())
    in_a = logits(model)
    load_lora(model, tmp_path / "b", "b", trainable=True)
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} \
        == {"whole"}
    set_adapter(model, "a")
    assert torch.equal(logits(model), in_a)
    assert torch.equal(logits(unload_lora(model)), logits(gpt()))


def test_loading_draws_no_random_numbers(tmp_path):
    save_lora(add_lora(gpt(), LoRAConfig()), tmp_path)
    model = gpt()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    load_lora(model, tmp_path)
    assert torch.equal(torch.rand(3), expected)


# ------------------------------------------------------------------------------------------------
# What is refused

def test_another_base_is_refused(tmp_path):
    save_lora(add_lora(gpt(), LoRAConfig()), tmp_path, base="gpt2")
    other = gpt()
    other.transformer.h[2].mlp.c_fc.weight.data[5, 7] += 1e-3
    with pytest.raises(ValueError, match=r"was trained on another base \(gpt2, hash [0-9a-f]{8}\)"):
        load_lora(other, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())[
        "base_model_name_or_path"] == "gpt2"


def spoil(folder, change_tensors=None, **settings):
    """Rewrite an adapter, without the hash of its base."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    if change_tensors:
        tensors = change_tensors(tensors)
    save_file(tensors, file)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **settings}))


KEY = "base_model.model.transformer.h.1.attn.c_attn."


@pytest.mark.parametrize("change,settings,words", [
    (lambda t: {k.replace("c_attn", "c_att"): v for k, v in t.items()}, {},
     "adapts transformer.h.0.attn.c_att, which this model does not have"),
    (lambda t: {**t, KEY + "lora_A.weight": torch.zeros(4, 31)}, {},
     "A of transformer.h.1.attn.c_attn is (4, 31); rank 4 and the model ask for (4, 32)"),
    (None, dict(r=5), "rank 5 and the model ask for (5, 32)"),
    (lambda t: {k: v for k, v in t.items() if k != KEY + "lora_B.weight"}, {},
     "has no B of layer transformer.h.1.attn.c_attn"),
    (None, dict(use_dora=True), "has no magnitude of layer transformer.h.0.attn.c_attn"),
    (None, dict(bias="lora_only"), "has no tensor transformer.h.0.attn.c_attn.bias of shape (96,)"),
    (lambda t: {**t, "base_model.model.transformer.wte.lora_embedding_A": torch.zeros(4, 53)}, {},
     "has a tensor transformer.wte.lora_embedding_A, which is not read: only A and B of linear"),
    (lambda t: {**t, "base_model.model.lm_head.weight": torch.zeros(54, 32)}, {},
     "has a tensor lm_head.weight, which is not read"),
    (lambda t: {**t, KEY + "base_layer.bias": torch.zeros(96)}, {},
     "has a tensor transformer.h.1.attn.c_attn.bias, which is not read"),
    (None, dict(peft_type="LOHA"), "holds a LOHA adapter; only LORA is read"),
    (None, dict(lora_bias=True), "lora_bias=True is not supported"),
    (None, dict(init_lora_weights="olora"),
     "init_lora_weights=olora changed the base too; convert the adapter"),
])
def test_files_that_do_not_fit_are_refused_in_one_line(change, settings, words, tmp_path):
    save_lora(add_lora(gpt(), LoRAConfig(r=4)), tmp_path)
    spoil(tmp_path, change, **settings)
    model = gpt()
    with pytest.raises(ValueError) as error:
        load_lora(model, tmp_path)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert list(model.state_dict()) == list(gpt().state_dict())     # nothing half done


@pytest.mark.parametrize("settings,words", [
    ([], "adapter_config.json holds a list, not an object; save"),
    ("", "adapter_config.json holds a str, not an object"),
    (dict(r=None), "adapter_config.json has no r; it must be a whole number above 0"),
    (dict(r=4.0), "r=4.0 must be a whole number above 0"),
    (dict(r=True), "r=True must be a whole number above 0"),
    (dict(lora_alpha=math.inf), "lora_alpha=inf must be a finite number above 0"),
    (dict(lora_alpha=math.nan), "lora_alpha=nan must be a finite number above 0"),
    (dict(lora_alpha="16"), "lora_alpha='16' must be a finite number above 0"),
    (dict(lora_dropout=1), "lora_dropout=1 must be in [0, 1)"),
    (dict(bias="some"), "bias='some' must be none, all or lora_only"),
    (dict(use_dora="no"), "use_dora='no' must be true or false"),
    (dict(modules_to_save="ln_f"), "modules_to_save='ln_f' must be a list of names"),
    (dict(rank_pattern={"c_attn": 0}), "must be whole numbers above 0 by name"),
    (dict(alpha_pattern={"c_attn": math.inf}), "must be finite numbers above 0 by name"),
])
def test_settings_that_cannot_be_are_refused_in_one_line(settings, words, tmp_path):
    save_lora(add_lora(gpt(), LoRAConfig(r=4)), tmp_path)
    file = tmp_path / "adapter_config.json"
    if isinstance(settings, dict):
        settings = {**json.loads(file.read_text()), **settings}
    file.write_text(json.dumps(settings))
    with pytest.raises(ValueError) as error:
        load_lora(gpt(), tmp_path)
    assert words in str(error.value) and "\n" not in str(error.value)


def cut_short(data):
    return data[:-100]


def no_header(data):
    return b"\xff" * len(data)


@pytest.mark.parametrize("file,change,words", [
    ("adapter_model.safetensors", cut_short, "is truncated or damaged"),
    ("adapter_model.safetensors", no_header, "is truncated or damaged"),
    ("adapter_model.safetensors", lambda data: b"", "is truncated or damaged"),
    ("adapter_config.json", cut_short, "is truncated or not JSON"),
])
def test_damaged_files_are_refused_in_one_line(file, change, words, tmp_path):
    save_lora(add_lora(gpt(), LoRAConfig(r=4)), tmp_path)
    (tmp_path / file).write_bytes(change((tmp_path / file).read_bytes()))
    with pytest.raises(ValueError, match=words) as error:
        load_lora(gpt(), tmp_path)
    assert file in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("change,words", [
    (lambda t: {**t, KEY + "lora_B.weight": torch.full((96, 4), math.nan)},
     "transformer.h.1.attn.c_attn.lora_B.weight holds values that are not finite"),
    (lambda t: {"ln_f.weight": torch.ones(32)}, "has no tensor of a LoRA adapter"),
    (lambda t: {}, "has no tensor of a LoRA adapter"),
    (lambda t: {**t, KEY + "lora_A.weight": torch.zeros(128)},
     "A of transformer.h.1.attn.c_attn is (128,)"),
])
def test_tensors_that_cannot_be_an_adapters_are_refused_in_one_line(change, words, tmp_path):
    save_lora(add_lora(gpt(), LoRAConfig(r=4)), tmp_path)
    spoil(tmp_path, change)
    with pytest.raises(ValueError) as error:
        load_lora(gpt(), tmp_path)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("notes,words", [
    ({"init": "kaiming", "quantize": "n" * 9999}, "lora.quantize='nnnn"),
    ({"init": "kaiming", "quantize": ["nf4"]}, "lora.quantize=['nf4'"),
    ({"base_hash": 3}, "it was trained on another base (unnamed, hash 3)")])
def test_notes_that_cannot_be_an_adapters_are_refused_in_one_line(notes, words, tmp_path):
    save_lora(add_lora(gpt(), LoRAConfig(r=4)), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(load_file(file), file, {"format": "pt", "oneloop": json.dumps(notes)})
    with pytest.raises(ValueError) as error:
        load_lora(gpt(), tmp_path)
    assert str(error.value).startswith(f"{tmp_path}: {words}") and len(str(error.value)) < 500


def test_a_magnitude_of_another_shape_is_refused(tmp_path):
    save_lora(add_lora(gpt(), LoRAConfig(r=4, use_dora=True)), tmp_path)
    spoil(tmp_path, lambda t: {**t, KEY + "lora_magnitude_vector": torch.ones(1)})
    with pytest.raises(ValueError, match=r"magnitude of transformer.h.1.attn.c_attn is \(1,\)"):
        load_lora(gpt(), tmp_path)


def test_a_folder_that_is_no_adapter_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no adapter_config.json"):
        load_lora(gpt(), tmp_path)


# ------------------------------------------------------------------------------------------------
# Exporting, and the adapter of a run

def test_an_exported_base_has_the_adapter_merged_in(tmp_path, capsys):
    shape = dataclasses.replace(SHAPE, vocab_size=256)
    gpt(shape=shape).save_pretrained(tmp_path / "base")
    Tokenizer([], special_tokens=()).save_pretrained(tmp_path / "base")
    model = shake(add_lora(gpt(shape=shape), LoRAConfig(r=4, use_dora=True, bias="all")))
    save_lora(model, tmp_path / "adapter", base="somewhere")
    export.main([str(tmp_path / "base"), f"--adapter={tmp_path / 'adapter'}",
                 f"--out={tmp_path / 'merged'}"])
    assert "logits differ by at most" in capsys.readouterr().out
    torch.testing.assert_close(logits(GPT.from_pretrained(tmp_path / "merged")), logits(model),
                               rtol=0, atol=1e-4)
    with pytest.raises(FileNotFoundError, match="nowhere has no adapter_config.json"):
        export.main([str(tmp_path / "base"), "--adapter=nowhere", f"--out={tmp_path / 'other'}"])


def test_the_adapter_of_a_run_is_put_on_its_base(tmp_path):
    model = shake(add_lora(gpt(), LoRAConfig(r=4, init="pissa", bias="all")))
    common = {"step": 1, "best_loss": 1.0, "base": model.adapters.base_hash}
    checkpoint.save(tmp_path / "best.pt", {
        **common, "model": trainable_state(model), "config": {"lora": dataclasses.asdict(
            LoRAConfig(r=4, init="pissa", bias="all"))}})
    assert torch.equal(logits(add_adapter_of(gpt(), tmp_path)), logits(model))
    checkpoint.save(tmp_path / "best.pt", {
        **common, "model": trainable_state(model), "config": {
            "lora": dataclasses.asdict(LoRAConfig(r=4, init="pissa", bias="all")),
            "model": dataclasses.asdict(dataclasses.replace(gpt().config, vocab_size=60))}})
    with pytest.raises(ValueError, match="gave its base 7 more tokens, and this model has not"):
        add_adapter_of(gpt(), tmp_path)
    checkpoint.save(tmp_path / "best.pt", {**common, "model": gpt().state_dict(), "config": {
        "model": dataclasses.asdict(gpt().config)}})
    with pytest.raises(ValueError, match="trained no adapter"):
        add_adapter_of(gpt(), tmp_path)
    with pytest.raises(FileNotFoundError, match="has no checkpoint yet"):
        add_adapter_of(gpt(), tmp_path / "nowhere")

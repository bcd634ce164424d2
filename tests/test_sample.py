"""Models by name, their text, their answers and their loss, from the command line."""
import dataclasses
import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch

import sample
from bpe import Tokenizer
from data.chat import extend_tokenizer, load_samples, render_prompt
from data.conversations import write_conversations
from data.corpus import CorpusConfig, prepare
from data.samples import SampleLoader
from eval import loss
from model import GPT, GPTConfig
from optim import OptimConfig, make_optimizer
from run import checkpoint
from run.config import build
from run.load import load_model, run_template
from sample import Chat, chat_reply, continue_text, preview
from train import TrainConfig, train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run on text with a trained tokenizer, which has an end-of-text token."""
    tmp_path = tmp_path_factory.mktemp("run")
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "document {i} of many"}}\n'
                                              for i in range(400)))
    data = prepare(CorpusConfig(from_=str(tmp_path / "a.jsonl"), vocab_size=280,
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
    assert float(shown[1]) == pytest.approx(checkpoint.load(run / "best.pt")["best_loss"], abs=1e-4)
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


# ---- conversations

ANSWERS = {"Hello!": "Good day 問😀", "And you?": "Fine, thanks.", "Bye!": "Addio é"}
EACH = ("plain", "chatml")


def talk_of(questions):
    return [message for q in questions for message in
            ({"role": "user", "content": q}, {"role": "assistant", "content": ANSWERS[q]})]


@pytest.fixture(scope="module", params=EACH)
def talker(request, tmp_path_factory):
    """A run that learned three answers by heart, a byte a token: é is two tokens, 😀 is four."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    folder, template = tmp_path_factory.mktemp("talker"), request.param
    orders = [["Hello!", "And you?", "Bye!"], ["And you?", "Hello!"], ["Bye!", "Hello!"],
              ["Bye!"], ["And you?"], ["Hello!", "Bye!", "And you?"]]
    write_conversations(folder / "data", [{"messages": talk_of(o)} for o in orders], "test",
                  val=[{"messages": talk_of(["Hello!"])}])
    tokenizer = extend_tokenizer(Tokenizer([], special_tokens=()), template)
    samples = load_samples(folder / "data", "train", tokenizer, template, 256)
    model = GPT(GPTConfig(block_size=256, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2,
                          n_embd=64))
    loader = SampleLoader(samples, 256, 6 * 256, 6)
    optimizer = make_optimizer(model, OptimConfig("muon"), 1e-2, 0.0)   # AdamW takes 150 steps
    for step in range(40):
        for x, y in loader.batches(step):
            model(x, y)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    run = folder / "run"
    run.mkdir()
    settings = {"model": dataclasses.asdict(model.config), "template": template}
    checkpoint.save(run / "best.pt", {"model": model.state_dict(), "config": settings,
                                      "step": 40, "base": "", "best_loss": 1.0})
    (run / "config.json").write_text(json.dumps(settings))
    (run / "run.json").write_text("{}")
    tokenizer.save(run / "tokenizer.json")
    return run, template


def count_computed(model, monkeypatch):
    """A list that gets the length of every row that the model computes."""
    computed, features = [], model.features

    def counting(idx, *rest, **named):
        computed.append(idx.size(1))
        return features(idx, *rest, **named)

    monkeypatch.setattr(model, "features", counting)
    return computed


def test_a_run_answers_as_it_was_taught_and_stops_at_its_end_token(talker):
    model, tokenizer = load_model(talker[0])
    assert run_template(talker[0]) == talker[1]
    for question, answer in ANSWERS.items():
        messages = [{"role": "user", "content": question}]
        assert chat_reply(model, tokenizer, messages, talker[1], temperature=0) == answer


def test_a_sample_of_a_chat_run_without_room_for_an_answer_is_marked_as_a_text():
    model = GPT(GPTConfig(block_size=32, vocab_size=256, n_layer=1, n_head=1, n_embd=8))
    data = SimpleNamespace(prompts=(), template="plain", tokenizer=Tokenizer([], special_tokens=()))
    config = SimpleNamespace(sample_prompt="a", sample_tokens=2, seed=0, model=model.config)
    first, rest = preview(model, data, config).split("\n", 1)
    assert first.startswith("(no question of the validation split leaves half of block_size=32")
    data.template = ""
    assert preview(model, data, config) == rest


def test_a_chat_gives_the_ids_that_no_cache_gives_and_computes_only_new_ones(talker, monkeypatch):
    run, template = talker
    model, tokenizer = load_model(run)
    chat, expected = Chat(model, tokenizer, template, temperature=0), []
    for question in ("Hello!", "And you?", "Bye!"):
        expected += [{"role": "user", "content": question}]
        prompt = render_prompt(expected, tokenizer, template)
        whole = model.generate(torch.tensor([prompt]), 40, temperature=0,
                               stop_ids=tokenizer.special_tokens.values())[0].tolist()
        known = len(chat.known)
        with monkeypatch.context() as patch:
            computed = count_computed(model, patch)
            answer = "".join(chat.answer(question))
        assert answer == ANSWERS[question]
        assert chat.known == whole[:-1]                 # all but the end token, which is not read
        assert sum(computed) == len(whole) - 1 - known
        expected += [{"role": "assistant", "content": answer}]
    assert chat.messages == expected


def test_sampling_in_a_chat_is_that_of_generate(talker):
    run, template = talker
    model, tokenizer = load_model(run)
    prompt = render_prompt([{"role": "user", "content": "Hello!"}], tokenizer, template)
    settings = dict(temperature=1.5, top_k=20, top_p=0.95)
    generator = torch.Generator().manual_seed(7)
    whole = model.generate(torch.tensor([prompt]), 30, generator=generator, **settings)[0].tolist()
    chat = Chat(model, tokenizer, template, seed=7, **settings)
    new = [token for token, _ in zip(chat.new_tokens(prompt), range(30))]
    assert prompt + new == whole


def test_the_same_prompt_again_gives_the_same_and_a_full_context_ends_it(talker):
    run, template = talker
    model, tokenizer = load_model(run)
    prompt = render_prompt([{"role": "user", "content": "Hello!"}], tokenizer, template)
    chat = Chat(model, tokenizer, template, temperature=0)
    first, second = list(chat.new_tokens(prompt)), list(chat.new_tokens(prompt))
    assert first == second and len(prompt) + len(first) == model.config.block_size + 1
    # the last token comes from a context that is full, and is read by nobody
    whole = model.generate(torch.tensor([prompt]), len(first), temperature=0)
    assert whole[0].tolist() == prompt + first


def test_pieces_are_whole_characters(talker):
    model, tokenizer = load_model(talker[0])
    pieces = list(Chat(model, tokenizer, talker[1], temperature=0).answer("Hello!"))
    assert "".join(pieces) == ANSWERS["Hello!"] and "\ufffd" not in "".join(pieces)
    assert {"問", "😀"} <= set(pieces) and len(pieces) == len(ANSWERS["Hello!"])


def test_characters_that_break_off_are_replaced_once_and_no_text_ends_an_answer(talker,
                                                                               monkeypatch):
    model, tokenizer = load_model(talker[0])
    chat = Chat(model, tokenizer, talker[1])
    other = max(tokenizer.special_tokens.values())
    messages = [{"role": "user", "content": "?"}]
    for ids, text in (([72, 0xf0, 0x9f, 72], "H\ufffdH"), ([72, 0xc3], "H\ufffd"),
                      ([72, other, 72], "H"), ([72, tokenizer.vocab_size + 5, 72], "H"), ([], "")):
        monkeypatch.setattr(chat, "new_tokens", lambda prompt: iter(ids))
        assert "".join(chat.reply(messages)) == text


def test_a_full_context_forgets_its_oldest_turns_whole(talker):
    run, template = talker
    model, tokenizer = load_model(run)
    chat = Chat(model, tokenizer, template, temperature=0)
    chat.set_system("Be kind.")
    for turn in range(8):
        assert "".join(chat.answer("And you?")) is not None
        assert len(chat.known) <= model.config.block_size
    ids = chat.fitting([*chat.messages, {"role": "user", "content": "Bye!"}])
    text = tokenizer.decode(ids)
    assert len(ids) <= 256 - 64 and "Be kind." in text and text.count("And you?") in (1, 2, 3)
    kept = text.count("And you?")
    assert ids == render_prompt([chat.messages[0], *chat.messages[len(chat.messages) - 2 * kept:],
                                 {"role": "user", "content": "Bye!"}], tokenizer, template)
    before = list(chat.messages)
    with pytest.raises(ValueError, match="leaves room for 192: shorten it"):
        list(chat.answer("x" * 300))
    assert chat.messages == before


def test_a_stopped_answer_counts_as_far_as_it_came(talker):
    model, tokenizer = load_model(talker[0])
    chat = Chat(model, tokenizer, talker[1], temperature=0)
    pieces = chat.answer("Hello!")
    assert next(pieces) + next(pieces) == "Go"
    pieces.close()
    assert chat.messages[-1] == {"role": "assistant", "content": "Go"}
    assert "".join(chat.answer("And you?"))
    chat.reset()
    assert "".join(chat.answer("Bye!")) == ANSWERS["Bye!"]


def test_the_terminal_talks_until_its_end(talker, monkeypatch, capsys):
    lines = iter(["/system Be kind.", "/reset", "Hello!", "", "/quit", "x" * 400, KeyboardInterrupt,
                  "Bye!"])

    def say(prompt):
        line = next(lines, EOFError)
        if isinstance(line, type):
            raise line
        return line

    monkeypatch.setattr("builtins.input", say)
    sample.main([str(talker[0]), "--chat", "--temperature=0", "--dtype=float32"])
    out = capsys.readouterr().out
    assert "/system TEXT" in out and "shorten it" in out


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on(talker, monkeypatch, capsys):
    model, tokenizer = load_model(talker[0])
    chat, tokens = Chat(model, tokenizer, talker[1], temperature=0), Chat.new_tokens

    def interrupted(self, prompt):
        for i, token in enumerate(tokens(self, prompt)):
            if len(self.messages) == 1 and i == 4:
                raise KeyboardInterrupt
            yield token

    monkeypatch.setattr(Chat, "new_tokens", interrupted)
    lines = iter(["Hello!", "Bye!"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, None) or sys.exit())
    with pytest.raises(SystemExit):
        sample.talk(chat)
    assert [m["content"] for m in chat.messages[:3]] == ["Hello!", chat.messages[1]["content"],
                                                         "Bye!"]
    assert ANSWERS["Hello!"].startswith(chat.messages[1]["content"].strip())
    assert len(chat.messages) == 4


def test_prompts_of_a_file_are_answered_into_another(talker, tmp_path):
    (tmp_path / "p.txt").write_text("Hello!\n\nBye!\n")
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, (
        {"prompt": "Hello!"}, {"messages": talk_of(["Hello!", "Bye!"])},
        {"instruction": "Bye!", "output": "Addio"}))))
    for name, prompts, references in (
            ("p.txt", ["Hello!", "Bye!"], [None, None]),
            ("p.jsonl", ["Hello!", "Hello!\n\nGood day 問😀\n\nBye!", "Bye!"],
             [None, "Addio é", "Addio"])):
        out = tmp_path / "answers.jsonl"
        sample.main([str(talker[0]), f"--prompts={tmp_path / name}", f"--out={out}",
                     "--temperature=0", "--dtype=float32"])
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        assert [line["prompt"] for line in lines] == prompts
        assert [line.get("reference") for line in lines] == references
        assert lines[0]["answer"] == ANSWERS["Hello!"] and lines[-1]["answer"] == ANSWERS["Bye!"]
        assert lines[0]["model"] == str(talker[0])
    sample.main([str(talker[0]), f"--prompts={tmp_path / 'p.txt'}", f"--out={out}",
                 "--system=Be brief."])
    assert json.loads(out.read_text().splitlines()[0])["prompt"] == "Be brief.\n\nHello!"


def test_prompts_that_lose_their_beginning_are_counted(talker, run, tmp_path, capsys):
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(json.dumps({"messages": talk_of(["Hello!", "Bye!"] * turns)})
                              for turns in (1, 5)))
    for model in (talker[0], run):                      # run: no template, a context of 32
        sample.main([str(model), f"--prompts={file}", "--max_new_tokens=4"])
        said = capsys.readouterr().err
        assert "1 of 2 prompts do not fit into block_size=" in said
    file.write_text('{"prompt": "Hello!"}')
    sample.main([str(talker[0]), f"--prompts={file}", "--max_new_tokens=4"])
    assert "do not fit" not in capsys.readouterr().err


def test_prompts_a_line_each_are_parted_by_line_ends_alone(tmp_path):
    """Not by what else str.splitlines takes for one; a byte order mark is no part of the first."""
    (tmp_path / "p.txt").write_bytes("\ufeffone\u2028still one\r\ntwo\x0c\n".encode())
    assert [messages[0]["content"] for messages, _ in sample.read_prompts(tmp_path / "p.txt")] == [
        "one\u2028still one", "two\x0c"]


def test_a_record_of_prompts_keeps_its_system_message(tmp_path):
    file, talk = tmp_path / "p.jsonl", [{"role": "user", "content": "Hello!"}]
    file.write_text("\n".join(json.dumps({**record, "system": "Be brief."}) for record in (
        {"prompt": "Hello!"}, {"messages": talk}, {"instruction": "Hello!", "output": "Hi"})))
    expected = [{"role": "system", "content": "Be brief."}, *talk]
    assert [messages for messages, _ in sample.read_prompts(file)] == [expected] * 3


def test_what_cannot_chat_says_why(talker, run, tmp_path):
    for words, message in (
            ([str(run), "--chat"], "was not trained on conversations"),
            ([str(run), "--chat", "--template=llama3"], "lacks special tokens of template=llama3"),
            ([str(run), "--chat", "--template=vicuna"], "choose alpaca, plain"),
            ([str(talker[0]), "--prompt=Hello!", "--system=Be brief."], "as it stands"),
            ([str(talker[0]), "--prompt=Hello!", "--out=answers.jsonl"], "for the answers to"),
            ([str(talker[0]), "--prompt=Hello!", "--chat"], "--prompt and --chat are different"),
            ([str(talker[0]), "--chat", "--prompts=p.txt"], "--chat and --prompts are different"),
            ([str(talker[0]), "--samples=3", "--prompts=p.txt"], "samples=3 is of a --prompt"),
            ([str(talker[0]), f"--prompts={tmp_path / 'none'}"], "there is no file")):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            sample.main(words)
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": ""}\n')
    with pytest.raises(ValueError, match=r"p.jsonl, line 2: empty user message"):
        sample.main([str(talker[0]), f"--prompts={tmp_path / 'p.jsonl'}"])

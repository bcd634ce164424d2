"""Every reader of files, fed damaged and hostile ones: a clear error or a right answer.

    python -m tests.test_fuzz [NAME ...] --inputs=10000

An input is a valid set of files with one of them changed: bits, lengths, pieces moved, huge
numbers, other JSON; or one of the hostile files below, written by hand. A clear error is a
ValueError or FileNotFoundError of one line that names a file. A right answer is the original, or,
where a format has no checksum, something that keeps the reader's promises (`check`). Everything
else is a fault: another exception, more than SECONDS, or more than MEMORY beyond the start.
"""
import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import pytest

from bench.kills import start
from tests.mutations import HUGE, change_state, mutated

REPOSITORY = Path(__file__).parent.parent
SECONDS, MEMORY = 20, 1 << 30
TEXT = "the cat and the hat, the bat; naïve café 中文中文 🙂 1234\n" * 3
DEEP = b'{"a":' * 100_000
TOK = {"format": "oneloop-bpe", "version": 1, "sha256": "0" * 64, "pattern": ".",
       "special_tokens": {}, "byte_ids": list(range(256)), "first_merge": 256, "merges": []}


def npy(header):
    header = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + b"\x00" * 100


# ---------------------------------------------------------------------------------- the readers

class Checkpoint:
    def write(self, folder):
        import torch

        from run import checkpoint
        from tests.test_checkpoint import state_of
        torch.manual_seed(0)
        checkpoint.save(folder / "last.pt", state_of())

    def read(self, folder):
        from run import checkpoint
        return checkpoint.load(folder / "last.pt")

    def check(self, found, original):       # a zip file has checksums
        assert found.keys() == original.keys()
        assert all(found["model"][k].equal(v) for k, v in original["model"].items())
        assert all(found[k] == original[k] for k in found if k != "model")

    hostile = [{"last.pt": b""}, {"last.pt": b"PK\x05\x06" + b"\xff" * 18},
               {"last.pt": b"\x80\x02" + b"\x8e" + struct.pack("<Q", HUGE)},
               {"last.pt": b"\x80\x02" + b"(" * 100_000}]


class Tok:
    """Our tok.json."""
    def write(self, folder):
        from bpe import Tokenizer
        Tokenizer.train([TEXT], 280).save(folder / "tok.json")

    def read(self, folder):
        from bpe import Tokenizer
        return Tokenizer.load(folder)

    def check(self, found, original):
        assert found.hash == original.hash

    hostile = [{"tok.json": json.dumps({**TOK, **change}).encode()} for change in (
        {"first_merge": HUGE}, {"special_tokens": {"x": HUGE}}, {"special_tokens": {"x": 1e300}},
        {"merges": [[97, 97, "aa"]] + [[i, i, "aa"] for i in range(256, 320)]},
        {"byte_ids": [HUGE] * 256}, {"pattern": "(" * 50_000},
        {"pattern": "((((((a{99}){99}){99}){99}){99}){99})"})] + [{"tok.json": DEEP}]


class HuggingFace(Tok):
    """tokenizer.json; no checksum."""
    def write(self, folder):
        from bpe import Tokenizer
        Tokenizer.train([TEXT], 280, "gpt4").save_pretrained(folder)
        (folder / "tokenizer_config.json").unlink()

    def check(self, found, original):
        try:
            ids = found.encode_slowly(TEXT)
        except ValueError as error:     # another pattern, which drops characters: no wrong ids
            assert "pattern=" in str(error) and "drops" in str(error)
            return
        assert found.decode(ids) == TEXT and max(ids) < found.vocab_size == len(found.token_bytes)
        assert all(0 <= i < found.vocab_size for i in found.special_tokens.values())

    hostile = [{"tokenizer.json": DEEP}, {"tokenizer.json": b'{"model": {"vocab": {}}}'}]


class Gpt2Files(HuggingFace):
    """encoder.json and vocab.bpe; no checksum."""
    def write(self, folder):
        HuggingFace.write(self, folder)
        model = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]
        (folder / "tokenizer.json").unlink()
        (folder / "encoder.json").write_text(json.dumps(model["vocab"]))
        (folder / "vocab.bpe").write_text("#version: 0.2\n" + "".join(
            f"{a} {b}\n" for a, b in model["merges"]), encoding="utf-8")

    hostile = [{"encoder.json": DEEP}, {"encoder.json": b"[]"}, {"vocab.bpe": b"a" * 10**6}]


class Shards:
    """meta.json, .npy, the tokenizer, the stamp."""
    def write(self, folder):
        import numpy as np

        from bpe import Tokenizer
        from data import shards
        from data.writer import ShardWriter
        writer = ShardWriter(folder, Tokenizer([], special_tokens=()), "fuzz", shard_tokens=300)
        for i in range(30):
            writer.add("val" if i < 5 else "train", np.arange(40) + i)
        writer.finish()
        shards.verify(folder)

    def read(self, folder):
        from data import shards
        shards.open_split(folder, "train")
        shards.verify(folder, cached=True)
        tokens = [shards.open_split(folder, split) for split in ("train", "val")]
        shards.fingerprint(folder)
        return [t.read(0, len(t)).tolist() for t in tokens], shards.read_meta(folder)

    def check(self, found, original):
        (train, val), meta = found
        assert max(train + val) < meta["vocab_size"]
        assert sorted(train + val) == sorted(sum(original[0], []))     # checksums fit

    hostile = [{"train_0000.npy": npy(text)} for text in (
        "{'descr': '<u2', 'fortran_order': False, 'shape': (%d,), }" % HUGE,
        "{'descr': '<u2', 'fortran_order': False, 'shape': (%d,), }" % 10**18,
        "{'descr': '|O', 'fortran_order': False, 'shape': (50,), }",
        "{'descr': '<u2', 'fortran_order': False, 'shape': (((((50,), }")] + [
        {"meta.json": DEEP}, {"train_0000.npy": b"\x93NUMPY\x03\x00\xff\xff\xff\xff{"}]


class Bins(Shards):
    """llm.c's shards; no checksum."""
    def write(self, folder):
        for name in ("a_train_0.bin", "a_val_0.bin"):
            header = struct.pack("<256i", 20240520, 1, 200, *[0] * 253)
            (folder / name).write_bytes(header + struct.pack("<200H", *range(0, 50000, 250)))

    def check(self, found, original):
        assert max(sum(found[0], [])) < 50257
        assert [len(ids) for ids in found[0]] == [200, 200]

    hostile = [{"a_train_0.bin": struct.pack("<256i", 20240520, 1, count, *[0] * 253) + b"\x00" * 8}
               for count in (2**31 - 1, -1, 0, -508)]


class Progress:
    """What an interrupted preparation has noted."""
    def write(self, folder):
        Shards().write(folder)
        meta = json.loads((folder / "meta.json").read_text())
        for path in folder.iterdir():
            path.unlink()
        (folder / "progress.json").write_text(json.dumps({"meta": meta, "documents": 30}))

    def read(self, folder):
        from data.writer import read_progress
        return read_progress(folder)

    def check(self, found, original):
        meta, documents = found
        assert documents >= 0 and meta["splits"] and meta["vocab_size"] > 0

    hostile = [{"progress.json": DEEP}, {"progress.json": b'{"meta": {}, "documents": 1}'}]


class Model:
    """A Hugging Face folder; no checksum."""
    def write(self, folder):
        import torch

        from model import GPT, GPTConfig
        torch.manual_seed(0)
        GPT(GPTConfig(8, 16, 2, 2, 8)).save_pretrained(folder)

    def read(self, folder):
        from model import GPT
        return GPT.from_pretrained(folder)

    def check(self, found, original):
        import torch
        logits, _ = found(torch.tensor([[0, 1, 2]])[:, :found.config.block_size])
        assert logits.shape[-1] == found.config.vocab_size
        shapes = {name: tensor.shape for name, tensor in original.state_dict().items()}
        assert shapes == {name: tensor.shape for name, tensor in found.state_dict().items()}

    hostile = [{"config.json": json.dumps(dict(vocab_size=16, n_positions=8, n_embd=8, n_layer=2,
                                               n_head=2, **{}) | change).encode()}
               for change in ({"vocab_size": HUGE}, {"n_embd": 2 * HUGE}, {"n_layer": HUGE},
                              {"n_layer": 10**7}, {"n_positions": HUGE}, {"n_head": 0},
                              {"n_layer": True}, {"n_embd": 8.0})] + [
        {"config.json": DEEP}, {"model.safetensors": b"\xff" * 8 + b"{}"},
        {"model.safetensors": struct.pack("<Q", 10**8) + b"{}"}]


class HellaSwag:
    """Items, a JSON object a line; no checksum."""
    def write(self, folder):
        (folder / "items.jsonl").write_text("".join(json.dumps(
            {"activity_label": "Roof", "ctx_a": f"A man {i}", "ctx_b": "he", "ctx": f"A man {i} he",
             "endings": ["a", "b é", "c 🙂", "d"], "label": i % 4}) + "\n" for i in range(5)))

    def read(self, folder):
        from eval.hellaswag import load_items
        return load_items(folder / "items.jsonl")

    def check(self, found, original):
        for item in found:
            assert item.label in range(4) and len(item.endings) == 4 and item.context.strip()
            "".join((item.context, item.harness_context, *item.endings)).encode()

    hostile = [{"items.jsonl": DEEP}, {"items.jsonl": b"9" * 10**6}, {"items.jsonl": b""}]


class Log:
    """A run's log.jsonl; no checksum."""
    def write(self, folder):
        (folder / "log.jsonl").write_text("".join(json.dumps(
            {"step": i, "loss": 4.5 / i, "lr": 1e-3}) + "\n" for i in range(1, 9)))

    def read(self, folder):
        from run import log as report
        lines = report.read_log(folder / "log.jsonl")
        report.repaired_log(folder / "log.jsonl", 5)
        return lines, report.read_log(folder / "log.jsonl")

    def check(self, found, original):
        lines, repaired = found
        assert all(isinstance(line, dict) and type(line["step"]) is int for line in lines)
        kept = [line for line in lines if line["step"] <= 5]
        assert json.dumps(repaired) == json.dumps(kept)             # NaN is not equal to itself

    hostile = [{"log.jsonl": DEEP}, {"log.jsonl": b"[1]\n"}, {"log.jsonl": b'{"step": "a"}\n'}]


class Jsonl:
    """Documents; no checksum."""
    name = "in.jsonl"

    def write(self, folder):
        (folder / self.name).write_text("".join(json.dumps({"text": f"{i} {TEXT}", "id": i}) + "\n"
                                                for i in range(5)))

    def read(self, folder):
        from data.texts import read_documents
        return list(read_documents([folder / self.name]))

    def check(self, found, original):
        assert all(isinstance(text, str) and text.strip() and text.encode() for text in found)

    hostile = [{"in.jsonl": DEEP}, {"in.jsonl": b'{"text": "\\ud800"}'}]


class Text(Jsonl):
    name, hostile = "in.txt", [{"in.txt": b"\xff"}, {"in.txt": b""}]

    def write(self, folder):
        (folder / self.name).write_bytes(TEXT.encode())


class Parquet(Jsonl):
    name, hostile = "in.parquet", [{"in.parquet": b"PAR1" + b"\xff" * 20 + b"PAR1"}]

    def write(self, folder):
        import pyarrow
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.table(
            {"text": [f"{i} {TEXT}" for i in range(20)], "id": list(range(20))}),
            folder / self.name)


class Adapter:
    """PEFT's two files; no checksum."""
    def base(self):
        import torch

        from model import GPT, GPTConfig
        torch.manual_seed(0)
        return GPT(GPTConfig(8, 16, 2, 2, 8)).eval()

    def write(self, folder):
        import lora
        lora.save_lora(lora.add_lora(self.base(), lora.LoRAConfig(r=2, bias="all"), quiet=True),
                       folder)

    def read(self, folder):
        import lora
        return lora.load_lora(self.base(), folder)

    def check(self, found, original):
        check_model(found)

    hostile = [{"adapter_config.json": json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4,
                                                   **change}).encode()}
               for change in ({"r": HUGE}, {"r": None}, {"lora_alpha": 1e999},
                              {"lora_alpha": 10**400},
                              {"rank_pattern": {"(a+)+$": 3, "(.*.*)*x": 3}}, {"bias": "al"},
                              {"peft_type": 10**3000}, {"lora_bias": 10**3000},
                              {"init_lora_weights": "pissa" * 999},
                              {"modules_to_save": [""]})] + [
        {"adapter_config.json": DEEP}, {"adapter_config.json": b"[]"},
        {"adapter_model.safetensors": struct.pack("<Q", 10**8) + b"{}"}]


class Chat:
    """Conversations: files of four formats, and a prepared data set."""
    def write(self, folder):
        from data.conversations import write_conversations
        talks = [{"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"},
                               {"role": "assistant", "content": f"{i} é"}]} for i in range(9)]
        write_conversations(folder, talks, "made up")
        lines = [*talks[:2], {"instruction": "a", "input": "b", "output": "c"},
                 {"conversation": [{"system": "s", "input": "a", "output": "b"}]},
                 {"conversations": [{"from": "human", "value": "a"},
                                    {"from": "gpt", "value": "b"}]}]
        (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / "in.json").write_text(json.dumps(lines))

    def read(self, folder):
        from bpe import Tokenizer
        from data import chat, conversations
        tokenizer = chat.extend_tokenizer(Tokenizer([]), "chatml")
        talks = [conversations.read([folder / name])[0] for name in ("in.jsonl", "in.json")]
        return talks, [[tokenizer.decode(chat.render(talk["messages"], tokenizer, "chatml")[0])
                        for talk in part] for part in talks], chat.load_samples(
            folder, "train", tokenizer, "chatml", 64)

    def check(self, found, original):
        for talk, text in zip(sum(found[0], []), sum(found[1], [])):
            assert all(message["content"].strip() in text for message in talk["messages"])
        assert (found[2].ids == original[2].ids).all()                  # it has a checksum

    hostile = [{"in.jsonl": DEEP}, {"in.json": DEEP}, {"meta.json": DEEP}, {"in.jsonl": b"[[]]"},
               {"in.jsonl": b'{"messages": [{"role": {}, "content": []}]}'}]


class Replies:
    """What a judge's server says."""
    def write(self, folder):
        points = {"helpful": 5, "honest": 6, "harmless": 7}
        text = "Well:\n" + json.dumps({"first": points, "second": points, "reason": "x"})
        (folder / "reply").write_text(json.dumps({"choices": [{"message": {"content": text}}]}))

    def read(self, folder):
        from eval import judge
        judge.PAUSES, judge.post = (0,), lambda *_: (folder / "reply").read_bytes()
        item = {"prompt": "Q", "first": "a", "second": "b"}
        if reason := judge.judge_item(item, judge.JudgeConfig(judge="http://localhost")):
            raise ValueError(f"reply: {reason}")
        return item

    def check(self, found, original):
        from eval import judge
        assert not judge.check_points(found["points"]) and type(found["reason"]) is str
        json.dumps(found).encode()

    hostile = [{"reply": DEEP}, {"reply": b"{" * 10**6}, {"reply": b"\xff\xfe"}, {"reply": b""}]


class Run:
    """What a finished run says of itself: config.json, run.json, log.jsonl."""
    def write(self, folder):
        a_run(folder)
        for path in [*folder.glob("*.pt"), folder / "tokenizer.json"]:
            path.unlink()

    def read(self, folder):
        from experiments.runs import load_run, status
        from run.load import run_settings
        from run.resume import finished_summary
        return run_settings(folder), finished_summary(folder, 0), status(load_run(folder, "a"))

    def check(self, found, original):
        settings, summary, line = found
        assert isinstance(settings, dict) and isinstance(summary, dict) and "\x1b" not in line

    hostile = [{name: data} for name in ("config.json", "run.json") for data in (DEEP, b"[]", b"")
               ] + [{"run.json": b'{"final": "x"}'}] + [
        {"log.jsonl": b'{"step": 1, "loss": 1}\n{"step": %s, "val_loss": %s}\n' % (step, loss)}
        for step, loss in ((b"1", b"9" * 400), (b"9" * 400, b"1"))]


class Sampled:
    """A run's folder, whose checkpoints hold other things, by who writes text with it."""
    settings = {}

    def write(self, folder):
        a_run(folder, **self.settings)

    def change(self, files, rng):
        """A checkpoint that is whole, and whose parts are changed; now and then any file."""
        if rng.random() < 0.2:
            return mutated(files, rng)
        import io

        import torch
        name = rng.choice(sorted(name for name in files if name.endswith(".pt")))
        state, file = torch.load(io.BytesIO(files[name]), weights_only=True), io.BytesIO()
        for _ in range(rng.choice((1, 1, 2))):
            state = change_state(state, rng)
        try:
            torch.save(state, file)
        except (RuntimeError, NotImplementedError):     # PyTorch cannot write what was made
            return mutated(files, rng)
        return {**files, name: file.getvalue()}

    def read(self, folder):
        import sample
        from run.config import told_by_pytorch
        from run.load import load_writer, needs_tokenizer
        model, tokenizer = load_writer(folder)
        tokenizer = needs_tokenizer(tokenizer, folder)
        try:
            return model, tokenizer, sample.continue_text(model, tokenizer, "a", max_new_tokens=3)
        except RuntimeError as error:                   # of NaN, which huge weights make
            if not told_by_pytorch(error):
                raise
            raise ValueError(f"{folder}: {told_by_pytorch(error)}") from None

    def check(self, found, original):
        check_model(found[0])
        assert isinstance(found[2], str)

    hostile = [{"best.pt": b""}, {"best.pt": b"\x80\x02" + b"(" * 100_000}]


class Evaluated(Sampled):
    """The same, by who evaluates it, and by who trains on from it: an adapter's run."""
    settings = {"lora": {"r": 2}}

    def read(self, folder):
        import torch

        from eval.loss import evaluate_loss, token_lengths
        from run.load import load_base
        model, tokenizer = load_base(folder)
        x = torch.arange(8).view(1, 8)
        return model, evaluate_loss(model, [(x, x)], torch.device("cpu"), token_lengths(tokenizer))

    def check(self, found, original):
        check_model(found[0])
        assert found[1]["tokens"] == 8


class Exported(Sampled):
    """The same, by who writes it for others, an adapter of it merged in."""
    def read(self, folder):
        from model import GPT
        from run.export import export
        with tempfile.TemporaryDirectory() as out:
            export(folder, out)
            return GPT.from_pretrained(out), None, ""


class Resumed(Sampled):
    """The same, by who goes on with it."""
    clear = (ValueError, OSError, ArithmeticError)      # those that a command line says in a line

    def read(self, folder):
        return a_run(folder, max_steps=3)

    def check(self, found, original):
        from run import checkpoint
        assert found["step"] >= 3
        state = checkpoint.load_last(found["out"])
        assert all(tensor.isfinite().all() for tensor in state["model"].values())

    hostile = [{"last.pt": b""}, {"last.pt": b"\x80\x02" + b"(" * 100_000}]


def a_run(folder, max_steps=2, **settings):
    """A run of some steps in the folder, on data and from a base beside it."""
    import torch

    from data.corpus import CorpusConfig, prepare
    from run.config import build
    from train import TrainConfig, train
    data, base = folder.parent / "data", folder.parent / "base"
    torch.set_num_threads(1)
    if not data.exists():
        (folder.parent / "text.txt").write_text(TEXT)
        prepare(CorpusConfig(from_=str(folder.parent / "text.txt"), tokenizer="bytes",
                             validation=0.4, out=str(data)))
    if settings.get("lora") and not base.exists():
        a_run(base)
    model = {} if settings.get("lora") else dict(block_size=8, n_layer=1, n_head=1, n_embd=8)
    return train(build(TrainConfig, {**dict(
        out=str(folder), data=str(data), max_steps=max_steps, batch_tokens=16, micro_batch=2,
        eval_tokens=16, save_every=1, keep_last=1, schedule="constant", sample_tokens=0,
        device="cpu", dtype="float32", compile="off", model=model,
        init_from=str(base) if settings.get("lora") else "scratch"), **settings}))


def check_model(model):
    """It computes: a score for each token."""
    import torch
    with torch.no_grad():
        logits, _ = model(torch.tensor([[0, 1, 2]])[:, :model.config.block_size])
    assert logits.shape[-1] == model.config.vocab_size


READERS = {cls.__name__.lower(): cls for cls in (
    Checkpoint, Tok, HuggingFace, Gpt2Files, Shards, Bins, Progress, Model, HellaSwag, Log, Jsonl,
    Text, Parquet, Adapter, Chat, Replies, Run, Sampled, Evaluated, Exported, Resumed)}


# -------------------------------------------------------------------------------------- the run

class TooLong(BaseException):
    pass


def too_long(*_):
    raise TooLong


def outcome(reader, folder, original, names):
    """"clear errors" or "right answers"; any other exception goes on."""
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        found = reader.read(folder)
    except getattr(reader, "clear", (ValueError, FileNotFoundError)) as error:
        message = str(error)
        assert len(message.splitlines()) == 1, f"not one line: {message}"
        assert any(name in message for name in names), f"names no file: {message}"
        assert len(message) < 1000, f"an endless line: {message[:1000]}"
        return "clear errors"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    reader.check(found, original)
    return "right answers"


def fuzz(name, inputs, verbose=True):
    """The counts of a reader; faults are shown, at most one of each kind."""
    reader, counts, shown = READERS[name](), Counter(), set()
    signal.signal(signal.SIGALRM, too_long)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "folder"
        folder.mkdir()
        reader.write(folder)
        original = reader.read(folder)
        reader.check(original, original)
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        limit_memory()
        hostile = [{**files, **change} for change in reader.hostile]
        for i in range(len(hostile) + inputs):
            change = getattr(reader, "change", mutated)
            case = hostile[i] if i < len(hostile) else change(files, random.Random(f"{name} {i}"))
            for path in folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name not in case or path.read_bytes() != case[path.name]:
                    path.unlink()
            for path, data in case.items():
                if not (folder / path).exists():
                    (folder / path).write_bytes(data)
            try:
                with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet), \
                        contextlib.redirect_stderr(quiet):
                    counts[outcome(reader, folder, original, [*files, str(folder)])] += 1
            except (Exception, TooLong) as error:
                counts["others"] += 1
                kind = (type(error), [f.lineno for f in traceback.extract_tb(error.__traceback__)
                                      if str(REPOSITORY) in f.filename][-1])
                if verbose and str(kind) not in shown and len(shown) < 12:
                    shown.add(str(kind))
                    print(f"--- {name}, input {i}:", file=sys.stderr)
                    traceback.print_exception(error, limit=-4, file=sys.stderr)
    return counts


def limit_memory():
    size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.RLIM_INFINITY))


def main(words):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=", ".join(READERS))
    parser.add_argument("--inputs", type=int, default=10_000)
    arguments = parser.parse_args(words)
    faults = 0
    for name in arguments.names or READERS:
        start = time.perf_counter()
        counts = fuzz(name, arguments.inputs)
        print(f"{name}: {sum(counts.values()):,} inputs, {counts['clear errors']:,} clear errors, "
              f"{counts['right answers']:,} right answers, {counts['others']:,} others, "
              f"{time.perf_counter() - start:.1f} s", flush=True)
        faults += counts["others"]
    return int(faults > 0)


def reported(path, words):
    sys.stdout = sys.stderr = open(path, "w")
    sys.exit(main(words))


# A process of its own for each, with a limit of memory, so that no crash takes the others along.
@pytest.mark.parametrize("inputs", [100, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_an_error_of_one_line_or_does_no_harm(tmp_path, name, inputs):
    if name == "parquet":
        pytest.importorskip("pyarrow")
    if name in ("model", "adapter", "exported"):
        pytest.importorskip("safetensors")
    if issubclass(READERS[name], Sampled):              # a run for each costs ten times as much
        inputs //= 5
    (process,) = start(reported, 1, tmp_path / "shown", [name, f"--inputs={inputs}"])
    process.join(timeout=1800)
    shown = (tmp_path / "shown").read_text()
    assert process.exitcode == 0 and ", 0 others," in shown, shown


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

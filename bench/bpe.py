"""Training and encoding speed and memory of bpe.py beside Hugging Face, rustbpe, minbpe, tiktoken.

Every figure comes from a process of its own; times are medians of `--repeats` runs taken in turn,
and each is given as a ratio to ours. Memory is the most that the process and its workers held
together (proportional set size), or its own peak resident size if that is more.

In: a folder with novels/*.txt, imdb/*.jsonl, chinese/*.txt (ONELOOP_SHARED, or ../shared/data);
the code is this Python's standard library and installed packages. Out: a table, and
bench/results/bpe.json.

    python -m bench.bpe [--sizes=20,100] [--repeats=3] [--minbpe=CHECKOUT] [--out=FILE]
"""
import argparse
import datetime
import importlib
import importlib.metadata
import json
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path

from bpe import GPT2_PATTERN, TIKTOKEN_GPT2, Tokenizer
from fast.bpe import read_blocks

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("ONELOOP_SHARED", ROOT.parent / "shared/data"))
VOCAB_SIZE = 32_000
THREADS = os.cpu_count()


# ------------------------------------------------------------------------------------- corpora

def documents():
    """(English texts, Python source files), each shuffled with a fixed seed."""
    english = [path.read_text(encoding="utf-8") for path in sorted(SHARED.glob("novels/*.txt"))]
    for path in sorted(SHARED.glob("imdb/*.jsonl")):
        english += [json.loads(line)["text"] for line in path.open(encoding="utf-8")]
    if not english:
        raise FileNotFoundError(f"no novels/*.txt in {SHARED}; set ONELOOP_SHARED to the data")
    paths = sysconfig.get_paths()
    code = []
    roots = Path(paths["stdlib"]), Path(paths["purelib"])
    for path in sorted({path for root in roots for path in root.rglob("*.py")}):
        try:
            code.append(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, FileNotFoundError):
            continue   # the standard library has test files in other encodings
    for texts in (english, code):
        random.Random(0).shuffle(texts)
    return english, code


def write_corpora(folder, sizes):
    """Files by name, and how often the English and the code had to be repeated to fill each."""
    english, code = documents()
    made = {}
    for megabytes in sizes:
        texts, times = [], []
        for pool in (english, code):
            size = i = 0
            while size < megabytes * 500_000:
                texts.append(pool[i % len(pool)])
                size += len(texts[-1].encode())
                i += 1
            times.append(round(i / len(pool), 2))
        random.Random(1).shuffle(texts)
        data = "\n".join(texts).encode()[:megabytes * 1_000_000].decode("utf-8", "ignore").encode()
        made[f"mix {megabytes} MB"] = (folder / f"mix{megabytes}.txt", times)
        (folder / f"mix{megabytes}.txt").write_bytes(data)
    mix = (folder / f"mix{sizes[0]}.txt").read_bytes()
    made[f"mix {sizes[0]} MB, one line"] = (folder / "line.txt", None)
    (folder / "line.txt").write_bytes(b" ".join(mix.split()))
    chinese = "".join(path.read_text(encoding="utf-8") for path in SHARED.glob("chinese/*.txt"))
    made["Chinese, one line"] = (folder / "chinese.txt", None)
    (folder / "chinese.txt").write_text("".join(chinese.split()), encoding="utf-8")
    made[f"mix {sizes[-1]} MB, 4 times"] = (folder / "four.txt", None)
    with open(folder / "four.txt", "wb") as file:
        for _ in range(4):
            file.write((folder / f"mix{sizes[-1]}.txt").read_bytes())
    made["mix 0.3 MB"] = (folder / "small.txt", None)
    (folder / "small.txt").write_bytes(mix[:300_000].decode("utf-8", "ignore").encode())
    return made


# --------------------------------------------------- what is measured, each in its own process

def train_ours(path, vocab_size):
    Tokenizer.train(read_blocks([path]), vocab_size, special_tokens=())


def train_hugging_face(path, vocab_size):
    from tokenizers import Tokenizer as HF, models, pre_tokenizers, trainers
    level = pre_tokenizers.ByteLevel
    tok = HF(models.BPE())
    tok.pre_tokenizer = level(add_prefix_space=False, use_regex=True)
    tok.train([str(path)], trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=level.alphabet(), show_progress=False))


def train_rustbpe(path, vocab_size):
    import rustbpe

    def blocks():
        with open(path, encoding="utf-8") as file:
            while lines := file.readlines(1 << 20):
                yield "".join(lines)

    rustbpe.Tokenizer().train_from_iterator(blocks(), vocab_size, buffer_size=16,
                                            pattern=GPT2_PATTERN)


def train_minbpe(path, vocab_size):
    sys.path.insert(0, os.environ["MINBPE"])
    from minbpe import RegexTokenizer
    RegexTokenizer(GPT2_PATTERN).train(Path(path).read_text(encoding="utf-8"), vocab_size)


def batch(path):
    text = Path(path).read_text(encoding="utf-8")
    return [text[i:i + 4000] for i in range(0, len(text), 4000)]


def encode_ours(texts):
    tok = Tokenizer.gpt2()
    tok.encode("loaded")
    return lambda: tok.encode_batch(texts, num_threads=THREADS)


def encode_tiktoken(texts):
    import tiktoken
    gpt2 = Tokenizer.gpt2()
    encoding = tiktoken.Encoding(
        "gpt2", pat_str=TIKTOKEN_GPT2, special_tokens=gpt2.special_tokens,
        mergeable_ranks={token: i for i, token in enumerate(gpt2.token_bytes) if token})
    return lambda: encoding.encode_ordinary_batch(texts, num_threads=THREADS)


def encode_hugging_face(texts):
    from tokenizers import Tokenizer as HF
    with tempfile.TemporaryDirectory() as folder:
        Tokenizer.gpt2().save_pretrained(folder)
        tok = HF.from_file(f"{folder}/tokenizer.json")
    return lambda: [encoding.ids for encoding in tok.encode_batch(texts)]


TRAINERS = {"ours": train_ours, "Hugging Face": train_hugging_face, "rustbpe": train_rustbpe,
            "minbpe": train_minbpe}
ENCODERS = {"ours": encode_ours, "tiktoken": encode_tiktoken, "Hugging Face": encode_hugging_face}


MODULES = {"Hugging Face": "tokenizers", "rustbpe": "rustbpe"}   # importing is not timed


def child(kind, name, path, vocab_size):
    """Runs in the process of its own: prints seconds and peak resident size as JSON."""
    if kind == "train":
        run = lambda: TRAINERS[name](path, int(vocab_size))   # noqa: E731
        if name in MODULES:
            importlib.import_module(MODULES[name])
    else:
        run = ENCODERS[name](batch(path))
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    status = Path("/proc/self/status").read_text()   # getrusage would count the parent's peak
    peak = int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024
    print(json.dumps({"seconds": seconds, "megabytes": peak}))


def measure(kind, name, path, vocab_size=VOCAB_SIZE, memory=False):
    """One run in a fresh process; `memory` samples it and its workers, which slows it a little."""
    command = [sys.executable, "-m", "bench.bpe", "--child", kind, name, str(path),
               str(vocab_size)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    most = [0.0]
    if memory:
        watcher = threading.Thread(target=watch, args=(process, most))
        watcher.start()
    out, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{name} failed on {path}")
    if memory:
        watcher.join()
    result = json.loads(out.splitlines()[-1])
    return result["seconds"], max(result["megabytes"], most[0])


def watch(process, most):
    while process.poll() is None:
        most[0] = max(most[0], sum(map(proportional, tree(process.pid))))
        time.sleep(0.03)


def tree(pid):
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        children = []
    return [pid] + [below for c in children for below in tree(int(c))]


def proportional(pid):
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
    except (OSError, ProcessLookupError):
        return 0.0


def row(kind, case, path, names, repeats, vocab_size=VOCAB_SIZE, memory=True):
    """Medians of runs taken in turn, so that a busy machine slows all of them alike."""
    seconds = {name: [] for name in names}
    for _ in range(repeats):
        for name in names:
            seconds[name].append(measure(kind, name, path, vocab_size)[0])
    result = {"case": case, "kind": kind, "megabytes": round(path.stat().st_size / 1e6, 1),
              "vocab_size": vocab_size if kind == "train" else 50257,
              "seconds": {}, "memory_mb": {}}
    for name in names:
        result["seconds"][name] = round(statistics.median(seconds[name]), 2)
        if memory:
            peak = measure(kind, name, path, vocab_size, memory=True)[1]
            result["memory_mb"][name] = round(peak)
    print(as_line(result), flush=True)
    return result


def as_line(result):
    cells = [f"{result['kind']}, {result['case']}, {result['megabytes']} MB"]
    for name in ("ours", "Hugging Face", "rustbpe", "tiktoken", "minbpe"):
        if name not in result["seconds"]:
            cells.append("")
            continue
        seconds, ours = result["seconds"][name], result["seconds"]["ours"]
        memory = f", {result['memory_mb'][name]} MB" if name in result["memory_mb"] else ""
        cells.append(f"{seconds:.2f} s ({seconds / ours:.2f}x){memory}")
    return "| " + " | ".join(cells) + " |"


def main():
    parser = argparse.ArgumentParser(prog="bench.bpe", description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", default="20,100", help="megabytes of the mixed corpora")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--minbpe", help="a checkout of karpathy/minbpe, to measure it too")
    parser.add_argument("--out", default=ROOT / "bench/results/bpe.json", type=Path)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(*args.child)
    sizes = [int(size) for size in args.sizes.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        corpora = write_corpora(Path(folder), sizes)
        print("| case | ours | Hugging Face | rustbpe | tiktoken | minbpe |")
        print("|---|---|---|---|---|---|")
        rows = []
        for case, (path, _) in corpora.items():
            if "4 times" in case:
                rows.append(row("train", case, path, ["ours"], 1))
            elif case != "mix 0.3 MB":
                rows.append(row("train", case, path, ["ours", "Hugging Face", "rustbpe"],
                                args.repeats))
            elif args.minbpe:
                os.environ["MINBPE"] = args.minbpe
                rows.append(row("train", case, path, ["ours", "minbpe"], 1, 512, memory=False))
        rows.append(row("encode", f"mix {sizes[0]} MB", corpora[f"mix {sizes[0]} MB"][0],
                        list(ENCODERS), args.repeats, memory=False))
        repeated = {case: times for case, (_, times) in corpora.items() if times}
    names = ("tokenizers", "rustbpe", "tiktoken", "numpy", "regex")
    args.out.write_text(json.dumps({
        "date": datetime.date.today().isoformat(), "cpu": cpu(), "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in names},
        "times_that_english_and_code_are_repeated": repeated, "repeats": args.repeats,
        "rows": rows}, indent=1) + "\n", encoding="utf-8")


def cpu():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


if __name__ == "__main__":
    main()

"""Fill the generated parts of README.md: the file map with line counts, the measured tables.

    python -m bench.readme             rewrites what stands between <!-- name --> and <!-- /name -->
"""
import ast
import json
import re
from pathlib import Path

from bench.machine import RESULTS
from bench.peers import OURS
from run.config import run_command

REPOSITORY = Path(__file__).parent.parent
README = REPOSITORY / "README.md"
FOLDERS = ("", "data", "eval", "experiments", "bench")


def file_map() -> str:
    """Every source file with its number of lines and the first line of its docstring."""
    rows = ["| file | lines | what it is |", "|---|---|---|"]
    for folder in FOLDERS:
        for path in sorted((REPOSITORY / folder).glob("*.py")):
            text = path.read_text()
            if path.name != "__init__.py":
                what = (ast.get_docstring(ast.parse(text)) or "").splitlines()[0]
                name = path.relative_to(REPOSITORY).as_posix()
                rows.append(f"| `{name}` | {len(text.splitlines())} | {what.replace('|', '/')} |")
    return "\n".join(rows)


def versus_table() -> str:
    """All bench/results/versus-peers-*.json as a table for each device; of a shape and precision
    that several have measured, the newest."""
    newest, heads = {}, {}
    for found in sorted((json.loads(path.read_text())
                         for path in sorted(RESULTS.glob("versus-peers-*.json"))),
                        key=lambda found: found["date"]):
        machine = found["processor"], found["device"]
        heads[machine] = f"{found['date']}, {', '.join(machine)}, PyTorch {found['torch']}"
        for ratio in found["ratios"]:
            newest[machine, ratio["what"], ratio["dtype"]] = ratio, found["rows"]
    parts = []
    for machine, head in heads.items():
        lines = []
        for (place, what, dtype), (ratio, rows) in newest.items():
            if place == machine:
                ours, peer = (next(
                    row for row in rows if (row["what"], row["dtype"]) == (what, dtype)
                    and f"{row['who']}, {row['mode']}" == name)
                    for name in (f"{OURS}, {ratio['mode']}", ratio["best_peer"]))
                lines.append(
                    f"| {what} | {dtype} | {ours['tokens_per_s']:,.0f} ({ours['mode']}) | "
                    f"{ours['share']:.0%} | {peer['tokens_per_s']:,.0f} ({ratio['best_peer']}) | "
                    f"{ratio['speed']:.2f} | {ratio['memory']:.2f} |")
        parts.append(
            f"Training steps, and greedy generation, beside nanoGPT, build-nanogpt and "
            f"transformers, each at its fastest (`python -m bench.versus_peers`; {head}). The "
            f"limit is that of matrix products, for generation that of reading memory; ratios are "
            f"ours over theirs:\n\n"
            "| what | precision | tokens/s | of the limit | best peer, tokens/s | speed | memory "
            "|\n|---|---|---|---|---|---|---|\n" + "\n".join(lines))
    return "\n\n".join(parts)


def ladder_table() -> str:
    """bench/results/ladder-*.json as tables, with their pictures."""
    parts = []
    for path in sorted(RESULTS.glob("ladder-*.json")):
        found = json.loads(path.read_text())
        rows, picture = found["rows"], path.with_suffix(".png")
        skipped = "".join(f"; without {rung}, {why}" for rung, why in found["skipped"].items())
        parts.append(
            f"The steps that make training fast, each on top of the ones before "
            f"(`python -m bench.ladder`; {found['shape']}, {rows[0]['micro_batch']} sequences; "
            f"{found['date']}, {found['processor']}, {found['device']}, PyTorch {found['torch']}, "
            f"medians of {found['rounds']}{skipped}):\n\n"
            "| | ms | tokens/s | of the matmul peak | MiB | times faster in all |\n"
            "|---|---|---|---|---|---|\n" + "\n".join(
                f"| {row['rung']} | {row['ms']:,.0f} | {row['tokens_per_s']:,.0f} | "
                f"{row['share']:.0%} | {row['memory_mib']:,.0f} | "
                f"{rows[0]['ms'] / row['ms']:.2f} |" for row in rows))
        if picture.exists():
            parts.append(f"![ms and memory of each step]({picture.parent.parent.name}/"
                         f"{picture.parent.name}/{picture.name})")
    return "\n\n".join(parts)


def around_the_step() -> str:
    """bench/results/{loading,startup,ranks-cpu}.json as a list of sentences."""
    lines = []
    if (path := RESULTS / "loading.json").exists():
        found = json.loads(path.read_text())
        worst = max(found["rows"], key=lambda row: row["of_a_core"])
        text = found["text"]
        lines += [f"Loading 2,000,000 tokens/s takes {worst['of_a_core']:.1%} of a core "
                  f"({worst['micro_batch']} x {worst['block_size']} tokens a batch; `python -m "
                  f"bench.loading`).",
                  f"Text to shards: {text['bytes'] / 1e6 / text['seconds']['oneloop']:.1f} MB/s "
                  f"with {text['threads']} threads, {text['of_tiktoken']:.2f} of the speed of "
                  f"tiktoken's `encode_ordinary_batch` alone (the same)."]
    if (path := RESULTS / "startup.json").exists():
        row = json.loads(path.read_text())["rows"][0]
        torch = "and imports torch" if row["bpe_imports_torch"] else "without importing torch"
        lines.append(f"`train.py --help` takes {row['train_beyond_torch']:.2f} s more than `import "
                     f"torch` ({row['seconds']['import torch']:.2f} s); `bpe.py --help` "
                     f"{row['seconds']['bpe.py --help']:.2f} s, {torch} (`python -m "
                     f"bench.startup`).")
    if (path := RESULTS / "ranks-cpu.json").exists():
        found = json.loads(path.read_text())
        lines += [f"{row['shape']}: {row['ranks']} gloo ranks with a thread each have "
                  f"{row['of_threads']:.2f} of the tokens/s of one process with {row['ranks']} "
                  f"threads, with the same batch (`python -m bench.ranks`)."
                  for row in found["rows"]]
        if rows := found["accumulation"]:
            *same, larger = rows
            lines.append(
                f"A step in {', '.join(str(row['accumulation']) for row in same)} micro-batches of "
                f"{same[0]['micro_batch']} sequences reduces "
                f"{', '.join(format(row['reduced_bytes_per_step'] / 1e6, '.0f') for row in same)} "
                f"MB of gradients and takes "
                f"{', '.join(format(row['memory_mib'], ',.0f') for row in same)} MiB; one of "
                f"{larger['micro_batch']} sequences {larger['memory_mib']:,.0f} MiB.")
    return "\n".join(f"- {line}" for line in lines)


def step_table() -> str:
    """bench/results/step-*.json as a table."""
    parts = []
    for path in sorted(RESULTS.glob("step-*.json")):
        found = json.loads(path.read_text())
        parts.append(f"A training step (`python -m bench.step`; {found['date']}, "
                     f"{found['processor']}, {found['device']}, PyTorch {found['torch']}):\n\n"
                     "| shape | precision | mode | ms | tokens/s | of the matmul peak | MiB |\n"
                     "|---|---|---|---|---|---|---|\n" + "\n".join(
                         f"| {r['shape']}, {r['micro_batch']} sequences | {r['dtype']} | "
                         f"{r['mode']} | {r['ms']:,.0f} | {r['tokens_per_s']:,} | "
                         f"{r['share_of_peak']:.0%} | {r['memory_mib']:,} |"
                         for r in found["rows"]))
    return "\n\n".join(parts)


def shakespeare_table() -> str:
    """bench/results/shakespeare.json as a table."""
    path = RESULTS / "shakespeare.json"
    if not path.exists():
        return ""
    found = json.loads(path.read_text())
    return ("Tiny shakespeare with nanoGPT's CPU recipe (4 layers, width 128, context 64, 2,000 "
            "steps of 12 sequences), whole command, one after the other on the same machine "
            f"(`python -m bench.shakespeare`; {found['date']}, {found['processor']}, "
            f"medians of {found['rounds']}):\n\n"
            "| | validation loss per byte | seconds |\n|---|---|---|\n" + "\n".join(
                f"| {r['who']} | {r['val_loss_per_byte']:.4f} | {r['seconds']:.0f} |"
                for r in found["rows"]))


def tokenizer_table() -> str:
    """bench/results/bpe.json as a table of training times and memory, and a line on encoding."""
    path = RESULTS / "bpe.json"
    if not path.exists():
        return ""
    found = json.loads(path.read_text())
    peers = ("ours", "Hugging Face", "rustbpe", "minbpe")
    lines = [f"Training (`python -m bench.bpe`; {found['date']}, {found['cores']} cores of an "
             f"{found['cpu']}, medians of {found['repeats']} taken in turn, GPT-2 pattern):", "",
             "| text | vocabulary | " + " | ".join(peers) + " |", "|---" * (2 + len(peers)) + "|"]
    for row in (row for row in found["rows"] if row["kind"] == "train"):
        cells = [f"{row['seconds'][peer]:.2f} s" + (f", {row['memory_mb'][peer]:,} MB"
                                                    if peer in row["memory_mb"] else "")
                 if peer in row["seconds"] else "" for peer in peers]
        lines.append(f"| {row['case']} | {row['vocab_size']:,} | " + " | ".join(cells) + " |")
    for row in (row for row in found["rows"] if row["kind"] == "encode"):
        lines += ["", f"Encoding {row['megabytes']:.0f} MB in batches: " + ", ".join(
            f"{peer} {seconds:.2f} s" for peer, seconds in row["seconds"].items()) + "."]
    return "\n".join(lines)


def kills_table() -> str:
    """bench/results/kills-*.json as a table."""
    rows = []
    for path in sorted(RESULTS.glob("kills-*.json")):
        found = json.loads(path.read_text())
        rows += [f"| {r['kind']} | {r['ranks']} | {r['kills']} | {r['exact']} | {r['lost']} | "
                 f"{r['in a save']} |" for r in found["rows"]]
    return ("SIGKILL at random moments of a short run, with dropout and a slow disk "
            "(`python -m bench.kills`); exact: the run ended as one left in peace; lost: a "
            "checkpoint that had been there was not, or could not be read:\n\n"
            "| training | ranks | kills | exact | lost | of the kills, within a save |\n"
            "|---|---|---|---|---|---|\n" + "\n".join(rows)) if rows else ""


def lora_table() -> str:
    """bench/results/lora-*.json as a table."""
    parts = []
    for path in sorted(RESULTS.glob("lora-*.json")):
        found = json.loads(path.read_text())
        rows = {(r["variant"], r["side"]): r for r in found["rows"]}
        lines = []
        for name in dict.fromkeys(r["variant"] for r in found["rows"]):
            ours, peft = rows[name, "ours"], rows[name, "peft"]
            lines.append(f"| {name} | {ours['ms']:,.0f} / {peft['ms']:,.0f} | "
                         f"{ours['ms'] / peft['ms']:.2f} | {ours['mib']:,.0f} / "
                         f"{peft['mib']:,.0f} | {ours['mib'] / peft['mib']:.2f} |")
        parts.append(f"A fine-tuning step beside PEFT on transformers (`python -m bench.lora`; "
                     f"{found['date']}, {found['processor']}, GPT-2 124M, batch 4 x 256, bf16, "
                     f"eager, adapters of rank 8 on c_attn):\n\n"
                     "| | ms, ours / PEFT | ratio | MiB, ours / PEFT | ratio |\n"
                     "|---|---|---|---|---|\n" + "\n".join(lines))
    return "\n\n".join(parts)


def saves_line() -> str:
    """bench/results/saves-*.json as a sentence."""
    parts = []
    for path in sorted(RESULTS.glob("saves-*.json")):
        found = json.loads(path.read_text())
        row = found["rows"][0]
        s, r = row["seconds"], row["ratios"]
        parts.append(f"A checkpoint of {row['shape']} stops training for "
                     f"{1000 * s['copy']:.0f} ms, {r['copy / plain copy']:.2f} of a plain copy of "
                     f"its bytes and {r['copy / foreground']:.1%} of writing it in the foreground "
                     f"(`python -m bench.saves`; {found['date']}, {found['processor']}). A step "
                     f"beside the writing takes {r['step while writing / step']:.2f} of its time.")
    return "\n\n".join(parts)


def main(words: list[str]) -> None:
    text = README.read_text()
    tables = "\n\n".join(part for part in (
        versus_table() or step_table(), ladder_table(), around_the_step(), shakespeare_table(),
        lora_table()) if part)
    for name, content in (("tokenizer", tokenizer_table()), ("measured", tables),
                          ("kills", "\n\n".join(part for part in (kills_table(), saves_line())
                                                if part)), ("map", file_map())):
        text = re.sub(f"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
                      lambda match: f"{match[1]}{content}\n{match[2]}", text, flags=re.S)
    README.write_text(text)


if __name__ == "__main__":
    run_command(main)

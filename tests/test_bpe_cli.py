"""python bpe.py: what it prints, and one clear line for each bad input."""
import json
import subprocess
import sys
from pathlib import Path

import pytest

import bpe

ROOT = Path(__file__).parents[1]
TEXT = "The loop reads text; the loop writes tokens, and that's all it does 12 times.\n" * 400


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def run(*args, stdin=b""):
    return subprocess.run([sys.executable, "bpe.py", *map(str, args)], cwd=ROOT, input=stdin,
                          capture_output=True, timeout=60)


def refused(capsys, *args):
    """The single line on stderr of a command that must fail with 2."""
    capsys.readouterr()
    assert bpe.main([str(arg) for arg in args]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("bpe.py: ")
    return lines[0]


def test_train_reports_what_it_did(corpus, tmp_path, capsys):
    out = tmp_path / "tok.json"
    assert bpe.main(["train", str(corpus), "--vocab-size=280", f"--out={out}",
                     "--special=<|a|>", "--special=<|b|>"]) == 0
    printed = capsys.readouterr().out
    assert f"{len(TEXT):,} bytes, 19 distinct pieces, vocabulary 280" in printed
    for line in ("held-out text: ", "bytes per token", "first merges:   [ t] ", "last merges:",
                 "longest tokens: "):
        assert line in printed
    tok = bpe.Tokenizer.load(out)
    assert tok.special_tokens == {"<|a|>": 278, "<|b|>": 279}


def test_the_longest_tokens_are_those_of_most_bytes_however_they_are_spelled(tmp_path, capsys):
    (tmp_path / "text.txt").write_text(" abcdef \x01\x01\x01" * 50)    # \x01 takes four characters
    bpe.main(["train", str(tmp_path / "text.txt"), "--vocab-size=290", f"--out={tmp_path / 't'}"])
    assert "longest tokens: [ abcdef] " in capsys.readouterr().out
    (tmp_path / "text.txt").write_text("x" * 4000)
    bpe.main(["train", str(tmp_path / "text.txt"), "--vocab-size=290", f"--out={tmp_path / 't'}"])
    assert f"longest tokens: [{40 * 'x'}] " in capsys.readouterr().out      # and no screens of it


def test_a_byte_order_mark_is_no_text(tmp_path):
    """Of 20 files it would be two merges."""
    learned = []
    for mark in (b"", b"\xef\xbb\xbf"):
        files = [tmp_path / f"{i}.txt" for i in range(20)]
        for i, file in enumerate(files):
            file.write_bytes(mark + b"some text %d" % (i % 5))
        out = tmp_path / "tok.json"
        assert bpe.main(["train", *map(str, files), "--vocab-size=300", f"--out={out}"]) == 0
        learned.append(bpe.Tokenizer.load(out).merges)
    assert learned[0] == learned[1]


def test_no_held_out_trains_on_everything(corpus, tmp_path, capsys):
    out = tmp_path / "tok.json"
    assert bpe.main(["train", str(corpus), "--vocab-size=300", f"--out={out}", "--pattern=gpt4",
                     "--no-held-out"]) == 0
    assert "held-out" not in capsys.readouterr().out
    expected = bpe.Tokenizer.train([TEXT], 300, pattern="gpt4")
    assert bpe.Tokenizer.load(out).hash == expected.hash


def test_early_stop_is_one_line(corpus, tmp_path, capsys):
    assert bpe.main(["train", str(corpus), "--vocab-size=5000", f"--out={tmp_path / 't'}"]) == 0
    assert "bpe.py: stopped after " in capsys.readouterr().err


def test_records_that_are_learned_with_their_quotes_are_said(corpus, tmp_path, capsys):
    records = corpus.rename(tmp_path / "corpus.JSONL")
    assert bpe.main(["train", str(records), "--vocab-size=280", f"--out={tmp_path / 'o'}"]) == 0
    assert "corpus.JSONL is read as it is, with its quotes" in capsys.readouterr().err


def test_encode_and_decode_are_inverse_for_any_bytes(corpus, tmp_path):
    out = tmp_path / "tok.json"
    bpe.main(["train", str(corpus), "--vocab-size=280", f"--out={out}"])
    data = bytes(range(256)) + "the loop 中 <|endoftext|>\r\n".encode()
    encoded = run("encode", f"--tokenizer={out}", stdin=data)
    ids = [int(word) for word in encoded.stdout.split()]
    assert ids == bpe.Tokenizer.load(out).encode_bytes(data)
    assert run("decode", f"--tokenizer={out}", stdin=encoded.stdout).stdout == data


def test_compare_counts_tokens_and_split_characters(tmp_path, capsys):
    tok = bpe.Tokenizer([(228, 184)], special_tokens=())   # the first two bytes of 中
    tok.save(tmp_path / "tok.json")
    files = {"en.txt": "abcd", "zh.txt": "中中a", "zh2.txt": "中a"}
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert bpe.main(["compare", *(str(tmp_path / name) for name in files),
                     f"--tokenizer={tmp_path / 'tok.json'}"]) == 0
    rows = [[cell.strip() for cell in line.strip("| ").split("|")]
            for line in capsys.readouterr().out.splitlines()[2:-3]]
    assert [[Path(row[0]).name, *row[1:]] for row in rows] == [
        ["en.txt", "LATIN", "4", "4", "1.00", "0.0%"],
        ["zh.txt", "CJK", "7", "5", "1.40", "66.7%"],
        ["zh2.txt", "CJK", "4", "3", "1.33", "50.0%"],
        ["all LATIN", "LATIN", "4", "4", "1.00", "0.0%"],
        ["all CJK", "CJK", "11", "8", "1.38", "60.0%"]]


def test_compare_says_what_the_vocabulary_is_for_in_a_page_without_scripts(tmp_path, capsys):
    """ab is used; abc is made of it and of c, and used; xy is not, and nothing needs it."""
    tok = bpe.Tokenizer([(97, 98), (256, 99), (120, 121), (228, 184)])
    tok.save(tmp_path / "tok.json")
    (tmp_path / "a.txt").write_text("abc <b>中</b>", encoding="utf-8")
    (tmp_path / "a.py").write_text("abc", encoding="utf-8")
    page = tmp_path / "page.html"
    assert bpe.main(["compare", str(tmp_path / "a.txt"), str(tmp_path / "a.py"),
                     f"--tokenizer={tmp_path / 'tok.json'}", f"--html={page}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    # used: abc, space, < b > / 中's two; not used: 256 bytes but those six, 3 merges; parts: ab,
    # a, c, and the two bytes that make the beginning of 中
    cells = [cell.strip() for cell in lines[-1].strip("| ").split("|")]
    assert cells[1:5] == ["261", "8", "252", "5"] and "| code |" in lines[3]
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text and "<b>" not in text and "&lt;" in text
    assert '<span class="t0">abc</span><span class="t1"> </span>' in text
    assert 'cut">\\xe4\\xb8</span>' in text and '<code class="part">ab</code>' in text
    assert '<code class="t0">xy</code>' not in text.split("unused")[0]


@pytest.mark.parametrize("options, message", [
    (["--vocab-size=200"], "vocab_size=200 is under 256 bytes + 1 special tokens; give at least"),
    (["--vocab-size=257", "--special=a", "--special=b"], "256 bytes + 2 special tokens"),
    (["--special=a", "--special=a"], "special token 'a' is given twice"),
    (["--special="], "special token '' is empty"),
    (["--pattern=(a"], "pattern='(a' is not a regular expression"),
    (["--pattern=[a-z]+"], "pattern='[a-z]+' drops '!'"),
    (["--min-frequency=0"], "min_frequency=0 is not allowed"),
    (["--num-proc=0"], "num_proc=0 is not allowed"),
])
def test_bad_options_are_refused(corpus, tmp_path, capsys, options, message):
    args = ["train", corpus, "--vocab-size=300", f"--out={tmp_path / 'tok.json'}", *options]
    assert message in refused(capsys, *args)
    assert not (tmp_path / "tok.json").exists()


def test_missing_and_empty_files_are_refused(corpus, tmp_path, capsys):
    out = [f"--out={tmp_path / 'tok.json'}", "--vocab-size=300"]
    assert "no such file: none.txt" in refused(capsys, "train", corpus, "none.txt", *out)
    assert f"no such file: {tmp_path}, it is a folder; name its files, {tmp_path}/*.txt" in refused(
        capsys, "train", tmp_path, *out)
    (tmp_path / "empty.txt").touch()
    assert "empty.txt is empty" in refused(capsys, "train", tmp_path / "empty.txt", *out)
    assert "no such file: none.txt" in refused(capsys, "compare", "none.txt", "--tokenizer",
                                               write_bytes_tokenizer(tmp_path))
    assert "no such folder: " in refused(
        capsys, "train", corpus, "--vocab-size=300", f"--out={tmp_path / 'none' / 'tok.json'}")


def write_bytes_tokenizer(folder):
    bpe.Tokenizer([], special_tokens=()).save(folder / "bytes.json")
    return folder / "bytes.json"


def test_invalid_utf8_is_named_by_its_byte_offset(tmp_path, capsys):
    path, out = tmp_path / "bad.txt", tmp_path / "tok.json"
    good = "é中 text ".encode() * 100_000              # several blocks, cut inside characters
    path.write_bytes(good + b"\xff" + good)
    args = ["train", path, "--vocab-size=300", f"--out={out}"]
    assert f"bad.txt is not UTF-8: byte 0xff at offset {len(good)}" in refused(capsys, *args)
    assert bpe.main([*map(str, args), "--errors=replace"]) == 0
    path.write_bytes(b"text cut inside a character \xe4\xb8")
    assert "byte 0xe4 at offset 28" in refused(capsys, *args)


def test_bad_tokenizer_files_and_ids_are_refused(tmp_path):
    good = write_bytes_tokenizer(tmp_path)
    text = good.read_text(encoding="utf-8")
    cases = {"tampered.json": (json.dumps({**json.loads(text), "first_merge": 257}), "was changed"),
             "truncated.json": (text[:-100], "is truncated or not JSON"),
             "version.json": (text.replace('"version": 1', '"version": 9'), "has version 9")}
    for name, (content, message) in cases.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
        result = run("encode", f"--tokenizer={tmp_path / name}", stdin=b"text")
        assert result.returncode == 2 and result.stdout == b""
        assert message in result.stderr.decode() and result.stderr.count(b"\n") == 1
    for ids, message in (("1 x", "'x' is not an id"), ("1 256", "id 256 is not in the vocabulary")):
        result = run("decode", f"--tokenizer={good}", stdin=ids.encode())
        assert result.returncode == 2 and message in result.stderr.decode()
        assert result.stderr.count(b"\n") == 1


@pytest.mark.parametrize("args, message", [
    ([], "bpe.py: the following arguments are required: COMMAND; see bpe.py --help"),
    (["train", "x", "--out=y", "--vocab-size=big"], "--vocab-size: invalid int value: 'big'"),
    (["train", "x", "--vocab-size=300"], "the following arguments are required: --out"),
    (["compare", "x", "--vocab=1"], "unrecognized arguments: --vocab=1"),
])
def test_bad_usage_is_one_line(args, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        bpe.main(args)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1


def test_help_needs_no_torch():
    code = ("import sys, bpe\ntry:\n    bpe.main(['--help'])\nexcept SystemExit:\n    pass\n"
            "sys.exit('torch' in sys.modules)")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60)
    assert result.returncode == 0 and b"compare" in result.stdout

"""What `python bpe.py` asks and says: the options of its commands, the report of a training."""
import argparse
import time
import warnings
from pathlib import Path
from typing import Any, Callable, Iterable

from fast.bpe_counts import count_pieces, read_blocks
from fast.bpe_pieces import PATTERNS
from formats.tokenizer import readable


RECORDS = ".json", ".jsonl", ".ndjson"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:      # one line, as all of our errors are
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def parse(argv: list[str] | None, about: str, commands: Iterable[Callable]) -> argparse.Namespace:
    """The words of a command line; `run` is the function of its command. about: bpe.py's docs."""
    parser = _Parser(prog="bpe.py", description=about.split("\n")[0],
                     epilog="all options: python bpe.py COMMAND --help")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    options = []
    for run in commands:
        command = subparsers.add_parser(run.__name__.removesuffix("_command"), help=run.__doc__)
        command.set_defaults(run=run)
        options.append(command.add_argument)
    train, extend, encode, decode, compare = options
    for option in (train, extend):
        option("--vocab-size", type=int, required=True, help="256 bytes + merges + special tokens")
        option("--out", required=True, help="the tok.json to write")
        option("--min-frequency", type=int, default=1,
               help="stop when all pairs are rarer (default 1)")
        option("--num-proc", type=int, help="counting processes (default: all cores)")
        option("--no-held-out", action="store_true",
               help="else a tenth is kept to measure compression")
    train("--pattern", default="gpt2", help=f"{', '.join(PATTERNS)}, or a regex (default gpt2)")
    train("--tie", choices=("ids", "bytes"), default="ids", help="of pairs that are as frequent, "
          "the smaller one, or the one of larger bytes, as in CS336 (default ids)")
    train("--special", action="append", metavar="TOKEN", help="repeatable (default <|endoftext|>)")
    extend("--pattern", help="can only be the tokenizer's, and is taken from it")
    for option in (train, extend, compare):
        option("files", nargs="+", metavar="FILE", help="UTF-8 text files")
        option("--errors", choices=("strict", "replace"), default="strict",
               help="what to do with bytes that are not UTF-8 (default strict)")
    for option in (extend, encode, decode):
        option("--tokenizer", default="gpt2", help="gpt2, a file or a folder (default gpt2)")
    compare("--tokenizer", action="append", help="the same; repeatable (default gpt2)")
    compare("--html", default="", metavar="FILE", help="a page to write: the tables, the texts in "
            "colour, unused tokens")
    return parser.parse_args(argv)


def learn(args: argparse.Namespace, pattern: str, make: Callable[[dict[bytes, int]], Any],
          old: Any = None) -> None:
    """Count the pieces of files, `make` a tokenizer of them, save it, and say what it became."""
    start, held_out = time.time(), None if args.no_held_out else []
    if not Path(args.out).parent.is_dir():
        raise FileNotFoundError(f"no such folder: {Path(args.out).parent}, for --out={args.out}")
    for name in (name for name in args.files if name.lower().endswith(RECORDS)):
        warnings.warn(f"{name} is read as it is, with its quotes and names of fields; write its texts "
                      f"to a .txt file to learn from them alone")
    texts = read_blocks(args.files, pattern, args.errors, held_out=held_out, progress=True)
    tok = make(pieces := count_pieces(texts, pattern, args.num_proc))
    tok.save(args.out)
    print_report(args, len(pieces), time.time() - start, tok, held_out or [], old)


def print_report(args: argparse.Namespace, pieces: int, seconds: float, tok: Any,
                 held_out: list[str], old: Any = None) -> None:
    """What was done, how well the tokenizer compresses text that it has not seen, beside the `old`
    one that it was extended from, and some of what it has learned."""
    size = sum(Path(file).stat().st_size for file in args.files)
    print(f"{size:,} bytes, {pieces:,} distinct pieces, vocabulary {tok.vocab_size:,}, "
          f"{seconds:.1f} s: {args.out}")
    if held_out:
        size = sum(len(text.encode()) for text in held_out)
        ratio = [f"{size / sum(map(len, t.encode_batch(held_out))):.3f} bytes per token"
                 for t in (tok, old) if t]
        print(f"held-out text: {size:,} bytes, {', before '.join(ratio)}")
    made = [tok.token_bytes[i] for i in tok.merge_ids[len(old.merges) if old else 0:]]
    for title, some in (("first merges:  ", made[:10]), ("last merges:   ", made[-10:]),
                        ("longest tokens:", sorted(made, key=len)[:-6:-1])):
        print(title, *(f"[{readable(token)[:40]}]" for token in some))

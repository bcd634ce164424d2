"""Dataclasses to command line: one mechanism for every setting of the project.

A setting is a field of a frozen dataclass, with its help text as a comment behind it; type,
default and comment make the `--help`. A field that is itself a dataclass becomes dotted flags; one
that is a dataclass or None is there when a flag of it is; a word that Python keeps for itself ends
in "_", which the flag has not (from_ is --from):

    @dataclass(frozen=True)
    class TrainConfig:
        learning_rate: float = 6e-4         # peak learning rate
        model: GPTConfig = GPTConfig()      # the network

    config = parse(TrainConfig, ["--learning_rate=1e-3", "--model.n_layer=6"], prog="train.py")
    config = build(TrainConfig, {"learning_rate": 1e-3, "model": {"n_layer": 6}})     # the same

A wrong setting is a ValueError of one line. `run_command` prints it on stderr and exits with 2.
"""
import argparse
import contextlib
import dataclasses
import difflib
import functools
import inspect
import math
import numbers
import os
import re
import signal
import sys
import textwrap
import traceback
import types
import typing
from typing import Any, Callable, Literal, TypeVar

Config = TypeVar("Config")
BOOLS = {"true": True, "yes": True, "on": True, "1": True,
         "false": False, "no": False, "off": False, "0": False}


def settings_of(cls: type, prefix: str = "") -> dict[str, tuple[Any, Any, str]]:
    """Every setting of a config class: {"model.n_layer": (type, default, help)}, nested dotted."""
    found = {}
    hints, texts = typing.get_type_hints(cls), comments(cls)
    for field in dataclasses.fields(cls):
        if group := _group(hints[field.name]):
            found.update(settings_of(group, f"{prefix}{field.name}."))
        else:
            found[prefix + field.name] = (hints[field.name], _default(field),
                                          texts.get(field.name, ""))
    return found


@functools.cache
def comments(cls: type) -> dict[str, str]:
    """The comment behind each field of a class, and below it where it goes on there; none of a
    class whose source cannot be read."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):                                    # typed into an interpreter
        return {}
    found, name = {}, ""
    for line in source.splitlines():
        code, mark, comment = line.partition("  # ")
        if field := re.match(r"    (\w+)\s*:", code):
            name = field[1]
        elif re.match(r"    [\w@]|\s*$", line):         # a method, or a gap
            name = ""
        if name and mark:
            found[name] = f"{found.get(name, '')} {comment}".strip()
    return found


def build(cls: type[Config], values: dict[str, Any]) -> Config:
    """A config from a dict, nested or dotted; what it does not name keeps its default.

    The inverse of `dataclasses.asdict`. An unknown name is a ValueError with the nearest known one.
    """
    known = settings_of(cls)
    values = flatten(values)
    for name in list(values):
        if values[name] is None and any(key.startswith(name + ".") for key in known):
            del values[name]                                        # a group that is not there
        elif name not in known:
            raise ValueError(_unknown(name, known))
    config = _assemble(cls, values)
    if any("." in name for name in known):                          # for `given`
        object.__setattr__(config, "given", frozenset(values))
    return config


def parse(cls: type[Config], words: list[str], prog: str, base: dict[str, Any] | None = None,
          about: str = "", follow: Callable[[dict, dict], dict] | None = None) -> Config:
    """A config from command-line words on top of the settings in `base` (a preset), which
    `follow(base, given)` fits to them.

    `--key=value` or `--key value`, `-` and `_` alike; a bool alone means true. `--help` prints
    every setting with type, default and meaning, and exits.
    """
    known, base = settings_of(cls), flatten(base or {})
    parser = _Parser(prog=prog, description=about, allow_abbrev=False,
                     formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(
                         prog, max_help_position=32, width=100),
                     usage=f"{prog} [--key=value ...]")
    groups: dict[str, Any] = {}
    for name, (kind, default, text) in known.items():
        section = name.rpartition(".")[0] or "settings"
        group = groups.setdefault(section, parser.add_argument_group(section))
        text = f"{text} [{_spell(base.get(name, default))}]".replace("%", "%%")
        bare = {"nargs": "?", "const": True} if kind is bool else {}
        group.add_argument("--" + name.removesuffix("_"), dest=name, type=_converter(kind),
                           default=argparse.SUPPRESS, metavar=_type_name(kind), help=text, **bare)
    # Only the name of a flag may be written with dashes; a value keeps its own.
    words = [flag.replace("-", "_").replace("__", "--", 1) + sep + value if flag[:2] == "--"
             else word for word in words for flag, sep, value in [word.partition("=")]]
    given, rest = parser.parse_known_args(words)
    for word in rest:
        if word.startswith("--"):
            raise ValueError(_unknown(word[2:].partition("=")[0], known))
        raise ValueError(f"unexpected argument {word!r}: settings are written --key=value")
    return build(cls, {**(follow(base, vars(given)) if follow else base), **vars(given)})


def given(config: Any, group: str) -> list[str]:
    """Those settings of a group that are no default, and those that `build` was given all the same:
    given(config, "model") is ["n_layer"] of {"model": {"n_layer": 12}}."""
    part, names = getattr(config, group), getattr(config, "given", ())
    return [field.name for field in dataclasses.fields(part)
            if f"{group}.{field.name}" in names or getattr(part, field.name) != _default(field)]


def run_command(main: Callable[[list[str]], Any]) -> None:
    """Run a command line; what its user got wrong becomes one line on stderr and exit code 2.

    ONELOOP_TRACEBACK=1 shows where it was raised.
    """
    if signal.getsignal(signal.SIGINT) is _interrupt:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):             # a terminal that lacks a character
        stream.reconfigure(errors="backslashreplace")
    try:
        main(sys.argv[1:])
    except Exception as error:
        raise SystemExit(print_error(error)) from None
    except KeyboardInterrupt as error:
        os._exit(print_error(error))    # at once, without waiting for a file being written


def interruptible() -> None:
    """Let Ctrl-C end this process in a line while PyTorch is imported, which takes seconds: called
    above a command's imports. `run_command` takes over."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def _interrupt(*_: Any) -> None:
    os._exit(print_error(KeyboardInterrupt()))          # an exception would get lost in C


def print_error(error: BaseException) -> int:
    """Say on stderr what ended this process: in one line what its user can mend, else with the way
    to it. Returns the exit code."""
    rank = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
    told = told_by_pytorch(error)
    code, text = 2, f"{rank}error: {told or error}\n"
    if isinstance(error, BrokenPipeError):                          # `... --help | head`
        code, text = 128 + signal.SIGPIPE, ""
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)                # Python flushes at its end
    elif isinstance(error, KeyboardInterrupt):
        code, text = 128 + signal.SIGINT, "\ninterrupted\n"
    elif os.environ.get("ONELOOP_TRACEBACK") or not told and not isinstance(
            error, (ValueError, OSError, ArithmeticError, ModuleNotFoundError)):
        code, text = 1, rank + "".join(traceback.format_exception(error))
    with contextlib.suppress(OSError):                              # nobody may be there to read
        sys.stderr.write(text)
        sys.stderr.flush()
        sys.stdout.flush()
    return code


def warn(text: str) -> None:
    """Say on stderr what ends nothing; nor does a screen that has gone away."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = open(os.devnull, "w")      # the old one would fail again at Python's end


def told_by_pytorch(error: BaseException) -> str:
    """In a line what PyTorch and Python have no class of errors for: memory, scores that are NaN;
    "" of all else."""
    text = next(iter(str(error).splitlines()), "")
    if isinstance(error, MemoryError) or isinstance(error, RuntimeError) and (
            "out of memory" in text or "can't allocate memory" in text):
        return (f"out of memory ({text[:120]}); make the batch, the context or the model smaller "
                f"(in training --micro_batch, --recompute_activations=true, --shard=fsdp)")
    if isinstance(error, RuntimeError) and "probability tensor contains" in text:
        return ("the model's scores are not finite: its training diverged, or its file is damaged; "
                "take an earlier checkpoint")
    return ""


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"n_layer": 2}} as {"model.n_layer": 2}."""
    flat = {}
    for name, value in values.items():
        nested = isinstance(value, dict) and not name.endswith("_pattern")  # a setting, not a group
        flat.update(flatten(value, f"{prefix}{name}.") if nested else {prefix + name: value})
    return flat


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise ValueError(message)


def _assemble(cls: type[Config], values: dict[str, Any], prefix: str = "") -> Config:
    hints = typing.get_type_hints(cls)
    arguments = {}
    for field in dataclasses.fields(cls):
        name, kind = prefix + field.name, hints[field.name]
        if group := _group(kind):
            given = any(key.startswith(name + ".") for key in values)
            if given or group is kind:                              # X | None needs a setting of X
                arguments[field.name] = _assemble(group, values, name + ".")
        elif name in values:
            value = values[name]
            if not _is_of(kind, value):
                raise ValueError(f"{name}={value!r:.80} is not allowed; give {_type_name(kind)}")
            arguments[field.name] = tuple(value) if isinstance(value, list) else value
            check_finite(name, value)
    return cls(**arguments)


def check_finite(name: str, value: Any) -> None:
    """ValueError for nan and inf, which pass comparisons such as `x < 0`."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}={value} is not a finite number; give one")


def _is_of(kind: Any, value: Any) -> bool:
    """Whether a value, of Python or of JSON, is of the type of a setting."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_is_of(part, value) for part in inner)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin is tuple:
        return isinstance(value, (tuple, list)) and all(_is_of(inner[0], part) for part in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            isinstance(key, str) and _is_of(inner[1], part) for key, part in value.items())
    if kind in (int, float):
        wanted = numbers.Integral if kind is int else numbers.Real
        return isinstance(value, wanted) and not isinstance(value, bool)
    return isinstance(value, kind)


def _group(kind: Any) -> type | None:
    """The dataclass of a field that is one, or one or None."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)


def _default(field: dataclasses.Field) -> Any:
    missing = field.default is dataclasses.MISSING
    return field.default_factory() if missing else field.default


def _converter(kind: Any) -> Callable[[str], Any]:
    """The function that turns a word into a value of type `kind`."""
    def convert(text: str) -> Any:
        try:
            return _convert(kind, text)
        except (ValueError, OverflowError):
            raise argparse.ArgumentTypeError(
                f"{text!r} is not allowed; give {_type_name(kind)}") from None
    return convert


def _convert(kind: Any, text: str) -> Any:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):                   # X | None
        return None if text.lower() == "none" else _convert(inner[0], text)
    if origin is Literal:
        if text not in inner:
            raise ValueError(text)
        return text
    if origin is tuple:
        return tuple(_convert(inner[0], part) for part in text.split(",") if part)
    if origin is dict:                                              # c_fc:4,c_attn:8
        pairs = (part.rpartition(":") for part in text.split(",") if part)
        return {key: _convert(inner[1], value) for key, _, value in pairs}
    if kind is bool:
        if text.lower() not in BOOLS:
            raise ValueError(text)
        return BOOLS[text.lower()]
    if kind is int and float(text) == int(float(text)):             # 1e9 and 524_288 are whole
        return int(float(text)) if "e" in text.lower() else int(text)
    return kind(text)


def _type_name(kind: Any) -> str:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "|".join(inner)
    if origin in (typing.Union, types.UnionType):
        return "|".join("none" if arg is type(None) else _type_name(arg) for arg in inner)
    if origin is tuple:
        return f"{_type_name(inner[0])},..."
    if origin is dict:
        return f"name:{_type_name(inner[1])},..."
    return "true|false" if kind is bool else kind.__name__


def _spell(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def _unknown(name: str, known: dict[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    # "n_layer" is what a nanoGPT user types for "model.n_layer"
    near = [key for key in known if key.rpartition(".")[2] == name] or near
    hint = f"did you mean --{near[0]}?" if near else "--help lists them all"
    return f"unknown setting --{name}; {hint}"

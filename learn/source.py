"""Functions of the project: cut out of its files by name, and exchanged while it runs.

A place is "model.py:CausalSelfAttention.forward". Files are read as they are, so that an exercise
is always today's source.
"""
import ast
import contextlib
import importlib
import inspect
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Callable, Iterator

REPOSITORY = Path(__file__).parent.parent


def function_at(place: str) -> tuple[ModuleType, Callable]:
    """The module of a place, and its function without decorators."""
    file, _, dotted = place.partition(":")
    module = found = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    for name in dotted.split("."):
        found = getattr(found, name)
    return module, inspect.unwrap(found)


def solution(place: str) -> str:
    """The function as it stands in the source, without decorators and indentation."""
    text = textwrap.dedent(inspect.getsource(function_at(place)[1]))
    return "\n".join(text.splitlines()[ast.parse(text).body[0].lineno - 1:]) + "\n"


def stub(place: str) -> str:
    """What the function needs of its module, its signature and docstring; no body."""
    module, text = function_at(place)[0], solution(place)
    node = ast.parse(text).body[0]
    used = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)} & vars(module).keys()
    lines = ["import torch\n"] if hasattr(module, "torch") else []
    if used := sorted(used - {"torch"}):
        lines.append(f"from {module.__name__} import {', '.join(used)}")
    return "\n".join([*lines, "", "", *text.splitlines()[:node.body[0].end_lineno],
                      "    raise NotImplementedError('the body is yours')", ""])


def changed(place: str, swaps: tuple[str, ...]) -> Callable:
    """The function of a place with words of its source exchanged: old, new, old, new ..."""
    (module, function), text = function_at(place), solution(place)
    for old, new in zip(swaps[::2], swaps[1::2]):
        text = text.replace(old, new)
    names = dict(vars(module))
    exec(text, names)
    return names[function.__name__]


@contextlib.contextmanager
def replaced(function: Callable, by: Callable) -> Iterator[None]:
    """Inside, all that holds `function` calls `by`: its code is exchanged, not its name, so that
    `from bpe import merge`, tables of functions and decorators have the new one too."""
    def stand_in(*values, _by, **words):
        return _by(*values, **words)

    kept = function.__code__, function.__kwdefaults__
    function.__code__, function.__kwdefaults__ = stand_in.__code__, {"_by": by}
    try:
        yield
    finally:
        function.__code__, function.__kwdefaults__ = kept

"""Imports point down only, those inside functions included: held by reading every import."""
import ast
import functools
import json
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
# From the bottom up. A module imports from rows below its own, and within its row where no circle
# comes of it; nothing of `fast` or `formats` knows a row above.
HOUSE = [("fast", "formats"), ("model", "bpe", "lora", "optim"), ("run",),
         ("sample", "eval", "data"), ("train",), ("bench", "experiments", "learn", "notebooks")]
ROW = {room: number for number, rooms in enumerate(HOUSE) for room in rooms}
LESSONS = ("model", "bpe", "lora", "optim")     # each stands alone: none imports another


@functools.cache
def modules():
    """{"run.config": its syntax tree} of every module but the tests."""
    return {path.relative_to(REPOSITORY).with_suffix("").as_posix().replace("/", "."):
            ast.parse(path.read_text(encoding="utf-8"))
            for pattern in ("*.py", *(f"{room}/**/*.py" for room in ROW))
            for path in REPOSITORY.glob(pattern)}


def imports(tree, known):
    """Modules of ours that a tree imports, at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            inner = [f"{node.module}.{name.name}" for name in node.names]
            yield from (name for name in inner if name in known)
            if node.module in known and not all(name in known for name in inner):
                yield node.module


def arrows():
    """{module: the modules of ours that it imports}."""
    known = modules()
    return {name: set(imports(tree, known)) - {name} for name, tree in known.items()}


def room(name):
    return name.split(".")[0]


def circles(graph):
    """The modules that can be reached from themselves."""
    reach = {name: set(found) for name, found in graph.items()}
    for middle in reach:
        for found in reach.values():
            if middle in found:
                found |= reach[middle]
    return sorted(name for name, found in reach.items() if name in found)


def test_imports_point_down_only():
    wrong = [f"{name} -> {other}" for name, found in arrows().items() for other in found
             if ROW[room(other)] > ROW[room(name)]
             or room(name) in LESSONS and room(other) in LESSONS]
    assert wrong == []


def test_there_is_no_circle():
    assert circles(arrows()) == []


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == ["b", "c"]
    tree = ast.parse("def f():\n    from run import config\n    import model\n    import math")
    assert set(imports(tree, {"run.config", "model"})) == {"run.config", "model"}


def test_the_tokenizer_needs_no_torch():
    graph, seen = arrows(), {"bpe"}
    while new := {other for name in seen for other in graph[name]} - seen:
        seen |= new
    for name in seen:
        assert "torch" not in {room(word) for word in imports(modules()[name], {"torch"})}, name


@functools.cache
def fresh():
    """Of a fresh interpreter: the files that `import model` reads, packages' empty __init__.py
    aside; which parts of the compiler the commands import; whether has_compiler has an answer."""
    code = ("import json, sys, torch, model\n"
            "files = [name for name, module in sys.modules.items()"
            " if getattr(module, '__file__', None)]\n"
            "import lora, sample, train\n"
            "parts = {'torch._dynamo', 'torch.utils._triton'} & sys.modules.keys()\n"
            "from run.device import has_compiler\n"
            "print(json.dumps([files, list(parts), has_compiler(torch.device('cuda'))]))")
    return json.loads(subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True,
                                     capture_output=True, text=True).stdout)


def test_importing_the_model_loads_one_other_file():
    assert set(fresh()[0]) & modules().keys() == {"model", "fast.cross_entropy"}


def test_commands_begin_without_dynamo_which_comes_when_it_is_asked_for():
    """It takes as long to import as all of PyTorch, and `import torch` does not bring it."""
    assert fresh()[1] == [] and fresh()[2] in (True, False)


def test_the_model_knows_nothing_of_lora_and_the_loop_nothing_of_tasks():
    assert "lora" not in (REPOSITORY / "model.py").read_text().lower()
    assert "if task" not in (REPOSITORY / "train.py").read_text()

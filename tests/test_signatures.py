"""Documentation against the code: every public name has a docstring, every call that README.md,
docs/ and the heads of modules show fits its function, and README.md's Python runs."""
import ast
import importlib
import inspect
import re
import shlex
import textwrap
import types
import typing
from pathlib import Path

import pytest
import torch.nn as nn

import bpe
from model import GPT, GPTConfig
from run.presets import PRESETS

REPOSITORY = Path(__file__).parent.parent
MODULES = [path for folder in ("", "run", "fast", "formats", "data", "eval") for path in sorted(
    (REPOSITORY / folder).glob("*.py")) if path.name != "__init__.py"]
PAGES = [*sorted(REPOSITORY.glob("README*.md")),
         *sorted((REPOSITORY / "docs").glob("*.md"))]
OURS = {path.stem for path in REPOSITORY.glob("*.py")} | {"run", "fast", "formats", "data", "eval", "experiments", "bench"}


def name_of(path):
    return path.relative_to(REPOSITORY).with_suffix("").as_posix().replace("/", ".")


# ------------------------------------------------------------------------------- docstrings

def undocumented(body, prefix=""):
    """Public names without a docstring.

    Left out: `main` and `..._command`, whose manual is the module's docstring, printed by --help;
    settings, whose fields have comments (tests/test_config.py); setters, as their property has one.
    """
    for node in body:
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)) or node.name.startswith("_"):
            continue
        fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
        settings = isinstance(node, ast.ClassDef) and node.name.endswith("Config") and fields
        setter = any(ast.unparse(line).endswith(".setter") for line in node.decorator_list)
        command = not prefix and (node.name == "main" or node.name.endswith("_command"))
        if not (ast.get_docstring(node) or settings or setter or command):
            yield prefix + node.name
        if isinstance(node, ast.ClassDef):
            yield from undocumented(node.body, f"{prefix}{node.name}.")


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_public_name_has_a_docstring(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    assert list(undocumented(tree.body)) == []


def test_names_without_a_docstring_are_found():
    tree = ast.parse(textwrap.dedent('''
        def main(): pass
        def merge_command(): pass
        def _own(): pass
        def told():
            """What it does."""
        def untold(): pass
        class Config:
            a: int = 1  # meaning
        class Record:
            a: int = 1
            def length(self): pass
        '''))
    assert list(undocumented(tree.body)) == ["untold", "Record", "Record.length"]


# --------------------------------------------------------------------------- calls that are shown

class Calls(ast.NodeVisitor):
    """Walks through code that is shown, without running it; `wrong` are calls that do not fit.

    Known are names imported from our modules, and variables that hold what such a call returns, as
    far as annotations say. Everything else is passed over.
    """

    def __init__(self, names=()):
        self.names, self.instances, self.wrong, self.checked = dict(names), {}, [], 0

    def visit_ImportFrom(self, node):
        if node.module.split(".")[0] in OURS:
            module = importlib.import_module(node.module)
            for alias in node.names:
                if alias.name == "*":
                    shown = getattr(module, "__all__", vars(module))
                    self.names.update((name, getattr(module, name)) for name in shown)
                elif hasattr(module, alias.name):
                    self.names[alias.asname or alias.name] = getattr(module, alias.name)
                else:                                       # a module of a folder, or nothing
                    self.names[alias.asname or alias.name] = importlib.import_module(
                        f"{node.module}.{alias.name}")

    def visit_Import(self, node):
        for alias in node.names:
            if alias.name.split(".")[0] in OURS and "." not in alias.name:
                self.names[alias.asname or alias.name] = importlib.import_module(alias.name)

    def visit_Assign(self, node):
        self.generic_visit(node)
        returned = self.returned(node.value)
        for target in node.targets:
            several = isinstance(target, ast.Tuple)
            kinds = returned if several else [returned]
            for part, kind in zip(target.elts if several else [target], kinds or []):
                if isinstance(part, ast.Name):
                    self.names.pop(part.id, None)
                    self.instances.pop(part.id, None)
                    if isinstance(kind, type):
                        self.instances[part.id] = kind

    def visit_Call(self, node):
        self.generic_visit(node)
        function, bound = self.resolved(node.func)
        if not callable(function) or not getattr(function, "__module__", "").split(".")[0] in OURS:
            return
        values = [None] * bound + [None for part in node.args if not isinstance(part, ast.Starred)]
        words = {word.arg: None for word in node.keywords if word.arg}
        whole = len(words) == len(node.keywords) and not any(
            isinstance(part, ast.Starred) for part in node.args)
        signature = inspect.signature(function)
        self.checked += 1
        try:
            (signature.bind if whole else signature.bind_partial)(*values, **words)
        except TypeError as error:
            self.wrong.append(f"{ast.unparse(node)}: {error}")

    def resolved(self, node):
        """(what an expression of names and dots stands for, or None; whether it wants a self)."""
        if isinstance(node, ast.Name):
            kind = self.instances.get(node.id)
            if kind is not None:                            # an instance that is called
                return (kind.forward, True) if issubclass(kind, nn.Module) else (None, False)
            return self.names.get(node.id), False
        if not isinstance(node, ast.Attribute):
            return None, False
        if isinstance(node.value, ast.Name) and node.value.id in self.instances:
            kind = self.instances[node.value.id]
            if not hasattr(kind, node.attr):
                if f"self.{node.attr} =" not in inspect.getsource(kind):
                    self.wrong.append(f"{kind.__name__} has no {node.attr}")
                return None, False
            raw = inspect.getattr_static(kind, node.attr)
            return getattr(kind, node.attr), isinstance(raw, types.FunctionType)
        holder, _ = self.resolved(node.value)
        if not isinstance(holder, (type, types.ModuleType)):
            return None, False
        if not hasattr(holder, node.attr):
            self.wrong.append(f"{ast.unparse(node)} does not exist")
            return None, False
        return getattr(holder, node.attr), False

    def returned(self, node):
        """The class of what a call returns, or a list of classes; None where nothing says it."""
        function = self.resolved(node.func)[0] if isinstance(node, ast.Call) else None
        if isinstance(function, type):
            return function if function.__module__.split(".")[0] in OURS else None
        if not isinstance(function, types.FunctionType):
            return None
        kind = typing.get_type_hints(function).get("return")

        def plain(kind):                                    # of X | Y the first
            return next((part for part in typing.get_args(kind) or [kind]
                         if isinstance(part, type)), None)
        if typing.get_origin(kind) is tuple:
            return [plain(part) for part in typing.get_args(kind)]
        return plain(kind) if typing.get_origin(kind) in (None, types.UnionType) else None


def wrong_calls(code, names=()):
    """(calls that do not fit, number of calls that were checked)."""
    calls = Calls(names)
    calls.visit(ast.parse(code))
    return calls.wrong, calls.checked


def shown_in(docstring):
    """The Python in a module's docstring: indented paragraphs, or lines of them, that parse."""
    lines = []
    for paragraph in re.split(r"\n\s*\n", docstring):
        code = textwrap.dedent(paragraph)
        if not paragraph.startswith("    "):
            continue
        code = "\n".join(line[4:] for line in code.splitlines() if line.startswith(">>> ")) or code
        for part in [code] if parses(code) else code.splitlines():
            if parses(part):
                lines.append(part)
    return "\n".join(lines)


def parses(code):
    try:
        return bool(ast.parse(code))
    except SyntaxError:
        return False


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_calls_at_the_head_of_a_module_fit_its_functions(path):
    module = importlib.import_module(name_of(path))
    assert wrong_calls(shown_in(module.__doc__), vars(module))[0] == []


def test_heads_show_calls():
    modules = [importlib.import_module(name) for name in ("model", "bpe", "lora", "optim")]
    assert all(wrong_calls(shown_in(module.__doc__), vars(module))[1] >= 2 for module in modules)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_calls_in_the_pages_fit_their_functions(page):
    text = page.read_text(encoding="utf-8")
    blocks = re.findall("```python\n(.*?)```", text, flags=re.S)
    blocks += [words[words.index("-c") + 1] for line in re.findall("`(python [^`]*-c [^`]*)`", text)
               if "-c" in (words := shlex.split(line))]
    for block in blocks:
        assert wrong_calls(block)[0] == []
    assert blocks or page.parent.name == "docs"


@pytest.mark.parametrize("code", [
    "from model import GPT, GPTConfig\nGPT(GPTConfig(n_layers=2))",
    "from model import GPT\nmodel = GPT.from_pretrained('gpt2', 0.0, None, 1)",
    "from model import GPT\nmodel = GPT.from_pretrained('gpt2')\nmodel.generate(idx)",
    "from model import GPT\nmodel = GPT.from_pretrained('gpt2')\nmodel(idx, labels=idx)",
    "from model import GPT\nmodel = GPT.from_pretrained('gpt2')\nmodel.sample(idx, 5)",
    "from sample import load_model\nmodel, tok = load_model('out/demo')\ntok.encode()",
    "from lora import LoRAConfig, add_lora\nadd_lora(model, rank=8)",
    "from data import corpus\ncorpus.prepare(corpus.CorpusConfig(text='x'))",
    "import bpe\nbpe.Tokenizer.trained('x', 300)",
])
def test_calls_that_do_not_fit_are_found(code):
    assert wrong_calls(code)[0]


# ------------------------------------------------------------------------------- README.md's Python

BLOCKS = re.findall("```python\n(.*?)```", PAGES[0].read_text(encoding="utf-8"), flags=re.S)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_the_python_of_the_readme_runs(number, tmp_path, monkeypatch, dataset):
    """As it stands, on stand-ins: a tiny preset `demo`, a tiny GPT-2, the tok.json of its text."""
    pytest.importorskip("safetensors")
    monkeypatch.chdir(tmp_path)
    tiny = dict(n_layer=1, n_head=2, n_embd=16, block_size=16)
    monkeypatch.setitem(PRESETS["demo"].settings, "data", str(dataset))
    for name, value in dict(model=tiny, batch_tokens=64, micro_batch=4, compile="off", device="cpu",
                            eval_every=50, save_every=50, sample_tokens=4).items():
        monkeypatch.setitem(PRESETS["demo"].settings, name, value)
    real = GPT.from_pretrained
    monkeypatch.setattr(GPT, "from_pretrained", staticmethod(
        lambda name, *settings, **more: GPT(GPTConfig(vocab_size=50257, **tiny))
        if name == "gpt2" else real(name, *settings, **more)))
    bpe.main(["train", str(tmp_path / "text.txt"), "--vocab-size=300", "--out=tok.json",
              "--num-proc=1"])
    exec(compile(BLOCKS[number], f"README.md, block {number}", "exec"), {"__name__": "readme"})

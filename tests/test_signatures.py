"""Documentation against the code: every public name has a docstring, every call that README.md,
docs/ and the heads of modules show fits its function, and the pages' Python runs."""
import ast
import importlib
import inspect
import io
import itertools
import re
import shlex
import textwrap
import tokenize
import types
import typing
from pathlib import Path

import pytest
import torch.nn as nn
from torch.nn import functional as F

from model import GPT, GPTConfig
from run.presets import PRESETS

REPOSITORY = Path(__file__).parent.parent
FOLDERS = ("run", "fast", "formats", "data", "eval", "learn")
MODULES = [path for folder in ("", *FOLDERS) for path in sorted((REPOSITORY / folder).glob("*.py"))
           if path.name != "__init__.py"]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
OURS = {path.stem for path in REPOSITORY.glob("*.py")} | {*FOLDERS, "experiments", "bench"}


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


def named_files(source):
    """Files of ours that comments and docstrings name."""
    lines = [token.string for token in tokenize.generate_tokens(io.StringIO(source).readline)
             if token.type == tokenize.COMMENT]
    lines += [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(source))
              if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    return set(re.findall(r"[\w/.]+\.(?:py|md|ipynb)\b", " ".join(lines))) - {"train_gpt2.py"}


def test_files_that_comments_and_docstrings_name_exist():
    paths = [*MODULES, *REPOSITORY.glob("bench/*.py"), *REPOSITORY.glob("experiments/*.py")]
    assert [(name_of(path), file) for path in paths for file in named_files(path.read_text())
            if not (REPOSITORY / file).exists() and not (path.parent / file).exists()] == []
    assert named_files('"""As in a.py."""\nb = "c.py"  # see d/e.md') == {"a.py", "d/e.md"}


# --------------------------------------------------------------------------- calls that are shown

def ours(thing):
    """Whether a function or class is of this repository."""
    return str(getattr(thing, "__module__", "")).split(".")[0] in OURS


def returned(function):
    """Classes of ours that a call returns, as annotations say; None for what they do not say."""
    if isinstance(function, type):
        return [function]
    kind = typing.get_type_hints(function).get("return") if inspect.isroutine(function) else None
    kinds = typing.get_args(kind) if typing.get_origin(kind) is tuple else [kind]
    plain = [next(iter(typing.get_args(kind)), kind) for kind in kinds]     # of X | Y the first
    return [kind if isinstance(kind, type) and ours(kind) else None for kind in plain]


def wrong_calls(code, names=()):
    """(calls of our functions that do not fit, number of calls that were checked) of code that is
    shown; only its imports run. Variables stand for what a call returned, as an empty object."""
    names, wrong, checked = dict(names), [], 0

    def resolved(node):
        """What an expression of names and dots stands for; None where that is not known."""
        if isinstance(node, ast.Name):
            return names.get(node.id)
        holder = resolved(node.value) if isinstance(node, ast.Attribute) else None
        if holder is None or hasattr(holder, node.attr):
            return getattr(holder, node.attr, None) if holder is not None else None
        named = isinstance(holder, (type, types.ModuleType))
        if f"self.{node.attr} =" not in inspect.getsource(holder if named else type(holder)):
            wrong.append(f"{ast.unparse(node)} does not exist")

    class Visitor(ast.NodeVisitor):
        def visit_Import(self, node):
            if (getattr(node, "module", None) or node.names[0].name).split(".")[0] in OURS:
                exec(ast.unparse(node), names)

        visit_ImportFrom = visit_Import

        def visit_Assign(self, node):
            self.generic_visit(node)
            function = resolved(node.value.func) if isinstance(node.value, ast.Call) else None
            targets = getattr(node.targets[0], "elts", node.targets)
            kinds = returned(function) if ours(function) else []
            for target, kind in itertools.zip_longest(targets, kinds):
                if isinstance(target, ast.Name):
                    names.pop(target.id, None)
                    if kind:
                        names[target.id] = kind.__new__(kind)

        def visit_Call(self, node):
            nonlocal checked
            self.generic_visit(node)
            function = resolved(node.func)
            function = function.forward if isinstance(function, nn.Module) else function
            if not callable(function) or not ours(function):
                return
            words = {word.arg: None for word in node.keywords if word.arg}
            values = [part for part in node.args if not isinstance(part, ast.Starred)]
            whole = len(words) + len(values) == len(node.keywords) + len(node.args)
            signature, checked = inspect.signature(function), checked + 1
            try:
                (signature.bind if whole else signature.bind_partial)(*values, **words)
            except TypeError as error:
                wrong.append(f"{ast.unparse(node)}: {error}")

    Visitor().visit(ast.parse(code))
    return wrong, checked


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
    assert blocks or page.name not in ("README.md", "finetuning.md", "steps.md")


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


# ------------------------------------------------------------------------------- the pages' Python

BLOCKS = [(page.name, block) for page in PAGES if page.name != "README.zh-CN.md" for block
          in re.findall("```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)]


@pytest.mark.parametrize("page,code", BLOCKS, ids=[page for page, _ in BLOCKS])
def test_the_python_of_the_pages_runs(page, code, tmp_path, monkeypatch, dataset):
    """As it stands, on stand-ins: a tiny preset `demo`, a tiny GPT-2."""
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
    monkeypatch.setattr(GPT, "__init__", GPT.__init__)  # what a patch replaces is to be put back
    monkeypatch.setattr(F, "scaled_dot_product_attention", F.scaled_dot_product_attention)
    exec(compile(code, page, "exec"), {"__name__": "readme"})

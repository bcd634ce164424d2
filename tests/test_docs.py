"""The pages of docs/ and README.md keep their word: tables, names, commands, formulas."""
import ast
import dataclasses
import functools
import importlib
import re
import shlex
from pathlib import Path

import pytest

import bpe
import learn.__main__ as learn
import train
from eval.hellaswag import HellaSwagConfig
from eval.judge import JudgeConfig
from eval.loss import LossConfig
from experiments import compare
from run.config import parse, settings_of
from run.presets import DEFAULT_PRESET, PRESETS, follow

REPOSITORY = Path(__file__).parent.parent
PATHS = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md",
         *sorted((REPOSITORY / "docs").glob("*.md"))]
# What is said of the project as it is: LOG.md tells its past, README.zh-CN.md repeats README.md.
PAGES = {path.name: path.read_text(encoding="utf-8") for path in PATHS
         if path.name not in ("LOG.md", "README.zh-CN.md")}
STEPS = [[cell.strip() for cell in line.strip("| ").split(" | ")]
         for line in PAGES["steps.md"].splitlines() if line.startswith("| ")][1:]
TITLES = re.findall(r"^## \d{4}-\d\d-\d\d: (.+)$",
                    (REPOSITORY / "docs" / "LOG.md").read_text(encoding="utf-8"), re.M)
GUIDE = PAGES["finetuning.md"]
COMMAND = re.compile(r"(?:[A-Z_]+=\d+ )?(?:srun|torchrun|python|\.venv/bin/python|make|pip) [^`#]+")


def commands_of(page):
    """The commands of a page: lines of its blocks, and spans in its text and tables."""
    lines = [line for block in re.findall("```\n(.*?)```", page, flags=re.S)
             for line in block.replace("\\\n", "").splitlines()]
    spans = re.findall("`([^`]+)`", re.sub("```.*?```", "", page, flags=re.S).replace("\n", " "))
    return [match[0].strip() for text in lines + spans if (match := COMMAND.match(text))]


COMMANDS = list(dict.fromkeys(command for page in PAGES.values() for command in commands_of(page)))


# ---- names and commands

@functools.cache
def parsed(path):
    return ast.parse(path.read_text())


def defined(path, name):
    """Whether a file defines a dotted name: a class, function, method, field or constant."""
    body = parsed(path).body
    for part in name.split("."):
        found = [node for node in body if getattr(node, "name", None) == part
                 or isinstance(node, ast.Assign) and part in map(ast.unparse, node.targets)
                 or isinstance(node, ast.AnnAssign) and part == ast.unparse(node.target)]
        if not found:
            return False
        body = getattr(found[0], "body", [])
    return True


def check_command(command):
    """What is wrong in a command line raises; nothing is run."""
    words = shlex.split(command)
    if words[0].endswith("/python"):
        words[0] = "python"
    while words[0] == "srun" or "=" in words[0]:            # FOO=1 before a command
        words = words[1:]
    if words[0] == "torchrun":
        words = ["python", *words[next(i for i, w in enumerate(words) if w.endswith(".py")):]]
    if words[0] == "make":
        makefile = (REPOSITORY / "Makefile").read_text()
        for word in words[1:]:
            assert re.search(rf"^{re.escape(word.partition('=')[0])}( \?=|:)", makefile, re.M), word
        return
    if words[0] == "pip":
        assert words[1] == "install" and (REPOSITORY / words[words.index("-c") + 1]).exists()
        extra = re.fullmatch(r"\.\[(\w+)\]", words[-1])[1]
        assert re.search(f"^{extra} = ", (REPOSITORY / "pyproject.toml").read_text(), re.M), extra
        return
    assert words[0] == "python", command
    if words[1] == "-c":
        code = ast.parse(words[2])
        for node in ast.walk(code):
            if isinstance(node, ast.ImportFrom):
                assert (REPOSITORY / f"{node.module.replace('.', '/')}.py").exists(), command
    elif words[1:3] == ["-m", "timeit"]:
        for part in words[words.index("-s") + 1:]:
            ast.parse(part)
    elif words[1:3] == ["-m", "pytest"]:
        for test in (word for word in words[3:] if not word.startswith("-")):
            path, _, name = test.partition("::")
            assert defined(REPOSITORY / path, name) if name else (REPOSITORY / path).exists(), test
    elif words[1:3] == ["-m", "pydoc"]:
        assert (REPOSITORY / f"{words[3]}.py").exists()
    elif words[1] == "-m":
        check_module(words[2], words[3:])
    else:
        assert words[1].endswith(".py"), command
        check_module(words[1].removesuffix(".py"), words[2:])


def check_module(name, words):
    """The words of one of our commands: RUNs and FILEs come first, then settings."""
    path = REPOSITORY / name.replace(".", "/")
    name += ".__main__" if (path / "__main__.py").exists() else ""
    count = next((i for i, word in enumerate(words) if word.startswith("-")), len(words))
    names, flags = words[:count], [word for word in words[count:] if word != "--help"]
    if name == "train":
        base = PRESETS[names[0] if names else DEFAULT_PRESET].settings
        parse(train.TrainConfig, names[1:] + flags, "train.py", base, follow=follow)
        return
    if name == "experiments.compare":
        compare.read(words)
        return
    if name == "learn.__main__":
        learn.read(["attention" if word == "NAME" else word for word in words])
        return
    if name == "bpe":
        bpe.parse(words, bpe.__doc__, bpe.COMMANDS)         # exits where a word is wrong
        return
    if name.startswith("tests."):                           # its flags are argparse's
        source = path.with_suffix(".py").read_text()
        assert all(f'"{flag.partition("=")[0]}"' in source for flag in flags), words
        return
    if (name, names[:1]) == ("data.chat", ["inspect"]):
        name = "data.inspect_chat"
    module = importlib.import_module(name)
    assert module.main
    if names and name == "data.chat":
        assert f'"{names[0]}"' in Path(module.__file__).read_text(), names[0]
    configs = [value for value in vars(module).values() if dataclasses.is_dataclass(value)
               and value.__module__ == module.__name__ and value.__name__.endswith("Config")]
    assert len(configs) <= 1, name
    for config in configs:
        try:
            parse(config, flags, name)
        except ValueError as error:                         # a config may want what --help does not
            assert words == ["--help"] or not flags and "missing" in str(error), error
    assert configs or not flags, f"{name} takes no settings"


def test_pages_show_commands_and_name_places():
    assert len(COMMANDS) >= 60
    for name in ("finetuning.md", "scaling.md", "steps.md"):
        assert re.search(r"`[\w/]+\.py:[\w.]+`", PAGES[name]), name


@pytest.mark.parametrize("page", PAGES)
def test_named_files_functions_and_settings_exist(page):
    text = re.sub("```.*?```", "", PAGES[page], flags=re.S)
    spans = re.findall(r"`([^`\n]+)`", text)
    for file, name in (span.split(":") for span in spans
                       if re.fullmatch(r"[\w/]+\.py:[\w.]+", span)):
        assert defined(REPOSITORY / file, name), f"{file}:{name}"
    for file in (span for span in spans if re.fullmatch(r"[\w/]+\.py|\w+/[\w/.-]+", span)):
        if not file.startswith("out/"):                 # what the commands make
            assert (REPOSITORY / file).exists(), file
    settings = {name for config in (train.TrainConfig, LossConfig, JudgeConfig, HellaSwagConfig,
                                            compare.CompareConfig)
                for name in settings_of(config)} | {"help", "set"}      # a field set_
    for flag in (span for span in spans if re.match(r"--[\w.]+(=|$)", span)):
        assert flag[2:].partition("=")[0] in settings, flag


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings_that_exist(path):
    for link in re.findall(r"\]\((?!http)([^)]*)\)", path.read_text(encoding="utf-8")):
        file, _, heading = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        assert not heading or re.search(f"^#+ {heading.replace('-', ' ')}$", target.read_text(),
                                        re.M | re.I), link


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_can_be_parsed(command):
    check_command(command)


@pytest.mark.parametrize("command", [
    "python train.py gpt2-125m", "python train.py demo --max_step=3",
    "python -m data.corpus --form=x", "python -m pytest -q tests/test_model.py::test_nothing",
    "python -c 'from nowhere import *'", "python -c 'print('", "make trains",
    "make PYTHONS=3 train",
    'pip install -c constraints.txt -e ".[dataset]"', "python sample.py out/demo --chats",
    "python bpe.py train FILE --vocabulary=300 --out=a",
    "python -m data.chat inspect FILE --templates=chatml", "python -m eval out/demo --model=gpt2",
    "python -m run.export out/demo --to=x", "python -m eval.nothing",
    "python -m tests.test_fuzz --input=3",
    "python -m experiments.compare demo --set=optim.optimiser=muon",
    "python -m learn start atention",
    "FOO=1 torchrun --nproc_per_node=8 train.py gpt2-124m --shards=fsdp"])
def test_the_check_of_commands_finds_what_is_wrong(command):
    with pytest.raises((AssertionError, KeyError, ValueError, SyntaxError, ImportError,
                        SystemExit)):
        check_command(command)


def test_every_step_has_a_place_a_command_and_a_marked_effect():
    assert len(STEPS) >= 24
    for step in STEPS:
        assert len(step) == 5, step
        assert step[3].startswith("`") and step[3].endswith("`")
        assert re.match("(measured|published): ", step[4]), step


# ---- the guide to fine-tuning

def cells(line):
    return [cell.strip() for cell in line.strip("| ").split(" | ")]


def test_every_experiment_that_the_guide_names_is_in_the_log():
    named = re.findall(r'LOG\s"([^"]+)"', GUIDE)
    assert len(set(named)) >= 4
    for title in named:
        assert " ".join(title.split()) in TITLES, title


def test_every_advice_in_the_guide_is_marked_with_what_it_rests_on():
    settings = [cells(line) for line in GUIDE.split("## Settings")[1].split("\n## ")[0].splitlines()
                if line.startswith("| ")][1:]
    assert len(settings) >= 10
    for row in settings:
        assert len(row) in (3, 4), row                      # an empty last cell falls away
        assert re.search(r"study|not varied|`[\w/]+\.(py|ipynb)`", row[2]), row
    rows = [cells(line) for part in ("Advice in circulation", "Data")
            for line in GUIDE.split(f"## {part}\n")[1].split("\n## ")[0].splitlines()
            if line.startswith("| ")]
    advice = [row for row in rows if row[0] not in ("advice", "question")]
    assert len(advice) >= 15
    for row in advice:
        assert re.search(r"\*\*(measured|published|untested)\*\*", row[-1]), row
        if "**measured**" in row[-1]:
            assert re.search(r'study|LOG "', row[-1]), row
        if "**published**" in row[-1]:
            assert re.search(r"\d{4}\.\d{5}|et al\.", row[-1]), row

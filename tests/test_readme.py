"""The READMEs keep their word: files, tests and names in them exist, and the two say the same."""
import re
from pathlib import Path

import pytest

from optim import SCHEDULES

REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
CHINESE = (REPOSITORY / "docs" / "README.zh-CN.md").read_text(encoding="utf-8")
PAGES = {"README.md": README, "README.zh-CN.md": CHINESE}


def test_the_map_names_every_source_file_with_its_length():
    rows = dict(re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", README, flags=re.M))
    files = [path for folder in ("", "data", "eval", "experiments", "bench")
             for path in (REPOSITORY / folder).glob("*.py") if path.name != "__init__.py"]
    assert rows.keys() == {path.relative_to(REPOSITORY).as_posix() for path in files}
    for name, lines in rows.items():                    # `python -m bench.readme` counts anew
        found = len((REPOSITORY / name).read_text().splitlines())
        assert abs(found - int(lines)) <= max(10, found // 10), name


def test_every_notebook_and_page_is_listed():
    for path in [*REPOSITORY.glob("notebooks/*.ipynb"), *REPOSITORY.glob("docs/*.md")]:
        name = path.relative_to(REPOSITORY).as_posix()
        for page in PAGES.values():
            assert f"| [{name}]({name}) |" in page, name


@pytest.mark.parametrize("page", PAGES)
def test_links_tests_and_names_of_a_readme_exist(page):
    text = PAGES[page]
    for link in re.findall(r"\]\((?!http)([^)#]*)[^)]*\)", text):
        assert not link or (REPOSITORY / link).exists(), link
    for module in re.findall(r"python -m ([\w.]+)", text):
        if module.split(".")[0] in ("data", "eval", "experiments", "bench", "tests"):
            path = REPOSITORY / module.replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    tests = "".join(path.read_text() for path in (REPOSITORY / "tests").glob("test_*.py"))
    for test in re.findall(r"`(test_\w+)`", text):
        assert f"def {test}(" in tests, test
    for file, name in re.findall(r"`([\w/]+\.py)(?::(\w+))?`", text):
        assert (REPOSITORY / file).exists(), file
        assert name in (REPOSITORY / file).read_text(), f"{file}:{name}"


def test_places_to_change_things_are_there():
    """Each row of the table names a file and, after it, what is in that file."""
    table = README.split("## To change things")[1].split("\n## ")[0]
    rows = re.findall(r"^\| an? ([\w ]+) \| (.*?) \|", table, flags=re.M)
    assert len(rows) >= 9 and {"optimizer", "schedule", "LoRA variant", "data set"} <= {
        name for name, _ in rows}
    for _, touch in rows:
        sources = "".join((REPOSITORY / file).read_text()
                          for file in re.findall(r"`([\w/]+\.py)", touch))
        for name in re.findall(r"`(?:[A-Z]\w+\.)?(\w+)`", touch):
            assert re.search(rf"\b{name}\b", sources), name
    assert SCHEDULES.keys() == set(re.findall(r'"(\w+)"', re.search(
        r"schedule: Literal\[(.*?)\]", (REPOSITORY / "train.py").read_text())[1]))


# ---- the two READMEs

NUMBER = r"(?<![\w.-])(?:[0-9][0-9,.]*[0-9]|[0-9])"

def generated_left_out(text):
    return re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", "", text, flags=re.S)


def outline(text):
    """Levels of headings, blocks of code without comments, rows and cells of tables, in order."""
    found, code = [], None
    for line in generated_left_out(text).splitlines():
        if line.startswith("```"):
            code = [line] if code is None else found.append(code)
        elif code is not None:
            code.append(re.sub(r"\s*#( .*)?$", "", line))
        elif heading := re.match("#+ ", line):
            found.append(heading[0])
        elif line.startswith("|"):
            cells = re.findall(rf"`.*?`|\]\([^)]*\)|{NUMBER}", line, re.A)
            found.append((line.count(" |"), sorted(cells)))
        else:
            found += re.findall(r"\]\([^)#]*\)", line)
    return [part for part in found if not str(part).startswith("](README")]


def test_both_readmes_have_the_same_sections_code_tables_and_links():
    assert outline(CHINESE) == outline(README)


@pytest.mark.parametrize("old,new", [
    ("\n## ", "\n### "), ("--lora.r=8", "--lora.r=4"), ("| a preset |", "| `a` preset |"),
    ("summary = train(config)", "summary = train()"), ("](docs/steps.md)", "](docs/step.md)"),
    ("\nmake test ", "\nmake tests ")])
def test_a_readme_that_is_out_of_step_is_found(old, new):
    assert old in README
    assert outline(README.replace(old, new, 1)) != outline(README)


def test_figures_in_the_text_of_both_readmes_are_the_same():
    def figures(text):
        text = re.sub("```.*?```|^\\|.*?$|\\]\\(.*?\\)", "", generated_left_out(text),
                      flags=re.S | re.M)
        return sorted(re.findall(NUMBER, text, flags=re.A))
    assert figures(CHINESE) == figures(README)

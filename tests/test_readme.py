"""README.md, its Chinese twin, the promises and CONTRIBUTING.md keep their word: what they name
exists, figures are those of bench/results, and the two READMEs say the same."""
import ast
import json
import posixpath
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
README, CHINESE, PROMISES, CONTRIBUTING = (
    (REPOSITORY / name).read_text(encoding="utf-8")
    for name in ("README.md", "docs/README.zh-CN.md", "docs/promises.md", "CONTRIBUTING.md"))


def rows_of(text, columns):
    """The rows of a text's tables that have so many columns, as lists of cells, without heads."""
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines()
            if line.startswith("| ")]
    return [row for row in rows if len(row) == columns]


def test_the_readme_is_short_and_names_the_test_command():
    assert len(README.splitlines()) <= 150
    assert "\nmake test " in README


def test_the_map_names_every_lesson_and_folder():
    ignored = (REPOSITORY / ".gitignore").read_text().split()
    there = {path.name + "/" * path.is_dir() for path in REPOSITORY.iterdir()
             if (path.is_dir() or path.suffix == ".py") and not path.name.startswith((".", "_"))}
    there -= {name for name in there if name in ignored or name.endswith(".egg-info/")}
    for page in (README, CHINESE):
        assert there == set(re.findall(r"^\| `(\w+(?:\.py|/))` \|", page, re.M))


def test_every_page_is_listed():
    """Pages in both READMEs, in Chinese where they have a twin; notebooks by tests/test_course.py."""
    for path in (REPOSITORY / "docs").glob("*.md"):
        name = path.relative_to(REPOSITORY).as_posix()
        if name.endswith(".zh-CN.md"):
            assert path.name == "README.zh-CN.md" or Path(str(path).replace(".zh-CN", "")).exists()
            continue
        twin = path.with_suffix(".zh-CN.md")
        assert f"| [{name}]({name}) |" in README, name
        assert f"| [{name}]({(twin if twin.exists() else path).name}) |" in CHINESE, name


def known_tests():
    """{test: whether it is only slow} of every test function."""
    found = {}
    for path in (REPOSITORY / "tests").glob("test_*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                found[node.name] = "pytest.mark.slow" in map(ast.unparse, node.decorator_list)
    return found


@pytest.mark.parametrize("page", [PROMISES, CONTRIBUTING], ids=["promises", "CONTRIBUTING"])
def test_every_test_that_is_named_exists(page):
    there = known_tests()
    named = re.findall(r"`(test_\w+)`", page)
    assert len(named) >= 9 and there.keys() >= set(named), set(named) - there.keys()


def test_every_promise_names_a_test_and_says_when_it_is_only_slow():
    there, rows = known_tests(), [row for row in rows_of(PROMISES, 2) if row[1] != "test"]
    assert len(rows) >= 18
    for promise, tests in rows:
        quick = re.findall(r"`tests/test_\w+\.py`", tests)
        quick += [name for name in re.findall(r"`(test_\w+)`", tests) if not there[name]]
        assert re.search("`(tests/)?test_", tests), promise
        assert bool(quick) != ("**slow**" in promise), promise


def test_places_to_change_things_are_there():
    """Each row of the table names a file and, after it, what is in that file."""
    rows = [row for row in rows_of(CONTRIBUTING, 3) if re.match("an? ", row[0])]
    assert len(rows) >= 9 and {"an optimizer", "a schedule", "a LoRA variant", "a data set"} <= {
        name for name, *_ in rows}
    for _, touch, _ in rows:
        sources = "".join((REPOSITORY / file).read_text(encoding="utf-8")
                          for file in re.findall(r"`([\w/]+\.py)", touch))
        for name in re.findall(r"`(?:[A-Z]\w+\.|[\w/]+\.py:)?(\w+)`", touch):
            assert re.search(rf"\b{name}\b", sources), name


# ---- the figures of the table

NUMBER = r"(?<![\w.-])(?:[0-9][0-9,.]*[0-9]|[0-9])"


def numbers_in(value):
    """Every number of a JSON file."""
    if isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from numbers_in(part)
    elif isinstance(value, (int, float)):
        yield value


def test_figures_of_the_readme_are_those_that_their_command_wrote():
    rows = [row for row in rows_of(README, 4) if "bench." in row[3]]
    assert len(rows) >= 5
    for what, *figures, command in rows:
        name = re.search(r"bench\.(\w+)", command)[1].replace("_", "-")
        written = [number for path in (REPOSITORY / "bench" / "results").glob(f"{name}*.json")
                   for number in numbers_in(json.loads(path.read_text()))]
        for figure in re.findall(NUMBER, " ".join(figures)):
            decimals = len(figure.partition(".")[2])
            assert figure in {f"{number:,.{decimals}f}" for number in written}, (what, figure)


# ---- the two READMEs

def links(text, folder):
    """Where the links of a page lead, from the repository's root, those to a page in Chinese to
    that in English; but for those to the page's twin."""
    found = [posixpath.normpath(posixpath.join(folder, link)).replace(".zh-CN.md", ".md")
             for link in re.findall(r"\]\(([^)#]*)\)", text)]
    return [link for link in found if not posixpath.basename(link).startswith("README")]


def outline(text, folder=""):
    """Levels of headings, blocks of code without comments, cells of tables, links, in order."""
    found, code = [], None
    for line in text.splitlines():
        if line.startswith("```"):
            code = [line] if code is None else found.append(code)
        elif code is not None:
            code.append(re.sub(r"\s*#( .*)?$", "", line))
        elif heading := re.match("#+ ", line):
            found.append(heading[0])
        elif line.startswith("|"):
            cells = re.findall(rf"`.*?`|{NUMBER}", re.sub(r"\]\([^)]*\)", "", line), re.A)
            found.append((line.count(" |"), sorted(cells), links(line, folder)))
        else:
            found += links(line, folder)
    return found


def test_both_readmes_have_the_same_sections_code_tables_and_links():
    assert outline(CHINESE, "docs") == outline(README)


@pytest.mark.parametrize("old,new", [
    ("\n## ", "\n### "), ("--lora.r=8", "--lora.r=4"), ("`data/` | text", "`data` | text"),
    ("summary = train(config)", "summary = train()"), ("](docs/steps.md)", "](docs/step.md)"),
    ("| 877 ms", "| 878 ms"), ("\nmake test ", "\nmake tests ")])
def test_a_readme_that_is_out_of_step_is_found(old, new):
    assert old in README
    assert outline(README.replace(old, new, 1)) != outline(README)


def test_figures_in_the_text_of_both_readmes_are_the_same():
    def figures(text):
        text = re.sub("```.*?```|^\\|.*?$|\\]\\(.*?\\)", "", text, flags=re.S | re.M)
        return sorted(re.findall(NUMBER, text, flags=re.A))
    assert figures(CHINESE) == figures(README)

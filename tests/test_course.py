"""The way through (docs/learn.md), the questions and the steps keep their word: whatever they name
is there, and both languages say the same."""
import functools
import json
import re
from pathlib import Path

import pytest
import torch

from tests.test_docs import STEPS, TITLES, defined

REPOSITORY = Path(__file__).parent.parent
DOCS = REPOSITORY / "docs"
PAGES = {name: (DOCS / name).read_text(encoding="utf-8") for name in
         ("learn.md", "learn.zh-CN.md", "questions.md", "questions.zh-CN.md", "steps.md")}
LINK = r"\[[^\]]*\]\(([^)#]*)(?:#[^)]*)?\)"


@functools.cache
def sections(path):
    """The headings of a notebook or a page; of the log the titles without their dates."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"]
                         if cell["cell_type"] == "markdown")
    return TITLES if path.name == "LOG.md" else re.findall("^#+ (.+)$", text, re.M)


def evidence(text):
    """What a line names: (kind, place, name) of sections of notebooks, entries of the log,
    functions and pages; ValueError for one that is not there."""
    found = []
    for link, quoted in re.findall(LINK + r'(?: "((?:[^"`]|`[^`]*`)+)")?', text):
        target = (DOCS / link).resolve()
        if not target.is_file():
            raise ValueError(f"there is no {link}")
        if quoted and quoted not in sections(target):
            raise ValueError(f"{link} has no {quoted!r}")
        found.append(("section", target.name, quoted))
    for file, name in re.findall(r"`([\w/]+\.py)(?::([\w.]+))?`", text):
        path = REPOSITORY / file
        if not path.is_file() or name and not defined(path, name):
            raise ValueError(f"there is no {file}, or no {name} in it")
        found.append(("code", file, name))
    return found


def questions(page):
    """{number: (question, answer, evidence, what goes wrong)} of a page of questions."""
    return {int(number): lines for number, *lines in re.findall(
        r"^\*\*(\d+)\. (.+)\*\*\n- (.+)\n- (.+)\n- (.+)$", PAGES[page], re.M)}


ENGLISH, CHINESE = questions("questions.md"), questions("questions.zh-CN.md")


def test_both_languages_have_the_same_questions_and_evidence():
    assert list(ENGLISH) == list(CHINESE) == list(range(1, len(ENGLISH) + 1)) and len(ENGLISH) > 150
    for page in ("questions.md", "questions.zh-CN.md"):
        assert PAGES[page].count("\n**") == len(ENGLISH), page          # none in another form
    for number, (question, answer, shown, wrong) in ENGLISH.items():
        theirs = CHINESE[number]
        same = re.sub(r"\.zh-CN", "", theirs[2].replace("；", "; "))
        assert shown.removeprefix("Evidence: ") == same.removeprefix("依据："), number
        assert wrong.startswith("Goes wrong: ") and theirs[3].startswith("易错："), number
        for text in (theirs[0] + theirs[1], theirs[3]):
            assert re.search("[\u4e00-\u9fff]", text), number
    assert PAGES["questions.md"].count("\n## ") == PAGES["questions.zh-CN.md"].count("\n## ")


@pytest.mark.parametrize("number", ENGLISH)
def test_every_answer_names_evidence_that_exists(number):
    found = evidence(ENGLISH[number][2])
    assert found and all(name for _, place, name in found                   # a section, not a book
                         if place.endswith(".ipynb") or place == "LOG.md"), ENGLISH[number][0]


@pytest.mark.parametrize("text", [
    '[02](../notebooks/02_tokenizer.ipynb) "What does BPE not do?"', "`model.py:GPT.nothing`",
    '[LOG](LOG.md) "an experiment that was never made"', "`nowhere.py`", "[x](nothing.md)",
    "`train.py:TrainConfig.no_such_setting`"])
def test_evidence_that_is_not_there_is_found(text):
    with pytest.raises(ValueError):
        evidence(text)


def stops(page):
    """[(places to open, minutes, numbers of questions)] of the stops of a page; what stands in
    quotes is a heading of one of the places."""
    found = []
    for stop in re.split(r"\n## (?=\d+\. )", PAGES[page])[1:]:
        stop = stop.split("\n## ")[0].replace("\n  ", " ").split("\n\nAfter")[0]
        opened, minutes, able = re.findall("^- (.+)$", stop, re.M)
        headings = [heading for link in re.findall(LINK, opened + "[](LOG.md)")
                    for heading in sections((DOCS / link).resolve())]
        quoted = re.findall('"([^"]+)"', re.sub("`[^`]*`", "", opened))    # but for commands
        assert set(quoted) <= set(headings), opened
        found.append((evidence(re.sub(' "[^"]+"', "", opened)), int(re.search(r"\d+", minutes)[0]),
                      [int(n) for n in re.findall(r"\d+", re.findall(r"[(（]([^()（）]*)[)）]", able)[-1])]))
    return found


def test_the_ten_stops_open_what_exists_and_lead_to_questions():
    english, chinese = stops("learn.md"), stops("learn.zh-CN.md")
    assert len(english) == 10
    for ours, theirs in zip(english, chinese, strict=True):
        assert sorted(ours[0], key=str) == sorted(theirs[0], key=str) and ours[0]
        assert ours[1] == theirs[1] and 10 <= ours[1] <= 60
        assert ours[2] == theirs[2] and set(ours[2]) <= set(ENGLISH)
    notebooks = {name for places, *_ in english for _, name, _ in places if name.endswith("ipynb")}
    assert notebooks == {path.name for path in (REPOSITORY / "notebooks").glob("*.ipynb")}


def test_both_languages_explain_the_same_words():
    words = [re.findall(r"^\| (.+?) \| (.+) \|$", PAGES[page], re.M)[2:]
             for page in ("learn.md", "learn.zh-CN.md")]
    assert len(words[0]) == len(words[1]) >= 30
    for (ours, _), (theirs, _) in zip(*words):              # the English word stands in both rows
        plain = re.sub(r"\W*\b(of|the|a|matrix|process|KV)\b\W*", " ", ours).strip()
        assert plain.split()[0].lower() in theirs.lower(), (ours, theirs)


def test_every_step_has_a_reason_and_the_lines_that_make_it():
    parts = dict(re.findall(r"^\*\*(.+?)\.\*\* (.+?)(?=^\*\*|\Z)", PAGES["steps.md"], re.M | re.S))
    assert list(parts) == [step[0] for step in STEPS]
    for name, _, where, *_ in STEPS:
        reason, diff = parts[name].split("```diff\n")
        lines = diff.split("\n```")[0].splitlines()
        assert len(reason.split()) >= 8 and 1 <= len(lines) <= 6, name
        source = "\n".join((REPOSITORY / file).read_text() for file in re.findall(r"`([\w/]+\.py)", where))
        squeezed = " ".join(re.sub(r"\s+#.*", "", source).split())
        for line in lines:
            assert line[:2] in ("+ ", "- ", "  "), line
            assert line[0] == "-" or " ".join(line[1:].split()) in squeezed, (name, line)
        assert any(line[0] == "+" for line in lines), name


def test_what_the_page_says_of_pytorch():
    x = torch.zeros(4, 6)
    assert not x[:, :4].is_contiguous() and x[:, :4].view(4, 2, 2).shape == (4, 2, 2)
    y = torch.zeros(2, 3, 5, 4).transpose(1, 2)             # (B, T, H, D) from (B, H, T, D)
    with pytest.raises(RuntimeError):
        y.view(2, 5, 12)
    assert y.reshape(2, 5, 12).shape == (2, 5, 12)
    m = torch.zeros(2, 3, 4)
    assert m.mT.shape == (2, 4, 3) and torch.zeros(3, 4).T.shape == (4, 3)
    layer = torch.nn.Linear(2, 2)
    layer.register_buffer("kept", torch.zeros(1))
    layer.register_buffer("made", torch.zeros(1), persistent=False)
    layer.listed, layer.loose = [torch.nn.Linear(2, 2)], torch.zeros(1)
    assert set(layer.state_dict()) == {"weight", "bias", "kept"}
    layer.eval()
    assert layer(torch.ones(1, 2)).requires_grad            # eval() keeps gradients
    assert torch.nn.Embedding(4, 2)(torch.zeros(2, dtype=torch.int32)).shape == (2, 2)
    assert torch.arange(3).dtype == torch.int64 and not hasattr(torch, "nograd")
    drop = torch.nn.Dropout(0.5)
    with torch.no_grad():
        assert (drop(torch.ones(1000)) == 0).any()          # no_grad() leaves dropout on

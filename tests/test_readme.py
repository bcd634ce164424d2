"""The README keeps its word: files, commands and settings that it names are there."""
import re
from pathlib import Path

import train
from config import settings_of
from presets import PRESETS

REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / "README.md").read_text()


def test_the_map_names_every_source_file_with_its_length():
    rows = dict(re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", README, flags=re.M))
    files = [path for folder in ("", "data", "eval", "experiments", "bench")
             for path in (REPOSITORY / folder).glob("*.py") if path.name != "__init__.py"]
    assert rows.keys() == {path.relative_to(REPOSITORY).as_posix() for path in files}
    for name, lines in rows.items():                    # `python -m bench.readme` counts anew
        found = len((REPOSITORY / name).read_text().splitlines())
        assert abs(found - int(lines)) <= max(10, found // 10), name


def test_commands_of_the_readme_name_things_that_exist():
    for module in re.findall(r"python -m ([\w.]+)", README):
        if module.split(".")[0] in ("data", "eval", "experiments", "bench"):
            path = REPOSITORY / module.replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    for name in re.findall(r"train\.py ([a-z0-9][\w-]*)", README):
        assert name in PRESETS, name
    flags = {flag for line in README.splitlines() if "train.py" in line     # torchrun's are before
             for flag in re.findall(r"--([\w.]+)", line.split("train.py", 1)[1])} - {"help", "key"}
    assert flags <= settings_of(train.TrainConfig).keys()
    tests = "".join(path.read_text() for path in (REPOSITORY / "tests").glob("test_*.py"))
    for test in re.findall(r"`(test_\w+)`", README):
        assert f"def {test}(" in tests, test

"""Exercises: functions of this project to write yourself, tried inside the project in seconds.

    python -m learn list                what there is, in order, with minutes
    python -m learn start attention     a file in exercises/: what is asked, signature, no body
    python -m learn check attention     your function in the project's place: what differs
    python -m learn hint attention      one hint
    python -m learn solution attention  the project's own function
"""
import contextlib
import difflib
import inspect
import os
import re
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, Iterator

import torch

from learn.exercises import EXERCISES, Exercise
from learn.source import REPOSITORY, changed, function_at, replaced, solution, stub
from run.config import run_command

FOLDER = Path("exercises")          # the reader's files, below where the command runs
COMMANDS = ("list", "start", "check", "hint", "solution")
LEAST = 10.0                        # seconds that a trial may take, or 20 times the project's own


def start(exercise: Exercise, path: Path) -> str:
    """Write the stub; a file that is there stays as it is."""
    if path.exists():
        raise ValueError(f"{path} is there and was left as it is; to begin again, rename it")
    path.parent.mkdir(exist_ok=True)
    words = f"{inspect.getdoc(exercise.trial)}\n\nThe project's own is {exercise.source}."
    path.write_text(f'"""{words}\n"""\n{stub(exercise.source)}', encoding="utf-8")
    return f"{path} says what to do; then: python -m learn check {path.stem}"


def trouble(exercise: Exercise, path: Path) -> str:
    """What is wrong with the function in a file; empty when nothing is."""
    place = exercise.place or function_at(exercise.source)[1]
    names, name = {"__name__": path.stem}, re.split(r"[:.]", exercise.source)[-1]
    text, began = path.read_text(encoding="utf-8"), time.monotonic()
    right, given, differs, what = list(exercise.trial()), [], "", "reading the file"
    try:
        with deadline(max(LEAST, 20 * (time.monotonic() - began)), path):
            exec(compile(text, path, "exec"), names)
            own, trial = names.get(name), exercise.trial()
            if not callable(own):
                return f"{path} has no function {name}"
            with replaced(place, own):
                for what, value in right:
                    given.append(next(trial)[1])
                    if differs := difference(given[-1], value):
                        break
    except (Exception, SystemExit) as error:
        return f"it stopped at: {what}\n  {where(error, path)}"
    if not differs:
        return ""
    for mistake, swaps in exercise.mistakes.items():
        with replaced(place, changed(exercise.source, swaps)):
            if not any(difference(a, b) for a, (_, b) in zip(given, exercise.trial())):
                differs += f"\n  That is what comes out when {mistake}."
                break
    return f"{len(given) - 1} of {len(right)} checks are right, then differs: {what}\n  {differs}"


def difference(found: Any, right: Any) -> str:
    """How two values differ, in numbers; empty where they do not."""
    right = torch.as_tensor(right).detach()
    try:
        found = torch.as_tensor(found).detach()
    except (TypeError, ValueError, RuntimeError):
        return f"it gave {found!r:.80}, which is no tensor and no list of numbers"
    if found.shape == right.shape:
        a, b = found.double(), right.double()       # rounding in float32 is below the tolerance
        wrong = ~torch.isclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
        if not wrong.any():
            return ""
        at = wrong.nonzero()[0].tolist()
        said = f"{a[tuple(at)]:.6g} instead of {b[tuple(at)]:.6g}"
        if at:
            said = (f"{wrong.sum()} of {wrong.numel()} numbers differ, by up to "
                    f"{(a - b).abs().max():.4g}; the first, at {at}, is {said}")
    else:
        said = f"the shape is {tuple(found.shape)}, not {tuple(right.shape)}"
    if right.dim() == 1 and max(found.numel(), right.numel()) <= 40:
        for name, values in (("yours ", found), ("wanted", right)):
            said += f"\n  {name}  {' '.join(f'{x:.5g}' for x in values.flatten().tolist())}"
    return said


def where(error: BaseException, path: Path) -> str:
    """The line that an error comes from, of the reader's file if it is in that."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError):
        return f"{path}, line {error.lineno}: {(error.text or '').strip()}\n  {text}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == str(path)]
    ours = [frame for frame in frames if frame.filename.startswith(str(REPOSITORY))
            and "site-packages" not in frame.filename]
    frame = (own or ours)[-1]
    return ("" if own else "what your function gave does not fit in ") + (
        f"{frame.filename.removeprefix(str(REPOSITORY) + os.sep)}, line {frame.lineno}: "
        f"{frame.line}\n  {text}")


@contextlib.contextmanager
def deadline(seconds: float, path: Path) -> Iterator[None]:
    """End the process, saying at which line it is, if what is inside takes longer."""
    reader = threading.get_ident()

    def end() -> None:
        frames = [frame for frame, _ in traceback.walk_stack(sys._current_frames()[reader])]
        frame = next((f for f in frames if f.f_code.co_filename == str(path)), frames[0])
        print(f"{path.stem}: an endless loop? It still runs after {seconds:.0f} seconds\n  at "
              f"{frame.f_code.co_filename}, line {frame.f_lineno}", flush=True)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def read(words: list[str]) -> tuple[str, str]:
    """Command and exercise, empty for list; ValueError for what is neither."""
    command, name = (*words, "", "")[:2]
    name = name.replace("-", "_")
    for what, word, known in (("command", command, COMMANDS), ("exercise", name, EXERCISES)):
        if word not in known and (command, word) != ("list", ""):
            near = difflib.get_close_matches(word, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"choose {', '.join(known)}"
            raise ValueError(f"there is no {what} {word!r}; {hint}" if word else
                             f"{command} which exercise? python -m learn list shows them")
    if len(words) > 2:
        raise ValueError(f"{words[2]!r} is one word too many; python -m learn COMMAND EXERCISE")
    return command, name


def main(words: list[str]) -> None:
    if not words or "--help" in words:
        print(__doc__)
        return
    torch.set_num_threads(1)                        # of use for these small models
    command, name = read(words)
    exercise, path = EXERCISES.get(name), FOLDER / f"{name}.py"
    if command == "list":
        for number, (name, exercise) in enumerate(EXERCISES.items(), 1):
            mark = "*" if (FOLDER / f"{name}.py").exists() else " "
            title = inspect.getdoc(exercise.trial).splitlines()[0]
            print(f"{number:2}{mark} {name:16}{exercise.minutes:3} min  {title}")
        print(f"{sum(e.minutes for e in EXERCISES.values())} minutes; * is begun, in {FOLDER}/. "
              f"Begin with: python -m learn start {next(iter(EXERCISES))}")
    elif command == "start":
        print(start(exercise, path))
    elif command == "hint":
        print(exercise.hint)
    elif command == "solution":
        print(f"# {exercise.source}\n{solution(exercise.source)}", end="")
    elif not path.exists():
        raise ValueError(f"there is no {path}; python -m learn start {name} makes it")
    elif wrong := trouble(exercise, path):
        print(f"{name}: {wrong}\n  A hint: python -m learn hint {name}")
        raise SystemExit(1)
    else:
        print(f"{name}: all checks are right. The project's own: python -m learn solution {name}")


if __name__ == "__main__":
    run_command(main)

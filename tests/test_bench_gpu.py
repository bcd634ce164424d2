"""bench.gpu: all its parts run, each leaves its rows in the file, and what fails costs one row."""
import json
import time

import pytest

from bench import gpu, machine, peers
from bench.gpu import PARTS, GPUConfig, Place


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder for results, on a machine whose limits are known at once."""
    monkeypatch.setattr(machine, "RESULTS", tmp_path)
    for module in (gpu, peers):
        for name in ("matmul_peak", "memory_bandwidth"):
            monkeypatch.setattr(module, name, lambda *_: 1e12)
    monkeypatch.setattr(gpu, "machine_state", lambda device: 1.0)
    monkeypatch.setattr(peers, "step_time", lambda step, device, repeats: machine.lasting(
        step, device))                                  # not as many as fill two seconds
    return lambda: json.loads(next(tmp_path.glob("gpu-cpu*.json")).read_text())


def test_all_parts_run_on_a_cpu_and_strict_runs_are_equal(results, capsys):
    gpu.main(["--device=cpu", "--tiny"])
    rows = results()["rows"]
    assert {row["part"] for row in rows} == {*PARTS} - {"larger"}
    assert not [row for row in rows if "missing" in row and row["what"] != "qlora"]
    assert [row["differences"] for row in rows if row["part"] == "exact"] == [0, 0]
    said = capsys.readouterr().out
    assert all(f"{part}:" in said for part in PARTS if part != "larger")


def test_what_fails_costs_a_row_and_each_part_leaves_the_file(results, monkeypatch):
    seen = []

    def fails(place):
        seen.append(results()["rows"])
        yield place.measured(lambda: 1 / 0)
    monkeypatch.setitem(PARTS, "exact", (fails, 0.1))
    gpu.main(["--device=cpu", "--tiny", "--parts=limits,exact"])
    assert [row["part"] for row in seen[0]] == ["limits"]
    assert results()["rows"][-1] == {"part": "exact",
                                     "missing": "ZeroDivisionError: division by zero"}


def test_a_measurement_ends_with_the_time_of_its_part():
    place = Place(GPUConfig(), "cpu", "float32", time.monotonic())
    assert place.measured(time.sleep, 60) == {"missing": "no time was left"}


@pytest.mark.parametrize("shape,fits,speeds,tried,best", [
    ("124M", 32, {32: 2.0, 16: 3.0, 8: 1.0}, [64, 32, 16, 8], 16),     # on while it is faster
    ("124M", 64, {64: 2.0, 32: 1.0}, [64, 32], 64),
    ("1558M", 8, {8: 1.0}, [64, 32, 16, 8], 8)])
def test_micro_batches_are_tried_from_the_largest_that_fits(monkeypatch, shape, fits, speeds, tried,
                                                            best):
    asked = []

    def measured(self, function, what, who, dtype, mode, kind, repeats, micro_batch, checkout):
        asked.append(micro_batch)
        if micro_batch > fits:
            return {"missing": "OutOfMemoryError: CUDA out of memory"}
        return {"who": who, "mode": mode, "micro_batch": micro_batch, "ms": 1.0, "work": 2,
                "limit": 10.0, "tokens_per_s": speeds[micro_batch], "memory_mib": 1.0}
    monkeypatch.setattr(Place, "measured", measured)
    monkeypatch.setattr(gpu, "peak_flops", lambda device: 20.0)
    row = gpu.step_row(Place(GPUConfig(), "cpu", "bfloat16", 0.0), shape, "oneloop")
    assert asked == tried and row["micro_batch"] == best
    assert (row["of_products"], row["mfu"]) == (speeds[best] / 5, speeds[best] / 10)

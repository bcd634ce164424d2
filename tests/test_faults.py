"""Runs that survive: whatever is killed, full, locked, hanging or not a number."""
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch

import ranks
from bench.kills import campaign, differences, settings_of, start
from ranks import exit_codes
from run import checkpoint
from run import log as report
from run import watch as faults
from run.config import build
from run.processes import Processes
from train import TrainConfig, train

REPOSITORY = Path(__file__).parent.parent
MODEL = dict(block_size=32, n_layer=2, n_head=2, n_embd=32, dropout=0.1)


@pytest.fixture
def settings(dataset, tmp_path):
    """Of a short run with everything in it: evaluations, samples, checkpoints, milestones."""
    return dict(data=str(dataset), out=str(tmp_path / "run"), max_steps=12, batch_tokens=16 * 32,
                micro_batch=4, learning_rate=1e-2, min_learning_rate=1e-3, warmup_steps=2,
                eval_every=4, save_every=2, milestone_every=4, log_every=2, dtype="float32",
                device="cpu", compile="off", sample_tokens=4, model=MODEL, timeout_minutes=1.0)


def printed(settings):
    return Path(settings["out"]).with_suffix(".txt").read_text()


def lines(out):
    return report.read_log(Path(out) / "log.jsonl")


# ---- killed

CALLS = [("fsync", 2), ("link", 1), ("computing", 7), ("evaluating", 8), ("saving", 12),
         *(pytest.param(name, n, marks=pytest.mark.slow) for name, last in
           (("replace", 40), ("fsync", 40), ("link", 3)) for n in range(1, last))]


@pytest.fixture(scope="module")
def peace(tmp_path_factory):
    """An undisturbed run, and its settings."""
    folder = tmp_path_factory.mktemp("peace")
    found = {**settings_of("pretraining", folder), "max_steps": 12, "eval_every": 4,
             "save_every": 2, "milestone_every": 4, "out": str(folder / "run")}
    assert exit_codes(ranks.plain, 1, found) == [0], printed(found)
    return found


@pytest.mark.parametrize("name,count", CALLS)
def test_a_run_killed_at_any_call_goes_on_as_if_nothing_had_been(peace, tmp_path, name, count):
    cut = {**peace, "out": str(tmp_path / "run")}
    died = exit_codes(ranks.dying_at, 1, cut, name, count)
    assert died == [-signal.SIGKILL] or count > 20 and died == [0]      # there are not so many
    assert exit_codes(ranks.plain, 1, cut) == [0], printed(cut)
    assert differences(Path(peace["out"]), Path(cut["out"])) == []


@pytest.mark.parametrize("kind,number", [("pretraining", 2), ("lora", 1)])
def test_runs_killed_at_random_moments_equal_one_that_was_not(tmp_path, kind, number):
    short = {**settings_of(kind, tmp_path), "max_steps": 16}
    counts = campaign(tmp_path, short, number, 3, random.Random())
    assert counts["exact"] == counts["kills"] >= 3 and counts["lost"] == 0, counts


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("kind", ["pretraining", "sft", "lora"])
def test_fifty_kills_at_random_moments_lose_nothing(tmp_path, kind, number):
    counts = campaign(tmp_path, settings_of(kind, tmp_path), number, 50, random.Random())
    assert counts["exact"] == counts["kills"] >= 50 and counts["lost"] == 0, counts


def test_torchrun_restarts_a_run_whose_rank_died_and_it_goes_on(settings, tmp_path):
    whole = {**settings, "out": str(tmp_path / "whole")}
    assert exit_codes(ranks.plain, 2, whole) == [0, 0], printed(whole)
    assert exit_codes(ranks.under_torchrun, 1, ranks.dying_once, settings) == [0]
    assert "going on at step" in printed(settings)
    assert differences(Path(whole["out"]), Path(settings["out"])) == []


def test_a_run_continues_with_another_number_of_ranks_and_another_micro_batch(settings, tmp_path):
    """1 rank, 2 ranks, 1 rank, each with another micro-batch; float32 sums in another order, to
    1e-6 of the loss at the start: as it falls, what it is computed from does not get smaller."""
    settings.update(schedule="constant", model={**MODEL, "dropout": 0.0})   # dropout is a rank's
    whole = {**settings, "out": str(tmp_path / "whole")}
    train(build(TrainConfig, whole))
    train(build(TrainConfig, {**settings, "max_steps": 4, "micro_batch": 16}))
    assert exit_codes(ranks.plain, 2, {**settings, "max_steps": 8, "micro_batch": 8}) == [0, 0]
    train(build(TrainConfig, {**settings, "micro_batch": 2}))
    for key in ("loss", "val_loss"):
        expected, found = ([line[key] for line in lines(out) if key in line]
                           for out in (whole["out"], settings["out"]))
        assert found == pytest.approx(expected, rel=0, abs=1e-6 * expected[0]), key


def test_a_second_interrupt_ends_a_run_at_once(settings, tmp_path):
    processes = start(
        ranks.as_command, 1, settings["out"], f"--data={settings['data']}",
        f"--out={settings['out']}", "--max_steps=1000000", "--log_every=1000000",
        "--batch_tokens=512", "--micro_batch=4", "--compile=off", "--device=cpu",
        "--dtype=float32", "--eval_every=0", "--save_every=0",
        *(f"--model.{key}={value}" for key, value in MODEL.items()))
    shown = Path(settings["out"]).with_suffix(".txt")
    for text in ("from step 0", "once more to stop at once"):
        while not shown.exists() or text not in shown.read_text():
            assert processes[0].is_alive()
            time.sleep(0.02)
        os.kill(processes[0].pid, signal.SIGINT)
    processes[0].join(timeout=120)
    assert processes[0].exitcode == 130
    assert "Traceback" not in shown.read_text()


# ---- the disk

def test_a_full_disk_costs_warnings_and_leaves_the_checkpoint_before(settings, tmp_path):
    first = {**settings, "max_steps": 4, "schedule": "constant", "milestone_every": 0,
             "sample_tokens": 0}                        # a run that stops at 4 samples there
    train(build(TrainConfig, first))
    full = {**first, "max_steps": 10, "max_failed_saves": 2}
    assert exit_codes(ranks.with_small_files, 1, full) == [2]
    text = printed(settings)
    for number in (1, 2, 3):
        assert f"WARNING: NO CHECKPOINT WAS SAVED ({number} in a row)" in text
    assert "File too large" in text and "max_failed_saves=2" in text.splitlines()[-1]
    assert checkpoint.load_last(settings["out"])["step"] == 4
    assert not list(Path(settings["out"]).glob("*.tmp"))
    train(build(TrainConfig, {**full, "out": str(tmp_path / "whole")}))
    train(build(TrainConfig, full))                     # there is room again
    assert differences(Path(settings["out"]), tmp_path / "whole") == []


def test_a_disk_that_is_full_for_a_while_is_survived(settings, tmp_path, monkeypatch, capsys):
    whole = {**settings, "out": str(tmp_path / "whole")}
    train(build(TrainConfig, whole))
    fsync, calls = os.fsync, []

    def full(handle):
        if ".pt." in os.readlink(f"/proc/self/fd/{handle}"):        # a checkpoint, not yet renamed
            calls.append(handle)
            if 1 < len(calls) < 4:
                raise OSError(28, "No space left on device")
        fsync(handle)
    monkeypatch.setattr(checkpoint.os, "fsync", full)
    train(build(TrainConfig, settings))
    assert "No space left on device" in capsys.readouterr().err
    one, two = (checkpoint.load(Path(s["out"]) / "last.pt") for s in (whole, settings))
    assert one["step"] == two["step"]
    for name, tensor in one["model"].items():
        assert torch.equal(tensor, two["model"][name])


def on_a_small_disk(tmp_path, size, function, *arguments):
    """The exit code of function(*arguments) with a file system of its own, of this size, at
    tmp_path/disk, and what it prints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    code, = exit_codes(ranks.on_a_small_disk, 1, disk, size, function, *arguments)
    if code == ranks.NO_DISK:
        pytest.skip("this machine does not let a test mount a file system")
    said = disk.with_suffix(".txt").read_text()
    assert "Traceback" not in said, said[-2000:]
    return code, said


def test_a_run_on_a_small_file_system_says_that_it_is_full(settings, tmp_path):
    disk = tmp_path / "disk"
    small = {**settings, "out": str(disk / "run"), "max_failed_saves": 0}
    code, said = on_a_small_disk(tmp_path, "300k", ranks.commanded, small, disk)
    assert code == 2 and "No space left on device" in said, said[-2000:]


def test_a_run_started_on_a_full_disk_says_so_and_starts_when_there_is_room(settings, tmp_path):
    """With 0 to 7 pages of 4 KiB left: the lock, config.json, run.json, the tokenizer or a
    checkpoint is the first that has no room."""
    settings.update(max_steps=5, save_every=1, milestone_every=0, eval_every=0, sample_tokens=0)
    code, said = on_a_small_disk(tmp_path, "32m", ranks.start_on_full_disks, settings,
                                 tmp_path / "disk")
    assert code == 0, said[-2000:]
    starts, same = json.loads(said.splitlines()[-1])
    assert same == [[]] * 8
    for out, error, left in starts:
        assert error.startswith((f"out={out} cannot be written: No space left on device; choose",
                                 "4 checkpoints in a row could not be written")), error
        assert not [name for name in left if name.endswith(".tmp")], left
    assert len({tuple(left) for _, _, left in starts}) > 3      # it ended at several files


def test_whatever_finds_no_room_on_the_disk_names_its_file(tmp_path):
    pytest.importorskip("safetensors")
    code, said = on_a_small_disk(tmp_path, "2m", ranks.write_on_full_disks, tmp_path / "disk")
    assert code == 0, said[-2000:]
    for line, name in zip(said.splitlines(), (
            "hf/model.safetensors", "data/train_0000.npy", "tok.json", "chat/.lock", "a.pt"),
            strict=True):
        assert f"{tmp_path}/disk/{name}" in line
        assert "No space left on device" in line or "requested and" in line     # numpy's words


def test_a_run_on_a_disk_that_is_full_for_a_while_lacks_nothing_in_the_end(settings, tmp_path):
    """Not a byte is free from step 3 to step 55, with evaluations, saves and more lines of the log
    than its last page of 4 KiB has room for; then there is room. A second run is not disturbed."""
    settings.update(max_steps=60, eval_every=20, save_every=5, milestone_every=0, log_every=1,
                    micro_batch=16, max_failed_saves=99)
    code, said = on_a_small_disk(tmp_path, "8m", ranks.on_a_disk_that_is_full_for_a_while, settings,
                                 tmp_path / "disk", 3, 55)
    assert code == 0, said[-2000:]
    assert said.count("log.jsonl cannot be written: [Errno 28] No space left on device") == 1
    assert "WARNING: NO CHECKPOINT WAS SAVED (1 in a row)" in said
    found = said.splitlines()[-1]
    assert found.endswith("] []") and "'run.json'" in found and ".tmp" not in found, found


# ---- numbers

def test_a_step_that_is_not_finite_is_skipped_on_all_ranks_and_counted(settings):
    settings.update(save_every=1, milestone_every=1, eval_every=0)
    assert exit_codes(ranks.with_a_bad_loss, 2, settings, [4], 1) == [0, 0], printed(settings)
    before, after, later = (checkpoint.load(Path(settings["out"]) / f"step_{n:07d}.pt")["model"]
                            for n in (4, 5, 6))         # step 4, counted from 0, makes state 5
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not torch.equal(after["lm_head.weight"], later["lm_head.weight"])
    found = {line["step"]: line for line in lines(settings["out"]) if "lr" in line}
    assert found[5]["loss"] is None and found[5]["skipped"] == "not finite"
    assert [step for step, line in found.items() if "skipped" in line] == [5]
    json.loads((Path(settings["out"]) / "log.jsonl").read_text().splitlines()[4],
               parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_steps_that_stay_bad_stop_the_run_and_name_what_they_read(settings):
    settings.update(max_bad_steps=3, eval_every=0)
    assert exit_codes(ranks.with_a_bad_loss, 1, settings, range(5, 99), 0) == [2]
    last = printed(settings).splitlines()[-1]
    assert last.startswith("error: loss or gradient was not finite in the 3 steps up to 8;")
    assert "train_0000.npy at token" in last and "last.pt" in last
    state = checkpoint.load_last(settings["out"])
    assert state["step"] == 6 and all(t.isfinite().all() for t in state["model"].values())


def test_bad_steps_of_a_chat_run_name_the_samples(tmp_path):
    settings = {**settings_of("sft", tmp_path), "out": str(tmp_path / "run"), "max_bad_steps": 2}
    assert exit_codes(ranks.with_a_bad_loss, 1, settings, range(3, 99), 0) == [2]
    assert "read samples " in printed(settings).splitlines()[-1]


def test_a_spike_is_marked_and_with_skip_spikes_not_applied(settings, monkeypatch, capsys):
    from model import GPT
    forward, calls = GPT.forward, []

    def spiking(self, *arguments, **named):
        logits, loss = forward(self, *arguments, **named)
        calls.append(self.training)
        return logits, loss * 40 if self.training and sum(calls) == 111 else loss
    monkeypatch.setattr(GPT, "forward", spiking)
    settings.update(max_steps=111, batch_tokens=4 * 32, save_every=110, milestone_every=110,
                    eval_every=0, eval_tokens=32, sample_tokens=0)
    for skip in (0.0, 8.0):
        out = f"{settings['out']}{skip}"
        calls.clear()
        train(build(TrainConfig, {**settings, "skip_spikes": skip, "out": out}))
        marked = [line for line in lines(out) if "spike" in line]
        assert [line["step"] for line in marked] == [111] and marked[0]["spike"] > 8
        assert marked[0].get("skipped") == ("spike" if skip else None)
        before, after = (checkpoint.load(Path(out) / name)["model"]["lm_head.weight"]
                         for name in ("step_0000110.pt", "last.pt"))
        assert torch.equal(before, after) == bool(skip)
    assert "standard deviations above the last 100, not applied" in capsys.readouterr().out


def test_a_spike_is_measured_in_standard_deviations_of_a_full_window():
    spikes = report.Spikes([])
    for value in [1.0, 3.0] * 49 + [1.0]:
        spikes.add(value)
    assert spikes.score(1e9) == 0.0                     # 99 losses are no window
    spikes.add(3.0)
    assert spikes.score(7.0) == pytest.approx(5.0)      # mean 2, standard deviation 1
    spikes.add(5.0)
    assert len(spikes.recent) == 100 and spikes.recent[-1] == 5.0


# ---- other processes

def test_two_runs_in_one_folder_are_refused_and_a_killed_one_leaves_no_lock(settings, tmp_path):
    holder, = start(ranks.holding, 1, tmp_path)
    ranks.wait_for((tmp_path / "held").exists)
    with pytest.raises(ValueError, match=f"is in use by process {holder.pid} on .*; wait for"):
        with faults.locked(tmp_path):
            pass
    with pytest.raises(ValueError, match="is in use by"):
        train(build(TrainConfig, {**settings, "out": str(tmp_path)}))
    holder.kill()
    holder.join()
    with faults.locked(tmp_path):
        pass


@pytest.mark.parametrize("stopped", [True, False])
def test_a_rank_that_hangs_is_named_and_ends_the_others(settings, stopped):
    settings["timeout_minutes"] = 0.03
    processes = start(ranks.hanging, 2, settings, stopped)
    wait([process.sentinel for process in processes], timeout=60)   # one finds out, maybe itself
    assert faults.EXIT_HANGS in [process.exitcode for process in processes], printed(settings)
    last = [text for text in printed(settings).splitlines() if "hangs" in text][-1]
    assert f"error: rank 1 (process {processes[1].pid} on" in last and "at step 3" in last
    assert ("shows no sign of life" in last) == stopped
    for process in processes:
        process.kill()
        process.join()


def test_on_gpus_the_rank_whose_device_hangs_is_named(monkeypatch, capsys):
    """Both hosts run ahead to step 5, where they wait. Of rank 1's device the forward pass of step
    3 does not end; rank 0's has come to the reduction that waits for it."""
    class Event:
        def record(self):
            self.comes = (step, phase) <= (3, reached)

        def query(self):
            return self.comes
    ended = threading.Event()
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(faults.os, "_exit", lambda code: (
        ended.set(), [watch.stopped.set() for watch in watches]))
    store = torch.distributed.HashStore()
    watches = [faults.Watch(Processes(rank, 2, torch.device("cuda"), lambda: store), minutes=0.02)
               for rank in range(2)]
    for watch, reached in zip(watches, ("reducing", "computing")):
        for step in range(6):
            for phase in ("computing", "reducing"):
                watch.at(step, phase)
    assert ended.wait(60)
    for watch in watches:
        watch.__exit__()
    said = capsys.readouterr().err.splitlines()
    assert said and all(line.startswith("error: rank 1 ") and "last seen at step 3, computing" in line
                        for line in said)


def test_a_rank_that_dies_is_one_line_from_the_others(settings):
    assert exit_codes(ranks.dying_rank, 2, settings) == [2, -signal.SIGKILL], printed(settings)
    assert "error: another rank is gone" in printed(settings).splitlines()[-1]


@pytest.mark.parametrize("micro_batch", [4, 8])         # two micro-batches a rank, and one
def test_a_parameter_that_takes_no_part_in_the_loss_is_named(settings, micro_batch):
    settings.update(micro_batch=micro_batch)
    assert exit_codes(ranks.with_an_idle_parameter, 2, settings) == [2, 2], printed(settings)
    assert "error: idle_gain take no part in the loss" in printed(settings)


def test_ranks_that_were_started_differently_are_refused(settings):
    assert exit_codes(ranks.different, 2, settings) == [2, 2]
    assert "has learning_rate=0.005, rank 0 has learning_rate=0.01" in printed(settings)
    assert not Path(settings["out"]).exists()


def test_another_start_is_refused_where_a_run_is(settings, tmp_path):
    train(build(TrainConfig, {**settings, "max_steps": 2, "out": str(tmp_path / "base")}))
    train(build(TrainConfig, {**settings, "max_steps": 2}))
    with pytest.raises(ValueError, match="holds a run with init_from=scratch, this one has "
                                         f"init_from={tmp_path / 'base'}; choose another --out"):
        train(build(TrainConfig, {**settings, "init_from": str(tmp_path / "base"), "model": {}}))


# ---- several hosts

@pytest.mark.slow                                       # PyTorch is imported nine times
def test_a_run_on_two_hosts_survives_the_loss_of_one(settings, tmp_path):
    """Two network namespaces, an agent of torchrun in each; one is killed with all its processes,
    and started again."""
    hosts = ("oneloop_a", "oneloop_b")
    commands = [*(f"ip netns add {host}" for host in hosts),
                "ip link add oneloop_va type veth peer name oneloop_vb",
                *(f"ip link set oneloop_v{host[-1]} netns {host}" for host in hosts),
                *(f"ip -n {host} addr add 10.77.0.{i}/24 dev oneloop_v{host[-1]}"
                  for i, host in enumerate(hosts, 1)),
                *(f"ip -n {host} link set {name} up" for host in hosts
                  for name in ("lo", f"oneloop_v{host[-1]}"))]
    try:
        for command in commands:
            try:
                done = subprocess.run(command.split(), capture_output=True, text=True)
            except FileNotFoundError:
                pytest.skip("there is no `ip` here to make network namespaces with")
            if done.returncode:
                pytest.skip(f"this machine does not permit `{command}`: {done.stderr.strip()}")
        survive_the_loss_of_a_host(settings, tmp_path, hosts)
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host], capture_output=True)


def survive_the_loss_of_a_host(settings, tmp_path, hosts):
    settings.update(max_steps=40)
    whole = {**settings, "out": str(tmp_path / "whole")}
    assert exit_codes(ranks.plain, 2, whole) == [0, 0], printed(whole)
    script = tmp_path / "host.py"
    script.write_text(
        f"import sys\nsys.path[:0] = [{str(REPOSITORY)!r}, {str(REPOSITORY / 'tests')!r}]\n"
        f"import torch, ranks\ntorch.set_num_threads(1)\n"
        f"ranks.slowly({settings!r}, {str(tmp_path / 'fast')!r})\n")

    def agent(i):
        return subprocess.Popen(
            ["ip", "netns", "exec", hosts[i], sys.executable, "-m", "torch.distributed.run",
             "--nnodes=2", "--nproc_per_node=1", "--max-restarts=3", "--rdzv_backend=c10d",
             "--rdzv_id=1", "--rdzv_endpoint=10.77.0.1:29511", f"--local_addr=10.77.0.{i + 1}",
             f"--rdzv_conf=is_host={1 - i},join_timeout=100,last_call_timeout=2,"
             f"keep_alive_interval=1,keep_alive_max_attempt=3", str(script)],
            # Without the first, a new agent waits for an address that the old one sent long ago.
            env={**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
                 "GLOO_SOCKET_IFNAME": f"oneloop_v{hosts[i][-1]}"},
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    agents = [agent(0), agent(1)]
    try:
        ranks.wait_for(lambda: any(Path(settings["out"]).glob("last*.pt")), agents)
        pids = subprocess.run(["ip", "netns", "pids", hosts[1]], capture_output=True, text=True)
        for pid in pids.stdout.split():                 # the whole host: agent and rank
            os.kill(int(pid), signal.SIGKILL)
        agents[1].wait()
        (tmp_path / "fast").touch()
        agents[1] = agent(1)
        errors = [process.communicate(timeout=200)[1] for process in agents]
        assert [process.returncode for process in agents] == [0, 0], errors
    finally:
        for process in agents:
            process.kill()
    assert "going on at step" in printed(settings)
    assert differences(Path(whole["out"]), Path(settings["out"])) == []


# ---- parts instead of copies

@pytest.mark.parametrize("shard", ["fsdp", pytest.param("zero2", marks=pytest.mark.slow)])
def test_a_sharded_run_equals_one_with_copies_and_either_continues_the_other(settings, tmp_path,
                                                                             shard):
    settings.update(schedule="constant", max_steps=6, eval_every=2,
                    model={**MODEL, "dropout": 0.0})
    copies, parts, mixed = ({**settings, "out": str(tmp_path / name)}
                            for name in ("copies", "parts", "mixed"))
    assert exit_codes(ranks.plain, 2, copies) == [0, 0], printed(copies)
    assert exit_codes(ranks.plain, 2, {**parts, "shard": shard}) == [0, 0], printed(parts)
    for steps, way in ((2, "none"), (4, shard), (6, "none")):
        part = {**mixed, "shard": way, "max_steps": steps}
        assert exit_codes(ranks.plain, 2, part) == [0, 0], printed(mixed)
    assert "going on at step 4 of 6" in printed(mixed)
    for other in (parts, mixed):
        one, two = (checkpoint.load(Path(s["out"]) / "last.pt") for s in (copies, other))
        assert list(one["model"]) == list(two["model"])
        for key in ("loss", "val_loss"):                # float32 sums in another order
            expected, found = ([line[key] for line in lines(s["out"]) if key in line]
                               for s in (copies, other))
            assert found == pytest.approx(expected, rel=1e-5)
        a, b = (torch.cat([tensor.flatten() for tensor in state["model"].values()])
                for state in (one, two))
        assert (a - b).norm() <= 1e-3 * a.norm()        # Adam turns rounding into small steps


def test_sharding_one_rank_is_refused(settings):
    with pytest.raises(ValueError, match="shard=fsdp needs several ranks"):
        train(build(TrainConfig, {**settings, "shard": "fsdp"}))


# ---- the same bits under torch.compile

@pytest.mark.slow
def test_compiled_runs_are_equal_bit_for_bit(settings, tmp_path):
    from run.device import has_compiler
    if not has_compiler(torch.device("cpu")):
        pytest.skip("no C++ compiler here")
    torch.set_num_threads(2)            # without `deterministic` they add in the order they come
    for name in "ab":
        train(build(TrainConfig, {**settings, "compile": "on", "out": str(tmp_path / name)}))
    assert differences(tmp_path / "a", tmp_path / "b") == []

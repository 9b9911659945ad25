"""Real faults in real runs: kills, full disks, dead and lying environments, numbers that overflow, damaged checkpoints.

pytest tests/test_faults.py               the fast part, on TD3
pytest tests/test_faults.py -m slow -s    each method family, with the full counts; prints fault, times injected, survived

A run is the script's `__main__` in a process of its own, forked from this one, which has torch imported already.
"""

import csv
import hashlib
import multiprocessing.util
import os
import pickle
import random
import re
import resource
import runpy
import shlex
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch._dynamo  # the first optimiser of each process would, for seconds
from conftest import ROOT, load_script
from faulty_envs import GOOD_STEPS
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

FAMILIES = ["baselines/td3.py", "td3_ams.py", "baselines/sac.py", "sac_pave.py"]
torch.set_num_threads(1)  # a forked process cannot use the threads of its parent


def each_family(*fast: object, slow: tuple = ()) -> pytest.MarkDecorator:
    """path and further values: TD3 with the fast ones, and, marked slow, every family with the slow ones."""
    cases = [pytest.param(path, *(slow or fast), marks=pytest.mark.slow, id=f"{path}-full") for path in FAMILIES]
    return pytest.mark.parametrize(("path", "times") if fast else "path", [pytest.param(FAMILIES[0], *fast), *cases])


# The table.

injected, survived = Counter(), Counter()


@contextmanager
def fault(name: str) -> Iterator[None]:
    """Counts a fault as survived if all checks in the block hold."""
    injected[name] += 1
    yield
    survived[name] += 1


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    print("\n\n| fault | injected | survived | lost |\n|---|---:|---:|---:|")
    for name, count in injected.items():
        print(f"| {name} | {count} | {survived[name]} | {count - survived[name]} |")


# Runs.

SMALL = {
    "env_id": "faulty_envs:Cheap-v0",
    "num_seeds": 2,
    "total_timesteps": 10**9,
    "learning_starts": 20,
    "batch_size": 16,
    "buffer_size": 400,
    "hidden_sizes": (16, 16),
    "update_every": 5,
    "eval_every": 10**9,
    "eval_episodes": 1,
    "log_every": 10,
    "checkpoint_seconds": 0,
    "vector_env": "sync",
    "device": "cpu",
    "compile": "off",
}


def small_flags(path: str, **changes) -> list[str]:
    known = {field.name for field in fields(load_script(path).Args)}
    flags = []
    for name, value in {**SMALL, **changes}.items():
        if name in known and value is not None:
            values = value if isinstance(value, tuple) else () if value is True else (value,)
            flags += ["--" + name.replace("_", "-"), *map(str, values)]
    return flags


class Run:
    """python path flags, in the folder cwd: started at once, alone in a session. limits: {resource.RLIMIT_*: bytes}."""

    def __init__(self, path: str, *flags: object, cwd: Path, limits: dict | None = None, stdout: int | None = None):
        self.path = path
        logs = Path(tempfile.mkdtemp(prefix="run_", dir=cwd.parent))
        self.stdout, self.stderr = logs / "stdout", logs / "stderr"
        for log in (self.stdout, self.stderr):
            log.touch()
        self.status, self.pid = None, os.fork()
        if not self.pid:
            self.child([str(ROOT / path), *map(str, flags)], cwd, limits or {}, stdout)

    def child(self, argv: list[str], cwd: Path, limits: dict, stdout: int | None) -> None:
        """What the interpreter does around a script, and no way back into pytest."""
        status = 1
        try:
            os.setsid()
            os.chdir(cwd)
            os.dup2(os.open(self.stdout, os.O_WRONLY) if stdout is None else stdout, 1)
            os.dup2(os.open(self.stderr, os.O_WRONLY), 2)
            sys.stdout = open(1, "w", closefd=False)
            sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            for number, limit in limits.items():
                resource.setrlimit(number, (limit, limit))
            sys.argv = argv
            runpy.run_path(argv[0], run_name="__main__")
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            multiprocessing.util._exit_function()
            sys.stdout.flush()
            os._exit(status)

    @property
    def output(self) -> str:
        return self.stdout.read_text()

    @property
    def errors(self) -> str:
        return self.stderr.read_text()

    @property
    def step(self) -> int:
        return max([0, *map(int, re.findall(r"^step (\d+)/", self.output, re.MULTILINE))])

    def running(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status is None

    def until(self, condition: Callable, timeout: float = 120) -> None:
        """Waits for condition(), which must come true while the process runs."""
        deadline = time.monotonic() + timeout
        while not condition():
            assert self.running(), f"ended with {self.status}: {self.output}{self.errors}"
            assert time.monotonic() < deadline, f"timed out: {self.output}{self.errors}"
            time.sleep(0.002)

    def wait(self, timeout: float = 120) -> "Run":
        """Its end, and the end of all that it started."""
        deadline = time.monotonic() + timeout
        while self.running():
            assert time.monotonic() < deadline, f"timed out: {self.output}{self.errors}"
            time.sleep(0.01)
        deadline = time.monotonic() + 5
        while orphans := self.session():
            assert time.monotonic() < deadline, f"orphans: {orphans}"
            time.sleep(0.01)
        return self

    def session(self) -> list[int]:
        """Living processes of the run."""
        members = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
            except OSError:
                continue
            if int(session) == self.pid and state != "Z":
                members.append(int(path.parent.name))
        return members

    def workers(self) -> list[int]:
        return sorted(set(self.session()) - {self.pid})

    def done(self) -> "Run":
        """Waits for a run that must succeed, in silence."""
        self.wait()
        assert (self.status, self.errors) == (0, ""), f"{self.status}: {self.output}{self.errors}"
        return self


@pytest.fixture(autouse=True)
def nothing_survives(monkeypatch):
    """A failed test leaves no process behind."""
    runs, init = [], Run.__init__
    monkeypatch.setattr(Run, "__init__", lambda self, *args, **kwargs: (runs.append(self), init(self, *args, **kwargs))[1])
    yield
    for run in runs:
        for pid in run.session() if run.running() else ():
            os.kill(pid, signal.SIGKILL)


def run_folder(cwd: Path) -> Path:
    (folder,) = (cwd / "runs").iterdir()
    return folder


def finished_run(path: str, cwd: Path, total: int = 40, **changes) -> Path:
    cwd.mkdir(exist_ok=True)
    Run(path, *small_flags(path, total_timesteps=total, **changes), cwd=cwd).done()
    return run_folder(cwd)


# What must hold after a fault.


def load(file: Path) -> dict:
    return torch.load(file, weights_only=True)


def tensors(state: object) -> list[torch.Tensor]:
    """All that a checkpoint holds, in order."""
    if isinstance(state, dict):
        return [tensor for value in state.values() for tensor in tensors(value)]
    return [state] if isinstance(state, torch.Tensor) else []


def equal(one: object, other: object) -> bool:
    one, other = tensors(one), tensors(other)
    return len(one) == len(other) > 10 and all(torch.equal(*pair) for pair in zip(one, other))


def read_eval(folder: Path) -> list[tuple]:
    """eval.csv's rows as (step, transitions, seed, episode, ...); whole, and none of them twice."""
    text = (folder / "eval.csv").read_text()
    header, *rows = csv.reader(text.splitlines())
    assert text.endswith("\n") and header == ["step", "transitions", "seed", "episode", "return", "length", "smoothness"]
    rows = [(*map(int, row[:4]), float(row[4]), int(row[5]), float(row[6])) for row in rows]
    assert len({row[:4] for row in rows}) == len(rows)
    return rows


def oldest_first(folder: Path) -> torch.Tensor:
    replay = load(folder / "replay.pt")
    return replay["rows"].roll(-replay["position"], 1)


def contents(folder: Path) -> dict[str, str]:
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def check_line(run: Run, status: int, *expected: str) -> None:
    assert run.status == status, f"{run.status}: {run.output}{run.errors}"
    assert run.errors.count("\n") == 1 and run.errors.startswith(f"{Path(run.path).name}: "), run.errors
    for text in expected:
        assert re.search(text, run.errors), f"not {text!r}: {run.errors}"


def check_goes_on(path: str, folder: Path) -> None:
    """The checkpoint is finite, a resumed run has its parameters, keeps its rows, and learns on."""
    checkpoint, rows, replay = load(folder / "checkpoint.pt"), read_eval(folder), None
    if (folder / "replay.pt").exists():
        replay = oldest_first(folder)
    step = checkpoint["step"]
    assert all(tensor.isfinite().all() for tensor in tensors(checkpoint["modules"]))
    if step:
        Run(path, "--resume", folder, "--total-timesteps", step, cwd=folder.parent.parent).done()
        again = load(folder / "checkpoint.pt")
        assert again["step"] == step and equal(again["modules"], checkpoint["modules"])
        assert torch.equal(again["cpu_generator"], checkpoint["cpu_generator"])
        if replay is not None:
            kept = oldest_first(folder)
            assert kept.shape[1] >= min(step, SMALL["buffer_size"]) and torch.equal(kept, replay[:, -kept.shape[1] :])
        expected = [row for row in rows if row[0] <= step]
        assert read_eval(folder)[: len(expected)] == expected
    run = Run(path, "--resume", folder, "--total-timesteps", step + 50, cwd=folder.parent.parent).done()
    assert min(map(int, re.findall(r"^step (\d+)/", run.output, re.MULTILINE))) >= step
    after = load(folder / "checkpoint.pt")
    assert after["step"] == step + 50 and not equal(after["modules"], checkpoint["modules"])
    read_eval(folder)


def check_fault(run: Run, cwd: Path, *expected: str) -> None:
    """One line that says what is wrong and how to go on; the checkpoint intact; no process left (wait() looks)."""
    run.wait()
    folder = run_folder(cwd)
    check_line(run, 1, *expected, rf"Go on from the last checkpoint: python .*{run.path} --resume runs/{folder.name}$")
    check_goes_on(run.path, folder)


# Kills and signals.


@each_family(4, slow=(30,))
def test_sigkill(path, times, tmp_path):
    """One run, killed again and again; every second time while it writes a checkpoint, which it does at every step."""
    flags, chance, last = small_flags(path, eval_every=25, env_id="Pendulum-v1", vector_env="auto"), random.Random(0), 0
    for kill in range(times):
        started = time.time_ns()
        resumed = ["--resume", run_folder(tmp_path), "--total-timesteps", 10**9] if kill else flags
        run = Run(path, *resumed, cwd=tmp_path)
        run.until(lambda: list(tmp_path.glob("runs/*/checkpoint.pt")))
        folder = run_folder(tmp_path)
        if kill % 2:
            time.sleep(chance.uniform(0, 2))  # as it starts, resumes, evaluates, learns or writes
        else:
            run.until(lambda: run.step > last + 10)
            run.until(lambda: half_written(folder, started))
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
        writing = half_written(folder, started)
        with fault("SIGKILL during a checkpoint write" if writing else "SIGKILL at another random moment"):
            assert run.status == -signal.SIGKILL, run.errors
            step = load(folder / "checkpoint.pt")["step"]
            assert step >= last  # where the previous resumed run ended
            evaluated = [row[0] for row in read_eval(folder)]
            assert set(range(0, step + 1, 25)) <= set(evaluated)  # no gap in the curve
            check_goes_on(path, folder)
            last = step + 50
    if times > 4:
        assert injected["SIGKILL during a checkpoint write"] > 1
    logged = [event.step for event in scalars(folder, "eval/return")]
    assert len(set(logged)) == len(logged) and set(range(0, last + 1, 25)) <= set(logged)


def half_written(folder: Path, since: int) -> bool:
    """Whether checkpoint.pt or replay.pt is being written by a process that started then (ns)."""
    for name in ("checkpoint.pt.tmp", "replay.pt.tmp"):
        try:
            if (folder / name).stat().st_mtime_ns > since:
                return True
        except FileNotFoundError:
            pass
    return False


def scalars(folder: Path, name: str) -> list:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return events.Scalars(name)


@each_family()
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves(path, number, tmp_path):
    """To the whole group, as from a terminal; in 10 seconds; the printed command goes on."""
    run = Run(path, *small_flags(path, vector_env="async", checkpoint_seconds=10**6), cwd=tmp_path)
    run.until(lambda: run.step >= 40)
    with fault(f"{number.name}: saved within 10 s"):
        reached = run.step
        os.killpg(run.pid, number)
        run.wait(10)
        folder = run_folder(tmp_path)
        step = load(folder / "checkpoint.pt")["step"]
        command = shlex.split(run.output.splitlines()[-1].partition("go on with: ")[2])
        assert (run.status, command) == (0, ["python", str(ROOT / path), "--resume", f"runs/{folder.name}"])
        assert step >= reached and run.errors.strip() == "stopping: saving the run (a second signal stops at once)"
        check_goes_on(path, folder)


@each_family()
def test_a_second_signal_stops_at_once(path, tmp_path):
    """The first cannot be obeyed while an environment hangs."""
    run = Run(path, *small_flags(path, env_id="faulty_envs:Hangs-v0", vector_env="async"), cwd=tmp_path)
    run.until(lambda: run.step == GOOD_STEPS // 10 * 10)
    time.sleep(1)
    with fault("a second SIGINT: ended at once"):
        before = contents(run_folder(tmp_path))
        for pause in (0.1, 0.8):  # sent twice at once, as uv run does, it is one
            os.killpg(run.pid, signal.SIGINT)
            time.sleep(pause)
        assert run.running()
        os.killpg(run.pid, signal.SIGINT)
        run.wait(3)
        assert run.status == 128 + signal.SIGINT and contents(run_folder(tmp_path)) == before
        check_goes_on(path, run_folder(tmp_path))


@each_family()
def test_sigint_with_the_output_pipe_gone(path, tmp_path):
    """python td3.py | tee log: Ctrl-C ends the tee too."""
    reader, writer = os.pipe()
    run = Run(path, *small_flags(path, checkpoint_seconds=10**6), cwd=tmp_path, stdout=writer)
    os.close(writer)
    run.until(lambda: "step 40/" in os.read(reader, 1000).decode())
    with fault("SIGINT with the output's pipe gone: saved"):
        os.close(reader)
        time.sleep(0.2)
        os.kill(run.pid, signal.SIGINT)
        run.wait(10)
        assert load(run_folder(tmp_path) / "checkpoint.pt")["step"] >= 40
        check_goes_on(path, run_folder(tmp_path))


# Environments.


class Misbehaviour(NamedTuple):
    name: str  # in the table
    env: str
    vector_env: str
    expected: str
    env_timeout: float = 300


LATE = r"no answer within 3 s \(--env-timeout\)"
NOT_FINITE = "observation or reward not finite"
MISBEHAVIOURS = [
    Misbehaviour("environment raises", "Raises", "sync", "ValueError: the robot fell off the table"),
    Misbehaviour("environment raises", "Raises", "async", "ValueError: the robot fell off the table"),
    Misbehaviour("environment raises", "Exits", "sync", "SystemExit"),
    Misbehaviour("environment raises", "Exits", "async", "its process died"),
    Misbehaviour("environment raises", "RaisesUnpicklable", "async", "ValueError: <unlocked _thread.lock"),
    Misbehaviour("environment's process dies", "Dies", "async", r"its process died"),
    Misbehaviour("NaN or infinite observation or reward", "NanObservation", "sync", NOT_FINITE),
    Misbehaviour("NaN or infinite observation or reward", "NanObservation", "async", NOT_FINITE),
    Misbehaviour("NaN or infinite observation or reward", "InfiniteReward", "async", NOT_FINITE),
    Misbehaviour("NaN or infinite observation or reward", "OverflowingReward", "sync", NOT_FINITE),
    Misbehaviour("NaN or infinite observation or reward", "NanReset", "sync", NOT_FINITE),
    Misbehaviour("environment hangs", "Hangs", "sync", LATE, 3),
    Misbehaviour("environment hangs", "Hangs", "async", LATE, 3),
    Misbehaviour("environment hangs", "HangsInReset", "async", LATE, 3),
]


@each_family()
@pytest.mark.parametrize("case", MISBEHAVIOURS, ids=lambda case: f"{case.env}-{case.vector_env}")
def test_environment_misbehaves(path, case, tmp_path):
    flags = {"env_id": f"faulty_envs:{case.env}-v0", "vector_env": case.vector_env, "env_timeout": case.env_timeout}
    run = Run(path, *small_flags(path, **flags), cwd=tmp_path)
    with fault(f"{case.name} ({case.vector_env})"):
        check_fault(run, tmp_path, rf"step {GOOD_STEPS}: environment.*\(faulty_envs:{case.env}-v0\): ", case.expected)
        assert load(run_folder(tmp_path) / "checkpoint.pt")["step"] == GOOD_STEPS + 50


@each_family()
def test_environment_raises_in_an_evaluation(path, tmp_path):
    run = Run(path, *small_flags(path, env_id="faulty_envs:Raises-v0", eval_every=10), cwd=tmp_path)
    with fault("environment raises in an evaluation"):  # the seventh, of 20 steps each
        check_fault(run, tmp_path, r"step 60: environment.*\(faulty_envs:Raises-v0\): ValueError: the robot fell")


@each_family()
def test_worker_killed(path, tmp_path):
    run = Run(path, *small_flags(path, vector_env="async"), cwd=tmp_path)
    run.until(lambda: run.step >= 40)
    with fault("environment's process killed"):
        os.kill(run.workers()[0], signal.SIGKILL)
        check_fault(run, tmp_path, r"step \d+: environment \d+ of \d+ \(faulty_envs:Cheap-v0\): its process died")


# Disks. /dev/full refuses every write, as a full disk does; a file-size limit refuses those beyond it.


@each_family()
@pytest.mark.parametrize("name", ["replay.pt", "checkpoint.pt", "eval.csv", "policies/step_000000060.pt", "args.json"])
def test_disk_full(path, name, tmp_path):
    folder = finished_run(path, tmp_path)
    (folder / f"{name}.tmp").symlink_to("/dev/full")
    kept = contents(folder)
    run = Run(path, "--resume", folder, "--total-timesteps", 80, "--eval-every", 20, cwd=tmp_path).wait()
    with fault(f"disk full: {re.sub('_[0-9]+', '_*', name)}"):
        check_line(run, 1, f"cannot write .*{name}: .*(No space left on device|file write failed)")
        if name in ("replay.pt", "checkpoint.pt", "args.json"):  # the first that a resumed run writes
            assert contents(folder)[str(folder / "checkpoint.pt")] == kept[str(folder / "checkpoint.pt")]
        assert load(folder / "checkpoint.pt")["step"] >= 40
        check_goes_on(path, folder)
        assert not list(folder.rglob("*.tmp"))


@each_family()
def test_disk_full_while_the_replay_grows(path, tmp_path):
    changes = {"buffer_size": 10**5, "num_envs": 50, "eval_every": 10**9}
    limits = {resource.RLIMIT_FSIZE: 200_000}
    run = Run(path, *small_flags(path, **changes), cwd=tmp_path, limits=limits)
    with fault("file-size limit: the growing replay.pt"):
        check_fault(run, tmp_path, r"step \d\d+: cannot write .*replay.pt: ")


@each_family()
def test_disk_full_for_tensorboard(path, tmp_path):
    """The events outgrow the limit, the checkpoint does not; the writer's thread must neither hang nor hide it."""
    flags = [*small_flags(path, log_every=1, hidden_sizes=(4,)), "--no-save-replay"]
    run = Run(path, *flags, cwd=tmp_path, limits={resource.RLIMIT_FSIZE: 50_000})
    with fault("file-size limit: TensorBoard's events"):
        check_fault(run, tmp_path, r"step \d\d+: cannot write TensorBoard's events: OSError: .*File too large")


# Numbers.


@each_family()
@pytest.mark.parametrize("env", ["HugeReward", "HugerReward"])
@pytest.mark.parametrize("noticed", ["by the checkpoint", "by the log"])
def test_numbers_overflow(path, env, noticed, tmp_path):
    """Between two lines of the log, or between two checkpoints."""
    sparse = {"log_every": 10**6} if noticed == "by the checkpoint" else {"checkpoint_seconds": 10**6}
    run = Run(path, *small_flags(path, env_id=f"faulty_envs:{env}-v0", **sparse), cwd=tmp_path).wait()
    with fault(f"loss or parameter not finite, noticed {noticed}"):
        folder = run_folder(tmp_path)
        check_line(run, 1, r"losses/\w+ is not finite", "checkpoint_last_finite.pt is from before")
        step = int(re.search(r"step (\d+): ", run.errors)[1])
        assert GOOD_STEPS < step <= GOOD_STEPS + 30  # the overflowing transitions must be drawn, too
        last = load(folder / "checkpoint_last_finite.pt")
        assert equal(last["modules"], load(folder / "checkpoint.pt")["modules"])
        assert (last["step"] > GOOD_STEPS - 10) == (noticed == "by the checkpoint")
        assert all(tensor.isfinite().all() for tensor in tensors(last["modules"]))
        assert sorted(file.name for file in folder.glob("policies/*")) == ["step_000000000.pt"]


@each_family()
def test_out_of_memory(path, tmp_path):
    """At the start, an exit status of 2; in an update, of 1."""
    used = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    limits = {resource.RLIMIT_AS: used + 1_500_000_000}
    for name, changes in {
        "replay": {"buffer_size": 10**9},
        "networks": {"hidden_sizes": (50_000, 50_000)},
    }.items():
        with fault(f"out of memory: {name}"):
            run = Run(path, *small_flags(path, **changes), cwd=tmp_path, limits=limits).wait()
            check_line(run, 2, "do(es)? not fit.* lower --")
            assert not list(tmp_path.iterdir())
    big = {"batch_size": 6_000_000, "buffer_size": 6_000_000, "learning_starts": 5, "num_seeds": 1}
    run = Run(path, *small_flags(path, **big), cwd=tmp_path, limits=limits).wait()
    with fault("out of memory: an update"):
        check_line(run, 1, r"step 5: \w+: .*(alloc|memory)", "Go on from the last checkpoint")
        assert load(run_folder(tmp_path) / "checkpoint.pt")["step"] == 5


# Checkpoints.


class Payload:
    """Unpickled, it would make a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def spoiled(file: Path, marker: Path) -> dict[str, Callable[[], object]]:
    """Ways to damage file, a checkpoint; marker is the folder that a payload would make."""
    state, whole = load(file), file.read_bytes()
    payload = {**state, "step": Payload(marker), "rows": Payload(marker)}
    renamed = {name: {**part, "extra": torch.zeros(1)} for name, part in state.get("modules", {}).items()}
    return {
        "truncated": lambda: file.write_bytes(whole[: len(whole) // 2]),
        "empty": lambda: file.write_bytes(b""),
        "bytes changed": lambda: file.write_bytes(whole[:100] + b"\xff" * 400 + whole[500:]),
        "of another version": lambda: torch.save({**state, "version": 99} if "version" in state else {}, file),
        "of other contents": lambda: torch.save({**state, "modules": renamed} if renamed else {"rows": 1}, file),
        "payload": lambda: torch.save(payload, file),
        "payload, legacy format": lambda: torch.save(payload, file, _use_new_zipfile_serialization=False),
        "payload, plain pickle": lambda: file.write_bytes(pickle.dumps(payload["step"])),
    }


@each_family()
def test_damaged_checkpoint(path, tmp_path):
    folder, marker = finished_run(path, tmp_path), tmp_path / "payload"
    for name in ("checkpoint.pt", "replay.pt"):
        file = folder / name
        whole = file.read_bytes()
        for damage, spoil in spoiled(file, marker).items():
            spoil()
            before = contents(folder)
            run = Run(path, "--resume", folder, "--total-timesteps", 50, cwd=tmp_path).wait()
            with fault(f"{name} {damage}"):
                check_line(run, 2, f"{name} is damaged or does not fit", "start again without --resume")
                assert contents(folder) == before and not marker.exists()
            file.write_bytes(whole)
    run = Run(path, "--resume", folder, "--hidden-sizes", 8, 8, cwd=tmp_path).wait()
    with fault("checkpoint.pt of other shapes"):
        check_line(run, 2, "checkpoint.pt is damaged or does not fit")
    (folder / "eval.csv").write_text((folder / "eval.csv").read_text().rsplit(",", 3)[0])
    run = Run(path, "--resume", folder, "--total-timesteps", 50, cwd=tmp_path).wait()
    with fault("eval.csv torn"):
        check_line(run, 2, "eval.csv is damaged")


# Command lines.

JUNK = st.sampled_from(["", "-1", "0", "nan", "inf", "-inf", "1e400", "1e-400", "9" * 30, "9" * 5000, "-", "--", "1,2", "None"])
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=300) | st.just("\udcff") | JUNK


def values(field) -> st.SearchStrategy[list[str]]:
    """Values for a flag: such that run in a moment, such that are refused, and such that look like neither."""
    name, default = field.name, field.default
    if isinstance(default, bool):
        return st.just([])
    if name == "hidden_sizes":
        return st.lists(st.sampled_from(["1", "7", "16", "0", "-3", "x", str(2**16 + 1)]), max_size=3)
    if name in ("num_seeds", "num_envs", "eval_episodes", "num_threads"):
        return st.sampled_from(["1", "2", "3", "0", "-1", "5000", str(2**40), "1.5"]).map(lambda text: [text])
    if name == "total_timesteps":
        return st.sampled_from(["1", "4", "9", "0", str(2**60)]).map(lambda text: [text])
    if name in ("batch_size", "num_neighbors", "update_every", "policy_frequency"):  # 10**9 would run, for long
        return (st.integers(-2, 40).map(str) | JUNK).map(lambda text: [text])
    if isinstance(default, int):
        return (st.integers(-2, 2**41).map(str) | JUNK).map(lambda text: [text])
    if isinstance(default, float):
        return (st.floats().map(repr) | st.floats(0, 1).map(repr) | JUNK).map(lambda text: [text])
    return (TEXT | st.sampled_from(["auto", "cpu", "on", "async", "sync", "relu", "silu"])).map(lambda text: [text])


def command_lines(path: str) -> st.SearchStrategy[list[str]]:
    skipped = {"track", "compile", "capture_video"}  # a network, a compiler, a display: not a matter of command lines
    flags = []
    for field in fields(load_script(path).Args):
        if field.name not in skipped:
            names = ["--" + field.name.replace("_", "-"), *(["--no-" + field.name] if field.default is True else ())]
            flags.append(st.tuples(st.sampled_from(names), values(field)).map(lambda pair: [pair[0], *pair[1]]))
    environment = st.sampled_from(["Pendulum-v1", "CartPole-v1", "dog-rnu", "nosuch:Env-v0", "h1-walk", "Ant-v2"]) | TEXT
    flags.append(environment.map(lambda text: ["--env-id", text]))
    parts = st.lists(st.one_of(flags) | TEXT.map(lambda text: [text]), max_size=6)
    return parts.map(lambda parts: [word for part in parts for word in part])


@each_family(25, slow=(200,))
def test_fuzzed_command_lines(path, times, tmp_path):
    """Exit status 0 or 2, no traceback; nothing written with 2."""
    base = small_flags(path, total_timesteps=4, learning_starts=2, batch_size=4)

    @settings(max_examples=times, deadline=None, derandomize=True, database=None)
    @given(command_lines(path))
    def check(flags):
        with tempfile.TemporaryDirectory(dir=tmp_path) as name:
            cwd = Path(name) / "cwd"
            cwd.mkdir()
            with fault("fuzzed command line"):
                run = Run(path, *base, *flags, cwd=cwd).wait()
                assert run.status in (0, 2) and "Traceback" not in run.errors, f"{flags}\n{run.status} {run.errors}"
                assert run.status == 0 or not list(cwd.iterdir()), flags

    check()


# Repetition.


@each_family()
def test_determinism(path, tmp_path):
    """The same seed gives the same eval.csv, in parallel or not; a seed's initial weights do not depend on num_seeds."""
    flags, tables = {"eval_every": 40, "env_id": "Pendulum-v1", "checkpoint_seconds": 10**6}, []
    with fault("same seed again: identical eval.csv"):
        for name, vector_env in (("one", "sync"), ("two", "sync"), ("three", "async")):
            folder = finished_run(path, tmp_path / name, total=80, **flags, vector_env=vector_env)
            tables.append((folder / "eval.csv").read_bytes())
        assert tables[0] == tables[1] == tables[2]
    with fault("another num_seeds: identical initial weights"):
        together, alone = (
            load(finished_run(path, tmp_path / f"{seeds}", total=1, num_seeds=seeds) / "policies/step_000000000.pt")
            for seeds in (3, 1)
        )
        for one, other in zip(tensors(together), tensors(alone)):
            assert torch.equal(one[:1], other)


@each_family(1, slow=(5,))
def test_two_runs_in_the_same_second(path, times, tmp_path):
    flags, seen = small_flags(path, total_timesteps=30, num_seeds=1), 0
    for attempt in range(20):
        cwd = tmp_path / str(attempt)
        cwd.mkdir()
        runs = [Run(path, *flags, cwd=cwd) for _ in range(2)]
        for run in runs:
            run.done()
        folders = [Path(run.output.splitlines()[-1].removesuffix(": finished")) for run in runs]
        stamps = {re.search(r"__(\d+)(_\d+)?$", folder.name)[1] for folder in folders}
        if len(stamps) == 1:
            with fault("two runs started in one second"):
                assert folders[0] != folders[1] and len(list((cwd / "runs").iterdir())) == 2
                for folder in folders:
                    assert load(cwd / folder / "checkpoint.pt")["step"] == 30 and len(read_eval(cwd / folder)) == 2
                    assert len(list((cwd / folder).glob("events.out.tfevents.*"))) == 1
            seen += 1
        if seen == times:
            return
    pytest.fail("no two of the runs started in the same second")


# Memory.


@pytest.mark.slow
@pytest.mark.parametrize("path", FAMILIES)
@pytest.mark.parametrize(("vector_env", "total"), [("sync", 200_000), ("async", 20_000)])
def test_memory_stays(path, vector_env, total, tmp_path):
    """Resident memory, file handles and shared memory of the run and its workers, after the replay has filled."""
    changes = {"buffer_size": 4_000, "eval_every": 2_000, "log_every": 100, "checkpoint_seconds": 2, "num_seeds": 1}
    flags = small_flags(path, total_timesteps=total, vector_env=vector_env, hidden_sizes=(8, 8), batch_size=8, **changes)
    with fault(f"{total} steps, {vector_env}: memory, handles, shared memory flat"):
        run, samples, shown = Run(path, *flags, cwd=tmp_path), [], 0
        while run.running():
            time.sleep(0.2)
            if run.step >= shown + total // 100 and run.step < total:
                shown = run.step
                with suppress(OSError):  # it may just have ended
                    samples.append((shown, *usage(run.session())))
        run.wait()
        assert run.status == 0, run.errors
        steps, resident, handles, shared = np.array([sample for sample in samples if sample[0] > total // 4], float).T
        slope = np.polyfit(steps, resident, 1)[0] * 100_000
        print(f"\n{path}: {resident[0]:.1f} MB at step {steps[0]:.0f}, {resident[-1]:.1f} MB at {steps[-1]:.0f},", end=" ")
        print(f"{slope:+.3f} MB in 100 000 steps; {handles.min():.0f} to {handles.max():.0f} handles,", end=" ")
        print(f"{shared.max():.0f} kB shared")
        assert len(steps) > 20 and slope * total / 100_000 < 5  # MB
        assert handles.max() - handles.min() <= 4 and shared.max() == shared.min()  # a few files are open for a moment


def usage(pids: list[int]) -> tuple[float, int, int]:
    """(MB resident, open file handles, kB of shared memory files mapped), summed over processes."""
    resident, handles, shared = 0, 0, 0
    for pid in pids:
        status, maps = (Path(f"/proc/{pid}/{name}").read_text() for name in ("status", "maps"))
        resident += int(re.search(r"VmRSS:\s+(\d+)", status)[1])
        handles += len(os.listdir(f"/proc/{pid}/fd"))
        for line in maps.splitlines():
            if re.search(r"/dev/shm|pymp-|/dev/zero", line):
                low, high = (int(address, 16) for address in line.split()[0].split("-"))
                shared += (high - low) // 1024
    return resident / 1024, handles, shared

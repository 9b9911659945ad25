"""Real faults in real runs: kills, full disks, dead and lying environments, numbers that overflow, damaged checkpoints.

The fast part is on TD3; -m slow has SAC and PPO too, and more kills.
"""

import io
import os
import pickle
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import load_script
from faulty_envs import GOOD_STEPS
from gymnasium.vector import AsyncVectorEnv
from processes import SMALL, Run, contents, flags, load, only_run, read_eval
from torch.utils._pytree import tree_leaves

TD3, SAC, PPO = "baselines/td3.py", "sac_pave.py", "baselines/ppo.py"
off_policy = pytest.mark.parametrize("path", [TD3, pytest.param(SAC, marks=pytest.mark.slow)])
each_script = pytest.mark.parametrize(
    "path", [TD3, *(pytest.param(path, marks=pytest.mark.slow) for path in (SAC, PPO))]
)


def impatient() -> None:
    """5 s instead of 300 for an environment to answer."""
    wait = AsyncVectorEnv.step_wait
    AsyncVectorEnv.step_wait = lambda self, timeout=None: wait(self, 5)


def start(path: str, cwd: Path, env: str = "Cheap", before: Callable = impatient, **changes) -> Run:
    changes = {"env_id": f"faulty_envs:{env}-v0", "total_timesteps": 10**6} | changes
    return Run(path, *flags(path, **SMALL | changes), cwd=cwd, before=before)


def check_goes_on(path: str, folder: Path) -> int:
    """The checkpoint is finite; resumed, a copy of the run has its networks, keeps its rows, goes on and updates.

    With a learning rate of 0 the networks stay what they were when loaded. Returns the checkpoint's step.
    """
    cwd = folder.parent.parent.with_name(f"resumed_{time.monotonic_ns()}")
    copy = Path(shutil.copytree(folder, cwd / "runs" / folder.name))
    before = load(copy / "checkpoint.pt")
    assert all(leaf.isfinite().all() for leaf in tree_leaves(before) if isinstance(leaf, torch.Tensor))
    step = before["step"]
    changes = dict(learning_rate=0, policy_lr=0, q_lr=0, eval_every=10**6, log_every=10, total_timesteps=step + 30)
    run = Run(path, "--resume", copy, *flags(path, **changes), cwd=cwd).wait(0)
    after = load(copy / "checkpoint.pt")
    assert step < run.steps[0] <= step + 10 and after["step"] == step + 30
    optimizer = "optimizer" if path == PPO else "critic_optimizer"
    assert after[optimizer]["state"][0]["step"] > before[optimizer]["state"].get(0, {"step": 0})["step"]
    for network in ("actor", "critic"):
        for name, weights in before[network].items():
            assert "normalizer" in name or torch.equal(weights, after[network][name])
    rows = [row for row in read_eval(folder) if row["step"] <= step]
    assert read_eval(copy)[: len(rows)] == rows and read_eval(copy)[-1]["step"] == step + 30
    shutil.rmtree(cwd)
    return step


# Kills and signals.

MORE = [pytest.param(path, times, marks=pytest.mark.slow) for path, times in ((TD3, 12), (SAC, 9), (PPO, 9))]


@pytest.mark.parametrize("path, times", [(TD3, 3), *MORE])
def test_sigkill(path, times, tmp_path):
    """One run, killed again and again; every second time while it writes a checkpoint, which it does at every step."""
    chance = random.Random(times)
    cwd = tmp_path / "run"
    last = 0
    for kill in range(times):
        for file in cwd.glob("runs/*/*.tmp"):
            file.unlink()
        run = Run(path, "--resume", only_run(cwd), cwd=cwd) if kill else start(path, cwd, eval_every=25, save_every=1)
        run.until(lambda: list(cwd.glob("runs/*/checkpoint.pt")))
        if kill % 2:
            time.sleep(chance.uniform(0, 2))  # as it starts, loads, evaluates, learns or writes
        else:
            run.until(lambda: max([0, *run.steps]) > last + 10)
            run.until(lambda: list(cwd.glob("runs/*/*.pt.tmp")))
        os.kill(run.pid, signal.SIGKILL)
        run.wait(-signal.SIGKILL)
        step = check_goes_on(path, only_run(cwd))
        assert step >= last and set(range(0, step, 25)) <= {row["step"] for row in read_eval(only_run(cwd))}
        last = step


SIGNALS = [
    ("SIGTERM", os.kill),
    ("SIGTERM", os.killpg),
    ("SIGINT", os.killpg),
    ("SIGUSR1", os.kill),
    ("SIGHUP", os.killpg),
]


@each_script
@pytest.mark.parametrize("number, send", SIGNALS)
def test_a_signal_saves(path, number, send, tmp_path):
    """SIGINT is sent while evaluations take most of the time."""
    run = start(path, tmp_path, save_every=10**6, eval_every=1 if number == "SIGINT" else 10**6)
    run.until(lambda: 40 in run.steps)
    send(run.pid, getattr(signal, number))
    run.wait(0, timeout=60)
    assert run.errors.strip() == "saving, then stopping; Ctrl-C again to stop at once"
    assert check_goes_on(path, only_run(tmp_path)) >= run.steps[-1]


def test_a_second_signal_stops_at_once(tmp_path):
    """The first cannot be obeyed while an environment hangs; another within a second is the same request."""
    run = start(TD3, tmp_path, "Hangs", before=lambda: None)
    run.until(lambda: GOOD_STEPS in run.steps)
    time.sleep(1)
    before = contents(tmp_path)
    for pause in (0.2, 1):  # uv run sends it twice
        os.killpg(run.pid, signal.SIGINT)
        time.sleep(pause)
    assert run.process.is_alive()
    os.killpg(run.pid, signal.SIGINT)
    run.wait(128 + signal.SIGINT, timeout=5)
    assert contents(tmp_path) == before
    check_goes_on(TD3, only_run(tmp_path))


def test_nohup_and_the_printed_command(tmp_path):
    """A SIGHUP that the user's shell ignores stays ignored; what SIGTERM prints can be pasted, whatever the folder."""

    def as_nohup() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    run = start(TD3, tmp_path, before=as_nohup, env_id="Pendulum-v1", runs_dir="it's $HOME")
    for number, steps in ((signal.SIGHUP, 40), (signal.SIGTERM, 80)):
        run.until(lambda: steps in run.steps)
        os.kill(run.pid, number)
    command = run.wait(0).output.splitlines()[-1].partition("go on with: ")[2]
    (folder,) = tmp_path.glob("it's $HOME/*")
    step = load(folder / "checkpoint.pt")["step"]
    subprocess.run(f"{command} --total-timesteps {step + 5}", shell=True, cwd=tmp_path, check=True)
    assert load(folder / "checkpoint.pt")["step"] == step + 5


def test_the_printed_command_under_uv(monkeypatch):
    monkeypatch.setenv("UV_RUN_RECURSION_DEPTH", "1")  # uv run sets it
    monkeypatch.setattr(sys, "argv", ["baselines/td3.py", "--seed", "2"])
    words = shlex.split(load_script(TD3).resume_command(Path("runs/one")))
    assert words == ["uv", "run", "baselines/td3.py", "--resume", "runs/one"]


# Environments and numbers.

EXPECTED = {
    "Raises": "ValueError: the robot fell off the table",
    "Dies": "EOFError|BrokenPipeError|ConnectionResetError",
    "Hangs": "TimeoutError: .* timed out after 5 second",
    "NanObservation": rf"step {GOOD_STEPS}: the observation of environment 0 is not finite: \[nan nan\]",
    "InfiniteReward": rf"step {GOOD_STEPS}: the reward of environment 0 is not finite: inf",
    "OverflowingReward": rf"step {GOOD_STEPS}: the reward of environment 0 is not finite: 1e\+300",
}
ALONE = [
    ("Raises", 1),
    ("NanObservation", 1),
    ("InfiniteReward", 1),
]  # a single environment is in the trainer's process
TOGETHER = [("Raises", 2), ("Dies", 2), ("Hangs", 2), ("OverflowingReward", 2)]


@each_script
@pytest.mark.parametrize("env, num_envs", ALONE + TOGETHER)
def test_environment_misbehaves(path, env, num_envs, tmp_path):
    run = start(path, tmp_path, env, num_envs=num_envs).wait(1)
    assert re.search(EXPECTED[env], run.errors), run.errors
    assert check_goes_on(path, only_run(tmp_path)) == GOOD_STEPS // 20 * 20


@each_script
@pytest.mark.parametrize("env", ["Raises", "Dies", "Hangs"])
def test_environment_misbehaves_in_an_evaluation(path, env, tmp_path):
    run = start(path, tmp_path, env, eval_every=10, save_every=10).wait(1)
    assert re.search(EXPECTED[env], run.errors), run.errors
    assert check_goes_on(path, only_run(tmp_path)) == 10  # it was the third evaluation, of 20 steps each


@off_policy
@pytest.mark.parametrize("env", ["HugeReward", "HugerReward"])
@pytest.mark.parametrize("log_every", [10, 10**6])
def test_numbers_overflow(path, env, log_every, tmp_path):
    """A loss or a network, noticed by the log or by the checkpoint; what was saved before is finite."""
    run = start(path, tmp_path, env, log_every=log_every, total_timesteps=100, save_every=25).wait(1)
    assert "not finite" in run.errors
    assert check_goes_on(path, only_run(tmp_path)) == GOOD_STEPS  # a replay saved later would hold such rewards


# Files. /dev/full refuses every write, as a full disk does; a file-size limit refuses those beyond it.


@off_policy
@pytest.mark.parametrize("name", ["checkpoint.pt", "checkpoint.pt, half", "replay.pt", "eval.csv"])
def test_disk_full(path, name, tmp_path):
    start(path, tmp_path, total_timesteps=40).wait(0)
    folder = only_run(tmp_path)
    half = (folder / "checkpoint.pt").stat().st_size // 2

    def before() -> None:
        if "half" in name:
            resource.setrlimit(resource.RLIMIT_FSIZE, (half, half))
        else:
            (folder / f"{name}.tmp").symlink_to("/dev/full")

    words = ["--resume", folder, "--total-timesteps", 80, "--eval-every", 20]
    run = Run(path, *words, cwd=tmp_path, before=before).wait(1)
    assert re.search("No space left on device|file write failed|File too large|unexpected pos", run.errors), run.errors
    (folder / f"{name}.tmp").unlink(missing_ok=True)
    assert check_goes_on(path, folder) == 40


class Payload:
    """Unpickled, it would make a folder."""

    def __reduce__(self):
        return os.mkdir, ("payload",)


def damaged(file: Path) -> list[bytes]:
    """What could be found in place of file, a checkpoint or a replay."""
    whole = file.read_bytes()
    state = load(file)
    payload = {**state, "step": Payload(), "rows": Payload()}
    misshapen = {**state, "rows": torch.zeros(3, 4), "critic": {"fc1.weight": torch.zeros(7)}}
    found = [
        b"",
        b"no checkpoint",
        whole[: len(whole) // 2],
        whole[:100] + b"\xff" * 400 + whole[500:],
        pickle.dumps(payload),
    ]
    for other in ({}, {"weights": 0}, misshapen, payload):
        buffer = io.BytesIO()
        torch.save(other, buffer)
        found.append(buffer.getvalue())
    return found


def test_damaged_files(tmp_path):
    """Exit status 2, one line, nothing written, no code run."""
    start(TD3, tmp_path / "run", total_timesteps=40).wait(0)
    start("baselines/sac.py", tmp_path / "other", total_timesteps=5, save_every=5).wait(0)
    folder = only_run(tmp_path / "run")
    foreign = {name: [(only_run(tmp_path / "other") / name).read_bytes()] for name in ("args.json", "checkpoint.pt")}
    found = {"args.json": [b"", b"{", b"[]", b"null", *foreign["args.json"]]}
    found["checkpoint.pt"] = damaged(folder / "checkpoint.pt") + foreign["checkpoint.pt"]
    found["replay.pt"] = damaged(folder / "replay.pt")
    for name, data in [(file, data) for file in found for data in found[file]]:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(data)
        before = contents(tmp_path / "run")
        run = Run(TD3, "--resume", folder, "--total-timesteps", 50, cwd=tmp_path / "run").wait(2)
        assert run.errors.count("\n") == 1 and "td3.py: --resume" in run.errors, run.errors
        assert contents(tmp_path / "run") == before and not (tmp_path / "run/payload").exists()
        (folder / name).write_bytes(whole)
    check_goes_on(TD3, folder)

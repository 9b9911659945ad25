"""Real faults in real runs: kills, full disks, environments that fail, damaged files; SAC and PPO with -m slow."""

import io
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from faulty_envs import GOOD_STEPS
from processes import SMALL, Run, contents, flags, load, only_run, read_eval, use_cores
from torch.utils._pytree import tree_leaves

TD3, SAC, PPO = "baselines/td3.py", "sac_pave.py", "baselines/ppo.py"
SLOW = [pytest.param(path, marks=pytest.mark.slow) for path in (SAC, PPO)]
each_script = pytest.mark.parametrize("path", [TD3, *SLOW])


def impatient() -> None:
    """Two environments have a process each; after 5 s of silence, and 1 s of closing, all further seconds are short."""
    use_cores(2)
    poll, join = Connection.poll, threading.Thread.join
    silence = Counter()  # seconds, by connection

    def short_poll(self, timeout=0.0):
        answered = poll(self, timeout if silence[self.fileno()] < 5 else 0)
        silence[self.fileno()] = 0 if answered else silence[self.fileno()] + 1
        return answered

    Connection.poll = short_poll
    threading.Thread.join = lambda self, timeout=None: join(self, timeout and 1)


def start(path: str, cwd: Path, env: str = "Cheap", before: Callable = impatient, **changes) -> Run:
    changes = {"env_id": f"faulty_envs:{env}-v0", "total_timesteps": 10**6} | changes
    return Run(path, *flags(path, **SMALL | changes), cwd=cwd, before=before)


def check_goes_on(path: str, folder: Path) -> int:
    """A resumed copy begins at the checkpoint, whose step is returned, updates, and has its rows and new ones."""
    cwd = folder.parent.parent.with_name(f"resumed_{time.monotonic_ns()}")
    copy = Path(shutil.copytree(folder, cwd / "runs" / folder.name))
    before = load(copy / "checkpoint.pt")
    assert all(leaf.isfinite().all() for leaf in tree_leaves(before) if isinstance(leaf, torch.Tensor))
    step = before["step"]
    words = ["--eval-every", 10**6, "--log-every", 10, "--total-timesteps", step + 30]
    run = Run(path, "--resume", copy, *words, cwd=cwd).wait(0)
    after = load(copy / "checkpoint.pt")
    assert step < run.steps[0] <= step + 10 and after["step"] == step + 30
    optimizer = "optimizer" if path == PPO else "critic_optimizer"
    assert after[optimizer]["state"][0]["step"] > before[optimizer]["state"].get(0, {"step": 0})["step"]
    rows = [row for row in read_eval(folder) if row["step"] <= step]
    assert read_eval(copy)[: len(rows)] == rows and read_eval(copy)[-1]["step"] == step + 30
    return step


# Kills and signals.


@each_script
def test_sigkill(path, tmp_path):
    """One run, killed again and again as it evaluates, learns or writes, which it does at every step."""
    cwd = tmp_path / "run"
    last = 0
    for _ in range(4):
        run = Run(path, "--resume", only_run(cwd), cwd=cwd) if last else start(path, cwd, eval_every=25, save_every=1)
        run.until(lambda: max([0, *run.steps]) > last + 10)
        time.sleep(random.uniform(0, 0.3))
        os.kill(run.pid, signal.SIGKILL)
        run.wait(-signal.SIGKILL)
        step = check_goes_on(path, only_run(cwd))
        assert step > last and set(range(0, step, 25)) <= {row["step"] for row in read_eval(only_run(cwd))}
        last = step


SIGNALS = [("TERM", os.kill), ("TERM", os.killpg), ("INT", os.killpg), ("USR1", os.kill), ("HUP", os.killpg)]


@each_script
@pytest.mark.parametrize("name, send", SIGNALS)
def test_a_signal_saves(path, name, send, tmp_path, monkeypatch):
    """What is printed can be pasted, whatever the folder. SIGINT is sent while evaluations take most of the time."""
    monkeypatch.setenv("UV_RUN_RECURSION_DEPTH", "1")  # uv run sets it
    eval_every = 1 if name == "INT" else 10**6
    run = start(path, tmp_path, save_every=10**6, eval_every=eval_every, runs_dir="it's $HOME")
    run.until(lambda: 40 in run.steps)
    send(run.pid, getattr(signal, f"SIG{name}"))
    run.wait(0, timeout=60)
    assert run.errors.strip() == "saving, then stopping; Ctrl-C again to stop at once"
    (folder,) = tmp_path.glob("it's $HOME/*")
    command = run.output.splitlines()[-1].partition("go on with: ")[2]
    words = ["uv", "run", str(ROOT / path), "--resume", str(folder.relative_to(tmp_path))]
    assert shlex.split(command) == words
    assert check_goes_on(path, folder) >= run.steps[-1]


@pytest.mark.parametrize("env, num_envs", [("Cheap", 2), ("Simulator", 1)])
def test_nobody_reads(env, num_envs, tmp_path):
    """Ctrl-C under `2>&1 | tee log` ends tee first, and a simulator; a closed terminal fails in the same places."""
    reader, writer = os.pipe()

    def write_to_pipe() -> None:
        impatient()
        os.close(reader)
        os.dup2(writer, 1)
        os.dup2(writer, 2)

    run = start(TD3, tmp_path, env, num_envs=num_envs, save_every=10**6, before=write_to_pipe)
    os.close(writer)
    output = b""
    while b"step 40/" not in output:
        output += os.read(reader, 1000)
    os.close(reader)
    os.killpg(run.pid, signal.SIGINT)
    run.wait(0, 1)
    assert check_goes_on(TD3, only_run(tmp_path)) >= 40


def test_suspended_and_closed(tmp_path):
    """Ctrl-Z for longer than a step may take. At the end the workers, which wait for their simulators, are killed."""
    run = start(TD3, tmp_path, "Simulator", total_timesteps=60)
    run.until(lambda: 20 in run.steps)
    for pid in run.session():
        os.kill(pid, signal.SIGSTOP)
    time.sleep(6)
    for pid in run.session():
        os.kill(pid, signal.SIGCONT)
    run.wait(0)


def test_ctrl_c_ends_the_simulator_too(tmp_path):
    """A terminal sends it to all of the trainer's process group: the step fails, and what was learnt is saved."""
    run = start(TD3, tmp_path, "Simulator", num_envs=1, save_every=10**6)
    run.until(lambda: 20 in run.steps)
    os.killpg(run.pid, signal.SIGINT)
    run.wait(1)
    assert "(RuntimeError: the simulator is gone); go on with: " in run.output.splitlines()[-1]
    assert check_goes_on(TD3, only_run(tmp_path)) >= 20


def test_a_failure_is_told_where_it_cannot_be_saved(tmp_path):
    run = start(TD3, tmp_path, "Simulator", num_envs=1, save_every=10**6)
    run.until(lambda: 20 in run.steps)
    checkpoint = only_run(tmp_path) / "checkpoint.pt"
    checkpoint.unlink()
    checkpoint.mkdir()  # cannot be written to
    os.killpg(run.pid, signal.SIGINT)
    run.wait(1)
    assert "IsADirectoryError" in run.errors
    assert "(RuntimeError: the simulator is gone); go on with: " in run.output.splitlines()[-1]


# Environments and numbers.

EXPECTED = {
    "Raises": "ValueError: the robot fell off the table",
    "Dies": "EOFError|BrokenPipeError|ConnectionResetError",
    "Hangs": "TimeoutError: an environment's step has not returned after 300 seconds",
    "HangsInReset": "TimeoutError: an environment's reset has not returned after 3600 seconds",
    "RaisesUnsendable": "RuntimeError: UnsendableError: the simulator is gone",
    "NanObservation": rf"step {GOOD_STEPS}: the observation of environment 0 is not finite: \[nan nan\]",
    "NanInReset": r"step 60: the observation of environment 0 is not finite: \[nan nan\]",
    "InfiniteReward": rf"step {GOOD_STEPS}: the reward of environment 0 is not finite: inf",
    "OverflowingReward": rf"step {GOOD_STEPS}: the reward of environment 0 is not finite: 1e\+300",
}
ROWS = [("Raises", 1, {}, GOOD_STEPS)]  # 1: in the trainer's process
ROWS += [(env, 2, {}, GOOD_STEPS) for env in ("Raises", "RaisesUnsendable", "Dies", "Hangs")]
ROWS += [(env, num_envs, {}, 40) for env, num_envs in [("NanObservation", 1), ("InfiniteReward", 1)]]
ROWS += [("OverflowingReward", 2, {}, 40), ("NanInReset", 1, {}, 60)]
EVALUATION = dict(eval_every=10, save_every=10)  # the third is too long, with 20 steps each
ROWS += [(env, 2, EVALUATION, 10) for env in ("Raises", "Dies", "Hangs", "HangsInReset")]


@each_script
@pytest.mark.parametrize("env, num_envs, changes, saved", ROWS)
def test_environment_misbehaves(path, env, num_envs, changes, saved, tmp_path):
    """In training: all steps before are saved, but for bad numbers; those, and an evaluation, leave what was saved."""
    run = start(path, tmp_path, env, num_envs=num_envs, **changes).wait(1)
    assert re.search(EXPECTED[env], run.errors), run.errors
    assert re.match(r"failed at step \d+ \(.*\); go on with: ", run.output.splitlines()[-1])
    assert check_goes_on(path, only_run(tmp_path)) == saved


@pytest.mark.parametrize("env", ["HugeReward", "HugerReward"])
@pytest.mark.parametrize("log_every", [10, 10**6])
def test_numbers_overflow(env, log_every, tmp_path):
    """A loss or a network, noticed by the log or by the checkpoint; what was saved before is finite."""
    run = start(TD3, tmp_path, env, log_every=log_every, total_timesteps=100, save_every=25).wait(1)
    assert "not finite" in run.errors
    assert check_goes_on(TD3, only_run(tmp_path)) == GOOD_STEPS  # a replay saved later would hold such rewards


# Files. /dev/full refuses every write, as a full disk does.


@pytest.mark.parametrize("name, saved", [("checkpoint.pt", 40), ("replay.pt", 40), ("eval.csv", 60)])
def test_disk_full(name, saved, tmp_path):
    start(TD3, tmp_path, total_timesteps=40).wait(0)
    folder = only_run(tmp_path)
    (folder / f"{name}.tmp").symlink_to("/dev/full")
    words = ["--resume", folder, "--total-timesteps", 80, "--eval-every", 20]
    run = Run(TD3, *words, cwd=tmp_path).wait(1)
    assert re.search("No space left on device|file write failed|unexpected pos", run.errors), run.errors
    (folder / f"{name}.tmp").unlink(missing_ok=True)
    assert check_goes_on(TD3, folder) == saved


def test_damaged_files_and_another_protocol(tmp_path):
    """Exit status 2, one line, nothing written."""
    start(TD3, tmp_path / "run", total_timesteps=40).wait(0)
    start(SAC, tmp_path / "other", total_timesteps=5, save_every=5).wait(0)
    folder = only_run(tmp_path / "run")
    other = only_run(tmp_path / "other")
    buffer = io.BytesIO()
    torch.save({**load(folder / "checkpoint.pt"), "rows": torch.zeros(3), "critic": {"fc1": torch.zeros(7)}}, buffer)
    for name in ("args.json", "checkpoint.pt", "replay.pt"):
        whole = (folder / name).read_bytes()
        corrupt = b"\xff" * 400 + whole[400:]
        foreign = (other / name).read_bytes() if name != "replay.pt" else pickle.dumps({})
        for data in (b"", whole[: len(whole) // 2], corrupt, foreign, buffer.getvalue()):
            (folder / name).write_bytes(data)
            before = contents(tmp_path / "run")
            run = Run(TD3, "--resume", folder, "--total-timesteps", 50, cwd=tmp_path / "run").wait(2)
            assert run.errors.count("\n") == 1 and "td3.py: --resume" in run.errors, run.errors
            assert contents(tmp_path / "run") == before
        (folder / name).write_bytes(whole)
    before = contents(folder)
    for words in ("--env-id Pendulum-v1", "--seed 2", "--num-envs 3", "--buffer-size 10", "--total-timesteps 10"):
        run = Run(TD3, "--resume", folder, *words.split(), cwd=tmp_path / "run").wait(2)
        assert re.search("(env_id|seed|num_envs|buffer_size) was|it is at step 40 already", run.errors), run.errors
    assert contents(folder) == before
    (folder / "replay.pt").unlink()
    check_goes_on(TD3, folder)  # which gathers a new replay

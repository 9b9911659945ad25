"""The scripts as processes: start_script as a user does, Run forked from pytest's process, which saves seconds."""

import atexit
import contextlib
import csv
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import psutil
import torch
import torch._dynamo  # the first optimiser of each process would
from conftest import ROOT, load_script
from torch.utils.tensorboard import SummaryWriter  # noqa: F401

torch.set_num_threads(1)  # a forked process cannot use the threads of its parent
# Autograd starts threads once, for the devices known then: let it be before a compiled function makes a GPU known.
torch.ones(1, requires_grad=True).sum().backward()


@atexit.register
def kill_what_is_left() -> None:
    for process in multiprocessing.active_children():  # of a test that failed; multiprocessing would wait for it
        process.kill()


SMALL = dict(env_id="Pendulum-v1", num_envs=2, learning_starts=20, batch_size=16, buffer_size=1000, compile=False)
SMALL |= dict(log_every=10, eval_every=10**6, eval_episodes=2, save_every=20, update_every=10)
SMALL |= dict(num_steps=20, num_minibatches=4)  # PPO's


def flags(path: str, **values: object) -> list[str]:
    """--name value for those that the script has."""
    known = {field.name for field in fields(load_script(path).Args)}
    words = []
    for name in [name for name in values if name in known]:
        flag = name.replace("_", "-")
        if isinstance(values[name], bool):
            words.append(f"--{flag}" if values[name] else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(values[name])]
    return words


def use_cores(count: int) -> None:
    """What a script takes the machine to have: its environments share that many processes."""
    os.sched_getaffinity = lambda pid: set(range(count))


def start_script(path: str, *flags: object, cwd: Path, **environment: str) -> subprocess.Popen:
    """A Python of its own, in the folder cwd, on one thread; its output in pipes, as text."""
    command = [sys.executable, str(ROOT / path), *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", **environment}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=cwd, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


class Run:
    """python path words, in the folder cwd: started at once, in a session of its own, after before() in its process."""

    def __init__(self, path: str, *words: object, cwd: Path, before: Callable = lambda: None):
        cwd.mkdir(exist_ok=True)
        self.cwd = cwd
        argv = [str(ROOT / path), *map(str, words)]
        self.logs = [cwd.parent / f"{cwd.name}_{time.monotonic_ns()}.{name}" for name in ("stdout", "stderr")]
        for log in self.logs:
            log.touch()
        # faulty_envs.py goes by the names of processes
        fork = multiprocessing.get_context("fork")
        self.process = fork.Process(target=self.main, args=(argv, before), name="MainProcess")
        self.process.start()
        self.pid = self.process.pid

    def main(self, argv: list[str], before: Callable) -> None:
        """What the interpreter does around a script."""
        os.setsid()
        os.chdir(self.cwd)
        for number, log in enumerate(self.logs, 1):
            os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), number)
        sys.stdout = open(1, "w", buffering=1, closefd=False)
        sys.stderr = open(2, "w", buffering=1, closefd=False)
        sys.argv = argv
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs the tests may ignore them
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        before()
        runpy.run_path(argv[0], run_name="__main__")
        gc.collect()  # vector environments close here

    @property
    def output(self) -> str:
        return self.logs[0].read_text()

    @property
    def errors(self) -> str:
        return self.logs[1].read_text()

    @property
    def steps(self) -> list[int]:
        """Those of the lines logged."""
        lines = self.output.splitlines()
        return [int(line.split("/")[0].removeprefix("step ")) for line in lines if line.startswith("step ")]

    def until(self, condition: Callable, timeout: float = 240) -> None:
        """Waits for condition(), which must come while the process runs."""
        deadline = time.monotonic() + timeout
        while not condition():
            if not self.process.is_alive() or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"status {self.process.exitcode}: {self.output}{self.errors}")
            time.sleep(0.002)

    def wait(self, *status: int, timeout: float = 240) -> "Run":
        """Its end, with one of these exit statuses, and the end of all that it started."""
        self.process.join(timeout)
        deadline = time.monotonic() + 5
        while self.session() and time.monotonic() < deadline:
            time.sleep(0.002)
        left = self.session()
        self.kill()
        assert not left, f"{left} outlived it: {self.output}{self.errors}"
        assert self.process.exitcode in status, f"status {self.process.exitcode}: {self.output}{self.errors}"
        return self

    def kill(self) -> None:
        for pid in self.session():
            os.kill(pid, signal.SIGKILL)

    def session(self) -> list[int]:
        """It and the processes that it started, as far as they live."""
        members = []
        for process in psutil.process_iter(["status"]):
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                if os.getsid(process.pid) == self.pid and process.info["status"] != psutil.STATUS_ZOMBIE:
                    members.append(process.pid)
        return members


def only_run(cwd: Path) -> Path:
    (folder,) = (cwd / "runs").iterdir()
    return folder


def load(file: Path) -> dict:
    return torch.load(file, weights_only=True)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_eval(folder: Path) -> list[dict[str, float]]:
    """eval.csv's rows; whole, and none of them twice."""
    text = (folder / "eval.csv").read_text()
    assert text.endswith("\n")
    rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(text.splitlines())]
    assert len({(row["step"], row["seed"], row["episode"]) for row in rows}) == len(rows)
    return rows

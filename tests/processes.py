"""A script's `__main__` in a process of its own, forked from pytest's, which has imported torch already: that costs seconds."""

import atexit
import csv
import gc
import multiprocessing.util
import os
import resource
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch
import torch._dynamo  # the first optimiser of each process would
from conftest import ROOT, load_script
from torch.utils.tensorboard import SummaryWriter  # noqa: F401

torch.set_num_threads(1)  # a forked process cannot use the threads of its parent

SMALL = dict(env_id="Pendulum-v1", num_envs=2, learning_starts=20, batch_size=16, buffer_size=1000, compile=False)
SMALL |= dict(log_every=10, eval_every=10**6, eval_episodes=2, save_every=20, update_every=10, num_steps=20, num_minibatches=4)


def flags(path: str, **values: object) -> list[str]:
    """--name value for those that the script has."""
    words, known = [], {field.name for field in fields(load_script(path).Args)}
    for name, value in values.items():
        flag = f"--{'no-' if value is False else ''}{name.replace('_', '-')}"
        words += [] if name not in known else [flag] if isinstance(value, bool) else [flag, str(value)]
    return words


class Run:
    """python path words, in the folder cwd: started at once, in a session of its own. limits: {resource.RLIMIT_*: bytes}."""

    def __init__(self, path: str, *words: object, cwd: Path, before: Callable = lambda: None, limits: dict | None = None):
        cwd.mkdir(exist_ok=True)
        self.cwd, self.status = cwd, None
        self.logs = [cwd.parent / f"{cwd.name}_{time.monotonic_ns()}.{name}" for name in ("stdout", "stderr")]
        for log in self.logs:
            log.touch()
        self.pid = os.fork()
        if not self.pid:
            self.child([str(ROOT / path), *map(str, words)], cwd, before, limits or {})

    def child(self, argv: list[str], cwd: Path, before: Callable, limits: dict) -> None:
        """What the interpreter does around a script, and no way back into pytest."""
        status = 1
        try:
            atexit._clear()
            os.setsid()
            os.chdir(cwd)
            for number, log in enumerate(self.logs, 1):
                os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), number)
            sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
            for number, limit in limits.items():
                resource.setrlimit(number, (limit, limit))
            before()
            sys.argv = argv
            runpy.run_path(argv[0], run_name="__main__")
            status = 0
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
            sys.stderr.write(f"{stop.code}\n" if isinstance(stop.code, str) else "")
        except BaseException:
            traceback.print_exc()
        finally:
            gc.collect()  # vector environments close here
            multiprocessing.util._exit_function()
            os._exit(status)

    output, errors = (property(lambda self, index=index: self.logs[index].read_text()) for index in (0, 1))

    @property
    def steps(self) -> list[int]:
        """Those of the lines logged."""
        return [int(line.split("/")[0][5:]) for line in self.output.splitlines() if line.startswith("step ")]

    def running(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status is None

    def until(self, condition: Callable, timeout: float = 240, ended: bool = False) -> None:
        """Waits for condition(), while the process runs unless ended."""
        deadline = time.monotonic() + timeout
        while not condition():
            if not (ended or self.running()) or time.monotonic() > deadline:
                for pid in self.session():
                    os.kill(pid, signal.SIGKILL)
                raise AssertionError(f"status {self.status}: {self.output}{self.errors}")
            time.sleep(0.002)

    def wait(self, *status: int, timeout: float = 240) -> "Run":
        """Its end, with one of these exit statuses, and the end of all that it started."""
        self.until(lambda: not self.running(), timeout, ended=True)
        self.until(lambda: not self.session(), 5, ended=True)
        assert self.status in status, f"{self.status}: {self.output}{self.errors}"
        return self

    def session(self) -> list[int]:
        """It and the processes that it started, as far as they live."""
        members = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
            except OSError:  # it has just ended
                continue
            members += [int(path.parent.name)] * (int(session) == self.pid and state != "Z")
        return members


def only_run(cwd: Path) -> Path:
    (folder,) = (cwd / "runs").iterdir()
    return folder


def load(file: Path) -> dict:
    return torch.load(file, weights_only=True)


def read_eval(folder: Path) -> list[dict[str, float]]:
    """eval.csv's rows; whole, and none of them twice."""
    text = (folder / "eval.csv").read_text()
    rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(text.splitlines())]
    assert text.endswith("\n") and len({(row["step"], row["seed"], row["episode"]) for row in rows}) == len(rows)
    return rows

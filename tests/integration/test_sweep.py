"""benchmark/suites.py and sweep.py: the papers' cells, a sweep killed in every way, and mistakes in its flags."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest
from processes import start_script

pytest.importorskip("ray", reason="the benchmark extra is not installed: uv run --extra benchmark pytest")
import suites
import sweep

from runs import Run, load_script, read_runs

STEPS = 3000
FLAGS = f"--no-compile --total-timesteps {STEPS} --learning-starts 100 --batch-size 8 --log-every 50 --eval-episodes 1"
GRID = {"scripts": ("td3",), "env_ids": ("Pendulum-v1",), "seed_list": (42,), "flags": FLAGS}
COMMAND = ("--scripts", "td3", "--env-ids", "Pendulum-v1", "--seed-list", 42, f"--flags={FLAGS}")


def is_of(run: Run, cell: suites.Cell) -> bool:
    return not suites.other_arguments(run, cell)


def as_run(cell: suites.Cell, **changes: object) -> Run:
    return Run(Path("runs/NAME"), {"script": cell.script, **asdict(suites.cell_args(cell)), **changes}, True)


@pytest.mark.parametrize("suite", suites.SUITES)
def test_a_run_is_of_its_own_cell_alone(suite):
    """A run of other seeds, length, place and evaluation still is the cell's; one with another argument is not."""
    for cell in suites.SUITES[suite]:
        run = as_run(cell, seed=7, num_seeds=3, total_timesteps=1000, eval_episodes=20, runs_dir="/elsewhere")
        del run.args["env_kwargs"]  # of before that flag
        of = {(suites.name_of(other), other.env_id) for other in suites.SUITES[suite] if is_of(run, other)}
        assert of == {(suites.name_of(cell), cell.env_id)}
        for changes in ({"gamma": 0.5}, {"dropped_flag": 1}, {"env_kwargs": '{"g": 9}'}):
            assert not is_of(as_run(cell, **changes), cell)


def test_plan_makes_blocks_of_successive_seeds_that_share_no_folder():
    options = sweep.Options(suites=("ams-what-works",), seed_list=(0, 42, 43, 44, 123), seeds_per_run=2, scale=0.1)
    tasks, complete = sweep.plan(sweep.select_cells(options), options, [])
    assert complete == 0 and len(tasks) == len(suites.SUITES["ams-what-works"]) * 4
    assert len({(task.args["exp_name"], task.args["seed"]) for task in tasks}) == len(tasks)
    elsewhere = replace(options, flags="--no-cuda --save-every 7 --exp-name other")  # on a machine without a GPU, say
    same_tasks, _ = sweep.plan(sweep.select_cells(elsewhere), elsewhere, [])
    assert [task.name for task in same_tasks] == [task.name for task in tasks]  # so they take turns
    assert [(task.args["seed"], task.args["num_seeds"]) for task in tasks[:4]] == [(0, 1), (42, 2), (44, 1), (123, 1)]
    for task in tasks:  # what the script makes of the flags
        args = sweep.tyro.cli(load_script(task.script.name).Args, args=task.flags)
        assert {"script": task.script.stem, **asdict(args)} == task.args
        assert task.args["total_timesteps"] == 50_000 and task.args["num_envs"] == 8


SAVES_FOR_A_SECOND = """
import pathlib, signal, sys, time

def save(*_):
    time.sleep(1)
    pathlib.Path("saved").touch()
    sys.exit()

signal.signal(signal.SIGTERM, save)
pathlib.Path("ready").touch()
time.sleep(60)
"""


def test_a_signal_to_the_whole_job_leaves_the_guard_to_wait(tmp_path):
    command = [sys.executable, "-c", sweep.GUARD, "lock", sys.executable, "-c", SAVES_FOR_A_SECOND]
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=tmp_path, start_new_session=True)
    while not (tmp_path / "ready").exists():
        assert guard.poll() is None
        time.sleep(0.01)
    os.killpg(guard.pid, signal.SIGTERM)
    assert guard.wait(60) == 0 and (tmp_path / "saved").exists()


@pytest.mark.slow
def test_sweep_survives_kill_and_ctrl_c_and_trains_nothing_twice(tmp_path):
    """SIGKILL to the driver; again, then Ctrl-C; again, then SIGKILL to Ray's worker; to the end."""
    options = sweep.Options(**GRID, runs_dir=tmp_path / "runs")
    (task,), _ = sweep.plan(sweep.select_cells(options), options, [])
    lock = str(task.script_lock)

    def start_and_wait(tries: int):
        process = start_script("benchmark/sweep.py", *COMMAND, cwd=tmp_path)
        deadline = time.monotonic() + 600
        logs = []  # of each try of the script
        while len(logs) < tries or logs[-1].count("\nstep ") < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
            if task.log.exists():
                logs = task.log.read_text().split("\n$ ")[1:]
        return process

    start_and_wait(1).kill()
    process = start_and_wait(2)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0 and "1 to go; the same command goes on" in output, errors
    process = start_and_wait(3)
    (guard,) = [other for other in psutil.process_iter(["cmdline"]) if lock in (other.info["cmdline"] or ())]
    guard.parent().kill()  # Ray's worker
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0 and "1 finished, 0 failed" in output, errors

    log = task.log.read_text()
    assert len(re.findall(r"^\$ .* --resume ", log, re.M)) == log.count("stopped at step") == 3
    steps = [int(step) for step in re.findall(r"^step (\d+)/", log, re.M)]
    assert steps == sorted(steps) and set(steps) == {*range(0, STEPS + 1, 50)}
    assert sweep.plan(sweep.select_cells(options), options, read_runs(options.runs_dir)) == ([], 1)

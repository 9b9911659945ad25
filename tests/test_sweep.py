"""benchmark/sweep.py: the papers' cells, a sweep that is killed in every way, and mistakes on its command line."""

import csv
import os
import re
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import ROOT, start_script

pytest.importorskip("ray", reason="the benchmark extra is not installed: uv run --extra benchmark pytest")
sys.path.insert(0, str(ROOT / "benchmark"))
import suites
import sweep

STEPS = 3000
FLAGS = f"--no-compile --total-timesteps {STEPS} --learning-starts 100 --batch-size 8 --eval-every 1500 --eval-episodes 1"
GRID = {"scripts": ("td3",), "env_ids": ("Pendulum-v1",), "seed_list": (42,), "flags": f"{FLAGS} --log-every 50"}
COMMAND = ("--scripts", "td3", "--env-ids", "Pendulum-v1", "--seed-list", 42, f"--flags={GRID['flags']}")


def paper(name: str) -> list[dict[str, str]]:
    with open(ROOT / "benchmark" / "paper" / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def as_run(cell: suites.Cell, **changes: object) -> suites.Run:
    """A run on disk with the cell's arguments, as far as is_of looks."""
    args = {"script": cell.script, **asdict(suites.cell_args(cell)), **changes}
    return suites.Run(Path("runs/NAME"), args, True)


def test_every_cell_of_the_papers_tables_is_in_a_suite():
    cells = {suite: {(cell.method, cell.env_id) for cell in suites.SUITES[suite]} for suite in suites.SUITES}
    rows = paper("pave_tables_1_2")
    for suite, backbone in (("pave-table-1", "td3"), ("pave-table-2", "sac")):
        assert cells[suite] == {(row["method"], row["env_id"]) for row in rows if row["backbone"] == backbone}
    assert cells["pave-critic-baselines"] == {(row["method"], row["env_id"]) for row in paper("pave_critic_baselines")}
    ablation = {(row["mpr"] + row["vfc"] + row["curv"], "Walker2d-v5") for row in paper("pave_ablation_walker_td3")}
    assert cells["pave-ablation"] == ablation
    assert cells["pave-plus-caps"] == {(row["method"], "LunarLander-v3") for row in paper("pave_plus_caps_lunar_td3")}
    rows = paper("ams_table_2")
    assert cells["ams-table-2"] == {(row["method"], row["env_id"]) for row in rows}
    rows = paper("ams_table_3_quadruped_run")
    assert cells["ams-table-3"] == {(f"{row['backbone']}:{row['variant']}", "quadruped-run") for row in rows}


@pytest.mark.parametrize("suite", suites.SUITES)
def test_cells_are_valid_and_a_run_is_of_its_own_cell_alone(suite):
    """A run of other seeds, length and evaluation still is the cell's; one with another argument is not."""
    for cell in suites.SUITES[suite]:
        args = suites.cell_args(cell)
        shorter = as_run(cell, seed=7, num_seeds=3, total_timesteps=args.total_timesteps // 2, eval_episodes=20)
        of = [other for other in suites.SUITES[suite] if suites.is_of(shorter, other)]
        same = [other for other in suites.SUITES[suite] if asdict(suites.cell_args(other)) == asdict(args)]
        assert of == [other for other in same if other.script == cell.script]
        assert not suites.is_of(as_run(cell, gamma=0.5), cell)
        assert not suites.is_of(as_run(cell, dropped_flag=1), cell)


def test_pave_tables_train_all_methods_by_one_protocol():
    for suite in ("pave-table-1", "pave-table-2"):
        for env_id in suites.PAVE_ENVS:
            group = [asdict(suites.cell_args(cell)) for cell in suites.SUITES[suite] if cell.env_id == env_id]
            shared = set.intersection(*map(set, group)) - {"exp_name"}
            assert len(group) == 5 and len(shared) > 15
            assert all(args[name] == group[0][name] for args in group for name in shared)


def test_plan_makes_blocks_of_successive_seeds_that_share_no_folder():
    options = sweep.Options(suites=("ams-what-works",), seed_list=(0, 42, 43, 44, 123), seeds_per_run=2, scale=0.1)
    tasks, complete = sweep.plan(sweep.select_cells(options), options, [])
    assert complete == 0 and len(tasks) == 7 * 4
    assert len({(task.args["exp_name"], task.args["seed"]) for task in tasks}) == len(tasks)
    assert [(task.args["seed"], task.args["num_seeds"]) for task in tasks[:4]] == [(0, 1), (42, 2), (44, 1), (123, 1)]
    for task in tasks:  # what the script makes of the flags
        args = suites.load_script(task.script.name).Args
        assert {"script": task.script.stem, **asdict(sweep.tyro.cli(args, args=task.flags))} == task.args
        assert task.args["total_timesteps"] == 50_000 and task.args["num_envs"] == 8


@pytest.mark.parametrize(
    "options, message",
    [
        ({"suites": ("pave-table-9",)}, "no suite is called pave-table-9"),
        ({}, "name a suite"),
        ({"suites": ("pave-table-1",), "only": ("Pendulum",)}, "--only Pendulum: there are"),
        ({"scripts": ("td4",), "env_ids": ("Pendulum-v1",)}, "no script is called td4"),
        ({**GRID, "scale": 0.0}, "must be above 0"),
        ({**GRID, "address": "127.0.0.1:9"}, "--address 127.0.0.1:9: no Ray cluster answers there"),
    ],
)
def test_mistakes_are_one_line_and_status_2(options, message, capsys):
    with pytest.raises(SystemExit) as error:
        sweep.main(sweep.Options(**options))
    printed = capsys.readouterr().err
    assert error.value.code == 2 and message in printed and printed.count("\n") == 1


def test_a_script_that_refuses_its_arguments_is_not_retried(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = sweep.Options(**{**GRID, "env_ids": ("No-Such-v0",)})
    (task,), _ = sweep.plan(sweep.select_cells(options), options, [])
    with pytest.raises(ValueError, match=r"exit status 2: td3\.py: --env-id No-Such-v0"):
        sweep.work(task, 1)


@pytest.mark.slow
def test_sweep_survives_kill_and_ctrl_c_and_trains_nothing_twice(tmp_path, monkeypatch):
    """SIGKILL to the driver; the same command, then Ctrl-C; the same command, then SIGKILL to Ray's worker; to the end."""

    def log() -> str:
        return "".join(path.read_text() for path in tmp_path.glob("runs/.sweep/*.log"))

    def steps() -> list[int]:
        return [int(step) for step in re.findall(r"^step (\d+)/", log(), re.M)]

    def start_and_wait(tries: int):
        process, before = start_script("benchmark/sweep.py", *COMMAND, cwd=tmp_path), len(steps())
        deadline = time.monotonic() + 600
        while log().count("\n$ ") < tries or len(steps()) < before + 3:
            assert process.poll() is None and time.monotonic() < deadline, log()
            time.sleep(0.05)
        return process

    start_and_wait(1).kill()
    process = start_and_wait(2)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0 and "1 to go; the same command goes on" in output, errors
    process = start_and_wait(3)
    (script,) = [path.parent for path in Path("/proc").glob("[0-9]*/cwd") if is_script(path, tmp_path)]
    os.kill(int(re.search(r"^PPid:\s+(\d+)", (script / "status").read_text(), re.M)[1]), signal.SIGKILL)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0 and "1 finished, 0 failed" in output, errors

    assert len(re.findall(r"^\$ .* --resume ", log(), re.M)) == log().count("stopped at step") == 3
    assert steps() == sorted(steps()) and set(steps()) == {*range(0, STEPS + 1, 50)}
    (run,) = suites.read_runs(tmp_path / "runs")
    assert run.is_complete and list(run.seeds) == [42]
    monkeypatch.chdir(tmp_path)
    options = sweep.Options(**GRID)
    assert sweep.plan(sweep.select_cells(options), options, [run]) == ([], 1)


def is_script(cwd: Path, folder: Path) -> bool:
    """Whether /proc/PID/cwd is of a td3.py that trains in the folder."""
    try:
        return cwd.resolve() == folder and "td3.py" in (cwd.parent / "cmdline").read_text().split("\0")[1]
    except OSError:  # it ended meanwhile
        return False

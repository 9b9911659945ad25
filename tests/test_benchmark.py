"""benchmark/: sweeps that survive kills, and what report.py, geometry.py and speed.py make of real (tiny) runs."""

import csv
import json
import os
import re
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, run_script, start_script

sys.path.insert(0, str(ROOT / "benchmark"))
import sweep

TINY = "--total-timesteps 2000 --learning-starts 100 --eval-every 1000 --eval-episodes 1 --hidden-sizes 8 8 --batch-size 8"
GRID = ("--scripts", "td3", "--env-ids", "Pendulum-v1", "--seeds", 2, "--seeds-per-run", 1)
GRID += (f"--flags={TINY} --checkpoint-seconds 0.5 --log-every 50",)


def wait_for(condition, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.1)


def last_steps(folder: Path) -> list[int]:
    """The last step that each script of a sweep has printed."""
    logs = [re.findall(r"^step (\d+)/", path.read_text(), re.M) for path in folder.glob("runs/.sweep/*.log")]
    return [int(steps[-1]) if steps else 0 for steps in logs]


def check_trained_once(folder: Path) -> None:
    """Both seeds have one run each, complete, and every step was evaluated once."""
    runs = sweep.read_runs(folder / "runs")
    assert sorted(run.args["seed"] for run in runs) == [1, 2]
    for run in runs:
        assert run.is_complete
        with open(run.folder / "eval.csv", newline="") as file:
            assert Counter(row["step"] for row in csv.DictReader(file)) == {"0": 1, "1000": 1, "2000": 1}


def test_pave_tables_train_all_methods_by_one_protocol():
    """The flags that the suites give to the plain scripts say what the PAVE scripts say by themselves."""
    for suite, backbone in (("pave-table-1", "td3"), ("pave-table-2", "sac")):
        for env_id in sweep.PAVE_ENVS:
            of = {cell.method: sweep.cell_args(cell) for cell in sweep.SUITES[suite] if cell.env_id == env_id}
            shared = set(vars(of["base"])) & set(vars(of["pave"])) - sweep.INCIDENTAL
            assert len(shared) > 15 and backbone
            for method, args in of.items():
                assert {name: getattr(args, name) for name in shared} == {name: getattr(of["base"], name) for name in shared}, (
                    method
                )


def test_every_cell_of_the_papers_tables_has_a_suite_entry():
    def read(name: str) -> list[dict[str, str]]:
        with open(ROOT / "benchmark" / "paper" / name, newline="") as file:
            return list(csv.DictReader(file))

    def cells(suite: str) -> set[tuple[str, str]]:
        return {(cell.method, cell.env_id) for cell in sweep.SUITES[suite]}

    for suite, backbone in (("pave-table-1", "td3"), ("pave-table-2", "sac")):
        paper = [row for row in read("pave_tables_1_2.csv") if row["backbone"] == backbone]
        assert cells(suite) == {(row["method"], row["env_id"]) for row in paper}
    assert cells("ams-table-2") == {(row["method"], row["env_id"]) for row in read("ams_table_2.csv")}
    variants = {f"{row['backbone']}:{row['variant']}" for row in read("ams_table_3_quadruped_run.csv")}
    assert {cell.method for cell in sweep.SUITES["ams-table-3"]} == variants
    assert cells("pave-critic-baselines") == {(row["method"], row["env_id"]) for row in read("pave_critic_baselines.csv")}
    settings = {row["mpr"] + row["vfc"] + row["curv"] for row in read("pave_ablation_walker_td3.csv")}
    assert {cell.method for cell in sweep.SUITES["pave-ablation"]} == settings
    assert {cell.method for cell in sweep.SUITES["pave-plus-caps"]} == {
        row["method"] for row in read("pave_plus_caps_lunar_td3.csv")
    }


@pytest.mark.parametrize(
    "flags, message",
    [
        (["pave-table-9"], "no suite is called pave-table-9"),
        ([], "name a suite"),
        (["pave-table-1", "--only", "Pendulum"], "--only Pendulum: there are"),
        (["--scripts", "td4", "--env-ids", "Pendulum-v1"], "no script is called td4"),
        (["pave-table-1", "--scale", "0"], "must be above 0"),
    ],
)
def test_mistakes_in_a_sweep_are_one_line_and_status_2(tmp_path, flags, message):
    result = run_script("benchmark/sweep.py", *flags, cwd=tmp_path)
    assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_dry_run_prints_commands_and_a_failing_run_is_reported_not_retried(tmp_path):
    flags = ("--scripts", "td3", "--env-ids", "Pendulum-v1", "No-Such-v0", "--scale", 0.01, "--seeds", 3, "--seeds-per-run", 2)
    result = run_script("benchmark/sweep.py", *flags, "--dry-run", cwd=tmp_path)
    commands = result.stdout.splitlines()
    assert len(commands) == 4 and not list(tmp_path.iterdir())
    assert commands[0].endswith("baselines/td3.py --env-id Pendulum-v1 --num-seeds 2 " + commands[0].split("--num-seeds 2 ")[1])
    assert "--total-timesteps 10000" in commands[0] and "--seed 3" in commands[1]
    result = run_script("benchmark/sweep.py", *flags, "--only", "No-Such-v0", cwd=tmp_path)
    assert result.returncode == 1 and "no environment is called 'No-Such-v0'" in result.stderr
    logs = [path.read_text() for path in tmp_path.glob("runs/.sweep/*.log")]
    assert [log.count("\n$ ") for log in logs] == [1, 1]


def test_sweep_survives_a_killed_driver_and_ctrl_c(tmp_path):
    """SIGKILL to the driver, then Ctrl-C, then a run to the end: each seed is trained once, from where it was."""
    process = start_script("benchmark/sweep.py", *GRID, cwd=tmp_path)
    wait_for(lambda: len(last_steps(tmp_path)) == 2 and min(last_steps(tmp_path)) > 100)
    process.kill()
    process.communicate()
    process = start_script("benchmark/sweep.py", *GRID, cwd=tmp_path)
    wait_for(lambda: all("--resume" in path.read_text() for path in tmp_path.glob("runs/.sweep/*.log")))
    reached = last_steps(tmp_path)
    wait_for(lambda: min(now - before for now, before in zip(last_steps(tmp_path), reached)) > 0)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and "2 to go; the same command goes on" in output, errors
    checkpoints = [json.loads((run.folder / "args.json").read_text()) for run in sweep.read_runs(tmp_path / "runs")]
    assert len(checkpoints) == 2 and not any(run.is_complete for run in sweep.read_runs(tmp_path / "runs"))
    result = run_script("benchmark/sweep.py", *GRID, cwd=tmp_path)
    assert result.returncode == 0 and "2 finished, 0 failed" in result.stdout, result.stderr
    check_trained_once(tmp_path)
    again = run_script("benchmark/sweep.py", *GRID, "--dry-run", cwd=tmp_path)
    assert again.stdout == "# 1 complete already\n"


def test_sweep_survives_the_death_of_a_machine(tmp_path):
    """Two Ray nodes, one killed in the middle: its run goes on, from its checkpoint, on the other."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        process = start_script("benchmark/sweep.py", *GRID, "--address", cluster.address, cwd=tmp_path)
        wait_for(lambda: len(last_steps(tmp_path)) == 2 and min(last_steps(tmp_path)) > 100)
        cluster.remove_node(nodes[0], allow_graceful=False)
        output, errors = process.communicate(timeout=180)
        assert process.returncode == 0 and "2 finished, 0 failed" in output, errors
    finally:
        cluster.shutdown()
    check_trained_once(tmp_path)
    tries = [path.read_text().count("\n$ ") for path in tmp_path.glob("runs/.sweep/*.log")]
    assert sorted(tries) == [1, 2]  # the killed node's run was tried again, the other was left alone
    assert os.path.exists(tmp_path / "runs")

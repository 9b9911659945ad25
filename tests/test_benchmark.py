"""benchmark/: sweeps that survive kills, and what report.py, geometry.py and speed.py make of real (tiny) runs."""

import csv
import json
import re
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script, start_script

metrics = pytest.importorskip("rliable.metrics", reason="the benchmark extra is not installed: uv run --extra benchmark pytest")
sys.path.insert(0, str(ROOT / "benchmark"))
import geometry
import report
import sweep

TINY = "--total-timesteps 10000 --learning-starts 100 --eval-every 5000 --eval-episodes 1 --hidden-sizes 8 8 --batch-size 8"
GRID = ("--scripts", "td3", "--env-ids", "Pendulum-v1", "--seeds", 2, "--seeds-per-run", 1)
GRID += (f"--flags={TINY} --checkpoint-seconds 1000 --log-every 50",)  # only a signal saves in the middle


def wait_for(condition, timeout: float = 300) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.1)


def last_steps(folder: Path) -> list[int]:
    """The last step that each script of a sweep has printed."""
    logs = [re.findall(r"^step (\d+)/", path.read_text(), re.M) for path in folder.glob("runs/.sweep/*.log")]
    return [int(steps[-1]) if steps else 0 for steps in logs]


def check_trained_once(folder: Path) -> None:
    """Both seeds have one run each, complete, every step was evaluated once, and none was trained twice."""
    for path in folder.glob("runs/.sweep/*.log"):
        steps = [int(step) for step in re.findall(r"^step (\d+)/", path.read_text(), re.M)]
        assert steps == sorted(steps)
    runs = sweep.read_runs(folder / "runs")
    assert sorted(run.args["seed"] for run in runs) == [1, 2]
    for run in runs:
        assert run.is_complete
        with open(run.folder / "eval.csv", newline="") as file:
            assert Counter(row["step"] for row in csv.DictReader(file)) == {"0": 1, "5000": 1, "10000": 1}


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
        (["--scripts", "td3", "--env-ids", "Pendulum-v1", "--address", "127.0.0.1:9"], "--address 127.0.0.1:9: no Ray cluster"),
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
    output, errors = process.communicate(timeout=200)
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
        output, errors = process.communicate(timeout=400)
        assert process.returncode == 0 and "2 finished, 0 failed" in output, errors
    finally:
        cluster.shutdown()
    check_trained_once(tmp_path)
    tries = [path.read_text().count("\n$ ") for path in tmp_path.glob("runs/.sweep/*.log")]
    assert sorted(tries) == [1, 2]  # the killed node's run was resumed, the other left alone


# What is made of runs: tiny ones of the suites, trained by the scripts.


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Base and PAVE on Pendulum, two seeds, 100 steps, by the sweep."""
    folder = tmp_path_factory.mktemp("trained")
    flags = (
        "pave-table-1",
        "--only",
        "base",
        "pave",
        "Pendulum-v1",
        "--scale",
        0.001,
        "--seeds",
        2,
        "--flags=--eval-episodes 2",
    )
    result = run_script("benchmark/sweep.py", *flags, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert len(sweep.read_runs(folder / "runs")) == 2
    return folder


def section(text: str, title: str) -> list[list[str]]:
    """The rows of the table under a heading of report.md."""
    lines = text.split(f"## {title}")[1].split("\n## ")[0].splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]


def test_report_and_geometry_of_real_runs(trained, tmp_path):
    """Both files, all figures; the figures of a cell are those of eval.csv, and cells without runs are empty."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    result = run_script("benchmark/geometry.py", "--checkpoints", 2, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    with open(tmp_path / "report" / "geometry.csv", newline="") as file:
        measured = list(csv.DictReader(file))
    assert Counter(row["script"] for row in measured) == {"td3": 6, "td3_pave": 6}  # 3 policies of 2 seeds
    assert all(row["states"] == "400" and float(row["M_sup"]) > 0 for row in measured)
    again = run_script("benchmark/geometry.py", "--checkpoints", 2, cwd=tmp_path)
    assert again.stdout.splitlines()[0].startswith("wrote")  # nothing was measured twice

    result = run_script("benchmark/report.py", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "report" / "report.md").read_text()
    table = section(text, "PAVE, table 1")
    run = next(run for run in sweep.read_runs(tmp_path / "runs") if run.args["script"] == "td3_pave")
    with open(run.folder / "eval.csv", newline="") as file:
        final = [row for row in csv.DictReader(file) if row["step"] == "100"]
    assert len(final) == 4
    row = dict(zip(table[0], next(row for row in table if row[0] == "PAVE, ours")))
    for name, column, decimals in (("Pendulum<br>re ↑", "return", 1), ("Pendulum<br>sm ↓", "smoothness", 3)):
        mean = sum(float(episode[column]) for episode in final) / 4
        assert re.sub("<.*?>", " ", row[name]).split()[0] == f"{mean:.{decimals}f}"
    assert "2 seeds, 2 ep., 0.001 of the steps" in row["Pendulum<br>re ↑"] and row["Ant<br>re ↑"] == "—"
    assert next(row for row in table if row[0] == "CAPS, ours")[1:] == ["—"] * 12
    assert "<b>-167.6</b>" in next(row for row in table if row[0] == "PAVE, paper")[3]
    assert next(row for row in section(text, "PAVE: M_sup") if row[0] == "PAVE, ours")[2] != "—"
    assert text.split("## Runs left out")[1].strip() == "none"
    page = (tmp_path / "report" / "report.html").read_text()
    assert str(tmp_path) not in page
    figures = {path.stem for path in (tmp_path / "report" / "figures").glob("*.png")}
    assert figures >= {
        "learning_curves_pave_td3",
        "aggregate_pave_td3",
        "plane_td3",
        "surface_td3",
        "geometry_over_training_td3",
    }
    assert page.count('src="data:image/png;base64,') == len(figures) == page.count("src=")


def test_report_says_why_a_run_does_not_count(trained, tmp_path):
    """A half-written run, one with other arguments, a broken one and an empty runs/."""
    other = f"{TINY} --total-timesteps 60 --learning-starts 30 --gamma 0.5".split()
    assert run_script("baselines/td3.py", "--env-id", "Pendulum-v1", *other, cwd=tmp_path).returncode == 0
    flags = ("--env-id", "Pendulum-v1", "--eval-episodes", 1, "--total-timesteps", 10**6, "--hidden-sizes", 8, 8)
    process = start_script("baselines/td3.py", *flags, cwd=tmp_path)
    wait_for(lambda: len(list(tmp_path.glob("runs/*/eval.csv"))) == 2)
    process.terminate()
    process.communicate()
    broken = tmp_path / "runs" / "broken"
    broken.mkdir()
    (broken / "args.json").write_text('{"script": ')
    result = run_script("benchmark/report.py", cwd=tmp_path)
    assert result.returncode == 0 and "broken: passed over" in result.stderr
    left = (tmp_path / "report" / "report.md").read_text().split("## Runs left out")[1]
    assert "half-written" in left and "other arguments" in left and "gamma 0.5 (table: 0.98)" in left
    shutil.rmtree(tmp_path / "runs")
    (tmp_path / "runs").mkdir()
    for script in ("report.py", "geometry.py"):
        result = run_script(f"benchmark/{script}", cwd=tmp_path)
        assert result.returncode == 2 and "runs holds no runs" in result.stderr and result.stderr.count("\n") == 1


def test_faster_metrics_are_those_of_rliable():
    generator = np.random.default_rng(0)
    scores, others = generator.integers(0, 9, (2, 5, 3)).astype(float)  # with ties
    assert report.iqm(scores[..., None])[0] == pytest.approx(metrics.aggregate_iqm(scores))
    assert report.probability_of_improvement(scores, others) == pytest.approx(
        metrics.probability_of_improvement(scores, others)
    )


# The Hessians.


def walker_critic() -> torch.nn.Module:
    script = sweep.load_script("td3")
    torch.manual_seed(0)
    return script.Critic(1, 17, 6, script.Args(hidden_sizes=(400, 300), activation="silu")).requires_grad_(False)


def hessians_by_loop(critic: torch.nn.Module, states: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain autograd, a state and a row at a time."""
    mixed, curvature = [], []
    for state, action in zip(states, actions):
        s, a = state.clone().requires_grad_(), action.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(critic(s[None, None], a[None, None])[0, 0, 0], a, create_graph=True)
        rows = [torch.autograd.grad(part, (s, a), retain_graph=True) for part in gradient]
        mixed.append(torch.stack([row[0] for row in rows]))
        curvature.append(torch.stack([row[1] for row in rows]))
    return torch.stack(mixed), torch.stack(curvature)


def test_hessians_are_those_of_a_plain_autograd_loop():
    critic, states, actions = walker_critic(), torch.randn(50, 17), torch.rand(50, 6) * 2 - 1
    mixed, curvature = hessians_by_loop(critic, states, actions)
    _, batched_mixed, batched_curvature = geometry.hessians(critic, states[None], actions[None])
    assert (batched_mixed[0] - mixed).abs().max() < 1e-5 * mixed.abs().max()
    assert (batched_curvature[0] - curvature).abs().max() < 1e-5 * curvature.abs().max()
    found = geometry.measure(critic, states, actions)
    torch.testing.assert_close(found.mixed_norms, torch.linalg.svdvals(mixed)[:, 0], rtol=1e-5, atol=0)
    largest = torch.linalg.eigvalsh(curvature)[:, -1]
    torch.testing.assert_close(found.largest_curvatures, largest, rtol=1e-5, atol=1e-5 * float(curvature.abs().max()))


def test_hessians_of_a_quadratic_are_its_matrices():
    coupling, hessian = torch.randn(3, 4), torch.diag(torch.tensor([-2.0, -1.0, 0.5]))

    def critic(observations: torch.Tensor, actions: torch.Tensor, twins: slice = slice(None)) -> torch.Tensor:
        values = ((actions @ coupling) * observations).sum(-1) + 0.5 * ((actions @ hessian) * actions).sum(-1)
        return torch.stack([values, -values], 1)[:, twins]

    states, actions = torch.randn(2000, 4), torch.randn(2000, 3)  # more than one chunk
    found = geometry.measure(critic, states, actions)
    torch.testing.assert_close(found.gradients, states @ coupling.T + actions @ hessian)
    torch.testing.assert_close(found.mixed_norms, torch.linalg.matrix_norm(coupling, 2).expand(2000))
    torch.testing.assert_close(found.largest_curvatures, torch.full((2000,), 0.5))


@pytest.mark.slow
def test_batched_hessians_are_20_times_faster_than_a_loop():
    """A Walker2d critic over 10 episodes of 1000 steps, one CPU thread; process time, which other programs do not lengthen."""
    critic, states, actions = walker_critic(), torch.randn(10_000, 17), torch.rand(10_000, 6) * 2 - 1
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        geometry.measure(critic, states, actions)
        start = time.process_time()
        geometry.measure(critic, states, actions)
        batched = (time.process_time() - start) / 10_000
        start = time.process_time()
        for part in zip(*hessians_by_loop(critic, states[:200], actions[:200])):
            torch.linalg.matrix_norm(part[0], 2), torch.linalg.eigvalsh(part[1])
        looped = (time.process_time() - start) / 200
    finally:
        torch.set_num_threads(threads)
    print(f"{looped * 1e6:.0f} us a state by the loop, {batched * 1e6:.0f} us batched: {looped / batched:.1f} times faster")
    assert looped > 20 * batched


@pytest.mark.slow
def test_speed_times_all_libraries(tmp_path):
    flags = (
        "--env-id",
        "Pendulum-v1",
        "--steps",
        100,
        "--settle",
        50,
        "--repeats",
        1,
        "--studies",
        "libraries",
        "--devices",
        "cpu",
    )
    result = run_script("benchmark/speed.py", *flags, cwd=tmp_path)
    assert result.returncode == 0 and not result.stderr, result.stderr
    with open(tmp_path / "report" / "speed.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and all(
        float(row["vector_steps_per_second"]) > 0 and float(row["peak_memory_mib"]) > 50 for row in rows
    )
    assert (tmp_path / "report" / "figures" / "speed.png").stat().st_size > 10_000


def test_mistakes_in_speed_are_one_line_and_status_2(tmp_path):
    for flags, message in (
        (("--studies", "colour"), "no study is called colour"),
        (("--steps", 10), "--steps must be at least"),
    ):
        result = run_script("benchmark/speed.py", *flags, cwd=tmp_path)
        assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())

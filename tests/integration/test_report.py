"""benchmark/geometry.py, intervals.py and report.py: closed forms, synthetic runs with known tables, and a real one."""

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import SMALL, Run, flags, only_run
from torch.utils.tensorboard import SummaryWriter

pytest.importorskip("rliable", reason="the benchmark extra is not installed: uv run --extra benchmark pytest")
import geometry
import intervals
import pandas as pd
import report
from suites import Cell, cell_args

A = 12


def test_geometry_of_a_quadratic_critic():
    mixed = torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]])

    def value(o, a):  # dQ/da = mixed o - a; the action Hessian is -1, but 1 where the last observation is 1
        return torch.einsum("ba,ao,bo->b", a, mixed, o) + (o[:, 2] - 0.5) * a.square().sum(1)

    towards = torch.tensor([1.0, 0, 0])
    bent = torch.tensor([0, 1.0, 1.0])
    first = torch.stack([towards, towards, -towards])
    second = torch.stack([-towards, bent])
    found = geometry.geometry(value, [(first, torch.zeros(3, 2)), (second, torch.zeros(2, 2))])
    assert found["M_sup"] == pytest.approx(4, rel=1e-5)
    assert found["negative_definite_rate"] == pytest.approx(4 / 5)
    assert found["mean_cosine"] == pytest.approx((1 - 1 + 0) / 3, abs=1e-6)  # not across the episodes' border
    assert found["flip_rate"] == pytest.approx(1 / 3)


def test_target_shift_of_a_quadratic_critic():
    """In the middle of the box curvature makes the shift, as its square; in a corner the clip does, in proportion."""
    curvature = 3
    slope = torch.linspace(0, 1, A)
    observations = torch.randn(256, 1)

    def value(o, a):
        return o[:, 0] + a @ slope - curvature / 2 * a.square().sum(1)

    middle = geometry.target_shift(value, observations, torch.zeros(256, A))
    corner = geometry.target_shift(value, observations, torch.ones(256, A))
    assert middle["taylor_radius_0.2"] == pytest.approx(curvature * 0.2**2 / 2, abs=1e-6)
    mean_component = math.gamma(A / 2) / math.gamma((A + 1) / 2) / math.pi**0.5
    for radius in geometry.RADII:
        exact = pytest.approx(curvature * radius**2 / 2, rel=1e-3, abs=1e-5)
        assert middle[f"shift_radius_{radius}"] == exact
        assert corner[f"unclipped_shift_radius_{radius}"] == exact
        # in the corner a component of v moves the action only where it points inwards, half the time
        inwards = radius * mean_component * (slope - curvature).sum().item() + curvature * radius**2 / 2
        assert corner[f"shift_radius_{radius}"] == pytest.approx(inwards / 2, rel=0.02)


def test_intervals_pair_by_seed():
    base = pd.Series({1: 10.0, 2: 200.0, 3: 30.0, 4: 0.0})
    ours = pd.Series({1: 11.0, 2: 202.0, 3: 33.0, 5: 0.0})
    mean, bounds, seeds = intervals.paired_difference(ours, base)
    assert (mean, seeds) == (2, 3)  # the seeds' own spread is gone
    assert 1 <= bounds[0] < 2 < bounds[1] <= 3


def write_run(folder: Path, cell: Cell, seed: int, returns: dict, training=(), **changes):
    """A run's folder with eval.csv, returns {step: of its episodes}, and TensorBoard's returns, {step: one}."""
    args = {**dataclasses.asdict(cell_args(cell)), "seed": seed, "exp_name": cell.method, **changes}
    folder = folder / report.file_name(f"{args['env_id']}__{cell.method}__{seed}")
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"script": cell.script, **args}))
    rows = [(step, seed, value) for step, values in returns.items() for value in values]
    pd.DataFrame(rows, columns=["step", "seed", "return"]).to_csv(folder / "eval.csv", index=False)
    with SummaryWriter(str(folder)) as writer:
        for step, value in dict(training).items():
            writer.add_scalar("charts/episodic_return", value, step)


def test_a_page_counts_the_right_runs_and_steps(tmp_path, capsys):
    runs = tmp_path / "runs"
    td3, ams = (Cell(script, script, "quadruped-run", {"num_envs": 8}) for script in ("td3", "td3_ams"))
    whole = {0: [0.0], 200_000: [0.0], 500_000: [200.0, 200.0]}
    for seed, value in ((0, 100), (42, 300), (43, 500)):
        last_tenth = {460_000: value, 500_000: value + 50}
        write_run(runs, ams, seed, whole, {450_000: 1e6, **last_tenth}, eval_every=100_000)
        write_run(runs, td3, seed, whole, {500_000: value - seed})
    write_run(runs, ams, 7, {0: [0.0], 200_000: [0.0]})  # on its way
    write_run(runs, td3, 1, {100_000: [1.0]}, env_kwargs='{"g": 9}')
    write_run(runs, td3, 1, {50: [0.0], 100: [1.0]}, env_id="gym_pusht:gym_pusht/PushT-v0")
    report.main(report.Options((runs,), output=tmp_path / "report"))
    assert capsys.readouterr().out.startswith("9 runs, 2 sections")
    page = tmp_path / "report" / "report.html"
    summary, table, other = pd.read_html(page, index_col=[0, 1])
    difference = summary.loc[("quadruped-run", "AMS on TD3 minus TD3")]
    assert difference["training return ↑"].item().startswith("53.3")  # 25 + the mean of 0, 42 and 43
    row = table.loc[("quadruped-run", "AMS")].droplevel(1)
    assert row["training return ↑"] == "325.0 [125.0, 525.0]"
    assert (row["paper's training return"], row["return ↑"]) == ("765 ± 32", "200.0 [200.0, 200.0]")
    assert (row["seeds"], row["steps"]) == (3, 500_000)
    others = [("gym_pusht:gym_pusht/PushT-v0", "td3"), ("quadruped-run", 'td3 env_kwargs {"g": 9}')]
    assert list(other.index) == others
    assert "quadruped-run__td3__1: env_kwargs {" in page.read_text()
    assert set(report.read_csvs([page.with_name("ams_td3.csv")]).exp_name) == {"AMS on TD3", "TD3"}


def test_settings_and_steps_of_ones_own(tmp_path):
    """Two settings under one exp_name are two methods; seeds evaluated at other steps are one."""
    runs = tmp_path / "runs"
    cell = Cell("td3_pave", "td3_pave", "Robot-v0", {})
    steps = [range(0, 1001, 100), range(0, 1001, 90), range(0, 501, 70)]
    for seed, evaluated in enumerate(steps):
        write_run(runs, cell, seed, {step: [float(step)] for step in [*evaluated, evaluated.stop - 1]})
    write_run(runs, cell, 3, {1000: [9.0]}, mpr_weight=0.5)
    data = pd.concat(report.read_runs_long(report.runs_in([runs]))[0])
    found = {name: set(rows.seed) for name, rows in data.groupby("exp_name")}
    assert found == {"td3_pave mpr_weight 0.1": {0, 1, 2}, "td3_pave mpr_weight 0.5": {3}}
    curve = report.curves_of(data)["td3_pave mpr_weight 0.1", "Robot-v0", "avg_return"]
    drawn = report.whole_curves(curve)
    assert list(drawn) == [0, 1]
    np.testing.assert_allclose(drawn.to_numpy(), np.stack([drawn.index] * 2, 1))


def test_a_real_run_from_training_to_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(geometry, "STATES", 16)
    values = {"num_seeds": 2, "total_timesteps": 40, "eval_every": 20, "eval_episodes": 1}
    Run("td3_ams.py", *flags("td3_ams.py", **SMALL | values), cwd=tmp_path).wait(0)
    folder = only_run(tmp_path)
    started = tmp_path / "runs" / "started"
    shutil.copytree(folder, started)
    replay = torch.load(folder / "replay.pt", weights_only=True)
    torch.save({"rows": replay["rows"][:, :0].clone(), "steps": 0}, started / "replay.pt")  # of step 0
    elsewhere = shutil.copytree(folder, tmp_path / "runs" / "elsewhere")
    args = json.loads((elsewhere / "args.json").read_text())
    (elsewhere / "args.json").write_text(json.dumps({**args, "env_id": "not_here:Robot-v0"}))
    geometry.main(geometry.Options((started, elsewhere, folder)))
    assert (started / "geometry.csv").exists() and "elsewhere: passed over" in capsys.readouterr().err
    for name, column in (("geometry", "M_sup"), ("target_shift", "unclipped_shift_td3_noise")):
        table = pd.read_csv(folder / f"{name}.csv")
        assert list(zip(table.step, table.seed)) == [(step, seed) for step in (0, 20, 40) for seed in (1, 2)]
        assert np.isfinite(table).all(axis=None) and table[column].nunique() >= 4  # nothing is learnt before 20
    report.main(report.Options((folder,), output=tmp_path))
    assert (tmp_path / "other_runs_Pendulum-v1_avg_return.png").exists()

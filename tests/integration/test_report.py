"""benchmark/geometry.py, intervals.py and report.py: closed forms, synthetic runs with known tables, and a real one."""

import dataclasses
import io
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from conftest import ROOT
from processes import run_script
from torch.utils.tensorboard import SummaryWriter

pytest.importorskip("rliable", reason="the benchmark extra is not installed: uv run --extra benchmark pytest")
sys.path.insert(0, str(ROOT / "benchmark"))
import geometry
import intervals
import pandas as pd
import report
from rliable import metrics
from suites import SUITES, cell_args

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
    assert found["states"] == 5
    assert found["M_sup"] == pytest.approx(4, rel=1e-5)
    assert found["negative_definite_rate"] == pytest.approx(4 / 5)
    assert found["mean_cosine"] == pytest.approx((1 - 1 + 0) / 3, abs=1e-6)  # not across the episodes' border
    assert found["flip_rate"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("curvature", [0.0, 3.0])
def test_target_shift_of_a_quadratic_critic(curvature):
    """In the middle of the box curvature makes the shift, as its square; in a corner the clip does, in proportion."""
    slope = torch.linspace(0, 1, A)
    observations = torch.randn(256, 1)

    def value(o, a):
        return o[:, 0] + a @ slope - curvature / 2 * a.square().sum(1)

    middle = geometry.target_shift(value, observations, torch.zeros(256, A))
    corner = geometry.target_shift(value, observations, torch.ones(256, A))
    assert (middle["saturated_actions"], corner["saturated_actions"]) == (0, 1)
    # v and -v are as likely, so two directions of a frame are uncorrelated, and E[(slope . v)^2] = |slope|^2 / A
    assert middle["sampling_sd_radius_0.2"] == pytest.approx(0.2 * slope.norm().item() / (A * 8) ** 0.5, rel=0.1)
    for radius in geometry.RADII:
        exact = pytest.approx(curvature * radius**2 / 2, rel=1e-3, abs=1e-5)
        assert middle[f"shift_radius_{radius}"] == exact
        assert middle[f"unclipped_shift_radius_{radius}"] == exact
        assert corner[f"unclipped_shift_radius_{radius}"] == exact
    assert middle["taylor_radius_0.2"] == pytest.approx(curvature * 0.2**2 / 2, abs=1e-6)
    # in the corner only a component of v or -v that points inwards moves: half of slope . |v| for a flat critic
    if curvature == 0:
        mean_component = math.gamma(A / 2) / math.gamma((A + 1) / 2) / math.pi**0.5
        for radius in geometry.RADII:
            expected = radius * mean_component * slope.sum().item() / 2
            assert corner[f"shift_radius_{radius}"] == pytest.approx(expected, rel=0.02)
        assert corner["shift_td3_noise"] > 0.3 > 1e-5 > abs(corner["unclipped_shift_td3_noise"])


def test_intervals_are_rliables_and_pair_by_seed():
    scores = np.random.default_rng(0).normal(size=(7, 5))
    expected = [metrics.aggregate_iqm(column[:, None]) for column in scores.T]
    assert intervals.interquartile_mean(scores) == pytest.approx(np.array(expected))
    low, high = intervals.interval(scores, intervals.interquartile_mean)
    assert (low < expected).all() and (expected < high).all()
    assert intervals.interval(scores[:2]) is None
    base = pd.Series({1: 10.0, 2: 200.0, 3: 30.0, 4: 0.0})
    ours = pd.Series({1: 11.0, 2: 202.0, 3: 33.0, 5: 0.0})
    mean, bounds, seeds = intervals.paired_difference(ours, base)
    assert (mean, seeds) == (2, 3)  # the seeds' own spread is gone
    assert 1 <= bounds[0] < 2 < bounds[1] <= 3
    assert intervals.paired_difference(ours, pd.Series({7: 1.0})) is None


def test_every_figure_of_the_papers_is_of_a_cell_and_all_cells_but_ours_have_one():
    printed = report.paper_figures()
    with_figures = {key[:2] for key in printed}
    assert with_figures < report.CELLS.keys()
    assert {name.split(" on ")[0] for name, _ in report.CELLS.keys() - with_figures} == {
        *("TD3 without noise", "LayerNorm alone", "AMS radius 0.7", "AMS, shared frame"),
        *("AMS without LayerNorm, radius 0.7", "PAVE, a quarter of the rows", "PAVE without Curv", "Curv alone"),
    }
    assert printed["PAVE on TD3", "Walker2d-v5", "smoothness", None] == "1.272 ± 0.172"
    assert ("Base on TD3", "Pendulum-v1", "M_sup", None) not in printed  # not comparable


def write_run(folder: Path, suite: str, method: str, of: str, seed: int, returns: dict, training=(), **flags):
    """A run's folder with eval.csv, returns {step: of its episodes}, and training: (tag, step, value)."""
    cell = next(cell for cell in SUITES[suite] if (cell.method, cell.env_id) == (method, of))
    args = {**dataclasses.asdict(cell_args(cell)), "seed": seed, "exp_name": method, "eval_every": 100_000, **flags}
    folder = folder / report.file_name(f"{args['env_id']}__{method}__{seed}")
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"script": cell.script, **args}))
    rows = [(step, seed, i, value, 0.1 * i) for step, values in returns.items() for i, value in enumerate(values)]
    columns = ["step", "seed", "episode", "return", "smoothness"]
    pd.DataFrame(rows, columns=columns).to_csv(folder / "eval.csv", index=False)
    with SummaryWriter(str(folder)) as writer:
        for tag, step, value in training:
            writer.add_scalar(tag, value, step)


def tables_of(folder: Path) -> list[pd.DataFrame]:
    tables = pd.read_html(io.StringIO((folder / "report.html").read_text()), index_col=[0, 1])
    for table in tables:
        table.columns = [column[0] for column in table.columns]
    return tables


def test_a_page_counts_the_right_runs_and_steps(tmp_path, capsys):
    runs = tmp_path / "runs"
    early = {0: [0.0], 100_000: [0.0], 200_000: [0.0]}
    whole = {**early, 500_000: [200.0, 200.0]}
    tag = "charts/episodic_return"
    for seed, value in ((0, 100), (42, 300), (43, 500)):
        training = [(tag, 450_000, 1e6), (tag, 460_000, value), (tag, 500_000, value + 50)]  # last tenth: after 450 000
        write_run(runs, "ams-table-2", "td3_ams", "quadruped-run", seed, whole, training)
        write_run(runs, "ams-table-2", "td3", "quadruped-run", seed, whole, [(tag, 500_000, value - seed)])
    write_run(runs, "ams-table-2", "td3_ams", "quadruped-run", 7, early)  # on its way
    several = [(tag, 500_000, 20), (f"{tag}_seed_0", 500_000, 10), (f"{tag}_seed_1", 500_000, 30)]
    write_run(
        runs, "ams-what-works", "td3:layer_norm_alone", "quadruped-run", 0, {500_000: [7.0]}, several, num_seeds=2
    )
    write_run(runs, "pave-table-1", "pave", "Pendulum-v1", 1, {100_000: [1.0, 3.0]}, env_kwargs='{"g": 9}')
    long_id = "gym_pusht:gym_pusht/" + "A-very-long-name" * 4 + "-v0"
    write_run(runs, "pave-table-1", "base", "Pendulum-v1", 1, {50: [0.0], 100: [1.0]}, env_id=long_id)
    peers = pd.DataFrame([["Peer", "quadruped-run", 0, "avg_return", step, 900] for step in (0, 10**5)])
    peers.set_axis(report.COLUMNS[:6], axis=1).to_csv(tmp_path / "peers.csv")
    report.main(report.Options((runs,), (tmp_path / "peers.csv",), tmp_path / "report"))
    assert capsys.readouterr().out.startswith("10 runs, 2 sections")

    summary, ams, other = tables_of(tmp_path / "report")
    difference = summary.loc[("quadruped-run", "AMS on TD3, less TD3")]
    assert difference["training return ↑"].startswith("53.3")  # 25 + the mean of 0, 42 and 43
    row = ams.loc[("quadruped-run", "AMS")]
    assert row["training return ↑"] == "325.0 [125.0, 525.0]"
    assert (row["paper's training return"], row["return ↑"]) == ("765 ± 32", "200.0 [200.0, 200.0]")
    assert (row["seeds"], row["steps"]) == (3, 500_000)
    assert float(ams.loc[("quadruped-run", "LayerNorm alone")]["training return ↑"]) == 20  # of two seeds
    assert list(other.index) == [("Pendulum-v1", "pave"), (long_id, "base")]
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Pendulum-v1__pave__1: env_kwargs {" in page

    table = pd.read_csv(tmp_path / "report" / "ams_td3.csv")
    assert list(table) == report.COLUMNS and table.env_step.max() == 8 * 500_000  # transitions
    report.main(report.Options(tuple((tmp_path / "report").glob("*.csv")), output=tmp_path / "again"))
    for before, after in zip([summary, ams, other], tables_of(tmp_path / "again")):
        pd.testing.assert_frame_equal(before, after)


def test_a_real_run_from_training_to_the_page(tmp_path, monkeypatch, capsys):
    flags = (
        "--env-id Pendulum-v1 --num-seeds 2 --no-compile --total-timesteps 200 --learning-starts 150 --batch-size 16"
    )
    flags += " --eval-every 100 --eval-episodes 1 --log-every 100"
    run_script("td3_ams.py", *flags.split(), cwd=tmp_path)
    monkeypatch.chdir(tmp_path)
    (folder,) = Path("runs").iterdir()
    (folder / "geometry.csv").write_text("step,seed,old_name\n0,1,2\n")  # of another version: made anew
    geometry.main(geometry.Options((folder,)))
    printed = capsys.readouterr().out
    assert "step 200" in printed and max(map(len, printed.splitlines())) < 120
    geometry.main(geometry.Options((Path("runs"),)))
    assert capsys.readouterr().out == ""  # nothing new
    for name, column in (("geometry", "M_sup"), ("target_shift", "unclipped_shift_td3_noise")):
        table = pd.read_csv(folder / f"{name}.csv")
        assert list(zip(table.step, table.seed)) == [(step, seed) for step in (0, 100, 200) for seed in (1, 2)]
        assert np.isfinite(table).all(axis=None) and table[column].nunique() == 4  # nothing is learnt before 150

    report.main(report.Options())
    assert capsys.readouterr().out.startswith("1 run, 1 section")
    sizes = [path.stat().st_size for path in Path("report").glob("*.png")]
    assert len(sizes) >= 3 and 5_000 < min(sizes) < max(sizes) < 500_000
    assert Path("report/other_runs_Pendulum-v1_shift.png").exists()


def test_what_we_measured_fills_the_tables(tmp_path):
    files = [path for path in (ROOT / "benchmark" / "results").glob("*.csv") if "exp_name" in path.read_text()[:100]]
    report.main(report.Options(runs=tuple(files), output=tmp_path))
    rows = pd.concat(tables_of(tmp_path)[1:])
    for name in ("LayerNorm alone", "LayerNorm + TD3's noise", "AMS without LayerNorm", "AMS radius 0.7", "CAPS"):
        assert rows.xs(name, level=1).notna().any(axis=None)
    assert set(rows.loc[("Pendulum-v1", "Base")].seeds) >= {5}  # TD3's fifth is of an earlier commit


@pytest.mark.parametrize("module", [report, geometry])
def test_no_runs_is_a_users_mistake(module, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        tyro.cli(module.Options, args=[str(tmp_path)])
    assert str(tmp_path) in "".join(capsys.readouterr().err.split()).replace("│", "")

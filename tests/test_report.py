"""benchmark/geometry.py and benchmark/report.py: closed forms, synthetic runs with known tables, and a real one end to end."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from conftest import ROOT, run_script
from torch.utils.tensorboard import SummaryWriter

pytest.importorskip("rliable", reason="the benchmark extra is not installed: uv run --extra benchmark pytest")
sys.path.insert(0, str(ROOT / "benchmark"))
import geometry
import pandas as pd
import report
from rliable import metrics
from suites import SUITES, cell_args, load_script


def write_run(folder, suite, method, env_id, seed, returns, training=None, **flags) -> None:
    """A run's folder with eval.csv, returns {step: of its episodes}, and charts/episodic_return {step: value}."""
    cell = next(cell for cell in SUITES[suite] if (cell.method, cell.env_id) == (method, env_id))
    args = {**dataclasses.asdict(cell_args(cell)), "seed": seed, "exp_name": method, "eval_every": 100, **flags}
    folder = folder / f"{env_id}__{method.replace(':', '_')}__{seed}"
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"script": cell.script, **args}))
    rows = [(step, seed, i, value, 0.1 * i) for step, values in returns.items() for i, value in enumerate(values)]
    pd.DataFrame(rows, columns=["step", "seed", "episode", "return", "smoothness"]).to_csv(folder / "eval.csv", index=False)
    with SummaryWriter(str(folder)) as writer:
        for step, value in (training or {}).items():
            writer.add_scalar("charts/episodic_return", value, step)


def lines_of(folder: Path, name: str) -> dict[str, list[str]]:
    """{first cell: cells} of a table of report.md."""
    title = next(table.title for table in report.TABLES if table.name == name)
    section = (folder / "report.md").read_text().split(f"## {title}\n")[1].split("\n## ")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")]
    return {line[0]: line[1:] for line in cells}


def test_derivatives_are_those_of_autograd():
    torch.manual_seed(0)
    critic = load_script("td3_pave").Critic(1, 5, 3).double()
    observations, actions = torch.randn(4, 5, dtype=torch.float64), torch.rand(4, 3, dtype=torch.float64)
    gradients, mixed, curvature = geometry.derivatives(lambda o, a: critic(o[None], a[None])[0, 0], observations, actions)
    for index, pair in enumerate(zip(observations, actions)):
        hessian = torch.autograd.functional.hessian(lambda o, a: critic(o[None, None], a[None, None])[0, 0, 0], pair)
        torch.testing.assert_close(mixed[index], hessian[1][0])
        torch.testing.assert_close(curvature[index], hessian[1][1])
    actions.requires_grad_()
    torch.testing.assert_close(gradients, *torch.autograd.grad(critic(observations[None], actions[None])[0, 0].sum(), actions))


def test_geometry_of_a_quadratic_critic():
    mixed = torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]])

    def value(o, a):  # dQ/da = mixed o - a; the action Hessian is -1, but 1 where the last observation is 1
        return torch.einsum("ba,ao,bo->b", a, mixed, o) + (o[:, 2] - 0.5) * a.square().sum(1)

    towards, back, bent = torch.tensor([1.0, 0, 0]), torch.tensor([-1.0, 0, 0]), torch.tensor([0, 1.0, 1.0])
    episodes = [(torch.stack(states), torch.zeros(len(states), 2)) for states in ([towards, towards, back], [back, bent])]
    found = geometry.geometry(value, episodes)
    assert found["states"] == 5 and found["M_sup"] == pytest.approx(4, rel=1e-5)
    assert found["negative_definite_rate"] == pytest.approx(4 / 5)
    assert found["mean_cosine"] == pytest.approx((1 - 1 + 0) / 3, abs=1e-6)  # not across the episodes' border
    assert found["flip_rate"] == pytest.approx(1 / 3)


def test_target_shift_of_a_quadratic_critic():
    A, curvature = 12, 3.0
    torch.manual_seed(0)
    slope, observations = torch.linspace(0, 1, A), torch.randn(256, 1)

    def value(o, a):
        return o[:, 0] + a @ slope - curvature / 2 * a.square().sum(1)

    found = geometry.target_shift(value, observations, torch.zeros(256, A))
    for radius in (0.2, 0.8):
        assert found[f"shift_radius_{radius}"] == pytest.approx(curvature * radius**2 / 2, rel=1e-4)
        assert found[f"taylor_radius_{radius}"] == pytest.approx(curvature * radius**2 / 2, rel=1e-4)
    assert found["shift_td3_noise"] == pytest.approx(A * curvature * 0.2**2 / 2, rel=0.05)  # less what the clip takes
    assert found["value_sd_over_states"] == pytest.approx(observations.std().item(), rel=1e-4)
    # v and -v are as likely in a frame, so two of its directions are uncorrelated, and E[(slope . v)^2] = |slope|^2 / A
    assert found["sampling_sd_radius_0.2"] == pytest.approx(0.2 * slope.norm().item() / (A * 8) ** 0.5, rel=0.05)


def test_iqm_is_rliables():
    scores = np.random.default_rng(0).normal(size=(7, 1, 5))
    assert report.iqm(scores) == pytest.approx(np.array([metrics.aggregate_iqm(scores[:, :, t]) for t in range(5)]))


def test_every_cell_of_the_papers_has_its_figures():
    printed = report.paper_values()
    ours_alone = {"pave:rows_25", "td3:layer_norm_alone", "td3:radius_0.7", "td3:shared_frame"}
    for suite, cells in SUITES.items():
        for cell in cells:
            metric = "training_return" if suite.startswith("ams") else "avg_return"
            assert ((suite, cell.method, cell.env_id, metric, None) in printed) == (cell.method not in ours_alone)
    assert printed["pave-table-1", "pave", "Walker2d-v5", "smoothness", None] == "1.272 ± 0.172"


def test_a_table_counts_the_right_runs_and_steps(tmp_path):
    early, runs = {0: [0.0], 100_000: [0.0], 200_000: [0.0]}, tmp_path / "runs"
    for seed, value in ((0, 100), (42, 300)):
        training = {199_000: 1000, 450_000: 1e6, 460_000: value, 500_000: value + 50}  # the last tenth: after 450 000
        returns = {**early, 500_000: [value, value]}
        write_run(runs, "ams-table-2", "td3_ams", "quadruped-run", seed, returns, training)
    write_run(runs, "ams-table-2", "td3_ams", "quadruped-run", 7, early)  # on its way
    write_run(runs, "ams-what-works", "td3:without_ntd", "quadruped-run", 0, {200_000: [7.0]})
    write_run(runs, "pave-table-1", "pave", "Pendulum-v1", 1, {0: [1.0], 100_000: [1.0, 3.0]})
    write_run(runs, "pave-table-1", "pave", "Pendulum-v1", 2, {0: [1.0], 100_000: [5.0, 7.0]})
    write_run(runs, "pave-table-1", "base", "Pendulum-v1", 1, {100_000: [0.0]}, sigma=0.5, exp_name="mine")
    peers = pd.DataFrame([["Peer", "quadruped-run", 0, "avg_return", step, 900] for step in (0, 10**6)], columns=report.COLUMNS)
    peers.to_csv(tmp_path / "peers.csv")
    report.main(report.Options((runs,), (tmp_path / "peers.csv",), tmp_path / "report"))

    works = lines_of(tmp_path / "report", "ams_what_works")
    assert list(works)[2] == "**quadruped-run**" and works[""][:3] == ["training return ↑", "paper", "avg return ↑"]
    expected = ["225.0 ± 100.0<br><small>[125.0, 325.0]</small>", "765 ± 32", "200.0 ± 100.0<br><small>[100.0, 300.0]</small>"]
    assert works["AMS-TD3"] == [*expected, "2 x 2", "500,000"]
    assert works["AMS-TD3, no NTD"] == ["", "730 ± 119", "7", "1 x 1", "200,000 of 500,000"]
    assert works["AMS-TD3, radius 0.7"] == ["", "", "", "no run", ""]
    pave = lines_of(tmp_path / "report", "pave_td3")
    assert pave["PAVE-TD3"][0].startswith("4 ± 2.24")  # over all four episodes: sqrt(5)
    assert pave["PAVE-TD3"][2].startswith("0.05 ± 0.05") and pave["PAVE-TD3"][-1] == "100,000"
    assert pave["Base-TD3"] == ["", "-168.7 ± 77.9", "", "1.59 ± 0.571", "no run", ""] and "**Walker2d-v5**" not in pave
    text, page = ((tmp_path / "report" / f"report.{kind}").read_text() for kind in ("md", "html"))
    assert "critic's geometry" not in text and "mine" in lines_of(tmp_path / "report", "other_runs")
    assert "Pendulum-v1__base__1: sigma 0.5" in page and "Pendulum-v1__pave__1:" not in page
    assert page.count("data:image/png;base64") == text.count("![") > 8

    table = pd.read_csv(tmp_path / "report" / "ams_what_works.csv")
    assert list(table) == report.COLUMNS and table.env_step.max() == 8 * 500_000  # transitions
    report.main(report.Options(tuple((tmp_path / "report").glob("*.csv")), output=tmp_path / "again"))
    assert (tmp_path / "again" / "report.md").read_text() == text


def test_a_real_run_from_training_to_the_page(tmp_path, monkeypatch, capsys):
    flags = "--env-id Pendulum-v1 --num-seeds 2 --num-envs 1 --no-compile --total-timesteps 200 --learning-starts 100"
    flags += " --eval-every 200 --eval-episodes 1 --log-every 100"
    run_script("td3_ams.py", *flags.split(), cwd=tmp_path)
    monkeypatch.chdir(tmp_path)
    (folder,) = Path("runs").iterdir()
    geometry.main(geometry.Options((folder,)))
    assert "step 200" in capsys.readouterr().out
    geometry.main(geometry.Options((Path("runs"),)))
    assert capsys.readouterr().out == ""  # nothing new
    for name, column in (("geometry", "M_sup"), ("target_shift", "shift_td3_noise")):
        table = pd.read_csv(folder / f"{name}.csv")
        assert list(zip(table.step, table.seed)) == [(step, seed) for step in (0, 200) for seed in (1, 2)]
        assert np.isfinite(table).all(axis=None) and table[column].nunique() == 4
    assert (pd.read_csv(folder / "geometry.csv").states == 200).all()  # an episode

    report.main(report.Options())
    assert capsys.readouterr().out.startswith("1 runs, 1 tables")
    assert lines_of(Path("report"), "other_runs")["td3_ams"][-2:] == ["2 x 1", "200"]
    sizes = [path.stat().st_size for path in Path("report").glob("*.png")]
    assert len(sizes) >= 3 and 5_000 < min(sizes) < max(sizes) < 500_000


def test_what_we_measured_fills_the_tables(tmp_path):
    report.main(report.Options(runs=tuple((ROOT / "benchmark" / "results").glob("*.csv")), output=tmp_path))
    measured = {"ams_what_works": "AMS-TD3", "ams_shift": "AMS-TD3", "pave_geometry_td3": "PAVE-TD3", "pave_sac": "CAPS-SAC"}
    for name, row in measured.items():
        assert float(lines_of(tmp_path, name)[row][0].split()[0]) and list(tmp_path.glob(f"{name}_*.png"))
    assert lines_of(tmp_path, "pave_sac")["CAPS-SAC"][-2:] == ["5 x 20", "100,000"]


@pytest.mark.parametrize("module", [report, geometry])
def test_no_runs_is_a_users_mistake(module, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        tyro.cli(module.Options, args=[str(tmp_path)])
    assert str(tmp_path) in "".join(capsys.readouterr().err.split()).replace("│", "")

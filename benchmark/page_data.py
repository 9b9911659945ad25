"""The data of the page of results, and what both its text (page.py) and its figures (page_figures.py) ask of it."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from report import COLUMNS, KEYS, MINUTES, TRAINING, read_runs_long

from runs import ROOT, Run

RESULTS = ROOT / "benchmark" / "results"
PAPER = ROOT / "benchmark" / "paper" / "figures.csv"

PENDULUM = "Pendulum-v1"
PENDULUM_STEPS = 100_000
PENDULUM_SEEDS = ("9001", "9002", "9003", "9004", "9005")
QUADRUPED = "quadruped-run"
QUADRUPED_STEPS = 200_000
SEEDS = ("0", "42", "123")  # quadruped-run's
ESCAPE = 400  # a training return; lying on the side brings about 300
GAMMA = 0.99  # AMS's
LAYER_NORM_ALONE = "LayerNorm alone on TD3"
GRID = {  # quadruped-run: critic -> what smooths its target -> method
    "LayerNorm": {
        "nothing": LAYER_NORM_ALONE,
        "AMS's neighbourhood": "AMS on TD3",
        "TD3's noise": "LayerNorm + TD3's noise on TD3",
    },
    "no LayerNorm": {
        "nothing": "TD3 without noise",
        "AMS's neighbourhood": "AMS without LayerNorm on TD3",
        "TD3's noise": "TD3",
    },
}
LARGER_RADIUS = (  # as grid_cells() has the grid
    ("LayerNorm", "radius 0.7", "AMS radius 0.7 on TD3"),
    ("no LayerNorm", "radius 0.7", "AMS without LayerNorm, radius 0.7 on TD3"),
)
PAVE_METHODS = (
    "Base",
    "PAVE",
    "PAVE, a quarter of the rows",
    "CAPS",
    "GRAD",
    "ASAP",
    "PAVE without Curv",
    "Curv alone",
)
ALGORITHMS = ("TD3", "SAC")
LIBRARIES = {  # in speed.csv's commands
    "smoothq": r"^baselines/{}\.py",
    "sbx-rl (JAX)": r"sbx:{}",
    "CleanRL": r"^cleanrl/cleanrl/{}_",
    "stable-baselines3": r"stable_baselines3:{}",
    "LeanRL": r"^leanrl/leanrl/{}_",
}
OUR_METHODS = {"AMS on TD3": "td3_ams.py", "PAVE on TD3": "td3_pave.py", "PAVE on SAC": "sac_pave.py"}


class Data(NamedTuple):
    """What the page is made of."""

    runs: pd.DataFrame  # report.COLUMNS and step; the runs of a seed are paired
    paper: pd.DataFrame
    speed: pd.DataFrame
    gpu: pd.DataFrame
    run_times: pd.DataFrame
    dog_run_others: pd.DataFrame

    def seeds(self, name: str, metric: str, step: int, env_id: str = PENDULUM) -> pd.Series:
        """The values of a method at a step, by seed; empty where there are none."""
        rows = self.runs
        rows = rows[(rows.exp_name == name) & (rows.env_name == env_id)]
        rows = rows[(rows.metric == metric) & (rows.step == step)]
        return rows.set_index("seed").value

    def printed(self, name: str, env_id: str, metric: str, table: str) -> float:
        """A paper's figure."""
        rows = self.paper
        rows = rows[(rows.name == name) & (rows.env_id == env_id) & (rows.metric == metric)]
        return float(rows[rows.table == table].value.iloc[0])


def read_data() -> Data:
    tables = [pd.read_csv(path) for path in sorted(RESULTS.glob("*.csv"))]
    runs = pd.concat([table for table in tables if "metric" in table and "env_step" in table])
    runs["step"] = runs.env_step // runs.num_envs
    runs["seed"] = runs.seed.astype(str)
    others = runs.exp_name.str.endswith("@others")  # other people's runs of the same method, counted in
    runs["exp_name"] = runs.exp_name.where(~others, runs.exp_name.str.removesuffix("@others"))
    runs = pd.concat([runs[~others], runs[others]]).drop_duplicates([*KEYS, "metric", "step"])  # ours go first
    names = ("speed", "gpu", "run_times", "dog_run_others")
    return Data(runs, pd.read_csv(PAPER), *(pd.read_csv(RESULTS / f"{name}.csv") for name in names))


def rows_of(run: Run) -> pd.DataFrame:
    """A run in the CSVs' form; of what training logs, the mean over the steps before each evaluation."""
    tables, reasons = read_runs_long([run])
    for folder, reason in reasons.items():
        print(f"{folder} is of none of the tables ({reason}): it goes by its exp_name, {run.args['exp_name']}")
    rows = tables[0]
    rows = rows[~rows.metric.isin(MINUTES)]
    every = run.args["eval_every"] * run.args["num_envs"]
    last = rows.env_step.max()
    until_evaluation = (np.ceil(rows.env_step / every).astype(int) * every).clip(upper=last)
    rows = rows.assign(env_step=until_evaluation.where(rows.metric.isin(TRAINING), rows.env_step))
    keys = [column for column in COLUMNS if column != "value"]
    return rows.groupby(keys).value.mean().reset_index()[COLUMNS]


def add_runs(path: Path, runs: Iterable[Run]) -> None:
    """Puts runs into a CSV, in the place of what it has of the same method, environment and seed."""
    added = pd.concat(map(rows_of, runs))
    if path.exists():
        old = pd.read_csv(path)
        same = pd.MultiIndex.from_frame(old[KEYS]).isin(pd.MultiIndex.from_frame(added[KEYS]))
        added = pd.concat([old[~same], added])
    added = added.sort_values([*KEYS, "metric", "env_step"], kind="stable")
    added.to_csv(path, index=False, float_format="%.6g")
    print(path)


# ------------------------------------------------------------------------------------------- what both files ask of it


class Comparison(NamedTuple):
    """Of two methods in a metric; the sign that a claim gives their difference."""

    ours: str
    base: str
    metric: str
    sign: int
    digits: int = 0


def differences_of(data: Data, comparison: Comparison, step: int = PENDULUM_STEPS, env_id: str = PENDULUM) -> pd.Series:
    """By seed, where both have it."""
    ours = data.seeds(comparison.ours, comparison.metric, step, env_id)
    base = data.seeds(comparison.base, comparison.metric, step, env_id)
    return (ours - base).dropna()


def on_quadruped(data: Data, comparison: Comparison) -> pd.Series:
    return differences_of(data, comparison, QUADRUPED_STEPS, QUADRUPED)


def ratios_of(data: Data, ours: str, base: str, metric: str, base_metric: str) -> pd.Series:
    """On quadruped-run at its last step, by seed."""
    above = data.seeds(ours, metric, QUADRUPED_STEPS, QUADRUPED)
    below = data.seeds(base, base_metric, QUADRUPED_STEPS, QUADRUPED)
    return (above / below).dropna()


def grid_cells() -> list[tuple[str, str, str]]:
    """critic, what smooths the target, method."""
    return [(critic, smoothing, name) for critic, row in GRID.items() for smoothing, name in row.items()]


class Network(NamedTuple):
    """The last one of a run whose target geometry.py has measured."""

    label: str
    name: str  # in the CSVs, as the next two
    env_id: str
    seed: int

    def values(self, data: Data) -> tuple[int, pd.Series]:
        """The step, and the values by metric."""
        rows = data.runs[(data.runs.exp_name == self.name) & (data.runs.env_name == self.env_id)]
        rows = rows[rows.seed == str(self.seed)]
        step = rows[rows.metric == "saturated_actions"].step.max()
        return step, rows[rows.step == step].set_index("metric").value


SHIFT_NETWORKS = (
    Network("AMS", "short_ams", QUADRUPED, 0),
    Network("AMS without LayerNorm", "short_ams_without_layer_norm", QUADRUPED, 0),
    Network("TD3 without noise", "TD3 without noise", QUADRUPED, 0),
    Network("AMS", "AMS on TD3", "dog-run", 1),
)


def dog_run_curve(data: Data, metric: str, name: str = "AMS on TD3") -> pd.Series:
    """A return of seed 1 by vector step."""
    rows = data.runs[(data.runs.env_name == "dog-run") & (data.runs.exp_name == name)]
    return rows[rows.metric == metric].set_index("step").value.sort_index()


def machines(data: Data) -> list[tuple[str, int, pd.DataFrame]]:
    """machine, cores and its rows of speed.csv."""
    groups = data.speed.groupby(["machine", "cores"], sort=False)
    return [(machine, cores, rows) for (machine, cores), rows in groups]


def cores_text(cores: int) -> str:
    return f"{cores} core" if cores == 1 else f"{cores} cores"


def rates_by_round(rows: pd.DataFrame, library: str, algorithm: str) -> pd.Series:
    """Of some rows of speed.csv; the rounds of several libraries took turns."""
    pattern = LIBRARIES[library].format(algorithm.lower())
    return rows[rows.command.str.contains(pattern)].set_index("round").vector_steps_per_second


def library_rates(rows: pd.DataFrame) -> pd.DataFrame:
    """The median rates of the libraries on one machine with so many cores: libraries down, TD3 and SAC across."""
    medians = {
        algorithm: {library: rates_by_round(rows, library, algorithm).median() for library in LIBRARIES}
        for algorithm in ALGORITHMS
    }
    return pd.DataFrame(medians).dropna()

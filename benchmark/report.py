"""The papers' tables and curves, ours beside theirs: a folder with report.html, report.md, PNGs and a CSV a table.

    python benchmark/report.py runs --peers FlashSAC/results/stateRL_cpusim/*.csv
    python benchmark/report.py benchmark/results/*.csv      # from the CSVs of an earlier report

A run counts for a cell of a table if its arguments are the cell's, however far it is; the step read is the one with the most
seeds x steps. Tables and panels without a run are left out. geometry.py gives the runs what the tables of the critics need.
The CSVs have the columns that FlashSAC, XQC, SimbaV2 and DR.Q publish, exp_name, env_name, seed, metric, env_step, value, where
env_step counts transitions.
"""

import base64
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import jinja2
import matplotlib
import numpy as np
import pandas as pd
import tyro
from geometry import runs_in
from rliable import library as rliable
from suites import SUITES, WEIGHTS, Cell, Run, cell_args, is_of, load_script, other_arguments
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("agg")
import matplotlib.pyplot as plt

PAPER = Path(__file__).resolve().parent / "paper"
COLUMNS = ["exp_name", "env_name", "seed", "metric", "env_step", "value"]
# Paul Tol's "muted" scheme, which colour-blind readers tell apart; a method has its colour everywhere.
COLOURS = {"Base": "#000000", "TD3": "#000000", "SAC": "#332288", "PPO": "#999999", "CAPS": "#DDCC77", "GRAD": "#88CCEE"}
COLOURS |= {"ASAP": "#117733", "SN": "#999933", "GP": "#44AA99", "PAVE": "#CC6677", "AMS-TD3": "#882255", "AMS-SAC": "#AA4499"}
OTHER_COLOURS = ("#0077BB", "#EE7733", "#009988", "#EE3377", "#33BBEE", "#CC3311", "#999933", "#BBBBBB")

SCORES, RETURNS = ("avg_return", "smoothness", "action_fluctuation"), ("training_return", "avg_return")
GEOMETRY = ("M_sup", "negative_definite_rate", "mean_cosine", "flip_rate")
STABILITY = ("critic_grad_norm", "td_target_variance")
MINUTES = ("minutes_per_1M_transitions", "minutes_per_1M_vector_steps")
SHIFT = ("value_sd_over_states", "shift_radius_0.2", "taylor_radius_0.2", "sampling_sd_radius_0.2", "shift_radius_0.8")
SHIFT += ("shift_td3_noise", "sampling_sd_td3_noise")  # of geometry.py
TRAINING = ("training_return", *STABILITY, *MINUTES)  # of TensorBoard
BETTER = dict.fromkeys((*RETURNS, *GEOMETRY[1:3]), " ↑") | dict.fromkeys((*SCORES[1:], "M_sup", "flip_rate"), " ↓")
LOGARITHMIC = ("M_sup", *STABILITY, *SHIFT)

PAVE_NOTE = "Deterministic policy; actions in the environment's units; ± is the deviation over all episodes of all seeds."
GEOMETRY_NOTE = """First critic, along the evaluation's episodes. M_sup is no finer than ±50 %: the paper's own tables disagree
by that much (Walker's base 1923 and 1320). Pendulum's printed figures are not comparable: the reference takes the critic at the
action in the environment's units, we at the normalised one that it learnt from."""
AMS_NOTE = """Training return: with exploration, of the episodes that ended in the last tenth of the run; seeds side by side log
their mean. The paper does not say which return it prints; we think this one, so its figures stand beside it. The other return:
deterministic policy."""
SHIFT_NOTE = """The shift is min_j Q_j at the policy's action less its mean around it; online networks, 512 next states of the
replay, beside the deviation of min_j Q_j over these states. Taylor: -radius² / (2 A) tr H, 0 for a ReLU critic without
LayerNorm, whose curvature is all in its kinks. sampling sd: of one draw, for the radius the mean over K = 8 directions."""
STABILITY_NOTE = """Means over the last tenth of the run, beside the paper's final values. The norm is that of the loss's
gradient, over both twins; the variance is over a batch."""
TIMING_NOTE = """On the machine of the runs, all seeds of a run together; the paper's on an RTX 3090. Its “1M environment steps”
are probably transitions, 8 a vector step: 20 minutes for 1M vector steps of cheetah-run would be 833 updates a second, several
times CleanRL's speed."""
IMPOSSIBLE = """ Returns lie between 0 and 1000, so the paper's SAC on h1-walk, dog-stand and h1-run cannot be; with mean and
deviation exchanged it can."""


class Table(NamedTuple):
    """Rows are the cells of a suite, environments one below the other; columns are metrics, whose curves are drawn below."""

    name: str
    suite: str  # empty: the runs that are in none
    title: str
    metrics: tuple[str, ...]
    note: str = ""
    steps: dict[str, tuple] = {}  # noqa: RUF012, environments and steps of training to show; empty: all, the last one


OVER_TRAINING = {"LunarLander-v3": (100_000, 300_000, 500_000), "Walker2d-v5": (200_000, 600_000, 1_000_000)}
TABLES = [
    Table("ams_what_works", "ams-what-works", "What in AMS works: quadruped-run", (*RETURNS, *STABILITY), AMS_NOTE),
    Table("ams_shift", "ams-what-works", "How far AMS's neighbourhood moves the target", SHIFT, SHIFT_NOTE),
    Table("pave_td3", "pave-table-1", "PAVE, table 1: TD3", SCORES, PAVE_NOTE),
    Table("pave_sac", "pave-table-2", "PAVE, table 2: SAC", SCORES, PAVE_NOTE),
    Table("pave_rows", "pave-quarter-rows", "PAVE on a quarter of the batch's rows", (*SCORES, MINUTES[1]), PAVE_NOTE),
    Table("pave_geometry_td3", "pave-table-1", "PAVE: the critic's geometry, TD3", GEOMETRY, GEOMETRY_NOTE),
    Table("pave_geometry_sac", "pave-table-2", "PAVE: the critic's geometry, SAC", GEOMETRY, GEOMETRY_NOTE),
    Table("pave_steps", "pave-table-1", "PAVE: over training, TD3", GEOMETRY[:2], GEOMETRY_NOTE, OVER_TRAINING),
    Table("pave_critics", "pave-critic-baselines", "PAVE: critic-side baselines", SCORES + GEOMETRY[:2], GEOMETRY_NOTE),
    Table("pave_terms", "pave-ablation", "PAVE: its three terms", SCORES, PAVE_NOTE + " Compare rows within this table only."),
    Table("pave_caps", "pave-plus-caps", "PAVE with CAPS", SCORES, PAVE_NOTE),
    Table("ams_table_2", "ams-table-2", "AMS, table 2", RETURNS, AMS_NOTE + IMPOSSIBLE),
    Table("ams_table_3", "ams-table-3", "AMS, table 3: ablation on quadruped-run", RETURNS, AMS_NOTE),
    Table("ams_figure_4", "ams-table-2", "AMS, figure 4", STABILITY, STABILITY_NOTE, {"quadruped-run": (None,)}),
    Table("ams_timing", "ams-table-2", "AMS, table B.4: training time", MINUTES, TIMING_NOTE),
    Table("other_runs", "", "Other runs", (*RETURNS, *SCORES[1:]), "Of no cell of the papers' tables; steps are transitions."),
]


def paper_values() -> dict[tuple, str]:
    """(suite, method, env_id, metric, step or None) -> the papers' figures as printed, with their deviation."""

    def read(name: str, **constants) -> pd.DataFrame:
        return pd.read_csv(PAPER / f"{name}.csv", dtype=str, keep_default_na=False).assign(**constants)

    tables, geometry, ablation = read("pave_tables_1_2"), read("pave_geometry"), read("pave_ablation_walker_td3")
    variants = read("ams_table_3_quadruped_run", env_id="quadruped-run")
    variants = variants.assign(method=variants.backbone + ":" + variants.variant)
    stability = read("ams_stability_quadruped_run").set_index("quantity").T.rename_axis("method").reset_index()
    timing = read("ams_timing_rtx3090").rename(columns={"baseline_minutes": "td3", "ams_minutes": "td3_ams"})
    frames = [
        ("pave-table-1", tables[tables.backbone == "td3"]),
        *((suite, tables[tables.backbone == "sac"]) for suite in ("pave-table-2", "pave-quarter-rows")),
        ("pave-table-1", geometry.pivot(index=["method", "env_id"], columns="quantity", values="value").reset_index()),
        ("pave-table-1", read("pave_geometry_over_training_td3")),
        ("pave-critic-baselines", read("pave_critic_baselines")),
        ("pave-plus-caps", read("pave_plus_caps_lunar_td3", env_id="LunarLander-v3")),
        ("pave-ablation", ablation.assign(method=ablation.mpr + ablation.vfc + ablation.curv, env_id="Walker2d-v5")),
        ("ams-table-2", read("ams_table_2").drop(columns="steps")),
        *((suite, variants) for suite in ("ams-table-3", "ams-what-works")),
        ("ams-table-2", stability.rename(columns={"critic_gradient_norm": STABILITY[0]}).assign(env_id="quadruped-run")),
        ("ams-table-2", timing.melt("env_id", var_name="method", value_name=MINUTES[0])),
    ]
    values = {}
    for suite, frame in frames:
        frame = frame.fillna("").rename(columns=lambda name: name.removesuffix("_mean"))
        for row in frame.to_dict("records"):
            step = int(row["step"]) if "step" in row else None
            for name in row.keys() & {"return", *SCORES, *GEOMETRY, *STABILITY, *MINUTES}:
                metric = ("training_return" if suite.startswith("ams") else "avg_return") if name == "return" else name
                deviation = f" ± {row[f'{name}_std']}" if f"{name}_std" in row else ""
                values[suite, row["method"], row["env_id"], metric, step] = row[name] + deviation
    return {key: text for key, text in values.items() if text}


WORDS = {("num_neighbors", 0): "no NTD", ("layer_norm", False): "no LayerNorm", ("policy_noise", 0.0): "no noise"}
WORDS |= {("shared_frame", True): "shared frame", ("caps_temporal_weight", 0.1): "with CAPS", ("caps_spatial_weight", 0.5): ""}
WORDS |= {(weight, 0.0): f"no {word}" for weight, word in zip(WEIGHTS, ("MPR", "VFC", "Curv"))}


def name_of(cell: Cell) -> str:
    """What its method is called in tables, curves and CSVs: td3_ams with num_neighbors 0 is AMS-TD3, no NTD."""
    name, defaults = "-".join(reversed(cell.script.upper().split("_"))), load_script(cell.script).Args()
    if all(cell.flags.get(weight) == 0 for weight in WEIGHTS):
        return name.replace("PAVE", "Base")
    changed = {k: v for k, v in cell.flags.items() if k not in ("num_envs", "total_timesteps") and v != getattr(defaults, k)}
    words = [WORDS.get((flag, value), f"{flag.replace('_', ' ')} {value}") for flag, value in changed.items()]
    return ", ".join(filter(None, [name, *words]))


# Our runs in long form.


def read_run(run: Run) -> pd.DataFrame:
    """seed, metric, env_step, value of one run: the mean over a seed's episodes and, with _sd, their deviation.

    Seeds side by side log one training curve, their mean: it counts as the first seed's.
    """
    episodes = pd.read_csv(run.folder / "eval.csv").rename(columns={"return": "avg_return"})
    groups = episodes.groupby(["seed", "step"])[[name for name in SCORES if name in episodes]]
    parts = [groups.mean().join(groups.std(ddof=0).add_suffix("_sd")).assign(episodes=groups.size()).reset_index()]
    parts += [pd.read_csv(path) for name in ("geometry", "target_shift") if (path := run.folder / f"{name}.csv").exists()]
    events, N, grid = (
        EventAccumulator(str(run.folder), {"scalars": 0}),
        run.args["num_envs"],
        max(run.args["eval_every"] // 10, 1),
    )
    events.Reload()
    tags = {"training_return": "charts/episodic_return", **dict.fromkeys(MINUTES, "charts/SPS")}
    for metric, tag in (tags | {name: f"diagnostics/{name}" for name in STABILITY}).items():
        if tag in events.Tags()["scalars"]:
            logged = pd.Series({event.step: event.value for event in events.Scalars(tag)})  # of a step's two the later
            means = logged.groupby(-(-logged.index // grid) * grid).mean().rename(metric)  # of a tenth between evaluations
            means = 1e6 / 60 / means / (N if metric == MINUTES[0] else 1) if metric in MINUTES else means
            parts.append(means.rename_axis("step").reset_index().assign(seed=run.args["seed"]))
    long = pd.concat([part.melt(["seed", "step"], var_name="metric") for part in parts]).dropna()
    return long.assign(env_step=long.step.astype(int) * N)


def read_runs_long(runs: list[Run]) -> tuple[pd.DataFrame, list[str]]:
    """All runs in long form under the names of their cells, and what keeps others from being of one."""
    frames, reasons, keys = [], [], ["exp_name", "env_name", "seed"]
    for run in runs:
        near = [cell for cells in SUITES.values() for cell in cells]
        near = [cell for cell in near if (cell.script, cell.env_id) == (run.args["script"], run.args["env_id"])]
        names = {name_of(cell) for cell in near if is_of(run, cell)}
        if not names:
            other = min((other_arguments(run, cell) for cell in near), key=len, default=["script", "env_id"])
            reasons.append(f"{run.folder.name}: {', '.join(f'{name} {run.args.get(name)}' for name in other)}")
        rows = read_run(run).assign(env_name=run.args["env_id"], run=run.folder.name)
        frames += [rows.assign(exp_name=name) for name in names or {run.args["exp_name"]}]
    data = pd.concat(frames)
    ends = data[data.metric == "avg_return"].groupby([*keys, "run"], sort=False).env_step.max().reset_index()
    furthest = ends.sort_values("env_step", kind="stable").drop_duplicates(keys, keep="last")  # of two runs of a seed
    dropped = {run.folder.name for run in runs} - {*furthest.run}
    reasons += [f"{name}: another run of its name and seed got further" for name in sorted(dropped)]
    return data.merge(furthest[[*keys, "run"]])[COLUMNS], reasons


# Tables and figures, from curves: (exp_name, env_name, metric) -> env_steps down, seeds across.
Curves = dict[tuple[str, str, str], pd.DataFrame]


def curves_of(data: pd.DataFrame) -> Curves:
    groups = data.groupby(["exp_name", "env_name", "metric"])
    return {key: rows.pivot_table(index="env_step", columns="seed", values="value") for key, rows in groups}


def interval(scores: np.ndarray, statistic: Callable) -> np.ndarray:
    """The 95 % interval [2, T] of statistic [T] of scores [seeds, 1, T], by rliable's stratified bootstrap."""
    np.random.seed(0)  # it draws from NumPy's generator: the same report twice
    return rliable.get_interval_estimates({"": scores}, statistic, reps=2000)[1][""]


def iqm(scores: np.ndarray) -> np.ndarray:
    """Interquartile mean [T] over the seeds of scores [seeds, 1, T]: rliable's, for all T at once."""
    cut, ordered = len(scores) // 4, np.sort(scores[:, 0], 0)
    return ordered[cut : len(ordered) - cut].mean(0)


class Row(NamedTuple):
    method: str
    name: str
    env_id: str
    num_envs: int
    total: int | None  # vector steps of the protocol

    def last_step(self, curves: Curves, metric: str) -> int:
        """The step with the most seeds x steps: runs on their way do not hide those that are through."""
        curve = curves[self.name, self.env_id, metric if metric in (*GEOMETRY, *SHIFT) else "avg_return"]
        return int((curve.notna().sum(axis=1) * curve.index).idxmax())

    def values(self, curves: Curves, metric: str, step: int | None = None) -> pd.Series:
        """By seed, at a step or the last one; of what training logs, means over the last tenth of the run."""
        if (curve := curves.get((self.name, self.env_id, metric))) is None:
            return pd.Series(dtype=float)
        at = self.last_step(curves, metric) if step is None else step
        window = curve[(curve.index > 0.9 * at) & (curve.index <= at)] if metric in TRAINING else curve[curve.index == at]
        return window.mean().dropna()


def rows_of(table: Table, curves: Curves) -> list[Row]:
    """The rows of the environments that have a run."""
    has_run = {key[:2] for key in curves if key[2] == "avg_return"}
    named = [(name_of(cell), cell) for suite, cells in SUITES.items() if table.suite in (suite, "") for cell in cells]
    if not table.suite:
        others = sorted(has_run - {(name, cell.env_id) for name, cell in named}, key=lambda key: key[::-1])
        return [Row(name, name, env_id, 1, None) for name, env_id in others]
    live = {env_id for name, env_id in has_run if env_id in (table.steps or [env_id])}
    live &= {cell.env_id for name, cell in named if (name, cell.env_id) in has_run}
    named = [(name, cell, cell_args(cell)) for name, cell in named if cell.env_id in live]
    return [Row(cell.method, name, cell.env_id, args.num_envs, args.total_timesteps) for name, cell, args in named]


def label_of(metric: str) -> str:
    return (metric if metric == "M_sup" else metric.replace("_", " ")) + BETTER.get(metric, "")


def number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"


def text_of(row: Row, table: Table, metric: str, step: int | None, curves: Curves) -> str:
    """Mean, deviation and, over seeds, 95 % interval of the mean; empty without a run."""
    values = row.values(curves, metric, step)
    if values.empty:
        return ""
    variance = values.var(ddof=0)
    if table.suite.startswith("pave"):
        variance += row.values(curves, f"{metric}_sd", step).pow(2).sum() / len(values)
    text = number(values.mean()) + (f" ± {number(variance**0.5)}" if variance else "")
    if len(values) == 1:
        return text
    low, high = interval(values.to_numpy()[:, None, None], lambda scores: scores.mean((0, 1))).ravel()
    return f"{text}<br><small>[{number(low)}, {number(high)}]</small>"


def table_lines(table: Table, rows: list[Row], curves: Curves, printed: dict) -> list[list[str]]:
    """Header and lines of a table; a line of one word begins an environment. Empty where there is nothing of ours."""
    env_ids = dict.fromkeys(row.env_id for row in rows)
    places = [(env_id, step) for env_id in env_ids for step in table.steps.get(env_id, (None,))]
    entries = [(row, step) for env_id, step in places for row in rows if row.env_id == env_id]
    columns = []
    for metric in table.metrics:
        mine = [text_of(row, table, metric, step, curves) for row, step in entries]
        paper = [printed.get((table.suite, row.method, row.env_id, metric, step), "") for row, step in entries]
        if any(mine):
            columns.append([label_of(metric), *mine])
            columns += [["paper", *paper]] if any(paper) else []
    if not columns:
        return []
    header, *cells = zip(*columns)
    lines, names = [["", *header, "seeds x episodes", "steps"]], [row.name for row, _ in entries]
    for (row, step), line in zip(entries, cells):
        place = [row.env_id if step is None else f"{row.env_id}, step {step:,}"]
        lines += [] if place in lines else [place]
        variant = f" ({row.method.split(':')[-1].replace('_', ' ')})" if ":" in row.method and names.count(row.name) > 1 else ""
        counted = ["not measured" if (row.name, row.env_id, "avg_return") in curves else "no run", ""]
        first = SCORES[0] if table.metrics[0] in TRAINING else table.metrics[0]
        if len(values := row.values(curves, first, step)):
            at = row.last_step(curves, first) if step is None else step
            of_total = f" of {row.total:,}" if row.total and not step and at < row.total * row.num_envs else ""
            episodes = row.values(curves, "episodes", at)[values.index].max()
            counted = [f"{len(values)} x {episodes:.0f}", f"{at // row.num_envs:,}{of_total}"]
        lines.append([row.name + variant, *line, *counted])
    return lines


def colours_of(names: list[str]) -> dict[str, str]:
    others, known = cycle(OTHER_COLOURS), {name: COLOURS.get(name, COLOURS.get(name.split("-")[0])) for name in names}
    return {name: next(others) if colour is None or "," in name else colour for name, colour in known.items()}


def save_figure(path: Path, axis: plt.Axes, title: str) -> Path:
    figure, handles = axis.figure, dict(zip(*axis.get_legend_handles_labels()[::-1]))
    columns = 1 if max(map(len, handles)) > 22 else 2
    figure.set_size_inches(4.6, 3.5 + 0.2 * len(handles) / columns)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def curve_figure(path: Path, title: str, label: str, lines: list[tuple], ends: dict, log: bool) -> Path:
    """lines: (name, colour, dashes, curve): IQM over seeds with its 95 % interval. ends: the paper's final values, or None."""
    _, axis = plt.subplots(layout="constrained")
    for name, colour, dashes, curve in lines:
        curve = curve.loc[1:]  # without the untrained policy, which would fill the panel
        curve = curve.loc[:, curve.loc[(curve.notna().sum(axis=1) * curve.index).idxmax()].notna()].dropna()
        scores = curve.T.to_numpy()[:, None, :]
        axis.plot(curve.index / 1000, iqm(scores), color=colour, ls=dashes, label=name, lw=1.6, marker=".")
        if len(scores) > 1:
            axis.fill_between(curve.index / 1000, *interval(scores, iqm), color=colour, alpha=0.2, lw=0)
    for colour, end in ends.items():
        if end:
            at_edge = {"transform": axis.get_yaxis_transform(), "clip_on": False}
            axis.plot(1, float(end.split()[0]), "D", color=colour, mfc="none", label="paper, at its end", **at_edge)
    axis.set(xlabel="environment steps (thousands)", ylabel=label, yscale="log" if log else "linear")
    return save_figure(path, axis, title)


def plane_figure(path: Path, rows: list[Row], table: Table, curves: Curves, printed: dict) -> Path:
    """Return against smoothness, means: up and to the left is better."""
    _, axis = plt.subplots(layout="constrained")
    for row, colour in zip(rows, colours_of([row.name for row in rows]).values()):
        metrics = ("smoothness", "avg_return")
        theirs = [printed.get((table.suite, row.method, row.env_id, metric, None)) for metric in metrics]
        if all(theirs):
            point = [float(value.split()[0]) for value in theirs]
            axis.plot(*point, "o", ms=8, mfc="none", color=colour, label=f"{row.name}, paper")
        if len(row.values(curves, "avg_return")):
            axis.plot(*(row.values(curves, metric).mean() for metric in metrics), "o", ms=8, color=colour, label=row.name)
    axis.set(xlabel="smoothness (lower is smoother)", ylabel="return")
    return save_figure(path, axis, rows[0].env_id)


def figures(table: Table, rows: list[Row], curves: Curves, printed: dict, peers: Curves, folder: Path) -> Iterator[Path]:
    """A panel a file, so that a narrow page shows one beside the other or one below the other."""
    for env_id in dict.fromkeys(row.env_id for row in rows):
        here = list({row.name: row for row in rows if row.env_id == env_id}.values())
        colours = colours_of([row.name for row in here] + [name for name, _, _ in peers])
        for row in here if table.metrics == SHIFT else ():  # a method a panel: its metrics are what is to be compared
            found = [(label_of(metric), curves.get((row.name, env_id, metric))) for metric in SHIFT]
            if found[0][1] is not None and len(found[0][1]) > 1:
                lines = [(label, colour, "-", curve) for (label, curve), colour in zip(found, OTHER_COLOURS)]
                path = folder / f"{table.name}_{row.name.replace(', ', '_').replace(' ', '_')}.png"
                yield curve_figure(path, f"{row.name}, {env_id}", "value", lines, {}, True)
        for metric in () if table.metrics == SHIFT else table.metrics:
            found = [(row, curves.get((row.name, env_id, metric))) for row in here]
            found = [(row, curve) for row, curve in found if curve is not None and len(curve) > 1]
            if not found or metric in MINUTES:
                continue
            lines = [(row.name, colours[row.name], "-", curve) for row, curve in found]
            longest = max(curve.index[-1] for _, curve in found)
            rivals = [(name, curve.loc[:longest]) for (name, env, m), curve in peers.items() if (env, m) == (env_id, metric)]
            lines += [(name, colours[name], "--", curve) for name, curve in rivals if len(curve) > 1]
            ends = {colours[row.name]: printed.get((table.suite, row.method, env_id, metric, None)) for row, _ in found}
            path = folder / f"{table.name}_{env_id}_{metric}.png"
            yield curve_figure(path, env_id, label_of(metric), lines, ends, metric in LOGARITHMIC)
        if table.suite and "smoothness" in table.metrics:
            yield plane_figure(folder / f"{table.name}_{env_id}_plane.png", here, table, curves, printed)


@dataclass
class Options:
    runs: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs"),)  # runs, folders of runs, CSVs of an earlier report
    peers: tuple[Path, ...] = ()  # other people's CSVs of that form: avg_return is drawn beside ours
    output: Path = Path("report")

    def __post_init__(self):
        missing = [path for path in (*self.runs, *self.peers) if not path.exists()]
        if missing or not (runs_in(self.runs) or any(path.suffix == ".csv" for path in self.runs)):
            raise ValueError(f"no runs: {', '.join(map(str, missing or self.runs))}")


def main(options: Options) -> None:
    runs, printed = runs_in(options.runs), paper_values()
    data, reasons = read_runs_long(runs) if runs else (None, [])
    data = pd.concat([data, *(pd.read_csv(path) for path in options.runs if path.suffix == ".csv")])[COLUMNS].drop_duplicates()
    curves, peers = curves_of(data), {}
    if options.peers:
        theirs = pd.concat(map(pd.read_csv, options.peers)).query("metric == 'avg_return'")
        names = theirs.env_name.str.removesuffix("-v0").str.removesuffix("_simple")  # HumanoidBench's
        peers = curves_of(theirs.assign(env_name=names))
    options.output.mkdir(parents=True, exist_ok=True)
    surfaces, sections, text = sorted(options.output.glob("surface_*.png")), [], ["# smoothq: ours beside the papers'", ""]
    for table in TABLES:
        rows = rows_of(table, curves)
        if not (lines := table_lines(table, rows, curves, printed)):
            continue
        keep = data.env_name.isin({row.env_id for row in rows}) & data.exp_name.isin({row.name for row in rows})
        keep &= data.metric.str.removesuffix("_sd").isin({*table.metrics, "avg_return", "episodes"})
        data[keep].to_csv(options.output / f"{table.name}.csv", index=False, float_format="%.6g")
        paths = list(figures(table, rows, curves, printed, peers, options.output))
        paths += [path for path in surfaces if table.name == f"pave_geometry_{path.stem[-3:]}"]
        images = {path.name: base64.b64encode(path.read_bytes()).decode() for path in paths}
        sections.append((table, lines, images))
        markdown = [line if len(line) > 1 else [f"**{line[0]}**"] for line in (lines[0], ["---"] * len(lines[0]), *lines[1:])]
        text += [f"## {table.title}", "", " ".join(table.note.split()), "", *(f"| {' | '.join(line)} |" for line in markdown)]
        text += ["", *(f"![{path.stem}]({path.name})" for path in paths), ""]
    (options.output / "report.md").write_text("\n".join(text))
    template = jinja2.Environment(autoescape=True).from_string(Path(__file__).with_suffix(".html.jinja").read_text())
    (options.output / "report.html").write_text(template.render(sections=sections, runs=runs, reasons=reasons))
    print(f"{len(runs)} runs, {len(sections)} tables: {options.output / 'report.html'}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

"""Tables and curves of many runs, ours beside the papers': a folder with report.html, PNGs and a CSV a section.

    python benchmark/report.py runs --peers FlashSAC/results/stateRL_cpusim/*.csv
    python benchmark/report.py benchmark/results/*.csv      # from the CSVs of an earlier report

A run counts for a method if its arguments are those of a cell of suites.py, however far it is; the step read is the one
with the most seeds x steps. geometry.py gives the runs what the tables of the critics need. The CSVs have the columns
that FlashSAC, XQC, SimbaV2 and DR.Q publish, exp_name, env_name, seed, metric, env_step, value, and num_envs: env_step
counts transitions, tables and figures vector steps, which are env_step / num_envs.
"""

import base64
import html
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import jinja2
import matplotlib
import numpy as np
import pandas as pd
import tyro
from geometry import GEOMETRY, SHIFT
from intervals import interquartile_mean, interval, paired_difference
from suites import INCIDENTAL, LENGTH, SEEDS, SUITES, cell_args, name_of, other_arguments
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from runs import Run, file_name, runs_in

matplotlib.use("agg")
import matplotlib.pyplot as plt

PAPER = Path(__file__).resolve().parent / "paper" / "figures.csv"
COLUMNS = ["exp_name", "env_name", "seed", "metric", "env_step", "value", "num_envs"]
KEYS = ["exp_name", "env_name", "seed"]
SCORES = ("avg_return", "smoothness", "action_fluctuation")
STABILITY = ("critic_grad_norm", "td_target_variance", "action_saturation")
MINUTES = ("minutes_per_1M_transitions", "minutes_per_1M_vector_steps")
TRAINING = ("training_return", *STABILITY, *MINUTES)  # what TensorBoard has: means over the last tenth of the run
TAGS = {"charts/episodic_return": "training_return", "charts/SPS": "SPS"}
TAGS |= {f"diagnostics/{metric}": metric for metric in STABILITY}
SHOWN_SHIFT = ("shift_radius_0.2", "unclipped_shift_radius_0.2", "taylor_radius_0.2", "shift_td3_noise")
SHOWN_SHIFT += ("unclipped_shift_td3_noise", "saturated_actions", "value_sd_over_states")

LABELS = {
    "avg_return": "return ↑",
    "training_return": "training return ↑",
    "smoothness": "smoothness ↓",
    "action_fluctuation": "action fluctuation ↓",
    "M_sup": "M_sup ↓",
    "negative_definite_rate": "negative definite rate ↑",
    "mean_cosine": "mean cosine ↑",
    "flip_rate": "flip rate ↓",
}
# Most of Paul Tol's "muted" and "bright" that have a contrast of 3 to white; colour-blind readers tell them apart.
COLOURS = ("#000000", "#CC3311", "#0077BB", "#117733", "#AA4499", "#808000", "#882255", "#D55E00", "#332288", "#777777")
COLOURS += ("#009078", "#8C564B", *map(matplotlib.colors.to_hex, plt.get_cmap("tab20b").colors))

PAVE_NOTE = """Deterministic policy; smoothness and fluctuation in the environment's units. M_sup and the other columns
of the critic: first critic, along the evaluation's episodes; M_sup is no finer than ±50 %, the paper's tables disagree
by that much (Walker's base 1923 and 1320). Pendulum's printed geometry is left out: the reference takes the critic at
the action in the environment's units, we at the normalised one that it learnt from. The paper's rows of single terms
come from an ablation whose base has a return of 4589 and a smoothness of 1.828."""
AMS_NOTE = """Training return: with exploration, of the episodes that ended in the last tenth of the run; the paper does
not say which return it prints, we think this one. The other return: deterministic policy. Gradient norm, target
variance and saturation (the share of the actor's action components beyond 0.98): means over the last tenth of the run.
Our gradient norm is some 50 times the paper's: of another definition. Its “1M environment steps” are probably
transitions, 8 a vector step, on an RTX 3090. Returns lie between 0 and 1000, so the paper's deviations for SAC on
h1-walk, dog-stand and h1-run cannot be; with mean and deviation exchanged they can. The shift is min_j Q_j at the
policy's action minus its mean around it, at 512 next states of the replay; unclipped: where the neighbours may leave
the box [-1, 1]. Taylor: -radius² / (2 A) tr H, 0 for a ReLU critic without LayerNorm: its curvature is in its kinks."""
OTHER_NOTE = """Of no cell of the papers' tables. A step advances a run's environments, by default 8 in AMS's scripts
and PPO, 1 in the others: as many steps are not as much data."""


class Section(NamedTuple):
    """The methods of some suites on one backbone: in no other section."""

    name: str
    title: str
    scripts: tuple[str, ...]  # of the backbone and, by its name, of the methods on it
    suites: tuple[str, ...]
    base: str  # the method that the others are compared with
    tables: tuple[tuple[str, ...], ...]  # the metrics of each
    note: str


PAVE_TABLES = ((*SCORES, MINUTES[1]), GEOMETRY)
AMS_TABLES = (("training_return", "avg_return", *STABILITY, MINUTES[0]), SHOWN_SHIFT)
OTHER_TABLES = (("training_return", *SCORES, "action_saturation"),)
PAVE_SUITES = tuple(suite for suite in SUITES if suite.startswith("pave"))
AMS_SUITES = ("ams-what-works", "ams-table-2", "ams-table-3")
SECTIONS = (
    Section("ams_td3", "AMS on TD3", ("td3", "ppo"), AMS_SUITES, "TD3", AMS_TABLES, AMS_NOTE),
    Section("ams_sac", "AMS on SAC", ("sac",), AMS_SUITES, "SAC", AMS_TABLES, AMS_NOTE),
    Section("pave_td3", "PAVE on TD3", ("td3",), PAVE_SUITES, "Base on TD3", PAVE_TABLES, PAVE_NOTE),
    Section("pave_sac", "PAVE on SAC", ("sac",), PAVE_SUITES, "Base on SAC", PAVE_TABLES, PAVE_NOTE),
    Section("other_runs", "Other runs", ("",), (), "", OTHER_TABLES, OTHER_NOTE),
)


def cells_by_name() -> dict[tuple[str, str], tuple]:
    """(method, env_id) -> its cell and the Args of its script."""
    cells = {}
    for cell in [cell for suite in (*AMS_SUITES, *PAVE_SUITES) for cell in SUITES[suite]]:
        cells.setdefault((name_of(cell), cell.env_id), (cell, cell_args(cell)))
    return cells


CELLS = cells_by_name()


def names_of(section: Section) -> list[str]:
    """The methods that belong to a section, in the order of its rows."""
    cells = [cell for suite in section.suites for cell in SUITES[suite]]
    return list(dict.fromkeys(name_of(cell) for cell in cells if cell.script.split("_")[0] in section.scripts))


def shown(name: str, section: Section) -> str:
    """AMS on TD3 -> AMS, in a section that has that in its title."""
    return name.removesuffix(f" on {section.scripts[0].upper()}")


# ----------------------------------------------------------------------------------------------------- reading the runs


def read_run(run: Run) -> pd.DataFrame:
    """seed, metric, env_step, value, num_envs: means over a seed's episodes and, with _sd, their deviation."""
    episodes = pd.read_csv(run.folder / "eval.csv").rename(columns={"return": "avg_return"})
    groups = episodes.groupby(["seed", "step"])[[score for score in SCORES if score in episodes]]
    scores = groups.mean().join(groups.std(ddof=0).add_suffix("_sd")).assign(episodes=groups.size())
    tables = [scores.reset_index(), *training_tables(run)]
    for name in ("geometry", "target_shift"):
        path = run.folder / f"{name}.csv"
        if path.exists():
            tables.append(pd.read_csv(path))
    long = pd.concat([table.melt(["seed", "step"], var_name="metric") for table in tables]).dropna()
    N = run.args["num_envs"]
    return long.assign(env_step=long.step.astype(int) * N, num_envs=N).drop(columns="step")


def training_tables(run: Run) -> Iterator[pd.DataFrame]:
    """seed, step and a metric of TensorBoard, ten points for each evaluation.

    What is logged for all seeds together counts as the first one's; the training return is logged for each, but by
    older runs.
    """
    events = EventAccumulator(str(run.folder), {"scalars": 0})
    events.Reload()
    tags = events.Tags()["scalars"]
    points = max(1, min(run.args["eval_every"], run.args["total_timesteps"]) // 10)
    for tag in tags:
        name, of_seed, seed = tag.partition("_seed_")
        if name not in TAGS or (not of_seed and any(other.startswith(f"{name}_seed_") for other in tags)):
            continue
        logged = pd.Series({event.step: event.value for event in events.Scalars(tag)})  # of a step's two the later
        means = logged.groupby(np.ceil(logged.index / points).astype(int) * points).mean()
        table = pd.DataFrame({"step": means.index, "seed": int(seed or run.args["seed"]), TAGS[name]: means.to_numpy()})
        if name == "charts/SPS":
            minutes = 1e6 / 60 / table.pop("SPS")
            table[MINUTES[0]] = minutes / run.args["num_envs"]
            table[MINUTES[1]] = minutes
        yield table


def read_runs_long(runs: list[Run]) -> tuple[list[pd.DataFrame], dict[str, str]]:
    """A table a run, named as the cell that it is of or by its exp_name; and what keeps runs from being of a cell."""
    tables = []
    reasons = {}
    for run in runs:
        name = None
        nearest = ["script", "env_id"]
        for (cell_name, _), (cell, _) in CELLS.items():
            different = other_arguments(run, cell)
            if not different:
                name = cell_name
            elif different[0] != "script" and (nearest[0] == "script" or len(different) < len(nearest)):
                nearest = different
        if name is None:
            reasons[run.folder.name] = ", ".join(f"{argument} {run.args.get(argument)}" for argument in nearest)
            name = own_name(run, runs)
        named = {"exp_name": name, "env_name": run.args["env_id"], "source": run.folder.name}
        tables.append(read_run(run).assign(**named))
    return tables, reasons


def own_name(run: Run, runs: list[Run]) -> str:
    """Its exp_name, and the arguments in which runs of that name and environment differ: they are not one method."""
    alike = [other for other in runs if all(other.args[name] == run.args[name] for name in ("exp_name", "env_id"))]
    differ = {name for other in alike for name in run.args if other.args.get(name, run.args[name]) != run.args[name]}
    settings = [f"{name} {run.args[name]}" for name in sorted(differ - INCIDENTAL - SEEDS - LENGTH)]
    mark = ["(own)"] if run.args["exp_name"] in {name for name, _ in CELLS} else []  # no run of the papers' method
    return " ".join([run.args["exp_name"], *mark, *settings])


def read_csvs(paths: list[Path]) -> pd.DataFrame:
    """The CSVs of an earlier report, also those from before num_envs was a column."""
    data = pd.concat(map(pd.read_csv, paths), ignore_index=True).reindex(columns=COLUMNS)
    data["source"] = "CSVs"
    num_envs = {env_id: args.num_envs for (_, env_id), (_, args) in CELLS.items()}  # one protocol an environment
    data["num_envs"] = data.num_envs.fillna(data.env_name.map(num_envs)).fillna(1)
    return data


def furthest(data: pd.DataFrame) -> pd.DataFrame:
    """Of several sources of a method, environment and seed the one that got furthest, the first of equals."""
    ends = data.groupby([*KEYS, "source"], sort=False).env_step.max().reset_index()
    best = ends.sort_values("env_step", ascending=False, kind="stable").drop_duplicates(KEYS)
    return data.merge(best[[*KEYS, "source"]])


def paper_figures() -> dict[tuple, str]:
    """(method, env_id, metric, step or None) -> the papers' figures as printed, with their deviation."""
    figures = {}
    for row in pd.read_csv(PAPER, dtype=str, keep_default_na=False).to_dict("records"):
        if row["env_id"] == "Pendulum-v1" and row["metric"] in GEOMETRY:
            continue  # PAVE_NOTE says why
        step = int(row["step"]) if row["step"] else None
        deviation = f" ± {row['deviation']}" if row["deviation"] else ""
        figures.setdefault((row["name"], row["env_id"], row["metric"], step), row["value"] + deviation)
    return figures


# --------------------------------------------------------------------------------------------------------------- tables

# (exp_name, env_name, metric) -> vector steps down, seeds across
Curves = dict[tuple[str, str, str], pd.DataFrame]


def curves_of(data: pd.DataFrame) -> Curves:
    data = data.assign(step=(data.env_step / data.num_envs).astype(int), value=data.value.astype(float))
    groups = data.groupby(["exp_name", "env_name", "metric"])
    return {key: rows.pivot_table(index="step", columns="seed", values="value") for key, rows in groups}


def last_step(curves: Curves, name: str, env_id: str, metric: str) -> int | None:
    """The step with the most seeds x steps: runs on their way do not hide those that are through."""
    if metric in TRAINING:
        metric = "avg_return"
    curve = curves.get((name, env_id, metric))
    if curve is None:
        return None
    return int((curve.notna().sum(axis=1) * curve.index).idxmax())


def values_at(curves: Curves, name: str, env_id: str, metric: str, step: int | None) -> pd.Series:
    """By seed; of what training logs, means over the last tenth of the run."""
    curve = curves.get((name, env_id, metric))
    if curve is None or step is None:
        return pd.Series(dtype=float)
    if metric in TRAINING:
        return curve[(curve.index > 0.9 * step) & (curve.index <= step)].mean().dropna()
    return curve[curve.index == step].mean().dropna()


def number(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:.1f}" if abs(value) < 1000 else f"{value:.0f}"
    return f"{value:.3g}"


def with_interval(mean: float, bounds: np.ndarray | None) -> str:
    if bounds is None:
        return number(mean)
    return f"{number(mean)}<br><small>[{number(bounds[0])}, {number(bounds[1])}]</small>"


def label_of(metric: str) -> str:
    return LABELS.get(metric, metric.replace("_", " "))


def counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def table_html(section: Section, places: list[tuple], metrics: tuple[str, ...], curves: Curves, paper: dict) -> str:
    """Ours beside the paper's; places: (method, env_id) of the rows."""
    order = ["environment", "method"]
    for metric in metrics:
        order += [label_of(metric), paper_label(metric)]
    order += ["seeds", "steps"]
    rows = []
    for name, env_id in places:
        row = {}
        seeds = 0
        for metric in metrics:
            step = last_step(curves, name, env_id, metric)
            values = values_at(curves, name, env_id, metric, step)
            if values.empty:
                continue
            row[label_of(metric)] = with_interval(values.mean(), interval(values))
            seeds = max(seeds, len(values))  # older runs log one training return for all
            row["seeds"] = str(seeds)
            row["steps"] = steps_text(name, env_id, step)
            printed = paper.get((name, env_id, metric, None))
            if printed:
                row[paper_label(metric)] = f'<span class="paper">{printed}</span>'
        if row:
            rows.append({"environment": html.escape(env_id), "method": html.escape(shown(name, section)), **row})
    return as_html(rows, order)


def paper_label(metric: str) -> str:
    return "paper's " + label_of(metric).rstrip(" ↑↓")


def steps_text(name: str, env_id: str, step: int) -> str:
    _, args = CELLS.get((name, env_id), (None, None))
    if args and step < args.total_timesteps:
        return f"{step:,} of {args.total_timesteps:,}"
    return f"{step:,}"


def as_html(rows: list[dict[str, str]], order: list[str]) -> str:
    """order: of the columns; those that no row has are left out."""
    if not rows:
        return ""
    frame = pd.DataFrame(rows)
    frame = frame[[column for column in order if column in frame]]
    return frame.set_index(["environment", "method"]).to_html(escape=False, na_rep="", border=0)


def summary_html(sections: list[tuple[Section, list[tuple]]], curves: Curves) -> str:
    """What each method changes against its base, seed by seed."""
    metrics = ("avg_return", "training_return", "smoothness")
    rows = []
    for section, places in sections:
        for name, env_id in places:
            row = {}
            for metric in metrics:
                steps = [last_step(curves, method, env_id, metric) for method in (name, section.base)]
                if name == section.base or None in steps:
                    continue
                ours = values_at(curves, name, env_id, metric, min(steps))
                base = values_at(curves, section.base, env_id, metric, min(steps))
                found = paired_difference(ours, base)
                if found:
                    mean, bounds, seeds = found
                    row[label_of(metric)] = with_interval(mean, bounds)
                    row.setdefault("seeds", str(seeds))
                    row.setdefault("steps", f"{min(steps):,}")
            if row:
                versus = html.escape(f"{name} minus {section.base}")
                rows.append({"environment": html.escape(env_id), "method": versus, **row})
    return as_html(rows, ["environment", "method", *map(label_of, metrics), "seeds", "steps"])


# -------------------------------------------------------------------------------------------------------------- figures


def save_figure(path: Path, axis: plt.Axes, title: str) -> Path:
    figure = axis.figure
    handles, labels = axis.get_legend_handles_labels()
    unique = dict(zip(labels, handles))
    columns = 1 if max(map(len, unique)) > 22 else 2
    figure.set_size_inches(4.6, 3.5 + 0.2 * len(unique) / columns)
    figure.legend(unique.values(), unique.keys(), loc="outside lower center", ncols=columns, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title("\n".join(textwrap.wrap(title, 45)))
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


class Line(NamedTuple):
    name: str
    colour: str
    curve: pd.DataFrame  # vector steps down, seeds across
    paper: dict[int, str]  # its figures, by step
    dashes: str = "-"


def whole_curves(curve: pd.DataFrame) -> pd.DataFrame:
    """Of the seeds that got to the step with the most seeds x steps; between steps of its own a seed's is a line."""
    furthest_step = (curve.notna().sum(axis=1) * curve.index).idxmax()
    curve = curve.loc[:, curve.loc[furthest_step].notna()]
    return curve.interpolate("index", limit_area="inside").dropna()


def curve_figure(path: Path, title: str, metric: str, lines: list[Line]) -> Path:
    """The interquartile mean over seeds and, of three or more, its 95 % interval."""
    _, axis = plt.subplots(layout="constrained")
    for line in lines:
        curve = whole_curves(line.curve.loc[1:])  # without the untrained policy, which would fill the panel
        scores = curve.T.to_numpy()
        thousands = curve.index / 1000
        label = f"{line.name}, {counted(len(scores), 'seed')}"
        axis.plot(
            thousands, interquartile_mean(scores), line.dashes, color=line.colour, label=label, lw=1.6, marker="."
        )
        band = interval(scores, interquartile_mean, reps=300)  # as fine as it is drawn
        if band is not None:
            axis.fill_between(thousands, *band, color=line.colour, alpha=0.2, lw=0)
        for step, printed in line.paper.items():
            value = float(printed.split()[0])
            axis.plot(step / 1000, value, "D", color=line.colour, mfc="none", clip_on=False)
    if any(line.paper for line in lines):
        axis.plot([], [], "D", color="#777777", mfc="none", label="paper")
    is_logarithmic = metric in ("M_sup", *STABILITY[:2])
    axis.set(xlabel="vector steps (thousands)", ylabel=label_of(metric), yscale="log" if is_logarithmic else "linear")
    return save_figure(path, axis, title)


def paper_points(name: str, env_id: str, metric: str, curve: pd.DataFrame, paper: dict) -> dict[int, str]:
    """The paper's figures at the steps that they belong to, as far as our runs go."""
    if metric == "critic_grad_norm":
        return {}  # AMS_NOTE says why
    _, args = CELLS.get((name, env_id), (None, None))
    points = {}
    for (method, environment, quantity, step), printed in paper.items():
        if args and (method, environment, quantity) == (name, env_id, metric):
            at = step or args.total_timesteps
            if at <= curve.index[-1]:
                points.setdefault(at, printed)
    return points


def plane_figure(
    path: Path, section: Section, colours: dict[str, str], names: list[str], env_id: str, curves: Curves
) -> Path:
    """Return minus the seed's own base against smoothness, with intervals: up and to the left is better."""
    _, axis = plt.subplots(layout="constrained")
    for name in names:
        step = last_step(curves, name, env_id, "avg_return")
        returns = values_at(curves, name, env_id, "avg_return", step)
        smoothness = values_at(curves, name, env_id, "smoothness", step)
        less_base = (returns - values_at(curves, section.base, env_id, "avg_return", step)).dropna()
        if less_base.empty:
            continue
        label = shown(name, section)
        colour = colours[name]
        x = smoothness.mean()
        y = less_base.mean()
        axis.plot(x, y, "o", ms=7, color=colour, label=f"{label}, {counted(len(less_base), 'seed')}")
        x_bounds = interval(smoothness)
        y_bounds = interval(less_base)
        if x_bounds is not None and y_bounds is not None:
            axis.plot(x_bounds, [y, y], color=colour, lw=1.2)
            axis.plot([x, x], y_bounds, color=colour, lw=1.2)
    axis.axhline(0, color="#777777", lw=0.8, zorder=0)
    base = shown(section.base, section)
    axis.set(xlabel="smoothness (lower is smoother)", ylabel=f"return less {base}'s, seed by seed")
    return save_figure(path, axis, env_id)


def figures(
    section: Section, places: list[tuple], curves: Curves, paper: dict, peers: Curves, folder: Path
) -> Iterator[Path]:
    """A panel a file, so that a narrow page shows one below the other; a method has one colour in all of them."""
    colours = dict(zip(dict.fromkeys(name for name, *_ in (*places, *peers)), cycle(COLOURS)))
    for env_id in dict.fromkeys(env_id for _, env_id in places):
        names = [name for name, environment in places if environment == env_id]
        prefix = file_name(f"{section.name}_{env_id}")
        rivals = [name for name, environment, _ in peers if environment == env_id]
        for metric in [metric for table in section.tables for metric in table]:
            if metric in (*MINUTES, *SHIFT):
                continue
            lines = []
            for name in names:
                curve = curves.get((name, env_id, metric))
                if curve is not None and len(curve.loc[1:]):
                    label = shown(name, section)
                    points = paper_points(name, env_id, metric, curve, paper)
                    lines.append(Line(label, colours[name], curve, points))
            if not any(len(line.curve.loc[1:]) > 1 for line in lines):
                continue
            longest = max(line.curve.index[-1] for line in lines)
            for name in rivals:
                curve = peers.get((name, env_id, metric), pd.DataFrame()).loc[:longest]
                if len(curve) > 1:
                    lines.append(Line(name, colours[name], curve, {}, "--"))
            yield curve_figure(folder / f"{prefix}_{metric}.png", env_id, metric, lines)
        smooth = [name for name in names if (name, env_id, "smoothness") in curves]
        if section.base in smooth and "smoothness" in section.tables[0]:
            yield plane_figure(folder / f"{prefix}_plane.png", section, colours, smooth, env_id, curves)


# ------------------------------------------------------------------------------------------------------------- the page


@dataclass
class Options:
    runs: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs"),)  # runs, folders of runs, CSVs of an earlier report
    peers: tuple[Path, ...] = ()  # other people's CSVs of that form: avg_return is drawn beside ours
    output: Path = Path("report")

    def __post_init__(self):
        missing = [path for path in (*self.runs, *self.peers) if not path.exists()]
        if missing or not (runs_in(self.runs) or any(path.suffix == ".csv" for path in self.runs)):
            raise ValueError(f"no runs: {', '.join(map(str, missing or self.runs))}")


def read_peers(paths: tuple[Path, ...]) -> Curves:
    if not paths:
        return {}
    data = pd.concat(map(pd.read_csv, paths)).query("metric == 'avg_return'")
    env_names = data.env_name.str.removesuffix("-v0").str.removesuffix("_simple")  # HumanoidBench's
    num_envs = data.reindex(columns=COLUMNS).num_envs.fillna(1)
    return curves_of(data.assign(env_name=env_names, num_envs=num_envs))


def main(options: Options) -> None:
    runs = runs_in(options.runs)
    tables, reasons = read_runs_long(runs)
    files = [path for path in options.runs if path.suffix == ".csv"]
    if files:
        tables.append(read_csvs(files))
    data = furthest(pd.concat(tables))
    for run in runs:
        if run.folder.name not in set(data.source):
            reasons[run.folder.name] = "another run of its method and seed got further"
    curves = curves_of(data)
    peers = read_peers(options.peers)
    paper = paper_figures()
    options.output.mkdir(parents=True, exist_ok=True)

    sections = []
    for section in SECTIONS:
        names = names_of(section) or sorted(set(data.exp_name) - {name for name, _ in CELLS})
        env_ids = sorted(set(data.env_name))
        places = [(name, env_id) for env_id in env_ids for name in names if (name, env_id, "avg_return") in curves]
        if places:
            sections.append((section, places))
    summary = summary_html(sections, curves)

    page = []
    for section, places in sections:
        rows = data[[place in places for place in zip(data.exp_name, data.env_name)]]
        rows[COLUMNS].to_csv(options.output / f"{section.name}.csv", index=False, float_format="%.6g")
        found = [table_html(section, places, metrics, curves, paper) for metrics in section.tables]
        paths = list(figures(section, places, curves, paper, peers, options.output))
        images = {path.name: base64.b64encode(path.read_bytes()).decode() for path in paths}
        page.append((section, found, images))
    source = Path(__file__).with_suffix(".html.jinja").read_text("utf-8")
    template = jinja2.Environment(autoescape=True).from_string(source)
    number_of_runs = counted(len(runs), "run")
    text = template.render(runs=number_of_runs, summary=summary, sections=page, reasons=reasons)
    (options.output / "report.html").write_text(text, "utf-8")
    print(f"{number_of_runs}, {counted(len(page), 'section')}: {options.output / 'report.html'}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

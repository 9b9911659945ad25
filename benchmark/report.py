"""Reads runs/ and sets it beside the papers: report/report.md, report/report.html (one file, opens from disk), report/figures/.

    python benchmark/report.py
    python benchmark/geometry.py && python benchmark/report.py       # with the tables of the critics' geometry

A run counts for a cell of a table if its arguments are the cell's, at any length (sweep.py --scale); what was trained for
fewer steps than the protocol asks says so in its cell. Of several lengths the longest counts. Runs that count nowhere are
listed with the reason.
"""

import base64
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import jinja2
import matplotlib
import numpy as np
import pandas as pd
import sweep
import tyro
from rliable import library as rliable
from sweep import Cell, Run, UserError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

PAPER = Path(__file__).resolve().parent / "paper"
# Paul Tol's "muted" scheme, which colour-blind readers tell apart; a method has its colour everywhere.
STYLE = {
    "td3": ("TD3", "#000000"),
    "sac": ("SAC", "#332288"),
    "ppo": ("PPO", "#999999"),
    "caps": ("CAPS", "#DDCC77"),
    "grad": ("GRAD", "#88CCEE"),
    "asap": ("ASAP", "#117733"),
    "sn": ("SN-Critic", "#999933"),
    "gp": ("GP-Critic", "#44AA99"),
    "pave": ("PAVE", "#CC6677"),
    "td3_ams": ("AMS-TD3", "#882255"),
    "sac_ams": ("AMS-SAC", "#AA4499"),
}
DECIMALS = {"LunarLander-v3": 1, "Pendulum-v1": 1, "Reacher-v5": 2}
SHORT = {"LunarLander-v3": "LunarLander", "Pendulum-v1": "Pendulum", "Reacher-v5": "Reacher", "Ant-v5": "Ant"}
SHORT |= {"Hopper-v5": "Hopper", "Walker2d-v5": "Walker"}
BOOTSTRAPS = 2000
EMPTY = "—"


def style(cell: Cell) -> tuple[str, str]:
    """A method's name and colour."""
    name, colour = STYLE[cell.script if cell.script in STYLE else cell.script.split("_")[1]]
    return ("Base" if cell.method == "base" else name), colour


class Result(NamedTuple):
    """The runs that count for a cell."""

    cell: Cell
    members: dict[int, Run]  # by seed
    episodes: pd.DataFrame  # eval.csv of those seeds
    share: float  # of the protocol's steps
    geometry: pd.DataFrame  # geometry.csv of those seeds

    @property
    def final(self) -> pd.DataFrame:
        return self.episodes[self.episodes["step"] == self.episodes["step"].max()]

    def seed_means(self, column: str) -> pd.DataFrame:
        """Means over an evaluation's episodes: steps down, seeds across; steps that all seeds have."""
        return self.episodes.pivot_table(index="step", columns="seed", values=column).dropna()

    def counted(self) -> str:
        episodes = len(self.final) // len(self.members)
        text = f"{len(self.members)} seed{'s' * (len(self.members) > 1)}, {episodes} ep."
        return text if self.share == 1 else f"{text}, {self.share:.2g} of the steps"


def result_of(cell: Cell, runs: list[Run], geometry: pd.DataFrame) -> Result | None:
    runs = [run for run in runs if run.is_complete and sweep.is_of(run, cell)]
    if not runs:
        return None
    longest = max(run.args["total_timesteps"] for run in runs)
    runs = [run for run in runs if run.args["total_timesteps"] == longest]
    members = {seed: run for run in runs for seed in run.seeds}  # the newest run of a seed counts
    tables = {run.folder: pd.read_csv(run.folder / "eval.csv") for run in runs}
    episodes = pd.concat([tables[run.folder][lambda t, s=seed: t["seed"] == s] for seed, run in members.items()])
    pairs = {(run.folder.name, seed) for seed, run in members.items()}
    mine = geometry[np.array([pair in pairs for pair in zip(geometry["run"], geometry["seed"])], bool)]
    return Result(cell, members, episodes, longest / sweep.cell_args(cell).total_timesteps, mine)


Results = dict[tuple[str, str, str], Result]  # by suite, method, env_id


# Tables: a cell is a piece of HTML that Markdown takes too.


class Table(NamedTuple):
    title: str
    caption: str
    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        lines = [self.header, ["---"] * len(self.header), *self.rows]
        return "\n".join([f"## {self.title}", "", self.caption, "", *("| " + " | ".join(line) + " |" for line in lines), ""])


def best_marked(values: list[float | None], decimals: int, higher: bool | None, notes: list[str] | None = None) -> list[str]:
    """Prints a column, best in bold and second underlined as the papers do (ties share); None stays empty."""
    digits = [1 if decimals == 0 and value is not None and abs(value) < 10 and value % 1 else decimals for value in values]
    printed = [None if value is None else round(float(value), digit) for value, digit in zip(values, digits)]
    order = sorted({value for value in printed if value is not None}, reverse=bool(higher))
    texts = []
    for index, value in enumerate(printed):
        text = EMPTY if value is None else f"{value:.{digits[index]}f}"
        if higher is not None and len(order) > 1 and value is not None:
            text = f"<b>{text}</b>" if value == order[0] else f"<u>{text}</u>" if value == order[1] else text
        texts.append(text + (notes[index] if notes and value is not None else ""))
    return texts


def paper(name: str) -> pd.DataFrame:
    return pd.read_csv(PAPER / f"{name}.csv", dtype={"mpr": str, "vfc": str, "curv": str})


def pave_table(number: int, results: Results) -> Table:
    suite, backbone = f"pave-table-{number}", ("td3", "sac")[number - 1]
    cells = {(cell.method, cell.env_id): cell for cell in sweep.SUITES[suite]}
    printed = paper("pave_tables_1_2").query("backbone == @backbone").set_index(["method", "env_id"])
    columns = []
    for env_id in sweep.PAVE_ENVS:
        for of, decimals, higher in (("return", DECIMALS.get(env_id, 0), True), ("smoothness", 3, False)):
            mine = [results.get((suite, method, env_id)) for method in sweep.PAVE_METHODS]
            means = [result and result.final[of].mean() for result in mine]
            notes = [r and f"<br>({r.final[of].std(ddof=0):.{decimals}f})" for r in mine]
            if of == "return":
                notes = [r and f"{note}<br><small>{r.counted()}</small>" for r, note in zip(mine, notes)]
            theirs = printed.loc[[(method, env_id) for method in sweep.PAVE_METHODS]]
            deviations = [f"<br>({value:.{decimals}f})" for value in theirs[f"{of}_std"]]
            ours = best_marked(means, decimals, higher, notes)
            columns.append((ours, best_marked(list(theirs[f"{of}_mean"]), decimals, higher, deviations)))
    rows = []
    for index, method in enumerate(sweep.PAVE_METHODS):
        name = style(cells[method, sweep.PAVE_ENVS[0]])[0]
        rows.append([f"{name}, ours", *(ours[index] for ours, _ in columns)])
        rows.append([f"{name}, paper", *(theirs[index] for _, theirs in columns)])
    header = ["", *(f"{SHORT[env_id]}<br>{sign}" for env_id in sweep.PAVE_ENVS for sign in ("re ↑", "sm ↓"))]
    caption = (
        "Return (re) and smoothness score (sm): mean and (standard deviation) over all episodes of all seeds, deterministic "
    )
    caption += "policy; below, seeds and episodes of each. Best in bold, second underlined, ours and the paper's apart."
    return Table(f"PAVE, table {number}: {backbone.upper()} (SiLU-unified)", caption, header, rows)


def last_geometry(result: Result | None, quantity: str) -> float | None:
    """Mean over seeds of a quantity of the final policies."""
    if result is None or result.geometry.empty:
        return None
    rows = result.geometry[result.geometry["step"] == result.episodes["step"].max()]
    return rows[quantity].mean() if len(rows) else None


def geometry_table(title: str, quantity: str, methods: tuple[str, ...], decimals: int, higher: bool, results: Results) -> Table:
    printed = paper("pave_geometry").query("quantity == @quantity").set_index(["method", "env_id"])["value"]
    columns = []
    for env_id in sweep.PAVE_ENVS:
        mine = [last_geometry(results.get(("pave-table-1", method, env_id)), quantity) for method in methods]
        theirs = [printed[method, env_id] for method in methods]
        columns.append((best_marked(mine, decimals, higher), best_marked(theirs, decimals, higher)))
    rows = []
    for index, method in enumerate(methods):
        name = "Base" if method == "base" else STYLE[method][0]
        rows.append([f"{name}, ours", *(ours[index] for ours, _ in columns)])
        rows.append([f"{name}, paper", *(theirs[index] for _, theirs in columns)])
    caption = (
        "TD3, first critic, along the evaluation's episodes, mean over seeds (geometry.py). Pendulum's printed figures are not "
    )
    caption += (
        "comparable: the reference takes the critic at the environment's action, we at the normalised one it learnt from."
    )
    return Table(f"PAVE: {title}", caption, ["", *(SHORT[env_id] for env_id in sweep.PAVE_ENVS)], rows)


def critic_baselines_table(results: Results) -> Table:
    printed = paper("pave_critic_baselines").set_index(["method", "env_id"])
    header, columns = ["Method"], []
    quantities = (("smoothness", "sm ↓", 2, False), ("return", "re ↑", 0, True), ("M_sup", "M_sup ↓", 0, False))
    for name, sign, decimals, higher in (*quantities, ("negative_definite_rate", "neg. def. ↑", 2, True)):
        for env_id in ("LunarLander-v3", "Walker2d-v5"):
            mine = [results.get(("pave-critic-baselines", method, env_id)) for method in sweep.CRITIC_METHODS]
            if name in ("smoothness", "return"):
                ours = [result and result.final[name].mean() for result in mine]
            else:
                ours = [last_geometry(result, name) for result in mine]
            theirs = printed.loc[[(method, env_id) for method in sweep.CRITIC_METHODS], name]
            header += [f"{SHORT[env_id]} {sign}<br>ours", "paper"]
            columns.append(best_marked(ours, decimals, higher, [r and f"<br><small>{r.counted()}</small>" for r in mine]))
            columns.append(best_marked([None if math.isnan(value) else value for value in theirs], decimals, higher))
    names = ["Base" if method == "base" else STYLE[method][0] for method in sweep.CRITIC_METHODS]
    rows = [[name, *(column[index] for column in columns)] for index, name in enumerate(names)]
    return Table(
        "PAVE: critic-centric baselines",
        "TD3 with SiLU. The weight of GP-Critic (0.1) is ours; none is published.",
        header,
        rows,
    )


def variants_table(
    title: str, caption: str, suite: str, printed: pd.DataFrame, names: dict[str, str], results: Results
) -> Table:
    """Rows of one environment: printed is indexed by method, with the columns return and smoothness or return alone."""
    env_id = sweep.SUITES[suite][0].env_id
    header, columns = ["Configuration"], []
    mine = [results.get((suite, method, env_id)) for method in names]
    for of, sign, decimals, higher in (("return", "re ↑", DECIMALS.get(env_id, 0), True), ("smoothness", "sm ↓", 3, False)):
        if of in printed:
            header += [f"{sign}<br>ours", "paper"]
            ours = [result and result.final[of].mean() for result in mine]
            columns.append(best_marked(ours, decimals, higher, [r and f"<br><small>{r.counted()}</small>" for r in mine]))
            columns.append(best_marked(list(printed.loc[list(names), of]), decimals, higher))
    return Table(title, caption, header, [[name, *(c[i] for c in columns)] for i, name in enumerate(names.values())])


def over_training_table(results: Results) -> Table:
    printed = paper("pave_geometry_over_training_td3").set_index(["env_id", "step", "method"])
    rows = []
    for env_id, step in dict.fromkeys((env_id, step) for env_id, step, _ in printed.index):
        row = [f"{SHORT[env_id]}, {step // 1000}K"]
        for quantity, decimals in (("M_sup", 0), ("negative_definite_rate", 3)):
            for method in ("base", "pave"):
                result, ours = results.get(("pave-table-1", method, env_id)), None
                if result is not None and len(result.geometry):
                    wanted = step * result.share
                    nearest = min(result.geometry["step"], key=lambda at: abs(at - wanted))
                    if abs(nearest - wanted) <= 0.06 * result.episodes["step"].max():  # no such policy, no figure
                        ours = result.geometry[result.geometry["step"] == nearest][quantity].mean()
                row += best_marked([ours, printed.loc[(env_id, step, method), quantity]], decimals, None)
        rows.append(row)
    pairs = [
        f"{sign}<br>{name}, {who}"
        for sign in ("M_sup ↓", "neg. def. ↑")
        for name in ("Base", "PAVE")
        for who in ("ours", "paper")
    ]
    return Table("PAVE: the critic over training, TD3", "The policy nearest to the step (geometry.py).", ["", *pairs], rows)


def ams_table_2(results: Results) -> Table:
    suite, methods = "ams-table-2", ("ppo", "sac", "td3", "td3_ams", "sac_ams")
    printed = paper("ams_table_2").set_index(["method", "env_id"])
    columns = []
    for env_id in sweep.AMS_ENVS:
        mine = [results.get((suite, method, env_id)) for method in methods]
        means = [result and result.seed_means("return").iloc[-1].mean() for result in mine]
        spreads = [result and result.seed_means("return").iloc[-1].std(ddof=0) for result in mine]
        notes = [r and f" ± {spread:.0f}<br><small>{r.counted()}</small>" for r, spread in zip(mine, spreads)]
        theirs = printed.loc[[(method, env_id) for method in methods]]
        deviations = [f" ± {value:.0f}" for value in theirs["return_std"]]
        columns.append((best_marked(means, 0, True, notes), best_marked(list(theirs["return_mean"]), 0, True, deviations)))
    rows = []
    for index, method in enumerate(methods):
        rows.append([f"{STYLE[method][0]}, ours", *(ours[index] for ours, _ in columns)])
        rows.append([f"{STYLE[method][0]}, paper", *(theirs[index] for _, theirs in columns)])
    caption = "Mean return ± standard deviation over seeds. Ours: deterministic policy; the paper does not say which it prints."
    return Table("AMS, table 2", caption, ["", *sweep.AMS_ENVS], rows)


def ams_table_3(results: Results) -> Table:
    printed = paper("ams_table_3_quadruped_run")
    printed.index = printed["backbone"] + ":" + printed["variant"]
    words = {"baseline": "baseline", "without_ntd": "w/o NTD", "without_ln": "w/o LN-Q", "ams": "AMS (full)"}
    names = {}
    for key, backbone, variant in zip(printed.index, printed["backbone"], printed["variant"]):
        names[key] = f"{backbone.upper()}, {words.get(variant, variant.replace('_', ' = '))}"
    caption = "Mean return of the deterministic policy."
    frame = printed.rename(columns={"return_mean": "return"})[["return"]]
    return variants_table("AMS, table 3: ablation on quadruped-run", caption, "ams-table-3", frame, names, results)


def scalars(run: Run, tag: str) -> pd.Series:
    """A curve from a run's TensorBoard events, by step; of a step that a resumed run logged twice, the later value."""
    events = EventAccumulator(str(run.folder), {"scalars": 0})
    events.Reload()
    found = events.Scalars(tag) if tag in events.Tags()["scalars"] else []
    series = pd.Series([event.value for event in found], index=[event.step for event in found], dtype=float)
    return series[~series.index.duplicated(keep="last")].sort_index()


def different_runs(result: Result) -> list[Run]:
    return list({run.folder: run for run in result.members.values()}.values())


def ams_stability_table(results: Results) -> Table:
    printed = paper("ams_stability_quadruped_run").set_index("quantity")
    rows = []
    for quantity, tag in (("critic_gradient_norm", "critic_grad_norm"), ("td_target_variance", "td_target_variance")):
        row = [quantity.replace("_", " ")]
        for method in ("td3", "td3_ams"):
            result = results.get(("ams-table-2", method, "quadruped-run"))
            curves = [scalars(run, f"diagnostics/{tag}") for run in different_runs(result)] if result else []
            value = np.mean([curve.tail(20).mean() for curve in curves]) if curves else None
            row += best_marked([value, printed.loc[quantity, method]], 2, None)
        rows.append(row)
    caption = "Mean over the last 20 logged updates of a run, beside the paper's final values."
    return Table(
        "AMS, figure 4: the final values", caption, ["quadruped-run", "TD3, ours", "paper", "AMS-TD3, ours", "paper"], rows
    )


def ams_timing_table(results: Results) -> Table:
    printed = paper("ams_timing_rtx3090").set_index("env_id")
    rows = []
    for env_id in printed.index:
        row = [env_id]
        for method, column in (("td3", "baseline_minutes"), ("td3_ams", "ams_minutes")):
            result = results.get(("ams-table-2", method, env_id))
            run = different_runs(result)[-1] if result else None
            minutes = 1e6 / scalars(run, "charts/SPS").median() / 60 if run else None
            note = f"<br><small>{run.args['num_seeds']} seeds a run</small>" if run else ""
            row += best_marked([minutes], 0, None, [note]) + best_marked([printed.loc[env_id, column]], 0, None)
        rows.append(row)
    caption = (
        "Minutes per million vector steps at the median speed logged, all seeds of a run together; the paper's on an RTX 3090."
    )
    return Table("AMS, table B.4: training time", caption, ["", "TD3, ours", "paper", "AMS-TD3, ours", "paper"], rows)


def all_tables(results: Results) -> list[Table]:
    ablation = paper("pave_ablation_walker_td3")
    ablation.index = ablation["mpr"] + ablation["vfc"] + ablation["curv"]
    terms = {key: [name for name, on in zip(("MPR", "VFC", "Curv"), key) if on == "1"] for key in ablation.index}
    names = {
        key: "Base" if not on else "Full PAVE" if len(on) == 3 else " + ".join(on) + " only" * (len(on) == 1)
        for key, on in terms.items()
    }
    plus_caps = {"base": "Base", "caps": "CAPS (actor-side)", "pave": "PAVE (critic-side)", "caps+pave": "CAPS + PAVE"}
    lunar = paper("pave_plus_caps_lunar_td3").set_index("method")
    return [
        pave_table(1, results),
        pave_table(2, results),
        geometry_table("M_sup, the largest mixed Hessian ↓", "M_sup", sweep.PAVE_METHODS, 0, False, results),
        geometry_table("negative-definite rate ↑", "negative_definite_rate", ("base", "pave"), 3, True, results),
        geometry_table("mean cosine of consecutive gradients ↑", "mean_cosine", ("base", "pave"), 3, True, results),
        geometry_table("flip rate (cosine below 0) ↓", "flip_rate", ("base", "pave"), 3, False, results),
        critic_baselines_table(results),
        variants_table("PAVE: ablation on Walker", "TD3, Walker2d-v5.", "pave-ablation", ablation, names, results),
        variants_table("PAVE with CAPS", "TD3, LunarLander-v3.", "pave-plus-caps", lunar, plus_caps, results),
        over_training_table(results),
        ams_table_2(results),
        ams_table_3(results),
        ams_stability_table(results),
        ams_timing_table(results),
    ]


# Figures.


def iqm(scores: np.ndarray) -> np.ndarray:
    """Interquartile mean over runs and tasks: [runs, tasks, T] -> [T] (rliable's aggregate_iqm, for all T at once)."""
    runs = np.sort(scores.reshape(-1, scores.shape[-1]), 0)
    cut = len(runs) // 4
    return runs[cut : len(runs) - cut].mean(0)


def probability_of_improvement(scores: np.ndarray, others: np.ndarray) -> float:
    """P(a run beats a run of the other method), ties half, mean over tasks; both [runs, tasks] (rliable's, vectorised)."""
    margins = scores[:, None] - others[None]
    return float(((margins > 0) + 0.5 * (margins == 0)).mean())


def band(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """IQM [T] and its 95 % interval [2, T] of scores [runs, tasks, T], by rliable's stratified bootstrap."""
    np.random.seed(0)  # the bootstrap draws from numpy's global generator: the same report twice
    point, interval = rliable.get_interval_estimates({"scores": scores}, iqm, reps=BOOTSTRAPS)
    return point["scores"], interval["scores"]


def grid_figure(rows: int, columns: int, title: str) -> tuple[Figure, np.ndarray]:
    figure, axes = plt.subplots(rows, columns, figsize=(3.1 * columns, 2.7 * rows + 0.9), squeeze=False, layout="constrained")
    figure.suptitle(title)
    return figure, axes


def shared_legend(figure: Figure, axes: np.ndarray, columns: int = 8) -> None:
    entries = {label: line for axis in axes.flat for line, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns, frameon=False)


def no_run(axis: plt.Axes) -> None:
    axis.text(0.5, 0.5, "no run", transform=axis.transAxes, ha="center", va="center", color="0.5")
    axis.set_xticks([])
    axis.set_yticks([])


def learning_curves(suite: str, title: str, columns: list[str], results: Results) -> Figure | None:
    """IQM over seeds with a 95 % band, an environment a panel; for PAVE's tables the smoothness in a second row of panels."""
    mine = {key: result for key, result in results.items() if key[0] == suite}
    if not mine:
        return None
    env_ids = list(dict.fromkeys(cell.env_id for cell in sweep.SUITES[suite]))
    across = 6
    figure, axes = grid_figure(len(columns) * len(env_ids) // across, across, title)
    panels = [(column, env_id) for column in columns for env_id in env_ids]
    for axis, (column, env_id) in zip(axes.flat, panels):
        axis.set_title(env_id, fontsize=10)
        shown = [result for (_, _, env), result in mine.items() if env == env_id]
        if not shown:
            no_run(axis)
        for result in shown:
            name, colour = style(result.cell)
            curve = result.seed_means(column)
            point, interval = band(curve.T.to_numpy()[:, None, :])
            axis.plot(curve.index / 1000, point, color=colour, label=name, lw=1.6)
            if curve.shape[1] > 1:
                axis.fill_between(curve.index / 1000, *interval, color=colour, alpha=0.2, lw=0)
        if shown:
            axis.set_xlabel("vector steps (thousands)", fontsize=8)
            axis.set_ylabel(
                {"return": "return of an episode", "smoothness": "smoothness score (lower is smoother)"}[column], fontsize=8
            )
            axis.tick_params(labelsize=8)
    shared_legend(figure, axes)
    return figure


def aggregate_figure(suite: str, title: str, best: str, printed: pd.DataFrame, results: Results) -> Figure | None:
    """IQM over seeds and environments of the final return, and the probability that method best beats each other one.

    A return is scaled so that 0 is the untrained policy (step 0 of all runs there) and 1 the best of the paper's table.
    """
    methods = list(dict.fromkeys(cell.method for cell in sweep.SUITES[suite]))
    methods = [method for method in methods if any(key[:2] == (suite, method) for key in results)]
    env_ids = list(dict.fromkeys(cell.env_id for cell in sweep.SUITES[suite]))
    env_ids = [env_id for env_id in env_ids if all((suite, method, env_id) in results for method in methods)]
    if len(methods) < 2 or not env_ids:
        return None
    scores = {}
    for method in methods:
        columns = []
        for env_id in env_ids:
            starts = [results[suite, other, env_id].seed_means("return").iloc[0].mean() for other in methods]
            top = printed[printed["env_id"] == env_id]["return_mean"].max()
            ends = results[suite, method, env_id].seed_means("return").iloc[-1].to_numpy()
            columns.append((ends - np.mean(starts)) / (top - np.mean(starts)))
        scores[method] = np.stack([column[: min(map(len, columns))] for column in columns], 1)  # [seeds, environments]
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.5 * len(methods) + 2.2), layout="constrained")
    figure.suptitle(f"{title}: {len(env_ids)} environment{'s' * (len(env_ids) > 1)}, {min(map(len, scores.values()))} seeds")
    np.random.seed(0)
    point, interval = rliable.get_interval_estimates(scores, lambda s: iqm(s[..., None]), reps=BOOTSTRAPS)
    cells = {cell.method: cell for cell in sweep.SUITES[suite]}
    for row, method in enumerate(reversed(methods)):
        (low,), (high,) = interval[method]
        axes[0].barh(row, high - low, left=low, height=0.5, color=style(cells[method])[1], alpha=0.45)
        axes[0].plot([point[method][0]] * 2, [row - 0.25, row + 0.25], color=style(cells[method])[1], lw=3)
    axes[0].use_sticky_edges = False  # or the lowest interval begins on the frame
    axes[0].margins(x=0.08)
    axes[0].set_yticks(range(len(methods)), [style(cells[method])[0] for method in reversed(methods)])
    axes[0].set_xlabel("IQM of the scaled return (0: untrained, 1: the best in the paper)")
    axes[0].set_title("Final return, with 95 % interval", fontsize=10)
    others = [method for method in methods if method != best] if best in methods else []
    for axis, bars in zip(axes, (methods, others)):
        axis.set_ylim(-0.6, max(len(bars), 1) - 0.4)
    for row, method in enumerate(reversed(others)):
        pair = {"pair": (scores[best], scores[method])}
        np.random.seed(0)
        value, interval = rliable.get_interval_estimates(pair, probability_of_improvement, reps=BOOTSTRAPS)
        low, high = interval["pair"].ravel()
        axes[1].barh(row, high - low, left=low, height=0.5, color=style(cells[method])[1], alpha=0.45)
        axes[1].plot([value["pair"]] * 2, [row - 0.25, row + 0.25], color=style(cells[method])[1], lw=3)
    axes[1].axvline(0.5, color="0.6", lw=1, ls="--")
    axes[1].set_yticks(range(len(others)), [f"over {style(cells[method])[0]}" for method in reversed(others)])
    axes[1].set(xlim=(-0.02, 1.02), xlabel="probability of a higher return")
    axes[1].set_title(f"Probability of improvement of {style(cells[best])[0]}, with 95 % interval", fontsize=10)
    return figure


def plane_figure(suite: str, backbone: str, results: Results) -> Figure | None:
    """Return against smoothness, an environment a panel: ours filled, the paper's hollow; better is up and to the left."""
    if not any(key[0] == suite for key in results):
        return None
    printed = paper("pave_tables_1_2").query("backbone == @backbone").set_index(["method", "env_id"])
    figure, axes = grid_figure(2, 3, f"Return against smoothness, {backbone.upper()} (up and to the left is better)")
    for axis, env_id in zip(axes.flat, sweep.PAVE_ENVS):
        has_run = any(key[0] == suite and key[2] == env_id for key in results)
        axis.set_title(env_id if has_run else f"{env_id} (no run of ours)", fontsize=10)
        for cell in sweep.SUITES[suite]:
            if cell.env_id != env_id:
                continue
            name, colour = style(cell)
            theirs = printed.loc[(cell.method, env_id)]
            hollow = {"marker": "o", "ms": 8, "mfc": "none", "mec": colour, "mew": 1.5, "ls": "none"}
            axis.plot(theirs["smoothness_mean"], theirs["return_mean"], label=f"{name}, paper", **hollow)
            if result := results.get((suite, cell.method, env_id)):
                x, y = result.final["smoothness"], result.final["return"]
                errors = {"xerr": x.std(ddof=0), "yerr": y.std(ddof=0), "elinewidth": 0.8, "capsize": 2}
                axis.errorbar(x.mean(), y.mean(), fmt="o", ms=8, color=colour, label=f"{name}, ours", **errors)
        axis.set_xlabel("smoothness score (lower is smoother)", fontsize=8)
        axis.set_ylabel("return of an episode", fontsize=8)
        axis.tick_params(labelsize=8)
    shared_legend(figure, axes, columns=5)
    return figure


def ams_figure_4(results: Results) -> Figure | None:
    """Critic gradient norm and TD target variance on quadruped-run; the paper's final values as dashed lines."""
    printed = paper("ams_stability_quadruped_run").set_index("quantity")
    found = [r for method in ("td3", "td3_ams") if (r := results.get(("ams-table-2", method, "quadruped-run")))]
    if not found:
        return None
    figure, axes = grid_figure(1, 2, "AMS, figure 4: stability on quadruped-run")
    figure.set_size_inches(10, 4)
    panels = (("critic_gradient_norm", "critic_grad_norm", "critic gradient norm"),)
    panels += (("td_target_variance", "td_target_variance", "variance of the TD target in the batch"),)
    for axis, (quantity, tag, label) in zip(axes[0], panels):
        for result in found:
            name, colour = style(result.cell)
            curves = pd.concat([scalars(run, f"diagnostics/{tag}") for run in different_runs(result)], axis=1).dropna()
            axis.plot(curves.index / 1000, curves.mean(axis=1), color=colour, label=f"{name}, ours")
            if curves.shape[1] > 1:
                half = 1.96 * curves.std(axis=1) / math.sqrt(curves.shape[1])
                axis.fill_between(
                    curves.index / 1000, curves.mean(axis=1) - half, curves.mean(axis=1) + half, color=colour, alpha=0.2, lw=0
                )
            axis.axhline(printed.loc[quantity, result.cell.method], color=colour, ls="--", lw=1, label=f"{name}, paper (final)")
        axis.set(xlabel="vector steps (thousands)", ylabel=label, yscale="log")
    shared_legend(figure, axes)
    return figure


def over_training_figure(results: Results) -> Figure | None:
    """M_sup and the negative-definite rate over training, TD3; mean over seeds, the range of the seeds shaded."""
    mine = {key[1:]: r for key, r in results.items() if key[0] == "pave-table-1" and r.geometry["step"].nunique() > 1}
    env_ids = [env_id for env_id in sweep.PAVE_ENVS if any(env == env_id for _, env in mine)]
    if not env_ids:
        return None
    figure, axes = grid_figure(2, len(env_ids), "The critic over training, TD3 (mean and range of the seeds)")
    figure.set_size_inches(max(3.1 * len(env_ids), 7), 6)
    for column, env_id in zip(axes.T, env_ids):
        column[0].set_title(env_id, fontsize=10)
        for (_, env), result in mine.items():
            if env != env_id:
                continue
            name, colour = style(result.cell)
            for axis, quantity in zip(column, ("M_sup", "negative_definite_rate")):
                by_step = result.geometry.groupby("step")[quantity]
                steps = by_step.mean().index / 1000
                axis.plot(steps, by_step.mean(), color=colour, label=name, marker="o", ms=3)
                axis.fill_between(steps, by_step.min(), by_step.max(), color=colour, alpha=0.2, lw=0)
        column[0].set_ylabel("M_sup (largest mixed Hessian norm)", fontsize=8)
        column[1].set(xlabel="vector steps (thousands)", ylim=(-0.03, 1.03))
        column[1].set_ylabel("negative-definite rate", fontsize=8)
    shared_legend(figure, axes)
    return figure


def all_figures(results: Results) -> dict[str, tuple[str, Figure]]:
    """{file stem: (caption, figure)} of those that have runs."""
    returns = {
        "td3": paper("pave_tables_1_2").query("backbone == 'td3'"),
        "sac": paper("pave_tables_1_2").query("backbone == 'sac'"),
    }
    figures = {}
    bands = "IQM over seeds with the 95 % band of rliable's stratified bootstrap; one seed has no band."
    for suite, backbone in (("pave-table-1", "td3"), ("pave-table-2", "sac")):
        title = f"PAVE on {backbone.upper()}"
        curves = learning_curves(suite, f"Learning curves, {title}", ["return", "smoothness"], results)
        figures[f"learning_curves_pave_{backbone}"] = (bands, curves)
        caption = "Over the environments where every method shown has runs; stratified bootstrap over seeds, 95 % intervals."
        figures[f"aggregate_pave_{backbone}"] = (caption, aggregate_figure(suite, title, "pave", returns[backbone], results))
        caption = "Mean over all episodes of all seeds with standard deviations; hollow circles are the paper's means."
        figures[f"plane_{backbone}"] = (caption, plane_figure(suite, backbone, results))
    figures["learning_curves_ams"] = (bands, learning_curves("ams-table-2", "Learning curves, AMS", ["return"], results))
    for best in ("td3_ams", "sac_ams"):
        title = f"AMS, table 2 ({STYLE[best][0]})"
        figure = aggregate_figure("ams-table-2", title, best, paper("ams_table_2"), results)
        figures[f"aggregate_{best}"] = ("Over the environments where every method shown has runs.", figure)
    caption = "A run logs the mean over its seeds, so a 95 % band needs several runs (sweep.py --seeds-per-run 1)."
    figures["ams_figure_4"] = (caption, ams_figure_4(results))
    figures["geometry_over_training_td3"] = ("From policies/step_*.pt (geometry.py).", over_training_figure(results))
    return {name: (caption, figure) for name, (caption, figure) in figures.items() if figure}


def left_out(runs: list[Run], results: Results) -> list[str]:
    """Why runs count for no cell, one line each."""
    used = {run.folder for result in results.values() for run in result.members.values()}
    lines = []
    for run in runs:
        if run.folder in used:
            continue
        near = [cell for cells in sweep.SUITES.values() for cell in cells]
        near = [cell for cell in near if (cell.script, cell.env_id) == (run.args["script"], run.args["env_id"])]
        if not run.is_complete:
            reason = "half-written: its last evaluation is not at total_timesteps; sweep.py or --resume finishes it"
        elif not near:
            reason = "no table has this script on this environment"
        elif any(sweep.is_of(run, cell) for cell in near):
            reason = "a longer or newer run of the same seeds counts"
        else:
            cell = min(near, key=lambda cell: len(sweep.other_arguments(run, cell)))
            wanted = sweep.scaled(sweep.cell_args(cell), run.args["total_timesteps"] / sweep.cell_args(cell).total_timesteps)
            pairs = [
                f"{name} {run.args.get(name)} (table: {getattr(wanted, name)})" for name in sweep.other_arguments(run, cell)
            ]
            reason = "other arguments: " + ", ".join(pairs)
        lines.append(f"{run.folder.name}: {reason}")
    return lines


@dataclass
class Options:
    runs: Path = field(default_factory=lambda: Path("runs"))
    """the folder of runs"""
    output: Path = field(default_factory=lambda: Path("report"))
    """where report.md, report.html and figures/ go; geometry.csv is read there"""


def main(options: Options) -> None:
    runs = sweep.read_runs(options.runs)
    if not runs:
        raise UserError(f"{options.runs} holds no runs; train some first: python benchmark/sweep.py pave-table-1 --scale 0.01")
    path = options.output / "geometry.csv"
    geometry = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=["run", "step", "seed"])
    results = {}
    for suite, cells in sweep.SUITES.items():
        for cell in cells:
            if (result := result_of(cell, runs, geometry)) is not None:
                results[suite, cell.method, cell.env_id] = result
    tables, left = all_tables(results), left_out(runs, results)
    folder = options.output / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    captions = {}
    for name, (caption, figure) in all_figures(results).items():
        figure.savefig(folder / f"{name}.png", dpi=120)
        plt.close(figure)
        captions[name] = caption
    for path in sorted(folder.glob("surface_*.png")):  # geometry.py's
        captions[path.stem] = "Final critic of the first seed, around the state that Base reaches after 20 steps (geometry.py)."
    cells = sum(map(len, sweep.SUITES.values()))
    summary = f"{len(runs)} runs in {options.runs}; {len(results)} of the {cells} cells of the papers' tables have one."
    text = ["# smoothq: runs beside the papers", "", summary, "", *(table.markdown() for table in tables), "## Figures", ""]
    text += [f"![{name}](figures/{name}.png)\n\n{caption}\n" for name, caption in captions.items()]
    text += ["## Runs left out", "", *([f"- {line}" for line in left] or ["none"]), ""]
    (options.output / "report.md").write_text("\n".join(text))
    images = [
        (name, caption, base64.b64encode((folder / f"{name}.png").read_bytes()).decode()) for name, caption in captions.items()
    ]
    page = jinja2.Environment(autoescape=True).from_string((Path(__file__).parent / "report.html.jinja").read_text())
    html = page.render(summary=summary, tables=tables, figures=images, left=left, empty=EMPTY)
    (options.output / "report.html").write_text(html)
    print(f"{summary}\nwrote {options.output / 'report.md'} and {options.output / 'report.html'}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except UserError as error:
        print(f"report.py: {error}", file=sys.stderr)
        sys.exit(2)

"""The figures of the page of results; page.py draws them."""

from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from geometry import RADII
from intervals import interval
from page_data import (
    ESCAPE,
    GRID,
    LAYER_NORM_ALONE,
    LIBRARIES,
    PAVE_METHODS,
    PENDULUM,
    PENDULUM_STEPS,
    QUADRUPED,
    QUADRUPED_STEPS,
    SEEDS,
    SHIFT_NETWORKS,
    Data,
    cores_text,
    dog_run_curve,
    grid_cells,
    machines,
    rates_by_round,
)
from play import Disturbance, load_player, play
from report import read_runs_long

from runs import Run

matplotlib.use("agg")
import matplotlib.pyplot as plt

# Paul Tol's, with a contrast of more than 3 to white; some colour-blind readers take RED and OLIVE for one, so that a
# method has a marker too.
BLUE = "#0077BB"
RED = "#CC3311"
GREEN = "#117733"
PURPLE = "#AA4499"
OLIVE = "#808000"
GREY = "#777777"
BLACK = "#000000"

MARKERS = dict(zip(SEEDS, "os^"))
PAVE_COLOURS = dict(zip(PAVE_METHODS, (BLACK, BLUE, GREEN, RED, PURPLE, OLIVE, GREY, "#882255")))
PAVE_MARKERS = dict(zip(PAVE_METHODS, "Pos^DvX>"))


def save(figure: plt.Figure, path: Path) -> None:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_quadruped(data: Data, path: Path) -> None:
    """A dot a seed: {LayerNorm, none} x {nothing, neighbourhood, TD3's noise}."""
    figure, axis = plt.subplots(figsize=(6.4, 3.9), layout="constrained")
    colours = dict(zip(GRID, (BLUE, RED)))
    for critic, smoothing, name in grid_cells():
        colour = colours[critic]
        side = -1 if critic == "LayerNorm" else 1
        place = list(GRID[critic]).index(smoothing) + 0.2 * side
        returns = data.seeds(name, "training_return", QUADRUPED_STEPS, QUADRUPED)
        for index, (seed, marker) in enumerate(MARKERS.items()):
            if seed in returns:
                axis.plot(place + 0.04 * (index - 1), returns[seed], marker, color=colour, ms=7)
        if len(returns) > 1:
            axis.plot([place - 0.12, place + 0.12], [returns.mean()] * 2, color=colour, lw=1.2)
        label = name.removesuffix(" on TD3").replace(" + ", ",\n").replace(" without", "\nwithout")
        at = (place, returns.min() - 14)
        axis.annotate(label, at, ha="center", va="top", fontsize=7.5, color=colour)
    axis.axhline(ESCAPE, color=GREY, lw=1, ls="--", zorder=0)
    axis.annotate(f"escape: {ESCAPE}", (-0.48, ESCAPE + 5), fontsize=8, color=GREY)
    axis.set_xticks(range(3), list(GRID["LayerNorm"]))
    axis.set(xlim=(-0.5, 2.5), ylim=(130, 680), xlabel="what smooths the target")
    axis.set_ylabel("training return (of 1000), last 20,000 steps")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour, label=critic) for critic, colour in colours.items()]
    for seed, marker in MARKERS.items():
        handles.append(plt.Line2D([], [], marker=marker, color=GREY, ls="", label=f"seed {seed}"))
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    axis.set_title(f"{QUADRUPED} on TD3, {QUADRUPED_STEPS:,} vector steps; a dot a seed, a bar their mean", fontsize=9)
    save(figure, path)


def draw_shift(data: Data, path: Path) -> None:
    """How far AMS's neighbourhood moves the target, against its radius: a panel a network."""
    figure, axes = plt.subplots(2, 2, figsize=(6.8, 6.2), sharex=True, sharey=True, layout="constrained")
    radii = np.array(RADII)
    for axis, network in zip(axes.flat, SHIFT_NETWORKS):
        step, values = network.values(data)
        for prefix, colour, label in (("", RED, "clipped to the box, as AMS does"), ("unclipped_", BLUE, "unclipped")):
            shifts = np.array([values[f"{prefix}shift_radius_{radius}"] for radius in RADII])
            shifts /= values["value_sd_over_states"]
            axis.plot(radii, shifts, "o-", color=colour, lw=1.4, ms=5, label=label)
            slope, _ = np.polyfit(np.log(radii), np.log(shifts), 1)
            at = (radii[2], shifts[2])
            axis.annotate(f"slope {slope:.1f}", at, (-4, 8), textcoords="offset points", ha="right", color=colour)
        axis.set(xscale="log", yscale="log", xlabel="radius (normalised action)")
        axis.set_xticks(RADII, map(str, RADII))
        axis.minorticks_off()
        bound = f"{100 * values['saturated_actions']:.0f} % of action components at the bound"
        where = f"{network.env_id}, seed {network.seed}, {step:,} steps"
        axis.set_title(f"{network.label}\n{where}\n{bound}", fontsize=9)
        axis.label_outer()
    figure.supylabel("target lowered by (standard deviations of Q over states)", fontsize=10)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle("Averaging over AMS's neighbourhood lowers Q; curvature would give a slope of 2", fontsize=10)
    save(figure, path)


def draw_trade_off(data: Data, path: Path) -> None:
    """Return and smoothness beside the seed's own base: means over seeds with their intervals, smoothness's of logs."""
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 4.6), layout="constrained")
    for axis, backbone in zip(axes, ("TD3", "SAC")):
        base_smoothness = data.seeds(f"Base on {backbone}", "smoothness", PENDULUM_STEPS)
        base_return = data.seeds(f"Base on {backbone}", "avg_return", PENDULUM_STEPS)
        for method, colour in PAVE_COLOURS.items():
            smoothness = data.seeds(f"{method} on {backbone}", "smoothness", PENDULUM_STEPS)
            over = np.log(smoothness / base_smoothness).dropna()
            less = (data.seeds(f"{method} on {backbone}", "avg_return", PENDULUM_STEPS) - base_return).dropna()
            if len(less) < 3 or method == "Base":
                continue
            x = np.exp(over.mean())
            y = less.mean()
            axis.plot(np.exp(interval(over)), [y, y], color=colour, lw=1.2)
            axis.plot([x, x], interval(less), color=colour, lw=1.2)
            axis.plot(x, y, PAVE_MARKERS[method], ms=8, color=colour, label=with_seeds(method, less))
        axis.plot(1, 0, PAVE_MARKERS["Base"], ms=9, color=BLACK, label="base")
        axis.axhline(0, color=GREY, lw=0.8, ls="--", zorder=0)
        axis.axvline(1, color=GREY, lw=0.8, ls="--", zorder=0)
        axis.set_xscale("log")
        label_ticks(axis.xaxis)
        axis.set_xlabel("smoothness / that of the seed's own base (log)")
        axis.set_title(f"{backbone}; the base's return: {base_return.mean():.0f}", fontsize=9)
        axis.legend(frameon=False, fontsize=7.5, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    axes[0].set_ylabel("return minus the seed's own base")
    how = "left is smoother; crosses: means and 95 % bootstrap intervals over seeds"
    figure.suptitle(f"{PENDULUM}, {PENDULUM_STEPS:,} steps; {how}; the panels' scales differ", fontsize=9)
    save(figure, path)


def with_seeds(method: str, values: pd.Series | pd.DataFrame) -> str:
    return f"{method}, {len(values)} seed" if len(values) == 1 else f"{method}, {len(values)} seeds"


def label_ticks(axis: matplotlib.axis.Axis) -> None:
    """Plain numbers on a logarithmic axis."""
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(short_tick)
    axis.set_tick_params(which="both", labelsize=8)


def short_tick(value: float, _: int) -> str:
    """Of a logarithmic axis the minor ticks that have room for a label."""
    leading = f"{value:e}"[0]
    return f"{value:g}" if leading in "234568" else ""


def draw_m_sup(data: Data, path: Path) -> None:
    """M_sup against smoothness, a dot a seed."""
    figure, axis = plt.subplots(figsize=(5.2, 4.5), layout="constrained")
    for method, colour in PAVE_COLOURS.items():
        name = f"{method} on TD3"
        smoothness = data.seeds(name, "smoothness", PENDULUM_STEPS)
        points = pd.DataFrame({"M_sup": data.seeds(name, "M_sup", PENDULUM_STEPS), "smoothness": smoothness}).dropna()
        if len(points):
            label = with_seeds(method, points)
            marker = PAVE_MARKERS[method]
            axis.plot(points.M_sup, points.smoothness, marker, ms=8, color=colour, mec="white", mew=0.6, label=label)
    axis.set(xscale="log", yscale="log", xlabel="M_sup, the mixed Hessian's largest norm (log)")
    axis.set_ylabel("smoothness (log; lower is smoother)")
    label_ticks(axis.xaxis)
    label_ticks(axis.yaxis)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    axis.set_title(f"{PENDULUM} on TD3, {PENDULUM_STEPS:,} steps; a dot a seed", fontsize=9)
    save(figure, path)


def draw_speed(data: Data, path: Path) -> None:
    """Bars of TD3 and SAC for each library, a panel a machine."""
    found = machines(data)
    size = (1.4 + 2.6 * len(found), 3.3)
    figure, axes = plt.subplots(1, len(found), figsize=size, layout="constrained", sharex=True, sharey=True)
    for axis, (machine, cores, rows) in zip(axes, found):
        for place, library in enumerate(LIBRARIES):
            for algorithm, colour, offset in (("TD3", BLUE, -0.19), ("SAC", RED, 0.19)):
                rates = rates_by_round(rows, library, algorithm)
                if rates.empty:
                    continue
                label = algorithm if place == 0 else None
                axis.barh(place + offset, rates.median(), 0.34, color=colour, label=label)
                axis.plot([rates.min(), rates.max()], [place + offset] * 2, color=BLACK, lw=1.5)
                at = (rates.max(), place + offset)
                axis.annotate(f" {rates.median():.0f}", at, va="center", fontsize=8)
        axis.set_yticks(range(len(LIBRARIES)), LIBRARIES)
        axis.margins(x=0.15)
        axis.set(xlabel="vector steps a second")
        axis.set_title(f"{machine}, {cores_text(cores)}", fontsize=9)
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.get_layout_engine().set(wspace=0.06)
    title = "Walker2d-v5, whole processes: median and range of three rounds; empty: not measured there"
    figure.suptitle(title, fontsize=9)
    save(figure, path)


def draw_dog_run(data: Data, path: Path) -> None:
    """Our curve, the paper's figures and other repositories'."""
    figure, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for metric, style, what in (("training_return", "-", "training"), ("avg_return", ":", "evaluation")):
        curve = dog_run_curve(data, metric).loc[1:]
        axis.plot(8 * curve.index / 1e6, curve, style, color=BLUE, label=f"AMS on TD3, ours, seed 1: {what}")
    curve = dog_run_curve(data, "training_return", LAYER_NORM_ALONE)
    label = "LayerNorm alone, ours, seed 1, unfinished: training"
    axis.plot(8 * curve.index / 1e6, curve, color=PURPLE, label=label)
    theirs = data.paper[data.paper.table.eq("AMS, table 2") & data.paper.env_id.eq("dog-run")].set_index("name")
    for name, colour in (("AMS on SAC", GREEN), ("AMS on TD3", BLUE), ("TD3", BLACK)):
        value = theirs.value[name]
        axis.errorbar(8, value, theirs.deviation[name], fmt="D", color=colour, mfc="none", mew=1.5, elinewidth=0.8)
        axis.annotate(f"{name}  ", (8, value), ha="right", va="center", fontsize=8, color=colour)
    label = "the AMS paper, mean and deviation, if its 1M steps are of 8 environments"
    axis.plot([], [], "D", color=GREY, mfc="none", label=label)
    for steps, rows in data.dog_run_others.groupby("environment_steps"):
        axis.plot(rows.environment_steps / 1e6, rows.avg_return, "s", color=RED, ms=5)
        for names, height in labels_apart(rows):
            axis.annotate(f"  {names}", (steps / 1e6, height), va="center", fontsize=8, color=RED)
    axis.plot([], [], "s", color=RED, label="other repositories' result files (BOOM's do not say their steps)")
    axis.set(xscale="log", xlim=(0.15, 30), ylim=(0, 960), xlabel="environment steps (millions, log)", ylabel="return")
    label_ticks(axis.xaxis)
    figure.legend(loc="outside lower center", frameon=False, fontsize=8)
    axis.set_title("dog-run; of our 8 environments 1,000,000 vector steps are 8 million", fontsize=9)
    save(figure, path)


def labels_apart(rows: pd.DataFrame, room: float = 46) -> list[tuple[str, float]]:
    """Names of equal values together; heights at least so far apart."""
    labels = []
    for value, group in sorted(rows.groupby("avg_return"), reverse=True):
        height = min(value, labels[-1][1] - room) if labels else value
        labels.append((", ".join(group.name), height))
    return labels


def draw_front(runs: list[Run], path: Path) -> None:
    """The torque of two policies over an episode from the same state, with their scores of eval.csv."""
    figure, axes = plt.subplots(2, 1, figsize=(7.2, 3.6), sharex=True, sharey=True, layout="constrained")
    tables, _ = read_runs_long(runs)
    for axis, run, table, colour in zip(axes, runs, tables, (RED, BLUE)):
        player = load_player(run.folder)
        starts = player.script.start_seeds(player.args, player.step, 1, 1)
        torque = play(player, starts, Disturbance())[0].actions[:, 0]
        box = player.env.action_box
        seconds = player.env.unwrapped.dt * np.arange(len(torque))
        axis.plot(seconds, torque, color=colour, lw=1.3)
        scores = table[table.env_step == player.step].set_index("metric").value
        label = f"smoothness {scores.smoothness:.2f}, return {scores.avg_return:.0f}"
        name = table.exp_name.iloc[0].replace("Base on ", "")
        axis.set_title(f"{name}: {label}", loc="left", fontsize=10, color=colour)
        axis.set(ylabel="torque (N m)", ylim=(1.05 * box.low[0], 1.05 * box.high[0]))
    axes[1].set_xlabel("time (s)")
    where = f"{player.args.env_id}, seed {player.seed}, {player.step:,} steps"
    figure.suptitle(f"{where}: one episode, and means over {scores.episodes:.0f} (lower is smoother)", fontsize=9)
    save(figure, path)


FIGURES = {
    "quadruped_run.png": draw_quadruped,
    "target_shift.png": draw_shift,
    "pave_return_smoothness.png": draw_trade_off,
    "pave_m_sup.png": draw_m_sup,
    "speed.png": draw_speed,
    "dog_run.png": draw_dog_run,
}

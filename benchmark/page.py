"""The page of results: each number and figure of it, and README.md's table, from the CSVs in benchmark/results.

    python benchmark/page.py                                                # all numbers and figures anew
    python benchmark/page.py --add pave_table_1_pendulum.csv --runs runs/*  # puts finished runs into a CSV before that
    python benchmark/page.py --front runs/BASE runs/PAVE                    # draws README.md's front figure

A text has its numbers between two comments, <!-- NAME --> and <!-- /NAME -->; the rest of it is written by hand.

Differences are paired by seed, with which a method's first networks and start states are the same as another's.
Verdicts go by a t-test of them: verdict() has the rule.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import tyro
from intervals import interval
from page_data import (
    ALGORITHMS,
    ESCAPE,
    GAMMA,
    LARGER_RADIUS,
    LAYER_NORM_ALONE,
    LIBRARIES,
    OUR_METHODS,
    PAVE_METHODS,
    PENDULUM,
    PENDULUM_SEEDS,
    PENDULUM_STEPS,
    QUADRUPED,
    QUADRUPED_STEPS,
    RESULTS,
    SEEDS,
    SHIFT_NETWORKS,
    Comparison,
    Data,
    add_runs,
    cores_text,
    differences_of,
    dog_run_curve,
    grid_cells,
    library_rates,
    machines,
    on_quadruped,
    rates_by_round,
    ratios_of,
    read_data,
)
from page_figures import FIGURES, draw_front
from scipy import stats

from runs import ROOT, read_runs

README_CLAIMS = 9  # README.md has the table's first rows


# ------------------------------------------------------------------------------------------------- numbers and verdicts


def number(value: float, digits: int = 0, signed: bool = False) -> str:
    return f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"


def with_interval(values: pd.Series, digits: int = 0, signed: bool = False) -> str:
    """Mean [95 % interval] over seeds; without the interval for fewer than three."""
    if values.empty:
        return ""
    text = number(values.mean(), digits, signed)
    bounds = interval(values)
    if bounds is None:
        return text
    low, high = (number(bound, digits, signed) for bound in bounds)
    return f"{text} [{low}, {high}]"


def listed(values: Iterable[float], digits: int = 0) -> str:
    return ", ".join(number(value, digits) for value in values)


def ranged(values: pd.Series, digits: int = 1) -> str:
    return f"{number(values.min(), digits)} to {number(values.max(), digits)}"


def table(columns: list[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


HOLDS = 0.05  # p of a two-sided t-test
LIKELY = 0.1
RULE = (
    f"holds p < {HOLDS}, likely p < {LIKELY}, contradicted p < {HOLDS} the other way, open fewer than three seeds, "
    "else not seen"
)


def verdict(differences: pd.Series, claimed_sign: int) -> str:
    """One word or two for paired differences and the sign that the claim gives them: RULE."""
    if len(differences) < 3:
        return "open"
    p = stats.ttest_1samp(differences, 0).pvalue
    as_claimed = np.sign(differences.mean()) == claimed_sign
    if p < HOLDS:
        return "holds" if as_claimed else "contradicted"
    if p < LIKELY and as_claimed:
        return "likely"
    return "not seen"


class Claim(NamedTuple):
    """A row of the table of verdicts."""

    text: str
    paper: str
    ours: str
    seeds: str
    verdict: str


def printed_difference(data: Data, comparison: Comparison, env_id: str, source: str) -> str:
    ours = data.printed(comparison.ours, env_id, comparison.metric, source)
    base = data.printed(comparison.base, env_id, comparison.metric, source)
    return number(ours - base, comparison.digits, signed=True)


def claim_of(text: str, paper: str, differences: pd.Series, comparison: Comparison) -> Claim:
    ours = with_interval(differences, comparison.digits, signed=True) or "no run yet"
    return Claim(text, paper, ours, str(len(differences)), verdict(differences, comparison.sign))


def ams_claims(data: Data) -> list[Claim]:
    with_noise = "LayerNorm + TD3's noise on TD3"  # the paper's "w/o NTD", as read here
    without = "AMS without LayerNorm on TD3"
    rows = (
        ("AMS beats TD3: return", "AMS on TD3", "TD3"),
        ("LayerNorm beats TD3, both with TD3's noise", with_noise, "TD3"),
        ("AMS's neighbourhood beats TD3's noise", "AMS on TD3", with_noise),
        ("The neighbourhood without LayerNorm beats TD3", without, "TD3"),
    )
    claims = []
    for text, ours, base in rows:
        comparison = Comparison(ours, base, "training_return", 1)
        paper = printed_difference(data, comparison, QUADRUPED, "AMS, table 3")
        claims.append(claim_of(text, paper, on_quadruped(data, comparison), comparison))
    alone = Comparison(LAYER_NORM_ALONE, "TD3", "training_return", 1)
    claims.append(claim_of("LayerNorm without noise or neighbourhood beats TD3", "", on_quadruped(data, alone), alone))
    return claims


def pave_claims(data: Data) -> list[Claim]:
    """The first four are PAVE's main ones."""
    rows = (
        ("PAVE smooths TD3: smoothness", Comparison("PAVE on TD3", "Base on TD3", "smoothness", -1, 2)),
        ("PAVE smooths SAC", Comparison("PAVE on SAC", "Base on SAC", "smoothness", -1, 2)),
        ("PAVE costs SAC a little return", Comparison("PAVE on SAC", "Base on SAC", "avg_return", -1, 1)),
        ("PAVE is smoother than CAPS on SAC", Comparison("PAVE on SAC", "CAPS on SAC", "smoothness", -1, 2)),
    )
    claims = []
    for text, comparison in rows:
        paper = printed_difference(data, comparison, PENDULUM, "PAVE, tables 1 and 2")
        claims.append(claim_of(text, paper, differences_of(data, comparison), comparison))

    flat = Comparison("PAVE on TD3", "Base on TD3", "M_sup", -1)
    printed = printed_difference(data, flat, PENDULUM, "PAVE, geometry")
    paper = f"{printed}, at other actions"  # its critic, trained on normalised ones, is given the environment's
    claims.append(claim_of("PAVE lowers TD3's M_sup", paper, differences_of(data, flat), flat))

    rough = Comparison("PAVE without Curv on TD3", "Base on TD3", "smoothness", 1, 2)
    paper = f"{printed_difference(data, rough, 'Walker2d-v5', 'PAVE, ablation')} (Walker2d)"
    text = "PAVE without Curv is rougher than base"
    claims.append(claim_of(text, paper, differences_of(data, rough), rough))
    return claims


def shift_claim(data: Data) -> Claim:
    """Theorem 3.3's shift is the curvature's, so quadratic in the radius; a ratio other than that contradicts it."""
    near = 0.2
    far = 0.8
    ratios = ratios_of(data, "AMS on TD3", "AMS on TD3", f"shift_radius_{far}", f"shift_radius_{near}")
    theirs = (far / near) ** 2
    p = stats.ttest_1samp(np.log(ratios), np.log(theirs)).pvalue
    word = "contradicted" if p < HOLDS else "not seen"
    text = f"AMS's clipped shift is quadratic: radius {far} over {near}"
    return Claim(text, f"{number(theirs)} (theorem 3.3, unclipped)", with_interval(ratios, 1), str(len(ratios)), word)


def dog_claim(data: Data) -> Claim:
    curve = dog_run_curve(data, "training_return")
    step = curve.index[-1]
    printed = data.printed("AMS on TD3", "dog-run", "training_return", "AMS, table 2")
    ours = f"{number(curve.iloc[-1])} at {step:,}"
    return Claim("AMS learns dog-run: training return", f"{number(printed)} at 1,000,000", ours, "1", "open")


def dog_text(data: Data) -> str:
    trained, evaluated = (dog_run_curve(data, metric).iloc[-1] for metric in ("training_return", "avg_return"))
    printed = data.printed("AMS on TD3", "dog-run", "training_return", "AMS, table 2")
    return f"{number(trained)} of 1000 in training, {number(evaluated)} evaluated (the paper: {number(printed)})"


def dog_layer_norm_text(data: Data) -> str:
    """At the last evaluation of LayerNorm alone, which is unfinished."""
    ours = dog_run_curve(data, "training_return")
    alone = dog_run_curve(data, "training_return", LAYER_NORM_ALONE)
    step = alone.index.intersection(ours.index)[-1]
    return f"{number(alone[step])} at {step:,}, AMS {number(ours[step])}"


def speed_claim(data: Data, cores: int) -> Claim:
    """TD3's and SAC's rates over sbx-rl's of the same round, medians; the verdict is the weakest of theirs."""
    shown = []
    words = []
    for machine, rows in data.speed[data.speed.cores == cores].groupby("machine", sort=False):
        medians = []
        for name in ALGORITHMS:
            ratios = rates_by_round(rows, "smoothq", name) / rates_by_round(rows, "sbx-rl (JAX)", name)
            medians.append(ratios.median())
            words.append(verdict(np.log(ratios), 1))
        shown.append(f"{machine} {listed(medians, 2)}")
    weakest = max(words, key=("holds", "likely", "not seen", "contradicted", "open").index)
    text = f"TD3, SAC outpace sbx-rl on {cores_text(cores)}"
    return Claim(text, "", "; ".join(shown), f"{len(ratios)} rounds", weakest)


def all_claims(data: Data) -> list[Claim]:
    rows = [*ams_claims(data), *pave_claims(data), shift_claim(data), dog_claim(data)]
    return [*rows, speed_claim(data, 1), speed_claim(data, 2)]


# ------------------------------------------------------------------------------------------------------ the page's text


def table_of_claims(claims: Iterable[Claim]) -> str:
    return table(["claim", "paper", "ours [95 % interval]", "seeds", "verdict"], claims)


def by_seed(values: pd.Series, seeds: Iterable[str], digits: int = 0) -> list[str]:
    """- where a run is missing."""
    return [number(values[seed], digits) if seed in values else "-" for seed in seeds]


def quadruped_table(data: Data) -> str:
    rows = []
    for critic, smoothing, name in [*grid_cells(), *LARGER_RADIUS]:
        returns = data.seeds(name, "training_return", QUADRUPED_STEPS, QUADRUPED)
        if returns.empty:
            continue
        less = on_quadruped(data, Comparison(name, "TD3", "training_return", 1))
        saturation = data.seeds(name, "action_saturation", QUADRUPED_STEPS, QUADRUPED)
        row = [critic, smoothing, *by_seed(returns, SEEDS), number(returns.mean())]
        row.append(with_interval(less, signed=True) if name != "TD3" else "")
        row.append(", ".join(escape(data, name, seed) for seed in SEEDS))
        row.append(", ".join(by_seed(saturation, SEEDS, 2)) if len(saturation) else "")
        rows.append(row)
    columns = ["critic", "target smoothed by", *(f"seed {seed}" for seed in SEEDS), "mean", "minus TD3"]
    return table([*columns, "escape, thousand steps", "at the bound"], rows)


def escape(data: Data, name: str, seed: str) -> str:
    """The first step, in thousands, at which the training return on quadruped-run is above ESCAPE."""
    rows = data.runs[(data.runs.exp_name == name) & (data.runs.env_name == QUADRUPED) & (data.runs.seed == seed)]
    curve = rows[rows.metric == "training_return"].set_index("step").value.sort_index()
    above = curve.index[curve > ESCAPE]
    return f"{above[0] // 1000}" if len(above) else "never"


def pendulum_table(data: Data) -> str:
    """Smoothness by seed, and what it costs."""
    backbones = ("TD3", "SAC")
    rows = []
    for method in PAVE_METHODS:
        cells = []
        for backbone in backbones:
            comparison = Comparison(f"{method} on {backbone}", f"Base on {backbone}", "avg_return", 1)
            smoothness = data.seeds(comparison.ours, "smoothness", PENDULUM_STEPS)
            cells.append(", ".join(by_seed(smoothness, PENDULUM_SEEDS, 2)) if len(smoothness) else "")
            less = with_interval(differences_of(data, comparison), 1, signed=True)
            cells.append(less if method != "Base" else "")
        if any(cells):
            rows.append([method, *cells])
    columns = [f"{backbone}: {what}" for backbone in backbones for what in ("smoothness", "return minus base")]
    return table(["seeds 9001 to 9005", *columns], rows)


def speed_table(data: Data) -> str:
    """Medians; machines down, libraries and our methods across."""
    rows = []
    for machine, cores, measured in machines(data):
        rates = library_rates(measured)
        cells = [f"{machine}, {cores_text(cores)}"]
        for library in LIBRARIES:
            cells.append(listed(rates.loc[library]) if library in rates.index else "")
        for script in OUR_METHODS.values():
            found = measured[measured.command.str.startswith(f"{script} ")].vector_steps_per_second
            cells.append(number(found.median(), 1))
        rows.append(cells)
    whole = data.gpu[data.gpu.machine.eq("H100") & data.gpu.env.eq("Walker2d-v5")]
    whole = whole[whole.measure.eq("vector_steps_per_second")]
    on_gpu = whole.set_index("script").value
    prefixes = {"smoothq": "", "CleanRL": "CleanRL ", "LeanRL": "LeanRL "}
    cells = ["H100"]
    for library in LIBRARIES:
        names = [f"{prefixes.get(library, library)}{algorithm}" for algorithm in ("td3", "sac")]
        cells.append(listed(on_gpu[names]) if names[0] in on_gpu else "")
    rows.append([*cells, *[""] * len(OUR_METHODS)])
    return table(["machine; cells: TD3, SAC", *LIBRARIES, *OUR_METHODS], rows)


def clip_text(data: Data) -> str:
    """The neighbourhood's shift of the target, clipped and unclipped, and the share of components at the bound."""
    parts = []
    for network in SHIFT_NETWORKS:
        _, values = network.values(data)
        clipped = number(values["shift_radius_0.2"], 5)
        unclipped = number(values["unclipped_shift_radius_0.2"], 5)
        name = network.label if network.env_id == QUADRUPED else f"{network.label} on {network.env_id}"
        parts.append(f"{name} {clipped}, {unclipped}, {number(100 * values['saturated_actions'])} %")
    return "; ".join(parts)


def compounded(data: Data, name: str, metric: str) -> str:
    """The shift over all backups, in units of Q and in per cent of Q's standard deviation over states."""
    shift = data.seeds(name, metric, QUADRUPED_STEPS, QUADRUPED) / (1 - GAMMA)
    spread = data.seeds(name, "value_sd_over_states", QUADRUPED_STEPS, QUADRUPED)
    return f"{ranged(shift)} ({ranged(100 * shift / spread, 0)} %)"


def calm_text(data: Data, metric: str) -> str:
    """LayerNorm alone over TD3, geometric mean over seeds; in brackets AMS's and the paper's AMS."""
    ams = "AMS on TD3"
    alone, ours = (stats.gmean(ratios_of(data, name, "TD3", metric, metric)) for name in (LAYER_NORM_ALONE, ams))
    theirs, their_base = (data.printed(name, QUADRUPED, metric, "AMS, figure 4") for name in (ams, "TD3"))
    return f"{number(alone, 2)} (AMS {number(ours, 2)}, the paper's {number(theirs / their_base, 2)})"


def share_taken_off(data: Data, backbone: str) -> str:
    """Of the base's smoothness, by PAVE, in per cent: ours, by seed, the paper's."""
    base = data.seeds(f"Base on {backbone}", "smoothness", PENDULUM_STEPS)
    ours = data.seeds(f"PAVE on {backbone}", "smoothness", PENDULUM_STEPS)
    names = (f"PAVE on {backbone}", f"Base on {backbone}")
    theirs, their_base = (data.printed(name, PENDULUM, "smoothness", "PAVE, tables 1 and 2") for name in names)
    share = number(100 * (1 - ours.mean() / base.mean()))
    by_seed = ranged(100 * (1 - ours / base), 0)
    return f"{share} % (by seed {by_seed}; the paper {number(100 * (1 - theirs / their_base))})"


def on_pendulum(data: Data, ours: str, base: str, metric: str, digits: int) -> str:
    return with_interval(differences_of(data, Comparison(ours, base, metric, 1)), digits, signed=True)


def five_seeds_text(data: Data, ours: str, base: str) -> str:
    """The last evaluation on the H200, not at quite the same step for all."""
    found = []
    for name in (f"{ours}@H200", f"{base}@H200"):
        rows = data.runs[(data.runs.exp_name == name) & (data.runs.metric == "avg_return")]
        found.append(rows[rows.step == rows.step.max()].set_index("seed").value)
    return with_interval(found[0] - found[1], signed=True)


def impossible_deviations(data: Data) -> str:
    """A return between 0 and 1000 with mean m deviates by sqrt(m (1000 - m)) at most."""
    rows = data.paper[data.paper.table.eq("AMS, table 2") & data.paper.name.eq("SAC")]
    rows = rows[rows.deviation > np.sqrt(rows.value * (1000 - rows.value))]
    return ", ".join(f"{row.env_id} {row.value:.0f} ± {row.deviation:.0f}" for row in rows.itertuples())


def blocks_of(data: Data) -> dict[str, str]:
    """The text between each two comments."""
    claims = all_claims(data)
    ams = "AMS on TD3"
    without = "AMS without LayerNorm on TD3"
    layer_norm = Comparison(LAYER_NORM_ALONE, "TD3", "training_return", 1)
    evaluated = on_quadruped(data, layer_norm._replace(metric="avg_return"))
    neighborhood = Comparison(ams, LAYER_NORM_ALONE, "training_return", 1)
    quarter = Comparison("PAVE, a quarter of the rows on SAC", "PAVE on SAC", "smoothness", -1)
    curvature = ratios_of(data, ams, ams, "taylor_radius_0.2", "shift_radius_0.2")
    times = data.run_times.set_index("exp_name").seconds
    return {
        "results": table_of_claims(claims[:README_CLAIMS]),
        "verdicts": table_of_claims(claims),
        "rule": RULE,
        "layer_norm": listed(on_quadruped(data, layer_norm)),
        "layer_norm_evaluated": f"{with_interval(evaluated, signed=True)}, {verdict(evaluated, 1)}",
        "neighborhood": with_interval(on_quadruped(data, neighborhood), signed=True),
        "five_td3": five_seeds_text(data, ams, "TD3"),
        "five_neighborhood": five_seeds_text(data, ams, LAYER_NORM_ALONE),
        "five_layer_norm": five_seeds_text(data, LAYER_NORM_ALONE, "TD3"),
        "clip": clip_text(data),
        "curvature": ranged(100 * curvature, 0),
        "compounded_ams": compounded(data, ams, "shift_radius_0.2"),
        "compounded_without": compounded(data, without, "shift_radius_0.2"),
        "compounded_noise": compounded(data, "TD3", "shift_td3_noise"),
        "calm_norm": calm_text(data, "critic_grad_norm"),
        "calm_variance": calm_text(data, "td_target_variance"),
        "quadruped": quadruped_table(data),
        "less_sac": share_taken_off(data, "SAC"),
        "less_td3": share_taken_off(data, "TD3"),
        "cost_grad": on_pendulum(data, "GRAD on SAC", "Base on SAC", "avg_return", 1),
        "cost_pave": on_pendulum(data, "PAVE on SAC", "Base on SAC", "avg_return", 1),
        "cost_quarter": on_pendulum(data, "PAVE, a quarter of the rows on SAC", "Base on SAC", "avg_return", 1),
        "cost_caps": on_pendulum(data, "CAPS on SAC", "Base on SAC", "avg_return", 1),
        "cost_asap": on_pendulum(data, "ASAP on SAC", "Base on SAC", "avg_return", 1),
        "td3_return": on_pendulum(data, "PAVE on TD3", "CAPS on TD3", "avg_return", 1),
        "td3_smoothness": on_pendulum(data, "PAVE on TD3", "CAPS on TD3", "smoothness", 2),
        "without_curv": on_pendulum(data, "PAVE without Curv on TD3", "PAVE on TD3", "smoothness", 2),
        "curv_alone": on_pendulum(data, "Curv alone on TD3", "PAVE on TD3", "smoothness", 2),
        "without_curv_m_sup": on_pendulum(data, "PAVE without Curv on TD3", "Base on TD3", "M_sup", 0),
        "quarter": with_interval(differences_of(data, quarter), 3, signed=True),
        "quarter_earlier": with_interval(differences_of(data, quarter, 75_000), 3, signed=True),
        "time_pave": number(times["PAVE on SAC"] / times["Base on SAC"], 1),
        "time_quarter": number(times["PAVE, a quarter of the rows on SAC"] / times["Base on SAC"], 1),
        "pendulum": pendulum_table(data),
        "speed": speed_table(data),
        "dog": dog_text(data),
        "dog_layer_norm": dog_layer_norm_text(data),
        "impossible": impossible_deviations(data),
    }


def filled(text: str, blocks: dict[str, str]) -> str:
    """Raises KeyError for a block that the text has and we do not."""
    return re.sub(
        r"(<!-- (\w+) -->).*?(<!-- /\2 -->)",
        lambda found: found[1] + blocks[found[2]] + found[3],
        text,
        flags=re.DOTALL,
    )


# ------------------------------------------------------------------------------------------------------------- the page


@dataclass
class Options:
    add: str = ""  # a CSV in benchmark/results that gets the rows of --runs
    runs: tuple[Path, ...] = ()  # their folders
    front: tuple[Path, ...] = ()  # two runs: draws the front figure
    output: Path = ROOT  # where README.md and benchmark/results are written

    def __post_init__(self):
        if bool(self.add) != bool(self.runs):
            raise ValueError("--add CSV and --runs FOLDER ... go together")
        if len(self.front) not in (0, 2):
            raise ValueError("--front takes two runs")


def main(options: Options) -> None:
    if options.add:
        add_runs(RESULTS / options.add, [run for path in options.runs for run in read_runs(path)])
    folder = options.output / "benchmark" / "results"
    folder.mkdir(parents=True, exist_ok=True)
    if options.front:
        runs = [run for path in options.front for run in read_runs(path)]
        draw_front(runs, folder / "front.png")
    data = read_data()
    blocks = blocks_of(data)
    for name in ("README.md", "benchmark/results/README.md"):
        text = (ROOT / name).read_text()
        (options.output / name).write_text(filled(text, blocks))
    for name, draw in FIGURES.items():
        draw(data, folder / name)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

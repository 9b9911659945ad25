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
    ESCAPE,
    GAMMA,
    LIBRARIES,
    OTHER_RADII,
    OUR_METHODS,
    PAVE_METHODS,
    PENDULUM,
    PENDULUM_STEPS,
    QUADRUPED,
    QUADRUPED_STEPS,
    RESULTS,
    SEEDS,
    SHIFT_NETWORKS,
    Data,
    Methods,
    add_runs,
    cores_text,
    differences_of,
    dog_run_curve,
    grid_cells,
    library_rates,
    machines,
    ratios_of,
    read_data,
)
from page_figures import FIGURES, draw_front
from scipy import stats

from runs import ROOT, read_runs

README_CLAIMS = 8  # README.md has the table's first rows


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


RULE = "holds p < 0.05, likely p < 0.1, contradicted p < 0.05 the other way, open fewer than three seeds, else not seen"


def verdict(differences: pd.Series, claimed_sign: int) -> str:
    """One word or two for paired differences and the sign that the claim gives them; RULE in code."""
    if len(differences) < 3:
        return "open"
    p = stats.ttest_1samp(differences, 0).pvalue
    as_claimed = np.sign(differences.mean()) == claimed_sign
    if p < 0.05:
        return "holds" if as_claimed else "contradicted"
    if p < 0.1 and as_claimed:
        return "likely"
    return "not seen"


class Claim(NamedTuple):
    """A row of the table of verdicts."""

    text: str
    paper: str
    ours: str
    seeds: str
    verdict: str


def printed_difference(data: Data, methods: Methods, env_id: str, source: str) -> str:
    ours = data.printed(methods.ours, env_id, methods.metric, source)
    base = data.printed(methods.base, env_id, methods.metric, source)
    return number(ours - base, methods.digits, signed=True)


def claim_of(text: str, paper: str, differences: pd.Series, methods: Methods) -> Claim:
    ours = with_interval(differences, methods.digits, signed=True) or "no run yet"
    return Claim(text, paper, ours, str(len(differences)), verdict(differences, methods.sign))


def ams_claims(data: Data) -> list[Claim]:
    alone = "LayerNorm alone on TD3"
    with_noise = "LayerNorm + TD3's noise on TD3"  # so the paper's "w/o NTD" is read here
    without = "AMS without LayerNorm on TD3"
    rows = (  # the claim; ours and our base; the paper's
        ("AMS beats TD3: return", "AMS on TD3", "TD3", "AMS on TD3", "TD3"),
        ("LayerNorm alone beats TD3", alone, "TD3", with_noise, "TD3"),
        ("AMS's neighbourhood adds to LayerNorm", "AMS on TD3", alone, "AMS on TD3", with_noise),
        ("The neighbourhood without LayerNorm beats TD3", without, "TD3", without, "TD3"),
    )
    claims = []
    for text, ours, base, their_ours, their_base in rows:
        methods = Methods(ours, base, "training_return", 1)
        theirs = methods._replace(ours=their_ours, base=their_base)
        paper = printed_difference(data, theirs, QUADRUPED, "AMS, table 3")
        claims.append(claim_of(text, paper, differences_of(data, methods, QUADRUPED_STEPS, QUADRUPED), methods))
    return claims


def pave_claims(data: Data) -> list[Claim]:
    """The first four are PAVE's main ones."""
    rows = (
        ("PAVE smooths TD3: smoothness", Methods("PAVE on TD3", "Base on TD3", "smoothness", -1, 2)),
        ("PAVE smooths SAC", Methods("PAVE on SAC", "Base on SAC", "smoothness", -1, 2)),
        ("PAVE costs SAC no return", Methods("PAVE on SAC", "Base on SAC", "avg_return", 1, 1)),
        ("PAVE is smoother than CAPS on SAC", Methods("PAVE on SAC", "CAPS on SAC", "smoothness", -1, 2)),
    )
    claims = []
    for text, methods in rows:
        paper = printed_difference(data, methods, PENDULUM, "PAVE, tables 1 and 2")
        claims.append(claim_of(text, paper, differences_of(data, methods), methods))

    flat = Methods("PAVE on TD3", "Base on TD3", "M_sup", -1)
    paper = "defined otherwise"
    claims.append(claim_of("PAVE flattens TD3's critic: M_sup", paper, differences_of(data, flat), flat))

    rough = Methods("PAVE without Curv on TD3", "Base on TD3", "smoothness", 1, 2)
    paper = f"{printed_difference(data, rough, 'Walker2d-v5', 'PAVE, ablation')} (Walker2d)"
    text = "PAVE without Curv is rougher than base"
    claims.append(claim_of(text, paper, differences_of(data, rough), rough))
    return claims


def shift_claim(data: Data) -> Claim:
    """Theorem 3.3's shift is the curvature's, so quadratic in the radius."""
    near = 0.2
    far = 0.8
    ratios = ratios_of(data, "AMS on TD3", "AMS on TD3", f"shift_radius_{far}", f"shift_radius_{near}")
    theirs = (far / near) ** 2
    word = verdict(np.log(ratios / theirs), 1)
    text = f"Curvature makes AMS's shift: that at radius {far} over {near}"
    return Claim(text, number(theirs), with_interval(ratios, 1), str(len(ratios)), word)


def dog_claim(data: Data) -> Claim:
    curve = dog_run_curve(data)
    step = curve.index[-1]
    printed = data.printed("AMS on TD3", "dog-run", "training_return", "AMS, table 2")
    ours = f"{number(curve.iloc[-1])} at {step:,}"
    return Claim("AMS learns dog-run", f"{number(printed)} at 1,000,000", ours, "1", "open")


def speed_claim(data: Data) -> Claim:
    """Holds where we are ahead by a twentieth on every CPU; rounds differ by that much."""
    shown = []
    worst = np.inf
    for machine, rows in data.speed[data.speed.cores == 1].groupby("machine", sort=False):
        rates = library_rates(rows)
        ratio = rates.loc["smoothq"] / rates.loc["sbx-rl (JAX)"]
        shown.append(f"{machine} {listed(ratio, 2)}")
        worst = min(worst, *ratio)
    word = "not seen"
    if worst > 1:
        word = "holds" if worst > 1.05 else "likely"
    return Claim("TD3, SAC outpace sbx-rl on one core", "", "; ".join(shown), "", word)


def all_claims(data: Data) -> list[Claim]:
    return [*ams_claims(data), *pave_claims(data), shift_claim(data), dog_claim(data), speed_claim(data)]


# ------------------------------------------------------------------------------------------------------ the page's text


def table_of_claims(claims: Iterable[Claim]) -> str:
    return table(["claim", "paper", "ours [95 % interval]", "seeds", "verdict"], claims)


def quadruped_table(data: Data) -> str:
    """Training returns by seed; escape: the first step, in thousands, at which it is above ESCAPE."""
    saturation = "action_saturation"
    has_saturation = (data.runs.metric.eq(saturation) & data.runs.env_name.eq(QUADRUPED)).any()
    seeds = list(SEEDS)
    by_seed = [f"seed {seed}" for seed in seeds]
    columns = ["critic", "target smoothed by", *by_seed, "mean", "less TD3", "escape, thousand"]
    base = data.seeds("TD3", "training_return", QUADRUPED_STEPS, QUADRUPED)
    rows = []
    for critic, smoothing, name in [*grid_cells(), *other_cells(data)]:
        curves = quadruped_curves(data, name)
        final = curves.reindex(index=[QUADRUPED_STEPS], columns=seeds).iloc[0]
        escapes = []
        cells = []
        for seed in seeds:
            curve = curves[seed].dropna() if seed in curves else pd.Series(dtype=float)
            above = curve.index[curve > ESCAPE]
            if len(curve):
                escapes.append(f"{above[0] // 1000}" if len(above) else "no")
            cells.append(last_value(curve))
        known = final.dropna()
        less = with_interval((known - base).dropna(), signed=True) if name != "TD3" else ""
        row = [critic, smoothing, *cells, number(known.mean()), less, ", ".join(escapes)]
        if has_saturation:
            row.append(listed(data.seeds(name, saturation, QUADRUPED_STEPS, QUADRUPED), 2))
        rows.append(row)
    if has_saturation:
        columns.append("saturated actions")
    return table(columns, rows)


def other_cells(data: Data) -> list[tuple[str, str, str]]:
    cells = []
    for name in OTHER_RADII:
        if (data.runs.exp_name == name).any():
            critic = "no LayerNorm" if "without LayerNorm" in name else "LayerNorm"
            cells.append((critic, "radius 0.7", name))
    return cells


def quadruped_curves(data: Data, name: str) -> pd.DataFrame:
    """Training returns: steps down, seeds across."""
    rows = data.runs
    rows = rows[(rows.exp_name == name) & (rows.env_name == QUADRUPED) & (rows.metric == "training_return")]
    return rows.pivot(index="step", columns="pair", values="value")


def last_value(curve: pd.Series) -> str:
    """With its step where that is not the last one."""
    if curve.empty:
        return ""
    if curve.index[-1] < QUADRUPED_STEPS:
        return f"{number(curve.iloc[-1])} at {curve.index[-1]:,}"
    return number(curve.loc[QUADRUPED_STEPS])


def pendulum_table(data: Data) -> str:
    """Smoothness by seed, - where a run is missing, and what it costs."""
    backbones = ("TD3", "SAC")
    seeds = [str(seed) for seed in range(9001, 9006)]
    rows = []
    for method in PAVE_METHODS:
        cells = []
        for backbone in backbones:
            methods = Methods(f"{method} on {backbone}", f"Base on {backbone}", "avg_return", 1, 1)
            smoothness = data.seeds(methods.ours, "smoothness", PENDULUM_STEPS)
            by_seed = smoothness.groupby(smoothness.index.str[:4]).first()
            shown = [number(by_seed[seed], 2) if seed in by_seed else "-" for seed in seeds]
            cells.append(", ".join(shown) if len(smoothness) else "")
            less = with_interval(differences_of(data, methods), 1, signed=True)
            cells.append(less if method != "Base" else "")
        rows.append([method, *cells])
    columns = [f"{backbone}: {what}" for backbone in backbones for what in ("smoothness", "return less base")]
    return table(["seeds 9001 to 9005", *columns], [row for row in rows if any(row[1:])])


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
    whole = data.gpu[data.gpu.env.eq("Walker2d-v5") & data.gpu.measure.eq("vector_steps_per_second")]
    on_gpu = whole.set_index("script").value
    prefixes = {"smoothq": "", "CleanRL": "CleanRL ", "LeanRL": "LeanRL "}
    cells = ["H100"]
    for library in LIBRARIES:
        names = [f"{prefixes.get(library, library)}{algorithm}" for algorithm in ("td3", "sac")]
        cells.append(listed(on_gpu[names]) if names[0] in on_gpu else "")
    rows.append([*cells, *[""] * len(OUR_METHODS)])
    return table(["TD3, SAC", *LIBRARIES, *OUR_METHODS], rows)


def clip_text(data: Data) -> str:
    """The neighbourhood's shift of the target clipped and unclipped, and the share of saturated actions."""
    parts = []
    for network in SHIFT_NETWORKS:
        _, values = network.values(data)
        clipped = number(values["shift_radius_0.2"], 5)
        unclipped = number(values["unclipped_shift_radius_0.2"], 5)
        parts.append(f"{network.label} {clipped}, {unclipped}, {number(100 * values['saturated_actions'])} %")
    return "; ".join(parts)


def compounded(data: Data, name: str, metric: str) -> str:
    shift = data.seeds(name, metric, QUADRUPED_STEPS, QUADRUPED)
    return ranged(shift / (1 - GAMMA))


def calm_text(data: Data, name: str) -> str:
    """Gradient norm and target variance over TD3's, geometric means over seeds."""
    ratios = []
    for metric in ("critic_grad_norm", "td_target_variance"):
        ratios.append(float(stats.gmean(ratios_of(data, name, "TD3", metric, metric))))
    return " and ".join(number(ratio, 2) for ratio in ratios)


def share_taken_off(data: Data, backbone: str) -> str:
    """Of the base's smoothness, by PAVE: ours, the paper's, in per cent."""
    base = data.seeds(f"Base on {backbone}", "smoothness", PENDULUM_STEPS).mean()
    ours = data.seeds(f"PAVE on {backbone}", "smoothness", PENDULUM_STEPS).mean()
    names = (f"PAVE on {backbone}", f"Base on {backbone}")
    theirs, their_base = (data.printed(name, PENDULUM, "smoothness", "PAVE, tables 1 and 2") for name in names)
    return f"{number(100 * (1 - ours / base))} % (the paper: {number(100 * (1 - theirs / their_base))} %)"


def less_base(data: Data, method: str) -> str:
    methods = Methods(f"{method} on SAC", "Base on SAC", "avg_return", 1)
    return with_interval(differences_of(data, methods), 1, signed=True)


def five_seeds_text(data: Data, base: str) -> str:
    """The last evaluation on the H200, not at quite the same step for all."""
    found = []
    for name in ("AMS on TD3@H200", f"{base}@H200"):
        rows = data.runs[(data.runs.exp_name == name) & (data.runs.metric == "avg_return")]
        found.append(rows[rows.step == rows.step.max()].set_index("seed").value)
    return with_interval(found[0] - found[1], signed=True)


def impossible_deviations(data: Data) -> str:
    """A return between 0 and 1000 with mean m deviates by sqrt(m (1000 - m)) at most."""
    rows = data.paper[data.paper.table.eq("AMS, table 2") & data.paper.name.eq("SAC")]
    rows = rows[rows.deviation > np.sqrt(rows.value * (1000 - rows.value))]
    return ", ".join(f"{row.env_id} {row.value:.0f} ± {row.deviation:.0f}" for row in rows.itertuples())


def blocks_of(data: Data) -> dict[str, str]:
    """The text between each pair of comments."""
    claims = all_claims(data)
    norms = data.seeds("TD3", "critic_grad_norm", QUADRUPED_STEPS, QUADRUPED)
    their_norm = data.printed("TD3", QUADRUPED, "critic_grad_norm", "AMS, figure 4")
    times = data.run_times.set_index("exp_name").seconds
    quarter = Methods("PAVE, a quarter of the rows on SAC", "PAVE on SAC", "smoothness", -1, 3)
    layer_norm = Methods("LayerNorm alone on TD3", "TD3", "training_return", 1)
    noise = Methods("AMS on TD3", "LayerNorm + TD3's noise on TD3", "training_return", 1)
    last = data.runs[data.runs.step == QUADRUPED_STEPS]
    spreads = last[last.metric == "value_sd_over_states"]
    return {
        "results": table_of_claims(claims[:README_CLAIMS]),
        "verdicts": table_of_claims(claims),
        "rule": RULE,
        "layer_norm": listed(differences_of(data, layer_norm, QUADRUPED_STEPS, QUADRUPED)),
        "noise": with_interval(differences_of(data, noise, QUADRUPED_STEPS, QUADRUPED), signed=True),
        "clip": clip_text(data),
        "compounded_ams": compounded(data, "AMS on TD3", "shift_radius_0.2"),
        "compounded_without": compounded(data, "AMS without LayerNorm on TD3", "shift_radius_0.2"),
        "compounded_noise": compounded(data, "TD3", "shift_td3_noise"),
        "spread": ranged(spreads.value, 0),
        "calm_ams": calm_text(data, "AMS on TD3"),
        "calm_layer_norm": calm_text(data, "LayerNorm alone on TD3"),
        "norm": number(norms.mean() / their_norm),
        "five_step": f"{data.runs[data.runs.exp_name == 'AMS on TD3@H200'].step.max():,}",
        "five_td3": five_seeds_text(data, "TD3"),
        "five_layer_norm": five_seeds_text(data, "LayerNorm alone on TD3"),
        "quadruped": quadruped_table(data),
        "less_sac": share_taken_off(data, "SAC"),
        "less_td3": share_taken_off(data, "TD3"),
        "cost_pave": less_base(data, "PAVE"),
        "cost_caps": less_base(data, "CAPS"),
        "cost_quarter": less_base(data, "PAVE, a quarter of the rows"),
        "quarter": with_interval(differences_of(data, quarter), 3, signed=True),
        "quarter_earlier": with_interval(differences_of(data, quarter, 75_000), 3, signed=True),
        "time_pave": number(times["PAVE on SAC"] / times["Base on SAC"], 1),
        "time_quarter": number(times["PAVE, a quarter of the rows on SAC"] / times["Base on SAC"], 1),
        "pendulum": pendulum_table(data),
        "speed": speed_table(data),
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
        draw_front(options.front, folder / "front.png")
    data = read_data()
    blocks = blocks_of(data)
    for name in ("README.md", "benchmark/results/README.md"):
        text = (ROOT / name).read_text()
        (options.output / name).write_text(filled(text, blocks))
    for name, draw in FIGURES.items():
        draw(data, folder / name)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

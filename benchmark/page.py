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

import matplotlib
import numpy as np
import pandas as pd
import tyro
from geometry import RADII
from intervals import interval
from play import Disturbance, load_player, play, scores_of
from report import COLUMNS, KEYS, MINUTES, TRAINING, read_runs_long
from scipy import stats

from runs import ROOT, Run, read_runs

matplotlib.use("agg")
import matplotlib.pyplot as plt

RESULTS = ROOT / "benchmark" / "results"
PAPER = ROOT / "benchmark" / "paper" / "figures.csv"
README_CLAIMS = 8  # README.md has the table's first rows

# Paul Tol's, with a contrast of more than 3 to white; colour-blind readers tell them apart.
BLUE = "#0077BB"
RED = "#CC3311"
GREEN = "#117733"
PURPLE = "#AA4499"
OLIVE = "#808000"
GREY = "#777777"
BLACK = "#000000"

PENDULUM = "Pendulum-v1"
PENDULUM_STEPS = 100_000
QUADRUPED = "quadruped-run"
QUADRUPED_STEPS = 200_000
SEEDS = {"0": "o", "42": "s", "123": "^"}  # quadruped-run's, as figure 1 draws them
ESCAPE = 400  # a training return that lying on the side does not reach
GAMMA = 0.99  # AMS's
NO_NOISE = "TD3 without noise"
GRID = {  # quadruped-run: critic -> what smooths its target -> method
    "LayerNorm": {
        "nothing": "LayerNorm alone on TD3",
        "AMS's neighbourhood": "AMS on TD3",
        "TD3's noise": "LayerNorm + TD3's noise on TD3",
    },
    "no LayerNorm": {
        "nothing": NO_NOISE,
        "AMS's neighbourhood": "AMS without LayerNorm on TD3",
        "TD3's noise": "TD3",
    },
}
OTHER_RADII = ("AMS radius 0.7 on TD3", "AMS without LayerNorm, radius 0.7 on TD3")
SHORT_RUNS = {  # by their --exp-name; for figure 2
    "short_ams": "AMS",
    "short_layer_norm_alone": "LayerNorm alone",
    "short_ams_without_layer_norm": "AMS without LayerNorm",
    "short_td3": "TD3",
}
PAVE_METHODS = {
    "Base": BLACK,
    "PAVE": BLUE,
    "PAVE, a quarter of the rows": GREEN,
    "CAPS": RED,
    "GRAD": PURPLE,
    "ASAP": OLIVE,
    "PAVE without Curv": GREY,
    "Curv alone": "#882255",
}
LIBRARIES = {  # in speed.csv's commands
    "smoothq": r"^baselines/{}\.py",
    "sbx-rl (JAX)": r"sbx:{}",
    "CleanRL": r"^cleanrl/cleanrl/{}_",
    "stable-baselines3": r"stable_baselines3:{}",
    "LeanRL": r"^leanrl/leanrl/{}_",
}
OUR_METHODS = {"AMS on TD3": "td3_ams.py", "PAVE on TD3": "td3_pave.py", "PAVE on SAC": "sac_pave.py"}


# ------------------------------------------------------------------------------------------------------------- the data


class Data(NamedTuple):
    """What the page is made of."""

    runs: pd.DataFrame  # report.COLUMNS, step and pair: a seed's runs of different methods that may be compared
    paper: pd.DataFrame
    speed: pd.DataFrame
    gpu: pd.DataFrame
    run_times: pd.DataFrame
    dog_run_others: pd.DataFrame

    def seeds(self, name: str, metric: str, step: int, env_id: str = PENDULUM) -> pd.Series:
        """The values of a method at a step, by pair; empty where there are none."""
        rows = self.runs
        rows = rows[(rows.exp_name == name) & (rows.env_name == env_id)]
        rows = rows[(rows.metric == metric) & (rows.step == step)]
        return rows.set_index("pair").value

    def printed(self, name: str, env_id: str, metric: str, table: str) -> float:
        """A paper's figure."""
        rows = self.paper
        rows = rows[(rows.name == name) & (rows.env_id == env_id) & (rows.metric == metric)]
        return float(rows[rows.table == table].value.iloc[0])


def read_data() -> Data:
    tables = [pd.read_csv(path) for path in sorted(RESULTS.glob("*.csv"))]
    runs = pd.concat([table for table in tables if "metric" in table and "env_step" in table])
    runs["step"] = runs.env_step // runs.num_envs
    # TD3's update is the same to the last bit since that commit, but a seed's start states are others.
    early = runs.exp_name.str.endswith("TD3@4e9ebee")
    runs["pair"] = runs.seed.astype(str).where(~early, runs.seed.astype(str) + " at 4e9ebee")
    counted = early | runs.exp_name.str.endswith("@others")
    runs["exp_name"] = runs.exp_name.where(~counted, runs.exp_name.str.split("@").str[0])
    runs = pd.concat([runs[~early], runs[early]]).drop_duplicates([*KEYS, "metric", "step"])  # today's go first
    names = ("speed", "gpu", "run_times", "dog_run_others")
    return Data(runs, pd.read_csv(PAPER), *(pd.read_csv(RESULTS / f"{name}.csv") for name in names))


def rows_of(run: Run) -> pd.DataFrame:
    """A run in the CSVs' form; of what training logs, the mean over the steps before each evaluation."""
    tables, _ = read_runs_long([run])
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


class Methods(NamedTuple):
    """Two that are compared, and the sign that a claim gives their difference in a metric."""

    ours: str
    base: str
    metric: str
    sign: int
    digits: int = 0


def differences_of(data: Data, methods: Methods, step: int = PENDULUM_STEPS, env_id: str = PENDULUM) -> pd.Series:
    """By seed."""
    ours = data.seeds(methods.ours, methods.metric, step, env_id)
    base = data.seeds(methods.base, methods.metric, step, env_id)
    return (ours - base).dropna()


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


def ratios_of(data: Data, ours: str, base: str, metric: str, base_metric: str) -> pd.Series:
    """On quadruped-run at its last step, by seed."""
    above = data.seeds(ours, metric, QUADRUPED_STEPS, QUADRUPED)
    below = data.seeds(base, base_metric, QUADRUPED_STEPS, QUADRUPED)
    return (above / below).dropna()


def shift_claim(data: Data) -> Claim:
    """Theorem 3.3's shift is the curvature's, so quadratic in the radius."""
    near = 0.2
    far = 0.8
    ratios = ratios_of(data, "AMS on TD3", "AMS on TD3", f"shift_radius_{far}", f"shift_radius_{near}")
    theirs = (far / near) ** 2
    word = verdict(np.log(ratios / theirs), 1)
    text = f"Curvature makes AMS's shift: that at radius {far} over {near}"
    return Claim(text, number(theirs), with_interval(ratios, 1), str(len(ratios)), word)


def dog_run_curve(data: Data) -> pd.Series:
    """The evaluation return of the run of AMS that got furthest, by vector step."""
    rows = data.runs[(data.runs.env_name == "dog-run") & (data.runs.metric == "avg_return")]
    rows = rows[rows.exp_name.str.startswith("AMS on TD3")]
    furthest = rows.loc[rows.step == rows.step.max(), "exp_name"].iloc[0]
    return rows[rows.exp_name == furthest].groupby("step").value.mean()


def dog_claim(data: Data) -> Claim:
    curve = dog_run_curve(data)
    step = curve.index[-1]
    printed = data.printed("AMS on TD3", "dog-run", "training_return", "AMS, table 2")
    ours = f"{number(curve.iloc[-1])} at {step:,}"
    return Claim("AMS learns dog-run", f"{number(printed)} at 1,000,000", ours, "1", "open")


def library_rates(rows: pd.DataFrame) -> pd.DataFrame:
    """The median rates of the libraries on one machine with so many cores: libraries down, TD3 and SAC across."""
    rates = {}
    for algorithm in ("td3", "sac"):
        for library, pattern in LIBRARIES.items():
            found = rows[rows.command.str.contains(pattern.format(algorithm))]
            if len(found):
                rates[(library, algorithm.upper())] = found.vector_steps_per_second.median()
    return pd.Series(rates).unstack().reindex(index=LIBRARIES, columns=["TD3", "SAC"]).dropna()


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


def grid_cells() -> list[tuple[str, str, str]]:
    """critic, what smooths the target, method."""
    return [(critic, smoothing, name) for critic, row in GRID.items() for smoothing, name in row.items()]


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


def cores_text(cores: int) -> str:
    return f"{cores} core" if cores == 1 else f"{cores} cores"


def machines(data: Data) -> list[tuple[str, int, pd.DataFrame]]:
    """machine, cores and its rows of speed.csv."""
    groups = data.speed.groupby(["machine", "cores"], sort=False)
    return [(machine, cores, rows) for (machine, cores), rows in groups]


def short_values(data: Data, name: str, metric: str) -> float | None:
    """Of a short run at its last step."""
    rows = data.runs[(data.runs.exp_name == name) & (data.runs.metric == metric)]
    if rows.empty:
        return None
    return float(rows.loc[rows.step == rows.step.max(), "value"].iloc[0])


def clip_text(data: Data) -> str:
    parts = []
    for name, label in SHORT_RUNS.items():
        clipped = short_values(data, name, "shift_radius_0.2")
        if clipped is not None:
            unclipped = short_values(data, name, "unclipped_shift_radius_0.2")
            saturated = short_values(data, name, "saturated_actions")
            parts.append(f"{label} {number(clipped, 5)}, {number(unclipped, 5)}, {number(100 * saturated)} %")
    return "; ".join(parts) or "no network yet"


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


# ---------------------------------------------------------------------------------------------------------- the figures


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
        for index, (seed, marker) in enumerate(SEEDS.items()):
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
    axis.set_ylabel("training return, last 20,000 steps")
    handles = [plt.Line2D([], [], marker="o", color=colour, ls="", label=critic) for critic, colour in colours.items()]
    for seed, marker in SEEDS.items():
        handles.append(plt.Line2D([], [], marker=marker, color=GREY, ls="", label=f"seed {seed}"))
    figure.legend(handles=handles, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    axis.set_title(f"{QUADRUPED} on TD3, {QUADRUPED_STEPS:,} vector steps; a dot a seed, a bar their mean", fontsize=9)
    save(figure, path)


def draw_shift(data: Data, path: Path) -> None:
    """How far the neighbourhood moves the target, against its radius: a panel a network of the short runs."""
    names = [name for name in SHORT_RUNS if short_values(data, name, "shift_radius_0.2") is not None]
    if not names:
        return
    width = max(5.5, 1.0 + 2.5 * len(names))
    figure, axes = plt.subplots(1, len(names), figsize=(width, 3.3), sharey=True, squeeze=False, layout="constrained")
    for axis, name in zip(axes[0], names):
        for prefix, colour, label in (("", RED, "clipped to the box, as AMS does"), ("unclipped_", BLUE, "unclipped")):
            shifts = np.array([short_values(data, name, f"{prefix}shift_radius_{radius}") for radius in RADII])
            axis.plot(RADII, np.abs(shifts), color=colour, lw=1.4, label=label)
            filled_in = np.where(shifts > 0, colour, "white")
            axis.scatter(RADII, np.abs(shifts), s=26, color=filled_in, edgecolor=colour, zorder=3)
            slope, dashes = (2, "--") if prefix else (1, ":")
            guide = abs(shifts[-1]) * (np.array(RADII) / RADII[-1]) ** slope
            axis.plot(RADII, guide, dashes, color=GREY, lw=1, label=f"slope {slope}")
        axis.set(xscale="log", yscale="log", xlabel="radius (normalised action)")
        axis.set_xticks(RADII, map(str, RADII))
        axis.minorticks_off()
        saturated = short_values(data, name, "saturated_actions")
        steps = data.runs.loc[data.runs.exp_name == name, "step"].max()
        title = f"{SHORT_RUNS[name]}, {steps:,} vector steps\n{number(100 * saturated)} % of the actions saturated"
        axis.set_title(title, fontsize=8.5)
    axes[0, 0].set_ylabel("|shift of the target|")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.suptitle(f"{QUADRUPED}, seed 0, how far the neighbourhood moves the target; hollow: below 0", fontsize=9)
    save(figure, path)


def draw_trade_off(data: Data, path: Path) -> None:
    """Return less the seed's own base against smoothness: means over seeds with their intervals."""
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 3.8), layout="constrained")
    for axis, backbone in zip(axes, ("TD3", "SAC")):
        base = data.seeds(f"Base on {backbone}", "avg_return", PENDULUM_STEPS)
        for method, colour in PAVE_METHODS.items():
            smoothness = data.seeds(f"{method} on {backbone}", "smoothness", PENDULUM_STEPS)
            less = (data.seeds(f"{method} on {backbone}", "avg_return", PENDULUM_STEPS) - base).dropna()
            if less.empty:
                continue
            smoothness = smoothness[less.index]
            x = smoothness.mean()
            y = less.mean()
            bounds = interval(smoothness)
            if bounds is not None:
                axis.plot(bounds, [y, y], color=colour, lw=1.2)
                axis.plot([x, x], interval(less), color=colour, lw=1.2)
            seeds = f"{len(less)} seed" if len(less) == 1 else f"{len(less)} seeds"
            face = "white" if bounds is None else colour
            axis.plot(x, y, "o", ms=7, color=colour, mfc=face, label=f"{method}, {seeds}")
        axis.axhline(0, color=GREY, lw=0.8, ls="--", zorder=0)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(short_tick)
        axis.tick_params(which="minor", labelsize=8)
        axis.set(xlabel="smoothness (log; left is smoother)", title=f"{backbone}")
        axis.legend(frameon=False, fontsize=7.5, loc="best")
    axes[0].set_ylabel("return less the seed's own base")
    figure.suptitle(f"{PENDULUM}, {PENDULUM_STEPS:,} steps; hollow: too few seeds for an interval", fontsize=9)
    save(figure, path)


def short_tick(value: float, _: int) -> str:
    """Of a logarithmic axis the minor ticks that have room for a label."""
    leading = f"{value:e}"[0]
    return f"{value:g}" if leading in "23457" else ""


def draw_m_sup(data: Data, path: Path) -> None:
    """M_sup against smoothness, a dot a seed."""
    figure, axis = plt.subplots(figsize=(5.2, 3.8), layout="constrained")
    for method, colour in PAVE_METHODS.items():
        name = f"{method} on TD3"
        smoothness = data.seeds(name, "smoothness", PENDULUM_STEPS)
        points = pd.DataFrame({"M_sup": data.seeds(name, "M_sup", PENDULUM_STEPS), "smoothness": smoothness}).dropna()
        if len(points):
            axis.plot(points.M_sup, points.smoothness, "o", ms=7, color=colour, mec="white", mew=0.6, label=method)
    axis.set(xscale="log", yscale="log", xlabel="M_sup, the mixed Hessian's largest norm (log)")
    axis.set_ylabel("smoothness (log; lower is smoother)")
    for formatted in (axis.xaxis, axis.yaxis):
        formatted.set_major_formatter("{x:g}")
        formatted.set_minor_formatter(short_tick)
    axis.tick_params(which="minor", labelsize=8)
    axis.legend(frameon=False, fontsize=8)
    axis.set_title(f"{PENDULUM} on TD3, {PENDULUM_STEPS:,} steps; a dot a seed", fontsize=9)
    save(figure, path)


def draw_speed(data: Data, path: Path) -> None:
    """Bars of TD3 and SAC for each library, a panel a machine."""
    found = [(machine, cores, rows) for machine, cores, rows in machines(data) if len(library_rates(rows))]
    figure, axes = plt.subplots(1, len(found), figsize=(1.4 + 2.6 * len(found), 3.3), layout="constrained", sharey=True)
    for axis, (machine, cores, rows) in zip(axes, found):
        rates = library_rates(rows)
        for place, library in enumerate(LIBRARIES):
            for algorithm, colour, offset in (("TD3", BLUE, -0.19), ("SAC", RED, 0.19)):
                if library not in rates.index:
                    continue
                rate = rates.loc[library, algorithm]
                axis.barh(place + offset, rate, 0.34, color=colour, label=algorithm if place == 0 else None)
                axis.annotate(f" {rate:.0f}", (rate, place + offset), va="center", fontsize=8)
        axis.set_yticks(range(len(LIBRARIES)), LIBRARIES)
        axis.margins(x=0.15)
        axis.set(xlabel="vector steps a second", title=f"{machine}, {cores_text(cores)}")
        axis.title.set_fontsize(9)
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.suptitle("Walker2d-v5, whole processes, medians of the rounds; empty: not measured there", fontsize=9)
    save(figure, path)


def draw_dog_run(data: Data, path: Path) -> None:
    """Our curve, the paper's figures and other repositories'."""
    figure, axis = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    curve = dog_run_curve(data).loc[1:]
    axis.plot(8 * curve.index / 1e6, curve, ".-", color=BLUE, label="AMS on TD3, ours, 1 seed, 8 environments")
    for name, colour in (("AMS on SAC", GREEN), ("AMS on TD3", BLUE), ("TD3", BLACK)):
        value = data.printed(name, "dog-run", "training_return", "AMS, table 2")
        axis.plot(8, value, "D", color=colour, mfc="none", mew=1.5)
        axis.annotate(f"{name}  ", (8, value), ha="right", va="center", fontsize=8, color=colour)
    axis.plot([], [], "D", color=GREY, mfc="none", label="the AMS paper, 1,000,000 vector steps of 8 environments")
    for steps, rows in data.dog_run_others.groupby("environment_steps"):
        axis.plot(rows.environment_steps / 1e6, rows.avg_return, "s", color=RED, ms=5)
        for names, height in labels_apart(rows):
            axis.annotate(f"  {names}", (steps / 1e6, height), va="center", fontsize=8, color=RED)
    axis.plot([], [], "s", color=RED, label="other repositories' result files")
    axis.set(xscale="log", xlim=(0.08, 30), ylim=(0, 960), xlabel="environment steps (millions, log)", ylabel="return")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.legend(frameon=False, fontsize=8, loc="upper left")
    axis.set_title("dog-run", fontsize=9)
    save(figure, path)


def labels_apart(rows: pd.DataFrame, room: float = 34) -> list[tuple[str, float]]:
    """Names of equal values together; heights at least so far apart."""
    labels = []
    for value, group in sorted(rows.groupby("avg_return"), reverse=True):
        height = min(value, labels[-1][1] - room) if labels else value
        labels.append((", ".join(group.name), height))
    return labels


def draw_front(folders: tuple[Path, Path], path: Path) -> None:
    """The torque of two policies over an episode from the same state, with the scores of the evaluation's episodes."""
    figure, axes = plt.subplots(2, 1, figsize=(7.2, 3.6), sharex=True, sharey=True, layout="constrained")
    players = [load_player(folder) for folder in folders]
    first = players[0]
    starts = first.script.start_seeds(first.args, first.step, 1, first.args.eval_episodes)
    for axis, player, colour in zip(axes, players, (RED, BLUE)):
        episodes = play(player, starts, Disturbance())
        scores = scores_of(player, episodes)
        torque = episodes[0].actions[:, 0]
        seconds = player.env.unwrapped.dt * np.arange(len(torque))
        axis.plot(seconds, torque, color=colour, lw=1.3)
        label = f"smoothness {scores['smoothness'].mean():.2f}, return {scores['return'].mean():.0f}"
        axis.set_title(f"{front_name(player.run)}: {label}", loc="left", fontsize=10, color=colour)
        axis.set(
            ylabel="torque (N m)", ylim=1.05 * np.array([first.env.action_box.low[0], first.env.action_box.high[0]])
        )
    axes[1].set_xlabel("time (s)")
    where = f"{first.args.env_id}, seed {first.seed}, {first.step:,} steps"
    figure.suptitle(f"{where}: an episode; scores are means over {len(starts)}", fontsize=9)
    save(figure, path)


def front_name(run: Run) -> str:
    names, _ = read_runs_long([run])
    return names[0].exp_name.iloc[0].replace("Base on ", "")


FIGURES = {
    "quadruped_run.png": draw_quadruped,
    "target_shift.png": draw_shift,
    "pave_return_smoothness.png": draw_trade_off,
    "pave_m_sup.png": draw_m_sup,
    "speed.png": draw_speed,
    "dog_run.png": draw_dog_run,
}


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

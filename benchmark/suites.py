"""The cells of the two papers' tables, each a script with flags on an environment, and which run is of which cell.

What a script sets by itself for an environment (PAVE's weights and budgets) is not repeated here.
"""

from dataclasses import asdict
from typing import Any, NamedTuple

from runs import Run, load_script, script_path

PAVE_ENVS = ("LunarLander-v3", "Pendulum-v1", "Reacher-v5", "Ant-v5", "Hopper-v5", "Walker2d-v5")
PAVE_METHODS = ("base", "caps", "grad", "asap", "pave")
WEIGHTS = ("mpr_weight", "vfc_weight", "curvature_weight")
AMS_ENVS = (
    *("cheetah-run", "humanoid-run", "quadruped-walk", "quadruped-run"),
    *("dog-stand", "dog-walk", "dog-trot", "dog-run"),
    *("h1-sit", "h1-slide", "h1-walk", "h1-run"),
)


class Cell(NamedTuple):
    """A figure of a table: one script with these flags on one environment, over some seeds."""

    method: str  # what sweep.py's --only calls it
    script: str
    env_id: str
    flags: dict[str, Any] = {}  # noqa: RUF012  (never written to)


def pave_cells(backbone: str, env_ids: tuple[str, ...], methods: tuple[str, ...]) -> list[Cell]:
    """All methods of PAVE's tables share one protocol; the base row is PAVE's script without PAVE."""
    cells = []
    for env_id in env_ids:
        for method in methods:
            if method == "base":
                cells.append(Cell(method, f"{backbone}_pave", env_id, dict.fromkeys(WEIGHTS, 0.0)))
            else:
                cells.append(Cell(method, f"{backbone}_{method}", env_id))
    return cells


def ablation_cells(env_id: str, variants: tuple[str, ...]) -> list[Cell]:
    """A variant is a 0 or 1 for each of PAVE's three terms."""
    cells = []
    for bits in variants:
        flags = {weight: 0.0 for weight, bit in zip(WEIGHTS, bits) if bit == "0"}
        cells.append(Cell(bits, "td3_pave", env_id, flags))
    return cells


def ams_cell(script: str, env_id: str, method: str | None = None, **flags: Any) -> Cell:
    """500 000 vector steps of 8 environments, twice that for the two hardest tasks; PPO's budget counts transitions."""
    steps = 1_000_000 if env_id in ("humanoid-run", "dog-run") else 500_000
    if script == "ppo":
        steps = steps // 8
    return Cell(method or script, script, env_id, {"num_envs": 8, "total_timesteps": steps, **flags})


VARIANTS = {  # of AMS on quadruped-run
    "without_ntd": {"num_neighbors": 0},  # TD3 has the noise of its target action back
    "layer_norm_alone": {"num_neighbors": 0, "policy_noise": 0.0},
    "without_ln": {"layer_norm": False},
    "without_ln_radius_0.7": {"layer_norm": False, "radius": 0.7},
    "ams": {},
    "shared_frame": {"shared_frame": True},
    **{f"radius_{radius}": {"radius": radius} for radius in (0.2, 0.4, 0.6, 0.7, 0.8)},
    **{f"neighbors_{K}": {"num_neighbors": K} for K in (4, 6, 8, 10)},
}


def quadruped_cells(backbone: str, *variants: str) -> list[Cell]:
    cells = [ams_cell(backbone, "quadruped-run", f"{backbone}:baseline")]
    for variant in variants:
        cells.append(ams_cell(f"{backbone}_ams", "quadruped-run", f"{backbone}:{variant}", **VARIANTS[variant]))
    return cells


SUITES: dict[str, list[Cell]] = {
    "pave-table-1": pave_cells("td3", PAVE_ENVS, PAVE_METHODS),
    "pave-table-2": pave_cells("sac", PAVE_ENVS, PAVE_METHODS),
    "pave-critic-baselines": pave_cells("td3", ("LunarLander-v3", "Walker2d-v5"), ("base", "sn", "gp", "pave")),
    "pave-ablation": ablation_cells("Walker2d-v5", ("000", "100", "010", "110", "001", "101", "011", "111")),
    "pave-terms-pendulum": ablation_cells("Pendulum-v1", ("000", "110", "001", "111")),  # ours
    "pave-quarter-rows": [  # ours: is a quarter of the batch enough for PAVE's losses?
        *pave_cells("sac", ("Pendulum-v1", "LunarLander-v3"), ("base", "pave")),
        Cell("pave:rows_25", "sac_pave", "Pendulum-v1", {"geometry_rows": 25}),
        Cell("pave:rows_25", "sac_pave", "LunarLander-v3", {"geometry_rows": 25}),
        Cell("pave:rows_64", "td3_pave", "LunarLander-v3", {"geometry_rows": 64}),
    ],
    "ams-table-2": [
        ams_cell(script, env_id) for env_id in AMS_ENVS for script in ("ppo", "sac", "td3", "td3_ams", "sac_ams")
    ],
    "ams-table-3": [
        *quadruped_cells("td3", "without_ntd", "without_ln", "ams"),
        *quadruped_cells("sac", "without_ntd", "without_ln", "ams"),
        *quadruped_cells("td3", *(f"radius_{radius}" for radius in (0.2, 0.4, 0.6, 0.8)))[1:],
        *quadruped_cells("td3", *(f"neighbors_{K}" for K in (4, 6, 8, 10)))[1:],
    ],
    "ams-what-works": [  # ours: what of AMS makes the gain? LayerNorm or none, with nothing, neighbourhood or noise
        ams_cell("td3", "quadruped-run", "td3:no_noise", policy_noise=0.0),
        *quadruped_cells("td3", "without_ln", "layer_norm_alone", "without_ntd", "ams"),
        *quadruped_cells("td3", "radius_0.7", "without_ln_radius_0.7", "shared_frame")[1:],
    ],
}


# ------------------------------------------------------------------------------------ what the report calls the methods

NAMES = {  # by script without the backbone, and the flags that are not its defaults
    "PAVE mpr_weight=0.0 vfc_weight=0.0 curvature_weight=0.0": "Base",
    "PAVE vfc_weight=0.0 curvature_weight=0.0": "MPR alone",
    "PAVE mpr_weight=0.0 curvature_weight=0.0": "VFC alone",
    "PAVE mpr_weight=0.0 vfc_weight=0.0": "Curv alone",
    "PAVE curvature_weight=0.0": "PAVE without Curv",
    "PAVE vfc_weight=0.0": "PAVE without VFC",
    "PAVE mpr_weight=0.0": "PAVE without MPR",
    "PAVE geometry_rows=25": "PAVE, a quarter of the rows",
    "PAVE geometry_rows=64": "PAVE, a quarter of the rows",
    "AMS num_neighbors=0": "LayerNorm + TD3's noise",
    "AMS num_neighbors=0 policy_noise=0.0": "LayerNorm alone",
    "AMS layer_norm=False": "AMS without LayerNorm",
    "AMS layer_norm=False radius=0.7": "AMS without LayerNorm, radius 0.7",
    "AMS shared_frame=True": "AMS, shared frame",
}


def name_of(cell: Cell) -> str:
    """td3_ams with num_neighbors 0 and policy_noise 0 is LayerNorm alone on TD3."""
    defaults = load_script(cell.script).Args()
    backbone, _, method = script_path(cell.script).stem.upper().partition("_")
    changed = []
    for flag, value in cell.flags.items():
        if flag not in ("num_envs", "total_timesteps") and value != getattr(defaults, flag):
            changed.append(f"{flag}={value}")
    if not method:
        return "TD3 without noise" if changed == ["policy_noise=0.0"] else backbone
    variant = " ".join([method, *changed])
    if variant == "AMS num_neighbors=0" and backbone == "SAC":  # which has no noise to give back
        name = "LayerNorm alone"
    elif variant in NAMES:
        name = NAMES[variant]
    else:  # AMS radius 0.7
        name = variant.replace("=", " ").replace("_", " ")
    return f"{name} on {backbone}"


# ------------------------------------------------------------------------------------------- which run is of which cell

INCIDENTAL = {  # arguments that do not change what is learned: runs that differ in these alone are the same run
    *("exp_name", "runs_dir", "resume", "track", "wandb_project_name", "wandb_entity", "cuda", "compile"),
    *("log_every", "save_every", "save_replay"),
}
SEEDS = {"seed", "num_seeds"}
LENGTH = {"total_timesteps", "eval_every", "eval_episodes"}


def cell_args(cell: Cell) -> Any:
    """The script's Args with which the cell is trained."""
    script = load_script(cell.script)
    settings = script.SETTINGS.get(cell.env_id, {})
    return script.Args(**{**settings, "env_id": cell.env_id, **cell.flags})


def differences(
    run: Run, wanted: dict[str, Any], defaults: dict[str, Any], ignore: set[str] = frozenset()
) -> list[str]:
    """The arguments in which a run differs from those wanted, INCIDENTAL ones aside.

    One that its script did not have when the run was made counts as its default, one that the script no longer has as
    a difference.
    """
    different = []
    for name in (run.args.keys() | wanted.keys()) - INCIDENTAL - ignore:
        if name not in wanted or run.args.get(name, defaults.get(name)) != wanted[name]:
            different.append(name)
    return sorted(different)


def other_arguments(run: Run, cell: Cell) -> list[str]:
    """The arguments in which a run is not the cell's, whatever its length, seeds and evaluations."""
    script = script_path(cell.script).stem
    if run.args.get("script") != script or run.args.get("env_id") != cell.env_id:
        return ["script", "env_id"]
    args = cell_args(cell)
    wanted = {"script": script, **asdict(args)}
    if run.args.get("learning_starts") != wanted.get("learning_starts"):  # of sweep.py --scale, perhaps
        scale = run.args["total_timesteps"] / args.total_timesteps
        wanted["learning_starts"] = max(1, round(args.learning_starts * scale))
    return differences(run, wanted, asdict(type(args)()), SEEDS | LENGTH)

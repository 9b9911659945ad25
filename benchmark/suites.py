"""The cells of the two papers' tables, each a script with flags on an environment, and which run on disk is of which cell.

What a script sets by itself for an environment (PAVE's weights and budgets) is not repeated here.
"""

import csv
import importlib.util
import json
import sys
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAVE_ENVS = ("LunarLander-v3", "Pendulum-v1", "Reacher-v5", "Ant-v5", "Hopper-v5", "Walker2d-v5")
AMS_ENVS = ("cheetah-run", "humanoid-run", "quadruped-walk", "quadruped-run", "dog-stand", "dog-walk", "dog-trot", "dog-run")
AMS_ENVS += ("h1-sit", "h1-slide", "h1-walk", "h1-run")
PAVE_METHODS = ("base", "caps", "grad", "asap", "pave")
CRITIC_METHODS = ("base", "sn", "gp", "pave")
WEIGHTS = ("mpr_weight", "vfc_weight", "curvature_weight")


class Cell(NamedTuple):
    """A figure of a table: one script with these flags on one environment, over some seeds."""

    method: str  # the row's name in benchmark/paper/*.csv
    script: str
    env_id: str
    flags: dict[str, Any] = {}  # noqa: RUF012  (never written to)


def pave_cell(backbone: str, method: str, env_id: str) -> Cell:
    """All methods of PAVE's tables share one protocol; the base row is PAVE's script without PAVE."""
    if method == "base":
        return Cell(method, f"{backbone}_pave", env_id, dict.fromkeys(WEIGHTS, 0.0))
    return Cell(method, f"{backbone}_{method}", env_id)


def ams_cell(script: str, env_id: str, method: str | None = None, **flags: Any) -> Cell:
    """500 000 vector steps of 8 environments, twice that for the two hardest tasks; PPO's budget counts transitions."""
    steps = 1_000_000 if env_id in ("humanoid-run", "dog-run") else 500_000
    steps = steps // 8 if script == "ppo" else steps
    return Cell(method or script, script, env_id, {"num_envs": 8, "total_timesteps": steps, **flags})


VARIANTS = {  # of AMS on quadruped-run
    "baseline": {},
    "without_ntd": {"num_neighbors": 0},  # TD3 has the noise of its target action back
    "layer_norm_alone": {"num_neighbors": 0, "policy_noise": 0.0},
    "without_ln": {"layer_norm": False},
    "ams": {},
    "shared_frame": {"shared_frame": True},
    **{f"radius_{radius}": {"radius": radius} for radius in (0.2, 0.4, 0.6, 0.7, 0.8)},
    **{f"neighbors_{K}": {"num_neighbors": K} for K in (4, 6, 8, 10)},
}


def quadruped_run(backbone: str, *variants: str) -> list[Cell]:
    scripts = {"baseline": backbone}
    return [ams_cell(scripts.get(v, f"{backbone}_ams"), "quadruped-run", f"{backbone}:{v}", **VARIANTS[v]) for v in variants]


SUITES: dict[str, list[Cell]] = {
    "pave-table-1": [pave_cell("td3", method, env_id) for env_id in PAVE_ENVS for method in PAVE_METHODS],
    "pave-table-2": [pave_cell("sac", method, env_id) for env_id in PAVE_ENVS for method in PAVE_METHODS],
    "pave-critic-baselines": [
        pave_cell("td3", method, env_id) for env_id in ("LunarLander-v3", "Walker2d-v5") for method in CRITIC_METHODS
    ],
    "pave-ablation": [  # a 0 or 1 for each of the three terms
        Cell(bits, "td3_pave", "Walker2d-v5", {name: 0.0 for name, bit in zip(WEIGHTS, bits) if bit == "0"})
        for bits in ("000", "100", "010", "110", "001", "101", "011", "111")
    ],
    "pave-plus-caps": [
        *(pave_cell("td3", method, "LunarLander-v3") for method in ("base", "caps", "pave")),
        Cell("caps+pave", "td3_pave", "LunarLander-v3", {"caps_temporal_weight": 0.1, "caps_spatial_weight": 0.5}),
    ],
    "pave-quarter-rows": [  # ours: is a quarter of the batch enough for PAVE's losses?
        *(pave_cell("sac", method, env_id) for env_id in ("Pendulum-v1", "LunarLander-v3") for method in ("base", "pave")),
        *(Cell("pave:rows_25", "sac_pave", env_id, {"geometry_rows": 25}) for env_id in ("Pendulum-v1", "LunarLander-v3")),
    ],
    "ams-table-2": [ams_cell(script, env_id) for env_id in AMS_ENVS for script in ("ppo", "sac", "td3", "td3_ams", "sac_ams")],
    "ams-table-3": [
        *quadruped_run("td3", "baseline", "without_ntd", "without_ln", "ams"),
        *quadruped_run("sac", "baseline", "without_ntd", "without_ln", "ams"),
        *quadruped_run("td3", *(f"radius_{radius}" for radius in (0.2, 0.4, 0.6, 0.8))),
        *quadruped_run("td3", *(f"neighbors_{K}" for K in (4, 6, 8, 10))),
    ],
    "ams-what-works": quadruped_run(  # ours: what of AMS makes the gain?
        "td3", "baseline", "without_ntd", "layer_norm_alone", "without_ln", "ams", "radius_0.7", "shared_frame"
    ),
}

# Arguments that do not change what is learned: two runs that differ in these alone are the same run.
INCIDENTAL = {"exp_name", "resume", "track", "wandb_project_name", "wandb_entity", "cuda", "compile"}
INCIDENTAL |= {"log_every", "save_every", "save_replay"}
SEEDS = {"seed", "num_seeds"}


def script_path(script: str) -> Path:
    """td3_ams, td3_ams.py, baselines/td3 ... -> the file; raises FileNotFoundError if there is none."""
    name = script.removesuffix(".py") + ".py"
    for path in (ROOT / name, ROOT / "baselines" / name):
        if path.is_file():
            return path
    raise FileNotFoundError(f"no script is called {script}: looked for {name} and baselines/{name}")


def load_script(script: str) -> ModuleType:
    """A training script as a module, imported once."""
    path = script_path(script)
    name = f"smoothq_script_{path.stem}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def cell_args(cell: Cell) -> Any:
    """The script's Args with which the cell is trained."""
    script = load_script(cell.script)
    return script.Args(**{**script.SETTINGS.get(cell.env_id, {}), "env_id": cell.env_id, **cell.flags})


class Run(NamedTuple):
    """A folder of runs/."""

    folder: Path
    args: dict[str, Any]  # args.json
    is_complete: bool

    @property
    def seeds(self) -> range:
        return range(self.args["seed"], self.args["seed"] + self.args["num_seeds"])


def read_runs(folder: Path) -> list[Run]:
    """Every run in runs/, oldest first; a folder whose args.json or eval.csv cannot be read is none."""
    runs = []
    for path in sorted(folder.glob("*/args.json"), key=lambda path: path.stat().st_mtime):
        try:
            args, table = json.loads(path.read_text()), path.with_name("eval.csv")
            last_step = -1
            if table.exists():
                last_step = max((int(row["step"]) for row in csv.DictReader(table.read_text().splitlines())), default=-1)
            runs.append(Run(path.parent, args, last_step == args["total_timesteps"]))
        except (ValueError, KeyError, TypeError, OSError) as error:
            print(f"{path.parent}: passed over ({type(error).__name__}: {error})", file=sys.stderr)
    return runs


def differences(run: Run, wanted: dict[str, Any], defaults: dict[str, Any], ignore: set[str] = frozenset()) -> list[str]:
    """The arguments in which a run differs from those wanted, INCIDENTAL ones aside. One that its script did not have when the
    run was made counts as its default, one that the script no longer has as a difference."""
    names = (run.args.keys() | wanted.keys()) - INCIDENTAL - ignore
    return sorted(name for name in names if name not in wanted or run.args.get(name, defaults.get(name)) != wanted[name])


def other_arguments(run: Run, cell: Cell) -> list[str]:
    """The arguments in which a run is not the cell's, whatever its length, seeds and evaluations."""
    if [run.args.get("script"), run.args.get("env_id")] != [Path(cell.script).stem, cell.env_id]:
        return ["script", "env_id"]
    args = cell_args(cell)
    wanted = {"script": Path(cell.script).stem, **asdict(args)}
    if "learning_starts" in wanted and run.args.get("learning_starts") != args.learning_starts:  # of sweep.py --scale, perhaps
        wanted["learning_starts"] = max(1, round(args.learning_starts * run.args["total_timesteps"] / args.total_timesteps))
    return differences(run, wanted, asdict(type(args)()), SEEDS | {"total_timesteps", "eval_every", "eval_episodes"})


def is_of(run: Run, cell: Cell) -> bool:
    return not other_arguments(run, cell)

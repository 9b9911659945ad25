"""The training scripts as modules, and their runs on disk: what the other files here load them with."""

import csv
import importlib.util
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import cloudpickle
import gymnasium as gym
import torch
import torch._dynamo  # loads Triton, which crashes once MUJOCO_GL=egl has loaded Mesa's LLVM

ROOT = Path(__file__).resolve().parent.parent


def script_path(name: str) -> Path:
    """td3_ams, td3_ams.py, baselines/td3 ... -> the file; raises FileNotFoundError if there is none."""
    file = name.removesuffix(".py") + ".py"
    for path in (ROOT / file, ROOT / "baselines" / file):
        if path.is_file():
            return path
    raise FileNotFoundError(f"no script is called {name}: looked for {file} and baselines/{file}")


def load_script(name: str) -> ModuleType:
    """A training script of this repository as a module."""
    return load_module(script_path(name))


def load_module(path: Path) -> ModuleType:
    """A file as a module, imported once."""
    module_name = file_name(f"smoothq_{path.resolve()}")
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, path)
        sys.modules[module_name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
        try:
            spec.loader.exec_module(sys.modules[module_name])
        except Exception as error:  # of a copy, its user's
            del sys.modules[module_name]
            raise ImportError(f"{path}: {type(error).__name__}: {error}") from error
        cloudpickle.register_pickle_by_value(sys.modules[module_name])  # a spawned worker cannot import it
    return sys.modules[module_name]


class Run(NamedTuple):
    """A folder of runs/."""

    folder: Path
    args: dict[str, Any]  # of args.json
    is_complete: bool

    @property
    def seeds(self) -> range:
        return range(self.args["seed"], self.args["seed"] + self.args["num_seeds"])


def read_run(folder: Path) -> Run:
    """Raises OSError, ValueError, KeyError or TypeError where args.json or eval.csv cannot be read."""
    args = json.loads((folder / "args.json").read_text())
    evaluations = folder / "eval.csv"
    last_step = -1
    if evaluations.exists():
        rows = csv.DictReader(evaluations.read_text().splitlines())
        last_step = max((int(row["step"]) for row in rows), default=-1)
    return Run(folder, args, last_step == args["total_timesteps"])


def read_runs(folder: Path) -> list[Run]:
    """The runs anywhere below a folder, or in it, oldest first; what cannot be read is passed over, with a line."""
    paths = folder.rglob("args.json")
    runs = []
    for path in sorted(paths, key=lambda path: path.stat().st_mtime):
        try:
            runs.append(read_run(path.parent))
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"{path.parent}: passed over ({type(error).__name__}: {error})", file=sys.stderr)
    return runs


def runs_in(paths: Iterable[Path]) -> list[Run]:
    """The evaluated runs at paths, each once: runs' folders, or folders of runs."""
    found = {run.folder: run for path in paths for run in read_runs(path)}
    return [run for run in found.values() if (run.folder / "eval.csv").exists()]


def policies(run: Run) -> dict[int, Path]:
    """The files of the saved policies, by step."""
    return {int(path.stem.removeprefix("step_")): path for path in sorted(run.folder.glob("policies/step_*.pt"))}


def script_and_args(run: Run) -> tuple[ModuleType, Any]:
    """The script that trained a run and its Args: a flag that the run is older than has its default.

    The run's folder holds the script as it was then: a copy may have other networks, this repository may have gone on.
    What the tools call of a script (make_env, evaluate, start_seeds, ...) must keep its name and its arguments.
    """
    name = run.args["script"]
    own = run.folder / f"{name}.py"  # older runs have none
    script = load_module(own) if own.is_file() else load_script(name)
    known = {name: value for name, value in run.args.items() if name in script.Args.__dataclass_fields__}
    return script, script.Args(**known)


def new_agent(script: ModuleType, args: Any, env: gym.Env) -> Any:
    """The script's Agent, untrained, on the CPU; env as the script makes it. Nothing here trains its networks."""
    agent = script.Agent(args, env.observation_space.shape[0], env.action_space.shape[0], torch.device("cpu"))
    agent.actor.requires_grad_(False)
    agent.critic.requires_grad_(False)
    return agent


def load_agent(run: Run) -> tuple[ModuleType, Any, gym.Env, Any]:
    """The script, its Args, the environment as the script makes it, and the Agent of all S seeds; then load_policy."""
    script, args = script_and_args(run)
    env = script.make_env(args.env_id, args.env_kwargs)
    return script, args, env, new_agent(script, args, env)


def load_policy(agent: Any, path: Path, seeds: slice = slice(None)) -> None:
    """Gives an agent the actor and the critic of a saved policy, or those of some of its seeds."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name in ("actor", "critic"):
        weights = {key: value[seeds] for key, value in state[name].items()}
        getattr(agent, name).load_state_dict(weights)


def file_name(text: str) -> str:
    """A name for a file, made as a run's folder's is: an environment's id may have slashes and colons."""
    return re.sub(r"[^\w.-]", "_", text)

"""What every test needs: the scripts as modules and as processes, a tiny environment, and train() on it in this process."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import gymnasium as gym
import numpy as np
import pytest
import torch
from same_code import ROOT, SCRIPTS

ALL = [str(path.relative_to(ROOT)) for path in SCRIPTS]
OFF_POLICY = [path for path in ALL if "ppo" not in path]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def load_script(path: str) -> ModuleType:
    """A script, named from the root (baselines/td3.py), as a module; loaded once."""
    name = "script_" + path.removesuffix(".py").replace("/", "_")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def start_script(path: str, *flags: object, cwd: Path, **environment: str) -> subprocess.Popen:
    """The script as a user starts it, in the folder cwd, on one thread; its output in pipes, as text."""
    command = [sys.executable, str(ROOT / path), *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", **environment}
    return subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_script(path: str, *flags: object, cwd: Path, timeout: float = 300, **environment: str) -> subprocess.CompletedProcess:
    """start_script, to its end."""
    process = start_script(path, *flags, cwd=cwd, **environment)
    try:
        output, errors = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


class Brief(gym.Env):
    """Episodes of 3 steps that terminate and of 4 that are truncated, by turns; the best action is half of the greatest.

    An observation is the episode's parity and the steps since its start.
    """

    observation_space, action_space = gym.spaces.Box(-9, 9, (2,), np.float32), gym.spaces.Box(-2, 2, (2,), np.float32)
    parity = 1

    def reset(self, *, seed=None, options=None):
        self.parity, self.steps = 1 - self.parity, 0
        return np.array([self.parity, 0]), {}

    def step(self, action):
        self.steps += 1
        ends = [self.steps == 3, False] if self.parity == 0 else [False, self.steps == 4]
        return np.array([self.parity, self.steps]), -float(np.square(action - 1).sum()), *ends, {}


gym.register("Brief-v0", Brief)


def serial_envs(makers: list, **mode) -> gym.vector.VectorEnv:
    """In place of AsyncVectorEnv: starting a process for each takes longer than all else."""
    envs, pending = gym.vector.SyncVectorEnv(makers, **mode), []
    envs.step_async, envs.step_wait = pending.append, lambda timeout: envs.step(pending.pop())
    return envs


def make_args(path: str, **flags):
    """The script's Args; flags that it lacks are left out."""
    args = load_script(path).Args
    return args(**{name: value for name, value in flags.items() if name in args.__dataclass_fields__})


def train(path: str, batch: dict[str, torch.Tensor] | None = None, losses: list | None = None, **changes) -> dict:
    """The script's own train() on Brief-v0, without a file: its args, modules and replay.

    Every update gets batch, if any: the replay's columns by name, previous_observations last. losses collects the class of the
    network and the loss [S] of each gradient.
    """
    script, defaults = load_script(path), dict(env_id="Brief-v0", update_every=1, eval_episodes=1, cuda=False, compile=False)
    kept = {"args": make_args(path, **defaults | changes)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gym.vector, "AsyncVectorEnv", serial_envs)
        patch.setattr("signal.signal", lambda *_: None)  # a run takes over Ctrl-C, which is pytest's
        patch.setattr(script, "start_log", lambda *_: lambda *_: None)
        patch.setattr(script, "evaluate", lambda *_: [])
        patch.setattr(script, "save_checkpoint", lambda _, step, state, __, replay: kept.update(state, replay=replay))
        if batch:
            *columns, previous = batch.values()
            before = [*columns[:3], previous, *columns[3:]]
            patch.setattr(script.ReplayBuffer, "sample", lambda self, _: columns if len(self.widths) == 5 else before)
        if losses is not None:
            compute, record = script.set_gradients, lambda loss, network: losses.append((type(network).__name__, loss.detach()))
            patch.setattr(script, "set_gradients", lambda *arguments: (record(*arguments), compute(*arguments)))
        script.train(kept["args"])
    return kept

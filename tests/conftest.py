"""What the tests share: the scripts as modules, a tiny environment, an agent and a batch for it, losses compared."""

import importlib.util
import sys
from types import ModuleType

import gymnasium as gym
import numpy as np
import pytest
import torch
from same_code import ROOT, SCRIPTS

ALL = [str(path.relative_to(ROOT)) for path in SCRIPTS]
OFF_POLICY = [path for path in ALL if "ppo" not in path]
S, B, O, A = 2, 6, 3, 2  # seeds, rows of a batch, sizes of an observation and an action, in make_agent and make_batch
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def float64():
    """For closed forms: rounding would hide a small mistake."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def load_script(path: str) -> ModuleType:
    """A script, named from the root (baselines/td3.py), as a module; loaded once."""
    name = "script_" + path.removesuffix(".py").replace("/", "_")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


class Brief(gym.Env):
    """Episodes of 3 steps that terminate and of 4 that are truncated, by turns; the best action is half the greatest.

    An observation is the episode's parity and the steps since its start.
    """

    observation_space = gym.spaces.Box(-9, 9, (2,), np.float32)
    action_space = gym.spaces.Box(-2, 2, (2,), np.float32)
    parity = 1

    def reset(self, *, seed=None, options=None):
        self.parity = 1 - self.parity
        self.steps = 0
        return np.array([self.parity, 0], np.float32), {}

    def step(self, action):
        self.steps += 1
        reward = -float(np.square(action - 1).sum())
        terminated = self.parity == 0 and self.steps == 3
        truncated = self.parity == 1 and self.steps == 4
        return np.array([self.parity, self.steps], np.float32), reward, terminated, truncated, {}


gym.register("Brief-v0", Brief)


def make_args(path: str, **flags):
    """The script's Args; flags that it lacks are left out."""
    args = load_script(path).Args
    return args(**{name: value for name, value in flags.items() if name in args.__dataclass_fields__})


def make_agent(path: str, **flags):
    """The script's Agent for S seeds; no target network equals the trained one, or a test could not tell them apart."""
    args = make_args(path, **{"num_seeds": S, "batch_size": B, **flags})
    agent = load_script(path).Agent(args, O, A, CPU)
    networks = [module for module in agent.state().values() if isinstance(module, torch.nn.Module)]
    for parameter in [parameter for network in networks for parameter in network.parameters()]:
        if not parameter.requires_grad:
            parameter += 0.02 * torch.randn_like(parameter)
    return agent


def make_batch(path: str):
    """Random transitions for make_agent's agent, some of whose actions saturate; every other one terminates."""
    batch = load_script(path).Batch
    observations = {name: 10 * torch.randn(S, B, O) for name in batch._fields if name.endswith("observations")}
    terminations = torch.arange(B).remainder(2).expand(S, B).float()
    return batch(
        actions=2 * torch.rand(S, B, A) - 1, rewards=torch.randn(S, B), terminations=terminations, **observations
    )


def check_loss(loss: torch.Tensor, expected: torch.Tensor, network: torch.nn.Module) -> None:
    """Two losses [S] are the same, and so are their gradients by the network's parameters."""
    assert loss.shape == (S,)
    options = {"retain_graph": True, "materialize_grads": True}  # 0 where a loss does not depend on a parameter
    gradients = torch.autograd.grad(loss.sum(), network.parameters(), **options)
    expected_gradients = torch.autograd.grad(expected.sum(), network.parameters(), **options)
    torch.testing.assert_close([loss, *gradients], [expected, *expected_gradients])

"""What the tests share: the scripts as modules, an agent and a batch for it, losses compared."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from same_code import ROOT, SCRIPTS

ALL = [str(path.relative_to(ROOT)) for path in SCRIPTS]
OFF_POLICY = [path for path in ALL if "ppo" not in path]
S, B, O, A = 2, 6, 3, 2  # seeds, rows of a batch, sizes of an observation and an action, in make_agent and make_batch
CPU = torch.device("cpu")
sys.path += [str(ROOT), str(ROOT / "baselines")]


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
    """A script, named from the root (baselines/td3.py), as a module."""
    return importlib.import_module(Path(path).stem)


def make_args(path: str, **flags):
    """The script's Args; flags that it lacks are left out."""
    args = load_script(path).Args
    return args(**{name: value for name, value in flags.items() if name in args.__dataclass_fields__})


def make_agent(path: str, **flags):
    """The script's Agent for S seeds; no target network equals the trained one, or a test could not tell them apart."""
    args = make_args(path, **{"num_seeds": S, "batch_size": B, **flags})
    agent = load_script(path).Agent(args, O, A, CPU)
    for parameter in weights(agent):
        if not parameter.requires_grad:
            parameter += 0.02 * torch.randn_like(parameter)
    return agent


def weights(agent) -> list[torch.Tensor]:
    """Of all its networks, targets too, each [S, ...]."""
    networks = [module for module in agent.state().values() if isinstance(module, torch.nn.Module)]
    return [parameter for network in networks for parameter in network.parameters()]


def make_batch(path: str):
    """Random rows for the losses of make_agent's agent; every other transition terminates."""
    batch = load_script(path).Batch
    columns = {name: torch.randn(S, B) for name in batch._fields}
    columns |= {name: 10 * torch.randn(S, B, O) for name in columns if name.endswith("observations")}
    columns["actions"] = 2 * torch.rand(S, B, A) - 1
    if "ppo" in path:
        columns["log_probs"] -= 2  # around those of its first policy
    else:
        columns["terminations"] = torch.arange(B).remainder(2).expand(S, B).float()
    return batch(**columns)


def check_loss(loss: torch.Tensor, expected: torch.Tensor, network: torch.nn.Module) -> None:
    """Two losses [S] are the same, and so are their gradients by the network's parameters."""
    options = {"retain_graph": True, "materialize_grads": True}  # 0 where a loss does not depend on a parameter
    gradients = torch.autograd.grad(loss.sum(), network.parameters(), **options)
    expected_gradients = torch.autograd.grad(expected.sum(), network.parameters(), **options)
    torch.testing.assert_close([loss, *gradients], [expected, *expected_gradients])

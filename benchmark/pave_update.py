"""PAVE's critic update against what one would write first: autograd.grad, once a critic and gradient, eight calls.

    python benchmark/pave_update.py                                  # Walker2d-v5's sizes on a CPU, eager and compiled
    python benchmark/pave_update.py --device cuda --num-threads 8

Both do the same arithmetic: TD loss, MPR, VFC and Curv of both critics, backward and Adam. The updates take turns in one
process; medians. Run it on a machine that does nothing else.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from sweep import load_script
from torch import Tensor, nn


@dataclass
class Options:
    observation_dim: int = 17
    action_dim: int = 6
    hidden_sizes: tuple[int, ...] = (400, 300)
    batch_size: int = 256
    updates: int = 100
    """updates of each kind that are timed"""
    compile: bool = True
    """time torch.compile too"""
    device: Literal["cpu", "cuda"] = "cpu"
    num_threads: int = 1


SIGMA, DELTA, WEIGHTS = 0.01, 1.0, (0.1, 0.1, 0.01)


def batched_update(script, options: Options, compiled: bool = False) -> Callable[[dict[str, Tensor]], None]:
    """The update of td3_pave.py."""
    args = script.Args(hidden_sizes=options.hidden_sizes)
    critic = script.Critic(1, options.observation_dim, options.action_dim, args).to(options.device)
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3, fused=True)

    def critic_gradients(batch: dict[str, Tensor]) -> None:
        geometry = script.critic_geometry(critic, *(batch[name] for name in GEOMETRY_INPUTS), DELTA)
        penalty = sum(weight * loss for weight, loss in zip(WEIGHTS, geometry[:3]))
        script.set_gradients(script.critic_loss(geometry.values, batch["targets"]) + penalty, critic)

    gradients = script.compile_gradients(critic_gradients) if compiled else critic_gradients

    def update(batch: dict[str, Tensor]) -> None:
        gradients(batch)
        optimizer.step()

    return update


GEOMETRY_INPUTS = ("observations", "actions", "next_observations", "noise", "probes")


def separate_update(options: Options) -> Callable[[dict[str, Tensor]], None]:
    """Two torch.nn critics, and one autograd.grad for each of g(s, a), g(s + noise, a), g(s', a) and H v."""
    critics = nn.ModuleList()
    for _ in range(2):
        sizes = itertools.pairwise([options.observation_dim + options.action_dim, *options.hidden_sizes, 1])
        critics.append(nn.Sequential(*[layer for size in sizes for layer in (nn.Linear(*size), nn.SiLU())][:-1]))
    critics.to(options.device)
    optimizer = torch.optim.Adam(critics.parameters(), lr=1e-3, fused=True)

    def update(batch: dict[str, Tensor]) -> None:
        observations, actions, next_observations, noise, probes = (batch[name][0] for name in GEOMETRY_INPUTS)
        actions = actions.clone().requires_grad_(True)
        loss = 0.0
        for critic in critics:

            def gradient(observations: Tensor, critic=critic) -> Tensor:
                values = critic(torch.cat([observations, actions], -1))
                return torch.autograd.grad(values.sum(), actions, create_graph=True)[0]

            here, moved, later = gradient(observations), gradient(observations + noise), gradient(next_observations)
            (hessian_probe,) = torch.autograd.grad((here * probes).sum(), actions, create_graph=True)
            mpr, vfc = F.mse_loss(here, moved), F.mse_loss(here, later)
            curv = F.relu((hessian_probe * probes).sum(-1) + DELTA).mean()
            td_loss = F.mse_loss(critic(torch.cat([observations, actions], -1))[:, 0], batch["targets"][0])
            loss = loss + td_loss + WEIGHTS[0] * mpr + WEIGHTS[1] * vfc + WEIGHTS[2] * curv
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return update


def main(options: Options) -> None:
    torch.set_num_threads(options.num_threads)
    torch.manual_seed(0)
    script = load_script("td3_pave")
    script.keep_freed_memory()
    shape, dims = (1, options.batch_size), {"observations": options.observation_dim, "actions": options.action_dim}
    dims |= {"next_observations": dims["observations"], "noise": dims["observations"], "probes": dims["actions"]}
    batch = {name: torch.randn(*shape, dim, device=options.device) for name, dim in dims.items()}
    batch["noise"] *= SIGMA
    batch["probes"] = batch["probes"].sign()
    batch["targets"] = torch.randn(shape, device=options.device)
    updates = {"autograd.grad, eight calls": separate_update(options), "td3_pave.py, eager": batched_update(script, options)}
    if options.compile:
        updates["td3_pave.py, torch.compile"] = batched_update(script, options, compiled=True)
    times = {name: [] for name in updates}
    for round_ in range(10 + options.updates):  # the first ten compile and warm up
        for name, update in updates.items():
            start = time.perf_counter()
            update(batch)
            if options.device == "cuda":
                torch.cuda.synchronize()
            if round_ >= 10:
                times[name].append(time.perf_counter() - start)
    reference = statistics.median(times["autograd.grad, eight calls"])
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"{median * 1e3:8.2f} ms  {reference / median:5.2f} x  {name}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

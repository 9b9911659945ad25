"""The shape of trained critics, from saved policies: exact Hessians along rollouts, the shift of AMS's target.

    python benchmark/geometry.py runs/Pendulum-v1__td3_pave__*

writes geometry.csv and target_shift.csv into each run's folder, a row for each saved policy and seed; what a file has
already is not computed again. report.py has the tables.

geometry.csv, PAVE's quantities (section "Empirical Validation of the Theory"), of the first critic at (s, a(s)) along
the episodes of the deterministic policy: M_sup, the largest spectral norm of the mixed Hessian; the share of states
with a negative definite action Hessian; the mean cosine of consecutive action gradients, the share of negative ones.

target_shift.csv, for TD3, SAC and AMS: how much less than min_j Q_j(s, mu(s)) its average over AMS's neighbourhood or
TD3's target noise is, at 512 next states of the replay, by the online networks. The algorithms clip the neighbours to
the box [-1, 1]: unclipped is the same without. taylor is what AMS's theorem 3.3 makes of it: for a ReLU critic without
LayerNorm 0, whose curvature is all in its kinks. saturated_actions is the share of mu's components beyond 0.98.

Actions are in normalised units.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import gymnasium as gym
import numpy as np
import pandas as pd
import torch
import tyro
from torch import Tensor

from runs import Run, load_agent, load_policy, load_script, policies, runs_in

# columns of the two files, but for step, seed and states
GEOMETRY = ("M_sup", "negative_definite_rate", "mean_cosine", "flip_rate")
RADII = (0.05, 0.1, 0.2, 0.4, 0.8)
SHIFT = (
    *(f"shift_radius_{radius}" for radius in RADII),
    *(f"unclipped_shift_radius_{radius}" for radius in RADII),
    *("taylor_radius_0.2", "sampling_sd_radius_0.2", "value_sd_over_states", "saturated_actions"),
    *("shift_td3_noise", "unclipped_shift_td3_noise", "sampling_sd_td3_noise"),
)
STATES = 512
DRAWS = 4  # of all neighbours
K = 8  # AMS's number of neighbours
NOISE = 0.2  # TD3's, and its bound
NOISE_CLIP = 0.5


@dataclass
class Networks:
    """What load_agent returns for a run."""

    script: ModuleType
    args: Any
    env: gym.Env
    agent: Any

    def seed_act(self, index: int, observations: Tensor) -> Tensor:
        """The deterministic actions of one seed: [B, O] -> [B, A]."""
        everyone = observations.expand(self.args.num_seeds, -1, -1)
        return self.agent.act(everyone, explore=False)[index]

    def value(self, index: int, twins: slice) -> Callable:
        """The least of some of one seed's critics, as a function of observations [B, O] and actions [B, A] -> [B]."""
        critic = self.agent.critic
        weights = {name: weight[index : index + 1, twins] for name, weight in critic.state_dict().items()}

        def value(observations: Tensor, actions: Tensor) -> Tensor:
            batch = (observations.unsqueeze(0), actions.unsqueeze(0))
            return torch.func.functional_call(critic, weights, batch).squeeze(0).amin(0)

        return value


# ---------------------------------------------------------------------------------------------------- PAVE's quantities


def derivatives(value: Callable, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The action gradient [B, A], mixed Hessian [B, A, O] and action Hessian [B, A, A] of value([B, O], [B, A]) -> [B].

    A row of the batch does not act on another, so one pullback of the batched gradient is row i of everyone's Hessians;
    vmap runs the A of them together.
    """

    def action_gradient(observations: Tensor, actions: Tensor) -> Tensor:
        return torch.func.grad(lambda actions: value(observations, actions).sum())(actions)

    parts = []
    for o, a in zip(observations.split(1000), actions.split(1000)):  # more fall out of a CPU's cache
        gradients, pullback = torch.func.vjp(action_gradient, o, a)
        rows = torch.eye(a.shape[1], dtype=a.dtype).unsqueeze(1).expand(-1, *a.shape)
        mixed, curvature = torch.func.vmap(pullback)(rows)  # [A, B, O], [A, B, A]
        parts.append((gradients, mixed.movedim(0, 1), curvature.movedim(0, 1)))
    gradients, mixed, curvature = zip(*parts)
    return torch.cat(gradients), torch.cat(mixed), torch.cat(curvature)


def geometry(value: Callable, episodes: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """PAVE's quantities of one critic over episodes of (observations [T, O], actions [T, A])."""
    observations = torch.cat([observations for observations, _ in episodes])
    actions = torch.cat([actions for _, actions in episodes])
    gradients, mixed, curvature = derivatives(value, observations, actions)
    cosines = []
    for part in gradients.split([len(actions) for _, actions in episodes]):  # consecutive only within an episode
        cosines.append(torch.cosine_similarity(part[:-1], part[1:], -1, eps=1e-30))
    cosines = torch.cat(cosines)
    return {
        "states": len(observations),
        "M_sup": torch.linalg.matrix_norm(mixed, 2).max().item(),
        "negative_definite_rate": (torch.linalg.eigvalsh(curvature)[:, -1] < 0).float().mean().item(),
        "mean_cosine": cosines.mean().item(),
        "flip_rate": (cosines < 0).float().mean().item(),
    }


def geometry_rows(networks: Networks, envs: gym.vector.VectorEnv, step: int) -> list[dict[str, float]]:
    """Plays the evaluation of this step again, in envs: a row of geometry.csv for each seed."""
    args = networks.args
    visited = []
    taken = []

    def policy(observations: np.ndarray) -> np.ndarray:
        batch = torch.from_numpy(observations.copy())
        actions = networks.agent.act(batch.unflatten(0, (args.num_seeds, -1)), explore=False).flatten(0, 1)
        visited.append(batch)
        taken.append(actions)
        return actions.numpy()

    played = networks.script.evaluate(policy, envs, args, step, networks.env.action_box)
    observations = torch.stack(visited, 1)  # [S * E, T, O]
    actions = torch.stack(taken, 1)
    rows = []
    for index, seed in enumerate(range(args.seed, args.seed + args.num_seeds)):
        episodes = []
        for episode, row in enumerate(played):
            if row["seed"] == seed:
                T = row["length"]
                episodes.append((observations[episode, :T], actions[episode, :T]))
        rows.append({"step": step, "seed": seed, **geometry(networks.value(index, slice(1)), episodes)})
    return rows


# ---------------------------------------------------------------------------------------------- the shift of the target


def target_shift(value: Callable, observations: Tensor, anchor: Tensor) -> dict[str, float]:
    """SHIFT's columns for value(s, a) = min_j Q_j, at observations [B, O] around the actions anchor [B, A].

    shift: the mean over states and draws, each a direction and its opposite, which rids it of most of the draw's noise.
    sampling_sd: of one draw, for the neighbourhood the mean over K directions; the root mean square over states.
    """
    B, A = anchor.shape
    M = max(A, K)
    sample_directions = load_script("td3_ams").sample_directions

    def values(offsets: Tensor, clip: bool) -> Tensor:
        """offsets [B, M, A] -> [B, M]."""
        actions = anchor.unsqueeze(1) + offsets
        if clip:
            actions = actions.clamp(-1, 1)
        repeated = observations.repeat_interleave(offsets.shape[1], 0)
        return value(repeated, actions.flatten(0, 1)).unflatten(0, (B, -1))

    center = value(observations, anchor).unsqueeze(1)  # [B, 1]
    laplacian = derivatives(value, observations, anchor)[2].diagonal(dim1=1, dim2=2).sum(1).mean().item()
    found = {
        "value_sd_over_states": center.std().item(),
        "saturated_actions": (anchor.abs() > 0.98).float().mean().item(),
        "taylor_radius_0.2": -(0.2**2) / (2 * A) * laplacian,
    }

    def measure(name: str, draws: Tensor, averaged: int) -> None:
        """draws [DRAWS, B, M, A]."""
        for prefix, clip in (("", True), ("unclipped_", False)):
            there = torch.stack([values(offsets, clip) for offsets in draws])
            back = torch.stack([values(-offsets, clip) for offsets in draws])
            found[f"{prefix}shift_{name}"] = (center - (there + back) / 2).mean().item()
            found[f"{prefix}sampling_sd_{name}"] = there[..., :averaged].mean(-1).var(0).mean().sqrt().item()

    directions = torch.stack([sample_directions((B,), A, M, anchor.device) for _ in range(DRAWS)])
    for radius in RADII:
        measure(f"radius_{radius}", radius * directions, averaged=K)
    noise = (NOISE * torch.randn(DRAWS, B, M, A)).clamp(-NOISE_CLIP, NOISE_CLIP)
    measure("td3_noise", noise, averaged=1)
    return {name: found[name] for name in SHIFT}


def target_shift_rows(networks: Networks, replay: Tensor, step: int) -> list[dict[str, float]]:
    """A row of target_shift.csv for each seed; replay [S, transitions, width]."""
    torch.manual_seed(0)  # the same states for every policy
    O = networks.env.observation_space.shape[0]
    A = networks.env.action_space.shape[0]
    widths = (O, A, O, 1, 1)  # of Batch's columns
    rows = replay[:, torch.randint(replay.shape[1], (STATES,))]
    next_observations = networks.script.Batch(*rows.split(widths, -1)).next_observations
    found = []
    for index, observations in enumerate(next_observations):
        anchor = networks.seed_act(index, observations)
        shift = target_shift(networks.value(index, slice(2)), observations, anchor)
        found.append({"step": step, "seed": networks.args.seed + index, **shift})
    return found


# ------------------------------------------------------------------------------------------------------------- the runs


@dataclass
class Options:
    runs: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs"),)  # runs, or folders of runs

    def __post_init__(self):
        if not runs_with_critics(self):
            raise ValueError(f"no saved critic in {', '.join(map(str, self.runs))}")


def runs_with_critics(options: Options) -> list[Run]:
    """PPO's critic knows no actions."""
    return [run for run in runs_in(options.runs) if run.args["script"] != "ppo" and policies(run)]


def extend(path: Path, run: Run, networks: Networks, columns: tuple[str, ...], measure: Callable) -> None:
    """Adds to a CSV the rows of those policies that it lacks; one with other columns is made anew."""
    table = pd.DataFrame({"step": []})
    if path.exists():
        old = pd.read_csv(path)
        if {"step", "seed", *columns} <= set(old):
            table = old
    for step, policy in policies(run).items():
        if step in set(table.step):
            continue
        load_policy(networks.agent, policy)
        rows = pd.DataFrame(measure(step))
        table = pd.concat([table, rows]) if len(table) else rows
        table.to_csv(path, index=False)
        means = rows[list(columns)].mean()
        print(f"{path}, step {step}: {columns[0]} {means.iloc[0]:.3g}", flush=True)


def main(options: Options) -> None:
    runs = runs_with_critics(options)
    for run in runs:
        try:
            networks = Networks(*load_agent(run))
        except (ImportError, OSError, gym.error.Error) as error:  # its environment or its script is not here
            print(f"{run.folder}: passed over ({type(error).__name__}: {error})", file=sys.stderr)
            continue
        args = networks.args
        count = args.num_seeds * args.eval_episodes
        envs = networks.script.make_envs(args, networks.script.start_seeds(args, 0, 1, count))
        extend(run.folder / "geometry.csv", run, networks, GEOMETRY, lambda step: geometry_rows(networks, envs, step))
        envs.close()
        networks.script.end_workers()  # what did not close
        if run.args["script"] in ("td3", "sac", "td3_ams", "sac_ams") and (run.folder / "replay.pt").exists():
            replay = torch.load(run.folder / "replay.pt", weights_only=True, mmap=True)["rows"].flatten(1, 2)
            if replay.shape[1]:  # a young run's is empty
                extend(
                    run.folder / "target_shift.csv",
                    run,
                    networks,
                    SHIFT,
                    lambda step: target_shift_rows(networks, replay, step),
                )
        networks.env.close()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

"""The shape of trained critics: exact Hessians along deterministic rollouts (PAVE, "Empirical Validation of the Theory").

    python benchmark/geometry.py                      # every run in runs/ -> report/geometry.csv, report/figures/surface_*.png
    python benchmark/geometry.py --checkpoints 0      # the final policies only

For each policy: M_sup, the largest spectral norm of the mixed Hessian over the visited states; the share of states where the
action Hessian is negative definite; the mean cosine of consecutive action gradients, and the share of negative ones. All of the
first critic, at (s, a(s)), actions in normalised units. What is in geometry.csv already is not computed again.
"""

import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
import sweep
import torch
import tyro
from sweep import Run, UserError
from torch import Tensor, nn

matplotlib.use("agg")
import matplotlib.pyplot as plt

COLUMNS = ["run", "script", "env_id", "step", "seed", "states", "M_sup", "negative_definite_rate", "mean_cosine", "flip_rate"]
ROWS = 1000  # states at once: larger batches fall out of a CPU's cache


class Policy(NamedTuple):
    """The networks of a run, S seeds side by side, as they were at a step."""

    script: ModuleType
    args: Any
    actor: nn.Module
    critic: nn.Module
    step: int

    def act(self, observations: Tensor) -> Tensor:
        """The deterministic action: observations [S, B, O] -> [S, B, A] in [-1, 1]."""
        output = self.actor(observations)
        if isinstance(output, tuple):  # SAC's mean and log standard deviation
            return torch.tanh(output[0])
        return output

    def member(self, index: int) -> "Policy":
        """One seed alone, S = 1."""
        args = dataclasses.replace(self.args, seed=self.args.seed + index, num_seeds=1)
        alone = []
        for network in (self.actor, self.critic):
            state = {name: value[index : index + 1] for name, value in network.state_dict().items()}
            alone.append(build(type(network), args, state))
        return self._replace(args=args, actor=alone[0], critic=alone[1])


def build(network: type[nn.Module], args: Any, state: dict[str, Tensor]) -> nn.Module:
    """The network whose parameters are state; the observation and action sizes are read off it."""
    action_dim = SPECS[args.env_id].action_dim
    module = network(args.num_seeds, SPECS[args.env_id].observation_dim, action_dim, args)
    module.load_state_dict(state)
    return module.requires_grad_(False)


SPECS: dict[str, Any] = {}  # EnvSpec of each environment seen


def load_policy(run: Run, path: Path) -> Policy:
    """The networks of policies/step_*.pt, built by the run's own script; raises UserError if they cannot be."""
    script = sweep.load_script(run.args["script"])
    try:
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in run.args.items() if key != "script"}
        args = script.Args(**values)
        if args.env_id not in SPECS:
            SPECS[args.env_id] = script.read_env_spec(args.env_id)
        state = torch.load(path, map_location="cpu", weights_only=True)
        actor, critic = (
            build(network, args, state[name]) for name, network in (("actor", script.Actor), ("critic", script.Critic))
        )
    except (TypeError, KeyError, RuntimeError, OSError, EOFError, script.UserError) as error:
        raise UserError(f"{path} cannot be loaded by {run.args['script']}.py: {str(error).splitlines()[0]}") from None
    return Policy(script, args, actor, critic, int(path.stem.removeprefix("step_")))


def hessians(critic: nn.Module, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Exact derivatives of the first critic, all states at once: observations [S, B, O], actions [S, B, A] ->
    action gradient [S, B, A], mixed Hessian [S, B, A, O] and action Hessian [S, B, A, A].

    States do not interact in a critic, so one pullback of the batched action gradient gives row i of every state's Hessians;
    vmap runs the A rows together.
    """

    def action_gradient(observations: Tensor, actions: Tensor) -> Tensor:
        return torch.func.grad(lambda a: critic(observations, a, slice(1)).sum())(actions)

    gradients, pullback = torch.func.vjp(action_gradient, observations, actions)
    action_dim = actions.shape[-1]
    rows = torch.eye(action_dim, dtype=actions.dtype).view(action_dim, 1, 1, action_dim).expand(-1, *gradients.shape)
    mixed, curvature = torch.func.vmap(pullback)(rows)  # [A, S, B, O], [A, S, B, A]
    return gradients, mixed.movedim(0, -2), curvature.movedim(0, -2)


class Geometry(NamedTuple):
    """What the papers' tables need of B states: gradients [B, A], M [B], the largest eigenvalue of the action Hessian [B]."""

    gradients: Tensor
    mixed_norms: Tensor
    largest_curvatures: Tensor


def measure(critic: nn.Module, observations: Tensor, actions: Tensor) -> Geometry:
    """The critic of one seed at observations [B, O], actions [B, A]."""
    parts = []
    for o, a in zip(observations.split(ROWS), actions.split(ROWS)):
        gradients, mixed, curvature = (part[0] for part in hessians(critic, o.unsqueeze(0), a.unsqueeze(0)))
        parts.append((gradients, torch.linalg.matrix_norm(mixed, 2), torch.linalg.eigvalsh(curvature)[..., -1]))
    return Geometry(*map(torch.cat, zip(*parts)))


class Rollout(NamedTuple):
    """One deterministic episode of one seed: observations [T, O], actions [T, A]."""

    seed_index: int
    observations: Tensor
    actions: Tensor


@torch.no_grad()
def rollouts(policy: Policy) -> list[Rollout]:
    """The episodes that the run's evaluation at this step consisted of, played again: S * eval_episodes of them."""
    observations, actions = [], []

    def act(batch: Tensor) -> Tensor:
        observations.append(batch.clone())
        actions.append(policy.act(batch))
        return actions[-1]

    script, args, spec = policy.script, policy.args, SPECS[policy.args.env_id]
    envs = script.make_vector_env(args, spec, args.num_seeds * args.eval_episodes)
    try:
        episodes = script.evaluate(act, envs, spec, args, policy.step, lambda: False)
    except script.TrainingFault as fault:
        raise UserError(str(fault)) from None
    finally:
        envs.close()
    stacked = [torch.stack(steps, 2).flatten(0, 1) for steps in (observations, actions)]  # [S * E, T, .]
    lengths = [episode.length for episode in episodes]
    return [Rollout(i // args.eval_episodes, *(part[i, :length] for part in stacked)) for i, length in enumerate(lengths)]


def geometry_rows(run: Run, policy: Policy) -> list[dict[str, Any]]:
    """A row of geometry.csv for each seed."""
    rows, episodes = [], rollouts(policy)
    for index in range(policy.args.num_seeds):
        mine = [episode for episode in episodes if episode.seed_index == index]
        states, actions = (torch.cat([getattr(episode, name) for episode in mine]) for name in ("observations", "actions"))
        found = measure(policy.member(index).critic, states, actions)
        parts = found.gradients.split([len(episode.actions) for episode in mine])  # consecutive only within an episode
        cosines = torch.cat([torch.cosine_similarity(part[:-1], part[1:], -1, eps=1e-30) for part in parts])
        row = {"run": run.folder.name, "script": run.args["script"], "env_id": policy.args.env_id, "step": policy.step}
        row |= {"seed": policy.args.seed + index, "states": len(states), "M_sup": found.mixed_norms.max().item()}
        row |= {"negative_definite_rate": (found.largest_curvatures < 0).float().mean().item()}
        row |= {"mean_cosine": cosines.mean().item(), "flip_rate": (cosines < 0).float().mean().item()}
        rows.append(row)
    return rows


def chosen_policies(run: Run, count: int) -> list[Path]:
    """The last policies/step_*.pt of a run, and count others spread evenly over those with updates behind them."""
    start = run.args.get("learning_starts", 0)
    paths = sorted(run.folder.glob("policies/step_*.pt"))
    trained = [path for path in paths if int(path.stem.removeprefix("step_")) > start]
    indices = {round(i * (len(trained) - 1) / max(count, 1)) for i in range(count)} | {len(trained) - 1} if trained else set()
    return [trained[index] for index in sorted(indices)]


SIDE, STATE_REACH, ACTION_REACH = 50, 1.0, 1.5


@torch.no_grad()
def surfaces(policies: dict[str, Policy]) -> dict[str, np.ndarray] | None:
    """M on a SIDE x SIDE sweep of one state and one action dimension, for the first seed of each method.

    The state is the one that Base reaches after 20 steps; the two dimensions are those of the largest mixed partial of Base's
    critic there. Each method is swept around its own action. None without Base.
    """
    if "base" not in policies:
        return None
    base = policies["base"].member(0)
    env = base.script.make_env(base.args.env_id)
    observation, _ = env.reset(seed=base.args.seed)
    for _ in range(20):
        observation, _, terminated, truncated, _ = env.step(base.act(torch.from_numpy(observation)[None, None])[0, 0].numpy())
        if terminated or truncated:
            break
    env.close()
    state = torch.from_numpy(observation)[None, None]
    mixed = hessians(base.critic, state, base.act(state))[1][0, 0]
    action_dim, state_dim = divmod(mixed.abs().argmax().item(), mixed.shape[1])
    found = {"state": state_dim, "action": action_dim}
    for name, policy in policies.items():
        member = policy.member(0)
        observations = state[0].repeat(SIDE * SIDE, 1)
        actions = member.act(state)[0].repeat(SIDE * SIDE, 1)
        observations[:, state_dim] += torch.linspace(-STATE_REACH, STATE_REACH, SIDE).repeat_interleave(SIDE)
        actions[:, action_dim] += torch.linspace(-ACTION_REACH, ACTION_REACH, SIDE).repeat(SIDE)
        found[name] = measure(member.critic, observations, actions).mixed_norms.view(SIDE, SIDE).numpy()
    return found


def draw_surfaces(suite: str, runs: list[Run], path: Path) -> bool:
    """The paper's grid of surfaces, environments down and methods across; panels without a run stay empty."""
    cells = sweep.SUITES[suite]
    methods = list(dict.fromkeys(cell.method for cell in cells))
    grid = {}
    for env_id in sweep.PAVE_ENVS:
        policies = {}
        for cell in cells:
            for run in runs:
                if cell.env_id == env_id and sweep.is_of(run, cell) and (paths := chosen_policies(run, 0)):
                    policies[cell.method] = load_policy(run, paths[-1])  # the newest one stays
        if found := surfaces(policies):
            grid[env_id] = found
    if not grid:
        return False
    size = (2.9 * len(methods), 2.6 * len(grid) + 1.0)
    figure, axes = plt.subplots(len(grid), len(methods), figsize=size, subplot_kw={"projection": "3d"}, squeeze=False)
    backbone = "TD3" if suite == "pave-table-1" else "SAC"
    figure.suptitle(f"Spectral norm M of the mixed Hessian, {backbone} critics (height and colour; a row shares its scale)")
    x, y = np.meshgrid(
        np.linspace(-STATE_REACH, STATE_REACH, SIDE), np.linspace(-ACTION_REACH, ACTION_REACH, SIDE), indexing="ij"
    )
    for row, (env_id, found) in zip(axes, grid.items()):
        top = float(np.percentile(found["base"], 99))
        for axis, method in zip(row, methods):
            axis.set_title(f"{env_id}\n{method.upper() if method != 'base' else 'Base'}", fontsize=9)
            if method not in found:
                axis.set_axis_off()
                axis.text2D(0.5, 0.5, "no run", transform=axis.transAxes, ha="center", color="0.5")
                continue
            axis.plot_surface(
                x,
                y,
                found[method].clip(max=top),
                cmap="viridis",
                vmin=0,
                vmax=top,
                rstride=1,
                cstride=1,
                lw=0,
                antialiased=False,
            )
            axis.set_zlim(0, top)
            axis.set_xlabel(f"state[{found['state']}] offset", fontsize=7, labelpad=-4)
            axis.set_ylabel(f"action[{found['action']}] offset", fontsize=7, labelpad=-4)
            axis.set_zlabel("M", fontsize=7, labelpad=-6)
            axis.set_xticks((-STATE_REACH, 0, STATE_REACH))
            axis.set_yticks((-ACTION_REACH, 0, ACTION_REACH))
            axis.tick_params(labelsize=6, pad=-2)
    figure.subplots_adjust(left=0.02, right=0.96, top=1 - 0.75 / size[1], bottom=0.3 / size[1], wspace=0.12, hspace=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


@dataclass
class Options:
    runs: Path = Path("runs")
    """the folder of runs"""
    output: Path = Path("report")
    """where geometry.csv and figures/ go"""
    checkpoints: int = 10
    """earlier policies of each run that are measured too, evenly spread over training"""
    threads: int = 1
    """PyTorch's CPU threads"""


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    runs = [run for run in sweep.read_runs(options.runs) if run.args.get("script") != "ppo"]  # PPO has no action value
    if not runs:
        raise UserError(
            f"{options.runs} holds no runs with a Q-function; train some first: python benchmark/sweep.py pave-table-1"
        )
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "geometry.csv"
    known = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=COLUMNS)
    known = known[known["run"].isin([run.folder.name for run in runs])]
    done = set(zip(known["run"], known["step"]))
    rows, failures = known.to_dict("records"), 0
    for run in runs:
        for policy_path in chosen_policies(run, options.checkpoints):
            step = int(policy_path.stem.removeprefix("step_"))
            if (run.folder.name, step) in done:
                continue
            try:
                new = geometry_rows(run, load_policy(run, policy_path))
            except UserError as error:
                print(f"passed over: {error}", file=sys.stderr)
                failures += 1
                continue
            rows += new
            mean = {name: math.fsum(row[name] for row in new) / len(new) for name in COLUMNS[6:]}
            print(
                f"{run.folder.name} step {step}:", ", ".join(f"{name} {value:.4g}" for name, value in mean.items()), flush=True
            )
            pd.DataFrame(rows, columns=COLUMNS).to_csv(path, index=False)
    print(f"wrote {path} ({len(rows)} rows)")
    for suite, name in (("pave-table-1", "surface_td3.png"), ("pave-table-2", "surface_sac.png")):
        if draw_surfaces(suite, runs, options.output / "figures" / name):
            print(f"wrote {options.output / 'figures' / name}")
    if failures and not rows:
        raise SystemExit("no policy could be measured")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except UserError as error:
        print(f"geometry.py: {error}", file=sys.stderr)
        sys.exit(2)

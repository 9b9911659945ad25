"""The shape of trained critics, from saved policies: exact Hessians along rollouts, and how far smoothing moves the target.

    python benchmark/geometry.py runs/Pendulum-v1__td3_pave__*

writes geometry.csv and target_shift.csv into each run's folder, and report/surface_*.png, which report.py shows.
geometry.csv, PAVE's quantities (section "Empirical Validation of the Theory"), of the first critic at (s, a(s)) along the
episodes of the deterministic policy: M_sup, the largest spectral norm of the mixed Hessian; the share of states with a negative
definite action Hessian; the mean cosine of consecutive action gradients, and the share of negative ones.
target_shift.csv, for TD3, SAC and AMS: how far AMS's neighbourhood and TD3's target noise move min_j Q_j(s, mu(s)), over 512
next states of the replay, with the online networks. taylor is what AMS's theorem 3.3 makes of the neighbourhood's shift: for a
ReLU critic without LayerNorm 0, whose curvature is all in its kinks.
Actions are in normalised units. A row for each saved policy and seed; what a file has already is not computed again.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import torch
import tyro
from suites import PAVE_METHODS, Run, is_of, load_script, pave_cell, read_runs
from torch import Tensor

matplotlib.use("agg")
import matplotlib.pyplot as plt


def runs_in(paths: Iterable[Path]) -> list[Run]:
    """The evaluated runs at paths: a run's folder, or a folder of them."""
    found = [run for path in paths for run in read_runs(path.parent if (path / "args.json").exists() else path)]
    return [run for run in found if {run.folder, run.folder.parent} & set(paths) and (run.folder / "eval.csv").exists()]


class Networks:
    """Actor and critic of a run, S seeds side by side, and its environment; load gives them the weights of a saved policy."""

    def __init__(self, run: Run):
        self.script = load_script(run.args["script"])
        self.args = self.script.Args(**{name: value for name, value in run.args.items() if name != "script"})
        self.env = self.script.make_env(self.args.env_id)
        sizes = (self.args.num_seeds, *self.env.observation_space.shape, *self.env.action_space.shape)
        self.actor = self.script.Actor(*sizes).requires_grad_(False)
        layer_norm = [self.args.layer_norm] if hasattr(self.args, "layer_norm") else []
        self.critic = self.script.Critic(*sizes, *layer_norm).requires_grad_(False)

    def load(self, path: Path) -> None:
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.actor.load_state_dict(state["actor"])
        self.critic.load_state_dict(state["critic"])

    def act(self, observations: Tensor) -> Tensor:
        """The deterministic action: [S, B, O] -> [S, B, A]."""
        output = self.actor(observations)
        return output if isinstance(output, Tensor) else output[0].tanh()  # SAC: mean, log standard deviation

    def seed_act(self, index: int, observations: Tensor) -> Tensor:
        """The action of one seed: [B, O] -> [B, A]."""
        return self.act(observations.expand(self.args.num_seeds, -1, -1))[index]

    def value(self, index: int, twins: slice) -> Callable:
        """The least of some of one seed's critics, as a function of observations [B, O] and actions [B, A] -> [B]."""
        weights = {name: weight[index : index + 1, twins] for name, weight in self.critic.state_dict().items()}
        return lambda o, a: torch.func.functional_call(self.critic, weights, (o[None], a[None]))[0].amin(0)


def derivatives(value: Callable, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """value([B, O], [B, A]) -> [B], at observations [B, O] and actions [B, A]: the exact action gradient [B, A], mixed Hessian
    [B, A, O] and action Hessian [B, A, A].

    A row of the batch does not act on another, so one pullback of the batched gradient is row i of everyone's Hessians; vmap
    runs the A of them together.
    """

    def action_gradient(observations: Tensor, actions: Tensor) -> Tensor:
        return torch.func.grad(lambda a: value(observations, a).sum())(actions)

    parts = []
    for o, a in zip(observations.split(1000), actions.split(1000)):  # more fall out of a CPU's cache
        gradients, pullback = torch.func.vjp(action_gradient, o, a)
        rows = torch.eye(a.shape[1], dtype=a.dtype).unsqueeze(1).expand(-1, *a.shape)
        mixed, curvature = torch.func.vmap(pullback)(rows)  # [A, B, O], [A, B, A]
        parts.append((gradients, mixed.movedim(0, 1), curvature.movedim(0, 1)))
    return tuple(map(torch.cat, zip(*parts)))


def geometry(value: Callable, episodes: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """PAVE's quantities of one critic over episodes of (observations [T, O], actions [T, A])."""
    observations, actions = map(torch.cat, zip(*episodes))
    gradients, mixed, curvature = derivatives(value, observations, actions)
    parts = gradients.split([len(actions) for _, actions in episodes])  # consecutive only within an episode
    cosines = torch.cat([torch.cosine_similarity(part[:-1], part[1:], -1, eps=1e-30) for part in parts])
    return {
        "states": len(observations),
        "M_sup": torch.linalg.matrix_norm(mixed, 2).max().item(),
        "negative_definite_rate": (torch.linalg.eigvalsh(curvature)[:, -1] < 0).float().mean().item(),
        "mean_cosine": cosines.mean().item(),
        "flip_rate": (cosines < 0).float().mean().item(),
    }


def geometry_rows(networks: Networks, envs: Any, step: int) -> list[dict[str, float]]:
    """Plays the evaluation of this step again, in envs: a row of geometry.csv for each seed."""
    args, visited = networks.args, []

    def policy(observations: np.ndarray) -> np.ndarray:
        batch = torch.from_numpy(observations.copy())
        actions = networks.act(batch.unflatten(0, (args.num_seeds, -1))).flatten(0, 1)
        visited.append((batch, actions))
        return actions.numpy()

    played = networks.script.evaluate(policy, envs, args, step, networks.env.unwrapped.action_space)
    observations, actions = (torch.stack(part, 1) for part in zip(*visited))  # [S * E, T, .]
    lengths = [row[5] for row in played]
    episodes = [(o[:length], a[:length]) for o, a, length in zip(observations, actions, lengths)]
    E, rows = args.eval_episodes, []
    for index in range(args.num_seeds):
        found = geometry(networks.value(index, slice(1)), episodes[index * E : (index + 1) * E])
        rows.append({"step": step, "seed": args.seed + index, **found})
    return rows


STATES, DRAWS, K, NOISE, CLIP = 512, 8, 8, 0.2, 0.5  # AMS's neighbours; TD3's target noise and its clip
RADII = (0.2, 0.8)


def target_shift(value: Callable, observations: Tensor, anchor: Tensor) -> dict[str, float]:
    """How much less than min_j Q_j(s, mu) its average around mu is: value(s, a) is that minimum, observations [B, O], anchor mu
    [B, A].

    shift: the mean over states and draws (a direction and its opposite: that rids it of most of the draw's noise).
    sampling_sd: of one draw, for the neighbourhood the mean over K directions; the root mean square over states.
    """
    B, A = anchor.shape
    sample_directions = load_script("td3_ams").sample_directions

    def values(offsets: Tensor) -> Tensor:
        """offsets [B, M, A] -> min_j Q_j [B, M]."""
        actions = (anchor.unsqueeze(1) + offsets).clamp(-1, 1)
        return value(observations.repeat_interleave(offsets.shape[1], 0), actions.flatten(0, 1)).unflatten(0, (B, -1))

    def moved(draw: Callable, averaged: int) -> tuple[float, float]:
        forth, back, draws = 0.0, 0.0, []
        for _ in range(DRAWS):
            offsets = draw()
            there = values(offsets)
            draws.append(there[:, :averaged].mean(1))
            forth, back = forth + there.mean().item() / DRAWS, back + values(-offsets).mean().item() / DRAWS
        return center.mean().item() - (forth + back) / 2, torch.stack(draws).var(0).mean().sqrt().item()

    center = values(torch.zeros(B, 1, A)).squeeze(1)
    laplacian = derivatives(value, observations, anchor)[2].diagonal(dim1=1, dim2=2).sum(1)
    found = {"value_sd_over_states": center.std().item()}
    for radius in RADII:
        shift, sd = moved(lambda: radius * sample_directions((B,), A, max(A, K), torch.device("cpu")), K)
        found |= {f"shift_radius_{radius}": shift, f"taylor_radius_{radius}": -(radius**2) / (2 * A) * laplacian.mean().item()}
        found |= {f"sampling_sd_radius_{radius}": sd}
    shift, sd = moved(lambda: (NOISE * torch.randn(B, max(A, K), A)).clamp(-CLIP, CLIP), 1)
    return found | {"shift_td3_noise": shift, "sampling_sd_td3_noise": sd}


def target_shift_rows(networks: Networks, replay: Tensor, step: int) -> list[dict[str, float]]:
    """A row of target_shift.csv for each seed; replay [S, transitions, width]."""
    torch.manual_seed(0)  # the same states for every policy
    O, A = networks.env.observation_space.shape[0], networks.env.action_space.shape[0]
    next_observations = replay[:, torch.randint(replay.shape[1], (STATES,)), O + A : O + A + O]
    rows = []
    for index, observations in enumerate(next_observations):
        found = target_shift(networks.value(index, slice(2)), observations, networks.seed_act(index, observations))
        rows.append({"step": step, "seed": networks.args.seed + index, **found})
    return rows


def policies(run: Run) -> dict[int, Path]:
    return {int(path.stem.removeprefix("step_")): path for path in sorted(run.folder.glob("policies/step_*.pt"))}


def extend(path: Path, networks: Networks, saved: dict[int, Path], measure: Callable) -> None:
    """Adds to a CSV the rows of those policies that it lacks."""
    table = pd.read_csv(path) if path.exists() else pd.DataFrame({"step": []})
    for step, policy in saved.items():
        if step not in set(table["step"]):
            networks.load(policy)
            new = pd.DataFrame(measure(step))
            table = pd.concat([table, new]) if len(table) else new
            table.to_csv(path, index=False)
            print(f"{path}, step {step}:", *(f"{name} {value:.3g}" for name, value in new.mean().iloc[2:].items()), flush=True)


SIDE, STATE_REACH, ACTION_REACH = 50, 1.0, 1.5  # of the paper's sweep


def surfaces(runs: dict[str, Run]) -> tuple[int, int, list[np.ndarray]]:
    """M over a sweep of one state and one action dimension for the first seed's last policy of each run; also the dimensions.

    The state is the one that the first run (Base) reaches after 20 steps, the dimensions are those of the largest mixed partial
    of its critic there; each is swept around its own action.
    """
    state, found = None, []
    for run in runs.values():
        networks = Networks(run)
        networks.load(list(policies(run).values())[-1])
        if state is None:
            observation, _ = networks.env.reset(seed=networks.args.seed)
            for _ in range(20):
                action = networks.seed_act(0, torch.from_numpy(observation)[None])[0].numpy()
                observation, _, terminated, truncated, _ = networks.env.step(action)
                if terminated or truncated:
                    break
            state = torch.from_numpy(observation)[None]
            mixed = derivatives(networks.value(0, slice(1)), state, networks.seed_act(0, state))[1][0]
            action_dim, state_dim = divmod(mixed.abs().argmax().item(), mixed.shape[1])
        observations, actions = state.repeat(SIDE**2, 1), networks.seed_act(0, state).repeat(SIDE**2, 1)
        observations[:, state_dim] += torch.linspace(-STATE_REACH, STATE_REACH, SIDE).repeat_interleave(SIDE)
        actions[:, action_dim] += torch.linspace(-ACTION_REACH, ACTION_REACH, SIDE).repeat(SIDE)
        mixed = derivatives(networks.value(0, slice(1)), observations, actions)[1]
        found.append(torch.linalg.matrix_norm(mixed, 2).view(SIDE, SIDE).numpy())
    return state_dim, action_dim, found


def draw_surfaces(env_id: str, backbone: str, runs: dict[str, Run], folder: Path) -> None:
    state_dim, action_dim, found = surfaces(runs)
    top = float(np.percentile(found[0], 99))
    x, y = (np.linspace(-reach, reach, SIDE) for reach in (STATE_REACH, ACTION_REACH))
    size = (max(3.3 * len(runs), 4.2), 3.6)
    figure, axes = plt.subplots(1, len(runs), figsize=size, subplot_kw={"projection": "3d"}, squeeze=False)
    for axis, name, surface in zip(axes[0], runs, found):
        plane = np.meshgrid(x, y, indexing="ij")
        axis.plot_surface(
            *plane, surface.clip(max=top), cmap="viridis", vmin=0, vmax=top, rcount=SIDE, ccount=SIDE, antialiased=False
        )
        axis.set_title("Base" if name == "base" else name.upper(), y=0.98)
        axis.set(xlabel=f"state[{state_dim}]", ylabel=f"action[{action_dim}]", zlim=(0, top))
        axis.set(xticks=(-STATE_REACH, 0, STATE_REACH), yticks=(-ACTION_REACH, 0, ACTION_REACH))
        axis.tick_params(labelsize=7, pad=-2)
    figure.suptitle(f"{env_id}, {backbone.upper()}: norm of the mixed Hessian", fontsize=11)
    figure.subplots_adjust(left=0.02, right=0.94, top=0.9, bottom=0.06, wspace=0.12)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"surface_{env_id}_{backbone}.png"
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(path)


@dataclass
class Options:
    runs: tyro.conf.Positional[tuple[Path, ...]] = (Path("runs"),)  # runs, or folders of runs
    output: Path = Path("report")  # where the surface figures go

    def __post_init__(self):
        if not any(policies(run) for run in runs_in(self.runs) if run.args["script"] != "ppo"):
            raise ValueError(f"no saved critic in {', '.join(map(str, self.runs))}")  # PPO's knows no actions


def main(options: Options) -> None:
    runs = [run for run in runs_in(options.runs) if run.args["script"] != "ppo" and policies(run)]
    for run in runs:
        networks, saved = Networks(run), policies(run)
        envs = networks.script.make_envs(networks.args.env_id, networks.args.num_seeds * networks.args.eval_episodes)
        extend(run.folder / "geometry.csv", networks, saved, lambda step: geometry_rows(networks, envs, step))
        envs.close()
        if (run.folder / "replay.pt").exists() and run.args["script"] in ("td3", "sac", "td3_ams", "sac_ams"):
            replay = torch.load(run.folder / "replay.pt", weights_only=True, mmap=True)["rows"].flatten(1, 2)
            extend(run.folder / "target_shift.csv", networks, saved, lambda step: target_shift_rows(networks, replay, step))
    for env_id in dict.fromkeys(run.args["env_id"] for run in runs):
        for backbone in ("td3", "sac"):
            cells = {method: pave_cell(backbone, method, env_id) for method in PAVE_METHODS}  # Base first
            shown = {method: run for method, cell in cells.items() for run in runs if is_of(run, cell)}
            if shown:
                draw_surfaces(env_id, backbone, shown, options.output)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

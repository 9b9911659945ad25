"""Watches a saved policy, or two side by side: score, film, figure.

    python benchmark/play.py runs/NAME --seed 3 --step 50000 --episodes 10
    python benchmark/play.py runs/BASE runs/PAVE --film --plot

Prints return, length, smoothness and action fluctuation, mean and standard deviation over episodes: first those of eval.csv, a
second run from the same start states. --film and --plot show the first one: play_*.mp4 and play_*.png in the run's folder.
"""

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple, NoReturn

import gymnasium as gym
import imageio.v2 as imageio
import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from torch import Tensor, nn

sys.path += [str(Path(__file__).resolve().parents[1] / folder) for folder in ("", "baselines")]  # the scripts


@dataclass
class Args:
    run: tyro.conf.Positional[Path]  # its folder
    beside: tyro.conf.Positional[Path | None] = None  # a second run's, of the same environment
    seed: int | None = None  # of the run's seeds; its first
    step: int | None = None  # of the run's saved policies; the last
    episodes: int = 10
    film: bool = False  # an mp4, in real time; the second run is on the right
    plot: bool = False  # a png: actions, their spectrum, the score
    track: bool = False  # upload the film to the run's own Weights & Biases page

    def __post_init__(self):
        if self.episodes < 1:
            raise ValueError(f"--episodes {self.episodes}: at least 1")


def fail(message: str) -> NoReturn:
    """A user's mistake: one line, exit status 2."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)


class Policy(nn.Module):
    """One seed's deterministic policy: observations [B, O] -> actions [B, A] in the environment's own units."""

    def __init__(self, actor: nn.Module, box: gym.spaces.Box):
        super().__init__()
        self.actor = actor.float().requires_grad_(False)  # PPO keeps its statistics in float64
        self.low, self.high = torch.from_numpy(box.low).float(), torch.from_numpy(box.high).float()

    def forward(self, observations: Tensor) -> Tensor:
        output = self.actor(observations.unsqueeze(0))  # SAC's: mean, log_std
        actions = output.clamp(-1, 1) if isinstance(output, Tensor) else output[0].tanh()
        return self.low + (actions.squeeze(0) + 1) / 2 * (self.high - self.low)


class Run(NamedTuple):
    folder: Path
    args: dict  # of args.json
    env: gym.Env  # as the script makes it: actions in [-1, 1]
    dt: float  # seconds a step
    policy: Policy
    seed: int
    step: int
    smoothness: Callable[[np.ndarray], float]  # the script's


def load_run(folder: Path, seed: int | None = None, step: int | None = None, film: bool = False) -> Run:
    """One seed's policy at one step, by the script that trained it. None: the first seed, the last step."""
    try:
        args = json.loads((folder / "args.json").read_text())
        script = importlib.import_module(args["script"])
    except (OSError, ValueError, ImportError) as error:
        fail(f"{folder}: not a run of these scripts ({error})")
    seeds = range(args["seed"], args["seed"] + args["num_seeds"])
    seed = seeds[0] if seed is None else seed
    files = {int(path.stem.removeprefix("step_")): path for path in sorted(folder.glob("policies/step_*.pt"))}
    step = max(files, default=None) if step is None else step
    if seed not in seeds or step not in files:
        fail(f"{folder} has seeds {seeds[0]} to {seeds[-1]} and policies of the steps {', '.join(map(str, files))}")
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):  # read when MuJoCo is imported
        os.environ.setdefault("MUJOCO_GL", "egl" if film else "disabled")
    try:
        env = script.make_env(args["env_id"], render_mode="rgb_array" if film else None)
        env.unwrapped.render_kwargs = {"height": 480, "width": 640}  # dm_control's, whose own picture is a quarter of it
        if film:
            sys.unraisablehook = lambda _: None  # a renderer's __del__ fails, when half made and at exit
            if renderer := getattr(env.unwrapped, "mujoco_renderer", None):  # HumanoidBench's render() is for an older one
                env.unwrapped.render = lambda: renderer.render("rgb_array")
            env.reset()
            env.render()
    except Exception as error:  # EGL, OSMesa, MuJoCo and pygame each have their own
        remedy = "; MuJoCo renders with MUJOCO_GL=egl and libegl1, or MUJOCO_GL=osmesa and libosmesa6" if film else ""
        fail(f"no {args['env_id']} here ({type(error).__name__}: {error}){remedy}")
    actor = script.Actor(1, *env.observation_space.shape, *env.action_space.shape)
    state = torch.load(files[step], weights_only=True, map_location="cpu")["actor"]
    actor.load_state_dict({name: value[[seeds.index(seed)]] for name, value in state.items()})
    dt = getattr(env.unwrapped, "dt", None) or 1 / env.metadata["render_fps"]  # dm_control's render_fps is wrong
    return Run(folder, args, env, dt, Policy(actor, env.unwrapped.action_space), seed, step, script.smoothness)


def episode(run: Run, start: int) -> Iterator[tuple[np.ndarray, float]]:
    """After each step of an episode from start seed start: action [A] in the environment's own units, reward."""
    observation, _ = run.env.reset(seed=start)
    box, done = run.env.unwrapped.action_space, False
    while not done:
        action = run.policy(torch.from_numpy(observation[None]))[0].numpy()
        observation, reward, terminated, truncated, _ = run.env.step(2 * (action - box.low) / (box.high - box.low) - 1)
        yield action, float(reward)
        done = terminated or truncated


def score(run: Run, starts: list[int]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The first episode's actions [T, A], and each episode's return, length, smoothness and action fluctuation."""
    episodes = [tuple(map(np.stack, zip(*episode(run, start)))) for start in starts]  # actions, rewards
    rows = []
    for actions, rewards in episodes:
        fluctuation = np.linalg.norm(np.diff(actions, axis=0), axis=1).sum() / len(actions)
        rows.append((rewards.sum(), len(actions), run.smoothness(actions), fluctuation))
    return episodes[0][0], dict(zip(("return", "length", "smoothness", "action fluctuation"), np.transpose(rows)))


def shown(values: np.ndarray) -> str:
    """Mean and standard deviation, three digits of the larger."""
    digits = int(np.clip(2 - np.floor(np.log10(max(abs(values.mean()), values.std(), 1e-9))), 0, 5))
    return f"{values.mean():.{digits}f} ± {values.std():.{digits}f}"


def film(path: Path, runs: list[Run], start: int) -> None:
    """An episode of each, side by side; the one that ends first stays on its last frame."""
    part = path.with_suffix(".part.mp4")
    with imageio.get_writer(part, fps=1 / runs[0].dt, macro_block_size=2) as writer:
        for _ in zip_longest(*(episode(run, start) for run in runs)):
            writer.append_data(np.hstack([run.env.render() for run in runs]))
    part.replace(path)
    print(path)


def plot(path: Path, runs: list[Run], results: list[tuple]) -> None:
    """A column a run: actions over time and their amplitudes (2/T |FFT|, mean over the dimensions) over frequency."""
    plt.rcParams.update({"font.size": 8, "axes.titlesize": 8, "axes.spines.top": False, "axes.spines.right": False})
    n = min(3, results[0][0].shape[1])  # traces
    layout = {"figsize": (0.4 + 3.1 * len(runs), 2.1 + 0.7 * n), "height_ratios": [1] * n + [1.8], "layout": "constrained"}
    figure, grid = plt.subplots(n + 1, len(runs), sharey="row", squeeze=False, **layout)
    for run, (actions, scores), axes, colour in zip(runs, results, grid.T, ("#4477AA", "#CC6677")):  # Paul Tol's
        axes[0].set_title(f"{run.args['exp_name']}\n{run.args['env_id']}", loc="left")
        axes[0].set_title(f"return {shown(scores['return'])}\nsmoothness {shown(scores['smoothness'])}", loc="right")
        for index, axis in enumerate(axes[:n]):
            axis.plot(run.dt * np.arange(len(actions))[:200], actions[:200, index], colour, lw=0.8, clip_on=False, zorder=3)
            axis.set(ylim=(run.policy.low[index].item(), run.policy.high[index].item()), ylabel=f"action {index + 1}")
            axis.tick_params(labelbottom=index == n - 1)
        axes[n - 1].set_xlabel("time (s)")
        amplitudes = 2 / len(actions) * np.abs(np.fft.rfft(actions, axis=0)).mean(1)
        axes[n].plot(np.fft.rfftfreq(len(actions), run.dt)[1:], amplitudes[1:], colour, lw=0.8)
        axes[n].set(xlabel="frequency (Hz)", ylabel="amplitude", yscale="log")
        axes[n].yaxis.set_minor_formatter("")
    for axis in grid[:, 1:].flat:
        axis.set_ylabel("")
    figure.savefig(path, dpi=200)
    print(path)


def main(args: Args) -> None:
    torch.set_num_threads(1)  # one observation at a time
    first, *others = runs = [load_run(path, args.seed, args.step, args.film) for path in (args.run, args.beside) if path]
    if any(run.args["env_id"] != first.args["env_id"] for run in others):
        fail(f"{args.beside} is of another environment than {args.run}")
    skip = (first.seed - first.args["seed"]) * first.args["eval_episodes"]  # as the scripts' start_seeds
    starts = np.random.SeedSequence([first.args["seed"], first.step, 1]).generate_state(skip + args.episodes)[skip:].tolist()
    results = [score(run, starts) for run in runs]
    for run, (_, scores) in zip(runs, results):
        print(f"{run.folder}: {run.args['env_id']}, seed {run.seed}, step {run.step}, {args.episodes} episodes")
        print("\n".join(f"  {name:18} {shown(values)}" for name, values in scores.items()))
    name = "_beside_".join([f"play_seed{first.seed}_step{first.step:09d}", *(run.folder.name for run in others)])
    if args.plot:
        plot(first.folder / f"{name}.png", runs, results)
    if args.film:
        film(first.folder / f"{name}.mp4", runs, starts[0])
    if args.film and args.track:
        import wandb

        page = {"project": first.args["wandb_project_name"], "entity": first.args["wandb_entity"], "id": first.folder.name}
        with wandb.init(**page, resume="allow") as wandb_run:
            wandb_run.log({"play/film": wandb.Video(str(first.folder / f"{name}.mp4")), "global_step": first.step})


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

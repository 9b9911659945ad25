"""Plays a saved policy, or two beside each other: their scores, a film, a plot, and how well they bear noise and delay.

    python benchmark/play.py runs/NAME --seed 3 --step 50000 --episodes 10
    python benchmark/play.py runs/BASE runs/PAVE --film --plot
    python benchmark/play.py runs/NAME --gif --seconds 3
    python benchmark/play.py runs/BASE runs/PAVE --noise 0.05 --delay 1

Prints return, length, smoothness and action fluctuation: mean and standard deviation over episodes. The episodes are
those of eval.csv; a second run starts from the same states. --film and --plot show the first one, in play_*.mp4 and
play_*.png in the first run's folder.

--noise adds Gaussian noise to each observation. Its unit, dimension by dimension, is the standard deviation of the
observations in the undisturbed episodes of all runs shown, so that two policies bear the same noise. --delay K applies
the action of K steps ago; in the first K steps that is the first action.
"""

import os
import random
import re
import subprocess
import sys
import textwrap
import traceback
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice, zip_longest
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

import gymnasium as gym
import imageio.v2 as imageio
import imageio_ffmpeg
import matplotlib
import numpy as np
import torch
import tyro
from tqdm import tqdm

from runs import Run, load_policy, new_agent, policies, read_run, script_and_args

matplotlib.use("agg")
import matplotlib.pyplot as plt


@dataclass
class Args:
    run: tyro.conf.Positional[Path]  # its folder
    beside: tyro.conf.Positional[Path | None] = None  # a second run's, of the same environment
    seed: int | None = None  # of the run's seeds; its first
    step: int | None = None  # of the run's saved policies; the last
    episodes: int = 10
    noise: float = 0.0  # on the observations, in their standard deviations
    delay: int = 0  # of the actions, in steps
    film: bool = False  # an mp4, in real time; the second run is on the right
    gif: bool = False  # the film, and a small gif of it for a README
    seconds: float = float("inf")  # the film's length at most
    plot: bool = False  # a png: actions, their spectrum, the score
    track: bool = False  # the film, and upload it to the run's own Weights & Biases page
    time_step: float | None = None  # seconds from one action to the next, where the environment does not say it rightly

    def __post_init__(self):
        if self.episodes < 1:
            raise ValueError(f"--episodes {self.episodes}: at least 1")
        if not (0 <= self.noise < float("inf") and self.delay >= 0):
            raise ValueError(f"--noise {self.noise} --delay {self.delay}: at least 0")
        if not self.seconds > 0:
            raise ValueError(f"--seconds {self.seconds}: more than 0")
        self.film |= self.gif or self.track


def fail(message: str) -> NoReturn:
    """A user's mistake: one line, exit status 2."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)


# -------------------------------------------------------------------------------------------------- a run's environment


def is_dm_control(env: gym.Env) -> bool:
    """By the name of shimmy's class: HumanoidBench lives without dm_control, which shimmy imports."""
    return type(env.unwrapped).__name__ == "DmControlCompatibilityV0"


def time_step(env: gym.Env) -> float | None:
    """Seconds from one action to the next, as env says; None if it does not."""
    frames_a_second = env.metadata.get("render_fps")
    seconds = getattr(env.unwrapped, "dt", None)
    found = []
    if isinstance(frames_a_second, Real) and frames_a_second > 0 and not is_dm_control(env):  # shimmy's is wrong
        found.append(1 / float(frames_a_second))
    if isinstance(seconds, Real) and seconds > 0:  # in shimmy dm_control's control_timestep()
        found.append(float(seconds))
    if not found:
        return None
    longest = max(found)  # some have the physics' dt, a part of a step; others a film's frames, several to a step
    if min(found) < 0.98 * longest:
        print(f"dt is {seconds} s, metadata['render_fps'] {frames_a_second}: a step is taken to last {longest:.4g} s")
    return longest


def render(env: gym.Env) -> np.ndarray:
    if type(env.unwrapped).__module__.startswith("humanoid_bench"):  # its render() is for an older gymnasium
        return env.unwrapped.mujoco_renderer.render("rgb_array")
    return env.render()


def make_film_env(script: ModuleType, args: Any) -> gym.Env:
    """The environment, which renders; a user's mistake where it does not."""
    gym.logger.min_level = gym.logger.ERROR  # it warns of what ends in a line here
    sys.unraisablehook = lambda _: None  # a renderer's __del__ fails, when half made and at exit
    try:
        env = script.make_env(args.env_id, args.env_kwargs, render_mode="rgb_array")
        if is_dm_control(env):
            env.unwrapped.render_kwargs = {"height": 480, "width": 640, "camera_id": 0}  # which follows the robot
        env.reset(seed=args.seed)
        picture = render(env)
    except Exception as error:  # EGL, OSMesa, MuJoCo and pygame each have their own
        message = " ".join(f"{type(error).__name__}: {error}".split())
        if "unexpected keyword argument 'render_mode'" in message:
            fail(f"--film: {args.env_id} takes no render_mode, so it cannot be filmed")
        places = [f"{Path(frame.filename).name} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)]
        if re.search(r"render|opengl|\begl|osmesa|glfw", " ".join([message, *places]), re.IGNORECASE):
            message += "; MuJoCo renders with MUJOCO_GL=egl and libegl1, or MUJOCO_GL=osmesa and libosmesa6"
        fail(f"--film: {args.env_id}: {message}")
    if not isinstance(picture, np.ndarray) or picture.ndim != 3:
        fail(f"--film: {args.env_id} renders no picture, so it cannot be filmed")
    return env


class Player(NamedTuple):
    """One seed's policy at one step."""

    run: Run
    script: ModuleType
    args: Any  # the script's Args, of this seed alone
    env: gym.Env  # as the script makes it: actions in [-1, 1]
    agent: Any
    seed: int
    step: int


def load_player(folder: Path, seed: int | None = None, step: int | None = None, film: bool = False) -> Player:
    """None: the run's first seed, its last step."""
    try:
        run = read_run(folder)
        script, args = script_and_args(run)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        fail(f"{folder}: not a run of these scripts ({type(error).__name__}: {error})")
    saved = policies(run)
    seed = run.seeds[0] if seed is None else seed
    step = max(saved, default=None) if step is None else step
    if seed not in run.seeds or step not in saved:
        steps = ", ".join(map(str, saved))
        fail(f"{folder} has seeds {run.seeds[0]} to {run.seeds[-1]} and policies of the steps {steps}")

    if sys.platform == "linux" and not os.environ.get("DISPLAY"):  # read when MuJoCo is imported
        os.environ.setdefault("MUJOCO_GL", "egl" if film else "disabled")
    if film:
        env = make_film_env(script, args)
    else:
        script.try_environment(args)
        env = script.make_env(args.env_id, args.env_kwargs)
    args = replace(args, num_seeds=1)
    agent = new_agent(script, args, env)
    index = run.seeds.index(seed)
    load_policy(agent, saved[step], slice(index, index + 1))
    return Player(run, script, args, env, agent, seed, step)


# -------------------------------------------------------------------------------------------------------------- playing


class Disturbance(NamedTuple):
    noise: np.ndarray | float = 0.0  # standard deviation of each dimension of an observation
    delay: int = 0


class Episode(NamedTuple):
    observations: np.ndarray  # [T, O], without noise
    actions: np.ndarray  # [T, A], as applied, in the environment's own units
    rewards: np.ndarray  # [T]


@torch.no_grad()
def act(agent: Any, observation: np.ndarray) -> np.ndarray:
    """The deterministic action of an agent of one seed: [O] -> [A], in [-1, 1]."""
    batch = torch.from_numpy(observation.astype(np.float32)).view(1, 1, -1)
    return agent.act(batch, explore=False)[0, 0].numpy()


def steps_of(player: Player, start: int, disturbance: Disturbance) -> Iterator[tuple[np.ndarray, np.ndarray, float]]:
    """An episode from the start seed start: after each step a row of Episode."""
    env = player.env
    generator = np.random.default_rng(start)
    random.seed(start)  # for an environment that draws from these, as the scripts have it
    np.random.seed(start)
    chosen = deque(maxlen=disturbance.delay + 1)
    observation, _ = env.reset(seed=start)
    for _ in range(player.script.EPISODE_LIMIT):
        noise = disturbance.noise * generator.standard_normal(observation.shape)
        chosen.append(act(player.agent, observation + noise))
        action = chosen[0]
        next_observation, reward, terminated, truncated, _ = env.step(action)
        yield observation, player.script.in_own_units(action, env.action_box), reward
        if terminated or truncated:
            return
        observation = next_observation
    print(f"an episode had no end and was cut at {player.script.EPISODE_LIMIT} steps")


def play(player: Player, starts: list[int], disturbance: Disturbance) -> list[Episode]:
    episodes = []
    for start in tqdm(starts, desc=player.run.folder.name, unit="episode", leave=False, disable=None):
        columns = zip(*steps_of(player, start, disturbance))
        episodes.append(Episode(*map(np.stack, columns)))
    return episodes


def disturbance_of(noise: float, delay: int, played: list[list[Episode]]) -> Disturbance:
    """noise is in standard deviations of all the observations in played."""
    observations = [episode.observations for episodes in played for episode in episodes]
    return Disturbance(noise * np.concatenate(observations).std(0), delay)


def scores_of(player: Player, episodes: list[Episode]) -> dict[str, np.ndarray]:
    """A number an episode of each measure of eval.csv."""
    changes = [np.linalg.norm(np.diff(episode.actions, axis=0), axis=1).sum() for episode in episodes]
    lengths = np.array([len(episode.actions) for episode in episodes])
    return {
        "return": np.array([episode.rewards.sum() for episode in episodes]),
        "length": lengths,
        "smoothness": np.array([player.script.smoothness(episode.actions) for episode in episodes]),
        "action fluctuation": np.array(changes) / lengths,
    }


def shown(values: np.ndarray) -> str:
    """Mean and standard deviation, to three digits of the larger."""
    mean = values.mean()
    deviation = values.std()
    largest = max(abs(mean), deviation)
    if 0 < largest < 1e-3:
        return f"{mean:.2e} ± {deviation:.2e}"
    digits = 0
    if largest > 0:
        digits = max(0, 2 - int(np.floor(np.log10(largest))))
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def print_scores(player: Player, conditions: dict[str, list[Episode]]) -> None:
    """A column a condition."""
    columns = {condition: scores_of(player, episodes) for condition, episodes in conditions.items()}
    count = len(conditions["undisturbed"])
    played = "1 episode" if count == 1 else f"{count} episodes"
    print(f"{player.run.folder}: {player.args.env_id}, seed {player.seed}, step {player.step}, {played}")
    table = {"": list(columns)} if len(columns) > 1 else {}
    for measure in columns["undisturbed"]:
        table[measure] = [shown(scores[measure]) for scores in columns.values()]
    for measure, cells in table.items():
        print(f"  {measure:18}", *(f"{cell:23}" for cell in cells[:-1]), cells[-1])


# ------------------------------------------------------------------------------------------------------ film and figure


def film(path: Path, players: list[Player], start: int, disturbance: Disturbance, fps: float, frames: int) -> None:
    """An episode of each, side by side; the one that ends first stays on its last frame.

    gymnasium's RecordVideo keeps all frames in memory, and films one environment.
    """
    part = path.with_suffix(".part.mp4")
    steps = zip_longest(*(steps_of(player, start, disturbance) for player in players))
    try:
        with imageio.get_writer(part, fps=fps, macro_block_size=2) as writer:
            for _ in tqdm(islice(steps, frames), desc="film", total=frames, unit="frame", leave=False):
                writer.append_data(np.hstack([render(player.env) for player in players]))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    print(path)


def gif(film: Path) -> None:
    """The film as a gif, half as wide and high, 15 frames a second, 32 colours: about 200 kB a second."""
    path = film.with_suffix(".gif")
    part = path.with_suffix(".part.gif")
    palette = "split[frames][all];[all]palettegen=max_colors=32[palette];[frames][palette]paletteuse=dither=none"
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-i", film]
    try:
        subprocess.run([*ffmpeg, "-vf", f"fps=15,scale=iw/2:-1,{palette}", part], check=True)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    print(path)


def plot(path: Path, players: list[Player], condition: str, played: list[list[Episode]], dt: float) -> None:
    """A column a run: actions over time and their amplitudes (2/T |FFT|, mean over the dimensions) over frequency."""
    plt.rcParams.update({"font.size": 8, "axes.titlesize": 8, "axes.spines.top": False, "axes.spines.right": False})
    box = players[0].env.action_box
    traces = min(3, played[0][0].actions.shape[1])
    figure, grid = plt.subplots(
        traces + 1,
        len(players),
        sharey="row",
        squeeze=False,
        figsize=(0.4 + 3.1 * len(players), 2.3 + 0.7 * traces),
        height_ratios=[1] * traces + [1.8],
        layout="constrained",
    )
    for player, episodes, axes, colour in zip(players, played, grid.T, ("#4477AA", "#CC6677")):  # Paul Tol's
        scores = scores_of(player, episodes)
        actions = episodes[0].actions
        T = len(actions)
        title = [textwrap.fill(f"{player.args.exp_name}, {player.args.env_id}", 44)]
        title += [f"{measure} {shown(scores[measure])}" for measure in ("return", "smoothness")]
        if condition != "undisturbed":
            title.append(condition)
        axes[0].set_title("\n".join(title), loc="left")
        for index, axis in enumerate(axes[:traces]):
            axis.plot(dt * np.arange(T)[:200], actions[:200, index], colour, lw=0.8, clip_on=False, zorder=3)
            axis.set_ylabel(f"action {index + 1}")
            low = box.low.flat[index]
            high = box.high.flat[index]
            if low < high:
                axis.set_ylim(low, high)
            axis.tick_params(labelbottom=index == traces - 1)
        axes[traces - 1].set_xlabel("time (s)")
        amplitudes = 2 / T * np.abs(np.fft.rfft(actions, axis=0)).mean(1)
        frequencies = np.fft.rfftfreq(T, dt)
        axes[traces].plot(frequencies[1:], amplitudes[1:], colour, lw=0.8)
        axes[traces].set(xlabel="frequency (Hz)", ylabel="amplitude", yscale="log")
        axes[traces].yaxis.set_minor_formatter("")
    for axis in grid[:, 1:].flat:
        axis.set_ylabel("")
    figure.savefig(path, dpi=200)
    plt.close(figure)
    print(path)


def upload(run: Run, path: Path, step: int) -> None:
    import wandb

    page = {"project": run.args["wandb_project_name"], "entity": run.args["wandb_entity"], "id": run.folder.name}
    with wandb.init(**page, resume="allow") as wandb_run:
        wandb_run.log({"play/film": wandb.Video(str(path)), "global_step": step})


def main(args: Args) -> None:
    torch.set_num_threads(1)  # one observation at a time
    players = [load_player(path, args.seed, args.step, args.film) for path in (args.run, args.beside) if path]
    first = players[0]
    for player in players:
        if (player.args.env_id, player.args.env_kwargs) != (first.args.env_id, first.args.env_kwargs):
            fail(f"{args.beside} is of another environment than {args.run}")
    skipped = (first.seed - first.args.seed) * first.args.eval_episodes
    starts = first.script.start_seeds(first.args, first.step, 1, skipped + args.episodes)[skipped:]

    condition = "undisturbed"
    disturbance = Disturbance()
    played = {condition: [play(player, starts, disturbance) for player in players]}
    name = f"play_seed{first.seed}_step{first.step:09d}"
    if args.noise or args.delay:
        disturbance = disturbance_of(args.noise, args.delay, played[condition])
        condition = f"noise {args.noise:g}, delay {args.delay}"
        played[condition] = [play(player, starts, disturbance) for player in players]
        name += f"_noise{args.noise:g}_delay{args.delay}"
    if args.beside:
        name += f"_beside_{players[1].run.folder.name}"
    for index, player in enumerate(players):
        print_scores(player, {key: episodes[index] for key, episodes in played.items()})

    if args.plot or args.film:
        dt = args.time_step or time_step(first.env)
        if not dt:
            print("no metadata['render_fps'] and no dt: a step is taken to last 0.05 s; --time-step says better")
            dt = 0.05
    if args.plot:
        plot(first.run.folder / f"{name}.png", players, condition, played[condition], dt)
    if args.film:
        path = first.run.folder / f"{name}.mp4"
        longest = max(len(episodes[0].actions) for episodes in played[condition])
        film(path, players, starts[0], disturbance, 1 / dt, round(min(longest, max(1, args.seconds / dt))))
        if args.gif:
            gif(path)
        if args.track:
            upload(first.run, path, first.step)
    for player in players:
        player.env.close()


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except KeyboardInterrupt:
        print("\nstopped; no half-written file is left", file=sys.stderr)
        sys.exit(130)

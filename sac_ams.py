# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11,<3", "numpy>=1.26,<3", "gymnasium[mujoco,box2d]>=1.1,<2", "mujoco>=3.1.6,<4",
#     "dm_control>=1.0.20,<2", "shimmy>=2.0,<3", "tyro>=0.9,<2", "tensorboard>=2.17,<3", "wandb>=0.18,<1"]
# ///
"""SAC with action manifold smoothing (AMS, Lin, ICML 2026): the TD target averages Q over a neighbourhood of tanh(mean(s')).

    y = r + gamma (1 - terminated) (1/K sum_k min_j Q'_j(s', clip(tanh(mean(s')) + radius v_k)) - alpha log pi(a' | s'))

The v_k are orthonormal (equations 6 and 9; section 3.5 for SAC); the entropy's a' is sampled. The critic has a LayerNorm before
each hidden activation (section 3.4). The rest is SAC: diff baselines/sac.py sac_ams.py.

    python sac_ams.py --env-id dog-run
    python sac_ams.py --env-id quadruped-run --num-seeds 5 --track

Shapes: S seeds trained side by side, N environments a seed, B batch, O observation, A action, K neighbours; an axis of 2 is the
twin critics. Actions are in [-1, 1] everywhere but inside the environments.
"""

import ctypes
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import sysconfig
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter


@dataclass
class Args:
    exp_name: str = Path(__file__).stem  # a part of the run's folder name
    env_id: str = "dog-run"  # a gymnasium id; domain-task for dm_control (dog-run); h1-task for HumanoidBench (h1-walk)
    seed: int = 1  # the first of num_seeds successive seeds
    num_seeds: int = 1  # S, independent seeds trained side by side
    num_envs: int = 8  # N, parallel environments a seed
    total_timesteps: int = 500_000  # vector steps: each advances every environment and makes one update
    resume: str | None = None  # a run's folder: go on from its checkpoint, with its arguments
    track: bool = False  # log to Weights & Biases too; WANDB_MODE=offline needs no account
    wandb_project_name: str = "smoothq"
    wandb_entity: str | None = None
    cuda: bool = True  # use the GPU where there is one
    compile: bool = True  # torch.compile the updates (with CUDA, one graph each): half a minute at first, faster after it
    log_every: int = 500  # vector steps between two lines of the log
    eval_every: int = 25_000  # vector steps between two evaluations of the deterministic policy
    save_every: int = 50_000  # vector steps between two checkpoints; Ctrl-C and SIGTERM save one too
    save_replay: bool = True  # with the checkpoint, so that a resumed run goes on where it was
    eval_episodes: int = 10  # a seed

    policy_lr: float = 3e-4
    q_lr: float = 1e-3  # of the critic and of the entropy coefficient
    buffer_size: int = 1_000_000  # transitions a seed
    batch_size: int = 256
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # share of the online network that enters the target network
    learning_starts: int = 5_000  # vector steps of uniformly random actions before the first update
    policy_frequency: int = 2  # updates of the critic between two rounds of actor updates; a round has as many
    num_neighbors: int = 8  # K, neighbours in the TD target; 0 is SAC's sampled target action
    radius: float = 0.2  # their distance from the squashed mean
    shared_frame: bool = False  # the same directions for the whole batch: the other reading of the paper's algorithm, line 3
    layer_norm: bool = True  # in the critic
    alpha: float = 0.2  # entropy coefficient, with --no-autotune
    autotune: bool = True  # tune it, from 1, to the target entropy -A

    def __post_init__(self):  # tyro makes a message and exit status 2 of a ValueError
        for name, value in vars(self).items():
            low = type(value) is int and name not in ("seed", "num_neighbors")
            high = 1 if name in ("policy_lr", "q_lr", "gamma", "tau") else 2**32
            if isinstance(value, (int, float)) and not low <= value <= high:
                raise ValueError(f"--{name.replace('_', '-')} {value}: at least {low:d}, at most {high}")


EVAL_COLUMNS = "step,transitions,seed,episode,return,length,smoothness,action_fluctuation"
STOP = []  # when SIGINT or SIGTERM asked to save and stop
SETTINGS = {env_id: dict(total_timesteps=1_000_000) for env_id in ("dog-run", "humanoid-run")}  # defaults by environment


def fail(message: str) -> None:
    """A user's mistake: one line, exit status 2."""
    print(f"{Path(__file__).name}: {message}", file=sys.stderr)
    sys.exit(2)


def parse_args() -> Args:
    """The command line, over the arguments of the run to resume or over SETTINGS."""
    args = tyro.cli(Args)
    saved = SETTINGS.get(args.env_id, {})
    if args.resume:
        try:
            saved = json.loads(Path(args.resume, "args.json").read_text()) | {"resume": args.resume}
            if saved.pop("script") != Path(__file__).stem:
                raise ValueError("it is another one's")
            Args(**saved)
        except (OSError, ValueError, TypeError, KeyError) as error:
            fail(f"--resume {args.resume}: no run of this script ({error})")
    args = tyro.cli(Args, default=Args(**saved))
    for name in ("env_id", "seed", "num_seeds", "num_envs", "buffer_size") if args.resume else ():
        if getattr(args, name, None) != saved.get(name):
            fail(f"--resume {args.resume}: {name} was {saved.get(name)}")
    return args


class LeanEnv(gym.Wrapper):
    """Float32 observations and no infos: what the trainer does not read is not sent between processes."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, env.observation_space.shape, np.float32)

    def reset(self, **kwargs):
        return self.env.reset(**kwargs)[0].astype(np.float32), {}

    def step(self, action):
        observation, reward, terminated, truncated, _ = self.env.step(action)
        return observation.astype(np.float32), reward, terminated, truncated, {}


def make_env(env_id: str, **kwargs) -> gym.Env:
    """One environment with observations [O] and actions in [-1, 1]^A; raises gym.error.Error where it cannot be had."""
    if multiprocessing.parent_process():  # in a worker: signals are for the trainer, which ends its workers
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: not even a hung one outlives a killed trainer
    name = "LunarLanderContinuous-v3" if env_id == "LunarLander-v3" else env_id
    if env_id.startswith("h1-"):  # README.md says how to get it
        name, kwargs = f"humanoid_bench:{env_id.replace('sit', 'sit_simple')}-v0", {"render_mode": None} | kwargs  # no window
    elif re.fullmatch(r"[a-z0-9_]+-(?!v\d+$)[a-z0-9_]+", env_id):
        name = f"shimmy:dm_control/{env_id}-v0"
    env = gym.make(name, disable_env_checker=True, **kwargs)
    if isinstance(env.observation_space, (gym.spaces.Dict, gym.spaces.Tuple)):
        env = gym.wrappers.FlattenObservation(env)
    if not all(isinstance(box, gym.spaces.Box) and len(box.shape) == 1 for box in (env.observation_space, env.action_space)):
        raise gym.error.Error(f"observations and actions must be real vectors: {env.observation_space}, {env.action_space}")
    return LeanEnv(gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1)))


def make_envs(env_id: str, num_envs: int) -> gym.vector.VectorEnv:
    """Several environments have a process each. Where an episode ended, infos["final_obs"] has its last observation."""
    makers, mode = [partial(make_env, env_id)] * num_envs, gym.vector.AutoresetMode.SAME_STEP
    if num_envs > 1:
        return gym.vector.AsyncVectorEnv(makers, autoreset_mode=mode)
    envs, pending = gym.vector.SyncVectorEnv(makers, autoreset_mode=mode), []
    envs.step_async, envs.step_wait = pending.append, lambda timeout: envs.step(pending.pop())
    return envs


class Linear(nn.Module):
    """One linear layer for each member of a stack of seeds (and twins): x [*stack, B, in] -> [*stack, B, out]."""

    def __init__(self, stack: tuple[int, ...], in_features: int, out_features: int):
        super().__init__()
        bound = in_features**-0.5  # as nn.Linear
        self.weight = nn.Parameter(torch.empty(*stack, in_features, out_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(*stack, 1, out_features).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        *stack, in_features, out_features = self.weight.shape
        if out_features == 1:  # a matrix product with a single column takes a CPU seven times as long
            return (x * self.weight.mT).sum(-1, keepdim=True) + self.bias
        x, weight, bias = (t.expand(*stack, *t.shape[-2:]).flatten(0, -3) for t in (x, self.weight, self.bias))
        if 2 * out_features < in_features:  # and few columns four times as long as so many rows
            return torch.baddbmm(bias.mT, weight.mT, x.mT).mT.unflatten(0, stack)
        return torch.baddbmm(bias, x, weight).unflatten(0, stack)


def set_gradients(loss: Tensor, network: nn.Module) -> None:
    """What loss.sum().backward() does, for one network and in a form that torch.compile takes. loss [S]: no two seeds meet."""
    parameters = list(network.parameters())
    for parameter, gradient in zip(parameters, torch.autograd.grad(loss.sum(), parameters)):
        parameter.grad = gradient.contiguous().as_strided(parameter.shape, parameter.stride())  # as Adam's fused kernels ask


@torch.no_grad()
def polyak_update(target: nn.Module, online: nn.Module, tau: float) -> None:
    """target <- (1 - tau) target + tau online."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), tau)


class Actor(nn.Module):
    def __init__(self, S: int, O: int, A: int):
        super().__init__()
        self.fc1 = Linear((S,), O, 256)
        self.fc2 = Linear((S,), 256, 256)
        self.fc_out = Linear((S,), 256, 2 * A)  # mean and log standard deviation

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """observations [S, B, O] -> mean and log standard deviation [S, B, A] of a Gaussian, before squashing."""
        x = F.relu(self.fc1(observations))
        x = F.relu(self.fc2(x))
        mean, log_std = self.fc_out(x).chunk(2, -1)
        return mean, 3.5 * torch.tanh(log_std) - 1.5  # within [-5, 2]

    def sample(self, observations: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Actions tanh(u), u ~ N(mean, std), [S, B, A], their log-probability [S, B] (appendix C), and tanh(mean) [S, B, A]."""
        mean, log_std = self(observations)
        noise = torch.randn_like(mean)
        actions = torch.tanh(mean + log_std.exp() * noise)
        log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        log_prob = log_prob - torch.log(1 - actions.square() + 1e-6)  # CleanRL's form: unlike the exact one it lets go at +-1
        return actions, log_prob.sum(-1), torch.tanh(mean)


class LayerNorm(nn.Module):
    """nn.LayerNorm for each member of a stack: [*stack, B, size] -> the same."""

    def __init__(self, stack: tuple[int, ...], size: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(*stack, 1, size)), nn.Parameter(torch.zeros(*stack, 1, size))

    def forward(self, x: Tensor) -> Tensor:
        ones, zeros = x.new_ones(x.shape[-1]), x.new_zeros(x.shape[-1])  # without them the CPU kernel is half as fast
        return torch.addcmul(self.bias, F.layer_norm(x, x.shape[-1:], ones, zeros), self.weight)


class Critic(nn.Module):
    def __init__(self, S: int, O: int, A: int, layer_norm: bool):
        super().__init__()
        self.fc1 = Linear((S, 2), O + A, 256)
        self.fc2 = Linear((S, 2), 256, 256)
        self.fc_q = Linear((S, 2), 256, 1)
        self.norm1, self.norm2 = (LayerNorm((S, 2), 256) if layer_norm else nn.Identity() for _ in range(2))

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """observations [S, B, O], actions [S, B, A] -> twin values [S, 2, B]."""
        return self.after_fc1(self.fc1(torch.cat([observations, actions], -1).unsqueeze(1)))

    def neighbor_values(self, observations: Tensor, actions: Tensor) -> Tensor:
        """observations [S, B, O], actions [S, B, K, A] -> [S, 2, B, K]; fc1 being linear, s has its part computed once."""
        (O, A), (B, K) = (observations.shape[-1], actions.shape[-1]), actions.shape[1:3]
        observation_weight, action_weight = self.fc1.weight.split([O, A], -2)
        shared = (observations.unsqueeze(1) @ observation_weight + self.fc1.bias).unsqueeze(3)  # [S, 2, B, 1, H]
        x = (actions.flatten(1, 2).unsqueeze(1) @ action_weight).unflatten(2, (B, K)) + shared
        return self.after_fc1(x.flatten(2, 3)).unflatten(-1, (B, K))

    def after_fc1(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(x))
        x = F.relu(self.norm2(self.fc2(x)))
        return self.fc_q(x).squeeze(-1)


def sample_directions(batch_shape: tuple[int, ...], action_dim: int, num_neighbors: int, device: torch.device) -> Tensor:
    """K random orthonormal directions [*batch_shape, K, A], a fresh frame for each row (AMS, equation 9); K > A stacks frames.

    Gram-Schmidt on Gaussian vectors is the Q of their QR, without a batched LAPACK call; the rows come last on the way.
    """
    frames = []
    for start in range(0, num_neighbors, action_dim):
        frame = torch.randn(min(action_dim, num_neighbors - start), action_dim, math.prod(batch_shape), device=device)
        for _ in range(2):  # the second pass removes what rounding left of the first
            for k, direction in enumerate(frame):
                direction *= direction.square().sum(0).clamp_min(1e-30).rsqrt()  # randn is exactly 0 once in 10^7
                rest = frame[k + 1 :]
                rest -= (rest * direction).sum(1, keepdim=True) * direction
        frames.append(frame)
    return torch.cat(frames).permute(2, 0, 1).unflatten(0, batch_shape)


def neighborhood_value(critic: Callable, observations: Tensor, anchor: Tensor, directions: Tensor, radius: float) -> Tensor:
    """1/K sum_k min_j Q_j(s, clip(anchor + radius v_k)) (AMS, equation 6): the minimum over the twins is inside the mean.

    observations [S, B, O], anchor [S, B, A], directions [S, B or 1, K, A] -> [S, B]. critic is our Critic or any callable
    (observations [S, B', O], actions [S, B', A]) -> [S, 2, B'].
    """
    neighbors = (anchor.unsqueeze(2) + radius * directions).clamp(-1, 1)  # [S, B, K, A]
    if isinstance(critic, Critic):
        values = critic.neighbor_values(observations, neighbors)
    else:
        K = neighbors.shape[2]
        values = critic(observations.repeat_interleave(K, 1), neighbors.flatten(1, 2)).unflatten(-1, (-1, K))
    return values.amin(1).mean(-1)


class ReplayBuffer:
    """The last transitions of each seed, on the training device: a ring of vector steps, rows [S, capacity, N, width]."""

    def __init__(self, S: int, N: int, widths: list[int], capacity: int, device: torch.device):
        self.widths = widths
        self.rows = torch.zeros(S, capacity, N, sum(widths), device=device)
        self.seed_index = torch.arange(S, device=device).unsqueeze(1)
        self.steps = 0
        self.filled = torch.zeros((), dtype=torch.float64, device=device)  # on the device: a captured graph reads it anew

    def add(self, *columns: np.ndarray) -> None:
        """A vector step: observations [S * N, O], actions, next observations, ..., rewards [S * N], terminations."""
        S, capacity, N, width = self.rows.shape
        rows = np.concatenate([column.reshape(S * N, -1) for column in columns], 1, dtype=np.float32)
        if not np.isfinite(rows).all():
            sys.exit("an environment returned a number that is not finite")
        self.rows[:, self.steps % capacity].copy_(torch.from_numpy(rows).view(S, N, width))
        self.steps += 1
        self.filled.fill_(min(self.steps, capacity) * N)

    def sample(self, batch_size: int) -> list[Tensor]:
        """Uniformly: observations [S, B, O], actions [S, B, A], next observations, ..., rewards [S, B], terminations [S, B]."""
        index = torch.rand(len(self.rows), batch_size, dtype=torch.float64, device=self.rows.device) * self.filled
        *vectors, rewards, terminations = self.rows.flatten(1, 2)[self.seed_index, index.long()].split(self.widths, -1)
        return [*vectors, rewards.squeeze(-1), terminations.squeeze(-1)]


def smoothness(actions: np.ndarray) -> float:
    """How much actions [T, A] oscillate: mean over A of 2/T sum_k f_k |FFT|_k, f_k = k/T; lower is smoother (CAPS, 2021)."""
    T = len(actions)
    spectrum = np.abs(np.fft.rfft(actions, axis=0))[: T // 2]
    return float((2 / T * (np.arange(T // 2) / T) @ spectrum).mean())


def evaluate(policy: Callable, envs: gym.vector.VectorEnv, args: Args, step: int, box: gym.spaces.Box) -> list[tuple]:
    """An episode of the deterministic policy in each environment: rows of EVAL_COLUMNS, none if told to stop meanwhile.

    Smoothness, and fluctuation, mean |a_t - a_(t-1)| (LipsNet, ICML 2023), are of actions in box, the environment's own units.
    """
    seeds = np.random.SeedSequence([args.seed, step, 1]).generate_state(envs.num_envs)  # those of training have 0 for the 1
    observations, _ = envs.reset(seed=seeds.tolist())
    running, returns, lengths = np.ones(envs.num_envs, bool), np.zeros(envs.num_envs), np.zeros(envs.num_envs, int)
    actions = []
    while running.any() and not STOP:
        actions.append(policy(observations))
        envs.step_async(actions[-1])
        observations, rewards, terminations, truncations, _ = envs.step_wait(timeout=300)
        returns += rewards * running
        lengths += running
        running &= ~(terminations | truncations)
    rows = []
    for index in range(0 if STOP else envs.num_envs):
        (seed, episode), T = divmod(index, args.eval_episodes), int(lengths[index])
        taken = box.low + (np.stack([a[index] for a in actions[:T]]) + 1) / 2 * (box.high - box.low)  # [T, A]
        fluctuation = float(np.linalg.norm(np.diff(taken, axis=0), axis=1).sum() / T)
        row = (step, step * args.num_envs, args.seed + seed, episode, float(returns[index]), T, smoothness(taken), fluctuation)
        rows.append(row)
    return rows


def write_atomically(path: Path, write: Callable) -> None:
    """Whoever reads path, after a kill or on a full disk too, finds the old file or the new one, whole. write(binary file)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        write(file)
    os.replace(temporary, path)


def save_checkpoint(folder: Path, step: int, state: dict, episodes: list[tuple], replay) -> None:
    """state: networks and optimisers, by name. A run killed between the two files resumes with a slightly older replay."""
    states = {name: module.state_dict() for name, module in state.items()}
    for name, saved in states.items():  # Adam's moments overflow before a network does
        if not all(leaf.isfinite().all() for leaf in torch.utils._pytree.tree_leaves(saved) if isinstance(leaf, Tensor)):
            sys.exit(f"step {step}: {name} is not finite; the checkpoint in {folder} is from before")
    write_atomically(folder / "checkpoint.pt", partial(torch.save, {"step": step, "episodes": episodes, **states}))
    if replay:
        rows = torch.stack([rows[: replay.steps].cpu() for rows in replay.rows])
        write_atomically(folder / "replay.pt", partial(torch.save, {"rows": rows, "steps": replay.steps}))


def load_checkpoint(folder: Path, state: dict, replay) -> tuple[int, list[tuple]]:
    """Restores what save_checkpoint saved, without running code from the files; returns the step and the evaluated episodes."""
    try:
        saved = torch.load(folder / "checkpoint.pt", weights_only=True, map_location="cpu")
        for name, module in state.items():
            if "param_groups" in saved[name]:  # this run's learning rate and device
                saved[name]["param_groups"] = module.state_dict()["param_groups"]
            module.load_state_dict(saved[name])
        if replay and (folder / "replay.pt").exists():
            stored = torch.load(folder / "replay.pt", weights_only=True, mmap=True)
            replay.rows[:, : stored["rows"].shape[1]].copy_(stored["rows"])
            replay.steps = stored["steps"]
            replay.filled.fill_(stored["rows"].shape[1] * replay.rows.shape[2])
        return saved["step"], saved["episodes"]
    except Exception as error:  # torch.load has half a dozen for a damaged file
        fail(f"--resume {folder}: {type(error).__name__}: {error}".splitlines()[0])


def capture(update: Callable) -> Callable:
    """update(update_actor) -> metrics as CUDA graphs, one for each value of update_actor, once it has warmed up."""
    calls, graphs = [0, 0], {}

    def captured_update(update_actor: bool) -> dict[str, Tensor]:
        calls[update_actor] += 1
        if calls[update_actor] <= 3:
            return update(update_actor)
        if update_actor not in graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                graphs[update_actor] = graph, update(update_actor)
        graphs[update_actor][0].replay()
        return graphs[update_actor][1]

    return captured_update


def start_log(folder: Path, args: Args, step: int) -> Callable:
    """log(step, scalars): to TensorBoard, the terminal and, with --track, Weights & Biases. charts/SPS counts vector steps."""
    arguments = json.dumps({"script": Path(__file__).stem, **asdict(args), "resume": None}, indent=2)
    write_atomically(folder / "args.json", lambda file: file.write(arguments.encode()))
    writer = SummaryWriter(str(folder), purge_step=step + 1 if args.resume else None)
    writer.add_text("hyperparameters", f"    {arguments}".replace("\n", "\n    "))
    if args.track:
        import wandb

        names = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": folder.name, "id": folder.name}
        wandb.init(**names, group=f"{args.env_id}__{args.exp_name}", resume="allow", config=asdict(args), save_code=True)
        wandb.define_metric("*", step_metric="global_step")
    print(folder, flush=True)
    shown, last = {}, [step, time.perf_counter()]

    def log(step: int, scalars: dict[str, float]) -> None:
        if step > last[0]:
            speed = (step - last[0]) / (time.perf_counter() - last[1])
            scalars |= {"charts/SPS": speed, "charts/transitions": step * args.num_envs}
        last[:] = step, time.perf_counter()
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)
        if args.track:
            wandb.log({**scalars, "global_step": step})
        shown.update({name: f"{value:.4g}" for name, value in scalars.items() if name.startswith(("eval/", "charts/SPS"))})
        print(f"step {step}/{args.total_timesteps}", *(f"{name} {value}" for name, value in shown.items()), flush=True)

    return log


def request_stop(number: int, _) -> None:
    if STOP and number == signal.SIGINT and time.monotonic() > STOP[0] + 1:  # sooner it is one request, that uv sent on
        os._exit(128 + number)
    STOP.append(time.monotonic())
    os.write(2, b"\nsaving, then stopping; again to stop at once\n")


def train(args: Args) -> None:
    S, N = args.num_seeds, args.num_envs
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    torch.set_num_threads(max(1, min(4, torch.get_num_threads() - S * N + 1)))  # the environments want the other cores
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)  # keep freed memory: the page faults would take a third of a CPU's update
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    os.environ["MUJOCO_GL"] = "disabled"  # nothing is rendered; EGL can load an LLVM that crashes Triton
    try:
        env = make_env(args.env_id)
    except (gym.error.Error, ImportError, ValueError) as error:
        fail(f"--env-id {args.env_id}: {error}" + " (how to install it: README.md)" * isinstance(error, ImportError))
    (O,), (A,), action_box = env.observation_space.shape, env.action_space.shape, env.unwrapped.action_space

    torch.manual_seed(args.seed)
    actor, critic = Actor(S, O, A).to(device), Critic(S, O, A, args.layer_norm).to(device)
    target_critic = deepcopy(critic).requires_grad_(False)
    log_alpha = nn.ParameterList([torch.full((S,), 0.0 if args.autotune else math.log(args.alpha), device=device)])
    adam = partial(torch.optim.Adam, fused=True, capturable=device.type == "cuda")
    actor_optimizer, critic_optimizer = adam(actor.parameters(), args.policy_lr), adam(critic.parameters(), args.q_lr)
    alpha_optimizer = adam(log_alpha.parameters(), args.q_lr)
    state = {"actor": actor, "critic": critic, "target_critic": target_critic, "log_alpha": log_alpha}
    state |= {"actor_optimizer": actor_optimizer, "critic_optimizer": critic_optimizer, "alpha_optimizer": alpha_optimizer}
    replay = ReplayBuffer(S, N, [O, A, O, 1, 1], max(1, min(args.buffer_size // N, args.total_timesteps)), device)

    def next_values(next_observations: Tensor) -> Tensor:
        """The value of the next state [S, B], entropy included: what AMS changes in SAC."""
        next_actions, log_prob, anchor = actor.sample(next_observations)
        entropy_cost = log_alpha[0].exp().unsqueeze(1) * log_prob
        if args.num_neighbors:
            directions = sample_directions((S, 1 if args.shared_frame else args.batch_size), A, args.num_neighbors, device)
            return neighborhood_value(target_critic, next_observations, anchor, directions, args.radius) - entropy_cost
        return target_critic(next_observations, next_actions).amin(1) - entropy_cost

    def critic_gradients(observations, actions, next_observations, rewards, terminations) -> dict[str, Tensor]:
        with torch.no_grad():  # a truncated episode bootstraps
            targets = rewards + args.gamma * (1 - terminations) * next_values(next_observations)  # [S, B]
        values = critic(observations, actions)  # [S, 2, B]
        qf_loss = (values - targets.unsqueeze(1)).square().mean(2).sum(1)  # [S]
        set_gradients(qf_loss, critic)
        grad_norm = sum(p.grad.flatten(1).square().sum(1) for p in critic.parameters()).sqrt()
        metrics = {"losses/qf_loss": qf_loss.detach(), "losses/qf_values": values.detach()}
        return metrics | {"diagnostics/critic_grad_norm": grad_norm, "diagnostics/td_target_variance": targets.var(1)}

    def actor_gradients(observations: Tensor) -> dict[str, Tensor]:
        (actions, log_prob, _), alpha = actor.sample(observations), log_alpha[0].exp()
        actor_loss = alpha.detach() * log_prob.mean(1) - critic(observations, actions).amin(1).mean(1)  # [S]
        set_gradients(actor_loss, actor)
        if args.autotune:
            set_gradients(-alpha * (log_prob.detach().mean(1) - A), log_alpha)  # target entropy -A
        return {"losses/actor_loss": actor_loss.detach(), "losses/alpha": alpha.detach()}

    if args.compile and not (shutil.which("g++") and Path(sysconfig.get_paths()["include"], "Python.h").exists()):
        print("torch.compile needs g++ and Python.h, and finds them not: the updates run uncompiled")
    elif args.compile:
        torch.compiler.reset()  # without guards a second run in this process would be answered with the first one's graph
        torch._dynamo.config.trace_autograd_ops = True  # a loss and its gradients become one graph
        options = {"guard_filter_fn": lambda guards: [False] * len(guards)}  # some 300 a call: nothing they check changes
        critic_gradients, actor_gradients = (torch.compile(f, options=options) for f in (critic_gradients, actor_gradients))

    def update(update_actor: bool) -> dict[str, Tensor]:
        batch = replay.sample(args.batch_size)
        metrics = critic_gradients(*batch)
        critic_optimizer.step()
        for _ in range(args.policy_frequency if update_actor else 0):  # as many as were skipped
            metrics |= actor_gradients(batch[0])
            actor_optimizer.step()
            if args.autotune:
                alpha_optimizer.step()
        polyak_update(target_critic, critic, args.tau)
        return metrics

    @torch.no_grad()
    def policy(observations: np.ndarray, explore: bool = False) -> np.ndarray:
        """observations [S * E, O] -> actions [S * E, A]."""
        sampled, _, deterministic = actor.sample(torch.from_numpy(observations).unflatten(0, (S, -1)).to(device))
        return (sampled if explore else deterministic).flatten(0, 1).cpu().numpy()

    if device.type == "cuda" and args.compile:
        torch.cuda.set_stream(torch.cuda.Stream())  # a graph cannot be warmed up on the default stream
        update = capture(update)

    name = re.sub(r"[^\w.-]", "_", f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}")
    folder = Path(args.resume or f"runs/{name}")
    step, episodes = load_checkpoint(folder, state, replay) if args.resume else (0, [])
    torch.manual_seed(args.seed + step)  # a resumed run begins new episodes, and draws new numbers
    envs, eval_envs = make_envs(args.env_id, S * N), make_envs(args.env_id, S * args.eval_episodes)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, request_stop)
    log = start_log(folder, args, step)

    observations, _ = envs.reset(seed=np.random.SeedSequence([args.seed, step, 0]).generate_state(S * N).tolist())
    episode_returns, finished, metrics = np.zeros(S * N), [], {}
    while True:
        at_end = step >= args.total_timesteps
        if (step % args.eval_every == 0 or at_end) and not (episodes and episodes[-1][0] == step):
            if rows := evaluate(policy, eval_envs, args, step, action_box):
                episodes += rows
                networks = {"actor": actor.state_dict(), "critic": critic.state_dict()}
                write_atomically(folder / f"policies/step_{step:09d}.pt", partial(torch.save, networks))
                text = "\n".join([EVAL_COLUMNS, *(",".join(map(str, row)) for row in episodes), ""])
                write_atomically(folder / "eval.csv", lambda file: file.write(text.encode()))
                means = np.mean(rows, 0)
                log(step, {"eval/return": means[4], "eval/smoothness": means[6], "eval/action_fluctuation": means[7]})
        if step % args.save_every == 0 or at_end or STOP:
            save_checkpoint(folder, step, state, episodes, replay if args.save_replay else None)
        if at_end or STOP:
            break

        actions = policy(observations, explore=True) if step >= args.learning_starts else 2 * torch.rand(S * N, A).numpy() - 1
        envs.step_async(actions)
        if replay.steps >= args.learning_starts:  # while the environments step
            metrics |= update(step % args.policy_frequency == 0)
        next_observations, rewards, terminations, truncations, infos = envs.step_wait(timeout=300)
        done, final_observations = terminations | truncations, next_observations.copy()
        if done.any():  # there next_observations already begin the next episode
            final_observations[done] = np.stack(infos["final_obs"][done])
        replay.add(observations, actions, final_observations, rewards, terminations)
        observations = next_observations
        step += 1

        episode_returns += rewards
        finished += list(episode_returns[done])
        episode_returns[done] = 0
        if step % args.log_every == 0:
            scalars = {name: metric.mean().item() for name, metric in metrics.items()}
            if not np.isfinite(list(scalars.values())).all():
                sys.exit(f"step {step}: a loss is not finite; the checkpoint in {folder} is from before")
            log(step, scalars | ({"charts/episodic_return": np.mean(finished)} if finished else {}))
            finished = []
    envs.close()
    eval_envs.close()
    if STOP:
        print(f"stopped at step {step}; go on with: python {sys.argv[0]} --resume {folder}")


if __name__ == "__main__":
    try:
        train(parse_args())
    finally:  # workers ignore SIGTERM: whatever ends the run, none outlives it
        for worker in multiprocessing.active_children():
            worker.kill()

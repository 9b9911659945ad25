"""PPO: proximal policy optimisation (Schulman et al. 2017, equation 9) as in CleanRL's ppo_continuous_action.py.

    L = mean max(-A ratio, -A clip(ratio, 1 - c, 1 + c)) + vf_coef 1/2 mean max((V - R)^2, (V_clipped - R)^2) - ent_coef entropy
    A_t = sum_l (gamma lambda)^l (r_{t+l} + gamma (1 - terminated_{t+l}) V(s'_{t+l}) - V(s_{t+l})),  R = A + V   (GAE)

    python baselines/ppo.py --env-id Walker2d-v5
    python baselines/ppo.py --env-id dog-run --num-seeds 5

Other than CleanRL's: a truncated episode bootstraps from its last observation, the running statistics of observations and
rewards are one a seed, shared by its environments, and actions are normalised to [-1, 1].

Shapes: S seeds, N environments a seed, T steps of a rollout, M rows of a minibatch, O observation, A action.
"""

import csv
import ctypes
import dataclasses
import difflib
import importlib
import itertools
import json
import math
import multiprocessing
import os
import re
import shlex
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, NoReturn, get_type_hints

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# region arguments
Count = Annotated[int, (1, 2**40)]  # the pair is the closed range that parse_args accepts
Few = Annotated[int, (1, 4096)]
Whole = Annotated[int, (0, 2**31 - 1)]
Rate = Annotated[float, (sys.float_info.min, 1.0)]
Positive = Annotated[float, (sys.float_info.min, 1e4)]
NonNegative = Annotated[float, (0.0, 1e4)]
Fraction = Annotated[float, (0.0, 1.0)]
Seconds = Annotated[float, (0.0, 1e9)]
Timeout = Annotated[float, (1e-3, 1e6)]  # what poll() and setitimer() take
Widths = Annotated[tuple[int, ...], (1, 2**16)]


class UserError(Exception):
    """A mistake in what was asked for: one line, exit status 2, nothing written."""


class TrainingFault(Exception):
    """What ends a run (environment, disk, numbers): one line, exit status 1, the last checkpoint intact."""


def parse_args(argv: list[str] | None = None) -> "Args":
    """Defaults, over them ENV_SETTINGS of the environment (or the resumed run's arguments), over them the flags given.

    Raises UserError for a value out of range and a --resume that does not fit; tyro exits with 2 for a malformed flag.
    """
    args = tyro.cli(Args, args=argv)
    saved = read_run_args(Path(args.resume)) if args.resume else ENV_SETTINGS.get(args.env_id, {})
    args = tyro.cli(Args, args=argv, default=Args(**saved))
    for name in ("env_id", "seed", "num_seeds", "num_envs") if args.resume else ():
        if getattr(args, name) != saved[name]:
            raise UserError(f"{args.resume} is a run of {name} {saved[name]}, not {getattr(args, name)}")
    for name, hint in get_type_hints(Args, include_extras=True).items():
        for low, high in getattr(hint, "__metadata__", ()):
            if not all(low <= value <= high for value in np.ravel(getattr(args, name))):
                limits = f"above 0, at most {high:g}" if low == sys.float_info.min else f"from {low:g} to {high:.12g}"
                raise UserError(f"--{name.replace('_', '-')} must be {limits}, not {getattr(args, name)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
    if args.track:
        import wandb

        try:
            wandb.login()
        except wandb.Error as error:
            raise UserError(f"--track: {one_line(error)} WANDB_MODE=offline needs no account.") from None
    return args


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


# endregion


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]  # a part of the run's folder name
    env_id: str = "HalfCheetah-v5"  # a gymnasium id; domain-task for dm_control (dog-run); h1-task for HumanoidBench
    seed: Whole = 1  # the run trains seeds seed, seed + 1, ..., seed + num_seeds - 1 side by side
    num_seeds: Few = 1  # S, independent seeds in this process
    total_timesteps: Count = 500_000  # vector steps: each advances every environment
    num_envs: Few = 8  # N, parallel environments a seed
    resume: str | None = None  # a run's folder: go on from its checkpoint, with a new rollout

    learning_rate: Rate = 3e-4  # of Adam, at the start
    anneal_lr: bool = True  # lower it linearly to 0 at the end
    num_steps: Annotated[int, (1, 2**20)] = 2048  # T, vector steps of a rollout; then the networks learn from it
    gamma: Fraction = 0.99  # discount factor
    gae_lambda: Fraction = 0.95  # discount of the advantage estimate besides
    num_minibatches: Count = 32  # parts of a rollout, one gradient step each
    update_epochs: Count = 10  # passes over a rollout
    norm_adv: bool = True  # normalise the advantages of a minibatch
    clip_coef: NonNegative = 0.2  # how far the probability ratio counts, and the value with --clip-vloss
    clip_vloss: bool = True  # clip the value's change too
    ent_coef: NonNegative = 0.0  # of the entropy
    vf_coef: NonNegative = 0.5  # of the value loss
    max_grad_norm: Positive = 0.5  # the gradient of actor and critic together is scaled down to it, for each seed
    hidden_sizes: Widths = (64, 64)  # hidden layers, actor and critic; their activation is tanh

    eval_every: Count = 25_000  # vector steps between two evaluations of the deterministic policy
    eval_episodes: Few = 10  # episodes a seed in an evaluation
    log_every: Count = 2048  # vector steps between two lines of the log
    checkpoint_seconds: Seconds = 600.0  # the most that a killed run loses
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto is cuda where there is a GPU
    num_threads: Few = 1  # PyTorch's CPU threads; the networks are small, and the environments want the other cores
    vector_env: Literal["auto", "async", "sync"] = "auto"  # a process an environment, or none; auto times a step
    env_timeout: Timeout = 300.0  # seconds after which an environment that does not answer ends the run

    track: bool = False  # log to Weights & Biases too
    wandb_project_name: str = "smoothq"
    wandb_entity: str | None = None
    capture_video: bool = False  # at each evaluation, record an episode of the first seed in runs/NAME/videos


ENV_SETTINGS: dict[str, dict] = {  # defaults that depend on the environment; a flag overrides them
    "dog-run": {"total_timesteps": 1_000_000},
    "humanoid-run": {"total_timesteps": 1_000_000},
}
ReplayBuffer = type(None)  # for the run region's annotations: PPO keeps no replay


# region environments
@contextmanager
def portable_errors() -> Iterator[None]:
    """Errors as one line of text: not every exception can be pickled, and sent between processes."""
    try:
        yield
    except multiprocessing.TimeoutError:
        raise
    except Exception as error:
        raise TrainingFault(one_line(error)) from None


class LeanEnv(gym.Wrapper):
    """Float32 observations and empty infos: what the scripts do not read is not sent between processes."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, env.observation_space.shape, np.float32)

    def reset(self, **kwargs):
        with portable_errors():
            return np.asarray(self.env.reset(**kwargs)[0], np.float32), {}

    def step(self, action):
        with portable_errors():
            observation, *outcome, _ = self.env.step(action)
            return np.asarray(observation, np.float32), *outcome, {}


def make_env(env_id: str, render_mode: str | None = None) -> gym.Env:
    """One environment with float32 observations [O] and actions in [-1, 1]^A; UserError if there is none or it does not fit."""
    name, kwargs = env_id, {}
    if env_id == "LunarLander-v3":
        kwargs["continuous"] = True
    elif re.fullmatch(r"h1-[a-z_]+", env_id):
        name = env_id.replace("h1-sit", "h1-sit_simple") + "-v0"
    elif re.fullmatch(r"\w+-\w+", env_id) and not re.search(r"-v\d+$", env_id):
        name = f"dm_control/{env_id}-v0"
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):  # read when MuJoCo is imported
        os.environ.setdefault("MUJOCO_GL", "egl" if render_mode else "disabled")
    warnings.filterwarnings("ignore", "overflow encountered in cast", module="gymnasium")  # dm_control's unbounded float64
    try:
        for prefix, registrar in (("dm_control/", "shimmy"), ("h1-", "humanoid_bench")):
            if name.startswith(prefix):
                importlib.import_module(registrar)  # registers its environments
        env = gym.make(name, render_mode=render_mode, disable_env_checker=True, **kwargs)
        if isinstance(env.observation_space, (gym.spaces.Dict, gym.spaces.Tuple)):
            env = gym.wrappers.FlattenObservation(env)
    except (gym.error.UnregisteredEnv, gym.error.NamespaceNotFound):
        importlib.import_module("shimmy")
        known = [re.sub(r"^dm_control/(.*)-v0$", r"\1", known) for known in gym.registry]
        close = ", ".join(difflib.get_close_matches(env_id.removeprefix("dm_control/"), known, 3, 0.5))
        raise UserError(f"no environment is called {env_id!r}" + (f"; the closest: {close}" if close else "")) from None
    except Exception as error:
        raise UserError(f"{env_id} cannot be made: {one_line(error)}") from None
    observations, actions = env.observation_space, env.action_space
    if not isinstance(actions, gym.spaces.Box) or len(actions.shape) != 1 or not actions.is_bounded():
        raise UserError(f"{env_id} has the action space {actions}; it must be continuous, a bounded vector (Box)")
    if not isinstance(observations, gym.spaces.Box) or len(observations.shape) != 1:
        raise UserError(f"{env_id} has the observation space {observations}; it must be a vector, not an image")
    return LeanEnv(gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1)))


def make_worker_env(env_id: str) -> gym.Env:
    """make_env in a worker process: only the trainer answers Ctrl-C, and no worker outlives it, even killed."""
    if multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    return make_env(env_id)


def kill_workers() -> None:
    """Ends the workers, which ignore the SIGTERM that multiprocessing would send them at exit, and wait for."""
    for worker in multiprocessing.active_children():
        worker.kill()


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """multiprocessing.TimeoutError after seconds: in this process, only a signal ends a step that hangs."""

    def expire(*_) -> NoReturn:
        raise multiprocessing.TimeoutError

    signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


class EnvSpec(NamedTuple):
    """What the networks need to know of an environment."""

    observation_dim: int
    action_dim: int
    action_low: np.ndarray  # [A], in the environment's own units
    action_high: np.ndarray
    step_seconds: float


def read_env_spec(env_id: str) -> EnvSpec:
    """Makes the environment once, so that a mistake ends the run before it begins; raises UserError."""
    env, step_seconds = make_env(env_id), 0.0
    with suppress(Exception), time_limit(10):  # a fault inside a step is the run's to report
        env.reset(seed=0)
        start = time.perf_counter()
        for _ in range(5):
            env.step(np.zeros(env.action_space.shape, np.float32))
        step_seconds = (time.perf_counter() - start) / 5
    box = env.unwrapped.action_space
    return EnvSpec(env.observation_space.shape[0], box.shape[0], box.low, box.high, step_seconds)


class Step(NamedTuple):
    """Answers of E environments. Where an episode ended, observations [E, O] already begin the next one, and
    next_observations [E, O] are the last of the old one; rewards, terminations, truncations [E]."""

    observations: np.ndarray
    next_observations: np.ndarray
    rewards: np.ndarray
    terminations: np.ndarray
    truncations: np.ndarray


class VectorEnv:
    """E environments behind send and receive, so that an update can run while they step; same-step autoreset.

    Raises TrainingFault, naming the environment, when one dies, raises, hangs for timeout seconds or returns no number.
    """

    def __init__(self, env_id: str, num_envs: int, parallel: bool, timeout: float):
        gym.logger.min_level = gym.logger.ERROR + 1  # a worker's fault is reported once, by faults()
        self.env_id, self.num_envs, self.parallel, self.timeout = env_id, num_envs, parallel, timeout
        engine = gym.vector.AsyncVectorEnv if parallel else gym.vector.SyncVectorEnv
        if parallel:
            multiprocessing.util.Finalize(None, kill_workers, exitpriority=0)
        with self.faults():
            thunks = [partial(make_worker_env, env_id)] * num_envs
            self.envs = engine(thunks, copy=False, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)

    def reset(self, seeds: list[int]) -> np.ndarray:
        """Begins an episode everywhere: seeds [E] -> observations [E, O]."""
        with self.faults():
            if self.parallel:
                self.envs.reset_async(seed=seeds)
            observations, _ = self.envs.reset_wait(self.timeout) if self.parallel else self.envs.reset(seed=seeds)
        self.check_finite(observations, np.zeros(self.num_envs))
        return observations.copy()

    def send(self, actions: np.ndarray) -> None:
        """Hands out actions [E, A]; parallel environments step at once, the others in receive."""
        if not np.isfinite(actions).all():  # not the environment's fault, though it would look like one
            raise TrainingFault("the policy's action is not finite")
        self.actions = actions
        if self.parallel:
            with self.faults():
                self.envs.step_async(actions)

    def receive(self) -> Step:
        with self.faults():
            answer = self.envs.step_wait(self.timeout) if self.parallel else self.envs.step(self.actions)
        observations, rewards, terminations, truncations, infos = answer
        self.check_finite(observations, rewards)
        observations = next_observations = observations.copy()  # the engine's own array is overwritten by the next step
        if "final_obs" in infos:
            next_observations = observations.copy()
            for index in np.flatnonzero(infos["_final_obs"]):
                next_observations[index] = infos["final_obs"][index]
            self.check_finite(next_observations, rewards)
        return Step(observations, next_observations, rewards, terminations, truncations)

    def check_finite(self, observations: np.ndarray, rewards: np.ndarray) -> None:
        finite = np.isfinite(observations).all(-1) & (np.abs(rewards) < 3e38)  # the replay holds float32
        if not finite.all():
            bad = f"environment {finite.argmin()} of {self.num_envs} ({self.env_id})"
            raise TrainingFault(f"{bad}: observation or reward not finite")

    @contextmanager
    def faults(self) -> Iterator[None]:
        try:
            with time_limit(self.timeout * (1 + self.parallel)):  # the workers' own time-out comes first
                yield
        except (Exception, SystemExit) as error:
            late = isinstance(error, multiprocessing.TimeoutError)
            why = str(error) if isinstance(error, TrainingFault) else one_line(error)
            why = f"no answer within {self.timeout:g} s (--env-timeout)" if late else why
            culprits = []
            if self.parallel and hasattr(self, "envs"):
                time.sleep(0.1)  # a killed process closes its pipe just before it counts as dead
                for index, (pipe, process) in enumerate(zip(self.envs.parent_pipes, self.envs.processes)):
                    if pipe is None or not process.is_alive() or (late and not pipe.poll(0)):
                        culprits.append(str(index))
                    if not process.is_alive() and isinstance(error, (EOFError, OSError)):
                        why = "its process died (killed, or out of memory)"
            who = f"environment {', '.join(culprits)} of {self.num_envs}" if culprits else "environment"
            raise TrainingFault(f"{who} ({self.env_id}): {why}") from None

    def close(self) -> None:
        """Ends the workers, also one that hangs."""
        for process in self.envs.processes if self.parallel else ():
            process.kill()
            process.join()
        self.envs.closed = True


def make_vector_env(args: "Args", spec: EnvSpec, num_envs: int) -> VectorEnv:
    """A process an environment where that is faster: it saves stepping time but costs a round trip of about 0.15 ms."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parallel = cores > 1 and spec.step_seconds * (1 - 1 / min(cores, num_envs + 1)) > 1.5e-4
    parallel = parallel if args.vector_env == "auto" else args.vector_env == "async"
    return VectorEnv(args.env_id, num_envs, parallel, args.env_timeout)


def env_seeds(args: "Args", envs_per_seed: int, purpose: int, step: int) -> list[int]:
    """[S * envs_per_seed] reset seeds, seed-major; seed k's depend on k alone, not on how many train beside it."""
    pairs = itertools.product(range(args.seed, args.seed + args.num_seeds), range(envs_per_seed))
    return [int(np.random.SeedSequence([*pair, purpose, step]).generate_state(1)[0] >> 1) for pair in pairs]


# endregion


# region linear
class Linear(nn.Module):
    """One linear layer for every member of a stack: weight [*stack, in, out], bias [*stack, 1, out].

    x [*stack, B, in], or broadcastable to it, -> x @ weight + bias [*stack, B, out], as one batched product.
    """

    def __init__(self, stack: tuple[int, ...], in_features: int, out_features: int):
        super().__init__()
        try:
            self.weight = nn.Parameter(torch.empty(*stack, in_features, out_features))
            self.bias = nn.Parameter(torch.empty(*stack, 1, out_features))
        except RuntimeError:
            raise UserError("the networks do not fit into memory: lower --hidden-sizes or --num-seeds") from None
        bound = in_features**-0.5  # as nn.Linear
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: Tensor, members: slice = slice(None)) -> Tensor:
        """members picks along the last stack axis: slice(1) is the first twin alone."""
        return affine(x, self.weight[..., members, :, :], self.bias[..., members, :, :])


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x @ weight + bias. For few columns MKL takes four times as long as for as few rows, for a single column seven times."""
    stack, (in_features, out_features) = weight.shape[:-2], weight.shape[-2:]
    if out_features == 1:
        return (x * weight.mT).sum(-1, keepdim=True) + bias
    x, weight, bias = x.expand(*stack, *x.shape[-2:]).flatten(0, -3), weight.flatten(0, -3), bias.flatten(0, -3)
    if 2 * out_features < in_features:
        return torch.baddbmm(bias.mT, weight.mT, x.mT).mT.unflatten(0, stack)
    return torch.baddbmm(bias, x, weight).unflatten(0, stack)


def seed_parameters(network: nn.Module, seeds: range) -> None:
    """Redraws the layers so that seed k's initial weights depend on it alone, not on how many train beside it."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for layer in network.modules():
        for parameter in layer.parameters() if isinstance(layer, Linear) else ():
            bound = layer.weight.shape[-2] ** -0.5
            for member, generator in zip(parameter.data, generators):
                member.uniform_(-bound, bound, generator=generator)


def set_gradients(loss: Tensor, network: nn.Module) -> None:
    """The gradients of loss [S] for the optimiser of network, which no other network gets; unlike backward(), it compiles."""
    parameters = list(network.parameters())
    gradients = torch.autograd.grad(loss.sum(), parameters, allow_unused=True)  # a sum over seeds: no term couples two of them
    for parameter, gradient in zip(parameters, gradients):  # contiguous: Adam's fused CPU kernel does not look at strides
        parameter.grad = None if gradient is None else gradient.contiguous()


@torch.no_grad()
def polyak_update(target: nn.Module, online: nn.Module, tau: float) -> None:
    """target <- (1 - tau) target + tau online, parameter by parameter."""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), tau)


def gradient_norm(network: nn.Module) -> Tensor:
    """Norm of the parameters' gradient, one number a seed: [S]."""
    return sum(parameter.grad.flatten(1).square().sum(1) for parameter in network.parameters()).sqrt()


def keep_freed_memory() -> None:
    """Stops glibc from returning freed activations to the kernel: the page faults cost up to half of an update on a CPU."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    for option, size in ((-3, 2**30), (-1, 2**31 - 1)) if mallopt else ():  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        mallopt(option, size)


# endregion


class RunningNormalizer(nn.Module):
    """Mean and variance [S, 1, W] of all rows that a seed has seen; forward scales rows [S, B, W] by them, within +-10."""

    def __init__(self, num_seeds: int, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_seeds, 1, width, dtype=torch.float64))
        self.register_buffer("var", torch.ones(num_seeds, 1, width, dtype=torch.float64))
        self.register_buffer("count", torch.full((num_seeds, 1, 1), 1e-4, dtype=torch.float64))

    def update(self, rows: Tensor) -> None:
        """Takes in rows [S, B, W] (Chan et al. 1979: mean and variance of the union of two sets)."""
        var, mean = torch.var_mean(rows.double(), 1, correction=0, keepdim=True)
        share = rows.shape[1] / (self.count + rows.shape[1])
        change = mean - self.mean
        self.var += share * (var - self.var) + share * (1 - share) * change.square()
        self.mean += share * change
        self.count += rows.shape[1]

    def scale(self) -> Tensor:
        return (self.var + 1e-8).sqrt()

    def forward(self, rows: Tensor) -> Tensor:
        return ((rows - self.mean) / self.scale()).clamp(-10, 10).float()


class Network(nn.Module):
    """A tanh network for each seed: [S, B, in] -> [S, B, out]; orthogonal initial weights, the last layer's times last_gain."""

    def __init__(self, seeds: range, in_features: int, out_features: int, last_gain: float, args: Args):
        super().__init__()
        sizes = [in_features, *args.hidden_sizes, out_features]
        self.layers = nn.ModuleList(Linear((len(seeds),), *size) for size in itertools.pairwise(sizes))
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # seed k's weights depend on it alone
        for layer in self.layers:
            nn.init.zeros_(layer.bias)
            for weight, generator in zip(layer.weight.data, generators):
                nn.init.orthogonal_(weight, last_gain if layer is self.layers[-1] else 2**0.5, generator)

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            hidden = torch.tanh(layer(hidden))
        return self.layers[-1](hidden)


class Actor(Network):
    """The policy: normalised observations [S, B, O] -> mean [S, B, A] of a Gaussian whose standard deviation is no function
    of the state. The statistics of the observations are with it, so that it can act alone."""

    def __init__(self, seeds: range, observation_dim: int, action_dim: int, args: Args):
        super().__init__(seeds, observation_dim, action_dim, 0.01, args)
        self.log_std = nn.Parameter(torch.zeros(len(seeds), 1, action_dim))
        self.observation_normalizer = RunningNormalizer(len(seeds), observation_dim)

    def log_prob(self, mean: Tensor, actions: Tensor) -> Tensor:
        """log N(actions; mean, std), summed over A: [S, B]."""
        scaled = (actions - mean) / self.log_std.exp()
        return (-0.5 * scaled.square() - self.log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> Tensor:
        """[S], the same in every state."""
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum((1, 2))


class Critic(Network):
    """The value of a state: normalised observations [S, B, O] -> [S, B]."""

    def __init__(self, seeds: range, observation_dim: int, args: Args):
        super().__init__(seeds, observation_dim, 1, 1.0, args)

    def forward(self, observations: Tensor) -> Tensor:
        return super().forward(observations).squeeze(-1)


def gae(rewards: Tensor, values: Tensor, next_values: Tensor, terminations: Tensor, ends: Tensor,
        gamma: float, gae_lambda: float) -> Tensor:  # fmt: skip
    """Generalised advantages A_t = delta_t + gamma lambda (1 - end_t) A_{t+1} -> [S, T, N] (Schulman et al. 2016, equation 16).

    delta_t = r_t + gamma (1 - terminated_t) V(s'_t) - V(s_t). values V(s_t), next_values V(s'_t), where s' is the last
    observation of its own episode; ends (terminated or truncated) cut the sum. All [S, T, N].
    """
    deltas = rewards + gamma * (1 - terminations) * next_values - values
    advantages, following = torch.empty_like(deltas), 0.0
    for t in reversed(range(deltas.shape[1])):
        following = deltas[:, t] + gamma * gae_lambda * (1 - ends[:, t]) * following
        advantages[:, t] = following
    return advantages


def policy_loss(log_ratio: Tensor, advantages: Tensor, clip_coef: float) -> Tensor:
    """mean max(-A ratio, -A clip(ratio, 1 - c, 1 + c)) over M: [S, M] -> [S] (PPO, equation 7)."""
    ratio = log_ratio.exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip_coef, 1 + clip_coef)).mean(-1)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_coef: float) -> Tensor:
    """1/2 mean max((V - R)^2, (V_clipped - R)^2) over M, V_clipped within c of the rollout's value: [S, M] -> [S]."""
    clipped = old_values + (values - old_values).clamp(-clip_coef, clip_coef)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square()).mean(-1)


def clip_gradients(networks: nn.Module, max_norm: float) -> None:
    """Scales each seed's gradient down to the norm max_norm, whatever the other seeds' are."""
    factor = (max_norm / (gradient_norm(networks) + 1e-6)).clamp(max=1)
    for parameter in networks.parameters():
        parameter.grad *= factor.view(-1, *[1] * (parameter.dim() - 1))


# region evaluation
def smoothness(actions: np.ndarray) -> float:
    """How much an episode's actions [T, A], in environment units, oscillate; lower is smoother (Mysore et al. 2021, CAPS).

    2 / T sum_k f_k |FFT(actions)|_k over the first T // 2 bins, f_k = k / T cycles a step, mean over A; 0 if T < 2.
    """
    length = len(actions)
    if length < 2:
        return 0.0
    magnitudes = np.abs(np.fft.rfft(np.asarray(actions, np.float64), axis=0))[: length // 2]
    return float(np.mean(2 / length * (np.arange(length // 2) / length) @ magnitudes))


class Episode(NamedTuple):
    """A row of eval.csv."""

    step: int
    transitions: int
    seed: int
    episode: int
    episodic_return: float
    length: int
    smoothness: float


@torch.no_grad()
def evaluate(policy: Callable, envs: VectorEnv, spec: EnvSpec, args: "Args", step: int, stop: Callable) -> list[Episode]:
    """One episode of the deterministic policy in each of the S * eval_episodes environments, each with a seed of its own.

    policy: observations [S, eval_episodes, O] -> actions [S, eval_episodes, A]. Empty if stop() turned true on the way.
    """
    observations = envs.reset(env_seeds(args, args.eval_episodes, 1, step))
    running, returns, lengths = np.ones(envs.num_envs, bool), np.zeros(envs.num_envs), np.zeros(envs.num_envs, int)
    taken = []
    while running.any():
        if stop():
            return []
        batch = torch.from_numpy(observations).view(args.num_seeds, args.eval_episodes, -1)
        taken.append(policy(batch).cpu().numpy().reshape(envs.num_envs, -1))
        envs.send(taken[-1])
        answer = envs.receive()
        returns += answer.rewards * running
        lengths += running
        running &= ~(answer.terminations | answer.truncations)
        observations = answer.observations
    actions = spec.action_low + (np.stack(taken) + 1) / 2 * (spec.action_high - spec.action_low)  # [T, E, A]
    episodes = []
    for index, length in enumerate(lengths):
        seed, episode = divmod(index, args.eval_episodes)
        result = float(returns[index]), int(length), smoothness(actions[:length, index])
        episodes.append(Episode(step, step * args.num_envs, args.seed + seed, episode, *result))
    return episodes


@torch.no_grad()
def record_video(policy: Callable, args: "Args", folder: Path, step: int) -> Path:
    """An mp4 of one episode of the first seed's deterministic policy; raises TrainingFault where nothing can render."""
    try:
        env = make_env(args.env_id, render_mode="rgb_array")
        fps = round(1 / env.unwrapped.dt) if hasattr(env.unwrapped, "dt") else env.metadata.get("render_fps", 30)
        name = f"step_{step:09d}"
        env = gym.wrappers.RecordVideo(env, str(folder), lambda _: True, name_prefix=name, fps=fps, disable_logger=True)
        (observation, _), done = env.reset(seed=env_seeds(args, 1, 2, step)[0]), False
        while not done:
            batch = torch.from_numpy(observation).expand(args.num_seeds, 1, -1)
            observation, _, terminated, truncated, _ = env.step(policy(batch)[0, 0].cpu().numpy())
            done = terminated or truncated
        env.close()
        return max(folder.glob(f"{name}*.mp4"))
    except Exception as error:
        hint = "without a display, the environment variable MUJOCO_GL chooses between egl and osmesa"
        raise TrainingFault(f"--capture-video failed: {one_line(error)} ({hint})") from None


# endregion


# region run
CHECKPOINT_VERSION = 1


def write_atomically(path: Path, write: Callable) -> None:
    """write(binary file): readers of path see the old file or the new one, whole. TrainingFault if the disk refuses."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        temporary.unlink(missing_ok=True)
        raise TrainingFault(f"cannot write {path}: {one_line(error)}") from None


def save_checkpoint(folder: Path, step: int, modules: dict, replay: ReplayBuffer | None) -> None:
    """Writes replay.pt, then checkpoint.pt; a kill between the two leaves a replay slightly ahead, which does no harm.

    modules: {name: network or optimiser}. Raises TrainingFault, the old files untouched, if one holds a number that is not
    finite; Adam's moments overflow before the parameters do.
    """
    for name, module in modules.items():
        states = [module.state_dict()] if isinstance(module, nn.Module) else module.state.values()
        if not all(torch.isfinite(tensor).all() for state in states for tensor in state.values()):
            raise TrainingFault(f"{name} is not finite")
    if replay is not None:
        write_atomically(folder / "replay.pt", partial(torch.save, replay.state_dict()))
    state = {"version": CHECKPOINT_VERSION, "step": step, "cpu_generator": torch.get_rng_state()}
    state["cuda_generator"] = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    state["modules"] = {name: module.state_dict() for name, module in modules.items()}
    write_atomically(folder / "checkpoint.pt", partial(torch.save, state))


def load_checkpoint(folder: Path, modules: dict, replay: ReplayBuffer | None, device: torch.device) -> int:
    """Restores modules, replay and generators; returns the step.

    Raises UserError for a file that is missing, truncated, of another version or other shapes, or that would run code.
    """
    afresh = "start again without --resume (policies/ still holds the evaluated policies)"
    path = folder / "checkpoint.pt"
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        if state["version"] != CHECKPOINT_VERSION:
            raise ValueError(f"version {state['version']}, this script reads {CHECKPOINT_VERSION}")
        for name, module in modules.items():
            module.load_state_dict(state["modules"][name])
        torch.set_rng_state(state["cpu_generator"].cpu())
        if device.type == "cuda" and state["cuda_generator"] is not None:
            torch.cuda.set_rng_state(state["cuda_generator"].cpu())
        path = folder / "replay.pt"
        if replay is not None and path.exists():
            replay.load_state_dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
        return state["step"]
    except FileNotFoundError:
        raise UserError(f"{folder} holds no checkpoint: {afresh}") from None
    except Exception as error:  # torch.load raises half a dozen types for a damaged file
        raise UserError(f"{path} is damaged or does not fit ({one_line(error)}): {afresh}") from None


def read_run_args(folder: Path) -> dict:
    """The arguments of the run in folder; raises UserError if it is no run, or another script's."""
    try:
        saved = json.loads((folder / "args.json").read_text())
        script = saved.pop("script")
        if script != Path(__file__).stem:
            raise UserError(f"--resume {folder}: that run was made by {script}.py, not by {Path(__file__).name}")
        saved = {key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()}
        return dataclasses.asdict(Args(**{**saved, "resume": str(folder)}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--resume {folder}: no run of this script ({one_line(error)})") from None


def make_run_folder(args: "Args") -> Path:
    """runs/{env_id}__{exp_name}__{seed}__{timestamp}, a new one also when another run starts in the same second."""
    name = re.sub(r"[^\w.-]", "_", f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}")
    try:
        for suffix in itertools.count() if not args.resume else ():
            folder = Path("runs", f"{name}_{suffix}" if suffix else name)
            with suppress(FileExistsError):
                folder.mkdir(parents=True)
                break
        folder = Path(args.resume) if args.resume else folder
        (folder / "policies").mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the run's folder: {one_line(error)}") from None
    text = json.dumps({"script": Path(__file__).stem, **dataclasses.asdict(args), "resume": None}, indent=2)
    write_atomically(folder / "args.json", lambda file: file.write(text.encode()))
    return folder


def read_episodes(folder: Path, last_step: int) -> list[Episode]:
    """The rows of eval.csv up to the checkpoint's step; what came after it is evaluated again."""
    if not (folder / "eval.csv").exists():
        return []
    kinds = Episode.__annotations__.values()
    try:
        rows = list(csv.reader((folder / "eval.csv").read_text().splitlines()))[1:]
        episodes = [Episode(*(kind(cell) for kind, cell in zip(kinds, row))) for row in rows]
    except (ValueError, TypeError) as error:
        raise UserError(f"{folder / 'eval.csv'} is damaged ({one_line(error)}): repair it, or move it away") from None
    return [episode for episode in episodes if episode.step <= last_step]


def write_episodes(folder: Path, episodes: list[Episode]) -> None:
    rows = [[name.removeprefix("episodic_") for name in Episode._fields], *episodes]
    text = "".join(",".join(map(str, row)) + "\n" for row in rows)
    write_atomically(folder / "eval.csv", lambda file: file.write(text.encode()))


class StopRequest:
    """stop() is true after SIGINT or SIGTERM; a second signal ends the process at once, the last checkpoint intact.

    Within half a second it is no second one: uv run, for one, forwards the Ctrl-C that the terminal has sent to both.
    """

    def __init__(self):
        self.requested_at = math.inf
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)

    def __call__(self) -> bool:
        return self.requested_at < math.inf

    def handle(self, number: int, _) -> None:
        if time.monotonic() > self.requested_at + 0.5:
            kill_workers()
            os._exit(128 + number)
        if self():
            return
        self.requested_at = time.monotonic()
        with suppress(OSError):  # os.write, for the signal may come in the middle of a print
            os.write(2, b"\nstopping: saving the run (a second signal stops at once)\n")


class Logger:
    """TensorBoard, wandb with --track, and a progress bar (plain lines where the output is no terminal)."""

    def __init__(self, args: "Args", folder: Path, step: int):
        self.total, self.shown, self.last, self.wandb = args.total_timesteps, {}, (step, time.perf_counter()), None
        # the writer's thread prints its faults; flush() raises them, here
        threading.excepthook = lambda fault: isinstance(fault.exc_value, OSError) or threading.__excepthook__(fault)
        self.writer = SummaryWriter(str(folder), purge_step=step + 1 if args.resume else None)  # step itself is not repeated
        self.writer.add_text("hyperparameters", "\n".join(f"    {key}: {value!r}" for key, value in vars(args).items()))
        self.bar = tqdm(total=self.total, initial=step, disable=not sys.stderr.isatty(), dynamic_ncols=True)
        if args.track:
            import wandb

            identity = {"project": args.wandb_project_name, "entity": args.wandb_entity, "name": folder.name, "id": folder.name}
            self.wandb = wandb
            wandb.init(**identity, resume="allow", config=vars(args), dir=str(folder), save_code=True)

    def log(self, step: int, scalars: dict[str, float], video: Path | None = None) -> None:
        """Writes the scalars and shows eval/*, the step and charts/SPS, vector steps a second since the last call."""
        now, (last_step, last_time) = time.perf_counter(), self.last
        if step > last_step:
            scalars = {**scalars, "charts/SPS": (step - last_step) / (now - last_time)}
        self.last = step, now
        try:
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, step)
            self.writer.flush()  # nothing logged is lost with a killed run, and a full disk shows here
        except OSError as error:
            raise TrainingFault(f"cannot write TensorBoard's events: {one_line(error)}") from None
        if self.wandb:
            media = {"videos/eval": self.wandb.Video(str(video), format="mp4")} if video else {}
            self.wandb.log({**scalars, **media}, step=step)
        for name in ("charts/SPS", "eval/return", "eval/smoothness"):
            if name in scalars:
                self.shown[name.split("/")[1]] = f"{scalars[name]:.4g}"
        if self.bar.disable:
            with suppress(BrokenPipeError):  # Ctrl-C ends the tee of python ... | tee too; the run is to be saved
                print(f"step {step}/{self.total}", *(f"{name} {value}" for name, value in self.shown.items()), flush=True)
        else:
            self.bar.set_postfix(self.shown, refresh=False)
            self.bar.update(step - self.bar.n)

    def close(self) -> None:
        self.bar.close()
        self.writer.close()
        if self.wandb:
            self.wandb.finish()


def resume_command(folder: Path) -> str:
    return f"python {shlex.quote(sys.argv[0])} --resume {shlex.quote(str(folder))}"


@contextmanager
def guarded(folder: Path, progress: Callable, *envs: VectorEnv) -> Iterator[None]:
    """Ends the environments however the run ends; for a fault, says in one line what it was and how to go on.

    progress() -> (step, metrics of the last update): a loss that is not finite is the cause of whatever else went wrong.
    """
    try:
        yield
    except (TrainingFault, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search("alloc|out of memory", str(error)):
            raise  # PyTorch has no type of its own for a CPU that is out of memory
        step, metrics = progress()
        what = str(error) if isinstance(error, TrainingFault) else one_line(error)
        if isinstance(error, TrainingFault):
            losses = [name for name, value in metrics.items() if not value.isfinite().all()]
            what = f"{losses[0]} is not finite ({what})" if losses and losses[0] not in what else what
        if "is not finite" in what:
            with suppress(OSError, TrainingFault):
                last = (folder / "checkpoint.pt").read_bytes()
                write_atomically(folder / "checkpoint_last_finite.pt", lambda file: file.write(last))
                what += "; checkpoint_last_finite.pt is from before"
        script = Path(__file__).name
        print(f"{script}: step {step}: {what}. Go on from the last checkpoint: {resume_command(folder)}", file=sys.stderr)
        sys.exit(1)
    finally:
        for vector_env in envs:
            vector_env.close()


# endregion


def train(args: Args) -> None:
    if args.num_steps * args.num_envs < 2 * args.num_minibatches:
        raise UserError(f"--num-minibatches must be at most half of --num-steps times --num-envs, not {args.num_minibatches}")
    spec = read_env_spec(args.env_id)
    use_cuda = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if use_cuda else "cpu")
    torch.set_num_threads(args.num_threads)
    keep_freed_memory()
    torch.manual_seed(args.seed)
    S, N = args.num_seeds, args.num_envs

    seeds = range(args.seed, args.seed + S)
    actor = Actor(seeds, spec.observation_dim, spec.action_dim, args).to(device)
    critic = Critic(seeds, spec.observation_dim, args).to(device)
    reward_normalizer = RunningNormalizer(S, 1).to(device)
    networks = nn.ModuleList([actor, critic])
    optimizer = torch.optim.Adam(networks.parameters(), args.learning_rate, eps=1e-5, fused=True)
    modules = {"actor": actor, "critic": critic, "optimizer": optimizer, "reward_normalizer": reward_normalizer}
    widths = {"observations": spec.observation_dim, "actions": spec.action_dim, "next_observations": spec.observation_dim}
    rollout = {name: torch.zeros(S, args.num_steps, N, width, device=device) for name, width in widths.items()}
    numbers = ("log_probs", "values", "rewards", "terminations", "ends")
    rollout |= {name: torch.zeros(S, args.num_steps, N, device=device) for name in numbers}
    seed_axis = torch.arange(S, device=device).unsqueeze(-1)

    def update() -> dict[str, Tensor]:
        """Learns from the full rollout."""
        with torch.no_grad():
            next_values = critic(rollout["next_observations"].flatten(1, 2)).view_as(rollout["values"])
            outcome = rollout["terminations"], rollout["ends"]
            advantages = gae(rollout["rewards"], rollout["values"], next_values, *outcome, args.gamma, args.gae_lambda)
        rows = {name: rollout[name].flatten(1, 2) for name in ("observations", "actions", "log_probs", "values")}
        rows |= {"advantages": advantages.flatten(1, 2), "returns": (advantages + rollout["values"]).flatten(1, 2)}
        for _ in range(args.update_epochs):
            order = torch.rand(rows["values"].shape, device=device).argsort(-1)
            for index in order.tensor_split(args.num_minibatches, -1):
                batch = {name: column[seed_axis, index] for name, column in rows.items()}  # [S, M, ...]
                log_ratio = actor.log_prob(actor(batch["observations"]), batch["actions"]) - batch["log_probs"]
                values, advantages = critic(batch["observations"]), batch["advantages"]
                if args.norm_adv:
                    advantages = (advantages - advantages.mean(-1, keepdim=True)) / (advantages.std(-1, keepdim=True) + 1e-8)
                pg_loss, entropy = policy_loss(log_ratio, advantages, args.clip_coef), actor.entropy()
                v_loss = value_loss(values, batch["values"], batch["returns"], args.clip_coef if args.clip_vloss else math.inf)
                loss = pg_loss - args.ent_coef * entropy + args.vf_coef * v_loss
                optimizer.zero_grad()
                loss.sum().backward()  # a sum over seeds: no term couples two of them
                clip_gradients(networks, args.max_grad_norm)
                optimizer.step()
        losses = {"policy_loss": pg_loss, "value_loss": v_loss, "entropy": entropy}
        losses["approx_kl"] = (log_ratio.exp() - 1 - log_ratio).mean(-1)  # http://joschu.net/blog/kl-approx.html
        losses["clipfrac"] = ((log_ratio.exp() - 1).abs() > args.clip_coef).float().mean(-1)
        losses["explained_variance"] = 1 - rows["advantages"].var(-1) / rows["returns"].var(-1).clamp_min(1e-8)
        return {f"losses/{name}": value.detach() for name, value in losses.items()}

    @torch.no_grad()
    def policy(observations: Tensor) -> Tensor:
        return actor(actor.observation_normalizer(observations.to(device))).clamp(-1, 1)

    @torch.no_grad()
    def explore(observations: Tensor) -> dict[str, Tensor]:
        """The rollout's columns of a step; the actions are a sample of the Gaussian, not yet clipped."""
        actor.observation_normalizer.update(observations)
        observations = actor.observation_normalizer(observations)
        mean = actor(observations)
        actions = mean + actor.log_std.exp() * torch.randn_like(mean)
        columns = {"observations": observations, "actions": actions, "values": critic(observations)}
        return {**columns, "log_probs": actor.log_prob(mean, actions)}

    step = load_checkpoint(Path(args.resume), modules, None, device) if args.resume else 0
    envs, eval_envs = make_vector_env(args, spec, S * N), make_vector_env(args, spec, S * args.eval_episodes)
    folder = make_run_folder(args)
    stop, metrics = StopRequest(), {}
    save = partial(save_checkpoint, folder, modules=modules, replay=None)

    with guarded(folder, lambda: (step, metrics), envs, eval_envs):
        logger, episodes = Logger(args, folder, step), read_episodes(folder, step)
        if not args.resume:
            save(step)
        observations = envs.reset(env_seeds(args, N, 0, step))
        episode_returns, episode_lengths, finished = np.zeros(S * N), np.zeros(S * N), []
        saved_at = time.perf_counter()
        discounted_returns = torch.zeros(S, N, device=device)  # of each episode so far: their spread is the rewards' scale
        row = 0  # of the rollout
        while True:
            due = step % args.eval_every == 0 or step == args.total_timesteps
            if due and not (episodes and episodes[-1].step == step):
                if new := evaluate(policy, eval_envs, spec, args, step, stop):
                    episodes += new
                    small = {name: modules[name].state_dict() for name in ("actor", "critic")}
                    write_atomically(folder / f"policies/step_{step:09d}.pt", partial(torch.save, small))
                    write_episodes(folder, episodes)
                    video = record_video(policy, args, folder / "videos", step) if args.capture_video else None
                    scores = np.mean([(episode.episodic_return, episode.smoothness) for episode in new], 0)
                    logger.log(step, dict(zip(("eval/return", "eval/smoothness"), scores)), video)
            if stop() or step >= args.total_timesteps:
                break
            if time.perf_counter() - saved_at > args.checkpoint_seconds:
                save(step)
                saved_at = time.perf_counter()

            columns = explore(torch.from_numpy(observations).to(device).view(S, N, -1))
            envs.send(columns["actions"].clamp(-1, 1).flatten(0, 1).cpu().numpy())
            answer = envs.receive()
            outcome = answer.next_observations, answer.rewards, answer.terminations, answer.terminations | answer.truncations
            next_observations, rewards, terminations, ends = (
                torch.as_tensor(part, dtype=torch.float32, device=device).view(S, N, *part.shape[1:]) for part in outcome
            )
            discounted_returns = discounted_returns * args.gamma * (1 - terminations) + rewards
            reward_normalizer.update(discounted_returns.unsqueeze(-1))
            columns["next_observations"] = actor.observation_normalizer(next_observations)
            columns["rewards"] = (rewards / reward_normalizer.scale().squeeze(-1)).clamp(-10, 10)
            for name, column in {**columns, "terminations": terminations, "ends": ends}.items():
                rollout[name][:, row] = column
            observations = answer.observations
            step, row = step + 1, (row + 1) % args.num_steps
            if row == 0:
                left = 1 - (step - args.num_steps) / args.total_timesteps
                optimizer.param_groups[0]["lr"] = args.learning_rate * (left if args.anneal_lr else 1)
                metrics |= update()

            episode_returns += answer.rewards
            episode_lengths += 1
            done = answer.terminations | answer.truncations
            finished += zip(episode_returns[done], episode_lengths[done])
            episode_returns[done] = episode_lengths[done] = 0
            if step % args.log_every == 0:
                scalars = {name: value.mean().item() for name, value in metrics.items()}
                for name, value in scalars.items():
                    if not math.isfinite(value):
                        raise TrainingFault(f"{name} is not finite")
                if finished:
                    means = np.mean(finished, 0)
                    scalars |= {"charts/episodic_return": means[0], "charts/episodic_length": means[1]}
                    finished.clear()
                scalars["charts/learning_rate"] = optimizer.param_groups[0]["lr"]
                logger.log(step, {**scalars, "charts/transitions": step * N})
        save(step)
        logger.close()
    how = "finished" if step >= args.total_timesteps else f"stopped at step {step}, go on with: {resume_command(folder)}"
    print(f"{folder}: {how}")


if __name__ == "__main__":
    try:
        train(parse_args())
    except (UserError, TrainingFault) as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)

"""SAC: soft actor-critic with twin critics (Haarnoja et al. 2018, arXiv:1812.05905), the parent of every sac_*.py.

    y = r + gamma (1 - terminated) (min_j Q'_j(s', a~') - alpha log pi(a~' | s')),   a~' sampled from pi(s')

    python baselines/sac.py --env-id Walker2d-v5
    python baselines/sac.py --env-id dog-run --num-envs 8 --num-seeds 5

Shapes: S seeds, N environments a seed, B batch, O observation, A action, H hidden, T time. The second axis of a critic's
value [S, 2, B] is the twin. Actions are normalised to [-1, 1] everywhere but inside the environments.
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
import shutil
import signal
import sys
import sysconfig
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, NoReturn, get_type_hints

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
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
    total_timesteps: Count = 1_000_000  # vector steps: each advances every environment and makes one update
    num_envs: Few = 1  # N, parallel environments a seed
    resume: str | None = None  # a run's folder: go on from its checkpoint

    policy_lr: Rate = 3e-4  # Adam's step size, actor
    q_lr: Rate = 1e-3  # Adam's step size, critic and entropy coefficient
    buffer_size: Count = 1_000_000  # transitions a seed that the replay holds
    gamma: Fraction = 0.99  # discount factor
    tau: Fraction = 0.005  # share of the online network that enters the target network at each update
    batch_size: Count = 256  # B, transitions a seed in an update
    alpha: Positive = 0.2  # entropy coefficient, with --no-autotune
    autotune: bool = True  # tune it, from 1, to the target entropy -A
    log_std_min: Annotated[float, (-100.0, 2.0)] = -5.0  # lower end of the policy's log standard deviation; the upper is 2
    log_std_bound: Literal["tanh", "clamp"] = "tanh"  # how it is kept there
    td_loss_scale: Positive = 1.0  # factor of the critic's TD loss
    learning_starts: Whole = 5_000  # vector steps of uniform random actions before the first update
    update_every: Count = 1  # vector steps between two rounds of updates; a round has as many
    policy_frequency: Count = 2  # updates of the critic between two rounds of actor updates; a round has as many
    hidden_sizes: Widths = (256, 256)  # hidden layers, actor and critic
    activation: Literal["relu", "silu"] = "relu"  # of the hidden layers, actor and critic

    eval_every: Count = 25_000  # vector steps between two evaluations of the deterministic policy
    eval_episodes: Few = 10  # episodes a seed in an evaluation
    log_every: Count = 500  # vector steps between two lines of the log
    checkpoint_seconds: Seconds = 600.0  # the most that a killed run loses
    save_replay: bool = True  # keep the replay beside the checkpoint, so that a resumed run goes on where it was
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto is cuda where there is a GPU
    num_threads: Few = 1  # PyTorch's CPU threads; the networks are small, and the environments want the other cores
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile the update; auto is on with cuda, and for a long run
    cuda_graph: bool = True  # with cuda, replay the update as one captured graph; without, run it eagerly
    vector_env: Literal["auto", "async", "sync"] = "auto"  # a process an environment, or none; auto times a step
    env_timeout: Timeout = 300.0  # seconds after which an environment that does not answer ends the run

    track: bool = False  # log to Weights & Biases too
    wandb_project_name: str = "smoothq"
    wandb_entity: str | None = None
    capture_video: bool = False  # at each evaluation, record an episode of the first seed in runs/NAME/videos


ENV_SETTINGS: dict[str, dict] = {}  # defaults that depend on the environment; a flag overrides them


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


LOG_STD_MAX = 2.0


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


class Actor(nn.Module):
    """The policy: observations [S, B, O] -> mean and log standard deviation [S, B, A] of a Gaussian, before squashing."""

    def __init__(self, num_seeds: int, observation_dim: int, action_dim: int, args: Args):
        super().__init__()
        sizes = [observation_dim, *args.hidden_sizes, 2 * action_dim]
        self.layers = nn.ModuleList(Linear((num_seeds,), *size) for size in itertools.pairwise(sizes))
        self.activation = getattr(F, args.activation)
        self.log_std_min, self.log_std_bound = args.log_std_min, args.log_std_bound

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        hidden = observations
        for layer in self.layers[:-1]:
            hidden = self.activation(layer(hidden))
        mean, log_std = self.layers[-1](hidden).chunk(2, -1)
        if self.log_std_bound == "clamp":
            return mean, log_std.clamp(self.log_std_min, LOG_STD_MAX)
        return mean, self.log_std_min + (LOG_STD_MAX - self.log_std_min) / 2 * (torch.tanh(log_std) + 1)


class Temperature(nn.Module):
    """The entropy coefficient alpha, one a seed: () -> [S]."""

    def __init__(self, num_seeds: int, alpha: float):
        super().__init__()
        self.log_alpha = nn.Parameter(torch.full((num_seeds,), math.log(alpha)))

    def forward(self) -> Tensor:
        return self.log_alpha.exp()


class Critic(nn.Module):
    """Twin action values: observations [S, B, O], actions [S, B, A] -> [S, 2, B]; or one input a twin, [S, 2, B, .]."""

    def __init__(self, num_seeds: int, observation_dim: int, action_dim: int, args: Args):
        super().__init__()
        sizes = [observation_dim + action_dim, *args.hidden_sizes, 1]
        self.layers = nn.ModuleList(Linear((num_seeds, 2), *size) for size in itertools.pairwise(sizes))
        self.activation = getattr(F, args.activation)

    def forward(self, observations: Tensor, actions: Tensor, twins: slice = slice(None)) -> Tensor:
        hidden = torch.cat([observations, actions], -1)
        if hidden.dim() == 3:
            hidden = hidden.unsqueeze(1)  # [S, 1, B, O + A], the same for both twins
        for layer in self.layers[:-1]:
            hidden = self.activation(layer(hidden, twins))
        return self.layers[-1](hidden, twins).squeeze(-1)


def squashed_sample(mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
    """A reparameterised draw a = tanh(u), u ~ N(mean, std) [S, B, A], and its log-probability [S, B] (SAC, appendix C).

    log pi = sum_A log N(u) - log(1 - tanh(u)^2), the last term as 2 (log 2 - u - softplus(-2 u)), exact for large u.
    """
    noise = torch.randn_like(mean)
    unsquashed = mean + log_std.exp() * noise
    log_normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    log_jacobian = 2 * (math.log(2) - unsquashed - F.softplus(-2 * unsquashed))
    return torch.tanh(unsquashed), (log_normal - log_jacobian).sum(-1)


def td_target(rewards: Tensor, terminations: Tensor, next_values: Tensor, gamma: float) -> Tensor:
    """r + gamma (1 - terminated) V(s'), all [S, B]; a truncated episode still bootstraps."""
    return rewards + gamma * (1 - terminations) * next_values


def critic_loss(values: Tensor, targets: Tensor) -> Tensor:
    """mse(Q_1) + mse(Q_2): values [S, 2, B] against targets [S, B] -> [S] (SAC, equation 5)."""
    return (values - targets.unsqueeze(1)).square().mean(-1).sum(-1)


# region replay
class ReplayBuffer:
    """A ring of the last capacity transitions of each seed: rows [S, capacity, W], split into named columns.

    columns: {name: width}, width 0 for one number a transition. On CUDA the rows live on the GPU, and what a step adds goes
    there in one pinned copy. Raises UserError if they do not fit into memory, or a batch not into them.
    """

    def __init__(self, args: "Args", columns: dict[str, int], device: torch.device):
        if max(args.batch_size, args.num_envs) > args.buffer_size:
            raise UserError(f"--buffer-size must be at least --batch-size and --num-envs, not {args.buffer_size}")
        self.capacity = min(args.buffer_size, args.total_timesteps * args.num_envs)
        self.columns, self.widths = columns, [max(width, 1) for width in columns.values()]
        shape = (args.num_seeds, self.capacity, sum(self.widths))
        try:
            self.rows = torch.empty(shape, device=device)
        except RuntimeError:
            raise UserError(f"a replay of {math.prod(shape) * 4e-9:.1f} GB does not fit: lower --buffer-size") from None
        self.staging = torch.empty(args.num_seeds, args.num_envs, shape[-1], pin_memory=device.type == "cuda")
        self.staged = dict(zip(columns, np.split(self.staging.numpy(), np.cumsum(self.widths)[:-1], -1)))  # views
        self.position, self.size = 0, 0
        self.device_size = torch.zeros((), dtype=torch.float64, device=device)  # a tensor: a captured graph reads it anew
        self.seed_axis = torch.arange(args.num_seeds, device=device).unsqueeze(-1)

    def add(self, **columns: np.ndarray) -> None:
        """Stores one transition of each environment: columns [S * N, width] or [S * N], seed-major."""
        for name, part in self.staged.items():
            part[...] = columns[name].reshape(part.shape)
        num_envs = self.staging.shape[1]
        before_end = min(num_envs, self.capacity - self.position)
        self.rows[:, self.position : self.position + before_end].copy_(self.staging[:, :before_end], non_blocking=True)
        self.rows[:, : num_envs - before_end].copy_(self.staging[:, before_end:], non_blocking=True)
        self.position = (self.position + num_envs) % self.capacity
        self.size = min(self.size + num_envs, self.capacity)
        self.device_size.fill_(self.size)

    def sample(self, batch_size: int) -> dict[str, Tensor]:
        """Uniform transitions, drawn with replacement for each seed: {name: [S, B, width], or [S, B] for width 0}."""
        uniform = torch.rand(len(self.rows), batch_size, dtype=torch.float64, device=self.rows.device)
        batch = self.rows[self.seed_axis, (uniform * self.device_size).long()].split(self.widths, -1)
        return {name: part if width else part[..., 0] for (name, width), part in zip(self.columns.items(), batch)}

    def state_dict(self) -> dict:
        rows = self.rows if self.size == self.capacity else self.rows[:, : self.size].clone()
        return {"rows": rows, "position": self.position}

    def load_state_dict(self, state: dict) -> None:
        """Takes over the newest rows, oldest first, also those of a ring of another capacity."""
        rows = state["rows"].roll(-state["position"], 1)[:, -self.capacity :]
        self.size = rows.shape[1]
        self.rows[:, : self.size] = rows
        self.position = self.size % self.capacity
        self.device_size.fill_(self.size)


# endregion


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


# region compilation
def worth_compiling(steps: int, device: torch.device) -> bool:
    """On a CPU, compiling costs half a minute, and an update then a quarter less; it takes g++ and Python's headers."""
    if device.type == "cpu":
        compiler = shutil.which("g++") and Path(sysconfig.get_paths()["include"], "Python.h").exists()
        if steps < 50_000 or not compiler:
            return False
    return hasattr(torch._dynamo.config, "trace_autograd_ops")  # since torch 2.11


def compile_gradients(gradients: Callable) -> Callable:
    """torch.compile, with the loss and its gradients as one graph, for the one batch size and the networks of this run.

    Nothing that the graph depends on changes in a run, so it skips the check of some 300 guards that a call begins with. Dynamo
    keeps graphs by code object: one of its own, so that no other run in this process is answered with this run's graph.
    """
    if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
        raise UserError(f"--compile on needs torch 2.11, this is {torch.__version__}")
    torch._dynamo.config.trace_autograd_ops = True  # else autograd runs the gradients, as a graph of their own
    gradients.__code__ = gradients.__code__.replace()
    return torch.compile(gradients, options={"guard_filter_fn": lambda guards: [False] * len(guards)})


class CapturedUpdate:
    """update(update_actor) -> metrics, replayed as one CUDA graph for each value of update_actor.

    The first calls run on a side stream (real updates, in which torch.compile and the allocator settle), the next one
    records. A replay draws fresh random numbers: PyTorch registers its default generator with a graph.
    """

    def __init__(self, update: Callable, warm_up: int = 4):
        self.update, self.warm_up, self.calls, self.graphs = update, warm_up, Counter(), {}
        self.stream = torch.cuda.Stream()

    def __call__(self, update_actor: bool) -> dict[str, Tensor]:
        self.calls[update_actor] += 1
        if self.calls[update_actor] <= self.warm_up:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                metrics = self.update(update_actor)
            torch.cuda.current_stream().wait_stream(self.stream)
            return metrics
        if update_actor not in self.graphs:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                metrics = self.update(update_actor)
            self.graphs[update_actor] = graph, metrics
        graph, metrics = self.graphs[update_actor]
        graph.replay()
        return metrics


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
    spec = read_env_spec(args.env_id)
    use_cuda = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if use_cuda else "cpu")
    torch.set_num_threads(args.num_threads)
    keep_freed_memory()
    torch.manual_seed(args.seed)
    S, N = args.num_seeds, args.num_envs

    actor, critic = (network(S, spec.observation_dim, spec.action_dim, args) for network in (Actor, Critic))
    for network in (actor, critic):
        seed_parameters(network, range(args.seed, args.seed + S))
        network.to(device)
    target_critic = deepcopy(critic).requires_grad_(False)
    temperature = Temperature(S, 1.0 if args.autotune else args.alpha).to(device)
    adam = partial(torch.optim.Adam, fused=True, capturable=use_cuda)
    actor_optimizer, critic_optimizer = adam(actor.parameters(), args.policy_lr), adam(critic.parameters(), args.q_lr)
    alpha_optimizer = adam(temperature.parameters(), args.q_lr)
    modules = {"actor": actor, "critic": critic, "target_critic": target_critic, "temperature": temperature}
    modules |= {"actor_optimizer": actor_optimizer, "critic_optimizer": critic_optimizer, "alpha_optimizer": alpha_optimizer}
    columns = {"observations": spec.observation_dim, "actions": spec.action_dim, "next_observations": spec.observation_dim}
    replay = ReplayBuffer(args, {**columns, "rewards": 0, "terminations": 0}, device)

    def critic_gradients(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        observations, next_observations = batch["observations"], batch["next_observations"]
        with torch.no_grad():
            alpha = temperature().unsqueeze(-1)  # [S, 1]
            next_actions, next_log_prob = squashed_sample(*actor(next_observations))
            next_values = target_critic(next_observations, next_actions).amin(1) - alpha * next_log_prob
            targets = td_target(batch["rewards"], batch["terminations"], next_values, args.gamma)  # [S, B]
        values = critic(observations, batch["actions"])  # [S, 2, B]
        qf_loss = args.td_loss_scale * critic_loss(values, targets)
        metrics = {"losses/qf_loss": qf_loss.detach(), "losses/qf_values": values.detach().mean((1, 2))}
        set_gradients(qf_loss, critic)
        metrics["diagnostics/critic_grad_norm"] = gradient_norm(critic)
        metrics["diagnostics/td_target_variance"] = targets.var(-1, correction=0)
        return metrics

    def actor_gradients(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        observations = batch["observations"]
        actions, log_prob = squashed_sample(*actor(observations))
        alpha = temperature().detach()
        actor_loss = alpha * log_prob.mean(-1) - critic(observations, actions).amin(1).mean(-1)
        metrics = {"losses/actor_loss": actor_loss.detach(), "losses/alpha": alpha}
        set_gradients(actor_loss, actor)
        if args.autotune:
            alpha_loss = -temperature() * (log_prob.detach().mean(-1) - spec.action_dim)  # target entropy -A
            metrics["losses/alpha_loss"] = alpha_loss.detach()
            set_gradients(alpha_loss, temperature)
        return metrics

    def update(update_actor: bool) -> dict[str, Tensor]:
        batch = replay.sample(args.batch_size)
        metrics = critic_gradients(batch)
        critic_optimizer.step()
        for _ in range(args.policy_frequency if update_actor else 0):  # as many as were skipped
            metrics |= actor_gradients(batch)
            actor_optimizer.step()
            if args.autotune:
                alpha_optimizer.step()
        polyak_update(target_critic, critic, args.tau)
        return metrics

    @torch.no_grad()
    def policy(observations: Tensor, explore: bool = False) -> Tensor:
        mean, log_std = actor(observations.to(device, non_blocking=True))
        return squashed_sample(mean, log_std)[0] if explore else torch.tanh(mean)

    step = load_checkpoint(Path(args.resume), modules, replay, device) if args.resume else 0
    envs, eval_envs = make_vector_env(args, spec, S * N), make_vector_env(args, spec, S * args.eval_episodes)
    folder = make_run_folder(args)
    stop, metrics = StopRequest(), {}
    if args.compile == "on" or (args.compile == "auto" and worth_compiling(args.total_timesteps - step, device)):
        critic_gradients, actor_gradients = map(compile_gradients, (critic_gradients, actor_gradients))
    if use_cuda and args.cuda_graph:
        update = CapturedUpdate(update)
    save = partial(save_checkpoint, folder, modules=modules, replay=replay if args.save_replay else None)

    with guarded(folder, lambda: (step, metrics), envs, eval_envs):
        logger, episodes = Logger(args, folder, step), read_episodes(folder, step)
        if not args.resume:
            save(step)
        observations = envs.reset(env_seeds(args, N, 0, step))
        episode_returns, episode_lengths, finished = np.zeros(S * N), np.zeros(S * N), []
        saved_at = time.perf_counter()
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

            if step < args.learning_starts:
                actions = torch.rand(S * N, spec.action_dim).numpy() * 2 - 1
            else:
                actions = policy(torch.from_numpy(observations).view(S, N, -1), explore=True)
                actions = actions.flatten(0, 1).cpu().numpy()
            envs.send(actions)
            ready = replay.size >= min(max(args.learning_starts * N, 1), replay.capacity)
            for index in range(args.update_every if ready and step % args.update_every == 0 else 0):
                metrics |= update((step + index) % args.policy_frequency == 0)  # while the environments step
            answer = envs.receive()
            replay.add(
                observations=observations,
                actions=actions,
                next_observations=answer.next_observations,
                rewards=answer.rewards,
                terminations=answer.terminations,
            )
            observations = answer.observations
            step += 1

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

# /// script
# requires-python = ">=3.10,<3.14"
# dependencies = [
#     "torch>=2.11,<3",
#     "numpy>=1.26,<3",
#     "gymnasium[mujoco]>=1.1,<2",
#     "box2d>=2.3.10; python_version < '3.14' and (sys_platform != 'linux' or platform_machine == 'x86_64')",
#     "pygame-ce>=2.1.3",
#     "mujoco>=3.1.6,<4",
#     "dm_control>=1.0.20,<2",
#     "shimmy>=2.0,<3",
#     "psutil>=5.9,<8",
#     "tyro>=1.0.16,<2",
#     "tqdm>=4.66,<5",
#     "tensorboard>=2.17,<3",
#     "wandb>=0.18,<1",
# ]
# [tool.uv]
# override-dependencies = ["labmaze; python_version < '3.13'"]
# ///
"""SAC with PAVE, policy-aware value-field equalization (ICML 2026).

With g = dQ/da and H_aa = dg/da, a greedy action within its bounds moves with the state by da/ds = -H_aa^-1 dg/ds: it
jumps where g turns fast with the state, or where Q is flat along the action. PAVE adds three losses to the critic's:

    L = L_TD + mpr_weight MPR + vfc_weight VFC + curvature_weight Curv    (the actor's loss is SAC's)
    MPR = mean (g(s + eps, a) - g(s, a))^2,  VFC = mean (g(s', a) - g(s, a))^2,  Curv = mean relu(v^T H_aa v + delta)

MPR and VFC keep g of the batch's s, a steady under Gaussian noise eps and to the next state s'; Curv keeps Q curved
downwards, along random signs v. The protocol is the paper's, the weights go by the environment. The rest is
SAC; to see what is not: `diff baselines/sac.py sac_pave.py`.

    python sac_pave.py --env-id Walker2d-v5
    python sac_pave.py --env-id Pendulum-v1 --num-seeds 5 --geometry-rows 25

Letters in shapes: S seeds, trained side by side; N environments of each; B rows of a batch; O and A, the sizes of an
observation and an action; H hidden units; a 2 is the pair of critics. Actions are in [-1, 1] everywhere outside the
environments.
"""

import csv
import ctypes
import io
import json
import math
import multiprocessing
import os
import random
import re
import secrets
import shlex
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

import gymnasium as gym
import numpy as np
import psutil
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    exp_name: str = Path(__file__).stem  # a part of the run's folder name
    env_id: str = "Walker2d-v5"  # a gymnasium id; module:id for your own; domain-task (dm_control); h1-task
    env_kwargs: str = "{}"  # JSON, for the environment's constructor: '{"healthy_reward": 0.5}'
    seed: int = 1  # the first of num_seeds successive seeds
    num_seeds: int = 1  # S, independent seeds trained side by side, with other random numbers than alone
    num_envs: int = 1  # N, parallel environments of each seed
    total_timesteps: int = 1_000_000  # vector steps: each advances every environment; SETTINGS has exceptions
    runs_dir: str = "runs"  # where the run's folder is made
    resume: str | None = None  # a run's folder: go on from its checkpoint, with its arguments where none are given
    track: bool = False  # log to Weights & Biases too; WANDB_MODE=offline needs no account
    wandb_project_name: str = "smoothq"
    wandb_entity: str | None = None
    cuda: bool = True  # use the GPU where there is one
    compile: bool = True  # torch.compile the updates, on a GPU as CUDA graphs: half a minute at first
    log_every: int = 500  # vector steps between two points of the log
    eval_every: int = 25_000  # vector steps between two evaluations of the deterministic policy
    eval_episodes: int = 10  # of each seed
    save_every: int = 50_000  # vector steps between two checkpoints; Ctrl-C and SIGTERM save one too
    save_replay: bool = True  # with the checkpoint; a run that resumes without it fills a new one first

    policy_lr: float = 1e-3
    q_lr: float = 1e-3  # of the critic and of the entropy coefficient
    buffer_size: int = 1_000_000  # transitions of each seed
    batch_size: int = 100
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # share of the online network that enters the target network
    learning_starts: int = 10_000  # vector steps of uniformly random actions before the first update
    update_every: int = 50  # vector steps between two rounds of updates; a round has as many updates
    policy_frequency: int = 1  # updates of the critic between two rounds of actor updates; a round has as many
    mpr_weight: float = 0.1  # of the mixed-partial regularisation
    vfc_weight: float = 0.1  # of the vector field consistency
    curvature_weight: float = 0.01  # of the curvature preservation; all three 0: the base method, as fast
    sigma: float = 0.01  # standard deviation of MPR's noise on the observation
    delta: float = 1.0  # Curv asks for v^T H_aa v <= -delta
    geometry_rows: int = 0  # rows of the batch that the three losses are taken on; 0 is all, as in the paper
    alpha: float = 0.2  # entropy coefficient, with --no-autotune
    autotune: bool = False  # tune it, from 1, to the target entropy -A

    def __post_init__(self):
        check_args(self, may_be_zero=("geometry_rows",), at_most_one=("policy_lr", "q_lr", "gamma", "tau"))


SETTINGS = {  # defaults that go by the environment
    "Ant-v5": {"vfc_weight": 0.0005, "curvature_weight": 1.0},
    "Hopper-v5": {"mpr_weight": 2.0, "vfc_weight": 0.0005, "curvature_weight": 3.0},
    "LunarLander-v3": {"total_timesteps": 500_000, "vfc_weight": 0.5, "curvature_weight": 0.05},
    "Reacher-v5": {"total_timesteps": 500_000, "vfc_weight": 0.0005, "curvature_weight": 1.0},
    "Pendulum-v1": {"total_timesteps": 100_000, "vfc_weight": 0.005, "curvature_weight": 0.5},
    "Walker2d-v5": {"mpr_weight": 2.0, "vfc_weight": 0.005, "curvature_weight": 2.0},
}


# ------------------------------------------------------------------------------------------------------------- networks


class Linear(nn.Module):
    """nn.Linear for each member of a stack of seeds (and twins): x [*stack, B, in] -> [*stack, B, out]."""

    def __init__(self, stack: tuple[int, ...], in_features: int, out_features: int):
        super().__init__()
        bound = in_features**-0.5  # as nn.Linear
        self.weight = nn.Parameter(torch.empty(*stack, in_features, out_features).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(*stack, 1, out_features).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.shape[-1] == 1:  # a matrix product with a single column takes a CPU seven times as long
            return (x * self.weight.mT).sum(-1, keepdim=True) + self.bias
        return x @ self.weight + self.bias


H1, H2 = 256, 256  # hidden units of the actor and of each critic


class Actor(nn.Module):
    def __init__(self, S: int, O: int, A: int):
        super().__init__()
        self.fc1 = Linear((S,), O, H1)
        self.fc2 = Linear((S,), H1, H2)
        self.fc_out = Linear((S,), H2, 2 * A)  # mean and log standard deviation

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """observations [S, B, O] -> mean and log standard deviation [S, B, A] of a Gaussian, before squashing."""
        x = F.silu(self.fc1(observations))
        x = F.silu(self.fc2(x))
        mean, log_std = self.fc_out(x).chunk(2, -1)
        return mean, log_std.clamp(-20, 2)

    def sample(self, observations: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Actions tanh(u) [S, B, A], u ~ N(mean, std), their log-probability [S, B] (appendix C), and tanh(mean)."""
        mean, log_std = self(observations)
        noise = torch.randn_like(mean)
        actions = torch.tanh(mean + log_std.exp() * noise)
        log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        log_prob = log_prob - torch.log(1 - actions.square() + 1e-6)  # 1e-6: finite at +-1, as CleanRL
        return actions, log_prob.sum(-1), torch.tanh(mean)


class Critic(nn.Module):
    def __init__(self, S: int, O: int, A: int):
        super().__init__()
        self.fc1 = Linear((S, 2), O + A, H1)
        self.fc2 = Linear((S, 2), H1, H2)
        self.fc_q = Linear((S, 2), H2, 1)

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """observations [S, B, O], actions [S, B, A] -> twin values [S, 2, B]."""
        _, (h2, _, _) = self.hidden(observations, actions)
        return self.fc_q(h2).squeeze(-1)

    def hidden(self, observations: Tensor, actions: Tensor) -> tuple[tuple[Tensor, ...], ...]:
        """SiLU, its first and its second derivative [S, 2, B, H], of each hidden layer."""
        x = torch.cat([observations, actions], -1).unsqueeze(1)
        layer1 = silu_derivatives(self.fc1(x))
        layer2 = silu_derivatives(self.fc2(layer1[0]))
        return layer1, layer2

    def action_field(
        self, observations: Tensor, actions: Tensor, probes: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Q(s, a) [S, 2, B], g = dQ/da [S, 2, B, A] and, with probes v [S, B, A], v^T H_aa v [S, 2, B].

        The chain rule for two layers of SiLU, written out.
        """
        (_, slope1, bend1), (h2, slope2, bend2) = self.hidden(observations, actions)
        values = self.fc_q(h2).squeeze(-1)

        action_weight = self.fc1.weight[:, :, -actions.shape[-1] :]  # [S, 2, A, H]
        q_weight = self.fc_q.weight.mT  # [S, 2, 1, H]
        dq_dh1 = (q_weight * slope2) @ self.fc2.weight.mT
        gradients = (dq_dh1 * slope1) @ action_weight.mT
        if probes is None:
            return values, gradients, None

        x1 = probes.unsqueeze(1) @ action_weight  # how fast fc1's and fc2's outputs move along v
        x2 = (slope1 * x1) @ self.fc2.weight
        curvature1 = (dq_dh1 * bend1 * x1.square()).sum(-1)
        curvature2 = (q_weight * bend2 * x2.square()).sum(-1)
        return values, gradients, curvature1 + curvature2


def silu_derivatives(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SiLU(x), its first and its second derivative."""
    s = torch.sigmoid(x)
    h = x * s
    first = s + h * (1 - s)
    second = s * (1 - s) * (2 + x * (1 - 2 * s))
    return h, first, second


# ----------------------------------------------------------------------------------------------------------------- PAVE


def pave_losses(
    critic: Critic,
    observations: Tensor,
    actions: Tensor,
    next_observations: Tensor,
    noise: Tensor,
    probes: Tensor,
    delta: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """PAVE's three losses, of both critics added, with g = dQ/da and H_aa = dg/da (the paper's section "PAVE").

    MPR = mean (g(s + noise, a) - g(s, a))^2
    VFC = mean (g(s', a) - g(s, a))^2
    Curv = mean relu(v^T H_aa v + delta)

    Means over B and, where the paper has a squared norm, over A too: the published weights go with that. observations
    and noise [S, B, O], actions and probes v [S, B, A] -> Q(s, a) [S, 2, B] and MPR, VFC, Curv [S].
    """
    values, field, curvature = critic.action_field(observations, actions, probes)
    elsewhere = torch.cat([observations + noise, next_observations], 1)
    _, moved_field, _ = critic.action_field(elsewhere, torch.cat([actions, actions], 1))
    noisy_field, next_field = moved_field.chunk(2, 2)
    mpr = (noisy_field - field).square().mean((-1, -2)).sum(1)
    vfc = (next_field - field).square().mean((-1, -2)).sum(1)
    curv = F.relu(curvature + delta).mean(-1).sum(1)
    return values, mpr, vfc, curv


# ---------------------------------------------------------------------------------------------------------------- agent


class Batch(NamedTuple):
    """Transitions: a sample of the replay; a step of training comes as NumPy arrays [S * N, ...]."""

    observations: Tensor  # [S, B, O]
    actions: Tensor  # [S, B, A]
    next_observations: Tensor  # [S, B, O], of the same episode
    rewards: Tensor  # [S, B]
    terminations: Tensor  # [S, B], 1 where the episode terminated; a truncated one bootstraps


class Agent:
    """The networks of S seeds, their losses and one step of learning."""

    def __init__(self, args: Args, O: int, A: int, device: torch.device):
        self.args = args
        self.device = device
        self.target_entropy = -A
        self.actor = Actor(args.num_seeds, O, A).to(device)
        self.critic = Critic(args.num_seeds, O, A).to(device)
        self.target_critic = deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.ParameterList([torch.zeros(args.num_seeds, device=device)])
        adam = partial(torch.optim.Adam, fused=True, capturable=device.type == "cuda")
        self.actor_optimizer = adam(self.actor.parameters(), lr=args.policy_lr)
        self.critic_optimizer = adam(self.critic.parameters(), lr=args.q_lr)
        self.alpha_optimizer = adam(self.log_alpha.parameters(), lr=args.q_lr)

    def alpha(self) -> Tensor:
        """The entropy coefficient [S]."""
        log_alpha = self.log_alpha[0]
        return log_alpha.exp() if self.args.autotune else torch.full_like(log_alpha, self.args.alpha)

    def act(self, observations: Tensor, explore: bool) -> Tensor:
        """observations [S, B, O] -> actions [S, B, A]."""
        if explore:
            actions, _, _ = self.actor.sample(observations)
            return actions
        mean, _ = self.actor(observations)
        return torch.tanh(mean)

    def next_values(self, next_observations: Tensor) -> Tensor:
        """The value of the next state, entropy included, [S, B, O] -> [S, B]."""
        next_actions, log_prob, _ = self.actor.sample(next_observations)
        values = self.target_critic(next_observations, next_actions).amin(1)
        return values - self.alpha().unsqueeze(1) * log_prob

    def critic_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Half the squared TD errors of both critics, plus PAVE's weighted losses [S], and what to log."""
        with torch.no_grad():
            next_values = self.next_values(batch.next_observations)
            targets = batch.rewards + self.args.gamma * (1 - batch.terminations) * next_values
        values, penalty, pave_metrics = self.values_and_penalty(batch)
        loss = 0.5 * (values - targets.unsqueeze(1)).square().mean(2).sum(1)
        metrics = {"losses/qf_loss": loss, "losses/qf_values": values, "diagnostics/td_target_variance": targets.var(1)}
        return loss + penalty, metrics | pave_metrics

    def values_and_penalty(self, batch: Batch) -> tuple[Tensor, Tensor | float, dict[str, Tensor]]:
        """Q(s, a) [S, 2, B] of the batch; PAVE's weighted losses [S], on its first geometry_rows; and what to log."""
        args = self.args
        if not (args.mpr_weight or args.vfc_weight or args.curvature_weight):
            return self.critic(batch.observations, batch.actions), 0.0, {}
        R = args.geometry_rows or args.batch_size
        rows = Batch(*[column[:, :R] for column in batch])
        noise = args.sigma * torch.randn_like(rows.observations)
        probes = 2.0 * torch.randint_like(rows.actions, 2) - 1  # Rademacher
        values, mpr, vfc, curv = pave_losses(
            self.critic, rows.observations, rows.actions, rows.next_observations, noise, probes, args.delta
        )
        if R < args.batch_size:
            other_values = self.critic(batch.observations[:, R:], batch.actions[:, R:])
            values = torch.cat([values, other_values], 2)
        weighted = [(args.mpr_weight, mpr), (args.vfc_weight, vfc), (args.curvature_weight, curv)]
        penalty = sum(weight * loss for weight, loss in weighted if weight)  # what weighs 0 needs no gradient
        return values, penalty, {"losses/mpr": mpr, "losses/vfc": vfc, "losses/curv": curv}

    def actor_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """alpha log pi(a | s) - min_j Q_j(s, a) of sampled actions [S], and what to log."""
        actions, log_prob, mean_actions = self.actor.sample(batch.observations)
        alpha = self.alpha().detach()
        values = self.critic(batch.observations, actions).amin(1)  # [S, B]
        loss = alpha * log_prob.mean(1) - values.mean(1)
        metrics = {"losses/actor_loss": loss, "losses/alpha": alpha, "losses/entropy": -log_prob.mean(1)}
        return loss, metrics | {"diagnostics/action_saturation": action_saturation(mean_actions)}

    def alpha_loss(self, entropy: Tensor) -> Tensor:
        """[S] -> [S]: its gradient lowers alpha while the policy's entropy is above the target."""
        return self.alpha() * (entropy.detach() - self.target_entropy)

    def critic_gradients(self, batch: Batch) -> dict[str, Tensor]:
        loss, metrics = self.critic_loss(batch)
        metrics["diagnostics/critic_grad_norm"] = set_gradients(loss, self.critic)
        return detached(metrics)

    def actor_gradients(self, batch: Batch) -> dict[str, Tensor]:
        loss, metrics = self.actor_loss(batch)
        set_gradients(loss, self.actor)
        if self.args.autotune:
            set_gradients(self.alpha_loss(metrics["losses/entropy"]), self.log_alpha)
        return detached(metrics)

    def compile(self) -> None:
        torch.compiler.reset()  # without guards a second agent in this process would get the first one's graphs
        self.critic_gradients = compile_gradients(self.critic_gradients, self.device)
        self.actor_gradients = compile_gradients(self.actor_gradients, self.device)

    def update(self, batch: Batch, update_actor: bool) -> dict[str, Tensor]:
        """One step of learning; returns what to log."""
        metrics = self.critic_gradients(batch)
        self.critic_optimizer.step()
        if update_actor:
            for _ in range(self.args.policy_frequency):  # as many as were skipped
                metrics |= self.actor_gradients(batch)
                self.actor_optimizer.step()
                if self.args.autotune:
                    self.alpha_optimizer.step()
        polyak_update(self.target_critic, self.critic, self.args.tau)
        return metrics

    def state(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        """What a checkpoint holds, by name."""
        return {
            "actor": self.actor,
            "critic": self.critic,
            "target_critic": self.target_critic,
            "log_alpha": self.log_alpha,
            "actor_optimizer": self.actor_optimizer,
            "critic_optimizer": self.critic_optimizer,
            "alpha_optimizer": self.alpha_optimizer,
        }


def action_saturation(actions: Tensor) -> Tensor:
    """The share of components beyond 0.98, [S, B, A] -> [S]; where it nears 1 a tanh actor has no gradient left."""
    return (actions.detach().abs() > 0.98).float().mean((1, 2))


def detached(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: metric.detach() for name, metric in metrics.items()}


def set_gradients(loss: Tensor, network: nn.Module) -> Tensor:
    """What loss.sum().backward() does for one network, in a form that torch.compile takes; returns their norm [S].

    loss [S]: no term couples two seeds, so that the sum gives each its own gradient.
    """
    parameters = list(network.parameters())
    gradients = torch.autograd.grad(loss.sum(), parameters)
    for parameter, gradient in zip(parameters, gradients):  # Adam's fused kernel wants the parameter's own strides
        parameter.grad = gradient.contiguous().as_strided(parameter.shape, parameter.stride())
    return sum(gradient.reshape(len(gradient), -1).square().sum(1) for gradient in gradients).sqrt()


@torch.no_grad()
def polyak_update(target: nn.Module, online: nn.Module, tau: float) -> None:
    """target <- (1 - tau) target + tau online."""
    # torch's optimisers use these private functions (torch 2.x): one kernel for all parameters
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), tau)


def compile_gradients(gradients: Callable, device: torch.device) -> Callable:
    """torch.compile for a function that always gets the same shapes and networks: it need not check them each time.

    Nor does it see that a number has changed: what changes with time must be a tensor, filled in place.
    """
    torch._dynamo.config.trace_autograd_ops = True  # a loss and its gradients become one graph (torch >= 2.11)
    options = {"guard_filter_fn": lambda guards: [False] * len(guards)}  # some 300 guards a call
    if device.type == "cpu":
        options["fallback_random"] = True  # the compiled randn takes a CPU ten times as long as torch's own
    return torch.compile(gradients, options=options)


def compiler_fault(device: torch.device) -> str:
    """Why torch.compile does not work on this machine, by a trial; empty where it does."""
    try:
        torch.compile(torch.sin)(torch.ones(8, device=device))
    except Exception as error:  # no g++, no Python.h, no OpenMP, a /tmp without programs, a user without a name, ...
        cause = getattr(error, "inner_exception", error)
        reason = str(cause).partition("Output:")[2] or str(cause)  # a compiler's words come after its command
        return " ".join(f"{type(cause).__name__}: {reason}".split())[:200]
    return ""


class CapturedUpdate:
    """update() -> metrics as one CUDA graph. The first three calls run as they are, which warms up what is recorded.

    A Python number in update, such as a radius or a learning rate, stays what it was when the graph was recorded.
    """

    def __init__(self, update: Callable):
        self.update = update
        self.calls = 0
        self.graph = None
        self.metrics = {}

    def __call__(self) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls <= 3:
            return self.update()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.metrics = self.update()
        self.graph.replay()
        return self.metrics


def leave_default_stream() -> None:
    """A CUDA graph cannot be warmed up on the default stream; what that one has begun comes first."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.default_stream())
    torch.cuda.set_stream(stream)


# --------------------------------------------------------------------------------------------------------------- replay


class ReplayBuffer:
    """The last transitions of each seed, on the training device: a ring of vector steps [S, capacity, N, width]."""

    def __init__(self, S: int, N: int, widths: tuple[int, ...], capacity: int, device: torch.device):
        self.widths = widths
        self.rows = torch.zeros(S, capacity, N, sum(widths), device=device)
        self.seed_index = torch.arange(S, device=device).unsqueeze(1)
        self.steps = 0  # added so far, the overwritten ones too
        self.filled = torch.zeros((), dtype=torch.float64, device=device)  # a tensor, which a captured graph reads anew

    def add(self, batch: Batch) -> None:
        """A vector step, as NumPy arrays: observations [S * N, O], ..., rewards [S * N], terminations [S * N]."""
        S, capacity, N, width = self.rows.shape
        rows = np.concatenate([column.reshape(S * N, -1) for column in batch], 1, dtype=np.float32)
        self.rows[:, self.steps % capacity].copy_(torch.from_numpy(rows).view(S, N, width))
        self.steps += 1
        self.filled.fill_(min(self.steps, capacity) * N)

    def sample(self, batch_size: int) -> Batch:
        """Uniformly, for each seed from its own transitions."""
        index = torch.rand(len(self.rows), batch_size, dtype=torch.float64, device=self.rows.device) * self.filled
        rows = self.rows.flatten(1, 2)[self.seed_index, index.long()]
        batch = Batch(*rows.split(self.widths, -1))
        return batch._replace(rewards=batch.rewards.squeeze(-1), terminations=batch.terminations.squeeze(-1))


def check_memory(args: Args, width: int, capacity: int, device: torch.device) -> None:
    """Says what the replay will take; it is filled over hours, so one that cannot fit is refused here."""
    gigabytes = args.num_seeds * capacity * args.num_envs * width * 4 / 1e9
    in_memory = gigabytes if args.save_replay else 0.0  # saving it takes a copy
    if device.type == "cuda":
        check_fits(args, "GPU memory", gigabytes, torch.cuda.mem_get_info()[0] / 1e9)
    else:
        in_memory += gigabytes
    check_fits(args, "memory", in_memory, free_memory() / 1e9)


def check_fits(args: Args, kind: str, gigabytes: float, free: float) -> None:
    print(f"a full replay needs {gigabytes:.2f} GB of {kind}; {free:.1f} GB are free", flush=True)
    if gigabytes > free:
        fail(f"the replay cannot fit: a smaller --buffer-size ({args.buffer_size}) or --num-seeds ({args.num_seeds})")


def free_memory() -> float:
    """Bytes that this process may take: the machine's, or less where SLURM or a container grants less."""
    grants = [float(psutil.virtual_memory().available)]
    per_node = float(os.environ.get("SLURM_MEM_PER_NODE", 0)) * 2**20
    per_core = float(os.environ.get("SLURM_MEM_PER_CPU", 0)) * 2**20
    grants += [grant for grant in (per_node, per_core * count_cores()) if grant]  # 0: all that there are
    cgroups = Path("/proc/self/cgroup")
    for line in cgroups.read_text().splitlines() if cgroups.exists() else []:
        _, controller, group = line.split(":", 2)
        if controller in ("memory", ""):  # version 1 and version 2
            folder = Path("/sys/fs/cgroup", controller, group.lstrip("/"))
            for ancestor in (folder, *folder.parents):
                for limit in (ancestor / "memory.limit_in_bytes", ancestor / "memory.max"):
                    if limit.exists():
                        grants.append(float(limit.read_text().replace("max", "inf")))
    return min(grants)


# --------------------------------------------------------------------------------------------------------- environments


def make_env(env_id: str, env_kwargs: str = "{}", **kwargs) -> gym.Env:
    """One environment with observations [O] and actions in [-1, 1]^A; raises gym.error.Error if it cannot be used.

    module:id imports your module, which registers the id; env_kwargs is JSON. kwargs: play.py's render_mode.
    """
    if env_id == "LunarLander-v3":  # its actions are discrete
        env_id = "LunarLanderContinuous-v3"
    elif env_id.startswith("dm_control/"):
        env_id = f"shimmy:{env_id}"
    elif env_id.startswith("h1-"):  # README.md says how to get it
        task = "h1-sit_simple" if env_id == "h1-sit" else env_id
        env_id = f"humanoid_bench:{task}-v0"
        kwargs = {"render_mode": None} | kwargs  # its default opens a window
    elif re.fullmatch(r"\w+-(?!v\d+$)\w+", env_id) and env_id not in gym.registry:  # dog-run, not Ant-v5
        env_id = f"shimmy:dm_control/{env_id}-v0"
    env = gym.make(env_id, disable_env_checker=True, **(json.loads(env_kwargs) | kwargs))
    return FlatEnv(env)


class FlatEnv(gym.Wrapper):
    """What an algorithm sees of an environment: observations [O] in float32, actions in [-1, 1]^A, a number as reward.

    Observations and actions of any shape are flattened; observations are not normalised: to do that, divide them by
    constants in a wrapper before this (running statistics would be in no checkpoint). What nobody here reads is not
    sent between processes: infos.
    """

    def __init__(self, env: gym.Env):
        super().__init__(env)
        for space in leaf_spaces(env.observation_space):
            if is_image(space):
                raise gym.error.Error(f"it observes images ({space}): leave them out, or encode them, in a wrapper")
            if not isinstance(space, NUMERIC_SPACES):
                raise gym.error.Error(f"its observations must be numbers, not {space}")
        self.action_box = own_action_box(env)  # its own units
        O = gym.spaces.flatdim(env.observation_space)
        A = int(np.prod(self.action_box.shape))
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (O,), np.float32)
        self.action_space = gym.spaces.Box(-1, 1, (A,), np.float32)

    def reset(self, **kwargs):
        observation, _ = self.env.reset(**kwargs)
        return self.flattened(observation), {}

    def step(self, action):
        own_action = in_own_units(action, self.action_box).reshape(self.action_box.shape)
        observation, reward, terminated, truncated, _ = self.env.step(own_action)
        if np.size(reward) != 1:
            raise ValueError(f"its reward must be one number, not {reward}")
        return self.flattened(observation), np.asarray(reward, float).item(), bool(terminated), bool(truncated), {}

    def flattened(self, observation) -> np.ndarray:
        flat = gym.spaces.flatten(self.env.observation_space, observation).astype(np.float32)
        if flat.shape != self.observation_space.shape:
            raise ValueError(f"its observations must have {self.observation_space.shape[0]} numbers, not {flat.size}")
        return flat


NUMERIC_SPACES = (gym.spaces.Box, gym.spaces.Discrete, gym.spaces.MultiDiscrete, gym.spaces.MultiBinary)


def leaf_spaces(space: gym.Space) -> list[gym.Space]:
    """The spaces that a Dict or a Tuple is made of, in the order of the flat observation."""
    if isinstance(space, gym.spaces.Dict):
        parts = space.values()
    elif isinstance(space, gym.spaces.Tuple):
        parts = space.spaces
    else:
        return [space]
    return [leaf for part in parts for leaf in leaf_spaces(part)]


def is_image(space: gym.Space) -> bool:
    """Bytes in rows and columns, or one to four large planes of any number."""
    if not isinstance(space, gym.spaces.Box) or len(space.shape) < 2:
        return False
    sides = sorted(space.shape)
    return space.dtype == np.uint8 or (len(sides) == 3 and sides[0] <= 4 and sides[1] >= 16)


def own_action_box(env: gym.Env) -> gym.spaces.Box:
    """The bounds of the actions that env itself takes, in its own units and shape; raises gym.error.Error without."""
    box = env.action_space
    layer = env  # the wrapper that set this box, or the environment itself
    while isinstance(layer, gym.Wrapper) and layer.env.action_space is box:
        layer = layer.env
    if isinstance(layer, gym.wrappers.ClipAction):  # it takes any number, and clips to the bounds of what it wraps
        box = layer.env.action_space
    if not isinstance(box, gym.spaces.Box) or not np.issubdtype(box.dtype, np.floating):
        raise gym.error.Error(f"its actions must be a Box of real numbers, not {box}")
    if not max(np.abs(box.low).max(), np.abs(box.high).max()) < 1e9:
        raise gym.error.Error(f"its actions must be bounded, not {box}")
    return box


def in_own_units(actions: np.ndarray, box: gym.spaces.Box) -> np.ndarray:
    """Actions of [-1, 1], [..., A], within the bounds of box; a component whose bounds are equal is constant."""
    low = box.low.ravel().astype(float)
    high = box.high.ravel().astype(float)
    scaled = low + (actions + 1) / 2 * (high - low)
    return scaled.clip(low, high).astype(box.dtype)


def make_seeded_env(args: Args, seed: int) -> gym.Env:
    random.seed(seed)  # for an environment that draws from these: workers begin with copies of the trainer's
    np.random.seed(seed)
    return make_env(args.env_id, args.env_kwargs)


class EnvGroup(gym.vector.SyncVectorEnv):
    """Environments of one process; where an episode ends, the next one begins at once."""

    def __init__(self, args: Args, seeds: list[int]):
        makers = [partial(make_seeded_env, args, seed) for seed in seeds]
        super().__init__(makers, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)

    def step(self, actions: np.ndarray) -> tuple:
        """infos["final_obs"] [n, O] is where the step led; an ended episode's observation is the next one's first."""
        observations, rewards, terminations, truncations, infos = super().step(actions)
        final_observations = observations.copy()
        done = terminations | truncations
        if done.any():
            final_observations[done] = np.stack(infos["final_obs"][done])
        return observations, rewards, terminations, truncations, {"final_obs": final_observations}

    def step_async(self, actions: np.ndarray) -> None:
        self.actions = actions

    def step_wait(self) -> tuple:
        """observations, rewards, terminations, truncations and final observations."""
        *columns, infos = self.step(self.actions)
        return *columns, infos["final_obs"]


RESET_TIMEOUT = 3600  # seconds for all environments of a process, which may compile
STEP_TIMEOUT = 300
STOP_TIMEOUT = 5  # of either, once a signal has asked to stop: who sends it kills soon after
CLOSE_TIMEOUT = 20


class EnvWorkers:
    """Groups of environments, each group in a process of its own: called as a single EnvGroup is."""

    def __init__(self, groups: list[Callable]):
        # a group starts the next episodes itself
        self.groups = gym.vector.AsyncVectorEnv(groups, autoreset_mode=gym.vector.AutoresetMode.DISABLED)

    def reset(self, seed: list[int]) -> tuple[np.ndarray, dict]:
        seeds = np.reshape(seed, (self.groups.num_envs, -1)).tolist()
        self.groups.reset_async(seed=seeds)
        self.wait("reset", RESET_TIMEOUT)
        observations, infos = self.groups.reset_wait()
        return np.concatenate(observations), infos

    def step_async(self, actions: np.ndarray) -> None:
        self.groups.step_async(actions.reshape(self.groups.action_space.shape))

    def step_wait(self) -> tuple:
        self.wait("step", STEP_TIMEOUT)
        *columns, infos = self.groups.step_wait()
        return tuple(np.concatenate(column) for column in (*columns, infos["final_obs"]))

    def wait(self, method: str, seconds: int) -> None:
        """Until all have answered. Seconds in which this process runs: Ctrl-Z costs one, however long it lasts."""
        waited = 0
        for pipe in self.groups.parent_pipes:
            while not pipe.poll(1):
                waited += 1
                if waited >= (STOP_TIMEOUT if STOP_REQUESTS else seconds):
                    raise TimeoutError(f"an environment's {method} has not returned after {waited} seconds")

    def close(self) -> None:
        """Those that do not close in time are left to end_workers."""
        closing = threading.Thread(target=self.groups.close, daemon=True)
        closing.start()
        closing.join(CLOSE_TIMEOUT)


class WorkerGroup(EnvGroup):
    """A group in a process of its own. AsyncVectorEnv also makes one in the trainer, whose process id is given."""

    def __init__(self, args: Args, seeds: list[int], trainer: int):
        if os.getpid() != trainer:
            torch.set_num_threads(1)  # a fork has none of the trainer's, and an environment's torch would wait for them
            # Stop signals are for the trainer, which ends its workers. A simulator started here would inherit SIG_IGN,
            # and could not be terminated; on Windows it would not, and a handler would end the worker.
            ignore = signal.SIG_IGN if sys.platform == "win32" else lambda *_: None
            for number in STOP_SIGNALS:
                signal.signal(number, ignore)
            if sys.platform == "linux":  # not even a worker that hangs outlives a killed trainer
                PR_SET_PDEATHSIG = 1
                ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        super().__init__(args, seeds)

    def reset(self, **kwargs) -> tuple:
        with sendable_errors():
            return super().reset(**kwargs)

    def step(self, actions: np.ndarray) -> tuple:
        with sendable_errors():
            return super().step(actions)


@contextmanager
def sendable_errors():
    """Not every exception can be sent to the trainer: one is raised that can, with the traceback."""
    try:
        yield
    except Exception as error:
        raise RuntimeError(f"{type(error).__name__}: {error}").with_traceback(error.__traceback__) from None


def count_cores() -> int:
    """Those that this process may use; the variable PYTHON_CPU_COUNT, Python 3.13's own, tells it another number."""
    told = os.environ.get("PYTHON_CPU_COUNT", "")
    if told.isdigit() and int(told) > 0:
        return int(told)
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()


def group_size(count: int) -> int:
    """How many of count environments share a process: 1 if there are cores enough.

    All groups are alike, so it divides count, and there may be more processes than cores.
    """
    size = (count - 1) // count_cores() + 1
    while count % size:
        size -= 1
    return size


def make_envs(args: Args, seeds: list[int]) -> EnvGroup | EnvWorkers:
    """An environment for each seed; a single group runs in this process."""
    size = group_size(len(seeds))
    if size == len(seeds):
        return EnvGroup(args, seeds)
    groups = [seeds[start : start + size] for start in range(0, len(seeds), size)]
    return EnvWorkers([partial(WorkerGroup, args, group, os.getpid()) for group in groups])


def start_seeds(args: Args, step: int, for_evaluation: bool, count: int) -> list[int]:
    """Seeds of count environments, different for each step, and for training and evaluation; a C++ int holds them."""
    seeds = np.random.SeedSequence([args.seed, step, int(for_evaluation)]).generate_state(count)
    return (seeds >> 1).tolist()


def try_environment(args: Args) -> tuple[int, int, gym.spaces.Box]:
    """The sizes of its observations and actions, and its own actions' bounds. A user's mistake if a step fails."""
    try:
        env = make_env(args.env_id, args.env_kwargs)
        env.reset(seed=args.seed)
        env.step(np.zeros(env.action_space.shape, np.float32))
        env.close()
    except Exception as error:  # whatever a stranger's constructor raises
        message = " ".join(str(error).split())[:500]
        if not isinstance(error, gym.error.Error):
            frame = traceback.extract_tb(error.__traceback__)[-1]
            message = f"{type(error).__name__}: {message} ({frame.filename}:{frame.lineno})"
        if isinstance(error, ImportError):
            message += "; your own module must be on PYTHONPATH, README.md says how to install others"
        if os.environ.get("MUJOCO_GL") == "disabled" and re.search(r"render|OpenGL|MUJOCO_GL", message):
            message += "; MUJOCO_GL=egl lets it render"
        fail(f"--env-id {args.env_id}: {message}")
    return env.observation_space.shape[0], env.action_space.shape[0], env.action_box


def check_finite(step: int, **columns: np.ndarray) -> None:
    """Raises FloatingPointError at a number that float32 does not hold; columns [S * N, ...] by name."""
    largest = np.finfo(np.float32).max
    for name, column in columns.items():
        good = np.abs(column) <= largest  # NaN is not
        if not good.all():
            index = int(np.argwhere(~good)[0][0])
            raise FloatingPointError(f"step {step}: the {name} of environment {index} is not finite: {column[index]}")


# ----------------------------------------------------------------------------------------------------------- evaluation

EPISODE_LIMIT = 10_000  # steps of an evaluation's episode, for an environment that never ends one


def smoothness(actions: np.ndarray) -> float:
    """How much actions [T, A] oscillate: the mean over A of 2/T sum_k f_k |FFT|_k, f_k = k/T (CAPS, 2021).

    Lower is smoother. That of white noise grows with the root of T: compare equal lengths, at one rate of actions.
    """
    T = len(actions)
    frequencies = np.arange(T // 2) / T
    spectrum = np.abs(np.fft.rfft(actions, axis=0))[: T // 2]  # [T // 2, A]
    return float((2 / T * (frequencies @ spectrum)).mean())


def evaluate(policy: Callable, envs: EnvGroup | EnvWorkers, args: Args, step: int, box: gym.spaces.Box) -> list[dict]:
    """An episode of the deterministic policy in each environment: rows of eval.csv; none if told to stop meanwhile.

    smoothness and action_fluctuation, 1/T sum_t |a_t - a_(t-1)| (LipsNet, ICML 2023), are in box's units, the
    environment's own.
    """
    count = args.num_seeds * args.eval_episodes
    observations, _ = envs.reset(seed=start_seeds(args, step, True, count))
    running = np.ones(count, bool)
    returns = np.zeros(count)
    lengths = np.zeros(count, int)
    actions = []
    while running.any() and len(actions) < EPISODE_LIMIT:
        if STOP_REQUESTS:
            return []
        chosen = policy(observations)
        check_finite(step, action=chosen)
        envs.step_async(chosen)
        actions.append(chosen)
        observations, rewards, terminations, truncations, _ = envs.step_wait()
        check_finite(step, observation=observations, reward=rewards)
        returns += rewards * running
        lengths += running
        running &= ~(terminations | truncations)
    if running.any():
        print(f"step {step}: an evaluation's episode had no end and was cut at {EPISODE_LIMIT} steps", flush=True)
    rows = []
    actions = np.stack(actions)  # [steps, S * E, A]
    for index, T in enumerate(lengths.tolist()):
        seed, episode = divmod(index, args.eval_episodes)
        taken = in_own_units(actions[:T, index], box)  # [T, A]
        fluctuation = np.linalg.norm(np.diff(taken, axis=0), axis=1).sum() / T
        row = {"step": step, "transitions": step * args.num_envs, "seed": args.seed + seed, "episode": episode}
        row |= {"return": float(returns[index]), "length": T}
        row |= {"smoothness": smoothness(taken), "action_fluctuation": float(fluctuation)}
        rows.append(row)
    return rows


# -------------------------------------------------------------------------------------------------------- a run on disk


def open_folder(args: Args) -> Path:
    """The folder to resume, or a new one, with args.json and this script in it: the tools load the run with both."""
    arguments = json.dumps({"script": Path(__file__).stem, **asdict(args), "resume": None}, indent=2)
    try:
        folder = Path(args.resume) if args.resume else make_folder(args)
        write_atomically(folder / "args.json", lambda file: file.write(arguments.encode()))
        write_atomically(folder / Path(__file__).name, lambda file: file.write(Path(__file__).read_bytes()))
    except OSError as error:
        fail(f"{error.filename} cannot be written: {error.strerror} (--runs-dir names another place)")
    return folder


def make_folder(args: Args) -> Path:
    """No two runs share its name, their id for Weights & Biases, not even on two nodes of a cluster."""
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}_{secrets.token_hex(3)}"
    folder = Path(args.runs_dir, re.sub(r"[^\w.-]", "_", name))
    folder.mkdir(parents=True)
    return folder


def write_atomically(path: Path, write: Callable) -> None:
    """Whoever reads path, after a kill or on a full disk too, finds the old file or the new one, whole."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # some file systems rename before they write
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # the half of a file would keep the disk full


def save_evaluation(folder: Path, step: int, agent: Agent, rows: list[dict]) -> None:
    """rows: of all evaluations so far."""
    policies = {"actor": agent.actor.state_dict(), "critic": agent.critic.state_dict()}
    write_atomically(folder / f"policies/step_{step:09d}.pt", partial(torch.save, policies))
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[-1])
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(folder / "eval.csv", lambda file: file.write(text.getvalue().encode()))


def save_checkpoint(folder: Path, step: int, agent: Agent, replay=None) -> None:
    """A run that is killed between the two files, or saved without its replay, resumes with the older one there."""
    saved = {"step": step}
    for name, module in agent.state().items():
        if not all(tensor.isfinite().all() for tensor in tensors_of(module)):
            raise FloatingPointError(f"step {step}: {name} is not finite")
        saved[name] = module.state_dict()
    write_atomically(folder / "checkpoint.pt", partial(torch.save, saved))
    if replay:
        rows = torch.empty_like(replay.rows[:, : replay.steps], device="cpu")
        for saved_rows, seed_rows in zip(rows, replay.rows):  # seed by seed: one copy, not two
            saved_rows.copy_(seed_rows[: replay.steps])
        write_atomically(folder / "replay.pt", partial(torch.save, {"rows": rows, "steps": replay.steps}))


def tensors_of(module: nn.Module | torch.optim.Optimizer) -> list[Tensor]:
    """A network's weights, or the moments of an optimiser, which overflow first."""
    if isinstance(module, nn.Module):
        return list(module.state_dict().values())
    return [tensor for moments in module.state.values() for tensor in moments.values()]


def load_checkpoint(args: Args, agent: Agent, replay=None) -> tuple[int, list[dict]]:
    """Restores what was saved, running no code from the files; returns the step and the rows of eval.csv up to it."""
    folder = Path(args.resume)
    try:
        saved = torch.load(folder / "checkpoint.pt", weights_only=True, map_location="cpu")
        step = saved["step"]
        if step > args.total_timesteps:
            raise ValueError(f"it is at step {step} already, --total-timesteps is {args.total_timesteps}")
        for name, module in agent.state().items():
            if "param_groups" in saved[name]:  # an optimiser: this run's learning rate and device
                saved[name]["param_groups"] = module.state_dict()["param_groups"]
            module.load_state_dict(saved[name])
        if replay and (folder / "replay.pt").exists():
            stored = torch.load(folder / "replay.pt", weights_only=True, mmap=True)
            count = stored["rows"].shape[1]  # vector steps
            for seed_rows, stored_rows in zip(replay.rows, stored["rows"]):  # all at once would take a GPU two replays
                seed_rows[:count].copy_(stored_rows)
            replay.steps = stored["steps"]
            replay.filled.fill_(count * args.num_envs)
        rows = []
        if (folder / "eval.csv").exists():  # not yet, where the run stopped in its first evaluation
            with open(folder / "eval.csv", newline="") as file:
                rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
        return step, rows
    except Exception as error:  # torch.load has half a dozen for a damaged file
        message = " ".join(str(error).split())[:300]
        fail(f"--resume {folder}: {type(error).__name__}: {message}")


class Log:
    """TensorBoard, the terminal (a bar, or lines where it is none) and, with --track, Weights & Biases."""

    def __init__(self, folder: Path, args: Args, step: int):
        self.args = args
        self.last_step = step
        self.last_time = time.perf_counter()
        self.writer = SummaryWriter(str(folder), purge_step=step + 1 if args.resume else None)
        rows = [f"|{name}|{value}|" for name, value in asdict(args).items()]
        self.writer.add_text("hyperparameters", "\n".join(["|flag|value|", "|-|-|", *rows]))
        width = shutil.get_terminal_size().columns - 1  # 79 where a terminal says 0, for which tqdm would print nothing
        self.bar = tqdm(total=args.total_timesteps, initial=step, unit="step", ncols=width, leave=False, disable=None)
        if args.track:
            import wandb

            wandb.init(
                project=args.wandb_project_name,
                entity=args.wandb_entity,
                group=f"{args.env_id}__{args.exp_name}",
                name=folder.name,
                id=folder.name,
                resume="allow",
                config=asdict(args),
                save_code=True,
            )
            wandb.define_metric("*", step_metric="global_step")
            self.wandb = wandb

    def log_training(self, step: int, scalars: dict[str, float]) -> None:
        """charts/SPS counts vector steps a second since the last call."""
        speed = (step - self.last_step) / (time.perf_counter() - self.last_time)
        self.last_step = step
        self.last_time = time.perf_counter()
        self.write(step, scalars | {"charts/SPS": speed, "charts/transitions": step * self.args.num_envs})
        shown = {"SPS": f"{speed:.1f}"}
        if "charts/episodic_return" in scalars:
            shown["return"] = f"{scalars['charts/episodic_return']:.4g}"
        if self.bar.disable:
            if any(name.startswith("losses/") for name in scalars):  # the random steps at first are no measure
                shown["left"] = tqdm.format_interval((self.args.total_timesteps - step) / speed)
            self.say(step, " ".join(f"{name} {value}" for name, value in shown.items()))
        else:
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update(step - self.bar.n)

    def announce_evaluation(self, step: int) -> None:
        if self.bar.disable:
            self.say(step, "evaluating")
        else:
            self.bar.set_description("evaluating")

    def log_evaluation(self, step: int, rows: list[dict]) -> None:
        """rows of eval.csv."""
        self.bar.set_description("")
        measures = ("return", "smoothness", "action_fluctuation")
        means = {f"eval/{name}": float(np.mean([row[name] for row in rows])) for name in measures}
        self.write(step, means)
        self.say(step, " ".join(f"{name} {value:.4g}" for name, value in means.items()))
        self.last_step = step  # its time does not count as training's
        self.last_time = time.perf_counter()

    def write(self, step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)
        if self.args.track:
            self.wandb.log({**scalars, "global_step": step})

    def say(self, step: int, text: str) -> None:
        with tqdm.external_write_mode(), suppress(OSError):  # nobody reads it any more: go on, or save
            print(f"step {step}/{self.args.total_timesteps} {text}", flush=True)

    def close(self, exit_code: int = 0) -> None:
        self.writer.close()
        self.bar.close()
        if self.args.track:
            try:
                self.wandb.finish(exit_code)
            except Exception as error:  # a signal to the whole job has ended W&B's process, say
                print(f"Weights & Biases: {error}", flush=True)


# ------------------------------------------------------------------------------------------------------------- training

STOP_REQUESTS = []  # when a signal asked to save and stop
STOP_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")  # SLURM sends SIGUSR1 if asked to, a closed terminal SIGHUP
STOP_SIGNALS = [getattr(signal, name) for name in STOP_NAMES if hasattr(signal, name)]  # Windows lacks two


def listen_for_stop() -> None:
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's SIGHUP
            signal.signal(number, request_stop)


def request_stop(number: int, _) -> None:
    if STOP_REQUESTS and number == signal.SIGINT and time.monotonic() > STOP_REQUESTS[0] + 1:
        end_workers()
        os._exit(128 + number)  # asked twice; within a second it is one Ctrl-C, which uv passes on once more
    STOP_REQUESTS.append(time.monotonic())
    with suppress(OSError):  # the terminal is closed, or Ctrl-C has ended the program that reads this
        os.write(2, b"\nsaving, then stopping; Ctrl-C again to stop at once\n")


def end_workers() -> None:
    """Kills those that are left, however the run ended, and what their environments started."""
    for worker in multiprocessing.active_children():
        with suppress(psutil.NoSuchProcess):  # it has just ended
            for process in psutil.Process(worker.pid).children(recursive=True):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        worker.kill()


def fail(message: str) -> NoReturn:
    """A user's mistake: one line, exit status 2."""
    print(f"{Path(__file__).name}: {message}", file=sys.stderr)
    sys.exit(2)


def check_args(args, may_be_zero: tuple[str, ...], at_most_one: tuple[str, ...]) -> None:
    """Raises ValueError for a number out of range, of which tyro makes a message and exit status 2."""
    for name, value in vars(args).items():
        if type(value) not in (int, float):
            continue
        least = 1 if type(value) is int and name not in ("seed", *may_be_zero) else 0
        most = 1 if name in at_most_one else 2**32
        if not least <= value <= most:  # NaN is in no range
            raise ValueError(f"--{name.replace('_', '-')} {value}: at least {least}, at most {most}")
    try:
        env_kwargs = json.loads(args.env_kwargs)
    except ValueError:
        env_kwargs = None
    if not isinstance(env_kwargs, dict):
        raise ValueError(f"--env-kwargs {args.env_kwargs}: not a JSON object")


def parse_args() -> Args:
    """The command line, over the arguments of the run to resume or over SETTINGS."""
    args = tyro.cli(Args)  # says which environment and which run; read again below, over their defaults
    if not args.resume:
        return tyro.cli(Args, default=Args(**SETTINGS.get(args.env_id, {})))
    try:
        saved = json.loads(Path(args.resume, "args.json").read_text())
        if saved.pop("script") != Path(__file__).stem:
            raise ValueError("it belongs to another script")
        default = Args(**saved | {"resume": args.resume})
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        fail(f"--resume {args.resume}: no run of this script ({error})")
    args = tyro.cli(Args, default=default)
    for name in ("env_id", "env_kwargs", "seed", "num_seeds", "num_envs", "buffer_size"):
        if getattr(args, name, None) != getattr(default, name, None):  # PPO has no buffer
            fail(f"--resume {args.resume}: {name} was {getattr(default, name)}")
    return args


def resume_command(folder: Path) -> str:
    """To be pasted into the shell that started this run."""
    python = Path(sys.executable).name
    if "UV_RUN_RECURSION_DEPTH" in os.environ:  # uv run sets it
        launcher = ["uv", "run"]
    elif shutil.which(python) == sys.executable:
        launcher = [python]
    else:
        launcher = [sys.executable]
    return shlex.join([*launcher, sys.argv[0], "--resume", str(folder)])


def prepare_process(num_envs: int) -> None:
    """Threads, memory and rendering, before the first tensor."""
    from torch import _dynamo  # noqa: F401  (loads Triton, which crashes once MUJOCO_GL=egl has loaded Mesa's LLVM)

    num_workers = num_envs // group_size(num_envs)
    free_cores = max(1, count_cores() - num_workers + 1)  # a single worker is this process
    allowed = torch.get_num_threads()  # obeys OMP_NUM_THREADS
    torch.set_num_threads(min(4, free_cores, allowed))  # more than 4 gain nothing
    os.environ.setdefault("MUJOCO_GL", "disabled")  # nothing is rendered
    if sys.platform == "linux" and not multiprocessing.get_start_method(allow_none=True):
        # From Python 3.14 on a server forks the workers: a signal to the whole job would end it, and them, at once.
        multiprocessing.set_start_method("fork")
    if sys.platform == "linux":  # keep freed memory: the page faults would take a third of a CPU's update
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**30) or libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD; an old glibc refuses the first
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def return_scalars(finished_returns: list[list[float]], first_seed: int) -> dict[str, float]:
    """The mean return of the episodes that have ended, over all seeds and, with several, of each."""
    scalars = {}
    if any(finished_returns):
        scalars["charts/episodic_return"] = float(np.mean(np.concatenate(finished_returns)))
    if len(finished_returns) > 1:
        for seed, returns in enumerate(finished_returns, first_seed):
            if returns:
                scalars[f"charts/episodic_return_seed_{seed}"] = float(np.mean(returns))
    return scalars


def train(args: Args) -> None:
    S = args.num_seeds
    N = args.num_envs
    prepare_process(S * N)
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    print(f"training on {torch.cuda.get_device_name() if device.type == 'cuda' else 'the CPU'}", flush=True)
    O, A, action_box = try_environment(args)

    torch.manual_seed(args.seed)
    agent = Agent(args, O, A, device)
    widths = (O, A, O, 1, 1)  # of Batch's columns
    capacity = max(1, min(args.buffer_size // N, args.total_timesteps))
    check_memory(args, sum(widths), capacity, device)
    replay = ReplayBuffer(S, N, widths, capacity, device)

    step = 0
    evaluations = []  # rows of eval.csv
    if args.resume:
        step, evaluations = load_checkpoint(args, agent, replay)
    folder = open_folder(args)
    print(folder, flush=True)
    training_seeds = start_seeds(args, step, False, S * N)
    envs = make_envs(args, training_seeds)
    eval_envs = make_envs(args, start_seeds(args, step, True, S * args.eval_episodes))
    listen_for_stop()

    @torch.no_grad()
    def policy(observations: np.ndarray, explore: bool = False) -> np.ndarray:
        """observations [S * E, O] -> actions [S * E, A]."""
        batch = torch.from_numpy(observations).to(device).unflatten(0, (S, -1))
        return agent.act(batch, explore).flatten(0, 1).cpu().numpy()

    def update_critic() -> dict[str, Tensor]:
        return agent.update(replay.sample(args.batch_size), update_actor=False)

    def update_both() -> dict[str, Tensor]:
        return agent.update(replay.sample(args.batch_size), update_actor=True)

    if args.compile:
        print("compiling: half a minute, here and at the first update", flush=True)
        fault = compiler_fault(device)
        if fault:
            print(f"torch.compile does not work here, so the updates run uncompiled: {fault}", flush=True)
        else:
            agent.compile()
        if device.type == "cuda":
            leave_default_stream()
            update_critic = CapturedUpdate(update_critic)
            update_both = CapturedUpdate(update_both)

    log = Log(folder, args, step)
    torch.manual_seed(args.seed + step)  # a resumed run begins new episodes, and draws new numbers

    observations, _ = envs.reset(seed=training_seeds)
    episode_returns = np.zeros(S * N)
    finished_returns = [[] for _ in range(S)]  # of each seed, since the last point of the log
    metrics = {}
    is_evaluating = False
    try:
        while True:
            is_last = step == args.total_timesteps
            last_evaluation = int(evaluations[-1]["step"]) if evaluations else -1  # perhaps of the run that it resumes
            if (step % args.eval_every == 0 or is_last) and step != last_evaluation:
                log.announce_evaluation(step)
                is_evaluating = True
                rows = evaluate(policy, eval_envs, args, step, action_box)
                is_evaluating = False
                if rows:
                    evaluations += rows
                    save_evaluation(folder, step, agent, evaluations)
                    log.log_evaluation(step, rows)
            is_stopped = bool(STOP_REQUESTS)
            if step % args.save_every == 0 or is_last or is_stopped:
                save_checkpoint(folder, step, agent, replay if args.save_replay else None)
            if is_last or is_stopped:
                break

            if step < args.learning_starts:
                actions = 2 * torch.rand(S * N, A).numpy() - 1
            else:
                actions = policy(observations, explore=True)
            check_finite(step, observation=observations, action=actions)
            envs.step_async(actions)
            # Updates run while the workers' environments step, so without the transition of this step.
            # replay.steps, not step: a run that resumes without its replay fills a new one first.
            if replay.steps >= args.learning_starts and step % args.update_every == 0:
                for number in range(step, step + args.update_every):
                    update = update_both if number % args.policy_frequency == 0 else update_critic
                    metrics |= update()
            next_observations, rewards, terminations, truncations, final_observations = envs.step_wait()

            done = terminations | truncations  # there next_observations already begin the next episode
            check_finite(step, observation=final_observations, reward=rewards)
            replay.add(Batch(observations, actions, final_observations, rewards, terminations))
            observations = next_observations
            step += 1

            episode_returns += rewards
            for index in np.flatnonzero(done):
                finished_returns[index // N].append(episode_returns[index])
                episode_returns[index] = 0
            if step % args.log_every == 0:
                scalars = {name: metric.mean().item() for name, metric in metrics.items()}
                if not np.isfinite(list(scalars.values())).all():
                    raise FloatingPointError(f"step {step}: a loss is not finite")
                log.log_training(step, scalars | return_scalars(finished_returns, args.seed))
                finished_returns = [[] for _ in range(S)]
    except Exception as error:  # an environment's, most likely
        # One of now would make a resumed run begin with the evaluation that failed, or may hold bad numbers.
        keep_older_checkpoint = (is_evaluating and not STOP_REQUESTS) or isinstance(error, FloatingPointError)
        if not (keep_older_checkpoint and (folder / "checkpoint.pt").exists()):
            try:
                save_checkpoint(folder, step, agent, replay if args.save_replay else None)
            except Exception:  # a full disk, or a GPU that is lost: the older checkpoint stays
                traceback.print_exc()
        with suppress(Exception):
            log.close(exit_code=1)
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        with suppress(OSError):  # nobody reads it any more
            traceback.print_exc()
            print(f"failed at step {step} ({reason}); go on with: {resume_command(folder)}", flush=True)
        for group in (envs, eval_envs):
            if isinstance(group, EnvGroup):  # end_workers ends the others
                with suppress(Exception):  # its simulator may be gone
                    group.close()
        sys.exit(1)
    log.close()
    envs.close()
    eval_envs.close()
    if is_stopped:
        print(f"stopped at step {step}; go on with: {resume_command(folder)}")
    else:
        print(f"finished {folder}: benchmark/play.py shows its policy, benchmark/export.py exports it")


if __name__ == "__main__":
    try:
        train(parse_args())
    finally:
        end_workers()

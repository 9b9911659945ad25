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
"""PPO, proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347).

    L = mean max(-adv r, -adv clip(r, 1 - c, 1 + c)) - ent_coef entropy + vf_coef value_loss,   r = pi / pi_old

(equations 7 and 9, negated), with CleanRL's settings for continuous actions, but 8 environments where it has 1. This
script bootstraps truncated episodes from their last observation, and pools the running statistics over all of a seed's
environments; CleanRL does neither. PPO's cells of the AMS table count transitions: 500 000 of them are 62 500 vector
steps of 8 environments.

    python baselines/ppo.py --env-id dog-run
    python baselines/ppo.py --env-id Walker2d-v5 --num-seeds 5

Letters in shapes: S seeds, trained side by side; N environments of each; T vector steps of a rollout; B rows of a
batch; O and A, the sizes of an observation and an action. Actions are in [-1, 1] everywhere outside the environments.
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
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

import gymnasium as gym
import numpy as np
import psutil
import torch
import tyro
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    exp_name: str = Path(__file__).stem  # a part of the run's folder name
    env_id: str = "dog-run"  # a gymnasium id; module:id for your own; domain-task (dm_control); h1-task
    env_kwargs: str = "{}"  # JSON, for the environment's constructor: '{"healthy_reward": 0.5}'
    seed: int = 1  # the first of num_seeds successive seeds
    num_seeds: int = 1  # S, independent seeds trained side by side, with other random numbers than alone
    num_envs: int = 8  # N, parallel environments of each seed; CleanRL has 1
    total_timesteps: int = 62_500  # vector steps: each advances every environment; SETTINGS has exceptions
    runs_dir: str = "runs"  # where the run's folder is made
    resume: str | None = None  # a run's folder: go on from its checkpoint, with its arguments where none are given
    track: bool = False  # log to Weights & Biases too; WANDB_MODE=offline needs no account
    wandb_project_name: str = "smoothq"
    wandb_entity: str | None = None
    cuda: bool = True  # use the GPU where there is one
    compile: bool = True  # does nothing here: one list of flags then serves a sweep of all scripts
    log_every: int = 2048  # vector steps between two points of the log
    eval_every: int = 25_000  # vector steps between two evaluations of the deterministic policy
    eval_episodes: int = 10  # of each seed
    save_every: int = 50_000  # vector steps between two checkpoints; Ctrl-C and SIGTERM save one too

    learning_rate: float = 3e-4  # at the start
    anneal_lr: bool = True  # linearly, to 0 at the end
    num_steps: int = 2048  # T, vector steps of a rollout
    gamma: float = 0.99  # discount factor
    gae_lambda: float = 0.95  # the advantage estimate's other discount
    num_minibatches: int = 32  # parts of a rollout, one gradient step each
    update_epochs: int = 10  # passes over a rollout
    norm_adv: bool = True  # normalise the advantages of a minibatch
    clip_coef: float = 0.2  # how far the probability ratio counts, and the value with --clip-vloss
    clip_vloss: bool = True
    ent_coef: float = 0.0  # weight of the entropy
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # of actor and critic together, each seed's own

    def __post_init__(self):
        check_args(self, may_be_zero=(), at_most_one=("learning_rate", "gamma", "gae_lambda"))
        if self.num_steps * self.num_envs < 2 * self.num_minibatches:
            raise ValueError("--num-minibatches: at most half of --num-steps times --num-envs")


SETTINGS = {  # defaults that go by the environment
    "dog-run": {"total_timesteps": 125_000},
    "humanoid-run": {"total_timesteps": 125_000},
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


class RunningNormalizer(nn.Module):
    """Mean and variance [S, 1, W] of all rows that a seed has seen; scales rows by them, within +-10."""

    def __init__(self, S: int, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(S, 1, width, dtype=torch.float64))
        self.register_buffer("var", torch.ones(S, 1, width, dtype=torch.float64))
        self.register_buffer("count", torch.full((S, 1, 1), 1e-4, dtype=torch.float64))

    def update(self, rows: Tensor) -> None:
        """Takes in rows [S, B, W] (Chan et al. 1979: mean and variance of the union of two sets)."""
        var, mean = torch.var_mean(rows.double(), 1, correction=0, keepdim=True)
        share = rows.shape[1] / (self.count + rows.shape[1])
        change = mean - self.mean
        self.var += share * (var - self.var) + share * (1 - share) * change.square()
        self.mean += share * change
        self.count += rows.shape[1]

    def scale(self) -> Tensor:
        """The standard deviation [S, 1, W]."""
        return (self.var + 1e-8).sqrt()

    def forward(self, rows: Tensor) -> Tensor:
        """[S, B, W] -> [S, B, W]."""
        return ((rows - self.mean) / self.scale()).clamp(-10, 10).float()


class Network(nn.Module):
    """Two tanh layers of 64, with orthogonal weights at first: [S, B, in] -> [S, B, out]."""

    def __init__(self, S: int, in_features: int, out_features: int, last_gain: float):
        super().__init__()
        self.fc1 = Linear((S,), in_features, 64)
        self.fc2 = Linear((S,), 64, 64)
        self.fc_out = Linear((S,), 64, out_features)
        make_orthogonal(self.fc1, 2**0.5)
        make_orthogonal(self.fc2, 2**0.5)
        make_orthogonal(self.fc_out, last_gain)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.fc1(x))
        x = torch.tanh(self.fc2(x))
        return self.fc_out(x)


def make_orthogonal(layer: Linear, gain: float) -> None:
    """Each seed's weight, and no bias."""
    for weight in layer.weight.data:
        nn.init.orthogonal_(weight, gain)
    nn.init.zeros_(layer.bias)


class Actor(nn.Module):
    """A Gaussian whose deviation is the same in every state. It holds the observations' statistics, to act alone."""

    def __init__(self, S: int, O: int, A: int):
        super().__init__()
        self.normalizer = RunningNormalizer(S, O)
        self.network = Network(S, O, A, last_gain=0.01)
        self.log_std = nn.Parameter(torch.zeros(S, 1, A))

    def forward(self, observations: Tensor) -> Tensor:
        """The environment's observations [S, B, O] -> mean [S, B, A]; the deterministic action is that, clipped."""
        return self.network(self.normalizer(observations))

    def log_prob(self, mean: Tensor, actions: Tensor) -> Tensor:
        """log N(actions; mean, std) of [S, B, A], summed over A: [S, B]."""
        scaled = (actions - mean) / self.log_std.exp()
        return (-0.5 * scaled.square() - self.log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> Tensor:
        """[S], the same in every state."""
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum((1, 2))


class Critic(Network):
    """The value of a state: normalised observations [S, B, O] -> [S, B]."""

    def __init__(self, S: int, O: int, A: int):
        super().__init__(S, O, 1, last_gain=1.0)

    def forward(self, observations: Tensor) -> Tensor:
        return super().forward(observations).squeeze(-1)


# ------------------------------------------------------------------------------------------------------------------ PPO


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminations: Tensor,
    ends: Tensor,
    gamma: float,
    gae_lambda: float,
) -> Tensor:
    """Generalised advantage estimates (Schulman et al. 2016, equation 16), from tensors [S, T, N]: [S, T, N].

        A_t = delta_t + gamma lambda (1 - end_t) A_(t+1),   delta_t = r_t + gamma (1 - terminated_t) V(s'_t) - V(s_t)

    next_values: of the last observation of the step's own episode, s'. ends: terminated or truncated.
    """
    deltas = rewards + gamma * (1 - terminations) * next_values - values
    advantages = torch.empty_like(deltas)
    following = torch.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.shape[1])):
        following = deltas[:, t] + gamma * gae_lambda * (1 - ends[:, t]) * following
        advantages[:, t] = following
    return advantages


def policy_loss(log_ratio: Tensor, advantages: Tensor, clip_coef: float) -> Tensor:
    """mean max(-adv ratio, -adv clip(ratio, 1 - c, 1 + c)) over B: [S, B] -> [S] (PPO, equation 7)."""
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    return torch.maximum(-advantages * ratio, -advantages * clipped).mean(-1)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_coef: float) -> Tensor:
    """1/2 mean max((V - R)^2, (V_clipped - R)^2) over B, V_clipped within c of the rollout's value: [S, B] -> [S]."""
    clipped = old_values + (values - old_values).clamp(-clip_coef, clip_coef)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square()).mean(-1)


# ---------------------------------------------------------------------------------------------------------------- agent


class Rollout(NamedTuple):
    """num_steps vector steps; train() collects them one by one, each without the axis T."""

    observations: Tensor  # [S, T, N, O], normalised
    actions: Tensor  # [S, T, N, A], as sampled: not clipped to [-1, 1]
    log_probs: Tensor  # [S, T, N], of the actions when they were sampled
    values: Tensor  # [S, T, N], of the observations
    rewards: Tensor  # [S, T, N], normalised
    next_observations: Tensor  # [S, T, N, O], normalised, of the same episode
    terminations: Tensor  # [S, T, N], 1 where the episode terminated
    ends: Tensor  # [S, T, N], 1 where the episode terminated or was truncated


class Batch(NamedTuple):
    """Rows of a rollout, as the losses take them."""

    observations: Tensor  # [S, B, O], normalised
    actions: Tensor  # [S, B, A]
    log_probs: Tensor  # [S, B], of the actions when they were sampled
    values: Tensor  # [S, B], of the observations, before the update
    advantages: Tensor  # [S, B]
    returns: Tensor  # [S, B]


class Agent:
    """The networks of S seeds, their losses and what they learn from a rollout."""

    def __init__(self, args: Args, O: int, A: int, device: torch.device):
        self.args = args
        self.device = device
        self.actor = Actor(args.num_seeds, O, A).to(device)
        self.critic = Critic(args.num_seeds, O, A).to(device)
        self.reward_normalizer = RunningNormalizer(args.num_seeds, 1).to(device)
        self.discounted_returns = torch.zeros(args.num_seeds, args.num_envs, device=device)  # of each environment
        self.parameters = [*self.actor.parameters(), *self.critic.parameters()]
        self.optimizer = torch.optim.Adam(self.parameters, args.learning_rate, eps=1e-5, fused=True)

    def act(self, observations: Tensor, explore: bool) -> Tensor:
        """The environment's observations [S, B, O] -> actions [S, B, A]."""
        if explore:
            actions, _, _ = self.sample(self.actor.normalizer(observations))
        else:
            actions = self.actor(observations)
        return actions.clamp(-1, 1)

    def sample(self, observations: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised observations [S, B, O] -> actions [S, B, A], not clipped; log-probabilities, values [S, B]."""
        mean = self.actor.network(observations)
        actions = mean + self.actor.log_std.exp() * torch.randn_like(mean)
        return actions, self.actor.log_prob(mean, actions), self.critic(observations)

    def normalized_rewards(self, rewards: Tensor, terminations: Tensor) -> Tensor:
        """A step's rewards [S, N] over the deviation of all discounted returns so far, within +-10: [S, N].

        As gymnasium's NormalizeReward: truncation does not begin a return anew.
        """
        self.discounted_returns = self.args.gamma * (1 - terminations) * self.discounted_returns + rewards
        self.reward_normalizer.update(self.discounted_returns.unsqueeze(-1))
        return (rewards / self.reward_normalizer.scale().squeeze(-1)).clamp(-10, 10).float()

    @torch.no_grad()
    def advantages(self, rollout: Rollout) -> Tensor:
        """Of the rollout's actions, [S, T, N]."""
        T, N = rollout.rewards.shape[1:]
        next_values = self.critic(rollout.next_observations.flatten(1, 2)).unflatten(1, (T, N))
        return gae(
            rewards=rollout.rewards,
            values=rollout.values,
            next_values=next_values,
            terminations=rollout.terminations,
            ends=rollout.ends,
            gamma=self.args.gamma,
            gae_lambda=self.args.gae_lambda,
        )

    def actor_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The policy loss minus ent_coef times the entropy [S], and what to log."""
        args = self.args
        mean = self.actor.network(batch.observations)
        log_ratio = self.actor.log_prob(mean, batch.actions) - batch.log_probs
        advantages = batch.advantages
        if args.norm_adv:
            deviation = advantages.std(-1, keepdim=True) + 1e-8
            advantages = (advantages - advantages.mean(-1, keepdim=True)) / deviation
        surrogate = policy_loss(log_ratio, advantages, args.clip_coef)
        entropy = self.actor.entropy()
        metrics = {"losses/policy_loss": surrogate, "losses/entropy": entropy}
        log_ratio = log_ratio.detach()
        ratio = log_ratio.exp()
        metrics["losses/approx_kl"] = (ratio - 1 - log_ratio).mean(-1)  # http://joschu.net/blog/kl-approx.html
        metrics["losses/clipfrac"] = ((ratio - 1).abs() > args.clip_coef).float().mean(-1)
        return surrogate - args.ent_coef * entropy, metrics

    def critic_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The value loss [S], and what to log."""
        bound = self.args.clip_coef if self.args.clip_vloss else math.inf
        loss = value_loss(self.critic(batch.observations), batch.values, batch.returns, bound)
        return loss, {"losses/value_loss": loss}

    def update(self, rollout: Rollout) -> dict[str, Tensor]:
        """Learns from a rollout; returns what to log: losses of the last minibatch, explained variance of all."""
        args = self.args
        advantages = self.advantages(rollout)
        rows = Batch(
            observations=rollout.observations.flatten(1, 2),
            actions=rollout.actions.flatten(1, 2),
            log_probs=rollout.log_probs.flatten(1),
            values=rollout.values.flatten(1),
            advantages=advantages.flatten(1),
            returns=(advantages + rollout.values).flatten(1),
        )
        seed_index = torch.arange(args.num_seeds, device=self.device).unsqueeze(1)
        for _ in range(args.update_epochs):
            order = torch.rand(rows.returns.shape, device=self.device).argsort(-1)
            for index in order.tensor_split(args.num_minibatches, -1):
                batch = Batch(*[column[seed_index, index] for column in rows])
                actor_loss, metrics = self.actor_loss(batch)
                critic_loss, critic_metrics = self.critic_loss(batch)
                metrics |= critic_metrics
                loss = actor_loss + args.vf_coef * critic_loss
                self.optimizer.zero_grad()
                loss.sum().backward()  # no term couples two seeds
                clip_gradients(self.parameters, args.max_grad_norm)
                self.optimizer.step()
        unexplained = rows.advantages.var(-1) / rows.returns.var(-1).clamp_min(1e-8)
        return detached(metrics | {"losses/explained_variance": 1 - unexplained})

    def state(self) -> dict[str, nn.Module | torch.optim.Optimizer]:
        """What a checkpoint holds, by name."""
        return {
            "actor": self.actor,
            "critic": self.critic,
            "optimizer": self.optimizer,
            "reward_normalizer": self.reward_normalizer,
        }


def detached(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: metric.detach() for name, metric in metrics.items()}


def clip_gradients(parameters: list[Tensor], max_norm: float) -> None:
    """Scales each seed's gradient down to the norm max_norm, whatever the other seeds' are; parameters [S, ., .]."""
    norm = sum(parameter.grad.square().sum((1, 2)) for parameter in parameters).sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1)
    for parameter in parameters:
        parameter.grad *= factor.view(-1, 1, 1)


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

    step = 0
    evaluations = []  # rows of eval.csv
    if args.resume:
        step, evaluations = load_checkpoint(args, agent)
    folder = open_folder(args)
    print(folder, flush=True)
    training_seeds = start_seeds(args, step, False, S * N)
    envs = make_envs(args, training_seeds)
    eval_envs = make_envs(args, start_seeds(args, step, True, S * args.eval_episodes))
    listen_for_stop()

    @torch.no_grad()
    def policy(observations: np.ndarray) -> np.ndarray:
        """observations [S * E, O] -> actions [S * E, A]."""
        batch = torch.from_numpy(observations).to(device).unflatten(0, (S, -1))
        return agent.act(batch, explore=False).flatten(0, 1).cpu().numpy()

    def by_seed(column: np.ndarray) -> Tensor:
        """[S * N, ...] -> [S, N, ...] in float32, on the training device."""
        return torch.as_tensor(column, dtype=torch.float32, device=device).unflatten(0, (S, N))

    log = Log(folder, args, step)
    torch.manual_seed(args.seed + step)  # a resumed run begins new episodes, and draws new numbers

    observations, _ = envs.reset(seed=training_seeds)
    episode_returns = np.zeros(S * N)
    finished_returns = [[] for _ in range(S)]  # of each seed, since the last point of the log
    collected = []  # steps of a rollout; a resumed run begins a new one
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
                save_checkpoint(folder, step, agent)
            if is_last or is_stopped:
                break

            check_finite(step, observation=observations)
            agent.actor.normalizer.update(by_seed(observations))
            normalized = agent.actor.normalizer(by_seed(observations))
            with torch.no_grad():
                sampled, log_probs, values = agent.sample(normalized)
            actions = sampled.clamp(-1, 1).flatten(0, 1).cpu().numpy()
            check_finite(step, action=actions)
            envs.step_async(actions)
            next_observations, rewards, terminations, truncations, final_observations = envs.step_wait()

            done = terminations | truncations  # there next_observations already begin the next episode
            check_finite(step, observation=final_observations, reward=rewards)
            collected.append(
                Rollout(
                    observations=normalized,
                    actions=sampled,
                    log_probs=log_probs,
                    values=values,
                    rewards=agent.normalized_rewards(by_seed(rewards), by_seed(terminations)),
                    next_observations=agent.actor.normalizer(by_seed(final_observations)),
                    terminations=by_seed(terminations),
                    ends=by_seed(done),
                )
            )
            observations = next_observations
            step += 1

            if len(collected) == args.num_steps:
                if args.anneal_lr:
                    share_left = 1 - (step - args.num_steps) / args.total_timesteps  # at the rollout's start
                    agent.optimizer.param_groups[0]["lr"] = args.learning_rate * share_left
                rollout = Rollout(*[torch.stack(column, 1) for column in zip(*collected)])
                metrics = agent.update(rollout)
                collected = []

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
                save_checkpoint(folder, step, agent)
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

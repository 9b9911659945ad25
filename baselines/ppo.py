# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11,<3", "numpy>=1.26,<3", "gymnasium[mujoco,box2d]>=1.1,<2", "mujoco>=3.1.6,<4",
#     "dm_control>=1.0.20,<2", "shimmy>=2.0,<3", "tyro>=0.9,<2", "tensorboard>=2.17,<3", "wandb>=0.18,<1"]
# ///
"""PPO, proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347) with CleanRL's settings for continuous actions.

    L = mean max(-A r, -A clip(r, 1 - c, 1 + c)) - ent_coef entropy + vf_coef value loss,  r = pi / pi_old  (equation 7)

Its cells of the AMS table count transitions: 500 000 of them are 62 500 vector steps of 8 environments.

    python baselines/ppo.py --env-id dog-run
    python baselines/ppo.py --env-id Walker2d-v5 --num-seeds 5

Shapes: S seeds side by side, N environments a seed, T steps of a rollout, M rows of a minibatch, O observation, A action.
Actions are in [-1, 1] everywhere but inside the environments.
"""

import ctypes
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
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
    total_timesteps: int = 62_500  # vector steps: each advances every environment
    resume: str | None = None  # a run's folder: go on from its checkpoint, with its arguments
    track: bool = False  # log to Weights & Biases too; WANDB_MODE=offline needs no account
    wandb_project_name: str = "smoothq"
    wandb_entity: str | None = None
    cuda: bool = True  # use the GPU where there is one
    log_every: int = 2048  # vector steps between two lines of the log
    eval_every: int = 25_000  # vector steps between two evaluations of the deterministic policy
    save_every: int = 50_000  # vector steps between two checkpoints; Ctrl-C and SIGTERM save one too
    eval_episodes: int = 10  # a seed

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
    ent_coef: float = 0.0
    vf_coef: float = 0.5
    max_grad_norm: float = 0.5  # of actor and critic together, each seed's own

    def __post_init__(self):  # tyro makes a message and exit status 2 of a ValueError
        for name, value in vars(self).items():
            low = type(value) is int and name != "seed"
            high = 1 if name in ("learning_rate", "gamma", "gae_lambda") else 2**32
            if isinstance(value, (int, float)) and not low <= value <= high:
                raise ValueError(f"--{name.replace('_', '-')} {value}: at least {low:d}, at most {high}")
        if self.num_steps * self.num_envs < 2 * self.num_minibatches:
            raise ValueError("--num-minibatches is at most half of --num-steps times --num-envs")


EVAL_COLUMNS = "step,transitions,seed,episode,return,length,smoothness,action_fluctuation"
STOP = []  # when SIGINT or SIGTERM asked to save and stop
SETTINGS = {env_id: dict(total_timesteps=125_000) for env_id in ("dog-run", "humanoid-run")}  # defaults by environment


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


class RunningNormalizer(nn.Module):
    """Mean and variance [S, 1, W] of all rows that a seed has seen; forward scales rows [S, B, W] by them, within +-10."""

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
        return (self.var + 1e-8).sqrt()

    def forward(self, rows: Tensor) -> Tensor:
        return ((rows - self.mean) / self.scale()).clamp(-10, 10).float()


class Network(nn.Module):
    """Two tanh layers of 64, orthogonal initial weights: [S, B, in] -> [S, B, out]."""

    def __init__(self, S: int, in_features: int, out_features: int, last_gain: float):
        super().__init__()
        self.fc1 = Linear((S,), in_features, 64)
        self.fc2 = Linear((S,), 64, 64)
        self.fc_out = Linear((S,), 64, out_features)
        for layer, gain in ((self.fc1, 2**0.5), (self.fc2, 2**0.5), (self.fc_out, last_gain)):
            nn.init.zeros_(layer.bias)
            for weight in layer.weight.data:
                nn.init.orthogonal_(weight, gain)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc_out(torch.tanh(self.fc2(torch.tanh(self.fc1(x)))))


class Actor(nn.Module):
    """A Gaussian whose deviation is no function of the state; with the observations' statistics, so that it can act alone."""

    def __init__(self, S: int, O: int, A: int):
        super().__init__()
        self.normalizer, self.network = RunningNormalizer(S, O), Network(S, O, A, 0.01)
        self.log_std = nn.Parameter(torch.zeros(S, 1, A))

    def forward(self, observations: Tensor) -> Tensor:
        """observations [S, B, O] -> mean [S, B, A]; the deterministic action is that, clipped."""
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
        super().__init__(S, O, 1, 1.0)

    def forward(self, observations: Tensor) -> Tensor:
        return super().forward(observations).squeeze(-1)


def gae(rewards: Tensor, values: Tensor, next_values: Tensor, terminations: Tensor, ends: Tensor,
        gamma: float, gae_lambda: float) -> Tensor:  # fmt: skip
    """Generalised advantages A_t = delta_t + gamma lambda (1 - end_t) A_{t+1}: [S, T, N] (Schulman et al. 2016, equation 16).

    delta_t = r_t + gamma (1 - terminated_t) V(s'_t) - V(s_t), s' the last observation of its own episode; ends (terminated or
    truncated) cut the sum. All [S, T, N].
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


def clip_gradients(parameters: list[Tensor], max_norm: float) -> None:
    """Scales each seed's gradient down to the norm max_norm, whatever the other seeds' are."""
    norm = sum(p.grad.flatten(1).square().sum(1) for p in parameters).sqrt()
    for p in parameters:
        p.grad *= (max_norm / (norm + 1e-6)).clamp(max=1).view(-1, *[1] * (p.dim() - 1))


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
    actor, critic, reward_normalizer = Actor(S, O, A).to(device), Critic(S, O, A).to(device), RunningNormalizer(S, 1).to(device)
    parameters = [*actor.parameters(), *critic.parameters()]
    optimizer = torch.optim.Adam(parameters, args.learning_rate, eps=1e-5, fused=True, capturable=device.type == "cuda")
    state = {"actor": actor, "critic": critic, "optimizer": optimizer, "reward_normalizer": reward_normalizer}
    rollout = {"observations": O, "actions": A, "next_observations": O}
    rollout |= dict.fromkeys(("log_probs", "values", "rewards", "terminations", "ends"), 1)
    rollout = {name: torch.zeros(S, args.num_steps, N, width, device=device) for name, width in rollout.items()}

    def update() -> dict[str, Tensor]:
        """Learns from the full rollout."""
        numbers = {name: rollout[name].squeeze(-1) for name in ("rewards", "values", "terminations", "ends")}
        with torch.no_grad():
            numbers["next_values"] = critic(rollout["next_observations"].flatten(1, 2)).view(S, args.num_steps, N)
            advantages = gae(**numbers, gamma=args.gamma, gae_lambda=args.gae_lambda)
        rows = {name: rollout[name].flatten(1, 2) for name in ("observations", "actions")}
        rows |= {name: rollout[name].flatten(1) for name in ("log_probs", "values")}
        rows |= {"advantages": advantages.flatten(1), "returns": (advantages + numbers["values"]).flatten(1)}
        for _ in range(args.update_epochs):
            order = torch.rand(S, args.num_steps * N, device=device).argsort(-1)
            for index in order.tensor_split(args.num_minibatches, -1):
                batch = {name: column[torch.arange(S, device=device)[:, None], index] for name, column in rows.items()}
                log_ratio = actor.log_prob(actor.network(batch["observations"]), batch["actions"]) - batch["log_probs"]
                values, advantages = critic(batch["observations"]), batch["advantages"]
                if args.norm_adv:
                    advantages = (advantages - advantages.mean(-1, keepdim=True)) / (advantages.std(-1, keepdim=True) + 1e-8)
                pg_loss, entropy = policy_loss(log_ratio, advantages, args.clip_coef), actor.entropy()
                v_loss = value_loss(values, batch["values"], batch["returns"], args.clip_coef if args.clip_vloss else math.inf)
                loss = pg_loss - args.ent_coef * entropy + args.vf_coef * v_loss
                optimizer.zero_grad()
                loss.sum().backward()  # no term couples two seeds
                clip_gradients(parameters, args.max_grad_norm)
                optimizer.step()
        losses = {"policy_loss": pg_loss, "value_loss": v_loss, "entropy": entropy}
        losses["approx_kl"] = (log_ratio.exp() - 1 - log_ratio).mean(-1)  # http://joschu.net/blog/kl-approx.html
        losses["clipfrac"] = ((log_ratio.exp() - 1).abs() > args.clip_coef).float().mean(-1)
        losses["explained_variance"] = 1 - rows["advantages"].var(-1) / rows["returns"].var(-1).clamp_min(1e-8)
        return {f"losses/{name}": value.detach() for name, value in losses.items()}

    @torch.no_grad()
    def policy(observations: np.ndarray) -> np.ndarray:
        """observations [S * E, O] -> actions [S * E, A]."""
        return actor(torch.from_numpy(observations).unflatten(0, (S, -1)).to(device)).clamp(-1, 1).flatten(0, 1).cpu().numpy()

    @torch.no_grad()
    def explore(observations: np.ndarray) -> dict[str, Tensor]:
        """A step's columns of the rollout; the actions are a sample of the Gaussian, not yet clipped."""
        observations = torch.from_numpy(observations).unflatten(0, (S, N)).to(device)
        actor.normalizer.update(observations)
        observations = actor.normalizer(observations)
        mean = actor.network(observations)
        actions = mean + actor.log_std.exp() * torch.randn_like(mean)
        log_probs, values = actor.log_prob(mean, actions).unsqueeze(-1), critic(observations).unsqueeze(-1)
        return {"observations": observations, "actions": actions, "log_probs": log_probs, "values": values}

    name = re.sub(r"[^\w.-]", "_", f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}")
    folder = Path(args.resume or f"runs/{name}")
    step, episodes = load_checkpoint(folder, state, None) if args.resume else (0, [])
    torch.manual_seed(args.seed + step)  # a resumed run begins new episodes, and draws new numbers
    envs, eval_envs = make_envs(args.env_id, S * N), make_envs(args.env_id, S * args.eval_episodes)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, request_stop)
    log = start_log(folder, args, step)

    observations, _ = envs.reset(seed=np.random.SeedSequence([args.seed, step, 0]).generate_state(S * N).tolist())
    episode_returns, finished, metrics = np.zeros(S * N), [], {}
    discounted_returns = torch.zeros(S, N, 1, device=device)  # of each episode so far: their spread is the rewards' scale
    row = 0  # of the rollout; a resumed run begins a new one
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
            save_checkpoint(folder, step, state, episodes, None)
        if at_end or STOP:
            break

        columns = explore(observations)
        envs.step_async(columns["actions"].clamp(-1, 1).flatten(0, 1).cpu().numpy())
        next_observations, rewards, terminations, truncations, infos = envs.step_wait(timeout=300)
        done, final_observations = terminations | truncations, next_observations.copy()
        if done.any():  # there next_observations already begin the next episode
            final_observations[done] = np.stack(infos["final_obs"][done])
        if not (np.isfinite(final_observations).all() and np.isfinite(rewards).all()):
            sys.exit("an environment returned a number that is not finite")
        outcome = {"next_observations": final_observations, "rewards": rewards, "terminations": terminations, "ends": done}
        for name, column in outcome.items():
            columns[name] = torch.as_tensor(column, dtype=torch.float32, device=device).reshape(S, N, -1)
        discounted_returns = discounted_returns * args.gamma * (1 - columns["terminations"]) + columns["rewards"]
        reward_normalizer.update(discounted_returns)
        columns["rewards"] = (columns["rewards"] / reward_normalizer.scale()).clamp(-10, 10)
        columns["next_observations"] = actor.normalizer(columns["next_observations"])
        for name, column in columns.items():
            rollout[name][:, row] = column
        observations = next_observations
        step, row = step + 1, (row + 1) % args.num_steps
        if row == 0:
            share_left = 1 - (step - args.num_steps) / args.total_timesteps
            optimizer.param_groups[0]["lr"] = args.learning_rate * (share_left if args.anneal_lr else 1)
            metrics |= update()

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

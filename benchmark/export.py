"""Exports a saved policy as ONNX and as torch.export .pt2: observation in, action in the environment's own units out.

    python benchmark/export.py runs/NAME --seed 3 --step 50000

Writes policy_seed3_step000050000.onnx and .pt2 into the run's folder, compares both with the script's agent and times
them. Their user needs onnxruntime, or torch, and nothing else; float32 observations [B, O] -> actions [B, A], any B:

    session = onnxruntime.InferenceSession("policy_seed3_step000050000.onnx")
    (actions,) = session.run(None, {"observations": observations})
    actions = torch.export.load("policy_seed3_step000050000.pt2").module()(torch.from_numpy(observations))

Both say what they are, in the names that metadata() below lists; the .pt2 gives those that it is asked for:

    about = session.get_modelmeta().custom_metadata_map  # {"env_id": "Ant-v5", "time_step": "0.05", ...}
    high = json.loads(about["action_high"])
    about = {"env_id": "", "time_step": ""}
    torch.export.load("policy_seed3_step000050000.pt2", extra_files=about)
"""

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import onnxruntime
import pandas as pd
import torch
import tyro
from play import Player, load_player, time_step
from torch import Tensor, nn


@dataclass
class Args:
    run: tyro.conf.Positional[Path]  # its folder
    seed: int | None = None  # of the run's seeds; its first
    step: int | None = None  # of the run's saved policies; the last
    time_step: float | None = None  # seconds from one action to the next, where the environment does not say it rightly


class Policy(nn.Module):
    """The deterministic policy: observations [B, O] -> actions [B, A] in the environment's own units and bounds."""

    def __init__(self, player: Player):
        super().__init__()
        self.agent = player.agent
        self.actor = player.agent.actor.float()  # for torch.export a part of this module; PPO's is in float64
        box = player.env.action_box
        self.low = torch.from_numpy(box.low.ravel()).float()
        self.high = torch.from_numpy(box.high.ravel()).float()

    def forward(self, observations: Tensor) -> Tensor:
        actions = self.agent.act(observations.unsqueeze(0), explore=False).squeeze(0)  # in [-1, 1]
        scaled = self.low + (actions + 1) / 2 * (self.high - self.low)
        return scaled.clamp(self.low, self.high)


def observation_parts(space: gym.Space, path: str = "") -> list[dict]:
    """What the flat observation is made of, in its order, which is gymnasium's flatten's: a Dict's keys are sorted.

    path is the keys (of a Dict) and indices (of a Tuple) down to the part, with slashes between them. A Discrete part
    has a number for each of its values: 1 for the one it is, 0 for the others.
    """
    if isinstance(space, gym.spaces.Dict):
        parts = space.spaces.items()
    elif isinstance(space, gym.spaces.Tuple):
        parts = enumerate(space.spaces)
    else:
        return [{"path": path.removeprefix("/"), "size": gym.spaces.flatdim(space), "space": str(space)}]
    return [leaf for key, part in parts for leaf in observation_parts(part, f"{path}/{key}")]


def metadata(player: Player, seconds: float | None) -> dict[str, str]:
    """What the policy is, as text: numbers, lists and env_kwargs in JSON.

    env_id, env_kwargs; observation_size O, observation_parts (path, size and space of each, in order); action_size A,
    action_shape (the environment's own: reshape the A numbers to it), action_low and action_high [A]; time_step in
    seconds, null where nothing says it; script, seed, step; where eval.csv is there, return, length and smoothness,
    means over this seed's episodes then.
    """
    box = player.env.action_box
    about = {
        "env_id": player.args.env_id,
        "env_kwargs": player.args.env_kwargs,
        "observation_size": player.env.observation_space.shape[0],
        "observation_parts": observation_parts(player.env.env.observation_space),
        "action_size": player.env.action_space.shape[0],
        "action_shape": box.shape,
        "action_low": box.low.ravel().tolist(),
        "action_high": box.high.ravel().tolist(),
        "time_step": seconds or time_step(player.env),
        "script": player.run.args["script"],
        "seed": player.seed,
        "step": player.step,
    }
    evaluations = player.run.folder / "eval.csv"
    if evaluations.exists():
        table = pd.read_csv(evaluations)
        rows = table[(table["seed"] == player.seed) & (table["step"] == player.step)]
        about |= rows[["return", "length", "smoothness"]].mean().to_dict()
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in about.items()}


def export(policy: Policy, path: Path, O: int, about: dict[str, str]) -> tuple[Path, Path]:
    """Writes path.onnx and path.pt2 and returns their paths."""
    onnx = path.with_suffix(".onnx")
    pt2 = path.with_suffix(".pt2")
    batch = torch.export.Dim("batch")
    program = torch.export.export(policy, (torch.zeros(2, O),), dynamic_shapes=({0: batch},))
    torch.export.save(program, pt2, extra_files=about)
    names = {"input_names": ["observations"], "output_names": ["actions"]}
    model = torch.onnx.export(program, (), verbose=False, **names)
    model.model.metadata_props.update(about)
    model.save(onnx)
    return onnx, pt2


def main(args: Args) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # warns of each operator of a missing torchvision
    torch.set_num_threads(1)
    player = load_player(args.run, args.seed, args.step)
    policy = Policy(player)
    about = metadata(player, args.time_step)
    player.env.close()
    O = player.env.observation_space.shape[0]
    onnx, pt2 = export(policy, args.run / f"policy_seed{player.seed}_step{player.step:09d}", O, about)
    for name, text in about.items():
        print(f"  {name:18} {text}")
    if about["time_step"] == "null":
        print("no metadata['render_fps'] and no dt: --time-step SECONDS says how long a step lasts")

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(onnx, options)
    module = torch.export.load(pt2).module()
    calls = {
        onnx: lambda observations: session.run(None, {"observations": observations})[0],
        pt2: lambda observations: module(torch.from_numpy(observations)).numpy(),
    }
    observations = np.random.default_rng(0).standard_normal((1000, O), np.float32)
    actions = policy(torch.from_numpy(observations)).numpy()
    for path, call in calls.items():
        difference = np.abs(call(observations) - actions).max()
        seconds = []
        for observation in observations:
            start = time.perf_counter()
            call(observation[None])
            seconds.append(time.perf_counter() - start)
        print(f"{path}: {1e6 * np.median(seconds):.0f} us a call; differs from the agent by {difference:.1g} at most")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

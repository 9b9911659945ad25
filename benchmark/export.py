"""Exports a saved policy as ONNX and as torch.export .pt2: observation in, action in the environment's own units out.

    python benchmark/export.py runs/NAME --seed 3 --step 50000

Writes policy_seed3_step000050000.onnx and .pt2 into the run's folder, compares both with the script's actor and times them.
Their user needs onnxruntime, or torch, and nothing else; float32 observations [B, O] -> actions [B, A], any B:

    session = onnxruntime.InferenceSession("policy_seed3_step000050000.onnx")
    (actions,) = session.run(None, {"observations": observations})
    actions = torch.export.load("policy_seed3_step000050000.pt2").module()(torch.from_numpy(observations))
"""

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import tyro
from play import Run, load_run


@dataclass
class Args:
    run: tyro.conf.Positional[Path]  # its folder
    seed: int | None = None  # of the run's seeds; its first
    step: int | None = None  # of the run's saved policies; the last


def export(run: Run) -> tuple[Path, Path]:
    """Writes a run's policy; returns the paths of the ONNX and the .pt2 file."""
    path = run.folder / f"policy_seed{run.seed}_step{run.step:09d}"
    onnx, pt2 = path.with_suffix(".onnx"), path.with_suffix(".pt2")
    observations = torch.zeros(2, *run.env.observation_space.shape)
    program = torch.export.export(run.policy, (observations,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, pt2)
    names = {"input_names": ["observations"], "output_names": ["actions"]}
    torch.onnx.export(program, (), onnx, external_data=False, verbose=False, **names)
    return onnx, pt2


def main(args: Args) -> None:
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # warns of each torchvision operator if that is not installed
    torch.set_num_threads(1)
    run = load_run(args.run, args.seed, args.step)
    onnx, pt2 = export(run)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session, module = onnxruntime.InferenceSession(onnx, options), torch.export.load(pt2).module()
    calls = {
        onnx: lambda observations: session.run(None, {"observations": observations})[0],
        pt2: lambda observations: module(torch.from_numpy(observations)).numpy(),
    }
    observations = np.random.default_rng(0).standard_normal((1000, *run.env.observation_space.shape), np.float32)
    actions = run.policy(torch.from_numpy(observations)).numpy()
    for path, call in calls.items():
        difference, seconds = np.abs(call(observations) - actions).max(), []
        for observation in observations:
            start = time.perf_counter()
            call(observation[None])
            seconds.append(time.perf_counter() - start)
        print(f"{path}: {1e6 * np.median(seconds):.0f} us a call; differs from the actor by {difference:.1g} at most")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

"""Where an iteration's time goes: torch.profiler around a script's own run, once its updates have settled.

    python benchmark/loop_profile.py td3_ams.py --env-id dog-run
    python benchmark/loop_profile.py baselines/td3.py --env-id Walker2d-v5 --no-cuda-graph --compile off

The flags are the script's. Prints the ten largest costs and, a step, the time of the loop, of the environments (send and
receive), of the update's call and, on a GPU, of its kernels: the larger of environments and kernels is the loop's floor.
trace.json opens in https://ui.perfetto.dev. The run stops after 300 steps with updates and 50 profiled ones, and is not kept.
"""

import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from sweep import load_script
from torch.profiler import ProfilerActivity, profile

SETTLE, PROFILED = 300, 50


class Enough(Exception):
    """The profile is complete."""


def timed(seconds: dict[str, float], name: str, function: Callable) -> Callable:
    def call(*args, **kwargs):
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[name] += time.perf_counter() - start

    return call


def main(path: str, flags: list[str]) -> None:
    script = load_script(path.removesuffix(".py"))
    args = script.parse_args(["--total-timesteps", "1000000", "--learning-starts", "200", *flags])
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    profiler, seconds, steps = profile(activities=activities), defaultdict(float), 0
    script.VectorEnv.send = timed(seconds, "environments: send", script.VectorEnv.send)
    receive = timed(seconds, "environments: receive", script.VectorEnv.receive)
    begun = 0.0

    def receive_and_count(envs):
        nonlocal steps, begun
        answer = receive(envs)
        steps += envs is training_envs[0]
        if steps == args.learning_starts + SETTLE and not begun:
            profiler.start()
            seconds.clear()
            begun = time.perf_counter()
        elif begun and steps == args.learning_starts + SETTLE + PROFILED:
            seconds["the loop"] = time.perf_counter() - begun
            profiler.stop()
            raise Enough
        return answer

    training_envs, make = [], script.make_vector_env

    def make_and_note(*arguments):
        training_envs.append(make(*arguments))  # the training environments are made first
        return training_envs[-1]

    script.VectorEnv.receive, script.make_vector_env = receive_and_count, make_and_note
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            script.train(args)
        except Enough:
            pass
        finally:
            os.chdir(here)
    averages = profiler.key_averages()
    if torch.cuda.is_available():
        seconds["kernels"] = sum(event.self_device_time_total for event in averages) * 1e-6
    order = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(averages.table(sort_by=order, row_limit=10, max_name_column_width=60))
    for name, total in sorted(seconds.items(), key=lambda item: -item[1]):
        print(f"{total / PROFILED * 1e3:8.3f} ms a step  {name}")
    profiler.export_chrome_trace("trace.json")


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        sys.exit(2)
    main(sys.argv[1], sys.argv[2:])

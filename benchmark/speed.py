"""How fast: our TD3 and SAC against stable-baselines3 (PyTorch) and sbx-rl (JAX), and what S, K and N cost.

    python benchmark/speed.py                        # CPU, and CUDA where there is one -> report/speed.csv, figures/speed.png
    python benchmark/speed.py --steps 500 --repeats 1 --studies libraries

Every figure is one training process with its own defaults, all with the same environment, networks (256, 256, ReLU), batch
(256), replay, one update a vector step and, on a CPU, one thread (XLA takes all cores: `taskset -c 0` in front of the command
holds every library to one). Ours compiles where a run of a million steps would by itself. The processes take turns; the median
over the repeats counts. The clock runs between two lines of a process's log, after warm-up, compilation and a number of updates
to settle. Run it on a machine that does nothing else.
"""

import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import tyro
from sweep import UserError, load_script, script_path

STUDIES = ("libraries", "seeds", "neighbors", "envs")
LIBRARIES = {"smoothq": "#CC6677", "stable-baselines3": "#88CCEE", "sbx-rl": "#117733"}
COLUMNS = ["study", "library", "algorithm", "device", "env_id", "value", "repeat"]
COLUMNS += ["vector_steps_per_second", "updates_per_second", "peak_memory_mib", "gpu_memory_mib"]
# On a CPU, as ours by default. XLA does not obey: `taskset -c 0` in front of the benchmark holds every library to one core.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
WARM_UP, LOG_EVERY = 256, 50  # vector steps before the first update; between two lines of the log


class Case(NamedTuple):
    """One process to time: value is S, K or N of the study, 1 for a library."""

    study: str
    library: str
    algorithm: str
    device: str
    env_id: str
    value: int = 1


@dataclass
class Options:
    env_id: str = "Walker2d-v5"
    """environment of all studies but neighbors"""
    neighbors_env_id: str = "dog-run"
    """environment of the study of K, up to its 38 actions"""
    studies: tuple[str, ...] = STUDIES
    """libraries, seeds (S), neighbors (K), envs (N)"""
    devices: tuple[str, ...] = ()
    """cpu, cuda; by default both where there is CUDA"""
    settle: int = 500
    """vector steps with updates before the clock runs"""
    steps: int = 3000
    """vector steps that are timed"""
    repeats: int = 5
    """processes a figure is the median of"""
    output: Path = Path("report")
    """where speed.csv and figures/speed.png go"""
    worker: str = ""
    """one of the other libraries, as library:algorithm:device: what the benchmark itself starts"""


def total_steps(options: Options) -> int:
    return WARM_UP + options.settle + options.steps


def cases(options: Options) -> list[Case]:
    found = []
    for device in options.devices:
        for algorithm in ("td3", "sac"):
            found += [Case("libraries", library, algorithm, device, options.env_id) for library in LIBRARIES]
        found += [Case("seeds", "smoothq", "td3", device, options.env_id, seeds) for seeds in (1, 2, 4, 8, 16)]
        found += [Case("neighbors", "smoothq", "td3_ams", device, options.neighbors_env_id, k) for k in (1, 2, 4, 8, 16, 38)]
        found += [Case("envs", "smoothq", "td3", device, options.env_id, envs) for envs in (1, 2, 4, 8, 16)]
    return [case for case in found if case.study in options.studies]


def compile_choice(case: Case) -> str:
    """What --compile auto comes to in a long run, which the timed one stands for."""
    import torch

    return "on" if load_script(case.algorithm).worth_compiling(10**6, torch.device(case.device)) else "off"


def command(case: Case, options: Options) -> list[str]:
    """The process that trains a case and prints "step N/..." lines."""
    if case.library != "smoothq":
        mine = ["--worker", f"{case.library}:{case.algorithm}:{case.device}", "--env-id", case.env_id]
        return [sys.executable, __file__, *mine, "--settle", str(options.settle), "--steps", str(options.steps)]
    flags = {"env-id": case.env_id, "device": case.device, "total-timesteps": total_steps(options), "learning-starts": WARM_UP}
    flags |= {"log-every": LOG_EVERY, "eval-every": 10**9, "eval-episodes": 1, "checkpoint-seconds": 1e9, "num-envs": 1}
    flags |= {"compile": compile_choice(case)}
    flags |= {"num-seeds": case.value} if case.study == "seeds" else {}
    flags |= {"num-envs": case.value} if case.study == "envs" else {}
    flags |= {"num-neighbors": case.value} if case.study == "neighbors" else {}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [sys.executable, str(script_path(case.algorithm)), *words, "--no-save-replay"]


def run_worker(options: Options) -> None:
    """Trains with another library, by the settings that our scripts have by default (its own for the rest)."""
    library, algorithm, device = options.worker.split(":")
    if library == "sbx-rl":
        import jax
        import sbx as package

        jax.config.update("jax_platforms", device)
    else:
        import stable_baselines3 as package
    import numpy as np
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.noise import NormalActionNoise
    from stable_baselines3.common.vec_env import DummyVecEnv

    class Log(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls % LOG_EVERY == 0:
                print(f"step {self.n_calls}/{total_steps(options)}", flush=True)
            return True

    script = load_script(algorithm)
    env = DummyVecEnv([lambda: script.make_env(options.env_id)])
    settings = {"learning_starts": WARM_UP, "batch_size": 256, "buffer_size": min(1_000_000, total_steps(options))}
    settings |= {"policy_kwargs": {"net_arch": [256, 256]}, "train_freq": 1, "gradient_steps": 1, "learning_rate": 3e-4}
    if algorithm == "td3":
        actions = env.action_space.shape[0]
        settings["action_noise"] = NormalActionNoise(np.zeros(actions), np.full(actions, 0.1))
    settings |= {"device": device} if library == "stable-baselines3" else {}
    model = getattr(package, algorithm.upper())("MlpPolicy", env, **settings)
    model.learn(total_steps(options), callback=Log())


def gpu_memory_mib() -> float | None:
    """Memory in use on the first GPU, by all processes."""
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    return float(subprocess.run(query, capture_output=True, text=True, check=True).stdout)


def time_case(case: Case, options: Options) -> dict[str, float]:
    """Trains once, in a folder of its own that is deleted afterwards; raises UserError with what a failed process said last."""
    times, gpu_before, gpu_peak = {}, gpu_memory_mib() if case.device == "cuda" else None, 0.0
    environment = {**os.environ, **(ONE_THREAD if case.device == "cpu" else {}), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "errors", "w+") as errors:
        kwargs = {"cwd": folder, "env": environment, "stdout": subprocess.PIPE, "stderr": errors, "text": True}
        process = subprocess.Popen(command(case, options), **kwargs)
        for line in process.stdout:
            if match := re.match(r"step (\d+)/", line):
                times.setdefault(int(match[1]), time.perf_counter())
                if gpu_before is not None:
                    gpu_peak = max(gpu_peak, gpu_memory_mib() - gpu_before)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            lines = errors.read().strip().splitlines() or [f"exit status {process.returncode}"]
            raise UserError(lines[-1])
    timed = {step: at for step, at in times.items() if step >= WARM_UP + options.settle}
    if len(timed) < 2:
        raise UserError(f"--steps {options.steps} is too short: at least {2 * LOG_EVERY} are needed")
    rate = (max(timed) - min(timed)) / (timed[max(timed)] - timed[min(timed)])
    seeds = case.value if case.study == "seeds" else 1
    measured = {"vector_steps_per_second": rate, "updates_per_second": rate * seeds, "peak_memory_mib": usage.ru_maxrss / 1024}
    return {**measured, "gpu_memory_mib": gpu_peak if gpu_before is not None else ""}


def draw(rows: list[dict], options: Options, path: Path) -> None:
    """Medians over the repeats, with the range of the repeats as bars."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    import pandas as pd

    table = pd.DataFrame(rows)
    shown = [study for study in STUDIES if study in set(table["study"])]
    figure, axes = plt.subplots(1, len(shown), figsize=(4.2 * len(shown) + 1.8, 4), squeeze=False, layout="constrained")
    repeats = table["repeat"].max() + 1
    figure.suptitle(
        "Training speed" + (f": median and range of {repeats} processes each" if repeats > 1 else ", one process each")
    )
    labels = {"seeds": "S, seeds side by side", "neighbors": "K, neighbours in the target", "envs": "N, environments"}
    for axis, study in zip(axes[0], shown):
        rates = table[table["study"] == study]
        axis.set_title(f"{study} ({rates['env_id'].iloc[0]})", fontsize=10)
        if study == "libraries":
            groups = list(dict.fromkeys(zip(rates["algorithm"], rates["device"])))
            for offset, (library, colour) in enumerate(LIBRARIES.items()):
                mine = rates[rates["library"] == library].groupby(["algorithm", "device"])["vector_steps_per_second"]
                for position, group in enumerate(groups):
                    if group not in mine.groups:
                        continue
                    values = mine.get_group(group)
                    reach = [[values.median() - values.min()], [values.max() - values.median()]]
                    label = library if position == 0 else None
                    at = position + (offset - 1) * 0.27
                    axis.bar(at, values.median(), 0.25, yerr=reach, color=colour, capsize=3, label=label)
            axis.set_xticks(range(len(groups)), [f"{algorithm.upper()}, {device}" for algorithm, device in groups])
            axis.set_ylabel("vector steps (= updates) a second")
        else:
            column = "updates_per_second" if study == "seeds" else "vector_steps_per_second"
            for device, colour in (("cpu", "#332288"), ("cuda", "#999933")):
                by_value = rates[rates["device"] == device].groupby("value")[column]
                if len(by_value):
                    middle = by_value.median()
                    reach = [middle - by_value.min(), by_value.max() - middle]
                    name = f"{rates['algorithm'].iloc[0].upper().replace('_', '-')}, {device}"
                    axis.errorbar(middle.index, middle, yerr=reach, marker="o", color=colour, capsize=3, label=name)
            axis.set_xscale("log", base=2)
            axis.set_xticks(sorted(rates["value"].unique()), sorted(rates["value"].unique()))
            axis.set_xlabel(labels[study])
            axis.set_ylabel("updates a second, all seeds" if study == "seeds" else "vector steps (= updates) a second")
        axis.set_ylim(0, 1.08 * axis.dataLim.y1)
        axis.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(options: Options) -> None:
    if options.worker:
        return run_worker(options)
    if unknown := set(options.studies) - set(STUDIES):
        raise UserError(f"no study is called {unknown.pop()}; there are {', '.join(STUDIES)}")
    if options.steps < 2 * LOG_EVERY or options.repeats < 1 or options.settle < 0:
        raise UserError(f"--steps must be at least {2 * LOG_EVERY}, --repeats at least 1, --settle at least 0")
    if not options.devices:
        import torch

        options.devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    options.output.mkdir(parents=True, exist_ok=True)
    rows, failed = [], set()
    for repeat in range(options.repeats):
        for case in cases(options):
            if case in failed:
                continue
            try:
                rows.append({**case._asdict(), "repeat": repeat, **time_case(case, options)})
            except UserError as error:
                print(f"left out: {' '.join(map(str, case))}: {error}", file=sys.stderr, flush=True)
                failed.add(case)
                continue
            rate, memory = rows[-1]["vector_steps_per_second"], rows[-1]["peak_memory_mib"]
            print(
                f"{repeat + 1}/{options.repeats} {' '.join(map(str, case))}: {rate:.1f} steps/s, {memory:.0f} MiB", flush=True
            )
            with open(options.output / "speed.csv", "w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(rows)
    if not rows:
        raise SystemExit("speed.py: nothing could be timed")
    draw(rows, options, options.output / "figures" / "speed.png")
    print(f"wrote {options.output / 'speed.csv'} and {options.output / 'figures' / 'speed.png'}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except UserError as error:
        print(f"speed.py: {error}", file=sys.stderr)
        sys.exit(2)

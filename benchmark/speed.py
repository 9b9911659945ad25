"""How fast: vector steps a second of whole training processes, ours beside the peers', on the same cores and in turns.

    python benchmark/speed.py --cores 1                    # TD3 and SAC: ours, stable-baselines3, sbx-rl (JAX)
    python benchmark/speed.py --cores 2 --peers FOLDER     # and CleanRL's and LeanRL's scripts in FOLDER
    python benchmark/speed.py "td3_ams.py --env-id dog-run" "OLD/td3_ams.py --env-id dog-run"             # any commands
    python benchmark/speed.py "baselines/td3.py --num-seeds 5" "td3_pave.py --env-id blind_env:Blind-17-6-v0"

A command is a Python script with its flags, from the repository's root or any other, that prints "step 500/...",
"global_step=500", a tqdm bar or CleanRL's "SPS:". Every process is held to the same --cores; rounds are interleaved and
the median counts. The clock runs between the first two such lines at or after --settle and --settle + --steps, so
neither start nor compilation is in it. The libraries have their own defaults but the same environment, networks
(256, 256), batch (256) and one update a step. Run it on a machine that does nothing else. Each process's rate is
appended to --output as a row.
"""

import csv
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
OURS = ["--learning-starts", "256", "--log-every", "50", "--eval-episodes", "1", "--eval-every", str(10**9)]
# In the peers' folder; LeanRL's --compile fails in today's tensordict, and its policy's actions want a .detach()
PEERS = {
    "CleanRL {}": "cleanrl/cleanrl/{}_continuous_action.py --env-id {env_id} --learning-starts 256 --no-cuda",
    "LeanRL {}": "leanrl/leanrl/{}_continuous_action_torchcompile.py --env-id {env_id} --learning-starts 256",
}


@dataclass
class Options:
    commands: tyro.conf.Positional[tuple[str, ...]] = ()
    """scripts with their flags; without any, TD3 and SAC of every library"""
    env_id: str = "Walker2d-v5"
    """of the libraries"""
    peers: Path | None = None
    """a folder with checkouts of cleanrl/ and leanrl/"""
    cores: int = 1
    """processors that each process may use"""
    rounds: int = 3
    """times each command runs"""
    settle: int = 600
    """vector steps before the clock runs"""
    steps: int = 400
    """vector steps that are timed"""
    timeout: float = 600.0
    """seconds after which a command that shows no such step has failed"""
    output: Path = Path("report/speed.csv")
    worker: str = ""
    """library:algorithm, what the benchmark itself starts"""


def libraries(options: Options) -> dict[str, str]:
    """The commands by default, with their names."""
    found = {}
    environment = f"--env-id {options.env_id}"
    for algorithm in ("td3", "sac"):
        found[f"smoothq {algorithm}"] = f"baselines/{algorithm}.py {environment}"
        for library in ("stable_baselines3", "sbx"):
            found[f"{library} {algorithm}"] = f"benchmark/speed.py --worker {library}:{algorithm} {environment}"
        if options.peers:
            for name, command in PEERS.items():
                script = command.format(algorithm, env_id=options.env_id)
                found[name.format(algorithm)] = f"{options.peers.resolve()}/{script}"
    return found


def train_peer(options: Options) -> None:
    """Trains with stable-baselines3 or sbx by the settings of our TD3 and SAC; prints a line every 50 steps."""
    import gymnasium as gym
    import numpy as np
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.noise import NormalActionNoise

    class Log(BaseCallback):
        def _on_step(self) -> bool:
            if self.n_calls % 50 == 0:
                print(f"step {self.n_calls}/", flush=True)
            return True

    library, algorithm = options.worker.split(":")
    env = gym.make(options.env_id)
    settings = {"learning_starts": 256, "batch_size": 256, "buffer_size": 1_000_000}
    settings |= {"train_freq": 1, "gradient_steps": 1, "learning_rate": 3e-4}
    if algorithm == "td3":
        (actions,) = env.action_space.shape
        settings["action_noise"] = NormalActionNoise(np.zeros(actions), np.full(actions, 0.1))
    model = getattr(__import__(library), algorithm.upper())
    model("MlpPolicy", env, policy_kwargs={"net_arch": [256, 256]}, **settings).learn(10**6, callback=Log())


# The step in a line: ours, stable-baselines3's and sbx's; CleanRL's; tqdm's, which is LeanRL's
STEP = re.compile(r"(?:\bstep |global_step=)(\d+)|(\d+)/\d+ \[")


def time_command(command: str, options: Options) -> float:
    """Vector steps a second of one process, times its --num-seeds; SystemExit with its last words if it fails."""
    script, *flags = shlex.split(command)
    path = Path(script) if Path(script).is_absolute() else ROOT / script
    if path.parent.name == "baselines" or path.stem.endswith(("_ams", "_pave")):
        flags = [*OURS, *flags]  # flags given come later and win
    seeds = 1
    if "--num-seeds" in flags:
        seeds = int(flags[flags.index("--num-seeds") + 1])
    folders = f"{ROOT}/benchmark{os.pathsep}{options.peers and options.peers.resolve()}/cleanrl"
    environment = {**os.environ, "PYTHONPATH": folders, "PYTHONUNBUFFERED": "1", "WANDB_MODE": "disabled"}
    environment |= {"OMP_NUM_THREADS": str(options.cores), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, str(path), *flags],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        os.sched_setaffinity(process.pid, sorted(os.sched_getaffinity(0))[: options.cores])
        killer = threading.Timer(options.timeout, process.kill)
        killer.start()
        first_step = None
        first_time = 0.0
        hundreds = 0
        line = ""
        for line in process.stdout:
            now = time.perf_counter()
            step = 0
            match = STEP.search(line)
            if match:
                step = int(match[1] or match[2])
            elif line.startswith("SPS:"):  # CleanRL, where gymnasium is newer than its own: a line every 100 steps
                hundreds += 1
                step = 100 * hundreds
            if first_step is None and step >= options.settle:
                first_step = step
                first_time = now
            elif first_step is not None and step >= first_step + options.steps:
                break
        else:  # its output ended
            process.wait()
            sys.exit(f"speed.py: {command} ended early: {line.strip()}")
        killer.cancel()
        process.kill()
        process.wait()
    return seeds * (step - first_step) / (now - first_time)


def main(options: Options) -> None:
    if options.worker:
        return train_peer(options)
    commands = {command: command for command in options.commands} or libraries(options)
    rates = {name: [] for name in commands}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with open(options.output, "a", newline="") as file:
        writer = csv.writer(file)
        if file.tell() == 0:
            writer.writerow(["command", "cores", "round", "vector_steps_per_second"])
        for turn in range(options.rounds):
            for name, command in commands.items():
                rates[name].append(time_command(command, options))
                writer.writerow([name, options.cores, turn, f"{rates[name][-1]:.2f}"])
                file.flush()
    reference = statistics.median(next(iter(rates.values())))
    print(
        f"{options.cores} core(s), vector steps a second times seeds: median (minimum to maximum), ratio to the first"
    )
    for name, values in rates.items():
        median = statistics.median(values)
        print(f"{median:9.1f} ({min(values):.1f} to {max(values):.1f})  {median / reference:6.2f} x  {name}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

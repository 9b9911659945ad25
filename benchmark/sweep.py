"""Runs a grid of script x environment x seeds: the papers' tables by name, or any grid, here or over a Ray cluster.

    python benchmark/sweep.py pave-table-2 --only Pendulum-v1 --scale 0.05 --seeds 2
    python benchmark/sweep.py ams-table-3 --seed-list 0 42 123 --address auto --gpus-per-run 0.25
    python benchmark/sweep.py --scripts td3_ams baselines/td3.py --env-ids dog-run --flags="--num-envs 8"

A complete run is skipped and a half-written one goes on, so the same command can be given again after Ctrl-C, a crash
or a power cut. With --address, --runs-dir must be on a disk that all machines of the cluster share, at the same path.
Ray retries what a dead worker or machine left, the script resumes it exactly.
"""

import os
import platform
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import tyro
from filelock import FileLock
from suites import INCIDENTAL, SEEDS, SUITES, Cell, cell_args, differences

from runs import Run, file_name, load_script, read_runs, script_path

LENGTHS = ("total_timesteps", "learning_starts", "eval_every")  # what --scale multiplies


@dataclass
class Options:
    suites: tyro.conf.Positional[tuple[str, ...]] = ()  # names of benchmark/suites.py: pave-table-1, ams-table-2, ...
    scripts: tuple[str, ...] = ()  # a grid of your own: these scripts (td3_ams, baselines/td3.py) ...
    env_ids: tuple[str, ...] = ()  # ... on each of these environments
    flags: str = ""  # added to every command, as one string: --flags="--num-envs 4 --no-cuda"
    seeds: int = 5  # how many
    first_seed: int = 1
    seed_list: tuple[int, ...] = ()  # these seeds instead
    seeds_per_run: int = 0  # most successive seeds side by side in one process; 0 is all of them
    scale: float = 1.0  # factor of every run's length: steps, warm-up, interval of evaluation
    only: tuple[str, ...] = ()  # keep only these environments and methods (Pendulum-v1 pave)
    runs_dir: Path = Path("runs")  # where the runs' folders are made
    dry_run: bool = False  # print the commands, start nothing
    address: str | None = None  # a Ray cluster's, or auto; without it one runs on this machine for as long as the sweep
    cpus_per_run: float = 1.0  # CPU cores that Ray sets aside for a run: its threads, and its processes of environments
    gpus_per_run: float | None = None  # share of a GPU for a run; by default 0.25 where there are GPUs
    retries: int = 10  # how often a run is resumed after its process, its worker or its machine died


def fail(message: object) -> NoReturn:
    """A user's mistake: one line, exit status 2."""
    print(f"sweep.py: {message}", file=sys.stderr)
    sys.exit(2)


# ---------------------------------------------------------------------------------------------------- what is to be run


def select_cells(options: Options) -> list[Cell]:
    """The cells that the options name."""
    unknown = set(options.suites) - SUITES.keys()
    if unknown:
        fail(f"no suite is called {', '.join(unknown)}; there are {', '.join(SUITES)}")
    if bool(options.scripts) != bool(options.env_ids) or not (options.suites or options.scripts):
        fail(f"name a suite ({', '.join(SUITES)}), or a grid with --scripts and --env-ids")
    cells = [cell for suite in options.suites for cell in SUITES[suite]]
    cells += [Cell(Path(script).stem, script, env_id) for script in options.scripts for env_id in options.env_ids]
    env_ids = {cell.env_id for cell in cells}
    methods = {cell.method for cell in cells}
    only = set(options.only)
    unknown = only - env_ids - methods
    if unknown:
        fail(f"--only {' '.join(unknown)}: there are {', '.join(sorted(env_ids))}; {', '.join(sorted(methods))}")
    env_ids = env_ids & only or env_ids
    methods = methods & only or methods
    return [cell for cell in cells if cell.env_id in env_ids and cell.method in methods]


class Task(NamedTuple):
    """One process to run: a script with flags."""

    name: str
    script: Path
    flags: list[str]
    args: dict[str, Any]  # what the run's args.json will hold
    defaults: dict[str, Any]  # of the script
    runs_dir: Path  # absolute: a worker may be elsewhere

    @property
    def log(self) -> Path:
        return self.runs_dir / ".sweep" / f"{self.name}.log"

    @property
    def script_lock(self) -> Path:
        """Held while its script runs."""
        return self.log.with_suffix(".script.lock")

    def find_run(self) -> Run | None:
        """The complete run of this task, else the newest that can be resumed."""
        unfinished = None
        for run in read_runs(self.runs_dir):
            if not differences(run, self.args, self.defaults):
                if run.is_complete:
                    return run
                if (run.folder / "checkpoint.pt").exists():
                    unfinished = run
        return unfinished

    def command(self, run: Run | None) -> list[str]:
        resume = ["--resume", str(run.folder)] if run else []
        return [str(self.script), *resume, *self.flags]  # this machine's --no-cuda or --save-every wins


def as_flags(args: Any, default: Any) -> list[str]:
    """The flags that turn the script's default Args into args."""
    flags = []
    for name, value in vars(args).items():
        flag = name.replace("_", "-")
        if value == getattr(default, name):
            continue
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", str(value)]
    return flags


def block_args(cell: Cell, options: Options) -> Any:
    """The script's Args for a cell, but for its seeds."""
    args = cell_args(cell)
    default = cell_args(cell._replace(flags={}))
    words = [script_path(cell.script).stem]
    for name, value in cell.flags.items():
        if value != getattr(default, name) and name not in ("num_envs", "total_timesteps"):
            words.append(f"{name}_{value}")
    lengths = {}
    for name in LENGTHS:
        if hasattr(args, name):  # PPO has no learning_starts
            lengths[name] = max(1, round(getattr(args, name) * options.scale))
    exp_name = "_".join(words)  # no two cells may share a folder's name
    args = replace(args, exp_name=exp_name, runs_dir=str(options.runs_dir.resolve()), **lengths)
    return tyro.cli(load_script(cell.script).Args, args=shlex.split(options.flags), default=args)


def blocks(seeds: list[int], most: int) -> list[range]:
    """Successive seeds, which one process can train side by side; most: 0 for no limit."""
    found = []
    for seed in seeds:
        if found and seed == found[-1].stop and len(found[-1]) != most:
            found[-1] = range(found[-1].start, seed + 1)
        else:
            found.append(range(seed, seed + 1))
    return found


def plan(cells: list[Cell], options: Options, runs: list[Run]) -> tuple[list[Task], int]:
    """The tasks still to do, and the number of cells that are complete already."""
    tasks = {}
    complete = 0
    for cell in cells:
        path = script_path(cell.script)
        args = block_args(cell, options)
        defaults = asdict(load_script(cell.script).Args())
        wanted = {"script": path.stem, **asdict(args)}
        done = set()
        for run in runs:
            if run.is_complete and not differences(run, wanted, defaults, SEEDS):
                done |= set(run.seeds)
        seeds = options.seed_list or range(options.first_seed, options.first_seed + options.seeds)
        missing = [seed for seed in seeds if seed not in done]
        if not missing:
            complete += 1
        for block in blocks(missing, options.seeds_per_run):
            task_args = replace(args, seed=block.start, num_seeds=len(block))
            flags = ["--env-id", cell.env_id, *as_flags(task_args, cell_args(cell._replace(flags={})))]
            wanted = {"script": path.stem, **asdict(task_args)}
            learned = [(key, value) for key, value in wanted.items() if key not in INCIDENTAL]  # as find_run sees it
            digest = zlib.crc32(repr(learned).encode())
            name = file_name(f"{cell.env_id}__{path.stem}__{block.start}-{block.stop - 1}__{digest:08x}")
            tasks[name] = Task(name, path, flags, wanted, defaults, options.runs_dir.resolve())
    return list(tasks.values()), complete


# ---------------------------------------------------------------------------------------------------------- one process

# Runs a script under a lock, and asks it to save and stop when stdin ends: the worker closed it or died, even killed.
# (PR_SET_PDEATHSIG signals for every thread of a dying worker, and a script's second SIGTERM ends it unsaved.)
# A signal to all processes of a job reaches the script too: the guard waits for it. SIG_IGN would be inherited.
GUARD = """
import os, signal, subprocess, sys, threading
from filelock import FileLock

for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
    if hasattr(signal, name):
        signal.signal(getattr(signal, name), lambda *_: None)

def stop_with_worker():
    os.read(0, 1)
    script.terminate()

with FileLock(sys.argv[1]):
    script = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL)
    threading.Thread(target=stop_with_worker, daemon=True).start()
    sys.exit(script.wait())
"""


def work(task: Task, num_threads: int) -> None:
    """Brings a task to its end, from wherever an earlier try left it. Runs on a Ray worker.

    Raises ValueError for a mistake in the arguments (no use in a retry), RuntimeError for a fault, and what ray.cancel
    raises once the script has saved. Nothing is trained twice: one worker at a time has a task, and it waits until the
    script of a worker that was killed has saved and ended.
    """
    task.log.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(task.log.with_suffix(".lock")), open(task.log, "a") as log:
        with FileLock(task.script_lock):
            run = task.find_run()
        if run and run.is_complete:
            return
        command = [sys.executable, *task.command(run)]
        print(f"# {platform.node()}, {time.strftime('%F %T')}\n$ {shlex.join(command)}", file=log, flush=True)
        script = subprocess.Popen(
            [sys.executable, "-c", GUARD, str(task.script_lock), *command],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": str(num_threads), "PYTHON_CPU_COUNT": str(num_threads)},
            start_new_session=True,  # Ctrl-C is the sweep's, which stops its scripts
        )
        try:
            while script.poll() is None:
                time.sleep(0.2)  # ray.cancel interrupts no system call
        finally:
            script.stdin.close()
            script.wait()
        run = task.find_run()
        if script.returncode == 0 and run and run.is_complete:
            return
    lines = [line for line in task.log.read_text().splitlines() if re.search(r"\w", line)]  # but for tyro's frame
    error = ValueError if script.returncode == 2 else RuntimeError
    raise error(f"exit status {script.returncode}: {lines[-1].strip('│ ')}")


# ---------------------------------------------------------------------------------------------------------- all of them

STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]


def start_ray(options: Options) -> float:
    """Connects to the cluster, or starts one here; returns the GPU share of a run."""
    survive = {"RAY_kill_child_processes_on_worker_exit": "0"}  # scripts, which then save
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", **survive}
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"  # or Ray copies this folder, runs/ and all, to every worker
    print("starting Ray, which takes some 20 seconds", flush=True)
    import ray

    if "://" in (options.address or ""):
        fail(f"--address {options.address}: Ray Client's; give the cluster's own, HOST:6379")
    if ":" in (options.address or ""):
        host, _, port = options.address.rpartition(":")
        try:  # Ray itself tries for a quarter of an hour
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, ValueError) as error:
            fail(f"--address {options.address}: no Ray cluster answers there ({error})")
    attempts = 1 if options.address else 5  # Ray gives itself 15 s: too few on a busy machine
    for attempt in range(1, attempts + 1):
        try:
            ray.init(
                address=options.address or "local",
                num_cpus=None if options.address else load_script("td3").count_cores(),  # a SLURM job's, not the node's
                runtime_env={"env_vars": survive} if options.address else None,
                log_to_driver=False,
                logging_level="ERROR",
                include_dashboard=False,
            )
            break
        except Exception as error:  # Ray raises half a dozen types, plain Exception among them
            ray.shutdown()
            if attempt == attempts:
                sys.exit(f"sweep.py: Ray: {str(error).splitlines()[0]}")
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = options.gpus_per_run
    if gpus is None:
        gpus = 0.25 if any("GPU" in node for node in nodes) else 0.0
    if not any(node.get("CPU", 0) >= options.cpus_per_run and node.get("GPU", 0) >= gpus for node in nodes):
        fail(f"no machine of the cluster has {options.cpus_per_run:g} CPU cores and {gpus:g} of a GPU for a run")
    return gpus


def progress(log: str) -> list[str]:
    """Step, of how many, steps a second, return and time left, from the lines of a script's log.

    step 500/1000 SPS 12.3 return -3.2 left 00:10, and step 500/1000 eval/return 1.2 eval/smoothness 0.1 ...
    """
    lines = re.findall(r"^step (\d+)/(\d+) (.*)$", log, re.M)
    if not lines:
        return ["0", "?", "", "", ""]
    latest = {}
    for _, _, text in lines:
        words = text.split()
        latest |= zip(words[::2], words[1::2])
    step, total, _ = lines[-1]
    returned = latest.get("eval/return", latest.get("return", ""))
    return [step, total, latest.get("SPS", ""), returned, latest.get("left", "")]


def progress_table(tasks: list[Task], started: float, summary: str) -> Any:
    """The tasks whose log has grown since the sweep began."""
    from rich.table import Table

    table = Table("run", "step", "of", "steps/s", "return", "left", title=summary, title_justify="left")
    for task in tasks:
        if task.log.exists() and task.log.stat().st_mtime >= started:
            table.add_row(task.name, *progress(task.log.read_text(errors="replace")))
    return table


def run_all(tasks: list[Task], options: Options, gpus: float) -> dict[str, str]:
    """Runs the tasks to their end behind a live table; returns {name: what went wrong}. Ctrl-C saves and stops all."""
    import ray
    from rich.console import Console
    from rich.live import Live

    console = Console()
    started = time.time()
    done = 0
    failed = {}
    retry = {"max_retries": options.retries, "retry_exceptions": [RuntimeError]}
    remote = ray.remote(num_cpus=options.cpus_per_run, num_gpus=gpus, **retry)(work)
    num_threads = max(1, int(options.cpus_per_run))
    pending = {remote.options(name=task.name).remote(task, num_threads): task for task in tasks}
    try:
        with Live(console=console, refresh_per_second=1, transient=True) as live:
            while pending:
                for reference in ray.wait(list(pending), timeout=2.0)[0]:
                    task = pending.pop(reference)
                    try:
                        ray.get(reference)
                        done += 1
                        console.print(f"finished {task.name}", soft_wrap=True)
                    except ray.exceptions.RayError as error:
                        failed[task.name] = str(getattr(error, "cause", error)).splitlines()[-1]
                summary = f"{done} finished, {len(failed)} failed, {len(pending)} running or waiting"
                live.update(progress_table(list(pending.values()), started, summary))
    except KeyboardInterrupt:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        print("stopping: the runs save what they have", flush=True)
        for reference in pending:
            ray.cancel(reference)
        ray.wait(list(pending), num_returns=len(pending))
        for task in pending.values():  # where the signal ended Ray's worker too, its script may be saving still
            if task.log.exists():
                FileLock(task.script_lock).acquire()
        print(f"stopped: {done} finished, {len(pending)} to go; the same command goes on", flush=True)
    else:
        print(f"{done} finished, {len(failed)} failed")
    return failed


def main(options: Options) -> None:
    if options.scale <= 0 or options.seeds < 1 or options.seeds_per_run < 0 or options.cpus_per_run <= 0:
        fail("--scale, --seeds and --cpus-per-run must be above 0, --seeds-per-run at least 0")
    try:
        tasks, complete = plan(select_cells(options), options, read_runs(options.runs_dir))
    except FileNotFoundError as error:  # a script's name
        fail(error)
    if complete:
        print(f"# {complete} complete already", flush=True)
    if options.dry_run:
        for task in tasks:
            print(shlex.join(["python", *task.command(task.find_run())]))
    elif tasks:
        gpus = start_ray(options)
        for number in STOP_SIGNALS:
            signal.signal(number, signal.default_int_handler)
        failed = run_all(tasks, options, gpus)
        if failed:
            sys.exit("\n".join(f"failed: {name}: {why}" for name, why in failed.items()))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

"""Runs a grid of script x environment x seeds: the papers' tables by name, or any grid, here or over a Ray cluster.

    python benchmark/sweep.py pave-table-2 --only Pendulum-v1 --scale 0.05 --seeds 2
    python benchmark/sweep.py ams-table-3 --seed-list 0 42 123 --address auto --gpus-per-run 0.25
    python benchmark/sweep.py --scripts td3_ams baselines/td3.py --env-ids dog-run --flags="--num-envs 8"

Run it where runs/ is to be. A complete run is skipped and a half-written one goes on, so the same command can be given again
after Ctrl-C, a crash or a power cut. With --address that folder must be on a disk that all machines of the cluster share, at
the same path. Ray retries what a dead worker or machine left, the script resumes it exactly.
"""

import fcntl
import os
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
from suites import SEEDS, SUITES, Cell, Run, cell_args, differences, load_script, read_runs, script_path

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
    dry_run: bool = False  # print the commands, start nothing
    address: str | None = None  # a Ray cluster's, or auto; without it one runs on this machine for as long as the sweep
    cpus_per_run: float = 1.0  # CPU cores that Ray sets aside for a run, and its threads
    gpus_per_run: float | None = None  # share of a GPU for a run; by default 0.25 where there are GPUs
    retries: int = 10  # how often a run is resumed after its process, its worker or its machine died


def fail(message: object) -> NoReturn:
    """A user's mistake: one line, exit status 2."""
    print(f"sweep.py: {message}", file=sys.stderr)
    sys.exit(2)


def select_cells(options: Options) -> list[Cell]:
    """The cells that the options name."""
    if unknown := set(options.suites) - SUITES.keys():
        fail(f"no suite is called {', '.join(unknown)}; there are {', '.join(SUITES)}")
    if bool(options.scripts) != bool(options.env_ids) or not (options.suites or options.scripts):
        fail(f"name a suite ({', '.join(SUITES)}), or a grid with --scripts and --env-ids")
    cells = [cell for suite in options.suites for cell in SUITES[suite]]
    cells += [Cell(Path(script).stem, script, env_id) for script in options.scripts for env_id in options.env_ids]
    env_ids, methods = {cell.env_id for cell in cells}, {cell.method for cell in cells}
    if unknown := set(options.only) - env_ids - methods:
        fail(f"--only {' '.join(unknown)}: there are {', '.join(sorted(env_ids))}; {', '.join(sorted(methods))}")
    env_ids, methods = (names & set(options.only) or names for names in (env_ids, methods))
    return [cell for cell in cells if cell.env_id in env_ids and cell.method in methods]


class Task(NamedTuple):
    """One process to run: a script with flags, and the folder to run it in."""

    name: str
    script: Path
    directory: Path
    flags: list[str]
    args: dict[str, Any]  # what the run's args.json will hold
    defaults: dict[str, Any]  # of the script

    @property
    def log(self) -> Path:
        return self.directory / "runs" / ".sweep" / f"{self.name}.log"

    def find_run(self) -> Run | None:
        """The complete run of this task, else the newest that can be resumed."""
        runs = [run for run in read_runs(self.directory / "runs") if not differences(run, self.args, self.defaults)]
        usable = [run for run in runs if run.is_complete or (run.folder / "checkpoint.pt").exists()]
        return sorted(usable, key=lambda run: run.is_complete)[-1] if usable else None

    def command(self, run: Run | None) -> list[str]:
        return [str(self.script), *(["--resume", str(run.folder.relative_to(self.directory))] if run else self.flags)]


def as_flags(args: Any, default: Any) -> list[str]:
    """The flags that turn the script's default Args into args."""
    flags = []
    for name, value in vars(args).items():
        flag = name.replace("_", "-")
        if value != getattr(default, name):
            flags += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return flags


def plan(cells: list[Cell], options: Options, runs: list[Run]) -> tuple[list[Task], int]:
    """The tasks still to do, and the number of cells that are complete already."""
    tasks, complete = {}, 0
    for cell in cells:
        script, path = load_script(cell.script), script_path(cell.script)
        args, default = cell_args(cell), cell_args(cell._replace(flags={}))
        variant = [f"{name}_{value}" for name, value in cell.flags.items() if value != getattr(default, name)]
        variant = [text for text in variant if not text.startswith(("num_envs", "total_timesteps"))]
        lengths = {name: max(1, round(getattr(args, name) * options.scale)) for name in LENGTHS if hasattr(args, name)}
        args = replace(args, exp_name="_".join([path.stem, *variant]), **lengths)  # no two cells may share a folder's name
        args = tyro.cli(script.Args, args=shlex.split(options.flags), default=args)
        wanted, defaults = {"script": path.stem, **asdict(args)}, asdict(script.Args())
        done = {seed for run in runs if run.is_complete and not differences(run, wanted, defaults, SEEDS) for seed in run.seeds}
        seeds = options.seed_list or range(options.first_seed, options.first_seed + options.seeds)
        missing = [seed for seed in seeds if seed not in done]
        complete += not missing
        while missing:
            size = next((n for n in range(1, len(missing)) if missing[n] != missing[0] + n), len(missing))
            size = min(size, options.seeds_per_run or size)
            block = replace(args, seed=missing[0], num_seeds=size)
            missing = missing[size:]
            wanted = {"script": path.stem, **asdict(block)}
            name = f"{cell.env_id}__{block.exp_name}__{block.seed}-{block.seed + size - 1}"
            name = re.sub(r"[^\w.-]", "_", f"{name}__{zlib.crc32(repr(wanted).encode()):08x}")
            tasks[name] = Task(name, path, Path.cwd(), ["--env-id", cell.env_id, *as_flags(block, default)], wanted, defaults)
    return list(tasks.values()), complete


# Runs a script, and asks it once to save and stop when stdin ends: the worker closed it or died, even killed. (PR_SET_PDEATHSIG
# signals for every thread of a dying worker, and a script's second SIGTERM ends it unsaved.)
GUARD = 'exec 3<&0; "$@" & script=$!; { cat <&3; kill $script 2>/dev/null; } & wait $script'


def work(task: Task, num_threads: int) -> None:
    """Brings a task to its end, from wherever an earlier try left it. Runs on a Ray worker.

    Raises ValueError for a mistake in the arguments (no use in a retry), RuntimeError for a fault, and what ray.cancel raises
    once the script has saved. The script inherits the locked file, so whoever comes next waits until it has ended: nothing is
    trained twice.
    """
    task.log.parent.mkdir(parents=True, exist_ok=True)
    with open(task.log.with_suffix(".lock"), "w") as lock, open(task.log, "a") as log:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.2)  # ray.cancel interrupts no system call
        run = task.find_run()
        if run and run.is_complete:
            return
        command = [sys.executable, *task.command(run)]
        print(f"# {os.uname().nodename}, {time.strftime('%F %T')}\n$ {shlex.join(command)}", file=log, flush=True)
        streams = {"stdin": subprocess.PIPE, "stdout": log, "stderr": log, "pass_fds": [lock.fileno()]}
        environment = {**os.environ, "OMP_NUM_THREADS": str(num_threads)}
        command = ["sh", "-c", GUARD, "sh", *command]
        script = subprocess.Popen(command, cwd=task.directory, env=environment, start_new_session=True, **streams)
        try:
            while script.poll() is None:
                time.sleep(0.2)
        finally:
            script.stdin.close()
            script.wait()
        run = task.find_run()
        if script.returncode == 0 and run and run.is_complete:
            return
    last_line = [line for line in task.log.read_text().splitlines() if re.search(r"\w", line)][-1]  # but for tyro's frame
    raise (ValueError if script.returncode == 2 else RuntimeError)(f"exit status {script.returncode}: {last_line.strip('│ ')}")


def start_ray(options: Options) -> float:
    """Connects to the cluster, or starts one here; returns the GPU share of a run."""
    survive = {"RAY_kill_child_processes_on_worker_exit": "0"}  # scripts, which then save
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", **survive}
    os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"  # or Ray copies this folder, runs/ and all, to every worker
    import ray

    if ":" in (options.address or ""):
        host, _, port = options.address.rpartition(":")
        try:  # Ray itself tries for a quarter of an hour
            socket.create_connection((host, int(port)), timeout=10).close()
        except (OSError, ValueError) as error:
            fail(f"--address {options.address}: no Ray cluster answers there ({error})")
    environment = {"env_vars": survive} if options.address else None
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": False}
    for attempts_left in range(0 if options.address else 4, -1, -1):  # Ray gives itself 15 s: too few on a busy machine
        try:
            ray.init(address=options.address or "local", runtime_env=environment, **quiet)
            break
        except Exception as error:  # Ray raises half a dozen types, plain Exception among them
            ray.shutdown()
            if not attempts_left:
                sys.exit(f"sweep.py: Ray: {str(error).splitlines()[0]}")
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = options.gpus_per_run
    if gpus is None:
        gpus = 0.25 if any("GPU" in node for node in nodes) else 0.0
    if not any(node.get("CPU", 0) >= options.cpus_per_run and node.get("GPU", 0) >= gpus for node in nodes):
        fail(f"no machine of the cluster has {options.cpus_per_run:g} CPU cores and {gpus:g} of a GPU for a run")
    return gpus


def progress_table(tasks: list[Task], started: float, summary: str) -> Any:
    """The tasks whose log has grown since the sweep began, by its last line."""
    from rich.table import Table

    table = Table("run", "step", "of", "steps/s", "return", "hours left", title=summary, title_justify="left")
    for task in tasks:
        if not task.log.exists() or task.log.stat().st_mtime < started:
            continue
        lines = re.findall(r"^step (\d+)/(\d+)(.*)$", task.log.read_text(errors="replace"), re.M)
        step, total, shown = lines[-1] if lines else ("0", "?", "")
        values = dict(zip(shown.split()[::2], shown.split()[1::2]))
        rate = float(values.get("charts/SPS", "nan"))
        left = f"{(int(total) - int(step)) / rate / 3600:.1f}" if rate > 0 else "?"
        table.add_row(task.name, step, total, f"{rate:.4g}", values.get("eval/return", ""), left)
    return table


def run_all(tasks: list[Task], options: Options, gpus: float) -> dict[str, str]:
    """Runs the tasks to their end behind a live table; returns {name: what went wrong}. Ctrl-C saves and stops them all."""
    import ray
    from rich.console import Console
    from rich.live import Live

    console, started, done, failed = Console(), time.time(), 0, {}
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
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        print("stopping: the runs save what they have", flush=True)
        for reference in pending:
            ray.cancel(reference)
        ray.wait(list(pending), num_returns=len(pending))
        print(f"stopped: {done} finished, {len(pending)} to go; the same command goes on", flush=True)
    else:
        print(f"{done} finished, {len(failed)} failed")
    return failed


def main(options: Options) -> None:
    if options.scale <= 0 or options.seeds < 1 or options.seeds_per_run < 0 or options.cpus_per_run <= 0:
        fail("--scale, --seeds and --cpus-per-run must be above 0, --seeds-per-run at least 0")
    try:
        tasks, complete = plan(select_cells(options), options, read_runs(Path("runs")))
    except FileNotFoundError as error:  # a script's name
        fail(error)
    if complete:
        print(f"# {complete} complete already", flush=True)
    if options.dry_run:
        for task in tasks:
            print(shlex.join(["python", *task.command(task.find_run())]))
    elif tasks:
        gpus = start_ray(options)
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        if failed := run_all(tasks, options, gpus):
            sys.exit("\n".join(f"failed: {name}: {why}" for name, why in failed.items()))


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

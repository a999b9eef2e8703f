"""The two engines of `run_grid`: worker processes of this machine that share the store, and a Ray cluster.

What they do to a run comes from above, as a function: one that trains and stores a run which the process has locked for
`run_in_processes`, `gcalib.run` for `run_on_ray`.
"""

from __future__ import annotations

import functools
import logging
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import Timeout
from tqdm import tqdm

from gcalib.config import RunConfig
from gcalib.store import RunStore

log = logging.getLogger("gcalib")
Train = Callable[[RunConfig, str, RunStore, str], None]
Run = Callable[..., dict[str, Any]]
DIED = "its process died"  # once: memory may have been short by chance
DIED_TWICE = "its process died twice; exit code -9 is often the system's answer to too little memory"


def run_in_processes(
    train_and_store: Train, todo: dict[str, RunConfig], runs: RunStore, workers: int, device: str
) -> dict[str, str]:
    """Do runs in this process, or in several; returns what failed, with the reason.

    Every worker goes through the same list. One that dies is replaced, and its run is tried once more. They are in
    sessions of their own, where a terminal's Ctrl-C does not reach them; they end when this process does.
    """
    with tempfile.TemporaryDirectory(prefix="gcalib-") as folder:
        notes = Path(folder)
        work = (train_and_store, todo, runs, device, notes)
        if workers == 1:
            _work(*work)
        else:
            (notes / "work").write_bytes(pickle.dumps(work))
            _supervise(notes / "work", todo, runs, workers)
        failed = {name: notes / name for name in sorted(todo.keys() - runs.names())}
        return {name: note.read_text() if note.exists() else "no worker lived" for name, note in failed.items()}


def _work(train_and_store: Train, todo: dict[str, RunConfig], runs: RunStore, device: str, notes: Path) -> None:
    """Do what no other process does, then wait for that; `notes` hold what to say of a run if nothing more happens."""
    waiting = list(todo)
    while waiting:
        busy = []
        for name in waiting:
            note = notes / name
            try:
                with runs.lock(name, wait=False):
                    said = note.read_text() if note.exists() else ""
                    if said in ("", DIED) and name not in runs.names():
                        note.write_text(DIED_TWICE if said else DIED)
                        train_and_store(todo[name], name, runs, device)
            except Timeout:
                busy.append(name)
            except Exception as error:  # noqa: BLE001 - a grid goes on whatever happened to one of its runs
                note.write_text(f"{type(error).__name__}: {error}")
                log.error("%s failed: %s", todo[name].model_dump(exclude_defaults=True), error)
        waiting = busy
        time.sleep(0.2 * bool(busy))


def _supervise(work: Path, todo: dict[str, RunConfig], runs: RunStore, workers: int) -> None:
    """Keep workers alive until all is done, and show from the store how far they are."""
    command = [sys.executable, "-c", "import sys; from gcalib import cluster; cluster.worker(sys.argv[1])", str(work)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // workers))}
    start = functools.partial(subprocess.Popen, command, stdin=subprocess.PIPE, env=environment, start_new_session=True)
    alive: list[subprocess.Popen[Any]] = []
    deaths = 0
    try:
        with tqdm(total=len(todo), unit="run", disable=not log.isEnabledFor(logging.INFO)) as bar:
            alive += [start() for _ in range(workers)]
            while alive:
                time.sleep(0.2)
                if more := len(todo.keys() & runs.names()) - bar.n:
                    bar.update(more)
                for process in [process for process in alive if process.poll() is not None]:
                    alive.remove(process)
                    if process.returncode and deaths < 2 * len(todo):
                        deaths += 1
                        log.warning("A worker died (exit code %s); another takes its place.", process.returncode)
                        alive.append(start())
    finally:
        for process in alive:
            process.kill()  # the store survives it, and a checkpoint is at most some epochs old
            process.wait()


def worker(work: str) -> None:
    """What a worker's process does, until its parent ends: however that comes, the pipe between them closes."""
    threading.Thread(target=lambda: os._exit(len(os.read(0, 1))), daemon=True).start()
    _work(*pickle.loads(Path(work).read_bytes()))


def run_on_ray(
    run: Run, configs: list[RunConfig], runs: RunStore, device: str, cpus: float, gpus: float
) -> Iterator[tuple[RunConfig, str, str]]:
    """Run configs on a Ray cluster: config, run id and, if it failed, the reason, as they end.

    The cluster is the one that `RAY_ADDRESS` names, `host:port` or `auto`, else this process's own of one machine. All
    nodes must see the store under the same path.

    Parameters
    ----------
    cpus, gpus
        What one run needs; fractions of a GPU let several runs share it. Some node of the cluster must have it.

    Raises
    ------
    ValueError
        If Ray is not installed, if nothing answers at the address, or if no node has what a run needs.
    """
    try:
        import ray
    except ImportError:
        raise ValueError("engine='ray' needs Ray: pip install -e '.[cluster]' in a clone.") from None
    address = os.environ.get("RAY_ADDRESS", "")
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    try:
        if colon:  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ValueError(f"No Ray cluster answers at {address} ({error}).") from None
    environment = {"env_vars": {name: os.environ[name] for name in ("GCALIB_DATA",) if name in os.environ}}
    ray.init(log_to_driver=False, runtime_env=environment, ignore_reinit_error=True)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
        raise ValueError(f"A run asks for cpus={cpus:g} and gpus={gpus:g}, and no node has both.")  # Ray would wait
    task = ray.remote(num_cpus=cpus, num_gpus=gpus)(_run_there)
    store = str(runs.folder.absolute())
    waiting: dict[Any, RunConfig] = {task.remote(run, config, store, device, cpus): config for config in configs}
    try:
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            config = waiting.pop(done)
            try:
                yield config, ray.get(done), ""
            except Exception as error:  # noqa: BLE001 - a grid goes on whatever happened to one of its runs
                cause = getattr(error, "cause", None) or error
                yield config, "", f"{type(cause).__name__}: {cause}"
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)


def _run_there(run: Run, config: RunConfig, store: str, device: str, cpus: float) -> str:
    """On a node: the id of the run, whose record is in the store."""
    torch.set_num_threads(max(1, int(cpus)))
    return str(run(config, store, device=device)["run_id"])

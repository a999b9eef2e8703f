"""Many runs at once: in processes of this machine that share the store, or on a Ray cluster.

What a run is comes from above, as a function: `complete(config, name, runs, device)` trains and stores a run that its
process has locked, and `run(config, store)` fetches it first.
"""

from __future__ import annotations

import json
import logging
import os
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
from tqdm import tqdm

from gcalib.config import RunConfig
from gcalib.store import BusyError, RunStore, read_run

log = logging.getLogger("gcalib")
Complete = Callable[[RunConfig, str, RunStore, str], None]
DIED = "its process died"  # once: memory may have been short by chance
DIED_TWICE = "its process died twice; exit code -9 is often the system's answer to too little memory"
RETRIES = 3  # of a run whose node dies
ANSWERS_WITHIN = 10  # seconds, of a cluster that is there


def share(complete: Complete, todo: dict[str, RunConfig], runs: RunStore, workers: int, device: str) -> dict[str, str]:
    """Do runs in this process, or in several; returns what failed, with the reason.

    Every worker goes through the same list. One that dies is replaced, and its run is tried once more. They are in
    sessions of their own, where a terminal's Ctrl-C does not reach them; they end when this process does.
    """
    with tempfile.TemporaryDirectory(prefix="gcalib-") as notes:
        if workers == 1:
            _work(complete, todo, runs, device, Path(notes))
        else:
            threads = max(1, torch.get_num_threads() // workers)
            configs = {name: config.model_dump() for name, config in todo.items()}
            (Path(notes) / "work.json").write_text(json.dumps([configs, str(runs.folder.absolute()), device, threads]))
            code = f"from gcalib import cluster; from {complete.__module__} import {complete.__name__} as complete\n"
            command = [sys.executable, "-c", f"{code}cluster.worker(complete, {notes!r})"]
            _supervise(command, todo, runs, workers, {**os.environ, "OMP_NUM_THREADS": str(threads)})
        said = {path.name: path.read_text() for path in Path(notes).iterdir()}
    stored = set(runs.names())
    return {name: said.get(name, "no worker lived to begin it") for name in todo if name not in stored}


def _work(complete: Complete, todo: dict[str, RunConfig], runs: RunStore, device: str, notes: Path) -> None:
    """Do what is not stored and what no other process is doing; at the end, wait for what others do.

    `notes` is a folder that the workers of a grid share. It holds what is to be said of a run if nothing more happens.
    """
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
                        complete(todo[name], name, runs, device)
            except BusyError:
                busy.append(name)
            except Exception as error:  # noqa: BLE001 - a grid goes on whatever happened to one of its runs
                note.write_text(f"{type(error).__name__}: {error}")
                log.error("%s failed: %s", todo[name].model_dump(exclude_defaults=True), error)
        waiting = busy
        time.sleep(0.2 * bool(busy))


def _supervise(
    command: list[str], todo: dict[str, RunConfig], runs: RunStore, workers: int, environment: dict[str, str]
) -> None:
    """Keep workers alive until all is done, and show from the store how far they are."""

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, start_new_session=True)

    alive: list[subprocess.Popen[bytes]] = []
    deaths = 0
    try:
        with tqdm(total=len(todo), unit="run", disable=None) as bar:
            alive += [start() for _ in range(workers)]
            while alive:
                time.sleep(0.2)
                if more := len(set(runs.names()) & set(todo)) - bar.n:
                    bar.update(more)
                    log.info("%d of %d runs", bar.n, len(todo))
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


def worker(complete: Complete, notes: str) -> None:
    """What a worker's process does."""

    def end_with_parent() -> None:
        os.read(0, 1)  # the other end of the pipe closes when the parent ends, however it does
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    configs, store, device, threads = json.loads((Path(notes) / "work.json").read_text())
    torch.set_num_threads(threads)
    _work(complete, {n: RunConfig(**fields) for n, fields in configs.items()}, RunStore(store), device, Path(notes))


def outcomes(
    run: Callable[..., dict[str, Any]],
    configs: list[RunConfig],
    runs: RunStore,
    *,
    device: str = "auto",
    cpus: float = 1,
    gpus: float = 0,
    gather: bool = False,
    address: str | None = None,
) -> Iterator[tuple[RunConfig, str, str]]:
    """Run configs on a Ray cluster: config, run id and, if it failed, the reason, as they end.

    Parameters
    ----------
    cpus, gpus
        What one run needs; fractions of a GPU let several runs share it. Some node of the cluster must have it.
    gather
        For nodes that do not see the store: each runs in a folder of its own and sends records and curves here. A run
        whose node dies then starts anew; on a shared store it resumes from its checkpoint.
    address
        Of the cluster: `auto` or `host:port` on one of its machines, `ray://host:port` from any other (with `gather`).
        By default the environment variable `RAY_ADDRESS`, else this process's own cluster of one machine.

    Raises
    ------
    ValueError
        If Ray is not installed, if nothing answers at the address, or if no node has what a run needs.
    """
    try:
        import ray
    except ImportError:
        raise ValueError("engine='ray' needs Ray: pip install -e '.[cluster]' in a clone.") from None
    threads = max(1, int(cpus))
    if not ray.is_initialized():
        address = address or os.environ.get("RAY_ADDRESS")
        _knock(address)
        passed = {name: os.environ[name] for name in ("GCALIB_DATA",) if name in os.environ}
        environment = {"env_vars": {**passed, "OMP_NUM_THREADS": str(threads)}}
        ray.init(address=address, log_to_driver=False, runtime_env=environment)
    nodes = [(has.get("CPU", 0), has.get("GPU", 0)) for has in (n["Resources"] for n in ray.nodes() if n["Alive"])]
    if not any(cores >= cpus and cards >= gpus for cores, cards in nodes):  # Ray would wait for such a node for ever
        found = ", ".join(f"{cores:g} and {cards:g}" for cores, cards in sorted(set(nodes)))
        raise ValueError(f"A run asks for cpus={cpus:g} and gpus={gpus:g}, and no node has both: they have {found}.")
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES)(_run_there)
    store = None if gather else str(runs.folder.absolute())
    waiting: dict[Any, RunConfig] = {task.remote(run, config, store, device, threads): config for config in configs}
    try:
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            config = waiting.pop(done)
            try:
                record, curves = ray.get(done)
                if gather:
                    with runs.lock(record["run_id"]):
                        if record["run_id"] not in runs.names():
                            runs.put(record, curves)
                yield config, record["run_id"], ""
            except Exception as error:  # noqa: BLE001 - a grid goes on whatever happened to one of its runs
                cause = getattr(error, "cause", None) or error
                yield config, "", f"{type(cause).__name__}: {cause}"
    finally:
        for reference in waiting:
            ray.cancel(reference, force=True)


def _knock(address: str | None) -> None:
    """Raise ValueError if nothing answers at `host:port`: Ray itself would try for minutes."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWERS_WITHIN).close()
        except OSError as error:
            raise ValueError(f"No Ray cluster answers at {address} ({error}).") from None


def _run_there(
    run: Callable[..., dict[str, Any]], config: RunConfig, store: str | None, device: str, threads: int
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """On a node: the record, and its curves if the node's store is its own."""
    torch.set_num_threads(threads)
    if store is not None:
        return run(config, store, device=device), []
    with tempfile.TemporaryDirectory(prefix="gcalib-") as own:
        return read_run(RunStore(own).run_path(run(config, own, device=device)["run_id"]))

"""Runs on a Ray cluster; imported only when asked for, since Ray is the extra `cluster`."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

from gcalib.config import RunConfig
from gcalib.experiments import run
from gcalib.store import RunStore

RETRIES = 3  # of a run whose node or process dies
ANSWERS_WITHIN = 10  # seconds, of a cluster that is there


def outcomes(
    configs: list[RunConfig],
    store: str | Path,
    *,
    device: str = "auto",
    cpus: float = 1,
    gpus: float = 0,
    gather: bool = False,
    address: str | None = None,
) -> Generator[tuple[RunConfig, str | BaseException], None, None]:
    """Run configs on the cluster, each with its outcome as it ends.

    Parameters
    ----------
    store
        A folder that all nodes see under this path, unless `gather`.
    cpus, gpus
        What one run needs; fractions of a GPU let several runs share it. Some node of the cluster must have it.
    gather
        Run in a folder of each node's own and bring records and curves to the driver, which stores them. A run whose
        node dies then starts anew; on a shared store it resumes from its checkpoint.
    address
        Of the cluster: `auto` or `host:port` on one of its machines, `ray://host:port` from any other (which does not
        see the store: `gather`). By default the environment variable `RAY_ADDRESS`, else this process's own cluster of
        one machine.

    Raises
    ------
    ValueError
        If Ray is not installed, if nothing answers at the address, or if no node has what a run needs.
    """
    try:
        import ray
    except ImportError:
        raise ValueError("engine='ray' needs Ray: pip install -e '.[cluster]' in a clone.") from None
    passed = {name: os.environ[name] for name in ("GCALIB_DATA",) if name in os.environ}
    threads = str(max(1, int(cpus)))
    if not ray.is_initialized():
        address = address or os.environ.get("RAY_ADDRESS")
        _knock(address)
        ray.init(address=address, log_to_driver=False, runtime_env={"env_vars": {**passed, "OMP_NUM_THREADS": threads}})
    nodes = [(has.get("CPU", 0), has.get("GPU", 0)) for has in (n["Resources"] for n in ray.nodes() if n["Alive"])]
    if not any(cores >= cpus and cards >= gpus for cores, cards in nodes):  # Ray would wait for such a node for ever
        found = ", ".join(f"{cores:g} and {cards:g}" for cores, cards in sorted(set(nodes)))
        raise ValueError(f"A run asks for cpus={cpus:g} and gpus={gpus:g}, and no node has both: they have {found}.")
    runs = RunStore(store)
    folder = None if gather else str(runs.folder.absolute())
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES)(_run_there)
    waiting: dict[Any, RunConfig] = {
        task.remote(config.model_dump(), folder, device, int(threads)): config for config in configs
    }
    try:
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            config = waiting.pop(done)
            try:
                record, curves = ray.get(done)
                if gather:
                    with runs.lock(record["run_id"]):
                        if not runs.has(record["run_id"]):
                            runs.put(record, curves)
                yield config, record["run_id"]
            except Exception as error:
                yield config, getattr(error, "cause", None) or error
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
    fields: dict[str, Any], store: str | None, device: str, threads: int
) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """On a node: the record, and its curves if the node's store is its own."""
    import torch

    torch.set_num_threads(threads)
    if store is not None:
        return run(RunConfig(**fields), store, device=device), []
    with tempfile.TemporaryDirectory(prefix="gcalib-") as own:
        record = run(RunConfig(**fields), own, device=device)
        return record, RunStore(own).curves(record["run_id"])

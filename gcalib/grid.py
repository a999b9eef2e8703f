"""Many runs: over the cores of this machine, or over a cluster (`gcalib.cluster`)."""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.connection
import os
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from tqdm import tqdm

from gcalib.config import RunConfig, run_id
from gcalib.data.pair import DataError
from gcalib.estimates import estimate, learnable
from gcalib.experiments import pair_of, run
from gcalib.records import RESULTS_VERSION, trace
from gcalib.seeds import grouped, run_seeds
from gcalib.store import BusyError, RunStore

log = logging.getLogger("gcalib")
ATTEMPTS = 2  # of a run whose process dies: memory may have been short by chance, but not twice

Outcome = str | BaseException
"""The id of a finished run, or why there is none."""


class GridError(RuntimeError):
    """Some runs of a grid failed; the others are stored. `failures` maps each failed config to its error."""

    def __init__(self, failures: dict[RunConfig, BaseException]) -> None:
        self.failures = failures
        lines = (f"{config.model_dump(exclude_defaults=True)}: {error}" for config, error in failures.items())
        super().__init__(f"{len(failures)} run(s) failed, the others are stored. " + " | ".join(lines))


class Interrupted(KeyboardInterrupt):
    """`Ctrl-C` during a grid."""

    def __init__(self) -> None:
        super().__init__("Interrupted: what was finished is stored, what was running resumes from its last checkpoint.")


def run_grid(
    configs: Iterable[RunConfig],
    store: str | Path = "results",
    *,
    engine: Literal["local", "ray"] = "local",
    workers: int = 1,
    device: str = "auto",
    seeds_at_once: int = 1,
    **cluster: Any,
) -> pd.DataFrame:
    """Run every config that the store does not hold; return all their records, one row each, in the order given.

    The runs that will take longest start first. One that fails, or whose process is killed twice, stops no other.
    Several processes, also on several machines, may be given the same grid and store: they share the work.

    Parameters
    ----------
    engine
        `"local"`: processes of this machine. `"ray"`: a Ray cluster (`pip install 'gcalib[cluster]'`).
    workers
        Local processes; they share the machine's cores evenly.
    seeds_at_once
        Local: configs that differ by their seed alone run in one process in turns, this many at once
        (`gcalib.seeds`). It is meant for small models on a large GPU; the records are the same.
    cluster
        With `engine="ray"` only, see `gcalib.cluster.outcomes`: `cpus` and `gpus` (fractions are allowed) that a run
        needs, `gather`, `address`.

    Raises
    ------
    GridError
        After all other runs have finished, if some failed.
    Interrupted
        On `Ctrl-C`.
    ValueError
        For an unknown engine or an argument it does not take.
    """
    if engine not in ("local", "ray"):
        raise ValueError(f"engine={engine!r} is unknown; the engines are local and ray.")
    if engine == "local" and cluster:
        raise ValueError(f"{', '.join(sorted(cluster))}: read by engine='ray' only.")
    if seeds_at_once < 1 or (engine == "ray" and seeds_at_once > 1):
        raise ValueError(f"seeds_at_once={seeds_at_once}: it must be 1 or more, and is read by engine='local' only.")
    asked = [config.canonical() for config in configs]
    unique = list(dict.fromkeys(asked))
    runs = RunStore(store)
    names = dict(zip(unique, finished(unique, store), strict=True))
    waiting = [config for config in unique if names[config] is None]
    failures: dict[RunConfig, BaseException] = {}
    if waiting:
        seconds = estimate(waiting, learnable(runs))["seconds"]
        longest_first = seconds.sort_values(ascending=False, kind="stable").index
        expected = {waiting[place]: max(0.1, seconds[place]) for place in longest_first}
        if engine == "ray":
            from gcalib import cluster as ray_cluster

            outcomes = ray_cluster.outcomes(list(expected), store, device=device, **cluster)
        else:
            groups = grouped(expected, seeds_at_once)
            outcomes = _alone(groups, store, device) if workers == 1 or len(groups) == 1 else (
                _shared(groups, store, workers, device)
            )  # fmt: skip
        for config, outcome in _shown(outcomes, expected):
            if isinstance(outcome, BaseException):
                failures[config] = outcome
                log.error("%s failed: %s", config.model_dump(exclude_defaults=True), outcome)
            else:
                names[config] = outcome
    runs.tidy()
    runs.advise()
    if failures:
        raise GridError(failures)
    frame = runs.frame([str(names[config]) for config in asked])
    trace(frame)
    return frame


def finished(configs: Iterable[RunConfig], store: str | Path) -> list[str | None]:
    """For each config the id of its finished run, or None."""
    runs = RunStore(store)
    there = set(runs.names())
    found: dict[int, str | None] = {}
    without_data: dict[int, RunConfig] = {}
    for place, config in enumerate(configs):
        try:
            name = run_id(config, pair_of(config).sha256, RESULTS_VERSION)
            found[place] = name if name in there else None
        except DataError:
            without_data[place] = config
    if without_data:
        found |= dict(zip(without_data, runs.find_names(without_data.values()), strict=True))
    return [found[place] for place in sorted(found)]


def _shown(
    outcomes: Iterator[tuple[RunConfig, Outcome]], expected: dict[RunConfig, float]
) -> Iterator[tuple[RunConfig, Outcome]]:
    """Pass outcomes on, with a bar that weighs each run by the time it was expected to take."""
    total, done, failed = sum(expected.values()), 0, 0
    bar = tqdm(
        total=total, disable=not sys.stderr.isatty() or len(expected) == 1,
        bar_format="{percentage:3.0f}%|{bar}| {postfix}, {elapsed} passed, {remaining} left",
    )  # fmt: skip
    with bar:
        bar.set_postfix_str(f"0 of {len(expected)} runs")
        for config, outcome in outcomes:
            done, failed = done + 1, failed + isinstance(outcome, BaseException)
            bar.set_postfix_str(f"{done} of {len(expected)} runs" + (f", {failed} failed" if failed else ""))
            bar.update(expected[config])
            yield config, outcome


def _alone(groups: list[list[RunConfig]], store: str | Path, device: str) -> Iterator[tuple[RunConfig, Outcome]]:
    # What another process is at comes last: by then it is stored, or that process has died.
    todo = deque((group, False) for group in groups)
    try:
        while todo:
            for config, outcome in _run(*todo.popleft(), store, device):
                if isinstance(outcome, BusyError):
                    todo.append(([config], True))
                else:
                    yield config, outcome
    except KeyboardInterrupt:
        raise Interrupted from None


def _run(group: list[RunConfig], wait: bool, store: str | Path, device: str) -> Iterator[tuple[RunConfig, Outcome]]:
    """Run a config, or several that differ by their seed."""
    if len(group) > 1:
        yield from run_seeds(group, store, device=device, wait=wait)
        return
    try:
        outcome: Outcome = run(group[0], store, device=device, wait=wait)["run_id"]
    except Exception as error:
        outcome = error
    yield group[0], outcome


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    runs: dict[int, RunConfig] = field(default_factory=dict)  # what it has yet to answer for, by seed


@dataclass
class _Pool:
    """Processes that run groups of configs one after the other, replaced when they die."""

    store: str | Path
    device: str
    threads: int
    workers: list[_Worker] = field(default_factory=list)

    def start(self) -> _Worker:
        # A fresh interpreter: a forked torch keeps a thread pool that no longer exists.
        context = multiprocessing.get_context("spawn")
        mine, theirs = context.Pipe()
        arguments = (theirs, str(self.store), self.device, self.threads)
        process = context.Process(target=_work, args=arguments, daemon=True)
        with _environment(OMP_NUM_THREADS=str(self.threads), MKL_NUM_THREADS=str(self.threads)):
            process.start()
        theirs.close()  # so that the pipe ends when the process does
        self.workers.append(_Worker(process, mine))
        return self.workers[-1]

    def stop(self) -> None:
        for worker in self.workers:
            worker.pipe.close()
            if worker.runs:
                worker.process.terminate()
        for worker in self.workers:
            worker.process.join(5)
            if worker.process.is_alive():
                worker.process.kill()


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _work(pipe: Connection, store: str, device: str, threads: int) -> None:
    """What a worker does until its pipe ends: run a group of configs, say of each seed how it went."""
    import signal

    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what Python holds is given back
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            configs, wait = pipe.recv()
        except EOFError:
            return
        for config, outcome in _run([RunConfig(**fields) for fields in configs], wait, store, device):
            try:
                pipe.send((config.seed, outcome))
            except Exception:  # an error that cannot be sent is sent as what it says
                pipe.send((config.seed, RuntimeError(f"{type(outcome).__name__}: {outcome}")))


def _end_with_parent() -> None:
    """End this worker when the process that started it is gone: nobody would hear what it finds."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker is started by a process"
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)  # as if killed, which the store survives; a checkpoint is at most some epochs old


def _shared(
    groups: list[list[RunConfig]], store: str | Path, workers: int, device: str
) -> Iterator[tuple[RunConfig, Outcome]]:
    """Hand out groups in order; a run whose process dies is tried again, once, and by itself."""
    todo = deque((group, False) for group in groups)
    deaths = dict.fromkeys((config for group in groups for config in group), 0)
    pool = _Pool(store, device, max(1, (os.cpu_count() or 1) // workers))
    try:
        for _ in range(min(workers, len(groups))):
            pool.start()
        while todo or any(worker.runs for worker in pool.workers):
            for worker in pool.workers:
                if not worker.runs and todo:
                    group, wait = todo.popleft()
                    worker.runs = {config.seed: config for config in group}
                    worker.pipe.send(([config.model_dump() for config in group], wait))
            busy = {worker.pipe: worker for worker in pool.workers if worker.runs}
            for pipe in multiprocessing.connection.wait(list(busy)):
                worker = busy[pipe]  # type: ignore[index]
                try:
                    seed, outcome = worker.pipe.recv()
                    config = worker.runs.pop(seed)
                    if isinstance(outcome, BusyError):  # see `_alone`
                        todo.append(([config], True))
                    else:
                        yield config, outcome
                except (EOFError, ConnectionResetError):
                    worker.process.join()
                    pool.workers.remove(worker)
                    code = worker.process.exitcode
                    for config in worker.runs.values():
                        deaths[config] += 1
                        if deaths[config] < ATTEMPTS:
                            log.warning("A worker died (exit code %s); its run starts again.", code)
                            todo.append(([config], False))
                        else:
                            yield (
                                config,
                                RuntimeError(
                                    f"the process that ran it died {ATTEMPTS} times, last with exit code {code}; "
                                    "-9 is often the system's answer to too little memory"
                                ),
                            )
                    if todo:
                        pool.start()
    except KeyboardInterrupt:
        raise Interrupted from None
    finally:
        pool.stop()

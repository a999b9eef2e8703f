"""Processes of this machine that run configs: one after the other, or in a pool whose workers may die."""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from gcalib.config import RunConfig
from gcalib.experiments import run
from gcalib.seeds import run_seeds
from gcalib.store import BusyError

log = logging.getLogger("gcalib")
ATTEMPTS = 2  # of a run whose process dies: memory may have been short by chance, but not twice

Outcome = str | BaseException
"""The id of a finished run, or why there is none."""

Outcomes = Generator[tuple[RunConfig, Outcome], None, None]
"""Configs with their outcomes, as they end; closing it ends what is still running."""


def alone(groups: list[list[RunConfig]], store: str | Path, device: str) -> Outcomes:
    """Run groups in this process, one after the other."""
    # What another process is at comes last: by then it is stored, or that process has died.
    todo = deque((group, False) for group in groups)
    while todo:
        for config, outcome in _run(*todo.popleft(), store, device):
            if isinstance(outcome, BusyError):
                todo.append(([config], True))
            else:
                yield config, outcome


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
        with _environment(OMP_NUM_THREADS=str(self.threads), MKL_NUM_THREADS=str(self.threads)), _held():
            process.start()
            self.workers.append(_Worker(process, mine))
        theirs.close()  # so that the pipe ends when the process does
        return self.workers[-1]

    def remove(self, worker: _Worker) -> int | None:
        """Forget a worker that died; returns its exit code."""
        worker.process.join()
        self.workers.remove(worker)
        return worker.process.exitcode

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


@contextmanager
def _held() -> Iterator[None]:
    """Let `Ctrl-C` wait. It reaches the whole group of processes, but one that is started here never hears of it."""
    multiprocessing.resource_tracker.ensure_running()  # started later, it would let signals through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _cores() -> int:
    """Cores that this process may use: a batch system gives a job some of a machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _work(pipe: Connection, store: str, device: str, threads: int) -> None:
    """What a worker does until its pipe ends: run a group of configs, say of each seed how it went."""
    import torch

    sys.stderr.isatty = lambda: False  # type: ignore[method-assign]  # the terminal's bar is the grid's
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


def shared(groups: list[list[RunConfig]], store: str | Path, workers: int, device: str) -> Outcomes:
    """Hand out groups in order; a run whose process dies is tried again, once, and by itself."""
    todo = deque((group, False) for group in groups)
    deaths = dict.fromkeys((config for group in groups for config in group), 0)
    pool = _Pool(store, device, max(1, _cores() // workers))
    try:
        for _ in range(min(workers, len(groups))):
            pool.start()
        while todo or any(worker.runs for worker in pool.workers):
            idle = [worker for worker in pool.workers if not worker.runs]
            while idle and todo:
                (group, wait), worker = todo[0], idle.pop()
                worker.runs = {config.seed: config for config in group}
                try:
                    worker.pipe.send(([config.model_dump() for config in group], wait))
                except OSError:  # it died with nothing to do, which is no run's fault
                    pool.remove(worker)
                    idle.append(pool.start())
                else:
                    todo.popleft()
            busy = {worker.pipe: worker for worker in pool.workers if worker.runs}
            for pipe in multiprocessing.connection.wait(list(busy)):
                worker = busy[pipe]  # type: ignore[index]
                try:
                    seed, outcome = worker.pipe.recv()
                    config = worker.runs.pop(seed)
                    if isinstance(outcome, BusyError):  # see `alone`
                        todo.append(([config], True))
                    else:
                        yield config, outcome
                except (EOFError, ConnectionResetError):
                    code = pool.remove(worker)
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
    finally:
        pool.stop()

"""Several seeds of one config in one process, in turns: a training step of each, then the next step of each.

Every seed has its own model, optimiser, random generators, batches, early stopping, checkpoint and record, and computes
what it would compute alone: on a CPU its record is the same to the bit. The seeds share the process: torch itself, the
data in memory, and on a GPU one CUDA context, where each has a stream, so that the kernels of one may run beside those
of another, and while the host forms the batch of a third.

This is no batched model of stacked parameters (`torch.func`, or batched products). Each seed draws batches of its own,
whose packed rows differ in number. Stacked, all would be padded to the largest: on Food-Kitchen, four seeds at batch
256, to 1.7 times the rows and 2.3 times the cells of attention. And each model would need a second form, whose shapes
depend on no data and whose dropout is drawn for the rows that are no pads. The price: the host still launches the
kernels of each seed by themselves, and an evaluation goes in one turn. Where the host is what a small model waits for,
processes that share the GPU (`workers`) can overlap that, and turns cannot.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from gcalib.config import RunConfig
from gcalib.experiments import run_in_steps
from gcalib.training import pick_device


def grouped(configs: Iterable[RunConfig], at_once: int) -> list[list[RunConfig]]:
    """Parts of at most `at_once` configs that differ by their seed alone, in the order of each part's first."""
    groups: dict[RunConfig, list[list[RunConfig]]] = {}
    order: list[list[RunConfig]] = []
    for config in configs:
        parts = groups.setdefault(config.but(seed=0), [])
        if not parts or len(parts[-1]) == at_once:
            parts.append([])
            order.append(parts[-1])
        parts[-1].append(config)
    return order


def run_seeds(
    configs: Iterable[RunConfig], store: str | Path, *, device: str = "auto", wait: bool = True
) -> Iterator[tuple[RunConfig, str | Exception]]:
    """Run configs that differ by their seed, in turns (`wait` as for `run`); yield each with its run id, or its error.

    One that stops early, or fails, leaves the others more of the process.
    """
    target = pick_device(device)
    on_gpu = target.type == "cuda"
    # in order of the seed: of two processes that wait for each other's runs, both would wait for ever
    turns = {
        config: (run_in_steps(config, store, device=device, wait=wait), torch.cuda.Stream(target) if on_gpu else None)
        for config in sorted(configs, key=lambda config: config.seed)
    }
    try:
        while turns:
            for config, (steps, stream) in list(turns.items()):
                try:
                    with _on(stream):
                        next(steps)
                except StopIteration as end:
                    del turns[config]
                    yield config, end.value["run_id"]
                except Exception as error:
                    del turns[config]
                    yield config, error
    finally:
        for steps, _ in turns.values():
            steps.close()  # gives its lock back


def _on(stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)

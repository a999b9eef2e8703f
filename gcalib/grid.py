"""Many runs: over the cores of this machine, or over a cluster (`gcalib.cluster`)."""

from __future__ import annotations

import logging
import math
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from gcalib.config import RunConfig, run_id
from gcalib.data.pair import DataError
from gcalib.estimates import estimate, learnable
from gcalib.experiments import pair_of
from gcalib.pool import Outcomes, alone, shared
from gcalib.records import RESULTS_VERSION, trace
from gcalib.seeds import grouped
from gcalib.store import RunStore
from gcalib.training import Bar, pick_device

log = logging.getLogger("gcalib")


class GridError(RuntimeError):
    """Some runs of a grid failed; the others, if any, are stored. `failures` maps each failed config to its error."""

    def __init__(self, failures: dict[RunConfig, BaseException], stored: int) -> None:
        self.failures = failures
        others = "the others are stored" if stored else "and there were no others"
        lines = (f"{config.model_dump(exclude_defaults=True)}: {error}" for config, error in failures.items())
        super().__init__(f"{len(failures)} run(s) failed, {others}. " + " | ".join(lines))


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
        `"local"`: processes of this machine. `"ray"`: a Ray cluster (`pip install -e '.[cluster]'`).
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
        For no configs, an unknown engine or an argument it does not take, or a device that is not there.
    """
    if engine not in ("local", "ray"):
        raise ValueError(f"engine={engine!r} is unknown; the engines are local and ray.")
    if engine == "local" and cluster:
        raise ValueError(f"{', '.join(sorted(cluster))}: read by engine='ray' only.")
    if seeds_at_once < 1 or (engine == "ray" and seeds_at_once > 1):
        raise ValueError(f"seeds_at_once={seeds_at_once}: it must be 1 or more, and is read by engine='local' only.")
    if workers < 1:
        raise ValueError(f"workers={workers}: it must be 1 or more.")
    asked = [config.canonical() for config in configs]
    if not asked:
        raise ValueError("There is no run to do: the list of configs is empty, as it is for a profile without a grid.")
    unique = list(dict.fromkeys(asked))
    runs = RunStore(store)
    names = dict(zip(unique, finished(unique, store), strict=True))
    waiting = [config for config in unique if names[config] is None]
    failures: dict[RunConfig, BaseException] = {}
    if waiting:
        if engine == "local" or not device.startswith("cuda"):  # which the nodes of a cluster may have
            pick_device(device)
        seconds = estimate(waiting, learnable(runs))["seconds"]
        longest_first = seconds.sort_values(ascending=False, kind="stable").index
        expected = {waiting[place]: max(0.1, seconds[place]) for place in longest_first}
        if engine == "ray":
            from gcalib import cluster as ray_cluster

            outcomes = ray_cluster.outcomes(list(expected), store, device=device, **cluster)
        else:
            groups = grouped(expected, seeds_at_once)
            outcomes = alone(groups, store, device) if workers == 1 or len(groups) == 1 else (
                shared(groups, store, workers, device)
            )  # fmt: skip
        try:
            with closing(outcomes), closing(_shown(outcomes, expected, runs)) as shown:
                for config, outcome in shown:
                    if isinstance(outcome, BaseException):
                        failures[config] = outcome
                    else:
                        names[config] = outcome
        except KeyboardInterrupt:
            raise Interrupted from None
    runs.tidy()
    runs.advise()
    if failures:
        raise GridError(failures, len(unique) - len(failures))
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
            name = run_id(config, pair_of(config, download=False).sha256, RESULTS_VERSION)
            found[place] = name if name in there else None
        except DataError:
            without_data[place] = config
    if without_data:
        found |= dict(zip(without_data, runs.find_names(without_data.values()), strict=True))
    return [found[place] for place in sorted(found)]


def _shown(outcomes: Outcomes, expected: dict[RunConfig, float], runs: RunStore) -> Outcomes:
    """Pass outcomes on, with a bar that weighs each run by the time it was expected to take, or a line for each."""
    terminal, failed = sys.stderr.isatty(), 0
    bar = _Bar(
        total=sum(expected.values()), disable=not terminal or len(expected) == 1,
        bar_format="{percentage:3.0f}%|{bar}| {elapsed} passed, {left} left{postfix}",
    )  # fmt: skip
    with bar, _moving(bar):
        bar.set_postfix_str(f"0 of {len(expected)} runs")
        for done, (config, outcome) in enumerate(outcomes, 1):
            failed += isinstance(outcome, BaseException)
            said = f"{done} of {len(expected)} runs" + (f", {failed} failed" if failed else "")
            bar.set_postfix_str(said, refresh=False)
            bar.update(expected[config])
            fields = config.model_dump(exclude_defaults=True)
            if isinstance(outcome, BaseException):
                log.error("%s failed: %s", fields, outcome)
            elif not terminal and log.isEnabledFor(logging.INFO):  # what a batch system keeps has no bar
                seconds = (runs.get(outcome) or {}).get("seconds", math.nan)
                log.info("%s: %s took %.0f s, %s", said, outcome, seconds, fields)
            yield config, outcome


class _Bar(Bar):
    """A bar whose time left goes down while no run ends."""

    at, since = 0.0, 0.0  # how far it is, and after how many seconds it came there

    @property
    def format_dict(self) -> Any:
        known = super().format_dict
        total, at, passed = known["total"], known["n"], known["elapsed"]
        if at != self.at:
            self.at, self.since = at, passed
        left = self.format_interval(max(0, total / at * self.since - passed)) if at else "?"
        return {**known, "left": left}


@contextmanager
def _moving(bar: _Bar) -> Iterator[None]:
    """Draw a bar every second."""
    ended = threading.Event()

    def draw() -> None:
        while not ended.wait(1):
            bar.refresh()

    if not bar.disable:
        threading.Thread(target=draw, daemon=True).start()
    try:
        yield
    finally:
        ended.set()

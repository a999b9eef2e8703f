"""How long runs will take and how much memory they need: from stored runs like them, else from their operations."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import pandas as pd

from gcalib.config import RunConfig
from gcalib.data.pair import DataError
from gcalib.experiments import pair_of
from gcalib.store import RunStore

SECONDS_PER_OPERATION = 3e-11  # of one core, where nothing is stored to learn from
EPOCHS_SHARE = 0.6  # of the limit, before early stopping ends a run
BYTES_AT_REST = 0.6e9  # of a process with torch loaded
HIGH = 0.9  # quantile of the memory of runs like it, which a machine should have
ENOUGH = 200  # stored runs of a model to learn from

FIELDS = ("pair", "model", "gca", "dim", "negatives", "ties", "max_length")
"""What the cost of an epoch depends on."""


def learnable(runs: RunStore) -> pd.DataFrame:
    """What `estimate` learns from, of all runs of a store or, if they are very many, of some."""
    return runs.costs([*FIELDS, "batch_size", "epochs_trained", "stopped_early", "seconds", "peak_memory_bytes"])


def estimate(configs: Sequence[RunConfig], stored: pd.DataFrame) -> pd.DataFrame:
    """Rough time and memory of runs, one row each in the order given.

    Parameters
    ----------
    stored
        Records to learn from (`learnable`), perhaps none.

    Returns
    -------
    pandas.DataFrame
        `seconds`; `bytes` of memory, which nine in ten runs like it stayed below; `learned_from`, the number of stored
        runs of the same model (0: guessed from the operations and sizes alone).
    """
    known = stored[stored["seconds"] > 0] if len(stored) else stored
    learned = {model: _learn(known, model) for model in dict.fromkeys(config.model for config in configs)}
    rows = []
    for config in configs:
        rate, epochs, count, memory = learned[config.model]
        epochs = min(epochs, config.epochs) if count else EPOCHS_SHARE * config.epochs
        seconds = rate * operations(config) * epochs
        rows.append({"seconds": seconds, "bytes": memory * _bytes(config), "learned_from": count})
    return pd.DataFrame(rows, columns=["seconds", "bytes", "learned_from"])


def operations(config: RunConfig) -> float:
    """Multiplications of an epoch, roughly: states of every event, and their scores against the negatives."""
    if config.model in ("popularity", "markov", "item-knn"):
        return 0.0
    d, layers = config.dim, config.layers or 1
    crossed = 1 + 0.5 * len(config.gca)
    return _size(config)[0] * 6.0 * (16 * d * d * layers * crossed + 2 * d * config.negatives)


def _bytes(config: RunConfig) -> float:
    rows = config.batch_size * config.max_length / 2
    # the tables with their gradients, two moments and the best epoch; activations; logits of both domains
    tables = 20.0 * _size(config)[1] * config.dim
    return BYTES_AT_REST + tables + rows * (300.0 * config.dim + 12.0 * config.negatives)


def _size(config: RunConfig) -> tuple[int, int]:
    """Events and items of a config's pair."""
    return _size_of(config.pair, config.max_length, config.min_per_domain)


@functools.lru_cache  # the order of ties changes no size, and a pair that is not here is asked for once
def _size_of(pair: str, max_length: int, min_per_domain: int | None) -> tuple[int, int]:
    try:
        fields = {"pair": pair, "max_length": max_length, "min_per_domain": min_per_domain}
        found = pair_of(RunConfig(**fields), download=False)  # type: ignore[arg-type]
    except (DataError, ValueError):
        return 200_000, 30_000  # an Amazon pair of common size
    return int(found.offsets[-1]), sum(found.num_items)


def _learn(known: pd.DataFrame, model: str) -> tuple[float, float, int, float]:
    """Of the stored runs of a model: seconds an operation, epochs until one stops by itself, how many they are, and
    how many times the memory of the formula they took.
    """
    same = known[(known["model"] == model) & (known["epochs_trained"] > 0)] if len(known) else known
    if not len(same):
        return SECONDS_PER_OPERATION, 0.0, 0, 1.0
    # in such an order that each pair is loaded once
    same, rates, shares = same.head(ENOUGH).sort_values(["pair", "max_length", "ties"]), [], []
    for row in same.to_dict("records"):
        config = RunConfig(**{name: row[name] for name in (*FIELDS, "batch_size")}, heads=1, self_heads=1)
        rates.append(row["seconds"] / (operations(config) * row["epochs_trained"]))
        shares.append(row["peak_memory_bytes"] / _bytes(config))
    stopped = same.loc[same["stopped_early"].astype(bool), "epochs_trained"]
    epochs = float(stopped.median()) if len(stopped) else math.inf
    return float(pd.Series(rates).median()), epochs, len(same), float(pd.Series(shares).quantile(HIGH))

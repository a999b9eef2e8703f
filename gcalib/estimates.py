"""How long runs will take and how much memory they need: from stored runs like them, else from their operations."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from gcalib.config import RunConfig
from gcalib.data.pair import DataError
from gcalib.experiments import pair_of
from gcalib.store import RunStore

SECONDS_PER_OPERATION = 3e-11  # of one core, where nothing is stored to learn from
EPOCHS_SHARE = 0.6  # of the limit, before early stopping ends a run
BYTES_AT_REST = 0.6e9  # of a process with torch loaded
ENOUGH = 200  # stored runs of a model to learn from

FIELDS = ("pair", "model", "gca", "dim", "negatives", "ties", "max_length")
"""What the cost of an epoch depends on."""


def learnable(runs: RunStore) -> pd.DataFrame:
    """What `estimate` learns from, of all runs of a store or, if they are very many, of some."""
    return runs.costs([*FIELDS, "epochs", "epochs_trained", "seconds"])


def estimate(configs: Sequence[RunConfig], stored: pd.DataFrame) -> pd.DataFrame:
    """Rough time and memory of runs, one row each in the order given.

    Parameters
    ----------
    stored
        Records to learn from (`learnable`), perhaps none.

    Returns
    -------
    pandas.DataFrame
        `seconds`; `bytes` of memory; `learned_from`, the number of stored runs of the same model (0: guessed from the
        operations alone).
    """
    known = stored[stored["seconds"] > 0] if len(stored) else stored
    rows = []
    rates: dict[str, tuple[float, float, int]] = {}
    for config in configs:
        if config.model not in rates:
            rates[config.model] = _learn(known, config.model)
        rate, epochs_share, count = rates[config.model]
        seconds = rate * operations(config) * epochs_share * config.epochs
        rows.append({"seconds": seconds, "bytes": _bytes(config), "learned_from": count})
    return pd.DataFrame(rows, columns=["seconds", "bytes", "learned_from"])


def operations(config: RunConfig) -> float:
    """Multiplications of an epoch, roughly: states of every event, and their scores against the negatives."""
    if config.model in ("popularity", "markov", "item-knn"):
        return 0.0
    d, layers = config.dim, config.layers or 1
    crossed = 1 + 0.5 * len(config.gca)
    return _events(config) * 6.0 * (16 * d * d * layers * crossed + 2 * d * config.negatives)


def _events(config: RunConfig) -> int:
    try:
        return int(pair_of(config).offsets[-1])
    except (DataError, ValueError):
        return 200_000  # an Amazon pair of common size


def _bytes(config: RunConfig) -> float:
    try:
        items = sum(pair_of(config).num_items)
    except (DataError, ValueError):
        items = 30_000
    rows = config.batch_size * config.max_length / 2
    # the tables with their gradients, two moments and the best epoch; activations; logits of both domains
    return BYTES_AT_REST + 20.0 * items * config.dim + rows * (300.0 * config.dim + 12.0 * config.negatives)


def _learn(known: pd.DataFrame, model: str) -> tuple[float, float, int]:
    """Seconds an operation, share of the epochs, and the number of runs they come from."""
    same = known[(known["model"] == model) & (known["epochs_trained"] > 0)] if len(known) else known
    if not len(same):
        return SECONDS_PER_OPERATION, EPOCHS_SHARE, 0
    # in such an order that each pair is loaded once
    same, rates, shares = same.head(ENOUGH).sort_values(["pair", "max_length", "ties"]), [], []
    for row in same.to_dict("records"):
        fields = {name: row[name] for name in FIELDS}
        work = operations(RunConfig(**fields, heads=1, self_heads=1)) * row["epochs_trained"]
        rates.append(row["seconds"] / work)
        shares.append(row["epochs_trained"] / row["epochs"])
    return float(pd.Series(rates).median()), float(pd.Series(shares).median()), len(same)

"""Batches of pairs without a common clock: two streams a user, ordered each for itself.

Row j of a domain's stream holds the user's j-th event there and predicts the next one. In training the last event of
each domain is a target and no row, as the last event of a sequence with a clock is; so training is the evaluation form
of the history without it, and positions, counted back from the newest row of the domain, mean the same in both.

Of the other domain's events nobody knows whether they came before or after a target, so all its rows are shown to the
first cross-attention (of each domain, that is, all but the last event in training). A row that a cross-attention has
touched depends on all rows of the other domain, future targets of that domain included: it may never be shown to that
domain again. In clocks: `seen` and `slot` are 0 everywhere, so `seen < slot + 1` shows an untouched row always, and
`slot < slot` a touched one never.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from gcalib.data.streams import Batch, Queries, Stream
from gcalib.packing import Layout


def make_clockless_batch(
    sequences: Sequence[np.ndarray],
    num_items_a: int,
    *,
    window: int,
    training: bool,
    users: np.ndarray | None = None,
) -> Batch:
    """Pack sequences of item ids, each domain's in time order; see `gcalib.data.batches.make_batch`.

    In training every event with one before it in its domain is a target. In evaluation the item after all of a
    domain is asked for, in both domains. The mixed stream is empty.

    Raises
    ------
    ValueError
        For an empty batch, or a sequence without an event.
    """
    if not len(sequences) or min(map(len, sequences)) < 1:
        raise ValueError(f"A batch needs users with at least 1 event each; got lengths {list(map(len, sequences))}.")
    size = len(sequences)
    parts = [_domain(sequences, num_items_a, domain, window, training) for domain in (0, 1)]
    numbers = None if users is None else torch.from_numpy(np.asarray(users, dtype=np.int64))
    none = np.zeros(0, dtype=np.int64)
    return Batch(size, _stream(none, none, none, size), (parts[0][0], parts[1][0]), (parts[0][1], parts[1][1]), numbers)


def _domain(
    sequences: Sequence[np.ndarray], num_items_a: int, domain: int, window: int, training: bool
) -> tuple[Stream, Queries]:
    newest = window + 1 if training else window
    events = [np.asarray(items)[(np.asarray(items) > num_items_a) == bool(domain)][-newest:] for items in sequences]
    lengths = np.array([len(items) for items in events])
    # a single event has nothing to predict it from: it is no target, so it may be a row
    rows = np.where(lengths > 1, lengths - 1, lengths) if training else lengths
    items = np.concatenate(events).astype(np.int64)
    owner = np.repeat(np.arange(len(events)), lengths)
    place = np.arange(len(items)) - (np.cumsum(lengths) - lengths)[owner]
    held = place < rows[owner]
    stream = _stream(items[held], owner[held], (rows[owner] - place)[held], len(events))

    row_starts = np.cumsum(rows) - rows
    if training:
        target = np.flatnonzero(place > 0)
        asked, own_row = owner[target], row_starts[owner[target]] + place[target] - 1
        targets = items[target]
        last = np.flatnonzero(place[target] == lengths[asked] - 1)
    else:
        asked, last = np.arange(len(events)), np.arange(len(events))
        own_row = np.where(rows > 0, row_starts + rows - 1, -1)
        targets = np.zeros(len(events), dtype=np.int64)
    index, zero, none = torch.from_numpy(own_row), torch.zeros(len(asked), dtype=torch.int64), np.full(len(asked), -1)
    queries = Queries(
        mixed_row=torch.from_numpy(none), own_row=index, sequence=torch.from_numpy(asked), slot=zero,
        targets=torch.from_numpy(targets), last=torch.from_numpy(last),
    )  # fmt: skip
    return stream, queries


def _stream(items: np.ndarray, owner: np.ndarray, position: np.ndarray, size: int) -> Stream:
    sequence, zero = torch.from_numpy(owner), torch.zeros(len(items), dtype=torch.int64)
    return Stream(
        items=torch.from_numpy(items), sequence=sequence, seen=zero, slot=zero, position=torch.from_numpy(position),
        pads=zero, layout=Layout.of(sequence, size),
    )  # fmt: skip

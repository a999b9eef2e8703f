"""From histories to packed batches: what each row holds, what it predicts, and what it may know.

Three streams come out of a sequence s_0 .. s_m of one user (Bian et al., WWW 2025, arXiv 2501.15118): the mixed one,
and one a domain. Position i of the mixed stream, its *slot*, holds s_i and predicts s_(i+1). A row of a domain's
stream holds one item of that domain and stands at the slot that predicts the domain's next item. Every row therefore
has two clocks, both indices into the user's sequence:

- `seen`: the event it holds, the newest thing that its content depends on;
- `slot`: the newest event that the prediction made from it may depend on (`seen <= slot`).

All causal masks of the package compare these two clocks. Without a common clock there is no mixed stream, and each
domain's is made on its own (`gcalib.data.clockless`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from gcalib.data.clockless import make_clockless_batch
from gcalib.data.streams import Batch, Queries, Stream
from gcalib.packing import Layout

__all__ = ["Batch", "Queries", "Stream", "length_batches", "make_batch", "shuffled_batches"]


def make_batch(
    sequences: Sequence[np.ndarray],
    num_items_a: int,
    *,
    window: int,
    training: bool,
    tails: bool = False,
    as_published: bool = False,
    users: np.ndarray | None = None,
    clock: bool = True,
) -> Batch:
    """Pack sequences of item ids.

    Parameters
    ----------
    sequences
        Item ids of each user, oldest first. In training every event after the first is a target; in evaluation the
        whole sequence is history and the item after it is asked for in both domains.
    window
        Slots of the model; of a longer sequence the newest ones are kept.
    tails
        In training, keep the newest item of a domain although no event of the domain follows it: it predicts
        nothing, but cross-attention from the other domain must see it, or the row's presence would tell the future.
    as_published
        Count positions within each stream, as official ABXI does, instead of in the mixed sequence. In training the
        published form tells a row how many items of its domain are still to come.
    users
        Numbers of the users in their pair, for models that know something of a user beside the sequence.
    clock
        False where the order of events across the domains is unknown: `window` then holds for each domain, and
        `tails` and `as_published` have no meaning.

    Raises
    ------
    ValueError
        For an empty batch, or a sequence too short: two events in training, one in evaluation.
    """
    if not clock:
        return make_clockless_batch(sequences, num_items_a, window=window, training=training, users=users)
    newest = window + 1 if training else window
    needed = 2 if training else 1
    lengths = np.array([min(len(sequence), newest) for sequence in sequences])
    if len(lengths) == 0 or lengths.min() < needed:
        raise ValueError(f"A batch needs users with at least {needed} event(s) each; got lengths {lengths.tolist()}.")
    items = np.concatenate([sequence[-newest:] for sequence in sequences]).astype(np.int64)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    starts = np.cumsum(lengths) - lengths
    event = np.arange(len(items)) - starts[owner]
    slots = lengths - 1 if training else lengths  # a user's slots
    in_b = items > num_items_a

    mixed_starts = np.cumsum(slots) - slots
    held = event < slots[owner]  # in training the last event is a target only
    mixed = _stream(items[held], owner[held], event[held], event[held], slots, window, as_published=False)
    following = np.append(items[1:], 0) * np.append(owner[1:] == owner[:-1], False)
    targets = following[held]
    is_last = event[held] == slots[owner[held]] - 1

    own, queries = [], []
    for domain in (0, 1):
        rows = np.flatnonzero(in_b == bool(domain))
        again = np.append(owner[rows[1:]] == owner[rows[:-1]], False) if len(rows) else np.zeros(0, dtype=bool)
        next_row = np.append(rows[1:], 0)[: len(rows)]
        slot = np.where(again, event[next_row] - 1, slots[owner[rows]] - 1)
        # What the very last event is, is for its predictors to find out: it is no row.
        kept = (again | tails | (not training)) & (event[rows] < slots[owner[rows]])
        rows, slot = rows[kept], slot[kept]
        stream = _stream(items[rows], owner[rows], event[rows], slot, slots, window, as_published)
        own.append(stream)

        wanted = (targets > num_items_a) == bool(domain)
        asked = np.flatnonzero(wanted & (targets > 0) | (is_last & (not training)))
        row_at = np.full(len(targets), -1)
        row_at[mixed_starts[owner[rows]] + slot] = np.arange(len(rows))  # a tail at the newest slot is never asked
        asked_owner = owner[held][asked]
        queries.append(
            Queries(
                mixed_row=torch.from_numpy(asked),
                own_row=torch.from_numpy(row_at[asked]),
                sequence=torch.from_numpy(asked_owner),
                slot=torch.from_numpy(event[held][asked]),
                targets=torch.from_numpy(targets[asked]),
                last=torch.from_numpy(np.flatnonzero(is_last[asked])),
            )
        )
    numbers = None if users is None else torch.from_numpy(np.asarray(users, dtype=np.int64))
    return Batch(len(lengths), mixed, (own[0], own[1]), (queries[0], queries[1]), numbers)


def _stream(
    items: np.ndarray, users: np.ndarray, seen: np.ndarray, slot: np.ndarray, slots: np.ndarray, window: int,
    as_published: bool,
) -> Stream:  # fmt: skip
    counts = np.bincount(users, minlength=len(slots))
    rank = np.arange(len(users)) - (np.cumsum(counts) - counts)[users]
    position = counts[users] - rank if as_published else slots[users] - seen
    # slots up to the row's own, pads in front included, less the real rows among them
    pads = window - slots[users] + slot - rank
    sequence = torch.from_numpy(users)
    return Stream(
        items=torch.from_numpy(items),
        sequence=sequence,
        seen=torch.from_numpy(seen),
        slot=torch.from_numpy(slot),
        position=torch.from_numpy(position),
        pads=torch.from_numpy(pads),
        layout=Layout.of(sequence, len(slots)),
    )


def length_batches(lengths: np.ndarray, batch_size: int, generator: np.random.Generator | None) -> Iterator[np.ndarray]:
    """Users of one epoch in batches of like length, so that attention has next to no pads.

    Which users share a batch is random among those of equal length, and so is the order of the batches;
    without a generator users come in order of length.
    """
    order = np.arange(len(lengths)) if generator is None else generator.permutation(len(lengths))
    order = order[np.argsort(lengths[order], kind="stable")]
    cuts = np.arange(0, len(order), batch_size)
    if generator is not None:
        # a random phase, so that the short batch is not always the one of the longest users
        phase = int(generator.integers(batch_size))
        cuts = np.unique(np.concatenate([[0], np.arange(phase, len(order), batch_size)]))
        parts = np.split(order, cuts[1:])
        yield from (parts[number] for number in generator.permutation(len(parts)))
    else:
        yield from (order[start : start + batch_size] for start in cuts)


def shuffled_batches(users: int, batch_size: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Users of one epoch in batches of any lengths: each epoch is cut anew out of a random order, as is usual."""
    order = generator.permutation(users)
    yield from (order[start : start + batch_size] for start in range(0, users, batch_size))

"""From histories to padded batches: what each row holds, what it predicts, and which events it may depend on.

A user's events s_0 .. s_m become three streams (Bian et al., WWW 2025, arXiv 2501.15118): the mixed one (B, L), which
holds s_i at column i, and one a domain (B, l_A) and (B, l_B). Column 0 of a domain's stream is empty and predicts the
domain's first item; column j holds the j-th item and predicts the next. Streams are padded at the end with item 0.

Two integers per row, both columns of the mixed stream, decide what may attend to what (`gcalib.attention.visible`):

- `position`: the event that the row holds;
- `query_position`: the newest event that the prediction made from the row may depend on.

For the history a1 b1 b2 a2 b3 (training, the last event is a target only):

    mixed    items  a1 b1 b2 a2        A   items           -  a1      B   items           -  b1  b2
             position 0  1  2  3           position        -   0          position        -   1   2
                                           query_position  -   2          query_position  0   1   3
                                           targets         -  a2          targets        b1  b2  b3

a2 is followed by no event of A, so it predicts nothing and is left out unless `keep_last_item`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gcalib.data.pair import Pair, Split

NEVER = 2**31 - 1  # position of a row that holds no event: later than every query


@dataclass(frozen=True)
class Stream:
    """One stream of a batch, oldest event first, pads last.

    Attributes
    ----------
    items
        Item ids, 0 at pads and in the empty column 0 of a domain's stream.
    position, query_position
        See the module's docstring; without a global order 0 at all real rows.
    recency
        The row's place counted back from the newest one (1), for position embeddings; 0 where `items` is.
    targets
        Id of the next item, 0 where there is none or it is unknown.
    predicts
        True at rows whose next item is asked for: in training where there is a target, in evaluation at the newest
        row too.
    """

    items: Int[Tensor, "B L"]
    position: Int[Tensor, "B L"]
    query_position: Int[Tensor, "B L"]
    recency: Int[Tensor, "B L"]
    targets: Int[Tensor, "B L"]
    predicts: Bool[Tensor, "B L"]

    @cached_property
    def mask(self) -> Bool[Tensor, "B L"]:
        """True at rows that hold an item."""
        return self.items > 0

    @cached_property
    def last(self) -> Int[Tensor, " B"]:
        """Column of each user's newest row; the empty column 0 of a domain without items."""
        columns = torch.arange(self.items.size(1), device=self.items.device)
        return (columns * self.mask).amax(dim=1)

    def newest(self, h: Float[Tensor, "B L dim"]) -> Float[Tensor, "B 1 dim"]:
        """Each user's newest row of h."""
        return rows_at(h, self.last.unsqueeze(1))

    @property
    def newest_mask(self) -> Bool[Tensor, "B 1"]:
        """Whether each user's newest row holds an item."""
        return self.items.gather(1, self.last.unsqueeze(1)) > 0

    def to(self, device: torch.device | str) -> Stream:
        """The same stream on another device."""
        return Stream(*(getattr(self, field.name).to(device, non_blocking=True) for field in fields(self)))


@dataclass(frozen=True)
class Batch:
    """A batch of users: the mixed stream (empty without a global order), the streams of A and B, and who they are.

    `training` says which form it has (see `collate`); `users` are the users' numbers in the pair, where known.
    """

    mixed: Stream
    a: Stream
    b: Stream
    training: bool
    users: Int[Tensor, " B"] | None = None

    @property
    def size(self) -> int:
        """Number of users B."""
        return self.a.items.size(0)

    @property
    def domains(self) -> tuple[Stream, Stream]:
        """The streams of A and of B."""
        return self.a, self.b

    @cached_property
    def history_items(self) -> Int[Tensor, "B items"]:
        """All items of each user's sequence in the batch, in either domain, some of them twice; 0 fills up a row."""
        streams = (self.mixed,) if self.mixed.mask.any() else self.domains
        return torch.cat([part for stream in streams for part in (stream.items, stream.targets)], dim=1)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        users = None if self.users is None else self.users.to(device)
        return Batch(self.mixed.to(device), self.a.to(device), self.b.to(device), self.training, users)


def items_of(num_items: tuple[int, int], domain: int) -> slice:
    """The ids of a domain's items."""
    nA, nB = num_items
    return slice(1, 1 + nA) if domain == 0 else slice(1 + nA, 1 + nA + nB)


def rows_at(h: Float[Tensor, "B L dim"], column: Int[Tensor, "B l"]) -> Float[Tensor, "B l dim"]:
    """`h[b, column[b, j]]`."""
    return h[torch.arange(h.size(0), device=h.device).unsqueeze(1), column]


def collate(
    sequences: Sequence[np.ndarray],
    num_items_a: int,
    *,
    window: int,
    training: bool,
    keep_last_item: bool = False,
    recency_in_domain: bool = False,
    users: np.ndarray | None = None,
    global_order: bool = True,
) -> Batch:
    """Make a batch of sequences of item ids.

    Parameters
    ----------
    sequences
        Item ids of each user, oldest first. In training every event after the first is a target; in evaluation the
        whole sequence is history and the item after it is asked for in both domains.
    window
        Input events of the model; of a longer sequence the newest ones are kept.
    keep_last_item
        In training, keep the newest item of a domain although no event of the domain follows it: it predicts nothing,
        but cross-attention from the other domain must see it, or its absence would tell the future.
    recency_in_domain
        Count `recency` within each stream, as official ABXI does, instead of in the mixed sequence. In training that
        tells a row how many items of its domain are still to come.
    users
        Numbers of the users in their pair.
    global_order
        False where the order of events across the domains is unknown: `window` then holds for each domain, the mixed
        stream is empty, and every row of the other domain is visible to the first cross-attention.

    Raises
    ------
    ValueError
        For an empty batch, or a sequence too short: two events in training, one in evaluation.
    """
    kept_events = window + training
    needed = 2 if training and global_order else 1
    if not len(sequences) or min(map(len, sequences)) < needed:
        raise ValueError(f"A batch needs users with {needed} events or more; it has {[len(s) for s in sequences]}.")
    size, nothing = len(sequences), np.zeros(0, dtype=np.int64)
    mixed = _stream(size, nothing, nothing)
    if global_order:
        items, owner, position, length = _flatten([np.asarray(sequence)[-kept_events:] for sequence in sequences])
        inputs = length - training  # of each user; in training the last event is a target only
        held = position < inputs[owner]
        follows = np.append(owner[1:] == owner[:-1], False)
        mixed = _stream(
            size, owner[held], position[held], items=items[held], position=position[held],
            query_position=position[held], recency=(inputs[owner] - position)[held],
            targets=np.where(follows, np.roll(items, -1), 0)[held], predicts=np.ones(held.sum(), dtype=bool),
        )  # fmt: skip
    streams = []
    for domain in (0, 1):
        if global_order:
            mine = (items > num_items_a) == domain
            events = (items[mine], owner[mine], position[mine])
            stream = _domain(*events, inputs, training, keep_last_item, recency_in_domain)
        else:
            of_domain = [np.asarray(s)[(np.asarray(s) > num_items_a) == domain][-kept_events:] for s in sequences]
            of_items, user, place, count = _flatten(of_domain)
            # a domain of one event has nothing to predict it from: it is no target and may be seen
            inputs = np.where(count > 1, count - training, count)
            stream = _domain(of_items, user, place, inputs, training, True, recency_in_domain)
            anywhere = stream.mask | stream.predicts
            stream = replace(
                stream, position=stream.position.masked_fill(stream.mask, 0),
                query_position=stream.query_position.masked_fill(anywhere, 0),
            )  # fmt: skip
        streams.append(stream)
    numbers = None if users is None else torch.from_numpy(np.asarray(users, dtype=np.int64))
    return Batch(mixed, streams[0], streams[1], training, numbers)


def _flatten(events: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """All events one user after the other, with their user, their place in the user's sequence, and its length."""
    length = np.array([len(part) for part in events])
    owner = np.repeat(np.arange(len(events)), length)
    place = np.arange(len(owner)) - (np.cumsum(length) - length)[owner]
    return np.concatenate(events).astype(np.int64), owner, place, length


def _domain(
    items: np.ndarray, owner: np.ndarray, position: np.ndarray, inputs: np.ndarray, training: bool,
    keep_last_item: bool, recency_in_domain: bool,
) -> Stream:  # fmt: skip
    """A domain's stream: its events, their users and positions, and each user's number of input events."""
    size = len(inputs)
    count = np.bincount(owner, minlength=size)
    first = np.cumsum(count) - count
    place = np.arange(len(owner)) - first[owner]
    again = np.append(owner[1:] == owner[:-1], False)[: len(owner)]  # another event of the domain follows
    query_position = np.where(again, np.roll(position, -1) - 1, inputs[owner] - 1)
    targets = np.where(again, np.roll(items, -1), 0)
    kept = (again | keep_last_item | (not training)) & (position < inputs[owner])
    rows = np.bincount(owner[kept], minlength=size)
    recency = rows[owner] - place if recency_in_domain else inputs[owner] - position

    # column 0 predicts the first item of the domain, if that has an event before it; in evaluation also the unknown one
    without_items = np.flatnonzero((count == 0) & (not training))
    with_first = np.flatnonzero(count > 0)
    with_first = with_first[position[first[with_first]] > 0]
    starts = np.concatenate([with_first, without_items])
    empty = np.zeros(len(starts), dtype=np.int64)
    return _stream(
        size, np.concatenate([starts, owner[kept]]), np.concatenate([empty, 1 + place[kept]]),
        items=np.concatenate([empty, items[kept]]), position=np.concatenate([empty + NEVER, position[kept]]),
        query_position=np.concatenate(
            [position[first[with_first]] - 1, inputs[without_items] - 1, query_position[kept]]
        ),
        recency=np.concatenate([empty, recency[kept]]),
        targets=np.concatenate([items[first[with_first]], empty[: len(without_items)], targets[kept]]),
        predicts=np.concatenate([empty == 0, (again | (not training))[kept]]),
    )  # fmt: skip


def _stream(size: int, user: np.ndarray, column: np.ndarray, **values: np.ndarray) -> Stream:
    """Write flat values to (user, column) of padded tensors."""
    length = int(column.max(initial=0)) + 1
    pads = {"position": NEVER, "query_position": -1, "predicts": False}
    padded = {}
    for field in fields(Stream):
        array = np.full((size, length), pads.get(field.name, 0))
        if values:
            array[user, column] = values[field.name]
        padded[field.name] = torch.from_numpy(array)
    return Stream(**padded)


def events_per_domain(pair: Pair, split: Split) -> np.ndarray:
    """Events of A and of B in each history, int (users, 2)."""
    owner = np.repeat(np.arange(pair.num_users), split.lengths)
    key = owner * 2 + pair.domain_of(split.history_items)
    return np.bincount(key, minlength=2 * pair.num_users).reshape(-1, 2)


def batches_of_users(
    events: np.ndarray, batch_size: int, generator: np.random.Generator | None
) -> Iterator[np.ndarray]:
    """Users of one epoch in batches of equal size and of like numbers of events in A and in B.

    The users are halved again and again, each time by the number of events (of A, of B, or of both) that leaves the
    fewest pads: 1.2 to 1.3 times as many rows as real ones on the large pairs, against 3 in random batches. Which users
    of equal numbers share a batch is random, and so is the order of the batches, unless there is no generator.

    Parameters
    ----------
    events
        int (users, 2), events of A and of B in each history.
    """
    keys = np.column_stack([events, events.sum(axis=1)])

    def rows(users: np.ndarray) -> int:
        return len(users) * int(keys[users].max(axis=0).sum())

    def halved(users: np.ndarray, parts: int) -> list[np.ndarray]:
        if parts == 1:
            return [users]
        cut = len(users) * (parts // 2) // parts
        orders = [users[np.argsort(key[users], kind="stable")] for key in keys.T]
        low, high = min(((o[:cut], o[cut:]) for o in orders), key=lambda halves: rows(halves[0]) + rows(halves[1]))
        return halved(low, parts // 2) + halved(high, parts - parts // 2)

    users = np.arange(len(events)) if generator is None else generator.permutation(len(events))
    batches = halved(users, -(-len(users) // batch_size))
    order = range(len(batches)) if generator is None else generator.permutation(len(batches))
    yield from (batches[number] for number in order)


def shuffled_batches(users: int, batch_size: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Users of one epoch in batches of any lengths, as official code draws them."""
    order = generator.permutation(users)
    yield from (order[start : start + batch_size] for start in range(0, users, batch_size))

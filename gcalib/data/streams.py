"""What a batch is made of: packed rows of the mixed stream and of each domain's, and the predictions asked."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from gcalib.packing import Layout


@dataclass(frozen=True)
class Stream:
    """Packed rows of one stream of a batch, user after user, oldest first.

    `position` counts back from the newest slot (1), without a clock from the newest row of the stream; `pads` is how
    many pads official ABXI lets the row attend to.
    """

    items: Int[Tensor, " rows"]
    sequence: Int[Tensor, " rows"]
    seen: Int[Tensor, " rows"]
    slot: Int[Tensor, " rows"]
    position: Int[Tensor, " rows"]
    pads: Int[Tensor, " rows"]
    layout: Layout


@dataclass(frozen=True)
class Queries:
    """Predictions asked of one domain: the mixed row and the domain's own row (-1: no item of it yet) behind each.

    `last` finds the queries at users' newest slots (in evaluation, one a user); `targets` holds the item ids that
    follow, 0 where unknown.
    """

    mixed_row: Int[Tensor, " queries"]
    own_row: Int[Tensor, " queries"]
    sequence: Int[Tensor, " queries"]
    slot: Int[Tensor, " queries"]
    targets: Int[Tensor, " queries"]
    last: Int[Tensor, " users"]

    def newest(self) -> Queries:
        """Only the newest query of each user (evaluation, where every user has one)."""
        rows = self.last
        return Queries(
            self.mixed_row[rows], self.own_row[rows], self.sequence[rows], self.slot[rows], self.targets[rows],
            torch.arange(len(rows), device=rows.device),
        )  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """One batch of users: the streams (mixed, A, B) and the predictions asked in A and in B.

    Without a common clock the mixed stream is empty (`gcalib.data.clockless`).

    `users` names them by their number in the pair, where that is known (in training).
    """

    size: int
    mixed: Stream
    own: tuple[Stream, Stream]
    queries: tuple[Queries, Queries]
    users: Int[Tensor, " size"] | None = None

    @property
    def rows(self) -> int:
        """Real positions over the three streams."""
        return sum(len(stream.items) for stream in (self.mixed, *self.own))

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        return _moved(self, device)


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, tuple):
        return tuple(_moved(part, device) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{field.name: _moved(getattr(value, field.name), device) for field in fields(value)})
    return value

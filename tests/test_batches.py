"""Batches against a slow reference that looks at one user, one slot and one row at a time."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gcalib.data.batches import Batch, length_batches, make_batch, shuffled_batches

NUM_A, NUM_B = 6, 7
SEQUENCES = st.lists(st.lists(st.integers(1, NUM_A + NUM_B), min_size=2, max_size=10), min_size=1, max_size=4)

Row = dict[str, int]


def domain(item: int) -> int:
    return 0 if item <= NUM_A else 1


def rows_of_user(events: list[int], slots: int, of: int | None, window: int, tails: bool, published: bool) -> list[Row]:
    """The rows of one stream of one user; `of` is the domain, None for the mixed stream."""
    rows: list[Row] = []
    for e in range(slots):
        if of is None:
            slot = e
        elif domain(events[e]) != of:
            continue
        else:
            later = [t for t in range(e + 1, len(events)) if domain(events[t]) == of]
            if not later and not tails:
                continue
            slot = later[0] - 1 if later else slots - 1
        rows.append({"items": events[e], "seen": e, "slot": slot})
    # the padded form of the official code: the newest slot in the last column, one column a slot, zero where no row is
    columns = [0] * window
    for row in rows:
        columns[window - slots + row["slot"]] = row["items"]
    for rank, row in enumerate(rows):
        own = window - slots + row["slot"]
        row["pads"] = columns[: own + 1].count(0)
        row["position"] = len(rows) - rank if published else slots - row["seen"]
    return rows


def reference(sequences: list[list[int]], window: int, training: bool, tails: bool, published: bool) -> dict[str, Any]:
    """All that `make_batch` should return, as lists."""
    streams: dict[str, list[Row]] = {"mixed": [], "a": [], "b": []}
    queries: dict[str, list[Row]] = {"a": [], "b": []}
    last: dict[str, list[int]] = {"a": [], "b": []}
    for user, sequence in enumerate(sequences):
        events = sequence[-(window + 1) :] if training else sequence[-window:]
        slots = len(events) - 1 if training else len(events)
        mixed_start = len(streams["mixed"])
        mixed = rows_of_user(events, slots, None, window, True, False)
        streams["mixed"] += [{**row, "sequence": user} for row in mixed]
        for of, name in enumerate("ab"):
            start = len(streams[name])
            own = rows_of_user(events, slots, of, window, tails or not training, published)
            streams[name] += [{**row, "sequence": user} for row in own]
            for slot in range(slots):
                target = events[slot + 1] if slot + 1 < len(events) else 0
                if target == 0 or domain(target) == of:
                    behind = [start + r for r, row in enumerate(own) if row["slot"] == slot]
                    assert len(behind) <= 1
                    if slot == slots - 1:
                        last[name].append(len(queries[name]))
                    queries[name].append(
                        {"mixed_row": mixed_start + slot, "own_row": behind[0] if behind else -1, "sequence": user,
                         "slot": slot, "targets": target}
                    )  # fmt: skip
    return {"streams": streams, "queries": queries, "last": last}


@settings(max_examples=300, deadline=None)
@given(SEQUENCES, st.integers(1, 10), st.booleans(), st.booleans(), st.booleans())
def test_batches_equal_the_reference(
    sequences: list[list[int]], window: int, training: bool, tails: bool, published: bool
) -> None:
    batch = make_batch(
        [np.array(s) for s in sequences], NUM_A, window=window, training=training, tails=tails, as_published=published
    )
    expected = reference(sequences, window, training, tails, published)
    assert batch.size == len(sequences)
    for name, stream in (("mixed", batch.mixed), ("a", batch.own[0]), ("b", batch.own[1])):
        rows = expected["streams"][name]
        for field in ("items", "sequence", "seen", "slot", "position", "pads"):
            found = getattr(stream, field)
            assert found.dtype == torch.int64 and found.tolist() == [row[field] for row in rows], (name, field)
        assert torch.equal(stream.layout.index // stream.layout.length, stream.sequence)
        assert (stream.slot >= stream.seen).all()
    for name, queries in zip("ab", batch.queries, strict=True):
        rows = expected["queries"][name]
        for field in ("mixed_row", "own_row", "sequence", "slot", "targets"):
            assert getattr(queries, field).tolist() == [row[field] for row in rows], (name, field)
        assert queries.last.tolist() == expected["last"][name]
    assert batch.rows == sum(map(len, expected["streams"].values()))


def test_a_batch_by_hand() -> None:
    """A1 B1 B2 A2 B3 in training: three predictions in B and one in A, each behind the domain's previous item."""
    batch = make_batch([np.array([1, 7, 8, 2, 9])], NUM_A, window=5, training=True)
    of_a, of_b = batch.own
    assert batch.mixed.items.tolist() == [1, 7, 8, 2] and batch.mixed.position.tolist() == [4, 3, 2, 1]
    assert of_a.items.tolist() == [1] and of_a.slot.tolist() == [2] and of_a.position.tolist() == [4]
    assert of_b.items.tolist() == [7, 8] and of_b.seen.tolist() == [1, 2] and of_b.slot.tolist() == [1, 3]
    asked_a, asked_b = batch.queries
    assert asked_a.targets.tolist() == [2] and asked_a.own_row.tolist() == [0]
    assert asked_b.targets.tolist() == [7, 8, 9] and asked_b.own_row.tolist() == [-1, 0, 1]
    with_tails = make_batch([np.array([1, 7, 8, 2, 9])], NUM_A, window=5, training=True, tails=True)
    assert with_tails.own[0].items.tolist() == [1, 2] and with_tails.own[0].slot.tolist() == [2, 3]
    assert with_tails.own[1].items.tolist() == [7, 8]  # the last event is a target, no tail


@settings(max_examples=100, deadline=None)
@given(SEQUENCES, st.integers(1, 10), st.booleans())
def test_the_newest_queries_are_one_a_user(sequences: list[list[int]], window: int, published: bool) -> None:
    batch = make_batch(
        [np.array(s) for s in sequences], NUM_A, window=window, training=False, as_published=published
    )
    for of, queries in enumerate(batch.queries):
        newest = queries.newest()
        assert newest.sequence.tolist() == newest.last.tolist() == list(range(len(sequences)))
        assert newest.targets.tolist() == [0] * len(sequences)
        assert batch.mixed.items[newest.mixed_row].tolist() == [s[-1] for s in sequences]
        for user, row in enumerate(newest.own_row.tolist()):
            own = [item for item in sequences[user][-window:] if domain(item) == of]
            assert (batch.own[of].items[row].item() == own[-1]) if own else row == -1


def test_bad_batches_are_refused_with_the_lengths() -> None:
    with pytest.raises(ValueError, match=r"needs users with at least 2 event.* got lengths \[3, 1\]"):
        make_batch([np.array([1, 2, 7]), np.array([1])], NUM_A, window=5, training=True)
    with pytest.raises(ValueError, match=r"needs users with at least 1 event.* got lengths \[0\]"):
        make_batch([np.array([], dtype=np.int64)], NUM_A, window=5, training=False)
    with pytest.raises(ValueError, match=r"needs users .* got lengths \[\]"):
        make_batch([], NUM_A, window=5, training=True)


def tensors_of(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, tuple):
        return [tensor for part in value for tensor in tensors_of(part)]
    return [t for f in fields(value) for t in tensors_of(getattr(value, f.name))] if is_dataclass(value) else []


def test_a_batch_moves_as_a_whole() -> None:
    batch = make_batch([np.array([1, 7, 8, 2, 9])], NUM_A, window=5, training=True)
    moved = batch.to("meta")
    assert isinstance(moved, Batch) and moved.size == 1 and moved.own[1].layout.length == 2
    assert len(tensors_of(moved)) == len(tensors_of(batch)) == 3 * 7 + 2 * 6
    assert all(tensor.device.type == "meta" for tensor in tensors_of(moved))
    assert all(map(torch.equal, tensors_of(batch.to("cpu")), tensors_of(batch)))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(2, 9), min_size=1, max_size=60), st.integers(1, 20), st.none() | st.integers(0, 9))
def test_an_epoch_visits_every_user_once_in_batches_of_like_length(
    lengths: list[int], batch_size: int, seed: int | None
) -> None:
    of_user = np.array(lengths)
    generator = None if seed is None else np.random.default_rng(seed)
    batches = list(length_batches(of_user, batch_size, generator))
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    sizes = [len(users) for users in batches]
    assert min(sizes) > 0 and max(sizes) <= batch_size
    assert sum(size < batch_size for size in sizes) <= (1 if seed is None else 2)
    spans = sorted((of_user[users].min(), of_user[users].max()) for users in batches)
    assert all(first[1] <= second[0] for first, second in zip(spans, spans[1:], strict=False))
    if seed is None:
        order = np.concatenate(batches)
        assert order.tolist() == sorted(order.tolist(), key=lambda user: (lengths[user], user))


def test_an_epoch_s_batches_and_their_order_are_random_and_follow_the_generator() -> None:
    lengths = np.repeat([3, 5, 8], 40)

    def epoch(seed: int) -> list[list[int]]:
        return [users.tolist() for users in length_batches(lengths, 10, np.random.default_rng(seed))]

    assert epoch(1) == epoch(1)
    first, second = epoch(1), epoch(2)
    assert {frozenset(users) for users in first} != {frozenset(users) for users in second}
    means = [lengths[users].mean() for users in first]
    assert means != sorted(means)
    generator = np.random.default_rng(0)
    smallest = [min(map(len, length_batches(lengths, 10, generator))) for _ in range(20)]
    assert len(set(smallest)) > 1  # the short batches are not always the same


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 9))
def test_shuffled_batches_visit_every_user_once_and_differ_between_epochs(
    users: int, batch_size: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    first, second = (list(shuffled_batches(users, batch_size, generator)) for _ in range(2))
    for batches in (first, second):
        assert sorted(np.concatenate(batches).tolist()) == list(range(users))
        assert all(len(part) == batch_size for part in batches[:-1]) and 0 < len(batches[-1]) <= batch_size
    if users >= 20:
        assert np.concatenate(first).tolist() != np.concatenate(second).tolist()

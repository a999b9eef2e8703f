"""Batches against a slow reference that looks at one user and one event at a time."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gcalib.data.batches import (
    NEVER,
    Batch,
    Stream,
    batches_of_users,
    collate,
    events_per_domain,
    rows_at,
    shuffled_batches,
)
from gcalib.data.synthetic import synthetic_pair

NUM_A, NUM_B = 6, 7
OF_A, OF_B = st.integers(1, NUM_A), st.integers(NUM_A + 1, NUM_A + NUM_B)
ORDERED = st.lists(st.lists(OF_A | OF_B, min_size=2, max_size=10), min_size=1, max_size=4)
PER_DOMAIN = st.lists(
    st.tuples(st.lists(OF_A, max_size=6), st.lists(OF_B, max_size=6)).filter(any), min_size=1, max_size=4
)
PAD = {"items": 0, "position": NEVER, "query_position": -1, "recency": 0, "targets": 0, "predicts": False}

Rows = dict[int, dict[str, int | bool]]  # by column


def rows_of_domain(
    events: list[int], inputs: int, domain: int, training: bool, keep_last_item: bool, recency_in_domain: bool
) -> Rows:
    """A domain's stream of one user, where the order of all events is known; the first `inputs` are the history."""
    rows: Rows = {}
    mine = [place for place, item in enumerate(events) if (item > NUM_A) == domain]
    held = [place for place in mine if place < inputs]
    for column, place in enumerate(held, start=1):
        newest = place == mine[-1]  # no event of the domain follows
        if not (training and newest) or keep_last_item:
            rows[column] = {**PAD, "items": events[place], "position": place, "query_position": inputs - 1}
    for column, row in rows.items():
        row["recency"] = len(rows) - column + 1 if recency_in_domain else inputs - held[column - 1]
    # the prediction of event `place` is made from the domain's newest row before it, and may depend on all before it
    for place in range(1, inputs + 1):
        known = place < len(events)
        if (events[place] > NUM_A) == domain if known else not training:
            row = rows.setdefault(sum(earlier < place for earlier in mine), dict(PAD))
            row |= {"query_position": place - 1, "targets": events[place] if known else 0, "predicts": True}
    return rows


def reference(sequences: list[list[int]], window: int, training: bool, **options: bool) -> list[list[Rows]]:
    """The rows of the mixed stream, of A and of B, of each user."""
    mixed, a, b = [], [], []
    for sequence in sequences:
        events = sequence[-(window + 1) :] if training else sequence[-window:]
        inputs = len(events) - 1 if training else len(events)
        mixed.append({
            place: {
                "items": events[place], "position": place, "query_position": place, "recency": inputs - place,
                "targets": ([*events, 0])[place + 1], "predicts": True,
            }
            for place in range(inputs)
        })  # fmt: skip
        a.append(rows_of_domain(events, inputs, 0, training, **options))
        b.append(rows_of_domain(events, inputs, 1, training, **options))
    return [mixed, a, b]


def reference_per_domain(users: list[tuple[list[int], list[int]]], window: int, training: bool) -> list[list[Rows]]:
    streams: list[list[Rows]] = [[{} for _ in users]]
    for domain in (0, 1):
        streams.append([])
        for user in users:
            events = user[domain][-(window + 1) :] if training else user[domain][-window:]
            inputs = events[:-1] if training and len(events) > 1 else events
            rows: Rows = {
                column: {
                    "items": item, "position": 0, "query_position": 0, "recency": len(inputs) - column + 1,
                    "targets": ([*events, 0])[column], "predicts": not training or column < len(events),
                }
                for column, item in enumerate(inputs, start=1)
            }  # fmt: skip
            if not training and not events:
                rows[0] = {**PAD, "query_position": 0, "predicts": True}
            streams[-1].append(rows)
    return streams


def assert_streams(batch: Batch, expected: list[list[Rows]]) -> None:
    for stream, users in zip((batch.mixed, *batch.domains), expected, strict=True):
        length = 1 + max((column for rows in users for column in rows), default=0)
        for field in PAD:
            wanted = [[rows.get(column, PAD)[field] for column in range(length)] for rows in users]
            found = getattr(stream, field)
            assert found.dtype == (torch.bool if field == "predicts" else torch.int64)
            assert found.tolist() == wanted, field


# ------------------------------------------------------------------------------------------------------- collate


@settings(max_examples=300, deadline=None)
@given(ORDERED, st.integers(1, 10), st.booleans(), st.booleans(), st.booleans())
def test_collate_is_the_reference(
    sequences: list[list[int]], window: int, training: bool, keep_last_item: bool, recency_in_domain: bool
) -> None:
    options = {"keep_last_item": keep_last_item, "recency_in_domain": recency_in_domain}
    batch = collate([np.array(s) for s in sequences], NUM_A, window=window, training=training, **options)
    assert batch.size == len(sequences)
    assert_streams(batch, reference(sequences, window, training, **options))


@settings(max_examples=200, deadline=None)
@given(PER_DOMAIN, st.integers(1, 7), st.booleans(), st.booleans())
def test_collate_is_the_reference_without_a_global_order(
    users: list[tuple[list[int], list[int]]], window: int, training: bool, keep_last_item: bool
) -> None:
    """Without an order across domains a domain's only item is kept anyway."""
    sequences = [np.array(a + b, dtype=np.int64) for a, b in users]
    batch = collate(
        sequences, NUM_A, window=window, training=training, keep_last_item=keep_last_item, global_order=False
    )
    assert batch.size == len(users)
    assert_streams(batch, reference_per_domain(users, window, training))


def test_a_batch_by_hand() -> None:
    """The example of the module's docstring: a1 b1 b2 a2 b3, as 1 7 8 2 9."""
    batch = collate([np.array([1, 7, 8, 2, 9])], NUM_A, window=5, training=True, users=np.array([4]))
    x, a, b = batch.mixed, *batch.domains
    assert x.items.tolist() == [[1, 7, 8, 2]]
    assert (a.items.tolist(), a.query_position.tolist(), a.targets.tolist()) == ([[0, 1]], [[-1, 2]], [[0, 2]])
    assert a.recency.tolist() == [[0, 4]]
    assert a.predicts.tolist() == [[False, True]]
    assert (b.items.tolist(), b.position.tolist()) == ([[0, 7, 8]], [[NEVER, 1, 2]])
    assert (b.query_position.tolist(), b.targets.tolist()) == ([[0, 1, 3]], [[7, 8, 9]])
    assert batch.users.tolist() == [4]


def test_the_last_item_of_a_domain_is_kept_on_request_and_predicts_nothing() -> None:
    batch = collate([np.array([1, 7, 8, 2, 9])], NUM_A, window=5, training=True, keep_last_item=True)
    assert batch.a.items.tolist() == [[0, 1, 2]]
    assert batch.a.predicts.tolist() == [[False, True, False]]
    assert batch.a.query_position.tolist() == [[-1, 2, 3]]
    assert batch.a.last.tolist() == [2]
    assert batch.b.items.tolist() == [[0, 7, 8]]  # the last event is a target only


@settings(max_examples=100, deadline=None)
@given(PER_DOMAIN, st.integers(1, 9))
def test_training_rows_are_the_evaluation_rows_of_what_comes_before_the_last_events(
    users: list[tuple[list[int], list[int]]], window: int
) -> None:
    """Without a global order, in each domain."""
    def cut(events: list[int]) -> list[int]:
        return events[:-1] if len(events) > 1 else events

    whole = [np.array(a + b, dtype=np.int64) for a, b in users]
    shorter = [np.array(cut(a) + cut(b), dtype=np.int64) for a, b in users]
    training = collate(whole, NUM_A, window=window, training=True, global_order=False)
    evaluation = collate(shorter, NUM_A, window=window, training=False, global_order=False)
    for first, second in zip(training.domains, evaluation.domains, strict=True):
        assert torch.equal(first.items, second.items)
        assert torch.equal(first.recency, second.recency)
        assert torch.equal(first.position[first.mask], second.position[second.mask])


@pytest.mark.parametrize(
    ("sequences", "training", "global_order", "message"),
    [
        ([[1, 2, 7], [1]], True, True, r"users with 2 events or more; it has \[3, 1\]"),
        ([[1], []], False, True, r"users with 1 events or more; it has \[1, 0\]"),
        ([[1], []], True, False, r"users with 1 events or more; it has \[1, 0\]"),
        ([], True, True, r"it has \[\]"),
    ],
)
def test_batches_without_enough_events_are_refused(
    sequences: list[list[int]], training: bool, global_order: bool, message: str
) -> None:
    arrays = [np.array(sequence, dtype=np.int64) for sequence in sequences]
    with pytest.raises(ValueError, match=message):
        collate(arrays, NUM_A, window=5, training=training, global_order=global_order)


# ----------------------------------------------------------------------------------------- what a batch can be asked


@settings(max_examples=60, deadline=None)
@given(ORDERED, st.integers(1, 10))
def test_the_newest_rows_are_each_user_s_last_item(sequences: list[list[int]], window: int) -> None:
    batch = collate([np.array(s) for s in sequences], NUM_A, window=window, training=False)
    for stream, domains in ((batch.mixed, (0, 1)), (batch.a, (0,)), (batch.b, (1,))):
        newest = stream.newest(stream.items.unsqueeze(2).double())
        mine = [[item for item in s[-window:] if int(item > NUM_A) in domains] for s in sequences]
        assert newest.tolist() == [[[items[-1] if items else 0]] for items in mine]
        assert stream.newest_mask.tolist() == [[bool(items)] for items in mine]
        assert stream.predicts[torch.arange(batch.size), stream.last].all()
        assert stream.mask.sum(dim=1).tolist() == list(map(len, mine))


@pytest.mark.parametrize("global_order", [True, False])
def test_history_items_are_all_items_of_the_training_sequences(global_order: bool) -> None:
    sequences = [np.array([3, 12, 4, 5, 15]), np.array([11, 1, 2, 13])]
    batch = collate(sequences, 10, window=47, training=True, global_order=global_order)
    assert [set(row[row > 0].tolist()) for row in batch.history_items] == [set(s.tolist()) for s in sequences]


def test_rows_at_picks_columns_of_each_user() -> None:
    h, column = torch.arange(24.0).view(2, 4, 3), torch.tensor([[3, 0], [1, 1]])
    assert torch.equal(rows_at(h, column), torch.stack([h[0, [3, 0]], h[1, [1, 1]]]))


def tensors_of(batch: Batch) -> list[torch.Tensor]:
    streams = [getattr(s, field.name) for s in (batch.mixed, *batch.domains) for field in fields(Stream)]
    return [*streams, batch.users]


def test_a_batch_moves_as_a_whole() -> None:
    batch = collate([np.array([1, 7, 8, 2, 9])], NUM_A, window=5, training=True, users=np.array([0]))
    assert {tensor.device.type for tensor in tensors_of(batch.to("meta"))} == {"meta"}
    assert all(map(torch.equal, tensors_of(batch.to("cpu")), tensors_of(batch)))


def test_a_batch_of_unknown_users_moves_too() -> None:
    assert collate([np.array([1, 7])], NUM_A, window=5, training=False).to("meta").users is None


# ------------------------------------------------------------------------------------------- the batches of an epoch

EVENTS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=60)


@settings(max_examples=100, deadline=None)
@given(EVENTS, st.integers(1, 20), st.none() | st.integers(0, 9))
def test_an_epoch_visits_every_user_once_in_batches_of_equal_size(
    events: list[tuple[int, int]], batch_size: int, seed: int | None
) -> None:
    generator = None if seed is None else np.random.default_rng(seed)
    batches = list(batches_of_users(np.array(events), batch_size, generator))
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(events)))
    assert len(batches) == -(-len(events) // batch_size)
    sizes = [len(batch) for batch in batches]
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1


@settings(max_examples=60, deadline=None)
@given(EVENTS)
def test_users_are_halved_by_the_number_of_events_that_leaves_the_fewest_pads(events: list[tuple[int, int]]) -> None:
    def rows(users: list[tuple[int, int]]) -> int:
        return len(users) * (max(a for a, _ in users) + max(b for _, b in users) + max(map(sum, users)))

    users, half = events * 2, len(events)
    ways = [sorted(users, key=key) for key in (lambda user: user[0], lambda user: user[1], sum)]
    fewest = min(rows(way[:half]) + rows(way[half:]) for way in ways)
    batches = batches_of_users(np.array(users), half, None)
    assert sum(rows([users[user] for user in batch]) for batch in batches) == fewest


def epoch(seed: int | None) -> list[list[int]]:
    events = np.repeat([[3, 1], [4, 4], [2, 9]], 40, axis=0)
    generator = None if seed is None else np.random.default_rng(seed)
    return [batch.tolist() for batch in batches_of_users(events, 10, generator)]


@pytest.mark.parametrize("seed", [None, 1])
def test_the_same_generator_gives_the_same_batches(seed: int | None) -> None:
    assert epoch(seed) == epoch(seed)


def test_which_of_equal_users_share_a_batch_is_random() -> None:
    assert {frozenset(users) for users in epoch(1)} != {frozenset(users) for users in epoch(2)}
    assert all(max(users) // 40 == min(users) // 40 for users in epoch(1))


def test_the_order_of_batches_is_random() -> None:
    means = [np.mean(users) for users in epoch(1)]  # equal users are numbered one after the other
    assert means != sorted(means)


def test_events_per_domain_are_those_of_each_history() -> None:
    split = PAIR.split("val")
    found = events_per_domain(PAIR, split)
    expected = [[int((h <= PAIR.num_items[0]).sum()), int((h > PAIR.num_items[0]).sum())] for h in HISTORIES]
    assert found.tolist() == expected


def pads_ratio(batches: list[np.ndarray]) -> float:
    """Rows of all streams over real rows, in training."""
    rows, real = 0, 0
    for users in batches:
        batch = collate([HISTORIES[user] for user in users], PAIR.num_items[0], window=47, training=True)
        for stream in (batch.mixed, *batch.domains):
            rows += stream.items.numel()
            real += int(stream.mask.sum())
    return rows / real


PAIR = synthetic_pair()
HISTORIES = [PAIR.split("val").history(user) for user in range(PAIR.num_users)]


def test_batches_of_like_users_hold_few_pads() -> None:
    generator, events = np.random.default_rng(0), events_per_domain(PAIR, PAIR.split("val"))
    like = pads_ratio(list(batches_of_users(events, 64, generator)))
    assert like < 1.5
    assert like < 0.6 * pads_ratio(list(shuffled_batches(len(events), 64, generator)))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 9))
def test_shuffled_batches_visit_every_user_once(users: int, batch_size: int, seed: int) -> None:
    batches = list(shuffled_batches(users, batch_size, np.random.default_rng(seed)))
    assert sorted(np.concatenate(batches).tolist()) == list(range(users))
    assert {len(batch) for batch in batches[:-1]} <= {batch_size}
    assert 0 < len(batches[-1]) <= batch_size


def test_shuffled_batches_differ_between_epochs() -> None:
    generator = np.random.default_rng(0)
    first, second = (np.concatenate(list(shuffled_batches(60, 20, generator))) for _ in range(2))
    assert first.tolist() != second.tolist()

"""Preparation: every step that drops or reorders events does what its description says, and counts it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gcalib.data import DataError, Pair
from gcalib.data.prepare import Events, Options, drop_below_k_core, drop_repeats, finish, match

PUBLISHED = Options(ties="published", min_per_domain=1)


def table(*events: tuple[int, int, int], num_items: int = 12) -> Events:
    """Events from (user, item, time), in the order given."""
    owner, items, times = (np.array(column, dtype=np.int64) for column in zip(*events, strict=True))
    users = np.array([f"u{user}" for user in range(int(owner.max()) + 1)], dtype=object)
    return Events(owner, items, times, users, np.array([f"i{n:02}" for n in range(1, 1 + num_items)], dtype=object))


def done(events: Events, options: Options = PUBLISHED, has_clock: bool = True, raw: bool = False) -> Pair:
    return finish(
        events, name="toy", domains=("a", "b"), num_items=(6, 6), has_clock=has_clock, options=options, raw=raw
    )


def test_repeats_keep_the_first_and_tell_duplicates_from_later_purchases():
    kept = drop_repeats(table((0, 1, 5), (0, 1, 5), (0, 2, 6), (0, 1, 9), (1, 1, 5), (1, 7, -1), (1, 7, -1)))
    assert list(zip(kept.owner, kept.items, kept.times, strict=True)) == [
        (0, 1, 5), (0, 2, 6), (1, 1, 5), (1, 7, -1)
    ]  # fmt: skip
    assert kept.counts == {"duplicate_events": 1, "repeated_events": 2}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 12)), min_size=1, max_size=60), st.integers(1, 4))
def test_k_core_is_the_largest_subset_with_k_of_everything(edges, k):
    events = table(*((user, item, 0) for user, item in sorted(set(edges))))
    kept = drop_below_k_core(events, k, num_items_a=6)
    left = set(edges)
    while True:  # one at a time: slow, and plainly right
        weak = [
            (u, i)
            for u, i in left
            if sum(v == u and (j > 6) == (i > 6) for v, j in left) < k or sum(j == i for _, j in left) < k
        ]
        if not weak:
            break
        left.remove(weak[0])
    assert set(zip(kept.owner.tolist(), kept.items.tolist(), strict=True)) == left
    assert kept.counts == {"events_below_k_core": len(set(edges)) - len(left)}


def one_user(items: list[int], times: list[int]) -> Events:
    return table(*((0, item, time) for item, time in zip(items, times, strict=True)))


def test_published_ties_keep_the_order_and_shuffled_ones_move_inside_a_day_only():
    items, times = [1, 2, 7, 8, 9, 3, 4, 10], [0, 1, 1, 1, 1, 2, 2, 3]
    events = one_user(items, times)
    assert done(events).items.tolist() == items
    assert done(events).counts["tied_events"] == 6
    orders = [done(events, Options(tie_seed=seed, min_per_domain=1)).items for seed in range(200)]
    for order in orders:
        assert order[0] == 1 and set(order[1:5]) == {2, 7, 8, 9} and set(order[5:7]) == {3, 4} and order[7] == 10
    # Item 2 stands first of its day one time in four: 200 draws leave 50 +- 4 standard deviations of 6.
    assert 26 <= sum(order[1] == 2 for order in orders) <= 74
    assert (done(events, Options(tie_seed=3)).items == done(events, Options(tie_seed=3)).items).all()


def test_without_a_clock_ties_are_known_times_of_one_domain():
    items, times = [1, 2, 3, 7, 8, 9], [5, -1, -1, 5, 5, 6]
    events = one_user(items, times)
    orders = {tuple(done(events, Options(tie_seed=s), has_clock=False).items.tolist()) for s in range(30)}
    assert orders == {(1, 2, 3, 7, 8, 9), (1, 2, 3, 8, 7, 9)}
    assert done(events, Options(), has_clock=False).counts["tied_events"] == 2


def test_maximum_length_keeps_the_newest():
    events = one_user([1, 2, 7, 3, 8, 4, 9], list(range(7)))
    pair = done(events, Options(max_length=5))
    assert pair.items.tolist() == [7, 3, 8, 4, 9]
    assert pair.times.tolist() == [2, 3, 4, 5, 6]
    assert pair.counts["events_beyond_max_length"] == 2


def test_maximum_length_without_a_clock_holds_for_each_domain():
    events = one_user([1, 2, 3, 4, 5, 7, 8, 9], [-1] * 5 + [1, 2, 3])
    pair = done(events, Options(max_length=4), has_clock=False)
    assert pair.items.tolist() == [2, 3, 4, 5, 7, 8, 9]
    assert not pair.has_clock
    assert pair.counts["events_beyond_max_length"] == 1


def test_minimum_applies_after_the_cut_and_drops_users():
    first = [(0, item, time) for time, item in enumerate([7, 8, 1, 2, 3, 4])]
    second = [(1, item, time) for time, item in enumerate([1, 2, 7, 8])]
    events = table(*first, *second)
    assert done(events).num_users == 2
    pair = done(events, Options(max_length=4))  # the newest four of the first user are all of A
    assert pair.num_users == 1 and sorted(pair.items) == [1, 2, 7, 8]
    assert pair.counts["users_below_minimum"] == 1
    with pytest.raises(DataError, match="no user is left with 3 events in each domain.*users_below_minimum 2"):
        done(events, Options(min_per_domain=3))


def test_prepared_files_keep_their_ids_and_raw_ones_are_numbered_anew():
    events = one_user([5, 2, 12, 9], [0, 1, 2, 3])
    kept = done(events)
    assert kept.items.tolist() == [5, 2, 12, 9] and kept.num_items == (6, 6)
    compact = done(events, raw=True)
    assert compact.items.tolist() == [2, 1, 4, 3] and compact.num_items == (2, 2)
    assert compact.item_names.tolist() == ["i02", "i05", "i09", "i12"]


def domain(rows: dict[str, list[tuple[str, int]]]) -> Events:
    """A single-domain table from user -> [(item, time), ...]."""
    users, names = sorted(rows), sorted({item for row in rows.values() for item, _ in row})
    flat = [(u, names.index(item) + 1, time) for u, user in enumerate(users) for item, time in rows[user]]
    owner, items, times = (np.array(column, dtype=np.int64) for column in zip(*flat, strict=True))
    return Events(owner, items, times, np.array(users, dtype=object), np.array(names, dtype=object))


def test_two_files_are_matched_by_user_and_merged_by_time():
    a = domain({"u1": [("p", 1), ("q", 4), ("both", 5)], "u2": [("p", 3), ("r", 3)], "only": [("both", 1)]})
    b = domain({"u2": [("x", 2), ("y", 3)], "u1": [("x", 4), ("both", 6), ("z", 9)], "lone": [("z", 1), ("x", 2)]})
    events, sizes, has_clock = match(a, b, k_core=1)
    assert has_clock
    names = events.item_names
    assert events.users.tolist() == ["u1", "u2"]
    streams = [[names[item - 1] for item in events.items[events.owner == user]] for user in (0, 1)]
    assert streams == [["p", "q", "x", "z"], ["x", "p", "r", "y"]]  # ties: domain A first
    assert events.counts["users_in_one_domain"] == 2
    assert events.counts["items_in_both_domains"] == 1
    assert events.counts["events_of_items_in_both_domains"] == 2
    assert sizes == (4, 4)


def test_users_of_one_domain_are_let_in_when_asked_for():
    a = domain({"u1": [("p", 1), ("q", 4)], "u2": [("q", 3)], **{f"a{n}": [("p", n), ("q", 9)] for n in range(20)}})
    b = domain({"u1": [("x", 2)], **{f"b{n}": [("y", n)] for n in range(20)}})
    events, _, has_clock = match(a, b, k_core=1, one_domain=None)
    assert has_clock and len(events.users) == 42 and events.counts["users_in_one_domain"] == 0
    assert [events.item_names[i - 1] for i in events.items[events.owner == 41]] == ["q"]  # u2, the last by name
    some = [match(a, b, k_core=1, one_domain=10)[0] for _ in range(2)]
    assert some[0].users.tolist() == some[1].users.tolist() and len(some[0].users) == 11
    assert "u1" in some[0].users and some[0].counts["users_in_one_domain"] == 31
    assert {user[0] for user in some[0].users} == {"u", "a", "b"}
    least = Options(ties="published", min_per_domain=0)
    rows = one_user([1, 2, 3, 4], [0, 1, 2, 3])
    assert done(rows, least).num_users == 1
    with pytest.raises(DataError, match="no user is left with 1 events in each domain"):
        done(rows)


def test_two_files_without_all_times_have_no_common_clock():
    a = domain({"u1": [("p", -1), ("q", -1)], "u2": [("q", -1)]})
    b = domain({"u1": [("x", 1)], "u2": [("y", 7), ("x", 8)]})
    events, _, has_clock = match(a, b, k_core=1)
    assert not has_clock
    assert events.owner.tolist() == [0, 0, 0, 1, 1, 1]
    assert [events.item_names[i - 1] for i in events.items] == ["p", "q", "x", "q", "y", "x"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ties": "random"}, "ties='random' is unknown; it may be shuffle or published"),
        ({"max_length": 3}, "max_length=3 must be a whole number of 4 or more"),
        ({"k_core": 0}, "k_core=0"),
        ({"min_per_domain": -1}, "min_per_domain=-1"),
        ({"tie_seed": -1}, "tie_seed=-1"),
        ({"max_length": 50.0}, "max_length=50.0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Options(**options)

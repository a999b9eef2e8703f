"""Preparation: every step that drops or reorders events does what its description says, and counts it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from gcalib.data.pair import DataError, Pair
from gcalib.data.prepare import Events, Options, clean, finish, match


def table(*events: tuple) -> pd.DataFrame:
    """Events from (user, item, time), in the order given."""
    return pd.DataFrame(events, columns=["user", "item", "time"])


def done(events: pd.DataFrame, has_global_order: bool = True, matched: bool = False, **options) -> Pair:
    """A pair of items 1..6 of A and 7..12 of B; by default with ties as published, and one event in each domain."""
    names = np.array([f"i{n:02}" for n in range(1, 13)], dtype=object)
    read = Events(events, names, (6, 6), has_global_order, matched)
    asked = Options(**{"ties": "published", "min_per_domain": 1, **options})
    return finish(read, "toy", ("a", "b"), asked)


def one_user(items: list[int], times: list[int]) -> pd.DataFrame:
    return table(*((0, item, time) for item, time in zip(items, times, strict=True)))


def test_repeats_keep_the_first_event():
    events = [(0, 1, 5), (0, 1, 5), (0, 2, 6), (0, 1, 9), (1, 1, 5), (1, 7, -1), (1, 7, -1)]
    kept, counts = clean(table(*events))
    assert list(kept.itertuples(index=False, name=None)) == [(0, 1, 5), (0, 2, 6), (1, 1, 5), (1, 7, -1)]
    assert counts == {"duplicate_events": 1, "repeated_events": 2}


def test_ties_published_keep_the_order():
    items = [1, 2, 7, 8, 9, 3, 4, 10]
    pair = done(one_user(items, [0, 1, 1, 1, 1, 2, 2, 3]))
    assert pair.items.tolist() == items
    assert pair.counts["tied_events"] == 6


def test_ties_shuffled_move_inside_a_time_only():
    """300 users of one sequence: item 2 stands first of its day one time in four, 75 times +- 4 deviations of 7.5."""
    events = [
        (user, *event) for user in range(300) for event in zip([1, 2, 7, 8, 9, 3], [0, 1, 1, 1, 1, 2], strict=True)
    ]
    rows = done(table(*events), ties="shuffle").items.reshape(300, 6)
    assert (rows[:, [0, 5]] == [1, 3]).all()
    assert (np.sort(rows[:, 1:5], axis=1) == [2, 7, 8, 9]).all()
    assert 45 <= (rows[:, 1] == 2).sum() <= 105


def test_ties_with_per_domain_order_are_known_times_of_one_domain():
    row = [(1, 5), (2, -1), (3, -1), (7, 5), (8, 5), (9, 6)]
    events = [(user, *event) for user in range(30) for event in row]
    pair = done(table(*events), has_global_order=False, ties="shuffle")
    assert {tuple(row) for row in pair.items.reshape(30, 6)} == {(1, 2, 3, 7, 8, 9), (1, 2, 3, 8, 7, 9)}
    assert pair.counts["tied_events"] == 60


def test_max_length_keeps_the_newest():
    pair = done(one_user([1, 2, 7, 3, 8, 4, 9], list(range(7))), max_length=5)
    assert pair.items.tolist() == [7, 3, 8, 4, 9]
    assert pair.times.tolist() == [2, 3, 4, 5, 6]
    assert pair.counts["events_beyond_max_length"] == 2


def test_max_length_with_per_domain_order_holds_for_each_domain():
    events = one_user([1, 2, 3, 4, 5, 7, 8, 9], [-1] * 5 + [1, 2, 3])
    pair = done(events, has_global_order=False, max_length=4)
    assert pair.items.tolist() == [2, 3, 4, 5, 7, 8, 9]
    assert pair.counts["events_beyond_max_length"] == 1


TWO = table(*((0, i, t) for t, i in enumerate([7, 8, 1, 2, 3, 4])), *((1, i, t) for t, i in enumerate([1, 2, 7, 8])))


def test_minimum_applies_after_the_cut():
    pair = done(TWO, max_length=4)  # the newest four of the first user are all of A
    assert pair.items.tolist() == [1, 2, 7, 8]
    assert pair.counts["users_below_minimum"] == 1


def test_minimum_of_zero_lets_in_users_of_one_domain():
    assert done(TWO, max_length=4, min_per_domain=0).num_users == 2


def test_minimum_that_leaves_nobody():
    with pytest.raises(DataError, match="toy: no event of a is left; users need 3 .*users_below_minimum 2.*Lower min"):
        done(TWO, min_per_domain=3)


def test_minimum_that_leaves_one_domain_empty():
    with pytest.raises(DataError, match="no event of b is left; users need 0 events in each domain, 4 in all"):
        done(one_user([1, 2, 3, 4], [0, 1, 2, 3]), min_per_domain=0)


@pytest.mark.parametrize(("has_global_order", "least"), [(True, 1), (False, 3)])
def test_minimum_of_a_prepared_file_follows_its_order(has_global_order, least):
    events = table(*((0, i, 0) for i in (1, 2, 3, 7, 8, 9)), *((1, i, 0) for i in (1, 2, 3, 7, 8)))
    pair = done(events, has_global_order, min_per_domain=None)
    assert pair.num_users == (2 if least == 1 else 1)


def test_item_ids_of_a_prepared_file_are_kept():
    pair = done(one_user([5, 2, 12, 9], [0, 1, 2, 3]))
    assert pair.items.tolist() == [5, 2, 12, 9]
    assert pair.num_items == (6, 6)


def test_item_ids_of_matched_files_are_given_anew():
    pair = done(one_user([5, 2, 12, 9], [0, 1, 2, 3]), matched=True)
    assert pair.items.tolist() == [2, 1, 4, 3]
    assert pair.num_items == (2, 2)
    assert pair.item_names.tolist() == ["i02", "i05", "i09", "i12"]


def domain(**rows: list[tuple[str, int]]) -> pd.DataFrame:
    """Events of one domain from user=[(item, time), ...]."""
    return table(*((user, item, time) for user, row in rows.items() for item, time in row))


def streams(events: Events) -> list[list[str]]:
    names = events.item_names[events.table["item"] - 1]
    return [names[events.table["user"] == user].tolist() for user in events.table["user"].unique()]


def test_match_merges_users_of_both_by_time():
    a = domain(u2=[("p", 3), ("r", 3)], u1=[("p", 1), ("q", 4), ("both", 5)], only=[("both", 1)])
    b = domain(u1=[("x", 4), ("both", 6), ("z", 9)], u2=[("x", 2), ("y", 3)], lone=[("z", 1), ("x", 2)])
    events = match(a, b)
    assert events.has_global_order
    assert streams(events) == [["p", "q", "x", "z"], ["x", "p", "r", "y"]]  # ties: domain A first
    assert events.counts["users_in_one_domain"] == 2
    assert events.counts["items_in_both_domains"] == 1
    assert events.counts["events_of_items_in_both_domains"] == 2


def test_match_without_all_times_has_per_domain_order():
    events = match(domain(u1=[("p", -1), ("q", -1)], u2=[("q", -1)]), domain(u1=[("x", 1)], u2=[("y", 7), ("x", 8)]))
    assert not events.has_global_order
    assert streams(events) == [["p", "q", "x"], ["q", "y", "x"]]


ONE_SIDED = (
    domain(u1=[("p", 1), ("q", 4)], u2=[("q", 3)], **{f"a{n}": [("p", n)] for n in range(20)}),
    domain(u1=[("x", 2)], **{f"b{n}": [("y", n)] for n in range(20)}),
)


def test_match_lets_in_all_users_of_one_domain():
    events = match(*ONE_SIDED, one_domain=None)
    assert events.table["user"].nunique() == 42
    assert events.counts["users_in_one_domain"] == 0
    assert streams(events)[-1] == ["q"]  # u2, the last by name


def test_match_lets_in_a_fixed_sample_of_users_of_one_domain():
    some, again = (match(*ONE_SIDED, one_domain=10) for _ in range(2))
    assert some.table.equals(again.table)
    assert some.table["user"].nunique() == 11
    assert some.counts["users_in_one_domain"] == 31
    assert ["p", "x", "q"] in streams(some)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ties": "random"}, "ties='random' is unknown; it may be shuffle or published"),
        ({"max_length": 3}, "max_length=3 must be a whole number, 4 or more"),
        ({"min_per_domain": -1}, "min_per_domain=-1 must be a whole number, 0"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Options(**options)

"""Measures of order, on a pair small enough to count by hand, and on the built-in one."""

from __future__ import annotations

import numpy as np
import pytest

from gcalib import load_pair
from gcalib.data.measures import later_context, later_training, mixing, tied_targets
from gcalib.data.pair import Pair

DAY = 86_400


def pair_of(*users: list[tuple[int, int]], num_items: tuple[int, int] = (4, 4)) -> Pair:
    """Users as lists of (item, day)."""
    events = [event for user in users for event in user]
    return Pair(
        "tiny", ("a", "b"), np.array([item for item, _ in events]), DAY * np.array([day for _, day in events]),
        np.cumsum([0, *map(len, users)]), num_items, True, "published",
    )  # fmt: skip


TWO = pair_of(
    [(1, 10), (5, 12), (2, 15), (3, 15), (6, 40)],  # A B A A B
    [(7, 11), (8, 20), (1, 30), (4, 30)],  # B B A A, the target tied with the event before
)


def test_mixing_by_hand():
    found = mixing(TWO)
    # 3 switches of 4 neighbourhoods, 1 of 3
    assert found["switches"] == pytest.approx(4 / 7)
    assert found["switches_at_random"] == pytest.approx((2 * 3 * 2 / 5 + 2 * 2 * 2 / 4) / 7)
    # user 0: target of B on day 40, newest of B on 12, of A on 15; user 1: target of A on 30, of A on 30, of B on 20
    assert found["own_age_days"] == (28 + 0) / 2
    assert found["other_age_days"] == (25 + 10) / 2


def test_random_order_switches_as_often_as_expected():
    pair = load_pair("synthetic:num_users=400")
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(pair.num_users), pair.lengths)
    items = pair.items[np.lexsort((rng.random(len(owner)), owner))]
    shuffled = Pair("shuffled", pair.domains, items, pair.times, pair.offsets, pair.num_items, True, "shuffle")
    found = mixing(shuffled)
    assert found["switches"] == pytest.approx(found["switches_at_random"], abs=0.01)
    assert mixing(pair)["switches"] < found["switches"] - 0.03  # users of the built-in pair tend to stay


def test_tied_targets_by_hand():
    assert tied_targets(TWO) == pytest.approx(
        {"target_in_b": 0.5, "tied_larger_id": 1.0, "tied_a_after_b": 0.0, "untied_larger_id": np.nan}, nan_ok=True
    )


def test_shuffling_takes_the_order_out_of_ties():
    published, shuffled = (tied_targets(load_pair("synthetic", ties=ties)) for ties in ("published", "shuffle"))
    assert published["tied_larger_id"] == 1 and published["tied_a_after_b"] == 0
    assert 0.4 < shuffled["tied_larger_id"] < 0.6 and shuffled["tied_a_after_b"] > 0.1


def test_later_context_by_hand():
    # user 0: last of A on day 15, B on 12 and 40; user 1: last of A on day 30, B on 11 and 20
    found = later_context(TWO)
    assert found == {"users_affected": 0.5, "later_share": 0.25, "same_day_share": 0.0, "days_ahead": 25.0}
    assert np.isnan(later_context(pair_of([(1, 1), (5, 1), (2, 1), (3, 1)]))["days_ahead"])
    # three events of B, on days 12, 16 and 40: the last is B's own target, and no context
    three = pair_of([(1, 10), (5, 12), (2, 15), (6, 16), (7, 40)])
    assert later_context(three) == {"users_affected": 1.0, "later_share": 0.5, "same_day_share": 0.0, "days_ahead": 1.0}


def test_later_training_by_hand():
    # Training sees 1 (day 10), 5 (12), 2 (15) of user 0 and 7 (11), 8 (20) of user 1.
    assert later_training(TWO) == {"training_later": 0.0, "seen_only_later": pytest.approx(np.nan, nan_ok=True)}
    early = pair_of([(1, 1), (5, 2), (2, 3), (7, 4)], [(7, 11), (8, 20), (1, 30), (5, 40)])
    # Target 7 on day 4 is met on day 11 only, 5 on day 40 on day 2 already; 2 of the 4 training events follow day 4.
    assert later_training(early) == {"training_later": 0.25, "seen_only_later": 0.5}


@pytest.mark.parametrize("measure", [mixing, tied_targets, later_context, later_training])
def test_a_pair_without_a_clock_is_refused(measure):
    pair = Pair("split", ("a", "b"), np.array([1, 2, 3, 4]), np.full(4, -1), np.array([0, 4]), (2, 2), False, "shuffle")
    with pytest.raises(ValueError, match="split is a per-domain pair"):
        measure(pair)

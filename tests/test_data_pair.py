"""Pair: sequences, leave-one-out, unseen targets, sampled candidates, and the hash that results depend on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from gcalib.data import DataError, Pair, synthetic_pair


def make(sequences: list[list[int]], num_items: tuple[int, int] = (3, 4), **changes) -> Pair:
    """A pair of the given sequences, one event a day."""
    lengths = [len(sequence) for sequence in sequences]
    arguments = {
        "name": "toy",
        "domains": ("a", "b"),
        "items": np.array(sum(sequences, [])),
        "times": np.concatenate([np.arange(n) * 86_400 for n in lengths]),
        "offsets": np.concatenate([[0], np.cumsum(lengths)]),
        "num_items": num_items,
        "has_clock": True,
        "ties": "published",
    }
    return Pair(**{**arguments, **changes})


TOY = [[1, 4, 2, 5], [7, 6, 3, 4, 1]]


def test_sequences_are_views_in_order():
    pair = make(TOY)
    assert pair.num_users == 2
    assert pair.num_interactions == (4, 5)
    assert [pair.sequence(user).tolist() for user in range(2)] == TOY
    assert np.shares_memory(pair.sequence(1), pair.items)
    assert pair.lengths.tolist() == [4, 5]
    with pytest.raises(IndexError, match="users 0..1, not 2"):
        pair.sequence(2)


def test_domain_of_tells_both_domains_and_padding():
    domain = make(TOY).domain_of(np.array([[0, 1, 3], [4, 7, 0]]))
    assert domain.tolist() == [[-1, 0, 0], [1, 1, -1]]
    assert domain.dtype == np.int8


def test_leave_one_out():
    pair = make(TOY)
    test, val = pair.split("test"), pair.split("val")
    assert test.targets.tolist() == [5, 1]
    assert val.targets.tolist() == [2, 4]
    assert [test.history(user).tolist() for user in test.users] == [[1, 4, 2], [7, 6, 3, 4]]
    assert [val.history(user).tolist() for user in val.users] == [[1, 4], [7, 6, 3]]
    assert val.lengths.tolist() == [2, 3]
    assert len(val) == 2
    with pytest.raises(ValueError, match="no split 'train'; there are val and test"):
        pair.split("train")


def test_unseen_targets_are_those_outside_every_training_history():
    pair = make([*TOY, [1, 7, 6, 3]])
    seen = {item for user in range(3) for item in pair.split("val").history(user)}
    for name in ("val", "test"):
        expected = [target not in seen for target in pair.split(name).targets]
        assert pair.unseen_targets(name).tolist() == expected
    assert pair.unseen_targets("val").any() and not pair.unseen_targets("val").all()


def test_a_pair_without_a_clock_has_no_one_stream():
    with pytest.raises(DataError, match="ABXI needs one stream .* toy is a per-domain pair"):
        make([[1, 2, 4, 5]], has_clock=False).require_clock("ABXI")
    make(TOY).require_clock("ABXI")


# Users with 4 + 3, 3 + 1, 0 + 4 and 2 + 2 events; the last has no domain with a target.
PER_DOMAIN = [[1, 2, 3, 4, 11, 12, 13], [5, 6, 7, 14], [15, 16, 17, 18], [8, 9, 19, 20]]


def test_without_a_clock_each_domain_has_its_own_leave_one_out():
    pair = make(PER_DOMAIN, num_items=(10, 12), has_clock=False)
    test, val = pair.split("test"), pair.split("val")
    assert test.users.tolist() == val.users.tolist() == [0, 0, 1, 2] and len(test) == 4
    assert test.targets.tolist() == [4, 13, 7, 18] and val.targets.tolist() == [3, 12, 6, 17]
    histories = [[1, 2, 3, 11, 12], [5, 6, 14], [15, 16, 17], [8, 9, 19, 20]]
    assert [test.history(user).tolist() for user in range(4)] == histories
    # what training sees has neither the validation nor the test event of either domain
    histories = [[1, 2, 11], [5, 14], [15, 16], [8, 9, 19, 20]]
    assert [val.history(user).tolist() for user in range(4)] == histories
    assert val.lengths.tolist() == [3, 2, 2, 4] and val.history_items.tolist() == sum(histories, [])
    assert pair.unseen_targets("val").all()
    assert pair.in_both.tolist() == [True, True, False, True]
    seen = make([[1, 2, 3, 4], [3, 11, 1, 2]], num_items=(10, 12), has_clock=True)
    assert seen.unseen_targets("test").tolist() == [True, False]


def test_candidates_without_a_clock_are_drawn_for_each_target():
    pair = make(PER_DOMAIN, num_items=(10, 12), has_clock=False)
    drawn = pair.candidates("test", 6)
    assert drawn.shape == (4, 6)
    unseen = [{5, 6, 7, 8, 9, 10}, set(range(14, 23)), {1, 2, 3, 4, 8, 9, 10}, {11, 12, 13, 14, 19, 20, 21, 22}]
    for row, free in zip(drawn, unseen, strict=True):
        assert len(set(row)) == 6 and set(row) <= free
    with pytest.raises(DataError, match="user 0 has only 6 unseen items in domain a"):
        pair.candidates("test", 7)


def test_hash_covers_what_results_depend_on_and_nothing_else():
    pair = make(TOY)
    same = make(TOY, name="other", domains=("x", "y"), ties="shuffle", counts={"tied_events": 3})
    assert pair.sha256 == same.sha256
    changed = [
        make([[1, 4, 2, 6], TOY[1]]),
        make(TOY, times=pair.times + 1),
        make([TOY[0] + [7], TOY[1][1:]]),
        make(TOY, num_items=(4, 3)),
        make(TOY, num_items=(3, 5)),
    ]
    assert len({pair.sha256, *(other.sha256 for other in changed)}) == 6
    assert make([[1, 2, 4, 5]]).sha256 != make([[1, 2, 4, 5]], has_clock=False).sha256


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_items": (0, 7)}, "domain a is empty"),
        ({"num_items": (2, 3)}, "item ids must lie in 1..5"),
        ({"offsets": np.array([0, 3, 9])}, "user 0 has 3 events; leave-one-out needs 4"),
        ({"offsets": np.array([0, 4])}, "offsets do not span"),
        ({"has_clock": False}, "toy: without a common clock each user's events must be all of A, then all of B"),
        ({"times": np.zeros(3)}, "3 times for 9 events"),
        ({"item_names": np.array(["x"])}, "1 item names for 7 items"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(DataError, match=message):
        make(TOY, **changes)


@pytest.fixture(scope="module")
def built_in() -> Pair:
    return synthetic_pair(num_users=1200, num_items=(120, 90), seed=5)


@pytest.mark.parametrize("name", ["val", "test"])
def test_candidates_are_distinct_unseen_items_of_the_targets_domain(built_in, name):
    drawn = built_in.candidates(name, 40)
    assert drawn.shape == (built_in.num_users, 40) and drawn.dtype == np.int64
    assert (np.diff(np.sort(drawn, axis=1), axis=1) > 0).all()
    domain = built_in.domain_of(built_in.split(name).targets)
    assert (built_in.domain_of(drawn) == domain[:, None]).all()
    for user in range(built_in.num_users):
        assert not np.isin(drawn[user], built_in.sequence(user)).any()


def test_candidates_are_drawn_once_for_every_run(built_in):
    again = replace(built_in)  # a fresh copy: nothing cached
    assert built_in.candidates("test", 40) is built_in.candidates("test", 40)
    assert (built_in.candidates("test", 40) == again.candidates("test", 40)).all()
    assert (built_in.candidates("test", 40) != built_in.candidates("val", 40)).any()


def test_candidates_are_uniform():
    """4,000 users with one and the same past: every item is as likely as any other, and so is every set of items."""
    pair = make([[1, 2, 3, 4]] * 4000, num_items=(3, 10))
    drawn = pair.candidates("test", 3) - 5  # 9 unseen items, ids 5..13
    singles = np.bincount(drawn.ravel(), minlength=9)
    assert stats.chisquare(singles).pvalue > 1e-3
    ordered = np.sort(drawn, axis=1)
    subsets = np.bincount(ordered[:, 0] * 81 + ordered[:, 1] * 9 + ordered[:, 2])
    subsets = subsets[subsets > 0]
    assert len(subsets) == 84  # 9 choose 3
    assert stats.chisquare(subsets).pvalue > 1e-3


def test_candidates_may_take_all_unseen_items_but_not_more():
    pair = make([[1, 4, 2, 5], [7, 6, 3, 1]], num_items=(3, 4))
    assert sorted(pair.candidates("test", 1)[1]) == [2]
    pair = make([[1, 4, 2, 5], [1, 6, 3, 5]], num_items=(3, 4))
    assert [sorted(row) for row in pair.candidates("test", 2)] == [[6, 7], [4, 7]]
    with pytest.raises(DataError, match="user 0 has only 2 unseen items in domain b"):
        pair.candidates("test", 3)
    with pytest.raises(ValueError, match="k of 1 or more"):
        pair.candidates("test", 0)


def test_a_repeated_item_counts_once_among_the_seen():
    pair = make([[5, 5, 5, 4, 4]], num_items=(3, 4))
    assert sorted(pair.candidates("test", 2)[0]) == [6, 7]

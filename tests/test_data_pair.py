"""Pair: sequences, leave-one-out, unseen targets, sampled candidates, and the hash that results depend on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from gcalib.data.pair import DataError, Pair
from gcalib.data.synthetic import synthetic_pair


def make(sequences: list[list[int]], num_items: tuple[int, int] = (3, 4), **changes) -> Pair:
    """A pair of the given sequences, one event a day."""
    lengths = [len(sequence) for sequence in sequences]
    arguments = {
        "name": "toy",
        "domains": ("a", "b"),
        "items": np.array(sum(sequences, [])),
        "times": np.concatenate([np.arange(n) * 86_400 for n in lengths]),
        "offsets": np.cumsum([0, *lengths]),
        "num_items": num_items,
        "has_global_order": True,
    }
    return Pair(**{**arguments, **changes})


TOY = [[1, 4, 2, 5], [7, 6, 3, 4, 1]]
# Users with 4 + 3, 3 + 1, 0 + 4 and 2 + 2 events; the last has no domain with a target.
PER_DOMAIN = [[1, 2, 3, 4, 11, 12, 13], [5, 6, 7, 14], [15, 16, 17, 18], [8, 9, 19, 20]]


def per_domain() -> Pair:
    return make(PER_DOMAIN, num_items=(10, 12), has_global_order=False)


def histories(pair: Pair, split: str) -> list[list[int]]:
    return [pair.split(split).history(user).tolist() for user in range(pair.num_users)]


def test_sequence_is_a_view_in_order():
    pair = make(TOY)
    assert [pair.sequence(user).tolist() for user in range(2)] == TOY
    assert np.shares_memory(pair.sequence(1), pair.items)


def test_sequence_of_an_unknown_user():
    with pytest.raises(IndexError, match="users 0..1, not 2"):
        make(TOY).sequence(2)


def test_pair_sizes():
    pair = make(TOY)
    assert pair.num_users == 2
    assert pair.num_interactions == (4, 5)
    assert pair.lengths.tolist() == [4, 5]
    assert pair.owner.tolist() == [0] * 4 + [1] * 5


def test_in_both_leaves_out_users_of_one_domain():
    assert per_domain().in_both.tolist() == [True, True, False, True]


def test_domain_of_tells_both_domains_and_padding():
    domain = make(TOY).domain_of(np.array([[0, 1, 3], [4, 7, 0]]))
    assert domain.tolist() == [[-1, 0, 0], [1, 1, -1]]
    assert domain.dtype == np.int8


def test_split_with_a_global_order():
    pair = make(TOY)
    assert pair.split("test").targets.tolist() == [5, 1]
    assert pair.split("val").targets.tolist() == [2, 4]
    assert histories(pair, "test") == [[1, 4, 2], [7, 6, 3, 4]]
    assert histories(pair, "val") == [[1, 4], [7, 6, 3]]
    assert pair.split("val").lengths.tolist() == [2, 3]


def test_split_with_per_domain_order():
    pair = per_domain()
    test, val = pair.split("test"), pair.split("val")
    assert test.users.tolist() == val.users.tolist() == [0, 0, 1, 2]
    assert test.targets.tolist() == [4, 13, 7, 18]
    assert val.targets.tolist() == [3, 12, 6, 17]
    assert histories(pair, "test") == [[1, 2, 3, 11, 12], [5, 6, 14], [15, 16, 17], [8, 9, 19, 20]]
    # what training sees has neither the validation nor the test event of either domain
    assert histories(pair, "val") == [[1, 2, 11], [5, 14], [15, 16], [8, 9, 19, 20]]
    assert val.history_items.tolist() == sum(histories(pair, "val"), [])


def test_split_of_an_unknown_name():
    with pytest.raises(ValueError, match="no split 'train'; there are val and test"):
        make(TOY).split("train")


def test_unseen_targets_are_outside_every_training_history():
    pair = make([[1, 2, 3, 4], [3, 11, 1, 2]], num_items=(10, 12))  # training sees 1, 2, 3, 11
    assert pair.unseen_targets("test").tolist() == [True, False]
    assert pair.unseen_targets("val").tolist() == [False, False]


def test_require_global_order_names_who_asks():
    with pytest.raises(DataError, match="ABXI needs one stream .* toy is a per-domain pair"):
        per_domain().require_global_order("ABXI")


def test_sha256_covers_what_results_depend_on():
    pair = make(TOY)
    changed = [
        make([[1, 4, 2, 6], TOY[1]]),
        make(TOY, times=pair.times + 1),
        make([TOY[0] + [7], TOY[1][1:]]),
        make(TOY, num_items=(4, 3)),
        make(TOY, num_items=(3, 5)),
        make([[1, 2, 4, 5]]),
        make([[1, 2, 4, 5]], has_global_order=False),
    ]
    assert len({pair.sha256, *(other.sha256 for other in changed)}) == 8


def test_sha256_does_not_cover_names():
    other = make(TOY, name="other", domains=("x", "y"), counts={"tied_events": 3})
    assert make(TOY).sha256 == other.sha256


@pytest.fixture(scope="module")
def built_in() -> Pair:
    return synthetic_pair(num_users=300, num_items=(120, 90), seed=5)


@pytest.mark.parametrize("name", ["val", "test"])
def test_candidates_are_distinct_unseen_items_of_the_targets_domain(built_in, name):
    drawn = built_in.candidates(name, 40)
    domain = built_in.domain_of(built_in.split(name).targets)
    assert drawn.shape == (300, 40)
    assert (np.diff(np.sort(drawn, axis=1), axis=1) > 0).all()
    assert (built_in.domain_of(drawn) == domain[:, None]).all()
    assert not any(np.isin(drawn[user], built_in.sequence(user)).any() for user in range(300))


def test_candidates_are_the_same_for_every_run(built_in):
    drawn = built_in.candidates("test", 40)
    assert built_in.candidates("test", 40) is drawn
    assert (replace(built_in).candidates("test", 40) == drawn).all()  # a fresh copy: nothing kept
    assert (built_in.candidates("val", 40) != drawn).any()


def test_candidates_are_uniform():
    """4,000 users with one and the same past: every item is as likely as any other, and so is every set of items."""
    pair = make([[1, 2, 3, 4]] * 4000, num_items=(3, 10))
    drawn = np.sort(pair.candidates("test", 3) - 5, axis=1)  # 9 unseen items, ids 5..13
    subsets = np.bincount(drawn @ [81, 9, 1])
    assert stats.chisquare(np.bincount(drawn.ravel(), minlength=9)).pvalue > 1e-3
    assert np.count_nonzero(subsets) == 84  # 9 choose 3
    assert stats.chisquare(subsets[subsets > 0]).pvalue > 1e-3


def test_candidates_may_be_all_unseen_items():
    pair = make([[1, 4, 2, 5], [1, 6, 3, 5]])
    assert [sorted(row) for row in pair.candidates("test", 2)] == [[6, 7], [4, 7]]
    with pytest.raises(DataError, match="user 0 has only 2 unseen items in domain b"):
        pair.candidates("test", 3)


def test_candidates_with_per_domain_order_are_drawn_for_each_target():
    drawn = per_domain().candidates("test", 6)
    unseen = [{5, 6, 7, 8, 9, 10}, set(range(14, 23)), {1, 2, 3, 4, 8, 9, 10}, {11, 12, 13, 14, 19, 20, 21, 22}]
    assert [len(set(row)) for row in drawn] == [6] * 4
    assert all(set(row) <= free for row, free in zip(drawn, unseen, strict=True))


def test_candidates_count_a_repeated_item_once():
    pair = make([[1, 5, 5, 4, 4]])
    assert sorted(pair.candidates("test", 2)[0]) == [6, 7]

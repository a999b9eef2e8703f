"""Ranking: against sorting by hand, ir-measures and scikit-learn, and by the properties that a rank must have."""

from __future__ import annotations

import doctest
import itertools
import math

import ir_measures
import numpy as np
import pytest
import scipy.stats
import torch
from beartype import beartype
from hypothesis import given, settings
from hypothesis import strategies as st
from ir_measures import RR, Success, nDCG
from jaxtyping import jaxtyped
from sklearn.metrics import roc_auc_score

from gcalib import ranking

rank_of_target = jaxtyped(typechecker=beartype)(ranking.rank_of_target)
rank_among = jaxtyped(typechecker=beartype)(ranking.rank_among)

seeds = st.integers(0, 2**32 - 1)


def draw(seed: int, levels: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores with many ties, targets, and a mask of excluded items that may hold the target."""
    rng = np.random.default_rng(seed)
    users, items = rng.integers(1, 6), rng.integers(2, 12)
    scores = torch.from_numpy(rng.integers(0, levels, (users, items)).astype(np.float32))
    target = torch.from_numpy(rng.integers(0, items, users))
    return scores, target, torch.from_numpy(rng.random((users, items)) < 0.3)


def by_hand(scores: torch.Tensor, target: torch.Tensor, excluded: torch.Tensor) -> list[float]:
    """Rank by its definition, item by item."""
    ranks = []
    for user in range(len(scores)):
        rank = 1.0
        for item in range(scores.shape[1]):
            if item != target[user] and not excluded[user, item]:
                difference = float(scores[user, item] - scores[user, target[user]])
                rank += 1.0 if difference > 0 else 0.5 if difference == 0 else 0.0
        ranks.append(rank)
    return ranks


@given(seeds, st.integers(1, 40))
def test_full_rank_is_its_definition(seed, block):
    scores, target, excluded = draw(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "BLOCK", block)  # a row may be larger than a block
        assert rank_of_target(scores, target, excluded).tolist() == by_hand(scores, target, excluded)
        assert rank_of_target(scores, target).tolist() == by_hand(scores, target, torch.zeros_like(excluded))


@given(seeds)
def test_excluded_pairs_may_repeat_and_come_in_any_order(seed):
    scores, target, excluded = draw(seed)
    row, column = excluded.nonzero(as_tuple=True)
    shuffled = torch.from_numpy(np.random.default_rng(seed).integers(0, max(len(row), 1), 3 * len(row)))
    shuffled = torch.cat([shuffled, torch.arange(len(row))])
    pairs = (row[shuffled], column[shuffled])
    assert torch.equal(rank_of_target(scores, target, pairs), rank_of_target(scores, target, excluded))


@given(seeds)
def test_minus_infinity_never_wins(seed):
    scores, target, excluded = draw(seed)
    padding = torch.full((len(scores), 1), -math.inf)
    padded = torch.cat([padding, scores], dim=1)
    ranks = rank_of_target(padded, target + 1, torch.cat([padding > 0, excluded], dim=1))
    assert torch.equal(ranks, rank_of_target(scores, target, excluded))
    of_target = scores.gather(1, target.unsqueeze(1)).squeeze(1)
    assert torch.equal(rank_among(of_target, padded), rank_among(of_target, scores))


@given(seeds)
def test_sampled_rank_agrees_with_the_full_one_over_the_same_items(seed):
    scores, target, _ = draw(seed)
    others = torch.tensor([[i for i in range(scores.shape[1]) if i != t] for t in target.tolist()])
    of_target = scores.gather(1, target.unsqueeze(1)).squeeze(1)
    assert torch.equal(rank_among(of_target, scores.gather(1, others)), rank_of_target(scores, target))


@given(seeds, st.integers(2, 300))
def test_a_constant_scorer_ranks_in_the_middle(seed, items):
    rank = rank_of_target(torch.full((1, items), 0.25), torch.tensor([seed % items]))
    assert rank.item() == (items + 1) / 2
    assert ranking.metrics(rank, items)["auc"] == 0.5


@given(seeds)
def test_strictly_monotone_transforms_change_no_rank(seed):
    scores, target, excluded = draw(seed)
    before = rank_of_target(scores, target, excluded)
    for transformed in (scores.exp(), 3 * scores - 7, scores.double() ** 3, scores.bfloat16()):
        assert torch.equal(rank_of_target(transformed, target, excluded), before)


@given(seeds)
def test_renumbering_items_changes_no_rank(seed):
    scores, target, excluded = draw(seed)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(scores.shape[1]))
    ranks = rank_of_target(scores[:, order], torch.argsort(order)[target], excluded[:, order])
    assert torch.equal(ranks, rank_of_target(scores, target, excluded))


@given(seeds)
def test_reversed_scores_mirror_the_rank(seed):
    scores, target, _ = draw(seed)
    both = rank_of_target(scores, target) + rank_of_target(-scores, target)
    assert (both == scores.shape[1] + 1).all()


def test_scores_closer_than_rounding_of_their_difference_are_told_apart():
    tiny = torch.finfo(torch.float32).smallest_normal
    scores = torch.tensor([[tiny, tiny * (1 + 2**-23), 0.0, -0.0], [1.0, 1 + 2**-23, 3e38, -3e38]])
    assert rank_of_target(scores, torch.tensor([0, 0])).tolist() == [2.0, 3.0]
    assert rank_of_target(scores[:1], torch.tensor([3])).tolist() == [3.5]  # 0 and -0 tie


@settings(max_examples=20)
@given(seeds)
def test_ndcg_mrr_and_hit_rate_are_those_of_ir_measures(seed):
    rng = np.random.default_rng(seed)
    users, items = 4, 30
    scores = torch.from_numpy(rng.permuted(np.tile(np.arange(items, dtype=np.float64), (users, 1)), axis=1))
    target = torch.from_numpy(rng.integers(0, items, users))
    found = ranking.metrics(rank_of_target(scores, target), items)
    qrels = [ir_measures.Qrel(str(u), str(int(t)), 1) for u, t in enumerate(target)]
    run = [ir_measures.ScoredDoc(str(u), str(i), float(scores[u, i])) for u in range(users) for i in range(items)]
    asked = (
        {"mrr": RR} | {f"ndcg@{k}": nDCG @ k for k in (1, 5, 10, 20)} | {f"hr@{k}": Success @ k for k in (1, 5, 10, 20)}
    )
    reference = ir_measures.calc_aggregate(asked.values(), qrels, run)
    assert {name: found[name] for name in asked} == pytest.approx(
        {n: reference[m] for n, m in asked.items()}, abs=1e-12
    )


@settings(max_examples=30)
@given(seeds)
def test_auc_is_that_of_scikit_learn_with_ties(seed):
    scores, target, _ = draw(seed)
    labels = torch.nn.functional.one_hot(target, scores.shape[1])
    reference = [roc_auc_score(label, score) for label, score in zip(labels, scores, strict=True)]
    found = ranking.per_user(rank_of_target(scores, target), scores.shape[1])["auc"]
    assert found == pytest.approx(reference, abs=1e-12)


def test_metrics_by_hand():
    found = ranking.metrics([1, 2, 10.5, 21], [2, 101, 101, 101])
    assert list(found) == [
        "hr@1", "ndcg@1", "hr@5", "ndcg@5", "hr@10", "ndcg@10", "hr@20", "ndcg@20", "mrr", "auc",
    ]  # fmt: skip
    assert found["hr@1"] == 0.25
    assert found["hr@10"] == 0.5  # 10.5 is not within 10
    assert found["hr@20"] == 0.75
    assert found["ndcg@5"] == pytest.approx((1 + 1 / math.log2(3)) / 4)
    assert found["ndcg@20"] == pytest.approx((1 + 1 / math.log2(3) + 1 / math.log2(11.5)) / 4)
    assert found["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 10.5 + 1 / 21) / 4)
    assert found["auc"] == pytest.approx((1 + 0.99 + 0.905 + 0.8) / 4)


def test_metrics_takes_lists_arrays_and_tensors():
    as_list = ranking.metrics([1, 3], 5)
    assert ranking.metrics(np.array([1, 3]), np.array([5, 5])) == as_list
    assert ranking.metrics(torch.tensor([1.0, 3.0]), torch.tensor(5)) == as_list


@pytest.mark.parametrize(
    ("ranks", "size", "message"),
    [
        ([], 5, "must be a list"),
        ([1, 0.5], 5, "User 1 has rank 0.5 of 5"),
        ([1, 6], 5, "User 1 has rank 6 of 5"),
        ([1, 4], [5, 3], "User 1 has rank 4 of 3"),
        ([math.nan], 5, "rank nan"),
        ([1], 1, "n 2 or more"),
        ([1, 2, 3], [5, 5], "a number or as many"),
        ([[1, 2]], 5, "must be a list"),
    ],
)
def test_metrics_refuses(ranks, size, message):
    with pytest.raises(ValueError, match=message):
        ranking.metrics(ranks, size)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_scores_that_cannot_be_ranked_are_refused(bad):
    scores = torch.zeros(3, 4)
    scores[1, 2] = bad
    for others in (0.0, -math.inf):  # which could hide it in a sum
        scores[:, 3] = others
        with pytest.raises(ValueError, match=f"The score in row 1, column 2 is {bad}"):
            rank_of_target(scores, torch.zeros(3, dtype=torch.long))
        with pytest.raises(ValueError, match=f"The score in row 1, column 1 is {bad}"):
            rank_among(scores[:, 0], scores[:, 1:])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_targets_without_a_finite_score_are_refused(bad):
    scores = torch.zeros(3, 4)
    scores[1, 0] = bad
    with pytest.raises(ValueError, match=f"The target's score in row 1 is {bad}"):
        rank_of_target(scores, torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match=f"The target's score in row 1 is {bad}"):
        rank_among(scores[:, 0], scores[:, 1:])


def test_honest_scores_may_overflow_in_a_sum():
    scores = torch.tensor([[-3e38, 3e38, 3e38, 0.0]])
    assert rank_of_target(scores, torch.tensor([0])).tolist() == [4.0]
    assert rank_of_target(scores, torch.tensor([1])).tolist() == [1.5]


def test_scores_that_need_a_gradient_are_ranked():
    scores = torch.tensor([[1.0, 2.0]], requires_grad=True)
    assert rank_of_target(scores, torch.tensor([0])).tolist() == [2.0]


def test_shapes_and_indices_are_checked():
    scores, target = torch.zeros(2, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"\[users, items\], \[users\]"):
        ranking.rank_of_target(scores, target[:1])
    with pytest.raises(ValueError, match=r"\[users, items\], \[users\]"):
        ranking.rank_among(torch.zeros(2), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="target holds indices from 0 to 3, outside 0..2"):
        ranking.rank_of_target(scores, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="excluded columns holds indices from -1 to -1"):
        ranking.rank_of_target(scores, target, (torch.tensor([0]), torch.tensor([-1])))
    with pytest.raises(ValueError, match="excluded rows"):
        ranking.rank_of_target(scores, target, (torch.tensor([2]), torch.tensor([0])))


def test_no_users_have_no_ranks():
    assert ranking.rank_of_target(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_docstring_examples():
    result = doctest.testmod(ranking)
    assert (result.attempted, result.failed) == (9, 0)


@settings(max_examples=40)
@given(seeds, st.integers(1, 9))
def test_the_mean_over_draws_is_that_of_all_draws_listed(seed, negatives):
    """Every subset of the others, one by one; and ties as the mean of both orders."""
    rng = np.random.default_rng(seed)
    size = int(rng.integers(negatives + 1, 11))
    rank = int(rng.integers(1, size + 1))
    beats = [place < rank - 1 for place in range(size - 1)]  # which of the others beat the target
    draws = [1 + sum(beats[item] for item in kept) for kept in itertools.combinations(range(size - 1), negatives)]
    listed = ranking.metrics(draws, negatives + 1)
    found = ranking.expected([rank], size, negatives)
    assert found.keys() == listed.keys()
    assert all(found[name] == pytest.approx(listed[name], abs=1e-12) for name in found)
    if rank < size:
        beside = ranking.expected([rank + 1], size, negatives)
        tied = ranking.expected([rank + 0.5], size, negatives)
        assert all(tied[name] == pytest.approx((found[name] + beside[name]) / 2, abs=1e-12) for name in tied)


def test_the_mean_over_draws_is_that_of_scipy_for_large_domains():
    """Where factorials have a hundred thousand digits, and for ranks from the first to the last."""
    others, better = 29_000, np.array([0, 1, 30, 400, 28_000, 29_000])
    found = ranking.expected(better + 1, others + 1, 999)
    chance = scipy.stats.hypergeom.pmf(np.arange(1000), others, better[:, None], 999)
    assert found["hr@10"] == pytest.approx(chance[:, :10].sum(axis=1).mean(), rel=1e-8)
    assert found["ndcg@20"] == pytest.approx((chance[:, :20] / np.log2(np.arange(20) + 2)).sum(axis=1).mean(), rel=1e-8)
    assert found["mrr"] == pytest.approx((chance / np.arange(1, 1001)).sum(axis=1).mean(), rel=1e-8)


def test_the_mean_over_draws_needs_enough_to_draw_from():
    with pytest.raises(ValueError, match="negatives=999; a target has only 41 other candidates"):
        ranking.expected([3, 1], [1000, 42], negatives=999)
    with pytest.raises(ValueError, match="negatives=0"):
        ranking.expected([3], 9, negatives=0)

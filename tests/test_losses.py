"""The losses and negatives that models share, by hand and in the models that use them."""

from __future__ import annotations

import doctest
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from gcalib.config import RunConfig
from gcalib.data.batches import Batch, collate
from gcalib.data.synthetic import synthetic_pair
from gcalib.models import losses
from gcalib.models.base import Recommender
from gcalib.models.losses import (
    binary_cross_entropy,
    draw_negatives,
    draw_new_to_users,
    info_nce,
    shared_logits,
    soft_contrast,
)
from gcalib.models.matching import build_model

PAIR = synthetic_pair(num_users=60, num_items=(80, 90))
NEVER = float("-inf")
EXTRA: dict[str, dict[str, object]] = {"llm4cdsr": {"text": "random"}, "cdsrnp": {"latent": 0}}  # no sampled latent


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def near(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.allclose(first, second, rtol=0, atol=1e-11)


def test_the_examples_in_the_docstrings_hold() -> None:
    result = doctest.testmod(losses)
    assert result.failed == 0
    assert result.attempted > 1


# -------------------------------------------------------------------------------------------------------- logits


def test_each_part_of_a_batch_is_scored_against_its_own_pool() -> None:
    """Three parts of four, four and three predictions; a target in its own pool is no negative of itself."""
    torch.manual_seed(0)
    table, states, targets = normal(30, 5), normal(11, 5), torch.arange(11)
    pools = torch.tensor([[9, 3, 20], [4, 8, 21], [10, 0, 22]])
    positive, negative = shared_logits(states, targets, table[targets], pools, table[pools])
    own = pools[torch.arange(11) // 4]
    expected = torch.einsum("nd,nkd->nk", states, table[own]).masked_fill(own == targets.unsqueeze(1), NEVER)
    assert near(negative, expected)
    assert near(positive, (states * table[:11]).sum(dim=1))
    assert torch.isinf(negative).nonzero().tolist() == [[3, 1], [4, 0], [10, 0]]  # 9, 8 and 0 are in others' pools


def test_excluded_items_are_no_negatives_of_their_prediction_and_stay_those_of_others() -> None:
    torch.manual_seed(0)
    table, states, targets = normal(30, 5), normal(3, 5), torch.tensor([1, 2, 3])
    pools, excluded = torch.tensor([[7, 2, 9], [3, 7, 5]]), torch.tensor([[9, 7], [0, 0], [5, 5]])
    _, negative = shared_logits(states, targets, table[targets], pools, table[pools], excluded)
    gone = torch.tensor([[1, 0, 1], [0, 1, 0], [1, 0, 1]], dtype=torch.bool)
    expected = torch.einsum("nd,nkd->nk", states, table[pools[[0, 0, 1]]]).masked_fill(gone, NEVER)
    assert near(negative, expected)


@pytest.mark.parametrize("excluded", [None, torch.zeros(0, 5, dtype=torch.int64)])
def test_no_predictions_have_no_logits(excluded: Tensor | None) -> None:
    """A batch may hold no target of a domain."""
    table, pools, nothing = normal(30, 8), torch.randint(1, 30, (4, 6)), torch.zeros(0, dtype=torch.int64)
    positive, negative = shared_logits(table[nothing], nothing, table[nothing], pools, table[pools], excluded)
    assert (positive.shape, negative.shape) == ((0,), (0, 6))


def test_no_negatives_leave_the_targets() -> None:
    states, vectors = normal(3, 4), normal(3, 4)
    none = torch.zeros(1, 0, dtype=torch.int64)
    positive, negative = shared_logits(states, torch.arange(1, 4), vectors, none, normal(1, 0, 4))
    assert near(positive, (states * vectors).sum(dim=1))
    assert negative.shape == (3, 0)


# -------------------------------------------------------------------------------------------------------- losses


def test_info_nce_by_hand() -> None:
    positive = torch.tensor([1.0, 0.0], dtype=torch.float64)
    negative = torch.tensor([[0.0, 2.0], [NEVER, 0.0]], dtype=torch.float64)
    first = -math.log(math.e / (math.e + 1 + math.e**2))
    weight = torch.tensor([0.25, 0.75], dtype=torch.float64)
    assert info_nce(positive, negative, weight).item() == pytest.approx(0.25 * first + 0.75 * math.log(2), rel=1e-12)


def test_binary_cross_entropy_averages_the_negatives_that_count() -> None:
    positive = torch.tensor([0.0, 2.0], dtype=torch.float64)
    negative = torch.tensor([[0.0, 1.0], [NEVER, 0.5]], dtype=torch.float64)
    first = math.log(2) + (math.log(2) + math.log1p(math.e)) / 2
    second = math.log1p(math.exp(-2)) + math.log1p(math.exp(0.5))
    weight = torch.tensor([0.25, 0.75], dtype=torch.float64)
    loss = binary_cross_entropy(positive, negative, weight)
    assert loss.item() == pytest.approx(0.25 * first + 0.75 * second, rel=1e-12)


def test_binary_cross_entropy_without_a_negative_is_that_of_the_target() -> None:
    loss = binary_cross_entropy(torch.zeros(1), torch.full((1, 2), NEVER), torch.ones(1))
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)


def test_soft_contrast_row_by_row() -> None:
    torch.manual_seed(0)
    x, y, expected = normal(5, 3), normal(5, 3), 0.0
    for i in range(5):
        alike = torch.stack([(x[i] @ x[j] + y[i] @ y[j]) / 2 for j in range(5)]).softmax(0)
        of_x = torch.stack([x[i] @ y[j] for j in range(5)]).log_softmax(0)
        expected -= (alike @ of_x).item() / 10
        for j in range(5):  # the transposed targets against the transposed logits
            weight = torch.stack([(x[j] @ x[k] + y[j] @ y[k]) / 2 for k in range(5)]).softmax(0)[i]
            expected -= (weight * torch.stack([x[k] @ y[i] for k in range(5)]).log_softmax(0)[j]).item() / 10
    assert soft_contrast(x, y).item() == pytest.approx(expected, rel=1e-12)


def test_soft_contrast_of_nobody_is_zero() -> None:
    assert soft_contrast(torch.zeros(0, 3), torch.zeros(0, 3)) == 0


def test_soft_contrast_of_halves_is_computed_in_float32() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(5, 3).bfloat16(), torch.randn(5, 3).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(soft_contrast(x, y), soft_contrast(x.float(), y.float()))


# ----------------------------------------------------------------------------------------------------- negatives


@pytest.mark.parametrize(("count", "of_a", "of_b"), [(8, 4, 4), (9, 4, 4), (100, 10, 50), (1000, 10, 80)])
def test_negatives_are_half_of_each_domain_and_none_twice(count: int, of_a: int, of_b: int) -> None:
    drawn = draw_negatives(np.random.default_rng(0), (10, 80), count)
    assert len(drawn.unique()) == len(drawn)
    assert ((drawn >= 1) & (drawn <= 10)).sum() == of_a
    assert ((drawn > 10) & (drawn <= 90)).sum() == of_b


def test_negatives_reach_every_item() -> None:
    rng = np.random.default_rng(0)
    drawn = torch.cat([draw_negatives(rng, (10, 12), 4) for _ in range(300)])
    assert drawn.unique().tolist() == list(range(1, 23))


def test_negatives_new_to_users_are_of_the_domain_and_not_the_users_own() -> None:
    sequences = [np.array([1, 2, 11, 3, 12, 4]), np.array([12, 5, 13, 14])]
    batch = collate(sequences, 10, window=10, training=True)
    rng, seen = np.random.default_rng(0), set()
    for _ in range(50):
        for domain, (items, stream) in enumerate(
            zip(draw_new_to_users(rng, (10, 8), batch), batch.domains, strict=True)
        ):
            user = stream.predicts.nonzero()[:, 0].tolist()
            assert len(items) == len(user)
            assert {(item > 10) for item in items.tolist()} == {bool(domain)}
            assert not [item for u, item in zip(user, items.tolist(), strict=True) if item in sequences[u]]
            seen |= {(u, item) for u, item in zip(user, items.tolist(), strict=True)}
    new = [(u, item) for u in (0, 1) for item in range(1, 19) if item not in sequences[u]]
    assert seen == set(new)


def test_a_user_of_a_whole_domain_gets_a_negative_all_the_same() -> None:
    batch = collate([np.array([1, 2, 3, 4])], 3, window=10, training=True)
    of_a, of_b = draw_new_to_users(np.random.default_rng(0), (3, 1), batch)
    assert set(of_a.tolist()) <= {1, 2, 3}
    assert of_b.tolist() == [4]


# ------------------------------------------------------------------------------------------------- in the models


each_objective = pytest.mark.parametrize(
    ("name", "objective"),
    [("abxi", "published"), *((n, o) for n in ("cdsrnp", "sasrec", "sasrec-mixed") for o in ("published", "infonce"))],
)


def model_of(name: str, **changes: object) -> Recommender:
    torch.manual_seed(0)
    config = RunConfig(pair="synthetic", model=name, dim=8, dropout=0.0, **{**EXTRA.get(name, {}), **changes})
    model = build_model(config, PAIR).double().train()
    with torch.no_grad():
        model.item.weight.mul_(20.0)  # at the start all scores are next to zero, and so are differences
    return model


def batch_of(model: Recommender, users: list[int]) -> Batch:
    training = PAIR.split("val")
    return model.collate([training.history(user) for user in users], PAIR, training=True, users=np.array(users))


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("abxi", {}), ("abxi", {"negative_pools": 3}), ("cdsrnp", {"objective": "infonce"}), ("sasrec", {}),
        ("sasrec", {"objective": "infonce"}), ("sasrec-mixed", {"objective": "infonce"}),
        ("llm4cdsr", {"objective": "infonce"}),
    ],
)  # fmt: skip
def test_with_the_option_no_users_own_items_are_their_negatives(name: str, extra: dict[str, object]) -> None:
    """Items of user 0 among the negatives: excluded for that user, negatives of user 1."""
    first, second = (set(PAIR.split("val").history(user).tolist()) for user in (0, 1))
    others = set(range(1, 171)) - first - second

    def found(users: list[int], negatives: set[int], *published: str) -> dict[str, Tensor]:
        model = model_of(name, published=published, **extra)
        in_front = [0] * (2 * len(users)) if name == "llm4cdsr" else []  # its contrast's items, two a user
        drawn = torch.tensor(in_front + sorted(negatives))
        drawn = drawn if name == "llm4cdsr" else drawn.expand(model.config.negative_pools, -1)
        return model.loss(batch_of(model, users), drawn)

    given = others | first
    together, without = found([0, 1], given, "exclude_history_negatives"), found([0, 1], given)
    of_first, of_second = found([0], others), found([1], given - second)
    for domain in "ab":
        assert torch.isclose(together[domain], (of_first[domain] + of_second[domain]) / 2, rtol=1e-5)
        assert not torch.isclose(together[domain], without[domain], rtol=1e-4)


@each_objective
def test_pools_draw_more_negatives_and_change_nothing_but_them(name: str, objective: str) -> None:
    model = model_of(name, objective=objective, negatives=20, negative_pools=4)
    batch = batch_of(model, list(range(32)))
    drawn = model.negatives(batch, np.random.default_rng(0))
    assert drawn.shape == (4, 20)
    assert len(drawn.unique()) > 40
    shared, same, apart = (model.loss(batch, pools) for pools in (drawn[:1], drawn[:1].expand(4, 20), drawn))
    for domain in "ab":
        assert torch.isclose(same[domain], shared[domain], rtol=1e-9)
        assert not torch.isclose(apart[domain], shared[domain], rtol=1e-6)


@each_objective
def test_losses_of_a_model_are_those_of_its_scores(name: str, objective: str) -> None:
    """ABXI has InfoNCE only, against negatives of both domains; the others' are of the target's own."""
    model, nA = model_of(name, objective=objective, temperature=0.5), PAIR.num_items[0]
    batch, drawn = batch_of(model, [3, 4, 5]), torch.tensor([[5, 17, 61, 90, 120, 160]])
    found, states = model.loss(batch, drawn), model(batch)
    for domain, (h, stream) in enumerate(zip(states, batch.domains, strict=True)):
        mine = drawn[0] if name == "abxi" else drawn[0][(drawn[0] > nA) == bool(domain)]
        total = 0.0
        for user in range(3):
            of_user = []
            for row in stream.predicts[user].nonzero().flatten():
                target, scores = stream.targets[user, row], model.item.weight @ h[user, row]
                negative = scores[mine[mine != target]]
                if name == "abxi" or objective == "infonce":
                    both = torch.cat([scores[target][None], negative]) / 0.5
                    of_user.append(both.logsumexp(0) - both[0])
                else:
                    of_user.append((-scores[target]).exp().log1p() + negative.exp().log1p().mean())
            total += torch.stack(of_user).mean() / 3
        assert torch.isclose(found["ab"[domain]], total, rtol=1e-6)  # weights are float32

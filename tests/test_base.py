"""The losses and negatives that models share."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from gcalib.config import RunConfig
from gcalib.data.batches import make_batch
from gcalib.data.synthetic import synthetic_pair
from gcalib.models import build_model
from gcalib.models.base import items_of_users, shared_logits
from gcalib.training import Trainer


def test_each_part_of_a_batch_is_scored_against_its_own_negatives() -> None:
    """Three parts of four, four and three queries; a target among its part's negatives is no negative of its own."""
    rng = torch.Generator().manual_seed(0)
    table = torch.randn(30, 5, generator=rng, dtype=torch.float64)
    states = torch.randn(11, 5, generator=rng, dtype=torch.float64)
    targets = torch.arange(11)
    negatives = torch.tensor([[9, 3, 20], [4, 8, 21], [10, 0, 22]])
    positive, negative = shared_logits(states, targets, table[targets], negatives, table[negatives])
    for query in range(11):
        row = negatives[query // 4]
        wanted = (table[row] @ states[query]).masked_fill(row == query, float("-inf"))
        assert torch.allclose(negative[query], wanted, rtol=0, atol=1e-12)
        assert torch.isclose(positive[query], table[query] @ states[query], rtol=0, atol=1e-12)
    assert int(torch.isinf(negative).sum()) == 3  # 3 in its own part, 4 and 10 in theirs; 9, 8 and 0 in others'


def test_spared_items_are_no_negatives_of_their_query_and_stay_those_of_others() -> None:
    rng = torch.Generator().manual_seed(0)
    table = torch.randn(30, 5, generator=rng, dtype=torch.float64)
    states = torch.randn(3, 5, generator=rng, dtype=torch.float64)
    targets, negatives = torch.tensor([1, 2, 3]), torch.tensor([[7, 2, 9], [3, 7, 5]])
    spared = torch.tensor([[9, 7], [0, 0], [5, 5]])  # queries 0 and 1 have the first row of negatives
    _, negative = shared_logits(states, targets, table[targets], negatives, table[negatives], spared)
    gone = torch.tensor([[True, False, True], [False, True, False], [True, False, True]])
    assert torch.equal(torch.isinf(negative), gone)
    scores = torch.stack([table[negatives[row]] @ states[query] for query, row in enumerate((0, 0, 1))])
    assert torch.allclose(negative[~gone], scores[~gone], rtol=0, atol=1e-12)


@pytest.mark.parametrize("clock", [True, False])
def test_items_of_users_are_all_of_their_training_sequences(clock: bool) -> None:
    sequences = [np.array([3, 12, 4, 3, 15]), np.array([11, 1, 2, 13])]
    batch = make_batch(sequences, 10, window=47, training=True, clock=clock)
    rows = items_of_users(batch)
    assert [set(row[row > 0].tolist()) for row in rows] == [set(sequence.tolist()) for sequence in sequences]


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("abxi", {}), ("abxi", {"negative_groups": 3}), ("cdsrnp", {"latent": 0, "objective": "infonce"}),
        ("sasrec", {}), ("sasrec", {"objective": "infonce"}), ("sasrec-mixed", {"objective": "infonce"}),
        ("llm4cdsr", {"objective": "infonce", "text": "hashed-words"}),
    ],
)  # fmt: skip
def test_without_own_negatives_each_user_is_spared_their_own_items(name: str, extra: dict[str, object]) -> None:
    """Items of the first user among the negatives: spared to that user, negatives of the second."""
    pair = synthetic_pair(num_users=60, num_items=(80, 90))
    config = RunConfig(pair="synthetic", model=name, dim=8, dropout=0.0, **extra)
    trainer = Trainer(config, pair, torch.device("cpu"))
    first, second = (set(row[row > 0].tolist()) for row in items_of_users(trainer.batch(np.arange(2))))
    others = set(range(1, 171)) - first - second

    def losses(users: list[int], negatives: set[int], own_negatives: bool = True) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = build_model(config.but(own_negatives=own_negatives), pair).train()
        with torch.no_grad():
            model.item.weight.mul_(20.0)  # at the start all scores are next to zero, and so are differences
        # LLM4CDSR's contrast has two items a user in front
        drawn = torch.tensor([0] * (2 * len(users) if name == "llm4cdsr" else 0) + sorted(negatives))
        drawn = drawn.expand(config.negative_groups, -1) if config.negative_groups > 1 else drawn
        return model.loss(trainer.batch(np.array(users)), drawn)

    given = others | first
    together, unspared = losses([0, 1], given, own_negatives=False), losses([0, 1], given)
    of_first, of_second = losses([0], others), losses([1], given - second)
    for domain in "ab":
        assert torch.isclose(together[domain], (of_first[domain] + of_second[domain]) / 2, rtol=1e-5)
        assert not torch.isclose(together[domain], unspared[domain], rtol=1e-4)


@pytest.mark.parametrize("name", ["abxi", "cdsrnp", "sasrec", "sasrec-mixed"])
@pytest.mark.parametrize("objective", ["infonce", "published"])
def test_groups_draw_more_negatives_and_change_nothing_but_them(name: str, objective: str) -> None:
    pair = synthetic_pair(num_users=60, num_items=(80, 90))
    extra = {} if name == "abxi" else {"objective": objective}  # ABXI has InfoNCE only
    extra |= {"latent": 0} if name == "cdsrnp" else {}  # a sampled latent would differ between the two losses
    config = RunConfig(
        pair="synthetic", model=name, dim=8, negatives=20, negative_groups=4, batch_size=32, **extra
    )  # fmt: skip
    trainer = Trainer(config, pair, torch.device("cpu"))
    batch = trainer.batch(np.arange(32))
    drawn = trainer.model.negatives(batch, np.random.default_rng(0))
    assert drawn.shape == (4, 20) and len(drawn.unique()) > 40
    same = drawn[:1].expand(4, 20)  # the same negatives in every part are negatives shared by the batch
    torch.manual_seed(0)
    model = build_model(config.but(dropout=0.0), pair).train()
    together, apart = model.loss(batch, drawn[0]), model.loss(batch, same)
    assert all(torch.allclose(together[name], apart[name], rtol=1e-6) for name in "ab")
    assert not torch.allclose(model.loss(batch, drawn)["a"], together["a"], rtol=1e-6)


def test_groups_without_a_query_have_no_logits() -> None:
    """A batch may hold no target of a domain; with groups, too."""
    table = torch.randn(30, 8)
    negatives = torch.randint(1, 30, (4, 6))
    nothing = torch.zeros(0, dtype=torch.int64)
    for spared in (None, torch.zeros(0, 5, dtype=torch.int64)):
        scored = shared_logits(table[nothing], nothing, table[nothing], negatives, table[negatives], spared)
        assert [part.shape for part in scored] == [(0,), (0, 6)]

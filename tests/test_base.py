"""The losses and negatives that models share."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gcalib.config import RunConfig
from gcalib.data.synthetic import synthetic_pair
from gcalib.models import build_model
from gcalib.models.base import shared_logits
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
    positive, negative = shared_logits(table[nothing], nothing, table[nothing], negatives, table[negatives])
    assert positive.shape == (0,) and negative.shape == (0, 6)

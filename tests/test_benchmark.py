"""The benchmark compares two ways to one result, and prints what it measured."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from gcalib.config import RunConfig
from gcalib.data.batches import make_batch
from gcalib.models.abxi import ABXI

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
NUM_ITEMS = (20, 30)


@pytest.mark.parametrize(("gca", "published"), list(product([(), (0,)], [True, False])))
def test_the_padded_comparator_has_our_states_losses_and_gradients(
    gca: tuple[int, ...], published: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from padded import PaddedABXI, pad_batch

    torch.manual_seed(0)
    config = RunConfig(pair="tiny", dim=16, heads=2, gca=gca, dropout=0.0, max_length=12, as_published=published)
    model = ABXI(config, NUM_ITEMS).double()
    with torch.no_grad():  # at the start LoRA is silent and biases are zero
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    padded = PaddedABXI(model, config).double()
    rng = np.random.default_rng(1)
    learned = np.setdiff1d(np.arange(1, 51), [5, 6, 7, 45, 46])
    sequences = [rng.permutation(learned)[:length] for length in (10, 9, 7, 4, 2, 12)] + [np.array([1, 2, 3])]
    batch = make_batch(
        sequences, NUM_ITEMS[0], window=model.window, training=True, tails=model.reads_tails, as_published=published
    )
    spread = pad_batch(batch, model.window)
    slots = torch.bincount(batch.mixed.sequence)
    for ours, theirs, queries in zip(model(batch), padded(spread), batch.queries, strict=True):
        column = model.window - slots[queries.sequence] + queries.slot
        assert torch.equal(spread.targets[queries.sequence, column], queries.targets)
        assert torch.allclose(theirs[queries.sequence, column], ours, rtol=0, atol=1e-10)
    negatives = torch.tensor([5, 6, 7, 45, 46])  # nobody's target: ours would mask a hit, drawing would avoid it
    ours = model.loss(batch, negatives)
    theirs = padded.loss(spread, negatives.expand(*spread.targets.shape, -1))
    assert [loss.item() for loss in theirs] == pytest.approx([loss.item() for loss in ours], rel=1e-6)
    sum(ours).backward()
    sum(theirs).backward()
    copies = dict(padded.parts.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.allclose(copies[name].grad, parameter.grad, rtol=1e-5, atol=1e-6), name


def test_the_comparator_refuses_what_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from padded import PaddedABXI

    config = RunConfig(pair="tiny", dim=16, gca=(1,))
    with pytest.raises(ValueError, match=r"gca=\(1,\): the padded comparator knows cross-attention at point 0 only"):
        PaddedABXI(ABXI(config, NUM_ITEMS), config)

"""Packed rows: there and back, and gradients that are copies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gcalib.packing import Layout, spread_rows, take_rows

COUNTS = st.lists(st.integers(0, 5), min_size=1, max_size=6)


def sequence_of(counts: list[int]) -> Tensor:
    """Which sequence each row belongs to, `counts[s]` rows for sequence s."""
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))


@given(COUNTS, st.booleans())
def test_every_row_stands_where_it_belongs_and_comes_back(counts: list[int], from_right: bool) -> None:
    layout = Layout.of(sequence_of(counts), len(counts), from_right=from_right)
    length = max(max(counts), 1)
    assert (layout.batch, layout.length) == (len(counts), length)
    rows = torch.arange(1.0, 1 + sum(counts)).unsqueeze(1) * torch.tensor([1.0, -1.0])
    expected = torch.zeros(len(counts), length, 2)
    real = torch.zeros(len(counts), length, dtype=torch.bool)
    taken = 0
    for s, count in enumerate(counts):
        first = length - count if from_right else 0
        expected[s, first : first + count] = rows[taken : taken + count]
        real[s, first : first + count] = True
        taken += count
    padded = layout.pad(rows)
    assert torch.equal(padded, expected)
    assert torch.equal(layout.real(), real)
    assert torch.equal(layout.unpad(padded), rows)
    assert torch.equal(layout.unpad(padded + 7.0 * ~real.unsqueeze(2)), rows)  # what stands on pads is dropped


def test_a_batch_without_rows_has_one_place_a_sequence() -> None:
    layout = Layout.of(torch.zeros(0, dtype=torch.int64), 3)
    assert layout.pad(torch.zeros(0, 4)).shape == (3, 1, 4) and not layout.real().any()
    assert layout.unpad(torch.ones(3, 1, 4)).shape == (0, 4)


@pytest.mark.parametrize("from_right", [False, True])
def test_gradients_of_pad_and_unpad(from_right: bool) -> None:
    layout = Layout.of(sequence_of([2, 0, 3]), 3, from_right=from_right)
    rows = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    padded = torch.randn(3, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layout.pad, rows)
    assert torch.autograd.gradcheck(layout.unpad, padded)


def test_gradients_of_take_and_spread() -> None:
    index = torch.tensor([4, 0, 2])
    table = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(take_rows(table, index), table[index])
    assert torch.equal(spread_rows(rows, index, 5), torch.zeros(5, 3, dtype=torch.float64).index_put((index,), rows))
    assert torch.autograd.gradcheck(take_rows, (table, index))
    assert torch.autograd.gradcheck(lambda r: spread_rows(r, index, 5), rows)
    for function, argument in ((lambda t: take_rows(t, index), table), (lambda r: spread_rows(r, index, 5), rows)):
        assert torch.autograd.gradgradcheck(function, argument)

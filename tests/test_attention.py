"""Gated cross-attention against torch's own attention: the equation, masks, pads, records of activations, exports."""

from __future__ import annotations

import copy
import doctest
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import Dim, export

from gcalib import attention
from gcalib.attention import (
    CrossAttention,
    GatedCrossAttention,
    causal_mask,
    newest_visible,
    record_activations,
    recording_paused,
    visible,
)

SEEDS = st.integers(0, 2**30)


def module(gate: str = "sigmoid", heads: int = 2, dim_y: int = 8, **options: Any) -> GatedCrossAttention:
    """A module in float64 whose every parameter, biases and norm too, is random."""
    torch.manual_seed(0)
    gca = GatedCrossAttention(8, heads, gate, dim_y=dim_y, **options).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in gca.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return gca


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def bools(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.bool)


def near(first: Tensor, second: Tensor, atol: float = 1e-11) -> bool:
    return first.shape == second.shape and torch.allclose(first, second, rtol=0, atol=atol)


def same_tensors(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def torch_attention(gca: GatedCrossAttention) -> nn.MultiheadAttention:
    """Torch's multi-head attention with the module's weights."""
    ours, width = gca.cross_attention, gca.dim_y
    other = nn.MultiheadAttention(gca.dim, ours.heads, kdim=width, vdim=width, batch_first=True).double()
    key, value = ours.key_value.weight.chunk(2)
    with torch.no_grad():
        if width == gca.dim:
            other.in_proj_weight.copy_(torch.cat([ours.query.weight, key, value]))
        else:
            other.q_proj_weight.copy_(ours.query.weight)
            other.k_proj_weight.copy_(key)
            other.v_proj_weight.copy_(value)
        other.in_proj_bias.copy_(torch.cat([ours.query.bias, ours.key_value.bias]))
    other.out_proj.load_state_dict(ours.out.state_dict())
    return other


def by_the_equation(gca: GatedCrossAttention, x: Tensor, y: Tensor, beside: Tensor, mask: Tensor) -> Tensor:
    """LayerNorm(x + act(FFN([x ; beside])) * CA(x, y)) by hand; a query that `mask` shows nothing gets X' = 0."""
    blind = ~mask.any(dim=2, keepdim=True)
    hidden = (~mask & ~blind).repeat_interleave(gca.cross_attention.heads, dim=0)
    x_prime = torch_attention(gca)(x, y, y, attn_mask=hidden, need_weights=False)[0].masked_fill(blind, 0.0)
    first, second = gca.gate[0], gca.gate[2]
    inner = (torch.cat([x, beside], dim=2) @ first.weight.T + first.bias).clamp(min=0)
    logits = inner @ second.weight.T + second.bias
    gate = torch.tanh(logits) if isinstance(gca.activation, nn.Tanh) else 1 / (1 + torch.exp(-logits))
    h = x + gate * x_prime
    centred = h - h.mean(dim=2, keepdim=True)
    deviation = (centred.square().mean(dim=2, keepdim=True) + gca.norm.eps).sqrt()
    return centred / deviation * gca.norm.weight + gca.norm.bias


# ------------------------------------------------------------------------------------------------- the equation


@pytest.mark.parametrize("gate", ["sigmoid", "tanh"])
@pytest.mark.parametrize(("heads", "dim_y"), [(1, 8), (2, 8), (8, 8), (4, 6)])
def test_forward_is_the_equation_in_values_and_gradients(gate: str, heads: int, dim_y: int) -> None:
    gca = module(gate, heads, dim_y)
    x, y = normal(3, 5, 8).requires_grad_(), normal(3, 5, dim_y).requires_grad_()
    out = gca(x, y)
    expected = by_the_equation(gca, x, y, y, torch.ones(3, 5, 5, dtype=torch.bool))
    assert near(out, expected)
    direction = normal(3, 5, 8)
    of_x, of_y = torch.autograd.grad((out * direction).sum(), (x, y))
    wanted_x, wanted_y = torch.autograd.grad((expected * direction).sum(), (x, y))
    assert near(of_x, wanted_x, 1e-9)
    assert near(of_y, wanted_y, 1e-9)


@pytest.mark.parametrize("dim", [8, 64])
def test_a_module_has_16_d_squared_weights(dim: int) -> None:
    """Of which the gate has 12; biases and norm apart."""
    gca = GatedCrossAttention(dim, 2)
    sizes = {name: parameter.numel() for name, parameter in gca.named_parameters() if parameter.dim() == 2}
    assert sum(sizes.values()) == 16 * dim**2
    assert sum(size for name, size in sizes.items() if name.startswith("gate.")) == 12 * dim**2


@pytest.mark.parametrize(("dim_y", "gate_hidden", "inner"), [(6, None, 28), (8, None, 32), (6, 5, 5)])
def test_the_inner_width_of_the_gate(dim_y: int, gate_hidden: int | None, inner: int) -> None:
    gca = module(dim_y=dim_y, gate_hidden=gate_hidden)
    assert gca.gate[0].weight.shape == (inner, 8 + dim_y)
    assert gca.gate[2].weight.shape == (8, inner)
    x, y = normal(3, 5, 8), normal(3, 5, dim_y)
    assert near(gca(x, y), by_the_equation(gca, x, y, y, torch.ones(3, 5, 5, dtype=torch.bool)))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from(["sigmoid", "tanh"]), SEEDS)
def test_without_a_norm_the_gated_update_is_added(Lx: int, Ly: int, gate: str, seed: int) -> None:
    """And queries that are pads, or see no key, stay x."""
    gca = module(gate, dim_y=6, norm=False)
    torch.manual_seed(seed)
    x, y = normal(3, Lx, 8), normal(3, Ly, 6)
    queries, keys = torch.rand(3, Lx) < 0.7, torch.rand(3, Ly) < 0.7
    with record_activations(gca) as recorded:
        out = gca(x, y, query_mask=queries, key_mask=keys, causal=True)
    (seen,) = recorded
    assert torch.equal(out[~seen.updated], x[~seen.updated])
    assert near(out[seen.updated], (x + seen.gate * seen.x_prime)[seen.updated], 1e-14)
    assert (out - x)[seen.updated].abs().amax(dim=1).gt(1e-6).all()
    with_norm = module(gate, dim_y=6)
    assert near(with_norm(x, y, query_mask=queries, key_mask=keys, causal=True), with_norm.norm(out))
    assert {*with_norm.state_dict()} - {*gca.state_dict()} == {"norm.weight", "norm.bias"}


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.booleans(), SEEDS)
def test_masks_and_unequal_lengths_against_the_equation(Lx: int, Ly: int, causal: bool, seed: int) -> None:
    """Rows are aligned from the newest real one, pair by pair."""
    gca = module(dim_y=6)
    torch.manual_seed(seed)
    x, y = normal(3, Lx, 8), normal(3, Ly, 6)
    queries, keys = torch.rand(3, Lx) < 0.7, torch.rand(3, Ly) < 0.7
    beside, mask = torch.zeros(3, Lx, 6, dtype=torch.float64), torch.zeros(3, Lx, Ly, dtype=torch.bool)
    for user in range(3):
        rows_x, rows_y = (m[user].nonzero().flatten().tolist()[::-1] for m in (queries, keys))  # newest first
        for age, row in enumerate(rows_x):
            mask[user, row, rows_y[age:] if causal else rows_y] = True
            if age < len(rows_y):
                beside[user, row] = y[user, rows_y[age]]
    out = gca(x, y, query_mask=queries, key_mask=keys, causal=causal)
    assert near(out, by_the_equation(gca, x, y, beside, mask))


@settings(max_examples=30, deadline=None)
@given(SEEDS)
def test_a_mask_of_pairs_decides_keys_and_neighbour(seed: int) -> None:
    gca = module(dim_y=6)
    torch.manual_seed(seed)
    x, y, mask = normal(3, 4, 8), normal(3, 5, 6), torch.rand(3, 4, 5) < 0.4
    queries, keys = torch.rand(3, 4) < 0.8, torch.rand(3, 5) < 0.8
    shown = mask & queries.unsqueeze(2) & keys.unsqueeze(1)
    beside = torch.zeros(3, 4, 6, dtype=torch.float64)
    for user, row, key in shown.nonzero().tolist():  # in order, so that the last one stays
        beside[user, row] = y[user, key]
    out = gca(x, y, query_mask=queries, key_mask=keys, mask=mask)
    assert near(out, by_the_equation(gca, x, y, beside, shown))


# ------------------------------------------------------------------------------------------------------- pads

PADS = st.tuples(st.integers(0, 3), st.integers(0, 3))


def padded(rows: Tensor, pads: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The rows (L, d) between pads that hold noise, and their mask."""
    front, behind = (100 * normal(n, rows.size(1)) for n in pads)
    real = torch.arange(pads[0] + len(rows) + pads[1])
    return torch.cat([front, rows, behind]), (real >= pads[0]) & (real < pads[0] + len(rows))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(0, 5), PADS, PADS, st.booleans(), SEEDS)
def test_pads_on_either_side_change_no_real_row(
    Lx: int, Ly: int, of_x: tuple[int, int], of_y: tuple[int, int], causal: bool, seed: int
) -> None:
    gca = module(dim_y=6)
    torch.manual_seed(seed)
    x, y = normal(Lx, 8), normal(Ly, 6)
    expected = gca(x.unsqueeze(0), y.unsqueeze(0), causal=causal)[0]
    (many_x, queries), (many_y, keys) = padded(x, of_x), padded(y, of_y)
    out = gca(many_x[None], many_y[None], query_mask=queries[None], key_mask=keys[None], causal=causal)[0]
    assert near(out[queries], expected)
    assert near(out[~queries], gca.norm(many_x[~queries]))


def test_hidden_keys_have_no_influence() -> None:
    gca = module()
    x, y = normal(3, 4, 8), normal(3, 4, 8)
    keys = bools([[0, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 0]])
    other = torch.where(keys.unsqueeze(2), y, 1e6 * normal(3, 4, 8))
    assert near(gca(x, other, key_mask=keys), gca(x, y, key_mask=keys))


def test_blind_queries_get_exactly_no_update() -> None:
    """Pads of x, and queries of a sequence that shows no key."""
    gca = module()
    x, y = normal(3, 4, 8), normal(3, 4, 8)
    keys = bools([[0, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 0]])
    queries = bools([[0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]])
    with record_activations(gca) as recorded:
        out = gca(x, y, query_mask=queries, key_mask=keys)
    (seen,) = recorded
    assert seen.updated.tolist() == [[False] + [True] * 3, [False] * 4, [True] * 4]
    assert not seen.x_prime[~seen.updated].any()
    assert seen.x_prime[seen.updated].abs().min() > 0
    assert near(out[~seen.updated], gca.norm(x[~seen.updated]))


@pytest.mark.parametrize("weights", [False, True])
def test_an_empty_y_leaves_the_norm_of_x(weights: bool) -> None:
    gca = module(dim_y=6)
    x, y = normal(2, 3, 8), normal(2, 0, 6)
    with record_activations(gca, weights=weights):
        assert near(gca(x, y), gca.norm(x))
        assert near(gca(x, y, causal=True, key_mask=torch.ones(2, 0, dtype=torch.bool)), gca.norm(x))
        assert near(gca(x, y, mask=torch.ones(2, 3, 0, dtype=torch.bool)), gca.norm(x))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 0, 0)])
def test_batches_and_queries_may_be_empty(shape: tuple[int, int, int]) -> None:
    B, Lx, Ly = shape
    assert module()(normal(B, Lx, 8), normal(B, Ly, 8), causal=True).shape == (B, Lx, 8)


def test_gradients_beside_blind_queries_are_right() -> None:
    gca = module()
    x, y = normal(2, 3, 8).requires_grad_(), normal(2, 3, 8).requires_grad_()
    keys = bools([[0, 1, 1], [0, 0, 0]])
    assert torch.autograd.gradcheck(lambda x, y: gca(x, y, key_mask=keys, causal=True), (x, y))
    (gca(x, y, key_mask=keys, causal=True) * normal(2, 3, 8)).sum().backward()
    assert not y.grad[~keys].any()
    assert all(parameter.grad.isfinite().all() for parameter in gca.parameters())
    assert all(parameter.grad.any() for parameter in gca.parameters())


def test_a_user_who_sees_nothing_teaches_the_attention_nothing() -> None:
    gca = module()
    (gca(normal(1, 3, 8), normal(1, 3, 8), key_mask=bools([[0, 0, 0]])) * normal(1, 3, 8)).sum().backward()
    assert not any(parameter.grad.any() for parameter in gca.cross_attention.parameters())


@pytest.mark.parametrize(("Lx", "Ly"), [(6, 6), (4, 6), (6, 4)])
def test_causal_rows_see_what_stands_beside_them_and_nothing_newer(Lx: int, Ly: int) -> None:
    gca = module()
    x, y = normal(2, Lx, 8), normal(2, Ly, 8)
    out = gca(x, y, causal=True)
    for age in range(1, min(Lx, Ly)):  # counted back from the newest
        x_2, y_2, row = x.clone(), y.clone(), Lx - age - 1
        x_2[:, row + 1 :], y_2[:, Ly - age :] = normal(2, age, 8), normal(2, age, 8)
        assert near(gca(x_2, y_2, causal=True)[:, : row + 1], out[:, : row + 1])
        y_2 = y.clone()
        y_2[:, Ly - age - 1] = normal(2, 8)
        assert not near(gca(x, y_2, causal=True)[:, row], out[:, row], 1e-6)


# -------------------------------------------------------------------------------------------- what may be seen


def test_the_examples_in_the_docstrings_hold() -> None:
    result = doctest.testmod(attention)
    assert result.failed == 0
    assert result.attempted > 3


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 4), st.integers(1, 4), SEEDS)
def test_visible_keys_are_not_newer_than_the_query_allows(Lx: int, Ly: int, seed: int) -> None:
    torch.manual_seed(seed)
    query, key = torch.randint(-1, 5, (3, Lx)), torch.randint(0, 5, (3, Ly))
    expected = [[[bool(k <= q) for k in key[user]] for q in query[user]] for user in range(3)]
    assert visible(query, key).tolist() == expected


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), SEEDS)
def test_causal_mask_shows_earlier_real_rows_and_the_row_itself(L: int, seed: int) -> None:
    torch.manual_seed(seed)
    mask = torch.rand(3, L) < 0.6
    expected = [[[bool(k == q or (k < q and mask[b, k])) for k in range(L)] for q in range(L)] for b in range(3)]
    assert causal_mask(mask).tolist() == expected


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 4), st.integers(1, 5), SEEDS)
def test_newest_visible_is_the_last_row_that_the_mask_shows(Lx: int, Ly: int, seed: int) -> None:
    torch.manual_seed(seed)
    y, mask = normal(3, Ly, 2), torch.rand(3, Lx, Ly) < 0.4
    expected = torch.zeros(3, Lx, 2, dtype=torch.float64)
    for user, query, key in mask.nonzero().tolist():
        expected[user, query] = y[user, key]
    assert torch.equal(newest_visible(y, mask), expected)


# ------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("heads", [0, 5, 24, -1])
def test_heads_that_do_not_divide_the_width_are_refused_with_those_that_do(heads: int) -> None:
    with pytest.raises(ValueError, match=rf"heads={heads} does not divide dim=12; .* 1, 2, 3, 4, 6, 12\."):
        GatedCrossAttention(12, heads)


def test_another_gate_is_refused() -> None:
    with pytest.raises(ValueError, match="gate='relu' is unknown; it may be sigmoid, tanh"):
        GatedCrossAttention(12, 4, gate="relu")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape_x", "shape_y"),
    [((2, 3, 8), (2, 3, 7)), ((2, 3, 7), (2, 3, 6)), ((2, 3, 8), (3, 3, 6)), ((3, 8), (3, 6)), ((2, 3, 8), (6,))],
)
def test_shapes_that_do_not_fit_are_named(shape_x: tuple[int, ...], shape_y: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be \(batch, length, 8\) and \(batch, length, 6\)") as failed:
        module(dim_y=6)(normal(*shape_x), normal(*shape_y))
    assert f"x {shape_x} and y {shape_y}" in str(failed.value)


@pytest.mark.parametrize(
    ("name", "shape", "wanted"),
    [("query_mask", (2, 4), "(2, 3)"), ("key_mask", (2, 3), "(2, 4)"), ("mask", (3, 4), "(2, 3, 4)")],
)
def test_masks_that_do_not_fit_are_named(name: str, shape: tuple[int, ...], wanted: str) -> None:
    with pytest.raises(ValueError) as failed:
        module()(normal(2, 3, 8), normal(2, 4, 8), **{name: torch.ones(shape, dtype=torch.bool)})
    assert f"{name} is torch.bool {shape}; it must be torch.bool {wanted}." in str(failed.value)


def test_a_mask_of_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"query_mask is torch.float32 \(2, 3\); it must be torch.bool"):
        module()(normal(2, 3, 8), normal(2, 4, 8), query_mask=torch.ones(2, 3))


# ----------------------------------------------------------------------------------------- records of activations


def test_records_hold_what_the_pass_computed() -> None:
    gca = module("tanh", dim_y=6)
    x, y = normal(2, 3, 8).requires_grad_(), normal(2, 5, 6)
    queries = bools([[0, 1, 1], [1, 1, 1]])
    with record_activations(nn.ModuleDict({"inner": gca})) as recorded:
        out = gca(x, y, query_mask=queries, causal=True)
    (seen,) = recorded
    assert seen.name == "gca"
    assert torch.equal(seen.x, x.detach())
    assert torch.equal(seen.y, torch.where(queries.unsqueeze(2), y[:, 2:], 0.0))  # counted from the newest
    assert near(seen.gate, gca.activation(gca.gate(torch.cat([seen.x, seen.y], dim=2))))
    assert torch.equal(seen.out, out)
    assert torch.equal(seen.update, seen.gate * seen.x_prime)
    assert near(gca.norm(seen.x + seen.update), seen.out)
    assert torch.equal(seen.mask, queries)
    assert seen.attention is None


def test_records_have_gradients_but_for_no_grad() -> None:
    gca, x = module(), normal(2, 3, 8)
    with record_activations(gca) as recorded:
        gca(x, x)
        with torch.no_grad():
            gca(x, x)
    with_gradients, without = ((seen.x_prime, seen.gate, seen.update, seen.out) for seen in recorded)
    assert not any(tensor.requires_grad for tensor in without)
    for tensor in with_gradients:
        weight = gca.cross_attention.key_value.weight
        (of_key,) = torch.autograd.grad(tensor.square().sum(), weight, retain_graph=True, allow_unused=True)
        assert of_key is None if tensor is recorded[0].gate else of_key.any()


def test_recording_changes_nothing_and_needs_no_second_pass() -> None:
    gca, calls = module(), []
    gca.cross_attention.out.register_forward_hook(lambda *_: calls.append("attention"))
    gca.gate.register_forward_hook(lambda *_: calls.append("gate"))
    x, y = normal(2, 3, 8), normal(2, 5, 8)
    plain = gca(x, y)
    with record_activations(gca, weights=True):
        assert torch.equal(gca(x, y), plain)
    assert calls == ["attention", "gate"] * 2


def test_recording_ends_with_its_block_and_blocks_nest() -> None:
    gca, x = module(), normal(1, 2, 8)
    with record_activations(gca) as outer:
        gca(x, x)
        with record_activations(gca, weights=True) as inner:
            gca(x, x)
        gca(x, x)
        with recording_paused(gca):
            gca(x, x)
    gca(x, x)
    assert [seen.attention is None for seen in outer] == [True, True]
    assert [seen.attention is None for seen in inner] == [False]


def test_recorded_weights_are_a_distribution_over_the_visible_keys_and_reproduce_x_prime() -> None:
    gca = module()
    x, y, keys = normal(2, 4, 8), normal(2, 4, 8), bools([[0, 1, 1, 1], [0, 0, 1, 1]])
    with record_activations(gca, weights=True) as recorded:
        gca(x, y, key_mask=keys, query_mask=keys, causal=True)
    (seen,) = recorded
    shown = keys.unsqueeze(1) & keys.unsqueeze(2) & torch.ones(4, 4, dtype=torch.bool).tril()
    weights = seen.attention  # (B, h, Lx, Ly)
    assert torch.equal(weights > 0, shown.unsqueeze(1).expand(2, 2, 4, 4))
    assert near(weights.sum(dim=3), shown.any(dim=2).double().unsqueeze(1).expand(2, 2, 4))
    key_value = gca.cross_attention.key_value
    v = (y @ key_value.weight[8:].T + key_value.bias[8:]).view(2, 4, 2, 4).transpose(1, 2)  # (B, h, Ly, p)
    heads = (weights @ v).transpose(1, 2).reshape(2, 4, 8)
    assert near(gca.cross_attention.out(heads) * seen.updated.unsqueeze(2), seen.x_prime)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_a_copy_made_while_recording_does_not_record_and_the_original_goes_on(
    duplicate: Callable[[GatedCrossAttention], GatedCrossAttention],
) -> None:
    gca, x = module(), normal(1, 2, 8)
    with record_activations(gca) as recorded:
        other = duplicate(gca)
        assert torch.equal(other(x, x), gca(x, x))
        assert len(recorded) == 1
        with record_activations(other) as of_other:
            other(x, x)
        gca(x, x)
    assert (len(recorded), len(of_other)) == (2, 1)


def test_a_pickle_made_while_recording_is_the_module_without_the_record() -> None:
    gca, x = module(), normal(1, 2, 8)
    pickled = pickle.dumps(gca)
    with record_activations(gca):
        out = gca(x, x)
        assert pickle.dumps(gca) == pickled
    assert torch.equal(pickle.loads(pickled)(x, x), out)


# ----------------------------------------------------------------------------------- dropout, start, forms of torch


def test_dropout_drops_features_of_x_prime_in_training_only() -> None:
    gca, x, y = module(dropout=0.5), normal(40, 5, 8), normal(40, 5, 8)
    with record_activations(gca) as recorded:
        assert near(gca.eval()(x, y), module()(x, y))
        gca.train()(x, y)
    kept, dropped = recorded[0].x_prime, recorded[1].x_prime
    assert near(dropped[dropped != 0], 2 * kept[dropped != 0])
    assert abs((dropped == 0).double().mean() - 0.5) < 5 * 0.5 / 1600**0.5


def test_without_dropout_training_is_evaluation() -> None:
    gca, x = module(), normal(2, 5, 8)
    assert torch.equal(gca.train()(x, x), gca.eval()(x, x))


def test_a_seed_gives_both_gates_the_same_initial_weights() -> None:
    starts = []
    for gate in ("sigmoid", "tanh"):
        torch.manual_seed(5)
        starts.append(GatedCrossAttention(8, 4, gate).state_dict())  # type: ignore[arg-type]
    assert same_tensors(*starts)


def test_cross_attention_is_usable_alone() -> None:
    gca, x, y = module(dim_y=6), normal(2, 3, 8), normal(2, 4, 6)
    alone = CrossAttention(8, 2, dim_y=6).double()
    alone.load_state_dict(gca.cross_attention.state_dict())
    assert near(alone(x, y, torch.ones(2, 3, 4, dtype=torch.bool)), torch_attention(gca)(x, y, y)[0])


def test_bfloat16_on_a_cpu_is_near_float32() -> None:
    torch.manual_seed(0)
    gca = GatedCrossAttention(8, 2, dim_y=6)
    x, y, keys = torch.randn(2, 5, 8), torch.randn(2, 4, 6), bools([[0, 1, 1, 1], [0, 0, 0, 0]])
    expected = gca(x, y, key_mask=keys, causal=True)
    half = copy.deepcopy(gca).bfloat16()
    with record_activations(half, weights=True) as recorded:
        out = half(x.bfloat16(), y.bfloat16(), key_mask=keys, causal=True)
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).abs().max() < 0.1
    assert recorded[0].attention.isfinite().all()
    out.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in half.parameters())


def test_bf16_autocast_is_near_float32() -> None:
    torch.manual_seed(0)
    gca, x, y = GatedCrossAttention(8, 2), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16), record_activations(gca, weights=True) as recorded:
        out = gca(x, y, causal=True)
    assert 0 < (out - gca(x, y, causal=True)).abs().max() < 0.1
    assert recorded[0].attention.isfinite().all()


def test_an_exported_program_takes_other_batches_and_lengths() -> None:
    gca = module(dim_y=6).eval()
    sizes = {"x": {0: Dim("B"), 1: Dim("Lx")}, "y": {0: Dim("B"), 1: Dim("Ly")}}
    sizes |= {"query_mask": sizes["x"], "key_mask": sizes["y"], "causal": None}  # type: ignore[dict-item]

    def arguments(B: int, Lx: int, Ly: int) -> tuple[tuple[Tensor, Tensor], dict[str, Tensor | bool]]:
        masks = {"query_mask": torch.rand(B, Lx) < 0.7, "key_mask": torch.rand(B, Ly) < 0.7}
        return (normal(B, Lx, 8), normal(B, Ly, 6)), {**masks, "causal": True}

    program = export(gca, *arguments(3, 5, 4), dynamic_shapes=sizes).module()
    for B, Lx, Ly in ((3, 5, 4), (7, 2, 6)):
        given, options = arguments(B, Lx, Ly)
        assert near(program(*given, **options), gca(*given, **options))


@pytest.mark.slow
def test_torch_compile_gives_the_same() -> None:
    gca, x, y = module(), normal(3, 5, 8), normal(3, 4, 8)
    compiled = torch.compile(gca)
    assert near(compiled(x, y, causal=True), gca(x, y, causal=True))

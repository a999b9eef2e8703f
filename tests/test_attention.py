"""Gated cross-attention against torch's own attention: equation, masks, alignment, taps, packed form."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gcalib.attention import CrossAttention, GatedCrossAttention, newest_visible, tapping
from gcalib.packing import Layout


def module(dim: int = 8, heads: int = 2, gate: str = "sigmoid") -> GatedCrossAttention:
    """A module in float64 whose every parameter, biases and norm too, is random."""
    torch.manual_seed(0)
    gca = GatedCrossAttention(dim, heads, gate=gate).double()
    with torch.no_grad():
        for parameter in gca.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return gca


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def referee(gca: GatedCrossAttention) -> nn.MultiheadAttention:
    """Torch's multi-head attention with the module's weights."""
    dim, attention = gca.dim, gca.attention
    other = nn.MultiheadAttention(dim, attention.heads, batch_first=True).double()
    with torch.no_grad():
        other.in_proj_weight.copy_(torch.cat([attention.query.weight, attention.key_value.weight]))
        other.in_proj_bias.copy_(torch.cat([attention.query.bias, attention.key_value.bias]))
    other.out_proj.load_state_dict(attention.out.state_dict())
    return other


def by_the_equation(gca: GatedCrossAttention, x: Tensor, y: Tensor, partner: Tensor, hidden: Tensor) -> Tensor:
    """LayerNorm(x + act(FFN([x ; y])) * CA(x, y)), by hand; `hidden` (batch, length_x, length_y) is True where hidden.

    A query from which everything is hidden gets X' = 0.
    """
    blind = hidden.all(dim=2, keepdim=True)
    heads = gca.attention.heads
    x_prime, _ = referee(gca)(x, y, y, attn_mask=(hidden & ~blind).repeat_interleave(heads, dim=0), need_weights=False)
    x_prime = torch.where(blind, 0.0, x_prime)
    first, second = gca.gate_ffn[0], gca.gate_ffn[2]
    inner = (torch.cat([x, partner], dim=2) @ first.weight.T + first.bias).clamp(min=0)
    logits = inner @ second.weight.T + second.bias
    gate = {"sigmoid": 1 / (1 + torch.exp(-logits)), "tanh": torch.tanh(logits)}[gca.gate_name]
    h = x + gate * x_prime
    centred = h - h.mean(dim=2, keepdim=True)
    deviation = (centred.square().mean(dim=2, keepdim=True) + gca.norm.eps).sqrt()
    return centred / deviation * gca.norm.weight + gca.norm.bias


@pytest.mark.parametrize("gate", ["sigmoid", "tanh"])
@pytest.mark.parametrize("heads", [1, 2, 8])
def test_the_plain_form_is_the_equation(gate: str, heads: int) -> None:
    gca = module(heads=heads, gate=gate)
    x, y = normal(3, 5, 8).requires_grad_(), normal(3, 5, 8).requires_grad_()
    nothing_hidden = torch.zeros(3, 5, 5, dtype=torch.bool)
    out, expected = gca(x, y), by_the_equation(gca, x, y, y, nothing_hidden)
    assert torch.allclose(out, expected, rtol=0, atol=1e-12)
    direction = normal(3, 5, 8)
    gradients = [torch.autograd.grad((o * direction).sum(), (x, y)) for o in (out, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.booleans(), st.integers(0, 2**30))
def test_masks_causality_and_unequal_lengths_against_the_equation(Lx: int, Ly: int, causal: bool, seed: int) -> None:
    gca = module()
    torch.manual_seed(seed)
    x, y = normal(3, Lx, 8), normal(3, Ly, 8)
    queries, keys = torch.rand(3, Lx) < 0.7, torch.rand(3, Ly) < 0.7
    hidden = ~(queries.unsqueeze(2) & keys.unsqueeze(1))
    partner = torch.zeros_like(x)
    for i in range(Lx):
        j = i + Ly - Lx  # counted from the newest end
        hidden[:, i, max(j + 1, 0) :] |= causal
        if j >= 0:
            partner[:, i] = torch.where(keys[:, j : j + 1], y[:, j], 0.0)
    out = gca(x, y, query_mask=queries, key_mask=keys, causal=causal)
    assert torch.allclose(out, by_the_equation(gca, x, y, partner, hidden), rtol=0, atol=1e-12)


def test_masked_keys_have_no_influence_and_a_blind_row_gets_exactly_no_update() -> None:
    gca = module()
    x, y = normal(3, 4, 8), normal(3, 4, 8)
    keys = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    queries = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]], dtype=torch.bool)
    with tapping(gca) as taps:
        out = gca(x, y, query_mask=queries, key_mask=keys)
    other = torch.where(keys.unsqueeze(2), y, 1e6 * normal(3, 4, 8))
    assert torch.equal(gca(x, other, query_mask=queries, key_mask=keys), out)
    assert torch.equal(out[1], gca.norm(x[1])) and torch.equal(out[0, 0], gca.norm(x[0, 0]))
    (tap,) = taps
    assert torch.equal(tap.x_prime[~tap.updated], torch.zeros(4, 8, dtype=torch.float64))
    assert tap.updated.tolist() == [True] * 3 + [False] * 4 + [True] * 4  # the query that is a pad is not in the tap
    assert tap.x_prime[tap.updated].abs().min() > 0


def test_gradients_are_finite_and_right_beside_blind_rows() -> None:
    gca = module(dim=4)
    x, y = normal(2, 3, 4).requires_grad_(), normal(2, 3, 4).requires_grad_()
    keys = torch.tensor([[0, 1, 1], [0, 0, 0]], dtype=torch.bool)

    def form(x: Tensor, y: Tensor) -> Tensor:
        return gca(x, y, key_mask=keys, causal=True)

    assert torch.autograd.gradcheck(form, (x, y))
    (form(x, y) * normal(2, 3, 4)).sum().backward()
    assert torch.isfinite(y.grad).all() and torch.equal(y.grad[1], torch.zeros(3, 4, dtype=torch.float64))
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in gca.parameters())
    gca.zero_grad()
    (gca(x[1:], y[1:], key_mask=keys[1:]) * normal(1, 3, 4)).sum().backward()
    # a user who sees nothing teaches the attention nothing
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in gca.attention.parameters())


@pytest.mark.parametrize(("Lx", "Ly"), [(6, 6), (4, 6), (6, 4)])
def test_causal_no_item_after_a_position_reaches_it(Lx: int, Ly: int) -> None:
    gca = module()
    x, y = normal(2, Lx, 8), normal(2, Ly, 8)
    out = gca(x, y, causal=True)
    for age in range(1, min(Lx, Ly)):  # positions counted back from the newest end
        x_2, y_2 = x.clone(), y.clone()
        x_2[:, Lx - age :], y_2[:, Ly - age :] = normal(2, age, 8), normal(2, age, 8)
        changed = gca(x_2, y_2, causal=True)
        assert torch.equal(changed[:, : Lx - age], out[:, : Lx - age])
        y_2 = y.clone()
        y_2[:, Ly - age - 1] = normal(2, 8)  # what stands beside a position does reach it
        assert (gca(x, y_2, causal=True)[:, Lx - age - 1] != out[:, Lx - age - 1]).any()


def test_heads_that_do_not_divide_the_width_are_refused_with_those_that_do() -> None:
    for heads in (0, 5, 24, -1):
        with pytest.raises(ValueError, match=rf"heads={heads} does not divide dim=12; .* 1, 2, 3, 4, 6, 12\."):
            GatedCrossAttention(12, heads)
    with pytest.raises(ValueError, match="gate='relu' is unknown; the gates are sigmoid and tanh"):
        GatedCrossAttention(12, 4, gate="relu")  # type: ignore[arg-type]
    for heads in (1, 2, 3, 4, 6, 12):
        assert CrossAttention(12, heads).heads == heads


@pytest.mark.parametrize(
    ("shape_x", "shape_y"),
    [
        ((2, 3, 8), (2, 3, 7)), ((2, 3, 7), (2, 3, 8)), ((2, 3, 8), (3, 3, 8)), ((3, 8), (3, 8)), ((2, 3, 8), (8,)),
        ((2, 3, 8), (2, 0, 8)),
    ],  # fmt: skip
)
def test_shapes_that_do_not_fit_are_named(shape_x: tuple[int, ...], shape_y: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be \(batch, length, 8\) with the same batch") as failed:
        module()(normal(*shape_x), normal(*shape_y))
    assert str(shape_x) in str(failed.value) and str(shape_y) in str(failed.value)


def test_masks_that_do_not_fit_are_named() -> None:
    x, y = normal(2, 3, 8), normal(2, 4, 8)
    with pytest.raises(ValueError, match=r"key_mask is torch.bool \(2, 3\); it must be torch.bool \(2, 4\)"):
        module()(x, y, key_mask=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"query_mask is torch.float32 \(2, 3\); it must be torch.bool"):
        module()(x, y, query_mask=torch.ones(2, 3))


def test_taps_hold_what_the_pass_computed_and_cost_no_second_one() -> None:
    gca = module(gate="tanh")
    calls = []
    gca.attention.query.register_forward_hook(lambda *_: calls.append("query"))
    gca.gate_ffn.register_forward_hook(lambda *_: calls.append("gate"))
    x, y = normal(2, 3, 8).requires_grad_(), normal(2, 5, 8)
    queries = torch.tensor([[0, 1, 1], [1, 1, 1]], dtype=torch.bool)
    plain = gca(x, y, query_mask=queries, causal=True)
    with tapping(nn.ModuleDict({"inner": gca}), weights=True) as taps:
        tapped = gca(x, y, query_mask=queries, causal=True)
        assert len(taps) == 1 and calls == ["query", "gate"] * 2
        (tap,) = taps
        taps.clear()
        gca(x[:1], y[:1])
        assert len(taps) == 1
    assert torch.equal(plain, tapped)
    gca(x, y)
    assert len(taps) == 1  # outside the block nothing is collected
    assert torch.equal(tap.x, x.detach()[queries]) and torch.equal(tap.y, y[:, 2:][queries])
    assert torch.equal(tap.gate, gca.activation(gca.gate_ffn(torch.cat([tap.x, tap.y], dim=1))))
    assert torch.equal(tap.out, plain[queries])
    assert torch.allclose(gca.norm(tap.x + tap.gate * tap.x_prime), tap.out, rtol=0, atol=1e-12)
    assert (tap.name, tap.batch, tap.sequence.tolist()) == ("gca", 2, [0, 0, 1, 1, 1])
    tensors = (tap.x, tap.y, tap.x_prime, tap.gate, tap.out, tap.updated, tap.sequence, tap.attention)
    assert not any(tensor.requires_grad for tensor in tensors)
    assert torch.equal(tap.real(), queries)
    assert torch.equal(tap.padded(tap.x), torch.where(queries.unsqueeze(2), x.detach(), 0.0))


def test_tapped_weights_are_a_distribution_over_the_visible_keys_and_reproduce_x_prime() -> None:
    gca = module()
    x, y = normal(2, 4, 8), normal(2, 4, 8)
    keys = torch.tensor([[0, 1, 1, 1], [0, 0, 1, 1]], dtype=torch.bool)
    with tapping(gca, weights=True) as taps:
        gca(x, y, key_mask=keys, causal=True)
    with tapping(gca) as without:
        gca(x, y, key_mask=keys, causal=True)
    (tap,), A = taps, taps[0].attention
    assert without[0].attention is None
    assert A.shape == (2, 2, 4, 4)
    visible = keys.unsqueeze(1) & torch.ones(4, 4, dtype=torch.bool).tril()
    assert torch.equal(A > 0, visible.unsqueeze(1).expand_as(A))
    total = A.sum(dim=3)
    assert torch.allclose(total, visible.any(dim=2).double().unsqueeze(1).expand_as(total), rtol=0, atol=1e-12)
    v = (y @ gca.attention.key_value.weight[8:].T + gca.attention.key_value.bias[8:]).view(2, 4, 2, 4).transpose(1, 2)
    x_prime = gca.attention.out((A @ v).transpose(1, 2).reshape(8, 8)) * tap.updated.unsqueeze(1)
    assert torch.allclose(x_prime, tap.x_prime, rtol=0, atol=1e-12)


def random_sides(seed: int, batch: int = 4) -> tuple[list[Layout], list[Tensor], Tensor]:
    """Two packed streams with random lengths, some of them zero, and a random mask (False beside pads)."""
    torch.manual_seed(seed)
    counts = [torch.randint(0, 5, (batch,)) for _ in range(2)]
    sequences = [torch.arange(batch).repeat_interleave(c) for c in counts]
    layouts = [Layout.of(sequence, batch) for sequence in sequences]
    real = layouts[0].real().unsqueeze(2) & layouts[1].real().unsqueeze(1)
    return layouts, sequences, real & (torch.rand(real.shape) < 0.6)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**30))
def test_the_packed_form_equals_the_padded_one(seed: int) -> None:
    gca = module()
    (of_x, of_y), (sequence, _), mask = random_sides(seed)
    x, y, partner = normal(len(of_x.index), 8), normal(len(of_y.index), 8), normal(len(of_x.index), 8)
    with tapping(gca) as taps:
        out = gca.rows(x, y, partner, of_x, of_y, mask, sequence=sequence)
    expected = by_the_equation(gca, of_x.pad(x), of_y.pad(y), of_x.pad(partner), ~mask)
    assert torch.allclose(out, of_x.unpad(expected), rtol=0, atol=1e-12)
    assert torch.equal(taps[0].updated, mask.any(dim=2).view(-1)[of_x.index])
    assert torch.equal(taps[0].y, partner) and torch.equal(taps[0].sequence, sequence)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**30))
def test_newest_visible_is_the_last_row_that_the_mask_shows(seed: int) -> None:
    (of_x, of_y), _, mask = random_sides(seed)
    y = normal(len(of_y.index), 3)
    padded, expected = of_y.pad(y), []
    for place in of_x.index.tolist():
        user, query = divmod(place, of_x.length)
        shown = mask[user, query].nonzero().flatten().tolist()
        expected.append(padded[user, shown[-1]] if shown else torch.zeros(3, dtype=torch.float64))
    found = newest_visible(y, of_y, mask, of_x)
    assert found.shape == (len(of_x.index), 3)
    assert not expected or torch.equal(found, torch.stack(expected))


def test_a_seed_and_the_gate_do_not_change_the_start() -> None:
    starts = []
    for gate in ("sigmoid", "tanh"):
        torch.manual_seed(5)
        starts.append(GatedCrossAttention(8, 4, gate=gate).state_dict())
    assert all(torch.equal(tensor, starts[1][name]) for name, tensor in starts[0].items())


def test_it_runs_in_bf16_autocast() -> None:
    gca = module().float()
    x, y = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16), tapping(gca, weights=True) as taps:
        out = gca(x, y, causal=True)
    assert 0 < (out - gca(x, y, causal=True)).abs().max() < 0.2
    assert torch.isfinite(taps[0].attention).all()

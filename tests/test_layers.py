"""The shared parts against plain torch: dropout, real rows, SwiGLU, LoRA, self-attention, SASRec's encoder."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gcalib.attention import causal_mask
from gcalib.layers import (
    Dropout,
    LoRA,
    SelfAttention,
    SwiGLU,
    TransformerEncoder,
    attend,
    merge_heads,
    padded,
    real_rows,
    split_heads,
)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def near(first: Tensor, second: Tensor, atol: float = 1e-11) -> bool:
    return first.shape == second.shape and torch.allclose(first, second, rtol=0, atol=atol)


# ------------------------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_dropout_has_the_rate_it_says_and_keeps_the_expectation(rate: float) -> None:
    torch.manual_seed(0)
    dropout = Dropout(rate).train()
    real_rate = dropout.threshold / 256
    assert abs(real_rate - rate) <= 1 / 512
    n = 400_000
    out = dropout(torch.ones(n // 100, 100))
    dropped = (out == 0).double().mean().item()
    assert abs(dropped - real_rate) < 5 * math.sqrt(real_rate * (1 - real_rate) / n)
    assert out[out != 0].unique().tolist() == pytest.approx([1 / (1 - real_rate)])  # one scale: the mean is exact
    assert dropout.extra_repr() == f"rate={dropout.threshold}/256"


@pytest.mark.parametrize("shift", [1, 2, 7, 8])
def test_dropout_drops_neighbours_independently(shift: int) -> None:
    """Eight neighbours share a word of randomness."""
    torch.manual_seed(1)
    kept = Dropout(0.5).train()(torch.ones(1000, 64)).ne(0).double() - 0.5
    bound = 5.5 * 0.25 / math.sqrt(kept.numel())
    assert abs((kept[:, shift:] * kept[:, :-shift]).mean()) < bound
    assert abs((kept[shift:] * kept[:-shift]).mean()) < bound


def test_dropout_is_alike_for_each_byte_and_new_in_each_call() -> None:
    torch.manual_seed(1)
    dropout = Dropout(0.5).train()
    first, second = (dropout(torch.ones(1000, 64)).ne(0).double() - 0.5 for _ in range(2))
    assert abs((first * second).mean()) < 5 * 0.25 / math.sqrt(first.numel())
    assert first.view(-1, 8).mean(dim=0).abs().max() < 5 * 0.5 / math.sqrt(first.numel() / 8)


def test_dropout_is_the_identity_in_evaluation_and_at_rate_zero() -> None:
    x, state = torch.randn(5, 7), torch.get_rng_state()
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0).train()(x) is x
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_at_a_rate_next_to_one_still_keeps_something() -> None:
    torch.manual_seed(0)
    assert 0.9 < Dropout(0.999).train()(torch.ones(100, 1000)).mean() < 1.1


def test_dropout_follows_the_seed_and_its_gradient_the_mask() -> None:
    dropout, x = Dropout(0.3).train(), torch.randn(9, 5, requires_grad=True)  # 45: not a whole number of words
    torch.manual_seed(4)
    first = dropout(x)
    torch.manual_seed(4)
    assert torch.equal(dropout(x), first)
    assert not torch.equal(dropout(x), first)
    (gradient,) = torch.autograd.grad(first.sum(), x)
    assert torch.allclose(gradient * x, first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dropout_keeps_the_type(dtype: torch.dtype) -> None:
    out = Dropout(0.5).train()(torch.ones(100, 3, dtype=dtype))
    assert out.dtype == dtype
    assert set(out.unique().tolist()) == {0.0, 2.0}


# ---------------------------------------------------------------------------------------------- row-wise layers


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.floats(0, 1), st.integers(0, 2**30))
def test_real_rows_pass_a_layer_and_come_back_between_zeros(B: int, L: int, share: float, seed: int) -> None:
    torch.manual_seed(seed)
    layer, x, mask = nn.Linear(3, 5).double(), normal(B, L, 3).requires_grad_(), torch.rand(B, L) < share
    rows = real_rows(x, mask)
    assert torch.equal(rows, x[mask])
    out, expected, direction = padded(layer(rows), mask), layer(x) * mask.unsqueeze(2), normal(B, L, 5)
    assert near(out, expected)
    (of_x,) = torch.autograd.grad((out * direction).sum(), x, retain_graph=True)
    (wanted,) = torch.autograd.grad((expected * direction).sum(), x, retain_graph=True)
    assert near(of_x, wanted)
    (of_weight,) = torch.autograd.grad((out * direction).sum(), layer.weight)
    (wanted,) = torch.autograd.grad((expected * direction).sum(), layer.weight)
    assert near(of_weight, wanted)


def test_swiglu_is_its_formula_without_biases() -> None:
    layer, x = SwiGLU(6, 10).double(), normal(4, 6)
    g = x @ layer.gate.weight.T
    assert near(layer(x), ((g / (1 + torch.exp(-g))) * (x @ layer.inner.weight.T)) @ layer.outer.weight.T)
    assert not [name for name, _ in layer.named_parameters() if "bias" in name]


def test_swiglu_has_the_published_width() -> None:
    assert SwiGLU(256).inner.out_features == 680


def test_lora_is_its_formula_and_starts_silent() -> None:
    layer, x = LoRA(6, 2).double(), normal(4, 6)
    assert not layer(x).any()
    assert layer.A.abs().min() > 0
    with torch.no_grad():
        layer.B.normal_()
    assert near(layer(x), torch.einsum("nd,rd,or->no", x, layer.B, layer.A))


# ------------------------------------------------------------------------------------------------------ attention


def test_heads_split_into_neighbouring_features_and_merge_back() -> None:
    x = torch.randn(2, 3, 8)
    heads = split_heads(x, 4)
    assert heads.shape == (2, 4, 3, 2)
    assert torch.equal(heads[1, 2, 0], x[1, 0, 4:6])
    assert torch.equal(merge_heads(heads), x)


def test_attend_is_scaled_softmax_attention_where_the_mask_shows() -> None:
    torch.manual_seed(0)
    q, k, v, mask = normal(2, 3, 4, 5), normal(2, 3, 6, 5), normal(2, 3, 6, 5), torch.rand(2, 4, 6) < 0.5
    mask[..., 0] = True
    logits = (q @ k.transpose(2, 3) / math.sqrt(5)).masked_fill(~mask.unsqueeze(1), -math.inf)
    assert near(attend(q, k, v, mask), logits.softmax(-1) @ v)


def test_attend_adds_a_mask_of_numbers_to_the_logits() -> None:
    q, k, v, bias = normal(2, 3, 4, 5), normal(2, 3, 6, 5), normal(2, 3, 6, 5), normal(2, 4, 6)
    logits = q @ k.transpose(2, 3) / math.sqrt(5) + bias.unsqueeze(1)
    assert near(attend(q, k, v, bias), logits.softmax(-1) @ v)


@pytest.mark.parametrize("autocast", [True, False])
def test_attend_of_halves_works_in_float32_on_a_cpu(autocast: bool) -> None:
    q, k, v = (torch.randn(2, 2, 6, 8).bfloat16() for _ in range(3))
    mask = torch.ones(2, 6, 6, dtype=torch.bool).tril()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = attend(q, k, v, mask)
    assert torch.equal(out, attend(q.float(), k.float(), v.float(), mask).bfloat16())


def torch_attention(query: nn.Linear, key_value: nn.Linear, out: nn.Linear, heads: int) -> nn.MultiheadAttention:
    """Torch's multi-head attention with the weights of ours."""
    other = nn.MultiheadAttention(out.in_features, heads, batch_first=True).double()
    with torch.no_grad():
        other.in_proj_weight.copy_(torch.cat([query.weight, key_value.weight]))
        other.in_proj_bias.copy_(torch.cat([query.bias, key_value.bias]))
    other.out_proj.load_state_dict(out.state_dict())
    return other


def self_attention() -> tuple[SelfAttention, nn.MultiheadAttention]:
    """Ours and torch's, with the same random weights, biases too."""
    torch.manual_seed(2)
    ours, other = SelfAttention(12, 3).double(), nn.MultiheadAttention(12, 3, batch_first=True).double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_()
        other.in_proj_weight.copy_(ours.query_key_value.weight)
        other.in_proj_bias.copy_(ours.query_key_value.bias)
    other.out_proj.load_state_dict(ours.out.state_dict())
    return ours, other


REAL = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)


def test_self_attention_is_causal_attention_of_each_sequence() -> None:
    ours, other = self_attention()
    x = normal(3, 4, 12).requires_grad_()
    out, direction = ours(x, causal_mask(REAL)), normal(3, 4, 12) * REAL.unsqueeze(2)
    expected = torch.zeros_like(out)
    for user, length in enumerate(REAL.sum(dim=1).tolist()):
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        sequence = x[user : user + 1, :length]
        expected[user, :length] = other(sequence, sequence, sequence, attn_mask=future)[0][0]
    assert near(out * REAL.unsqueeze(2), expected)
    (of_x,) = torch.autograd.grad((out * direction).sum(), x)
    (wanted,) = torch.autograd.grad((expected * direction).sum(), x)
    assert near(of_x, wanted, 1e-10)


PADS = torch.tensor([[3, 0, 5, 1], [7, 0, 0, 0], [0, 0, 2, 0]])


def beside_zeros(other: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """Causal attention of each real row to its `PADS` rows of zeros, too, one row at a time."""
    out = torch.zeros_like(x)
    for user, row in REAL.nonzero().tolist():
        seen = torch.cat([x.new_zeros(int(PADS[user, row]), x.size(2)), x[user, : row + 1]])[None]
        out[user, row] = other(x[user, row].view(1, 1, -1), seen, seen)[0][0, 0]
    return out


def test_self_attention_beside_pads_is_attention_to_as_many_zero_vectors() -> None:
    """One pad whose logit is raised by log n stands for n of them, n = 0 included; its key and value are biases."""
    ours, other = self_attention()
    x = normal(3, 4, 12).requires_grad_()
    out, expected = ours(x, causal_mask(REAL), PADS), beside_zeros(other, x)
    assert near(out * REAL.unsqueeze(2), expected)
    direction = normal(3, 4, 12) * REAL.unsqueeze(2)
    of_x, of_bias = torch.autograd.grad((out * direction).sum(), (x, ours.query_key_value.bias))
    wanted_x, wanted_bias = torch.autograd.grad((expected * direction).sum(), (x, other.in_proj_bias))
    assert near(of_x, wanted_x, 1e-10)
    assert near(of_bias, wanted_bias, 1e-10)


@pytest.mark.parametrize("pads", [None, PADS])
def test_self_attention_runs_under_autocast(pads: Tensor | None) -> None:
    torch.manual_seed(3)
    ours, x = SelfAttention(12, 3), torch.randn(3, 4, 12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ours(x, causal_mask(REAL), pads)
    exact = ours(x, causal_mask(REAL), pads)
    assert 0 < (out - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("pads", [None, PADS])
def test_the_encoder_is_the_equations_of_sasrec(pads: Tensor | None) -> None:
    """One layer: q = LN(x); x = q + Attention(q, x, x); x = LN(x); x = x + FFN(x); a last norm."""
    torch.manual_seed(0)
    encoder, x = TransformerEncoder(12, layers=1, heads=3, dropout=0.0, hidden=7).double(), normal(3, 4, 12)
    layer = encoder.layers[0]
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.normal_()
    other, q = torch_attention(layer.query, layer.key_value, layer.out, 3), layer.query_norm(x)
    expected = torch.zeros_like(x)
    for user, row in REAL.nonzero().tolist():
        zeros = torch.zeros(0 if pads is None else int(pads[user, row]), 12, dtype=torch.float64)
        seen = torch.cat([zeros, x[user, : row + 1]])[None]
        h = layer.ffn_norm(q[user, row] + other(q[user, row].view(1, 1, 12), seen, seen)[0][0, 0])
        expected[user, row] = encoder.norm(h + layer.outer(torch.relu(layer.inner(h))))
    assert near(encoder(x, REAL, causal_mask(REAL), pads), expected)


def test_the_encoder_is_as_deep_and_wide_as_asked() -> None:
    encoder = TransformerEncoder(12, layers=3, heads=2, dropout=0.0)
    assert [layer.inner.out_features for layer in encoder.layers] == [12, 12, 12]

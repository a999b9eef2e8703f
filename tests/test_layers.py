"""The shared parts against plain torch: dropout, SwiGLU, LoRA, self-attention."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gcalib.layers import Dropout, LoRA, SelfAttention, SwiGLU, _SiluTimes, attend, merge_heads, split_heads
from gcalib.packing import Layout


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
    kept = out[out != 0].unique()
    assert kept.tolist() == pytest.approx([1 / (1 - real_rate)])  # one scale, so the expectation is exact
    assert dropout.extra_repr() == f"rate={dropout.threshold}/256"


def test_dropout_drops_elements_independently_of_each_other_and_of_the_call() -> None:
    torch.manual_seed(1)
    dropout = Dropout(0.5).train()
    first, second = (dropout(torch.ones(1000, 64)).ne(0).double() - 0.5 for _ in range(2))
    bound = 5 * 0.25 / math.sqrt(first.numel())
    assert abs((first * second).mean()) < bound
    for shift in (1, 2, 7, 8):  # neighbours share a word of randomness
        assert abs((first[:, shift:] * first[:, :-shift]).mean()) < 1.1 * bound
        assert abs((first[shift:] * first[:-shift]).mean()) < 1.1 * bound
    by_byte = first.flatten().view(-1, 8).mean(dim=0)  # each byte of a word alike
    assert by_byte.abs().max() < 5 * 0.5 / math.sqrt(len(first.flatten()) / 8)


def test_dropout_is_the_identity_in_evaluation_and_at_rate_zero() -> None:
    x = torch.randn(5, 7)
    state = torch.get_rng_state()
    assert Dropout(0.5).eval()(x) is x and Dropout(0.0).train()(x) is x
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_at_a_rate_next_to_one_still_keeps_something() -> None:
    torch.manual_seed(0)
    out = Dropout(0.999).train()(torch.ones(100, 1000))
    assert torch.isfinite(out).all() and 0.9 < out.mean() < 1.1


def test_dropout_follows_the_seed_and_its_gradient_the_mask() -> None:
    dropout = Dropout(0.3).train()
    x = torch.randn(9, 5, requires_grad=True)  # 45 elements: not a whole number of words
    torch.manual_seed(4)
    first = dropout(x)
    torch.manual_seed(4)
    assert torch.equal(dropout(x), first) and not torch.equal(dropout(x), first)
    (gradient,) = torch.autograd.grad(first.sum(), x)
    assert torch.allclose(gradient * x, first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dropout_keeps_the_type(dtype: torch.dtype) -> None:
    out = Dropout(0.5).train()(torch.ones(100, 3, dtype=dtype))
    assert out.dtype == dtype and set(out.unique().tolist()) == {0.0, 2.0}


def test_swiglu_is_its_formula_and_has_the_published_width() -> None:
    assert SwiGLU(256).inner.out_features == 680
    layer = SwiGLU(6, 10).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    W_gate, W_in, W_out = layer.gate.weight, layer.inner.weight, layer.outer.weight
    g = x @ W_gate.T
    expected = ((g / (1 + torch.exp(-g))) * (x @ W_in.T)) @ W_out.T
    assert torch.allclose(layer(x), expected, rtol=0, atol=1e-14)
    assert all(linear.bias is None for linear in (layer.gate, layer.inner, layer.outer))


def test_gradient_of_the_gated_product() -> None:
    g, u = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.equal(_SiluTimes.apply(g, u), F.silu(g) * u)
    assert torch.autograd.gradcheck(_SiluTimes.apply, (g, u))


def test_lora_is_its_formula_and_starts_silent() -> None:
    layer = LoRA(6, 2).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    assert torch.equal(layer(x), torch.zeros(4, 6, dtype=torch.float64)) and layer.A.abs().min() > 0
    with torch.no_grad():
        layer.B.normal_()
    assert torch.allclose(layer(x), torch.einsum("nd,rd,or->no", x, layer.B, layer.A), rtol=0, atol=1e-14)


def test_heads_split_into_neighbouring_features_and_merge_back() -> None:
    x = torch.randn(2, 3, 8)
    heads = split_heads(x, 4)
    assert heads.shape == (2, 4, 3, 2) and torch.equal(heads[1, 2, 0], x[1, 0, 4:6])
    assert torch.equal(merge_heads(heads), x)


def test_attend_is_scaled_softmax_attention() -> None:
    q, k, v = (torch.randn(2, 3, 4, 5, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(2, 1, 4, 4) < 0.5
    mask[..., 0] = True
    for given, causal, shown in ((mask, False, mask), (None, True, torch.ones(4, 4, dtype=torch.bool).tril())):
        logits = (q @ k.transpose(2, 3) / math.sqrt(5)).masked_fill(~shown, -math.inf)
        assert torch.allclose(attend(q, k, v, given, causal=causal), logits.softmax(-1) @ v, rtol=0, atol=1e-14)


def test_attend_works_in_float32_under_bf16_autocast_on_a_cpu() -> None:
    q, k, v = (torch.randn(2, 2, 6, 8) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend(q, k, v, causal=True)
        from_halves = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), causal=True)
    assert out.dtype == from_halves.dtype == torch.float32
    assert torch.equal(out, attend(q, k, v, causal=True))
    assert torch.equal(from_halves, attend(*(t.bfloat16().float() for t in (q, k, v)), causal=True))


def attention_and_referee(dim: int = 12, heads: int = 3) -> tuple[SelfAttention, nn.MultiheadAttention]:
    """Ours and torch's, with the same random weights, biases too."""
    torch.manual_seed(2)
    ours, referee = SelfAttention(dim, heads).double(), nn.MultiheadAttention(dim, heads, batch_first=True).double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_()
        referee.in_proj_weight.copy_(ours.query_key_value.weight)
        referee.in_proj_bias.copy_(ours.query_key_value.bias)
    referee.out_proj.load_state_dict(ours.out.state_dict())
    return ours, referee


def streams(*counts: list[int]) -> tuple[list[Layout], Tensor, list[Tensor]]:
    """Layouts of some streams, random rows of all, and the rows of each."""
    layouts = [Layout.of(torch.arange(len(c)).repeat_interleave(torch.tensor(c)), len(c)) for c in counts]
    rows = torch.randn(sum(map(sum, counts)), 12, dtype=torch.float64, requires_grad=True)
    return layouts, rows, list(rows.split([sum(c) for c in counts]))


def test_self_attention_is_causal_attention_of_each_sequence() -> None:
    ours, referee = attention_and_referee()
    counts = ([4, 1, 3], [2, 0, 5])
    layouts, rows, parts = streams(*counts)
    expected = []
    for part, count in zip(parts, counts, strict=True):
        for sequence in part.split(count):
            if len(sequence):
                future = torch.ones(len(sequence), len(sequence), dtype=torch.bool).triu(1)
                expected.append(referee(*[sequence.unsqueeze(0)] * 3, attn_mask=future)[0][0])
    out = ours(rows, layouts)
    assert torch.allclose(out, torch.cat(expected), rtol=0, atol=1e-12)
    direction = torch.randn_like(out)
    gradients = [torch.autograd.grad((o * direction).sum(), rows)[0] for o in (out, torch.cat(expected))]
    assert torch.allclose(*gradients, rtol=0, atol=1e-11)


def test_self_attention_beside_pads_is_attention_to_as_many_zero_vectors() -> None:
    """The single pad whose logit is raised by log n stands for n zero vectors, n = 0 included."""
    ours, referee = attention_and_referee()
    counts = [4, 1, 3]
    layouts, rows, (part,) = streams(counts)
    pads = torch.tensor([3, 0, 5, 1, 7, 0, 0, 2])
    expected, row = [], 0
    for sequence in part.split(counts):
        for place in range(len(sequence)):
            seen = torch.cat([torch.zeros(int(pads[row]), 12, dtype=torch.float64), sequence[: place + 1]])
            expected.append(referee(sequence[place].view(1, 1, 12), seen.unsqueeze(0), seen.unsqueeze(0))[0][0, 0])
            row += 1
    out = ours(rows, layouts, [pads])
    assert torch.allclose(out, torch.stack(expected), rtol=0, atol=1e-12)
    # the pad's key and value are biases, so pads carry gradient into them
    parameters = [ours.query_key_value.bias, rows]
    direction = torch.randn_like(out)
    of_bias, of_rows = torch.autograd.grad((out * direction).sum(), parameters)
    in_proj, of_rows_2 = torch.autograd.grad((torch.stack(expected) * direction).sum(), [referee.in_proj_bias, rows])
    assert torch.allclose(of_bias, in_proj, rtol=0, atol=1e-11) and torch.allclose(of_rows, of_rows_2, atol=1e-11)


def test_self_attention_runs_under_autocast_with_and_without_pads() -> None:
    torch.manual_seed(3)
    ours = SelfAttention(12, 3)
    layouts, rows, _ = streams([4, 1, 3])
    rows = rows.detach().float()
    pads = [torch.tensor([3, 0, 5, 1, 7, 0, 0, 2])]
    for given in (None, pads):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = ours(rows, layouts, given)
        exact = ours(rows, layouts, given)
        assert 0 < (out - exact).abs().max() < 0.05 * exact.abs().max()

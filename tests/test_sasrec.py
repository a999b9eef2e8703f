"""SASRec: what each form sees, and that the encoder is the published one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gcalib.config import RunConfig
from gcalib.data.batches import collate
from gcalib.data.synthetic import synthetic_pair
from gcalib.models.matching import MODELS, build_model
from gcalib.models.sasrec import SASRec

FORMS = pytest.mark.parametrize("name", ["sasrec", "sasrec-mixed"])


def states(name: str, history: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Evaluation states of one user, with 20 items of A and 30 of B."""
    torch.manual_seed(3)
    model = MODELS[name](RunConfig(pair="tiny", model=name, dim=16, max_length=15), (20, 30)).double().eval()
    with torch.no_grad():
        a, b = model(collate([np.array(history)], 20, window=12, training=False))
    return a, b


@FORMS
def test_state_of_a_depends_on_items_of_b_in_the_mixed_form_only(name: str) -> None:
    before, after = states(name, [3, 25, 7]), states(name, [3, 41, 7])
    assert torch.equal(before[0], after[0]) == (name == "sasrec")
    assert not torch.equal(before[1], after[1])


def test_state_of_a_domain_without_history_is_zero() -> None:
    a, b = states("sasrec", [3, 7])
    assert a.abs().max() > 0
    assert b.abs().max() == 0


def test_states_of_the_mixed_form_are_one_for_both_domains() -> None:
    a, b = states("sasrec-mixed", [3, 25, 7])
    assert torch.equal(a, b)


def test_states_of_the_mixed_form_are_of_the_row_before_the_target() -> None:
    torch.manual_seed(3)
    model = MODELS["sasrec-mixed"](RunConfig(pair="tiny", model="sasrec-mixed", dim=16, dropout=0.0), (20, 30)).train()
    assert isinstance(model, SASRec)
    batch = collate([np.array([3, 25, 26, 7, 27])], 20, window=12, training=True)
    with torch.no_grad():
        h, (a, b) = model.encode(batch.mixed, 0)[0], model(batch)
    # 7 is predicted after 26, the third event; 25, 26 and 27 after the first, second and fourth
    assert torch.equal(a[0][batch.a.predicts[0]], h[[2]])
    assert torch.equal(b[0][batch.b.predicts[0]], h[[0, 1, 3]])


@FORMS
def test_an_insertion_point_is_refused(name: str) -> None:
    pair = synthetic_pair(num_users=10, num_items=(60, 60))
    with pytest.raises(ValueError, match=f"{name} has no insertion point 0: it has none"):
        build_model(RunConfig(pair="synthetic", model=name, gca=(0,)), pair)


def test_encode_is_the_published_model() -> None:
    """Its equations, written with torch's own attention."""
    torch.manual_seed(3)
    config = RunConfig(pair="tiny", model="sasrec-mixed", dim=8, hidden=12, dropout=0.0, max_length=15)
    model = MODELS["sasrec-mixed"](config, (20, 30)).double()
    assert isinstance(model, SASRec)
    stream = collate([np.array([3, 25, 26, 7, 27])], 20, window=12, training=False).mixed
    future = torch.ones(5, 5, dtype=torch.bool).triu(1)
    with torch.no_grad():
        for parameter in model.parameters():  # biases start at zero
            parameter.add_(0.2 * torch.randn_like(parameter))
        h = (model.item.weight[[3, 25, 26, 7, 27]] * 8**0.5 + model.position[0].weight[[5, 4, 3, 2, 1]]).unsqueeze(0)
        for layer in model.encoder[0].layers:
            attention = torch.nn.MultiheadAttention(8, config.self_heads, batch_first=True).double()
            attention.in_proj_weight.copy_(torch.cat([layer.query.weight, layer.key_value.weight]))
            attention.in_proj_bias.copy_(torch.cat([layer.query.bias, layer.key_value.bias]))
            attention.out_proj.weight.copy_(layer.out.weight)
            attention.out_proj.bias.copy_(layer.out.bias)
            q = layer.query_norm(h)
            h = layer.ffn_norm(q + attention(q, h, h, attn_mask=future)[0])
            h = h + layer.outer(torch.relu(layer.inner(h)))
        assert torch.allclose(model.encode(stream, 0), model.encoder[0].norm(h), rtol=0, atol=1e-12)

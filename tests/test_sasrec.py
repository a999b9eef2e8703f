"""SASRec: what each form sees, and that the published encoder is what it says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gcalib.config import RunConfig
from gcalib.data.batches import make_batch
from gcalib.data.synthetic import synthetic_pair
from gcalib.layers import TransformerEncoder
from gcalib.models import MODELS, Recommender, build_model
from gcalib.models.base import binary_cross_entropy
from gcalib.packing import Layout

PAIR = synthetic_pair(num_users=40, num_items=(60, 60))


def tiny(model: str, **changes: object) -> Recommender:
    torch.manual_seed(3)
    config = RunConfig(pair="tiny", model=model, dim=16, dropout=0.0, max_length=15, **changes)
    return MODELS[model](config, (20, 30)).double()  # type: ignore[call-arg]


@pytest.mark.parametrize("name", ["sasrec", "sasrec-mixed"])
def test_only_the_mixed_form_sees_the_other_domain(name: str) -> None:
    model = tiny(name).eval()
    with torch.no_grad():
        one, two = (model(make_batch([h], 20, window=12, training=False)) for h in ([3, 25, 7], [3, 41, 7]))
    alike = torch.equal(one[0], two[0])  # the state for A, with another item of B in the history
    assert alike == (name == "sasrec")
    assert not torch.equal(one[1], two[1])


def test_a_domain_without_history_has_no_opinion() -> None:
    with torch.no_grad():
        a, b = tiny("sasrec").eval()(make_batch([[3, 7]], 20, window=12, training=False))
    assert b.abs().max() == 0 < a.abs().max()


@pytest.mark.parametrize("name", ["sasrec", "sasrec-mixed"])
def test_no_future_and_one_computation(name: str) -> None:
    model, rng = tiny(name), np.random.default_rng(0)
    sequence = rng.permutation(np.arange(1, 51))[:13]
    changed = np.concatenate([sequence[:8], np.setdiff1d(np.arange(1, 51), sequence)[:5]])
    with torch.no_grad():
        states = []
        for items in (sequence, changed):
            batch = make_batch([items], 20, window=12, training=True)
            found = model.train()(batch)
            slots = [queries.slot.tolist() for queries in batch.queries]
            states.append({(d, s): row for d in (0, 1) for s, row in zip(slots[d], found[d], strict=True)})
        early = [key for key in states[0] if key[1] < 7]
        assert len(early) == 7
        assert all(torch.allclose(states[0][key], states[1][key], rtol=0, atol=1e-12) for key in early)
        domain = int(sequence[-1] > 20)
        newest = model.eval()(make_batch([sequence[:-1]], 20, window=12, training=False))[domain][0]
    assert torch.allclose(states[0][domain, 11], newest, rtol=0, atol=1e-12)


def test_a_model_without_insertion_points_says_so() -> None:
    with pytest.raises(ValueError, match="sasrec has no insertion point 0: it has none"):
        build_model(RunConfig(pair="synthetic", model="sasrec", gca=(0,)), PAIR)


def test_the_encoder_is_sasrec_s() -> None:
    """Against the equations of one layer, written with torch's own attention."""
    torch.manual_seed(0)
    encoder = TransformerEncoder(8, layers=1, heads=2, dropout=0.0).double()
    x = torch.randn(5, 8, dtype=torch.float64)
    found = encoder(x, Layout.of(torch.zeros(5, dtype=torch.int64), 1))
    layer = encoder.layers[0]
    official = torch.nn.MultiheadAttention(8, 2).double()
    with torch.no_grad():
        official.in_proj_weight.copy_(torch.cat([layer["query"].weight, layer["key_value"].weight]))
        official.in_proj_bias.copy_(torch.cat([layer["query"].bias, layer["key_value"].bias]))
        official.out_proj.weight.copy_(layer["out"].weight)
        official.out_proj.bias.copy_(layer["out"].bias)
    q = layer["query_norm"](x)
    future = torch.ones(5, 5, dtype=torch.bool).triu(1)
    h = layer["ffn_norm"](q + official(q, x, x, attn_mask=future)[0])
    wanted = encoder.norm(h + layer["outer"](torch.relu(layer["inner"](h))))
    assert torch.allclose(found, wanted, rtol=0, atol=1e-12)


def test_attention_weights_are_dropped_where_asked_in_training_only() -> None:
    """What attention finds then varies about what it finds otherwise, at the given rate."""
    torch.manual_seed(0)
    x, layout = torch.randn(6, 8), Layout.of(torch.zeros(6, dtype=torch.int64), 1)
    found: list[torch.Tensor] = []
    encoder = TransformerEncoder(8, layers=1, heads=2, dropout=0.5, drop_attention=True)
    encoder.layers[0]["out"].register_forward_hook(lambda _, given, __: found.append(given[0].detach()))  # type: ignore[index]
    with torch.no_grad():
        encoder.eval()(x, layout)
        encoder.eval()(x, layout)
        for _ in range(2000):
            encoder.train()(x, layout)
    assert torch.equal(found[0], found[1])
    drawn = torch.stack(found[2:])
    assert torch.allclose(drawn[:, 0].abs().amin(dim=0), torch.zeros(8))  # the first row has itself alone, or nothing
    assert torch.allclose(drawn[:, 0].abs().amax(dim=0), 2 * found[0][0].abs())
    off = (drawn.mean(dim=0) - found[0]) / (drawn.std(dim=0) / 2000**0.5)
    assert off.abs().max() < 4.5 and (drawn.std(dim=0) > 0).all()
    plain = TransformerEncoder(8, layers=1, heads=2, dropout=0.5)
    plain.layers[0]["out"].register_forward_hook(lambda _, given, __: found.append(given[0].detach()))  # type: ignore[index]
    with torch.no_grad():
        plain.train()(x, layout), plain.train()(x, layout)
    assert torch.equal(found[-1], found[-2])


@pytest.mark.parametrize("name", ["sasrec", "sasrec-mixed", "llm4cdsr", "cdsrnp"])
def test_every_model_with_such_an_encoder_passes_the_wish_on(name: str) -> None:
    text = {"text": "hashed-words"} if name == "llm4cdsr" else {}
    for wish in (False, True):
        config = RunConfig(pair="synthetic", model=name, dim=16, dropout=0.25, attention_dropout=wish, **text)
        encoders = [part for part in build_model(config, PAIR).modules() if isinstance(part, TransformerEncoder)]
        assert encoders and {part.attention_rate for part in encoders} == {0.25 * wish}


def test_binary_cross_entropy_by_hand() -> None:
    positive, negative = torch.tensor([0.0, 2.0]), torch.tensor([[0.0, 1.0], [float("-inf"), 0.5]])
    wanted = [np.log(2) + (np.log(2) + np.log1p(np.e)) / 2, np.log1p(np.exp(-2)) + np.log1p(np.exp(0.5))]
    loss = binary_cross_entropy(positive, negative, torch.tensor([0.25, 0.75]))
    assert loss.item() == pytest.approx(0.25 * wanted[0] + 0.75 * wanted[1], rel=1e-6)

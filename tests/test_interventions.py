"""Interventions: each update is what it claims to be, exactly; the penalty moves the angle; nothing else changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import SEEDS, module, near
from test_models import HISTORIES, NUM_A, PAIR, batch_of, model_of, states_of
from torch import Tensor

from gcalib.attention import Activations, GatedCrossAttention, record_activations
from gcalib.config import RunConfig
from gcalib.evaluation import evaluate
from gcalib.interventions import squared_cosine
from gcalib.models.matching import build_model
from gcalib.training import Trainer, fit

maps_of_x = pytest.mark.parametrize("update", ["linear", "ffn"])
in_both_modes = pytest.mark.parametrize("training", [True, False])


def config_of(**changes: Any) -> RunConfig:
    fields = {"gca": (0,), "dim": 8, "heads": 2, "dropout": 0.0, "batch_size": 20, "negatives": 64, "lr": 0.01}
    return RunConfig(**{"pair": "synthetic", **fields, "warmup_epochs": 0, **changes})


def batch(seed: int = 0) -> dict[str, Tensor]:
    """Three users with pads of x and of y; some queries see no key."""
    rng = torch.Generator().manual_seed(seed + 1)  # 0 would draw the noise of an evaluation as x
    x, y = (torch.randn(3, length, 8, generator=rng, dtype=torch.float64) for length in (6, 5))
    queries, keys, mask = (torch.rand(shape, generator=rng) < 0.7 for shape in ((3, 6), (3, 5), (3, 6, 5)))
    mask[0, 1] = False
    return {"x": x, "y": y, "query_mask": queries, "key_mask": keys, "mask": mask}


def seen(gca: GatedCrossAttention, given: dict[str, Tensor]) -> Activations:
    with torch.no_grad(), record_activations(gca) as recorded:
        gca(**given)
    return recorded[0]


def cosines(one: Activations) -> Tensor:
    return torch.cosine_similarity(one.x, one.update, dim=2)[one.updated]


def test_full_is_the_module_bit_for_bit() -> None:
    starts = []
    for options in ({}, {"update": "full"}, {"update": "orthogonal"}, {"update": "noise", "evaluation_only": True}):
        torch.manual_seed(5)
        starts.append(GatedCrossAttention(8, 2, **options).state_dict())
    assert all(torch.equal(values, other[name]) for other in starts for name, values in starts[0].items())
    one = seen(module(update="full"), batch())
    assert torch.equal(one.out, module().norm(one.x + one.gate * one.x_prime))


@settings(max_examples=20, deadline=None)
@given(SEEDS, st.sampled_from(["sigmoid", "tanh", "constant", "none"]))
def test_orthogonal_and_parallel_updates_add_up_to_the_full_one(seed: int, gate: str) -> None:
    full, orthogonal, parallel = (seen(module(gate, update=u), batch(seed)) for u in ("full", "orthogonal", "parallel"))
    assert near(orthogonal.update + parallel.update, full.update, 1e-12)
    assert cosines(orthogonal).abs().max() < 1e-12
    assert near(cosines(parallel).abs(), torch.ones_like(cosines(parallel)), 1e-12)
    for one in (orthogonal, parallel):
        assert torch.equal(one.update.abs().amax(dim=2) > 0, one.updated)
        assert torch.equal(one.x_prime, full.x_prime) and torch.equal(one.gate, full.gate)
        assert near(one.out, module(gate).norm(one.x + one.update))


@settings(max_examples=20, deadline=None)
@given(SEEDS)
def test_noise_has_the_length_and_the_angle_of_the_update(seed: int) -> None:
    """The same noise in every evaluation, another one in every training pass."""
    full, gca, state = seen(module(), batch(seed)), module(update="noise").eval(), torch.get_rng_state()
    first = seen(gca, batch(seed))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(seen(gca, batch(seed)).update, first.update)
    second, third = (seen(gca.train(), batch(seed)) for _ in "12")
    for one, other in ((first, full), (second, full), (second, third)):
        assert near(one.update.norm(dim=2), other.update.norm(dim=2), 1e-10)  # zero without a key
        assert near(cosines(one), cosines(other), 1e-10)
        assert (one.update - other.update)[one.updated].norm(dim=1).gt(1e-6).all()


def test_noise_prefers_no_direction() -> None:
    x, y = (rows[:1, :1].expand(1, 20_000, 8) for rows in (batch()["x"], batch()["y"]))
    noise, parallel = (seen(module(update=u), {"x": x, "y": y[:, :1]}).update[0] for u in ("noise", "parallel"))
    assert (noise - parallel).mean(dim=0).norm() < 0.03 * (noise - parallel).norm(dim=1).mean()


@in_both_modes
@pytest.mark.parametrize("point", [0, 1])
def test_other_user_is_the_module_with_the_next_user_s_y(point: int, training: bool) -> None:
    model = model_of("abxi", (0, 1), update="other-user")
    made = batch_of(model, HISTORIES, training)
    h = tuple(torch.randn(*stream.items.shape, 16, dtype=torch.float64) for stream in made.domains)
    with record_activations(model) as recorded:
        model.gca(point, h, made)
    assert len(recorded) == 2 and all(one.updated[:2].any() for one in recorded)
    for domain, one in enumerate(recorded):
        asked, known = made.domains[domain], made.domains[1 - domain]
        plain = GatedCrossAttention(16, 2).double()
        plain.load_state_dict(model.gca[f"{point}{'ab'[domain]}"].state_dict())
        newest = known.query_position + 1 if point else known.position
        for user, other in enumerate([[1], [2], [3], [4], [5], [0]]):
            mask = newest[other].unsqueeze(1) <= asked.query_position[[user]].unsqueeze(2)
            rows = {"query_mask": asked.mask[[user]], "key_mask": known.mask[other], "mask": mask}
            expected = seen(plain, {"x": h[domain][[user]], "y": h[1 - domain][other], **rows})
            for name in ("y", "x_prime", "gate", "update", "out"):
                assert near(getattr(one, name)[[user]], getattr(expected, name)), name


@in_both_modes
def test_other_user_s_update_reads_no_event_of_the_user_s_other_domain(training: bool) -> None:
    """Other items of B for user 2 change what is added to A's rows of user 1 alone."""
    model, updates = model_of("abxi", (0,), update="other-user"), []
    changed = [np.where((items > NUM_A) & (u == 2), 191 - items, items) for u, items in enumerate(HISTORIES)]
    for histories in (HISTORIES, changed):
        with record_activations(model) as recorded:
            states_of(model, batch_of(model, histories, training))
        updates.append(recorded[0].update)
    assert [not torch.equal(*rows) for rows in zip(*updates, strict=True)] == [u == 1 for u in range(len(HISTORIES))]


@maps_of_x
def test_a_map_of_x_reads_no_y(update: str) -> None:
    gca, given = module(update=update), batch()
    one, other = seen(gca, given), seen(gca, {**given, "y": torch.randn(3, 5, 8).double()})
    assert torch.equal(one.out, other.out)
    weight, bias, out_weight, out_bias = gca.cross_attention.parameters()
    inner = one.x @ weight.T + bias
    expected = (inner if update == "linear" else inner.clamp(min=0)) @ out_weight.T + out_bias
    assert near(one.x_prime, expected * one.updated.unsqueeze(2))  # zero where no key is visible
    assert near(one.gate, gca.activation(gca.gate(torch.cat([one.x, one.x], dim=2))))
    x, z = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    of_x, of_z, of_both, of_0 = (gca.cross_attention(rows, None, given["mask"]) for rows in (x, z, x + 2 * z, 0 * x))
    assert near(of_both - of_0, of_x - of_0 + 2 * (of_z - of_0)) == (update == "linear")


@maps_of_x
def test_a_map_of_x_has_the_weights_of_cross_attention(update: str) -> None:
    ours, theirs = (build_model(config_of(dim=64, update=u), PAIR) for u in (update, "full"))
    attentions = [model.gca["0a"].cross_attention for model in (ours, theirs)]
    assert sum(parameter.numel() for parameter in attentions[0].parameters() if parameter.dim() == 2) == 4 * 64**2
    for (one, other), tolerance in ((attentions, 0.01), ((ours, theirs), 0.005)):
        counts = [sum(parameter.numel() for parameter in of.parameters()) for of in (one, other)]
        assert counts[0] == pytest.approx(counts[1], rel=tolerance)


@pytest.mark.parametrize(("gate", "trained"), [("constant", 8), ("none", 0)])
def test_a_gate_that_reads_nothing(gate: str, trained: int) -> None:
    start = GatedCrossAttention(8, 2, gate).gate
    assert torch.equal(start.alpha, torch.ones(8))
    assert sum(parameter.numel() for parameter in start.parameters() if parameter.requires_grad) == trained
    gca, one = module(gate), seen(module(gate), batch())  # with another alpha
    assert torch.equal(one.out, gca.norm(one.x + gca.gate.alpha.detach() * one.x_prime))


@in_both_modes
@pytest.mark.parametrize("update", ["orthogonal", "parallel", "noise", "other-user"])
def test_evaluation_only_spares_training(update: str, training: bool) -> None:
    options = {}, {"update": update}, {"update": update, "evaluation_only": True}
    models = [model_of("abxi", (0, 2), **given) for given in options]
    states = (states_of(model, batch_of(model, HISTORIES, training)) for model in models)
    full, always, in_evaluation = (torch.cat([h.flatten() for h in both]) for both in states)
    assert torch.equal(in_evaluation, full if training else always) and not near(always, full, 1e-6)


def test_evaluation_measures_what_was_added() -> None:
    for update, cos in (("orthogonal", 0.0), ("parallel", 1.0)):
        found = evaluate(model_of("abxi", (0,), update=update), PAIR, "test", protocols=())
        assert found["a.gca0.gated_cos_mean_abs"] == pytest.approx(cos, abs=1e-9)
        assert (found["a.gca0.gated_norm_orthogonal"] > 1e-3) == (cos == 0)


def test_penalty_sends_the_angle_where_its_sign_says() -> None:
    angle = {}
    for weight in (10.0, 0.0, -10.0):
        last = fit(config_of(cos_penalty=weight, epochs=10, eval_every=10), PAIR, device="cpu").curves[-1]
        angle[weight] = [last[f"val.{s}.gca0.gated_cos_mean_abs"] for s in "ab"]
        assert last["loss_cos_penalty"] / weight > 0 if weight else "loss_cos_penalty" not in last
    assert max(angle[10.0]) < 0.1 < 0.3 < min(angle[0.0]) < max(angle[0.0]) < 0.7 < min(angle[-10.0])


def test_penalty_is_a_mean_over_the_updated_rows_of_all_modules() -> None:
    recorded = [seen(module(), batch(seed)) for seed in (1, 2)]
    assert near(squared_cosine(recorded), torch.cat([cosines(one) for one in recorded]).square().mean())
    trainer = Trainer(config_of(cos_penalty=2.0), PAIR, torch.device("cpu"))
    trainer.histories[0] = np.arange(1, 6)  # a user of one domain, whose rows see no key
    assert trainer.step(np.array([0]))["cos_penalty"] == 0


def test_penalty_leaves_a_plain_model_alone() -> None:
    first, other = (fit(config_of(gca=(), cos_penalty=w, epochs=1), PAIR, device="cpu").curves for w in (0.0, 9.0))
    assert first == other

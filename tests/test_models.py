"""What must hold of every trainable model at every insertion point and stack, in float64."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gcalib.attention import record_activations
from gcalib.config import RunConfig, Update
from gcalib.data.batches import Batch, Stream
from gcalib.data.pair import Pair
from gcalib.data.synthetic import synthetic_pair
from gcalib.evaluation import evaluate
from gcalib.layers import TransformerEncoder
from gcalib.models.base import Recommender, States
from gcalib.models.cdsrnp import CDSRNP, InterestDecoder
from gcalib.models.matching import build_model

STACKS = [points for size in range(4) for points in combinations((0, 1, 2), size)]
CASES = [(name, gca) for name in ("abxi", "llm4cdsr", "cdsrnp") for gca in STACKS]
CASES += [("sasrec", ()), ("sasrec-mixed", ())]
PER_DOMAIN_CASES = [("cdsrnp", gca) for gca in STACKS if len(gca) < 2] + [("sasrec", ())]
ENCODED = {"abxi": "xab", "llm4cdsr": "xab", "cdsrnp": "abab", "sasrec": "ab", "sasrec-mixed": "x"}  # in this order

PAIR = synthetic_pair(num_users=60, num_items=(60, 70), seed=4)
NUM_A, NUM_ITEMS = 60, 130
Z = torch.linspace(-1, 1, 16, dtype=torch.float64)  # CDSRNP's latent: what holds of states holds given z

SEVERAL = [((0,), 2), ((1,), 2), ((2,), 2), ((0, 2), 2), ((0,), 3), ((2,), 3)]  # modules in succession at a point
DEEP = [(name, *several, "full") for name in ("abxi", "llm4cdsr", "cdsrnp") for several in SEVERAL]
UPDATES = get_args(Update)[1:]
INTERVENED = [(name, gca, 1, update) for name in ("abxi", "cdsrnp") for gca in ((0,), (0, 1)) for update in UPDATES]

each_case = pytest.mark.parametrize(("name", "gca"), CASES)
each_module = pytest.mark.parametrize(
    ("name", "gca", "depth", "update"), [(*case, 1, "full") for case in CASES] + DEEP + INTERVENED
)
each_case_per_domain = pytest.mark.parametrize(("name", "gca"), PER_DOMAIN_CASES)


@pytest.fixture
def one_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise of every row is the same vector, however many rows there are."""
    randn = torch.randn
    monkeypatch.setattr(torch, "randn", lambda *n, **o: Z.expand(*n) if "generator" in o else randn(*n, **o))


def without_order(pair: Pair) -> Pair:
    """The same events, of each user all of A and then all of B."""
    order = np.lexsort((pair.domain_of(pair.items), pair.owner))
    return replace(pair, items=pair.items[order], times=np.full(len(order), -1), has_global_order=False)


PER_DOMAIN = without_order(PAIR)


def config_of(name: str, gca: tuple[int, ...], **changes: Any) -> RunConfig:
    text = {"text": "random"} if name == "llm4cdsr" else {}
    return RunConfig(pair="tiny", model=name, gca=gca, dim=16, heads=2, dropout=0.0, max_length=20, **text, **changes)


def model_of(name: str, gca: tuple[int, ...], pair: Pair = PAIR, **changes: Any) -> Recommender:
    torch.manual_seed(3)
    model = build_model(config_of(name, gca, **changes), pair).double()
    with torch.no_grad():  # what starts at zero, such as biases, LoRA and pads, would hide a leak
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def batch_of(model: Recommender, sequences: list[np.ndarray], training: bool, pair: Pair = PAIR) -> Batch:
    model.train(training)
    return model.collate(sequences, pair, training=training, users=np.arange(len(sequences)))


def states_of(model: Recommender, batch: Batch) -> States:
    with torch.no_grad():
        return model(batch, Z) if isinstance(model, CDSRNP) else model(batch)


def predictions(
    model: Recommender, sequences: list[np.ndarray], pair: Pair = PAIR
) -> dict[tuple[int, int, int], Tensor]:
    """Training states that predict, by user, domain and `query_position`."""
    batch = batch_of(model, sequences, True, pair)
    return {
        (user, domain, int(stream.query_position[user, row])): h[user, row]
        for domain, (h, stream) in enumerate(zip(states_of(model, batch), batch.domains, strict=True))
        for user, row in stream.predicts.nonzero().tolist()
    }


def near(first: Tensor, second: Tensor, atol: float = 1e-10) -> bool:
    return first.shape == second.shape and torch.allclose(first, second, rtol=0, atol=atol)


def history(rng: np.random.Generator, length: int) -> np.ndarray:
    return rng.permutation(np.arange(1, 1 + NUM_ITEMS))[:length]


def changed_from(rng: np.random.Generator, sequence: np.ndarray, t: int) -> np.ndarray:
    """Other items from event t on; event t stays in its domain, so that the same rows predict it."""
    free = rng.permutation(np.setdiff1d(np.arange(1, 1 + NUM_ITEMS), sequence))
    at_t = free[(free > NUM_A) == (sequence[t] > NUM_A)][0]
    return np.concatenate([sequence[:t], [at_t], free[free != at_t][: len(sequence) - t - 1]])


# --------------------------------------------------------------------------------------- no future reaches the past


@each_module
@pytest.mark.usefixtures("one_noise")
def test_no_future_in_training(name: str, gca: tuple[int, ...], depth: int, update: str) -> None:
    """A state that predicts event t or an earlier one depends on no event from t on."""
    model, rng = model_of(name, gca, gca_depth=depth, update=update), np.random.default_rng(0)
    compared = moved = 0
    for t in (3, 5, 8, 10):
        sequences = [history(rng, length) for length in (14, 12, 11)]
        before = predictions(model, sequences)
        after = predictions(model, [changed_from(rng, sequence, t) for sequence in sequences])
        for key, state in before.items():
            if key[2] < t:
                assert near(after[key], state), (t, key)
                compared += 1
            elif key in after:
                moved += not near(after[key], state, 1e-6)
    assert compared == 3 * (3 + 5 + 8 + 10)
    assert moved > 15


def rows_before(t: int, model: Recommender, batch: Batch) -> list[Tensor]:
    """Evaluation: rows that may depend on events before t only, of each encoder and of each cross-attention."""
    encoded: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda module, inputs, output: encoded.append(output))
        for module in model.modules()
        if isinstance(module, (TransformerEncoder, InterestDecoder)) or module is getattr(model, "attention_norm", None)
    ]
    with record_activations(model) as recorded:
        states_of(model, batch)
    for hook in hooks:
        hook.remove()
    streams: dict[str, Stream] = {"x": batch.mixed, "a": batch.a, "b": batch.b}
    found = [(streams[s], streams[s].mask, h) for s, h in zip(ENCODED[model.config.model], encoded, strict=True)]
    found += [(streams[seen.name[0]], seen.mask, seen.out) for seen in recorded]
    return [h[mask & (stream.query_position < t)] for stream, mask, h in found]


@each_module
@pytest.mark.usefixtures("one_noise")
def test_no_future_in_evaluation(name: str, gca: tuple[int, ...], depth: int, update: str) -> None:
    """Also of rows older than the newest, which a later cross-attention reads."""
    model, rng, compared = model_of(name, gca, gca_depth=depth, update=update), np.random.default_rng(1), 0
    for t in (4, 7, 10):
        users = [history(rng, length) for length in (13, 11)]
        both = (users, [changed_from(rng, sequence, t) for sequence in users])
        first, second = (rows_before(t, model, batch_of(model, sequences, False)) for sequences in both)
        assert len(first) == len(ENCODED[name]) + 2 * len(gca) * depth
        for one, other in zip(first, second, strict=True):
            assert near(one, other), t
            compared += len(one)
    assert compared > 14 * len(ENCODED[name]) + 20 * len(gca) * depth


# ------------------------------------------------------------------------------------- one computation for all users

HISTORIES = [history(np.random.default_rng(4), length) for length in (15, 3, 8, 2)]
HISTORIES += [np.array([5, 6, 7]), np.array([80, 81])]


@each_case
def test_a_user_does_not_depend_on_the_others_in_the_batch(name: str, gca: tuple[int, ...]) -> None:
    model = model_of(name, gca)
    trained, asked = predictions(model, HISTORIES), states_of(model, batch_of(model, HISTORIES, False))
    for user, alone in enumerate(HISTORIES):
        for (_, *key), state in predictions(model, [alone]).items():
            assert near(state, trained[user, *key])
        for state, together in zip(states_of(model, batch_of(model, [alone], False)), asked, strict=True):
            assert near(state[0], together[user])


@each_module
@pytest.mark.usefixtures("one_noise")
def test_the_last_training_state_is_the_evaluation_state(
    name: str, gca: tuple[int, ...], depth: int, update: str
) -> None:
    model = model_of(name, gca, gca_depth=depth, update=update)
    trained = predictions(model, HISTORIES)
    asked = states_of(model, batch_of(model, [sequence[:-1] for sequence in HISTORIES], False))
    for user, sequence in enumerate(HISTORIES):
        domain = int(sequence[-1] > NUM_A)
        assert near(trained[user, domain, len(sequence) - 2], asked[domain][user, 0])


@pytest.mark.parametrize("name", ["abxi", "llm4cdsr", "cdsrnp"])
@pytest.mark.parametrize("gca", STACKS[1:])
def test_initial_weights_are_alike_with_and_without_cross_attention(name: str, gca: tuple[int, ...]) -> None:
    starts = []
    for points in ((), gca):
        torch.manual_seed(7)
        starts.append(build_model(config_of(name, points), PAIR).state_dict())
    plain, other = starts
    assert all(torch.equal(tensor, other[key]) for key, tensor in plain.items())
    assert {key.split(".")[1][0] for key in other.keys() - plain.keys()} == {str(point) for point in gca}


# ------------------------------------------------------------------------------------------------ users of one domain


@each_case
@pytest.mark.parametrize("domain", [0, 1])
def test_users_of_one_domain_have_finite_losses_and_gradients(name: str, gca: tuple[int, ...], domain: int) -> None:
    """Nothing is asked of the other domain, whose loss is zero."""
    model = model_of(name, gca)
    batch = batch_of(model, [np.arange(1, 6) + NUM_A * domain, np.arange(9, 12) + NUM_A * domain], True)
    losses = model.loss(batch, model.negatives(batch, np.random.default_rng(0)))
    assert losses["ab"[1 - domain]] == 0
    assert 0 < losses["ab"[domain]] < torch.inf
    torch.stack(list(losses.values())).sum().backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


@each_case
def test_users_of_one_domain_are_asked_for_both(name: str, gca: tuple[int, ...]) -> None:
    model = model_of(name, gca)
    for state in states_of(model, batch_of(model, [np.array([5, 6, 7]), np.array([80, 81])], False)):
        assert state.shape[:2] == (2, 1)
        assert state.isfinite().all()


# --------------------------------------------------------------------------------------------- without a global order


def rows_of_domains(model: Recommender, sequence: np.ndarray, training: bool) -> tuple[Tensor, ...]:
    """States of all real rows of A and of B, older ones of evaluation too."""
    batch = batch_of(model, [sequence], training, PER_DOMAIN)
    with torch.no_grad():
        if isinstance(model, CDSRNP):
            states = model.decode(batch, model.encode(batch), Z)
        else:
            states = [model.encode(stream, domain) for domain, stream in enumerate(batch.domains)]
    return tuple(h[stream.mask] for h, stream in zip(states, batch.domains, strict=True))


@each_case_per_domain
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("j", [0, 3, 6])
def test_a_domain_s_own_future_stays_out_without_a_global_order(
    name: str, gca: tuple[int, ...], training: bool, j: int
) -> None:
    """Rows of A up to j depend on no item of A after j, though those of B may be from any time."""
    model, rng = model_of(name, gca, PER_DOMAIN), np.random.default_rng(6)
    of_a, of_b = rng.permutation(NUM_A) + 1, rng.permutation(NUM_ITEMS - NUM_A) + 1 + NUM_A
    before = rows_of_domains(model, np.concatenate([of_a[:9], of_b[:9]]), training)
    for domain in (0, 1):
        parts = [of_a[:9].copy(), of_b[:9].copy()]
        parts[domain][j + 1 :] = (of_a, of_b)[domain][9 : 17 - j]
        after = rows_of_domains(model, np.concatenate(parts), training)
        assert near(after[domain][: j + 1], before[domain][: j + 1])
        assert not near(after[domain][j + 1 :], before[domain][j + 1 :], 1e-6)
        assert near(after[1 - domain], before[1 - domain], 1e-6) == (gca == ())  # of the other domain a row sees all


@each_case_per_domain
def test_training_is_the_evaluation_form_without_a_global_order(name: str, gca: tuple[int, ...]) -> None:
    model, rng = model_of(name, gca, PER_DOMAIN), np.random.default_rng(7)
    of_a, of_b = rng.permutation(NUM_A)[:9] + 1, rng.permutation(NUM_ITEMS - NUM_A)[:6] + 1 + NUM_A
    trained = rows_of_domains(model, np.concatenate([of_a, of_b]), True)
    asked = states_of(model, batch_of(model, [np.concatenate([of_a[:-1], of_b[:-1]])], False, PER_DOMAIN))
    for rows, state in zip(trained, asked, strict=True):
        assert near(rows[-1], state[0, 0])


@pytest.mark.parametrize(("gca", "depth"), [(gca, 1) for gca in STACKS[4:]] + [((0,), 2), ((1,), 3), ((2,), 2)])
def test_a_stack_without_a_global_order_is_refused(gca: tuple[int, ...], depth: int) -> None:
    with pytest.raises(ValueError, match=r"cannot be stacked on synthetic, a per-domain pair: .* single insertion"):
        model_of("cdsrnp", gca, PER_DOMAIN, gca_depth=depth)


# ------------------------------------------------------------------------------------------------ modules in succession


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("gca", "point"), [((0,), 0), ((0, 1), 1)])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_modules_of_a_point_follow_one_another(depth: int, gca: tuple[int, ...], point: int, training: bool) -> None:
    """The first is what it is alone; a later one reads what both first ones made, and compares events as in a stack."""
    model = model_of("abxi", gca, gca_depth=depth)
    batch = batch_of(model, HISTORIES, training)
    h = tuple(torch.randn(*stream.items.shape, 16, dtype=torch.float64) for stream in batch.domains)
    asked, known = (batch.a, batch.b), (batch.b, batch.a)
    expected = h
    with torch.no_grad():
        for suffix in ("", "_2", "_3")[:depth]:
            updated, modules = bool(suffix) or point > 0, [model.gca[f"{point}{s}{suffix}"] for s in "ab"]
            outs = [
                gca(x, y, query_mask=of_x.mask, key_mask=of_y.mask, mask=mask)
                for gca, x, y, of_x, of_y in zip(modules, expected, expected[::-1], asked, known, strict=True)
                for newest in [of_y.query_position + 1 if updated else of_y.position]
                for mask in [newest.unsqueeze(1) <= of_x.query_position.unsqueeze(2)]
            ]
            expected = tuple(
                torch.where(s.mask.unsqueeze(2), out, x) for s, out, x in zip(asked, outs, expected, strict=True)
            )
        with record_activations(model) as recorded:
            found = model.gca(point, h, batch)
    assert all(near(one, other) for one, other in zip(found, expected, strict=True))
    assert [seen.name for seen in recorded] == [f"{s}.gca{point}{n}" for n in ("", "_2", "_3")[:depth] for s in "ab"]
    assert all(seen.updated.any() for seen in recorded)


def test_modules_of_a_point_are_built_as_the_config_says() -> None:
    model = build_model(config_of("cdsrnp", (0, 2), gca_depth=2, gate_hidden=5, gca_norm=False, gate="tanh"), PAIR)
    assert set(model.gca) == {f"{point}{s}{n}" for point in (0, 2) for s in "ab" for n in ("", "_2")}
    for gca in model.gca.values():
        assert gca.gate[0].out_features == 5
        assert not list(gca.norm.parameters())
        assert isinstance(gca.activation, torch.nn.Tanh)


# ------------------------------------------------------------------------------------------- the sign of a tanh gate


def flip_features(model: Recommender, seed: int, share: float) -> None:
    """Change the sign of some features of X' and of the gate before its tanh, of each module others."""
    rng = torch.Generator().manual_seed(seed)
    for gca in model.gca.values():
        count = max(1, min(15, round(16 * share)))
        flipped = torch.randperm(16, generator=rng)[:count]
        for layer in (gca.cross_attention.out, gca.gate[2]):
            layer.weight.data[flipped] *= -1
            layer.bias.data[flipped] *= -1


def measured(model: Recommender) -> tuple[Tensor, dict[str, float]]:
    """Scores of all items as the next events of `HISTORIES`, and the alignment over the test split."""
    states = states_of(model, batch_of(model, HISTORIES, False))
    scores = [model.scorer(domain)(h[:, 0]) for domain, h in enumerate(states)]
    return torch.cat(scores, dim=1).detach(), evaluate(model, PAIR, "test", protocols=())


DETERMINED = ("gated_cos_", "gated_null_perm_", "gated_norm_", "fixed_", "norm_x")


@pytest.mark.parametrize("name", ["abxi", "cdsrnp"])
@pytest.mark.parametrize("gca", [(0,), (0, 1)])
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**30), share=st.floats(0.1, 0.9))
def test_signs_of_a_tanh_gate_s_features_are_not_determined(
    name: str, gca: tuple[int, ...], seed: int, share: float
) -> None:
    """The model computes the same whichever they are, and so the gated and the fixed cosine are the same."""
    model = model_of(name, gca, gate="tanh")
    scores, before = measured(model)
    flip_features(model, seed, share)
    again, after = measured(model)
    assert near(again, scores, 1e-9)
    for key, value in before.items():
        if key.partition(".gca")[2][2:].startswith(DETERMINED):
            assert after[key] == pytest.approx(value, abs=1e-9), key
    changes = [abs(after[key] - before[key]) for key in before if key.endswith(".cos_mean_abs")]
    assert len(changes) == 2 * len(gca)
    assert min(changes) > 1e-9


@pytest.mark.parametrize("name", ["abxi", "cdsrnp"])
def test_cosine_of_a_tanh_gate_s_update_depends_on_signs_that_are_not_determined(name: str) -> None:
    """Of one function, the mean |cos(X, X')| of every module takes values that lie apart."""
    model, readings = model_of(name, (0, 1), gate="tanh"), []
    for seed in range(12):
        flip_features(model, seed, 0.5)
        readings.append(measured(model)[1])
    modules = [f"{s}.gca{point}" for s in "ab" for point in (0, 1)]
    assert min(np.ptp([reading[f"{module}.cos_mean_abs"] for reading in readings]) for module in modules) > 0.02


@pytest.mark.parametrize("name", ["abxi", "cdsrnp"])
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**30), share=st.floats(0.1, 0.9))
def test_signs_of_a_sigmoid_gate_s_features_are_determined(name: str, seed: int, share: float) -> None:
    model = model_of(name, (0,), gate="sigmoid")
    scores, before = measured(model)
    flip_features(model, seed, share)
    again, after = measured(model)
    assert (again - scores).abs().max() > 0.01
    for module in ("a.gca0", "b.gca0"):
        assert before[f"{module}.fixed_cos_signed"] == pytest.approx(before[f"{module}.cos_signed"], abs=1e-12)
        assert abs(after[f"{module}.gated_cos_mean_abs"] - before[f"{module}.gated_cos_mean_abs"]) > 1e-9

"""ABXI against the official program, and the no-future property at every insertion point."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from gcalib.attention import tapping
from gcalib.config import RunConfig
from gcalib.data.batches import Batch, make_batch
from gcalib.models.abxi import ABXI
from gcalib.models.base import Recommender, info_nce, mean_per_user

FIXTURE = Path(__file__).parent / "fixtures" / "abxi_official.npz"
STACKS = [points for size in range(4) for points in combinations((0, 1, 2), size)]


@pytest.fixture(scope="module")
def official() -> dict[str, np.ndarray]:
    with np.load(FIXTURE, allow_pickle=False) as arrays:
        return dict(arrays)


def official_model(arrays: dict[str, np.ndarray]) -> ABXI:
    """Our ABXI with the official weights, in float64."""
    nA, nB, window, dim, heads, domain_rank, invariant_rank, _ = map(int, arrays["meta"])
    config = RunConfig(
        pair="fixture", dim=dim, hidden=680, self_heads=heads, domain_rank=domain_rank, invariant_rank=invariant_rank,
        dropout=0.0, max_length=window + 3, temperature=0.75, as_published=True,
    )  # fmt: skip
    weights = {name[7:]: torch.from_numpy(array) for name, array in arrays.items() if name.startswith("weight/")}
    model = ABXI(config, (nA, nB)).double()
    prefixes = {"ffn": "ffn", "proj_i": "invariant", "mha.mha.in_proj_": "attention.query_key_value."}
    prefixes |= {"mha.mha.out_proj": "attention.out", "mha.norm_mha": "attention_norm", "ei": "item", "ep": "position"}
    for s in "xab":
        prefixes |= {f"dlora_{s}": f"lora.{s}", f"norm_sa_{s}": f"ffn_norm.{s}"}
    for s in "ab":
        prefixes |= {f"ilora_{s}": f"invariant_lora.{s}", f"proj_{s}": f"own.{s}"}
        prefixes |= {f"norm_i2{s}": f"invariant_norm.{s}", f"norm_{s}2{s}": f"own_norm.{s}"}
    parts = {"fc_1": "inner", "fc_2": "gate", "fc_3": "outer", "mat_A": "A", "mat_B": "B"}
    renamed = {}
    for name, tensor in weights.items():
        prefix = max((p for p in prefixes if name.startswith(p)), key=len)
        renamed[prefixes[prefix] + "".join(name[len(prefix) :])] = tensor
    for old, new in parts.items():
        renamed = {name.replace(old, new): tensor for name, tensor in renamed.items()}
    model.load_state_dict(renamed)
    return model


def official_histories(arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
    return [arrays[f"history_{user}"] for user in range(len(arrays["train_x"]))]


def test_training_states_loss_and_gradient_are_the_official_ones(official: dict[str, np.ndarray]) -> None:
    model = official_model(official).train()
    nA, _, window = map(int, official["meta"][:3])
    histories = official_histories(official)
    batch = make_batch(histories, nA, window=window, training=True, as_published=True)
    state = torch.from_numpy(official["train_state"])
    negatives = torch.from_numpy(official["train_negatives"])
    total = torch.zeros((), dtype=torch.float64)
    slots = torch.tensor([len(history) - 1 for history in histories])
    for ours, queries, loss in zip(model(batch), batch.queries, ("loss_a", "loss_b"), strict=True):
        column = window - slots[queries.sequence] + queries.slot  # where the padded official form has this query
        assert torch.equal(torch.from_numpy(official["train_target"])[queries.sequence, column], queries.targets)
        assert (state[queries.sequence, column] - ours).abs().max() < 1e-9
        vectors = model.item(negatives[queries.sequence, column].long())
        positive = (ours * model.item(queries.targets)).sum(1) / model.temperature
        negative = torch.einsum("qd,qnd->qn", ours, vectors) / model.temperature
        ours_loss = info_nce(positive, negative, mean_per_user(queries.sequence, batch.size).double())
        assert abs(ours_loss.item() - official[loss]) < 1e-9
        total = total + ours_loss
    total.backward()
    assert (model.item.weight.grad - torch.from_numpy(official["grad_item_embedding"])).abs().max() < 1e-9


def test_evaluation_states_and_scores_are_the_official_ones(official: dict[str, np.ndarray]) -> None:
    model = official_model(official).eval()
    nA, _, window = map(int, official["meta"][:3])
    batch = make_batch(
        [history[:-1] for history in official_histories(official)], nA, window=window, training=False,
        as_published=True,
    )  # fmt: skip
    in_b = torch.from_numpy(official["eval_target"][:, 0] > nA)
    with torch.no_grad():
        state_a, state_b = model(batch)
    ours = torch.where(in_b.unsqueeze(1), state_b, state_a)
    assert (ours - torch.from_numpy(official["eval_state"])).abs().max() < 1e-9
    scores = torch.from_numpy(official["eval_scores"])
    for domain, columns in ((0, slice(1, 1 + nA)), (1, slice(1 + nA, None))):
        assert (ours @ model.item_vectors(domain).T - scores[:, columns]).abs().max() < 1e-9


def tiny(gca: tuple[int, ...], **changes: object) -> ABXI:
    torch.manual_seed(3)
    config = RunConfig(pair="tiny", dim=16, heads=2, gca=gca, dropout=0.0, max_length=15, **changes)
    model = ABXI(config, (20, 30)).double()
    with torch.no_grad():  # at the start LoRA is silent and biases are zero: a leak through them would not show
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def random_history(rng: np.random.Generator, length: int) -> np.ndarray:
    return rng.permutation(np.arange(1, 51))[:length]


def states_by_slot(model: ABXI, sequences: list[np.ndarray]) -> dict[tuple[int, int, int], torch.Tensor]:
    """Training states, by (user, slot, domain of the target)."""
    options = {"tails": model.reads_tails, "as_published": model.as_published}
    batch = make_batch(sequences, 20, window=12, training=True, **options)
    with torch.no_grad():
        states = model.train()(batch)
    return {
        (int(user), int(slot), domain): state
        for domain, (queries, rows) in enumerate(zip(batch.queries, states, strict=True))
        for user, slot, state in zip(queries.sequence, queries.slot, rows, strict=True)
    }


def changed_after(rng: np.random.Generator, sequence: np.ndarray, t: int, same_domain: bool = False) -> np.ndarray:
    """The sequence with all events after t replaced by others."""
    changed = sequence.copy()
    free = np.setdiff1d(np.arange(1, 51), sequence)
    for place in range(t + 1, len(sequence)):
        pool = free[(free > 20) == (sequence[place] > 20)] if same_domain else free
        changed[place] = rng.choice(pool)
        free = np.setdiff1d(free, changed[place])
    return changed


@pytest.mark.parametrize("gca", STACKS)
def test_no_future_in_training(gca: tuple[int, ...]) -> None:
    """Changing every event after t changes no state, and so no loss term, of a target at or before t."""
    model, rng = tiny(gca), np.random.default_rng(0)
    compared = moved = 0
    for t in (2, 4, 7, 9):
        sequences = [random_history(rng, length) for length in (13, 12, 11)]
        before = states_by_slot(model, sequences)
        after = states_by_slot(model, [changed_after(rng, s, t) for s in sequences])
        for key, state in before.items():
            if key[1] < t:  # the target at slot + 1 <= t is the same event in both
                assert torch.allclose(after[key], state, rtol=0, atol=1e-12), (gca, t, key)
                compared += 1
            elif key in after:
                moved += not torch.allclose(after[key], state, rtol=0, atol=1e-6)
    assert compared > 50 and moved > 20


def rows_before(t: int, model: Recommender, encoders: list[nn.Module], batch: Batch) -> list[torch.Tensor]:
    """Evaluation: the rows at slots before t that encoders give, stream by stream, then those of cross-attention.

    What a model does between these goes row by row. `encoders` give the rows of all streams, in order: one or several.
    """
    streams = (batch.mixed, *batch.own)
    encoded: list[torch.Tensor] = []
    hooks = [module.register_forward_hook(lambda module, inputs, output: encoded.append(output)) for module in encoders]
    with torch.no_grad(), tapping(model) as taps:
        model(batch)
    for hook in hooks:
        hook.remove()
    states = torch.cat(encoded).split([len(stream.items) for stream in streams])
    found = [(stream.slot, h) for stream, h in zip(streams, states, strict=True)]
    for tap in taps:
        own = 0 if tap.name.startswith("a") else 1
        found.append(((batch.queries if tap.name.endswith("2") else batch.own)[own].slot, tap.out))
    return [h[slot < t] for slot, h in found]


def assert_no_future_in_evaluation(model: Recommender, encoders: list[nn.Module]) -> None:
    """No row depends on events after its slot, neither of the encoders nor of cross-attention."""
    rng, compared, gca = np.random.default_rng(1), 0, model.gca_points
    for t in (3, 6, 9):
        sequence = random_history(rng, 12)
        # a slot before t is followed by an event that both histories share
        first, second = (
            rows_before(t, model, encoders, make_batch([history], 20, window=12, training=False))
            for history in (sequence, changed_after(rng, sequence, t))
        )
        assert len(first) == 3 + 2 * len(gca)
        for one, other in zip(first, second, strict=True):
            assert torch.allclose(one, other, rtol=0, atol=1e-12), (gca, t)
            compared += len(one)
    assert compared > 30 + 10 * len(gca)


@pytest.mark.parametrize("gca", STACKS)
def test_no_future_in_evaluation(gca: tuple[int, ...]) -> None:
    model = tiny(gca).eval()
    assert_no_future_in_evaluation(model, [model.attention_norm])


def test_published_positions_tell_the_future_and_ours_do_not() -> None:
    """Counting positions within a domain's stream says how many items of the domain are still to come."""
    rng = np.random.default_rng(2)
    model = tiny((), as_published=True)
    sequences = [random_history(rng, 13) for _ in range(4)]
    before = states_by_slot(model, sequences)

    def largest_move(same_domain: bool) -> float:
        after = states_by_slot(model, [changed_after(rng, s, 6, same_domain) for s in sequences])
        return max(float((after[key] - state).abs().max()) for key, state in before.items() if key[1] < 6)

    assert largest_move(same_domain=True) < 1e-12
    assert largest_move(same_domain=False) > 1e-3


@pytest.mark.parametrize("gca", STACKS)
def test_a_user_does_not_depend_on_the_others_in_the_batch(gca: tuple[int, ...]) -> None:
    model, rng = tiny(gca).eval(), np.random.default_rng(4)
    histories = [random_history(rng, length) for length in (12, 3, 7, 1)] + [np.array([5, 6, 7]), np.array([30, 31])]
    with torch.no_grad():
        together = model(make_batch(histories, 20, window=12, training=False))
        for user, history in enumerate(histories):
            alone = model(make_batch([history], 20, window=12, training=False))
            for domain in (0, 1):
                assert torch.allclose(alone[domain][0], together[domain][user], rtol=0, atol=1e-12)


@pytest.mark.parametrize("gca", STACKS)
def test_the_last_training_state_is_the_evaluation_state(gca: tuple[int, ...]) -> None:
    """Training and evaluation are one computation: on the newest slot they agree (dropout off)."""
    model, rng = tiny(gca), np.random.default_rng(5)
    sequence = random_history(rng, 13)
    training = states_by_slot(model, [sequence])
    with torch.no_grad():
        evaluation = model.eval()(make_batch([sequence[:-1]], 20, window=12, training=False))
    domain = int(sequence[-1] > 20)
    assert torch.allclose(training[0, 11, domain], evaluation[domain][0], rtol=0, atol=1e-12)


def test_the_baseline_starts_alike_with_and_without_cross_attention() -> None:
    starts = []
    for gca in ((), (0,), (0, 1, 2)):
        torch.manual_seed(7)
        starts.append(ABXI(RunConfig(pair="tiny", dim=16, gca=gca), (20, 30)).state_dict())
    for other in starts[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in starts[0].items())
        assert len(other) > len(starts[0])


def test_with_pads_as_targets_only_the_mean_of_a_changes() -> None:
    """Alone, a user's loss in A shrinks by their targets in A over all slots that hold none of B; B's stays."""
    rng = np.random.default_rng(5)
    sequences = [random_history(rng, length) for length in (4, 9, 13, 30)]  # the last two fill the window
    negatives = torch.tensor([3, 8, 15, 22, 37, 44])

    def losses(histories: list[np.ndarray], pads: bool) -> dict[str, torch.Tensor]:
        model = tiny((), pads_as_targets=pads).train()
        return model.loss(make_batch(histories, 20, window=12, training=True), negatives)

    expected = {"a": 0.0, "b": 0.0}
    for sequence in sequences:
        alone, targets = losses([sequence], pads=False), sequence[1:][-12:]
        share = (targets <= 20).sum() / (12 - (targets > 20).sum())
        assert 0 < share <= 1
        expected["a"] += alone["a"].item() * share / len(sequences)
        expected["b"] += alone["b"].item() / len(sequences)
    together = losses(sequences, pads=True)
    assert together["a"].item() == pytest.approx(expected["a"], rel=1e-6)  # weights are float32
    assert together["b"].item() == pytest.approx(expected["b"], rel=1e-6)
    assert losses(sequences, pads=False)["a"].item() > 1.2 * together["a"].item()

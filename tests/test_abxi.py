"""ABXI against the official program, and what the options of `published` change."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from gcalib.config import RunConfig
from gcalib.data.batches import Batch, collate
from gcalib.models.abxi import ABXI
from gcalib.models.losses import info_nce, mean_per_user

FIXTURE = Path(__file__).parent / "fixtures" / "abxi_official.npz"
OFFICIAL = ("official_attention",)


@pytest.fixture(scope="module")
def official() -> dict[str, np.ndarray]:
    with np.load(FIXTURE, allow_pickle=False) as arrays:
        return dict(arrays)


def official_model(arrays: dict[str, np.ndarray]) -> ABXI:
    """Our ABXI with the official weights, in float64."""
    nA, nB, window, dim, heads, domain_rank, invariant_rank, _ = map(int, arrays["meta"])
    config = RunConfig(
        pair="fixture", dim=dim, hidden=680, self_heads=heads, domain_rank=domain_rank, invariant_rank=invariant_rank,
        dropout=0.0, max_length=window + 3, published=OFFICIAL,
    )  # fmt: skip
    prefixes = {"ffn": "ffn", "proj_i": "invariant", "mha.mha.in_proj_": "attention.query_key_value."}
    prefixes |= {"mha.mha.out_proj": "attention.out", "mha.norm_mha": "attention_norm", "ei": "item", "ep": "position"}
    for s in "xab":
        prefixes |= {f"dlora_{s}": f"lora.{s}", f"norm_sa_{s}": f"ffn_norm.{s}"}
    for s in "ab":
        prefixes |= {f"ilora_{s}": f"invariant_lora.{s}", f"proj_{s}": f"own.{s}"}
        prefixes |= {f"norm_i2{s}": f"invariant_norm.{s}", f"norm_{s}2{s}": f"own_norm.{s}"}
    parts = {"fc_1": "inner", "fc_2": "gate", "fc_3": "outer", "mat_A": "A", "mat_B": "B"}
    weights = {}
    for name, array in arrays.items():
        if name.startswith("weight/"):
            theirs = name.removeprefix("weight/")
            prefix = max((p for p in prefixes if theirs.startswith(p)), key=len)
            ours = prefixes[prefix] + theirs.removeprefix(prefix)
            for old, new in parts.items():
                ours = ours.replace(old, new)
            weights[ours] = torch.from_numpy(array)
    model = ABXI(config, (nA, nB)).double()
    model.load_state_dict(weights)
    return model


def official_batch(arrays: dict[str, np.ndarray], training: bool) -> Batch:
    histories = [arrays[f"history_{user}"] for user in range(len(arrays["train_x"]))]
    nA, _, window = map(int, arrays["meta"][:3])
    return collate(
        [history if training else history[:-1] for history in histories], nA, window=window, training=training,
        recency_in_domain=True,
    )  # fmt: skip


def test_training_states_loss_and_gradient_are_the_official_ones(official: dict[str, np.ndarray]) -> None:
    model = official_model(official).train()
    window = int(official["meta"][2])
    batch = official_batch(official, training=True)
    inputs = batch.mixed.mask.sum(dim=1)
    state, negatives = (torch.from_numpy(official[name]) for name in ("train_state", "train_negatives"))
    total = torch.zeros((), dtype=torch.float64)
    for h, stream, loss in zip(model(batch), batch.domains, ("loss_a", "loss_b"), strict=True):
        user, row = stream.predicts.nonzero(as_tuple=True)
        column = window - inputs[user] + stream.query_position[user, row]  # of the official form, padded in front
        ours, targets = h[user, row], stream.targets[user, row]
        assert torch.equal(torch.from_numpy(official["train_target"])[user, column], targets)
        assert (state[user, column] - ours).abs().max() < 1e-9
        vectors = model.item(negatives[user, column].long())
        positive = (ours * model.item(targets)).sum(1) / 0.75
        negative = torch.einsum("qd,qnd->qn", ours, vectors) / 0.75
        ours_loss = info_nce(positive, negative, mean_per_user(user, batch.size).double())
        assert abs(ours_loss.item() - official[loss]) < 1e-9
        total = total + ours_loss
    total.backward()
    assert (model.item.weight.grad - torch.from_numpy(official["grad_item_embedding"])).abs().max() < 1e-9


def test_evaluation_states_and_scores_are_the_official_ones(official: dict[str, np.ndarray]) -> None:
    model = official_model(official).eval()
    nA = int(official["meta"][0])
    in_b = torch.from_numpy(official["eval_target"][:, 0] > nA)
    with torch.no_grad():
        state_a, state_b = model(official_batch(official, training=False))
    ours = torch.where(in_b.unsqueeze(1), state_b[:, 0], state_a[:, 0])
    assert (ours - torch.from_numpy(official["eval_state"])).abs().max() < 1e-9
    scores = torch.from_numpy(official["eval_scores"])
    for domain, columns in ((0, slice(1, 1 + nA)), (1, slice(1 + nA, None))):
        assert (ours @ model.item_vectors(domain).T - scores[:, columns]).abs().max() < 1e-9


def tiny(*published: str) -> ABXI:
    torch.manual_seed(3)
    config = RunConfig(pair="tiny", dim=16, dropout=0.0, max_length=15, published=published)
    model = ABXI(config, (20, 30)).double()
    with torch.no_grad():  # at the start LoRA is silent and biases are zero
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.train()


def batch_of(model: ABXI, sequences: list[np.ndarray]) -> Batch:
    return collate(sequences, 20, window=12, training=True, recency_in_domain=model.recency_in_domain)


def early_states(model: ABXI, sequences: list[np.ndarray], t: int) -> torch.Tensor:
    """States that predict events up to t, first of A, then of B."""
    batch = batch_of(model, sequences)
    with torch.no_grad():
        states = model(batch)
    early = [stream.predicts & (stream.query_position < t) for stream in batch.domains]
    return torch.cat([h[rows] for h, rows in zip(states, early, strict=True)])


def test_official_positions_tell_the_future() -> None:
    """They count the domain's items that are still to come; other items there of the same domains change nothing."""
    rng, model = np.random.default_rng(2), tiny("official_attention")
    sequence = rng.permutation(np.arange(1, 51))[:13]
    free = np.setdiff1d(np.arange(1, 51), sequence)
    of_a, of_b = free[free <= 20], free[free > 20]
    alike = np.concatenate([sequence[:7], np.where(sequence[7:] <= 20, of_a[:6], of_b[:6])])
    only_b = np.concatenate([sequence[:7], of_b[:6]])
    before = early_states(model, [sequence], 6)
    assert (early_states(model, [alike], 6) - before).abs().max() < 1e-10
    assert (early_states(model, [only_b], 6) - before).abs().max() > 1e-3


def test_with_pads_as_targets_only_the_mean_of_a_changes() -> None:
    """A user's loss in A shrinks by their targets in A over all inputs of the window that predict none of B."""
    rng, negatives = np.random.default_rng(5), torch.tensor([[3, 8, 15, 22, 37, 44]])
    sequences = [rng.permutation(np.arange(1, 51))[:length] for length in (4, 9, 13, 30)]  # two fill the window

    def losses(histories: list[np.ndarray], *published: str) -> dict[str, float]:
        model = tiny(*published)
        return {name: loss.item() for name, loss in model.loss(batch_of(model, histories), negatives).items()}

    alone = [losses([sequence]) for sequence in sequences]
    shares = [(s[1:][-12:] <= 20).sum() / (12 - (s[1:][-12:] > 20).sum()) for s in sequences]
    together = losses(sequences, "pads_as_targets")
    expected = np.mean([share * loss["a"] for share, loss in zip(shares, alone, strict=True)])
    assert min(shares) < 0.5
    assert together["a"] == pytest.approx(expected, rel=1e-6)  # weights are float32
    assert together["b"] == pytest.approx(np.mean([loss["b"] for loss in alone]), rel=1e-6)

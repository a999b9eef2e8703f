"""LLM4CDSR against the official program, the no-future property at every insertion point, and what it learns from."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from test_abxi import assert_no_future_in_evaluation

from gcalib.config import RunConfig
from gcalib.data.batches import Batch, make_batch
from gcalib.data.pair import Pair
from gcalib.data.synthetic import synthetic_pair
from gcalib.data.text import ItemText, TextVectors, text_vectors
from gcalib.evaluation import evaluate
from gcalib.models import build_model
from gcalib.models.base import binary_cross_entropy, info_nce, mean_per_user, soft_contrast
from gcalib.models.cost import parameter_counts
from gcalib.models.llm4cdsr import LLM4CDSR
from gcalib.training import Trainer

FIXTURE = Path(__file__).parent / "fixtures" / "llm4cdsr_official.npz"
STACKS = [points for size in range(4) for points in combinations((0, 1, 2), size)]
N_A, N_B = 20, 30


def vectors_of(items: np.ndarray, users: np.ndarray) -> TextVectors:
    return TextVectors(items, users, ItemText(("some",) * len(items), ("titles", "titles"), (1.0, 1.0), (1.0, 1.0)))


@pytest.fixture(scope="module")
def official() -> dict[str, np.ndarray]:
    with np.load(FIXTURE, allow_pickle=False) as arrays:
        return dict(arrays)


def official_model(arrays: dict[str, np.ndarray]) -> LLM4CDSR:
    """Our LLM4CDSR with the official weights, in float64."""
    nA, nB, window, dim, _, layers, heads = map(int, arrays["meta"])
    config = RunConfig(
        pair="fixture", model="llm4cdsr", dim=dim, layers=layers, self_heads=heads, dropout=0.0, max_length=window + 3,
        as_published=True,
    )  # fmt: skip
    weights = {name[7:]: torch.from_numpy(array) for name, array in arrays.items() if name.startswith("weight/")}
    text, users = (weights.pop(f"{name}_emb_llm.weight").numpy() for name in ("item", "user"))
    model = LLM4CDSR(config, (nA, nB), vectors_of(text[1:], users)).double()
    model.text_items, model.text_users = torch.from_numpy(text), torch.from_numpy(users)
    renamed = {"item.weight": torch.cat([weights.pop("item_embA.weight"), weights.pop("item_embB.weight")[1:]])}
    inside = {
        "attention_layernorms.{}": "query_norm", "forward_layernorms.{}": "ffn_norm",
        "attention_layers.{}.out_proj": "out", "forward_layers.{}.conv1": "inner", "forward_layers.{}.conv2": "outer",
    }  # fmt: skip
    for suffix, s in (("", "x"), ("A", "a"), ("B", "b")):
        renamed[f"position.{s}.weight"] = weights.pop(f"pos_emb{suffix}.weight")
        for part in ("weight", "bias"):
            renamed[f"encoder.{s}.norm.{part}"] = weights.pop(f"backbone{suffix}.last_layernorm.{part}")
            for layer in range(layers):
                ours, theirs = f"encoder.{s}.layers.{layer}", f"backbone{suffix}"
                packed = weights.pop(f"{theirs}.attention_layers.{layer}.in_proj_{part}")
                renamed[f"{ours}.query.{part}"], renamed[f"{ours}.key_value.{part}"] = packed[:dim], packed[dim:]
                for old, new in inside.items():
                    tensor = weights.pop(f"{theirs}.{old.format(layer)}.{part}")
                    renamed[f"{ours}.{new}.{part}"] = tensor.squeeze(2) if tensor.dim() == 3 else tensor
    model.load_state_dict({**renamed, **weights})
    return model


def official_histories(arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Whole sequences with ids of ours: the official ones count each domain's items from 1."""
    users = range(len(arrays["train/seq"]))
    return [arrays[f"history_{user}"] + arrays[f"domain_{user}"] * arrays["meta"][0] for user in users]


def official_batch(arrays: dict[str, np.ndarray], training: bool) -> Batch:
    histories = official_histories(arrays)
    return make_batch(
        histories if training else [history[:-1] for history in histories], int(arrays["meta"][0]),
        window=int(arrays["meta"][2]), training=training, as_published=True, users=arrays["train/user_id"],
    )  # fmt: skip


def test_evaluation_scores_are_the_official_ones(official: dict[str, np.ndarray]) -> None:
    model = official_model(official).eval()
    nA, dim = int(official["meta"][0]), int(official["meta"][3])
    with torch.no_grad():
        states = model(official_batch(official, training=False))
        vectors = torch.cat([model.item_vectors(0), model.item_vectors(1)])
    for user, domain in enumerate(official["eval/target_domain"]):
        state = states[domain][user]
        # the fixture's candidates are drawn apart for the two halves of the score
        mixed = vectors[official["eval/candidates"][user] - 1, :dim]
        own = vectors[official[f"eval/candidates{'AB'[domain]}"][user] + domain * nA - 1, dim:]
        found = torch.cat([mixed, own], dim=1) @ state
        assert (found - torch.from_numpy(official["eval_logits"][user])).abs().max() < 1e-9


def test_training_losses_are_the_official_ones(official: dict[str, np.ndarray]) -> None:
    """To the seven digits in which the official program gives its losses."""
    model = official_model(official).train()
    nA = int(official["meta"][0])
    batch = official_batch(official, training=True)
    mixed, *own = model._states(batch, model._adapted(batch.mixed.items))
    slots = torch.tensor([len(history) - 1 for history in official_histories(official)])
    recommendation = torch.zeros((), dtype=torch.float64)
    for domain, (query, h) in enumerate(zip(batch.queries, own, strict=True)):
        counted = query.own_row >= 0
        column = int(official["meta"][2]) - slots[query.sequence] + query.slot
        where = (query.sequence[counted].numpy(), column[counted].numpy())
        assert (official["train/domain_mask"][where] == domain).all()
        assert (official["train/domain_mask"] == domain).sum() == counted.sum()
        assert (official["train/pos"][where] == query.targets[counted].numpy()).all()
        state = model._joined(mixed, h, query)[counted]
        letter = "AB"[domain]
        logits = []
        for kind in ("pos", "neg"):
            half = official[f"train/{kind}{letter}"]
            local = torch.from_numpy(half[half > 0].astype(np.int64) + domain * nA)
            text = torch.from_numpy(official[f"train/{kind}"][where].astype(np.int64))
            logits.append((state * torch.cat([model._adapted(text), model.item(local)], dim=1)).sum(dim=1))
        weight = torch.full((int(counted.sum()),), 1 / int(counted.sum()), dtype=torch.float64)
        recommendation = recommendation + binary_cross_entropy(logits[0], logits[1].unsqueeze(1), weight)
    assert recommendation.item() == pytest.approx(float(official["loss_recommendation"]), rel=2e-7)

    m_a, m_b = (model._adapted(torch.from_numpy(official[f"train/reg_{s}"][:, 0])) for s in "AB")
    newest = torch.tensor(np.cumsum(slots.numpy()) - 1)
    profile = model.user_adapter(model.text_users[batch.users])
    total = recommendation + 0.1 * soft_contrast(m_a, m_b) + 0.1 * soft_contrast(profile, mixed[newest])
    assert total.item() == pytest.approx(float(official["loss_total"]), rel=2e-7)


def tiny(gca: tuple[int, ...] = (), **changes: object) -> LLM4CDSR:
    torch.manual_seed(3)
    rng = np.random.default_rng(6)
    config = RunConfig(
        pair="tiny",
        model="llm4cdsr",
        **{"dim": 16, "heads": 2, "gca": gca, "dropout": 0.0, "max_length": 15, **changes},
    )
    vectors = vectors_of(*(rng.standard_normal((n, 10)).astype(np.float32) for n in (N_A + N_B, 8)))
    model = LLM4CDSR(config, (N_A, N_B), vectors).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def random_history(rng: np.random.Generator, length: int) -> np.ndarray:
    return rng.permutation(np.arange(1, 1 + N_A + N_B))[:length]


def training_batch(model: LLM4CDSR, sequences: list[np.ndarray]) -> Batch:
    users = np.arange(len(sequences))
    return make_batch(sequences, N_A, window=12, training=True, tails=model.reads_tails, users=users)


def states_by_slot(model: LLM4CDSR, sequences: list[np.ndarray]) -> dict[tuple[int, int, int], torch.Tensor]:
    """Training states, by (user, slot, domain of the target)."""
    batch = training_batch(model, sequences)
    with torch.no_grad():
        states = model.train()(batch)
    return {
        (int(user), int(slot), domain): state
        for domain, (queries, rows) in enumerate(zip(batch.queries, states, strict=True))
        for user, slot, state in zip(queries.sequence, queries.slot, rows, strict=True)
    }


def changed_after(rng: np.random.Generator, sequence: np.ndarray, t: int) -> np.ndarray:
    """The sequence with all events after t replaced by others."""
    free = np.setdiff1d(np.arange(1, 1 + N_A + N_B), sequence)
    return np.concatenate([sequence[: t + 1], rng.permutation(free)[: len(sequence) - t - 1]])


@pytest.mark.parametrize("gca", STACKS)
def test_no_future_in_training(gca: tuple[int, ...]) -> None:
    """Changing every event after t changes no state, and so no recommendation loss, of a target at or before t."""
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


def test_as_published_the_future_leaks() -> None:
    """On purpose: the official code attends without a causal mask, so that early states move with late events."""
    model, rng = tiny(as_published=True), np.random.default_rng(0)
    sequences = [random_history(rng, 13) for _ in range(3)]
    before = states_by_slot(model, sequences)
    after = states_by_slot(model, [changed_after(rng, s, 7) for s in sequences])
    early = [key for key in before if key[1] < 7]
    assert len(early) == 21
    assert all((after[key] - before[key]).abs().max() > 1e-3 for key in early)


@pytest.mark.parametrize("gca", STACKS)
def test_no_future_in_evaluation(gca: tuple[int, ...]) -> None:
    model = tiny(gca).eval()
    assert_no_future_in_evaluation(model, [model.encoder[s] for s in "xab"])


@pytest.mark.parametrize("gca", STACKS)
def test_a_user_does_not_depend_on_the_others_in_the_batch(gca: tuple[int, ...]) -> None:
    model, rng = tiny(gca).eval(), np.random.default_rng(4)
    histories = [random_history(rng, length) for length in (12, 3, 7, 1)] + [np.array([5, 6, 7]), np.array([30, 31])]
    with torch.no_grad():
        together = model(make_batch(histories, N_A, window=12, training=False))
        for user, history in enumerate(histories):
            alone = model(make_batch([history], N_A, window=12, training=False))
            for domain in (0, 1):
                assert torch.allclose(alone[domain][0], together[domain][user], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("gca", "published"), [*((gca, False) for gca in STACKS), ((), True)])
def test_the_last_training_state_is_the_evaluation_state(gca: tuple[int, ...], published: bool) -> None:
    """Training and evaluation are one computation: on the newest slot they agree (dropout off).

    As published only without cross-attention: a domain's newest row may be missing in training, and without a mask
    it moves all others as soon as the streams are joined.
    """
    model, rng = tiny(gca, as_published=published), np.random.default_rng(5)
    sequence = random_history(rng, 13)
    training = states_by_slot(model, [sequence])
    with torch.no_grad():
        evaluation = model.eval()(make_batch([sequence[:-1]], N_A, window=12, training=False))
    domain = int(sequence[-1] > N_A)
    assert torch.allclose(training[0, 11, domain], evaluation[domain][0], rtol=0, atol=1e-12)


def test_scores_are_text_and_own_part_together() -> None:
    model, d = tiny().eval(), 16
    with torch.no_grad():
        states = model(make_batch([np.array([3, 25, 7])], N_A, window=12, training=False))
        text = model.adapter(model.text_items)
    for domain, rows in ((0, slice(1, 1 + N_A)), (1, slice(1 + N_A, None))):
        scores = states[domain][0] @ model.item_vectors(domain).T
        parts = text[rows] @ states[domain][0, :d] + model.item.weight[rows] @ states[domain][0, d:]
        assert torch.allclose(scores, parts, rtol=0, atol=1e-12)
    assert not torch.allclose(states[0][:, d:], states[1][:, d:]) and torch.equal(states[0][:, :d], states[1][:, :d])


def by_hand(model: LLM4CDSR, batch: Batch, drawn: torch.Tensor) -> dict[str, torch.Tensor]:
    """The losses from `forward` and `item_vectors`, user by user and target by target."""
    vectors = torch.cat([torch.zeros(1, 32, dtype=torch.float64), model.item_vectors(0), model.item_vectors(1)])
    picked, sampled = drawn[: 2 * batch.size].view(2, -1), drawn[2 * batch.size :]
    losses = {}
    for domain, (state, query) in enumerate(zip(model(batch), batch.queries, strict=True)):
        mine = sampled[(sampled > N_A) == bool(domain)]
        positive = (state * vectors[query.targets]).sum(1)
        if model.objective == "infonce":
            negative = (state @ vectors[mine].T).masked_fill(mine == query.targets[:, None], float("-inf"))
            weight = mean_per_user(query.sequence, batch.size)
            loss = info_nce(positive / model.temperature, negative / model.temperature, weight)
        else:
            counted = query.own_row >= 0 if model.as_published else torch.ones(len(positive), dtype=torch.bool)
            negative = (state * vectors[mine]).sum(1)
            each = -torch.log(torch.sigmoid(positive)) - torch.log(1 - torch.sigmoid(negative))
            loss = each[counted].mean()
        losses["ab"[domain]] = loss
    both = [user for user in range(batch.size) if picked[0, user] and picked[1, user]]
    losses["regulariser"] = 0.1 * soft_contrast(*(vectors[items[both], :16] for items in picked))
    mixed, *_ = model._states(batch, model._adapted(batch.mixed.items))
    newest = [int(torch.nonzero(batch.mixed.sequence == user)[-1]) for user in range(batch.size)]
    losses["profile"] = 0.1 * soft_contrast(model.user_adapter(model.text_users[batch.users]), mixed[newest])
    return losses


@pytest.mark.parametrize("changes", [{}, {"as_published": True}, {"objective": "infonce", "negatives": 16}])
def test_the_losses_by_hand(changes: dict[str, object]) -> None:
    model, rng = tiny(**changes).train(), np.random.default_rng(8)
    sequences = [random_history(rng, length) for length in (13, 9, 4)] + [np.array([3, 9, 12, 40])]
    batch = training_batch(model, sequences)
    drawn = model.negatives(batch, np.random.default_rng(1))
    found, wanted = model.loss(batch, drawn), by_hand(model, batch, drawn)
    assert found.keys() == wanted.keys() and drawn[batch.size + 3] == 0  # the last user has no item of B to contrast
    for name, loss in wanted.items():
        assert found[name].item() == pytest.approx(loss.item(), abs=1e-12), name
    assert set(tiny(alpha=0.0, beta=0.0, **changes).loss(batch, drawn)) == {"a", "b"}


def test_what_is_drawn() -> None:
    """Each user's contrasted items are the user's own and change; negatives are new to the user, one a target."""
    model, rng = tiny(), np.random.default_rng(9)
    sequences = [random_history(rng, 13) for _ in range(4)]
    batch = training_batch(model, sequences)
    again = [model.negatives(batch, np.random.default_rng(2)) for _ in range(2)]
    assert torch.equal(*again)
    met: list[set[int]] = [set() for _ in range(8)]
    stream = np.random.default_rng(3)
    for _ in range(300):
        drawn = model.negatives(batch, stream)
        for place, item in enumerate(drawn[:8].tolist()):
            met[place].add(item)
        owner = torch.cat([query.sequence for query in batch.queries]).tolist()
        assert len(drawn) == 8 + len(owner) == 8 + 48
        targets = torch.cat([query.targets for query in batch.queries])
        assert torch.equal(drawn[8:] > N_A, targets > N_A)
        assert not any(int(item) in sequences[user] for item, user in zip(drawn[8:], owner, strict=True))
    for place, items in enumerate(met):
        history = sequences[place % 4][:-1]
        assert items == set(history[(history > N_A) == (place >= 4)].tolist())


def test_text_is_neither_parameter_nor_checkpoint() -> None:
    model = tiny()
    assert not [name for name in (*model.state_dict(), *dict(model.named_parameters())) if "text" in name]
    assert {name for name, _ in model.named_buffers()} == {"text_items", "text_users"}
    frozen = tiny(local_frozen=True)
    assert [name for name, p in frozen.named_parameters() if not p.requires_grad] == ["item.weight"]


def test_local_embeddings_start_at_the_principal_components() -> None:
    vectors = vectors_of(np.random.default_rng(0).standard_normal((50, 10)).astype(np.float32), np.zeros((2, 10)))
    weights = {}
    for start in ("text", "random"):
        torch.manual_seed(0)
        config = RunConfig(pair="tiny", model="llm4cdsr", dim=12, local_init=start)
        weights[start] = LLM4CDSR(config, (N_A, N_B), vectors).item.weight.detach().numpy()
    centred = vectors.items - vectors.items.mean(axis=0)
    found = weights["text"][1:, :10]
    # distances between items are kept, and the axes come in order of the variance along them
    assert np.allclose(found @ found.T, centred @ centred.T, atol=1e-4)
    assert (np.diff(found.var(axis=0)) < 0).all()
    assert np.array_equal(weights["text"][:, 10:], weights["random"][:, 10:]) and not weights["text"][0].any()


@pytest.mark.parametrize("axis", ["width", "hidden", "adapter"])
def test_a_plain_twin_can_be_made_as_large(axis: str) -> None:
    pair = synthetic_pair(num_users=20, num_items=(60, 60))
    config = RunConfig(
        pair="synthetic", model="llm4cdsr", text="hashed-words", dim=32, gca=(0,), match="params", match_axis=axis
    )
    sizes = [
        parameter_counts(build_model(c, pair))["params_network"]
        for c in (config, config.but(match=None, match_axis="width"))
    ]
    assert abs(sizes[0] - sizes[1]) <= 0.01 * sizes[1]


def test_the_baseline_starts_alike_with_and_without_cross_attention() -> None:
    pair = synthetic_pair(num_users=20, num_items=(60, 60))
    starts = []
    for gca in ((), (0,), (0, 1, 2)):
        torch.manual_seed(7)
        config = RunConfig(pair="synthetic", model="llm4cdsr", text="hashed-words", dim=16, gca=gca)
        starts.append(build_model(config, pair).state_dict())
    for other in starts[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in starts[0].items())
        assert len(other) > len(starts[0])


def taught(pair: Pair, steps: int, **changes: object) -> tuple[Trainer, float, float]:
    """A trainer after some steps on all of a pair's 32 users, its first loss and its last."""
    config = RunConfig(
        pair="synthetic", model="llm4cdsr", text="hashed-words", dim=32, dropout=0.0, batch_size=32, lr=3e-3,
        weight_decay=0.0, alpha=0.0, beta=0.0, **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    trainer = Trainer(config, pair, torch.device("cpu"))
    losses = [sum(loss.item() for loss in trainer.step(np.arange(32)).values()) for _ in range(1 + steps)]
    return trainer, losses[0], losses[-1]


@pytest.mark.parametrize("gca", [(), (0,), (1, 2)])
def test_it_learns_a_few_users_by_heart(gca: tuple[int, ...]) -> None:
    pair = synthetic_pair(num_users=32, num_items=(60, 60))
    trainer, first, last = taught(pair, 200, gca=gca, objective="infonce", negatives=120, temperature=1.0)
    assert first > 5 and last < 0.1
    batch = trainer.batch(np.arange(32))
    with torch.no_grad():
        states = trainer.model(batch)
    for domain, (state, query) in enumerate(zip(states, batch.queries, strict=True)):
        best = 1 + domain * 60 + (state @ trainer.model.item_vectors(domain).T).argmax(dim=1)
        told = query.slot >= 2  # two users may begin alike
        assert told.sum() > 100 and (best == query.targets)[told].all()


def test_it_learns_a_few_users_by_heart_with_its_published_loss() -> None:
    """Its negatives are new to the user, so it learns to rank a target above those items, not above the user's own."""
    pair = synthetic_pair(num_users=32, num_items=(60, 60))
    trainer, first, last = taught(pair, 400, gca=(0,))
    assert first > 1.3 and last < 0.03 * first
    batch = trainer.batch(np.arange(32))
    with torch.no_grad():
        states = trainer.model(batch)
    for domain, (state, query) in enumerate(zip(states, batch.queries, strict=True)):
        scores, first_id = state @ trainer.model.item_vectors(domain).T, 1 + domain * 60
        for row, (user, target) in enumerate(zip(query.sequence.tolist(), query.targets.tolist(), strict=True)):
            own = pair.split("val").history(user)
            scores[row, own[(own != target) & (pair.domain_of(own) == domain)] - first_id] = -torch.inf
        told = query.slot >= 2  # two users may begin alike
        assert told.sum() > 100 and (first_id + scores.argmax(dim=1) == query.targets)[told].double().mean() > 0.98


def test_what_it_knows_of_users_is_from_training_events_only() -> None:
    """Other validation and test events: the same text vectors, and the same start of the model."""
    pair = synthetic_pair(num_users=40, num_items=(60, 60))
    items = pair.items.copy()
    ends = pair.offsets[1:]
    for place in (ends - 1, ends - 2):  # another item of the same domain
        last = np.where(items[place] > 60, 120, 60)
        items[place] = np.where(items[place] == last, last - 1, last)
    config = RunConfig(pair="synthetic", model="llm4cdsr", text="hashed-words", dim=16)
    models = []
    for events in (pair.items, items):
        torch.manual_seed(0)
        models.append(build_model(config, replace(pair, items=events)))
    for name, buffer in models[0].named_buffers():
        assert torch.equal(buffer, dict(models[1].named_buffers())[name])
    assert all(torch.equal(t, models[1].state_dict()[name]) for name, t in models[0].state_dict().items())
    changed = pair.items.copy()
    changed[pair.offsets[:-1]] = np.where(changed[pair.offsets[:-1]] > 60, 120, 60)
    first, other = (text_vectors(p, "hashed-words") for p in (pair, replace(pair, items=changed)))
    assert not np.array_equal(first.users, other.users)


def test_a_record_says_where_the_text_is_from() -> None:
    pair = synthetic_pair(num_users=20, num_items=(60, 60))
    config = RunConfig(pair="synthetic", model="llm4cdsr", text="hashed-words", dim=16, gca=(0,))
    model = build_model(config, pair)
    facts = model.facts()
    assert facts["text_source_a"] == "planted titles" and facts["text_items_b"] == facts["text_events_a"] == 1.0
    assert facts["text_width"] == 256 and len(facts["text_sha256"]) == 64
    figures = evaluate(model, pair, "val")
    assert {"a.full.mrr", "b.full.ndcg@10", "a.gca0.cos_mean_abs", "b.gca0.cos_mean_abs"} <= figures.keys()

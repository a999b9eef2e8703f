"""LLM4CDSR against the official program, its losses by hand, what it draws, and what it knows of items and users."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gcalib.config import RunConfig
from gcalib.data.batches import Batch, collate
from gcalib.data.synthetic import synthetic_pair
from gcalib.data.text import ItemText, TextVectors, text_vectors
from gcalib.models.llm4cdsr import LLM4CDSR
from gcalib.models.losses import binary_cross_entropy, info_nce, mean_per_user, soft_contrast
from gcalib.models.matching import build_model

FIXTURE = Path(__file__).parent / "fixtures" / "llm4cdsr_official.npz"
OFFICIAL = ("official_attention",)
N_A, N_B = 20, 30
PAIR = synthetic_pair(num_users=40, num_items=(60, 60))


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
        pair="fixture", model="llm4cdsr", dim=dim, self_heads=heads, dropout=0.0, max_length=window + 3,
        published=OFFICIAL,
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
                joint = weights.pop(f"{theirs}.attention_layers.{layer}.in_proj_{part}")
                renamed[f"{ours}.query.{part}"], renamed[f"{ours}.key_value.{part}"] = joint[:dim], joint[dim:]
                for old, new in inside.items():
                    tensor = weights.pop(f"{theirs}.{old.format(layer)}.{part}")
                    renamed[f"{ours}.{new}.{part}"] = tensor.squeeze(2) if tensor.dim() == 3 else tensor
    model.load_state_dict({**renamed, **weights})
    return model


def official_batch(arrays: dict[str, np.ndarray], training: bool) -> Batch:
    """The users' whole sequences; the official ids count each domain's items from 1."""
    nA, _, window = map(int, arrays["meta"][:3])
    users = range(len(arrays["train/seq"]))
    histories = [arrays[f"history_{user}"] + arrays[f"domain_{user}"] * nA for user in users]
    return collate(
        histories if training else [history[:-1] for history in histories], nA, window=window, training=training,
        users=arrays["train/user_id"],
    )  # fmt: skip


# --------------------------------------------------------------------------------------------- the official program


def test_evaluation_scores_are_the_official_ones(official: dict[str, np.ndarray]) -> None:
    model = official_model(official).eval()
    nA, dim = int(official["meta"][0]), int(official["meta"][3])
    with torch.no_grad():
        states = model(official_batch(official, training=False))
        vectors = torch.cat([model.item_vectors(0), model.item_vectors(1)])
    for user, domain in enumerate(official["eval/target_domain"]):
        # the fixture's candidates are drawn apart for the two halves of the score
        mixed = vectors[official["eval/candidates"][user] - 1, :dim]
        own = vectors[official[f"eval/candidates{'AB'[domain]}"][user] + domain * nA - 1, dim:]
        found = torch.cat([mixed, own], dim=1) @ states[domain][user, 0]
        assert (found - torch.from_numpy(official["eval_logits"][user])).abs().max() < 1e-9


def test_training_losses_are_the_official_ones(official: dict[str, np.ndarray]) -> None:
    """To the seven digits in which the official program gives its losses."""
    model = official_model(official).train()
    nA, _, window = map(int, official["meta"][:3])
    batch = official_batch(official, training=True)
    mixed, *own = model.streams(batch, model.adapted(batch.mixed.items))
    inputs = batch.mixed.mask.sum(dim=1)
    recommendation = torch.zeros((), dtype=torch.float64)
    for domain, (stream, h) in enumerate(zip(batch.domains, own, strict=True)):
        counted = stream.predicts & stream.mask
        user, row = counted.nonzero(as_tuple=True)
        where = user, window - inputs[user] + stream.query_position[user, row]  # the official form pads in front
        assert (torch.from_numpy(official["train/domain_mask"])[where] == domain).all()
        assert (official["train/domain_mask"] == domain).sum() == counted.sum()
        assert torch.equal(torch.from_numpy(official["train/pos"])[where].long(), stream.targets[counted])
        state, logits = model.joined(mixed, h, stream)[counted], []
        for kind in ("pos", "neg"):
            half = official[f"train/{kind}{'AB'[domain]}"]
            local = torch.from_numpy(half[half > 0].astype(np.int64) + domain * nA)
            text = torch.from_numpy(official[f"train/{kind}"])[where].long()
            logits.append((state * torch.cat([model.adapted(text), model.item(local)], dim=1)).sum(dim=1))
        weight = torch.full((len(user),), 1 / len(user), dtype=torch.float64)
        recommendation = recommendation + binary_cross_entropy(logits[0], logits[1].unsqueeze(1), weight)
    assert recommendation.item() == pytest.approx(float(official["loss_recommendation"]), rel=2e-7)

    m_a, m_b = (model.adapted(torch.from_numpy(official[f"train/reg_{s}"][:, 0])) for s in "AB")
    profile = model.user_adapter(model.text_users[batch.users])
    contrasts = soft_contrast(m_a, m_b) + soft_contrast(profile, batch.mixed.newest(mixed)[:, 0])
    assert (recommendation + 0.1 * contrasts).item() == pytest.approx(float(official["loss_total"]), rel=2e-7)


# ------------------------------------------------------------------------------------------------------- the losses


def tiny(**changes: object) -> LLM4CDSR:
    torch.manual_seed(3)
    rng = np.random.default_rng(6)
    fields = {"dim": 16, "heads": 2, "dropout": 0.0, "max_length": 15, **changes}
    vectors = vectors_of(*(rng.standard_normal((n, 10)).astype(np.float32) for n in (N_A + N_B, 8)))
    model = LLM4CDSR(RunConfig(pair="tiny", model="llm4cdsr", **fields), (N_A, N_B), vectors).double()
    with torch.no_grad():  # biases start at zero
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def random_history(rng: np.random.Generator, length: int) -> np.ndarray:
    return rng.permutation(np.arange(1, 1 + N_A + N_B))[:length]


def training_batch(sequences: list[np.ndarray]) -> Batch:
    return collate(sequences, N_A, window=12, training=True, users=np.arange(len(sequences)))


def losses_by_hand(model: LLM4CDSR, batch: Batch, drawn: torch.Tensor) -> dict[str, torch.Tensor]:
    """From `forward` and `item_vectors`, over all targets of a domain in turn."""
    vectors = torch.cat([torch.zeros(1, 32, dtype=torch.float64), model.item_vectors(0), model.item_vectors(1)])
    picked, sampled = drawn[: 2 * batch.size].view(2, -1), drawn[2 * batch.size :]
    losses = {}
    for domain, (h, stream) in enumerate(zip(model(batch), batch.domains, strict=True)):
        state, targets = h[stream.predicts], stream.targets[stream.predicts]
        positive = (state * vectors[targets]).sum(1)
        mine = sampled[(sampled > N_A) == bool(domain)]
        if model.config.objective == "infonce":
            negative = (state @ vectors[mine].T).masked_fill(mine == targets[:, None], float("-inf"))
            weight = mean_per_user(stream.predicts.nonzero()[:, 0], batch.size)
            loss = info_nce(positive / model.config.temperature, negative / model.config.temperature, weight)
        else:
            negative = (state * vectors[mine]).sum(1)
            each = -torch.log(torch.sigmoid(positive)) - torch.log(1 - torch.sigmoid(negative))
            counted = stream.items[stream.predicts] > 0 if model.official else torch.ones_like(each, dtype=torch.bool)
            loss = each[counted].mean()
        losses["ab"[domain]] = loss
    both = [user for user in range(batch.size) if picked[0, user] and picked[1, user]]
    losses["regulariser"] = 0.1 * soft_contrast(*(vectors[items[both], :16] for items in picked))
    mixed = model.streams(batch, model.adapted(batch.mixed.items))[0]
    newest = torch.stack([mixed[user, batch.mixed.items[user].nonzero()[-1, 0]] for user in range(batch.size)])
    losses["profile"] = 0.1 * soft_contrast(model.user_adapter(model.text_users[batch.users]), newest)
    return losses


@pytest.mark.parametrize(
    "changes", [{}, {"published": OFFICIAL}, {"objective": "infonce", "negatives": 16}], ids=["ours", "official", "nce"]
)
def test_losses_by_hand(changes: dict[str, object]) -> None:
    model, rng = tiny(**changes).train(), np.random.default_rng(8)
    sequences = [random_history(rng, length) for length in (13, 9, 4)] + [np.array([3, 9, 12, 40])]
    batch = training_batch(sequences)
    drawn = model.negatives(batch, np.random.default_rng(1))
    assert drawn[batch.size + 3] == 0  # the last user has no item of B to contrast
    found, wanted = model.loss(batch, drawn), losses_by_hand(model, batch, drawn)
    assert found.keys() == wanted.keys()
    for name, loss in wanted.items():
        assert found[name].item() == pytest.approx(loss.item(), abs=1e-12), name


def test_losses_official_leave_out_targets_without_an_item_of_their_domain() -> None:
    model, sequence = tiny(published=OFFICIAL).train(), np.array([3, 9, 40])
    batch = training_batch([sequence])
    losses = model.loss(batch, model.negatives(batch, np.random.default_rng(1)))
    assert losses["b"] == 0
    assert losses["a"] > 0


def test_losses_need_the_batch_s_users() -> None:
    model = tiny().train()
    batch = replace(training_batch([np.array([3, 9, 40])]), users=None)
    with pytest.raises(ValueError, match="needs to know who the batch's users are"):
        model.loss(batch, model.negatives(batch, np.random.default_rng(1)))


def test_drawn_items_of_the_contrast_are_any_of_the_user_s_own() -> None:
    model, rng = tiny(), np.random.default_rng(9)
    sequences = [random_history(rng, 13) for _ in range(4)]
    batch, met = training_batch(sequences), [set[int]() for _ in range(8)]
    for _ in range(300):
        for place, item in enumerate(model.negatives(batch, rng)[:8].tolist()):
            met[place].add(item)
    for place, items in enumerate(met):
        history = sequences[place % 4][:-1]
        assert items == set(history[(history > N_A) == (place >= 4)].tolist())


def test_drawn_negatives_are_new_to_the_user_one_a_target() -> None:
    model, rng = tiny(), np.random.default_rng(9)
    sequences = [random_history(rng, 13) for _ in range(4)]
    batch = training_batch(sequences)
    owner = torch.cat([stream.predicts.nonzero()[:, 0] for stream in batch.domains]).tolist()
    targets = torch.cat([stream.targets[stream.predicts] for stream in batch.domains])
    assert len(targets) == 48
    for _ in range(50):
        negatives = model.negatives(batch, rng)[8:]
        assert torch.equal(negatives > N_A, targets > N_A)
        assert not any(int(item) in sequences[user] for item, user in zip(negatives, owner, strict=True))


def test_drawn_items_repeat_with_their_generator() -> None:
    model, batch = tiny(), training_batch([random_history(np.random.default_rng(9), 13)])
    again = [model.negatives(batch, np.random.default_rng(2)) for _ in range(2)]
    assert torch.equal(*again)


def test_official_attention_shows_early_states_late_events() -> None:
    """On purpose: the official code attends without a causal mask."""
    model = tiny(published=OFFICIAL).train()
    sequence = random_history(np.random.default_rng(0), 13)
    changed = sequence.copy()
    changed[11] = next(item for item in range(1, 51) if item not in sequence and (item > N_A) == (sequence[11] > N_A))
    with torch.no_grad():
        before, after = (model(training_batch([items])) for items in (sequence, changed))
    for h, other, stream in zip(before, after, training_batch([sequence]).domains, strict=True):
        early = stream.predicts & (stream.query_position < 10)
        assert early.sum() > 3
        assert ((h - other)[early].abs().amax(dim=1) > 1e-3).all()


# --------------------------------------------------------------------------------------------- what the model knows


def test_scores_are_those_of_text_and_own_embedding_together() -> None:
    model, d = tiny().eval(), 16
    with torch.no_grad():
        states = model(collate([np.array([3, 25, 7])], N_A, window=12, training=False))
        text = model.adapter(model.text_items)
        for domain, rows in ((0, slice(1, 1 + N_A)), (1, slice(1 + N_A, None))):
            state = states[domain][0, 0]
            parts = text[rows] @ state[:d] + model.item.weight[rows] @ state[d:]
            assert torch.allclose(model.scorer(domain)(state), parts, rtol=0, atol=1e-12)
    assert torch.equal(states[0][..., :d], states[1][..., :d])
    assert not torch.allclose(states[0][..., d:], states[1][..., d:])


def test_text_is_neither_parameter_nor_in_a_checkpoint() -> None:
    model = tiny()
    assert not [name for name in (*model.state_dict(), *dict(model.named_parameters())) if "text" in name]
    assert {name for name, _ in model.named_buffers()} == {"text_items", "text_users"}


def test_own_embeddings_start_at_the_principal_components() -> None:
    vectors = vectors_of(np.random.default_rng(0).standard_normal((50, 10)).astype(np.float32), np.zeros((2, 10)))
    torch.manual_seed(0)
    model = LLM4CDSR(RunConfig(pair="tiny", model="llm4cdsr", dim=12), (N_A, N_B), vectors)
    weight = model.item.weight.detach().numpy()
    centred = vectors.items - vectors.items.mean(axis=0)
    components = weight[1:, :10]
    assert np.allclose(components @ components.T, centred @ centred.T, atol=1e-4)  # distances are kept
    assert (np.diff(components.var(axis=0)) < 0).all()
    assert 0 < np.abs(weight[1:, 10:]).max() < 0.15  # the text is narrower than d
    assert not weight[0].any()


def test_text_and_initial_weights_are_of_training_events_only() -> None:
    items, ends = PAIR.items.copy(), PAIR.offsets[1:]
    for place in (ends - 1, ends - 2):  # another item of the same domain
        last = np.where(items[place] > 60, 120, 60)
        items[place] = np.where(items[place] == last, last - 1, last)
    config = RunConfig(pair="synthetic", model="llm4cdsr", text="hashed-words", dim=16)
    models = []
    for pair in (PAIR, replace(PAIR, items=items)):
        torch.manual_seed(0)
        models.append(build_model(config, pair))
    for kind in ("named_buffers", "named_parameters"):
        first, second = (dict(getattr(model, kind)()) for model in models)
        assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_text_of_users_is_of_their_training_events() -> None:
    items, first = PAIR.items.copy(), PAIR.offsets[:-1]
    items[first] = np.where(items[first] > 60, 120, 60)
    before, after = (text_vectors(pair, "hashed-words").users for pair in (PAIR, replace(PAIR, items=items)))
    assert not np.array_equal(before, after)


def test_facts_say_where_the_text_is_from() -> None:
    facts = build_model(RunConfig(pair="synthetic", model="llm4cdsr", text="hashed-words", dim=16), PAIR).facts()
    assert facts["text_source_a"] == facts["text_source_b"] == "planted titles 100%"
    assert facts["text_items_b"] == facts["text_events_a"] == 1.0
    assert facts["text_width"] == 256
    assert len(facts["text_sha256"]) == 64

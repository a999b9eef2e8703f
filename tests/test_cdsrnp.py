"""CDSRNP: what z is made of, that no state sees its future given z, and that the model learns."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gcalib.attention import tapping
from gcalib.config import RunConfig
from gcalib.data.batches import Batch, make_batch
from gcalib.data.pair import Pair
from gcalib.data.synthetic import synthetic_pair
from gcalib.evaluation import evaluate, score
from gcalib.models import build_model
from gcalib.models.cdsrnp import CDSRNP
from gcalib.models.cost import flops_per_step
from gcalib.models.neural_process import Gaussian, LatentEncoder, Support
from gcalib.training import Trainer

STACKS = [points for size in range(4) for points in combinations((0, 1, 2), size)]
SINGLE = [(), (0,), (1,), (2,)]
PAIR = synthetic_pair(num_users=60, num_items=(60, 70), seed=4)
WINDOW = 17
Z = torch.linspace(-1, 1, 16, dtype=torch.float64)


def without_clock(pair: Pair) -> Pair:
    """The same events, of each user all of A and then all of B."""
    owner = np.repeat(np.arange(pair.num_users), pair.lengths)
    order = np.lexsort((pair.domain_of(pair.items), owner))
    return replace(pair, items=pair.items[order], times=np.full(len(order), -1), has_clock=False)


NO_CLOCK = without_clock(PAIR)


def tiny(gca: tuple[int, ...] = (), pair: Pair = PAIR, **changes: object) -> CDSRNP:
    torch.manual_seed(3)
    fields = {"dim": 16, "heads": 2, "dropout": 0.0, "max_length": WINDOW + 3, "support": 9, **changes}
    model = build_model(RunConfig(pair="tiny", model="cdsrnp", gca=gca, **fields), pair).double()
    assert isinstance(model, CDSRNP)
    with torch.no_grad():  # biases start at zero: a leak through them would not show
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def batch_of(model: CDSRNP, sequences: list[np.ndarray], training: bool, clock: bool = True) -> Batch:
    return make_batch(
        sequences, PAIR.num_items[0], window=model.window, training=training, tails=model.reads_tails, clock=clock
    )


def row_states(model: CDSRNP, batch: Batch, z: torch.Tensor | None = Z) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return model.decode(batch, model.encode(batch), z if model.latent else None)


def random_history(rng: np.random.Generator, length: int) -> np.ndarray:
    return rng.permutation(np.arange(1, 131))[:length]


def replaced(
    rng: np.random.Generator, sequence: np.ndarray, places: np.ndarray, same_domain: bool = False
) -> np.ndarray:
    """The sequence with other items at some places."""
    changed = sequence.copy()
    free = rng.permutation(np.setdiff1d(np.arange(1, 131), sequence))
    for place in places:
        fit = (free > 60) == (sequence[place] > 60) if same_domain else np.ones(len(free), dtype=bool)
        changed[place] = free[fit][0]
        free = np.setdiff1d(free, changed[place])
    return changed


# ------------------------------------------------------------------------------------------------ no look ahead


@pytest.mark.parametrize("gca", STACKS)
@pytest.mark.parametrize("latent", [None, 0])
def test_no_future_in_training_given_z(gca: tuple[int, ...], latent: int | None) -> None:
    model, rng = tiny(gca, latent=latent).train(), np.random.default_rng(0)

    def states(sequences: list[np.ndarray]) -> dict[tuple[int, int, int], torch.Tensor]:
        batch = batch_of(model, sequences, training=True)
        with torch.no_grad():
            found = model(batch, Z if model.latent else None)
        return {
            (int(user), int(slot), domain): state
            for domain, (queries, rows) in enumerate(zip(batch.queries, found, strict=True))
            for user, slot, state in zip(queries.sequence, queries.slot, rows, strict=True)
        }

    compared = moved = 0
    for t in (2, 4, 7, 9):
        sequences = [random_history(rng, length) for length in (14, 12, 11)]
        before = states(sequences)
        after = states([replaced(rng, s, np.arange(t + 1, len(s))) for s in sequences])
        for key, state in before.items():
            if key[1] < t:  # the target at slot + 1 <= t is the same event in both
                assert torch.allclose(after[key], state, rtol=0, atol=1e-12), (gca, t, key)
                compared += 1
            elif key in after:
                moved += not torch.allclose(after[key], state, rtol=0, atol=1e-6)
    assert compared > 50 and moved > 10


@pytest.mark.parametrize("gca", STACKS)
def test_no_future_in_evaluation(gca: tuple[int, ...]) -> None:
    """No row's state depends on events after the row's slot."""
    model, rng = tiny(gca).eval(), np.random.default_rng(1)
    compared = 0
    for t in (3, 6, 9):
        sequence = random_history(rng, 14)
        batches = [
            batch_of(model, [history], training=False)
            for history in (sequence, replaced(rng, sequence, np.arange(t + 1, 14)))
        ]
        states = [row_states(model, batch, model.prior_mean()) for batch in batches]
        for domain in (0, 1):
            first, second = (
                rows[domain][batch.own[domain].slot < t] for rows, batch in zip(states, batches, strict=True)
            )
            assert torch.allclose(first, second, rtol=0, atol=1e-12), (gca, t)
            compared += len(first)
    assert compared > 10


@pytest.mark.parametrize("gca", STACKS)
def test_the_last_training_state_is_the_evaluation_state(gca: tuple[int, ...]) -> None:
    model, rng = tiny(gca), np.random.default_rng(5)
    sequence = random_history(rng, 14)
    model.eval()
    with torch.no_grad():
        z = model.prior_mean()
        evaluation = model(batch_of(model, [sequence[:-1]], training=False))
        batch = batch_of(model.train(), [sequence], training=True)
        training = model(batch, z)
    domain = int(sequence[-1] > 60)
    assert torch.allclose(training[domain][batch.queries[domain].last[0]], evaluation[domain][0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("gca", STACKS)
def test_a_user_does_not_depend_on_the_others_in_the_batch(gca: tuple[int, ...]) -> None:
    model, rng = tiny(gca).eval(), np.random.default_rng(4)
    histories = [random_history(rng, length) for length in (14, 3, 7, 1)] + [np.array([5, 6, 7]), np.array([80, 81])]
    with torch.no_grad():
        together = model(batch_of(model, histories, training=False))
        for user, history in enumerate(histories):
            alone = model(batch_of(model, [history], training=False))
            for domain in (0, 1):
                assert torch.allclose(alone[domain][0], together[domain][user], rtol=0, atol=1e-12)


# ---------------------------------------------------------------------------------------- without a common clock


@pytest.mark.parametrize("gca", SINGLE)
@pytest.mark.parametrize("training", [True, False])
def test_a_domain_s_own_future_stays_out_without_a_clock(gca: tuple[int, ...], training: bool) -> None:
    """Rows of A up to j do not depend on events of A after j, though those of B may be from any time."""
    model, rng = tiny(gca, NO_CLOCK).train(training), np.random.default_rng(6)
    a, b = rng.permutation(np.arange(1, 61))[:9], rng.permutation(np.arange(61, 131))[:8]
    sequence = np.concatenate([a, b])
    before = row_states(model, batch_of(model, [sequence], training, clock=False))
    for j in (0, 3, 6):
        for domain, places in enumerate((np.arange(j + 1, 9), np.arange(9 + j + 1, 17))):
            changed = replaced(rng, sequence, places, same_domain=True)
            after = row_states(model, batch_of(model, [changed], training, clock=False))
            assert torch.allclose(after[domain][: j + 1], before[domain][: j + 1], rtol=0, atol=1e-12)
            unseen = training and len(places) == 1  # the last event is a target only
            assert unseen == torch.allclose(after[domain][j + 1 :], before[domain][j + 1 :], rtol=0, atol=1e-6)
            other = torch.allclose(after[1 - domain], before[1 - domain], rtol=0, atol=1e-6)
            assert other == (gca == () or unseen)  # of the other domain a row sees all


@pytest.mark.parametrize("gca", SINGLE)
def test_training_is_the_evaluation_form_without_a_clock(gca: tuple[int, ...]) -> None:
    model, rng = tiny(gca, NO_CLOCK), np.random.default_rng(7)
    a, b = rng.permutation(np.arange(1, 61))[:9], rng.permutation(np.arange(61, 131))[:6]
    model.eval()
    with torch.no_grad():
        z = model.prior_mean()
        evaluation = model(batch_of(model, [np.concatenate([a[:-1], b[:-1]])], training=False, clock=False))
        batch = batch_of(model.train(), [np.concatenate([a, b])], training=True, clock=False)
        training = model(batch, z)
    for domain in (0, 1):
        last = training[domain][batch.queries[domain].last]
        assert torch.allclose(last, evaluation[domain], rtol=0, atol=1e-12)


def test_a_stack_without_a_clock_is_refused() -> None:
    for gca in STACKS[4:]:
        with pytest.raises(ValueError, match=r"cannot be stacked on synthetic, a per-domain pair: .* single insertion"):
            tiny(gca, NO_CLOCK)


# -------------------------------------------------------------------------------------------- support and latent


def test_the_support_holds_training_histories_of_users_of_both_domains() -> None:
    support = Support.draw(PAIR, 9, seed=0)
    training = PAIR.split("val")
    assert len(set(support.users)) == 9
    for user, history in zip(support.users, support.histories, strict=True):
        assert history.tolist() == PAIR.sequence(user)[:-2].tolist() == training.history(user).tolist()
        assert set(PAIR.domain_of(history[:-1])) == {0, 1}
    assert Support.draw(PAIR, 9, seed=0).sha256 == support.sha256 != Support.draw(PAIR, 9, seed=1).sha256
    assert len(Support.draw(PAIR, 1000, seed=0).users) <= PAIR.num_users


def one_domain(rows: list[list[int]], has_clock: bool = True) -> Pair:
    lengths = [len(row) for row in rows]
    return Pair(
        "open", ("a", "b"), np.concatenate(rows), np.arange(sum(lengths)), np.concatenate([[0], np.cumsum(lengths)]),
        (60, 70), has_clock, "published",
    )  # fmt: skip


def test_users_whose_training_history_lacks_a_domain_are_no_support() -> None:
    both, one, late = [1, 61, 2, 3, 4], [5, 6, 7, 8], [1, 2, 3, 62, 63]  # the last meets B in val and test only
    target_only = [1, 2, 70, 3, 4]  # its only event of B is the last of training: a target, not a row
    pair = one_domain([one, both, late, target_only])
    assert Support.draw(pair, 5, seed=0).users.tolist() == [1]
    assert pair.in_both.tolist() == [False, True, True, True]
    with pytest.raises(ValueError, match="open has no user with both domains in training.* or latent=0"):
        Support.draw(one_domain([one, late]), 5, seed=0)
    assert tiny(pair=one_domain([one, late]), latent=0).facts() == {}
    # without a clock: rows in both domains, and a target in one; of 61..64 two events are left, of 61..63 one
    no_clock = one_domain([[1, 2, 3, 61, 62, 63], [1, 2, 3, 61, 62, 63, 64], [1, 2, 3, 4]], has_clock=False)
    assert Support.draw(no_clock, 5, seed=0).users.tolist() == [1]


@pytest.mark.parametrize("pair", [PAIR, NO_CLOCK], ids=["clock", "no clock"])
def test_held_out_events_never_reach_the_support_nor_z(pair: Pair) -> None:
    """With other items as validation and test targets, evaluation has the same z to the last bit."""
    kept = set(np.concatenate([pair.split("val").history(user) for user in range(pair.num_users)]).tolist())
    items = pair.items.copy()
    for user in range(pair.num_users):
        history = set(pair.split("val").history(user).tolist())
        for event in range(pair.offsets[user], pair.offsets[user + 1]):
            if items[event] not in history:  # held out
                items[event] = 60 if items[event] <= 60 else 130
    assert len(kept) > 50 and (items != pair.items).sum() > 100
    other = replace(pair, items=items)
    first, second = tiny(pair=pair).eval(), tiny(pair=other).eval()
    assert first.facts() == second.facts() and first.facts()["support_users"] == 9
    assert torch.equal(first.prior_mean(), second.prior_mean())


def test_the_latent_does_not_depend_on_the_order_of_users() -> None:
    torch.manual_seed(0)
    encoder, triples = LatentEncoder(8, 5).double(), torch.randn(12, 24, dtype=torch.float64)
    whole, shuffled, parts = encoder(triples), encoder(triples[torch.randperm(12)]), encoder(triples[:4], triples[4:])
    for other in (shuffled, parts):
        assert torch.allclose(whole.mean, other.mean, rtol=0, atol=1e-12)
        assert torch.allclose(whole.log_variance, other.log_variance, rtol=0, atol=1e-12)
    # one user among four weighs a quarter: the mean is a mean
    alone = [encoder(triples[i : i + 1]).mean for i in range(4)]
    assert torch.allclose(encoder(triples[:4]).mean, torch.stack(alone).mean(0), rtol=0, atol=1e-12)


def test_the_support_s_order_does_not_move_z() -> None:
    model = tiny().eval()
    z = model.prior_mean()
    assert model.support is not None
    order = np.random.default_rng(0).permutation(9)
    model.support = Support(model.support.users[order], [model.support.histories[i] for i in order], True)
    assert torch.allclose(model.eval().prior_mean(), z, rtol=0, atol=1e-12)


def test_kl_by_hand() -> None:
    # means 1 and 0, variances 4 and 1: (log(1/4) + (4 + 1) / 1 - 1) / 2
    first = Gaussian(torch.tensor([1.0]).double(), torch.tensor([4.0]).double().log())
    unit = Gaussian(torch.zeros(1).double(), torch.zeros(1).double())
    assert first.kl(unit).item() == pytest.approx((4 - np.log(4)) / 2, abs=1e-12)
    assert unit.kl(unit).item() == 0


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6))
def test_kl_is_torch_s_and_never_negative(seed: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    m, v, n, w = torch.randn(4, size, generator=generator, dtype=torch.float64)
    ours = Gaussian(m, v).kl(Gaussian(n, w))
    normal = torch.distributions.Normal
    official = torch.distributions.kl_divergence(normal(m, (v / 2).exp()), normal(n, (w / 2).exp())).sum()
    assert ours >= 0 and abs(ours - official) < 1e-10 * max(1, float(official))


def test_samples_have_the_mean_and_variance() -> None:
    torch.manual_seed(0)
    gaussian = Gaussian(torch.full((200_000,), 3.0), torch.full((200_000,), np.log(4.0)))
    sample = gaussian.sample()
    assert sample.mean().item() == pytest.approx(3, abs=0.03) and sample.std().item() == pytest.approx(2, abs=0.03)


def test_z_moves_scores_and_is_kept_until_the_mode_changes() -> None:
    model = tiny().eval()
    batch = batch_of(model, [np.array([1, 70, 2])], training=False)
    with torch.no_grad():
        now = model(batch)[0]
        assert not torch.allclose(model(batch, model.prior_mean() + 1)[0], now, rtol=0, atol=1e-3)
        kept = model.prior_mean()
        model.latent.mean.bias.add_(1)
        assert model.prior_mean() is kept
        assert torch.allclose(model.eval().prior_mean(), kept + 1, rtol=0, atol=1e-12)
    assert model.train()._z is None


def test_z_is_not_kept_beyond_its_weights_or_their_type() -> None:
    torch.manual_seed(1)
    model, other = tiny().eval(), tiny().eval()
    with torch.no_grad():
        other.latent.mean.bias.add_(1)
        kept = model.prior_mean()
        model.load_state_dict(other.state_dict())
        assert torch.equal(model.prior_mean(), other.prior_mean()) and not torch.allclose(model.prior_mean(), kept)
        assert model.float().prior_mean().dtype == torch.float32


def test_training_samples_the_posterior_and_pays_for_it() -> None:
    model = tiny().train()
    batch = batch_of(model, [PAIR.split("val").history(user) for user in range(8)], training=True)
    negatives = model.negatives(batch, np.random.default_rng(0))
    assert set(model.loss(batch, negatives)) == {"a", "b", "kl"} and model.loss(batch, negatives)["kl"] > 0
    prior, posterior = model.distributions(batch, model.encode(batch))
    assert not torch.allclose(prior.mean, posterior.mean)
    torch.manual_seed(0)
    first, second = model(batch), model(batch)
    assert not torch.equal(first[0], second[0])
    loss = tiny(kl_weight=0.0).train().loss(batch, negatives)["kl"]
    assert loss == 0


def test_without_the_latent_the_decoder_is_plain() -> None:
    model = tiny(latent=0).train()
    batch = batch_of(model, [PAIR.split("val").history(user) for user in range(8)], training=True)
    assert model.support is None and model.facts() == {} and all(d.film is None for d in model.decoder)
    assert set(model.loss(batch, model.negatives(batch, np.random.default_rng(0)))) == {"a", "b"}
    assert torch.equal(model(batch)[0], model(batch)[0])


def test_the_baseline_starts_alike_with_and_without_cross_attention() -> None:
    starts = []
    for gca in ((), (0,), (0, 1, 2)):
        torch.manual_seed(7)
        starts.append(build_model(RunConfig(pair="tiny", model="cdsrnp", dim=16, gca=gca), PAIR).state_dict())
    for other in starts[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in starts[0].items())
        assert len(other) > len(starts[0])


# ------------------------------------------------------------------------------------------ training, evaluation


@pytest.mark.parametrize("pair", [PAIR, NO_CLOCK], ids=["clock", "no clock"])
def test_measurements_are_of_the_evaluated_users_only(pair: Pair) -> None:
    """The support passes through the same cross-attention, and leaves no tap."""
    model = tiny((0,), pair).eval()
    batch = batch_of(model, [pair.split("val").history(3)], training=False, clock=pair.has_clock)
    with torch.no_grad(), tapping(model) as taps:
        model(batch)
    assert [(tap.name, tap.batch, len(tap.x)) for tap in taps] == [
        ("a.gca0", 1, len(batch.own[0].items)), ("b.gca0", 1, len(batch.own[1].items))
    ]  # fmt: skip


@pytest.mark.parametrize(("pair", "objective"), [(PAIR, "published"), (NO_CLOCK, "infonce")], ids=["clock", "no clock"])
def test_the_model_can_learn_32_users_by_heart(pair: Pair, objective: str) -> None:
    # With a clock a user's first event of the other domain has no row behind it: that loss cannot go.
    few = synthetic_pair(num_users=32, num_items=(100, 100), seed=2)
    few = few if pair.has_clock else without_clock(few)
    config = RunConfig(
        pair="few", model="cdsrnp", dim=32, heads=2, gca=(0,), dropout=0.0, weight_decay=0.0, batch_size=32,
        objective=objective, negatives=200,
    )  # fmt: skip
    torch.manual_seed(0)
    trainer = Trainer(config, few, torch.device("cpu"))
    losses = [trainer.epoch(lr) for lr in [0.01] * 120 + [0.002] * 60]
    assert losses[-1]["loss_a"] + losses[-1]["loss_b"] < 0.06 * (losses[0]["loss_a"] + losses[0]["loss_b"])
    model, hits = trainer.model.eval(), []
    for learned in trainer.sequences:
        of_a, of_b = learned[learned <= 100], learned[learned > 100]
        history = learned[:-1] if few.has_clock else np.concatenate([of_a[:-1], of_b[:-1]])
        target = int(learned[-1])
        scores = score(model, few, [history])[0]
        hits.append(scores[target] >= scores[slice(1, 101) if target <= 100 else slice(101, None)].max())
    assert np.mean(hits) > 0.95


def test_users_of_one_domain_train_and_are_measured_apart() -> None:
    rng = np.random.default_rng(0)
    rows = [PAIR.sequence(user).tolist() for user in range(20)]
    rows += [rng.permutation(np.arange(1, 61))[:6].tolist() for _ in range(4)]
    rows += [rng.permutation(np.arange(61, 131))[:6].tolist() for _ in range(3)]
    pair = one_domain(rows)
    for name in ("cdsrnp", "abxi", "sasrec", "sasrec-mixed"):
        gca = () if name.startswith("sasrec") else (0, 1, 2)
        config = RunConfig(pair="open", model=name, dim=8, heads=2, gca=gca, batch_size=9, max_length=50)
        torch.manual_seed(0)
        trainer = Trainer(config, pair, torch.device("cpu"))
        assert np.isfinite(list(trainer.epoch(0.01).values())).all()
        found = evaluate(trainer.model, pair, "test", protocols=("full",))
        assert found["a.targets"] + found["b.targets"] == 27
        in_a = found["a.targets"] - 4
        whole = (in_a * found["a.full_both.mrr"] + 4 * found["a.full_single.mrr"]) / (in_a + 4)
        assert found["a.full.mrr"] == pytest.approx(whole, abs=1e-12)
    assert not any("full_both" in key for key in evaluate(tiny(), PAIR, "test", protocols=("full",)))


@pytest.mark.parametrize("name", ["cdsrnp", "abxi", "sasrec"])
def test_a_batch_of_users_of_one_domain_has_a_loss(name: str) -> None:
    """Nothing is asked of the other domain, whose loss is zero and whose gradients are finite."""
    torch.manual_seed(0)
    gca = () if name == "sasrec" else (0, 1, 2)
    model = build_model(RunConfig(pair="tiny", model=name, dim=8, heads=2, gca=gca, max_length=20), PAIR).train()
    batch = make_batch(
        [np.arange(1, 6), np.arange(9, 12)], 60, window=model.window, training=True, tails=model.reads_tails
    )
    losses = model.loss(batch, model.negatives(batch, np.random.default_rng(0)))
    torch.stack(list(losses.values())).sum().backward()
    assert losses["b"] == 0 < losses["a"]
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_its_operations_do_not_depend_on_what_was_drawn_before() -> None:
    pair = synthetic_pair(num_users=200, num_items=(60, 70), seed=4)  # more users than a step reads of the support
    model, counts = build_model(RunConfig(pair="synthetic", model="cdsrnp", dim=8), pair), set()
    for seed in range(5):
        torch.manual_seed(seed)
        counts.add(flops_per_step(model, pair, 16))
    assert len(counts) == 1

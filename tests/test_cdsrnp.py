"""CDSRNP: its support, what z is made of, what a row may see, and pairs of other shapes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gcalib.attention import record_activations
from gcalib.config import RunConfig
from gcalib.data.batches import Batch
from gcalib.data.pair import Pair
from gcalib.data.synthetic import synthetic_pair
from gcalib.evaluation import evaluate
from gcalib.models import cdsrnp
from gcalib.models.cdsrnp import CDSRNP, Gaussian, LatentEncoder, Support
from gcalib.models.matching import build_model, flops_per_step
from gcalib.training import Trainer

SINGLE = [(), (0,), (1,), (2,)]
PAIR = synthetic_pair(num_users=60, num_items=(60, 70), seed=4)


def per_domain(pair: Pair) -> Pair:
    """The same events, of each user all of A and then all of B."""
    order = np.lexsort((pair.domain_of(pair.items), pair.owner))
    return replace(pair, items=pair.items[order], times=np.full(len(order), -1), has_global_order=False)


PER_DOMAIN = per_domain(PAIR)
BOTH_ORDERS = pytest.mark.parametrize("pair", [PAIR, PER_DOMAIN], ids=["global", "per-domain"])


def pair_of(rows: list[list[int]], has_global_order: bool = True) -> Pair:
    """A pair of the given sequences; 60 items of A, then 70 of B."""
    lengths = [len(row) for row in rows]
    return Pair(
        "open", ("a", "b"), np.concatenate(rows), np.arange(sum(lengths)), np.concatenate([[0], np.cumsum(lengths)]),
        (60, 70), has_global_order,
    )  # fmt: skip


@pytest.fixture
def nine_support_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cdsrnp, "SUPPORT", 9)


def tiny(pair: Pair = PAIR, **changes: object) -> CDSRNP:
    torch.manual_seed(3)
    fields = {"dim": 16, "heads": 2, "dropout": 0.0, "max_length": 20, **changes}
    model = build_model(RunConfig(pair="tiny", model="cdsrnp", **fields), pair).double()
    assert isinstance(model, CDSRNP)
    with torch.no_grad():  # biases start at zero: a leak through them would not show
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def training_batch(model: CDSRNP, users: int = 8) -> Batch:
    return model.collate([PAIR.split("val").history(user) for user in range(users)], PAIR, training=True)


# ------------------------------------------------------------------------------------------------------ the support


@BOTH_ORDERS
def test_support_holds_training_histories_of_users_of_both_domains(pair: Pair, nine_support_users: None) -> None:
    support = Support.draw(pair, seed=0)
    assert len(set(support.users)) == 9
    for user, history in zip(support.users, support.histories, strict=True):
        assert history.tolist() == pair.split("val").history(user).tolist()
        assert set(pair.domain_of(history)) == {0, 1}


def test_support_is_drawn_by_the_seed(nine_support_users: None) -> None:
    first, again, other = (Support.draw(PAIR, seed).users.tolist() for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_support_is_all_users_where_there_are_few() -> None:
    assert Support.draw(PAIR, seed=0).users.tolist() == list(range(PAIR.num_users))


def test_support_leaves_out_users_whose_training_lacks_a_domain() -> None:
    both, one, late = [1, 61, 2, 3, 4], [5, 6, 7, 8], [1, 2, 3, 62, 63]  # the last meets B in val and test only
    target_only = [1, 2, 70, 3, 4]  # its only event of B is the last of training: a target, not a row
    pair = pair_of([one, both, late, target_only])
    assert pair.in_both.tolist() == [False, True, True, True]
    assert Support.draw(pair, seed=0).users.tolist() == [1]


def test_support_needs_a_target_per_domain() -> None:
    """Of 61..64 two events are left for training, a row and a target; of 61..63 one."""
    pair = pair_of([[1, 2, 3, 61, 62, 63], [1, 2, 3, 61, 62, 63, 64], [1, 2, 3, 4]], has_global_order=False)
    assert Support.draw(pair, seed=0).users.tolist() == [1]


def test_support_missing_is_refused_unless_the_latent_is_left_out() -> None:
    pair = pair_of([[5, 6, 7, 8], [1, 2, 3, 62, 63]])
    with pytest.raises(ValueError, match=r"open has no user with both domains in training.* or latent=0"):
        Support.draw(pair, seed=0)
    assert tiny(pair, latent=0).facts() == {}


@BOTH_ORDERS
def test_support_and_z_do_not_depend_on_held_out_events(pair: Pair, nine_support_users: None) -> None:
    items = pair.items.copy()
    for user in range(pair.num_users):
        events = np.arange(pair.offsets[user], pair.offsets[user + 1])
        held_out = events[~np.isin(pair.items[events], pair.split("val").history(user))]
        items[held_out] = np.where(items[held_out] <= 60, 60, 130)
    assert (items != pair.items).sum() > 100
    first, second = (tiny(each).eval() for each in (pair, replace(pair, items=items)))
    assert first.facts() == second.facts()
    assert first.facts()["support_users"] == 9
    assert torch.equal(first.prior_mean(), second.prior_mean())


# ------------------------------------------------------------------------------------------------------- the latent


def test_latent_does_not_depend_on_the_order_of_triples() -> None:
    torch.manual_seed(0)
    encoder, triples = LatentEncoder(8, 5).double(), torch.randn(12, 24, dtype=torch.float64)
    whole = encoder(triples)
    for other in (encoder(triples[torch.randperm(12)]), encoder(triples[:4], triples[4:])):
        assert torch.allclose(whole.mean, other.mean, rtol=0, atol=1e-12)
        assert torch.allclose(whole.log_variance, other.log_variance, rtol=0, atol=1e-12)


def test_latent_is_of_the_mean_of_the_triples() -> None:
    torch.manual_seed(0)
    encoder, triples = LatentEncoder(8, 5).double(), torch.randn(4, 24, dtype=torch.float64)
    alone = torch.stack([encoder(triples[i : i + 1]).mean for i in range(4)])
    assert torch.allclose(encoder(triples).mean, alone.mean(0), rtol=0, atol=1e-12)


def test_z_does_not_depend_on_the_order_of_the_support(nine_support_users: None) -> None:
    model = tiny().eval()
    z, support = model.prior_mean(), model.support
    assert support is not None
    order = np.random.default_rng(0).permutation(9)
    model.support = Support(support.users[order], [support.histories[i] for i in order], True)
    assert torch.allclose(model.eval().prior_mean(), z, rtol=0, atol=1e-12)


def test_kl_by_hand() -> None:
    # means 1 and 0, variances 4 and 1: (log(1/4) + (4 + 1) / 1 - 1) / 2
    first = Gaussian(torch.tensor([1.0]).double(), torch.tensor([4.0]).double().log())
    unit = Gaussian(torch.zeros(1).double(), torch.zeros(1).double())
    assert first.kl(unit).item() == pytest.approx((4 - np.log(4)) / 2, abs=1e-12)
    assert unit.kl(unit).item() == 0


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6))
def test_kl_is_that_of_torch(seed: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    m, v, n, w = torch.randn(4, size, generator=generator, dtype=torch.float64)
    ours = Gaussian(m, v).kl(Gaussian(n, w)).item()
    normal = torch.distributions.Normal
    theirs = torch.distributions.kl_divergence(normal(m, (v / 2).exp()), normal(n, (w / 2).exp())).sum().item()
    assert ours == pytest.approx(theirs, rel=1e-10, abs=1e-10)
    assert ours >= 0


def test_samples_have_the_mean_and_the_variance() -> None:
    torch.manual_seed(0)
    sample = Gaussian(torch.full((200_000,), 3.0), torch.full((200_000,), np.log(4.0))).sample()
    assert sample.mean().item() == pytest.approx(3, abs=0.03)
    assert sample.std().item() == pytest.approx(2, abs=0.03)


def test_z_moves_the_states() -> None:
    model = tiny().eval()
    batch = model.collate([np.array([1, 70, 2])], PAIR, training=False)
    with torch.no_grad():
        found, other = model(batch)[0], model(batch, model.prior_mean() + 1)[0]
    assert (found - other).abs().max() > 1e-3


def test_z_is_kept_in_evaluation_and_forgotten_in_training() -> None:
    model = tiny().eval()
    kept = model.prior_mean()
    with torch.no_grad():
        model.latent.mean.bias.add_(1)
    assert model.prior_mean() is kept
    model.train()
    assert torch.allclose(model.eval().prior_mean(), kept + 1, rtol=0, atol=1e-12)


def test_z_is_forgotten_with_other_weights() -> None:
    model, other = tiny().eval(), tiny().eval()
    with torch.no_grad():
        other.latent.mean.bias.add_(1)
    before = model.prior_mean()
    model.load_state_dict(other.state_dict())
    assert torch.equal(model.prior_mean(), other.prior_mean())
    assert not torch.allclose(model.prior_mean(), before)


def test_z_is_forgotten_with_another_type() -> None:
    model = tiny().eval()
    assert model.prior_mean().dtype == torch.float64
    assert model.float().prior_mean().dtype == torch.float32


def test_loss_has_the_kl_of_prior_and_posterior() -> None:
    model = tiny().train()
    batch = training_batch(model)
    losses = model.loss(batch, model.negatives(batch, np.random.default_rng(0)))
    assert losses.keys() == {"a", "b", "kl"}
    assert losses["kl"] > 0


def test_z_is_drawn_from_the_posterior_in_training() -> None:
    model = tiny().train()
    batch = training_batch(model)
    h = model.encode(batch)
    prior, posterior = model.distributions(batch, h)
    assert not torch.allclose(prior.mean, posterior.mean)
    torch.manual_seed(5)
    drawn = model(batch)
    torch.manual_seed(5)
    by_hand = model.decode(batch, h, model.distributions(batch, h)[1].sample())
    assert torch.equal(drawn[0], by_hand[0])
    assert not torch.equal(model(batch)[0], drawn[0])


def test_prior_is_given_the_support_and_posterior_the_users_too(nine_support_users: None) -> None:
    model = tiny().train()
    batch = training_batch(model)
    with torch.no_grad():
        h = model.encode(batch)
        support, users = model.support_triples(list(range(9))), model.triples(batch, h)
        assert (len(support), len(users)) == (9, 8)
        for found, triples in zip(model.distributions(batch, h), (support, torch.cat([support, users])), strict=True):
            assert torch.allclose(found.mean, model.latent(triples).mean, rtol=0, atol=1e-12)


def test_gradients_end_at_the_triples() -> None:
    model = tiny().train()
    batch = training_batch(model)
    prior, posterior = model.distributions(batch, model.encode(batch))
    posterior.kl(prior).backward()
    reached = {name.partition(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == {"latent"}


def test_latent_left_out_makes_the_decoder_plain() -> None:
    model = tiny(latent=0).train()
    batch = training_batch(model)
    assert model.support is None
    assert all(decoder.film is None for decoder in model.decoder)
    assert model.loss(batch, model.negatives(batch, np.random.default_rng(0))).keys() == {"a", "b"}
    assert torch.equal(model(batch)[0], model(batch)[0])


def test_flops_do_not_depend_on_what_was_drawn_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step reads a random part of the support, whose users have histories of different lengths."""
    monkeypatch.setattr(cdsrnp, "STEP_SUPPORT", 4)
    model, counted = build_model(RunConfig(pair="synthetic", model="cdsrnp", dim=8), PAIR), set()
    for seed in range(3):
        torch.manual_seed(seed)
        counted.add(flops_per_step(model, PAIR, 16))
    assert len(counted) == 1


# ---------------------------------------------------------------------------------- recording, pairs of other shapes


@BOTH_ORDERS
def test_recording_is_of_the_evaluated_users_only(pair: Pair) -> None:
    """The support passes through the same cross-attention."""
    model = tiny(pair, gca=(0,)).eval()
    batch = model.collate([pair.split("val").history(3)], pair, training=False)
    with torch.no_grad(), record_activations(model) as recorded:
        model(batch)
    assert [one.name for one in recorded] == ["a.gca0", "b.gca0"]
    assert [one.x.shape for one in recorded] == [(*stream.items.shape, 16) for stream in batch.domains]


@pytest.mark.parametrize("gca", SINGLE)
@pytest.mark.parametrize("training", [True, False])
def test_per_domain_rows_see_their_own_past_and_all_of_the_other_domain(gca: tuple[int, ...], training: bool) -> None:
    model, rng = tiny(PER_DOMAIN, gca=gca).train(training), np.random.default_rng(6)
    own = rng.permutation(np.arange(1, 61))[:9], rng.permutation(np.arange(61, 131))[:9]
    z = torch.linspace(-1, 1, 16, dtype=torch.float64)

    def rows(*parts: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        batch = model.collate([np.concatenate(parts)], PER_DOMAIN, training=training)
        with torch.no_grad():
            a, b = model.decode(batch, model.encode(batch), z)
        return a[0, 1:], b[0, 1:]  # column 0 holds no event

    before = rows(*own)
    for domain in (0, 1):
        for place in (1, 4, 7):
            changed = [part.copy() for part in own]
            free = np.setdiff1d(np.arange(1, 61) + 60 * domain, own[domain])
            changed[domain][place] = free[0]
            after = rows(*changed)
            moved = (after[domain] - before[domain]).abs().amax(dim=1) > 1e-6
            assert not moved[:place].any()
            assert moved[place:].all()
            assert ((after[1 - domain] - before[1 - domain]).abs().max() > 1e-6) == (gca != ())


def test_per_domain_pair_refuses_a_stack() -> None:
    with pytest.raises(ValueError, match=r"cannot be stacked on synthetic, a per-domain pair: .* single insertion"):
        tiny(PER_DOMAIN, gca=(0, 1))


@BOTH_ORDERS
def test_triples_are_of_each_user_s_last_training_event(pair: Pair) -> None:
    """With per-domain order, of the last of each domain."""
    model = tiny(pair)
    histories = [pair.split("val").history(user) for user in range(4)]
    batch = model.collate(histories, pair, training=True)
    with torch.no_grad():
        triples = model.triples(batch, model.encode(batch))
        if pair.has_global_order:
            targets = sorted([history[-1] for history in histories], key=lambda item: item > 60)
        else:
            targets = [history[(history > 60) == in_b][-1] for in_b in (False, True) for history in histories]
        assert torch.equal(triples[:, 32:], model.item(torch.from_numpy(np.array(targets))))


@pytest.mark.parametrize("name", ["cdsrnp", "abxi", "sasrec", "sasrec-mixed"])
def test_users_of_one_domain_are_trained_on_and_measured_apart(name: str) -> None:
    rng = np.random.default_rng(0)
    rows = [PAIR.sequence(user).tolist() for user in range(20)]
    rows += [rng.permutation(np.arange(1, 61))[:6].tolist() for _ in range(4)]
    rows += [rng.permutation(np.arange(61, 131))[:6].tolist() for _ in range(3)]
    pair, gca = pair_of(rows), () if name.startswith("sasrec") else (0, 1, 2)
    torch.manual_seed(0)
    config = RunConfig(pair="open", model=name, dim=8, heads=2, gca=gca, batch_size=9)
    trainer = Trainer(config, pair, torch.device("cpu"))
    assert np.isfinite(list(trainer.epoch(0.01).values())).all()
    found = evaluate(trainer.model, pair, "test", protocols=("full",))
    assert found["a.targets"] + found["b.targets"] == 27
    of_both = found["a.targets"] - 4
    together = (of_both * found["a.full_both.mrr"] + 4 * found["a.full_single.mrr"]) / (of_both + 4)
    assert found["a.full.mrr"] == pytest.approx(together, abs=1e-12)


@pytest.mark.parametrize("name", ["cdsrnp", "abxi", "llm4cdsr", "sasrec"])
def test_users_of_one_domain_alone_in_a_batch_have_a_loss(name: str) -> None:
    """Nothing is asked of the other domain, whose loss is zero and whose gradients are finite."""
    torch.manual_seed(0)
    changes = {} if name == "sasrec" else {"gca": (0, 1, 2)}
    changes |= {"text": "hashed-words"} if name == "llm4cdsr" else {}
    model = build_model(RunConfig(pair="tiny", model=name, dim=8, heads=2, max_length=20, **changes), PAIR).train()
    batch = model.collate([np.arange(1, 6), np.arange(9, 12)], PAIR, training=True, users=np.arange(2))
    losses = model.loss(batch, model.negatives(batch, np.random.default_rng(0)))
    torch.stack(list(losses.values())).sum().backward()
    assert losses["b"] == 0
    assert losses["a"] > 0
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())

"""Training: exact resume, divergence, overfitting, scores, and evaluation against an obvious reference."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from gcalib import training
from gcalib.config import RunConfig
from gcalib.data import load_pair
from gcalib.data.pair import Pair
from gcalib.data.synthetic import synthetic_pair
from gcalib.evaluation import evaluate, score
from gcalib.experiments import run
from gcalib.models import build_model
from gcalib.models.base import draw_negatives
from gcalib.records import CIRCUMSTANCES
from gcalib.store import RunStore, load_curves, load_results
from gcalib.training import DivergedError, Trainer, fit, learning_rate

TINY = "synthetic:num_users=150,items_a=120,items_b=130"


def tiny_config(**changes: object) -> RunConfig:
    return RunConfig(**{"pair": TINY, "dim": 8, "heads": 2, "gca": (0,), "epochs": 4, "batch_size": 32, **changes})


@pytest.fixture(scope="module")
def pair() -> Pair:
    return load_pair(TINY)


def comparable(record: dict[str, object]) -> dict[str, object]:
    return {key: value for key, value in record.items() if key not in CIRCUMSTANCES}


def test_learning_rate_warms_up_and_is_cut() -> None:
    config = RunConfig(pair=TINY, lr=0.4, warmup_epochs=3, plateau_factor=0.5)
    rates = [learning_rate(config, epoch, cuts=0) for epoch in (1, 2, 3, 4, 50)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])
    assert learning_rate(config, 50, cuts=2) == pytest.approx(0.1)


def test_negatives_are_distinct_and_from_both_domains() -> None:
    drawn = draw_negatives(np.random.default_rng(0), (20, 500), 100).numpy()
    assert len(np.unique(drawn)) == len(drawn) == 20 + 50
    assert (drawn <= 20).sum() == 20 and drawn.min() == 1 and drawn[drawn > 20].min() > 20 and drawn.max() <= 520
    later = np.concatenate([draw_negatives(np.random.default_rng(s), (20, 500), 100).numpy() for s in range(200)])
    assert set(later.tolist()) == set(range(1, 521))  # every item can be drawn


def test_two_runs_of_one_seed_are_the_same_bits(tmp_path: Path) -> None:
    first, second = (run(tiny_config(), tmp_path / name) for name in ("one", "two"))
    assert comparable(first) == comparable(second)
    assert comparable(run(tiny_config(seed=1), tmp_path / "one")) != comparable(first)


@pytest.mark.parametrize("changes", [{}, {"gca": (0, 1)}, {"weight_average": 0.9}, {"batches": "shuffled"}])
def test_an_interrupted_fit_ends_as_an_undisturbed_one(
    pair: Pair, tmp_path: Path, changes: dict[str, object]
) -> None:
    class Stop(Exception):
        pass

    def stop(epoch: int) -> None:
        if epoch == 2:
            raise Stop

    config = tiny_config(**changes, warmup_epochs=1, plateau_patience=0, stop_patience=3, epochs=6)
    undisturbed = fit(config, pair, device="cpu")
    checkpoint = tmp_path / "run.pt"
    with pytest.raises(Stop):
        fit(config, pair, device="cpu", checkpoint=checkpoint, on_epoch=stop)
    torch.rand(5)  # what else the process draws must not matter
    resumed = fit(config, pair, device="cpu", checkpoint=checkpoint)
    assert resumed.curves == undisturbed.curves
    weights = undisturbed.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in resumed.model.state_dict().items())


def test_shuffled_batches_mix_lengths_and_meet_every_user_once(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a batch costs in pads is the price of mixing lengths, so here is that they are mixed, and how much."""
    spread = {}
    for batches in ("by_length", "shuffled"):
        trainer = Trainer(tiny_config(batches=batches, batch_size=20), pair, torch.device("cpu"))
        met: list[np.ndarray] = []
        monkeypatch.setattr(trainer, "step", lambda users, met=met: met.append(users) or {"a": torch.zeros(())})
        trainer.epoch(0.1)
        assert sorted(np.concatenate(met).tolist()) == list(range(pair.num_users))
        spread[batches] = np.mean([np.ptp(trainer.lengths[users]) for users in met])
    assert spread["shuffled"] > 2 * spread["by_length"]


def test_the_average_of_the_weights_is_what_is_ranked(pair: Pair) -> None:
    """It follows the weights as a moving average does, from the end of the first step on, and leaves training alone."""
    config = tiny_config(epochs=2, warmup_epochs=0)
    plain, followed = (Trainer(config.but(weight_average=decay), pair, torch.device("cpu")) for decay in (0.0, 0.8))
    followed.model.load_state_dict(plain.model.state_dict())
    wanted: dict[str, torch.Tensor] = {}
    for _ in range(3):
        for trainer in (plain, followed):
            torch.manual_seed(7)
            trainer.model.train()
            trainer.step(np.arange(20))
        for name, value in plain.model.state_dict().items():
            wanted[name] = 0.8 * wanted[name] + 0.2 * value if name in wanted else value.clone()
    for name, value in followed.model.state_dict().items():
        assert torch.equal(value, plain.model.state_dict()[name])  # training goes on as without
        assert torch.allclose(followed.evaluated.state_dict()[name], wanted[name], rtol=0, atol=1e-6)
    assert plain.evaluated is plain.model and followed.evaluated is not followed.model
    done = fit(config.but(weight_average=0.8), pair, device="cpu")
    assert evaluate(done.model, pair, "val")["a.full.mrr"] == done.curves[done.best_epoch]["val.a.full.mrr"]
    without = fit(config, pair, device="cpu").curves
    assert done.curves[0] == without[0] and done.curves[1]["loss_a"] == without[1]["loss_a"]
    assert done.curves[1]["val.a.full.mrr"] != without[1]["val.a.full.mrr"]


def test_a_killed_run_ends_in_the_same_record(tmp_path: Path) -> None:
    """SIGKILL in mid-epoch, start again: bit for bit the record of a run left alone."""
    config = tiny_config(epochs=25, stop_patience=25, dim=16)
    alone = run(config, tmp_path / "alone")
    store = RunStore(tmp_path / "killed")
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from gcalib import RunConfig, run\n"
        f"run(RunConfig.model_validate_json({config.model_dump_json()!r}), {str(store.folder)!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    checkpoint = store.checkpoint_path(alone["run_id"])
    deadline = time.monotonic() + 60
    while not checkpoint.exists():
        assert process.poll() is None and time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.005)
    time.sleep(0.1)  # some way into a later epoch
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert store.names() == []
    resumed = run(config, store.folder)
    assert comparable(resumed) == comparable(alone)
    assert load_curves(store.folder).equals(load_curves(tmp_path / "alone"))
    assert [path.name for path in store.folder.rglob("*") if path.is_file()] == [f"{alone['run_id']}.parquet"] * 2


def flipped(content: bytes) -> bytes:
    """One bit of the largest tensor is another."""
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize("damage", [lambda content: content[:1000], flipped], ids=["cut", "one bit"])
def test_a_checkpoint_of_another_run_is_refused_and_a_broken_one_set_aside(
    pair: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[bytes], bytes]
) -> None:
    checkpoint = tmp_path / "run.pt"
    fit(tiny_config(epochs=1), pair, device="cpu", checkpoint=checkpoint)
    with pytest.raises(ValueError, match="belongs to another run"):
        fit(tiny_config(epochs=1, seed=5), pair, device="cpu", checkpoint=checkpoint)
    broken = damage(checkpoint.read_bytes())
    checkpoint.write_bytes(broken)
    fresh = fit(tiny_config(epochs=1), pair, device="cpu")
    with caplog.at_level("WARNING"):
        again = fit(tiny_config(epochs=1), pair, device="cpu", checkpoint=checkpoint)
    assert again.curves == fresh.curves and "could not be read and is now" in caplog.text
    assert (tmp_path / "run.damaged").read_bytes() == broken and checkpoint.exists()


def test_a_checkpoint_that_cannot_be_written_costs_no_run(
    pair: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with caplog.at_level("WARNING"):
        done = fit(tiny_config(epochs=2), pair, device="cpu", checkpoint=tmp_path / "run.pt")
    assert len(done.curves) == 3 and "No space left on device" in caplog.text and not list(tmp_path.iterdir())


def test_a_checkpoint_older_than_a_field_still_counts(pair: Pair, tmp_path: Path) -> None:
    checkpoint = tmp_path / "run.pt"
    fit(tiny_config(epochs=1), pair, device="cpu", checkpoint=checkpoint)
    content = torch.load(checkpoint, weights_only=True)
    del content["config"]["negative_groups"]
    torch.save(content, checkpoint)
    assert len(fit(tiny_config(epochs=1), pair, device="cpu", checkpoint=checkpoint).curves) == 2


def test_a_diverged_run_is_reported_and_not_recorded(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="no longer finite"):
        run(tiny_config(lr=1e20, warmup_epochs=0), tmp_path)
    assert load_results(tmp_path).empty


def test_a_pair_whose_validation_targets_are_all_of_one_domain_is_named(pair: Pair) -> None:
    """The second domain comes later for every user, by two events or more."""
    order = np.lexsort((pair.items > pair.num_items[0], np.repeat(np.arange(pair.num_users), pair.lengths)))
    late = replace(pair, items=pair.items[order])
    assert (late.split("val").targets > pair.num_items[0]).all()
    with pytest.raises(ValueError, match=f"{pair.name}, domain {pair.domains[0]}: no user's validation target lies in"):
        fit(tiny_config(), late, device="cpu")


def test_early_stopping_keeps_the_best_epoch(pair: Pair) -> None:
    done = fit(tiny_config(epochs=200, stop_patience=4, warmup_epochs=0, lr=0.02), pair, device="cpu")
    quality = [row["val.a.full.mrr"] + row["val.b.full.mrr"] for row in done.curves]
    assert done.stopped_early and len(done.curves) - 1 < 200
    assert done.best_epoch == int(np.argmax(quality[1:])) + 1 == len(done.curves) - 1 - 4
    again = evaluate(done.model, pair, "val", alignment=False)
    assert again["a.full.mrr"] + again["b.full.mrr"] == quality[done.best_epoch]


def test_the_model_can_learn_32_users_by_heart() -> None:
    """A sound model drives the training loss of a few users near zero and ranks their training targets first."""
    pair = synthetic_pair(num_users=32, num_items=(100, 100), seed=2)
    config = tiny_config(dim=32, dropout=0.0, lr=0.01, weight_decay=0.0, warmup_epochs=0, seed=1)
    torch.manual_seed(0)
    trainer = Trainer(config, pair, torch.device("cpu"))
    losses = [trainer.epoch(config.lr) for _ in range(60)]
    assert losses[-1]["loss_a"] + losses[-1]["loss_b"] < 0.02 * (losses[0]["loss_a"] + losses[0]["loss_b"])
    hits = []
    model = trainer.model.eval()
    for user in range(pair.num_users):
        learned = trainer.sequences[user]
        target = int(learned[-1])
        scores = score(model, pair, [learned[:-1]])[0]
        domain = slice(1, 1 + pair.num_items[0]) if target <= pair.num_items[0] else slice(1 + pair.num_items[0], None)
        hits.append(scores[target] >= scores[domain].max())
    assert np.mean(hits) > 0.95


def test_evaluation_agrees_with_ranking_score_one_user_at_a_time(pair: Pair) -> None:
    torch.manual_seed(1)
    model = build_model(tiny_config(), pair)
    with torch.no_grad():
        model.item.weight.mul_(20)
    found = evaluate(model, pair, "test", protocols=("full", "s100") if min(pair.num_items) > 150 else ("full",))
    split = pair.split("test")
    reciprocal: dict[int, list[float]] = {0: [], 1: []}
    for user in range(pair.num_users):
        scores = score(model, pair, [split.history(user)])[0]
        target = int(split.targets[user])
        domain = int(target > pair.num_items[0])
        ids = np.arange(1, 1 + pair.num_items[0]) if domain == 0 else np.arange(1 + pair.num_items[0], len(scores))
        others = np.setdiff1d(ids, pair.sequence(user))
        reciprocal[domain].append(1 / (1 + (scores[others] > scores[target]).sum()))
    assert found["a.full.mrr"] == pytest.approx(np.mean(reciprocal[0]), rel=1e-6)
    assert found["b.full.mrr"] == pytest.approx(np.mean(reciprocal[1]), rel=1e-6)
    assert found["a.targets"] + found["b.targets"] == pair.num_users


def test_one_draw_of_the_candidates_lies_beside_the_mean_over_draws() -> None:
    """The kept draw's figure is one of those that the expected one averages; the AUC among all is that average."""
    pair = synthetic_pair(num_users=400, num_items=(300, 300), seed=3)
    torch.manual_seed(1)
    found = evaluate(build_model(tiny_config(), pair), pair, "test", protocols=("s100",), alignment=False)
    for domain in "ab":
        mean, targets = found[f"{domain}.s100_expected.hr@20"], found[f"{domain}.targets"]
        assert found[f"{domain}.s100_expected.auc"] == pytest.approx(found[f"{domain}.full.auc"], rel=1e-12)
        widest = (mean * (1 - mean) / targets) ** 0.5  # the targets differ, which makes the draws' spread smaller
        assert 0 < abs(found[f"{domain}.s100.hr@20"] - mean) < 4 * widest
        assert found[f"{domain}.full.hr@20"] < mean < 1


def test_memory_is_handed_back_at_once_where_there_is_much(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    returned: list[int] = []
    trainer = Trainer(tiny_config(batch_size=5), pair, torch.device("cpu"))
    monkeypatch.setattr(training, "_TRIM", returned.append)
    times = []
    for held in (training.TRIM_ABOVE, training.TRIM_AT_ONCE, training.TRIM_AT_ONCE + 1):
        monkeypatch.setattr(training, "_resident", lambda held=held: held)
        returned.clear()
        steps = sum(1 for _ in trainer.steps(1e-3))
        times.append(len(returned))
    assert steps >= 30 and times == [0, steps // 8 + 1, steps + 1]  # once more at the end


def test_score_has_one_column_an_item_and_refuses_bad_histories(pair: Pair) -> None:
    model = build_model(tiny_config(), pair).train()
    scores = score(model, pair, [[1, 2, 3], np.array([140]), list(range(1, 100))])
    assert scores.shape == (3, 1 + sum(pair.num_items)) and scores.dtype == np.float32
    assert np.isneginf(scores[:, 0]).all() and np.isfinite(scores[:, 1:]).all()
    assert model.training  # as it was
    assert score(model, pair, []).shape == (0, 1 + sum(pair.num_items))
    with pytest.raises(ValueError, match="History 1 must be a list of at least one"):
        score(model, pair, [[1], []])
    with pytest.raises(ValueError, match=r"History 0 holds an item id outside 1\.\.250"):
        score(model, pair, [[0, 3]])


def test_bf16_learns_like_fp32(pair: Pair) -> None:
    """Half the mantissa moves single figures a little and the training loss hardly at all."""
    losses = {}
    for precision in ("fp32", "bf16"):
        done = fit(tiny_config(precision=precision, epochs=5, warmup_epochs=0, dim=16), pair, device="cpu")
        losses[precision] = np.array([row["loss_a"] + row["loss_b"] for row in done.curves[1:]])
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.01)
    assert (losses["bf16"] != losses["fp32"]).all()  # it did run in another precision
    assert losses["fp32"][-1] < losses["fp32"][0]

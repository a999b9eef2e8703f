"""Training: schedules, exact resume, checkpoints, divergence, the epoch that is kept, precision, overfitting."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gcalib import training
from gcalib.config import RunConfig
from gcalib.data.pair import Pair
from gcalib.data.synthetic import synthetic_pair
from gcalib.evaluation import evaluate
from gcalib.training import DivergedError, Trainer, fastest_precision, fit, learning_rate, pick_device

PAIR = synthetic_pair(num_users=60, num_items=(60, 70))
CPU = torch.device("cpu")


def tiny_config(**changes: object) -> RunConfig:
    fields = {"pair": "synthetic", "dim": 8, "heads": 2, "gca": (0,), "epochs": 3, "batch_size": 20, "negatives": 64}
    return RunConfig(**{**fields, "warmup_epochs": 0, **changes})


def equal_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


# ------------------------------------------------------------------------------------------------ schedules, batches


def test_learning_rate_cosine_by_hand() -> None:
    config = tiny_config(lr=0.4, warmup_epochs=3, epochs=12)
    rates = [learning_rate(config, epoch) for epoch in (1, 2, 3, 4, 8, 12)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4 * 0.51, 0.4 * 0.02])


def test_learning_rate_plateau_by_hand() -> None:
    config = tiny_config(lr=0.4, warmup_epochs=3, schedule="plateau")
    assert [learning_rate(config, epoch) for epoch in (1, 2, 3, 4, 50)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])
    assert learning_rate(config, 50, cuts=2) == pytest.approx(0.4 * 0.3162**2)


@pytest.mark.parametrize("published", [(), ("shuffled_batches",)], ids=["like lengths", "shuffled"])
def test_batches_meet_every_user_once_an_epoch(published: tuple[str, ...]) -> None:
    trainer = Trainer(tiny_config(published=published, batch_size=12), PAIR, CPU)
    first, second = ([users.tolist() for users in trainer.batches()] for _ in range(2))
    assert sorted(sum(first, [])) == sorted(sum(second, [])) == list(range(PAIR.num_users))
    assert first != second


def test_batches_shuffled_mix_lengths() -> None:
    spread = []
    for published in ((), ("shuffled_batches",)):
        trainer = Trainer(tiny_config(published=published, batch_size=12), PAIR, CPU)
        spread.append(np.mean([np.ptp(PAIR.lengths[users]) for users in trainer.batches()]))
    assert spread[1] > 2 * spread[0]


def test_fit_calls_back_with_the_rows_of_the_curves() -> None:
    rows: list[dict[str, float]] = []
    done = fit(tiny_config(), PAIR, device="cpu", on_epoch=rows.append)
    assert rows == done.curves[1:]
    assert [row["epoch"] for row in done.curves] == [0, 1, 2, 3]
    assert done.curves[1].keys() - done.curves[0].keys() == {"loss_a", "loss_b", "lr"}


def test_fit_repeats_with_its_seed_and_leaves_torch_s_generator_alone() -> None:
    state = torch.get_rng_state()
    first = fit(tiny_config(), PAIR, device="cpu")
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    again, other = (fit(tiny_config(seed=seed), PAIR, device="cpu") for seed in (0, 1))
    assert first.curves == again.curves
    assert equal_weights(first.model, again.model)
    assert first.curves != other.curves


def test_fit_learns() -> None:
    """The built-in pair's structure is found: the targets rank far better than before training."""
    pair = synthetic_pair(num_users=300, num_items=(60, 60), novelty=0.5, seed=1)
    done = fit(tiny_config(model="sasrec-mixed", gca=(), dim=16, epochs=5, lr=0.01, dropout=0.1), pair, device="cpu")
    untrained, *trained = [row["val.a.full.mrr"] + row["val.b.full.mrr"] for row in done.curves]
    assert max(trained) > 1.5 * untrained


# --------------------------------------------------------------------------------------------- resume, checkpoints


class Stop(Exception):
    """Raised in place of a kill."""


def interrupted(config: RunConfig, checkpoint: Path, epoch: int, pair: Pair = PAIR) -> None:
    """A run that ends after an epoch, with its checkpoint written."""

    def stop(row: dict[str, float]) -> None:
        if row["epoch"] == epoch:
            raise Stop

    with pytest.raises(Stop):
        fit(config, pair, device="cpu", checkpoint=checkpoint, on_epoch=stop)


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a checkpoint goes, written after each epoch whatever it costs."""
    monkeypatch.setattr(training, "CHECKPOINT_SHARE", math.inf)
    return tmp_path / "run.pt"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"published": ("shuffled_batches",)},
        {"schedule": "plateau", "lr": 0.03, "plateau_patience": 0, "stop_patience": 2, "epochs": 30},
        {"model": "cdsrnp", "gca": (0, 1)},  # draws its support and its latent from torch's generator
        {"eval_every": 2},
        {"eval_every": 3, "track_test": True},  # interrupted after an epoch without a validation
        {"schedule": "plateau", "lr": 0.03, "plateau_patience": 0, "stop_patience": 1, "epochs": 30, "eval_every": 3},
    ],
    ids=["cosine", "shuffled", "plateau", "cdsrnp", "every 2", "every 3, test", "plateau, every 3"],
)
def test_resume_ends_bit_for_bit_as_an_uninterrupted_run(
    checkpoint: Path, changes: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config(**{"epochs": 4, **changes})
    alone = fit(config, PAIR, device="cpu")
    interrupted(config, checkpoint, 2)
    torch.rand(5)  # what else the process draws does not matter
    with caplog.at_level(logging.INFO, "gcalib"):
        resumed = fit(config, PAIR, device="cpu", checkpoint=checkpoint)
    assert "resumed after epoch 2" in caplog.text
    assert resumed.curves == alone.curves
    assert (resumed.best_epoch, resumed.stopped_early) == (alone.best_epoch, alone.stopped_early)
    assert equal_weights(resumed.model, alone.model)


@pytest.mark.parametrize("schedule", ["cosine", "plateau"])
def test_resume_of_a_finished_run_trains_no_more(checkpoint: Path, schedule: str) -> None:
    config = tiny_config(schedule=schedule, lr=0.03, stop_patience=1, epochs=3 if schedule == "cosine" else 30)
    done, rows = fit(config, PAIR, device="cpu", checkpoint=checkpoint), []
    again = fit(config, PAIR, device="cpu", checkpoint=checkpoint, on_epoch=rows.append)
    assert rows == []
    assert (again.curves, again.best_epoch) == (done.curves, done.best_epoch)
    assert again.stopped_early == done.stopped_early == (schedule == "plateau")
    assert equal_weights(again.model, done.model)


def test_resume_keeps_count_of_the_seconds(checkpoint: Path) -> None:
    interrupted(tiny_config(), checkpoint, 2)
    before = torch.load(checkpoint, weights_only=True)["progress"]["seconds"]
    assert fit(tiny_config(), PAIR, device="cpu", checkpoint=checkpoint).seconds > before > 0


@pytest.mark.parametrize("what", ["config", "data"])
def test_checkpoint_of_another_run_is_refused(checkpoint: Path, what: str) -> None:
    interrupted(tiny_config(), checkpoint, 1)
    content = checkpoint.read_bytes()
    config = tiny_config(seed=5) if what == "config" else tiny_config()
    pair = PAIR if what == "config" else synthetic_pair(num_users=60, num_items=(60, 70), seed=1)
    with pytest.raises(ValueError, match=r"run\.pt belongs to another run: delete it"):
        fit(config, pair, device="cpu", checkpoint=checkpoint)
    assert checkpoint.read_bytes() == content


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


def one_bit_flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def with_a_former_field(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    content["config"]["weight_average"] = 0.9
    torch.save(content, path)


def without_a_part(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    content["state"] = content.pop("progress")
    torch.save(content, path)


@pytest.mark.parametrize("damage", [cut, one_bit_flipped, with_a_former_field, without_a_part])
def test_checkpoint_damaged_or_of_another_version_is_set_aside(
    checkpoint: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config(epochs=2)
    interrupted(config, checkpoint, 1)
    damage(checkpoint)
    content = checkpoint.read_bytes()
    done = fit(config, PAIR, device="cpu", checkpoint=checkpoint)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "could not be read and is now" in caplog.text
    assert checkpoint.with_suffix(".damaged").read_bytes() == content
    assert done.curves == fit(config, PAIR, device="cpu").curves


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("file write failed")], ids=str)
def test_checkpoint_on_a_full_disk_costs_no_run(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def full(_: object, path: Path) -> None:
        path.write_bytes(b"as much as fits")
        raise error

    monkeypatch.setattr(torch, "save", full)
    done = fit(tiny_config(epochs=2), PAIR, device="cpu", checkpoint=checkpoint)
    assert len(done.curves) == 3
    assert str(error) in caplog.text
    assert not list(checkpoint.parent.iterdir())


# --------------------------------------------------------------------------------------- divergence, unusable pairs


@pytest.mark.parametrize("batch_size", [20, 60], ids=["in an epoch", "in its last step"])
@pytest.mark.parametrize("lr", [300, 1e20])
def test_divergence_is_told_from_bad_arguments(lr: float, batch_size: int) -> None:
    with pytest.raises(DivergedError, match="no longer finite.*lower lr"):
        fit(tiny_config(lr=lr, batch_size=batch_size, published=("shuffled_batches",)), PAIR, device="cpu")


def test_divergence_after_the_last_step_is_found_in_validation() -> None:
    with pytest.raises(DivergedError, match="Validation scores are no longer finite"):
        fit(tiny_config(lr=1e30, batch_size=60, epochs=1, published=("shuffled_batches",)), PAIR, device="cpu")


def test_pair_without_validation_targets_in_a_domain_is_refused() -> None:
    """Of each user the second domain comes last, with two events or more."""
    order = np.lexsort((PAIR.domain_of(PAIR.items), PAIR.owner))
    with pytest.raises(ValueError, match="synthetic, domain a: no user's validation target lies in it"):
        fit(tiny_config(), replace(PAIR, items=PAIR.items[order]), device="cpu")


def test_select_with_too_few_items_is_refused() -> None:
    with pytest.raises(ValueError, match="select='s999' needs more items a domain than synthetic has: use 'full'"):
        fit(tiny_config(select="s999"), PAIR, device="cpu")


def test_device_unknown_or_absent_is_refused() -> None:
    with pytest.raises(ValueError, match="device='tpu' is unknown"):
        pick_device("tpu")
    with pytest.raises(ValueError, match=r"device='cuda:99': PyTorch .* finds \d+ GPUs"):
        pick_device("cuda:99")


# ------------------------------------------------------------------------------------------- the epoch that is kept


Weights = list[dict[str, torch.Tensor]]


def prescribe(monkeypatch: pytest.MonkeyPatch, figures: list[float], candidates: str = "full") -> Weights:
    """Let the validation MRR of A be the given figures, of the untrained model first; returns each epoch's weights."""
    weights: Weights = []

    def validate(trainer: Trainer) -> dict[str, float]:
        weights.append(copy.deepcopy(trainer.model.state_dict()))
        return {f"val.a.{candidates}.mrr": figures[len(weights) - 1], f"val.b.{candidates}.mrr": 0.5}

    monkeypatch.setattr(Trainer, "validate", validate)
    return weights


@pytest.mark.parametrize("schedule", ["cosine", "plateau"])
@pytest.mark.parametrize("select", ["full", "s100"])
def test_best_epoch_is_kept(schedule: str, select: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = prescribe(monkeypatch, [0.9, 0.1, 0.2, 0.4, 0.4, 0.3], select)
    done = fit(tiny_config(schedule=schedule, select=select, epochs=5), PAIR, device="cpu")
    assert done.best_epoch == 3
    assert not done.stopped_early
    assert all(torch.equal(tensor, weights[3][name]) for name, tensor in done.model.state_dict().items())


def test_best_epoch_is_the_one_with_the_highest_mrr_of_both_domains() -> None:
    done = fit(tiny_config(lr=0.03), PAIR, device="cpu")
    quality = [row["val.a.full.mrr"] + row["val.b.full.mrr"] for row in done.curves[1:]]
    assert done.best_epoch == 1 + int(np.argmax(quality))
    again = evaluate(done.model, PAIR, "val", protocols=("full",), alignment=False)
    assert again["a.full.mrr"] + again["b.full.mrr"] == max(quality)


def test_early_stopping_waits_for_its_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    prescribe(monkeypatch, [0.9, 0.1, 0.3, 0.2, 0.4, 0.4, 0.3, 0.2])
    done = fit(tiny_config(schedule="plateau", epochs=50, stop_patience=3), PAIR, device="cpu")
    assert done.stopped_early
    assert (done.best_epoch, len(done.curves) - 1) == (4, 7)


def test_early_stopping_does_not_count_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    prescribe(monkeypatch, [0.9, 0.4, 0.3, 0.3, 0.3, 0.3])
    done = fit(tiny_config(schedule="plateau", epochs=50, stop_patience=2, warmup_epochs=3), PAIR, device="cpu")
    assert (done.best_epoch, len(done.curves) - 1) == (1, 5)


def test_cosine_never_stops_early(monkeypatch: pytest.MonkeyPatch) -> None:
    prescribe(monkeypatch, [0.9, 0.4, 0.3, 0.2, 0.1])
    done = fit(tiny_config(epochs=4, stop_patience=1), PAIR, device="cpu")
    assert not done.stopped_early
    assert len(done.curves) == 5


def test_plateau_cuts_the_learning_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    prescribe(monkeypatch, [0.9, 0.1, 0.3, 0.2, 0.2, 0.4, 0.3, 0.3, 0.3, 0.3])
    config = tiny_config(schedule="plateau", epochs=9, plateau_patience=1, lr=0.03)
    rates = [row["lr"] for row in fit(config, PAIR, device="cpu").curves[1:]]
    cuts = [0, 0, 0, 0, 1, 1, 1, 2, 2]  # after epochs 3, 4 and 6, 7 without a better one
    assert rates == pytest.approx([0.03 * 0.3162**n for n in cuts])


# ------------------------------------------------------------------------------- how often, and test beside validation


@pytest.mark.parametrize(("epochs", "every", "expected"), [(5, 2, [2, 4, 5]), (4, 2, [2, 4]), (3, 7, [3])])
def test_validation_is_made_every_few_epochs_and_after_the_last(epochs: int, every: int, expected: list[int]) -> None:
    done = fit(tiny_config(epochs=epochs, eval_every=every, lr=0.03), PAIR, device="cpu")
    assert [row["epoch"] for row in done.curves] == list(range(epochs + 1))
    assert all(row["loss_a"] > 0 for row in done.curves[1:])
    validated = [row for row in done.curves if any(key.startswith("val.") for key in row)]
    assert [row["epoch"] for row in validated] == [0, *expected]
    found = {row["epoch"]: row["val.a.full.mrr"] + row["val.b.full.mrr"] for row in validated[1:]}
    assert done.best_epoch == max(found, key=found.__getitem__)
    again = evaluate(done.model, PAIR, "val", protocols=("full",), alignment=False)
    assert again["a.full.mrr"] + again["b.full.mrr"] == max(found.values())


@pytest.mark.parametrize("model", ["abxi", "cdsrnp"])
def test_training_does_not_depend_on_what_is_evaluated(checkpoint: Path, model: str) -> None:
    """Losses and the weights after the last epoch, which a checkpoint holds beside those of the best one."""
    curves, weights = [], []
    for number, changes in enumerate(({}, {"eval_every": 2}, {"track_test": True})):
        path = checkpoint.with_stem(f"run{number}")
        curves.append(fit(tiny_config(model=model, **changes), PAIR, device="cpu", checkpoint=path).curves)
        weights.append(torch.load(path, weights_only=True)["model"])
    plain = curves[0]
    for other, theirs in zip(curves[1:], weights[1:], strict=True):
        for one, row in zip(plain, other, strict=True):
            shared = {key: value for key, value in row.items() if not key.startswith("test.")}
            assert shared == {key: one[key] for key in shared}
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in weights[0].items())


def test_track_test_puts_the_test_split_beside_validation() -> None:
    done = fit(tiny_config(track_test=True, eval_every=2), PAIR, device="cpu")
    assert [any(key.startswith("test.") for key in row) for row in done.curves] == [True, False, True, True]
    row = next(row for row in done.curves if row["epoch"] == done.best_epoch)
    wanted = evaluate(done.model, PAIR, "test", alignment=False)
    assert {key: value for key, value in row.items() if key.startswith("test.")} == {
        f"test.{key}": value for key, value in wanted.items()
    }


def test_plateau_counts_validations(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = prescribe(monkeypatch, [0.9, 0.1, 0.3, 0.2, 0.2])
    changes = {"schedule": "plateau", "epochs": 50, "stop_patience": 2, "plateau_patience": 0, "eval_every": 2}
    done = fit(tiny_config(lr=0.03, **changes), PAIR, device="cpu")
    assert done.stopped_early
    assert (done.best_epoch, len(done.curves) - 1) == (4, 8)
    assert all(torch.equal(tensor, weights[2][name]) for name, tensor in done.model.state_dict().items())
    assert [row["lr"] for row in done.curves[1:]] == pytest.approx([0.03] * 6 + [0.03 * 0.3162] * 2)


# --------------------------------------------------------------------------------------------------------- precision


def test_precision_auto_is_measured_once() -> None:
    fastest_precision.cache_clear()
    chosen = fastest_precision("cpu")
    assert chosen in ("fp32", "bf16")
    assert fastest_precision("cpu") == chosen
    assert fastest_precision.cache_info().misses == 1


@pytest.mark.parametrize("fastest", ["fp32", "bf16"])
def test_precision_auto_takes_the_faster_and_says_which(fastest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "fastest_precision", lambda device: {"cpu": fastest}[device])
    done, asked = (fit(tiny_config(epochs=1, precision=name), PAIR, device="cpu") for name in ("auto", fastest))
    assert done.precision == asked.precision == fastest
    assert done.curves == asked.curves


def test_precision_auto_keeps_to_what_a_run_began_with(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(precision="auto")
    monkeypatch.setattr(training, "fastest_precision", lambda _: "bf16")
    interrupted(config, checkpoint, 1)
    monkeypatch.setattr(training, "fastest_precision", lambda _: "fp32")
    assert fit(config, PAIR, device="cpu", checkpoint=checkpoint).precision == "bf16"


@pytest.mark.parametrize("model", ["abxi", "cdsrnp", "llm4cdsr"])
def test_precision_bf16_learns_like_fp32(model: str) -> None:
    """Half the mantissa moves single figures a little and the training loss hardly at all."""
    text = {"text": "random"} if model == "llm4cdsr" else {}
    losses = {}
    for precision in ("fp32", "bf16"):
        config = tiny_config(model=model, precision=precision, epochs=3, dim=16, dropout=0.1, lr=0.01, **text)
        done = fit(config, PAIR, device="cpu")
        losses[precision] = np.array([row["loss_a"] + row["loss_b"] for row in done.curves[1:]])
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)
    assert losses["bf16"].tolist() != losses["fp32"].tolist()
    assert losses["fp32"][-1] < 0.98 * losses["fp32"][0]


# ------------------------------------------------------------------------------------------------------- overfitting


def share_ranked_first(model: str, pair: Pair, **changes: Any) -> float:
    """Share of the training targets that a model ranks first after training on a tiny batch.

    Counted are targets with three events before them, one of their own domain: several users may begin alike, and
    CDSRNP says nothing of a user in a domain without a row.
    """
    config = tiny_config(
        model=model, dim=32, dropout=0.0, weight_decay=0.0, batch_size=16, max_length=13, negatives=200, lr=0.015,
        warmup_epochs=5, epochs=60, **changes,
    )  # fmt: skip
    torch.manual_seed(config.seed)
    trainer = Trainer(config, pair, CPU)
    for epoch in range(1, config.epochs + 1):
        trainer.epoch(learning_rate(config, epoch))
    users = np.arange(pair.num_users)
    batch = trainer.model.collate(trainer.histories, pair, training=True, users=users)
    hits = []
    with torch.no_grad():
        for domain, (h, stream) in enumerate(zip(trainer.model(batch), batch.domains, strict=True)):
            counted = stream.predicts & stream.mask
            if pair.has_global_order:
                counted &= stream.query_position >= 2
            best = trainer.model.scorer(domain)(h[counted]).argmax(dim=1) + 1 + domain * pair.num_items[0]
            hits += (best == stream.targets[counted]).tolist()
    assert len(hits) > 100
    return float(np.mean(hits))


FEW = synthetic_pair(num_users=16, num_items=(100, 100), seed=2)
INFONCE = {"objective": "infonce"}
MODELS = pytest.mark.parametrize(
    ("model", "changes"),
    [("abxi", {}), ("llm4cdsr", {"text": "random", **INFONCE}), ("cdsrnp", INFONCE)],
    ids=["abxi", "llm4cdsr", "cdsrnp"],
)


@MODELS
def test_overfits_a_tiny_batch(model: str, changes: dict[str, Any]) -> None:
    """Every target comes first, by two logits or more, wherever this was tried."""
    assert share_ranked_first(model, FEW, **changes) > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
@MODELS
def test_overfits_a_tiny_batch_whatever_the_seed(model: str, changes: dict[str, Any], seed: int) -> None:
    assert share_ranked_first(model, FEW, seed=seed, **changes) > 0.95


@pytest.mark.slow
@pytest.mark.parametrize(("model", "gca"), [("cdsrnp", (0,)), ("sasrec", ()), ("sasrec-mixed", ())])
def test_overfits_a_tiny_batch_with_the_published_loss(model: str, gca: tuple[int, ...]) -> None:
    assert share_ranked_first(model, FEW, gca=gca) > 0.95


@pytest.mark.slow
@pytest.mark.parametrize(("model", "gca"), [("cdsrnp", (0,)), ("cdsrnp", (2,)), ("sasrec", ())])
def test_overfits_a_tiny_batch_of_a_per_domain_pair(model: str, gca: tuple[int, ...]) -> None:
    order = np.lexsort((FEW.domain_of(FEW.items), FEW.owner))
    pair = replace(FEW, items=FEW.items[order], times=np.full(len(order), -1), has_global_order=False)
    assert share_ranked_first(model, pair, gca=gca, **INFONCE) > 0.95

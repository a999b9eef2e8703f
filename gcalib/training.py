"""Training of any `Recommender`: one loop, two learning-rate schedules, checkpoints, exact resume."""

from __future__ import annotations

import copy
import functools
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gcalib import checkpoints
from gcalib.attention import record_activations
from gcalib.config import RunConfig
from gcalib.data.batches import batches_of_users, events_per_domain, shuffled_batches
from gcalib.data.pair import Pair
from gcalib.evaluation import evaluate
from gcalib.interventions import squared_cosine
from gcalib.models.base import Recommender
from gcalib.models.matching import MODELS, build_model

log = logging.getLogger("gcalib")
OnEpoch = Callable[[dict[str, float]], None]
FINAL_SHARE = 0.02  # of the learning rate, at the end of the cosine schedule
PLATEAU_FACTOR = 0.3162  # as published by ABXI's authors
CHECKPOINT_SHARE = 0.05  # of the time, at most, goes into writing checkpoints
BF16_GAIN = 1.2  # how many times as fast as fp32 bf16 has to be


class DivergedError(RuntimeError):
    """A run whose loss stopped being a number; nothing of it is recorded."""


def pick_device(name: str = "auto") -> torch.device:
    """`"auto"` is CUDA where there is one, else the CPU; a ValueError for a device that is unknown or not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device={name!r} is unknown; the devices are auto, cpu and cuda.")
    device, gpus = torch.device(name), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= gpus:
        raise ValueError(f"device={name!r}: PyTorch {torch.__version__} finds {gpus} GPUs; use auto or cpu.")
    return device


@functools.cache
def fastest_precision(device: str) -> str:
    """`"bf16"` where its matrix products are faster than those of fp32, else `"fp32"`; measured once, in some 50 ms.

    A CPU without bf16 instructions is 300 times slower in bf16, so the product measured there is small.
    """
    size = 160 if device == "cpu" else 4096

    def seconds(dtype: torch.dtype) -> float:
        x, end = torch.ones(size, size, dtype=dtype, device=device), time.perf_counter() + 0.02
        times: list[float] = []
        while len(times) < 2 or time.perf_counter() < end:
            started = time.perf_counter()
            (x @ x)[0, 0].item()
            times.append(time.perf_counter() - started)
        return min(times)

    fp32, bf16 = seconds(torch.float32), seconds(torch.bfloat16)
    chosen = "bf16" if BF16_GAIN * bf16 < fp32 else "fp32"
    log.info("precision auto: %s (a product takes %.2g s in fp32, %.2g s in bf16)", chosen, fp32, bf16)
    return chosen


@dataclass
class Fit:
    """What `fit` returns: the model at its best epoch, and how it got there.

    `curves` has one dict per epoch (0: untrained); `precision` is the one used, fp32 or bf16.
    """

    model: Recommender
    curves: list[dict[str, float]]
    best_epoch: int
    stopped_early: bool
    seconds: float
    precision: str


@dataclass
class Progress:
    """Where a run is: all that a resumed one needs beside the states of torch and numpy."""

    epoch: int = 0
    best: float = -math.inf
    best_epoch: int = 0
    waited: int = 0  # validations since the best
    waited_at_lr: int = 0  # validations since the best or the last cut of the learning rate
    cuts: int = 0
    seconds: float = 0.0
    curves: list[dict[str, float]] = field(default_factory=list)


def learning_rate(config: RunConfig, epoch: int, cuts: int = 0) -> float:
    """Learning rate in an epoch (from 1): linear warm-up, then a cosine to 2% or a factor for each cut on a plateau.

    Examples
    --------
    >>> config = RunConfig(pair="synthetic", lr=1.0, epochs=12, warmup_epochs=1)
    >>> [round(learning_rate(config, epoch), 3) for epoch in (1, 2, 7, 12)]
    [0.5, 1.0, 0.51, 0.02]
    """
    warm = min(1.0, epoch / (config.warmup_epochs + 1))
    if config.schedule == "plateau":
        return config.lr * warm * PLATEAU_FACTOR**cuts
    done = (epoch - config.warmup_epochs - 1) / max(1, config.epochs - config.warmup_epochs - 1)
    cosine = (1 + math.cos(math.pi * min(1.0, max(0.0, done)))) / 2
    return config.lr * warm * (FINAL_SHARE + (1 - FINAL_SHARE) * cosine)


class Trainer:
    """A model with its optimiser and its data."""

    def __init__(self, config: RunConfig, pair: Pair, device: torch.device) -> None:
        self.config, self.pair, self.device = config, pair, device
        self.precision = fastest_precision(device.type) if config.precision == "auto" else config.precision
        self.model = build_model(config, pair).to(device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        self.rng = np.random.default_rng([config.seed, 1])
        training = pair.split("val")  # its histories are all that training may see
        self.histories = [training.history(user) for user in range(pair.num_users)]
        self.events = events_per_domain(pair, training)

    def batches(self) -> Iterator[np.ndarray]:
        """Users of one epoch, batch by batch."""
        if "shuffled_batches" in self.config.published:
            return shuffled_batches(len(self.histories), self.config.batch_size, self.rng)
        return batches_of_users(self.events, self.config.batch_size, self.rng)

    def step(self, users: np.ndarray) -> dict[str, Tensor]:
        """One optimiser step; returns the losses before it, by name."""
        batch = self.model.collate([self.histories[user] for user in users], self.pair, training=True, users=users)
        negatives = self.model.negatives(batch, self.rng).to(self.device)
        autocast = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")
        with autocast, record_activations(self.model) as recorded:
            losses = self.model.loss(batch.to(self.device), negatives)
        if self.config.cos_penalty and recorded:
            losses["cos_penalty"] = self.config.cos_penalty * squared_cosine(recorded)
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return {name: loss.detach() for name, loss in losses.items()}

    def epoch(self, lr: float) -> dict[str, float]:
        """One pass over all users; returns the mean losses, or raises DivergedError if they are not finite."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.train()
        total: dict[str, Tensor] = {}
        for users in self.batches():
            for name, loss in self.step(users).items():
                total[name] = total.get(name, 0.0) + loss.float() * (len(users) / len(self.histories))
        means = {f"loss_{name}": float(loss) for name, loss in total.items()}
        if not math.isfinite(sum(means.values())):
            raise DivergedError(f"The loss is no longer finite at learning rate {lr:g}: lower lr, or warm up longer.")
        return {**means, "lr": lr}

    def validate(self) -> dict[str, float]:
        """Figures of the validation split, and with `track_test` of the test split, for the curves."""
        select, pair = self.config.select, self.pair
        found = evaluate(self.model, pair, "val", protocols=tuple({"full", select}))
        tested = evaluate(self.model, pair, "test", alignment=False) if self.config.track_test else {}
        for domain, name in zip("ab", pair.domains, strict=True):
            if not found[f"{domain}.targets"]:
                what = "no user's validation target lies in it, and the best epoch is picked by both domains"
                raise ValueError(f"{pair.name}, domain {name}: {what}.")
            if f"{domain}.{select}.mrr" not in found:
                raise ValueError(f"select={select!r} needs more items a domain than {pair.name} has: use 'full'.")
        of_test = {f"test.{name}": value for name, value in tested.items()}
        return {f"val.{name}": value for name, value in found.items()} | of_test


def fit(
    config: RunConfig,
    pair: Pair,
    *,
    device: torch.device | str = "auto",
    checkpoint: Path | None = None,
    on_epoch: OnEpoch | None = None,
) -> Fit:
    """Train a model and keep its best epoch, by the validation MRR summed over both domains.

    Torch's random generators are left as they were.

    Parameters
    ----------
    checkpoint
        File to resume from if it exists, rewritten after epochs (so rarely that it costs at most a twentieth of the
        time), left in place at the end. A resumed run ends bit for bit where an uninterrupted one does, on a CPU
        with the same number of threads.
    on_epoch
        Called with the row of the curves after each epoch and its checkpoint.

    Raises
    ------
    DivergedError
        If the loss stops being finite.
    """
    device = pick_device(device) if isinstance(device, str) else device
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        return _fit(config, pair, device, checkpoint, on_epoch)


def _fit(config: RunConfig, pair: Pair, device: torch.device, checkpoint: Path | None, on_epoch: OnEpoch | None) -> Fit:
    started = time.perf_counter()
    if not MODELS[config.model].trained:  # a baseline without parameters is evaluated only
        model = build_model(config, pair)
        row = {"epoch": 0, **{f"val.{name}": value for name, value in evaluate(model, pair, "val").items()}}
        return Fit(model, [row], 0, True, time.perf_counter() - started, "fp32")
    trainer = Trainer(config, pair, device)
    model = trainer.model
    progress, best_weights = Progress(), copy.deepcopy(model.state_dict())
    names = set(_state(trainer, progress, best_weights))
    if checkpoint is not None and (content := checkpoints.load(checkpoint, names)):
        progress, best_weights = _resume(checkpoint, trainer, content)
    started -= progress.seconds
    saved, save_cost = -math.inf, 0.0
    patience = config.stop_patience if config.schedule == "plateau" else math.inf

    if progress.epoch == 0:
        progress.curves.append({"epoch": 0, **trainer.validate()})
    for epoch in range(progress.epoch + 1, config.epochs + 1):
        if progress.waited >= patience:
            break
        row = {"epoch": epoch, **trainer.epoch(learning_rate(config, epoch, progress.cuts))}
        quality, validated = -math.inf, epoch % config.eval_every == 0 or epoch == config.epochs
        if validated:
            try:
                row |= trainer.validate()
            except ValueError as error:  # with the untrained weights the same ranking has succeeded
                raise DivergedError("Validation scores are no longer finite: lower lr, or warm up longer.") from error
            quality = row[f"val.a.{config.select}.mrr"] + row[f"val.b.{config.select}.mrr"]
        progress.epoch = epoch
        progress.curves.append(row)
        if quality > progress.best:
            progress.best, progress.best_epoch, progress.waited, progress.waited_at_lr = quality, epoch, 0, 0
            best_weights = copy.deepcopy(model.state_dict())
        elif validated and epoch > config.warmup_epochs:
            progress.waited += 1
            progress.waited_at_lr += 1
            if progress.waited_at_lr > config.plateau_patience:
                progress.cuts, progress.waited_at_lr = progress.cuts + 1, 0

        now = time.perf_counter()
        progress.seconds = now - started
        if checkpoint is not None and save_cost <= CHECKPOINT_SHARE * (now - saved):
            checkpoints.save(checkpoint, _state(trainer, progress, best_weights))
            saved, save_cost = now, time.perf_counter() - now
        shown = (epoch, quality, progress.best, progress.best_epoch, row["lr"], progress.seconds)
        log.info("epoch %d: val MRR %.4f (best %.4f at %d), lr %.1e, %.0f s", *shown)
        if on_epoch is not None:
            on_epoch(row)
    model.load_state_dict(best_weights)
    stopped, seconds = progress.waited >= patience, time.perf_counter() - started
    return Fit(model, progress.curves, progress.best_epoch, stopped, seconds, trainer.precision)


def _state(trainer: Trainer, progress: Progress, best_weights: dict[str, Tensor]) -> dict[str, Any]:
    """What a checkpoint holds."""
    return {
        "config": trainer.config.model_dump(mode="json"),
        "data_sha256": trainer.pair.sha256,
        "precision": trainer.precision,
        "progress": vars(progress),
        "model": trainer.model.state_dict(),
        "best_weights": best_weights,
        "optimizer": trainer.optimizer.state_dict(),
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state() if trainer.device.type == "cuda" else None,
        "sampler": trainer.rng.bit_generator.state,
    }


def _resume(path: Path, trainer: Trainer, content: dict[str, Any]) -> tuple[Progress, dict[str, Tensor]]:
    """Continue from what a checkpoint holds."""
    if content["config"] != trainer.config or content["data_sha256"] != trainer.pair.sha256:
        raise ValueError(f"The checkpoint {path} belongs to another run: delete it to start this one anew.")
    if (content["cuda_rng"] is None) == (trainer.device.type == "cpu"):  # a GPU's bf16 may be 300 times slower on a CPU
        trainer.precision = content["precision"]
    trainer.model.load_state_dict(content["model"])
    trainer.optimizer.load_state_dict(content["optimizer"])
    torch.set_rng_state(content["torch_rng"])
    if trainer.device.type == "cuda" and content["cuda_rng"] is not None:
        torch.cuda.set_rng_state(content["cuda_rng"])
    trainer.rng.bit_generator.state = content["sampler"]
    progress = Progress(**content["progress"])
    log.info("%s: resumed after epoch %d", path.stem, progress.epoch)
    return progress, {name: tensor.to(trainer.device) for name, tensor in content["best_weights"].items()}

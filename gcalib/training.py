"""Training of any `Recommender`: early stopping, checkpoints, exact resume."""

from __future__ import annotations

import copy
import ctypes
import logging
import math
import os
import secrets
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from gcalib.config import RunConfig
from gcalib.data.batches import Batch, length_batches, make_batch, shuffled_batches
from gcalib.data.pair import Pair
from gcalib.evaluation import evaluate
from gcalib.models import MODELS, Recommender, build_model

log = logging.getLogger("gcalib")
T = TypeVar("T")
CHECKPOINT_SHARE = 0.05  # of the time, at most, goes into writing checkpoints
TRIM_ABOVE = 1.8e9  # bytes held between two steps
TRIM_EVERY = 8  # steps: what is handed back has to be asked for again, a tenth of a step's time at width 256
TRIM_AT_ONCE = 3.4e9  # bytes with which no step begins: in bf16, eight steps leave as much as two gigabytes behind
_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


class Bar(tqdm):  # type: ignore[type-arg]
    """A progress bar of one process.

    tqdm's own lock is for several: a semaphore with a name, of which Python's resource tracker complains when a process
    is killed.
    """


Bar.set_lock(threading.RLock())


class DivergedError(RuntimeError):
    """A run whose loss stopped being a number; nothing of it is recorded."""


def finish(steps: Generator[None, None, T]) -> T:
    """Do in one go what pauses between its steps (`Trainer.steps`, `fit_in_steps`); returns what it returns."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


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


@dataclass
class Fit:
    """What `fit` hands back: the model at its best epoch, and how it got there (one dict an epoch, 0 = untrained)."""

    model: Recommender
    curves: list[dict[str, float]]
    best_epoch: int
    stopped_early: bool
    seconds: float


@dataclass
class _State:
    """Everything that a resumed run needs and that torch does not keep itself."""

    epoch: int = 0
    best: float = -math.inf
    best_epoch: int = 0
    waited: int = 0  # epochs since the best
    waited_at_lr: int = 0  # epochs since the best or the last cut of the learning rate
    cuts: int = 0
    seconds: float = 0.0
    curves: list[dict[str, float]] = field(default_factory=list)


def learning_rate(config: RunConfig, epoch: int, cuts: int) -> float:
    """Linear warm-up over the first epochs (from 1), then a plateau factor for each cut.

    >>> learning_rate(RunConfig(pair="synthetic", lr=0.6, warmup_epochs=2), epoch=1, cuts=0)
    0.2
    """
    warm = min(1.0, epoch / (config.warmup_epochs + 1))
    return config.lr * warm * config.plateau_factor**cuts


class Trainer:
    """One model, its optimiser and its data; `epoch()` makes one pass over the users.

    Parameters
    ----------
    device
        Where to train.

    Attributes
    ----------
    averaged
        The moving average of the model's weights, if `config.weight_average` asks for one.
    """

    def __init__(self, config: RunConfig, pair: Pair, device: torch.device) -> None:
        self.config, self.pair, self.device = config, pair, device
        self.model = build_model(config, pair).to(device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        self.averaged = (
            AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(config.weight_average), use_buffers=True)
            if config.weight_average
            else None
        )
        self.rng = np.random.default_rng([config.seed, 1])
        training = pair.split("val")  # its histories are all that training may see
        self.sequences = [training.history(user) for user in range(pair.num_users)]
        self.lengths = training.lengths

    @property
    def evaluated(self) -> Recommender:
        """The model that is validated and kept: the average, where there is one."""
        return self.model if self.averaged is None else cast(Recommender, self.averaged.module)

    def batch(self, users: np.ndarray) -> Batch:
        """Training batch of some users."""
        model = self.model
        return make_batch(
            [self.sequences[user] for user in users], self.pair.num_items[0], window=model.window, training=True,
            tails=model.reads_tails, as_published=model.as_published, users=users,
            clock=self.pair.has_clock,
        ).to(self.device)  # fmt: skip

    def step(self, users: np.ndarray) -> dict[str, Tensor]:
        """One optimiser step; returns the losses before it, by name."""
        batch = self.batch(users)
        negatives = self.model.negatives(batch, self.rng).to(self.device)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.config.precision == "bf16"):
            losses = self.model.loss(batch, negatives)
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)
        return {name: loss.detach() for name, loss in losses.items()}

    def _batches(self) -> Iterator[np.ndarray]:
        size = self.config.batch_size
        if self.config.batches == "shuffled":
            return shuffled_batches(len(self.lengths), size, self.rng)
        return length_batches(self.lengths, size, self.rng)

    def epoch(self, lr: float) -> dict[str, float]:
        """One pass over all users; returns the mean losses.

        Raises
        ------
        DivergedError
            As soon as an epoch's loss is not finite.
        """
        return finish(self.steps(lr))

    def steps(self, lr: float) -> Generator[None, None, dict[str, float]]:
        """`epoch`, with a pause after each step."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.train()
        total: dict[str, Tensor] = {}
        for number, users in enumerate(self._batches(), start=1):
            for name, loss in self.step(users).items():
                total[name] = total.get(name, 0.0) + loss.float() * (len(users) / len(self.lengths))
            _return_memory(TRIM_ABOVE if number % TRIM_EVERY == 0 else TRIM_AT_ONCE)
            yield
        _return_memory(TRIM_ABOVE)  # an epoch may have fewer steps
        means = {f"loss_{name}": float(loss) for name, loss in total.items()}
        if not math.isfinite(sum(means.values())):
            raise DivergedError(f"The loss is no longer finite at learning rate {lr:g}: lower lr, or warm up longer.")
        return {**means, "lr": lr}


def _return_memory(above: float) -> None:
    """Hand freed memory back to the system if the process holds more than `above` bytes.

    Batches differ in size, so glibc's heap falls to pieces: without this, a long run at width 256 comes to hold some
    three times what a step needs. Elsewhere than on Linux with glibc nothing is done.
    """
    if _TRIM is None:
        return
    if _resident() > above:
        _TRIM(0)


def _resident() -> int:
    """Bytes of this process in memory, on Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def fit(
    config: RunConfig,
    pair: Pair,
    *,
    device: torch.device | str = "auto",
    checkpoint: Path | None = None,
    on_epoch: Callable[[int], None] | None = None,
) -> Fit:
    """Train until the validation MRR, summed over both domains, has not improved for `config.stop_patience` epochs.

    Parameters
    ----------
    checkpoint
        File to resume from if it exists, rewritten after epochs (so rarely that it costs at most a twentieth of the
        time), left in place at the end. A resumed run ends bit for bit where an uninterrupted one does, on a CPU
        with the same number of threads.
    on_epoch
        Called with the number of each finished epoch, after its checkpoint.

    Raises
    ------
    DivergedError
        If the loss stops being finite.
    """
    device = pick_device(device) if isinstance(device, str) else device
    return finish(fit_in_steps(config, pair, device, checkpoint, on_epoch))


def fit_in_steps(
    config: RunConfig,
    pair: Pair,
    device: torch.device,
    checkpoint: Path | None = None,
    on_epoch: Callable[[int], None] | None = None,
) -> Generator[None, None, Fit]:
    """`fit`, with a pause after each training step, in which the process may do anything else, as train another model.

    Between two steps torch's random generators are the caller's, and the run's clock stands still.
    """
    clock, own_rng = _Clock(), None
    steps = _fit(config, pair, device, checkpoint, on_epoch, clock)
    while True:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if device.type == "cuda" else []):
            if own_rng is not None:
                _set_rng(own_rng, device)
            try:
                next(steps)
            except StopIteration as end:
                return end.value
            own_rng = _rng(device)
        with clock.stopped():
            yield


class _Clock:
    """Seconds that pass while it is not stopped."""

    def __init__(self) -> None:
        self.pauses = 0.0

    def now(self) -> float:
        return time.perf_counter() - self.pauses

    @contextmanager
    def stopped(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.pauses += time.perf_counter() - began


def _fit(
    config: RunConfig,
    pair: Pair,
    device: torch.device,
    checkpoint: Path | None,
    on_epoch: Callable[[int], None] | None,
    clock: _Clock,
) -> Generator[None, None, Fit]:
    torch.manual_seed(config.seed)
    if not MODELS[config.model].trained:
        return _counted(config, pair)
    trainer = Trainer(config, pair, device)
    state, best_model = _State(), copy.deepcopy(trainer.evaluated.state_dict())
    if checkpoint is not None and checkpoint.exists():
        try:
            content = _load(checkpoint)
        except Exception as error:  # noqa: BLE001 - a damaged file can fail in any way
            aside = checkpoint.with_suffix(".damaged")
            os.replace(checkpoint, aside)
            log.warning("The checkpoint could not be read and is now %s; the run starts anew (%s).", aside, error)
        else:
            state, best_model = _restore(content, checkpoint, trainer)
            log.info("%s: resumed after epoch %d", checkpoint.stem, state.epoch)
    started, saved, save_cost = clock.now() - state.seconds, -math.inf, 0.0
    protocols = tuple({"full", config.select})

    def validate() -> dict[str, float]:
        found = evaluate(trainer.evaluated, pair, "val", protocols=protocols, device=device)
        for domain, name in zip("ab", pair.domains, strict=True):
            if not found[f"{domain}.targets"]:
                what = "no user's validation target lies in it, and the best epoch is picked by both domains"
                raise ValueError(f"{pair.name}, domain {name}: {what}.")
        if f"a.{config.select}.mrr" not in found:
            raise ValueError(f"select={config.select!r} needs more items a domain than {pair.name} has: use 'full'.")
        return {f"val.{name}": value for name, value in found.items()}

    if state.epoch == 0:
        state.curves.append({"epoch": 0, **validate()})
    bar = Bar(total=config.epochs, initial=state.epoch, unit="epoch", disable=not sys.stderr.isatty(), leave=False)
    while state.epoch < config.epochs and state.waited < config.stop_patience:
        state.epoch += 1
        losses = yield from trainer.steps(learning_rate(config, state.epoch, state.cuts))
        row = {"epoch": state.epoch, **losses, **validate()}
        state.curves.append(row)
        quality = row[f"val.a.{config.select}.mrr"] + row[f"val.b.{config.select}.mrr"]
        if quality > state.best:
            state.best, state.best_epoch, state.waited, state.waited_at_lr = quality, state.epoch, 0, 0
            best_model = copy.deepcopy(trainer.evaluated.state_dict())
        elif state.epoch > config.warmup_epochs:
            state.waited += 1
            state.waited_at_lr += 1
            if state.waited_at_lr > config.plateau_patience:
                state.cuts, state.waited_at_lr = state.cuts + 1, 0
        now = clock.now()
        state.seconds = now - started
        if checkpoint is not None and save_cost <= CHECKPOINT_SHARE * (now - saved):
            _save(checkpoint, trainer, state, best_model)
            saved, save_cost = now, clock.now() - now
        loss = sum(value for name, value in row.items() if name.startswith("loss_"))
        log.info(
            "%s epoch %d: loss %.4f, val MRR %.4f (best %.4f at %d), lr %.1e, %.0f s",
            checkpoint.stem if checkpoint else config.model, state.epoch, loss, quality, state.best,
            state.best_epoch, row["lr"], state.seconds,
        )  # fmt: skip
        bar.set_postfix(loss=f"{loss:.3f}", mrr=f"{quality:.4f}", best=state.best_epoch)
        bar.update()
        if on_epoch is not None:
            on_epoch(state.epoch)
    bar.close()
    trainer.model.load_state_dict(best_model)
    return Fit(
        trainer.model, state.curves, state.best_epoch, state.waited >= config.stop_patience, clock.now() - started
    )  # fmt: skip


def _counted(config: RunConfig, pair: Pair) -> Fit:
    """A yardstick without parameters: evaluated, not trained."""
    started, model = time.perf_counter(), build_model(config, pair)
    found = {f"val.{name}": value for name, value in evaluate(model, pair, "val").items()}
    return Fit(model, [{"epoch": 0, **found}], 0, True, time.perf_counter() - started)


def _rng(device: torch.device) -> dict[str, Tensor | None]:
    """State of torch's generators, as a checkpoint keeps it."""
    return {
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state() if device.type == "cuda" else None,
    }


def _set_rng(states: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(states["torch_rng"])
    if device.type == "cuda" and states["cuda_rng"] is not None:
        torch.cuda.set_rng_state(states["cuda_rng"])


def _save(path: Path, trainer: Trainer, state: _State, best_model: dict[str, Tensor]) -> None:
    """Write a checkpoint beside its place and rename it, so that a reader finds the old one or the new one, whole."""
    content = {
        "config": trainer.config.model_dump(mode="json"),
        "data_sha256": trainer.pair.sha256,
        "state": vars(state),
        "model": trainer.model.state_dict(),
        "averaged": None if trainer.averaged is None else trainer.averaged.state_dict(),
        "best_model": best_model,
        "optimizer": trainer.optimizer.state_dict(),
        **_rng(trainer.device),
        "sampler": trainer.rng.bit_generator.state,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}")
    try:
        torch.save(content, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError for a full disk
        log.warning("%s could not be written (%s): the run goes on without it.", path, error)
    finally:
        temporary.unlink(missing_ok=True)


def _load(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:  # torch itself does not look at the checksums that it writes
        if damaged := archive.testzip():
            raise ValueError(f"{damaged} has another checksum than when it was written")
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return content


def _restore(content: dict[str, Any], path: Path, trainer: Trainer) -> tuple[_State, dict[str, Tensor]]:
    # by its fields, not by its text: it may be older than one of them, which then had its default
    if RunConfig(**content["config"]) != trainer.config or content["data_sha256"] != trainer.pair.sha256:
        raise ValueError(f"The checkpoint {path} belongs to another run: delete it to start this one anew.")
    trainer.model.load_state_dict(content["model"])
    if trainer.averaged is not None:
        trainer.averaged.load_state_dict(content["averaged"])
    trainer.optimizer.load_state_dict(content["optimizer"])
    _set_rng(content, trainer.device)
    trainer.rng.bit_generator.state = content["sampler"]
    best_model = {name: tensor.to(trainer.device) for name, tensor in content["best_model"].items()}
    return _State(**content["state"]), best_model

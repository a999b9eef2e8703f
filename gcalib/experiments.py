"""Runs: `run(config)` gives a record, from the store if it is there, else by training."""

from __future__ import annotations

import copy
import functools
import logging
import resource
import sys
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from gcalib.attention import GatedCrossAttention
from gcalib.config import RunConfig, run_id
from gcalib.data.errors import NoDataError
from gcalib.data.pair import DataError, Pair
from gcalib.data.sources import at_hand, load_pair
from gcalib.evaluation import evaluate
from gcalib.models import Recommender, build_model, matched
from gcalib.models.cost import flops_per_step, parameter_counts
from gcalib.records import RESULTS_VERSION, trace
from gcalib.store import RunStore
from gcalib.training import finish, fit_in_steps, pick_device

log = logging.getLogger("gcalib")
FRESH = 4  # draws of an untrained cross-attention that a null is the mean of


@functools.lru_cache(maxsize=4)
def _pair(name: str, ties: str, tie_seed: int, max_length: int, min_per_domain: int | None) -> Pair:
    return load_pair(name, ties=ties, tie_seed=tie_seed, max_length=max_length, min_per_domain=min_per_domain)


def pair_of(config: RunConfig, download: bool = True) -> Pair:
    """The pair of a config, with its tie order, maximum length and minimum (kept for the next call).

    Without `download` a pair that is not at hand is a `NoDataError`.
    """
    if not download and not at_hand(config.pair):
        raise NoDataError(f"{config.pair} is not at hand; load_pair({config.pair!r}) downloads what is public.")
    return _pair(config.pair, config.ties, config.tie_seed, config.max_length, config.min_per_domain)


def run(
    config: RunConfig, store: str | Path = "results", *, device: str = "auto", wait: bool = True
) -> dict[str, Any]:
    """Train, evaluate and measure one config, or fetch its record if the store has it.

    An interrupted run resumes from its checkpoint. A second process that asks for a run under way waits for it, or
    without `wait` raises `BusyError`.

    Returns
    -------
    dict
        The config's fields, `run_id`, `params_*` (see `parameter_counts`), `flops_per_step`,
        `seconds`, `peak_memory_bytes` (the process's, so of all seeds that it ran at once), `epochs_trained`,
        `best_epoch`, `stopped_early` (False: cut by `epochs`),
        `code_version`, `results_version`, `data_sha256`, `clock` (False: a per-domain
        pair, whose contexts may be later than their targets), and `<split>.<domain>...` figures of the best epoch
        (see `gcalib.evaluation.evaluate`; beside it `null_init_mean_abs` and `null_fresh_mean_abs`, of untrained
        cross-attention: set back to the run's start, and drawn anew).

    Raises
    ------
    DivergedError
        If the loss stops being finite; nothing is recorded.
    ValueError
        If the data is bad, or missing while the store has no such run.
    """
    return finish(run_in_steps(config, store, device=device, wait=wait))


def run_in_steps(
    config: RunConfig, store: str | Path = "results", *, device: str = "auto", wait: bool = True
) -> Generator[None, None, dict[str, Any]]:
    """`run`, with a pause after each training step (see `gcalib.training.fit_in_steps`); the run is held meanwhile."""
    config = config.canonical()
    runs = RunStore(store)
    try:
        pair = pair_of(config, download=False)
    except DataError:
        if (record := runs.find(config)) is not None:
            trace([record])  # nobody downloads data to read what is finished
            return record
        pair = pair_of(config)
    name = run_id(config, pair.sha256, RESULTS_VERSION)
    if (record := runs.get(name)) is None:
        with runs.lock(name, wait=wait):
            if runs.get(name) is None:
                checkpoint = runs.checkpoint_path(name)
                runs.put(*(yield from _compute(config, pair, name, checkpoint, pick_device(device))))
                checkpoint.unlink(missing_ok=True)
        record = runs.get(name)
        assert record is not None, f"{name} was stored a moment ago and is gone"
    trace([record])
    return record


def _compute(
    config: RunConfig, pair: Pair, name: str, checkpoint: Path, device: torch.device
) -> Generator[None, None, tuple[dict[str, Any], list[dict[str, float]]]]:
    _reset_peak_memory(device)
    twin = matched(config, pair) if config.match else None
    trained = twin.config if twin else config  # what is built and trained; the record keeps what was asked for
    done = yield from fit_in_steps(trained, pair, device, checkpoint)
    model = done.model
    figures: dict[str, float] = {}
    for split in ("val", "test"):
        figures |= {f"{split}.{key}": value for key, value in evaluate(model, pair, split).items()}
    if trained.gca:
        figures |= _untrained_cosines(model, trained, pair)
    record = {
        "run_id": name,
        **config.model_dump(),
        **parameter_counts(model),
        "flops_per_step": flops_per_step(model, pair, config.batch_size) if model.trained else 0,
        "seconds": done.seconds,
        "peak_memory_bytes": _peak_memory(device),
        "epochs_trained": len(done.curves) - 1,
        "best_epoch": done.best_epoch,
        "stopped_early": done.stopped_early,
        "code_version": _code_version(),
        "results_version": RESULTS_VERSION,
        "data_sha256": pair.sha256,
        "clock": pair.has_clock,
        "device": device.type,
        "threads": torch.get_num_threads(),
        **({} if twin is None else twin.facts()),
        **model.facts(),
        **figures,
    }
    return {**record, "gca": list(config.gca)}, done.curves


def _untrained_cosines(model: Recommender, config: RunConfig, pair: Pair) -> dict[str, float]:
    """Mean |cos(X, X')| of the trained model with its cross-attention untrained: the third null, in two forms.

    `null_init_mean_abs` sets the modules back to the start of the run, through which the rest was trained and to which
    it may have adapted: this is a level to compare with, not one of independence. `null_fresh_mean_abs` draws them
    anew, from seeds that the run has not seen, and is the mean over `FRESH` draws.
    """
    figures: dict[str, float] = {}
    mixed = copy.deepcopy(model)
    for seed in range(config.seed, config.seed + FRESH + 1):
        measure, draws = ("null_init_mean_abs", 1) if seed == config.seed else ("null_fresh_mean_abs", FRESH)
        _untrain(mixed, config, pair, seed)
        for split in ("val", "test"):
            for key, value in evaluate(mixed, pair, split, protocols=()).items():  # measured, not ranked
                point, _, name = key.rpartition(".")
                if name == "cos_mean_abs":
                    column = f"{split}.{point}.{measure}"
                    figures[column] = figures.get(column, 0.0) + value / draws
    return figures


def _untrain(model: Recommender, config: RunConfig, pair: Pair, seed: int) -> None:
    """Give every cross-attention of a model the weights that it has before training under a seed, in place."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        untrained = dict(build_model(config, pair).named_modules())
    for name, module in model.named_modules():
        if isinstance(module, GatedCrossAttention):
            module.load_state_dict(untrained[name].state_dict())


def _code_version() -> str:
    import gcalib

    return gcalib.__version__


def _reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        with suppress(OSError):  # some containers forbid it: then the peak is the process's so far
            Path("/proc/self/clear_refs").write_text("5")  # forget the process's earlier peak


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU, or of this process since the run began (since it began itself, outside Linux)."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("VmHWM:")[1].split()[0])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

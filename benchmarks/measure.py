"""What the benchmark measures: matrix peak, training steps, ranking, memory, loading and importing."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from padded import PaddedABXI, draw_for_each_position, pad_batch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import gcalib.evaluation
from gcalib import RunConfig, build_model
from gcalib.data import Pair
from gcalib.data.batches import length_batches
from gcalib.evaluation import EVAL_USERS, evaluate
from gcalib.models.cost import CPU_ATTENTION_FLOPS
from gcalib.training import Trainer

PRECISIONS = ("fp32", "bf16")
COMPARATOR_BYTES = 12e9  # it takes 9 to 10 GB at full size
KINDS = {
    "products": ("mm", "addmm", "bmm", "baddbmm"),
    "attention": ("_scaled_dot_product",),
    "moving": (
        "cat", "copy_", "embedding", "fill_", "gather", "index", "masked_fill", "repeat", "scatter", "slice", "stack",
        "zero_",
    ),
    "optimiser": ("_fused_adamw_",),
}  # fmt: skip
"""Kinds of operators by the beginnings of their names; what is of none of them goes over elements, one by one."""
FRESH_TRAINING = """
import sys, torch
from gcalib import RunConfig, load_pair
from gcalib.experiments import _peak_memory
from gcalib.evaluation import evaluate
from gcalib.training import Trainer
config = RunConfig.model_validate_json(sys.argv[1])
trainer = Trainer(config, load_pair(config.pair), torch.device("cpu"))
trainer.epoch(config.lr)
evaluate(trainer.model, trainer.pair, "val")
print(_peak_memory(torch.device("cpu")))
"""
FRESH_IMPORT = """
import sys, time
start = time.perf_counter()
import torch
torch_there = time.perf_counter()
import gcalib
there = time.perf_counter()
gcalib.load_pair(sys.argv[1])
print(there - start, torch_there - start, time.perf_counter() - there)
"""


def seconds(work: Callable[[], Any]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Stopwatch:
    """Time spent in functions that it has been wrapped around, by name, since the last `lap`."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            self.spent[name] = self.spent.get(name, 0.0) + time.perf_counter() - start
            return result

        return timed

    def lap(self, work: Callable[[], Any]) -> dict[str, float]:
        """Seconds of each wrapped function in one call of `work`, and "total"."""
        self.spent = {}
        total = seconds(work)
        return {**self.spent, "total": total}


def matrix_peak(sizes: tuple[int, ...], repeats: int = 5) -> dict[str, float]:
    """The machine's best GFLOP/s in square matrix products, by precision."""
    best = {}
    for precision, dtype in zip(PRECISIONS, (torch.float32, torch.bfloat16), strict=True):
        rates = []
        for n in sizes:
            x, y = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
            rates += [2e-9 * n**3 / seconds(lambda x=x, y=y: x @ y) for _ in range(repeats)]
        best[precision] = max(rates)
    return best


def kind(operator: str) -> str:
    """Of which of `KINDS` an operator of torch is, or "elementwise".

    >>> kind("aten::addmm"), kind("aten::native_layer_norm")
    ('products', 'elementwise')
    """
    name = operator.rpartition("::")[2]
    return next((kind for kind, names in KINDS.items() if name.startswith(names)), "elementwise")


def where_time_goes(trainer: Trainer, batches: list[np.ndarray]) -> dict[str, float]:
    """Shares of the time of training steps by kind of operator, as torch's profiler sees it; they add up to 1.

    The moving of rows is what computing no padding costs: gathering them before a layer, spreading them after it.
    """
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as watched:
        for users in batches:
            trainer.step(users)
    spent = dict.fromkeys([*KINDS, "elementwise"], 0.0)
    for operator in watched.key_averages():
        spent[kind(operator.key)] += operator.self_cpu_time_total
    return {name: time / sum(spent.values()) for name, time in spent.items()}


def our_step(config: RunConfig, pair: Pair, peak: float, repeats: int) -> dict[str, float]:
    """Times (ms) and arithmetic (GFLOP) of a training step, averaged over batches that stand for an epoch."""
    torch.manual_seed(0)
    trainer, watch = Trainer(config, pair, torch.device("cpu")), Stopwatch()
    trainer.model.train()
    batches = list(length_batches(trainer.lengths, config.batch_size, None))
    batches = [users for number, users in enumerate(batches) if number % 4 in (1, 2)]  # the middle of each four
    rows = statistics.mean(trainer.batch(users).rows for users in batches)
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION_FLOPS) as counter:  # also warms up
        for users in batches:
            trainer.step(users)
    counts = counter.get_flop_counts()["Global"]
    attention = sum(count for op, count in counts.items() if op in CPU_ATTENTION_FLOPS) / len(batches) / 1e9
    gflop = sum(counts.values()) / len(batches) / 1e9
    trainer.batch = watch.around("batch", trainer.batch)  # type: ignore[method-assign]
    trainer.model.loss = watch.around("forward", trainer.model.loss)  # type: ignore[method-assign]
    trainer.optimizer.step = watch.around("optimiser", trainer.optimizer.step)  # type: ignore[method-assign]
    laps = []
    for users in batches:
        runs = [watch.lap(lambda users=users: trainer.step(users)) for _ in range(repeats)]
        laps.append(sorted(runs, key=lambda run: run["total"])[repeats // 2])
    mean = {name: 1e3 * statistics.mean(lap[name] for lap in laps) for name in laps[0]}
    parts = {f"{name}_ms": mean[name] for name in ("batch", "forward", "optimiser")}
    rate = gflop / mean["total"] * 1e3
    return {
        "ms": mean["total"], **parts, "backward_ms": mean["total"] - sum(parts.values()), "rows": rows, "gflop": gflop,
        "gflop_in_attention": attention, "gflop_per_s": rate, "share_of_peak": rate / peak,
        **{f"share_{name}": share for name, share in where_time_goes(trainer, batches).items()},
    }  # fmt: skip


def padded_step(config: RunConfig, pair: Pair, repeats: int) -> float | None:
    """Time (ms) of the comparator's step, the best of some repeats; None where memory is short."""
    if config.batch_size * config.dim > 2**15 and free_memory() < COMPARATOR_BYTES:
        return None
    torch.manual_seed(0)
    trainer = Trainer(config, pair, torch.device("cpu"))
    model = PaddedABXI(trainer.model, config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    batches = list(length_batches(trainer.lengths, config.batch_size, None))
    users = batches[len(batches) // 2]  # padded, one batch is like another

    def step(users: np.ndarray) -> None:
        batch = pad_batch(trainer.batch(users), trainer.model.window)
        negatives = draw_for_each_position(batch, pair.num_items)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.precision == "bf16"):
            loss_a, loss_b = model.loss(batch, negatives)
        optimizer.zero_grad()
        (loss_a + loss_b).backward()
        optimizer.step()

    step(users[:8])  # warm-up
    return 1e3 * min(seconds(lambda: step(users)) for _ in range(repeats))


def free_memory() -> float:
    """Bytes that a process may still take (Linux; elsewhere taken for granted)."""
    info = Path("/proc/meminfo")
    return 1024 * float(info.read_text().split("MemAvailable:")[1].split()[0]) if info.exists() else float("inf")


def ranking(config: RunConfig, pair: Pair, repeats: int) -> dict[str, float]:
    """Milliseconds to rank every user's test target: `evaluate` and its parts, and the bare products."""
    torch.manual_seed(0)
    model, watch, split = build_model(config, pair).eval(), Stopwatch(), pair.split("test")
    owner = pair.domain_of(split.targets)
    chunks = list(length_batches(split.lengths, EVAL_USERS, None))
    sizes = [(int((owner[users] == domain).sum()), domain) for users in chunks for domain in (0, 1)]
    states = [(torch.randn(rows, config.dim), model.item_vectors(domain).detach()) for rows, domain in sizes]

    def products() -> None:
        for state, vectors in states:
            state @ vectors.T

    make_batch = gcalib.evaluation.make_batch
    model.forward = watch.around("model", model.forward)  # type: ignore[method-assign]
    gcalib.evaluation.make_batch = watch.around("batch", make_batch)
    found = {}
    try:
        for name, protocols in (("full", ("full",)), ("all", ("full", "s999", "s100"))):
            laps = [
                watch.lap(lambda p=protocols: evaluate(model, pair, "test", protocols=p, alignment=False))
                for _ in range(repeats + 1)
            ][1:]  # the first draws the candidates, once for a pair
            found[name] = min(laps, key=lambda lap: lap["total"] - lap["model"] - lap["batch"])
    finally:
        gcalib.evaluation.make_batch = make_batch
    bare = min(seconds(products) for _ in range(repeats + 1))
    full = found["full"]
    ranked = {name: lap["total"] - lap["model"] - lap["batch"] for name, lap in found.items()}
    return {
        "bare_product_ms": 1e3 * bare, "ranking_ms": 1e3 * ranked["full"],
        "ranking_with_sampled_ms": 1e3 * ranked["all"], "evaluate_ms": 1e3 * full["total"],
        "model_ms": 1e3 * full["model"], "batch_ms": 1e3 * full["batch"], "ratio": ranked["full"] / bare,
    }  # fmt: skip


def fresh(code: str, *arguments: str) -> list[float]:
    """Numbers printed by a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True)
    return [float(number) for number in done.stdout.split()]


def peak_memory(config: RunConfig) -> float:
    """Bytes at the worst moment of a process that loads the pair, trains for an epoch and validates."""
    return fresh(FRESH_TRAINING, config.model_dump_json())[0]


def loading(pair: str, repeats: int) -> dict[str, float]:
    """Seconds of `import gcalib`, of the `import torch` within it, and of loading a pair: the best of some repeats."""
    runs = [fresh(FRESH_IMPORT, pair) for _ in range(repeats)]
    imported, torch_alone, _ = min(runs)
    load = min(run[2] for run in runs)
    return {"import_s": imported, "import_torch_s": torch_alone, "torch_share": torch_alone / imported, "load_s": load}

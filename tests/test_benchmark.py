"""The benchmark compares two ways to one result, and prints what it measured."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import gcalib.experiments
from gcalib.config import RunConfig
from gcalib.data.batches import make_batch
from gcalib.models.abxi import ABXI

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
NUM_ITEMS = (20, 30)


@pytest.mark.parametrize(("gca", "published"), list(product([(), (0,)], [True, False])))
def test_the_padded_comparator_has_our_states_losses_and_gradients(
    gca: tuple[int, ...], published: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from padded import PaddedABXI, pad_batch

    torch.manual_seed(0)
    config = RunConfig(pair="tiny", dim=16, heads=2, gca=gca, dropout=0.0, max_length=12, as_published=published)
    model = ABXI(config, NUM_ITEMS).double()
    with torch.no_grad():  # at the start LoRA is silent and biases are zero
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    padded = PaddedABXI(model, config).double()
    rng = np.random.default_rng(1)
    learned = np.setdiff1d(np.arange(1, 51), [5, 6, 7, 45, 46])
    sequences = [rng.permutation(learned)[:length] for length in (10, 9, 7, 4, 2, 12)] + [np.array([1, 2, 3])]
    batch = make_batch(
        sequences, NUM_ITEMS[0], window=model.window, training=True, tails=model.reads_tails, as_published=published
    )
    spread = pad_batch(batch, model.window)
    slots = torch.bincount(batch.mixed.sequence)
    for ours, theirs, queries in zip(model(batch), padded(spread), batch.queries, strict=True):
        column = model.window - slots[queries.sequence] + queries.slot
        assert torch.equal(spread.targets[queries.sequence, column], queries.targets)
        assert torch.allclose(theirs[queries.sequence, column], ours, rtol=0, atol=1e-10)
    negatives = torch.tensor([5, 6, 7, 45, 46])  # nobody's target: ours would mask a hit, drawing would avoid it
    ours = tuple(model.loss(batch, negatives).values())
    theirs = padded.loss(spread, negatives.expand(*spread.targets.shape, -1))
    assert [loss.item() for loss in theirs] == pytest.approx([loss.item() for loss in ours], rel=1e-6)
    sum(ours).backward()
    sum(theirs).backward()
    copies = dict(padded.parts.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.allclose(copies[name].grad, parameter.grad, rtol=1e-5, atol=1e-6), name


def test_the_comparator_refuses_what_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from padded import PaddedABXI

    config = RunConfig(pair="tiny", dim=16, gca=(1,))
    with pytest.raises(ValueError, match=r"gca=\(1,\): the padded comparator knows cross-attention at point 0 only"):
        PaddedABXI(ABXI(config, NUM_ITEMS), config)


def test_the_quick_benchmark_measures_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import step as benchmark

    out = tmp_path / "bench.json"
    benchmark.main(["--quick", "--out", str(out)])
    printed = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert set(found["step"]) == {f"gca={gca} {precision}" for gca in ((), (0,)) for precision in ("fp32", "bf16")}
    assert found["peak_gflop_per_s"].keys() == found["peak_memory_bytes"].keys() == {"fp32", "bf16"}
    for step in found["step"].values():
        parts = step["batch_ms"] + step["forward_ms"] + step["backward_ms"] + step["optimiser_ms"]
        assert parts == pytest.approx(step["ms"]) and min(step.values()) > 0
        assert step["gflop"] > step["gflop_in_attention"]  # which torch counts for GPUs only
    for step in (*found["step"].values(), *found["models"].values()):
        shares = [step[f"share_{kind}"] for kind in ("products", "attention", "moving", "elementwise", "optimiser")]
        assert sum(shares) == pytest.approx(1) and min(shares) > 0
    named = {"aten::addmm": "products", "aten::index_select": "moving", "aten::native_layer_norm": "elementwise"}
    assert {name: benchmark.measure.kind(name) for name in named} == named
    assert found["step"]["gca=(0,) fp32"]["gflop"] > found["step"]["gca=() fp32"]["gflop"]
    assert found["ranking"]["ratio"] > 0 and found["ranking"]["evaluate_ms"] > found["ranking"]["ranking_ms"]
    assert 0 < found["loading"]["torch_share"] < 1 and found["loading"]["load_s"] > 0
    for line in ("faster than padded fp32", "share of peak", "peak memory", "against bare products", "import gcalib"):
        assert line in printed
    assert "MISSED" not in printed  # goals are for the real pair

    benchmark.main(["ranking", "--quick", "--out", str(out)])  # one part anew: the others stay
    again = json.loads(out.read_text())
    assert again["step"] == found["step"] and again["ranking"] != found["ranking"]
    with pytest.raises(SystemExit):
        benchmark.main(["ranking", "--out", str(out)])
    assert "was measured otherwise" in capsys.readouterr().err and json.loads(out.read_text()) == again


def test_the_quick_grid_benchmark_measures_every_part_but_the_cluster(tmp_path: Path) -> None:
    """`nodes` is left out: it takes long, and tests/test_grid.py has a cluster that loses a node."""
    out, parts = tmp_path / "grid.json", ["throughput", "overhead", "finished", "kills"]
    # in a process of its own: it forks, and pytest's may have threads
    command = [sys.executable, "-m", "gcalib", "bench", "grid", *parts, "--quick", "--out", str(out)]
    done = subprocess.run(command, cwd=BENCHMARKS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr  # the parts compare the records themselves, and fail if some differ
    found = json.loads(out.read_text())
    assert set(found) == {"torch", "quick", *parts}
    throughput, overhead = found["throughput"], found["overhead"]
    assert throughput["ratio"] == throughput["seconds_1"] / throughput["seconds_2"] > 0 and throughput["runs"] == 2
    for kind in ("loose_ms", "merged_ms"):
        assert overhead[kind].keys() == {"0", "20"} and all(0 < ms < 1000 for ms in overhead[kind].values())
    assert found["finished"]["runs"] == 50 and found["finished"]["seconds"] > 0
    assert found["kills"]["kills"] >= 4 and found["kills"]["differing_records"] == found["kills"]["files_left"] == 0
    assert done.stdout.count("overhead a run") == 4 and "MISSED" not in done.stdout  # goals are for the full size


def test_the_overhead_of_a_grid_is_without_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the benchmark's clock each run takes two minutes more, before its training and after it."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import grid as benchmark

    real, late = gcalib.experiments._compute, 0.0

    def slow(*arguments: Any) -> Any:
        nonlocal late
        late += 60
        computed = yield from real(*arguments)
        late += 60
        return computed

    monkeypatch.setattr(gcalib.experiments, "_compute", slow)
    monkeypatch.setattr(benchmark, "time", SimpleNamespace(perf_counter=lambda: time.perf_counter() + late))
    assert 0 < benchmark._beside(benchmark.grid_of(benchmark.TINY, 2), tmp_path) < 1 and late == 240


def test_the_flops_of_a_step_are_those_of_its_formula() -> None:
    """Attention, as records and the benchmark count it: 14 L^2 d for each of a stream's sequences."""
    from torch.utils.flop_counter import FlopCounterMode

    from gcalib.layers import SelfAttention
    from gcalib.models.cost import CPU_ATTENTION_FLOPS
    from gcalib.packing import Layout

    layout = Layout.of(torch.tensor([0, 0, 0, 1]), 2)
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION_FLOPS) as counter:
        SelfAttention(8, 2)(torch.randn(4, 8, requires_grad=True), [layout]).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    assert sum(counts[op] for op in CPU_ATTENTION_FLOPS) == 2 * 14 * 3**2 * 8
    assert sum(counts.values()) - 2 * 14 * 3**2 * 8 == 3 * 2 * 4 * 8 * (24 + 8)  # forward and both gradients

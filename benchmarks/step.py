"""Speed and memory of training, ranking, loading and importing: `python -m gcalib bench`.

Every ratio comes from one run on one machine, which should have nothing else to do. `bench step models` measures some
parts, and with `--out` those of an earlier run stay in the file.

- A training step is `gcalib.training.Trainer.step` at dim 256 and batch 256, over half the batches of an epoch (in
  order of length, the middle two of every four), each with the median of some repeats. The comparator is the same step
  as it is ordinarily written (`padded.py`), for which all batches are alike.
- Arithmetic is counted by torch, as for `flops_per_step` of a record: matrix products, and attention as 14 L^2 d for a
  sequence padded to length L in its batch (two products forward, five backward, hidden keys included).
  The machine's peak is the best rate of a large square product. What keeps a step from it is told by the shares of
  its time that go into products, attention, the moving of rows, the optimiser and all that works element by element.
- Ranking is `gcalib.evaluation.evaluate` on all users, protocol `full`, less the time in the model and in building
  batches; beside it the bare products of states and item vectors, in the same pieces.
- Memory is the largest resident set of a fresh process that loads the pair, makes steps and validates.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gcalib import RunConfig, load_pair
from gcalib.data import DataError, Pair

sys.path.insert(0, str(Path(__file__).parent))  # where runpy does not look
import measure  # noqa: E402

PAIR, QUICK_PAIR = "food-kitchen", "synthetic:num_users=200,items_a=300,items_b=320"
VARIANTS = ((), (0,))
MODELS: dict[str, dict[str, Any]] = {
    "abxi": {"model": "abxi"},
    "llm4cdsr": {"model": "llm4cdsr", "objective": "infonce"},
    "llm4cdsr, published loss": {"model": "llm4cdsr"},
    "cdsrnp": {"model": "cdsrnp", "objective": "infonce"},
    "cdsrnp, published loss": {"model": "cdsrnp"},
    "sasrec-mixed": {"model": "sasrec-mixed", "objective": "infonce"},
}
"""Every trained model, with early cross-attention where it has a place for it, and the loss that the study uses."""


@dataclass(frozen=True)
class Size:
    """How long to measure: widths of the square products, repeats of what is timed."""

    products: tuple[int, ...] = (2048, 4096)
    repeats: int = 3


def steps(config: RunConfig, pair: Pair, size: Size) -> dict[str, Any]:
    """ABXI's training step beside the padded one."""
    peak, found = measure.matrix_peak(size.products), {}
    for gca in VARIANTS:
        for precision in measure.PRECISIONS:
            name, now = f"gca={gca} {precision}", config.but(gca=gca, precision=precision)
            note(f"training step, {name}")
            step = measure.our_step(now, pair, peak[precision], size.repeats)
            note(f"the same, padded and with negatives for each position, {name}")
            step["padded_ms"] = measure.padded_step(now, pair, repeats=2)
            reference = found.get(f"gca={gca} fp32", step)["padded_ms"]
            step["times_faster"] = reference and reference / step["ms"]
            step["times_faster_same_precision"] = step["padded_ms"] and step["padded_ms"] / step["ms"]
            found[name] = step
    return {"peak_gflop_per_s": peak, "step": found}


def models(config: RunConfig, pair: Pair, size: Size) -> dict[str, Any]:
    """The training steps of all models, against one peak."""
    peak, found = measure.matrix_peak(size.products)["fp32"], {}
    for name, fields in MODELS.items():
        note(f"training step, {name}")
        now = config.but(**fields, **({} if name.startswith("sasrec") else {"gca": (0,)}))
        if name.startswith("llm4cdsr") and pair.name.startswith("synthetic"):
            now = now.but(text="hashed-words")
        found[name] = {**measure.our_step(now, pair, peak, size.repeats), "peak_memory_bytes": measure.peak_memory(now)}
    return {"models": found}


def memory(config: RunConfig, pair: Pair, size: Size) -> dict[str, Any]:
    """ABXI's memory, in both precisions."""
    note("memory")
    most = config.but(gca=VARIANTS[-1])
    return {"peak_memory_bytes": {p: measure.peak_memory(most.but(precision=p)) for p in measure.PRECISIONS}}


def ranking(config: RunConfig, pair: Pair, size: Size) -> dict[str, Any]:
    """Ranking all users; loading the pair, importing the package."""
    note("ranking, loading, importing")
    return {
        "ranking": measure.ranking(config, pair, size.repeats), "loading": measure.loading(config.pair, size.repeats)
    }  # fmt: skip


PARTS = {"step": steps, "models": models, "memory": memory, "ranking": ranking}


def table(found: dict[str, Any]) -> str:
    """The figures as text, the goals beside those that have one."""
    lines = [""]
    if peak := found.get("peak_gflop_per_s"):
        lines += [f"Peak of square products: fp32 {peak['fp32']:.0f}, bf16 {peak['bf16']:.0f} GFLOP/s", ""]
    rows = {**found.get("step", {}), **found.get("models", {})}
    if rows:
        header = (
            "training step", "ms", "batch", "forward", "backward", "optimiser", "rows", "GFLOP", "attention", "GFLOP/s",
            "padded ms",
        )  # fmt: skip
        lines.append(f"{header[0]:<26}" + "".join(f"{title:>11}" for title in header[1:]))
    for name, step in rows.items():
        values = [step[f"{part}ms"] for part in ("", "batch_", "forward_", "backward_", "optimiser_")]
        values += [step[key] for key in ("rows", "gflop", "gflop_in_attention", "gflop_per_s")]
        texts = [f"{value:,.1f}" for value in values] + [f"{step['padded_ms']:,.1f}" if step.get("padded_ms") else "-"]
        lines.append(f"{name:<26}" + "".join(f"{text:>11}" for text in texts))
    if rows:
        kinds = ("products", "attention", "moving", "elementwise", "optimiser")
        lines += ["", f"{'share of the time in':<26}" + "".join(f"{name:>13}" for name in kinds)]
        lines += [
            f"{name:<26}" + "".join(f"{step[f'share_{part}']:>13.0%}" for part in kinds)
            for name, step in rows.items() if f"share_{kinds[0]}" in step
        ]  # fmt: skip
    if held := found.get("peak_memory_bytes"):
        lines += ["", f"Peak memory of training: fp32 {held['fp32'] / 1e9:.2f} GB, bf16 {held['bf16'] / 1e9:.2f} GB"]
    if rank := found.get("ranking"):
        lines.append(
            f"Ranking all users: bare products {rank['bare_product_ms']:.0f} ms, ranking {rank['ranking_ms']:.0f} ms "
            f"({rank['ranking_with_sampled_ms']:.0f} with s999 and s100), whole evaluation {rank['evaluate_ms']:.0f} "
            f"ms of which model {rank['model_ms']:.0f} and batches {rank['batch_ms']:.0f}"
        )
    lines += ["", f"{'ratio or cost':<58}{'measured':>10}{'goal':>10}"]
    for label, value, goal, unit, met in goals(found):
        verdict = "" if found["quick"] or not goal else "not measured" if value is None else "met" if met else "MISSED"
        lines.append(f"{label:<58}{'-' if value is None else f'{value:.2f}{unit}':>10}{goal:>10}  {verdict}".rstrip())
    return "\n".join(lines)


def goals(found: dict[str, Any]) -> list[tuple[str, float | None, str, str, bool]]:
    """Each goal of the measured parts: what, measured (None if it was not), the goal, the unit, whether it is met."""
    rows: list[tuple[str, float | None, str, str, bool]] = []
    for name, step in found.get("step", {}).items():
        precision = name.split()[-1]
        faster, same, share = (step[key] for key in ("times_faster", "times_faster_same_precision", "share_of_peak"))
        least, least_share = (10, 60) if precision == "fp32" else (20, 45)
        rows.append((f"step {name}: faster than padded fp32", faster, f">= {least}", "x", (faster or 0) >= least))
        if precision == "bf16":
            rows.append((f"step {name}: faster than padded bf16", same, "", "x", True))
        rows.append((f"step {name}: share of peak", 100 * share, f">= {least_share}", "%", 100 * share >= least_share))
    for name, step in found.get("models", {}).items():
        share, held = 100 * step["share_of_peak"], step["peak_memory_bytes"] / 1e9
        rows.append((f"step {name}: share of peak", share, ">= 60", "%", share >= 60))
        rows.append((f"step {name}: peak memory", held, "< 4", " GB", held < 4))
    if "peak_memory_bytes" in found:
        held = max(found["peak_memory_bytes"].values()) / 1e9
        rows.append(("peak memory of training", held, "< 3", " GB", held < 3))
    if "ranking" in found:
        rank, load = found["ranking"], found["loading"]
        rows.append(("full ranking against bare products", rank["ratio"], "<= 2", "x", rank["ratio"] <= 2))
        rows.append((f"loading {found['pair']}", load["load_s"], "< 2", " s", load["load_s"] < 2))
        rows.append(("import gcalib", load["import_s"], "< 3", " s", load["import_s"] < 3))
        rows.append(("share of import torch in it", 100 * load["torch_share"], "> 50", "%", load["torch_share"] > 0.5))
    return rows


def note(text: str) -> None:
    """Progress goes to stderr; the table alone goes to stdout."""
    print(f"... {text}", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description="Speed and memory, as ratios from one run.")
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; default all")
    parser.add_argument("--pair", default=PAIR, help=f"pair to measure on (default {PAIR})")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file; other parts' figures in it stay")
    parser.add_argument("--quick", action="store_true", help="on a tiny pair, where no goal applies")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"{', '.join(sorted(unknown))}: the parts are {', '.join(PARTS)}")
    config, size = RunConfig(pair=options.pair, dim=256, batch_size=256), Size()
    if options.quick:
        config, size = RunConfig(pair=QUICK_PAIR, dim=16, batch_size=32), Size(products=(256,), repeats=1)
    try:
        pair = load_pair(config.pair)
    except DataError as error:
        note(f"{error} Measuring on the synthetic pair instead: its figures say nothing about {options.pair}.")
        config = config.but(pair="synthetic")
        pair = load_pair(config.pair)
    found: dict[str, Any] = {
        "pair": pair.name, "dim": config.dim, "batch_size": config.batch_size, "torch": torch.__version__,
        "threads": torch.get_num_threads(), "quick": options.quick,
    }  # fmt: skip
    if options.out and options.out.exists():
        before = json.loads(options.out.read_text())
        if any(before.get(name) != value for name, value in found.items()):
            parser.error(f"{options.out} was measured otherwise: {', '.join(f'{n} {before.get(n)}' for n in found)}.")
        found = before
    note(f"{pair.name}, dim {config.dim}, batch {config.batch_size}, {torch.get_num_threads()} threads")
    for part in options.parts or PARTS:
        found |= PARTS[part](config, pair, size)
        if options.out:
            options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()

"""The command line: `python -m gcalib pairs | run | grid | notebooks | site | results | compact | bench`."""

from __future__ import annotations

import logging
import runpy
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from typer.core import TyperGroup

if TYPE_CHECKING:
    from gcalib.config import Profile

INTERRUPTED = 130  # exit code: 128 and the number of the signal


class _Commands(TyperGroup):
    """The commands, of which each answers `Ctrl-C` with a sentence, as typer does not."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            typer.echo(str(error) or "Interrupted.", err=True)
            sys.exit(INTERRUPTED)


app = typer.Typer(
    cls=_Commands, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__
)


@app.command()
def pairs(
    download: Annotated[bool, typer.Option(help="fetch the public files that are missing")] = False,
) -> None:
    """List the pairs: where they were found, whether their hashes are right, their statistics, what reading dropped."""
    from gcalib.data.sources import report

    frame = report(download=download)
    for row in frame.to_dict("records"):
        typer.secho(f"{row['name']}", bold=True)
        for column, value in row.items():
            if column != "name" and value is not None and value == value and value != "":
                typer.echo(f"  {column:18s} {value:.3f}" if isinstance(value, float) else f"  {column:18s} {value}")
    if "verified" in frame and (frame["verified"] == False).any():  # noqa: E712 - missing files are neither
        raise typer.Exit(1)


@app.command()
def run(
    pair: Annotated[str, typer.Option(help="name or path of a pair")] = "synthetic",
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="a RunConfig field, as key=value; YAML values, e.g. gca=[0]")
    ] = None,
    store: Annotated[str, typer.Option(help="folder of the run store")] = "results",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Train and measure one config, or show its record if the store has it."""
    from pydantic import ValidationError

    from gcalib.config import RunConfig, faults
    from gcalib.experiments import run as run_config

    fields = {}
    for text in setting or []:
        key, equals, value = text.partition("=")
        if not equals or key not in RunConfig.model_fields:
            raise ValueError(f"--set {text}: write key=value with a key of {', '.join(RunConfig.model_fields)}.")
        try:
            fields[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"--set {text}: {value!r} is no YAML value.") from None
    try:
        config = RunConfig(**{"pair": pair, **fields})
    except ValidationError as error:
        raise ValueError(f"The run cannot be set so: {faults(error)}.") from None
    record = run_config(config, store, device=device)
    for key, value in record.items():
        typer.echo(f"{key:40s} {value:.6g}" if isinstance(value, float) else f"{key:40s} {value}")


@app.command()
def grid(
    profile: Annotated[str, typer.Option(help="a profile of params/ that has a grid, by name or file")],
    workers: Annotated[int | None, typer.Option(help="processes that share the cores; default the profile's")] = None,
    engine: Annotated[str, typer.Option(help="local, or ray for a cluster (RAY_ADDRESS)")] = "local",
    cpus: Annotated[float | None, typer.Option(help="ray: cores that a run needs; default 1")] = None,
    gpus: Annotated[float | None, typer.Option(help="ray: GPUs that a run needs, such as 0.25; default 0")] = None,
    gather: Annotated[bool, typer.Option(help="ray: the nodes do not see the store; bring records here")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    seeds_at_once: Annotated[int, typer.Option(help="seeds of a config in one process, in turns; for a GPU")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what it would cost, run nothing")] = False,
) -> None:
    """Run the grid of a profile: what is stored is not run again, what was interrupted goes on."""
    from gcalib.estimates import estimate, learnable
    from gcalib.grid import finished, run_grid
    from gcalib.store import RunStore

    if workers is not None and workers < 1:
        raise ValueError(f"--workers {workers}: it must be 1 or more.")
    asked = _profile(profile)
    configs = asked.grid_configs()
    if not configs:
        raise ValueError(f"The profile {asked.profile} has no grid.")
    workers = workers or asked.workers
    missing = [c for c, name in zip(configs, finished(configs, asked.store), strict=True) if name is None]
    plan = estimate(missing, learnable(RunStore(asked.store)))
    hours = plan["seconds"].sum() / 3600
    guessed = f", {int((plan['learned_from'] == 0).sum())} of them guessed" if (plan["learned_from"] == 0).any() else ""
    typer.echo(
        f"{len(configs)} runs, {len(configs) - len(missing)} of them stored. The other {len(missing)} need about "
        f"{hours:.1f} hours of one process{guessed}, {hours / workers:.1f} hours with {workers}, and up to "
        f"{plan['bytes'].max() / 1e9 if len(plan) else 0:.1f} GB each."
    )
    if not dry_run:
        cluster = {"cpus": cpus, "gpus": gpus, "gather": gather or None}
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's word for Ctrl-C
        run_grid(
            configs, asked.store, engine=engine, workers=workers, device=device, seeds_at_once=seeds_at_once,  # type: ignore[arg-type]
            **{name: value for name, value in cluster.items() if value is not None},
        )  # fmt: skip


def _profile(name: str) -> Profile:
    """A profile by its name, or the file at a path."""
    from gcalib.config import Profile

    path = Path(name)
    return Profile.load(path.stem, path.parent) if path.suffix == ".yaml" and path.is_file() else Profile.load(name)


@app.command()
def notebooks(
    names: Annotated[list[str] | None, typer.Argument(help="beginnings of file names, such as 00; default all")] = None,
    profile: Annotated[str, typer.Option(help="a profile of params/, by name or file")] = "smoke",
    out: Annotated[Path, typer.Option(help="folder of the executed copies")] = Path("build/notebooks"),
    in_place: Annotated[bool, typer.Option(help="execute for a commit, each on the profile it names")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="keep the copies that are still right")] = False,
    check: Annotated[bool, typer.Option(help="execute nothing; say what is wrong with the committed ones")] = False,
) -> None:
    """Execute the notebooks in order and write an index; go on after a failure in one."""
    from gcalib import shelf
    from gcalib.config import PARAMS

    paths = shelf.notebooks(names or ())
    if check:
        wrong = [sentence for path in paths for sentence in shelf.faults(path)]
        typer.echo("\n".join(wrong) or f"{len(paths)} notebooks, nothing wrong")
        raise typer.Exit(bool(wrong))
    if in_place and resume:
        raise ValueError("--resume keeps executed copies; it goes with --out, not with --in-place.")
    named = "" if in_place else _profile(profile).profile  # a misspelt one is found now, not in each notebook
    if Path(profile).suffix == ".yaml" and Path(profile).resolve().parent != PARAMS.resolve():
        raise ValueError(f"--profile {profile}: a notebook reads its profile from {PARAMS}/; put the file there.")
    outcomes = []
    for outcome in shelf.execute(paths, None if in_place else out, None if in_place else named, resume=resume):
        outcomes.append(outcome)
        typer.echo(f"{outcome.name:40s} {outcome.seconds:6.1f} s  {outcome.status}")
    if not in_place:
        typer.echo(f"Open {shelf.write_index(outcomes, out, named)}")
    if failed := sum(outcome.error is not None for outcome in outcomes):
        typer.echo(f"{failed} of {len(outcomes)} notebooks failed")
        raise typer.Exit(1)


@app.command()
def site(out: Annotated[Path, typer.Option(help="folder of the pages")] = Path("build/site")) -> None:
    """Write the executed notebooks as web pages that work offline, with a front page; execute nothing."""
    from gcalib import pages, shelf

    if not (paths := shelf.notebooks()):
        raise ValueError("There is no notebooks/ folder with notebooks here: run this in the root of the repository.")
    typer.echo(f"Open {pages.write_site(paths, out)}")


@app.command()
def results(store: Annotated[str, typer.Option(help="folder of the run store")] = "results") -> None:
    """Print the finished runs of a store, a line each; a stale one says what has changed since."""
    from gcalib.store import RunStore, load_results

    RunStore(store).advise()
    frame = load_results(store, stale=True)
    if frame.empty:
        typer.echo(f"{store} holds no finished run")
        return
    marks = ["stale"] if frame["stale"].any() else []
    wanted = marks + ["pair", "model", "gca", "gate", "heads", "dim", "ties", "precision", "seed", "epochs_trained"]
    figures = [f"test.{d}.{p}.ndcg@10" for p in ("full", "s999") for d in "ab"]
    shown = frame.set_index("run_id")[[c for c in wanted + figures if c in frame]].sort_values(["pair", "gca", "seed"])
    typer.echo(shown.to_string(float_format="{:.4f}".format))


@app.command()
def compact(store: Annotated[str, typer.Option(help="folder of the run store")] = "results") -> None:
    """Merge the records of a store into one file, and the curves: quicker to read, and one line for pandas."""
    from gcalib.store import RunStore

    typer.echo(f"{store}: {RunStore(store).compact()} runs in one file")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Measure speed and memory, or with `bench grid` grids (`benchmarks/`; further options go to the script)."""
    arguments = list(context.args)
    name = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "step"
    if name not in ("step", "grid"):
        raise ValueError(f"There is no benchmark {name!r}; there are step and grid.")
    script = Path("benchmarks") / f"{name}.py"
    if not script.exists():
        raise ValueError(f"There is no {script} here: run this in the root of the repository.")
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def main() -> None:
    """Run the command line; what the user did wrong is one sentence, without a traceback."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("papermill").setLevel(logging.WARNING)
    try:
        app()
    except (ValueError, OSError, RuntimeError) as error:
        typer.echo(" ".join(str(error).split()), err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()

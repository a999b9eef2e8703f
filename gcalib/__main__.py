"""The command line: `gcalib pairs | run | grid | notebooks | site | results | compact`."""

from __future__ import annotations

import logging
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from pydantic import ValidationError
from typer.core import TyperGroup

from gcalib.config import Profile, RunConfig, faults

INTERRUPTED = 130  # exit code: 128 and the number of the signal


class _Commands(TyperGroup):
    """The commands, of which each answers Ctrl-C with a sentence, as typer does not."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            typer.echo(str(error) or "Interrupted.", err=True)
            sys.exit(INTERRUPTED)


app = typer.Typer(
    cls=_Commands, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__
)
Store = Annotated[str, typer.Option(help="folder of the run store")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda")]
ProfileName = Annotated[str, typer.Option(help="a profile of params/, by name or file")]


@app.command()
def pairs(
    download: Annotated[bool, typer.Option("--download", help="fetch the public files that are missing")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="check the hashes of the files")] = False,
) -> None:
    """List the pairs: where their files are, and how large they are."""
    from gcalib.data.sources import report

    frame = report(download=download, verify=verify)
    typer.echo(frame.drop(columns="problem").dropna(axis="columns", how="all").to_string(index=False))
    missing = frame["found"] == "missing"
    for problem in frame.loc[~missing & frame["problem"].ne(""), "problem"]:
        typer.echo(problem)
    if missing.any():
        typer.echo("`gcalib pairs --download` fetches what is public; load_pair says of a pair what else it needs.")
    raise typer.Exit(int(frame["verified"].eq(False).any()))


@app.command()
def run(
    pair: Annotated[str, typer.Option(help="name or path of a pair")] = "synthetic",
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="a RunConfig field, as key=value; YAML values, e.g. gca=[0]")
    ] = None,
    store: Store = "results",
    device: Device = "auto",
    keep_model: Annotated[bool, typer.Option("--keep-model", help="keep the weights for load_model")] = False,
) -> None:
    """Train and measure one config, or show its record if the store has it."""
    from gcalib.experiments import run as run_config

    try:
        fields = {key: yaml.safe_load(value) for key, _, value in (text.partition("=") for text in setting or [])}
        config = RunConfig(**{"pair": pair, **fields})
    except yaml.YAMLError:
        raise ValueError(f"--set {' --set '.join(setting or [])}: write key=value with a YAML value.") from None
    except ValidationError as error:
        raise ValueError(f"The run cannot be set so: {faults(error)}.") from None
    for key, value in run_config(config, store, device=device, keep_model=keep_model).items():
        typer.echo(f"{key:40s} {value:.6g}" if isinstance(value, float) else f"{key:40s} {value}")


@app.command()
def grid(
    profile: ProfileName,
    workers: Annotated[int | None, typer.Option(min=1, help="processes; default the profile's")] = None,
    engine: Annotated[str, typer.Option(help="local, or ray for a cluster (RAY_ADDRESS)")] = "local",
    cpus: Annotated[float | None, typer.Option(help="ray: cores that a run needs; default 1")] = None,
    gpus: Annotated[float | None, typer.Option(help="ray: GPUs that a run needs, such as 0.25; default 0")] = None,
    gather: Annotated[bool, typer.Option("--gather", help="ray: the nodes do not see the store")] = False,
    device: Device = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what is left, run nothing")] = False,
) -> None:
    """Run the grid of a profile: what is stored is not run again, what was interrupted goes on."""
    from gcalib.experiments import plan, run_grid

    asked = _profile(profile)
    configs, workers = asked.grid_configs(), workers or asked.workers
    left = plan(configs, asked.store)
    unknown = f", {left['unknown']} of them like no stored run and not counted" if left["unknown"] else ""
    hours = f"{left['hours']:.1f} hours of one process, {left['hours'] / workers:.1f} with {workers}"
    typer.echo(f"{left['runs']} runs, {left['left']} of them left{unknown}: about {hours}.")
    if not dry_run:
        cluster = {name: value for name, value in (("cpus", cpus), ("gpus", gpus), ("gather", gather)) if value}
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's word for Ctrl-C
        run_grid(configs, asked.store, engine=engine, workers=workers, device=device, **cluster)  # type: ignore[arg-type]


def _profile(name: str) -> Profile:
    """A profile by its name, or the file at a path."""
    path = Path(name)
    return Profile.load(path.stem, path.parent) if path.suffix == ".yaml" and path.is_file() else Profile.load(name)


@app.command()
def notebooks(
    names: Annotated[list[str] | None, typer.Argument(help="beginnings of file names, such as 00; default all")] = None,
    profile: ProfileName = "smoke",
    out: Annotated[Path, typer.Option(help="folder of the executed copies")] = Path("build/notebooks"),
    in_place: Annotated[bool, typer.Option("--in-place", help="for a commit, each on the profile it names")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="keep the copies that are still right")] = False,
    check: Annotated[bool, typer.Option("--check", help="say what is wrong with the committed ones")] = False,
) -> None:
    """Execute the notebooks in order and write an index; go on after a failure in one."""
    from gcalib.publish import notebooks as publish

    paths = publish.notebooks(names or ())
    if check:
        wrong = [sentence for path in paths for sentence in publish.faults(path)]
        typer.echo("\n".join(wrong) or f"{len(paths)} notebooks, nothing wrong")
        raise typer.Exit(bool(wrong))
    # a notebook reads its profile by name, from params/
    named = None if in_place else Profile.load(Path(profile).stem).profile
    outcomes = []
    for outcome in publish.execute(paths, None if in_place else out, named, resume=resume):
        outcomes.append(outcome)
        typer.echo(f"{outcome.name:40s} {outcome.seconds:6.1f} s  {outcome.status}")
    if named:
        typer.echo(f"Open {publish.write_index(outcomes, out, named)}")
    if failed := sum(outcome.error is not None for outcome in outcomes):
        typer.echo(f"{failed} of {len(outcomes)} notebooks failed")
        raise typer.Exit(1)


@app.command()
def site(out: Annotated[Path, typer.Option(help="folder of the pages")] = Path("build/site")) -> None:
    """Write the executed notebooks as web pages that work offline, with a front page; execute nothing."""
    from gcalib.publish import notebooks as publish
    from gcalib.publish.site import write_site

    if not (paths := publish.notebooks()):
        raise ValueError("There is no notebooks/ folder with notebooks here: run this in the root of the repository.")
    typer.echo(f"Open {write_site(paths, out)}")


@app.command()
def results(store: Store = "results") -> None:
    """Print the finished runs of a store, a line each."""
    from gcalib.store import load_results

    if (frame := load_results(store)).empty:
        typer.echo(f"{store} holds no finished run")
        return
    frame["match"] = frame["match"].fillna("")
    has_gate = frame["gca"].map(len).gt(0) & frame["match"].eq("")
    frame[["gate", "heads"]] = frame[["gate", "heads"]].astype("object").where(has_gate, "")
    frame["gca"] = frame["gca"].map(lambda points: "+".join(map(str, points)))
    keys = ["pair", "model", "gca", "match", "gate", "heads", "dim", "seed"]
    figures = [name for name in ("test.a.full.ndcg@10", "test.b.full.ndcg@10") if name in frame]
    shown = frame.sort_values([*keys[:4], "dim", "seed"])[["run_id", *keys, "best_epoch", *figures]]
    typer.echo(shown.to_string(index=False, float_format="{:.4f}".format))


@app.command()
def compact(store: Store = "results") -> None:
    """Merge the runs of a store into two files: quicker to read, and one line for pandas."""
    from gcalib.store import RunStore

    typer.echo(f"{store}: {RunStore(store).compact()} runs in two files")


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

"""The command line: `gcalib pairs | run | grid | notebooks | site | results | compact`."""

from __future__ import annotations

import signal

if __name__ == "__main__":  # Ctrl-C ends quietly while the rest is imported
    signal.signal(signal.SIGINT, signal.SIG_DFL)

# ruff: noqa: E402
import logging
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
import yaml
from pydantic import ValidationError

from gcalib.config import Profile, RunConfig, faults

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
Store = Annotated[str, typer.Option(help="folder of the run store")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda")]
ProfileName = Annotated[str, typer.Option(help="a profile of params/, by name or file")]


def _fields(settings: list[str] | None) -> dict[str, Any]:
    """Settings that read key=value, the value in YAML."""
    return {key: yaml.safe_load(value) for key, _, value in (text.partition("=") for text in settings or [])}


@app.command()
def pairs(
    path: Annotated[str | None, typer.Argument(help="of one pair, or its name: what was read and dropped")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", help="a field of RunConfig, e.g. columns='{user: 0, item: 1}'")
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="fetch the public files that are missing")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="check the hashes of the files")] = False,
) -> None:
    """List the pairs: where their files are, and how large they are; or say what is in one of them."""
    from gcalib.data.sources import report, summary

    if path is not None:
        from gcalib.experiments import pair_of

        typer.echo(summary(pair_of(RunConfig(**{"pair": path, **_fields(setting)}))))
        return
    frame = report(download=download, verify=verify)
    typer.echo(frame.drop(columns="problem").dropna(axis="columns", how="all").to_string(index=False))
    for problem in frame.loc[frame["found"].ne("missing") & frame["problem"].ne(""), "problem"]:
        typer.echo(problem)
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
    from gcalib.data.pair import NoDataError
    from gcalib.data.sources import summary
    from gcalib.experiments import pair_of
    from gcalib.experiments import run as run_config

    config = RunConfig(**{"pair": pair, **_fields(setting)})
    with suppress(NoDataError):  # the store may have the run all the same
        typer.echo(summary(pair_of(config, download=False)) + "\n")
    for key, value in run_config(config, store, device=device, keep_model=keep_model).items():
        typer.echo(f"{key:40s} {value:.6g}" if isinstance(value, float) else f"{key:40s} {value}")


@app.command()
def grid(
    profile: ProfileName,
    workers: Annotated[int | None, typer.Option(min=1, help="processes; default the profile's")] = None,
    engine: Annotated[Literal["local", "ray"], typer.Option(help="ray: the cluster of RAY_ADDRESS")] = "local",
    cpus: Annotated[float, typer.Option(help="ray: cores that a run needs")] = 1,
    gpus: Annotated[float, typer.Option(help="ray: GPUs that a run needs, such as 0.25")] = 0,
    device: Device = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what is left, run nothing")] = False,
) -> None:
    """Run the grid of a profile: what is stored is not run again, what was interrupted goes on."""
    from gcalib.experiments import plan, run_grid

    asked = Profile.load(profile)
    configs, workers = asked.grid_configs(), workers or asked.workers
    left = plan(configs, asked.store)
    hours = f"{left['hours']:.1f} hours of one process, {left['hours'] / workers:.1f} with {workers}"
    typer.echo(f"{left['left']} of {left['runs']} runs left: {hours}; {left['unknown']} without a comparable record.")
    if not dry_run:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # a batch system's word for Ctrl-C
        run_grid(configs, asked.store, engine=engine, workers=workers, device=device, cpus=cpus, gpus=gpus)


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
    named = None if in_place else Profile.load(profile).profile
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
    keys = ["pair", "model", "gca", "match", "dim", "seed"]
    frame["data"] = frame["data_sha256"].str[:8]
    alike = frame[frame.duplicated(keys, keep=False)].groupby(keys)  # rows that would look like one another
    others = [name for name in (*RunConfig.model_fields, "data") if name not in (*keys, "gate", "heads")]
    keys += [name for name in others if name in frame and alike[name].nunique().gt(1).any()]
    figures = [name for name in ("test.a.full.ndcg@10", "test.b.full.ndcg@10") if name in frame]
    shown = frame.sort_values(keys)[["run_id", *keys, "gate", "heads", "best_epoch", *figures]]
    typer.echo(shown.to_string(index=False, float_format="{:.4f}".format))


@app.command()
def compact(store: Store = "results") -> None:
    """Merge the runs of a store into two files: quicker to read, and one line for pandas."""
    from gcalib.store import RunStore

    typer.echo(f"{store}: {RunStore(store).compact()} runs in two files")


def main() -> None:
    """Run the command line; what the user did wrong is one sentence, without a traceback."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("papermill").setLevel(logging.WARNING)
    try:
        app()
    except (ValueError, OSError, RuntimeError, yaml.YAMLError) as error:
        sentence = faults(error) if isinstance(error, ValidationError) else str(error)
        typer.echo(" ".join(sentence.split()), err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()

"""The command ``soaa``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from optimizers.ablation import spectrum_command
from optimizers.ablation.errors import AblationError

app = typer.Typer(
    name="soaa",
    help="Second-order optimizers for PyTorch: compare them, and look at what was found.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
console = Console()
errors = Console(stderr=True)
# columns that a terminal 80 wide has room for; the files have all
NARROW = ("cell", "lr", "validation loss", "test metric", "steps to target", "ms/step")


def main() -> None:
    """Run the command; a mistake of the user is one line on standard error and exit code 2."""
    try:
        app()
    except AblationError as error:
        errors.print(f"[bold red]error:[/] {_escaped(error)}", highlight=False, soft_wrap=True)
        sys.exit(2)


def _version(asked: bool) -> None:
    if asked:
        from optimizers.ablation import environment

        installed = {name: environment.version(name) for name in ("soaa", "torch", "optuna")}
        console.print(
            ", ".join(f"{name} {version or 'not installed'}" for name, version in installed.items())
        )
        raise typer.Exit


@app.callback()
def _command(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show versions and exit.")
    ] = False,
) -> None:
    pass


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        errors.print("interrupted: finished runs are on disk, the same command continues", highlight=False)
        raise typer.Exit(130) from None


def _escaped(message: object) -> str:
    from rich.markup import escape

    return escape(str(message))


def _listed(values: list[str] | None) -> tuple[str, ...]:
    """Options that are repeated or separated by blanks; commas separate where no cell option uses them."""
    names: list[str] = []
    for value in values or []:
        names += [value] if ":" in value else [name for name in value.split(",") if name]
    return tuple(names)


@app.command()
def ablate(
    config: Annotated[
        str | None,
        typer.Argument(
            help="TOML or YAML file, or a name of soaa list; options override.", show_default=False
        ),
    ] = None,
    config_option: Annotated[
        str | None, typer.Option("--config", help="The same as CONFIG.", show_default=False)
    ] = None,
    workload: Annotated[
        str | None, typer.Option("--workload", "-w", help="See soaa list.  (default: digits)")
    ] = None,
    optimizer: Annotated[
        list[str] | None,
        typer.Option("--optimizer", "-o", help="name or name:option=value,option=value; again for more."),
    ] = None,
    curvature: Annotated[
        list[str] | None, typer.Option("--curvature", "-c", help="Rows of a grid, a,b or repeated.")
    ] = None,
    trust_region: Annotated[
        list[str] | None, typer.Option("--trust-region", "-t", help="Columns of that grid, a,b or repeated.")
    ] = None,
    lr: Annotated[
        str | None,
        typer.Option("--lr", help="Learning rates, a,b,c.  (default: four in each written range)"),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option("--seeds", help="How many, or which: 5 or 0,7,8.  (default: 3)")
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", help="Training steps.  (default: the workload's)")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Samples a step.  (default: the workload's)")
    ] = None,
    tune: Annotated[
        int | None,
        typer.Option("--tune", help="Trials a cell in the written search space.  (default: 0, no tuning)"),
    ] = None,
    tune_seed: Annotated[
        int | None, typer.Option("--tune-seed", help="Seed of the trials, none of --seeds.  (default: 1000)")
    ] = None,
    extensions: Annotated[
        int | None,
        typer.Option("--extensions", help="How often a search goes on beyond an edge.  (default: 2)"),
    ] = None,
    interleave: Annotated[
        bool | None,
        typer.Option("--interleave/--no-interleave", help="Cells take turns, for times to be compared."),
    ] = None,
    schedule: Annotated[
        str | None, typer.Option("--schedule", help="constant or cosine.  (default: constant)")
    ] = None,
    warmup: Annotated[
        float | None, typer.Option("--warmup", help="Fraction of the steps.  (default: 0.0)")
    ] = None,
    evaluations: Annotated[
        int | None, typer.Option("--evaluations", help="Points of a curve.  (default: 20)")
    ] = None,
    evaluation_samples: Annotated[
        int | None,
        typer.Option(
            "--evaluation-samples",
            help="Of a split, for every loss.  (default: the workload's on curves, else all)",
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", help="Of PyTorch in each run.  (default: 1)")
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", help="Runs at the same time.  (default: 1)")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, ...  (default: cpu)")] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, float64, bfloat16.  (default: float32)")
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            "--storage",
            help="Study database that shares runs: sqlite:///FILE, postgresql://... or mysql://...",
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Results folder; the same folder continues.")] = Path(
        "soaa-results"
    ),
) -> None:
    """Compare optimizers, or any grid of curvature x trust region, on a workload."""
    from optimizers.ablation.config import Ablation
    from optimizers.ablation.config_file import read_study

    if config and config_option:
        raise AblationError(f"give one configuration, got {config!r} and --config {config_option!r}")
    asked: dict[str, Any] = {
        "workload": workload,
        "optimizers": _listed(optimizer) or None,
        "curvature": _listed(curvature) or None,
        "trust_region": _listed(trust_region) or None,
        "learning_rates": _numbers("--lr", lr, float),
        "seeds": _seeds(seeds),
        "steps": steps,
        "batch_size": batch_size,
        "tune": tune,
        "tune_seed": tune_seed,
        "extensions": extensions,
        "interleave": interleave,
        "schedule": schedule,
        "warmup": warmup,
        "evaluations": evaluations,
        "evaluation_samples": evaluation_samples,
        "threads": threads,
        "workers": workers,
        "device": device,
        "dtype": dtype,
        "storage": storage,
    }
    overrides = {name: value for name, value in asked.items() if value is not None}
    chosen = config or config_option
    _run((Ablation(**overrides),) if chosen is None else read_study(chosen, overrides), out)


def _run(ablations: Any, out: Path) -> None:
    from optimizers.ablation.ablate import ablate_study

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with _interruptible(), Progress(*columns, console=errors, transient=True) as progress:
        task = progress.add_task("checking", total=None)
        done: dict[str, int] = {}

        def start(runs: list[Any], steps: int) -> None:
            progress.update(task, total=steps, description=f"{len(runs)} runs")

        def step(run: Any, count: int) -> None:
            done[run.key] = count
            name = f"{run.workload}: {run.cell.label} seed {run.seed}"
            progress.update(task, completed=sum(done.values()), description=name[:40])

        outcomes = ablate_study(ablations, out, step, start)
    for outcome in outcomes:
        _print_outcome(outcome)
    failed = [row for outcome in outcomes for row in outcome.rows if row.error]
    for row in failed:
        errors.print(f"[red]failed:[/] {_escaped(row.cell.label)}: {_escaped(row.error)}", highlight=False)
    if failed:
        raise typer.Exit(1)


def _print_outcome(outcome: Any) -> None:
    from optimizers.ablation import results, workload

    problem = workload.get(outcome.ablation.workload)
    goal, whose = results.target(outcome.best, problem.target)
    table = Table(title=problem.summary, title_justify="left", box=None, pad_edge=False)
    titles = {
        "validation metric": f"validation {problem.metric_name}",
        "test metric": f"test {problem.metric_name}",
    }
    shown = [name for name, _ in results.COLUMNS if console.width >= 150 or name in NARROW]
    for position, name in enumerate(shown):
        # two lines of a title, and no number broken over lines: the cell's name takes what room is left
        title = titles.get(name, name).replace(" to ", " to\n").replace("validation ", "validation\n")
        table.add_column(
            title.replace("test ", "test\n"),
            justify="left" if position == 0 else "right",
            overflow="fold",
            no_wrap=position > 0,
        )
    for row in outcome.table():
        table.add_row(*(_escaped(row[name]) for name in shown))
    console.print(table)
    if whose:
        measure = problem.target.replace("_", " ")
        console.print(
            f"target: {measure} <= {goal:.4g}, the median of {whose}, the best first-order baseline here"
        )
    console.print("learning rates were chosen by validation loss; ± is the standard deviation over seeds")
    console.print(f"table.md, table.csv, curves.png and runs/ are in {outcome.folder}", soft_wrap=True)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Results folder of an ablation or a study.")] = Path(
        "soaa-results"
    ),
) -> None:
    """Write report.html (one file that needs nothing else), report.md, CSV tables and PNG figures."""
    from optimizers.ablation.report import report as write_report

    with _interruptible():
        path = write_report(folder)
    console.print(f"{path}, report.md, tables (CSV) and figures/ (PNG)", soft_wrap=True)


@app.command("list")
def list_names() -> None:
    """List workloads, configurations, optimizers, curvature and trust regions."""
    from optimizers.ablation import adapter, workload
    from optimizers.ablation.config_file import studies

    table = Table(box=None, pad_edge=False)
    table.add_column("kind", style="dim")
    table.add_column("name", style="bold", no_wrap=True)
    table.add_column("what it is", overflow="fold")
    for name in workload.names():
        table.add_row("workload", name, _escaped(workload.get(name).summary))
    table.add_section()
    for name, summary in studies().items():
        table.add_row("configuration", name, _escaped(summary))
    for kind, names in sorted(adapter.available().items()):
        table.add_section()
        for name in names:
            table.add_row(
                kind.replace("_", " ").removesuffix("s"), name, _escaped(adapter.summary(kind, name))
            )
    console.print(table)


app.command("spectrum")(spectrum_command.spectrum)


@app.command()
def show(
    run: Annotated[str, typer.Argument(help="Key of a run, or the start of it.")],
    out: Annotated[Path, typer.Option("--out", help="Results folder.")] = Path("soaa-results"),
) -> None:
    """Show one finished run: configuration, result, versions and machine."""
    import json

    from optimizers.ablation.store import Store

    if not (out / "runs").is_dir():
        raise AblationError(f"{out} holds no results: name the folder that soaa ablate wrote with --out")
    record = Store(out).load(run)
    shown = {
        name: record[name]
        for name in ("key", "status", "error", "config", "result", "environment")
        if name in record
    }
    console.print_json(json.dumps(shown))


def _numbers(option: str, text: str | None, kind: type) -> tuple[Any, ...] | None:
    if text is None:
        return None
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        example = "1e-3,1e-2" if kind is float else "3 or 0,1,2"
        raise AblationError(
            f"{option} must be numbers separated by commas, such as {example}, got {text!r}"
        ) from None


def _seeds(text: str | None) -> int | tuple[int, ...] | None:
    numbers = _numbers("--seeds", text, int)
    if numbers is None:
        return None
    return int(numbers[0]) if len(numbers) == 1 else numbers

"""`tilewright tune`: measures tiles of a model's kernels, and leaves records that the next compile uses."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tilewright.commands.compile import MODEL_HELP

_LOGS = typer.Option(metavar="DIR", help="Where tuning records are; by default that of the installation.")


class _Group(TyperGroup):
    """`tune MODEL` is `tune run MODEL`: what is no subcommand's name belongs to it."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Group,
    help="Measure the tiles of a model's kernels on this machine, and keep the best: tune MODEL.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command("run")
def run(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP)] = None,
    target: Annotated[str, typer.Option(help="What to tune for: cpu, cuda, or a named machine.")] = "auto",
    workload: Annotated[
        str, typer.Option(metavar="decode|prefill|mixed|FILE", help="The steps that count, and how often each runs.")
    ] = "mixed",
    list_: Annotated[bool, typer.Option("--list", help="Show the tasks, and measure nothing.")] = False,
    budget: Annotated[str, typer.Option(metavar="TIME", help="How long to measure: 90s, 20m, 2h.")] = "20m",
    trials: Annotated[int | None, typer.Option(help="Candidates to measure at most.")] = None,
    until: Annotated[float, typer.Option(help="The fraction of its floor at which a task is done.")] = 0.95,
    logs: Annotated[Path | None, _LOGS] = None,
    weights: Annotated[str, typer.Option(metavar="auto|random:SEED", help="As for compile.")] = "auto",
    quant: Annotated[str, typer.Option(metavar="auto|none|FORMAT", help="As for compile.")] = "auto",
    max_batch: Annotated[int | None, typer.Option(help="As for compile.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="As for compile.")] = None,
    page_size: Annotated[int, typer.Option(help="As for compile.")] = 16,
    strict: Annotated[bool, typer.Option("--strict", help="As for compile.")] = False,
    export: Annotated[
        Path | None, typer.Option(metavar="TASKS.tar", help="Compile candidates into a bundle, and measure nothing.")
    ] = None,
    measure: Annotated[
        Path | None, typer.Option(metavar="TASKS.tar", help="Measure a bundle here; the records go into TASKS.jsonl.")
    ] = None,
    import_: Annotated[
        Path | None, typer.Option("--import", metavar="TASKS.jsonl", help="Take in what --measure left.")
    ] = None,
) -> None:
    """Tune MODEL's kernels on this machine. An interrupted sweep goes on when it is started again."""
    from tilewright import tuning
    from tilewright.compiler import env
    from tilewright.compiler.build import compile_options
    from tilewright.compiler.errors import UserError
    from tilewright.progress_display import compile_progress

    folder = logs or env.tuning_logs()
    given = [name for name, value in (("MODEL", model), ("--measure", measure), ("--import", import_)) if value]
    if len(given) != 1:
        found = " and ".join(given) or "none"
        raise UserError(f"tune takes one of MODEL, --measure and --import, and was given {found}")
    if measure is not None:
        _measure(measure)
        return
    if import_ is not None:
        _merge([import_], folder)
        return
    assert model is not None
    seconds = tuning.parse_budget(budget)
    _check(trials, until)
    options = compile_options(target, weights, quant, max_batch, max_tokens, page_size, strict)
    if not list_ and export is None:
        tuning.check_measurable(options.target)
    with compile_progress() as report:
        plan = tuning.plan(model, options, workload, report)
    if list_:
        _list(plan, folder)
    elif export is not None:
        _export(plan, export, folder, trials)
    else:
        _sweep(plan, folder, seconds, trials, until)


def _check(trials: int | None, until: float) -> None:
    from tilewright.compiler.errors import UserError

    if trials is not None and trials < 1:
        raise UserError(f"--trials is {trials}; give a number from 1 on")
    if not 0 < until <= 1:
        raise UserError(f"--until is {until:g}; give a fraction of the floor above 0, up to 1")


def _list(found: Any, logs: Path) -> None:
    from tilewright import tuning
    from tilewright.tune_display import show_plan

    records, problems = tuning.records_of(found, logs)
    _warn(problems)
    show_plan(found, tuning.present(found, records))


def _sweep(found: Any, logs: Path, seconds: float, trials: int | None, until: float) -> None:
    from tilewright import console, tuning
    from tilewright.tune_display import show_sweep, sweep_display
    from tilewright.tuner.sweep import Budget

    with sweep_display() as observe:
        state, problems = tuning.sweep(found, logs, Budget(seconds, trials), until, observe)
    _warn(problems)
    show_sweep(state)
    console.note(f"records are in {logs}; tilewright compile uses them")


def _export(found: Any, file: Path, logs: Path, trials: int | None) -> None:
    from tilewright import console, tuning
    from tilewright.compiler.progress import Progress
    from tilewright.progress_display import compile_progress

    with compile_progress() as report:
        count, failed = tuning.export(
            found, file, logs, trials, lambda done, total: report(Progress("kernels", done, total))
        )
    print(file)
    made = f"{count} candidates of {len(found.tasks)} tasks, {failed} did not compile"
    console.note(f"{made}; measure them with tilewright tune --measure {file}")


def _measure(file: Path) -> None:
    from tilewright import console, tuning

    def done(record: Any, count: int, total: int) -> None:
        outcome = record.failure or f"{record.us:.4g} us"
        console.note(f"{count} of {total}: {record.schedule} m={record.rows} {outcome}")

    output, count = tuning.measure(file, done)
    print(output)
    console.note(f"{count} records; take them in with tilewright tune --import {output}")


@app.command("merge")
def merge(
    sources: Annotated[list[Path], typer.Argument(metavar="SOURCE...", help="Files of records, or log folders.")],
    logs: Annotated[Path | None, _LOGS] = None,
) -> None:
    """Take records from elsewhere into the log folder. Of two of one candidate the later counts."""
    from tilewright.compiler import env

    _merge(sources, logs or env.tuning_logs())


def _merge(sources: list[Path], logs: Path) -> None:
    from tilewright.tuner.log import merge as merge_records

    found, kept, problems = merge_records(sources, logs)
    _warn(problems)
    print(f"{kept} of {found} records taken into {logs}")


@app.command("report")
def report(
    logs: Annotated[Path | None, _LOGS] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The page.")] = Path("tuning.html"),
) -> None:
    """Write what the records say as a page: each task's way to its best tile, and a roofline."""
    from tilewright.compiler import env
    from tilewright.tuner.report import write_report

    _warn(write_report(logs or env.tuning_logs(), output))
    print(output)


def _warn(problems: list[str]) -> None:
    from tilewright import console

    for problem in problems:
        console.warn(problem)

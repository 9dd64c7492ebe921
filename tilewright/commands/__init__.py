"""One file a command. Each imports what it needs when it runs, so that `--help` and `doctor` stay quick."""

from typing import Any

import typer
from typer.core import TyperGroup

from tilewright.commands import bench, bench_serve, chat, compile, doctor, generate, inspect, serve, tune, verify


def register(app: typer.Typer) -> None:
    """Adds every command, in the order of the help."""
    app.command("compile")(compile.command)
    app.command("generate")(generate.command)
    app.command("chat")(chat.command)
    app.command("serve")(serve.command)
    app.command("inspect")(inspect.command)
    app.command("verify")(verify.command)
    app.add_typer(_benches(), name="bench")
    app.add_typer(tune.app, name="tune")
    app.command("doctor")(doctor.command)


class _Benches(TyperGroup):
    """`bench ARTIFACT KIND` beside `bench serve URL`: a first word that names no subcommand is an artifact."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["artifact", *args]
        return super().parse_args(ctx, args)


def _benches() -> typer.Typer:
    benches = typer.Typer(cls=_Benches, help="Time an artifact, or a server under load.", no_args_is_help=False)
    benches.command("artifact", help="Time an artifact: `bench ARTIFACT KIND` for short.")(bench.command)
    benches.command("serve")(bench_serve.command)
    return benches

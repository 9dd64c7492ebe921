"""One file a command. Each imports what it needs when it runs, so that `--help` and `doctor` stay quick."""

import typer

from tilewright.commands import bench, chat, compile, doctor, generate, inspect, serve, tune, verify


def register(app: typer.Typer) -> None:
    """Adds every command, in the order of the help."""
    app.command("compile")(compile.command)
    app.command("generate")(generate.command)
    app.command("chat")(chat.command)
    app.command("serve")(serve.command)
    app.command("inspect")(inspect.command)
    app.command("verify")(verify.command)
    app.command("bench")(bench.command)
    app.add_typer(tune.app, name="tune")
    app.command("doctor")(doctor.command)

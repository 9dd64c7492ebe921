"""The `tilewright` command: its subcommands, and what becomes of an error.

Exit codes: 0 done; 1 a bug in tilewright, or a device that failed; 2 bad input, with one sentence that says what to do;
130 interrupted.
"""

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from tilewright import __version__, commands, console
from tilewright.compiler import env
from tilewright.compiler.errors import UserError

EXIT_BUG = EXIT_DEVICE = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class _Group(TyperGroup):
    """Ends an interrupted command, or one whose reader has gone, before typer can report it in its own way."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _interrupted()
        except BrokenPipeError:
            _reader_gone()


app = typer.Typer(
    name="tilewright",
    cls=_Group,
    help="Compile a language model into one sealed artifact, and serve it.",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
commands.register(app)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tilewright {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits: the entry point of the installed program."""
    try:
        env.check()
        command = typer.main.get_command(app)
        code = command.main(args=None if argv is None else list(argv), prog_name="tilewright", standalone_mode=False)
        sys.stdout.flush()
    except UserError as error:
        _fail(str(error))
    except BrokenPipeError:
        _reader_gone()
    except (KeyboardInterrupt, typer.Abort):
        _interrupted()
    except Exception as error:
        # The usage errors of typer, whichever copy of click it carries.
        if hasattr(error, "format_message"):
            _fail(_usage(error))
        if _of_device(error):
            _device_failed(error)
        _bug(error)
    sys.exit(code if isinstance(code, int) else 0)


def _usage(error: Any) -> str:
    message = " ".join(error.format_message().split()).rstrip(".")
    context = getattr(error, "ctx", None)
    return f"{message}; see {context.command_path if context else 'tilewright'} --help"


def _fail(text: str) -> NoReturn:
    console.error(" ".join(text.split()))
    sys.exit(EXIT_BAD_INPUT)


def _interrupted() -> NoReturn:
    """Says so and leaves. What still runs in threads is waited for; a second interrupt ends the process at once."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    console.err().print("interrupted")
    sys.exit(EXIT_INTERRUPTED)


def _reader_gone() -> NoReturn:
    """The reader of our output has closed it (`| head`): nothing is left to say, at exit too."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)


def _of_device(error: BaseException) -> bool:
    """Whether a device failed while it was used; what serves loads late, and only then there is such an error."""
    types = sys.modules.get("tilewright.runtime.types")
    return types is not None and isinstance(error.__cause__ or error, types.DeviceError)


def _device_failed(error: Exception) -> NoReturn:
    console.error(" ".join(f"{error}; nvidia-smi shows its state, and the kernel's log why".split()))
    sys.exit(EXIT_DEVICE)


def _bug(error: Exception) -> NoReturn:
    if env.debug():
        traceback.print_exception(error)
    else:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        console.error(f"a bug in tilewright ({text}); run again with {env.DEBUG}=1 for the traceback, and report it")
    sys.exit(EXIT_BUG)

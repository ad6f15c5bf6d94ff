"""The application that the commands are registered on: options for all commands, and errors turned into one line and an exit code."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from graphprune.cli.screen import Screen
from graphprune.errors import GraphPruneError

_GLOBAL_FLAGS = ("--json", "--quiet", "-q")
_USAGE_CODE = 2


class OneLineErrors(TyperGroup):
    """A group of commands that says what is wrong in one line on stderr, and takes the options of the program behind a command as well."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Moves the options that hold for all commands to the front; without any arguments, asks for help."""
        end = args.index("--") if "--" in args else len(args)
        flags = [argument for argument in args[:end] if argument in _GLOBAL_FLAGS]
        others = [argument for argument in args[:end] if argument not in _GLOBAL_FLAGS]
        return super().parse_args(ctx, [*flags, *others, *args[end:]] if args else ["--help"])

    def main(self, *args: Any, **options: Any) -> Any:
        """Runs the command and exits with its code; a `GraphPruneError` or a wrong usage is one line and exit code 2."""
        if not options.get("standalone_mode", True):
            return super().main(*args, **options)
        options["standalone_mode"] = False  # errors are raised, so that they can be told here
        try:
            code = super().main(*args, **options)
        except GraphPruneError as error:
            _complain(str(error))
            sys.exit(_USAGE_CODE)
        except typer.Abort:
            _complain("aborted")
            sys.exit(1)
        except Exception as error:  # what typer raises on wrong usage is told by its method: its class has moved between releases
            message = getattr(error, "format_message", None)
            if message is None:
                raise
            _complain(message())
            sys.exit(getattr(error, "exit_code", _USAGE_CODE))
        sys.exit(code if isinstance(code, int) else 0)


def _complain(message: str) -> None:
    """Writes one line to stderr."""
    sys.stderr.write(f"error: {' '.join(message.split())}\n")


app = typer.Typer(
    cls=OneLineErrors,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    """Prints the version and exits, where that was asked for."""
    if wanted:
        from graphprune import __version__

        sys.stdout.write(f"graphprune {__version__}\n")
        raise typer.Exit


@app.callback()
def program(
    ctx: typer.Context,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout, and nothing else there.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors (and the JSON that was asked for).")] = False,
    _version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_show_version)] = False,
) -> None:
    """Structural pruning for PyTorch: trace, prune, verify, export and time a model.

    --json and --quiet may stand before or behind the command.
    """
    ctx.obj = Screen.open(json=json, quiet=quiet)
    if json:
        ctx.with_resource(redirect_stdout(sys.stderr))  # what the user's own model prints may not mix with the JSON

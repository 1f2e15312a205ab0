"""Train many LoRA adapters of one frozen base model together, plan such trainings, and measure them."""

import errno
import io
import logging
import os
import signal
import sys
from importlib.metadata import version as version_of
from typing import Annotated

import typer
from pydantic import ValidationError

from lorafusion.cli.common import CommandLine
from lorafusion.cli.lab import lab_app, reproduce_app
from lorafusion.cli.patch import patch_app
from lorafusion.cli.plan import plan_app
from lorafusion.cli.train import train_app
from lorafusion.cli.workload import workload_app
from lorafusion.core.log import start_logging
from lorafusion.core.schema import UserError, shown

app = CommandLine(help=__doc__, add_completion=True)
for group in (train_app, patch_app, workload_app, reproduce_app):
    app.add_typer(group)
app.add_typer(plan_app, name="plan")
app.add_typer(lab_app, name="lab")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"lorafusion {version_of('lorafusion')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="print the version")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="say more of what is done")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="say only what is wrong")] = False,
) -> None:
    """Train many LoRA adapters of one frozen base model together, plan such trainings, and measure them."""
    if verbose and quiet:
        raise UserError("--verbose, --quiet: expected one of them at most, found both")
    start_logging(logging.DEBUG if verbose else logging.WARNING if quiet else None)


def main() -> None:
    """Entry point: a user's mistake is a line and status 2."""
    _fill_standard_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file's name may be no text
    os.environ["MPLBACKEND"] = "agg"  # figures are drawn to files
    os.environ["PYTHONSAFEPATH"] = "1"  # no process that is started runs a queue.py of the folder it is called in
    status = 2
    try:
        _check_folder()
        if "" in sys.argv[1:]:  # which typer takes for this folder where a path belongs
            raise UserError(f"{sys.argv[sys.argv.index('', 1) - 1]}: expected a value after it, found an empty word")
        status = app(prog_name="lorafusion", standalone_mode=False)
        sys.stdout.flush()
    except UserError as error:
        print(*(f"error: {line}" for line in str(error).splitlines()), sep="\n", file=sys.stderr)
    except typer.TyperException as error:  # of a command that is called wrongly
        print(_usage_error(error), file=sys.stderr)
    except (KeyboardInterrupt, typer.Abort):
        status = 128 + signal.SIGINT
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC) or error.filename is not None:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python tries to write at its end too
        if error.errno == errno.ENOSPC:
            status = 2
            print(f"error: standard output: {error.strerror}", file=sys.stderr)
    sys.exit(status)


def _fill_standard_streams() -> None:
    """A caller may have closed them. Files that are opened would get their places then, and what is said to them."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdout, sys.stderr = sys.stdout or os.fdopen(1, "w"), sys.stderr or os.fdopen(2, "w")


def _check_folder() -> None:
    """The folder that paths start from: whoever calls may stand in one that is gone."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise UserError("the folder in which this is called has been removed") from None


def _usage_error(error: typer.TyperException) -> str:
    """One line; or the help, where a group was called without a command."""
    message, context = error.format_message(), getattr(error, "ctx", None)
    if message.startswith("Usage: "):
        return message
    more = f" (see {context.command_path} --help)" if context else ""
    cause = error.__cause__
    value = f" (found {shown(cause.errors()[0]['input'])})" if isinstance(cause, ValidationError) else ""
    return f"error: {UserError(message.rstrip('.') + value + more)}"


if __name__ == "__main__":
    main()

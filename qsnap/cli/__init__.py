"""The command line: parse, run, render. Nothing below this package knows click or rich.

Modules that take time to load are imported where a command needs them, so that ``qsnap --version`` and the
shell's completion stay quick.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import click

from qsnap import __version__
from qsnap.cli.commands import everyday, job, series
from qsnap.errors import EXIT_TABLE, BadUsage, Interrupted, QsnapError

#: Set by the scripts of ``qsnap completion``: what they ask for.
COMPLETE_VARIABLE = "_QSNAP_COMPLETE"


def main() -> NoReturn:
    """Run the command, say what went wrong, exit with its code.

    A list takes 0.1 s, and a quarter of that would go into collecting the garbage of imports and into taking
    the interpreter apart at the end. Both are left out; all that is open has been closed by then.
    """
    gc.disable()
    if instruction := os.environ.get(COMPLETE_VARIABLE):
        from qsnap.cli.completion import answer

        os._exit(answer(cli, instruction))
    _prepare_streams()
    code = _exit_code(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        # Whoever read our output may have gone; what was asked for is done all the same.
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _prepare_streams() -> None:
    """A closed stream becomes one that takes everything, and no character is one too many for any."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 (for good)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _exit_code(arguments: list[str]) -> int:
    # Where the line cannot be parsed, what stands before "--"; else what the command was given
    told = {"as_json": "--json" in arguments[: arguments.index("--") if "--" in arguments else None]}
    try:
        code = cli.main(arguments, prog_name="qsnap", standalone_mode=False, obj=told)
    except click.exceptions.Exit as done:
        return done.exit_code
    except (click.Abort, KeyboardInterrupt):
        return _said(Interrupted(signal.SIGINT), told["as_json"])
    except click.exceptions.NoArgsIsHelpError as error:
        with suppress(OSError):
            sys.stderr.write(error.format_message() + "\n")
        return BadUsage.exit_code
    except click.ClickException as error:
        return _said(BadUsage(_usage_message(error)), told["as_json"])
    except QsnapError as error:
        return _said(error, told["as_json"])
    return code if isinstance(code, int) else 0


def _said(error: QsnapError, as_json: bool) -> int:
    """The error's exit code, shown."""
    from qsnap.cli.output.show import show_error

    show_error(error, as_json=as_json)
    return error.exit_code


def _usage_message(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    hint = f" (see {context.command_path} --help)" if context else ""
    return " ".join(error.format_message().split()) + hint


def _exit_table() -> str:
    rows = "\n".join(f"  {code:<9} {meaning.replace('**', '').replace('`', '')}" for code, meaning in EXIT_TABLE)
    return f"\b\nExit codes:\n{rows}"


_HELP = {"help_option_names": ["-h", "--help"]}


@click.group(context_settings=_HELP, epilog=_exit_table())
@click.version_option(__version__, prog_name="qsnap", message="%(prog)s %(version)s")
def cli() -> None:
    """Named, checked, restorable snapshots of running QEMU guests, from the monitor socket alone."""


for _command in (
    everyday.save, everyday.load, everyday.list_, everyday.show, everyday.delete, everyday.check, everyday.status,
    everyday.recover, everyday.vms, everyday.completion, everyday.demo,
    series.prune, series.protect, series.unprotect, series.describe, job.run, job.ensure,
):  # fmt: skip
    cli.add_command(_command)

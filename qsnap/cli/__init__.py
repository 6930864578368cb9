"""The command line: parse, run, render. Nothing below this package knows click or rich.

Modules that take time to load are imported where a command needs them, so that ``qsnap --version`` and the
shell's completion stay quick.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib import import_module
from typing import NoReturn

import click

from qsnap import __version__
from qsnap.cli.words import ALIASES, SHARED, meant_by, verb_first
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
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, PTH123 (for good; pathlib is slow to load)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _exit_code(arguments: list[str]) -> int:
    if not arguments:  # before click, whose versions differ here
        with suppress(OSError):
            sys.stderr.write(cli.get_help(click.Context(cli, info_name="qsnap", **cli.context_settings)) + "\n")
        return BadUsage.exit_code
    arguments = verb_first(arguments)
    # Before the line is parsed, whatever is before "--"; then what the command was given
    output = {"as_json": "--json" in arguments[: arguments.index("--") if "--" in arguments else None]}
    try:
        code = cli.main(arguments, prog_name="qsnap", standalone_mode=False, obj=output)
    except click.exceptions.Exit as done:
        return done.exit_code
    except (click.Abort, KeyboardInterrupt):
        return _shown(Interrupted(signal.SIGINT), output["as_json"])
    except click.ClickException as error:
        return _shown(BadUsage(_usage_message(error)), output["as_json"])
    except QsnapError as error:
        return _shown(error, output["as_json"])
    return code if isinstance(code, int) else 0


def _shown(error: QsnapError, as_json: bool) -> int:
    """Show the error, and return its exit code."""
    from qsnap.cli.output.show import show_error

    show_error(error, as_json=as_json)
    return error.exit_code


def _usage_message(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    hint = f" (see {context.command_path} --help)" if context else ""
    if isinstance(error, click.NoSuchOption) and context:
        return _without_option(error.option_name, context) + hint
    return " ".join(error.format_message().split()) + hint


def _without_option(word: str, context: click.Context) -> str:
    """What to say of a wrong option: the one that is spelt like it, or the commands that have it."""
    from difflib import get_close_matches

    def options_of(command: click.Command) -> list[str]:
        return [name for one in command.params if not getattr(one, "hidden", False) for name in one.opts]

    message = f"{word} is not an option."
    if near := get_close_matches(word, options_of(context.command), 1, 0.75):
        return f"{message} Did you mean {near[0]!r}?"
    if word in SHARED:
        return f"{context.info_name} has no option {word}"
    if others := ", ".join(name for name, command in cli.commands.items() if word in options_of(command)):
        if context.parent is None:
            return f"{word} comes after the command; these have it: {others}"
        return f"{context.info_name} has no option {word}; these have it: {others}"
    return message


def _exit_table() -> str:
    rows = "\n".join(f"  {code:<9} {meaning.replace('**', '').replace('`', '')}" for code, meaning in EXIT_TABLE)
    return f"\b\nExit codes:\n{rows}"


#: Under which heading of the help each command is, and its module in ``cli.commands``.
_COMMANDS = {
    "Snapshots": {
        "check": "guest", "save": "save", "list": "snapshots", "tree": "snapshots", "show": "snapshots",
        "load": "snapshots", "undo": "snapshots", "delete": "snapshots", "verify": "snapshots",
    },
    "The guest": {"status": "guest", "pause": "guest", "resume": "guest", "recover": "guest"},
    "Series and notes": {"prune": "series", "protect": "notes", "unprotect": "notes", "describe": "notes"},
    "Elsewhere": {"export": "elsewhere", "boot": "elsewhere"},
    "Around a command": {"run": "job", "ensure": "job"},
    "This machine": {"vms": "guest", "demo": "guest", "completion": "guest", "help": "guest"},
}  # fmt: skip
_MODULES = {name: module for commands in _COMMANDS.values() for name, module in commands.items()}


class _Commands(Mapping[str, click.Command]):
    """The commands; the module of one is loaded when it is asked for."""

    def __getitem__(self, name: str) -> click.Command:
        module = import_module(f"qsnap.cli.commands.{_MODULES[name]}")
        return next(one for one in vars(module).values() if isinstance(one, click.Command) and one.name == name)

    def __iter__(self) -> Iterator[str]:
        return iter(_MODULES)

    def __len__(self) -> int:
        return len(_MODULES)


class _Group(click.Group):
    """A group whose help has its commands under headings."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, ALIASES.get(cmd_name, cmd_name))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        word = args[0]
        if not word.startswith("-") and self.get_command(ctx, word) is None:
            meant = meant_by(word, _MODULES)
            raise click.UsageError(
                f"There is no command {word!r}." + (f" Did you mean {meant!r}?" if meant else ""), ctx
            )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = formatter.width - 6 - max(map(len, _MODULES))
        for heading, names in _COMMANDS.items():
            with formatter.section(heading):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(width)) for name in names])
        with formatter.section("Other names"):
            names_of = {name: [alias for alias, one in ALIASES.items() if one == name] for name in ALIASES.values()}
            formatter.write_text(", ".join(f"{' or '.join(others)} for {name}" for name, others in names_of.items()))


@click.group(
    cls=_Group, commands=_Commands(), context_settings={"help_option_names": ["-h", "--help"]}, epilog=_exit_table()
)
@click.version_option(__version__, prog_name="qsnap", message="%(prog)s %(version)s")
def cli() -> None:
    """Named, checked, restorable snapshots of running QEMU guests, from the monitor socket alone."""

"""The command line: parse, run, render. Nothing below this package knows click or rich.

Modules that take time to load are imported where a command needs them, so that ``qsnap --version`` and the
shell's completion stay quick.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import click

from qsnap import __version__
from qsnap.errors import EXIT_TABLE, BadUsage, Interrupted, PrecheckRefused, QsnapError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from qsnap.cli.session import Options
    from qsnap.config import Settings


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
    as_json = "--json" in arguments
    try:
        code = cli.main(arguments, prog_name="qsnap", standalone_mode=False)
    except click.exceptions.Exit as done:
        return done.exit_code
    except (click.Abort, KeyboardInterrupt):
        return _said(Interrupted(signal.SIGINT), as_json)
    except click.exceptions.NoArgsIsHelpError as error:
        with suppress(OSError):
            sys.stderr.write(error.format_message() + "\n")
        return BadUsage.exit_code
    except click.ClickException as error:
        return _said(BadUsage(_usage_message(error)), as_json)
    except QsnapError as error:
        return _said(error, as_json)
    return code if isinstance(code, int) else 0


def _said(error: QsnapError, as_json: bool) -> int:
    """The error's exit code, whether or not it can be told to anybody."""
    from qsnap.cli.render import say_error

    code = 128 + error.signum if isinstance(error, Interrupted) else error.exit_code
    with suppress(OSError):
        say_error(error, code, as_json=as_json)
    return code


def _shown(show: Callable[[], object], exit_code: int = 0) -> int:
    """Show a result; the exit code of what was done, also if nobody reads it any more.

    :raise QsnapError: the result cannot be written; what was asked for is done.
    """
    try:
        show()
        sys.stdout.flush()
    except BrokenPipeError:
        pass
    except OSError as error:
        raise QsnapError(f"done, but the result could not be written: {error.strerror}") from error
    return exit_code


def _usage_message(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    hint = f" (see {context.command_path} --help)" if context else ""
    return " ".join(error.format_message().split()) + hint


def _exit_table() -> str:
    rows = "\n".join(f"  {code:<9} {meaning.replace('**', '').replace('`', '')}" for code, meaning in EXIT_TABLE)
    return f"\b\nExit codes:\n{rows}"


def _completes(kind: str) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem[str]]]:
    """What the shell is offered: the names that ``qsnap.cli.completion`` finds under that *kind*."""

    def offer(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
        from qsnap.cli import completion

        return completion.offer(kind, _options(context), context.params.get("tags") or (), incomplete)

    return offer


_output_options = (
    click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output."),
    click.option("-q", "--quiet", is_flag=True, help="Say nothing on success (list, vms: the names alone)."),
    click.option("-v", "--verbose", is_flag=True, help="Show the dialogue with QEMU on standard error."),
    click.option(
        "--config",
        metavar="FILE",
        envvar="QSNAP_CONFIG",
        shell_complete=_completes("files"),
        show_envvar=True,
        help="The config file. Default: ~/.config/qsnap/config.toml.",
    ),
)
_vm_options = (
    click.option(
        "-m",
        "--monitor",
        metavar="ADDRESS",
        envvar="QSNAP_MONITOR",
        shell_complete=_completes("files"),
        show_envvar=True,
        help="QEMU's monitor: a path, unix:PATH, tcp:HOST:PORT, or QEMU's own -qmp argument.",
    ),
    click.option(
        "--vm",
        metavar="NAME",
        shell_complete=_completes("vms"),
        help="The VM: a name of the config file, QEMU's -name, its pid or UUID. See: qsnap vms. "
        "Without -m and --vm: the only VM that runs.",
    ),
    click.option(
        "--timeout",
        "timeout_s",
        type=float,
        metavar="SECONDS",
        help="End the command after that time, as an interrupt does. Default: none.",
    ),
    click.option(
        "--lock-wait",
        "lock_wait_s",
        type=float,
        metavar="SECONDS",
        help="Wait so long for another qsnap that is at work on the VM; 0 refuses at once. Default: 5.",
    ),
    click.option(
        "--state-dir",
        metavar="DIR",
        shell_complete=_completes("directories"),
        help="Where the state files of live saves lie. Default: beside the images.",
    ),
)


def _takes(*options: Callable[[Any], Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A command with these options, handed on as one ``options`` argument."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def wrapper(**given: Any) -> object:  # noqa: ANN401 (whatever click gives)
            from qsnap.cli.session import Options

            options = _options(click.get_current_context())
            return command(options, **{name: given[name] for name in given.keys() - set(Options._fields)})

        for option in reversed(options):
            wrapper = option(wrapper)
        return wrapper

    return decorate


def _options(context: click.Context) -> Options:
    """Those that every command takes, of a command line."""
    from qsnap.cli.session import Options

    common = {name: value for name, value in context.params.items() if name in Options._fields}
    if common.get("vm") is not None:
        source = context.get_parameter_source("monitor")
        if source is not click.core.ParameterSource.COMMANDLINE:
            common["monitor"] = None  # --vm wins over the environment
    return Options(**common)


common_options = _takes(*_vm_options, *_output_options)


_HELP = {"help_option_names": ["-h", "--help"]}


@click.group(context_settings=_HELP, epilog=_exit_table())
@click.version_option(__version__, prog_name="qsnap", message="%(prog)s %(version)s")
def cli() -> None:
    """Named, checked, restorable snapshots of running QEMU guests, from the monitor socket alone."""


_tag = click.argument("tag", shell_complete=_completes("tags"))
_exclude = click.option(
    "--exclude",
    multiple=True,
    metavar="NODE",
    shell_complete=_completes("nodes"),
    help="Leave this device out, knowingly. May be repeated; '' for none.",
)
_vmstate = click.option(
    "--vmstate",
    metavar="NODE",
    shell_complete=_completes("nodes"),
    help="The device that holds the VM state. Default: QEMU's own choice.",
)


def _excluded(given: tuple[str, ...], settings: Settings) -> tuple[str, ...]:
    """What is left out: as the command line says, else as the config file does. "" is a word for nothing."""
    return tuple(filter(None, given)) if given else settings.exclude or ()


class _SaveCommand(click.Command):
    """A command whose option --live is a flag, and can have a value all the same: --live=auto."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        given = ["--live-auto" if argument == "--live=auto" else argument for argument in args[:end]]
        return super().parse_args(ctx, given + args[end:])


@cli.command(cls=_SaveCommand)
@click.argument("tag", required=False)
@click.option(
    "--live/--no-live",
    default=None,
    help="Save while the guest runs: it pauses for some milliseconds. --live=auto: where that is possible.",
)
@click.option("--live-auto", is_flag=True, hidden=True)
@click.option(
    "--replace/--no-replace",
    default=None,
    help="What to do if the snapshot exists: replace it (the default), or refuse.",
)
@click.option(
    "--safe-replace/--no-safe-replace",
    default=None,
    help="Replace it so that a whole snapshot stands at every instant: the state is written twice.",
)
@_vmstate
@_exclude
@click.option("--force", is_flag=True, help="Try even if there seems to be no room. Overrides nothing else.")
@click.option("-n", "--dry-run", is_flag=True, help="Check and decide everything, and do nothing.")
@common_options
def save(
    options: Options,
    tag: str | None,
    live: bool | None,
    live_auto: bool,
    replace: bool | None,
    safe_replace: bool | None,
    vmstate: str | None,
    exclude: tuple[str, ...],
    force: bool,
    dry_run: bool,
) -> int:
    """Save RAM, device state and all disks as snapshot TAG.

    Without TAG it is named vm-YYYYmmddHHMMSS. The guest is paused while QEMU writes, and runs again
    afterwards; with --live it runs meanwhile. A snapshot of that name is replaced, unless --no-replace is given.
    """
    from qsnap.cli.bar import save_bar
    from qsnap.cli.session import run

    with save_bar(quiet=options.quiet or dry_run) as watch:
        result = run(
            options,
            lambda vm, settings: vm.save(
                tag,
                **_replacement(replace, safe_replace, settings),
                vmstate=vmstate or settings.vmstate,
                exclude=_excluded(exclude, settings),
                force=force,
                dry_run=dry_run,
                watch=watch,
                live=_liveness(live, live_auto, settings),
            ),
        )
    return _shown(lambda: options.renderer.save(result))


def _liveness(live: bool | None, auto: bool, settings: Settings) -> bool | Literal["auto"]:
    """Whether to save live, by the options, and where they say nothing by the config file."""
    if auto:
        return "auto"
    return live if live is not None else settings.live or False


def _replacement(replace: bool | None, safely: bool | None, settings: Settings) -> dict[str, bool]:
    """What the options say of a snapshot that exists, and where they say nothing the config file."""
    if replace is None:
        replace = bool(safely) or not settings.no_replace
    if safely is None:
        safely = replace and bool(settings.safe_replace)
    return {"replace": replace, "safe_replace": safely}


@cli.command()
@_tag
@click.option("--paused", is_flag=True, help="Leave the guest paused.")
@click.option("--running", is_flag=True, help="Run the guest, even if it was paused.")
@_exclude
@common_options
def load(options: Options, tag: str, paused: bool, running: bool, exclude: tuple[str, ...]) -> int:
    """Put the guest back to snapshot TAG: RAM, device state and all disks.

    What the guest has done since is lost. It is left in the run state that it had, running or paused.
    """
    from qsnap.cli.session import run

    if paused and running:
        raise BadUsage("--paused and --running exclude each other")
    wanted = running if paused or running else None
    result = run(options, lambda vm, settings: vm.load(tag, running=wanted, exclude=_excluded(exclude, settings)))
    return _shown(lambda: options.renderer.load(result))


@cli.command("list")
@common_options
def list_(options: Options) -> int:
    """List the snapshots, oldest first."""
    from qsnap.cli.session import run

    snapshots = run(options, lambda vm, _: vm.list())
    return _shown(lambda: options.renderer.list(snapshots))


@cli.command()
@_tag
@common_options
def show(options: Options, tag: str) -> int:
    """Show snapshot TAG, device by device."""
    from qsnap.cli.session import run

    found = run(options, lambda vm, _: vm.show(tag))
    return _shown(lambda: options.renderer.show(*found))


@cli.command()
@click.argument("tags", metavar="TAG...", nargs=-1, required=True, shell_complete=_completes("tags"))
@click.option("--missing-ok", is_flag=True, help="A snapshot that does not exist is no error.")
@common_options
def delete(options: Options, tags: tuple[str, ...], missing_ok: bool) -> int:
    """Delete snapshots, from every device that holds them."""
    from qsnap.cli.session import run

    result = run(options, lambda vm, _: vm.delete(*tags, missing_ok=missing_ok))
    return _shown(lambda: options.renderer.delete(result))


@cli.command()
@_vmstate
@_exclude
@common_options
def check(options: Options, vmstate: str | None, exclude: tuple[str, ...]) -> int:
    """Tell whether the guest can be saved now; if not, why and what to do.

    Exits with 0 or 6. The guest is not touched.
    """
    from qsnap.cli.session import run

    report = run(
        options,
        lambda vm, settings: vm.check(vmstate=vmstate or settings.vmstate, exclude=_excluded(exclude, settings)),
    )
    return _shown(lambda: options.renderer.check(report), 0 if report.ok else PrecheckRefused.exit_code)


@cli.command()
@common_options
def status(options: Options) -> int:
    """Show the guest's run state and devices, and what of an earlier qsnap is left behind."""
    from qsnap.cli.session import run

    result = run(options, lambda vm, _: vm.status())
    return _shown(lambda: options.renderer.status(result))


@cli.command()
@click.option(
    "--force", is_flag=True, help="Also where it cannot be told whether that qsnap is dead: on another machine."
)
@common_options
def recover(options: Options, force: bool) -> int:
    """See to what a qsnap that died has left behind: resume the guest, remove what is half made.

    Its guard does that at once, and every other command but status before its own work. This does nothing else.
    """
    from qsnap.cli.session import run

    result = run(options, lambda vm, _: vm.recover(force=force))
    return _shown(lambda: options.renderer.recover(result))


@cli.command()
@_takes(*_output_options)
def vms(options: Options) -> int:
    """List the VMs of this machine, and how to choose each.

    Connects to none of them. Of a monitor that is busy it shows who holds it.
    """
    from qsnap.choice import known_vms
    from qsnap.config import load
    from qsnap.discovery import running_vms

    found = known_vms(load(options.config), running_vms())
    return _shown(lambda: options.renderer.vms(found))


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> int:
    """Print the script that completes commands, options, VMs and tags in a shell.

    \b
    bash  in ~/.bashrc:            eval "$(qsnap completion bash)"
    zsh   in ~/.zshrc, at its end: eval "$(qsnap completion zsh)"
    fish  once:                    qsnap completion fish > ~/.config/fish/completions/qsnap.fish
    """
    from qsnap.cli.completion import script

    return _shown(lambda: sys.stdout.write(script(cli, shell)))


@cli.command()
@click.option("--qemu", metavar="PROGRAM", envvar="QSNAP_QEMU", show_envvar=True, help="The QEMU to run.")
def demo(qemu: str | None) -> None:
    """Boot a tiny guest of qsnap's own and walk through save, list and load.

    Needs no VM: only qemu-system-x86_64 and qemu-img. Nothing is left behind.
    """
    from qsnap.cli.demo import demo as walk_through
    from qsnap.cli.session import run_interruptibly

    with suppress(BrokenPipeError):
        run_interruptibly(walk_through(qemu or "qemu-system-x86_64"))

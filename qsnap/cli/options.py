"""Options and arguments that commands share, and what a command does with them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from qsnap.cli.runner import Options
    from qsnap.model.qemu import Struct
    from qsnap.targets.config import Settings
    from qsnap.vm import VM

#: VMs that are worked on at once: they share disks.
JOBS = 2


def work(options: Options, action: Callable[[VM, Settings], Awaitable[Struct]]) -> int:
    """Do *action* with each VM that is meant, and show what comes of it; the exit code."""
    from qsnap.cli.several import do

    return options.shown(do(options, action))


def completes(kind: str) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem[str]]]:
    """What the shell is offered: the names that ``qsnap.cli.completion`` finds under that *kind*."""

    def offer(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
        from qsnap.cli import completion

        return completion.offer(kind, options_of(context), context.params.get("tags") or (), incomplete)

    return offer


output_options = (
    click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output."),
    click.option("-q", "--quiet", is_flag=True, help="Say nothing on success (list, vms: the names alone)."),
    click.option("-v", "--verbose", is_flag=True, help="Show the dialogue with QEMU on standard error."),
    click.option(
        "--config",
        metavar="FILE",
        envvar="QSNAP_CONFIG",
        shell_complete=completes("files"),
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
        shell_complete=completes("files"),
        show_envvar=True,
        help="QEMU's monitor: a path, unix:PATH, tcp:HOST:PORT, or QEMU's own -qmp argument.",
    ),
    click.option(
        "--vm",
        "vms",
        metavar="NAME",
        multiple=True,
        shell_complete=completes("vms"),
        help="The VM: a name of the config file, QEMU's -name, its pid or UUID. See: qsnap vms. "
        "Without -m and --vm: the only VM that runs. May be repeated.",
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
        shell_complete=completes("directories"),
        help="Where the state files of live saves lie. Default: beside the images.",
    ),
    click.option(
        "--ignore-unseen",
        is_flag=True,
        default=None,
        help="Delete, prune and replace also where it cannot be seen from here what is protected (over TCP, say).",
    ),
)


_several_options = (
    click.option("--all", "all_vms", is_flag=True, help="All VMs of yours that run and have a monitor."),
    click.option(
        "--jobs",
        type=click.IntRange(1, 64),
        default=JOBS,
        metavar="N",
        help=f"Of several VMs, work on so many at once. Default: {JOBS}, as they share disks.",
    ),
)


def takes(*options: Callable[[Any], Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A command with these options, handed on as one ``options`` argument."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def wrapper(**given: Any) -> object:  # noqa: ANN401 (whatever click gives)
            from qsnap.cli.runner import Options

            context = click.get_current_context()
            options = options_of(context)
            if context.obj is not None:
                context.obj["as_json"] = options.as_json  # for how an error is told
            return command(options, **{name: given[name] for name in given.keys() - set(Options._fields)})

        for option in reversed(options):
            wrapper = option(wrapper)
        return wrapper

    return decorate


def options_of(context: click.Context) -> Options:
    """Those that every command takes, of a command line."""
    from qsnap.cli.runner import Options

    common = {name: value for name, value in context.params.items() if name in Options._fields}
    if common.get("vms") or common.get("all_vms"):
        source = context.get_parameter_source("monitor")
        if source is not click.core.ParameterSource.COMMANDLINE:
            common["monitor"] = None  # --vm and --all win over the environment
    return Options(**common)


common_options = takes(*_vm_options, *_several_options, *output_options)
#: Of a command that is about one VM.
one_vm_options = takes(*_vm_options, *output_options)


tag = click.argument("tag", shell_complete=completes("tags"))
exclude = click.option(
    "--exclude",
    multiple=True,
    metavar="NODE",
    shell_complete=completes("nodes"),
    help="Leave this device out, knowingly. May be repeated; '' for none.",
)
vmstate = click.option(
    "--vmstate",
    metavar="NODE",
    shell_complete=completes("nodes"),
    help="The device that holds the VM state. Default: QEMU's own choice.",
)


def excluded(given: tuple[str, ...], settings: Settings) -> tuple[str, ...]:
    """What is left out: as the command line says, else as the config file does. "" is a word for nothing."""
    return tuple(filter(None, given)) if given else settings.exclude or ()

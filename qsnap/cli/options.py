"""Options and arguments that commands share."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qsnap.cli.common import PARALLEL_VMS, Options

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


class Command(click.Command):
    """A command whose help has its options under headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Its own first, and then those that it shares with others."""
        records: dict[str, list[tuple[str, str]]] = {"Options": [], "What to keep": [], "The VM": [], "Output": []}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Option) and (record := parameter.get_help_record(ctx)):
                records[_heading(parameter.name or "")].append(record)
        for heading, under_it in records.items():
            if under_it:
                with formatter.section(heading):
                    formatter.write_dl(under_it)


def _heading(name: str) -> str:
    if name in ("as_json", "quiet", "verbose", "config"):
        return "Output"
    if name in Options._fields:
        return "The VM"
    return "What to keep" if name.startswith("keep_") else "Options"


def completes(kind: str) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem[str]]]:
    """What the shell is offered: the names that ``qsnap.cli.completion`` finds under that *kind*."""

    def offer(context: click.Context, _: click.Parameter, incomplete: str) -> list[CompletionItem[str]]:
        from qsnap.cli import completion

        return completion.offer(kind, options_of(context), context.params.get("tags") or (), incomplete)

    return offer


output_options = (
    click.option("--json", "as_json", is_flag=True, help="Print one JSON document."),
    click.option("-q", "--quiet", is_flag=True, help="Print nothing on success (list and vms: only the names)."),
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
        help="The VM: its name in the config file, its QEMU -name, pid or UUID (see: qsnap vms). "
        "Default, without -m: the only running VM. Repeatable.",
    ),
    click.option(
        "--timeout",
        "timeout_s",
        type=float,
        metavar="SECONDS",
        help="Interrupt the command after that time. Default: never.",
    ),
    click.option(
        "--lock-wait",
        "lock_wait_s",
        type=float,
        metavar="SECONDS",
        help="How long to wait for another qsnap that is using the VM; 0: fail at once. Default: 5.",
    ),
    click.option(
        "--state-dir",
        metavar="DIR",
        shell_complete=completes("directories"),
        help="Where the state files of live saves are. Default: beside the images.",
    ),
    click.option(
        "--ignore-unseen",
        is_flag=True,
        default=None,
        help="Delete, prune and replace even if qsnap cannot see what is protected (over TCP, for example).",
    ),
)


_several_options = (
    click.option("--all", "all_vms", is_flag=True, help="All your running VMs that have a monitor."),
    click.option(
        "--jobs",
        type=click.IntRange(1, 64),
        default=PARALLEL_VMS,
        metavar="N",
        help=f"Work on up to N VMs at a time. Default: {PARALLEL_VMS}, because they share disks.",
    ),
)


def takes(*options: Callable[[Any], Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A command with these options, handed on as one ``options`` argument."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def wrapper(**given: Any) -> object:  # noqa: ANN401 (whatever click gives)
            context = click.get_current_context()
            options = options_of(context)
            if context.obj is not None:
                context.obj["as_json"] = options.as_json  # for how an error is shown
            return command(options, **{name: given[name] for name in given.keys() - set(Options._fields)})

        for option in reversed(options):
            wrapper = option(wrapper)
        return wrapper

    return decorate


def options_of(context: click.Context) -> Options:
    """Those that every command takes, of a command line."""
    common = {name: value for name, value in context.params.items() if name in Options._fields}
    if common.get("vms") or common.get("all_vms"):
        source = context.get_parameter_source("monitor")
        if source is not click.core.ParameterSource.COMMANDLINE:
            common["monitor"] = None  # --vm and --all win over the environment
    return Options(**common)


common_options = takes(*_vm_options, *_several_options, *output_options)
#: Of a command that is about one VM.
one_vm_options = takes(*_vm_options, *output_options)


tag_argument = click.argument("tag", shell_complete=completes("tags"))
tags_argument = click.argument("tags", metavar="TAG...", nargs=-1, required=True, shell_complete=completes("tags"))
exclude_option = click.option(
    "--exclude",
    multiple=True,
    metavar="NODE",
    shell_complete=completes("nodes"),
    help="Leave this device out. Repeatable; '' for none.",
)
vmstate_option = click.option(
    "--vmstate",
    metavar="NODE",
    shell_complete=completes("nodes"),
    help="The device that holds the VM state. Default: the one that QEMU chooses.",
)
prefix_option = click.option(
    "--prefix", metavar="PREFIX", help="The series: the snapshots named PREFIX-YYYYmmddTHHMMSS."
)
qemu_option = click.option(
    "--qemu",
    metavar="PROGRAM",
    envvar="QSNAP_QEMU",
    show_envvar=True,
    help="The QEMU to run. Default: the one that the guest was saved in.",
)
wide_option = click.option("--wide", is_flag=True, help="Leave out and cut nothing to fit the terminal.")
textfile_option = click.option(
    "--textfile",
    type=click.Path(path_type=Path),
    metavar="PATH",
    shell_complete=completes("files"),
    help="Write metrics for Prometheus' node exporter to that file (*.prom).",
)
ping_option = click.option(
    "--ping",
    metavar="URL",
    callback=lambda _context, _parameter, url: _checked_url(url),
    help="Call a health check: URL/start, then URL or URL/fail. It never fails the command.",
)


def _checked_url(url: str | None) -> str | None:
    from qsnap.cli.ping import checked

    return None if url is None else checked(url)

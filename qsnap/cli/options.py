"""Options and arguments that commands share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qsnap.cli.common import PARALLEL_VMS, PROGRESS_KINDS, Options

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


#: Flags that can have a value all the same, behind "=" alone; the hidden options that take it.
_WITH_VALUES = {"--live=auto": "--live-auto", "--save-current=": "--save-current-as="}


def _rewritten(argument: str) -> str:
    for flag, option in _WITH_VALUES.items():
        if argument == flag or (flag.endswith("=") and argument.startswith(flag)):
            return option + argument.removeprefix(flag)
    return argument


class Command(click.Command):
    """A command whose help has its options under headings."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        return super().parse_args(ctx, [*map(_rewritten, args[:end]), *args[end:]])

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Its own; of those that it shares with others the names alone."""
        shared = []
        for heading, parameters in _under_headings(self.get_params(ctx)).items():
            if heading in COMMON_HEADINGS:
                shared += [one.opts[-1] for one in parameters]
            else:
                _write_options(ctx, formatter, heading, parameters)
        if shared:
            with formatter.section("Common options (explained by: qsnap help options)"):
                formatter.write_text(", ".join(shared))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Examples, and then what else there is."""
        from qsnap.cli.examples import EXAMPLES

        if examples := EXAMPLES.get(self.name or ""):
            with formatter.section("Examples"):
                for line, what in examples:
                    formatter.write(f"{'':{formatter.current_indent}}# {what}\n{'':{formatter.current_indent}}{line}\n")
        super().format_epilog(ctx, formatter)


#: What all commands that are about VMs share.
COMMON_HEADINGS = ("The VM", "Output")


def write_common_options(ctx: click.Context, command: click.Command, formatter: click.HelpFormatter) -> None:
    """The options that commands share, explained; those of *command*, which has them all."""
    for heading, parameters in _under_headings(command.get_params(ctx)).items():
        if heading in COMMON_HEADINGS:
            _write_options(ctx, formatter, heading, parameters)


def _under_headings(parameters: Iterable[click.Parameter]) -> Mapping[str, list[click.Option]]:
    found: dict[str, list[click.Option]] = {"Options": [], "What to keep": [], **{one: [] for one in COMMON_HEADINGS}}
    for one in parameters:
        if isinstance(one, click.Option) and not one.hidden:
            found[_heading(one.name or "")].append(one)
    return found


def _write_options(
    ctx: click.Context, formatter: click.HelpFormatter, heading: str, parameters: Iterable[click.Option]
) -> None:
    if records := [record for one in parameters if (record := one.get_help_record(ctx))]:
        with formatter.section(heading):
            formatter.write_dl(records)


def _heading(name: str) -> str:
    if name in ("as_json", "quiet", "verbose", "config", "progress"):
        return "Output"
    if name in Options.__struct_fields__:
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
        "--progress",
        type=click.Choice(PROGRESS_KINDS),
        default=PROGRESS_KINDS[0],
        help="How far it has come, on standard error: a bar on a terminal (auto), lines of JSON (json), or nothing.",
    ),
    click.option(
        "--config",
        metavar="FILE",
        envvar="QSNAP_CONFIG",
        shell_complete=completes("files"),
        show_envvar=True,
        help="The config file. Default: ~/.config/qsnap/config.toml.",
    ),
)


class _Monitor(click.Option):
    """An option that is given once, and says so: --vm can be repeated."""

    def value_from_envvar(self, ctx: click.Context) -> tuple[str, ...] | None:
        found = self.resolve_envvar_value(ctx)
        return None if found is None else (found,)

    def process_value(self, ctx: click.Context, value: Any) -> str | None:  # noqa: ANN401 (of click)
        given = super().process_value(ctx, value) or ()
        if len(given) > 1:
            raise click.UsageError("-m names one VM; several are named by --vm NAME --vm NAME", ctx)
        return given[0] if given else None


_vm_options = (
    click.option(
        "-m",
        "--monitor",
        cls=_Monitor,
        multiple=True,
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
        help=f"Work on up to N VMs at a time; with --together, on all of them. "
        f"Default: {PARALLEL_VMS}, because they share disks.",
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
            return command(options, **{name: given[name] for name in given.keys() - set(Options.__struct_fields__)})

        for option in reversed(options):
            wrapper = option(wrapper)
        return wrapper

    return decorate


def options_of(context: click.Context) -> Options:
    """The options of a command line that every command takes."""
    common = {name: value for name, value in context.params.items() if name in Options.__struct_fields__}
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
live_option = click.option(
    "--live/--no-live",
    default=None,
    help="Save while the guest runs; it pauses only for milliseconds. --live=auto: if that is possible.",
)
live_auto_option = click.option("--live-auto", is_flag=True, hidden=True)
vmstate_option = click.option(
    "--vmstate",
    metavar="NODE",
    shell_complete=completes("nodes"),
    help="The device that holds the VM state. Default: the one that QEMU chooses.",
)
prefix_option = click.option("--prefix", metavar="PREFIX", help="The series: PREFIX-YYYYmmddTHHMMSS.")
qemu_option = click.option(
    "--qemu",
    metavar="PROGRAM",
    envvar="QSNAP_QEMU",
    show_envvar=True,
    help="The QEMU to run. Default: the one that the guest was saved in.",
)
together_option = click.option(
    "--together", is_flag=True, help="Several VMs at one moment: all of it is done, or nothing."
)
#: Of a command that would leave other VMs' parts of a group behind.
whole_option = click.option(
    "--together/--no-together",
    default=None,
    help="Delete all parts of what several VMs saved together, or this VM's alone. Default: refuse to delete one part.",
)
image_option = click.option(
    "--image",
    "images",
    metavar="FILE",
    multiple=True,
    shell_complete=completes("files"),
    help="With the VM off: its image. Repeatable, for all its images.",
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

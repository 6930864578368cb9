"""The guest and this machine: check, status, pause, resume, recover; vms, completion, help and the demo."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import click

from qsnap.cli.commands import work
from qsnap.cli.common import Options, excluded
from qsnap.cli.options import (
    Command,
    common_options,
    exclude_option,
    output_options,
    prefix_option,
    takes,
    textfile_option,
    vmstate_option,
    wide_option,
    write_common_options,
)
from qsnap.errors import BadUsage

if TYPE_CHECKING:
    from qsnap.cli.output.results import Recoveries
    from qsnap.vm import VM


@click.command(cls=Command)
@vmstate_option
@exclude_option
@common_options
def check(options: Options, vmstate: str | None, exclude: tuple[str, ...]) -> int:
    """Check whether the guest can be saved now.

    If not, says why and what to do. Exits with 0 or 6. The guest is not touched.
    """
    return work(
        options,
        lambda vm, settings, _: vm.check(vmstate=vmstate or settings.vmstate, exclude=excluded(exclude, settings)),
        looks=True,
    )


@click.command(cls=Command)
@click.option(
    "--max-age", metavar="DURATION", help="Act as a monitoring plugin: is the newest snapshot younger than DURATION?"
)
@click.option("--warn-age", metavar="DURATION", help="With --max-age: warn if the newest snapshot is older than that.")
@prefix_option
@textfile_option
@common_options
def status(
    options: Options, max_age: str | None, warn_age: str | None, prefix: str | None, textfile: Path | None
) -> int:
    """Show the guest's state and devices, and what was left behind.

    With --max-age 26h it answers as a monitoring plugin: one line, and exit code 0 (OK), 1 (WARNING), 2 (CRITICAL: the
    newest snapshot that can be loaded is older, or there is none) or 3 (UNKNOWN: nobody answers).
    """
    if max_age is None and (warn_age is not None or prefix is not None):
        raise BadUsage("--warn-age and --prefix go with --max-age DURATION")
    from qsnap.cli.monitoring import MetricsRecorder, plugin_answer
    from qsnap.cli.several import do

    recorder = MetricsRecorder(textfile, prefix)
    if max_age is not None:
        result = plugin_answer(options, recorder, prefix, max_age, warn_age)
    else:
        result = do(options, recorder.around(lambda vm, *_: vm.status()), recorder.record, looks=True)
    return recorder.exit_code(options.shown(result))


@click.command(cls=Command)
@common_options
def pause(options: Options) -> int:
    """Pause the guest, until qsnap resume."""
    return work(options, lambda vm, *_: vm.pause())


@click.command(cls=Command)
@common_options
def resume(options: Options) -> int:
    """Run a paused guest again.

    Refused (6) if a load has failed midway, because the guest must not run on RAM and disks of different moments.
    """
    return work(options, lambda vm, *_: vm.resume())


@click.command(cls=Command)
@click.option(
    "--force", is_flag=True, help="Even if qsnap cannot tell whether that process is dead: it ran on another machine."
)
@common_options
def recover(options: Options, force: bool) -> int:
    """Clean up after a qsnap that died.

    Resumes the guest and removes what is half made. The guard of that qsnap does so at once, and every other command
    except status does so before its own work. This command does nothing else.
    """
    from qsnap.cli.output.results import Recoveries

    async def recovered(vm: VM, *_: object) -> Recoveries:
        return Recoveries(recovered=tuple(await vm.recover(force=force)))

    return work(options, recovered)


@click.command(cls=Command)
@wide_option
@takes(*output_options)
def vms(options: Options, wide: bool) -> int:
    """List the VMs of this machine, and how to choose each.

    Connects to none of them. A busy monitor is shown with the process that holds it. On a terminal, long texts are cut;
    --wide shows everything, as a pipe gets it.
    """
    from qsnap.cli.output.results import KnownVMs
    from qsnap.cli.pick import refuse_few_files
    from qsnap.targets.choose import known_vms
    from qsnap.targets.config import load
    from qsnap.targets.running import running_vms

    refuse_few_files()
    return options.shown(KnownVMs(vms=tuple(known_vms(load(options.config), running_vms()))), wide=wide)


@click.command(cls=Command)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> int:
    """Print the script that completes qsnap's words in a shell.

    \b
    bash  in ~/.bashrc:            eval "$(qsnap completion bash)"
    zsh   in ~/.zshrc, at its end: eval "$(qsnap completion zsh)"
    fish  once:                    qsnap completion fish > ~/.config/fish/completions/qsnap.fish
    """
    from qsnap.cli.completion import script
    from qsnap.cli.output.show import written

    with written():
        sys.stdout.write(script(click.get_current_context().find_root().command, shell))
    return 0


@click.command("help", cls=Command)
@click.argument("command", required=False)
def help_(command: str | None) -> int:
    """Explain qsnap, or one of its commands.

    qsnap help options explains the options that commands share.
    """
    from qsnap.cli.output.show import written

    context = click.get_current_context().find_root()
    group = context.command
    assert isinstance(group, click.Group)
    with written():
        if command == "options":
            formatter = context.make_formatter()
            write_common_options(context, group.commands["list"], formatter)
            sys.stdout.write(formatter.getvalue())
        elif command is None:
            sys.stdout.write(group.get_help(context) + "\n")
        else:
            name, found, _ = group.resolve_command(context, [command])
            assert found is not None
            sys.stdout.write(found.get_help(click.Context(found, parent=context, info_name=name)) + "\n")
    return 0


@click.command(cls=Command)
@click.option("--qemu", metavar="PROGRAM", envvar="QSNAP_QEMU", show_envvar=True, help="The QEMU to run.")
def demo(qemu: str | None) -> None:
    """Boot a tiny guest, and walk through save, list and load.

    Needs no VM, only qemu-system-x86_64 and qemu-img. Leaves nothing behind.
    """
    from qsnap.cli.demo import demo as walk_through
    from qsnap.cli.pick import refuse_few_files
    from qsnap.cli.signals import run_interruptibly

    refuse_few_files()
    with suppress(BrokenPipeError):
        run_interruptibly(walk_through(qemu or "qemu-system-x86_64"))

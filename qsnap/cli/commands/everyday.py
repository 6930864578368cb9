"""The everyday commands."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from qsnap.cli import options as given
from qsnap.cli.commands.series import (
    ping_option,
    policy_of,
    policy_options,
    prefix_option,
    prune_after,
    textfile_option,
    wants_policy,
)
from qsnap.cli.options import common_options, completes, excluded, takes, work
from qsnap.errors import BadUsage

if TYPE_CHECKING:
    from qsnap.cli.runner import Options
    from qsnap.model.qemu import SaveResult
    from qsnap.targets.config import Settings
    from qsnap.vm import VM


class _SaveCommand(click.Command):
    """A command whose option --live is a flag, and can have a value all the same: --live=auto."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        given = ["--live-auto" if argument == "--live=auto" else argument for argument in args[:end]]
        return super().parse_args(ctx, given + args[end:])


@click.command(cls=_SaveCommand)
@click.argument("tag", required=False)
@prefix_option
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
@given.vmstate
@given.exclude
@click.option("--description", metavar="TEXT", default="", help="A line about it, which list and show tell.")
@policy_options
@textfile_option
@ping_option
@click.option("--force", is_flag=True, help="Try even if there seems to be no room. Overrides nothing else.")
@click.option("-n", "--dry-run", is_flag=True, help="Check and decide everything, and do nothing.")
@common_options
def save(
    options: Options,
    tag: str | None,
    prefix: str | None,
    live: bool | None,
    live_auto: bool,
    replace: bool | None,
    safe_replace: bool | None,
    vmstate: str | None,
    exclude: tuple[str, ...],
    description: str,
    textfile: Path | None,
    ping: str | None,
    force: bool,
    dry_run: bool,
    **keep: Any,  # noqa: ANN401 (of policy_options)
) -> int:
    """Save RAM, device state and all disks as snapshot TAG.

    Without TAG it is named vm-YYYYmmddHHMMSS. The guest is paused while QEMU writes, and runs again
    afterwards; with --live it runs meanwhile. A snapshot of that name is replaced, unless --no-replace is given.
    With --prefix it is the next one of a series; with a policy (--keep-…) the series is pruned when it is saved.
    """
    from qsnap.cli.monitoring import MetricsRecorder
    from qsnap.cli.output.bar import save_bar
    from qsnap.cli.output.results import exit_code_of
    from qsnap.cli.ping import pinged
    from qsnap.cli.several import do

    if tag is not None and prefix is not None:
        raise BadUsage("a tag and --prefix exclude each other: those of a series are named by the time")
    policy = policy_of(keep) if wants_policy(keep) else None
    if policy is not None and prefix is None:
        raise BadUsage("a policy (--keep-…) is of a series: say which, with --prefix PREFIX")
    if policy is not None and policy.is_empty:
        raise BadUsage("the policy is empty: it would keep nothing. Say what to keep, as in --keep-daily 7")

    async def action(vm: VM, settings: Settings) -> SaveResult:
        result = await vm.save(
            tag,
            prefix=prefix,
            description=description,
            vmstate=vmstate or settings.vmstate,
            exclude=excluded(exclude, settings),
            force=force,
            dry_run=dry_run,
            watch=watch,
            live=_liveness(live, live_auto, settings),
            **_replacement(replace, safe_replace, settings),
        )
        if policy is None or prefix is None:
            return result
        import msgspec

        return msgspec.structs.replace(result, pruned=await prune_after(vm, prefix, policy, result))

    recorder = MetricsRecorder(None if dry_run else textfile, prefix)
    with (
        pinged(None if dry_run else ping) as report,
        save_bar(quiet=options.quiet or dry_run or options.is_of_several) as watch,
    ):
        result = do(options, recorder.around(action), recorder.record)
        code = recorder.exit_code(exit_code_of(result))
        report(code)
    options.shown(result)
    return code


def _liveness(live: bool | None, auto: bool, settings: Settings) -> bool | Literal["auto"]:
    """Whether to save live, by the options, and where they say nothing by the config file."""
    if auto:
        return "auto"
    return live if live is not None else settings.live or False


def _replacement(replace: bool | None, safely: bool | None, settings: Settings) -> dict[str, Any]:
    """What the options say of a snapshot that exists, and where they say nothing the config file."""
    if replace is None:
        replace = bool(safely) or not settings.no_replace
    if safely is None:
        safely = replace and bool(settings.safe_replace)
    return {"replace": replace, "safe_replace": safely}


@click.command()
@given.tag
@click.option("--paused", is_flag=True, help="Leave the guest paused.")
@click.option("--running", is_flag=True, help="Run the guest, even if it was paused.")
@given.exclude
@click.option(
    "--force", is_flag=True, help="Load also if a disk stands on other images than at the save. Overrides nothing else."
)
@common_options
def load(options: Options, tag: str, paused: bool, running: bool, exclude: tuple[str, ...], force: bool) -> int:
    """Put the guest back to snapshot TAG: RAM, device state and all disks.

    What the guest has done since is lost. It is left in the run state that it had, running or paused.
    """
    if paused and running:
        raise BadUsage("--paused and --running exclude each other")
    wanted = running if paused or running else None
    return work(
        options,
        lambda vm, settings: vm.load(tag, running=wanted, exclude=excluded(exclude, settings), force=force),
    )


@click.command("list")
@common_options
def list_(options: Options) -> int:
    """List the snapshots, oldest first."""
    from qsnap.cli.output.results import Snapshots

    async def found(vm: VM, _: Settings) -> Snapshots:
        return Snapshots(snapshots=tuple(await vm.list()))

    return work(options, found)


@click.command()
@given.tag
@common_options
def show(options: Options, tag: str) -> int:
    """Show snapshot TAG, device by device."""
    from qsnap.cli.output.results import Details

    async def found(vm: VM, _: Settings) -> Details:
        snapshot, rows = await vm.show(tag)
        return Details(snapshot=snapshot, rows=rows)

    return work(options, found)


@click.command()
@click.argument("tags", metavar="TAG...", nargs=-1, required=True, shell_complete=completes("tags"))
@click.option("--missing-ok", is_flag=True, help="A snapshot that does not exist is no error.")
@common_options
def delete(options: Options, tags: tuple[str, ...], missing_ok: bool) -> int:
    """Delete snapshots, from every device that holds them."""
    return work(options, lambda vm, _: vm.delete(*tags, missing_ok=missing_ok))


@click.command()
@given.vmstate
@given.exclude
@common_options
def check(options: Options, vmstate: str | None, exclude: tuple[str, ...]) -> int:
    """Tell whether the guest can be saved now; if not, why and what to do.

    Exits with 0 or 6. The guest is not touched.
    """
    return work(
        options,
        lambda vm, settings: vm.check(vmstate=vmstate or settings.vmstate, exclude=excluded(exclude, settings)),
    )


@click.command()
@click.option("--max-age", metavar="DURATION", help="Tell as a monitoring plugin does whether there is one that young.")
@click.option("--warn-age", metavar="DURATION", help="With --max-age: warn if the newest is older than that.")
@prefix_option
@textfile_option
@common_options
def status(
    options: Options, max_age: str | None, warn_age: str | None, prefix: str | None, textfile: Path | None
) -> int:
    """Show the guest's run state and devices, and what of an earlier qsnap is left behind.

    With --max-age 26h it answers as a monitoring plugin: one line, and 0 (OK), 1 (WARNING), 2 (CRITICAL: the newest
    snapshot that can be loaded is older, or there is none) or 3 (UNKNOWN: nobody answers).
    """
    if max_age is None and (warn_age is not None or prefix is not None):
        raise BadUsage("--warn-age and --prefix go with --max-age DURATION")
    from qsnap.cli.monitoring import MetricsRecorder, plugin_answer
    from qsnap.cli.several import do

    recorder = MetricsRecorder(textfile, prefix)
    if max_age is not None:
        result = plugin_answer(options, recorder, prefix, max_age, warn_age)
    else:
        result = do(options, recorder.around(lambda vm, _: vm.status()), recorder.record)
    return recorder.exit_code(options.shown(result))


@click.command()
@click.option(
    "--force", is_flag=True, help="Also where it cannot be told whether that qsnap is dead: on another machine."
)
@common_options
def recover(options: Options, force: bool) -> int:
    """See to what a qsnap that died has left behind: resume the guest, remove what is half made.

    Its guard does that at once, and every other command but status before its own work. This does nothing else.
    """
    from qsnap.cli.output.results import Recoveries

    async def recovered(vm: VM, _: Settings) -> Recoveries:
        return Recoveries(recovered=tuple(await vm.recover(force=force)))

    return work(options, recovered)


@click.command()
@takes(*given.output_options)
def vms(options: Options) -> int:
    """List the VMs of this machine, and how to choose each.

    Connects to none of them. Of a monitor that is busy it shows who holds it.
    """
    from qsnap.cli.output.results import KnownVMs
    from qsnap.cli.runner import refuse_few_files
    from qsnap.targets import running_vms
    from qsnap.targets.choose import known_vms
    from qsnap.targets.config import load

    refuse_few_files()
    return options.shown(KnownVMs(vms=tuple(known_vms(load(options.config), running_vms()))))


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> int:
    """Print the script that completes commands, options, VMs and tags in a shell.

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


@click.command()
@click.option("--qemu", metavar="PROGRAM", envvar="QSNAP_QEMU", show_envvar=True, help="The QEMU to run.")
def demo(qemu: str | None) -> None:
    """Boot a tiny guest of qsnap's own and walk through save, list and load.

    Needs no VM: only qemu-system-x86_64 and qemu-img. Nothing is left behind.
    """
    from qsnap.cli.demo import demo as walk_through
    from qsnap.cli.runner import refuse_few_files, run_interruptibly

    refuse_few_files()
    with suppress(BrokenPipeError):
        run_interruptibly(walk_through(qemu or "qemu-system-x86_64"))

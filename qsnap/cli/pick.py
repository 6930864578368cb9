"""Which VMs the options mean."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING

from qsnap.cli.common import Options
from qsnap.cli.output.show import is_terminal, say
from qsnap.errors import BadUsage, QsnapError
from qsnap.monitor.address import Address, TcpAddress
from qsnap.targets.choose import Target, choose, choose_all
from qsnap.targets.config import load

if TYPE_CHECKING:
    from qsnap.targets.vms import RunningVM

#: Open files that a command needs, and that each VM adds. With one VM 14 were enough; notes and modules may take more.
_FILES, _FILES_OF_A_VM = 16, 16


def target(options: Options) -> Target:
    """The VM that the options mean: see :func:`qsnap.targets.choose.choose`."""
    refuse_few_files()
    if options.is_of_several:
        raise BadUsage("this command works on one VM at a time; name it with --vm or -m")
    vm = options.vms[0] if options.vms else None
    return choose(load(options.config), _running_vms, monitor=options.monitor, vm=vm)


def title_of(options: Options, meant: Target | None) -> str:
    """What to call the VM that a command is about: as it was named, or else by the name that it is chosen by."""
    return next(iter(options.vms), options.monitor) or (meant.name if meant else "")


def targets(options: Options) -> Iterator[tuple[str, Target | QsnapError]]:
    """The VMs that the options mean, and what to call each; an error for one that cannot be had."""
    if not options.is_of_several:
        try:
            meant = target(options)
            yield title_of(options, meant), meant
        except QsnapError as error:
            yield title_of(options, None), error
        return
    if options.monitor is not None or (options.vms and options.all_vms):
        raise BadUsage("use only one of -m, --vm and --all")
    config = load(options.config)
    if options.all_vms:
        yield from ((meant.name, meant) for meant in choose_all(config, _running_vms()))
        return
    running = cache(_running_vms)
    seen: set[Address] = set()
    for name in dict.fromkeys(options.vms):
        try:
            meant = choose(config, running, vm=name)
        except QsnapError as error:
            yield name, error
            continue
        if meant.address not in seen:
            yield name, meant
        seen.add(meant.address)


def refuse_few_files(at_once: int = 1) -> None:
    """Refuse to begin where this process may have so few files open that it would fail in the middle.

    :param at_once: VMs.
    :raise QsnapError: it may not have enough; nothing was done.
    """
    needed = _FILES + at_once * _FILES_OF_A_VM
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed != resource.RLIM_INFINITY and allowed < needed:
        raise QsnapError(f"qsnap may open only {allowed} files, but needs {needed}: `ulimit -n {needed}`")


def _running_vms() -> Sequence[RunningVM]:
    from qsnap.targets.running import running_vms

    return running_vms()


def chosen(options: Options) -> Target:
    """The VM that the options mean; if qsnap picked it, that is said: see :func:`say_which`.

    :raise BadUsage: a monitor was named that is not valid; or none, and several VMs run; or several were named.
    :raise NoVM: no such VM runs, or none at all.
    """
    meant = target(options)
    say_which(options, meant)
    return meant


def say_which(options: Options, meant: Target, *, looks: bool = False) -> None:
    """Say which VM qsnap picked, to a person and if it is changed; and warn of a monitor that anybody can reach.

    :param looks: it is not changed.
    """
    address = meant.address
    if isinstance(address, TcpAddress) and not address.is_loopback:
        say(f"warning: {address}: a monitor has no password; whoever reaches it controls the VM")
    if meant.was_guessed and not looks and not options.quiet and not options.as_json and is_terminal(sys.stderr):
        say(f"using {meant.title if meant.name == str(meant.pid) else meant.name}")

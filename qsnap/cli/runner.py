"""Connect to one VM, as the options and the config file say, and work with it."""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from qsnap.cli.common import Options
from qsnap.cli.output.show import say
from qsnap.cli.signals import run_interruptibly
from qsnap.connecting import LOCK_WAIT_S, connect
from qsnap.errors import ConnectError
from qsnap.monitor.address import expanded
from qsnap.vm import VM

if TYPE_CHECKING:
    from qsnap.targets.choose import Target
    from qsnap.targets.config import Settings

_T = TypeVar("_T")
_V = TypeVar("_V")


def run_on(
    options: Options, meant: Target, action: Callable[[VM, Settings], Awaitable[_T]], *, obeys_signals: bool = True
) -> _T:
    """Connect to a VM that was chosen, do *action*, and return what it returns.

    :param action: is given the VM, and the defaults that the config file has for it.
    :param obeys_signals: False goes on to the end, and only says that it does.
    :raise Interrupted: by a signal; the guest was resumed.
    """
    return run_interruptibly(connected(options, meant, action), obeys_signals=obeys_signals)


async def connected(options: Options, meant: Target, action: Callable[[VM, Settings], Awaitable[_T]]) -> _T:
    """Connect, do *action*, and say what was cleared up on the way.

    :raise ConnectError: another VM answers at its address.
    """
    if options.verbose:
        _show_dialogue()
    address = meant.address
    lock_wait_s = _first(options.lock_wait_s, meant.settings.lock_wait)
    state_dir = _first(options.state_dir, meant.settings.state_dir)
    async with connect(
        address,
        timeout_s=_first(options.timeout_s, meant.settings.timeout),
        lock_wait_s=LOCK_WAIT_S if lock_wait_s is None else lock_wait_s,
        state_dir=None if state_dir is None else expanded(state_dir),
        ignore_unseen=bool(_first(options.ignore_unseen, meant.settings.ignore_unseen)),
    ) as vm:
        if meant.pid and vm.pid not in (None, meant.pid):
            raise ConnectError(f"{meant.title} is not what answers at {address}: that is process {vm.pid}")
        try:
            return await action(vm, meant.settings)
        finally:
            of_it = f"{meant.name}: " if options.is_of_several else ""
            if vm.recovered and not options.quiet and not options.as_json:
                from qsnap.cli.output.people import lines_of

                for line in itertools.chain(*map(lines_of, vm.recovered)):
                    say(f"qsnap: {of_it}{line}")
            for remark in vm.remarks:
                say(f"warning: {of_it}{remark}")


def _first(*values: _V | None) -> _V | None:
    """The first that is given."""
    return next((value for value in values if value is not None), None)


def _show_dialogue() -> None:
    if logging.getLogger("qsnap").handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s.%(msecs)03d %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("qsnap")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)

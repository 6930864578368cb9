"""The console script, and ``python -m qsnap``."""

from __future__ import annotations

import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


def main() -> NoReturn:
    """Hand over to the command line.

    Until that has begun to work, Ctrl-C just ends the process: there is nothing yet to clear up, and a
    traceback out of the middle of an import would help nobody.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from qsnap.cli import main as command_line

    command_line()


if __name__ == "__main__":
    main()

"""The console script, and ``python -m qsnap``."""

from __future__ import annotations

import os
import signal
import sys

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
    _speak_utf8()
    from qsnap.cli import main as command_line

    command_line()


def _speak_utf8() -> None:
    """Begin anew in Python's UTF-8 mode, if the locale has another encoding.

    Tags and file names are UTF-8 to QEMU. Else those of the command line would be others than those that QEMU tells of,
    and a file with a character that the locale does not have could not be named at all.
    """
    if not sys.flags.utf8_mode and sys.getfilesystemencoding() != "utf-8" and sys.executable:
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])  # noqa: S606 (ourselves)


if __name__ == "__main__":
    main()

"""The console script, and ``python -m qsnap``.

Until the command line has begun to work, Ctrl-C just ends the process: there is nothing yet to clear up, and a
traceback out of the middle of an import would help nobody. What the interpreter does before this module is not ours.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # built in; ``signal`` itself takes a tenth of our start

if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
    _signal.signal(_signal.SIGINT, _signal.SIG_DFL)

import os
import sys
from typing import NoReturn


def main() -> NoReturn:
    """Hand over to the command line."""
    _speak_utf8()
    from qsnap.cli import main as command_line

    command_line()


def _speak_utf8() -> None:
    """Restart in Python's UTF-8 mode, if the locale has another encoding.

    QEMU takes tags and file names as UTF-8. In another encoding, those on the command line would differ from those that
    QEMU reports, and a file with a character that the locale lacks could not be named at all.
    """
    if not sys.flags.utf8_mode and sys.getfilesystemencoding() != "utf-8" and sys.executable:
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])  # noqa: S606 (ourselves)


if __name__ == "__main__":
    main()

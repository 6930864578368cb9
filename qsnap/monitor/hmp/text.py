r"""The human monitor's language: how a line is typed and where its answer stands. Pure.

Read in QEMU's monitor/hmp.c, util/readline.c and util/cutils.c; held against 5.2, 7.2, 10.0 and 11.1:

* Every byte that is typed makes readline draw the line anew: ``s ESC[K``, ``ESC[D sa ESC[K``, … No line break is
  in that, so an answer begins behind the first one. The prompt ``(qemu) `` has none behind it.
* Lines that come together are done one after the other. So each command is followed by one that prints a
  number of our choice: the answer ends where that number stands on a line of its own, whatever the answer
  holds.
* Words may be in double quotes, with ``\\`` and ``\"`` inside. Bytes below 0x20, 0x7f and 0x9b are keys of
  the line editor: 0x9b is half of "Û" in UTF-8, and would be swallowed. 0xff begins a command of telnet, where the
  monitor speaks that; no character has it in UTF-8.
"""

from __future__ import annotations

import re

from qsnap.errors import MonitorError, NotSupported
from qsnap.model.qemu import QemuVersion

PROMPT = b"(qemu) "
#: Bytes of a line that readline keeps (READLINE_CMD_BUF_SIZE).
MAX_LINE_BYTES = 4095
#: Blanks at the end of a shorter tag cannot be told from those that fill its column.
_TAG_WIDTH = 16

_BANNER = re.compile(rb"QEMU (\d+)\.(\d+)\.(\d+)[^\r\n]* monitor - [^\r\n]*\r?\n")
_KEYS = frozenset((*range(0x20), 0x7F, 0x9B, 0xFF))


def quoted(word: str) -> str:
    r"""*word* as one argument, whatever it holds: ``a "b"`` becomes ``"a \"b\""``.

    :raise NotSupported: it holds a control character, which HMP has no safe way to take.
    """
    if any(ord(char) < 0x20 or ord(char) == 0x7F for char in word):
        raise NotSupported(f"the human monitor cannot be given {word!r}: it holds control characters")
    escaped = word.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def error_in(answer: str) -> str:
    r"""The error that *answer* to savevm, loadvm or delvm is: any text but warnings. "" for success: they say nothing.

    ``Error: Device 'd' …\r\n`` becomes ``Device 'd' …``; lines before the ``Error:`` line are kept, as they
    say what went wrong inside. QEMU warns by lines that begin with ``warning: `` (util/qemu-error.c): a load on ppc64
    under TCG does so of capabilities of the CPU, and is done.
    """
    lines = [line.strip() for line in answer.splitlines() if line.strip()]
    if all(line.startswith("warning: ") for line in lines):
        return ""
    return "; ".join(line.removeprefix("Error: ") for line in lines)


def banner(stream: bytes) -> QemuVersion | None:
    """QEMU's version, once *stream* holds the whole banner and the prompt; None before that."""
    match = _BANNER.search(stream)
    if match is None or PROMPT not in stream[match.end() :]:
        return None
    return QemuVersion(*map(int, match.groups()))


def version(answer: str) -> QemuVersion:
    """What ``info version`` says: ``7.2.22Debian 1:7.2…``.

    :raise MonitorError: it is not a version.
    """
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", answer)
    if match is None:
        raise MonitorError(f"the human monitor tells no version: {answer!r}")
    return QemuVersion(*map(int, match.groups()))


def tag_obstacle(tag: str) -> str | None:
    """Why *tag* cannot go through a human monitor and its tables; None where it can."""
    data = tag.encode(errors="surrogateescape")
    if not _KEYS.isdisjoint(data):
        return "it holds a byte that the human monitor's line editor takes for a key (0x9b, in Û and others)"
    if tag.endswith(" ") and len(data) <= _TAG_WIDTH:
        return "it ends with a blank, which the human monitor's tables do not show"
    return None


def typed(line: str, number: int) -> bytes:
    """The bytes to send: *line*, and the command that prints *number* behind its answer.

    :raise NotSupported: *line* holds a byte that the line editor does not take, or is too long.
    """
    data = line.encode(errors="surrogateescape")
    if not _KEYS.isdisjoint(data) or len(data) > MAX_LINE_BYTES:
        raise NotSupported(f"the human monitor cannot be given the line {line!r}")
    return b"%s\nprint %#x\n" % (data, number)


def answer(stream: bytes, number: int) -> tuple[str, bytes] | None:
    """The answer to the first command in *stream*, and what follows it; None while it is not whole.

    :param stream: all that came since the command was sent; a prompt may stand before it.
    """
    end = re.search(rb"\r?\n%#x\r?\n" % number, stream)
    if end is None:
        return None
    body = stream[: stream.rfind(PROMPT, 0, end.start())]
    _, _, text = body.partition(b"\n")
    return text.decode(errors="replace").replace("\r\n", "\n"), stream[end.end() :]

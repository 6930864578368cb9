"""The human monitor's language: how a word is quoted, and where an error stands in an answer. Pure.

Read in QEMU's monitor/hmp.c (get_str, monitor_parse_arguments) and seen on 5.2, 7.2, 10.0 and 11.1.
"""

from __future__ import annotations

from qsnap.errors import NotSupported


def quoted(word: str) -> str:
    r"""*word* as one argument, whatever it holds: ``a "b"`` becomes ``"a \"b\""``.

    :raise NotSupported: it holds a control character, which HMP has no safe way to take.
    """
    if any(ord(char) < 0x20 or ord(char) == 0x7F for char in word):
        raise NotSupported(f"the human monitor cannot be given {word!r}: it holds control characters")
    escaped = word.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def error_in(answer: str) -> str:
    r"""The error that *answer* to savevm, loadvm or delvm is: any text. "" where they say nothing: success.

    ``Error: Device 'd' …\r\n`` becomes ``Device 'd' …``; lines before the ``Error:`` line are kept, as they
    say what went wrong inside.
    """
    lines = [line.strip() for line in answer.splitlines() if line.strip()]
    return "; ".join(line.removeprefix("Error: ") for line in lines)

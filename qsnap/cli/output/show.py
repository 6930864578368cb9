"""The one place that prints: results on standard output, what is said beside them on standard error."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TextIO

from qsnap.cli.output.lines import Aside, Cut, Hint
from qsnap.cli.output.text import cut, printable, wrapped
from qsnap.errors import QsnapError

if TYPE_CHECKING:
    from rich.console import Console

    from qsnap.cli.output.lines import Lines
    from qsnap.model.qemu import Struct


def is_terminal(stream: TextIO) -> bool:
    """Whether colours and bars belong there."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def say(text: str, *, keep_newlines: bool = False) -> None:
    """Write a line, or lines, to standard error; nothing happens if that cannot be written."""
    with suppress(OSError):
        for line in text.split("\n") if keep_newlines else [text]:
            _write_line(line, sys.stderr)


def show(
    result: Struct, *, as_json: bool = False, quiet: bool = False, stream: TextIO | None = None, wide: bool = False
) -> None:
    """Show the result of a command.

    :param stream: instead of standard output.
    :param wide: do not fit tables into the terminal.
    :raise QsnapError: it cannot be written; the command is done.
    """
    stream = stream or sys.stdout
    with written(stream):
        if as_json:
            _write_document(result.to_json(), stream)
        else:
            from qsnap.cli.output.people import lines_of, quiet_lines_of

            write(quiet_lines_of(result) if quiet else lines_of(result), stream, wide=wide)


@contextmanager
def written(stream: TextIO | None = None) -> Iterator[None]:
    """Flush what the block writes. It is not an error if the reader has gone.

    :raise QsnapError: it cannot be written to standard output; the command is done.
    """
    try:
        yield
        (stream or sys.stdout).flush()
    except BrokenPipeError:
        pass
    except OSError as error:
        if stream is sys.stderr:
            return
        raise QsnapError(f"done, but the result could not be written: {error.strerror}") from error


def show_error(error: QsnapError, *, as_json: bool) -> None:
    """Show what went wrong, on standard error; nothing happens if that cannot be written."""
    with suppress(OSError):
        if as_json:
            _write_document(error.to_json(), sys.stderr)
            return
        from qsnap.cli.output.people import lines_of

        write(lines_of(error), sys.stderr)


def write(lines: Lines, stream: TextIO, console: Console | None = None, *, wide: bool = False) -> None:
    """Write lines for people; tables are drawn where the stream is a terminal, or on that console."""
    for line in lines:
        if isinstance(line, Aside):
            say(f"{line.head}: {line.text}", keep_newlines=True)
        elif isinstance(line, Hint):
            if console is not None or is_terminal(stream):
                _write_line(line.text, stream)
        elif isinstance(line, Cut):
            text = printable(line.text)
            stream.write((cut(text, _columns(stream)) if is_terminal(stream) else text) + "\n")
        elif isinstance(line, str):
            _write_line(line, stream)
        elif console is None and not is_terminal(stream):
            stream.write(line.plain() + "\n")
        else:
            from rich.console import Console

            line.draw(console or Console(file=stream), wide=wide)


def _write_line(line: str, stream: TextIO) -> None:
    """Write text that may hold anything; on a terminal its words stay whole."""
    text = printable(line)
    stream.write((wrapped(text, _columns(stream)) if is_terminal(stream) else text) + "\n")


def _columns(stream: TextIO) -> int:
    """The columns of the terminal."""
    if (given := os.environ.get("COLUMNS", "")).isdecimal() and int(given):
        return int(given)
    with suppress(OSError, ValueError):
        if found := os.get_terminal_size(stream.fileno()).columns:
            return found
    return 80


def _write_document(document: Mapping[str, Any], stream: TextIO) -> None:
    """One document, on one line, in ASCII."""
    stream.write(json.dumps(document) + "\n")

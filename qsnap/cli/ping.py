"""Calls of a health check's URL: at the start of a command, and at its good or bad end. None ever fails the command."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from urllib.parse import urlsplit, urlunsplit

from qsnap.cli.output.show import say
from qsnap.errors import BadUsage

#: Seconds that a call may take.
TIMEOUT_S = 5.0
#: Bytes of a message that are sent along.
_MESSAGE_MAX = 10_000


def checked(url: str) -> str:
    """*url*, if it can be called.

    :raise BadUsage: it cannot.
    """
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 (raises for one that is not a number)
    except ValueError as error:
        raise BadUsage(f"{url!r} is not a URL: {error}") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or not url.isprintable() or " " in url:
        raise BadUsage(
            f"{url!r} is not a URL that can be called; a good one begins with https:// or http:// and a host"
        )
    return url


@contextmanager
def pinged(url: str | None) -> Iterator[Callable[[int], None]]:
    """Call URL/start now, and at the end of the block URL, or URL/fail if it raises or reports a code that is not 0.

    The command does not wait for the call at its start; for the one at its end it does, some seconds at most.

    :return: takes the exit code that the command will have.
    """
    if url is None:
        yield lambda _: None
        return
    codes: list[int] = []
    start = _begun(url, "start", "")
    try:
        yield codes.append
    except BaseException as error:
        _ended(start, url, "fail", str(error) or type(error).__name__)
        raise
    failed = any(codes)
    _ended(start, url, "fail" if failed else "", f"exit code {codes[-1]}" if failed else "")


def _begun(url: str, what: str, message: str) -> threading.Thread:
    call = threading.Thread(target=_call, args=(url, what, message), daemon=True)
    call.start()
    return call


def _ended(start: threading.Thread, url: str, what: str, message: str) -> None:
    start.join(TIMEOUT_S)
    end = _begun(url, what, message)
    # A name server, or one that answers a byte at a time, holds it up longer than its own limit
    end.join(TIMEOUT_S + 1)
    if end.is_alive():
        _warn(url, "did not answer in time")


def _call(url: str, what: str, message: str) -> None:
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    parts = urlsplit(url)
    path = f"{parts.path.rstrip('/')}/{what}" if what else parts.path
    body = message.encode(errors="replace")[:_MESSAGE_MAX] or None
    try:
        request = Request(urlunsplit(parts._replace(path=path)), data=body)  # noqa: S310 (see checked)
        with urlopen(request, timeout=TIMEOUT_S):  # noqa: S310
            pass
    except HTTPError as answer:
        answer.close()
        _warn(url, f"answered {answer.code} {answer.reason}".rstrip())
    except Exception as error:  # noqa: BLE001 (whatever a library makes of whatever a server sends)
        reason = getattr(error, "reason", error)  # urllib wraps what the system says
        _warn(url, f"could not be reached: {getattr(reason, 'strerror', None) or reason or type(error).__name__}")


@cache  # the same of both calls is said once
def _warn(url: str, why: str) -> None:
    say(f"warning: the health check at {urlsplit(url).hostname} {why}"[:500])

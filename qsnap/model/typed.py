"""Values of our types, made from JSON and from plain data: by one thread at a time.

What msgspec knows of a Struct type it builds at the type's first use. If a second thread uses the type meanwhile, the
process ends with SIGSEGV (seen with msgspec 0.22, Python 3.11). Several VMs are read in several threads.
"""

from __future__ import annotations

import threading
from typing import TypeVar

import msgspec

_T = TypeVar("_T")
_one = threading.Lock()


def decode(text: bytes | str, kind: type[_T]) -> _T:
    """What JSON says.

    :raise msgspec.DecodeError: it is not JSON, or not of that type.
    """
    with _one:
        return msgspec.json.decode(text, type=kind)


def convert(value: object, kind: type[_T]) -> _T:
    """A value of plain data, as it was decoded from JSON.

    :raise msgspec.ValidationError: it is not of that type.
    """
    with _one:
        return msgspec.convert(value, kind)

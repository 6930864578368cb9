"""The human monitor's quoting, and which of its answers are errors."""

from __future__ import annotations

import pytest

from qsnap.errors import NotSupported
from qsnap.monitor.hmp import text as hmp_text

pytestmark = pytest.mark.no_qemu


def test_hmp_quoting() -> None:
    assert hmp_text.quoted('a "b" \\') == '"a \\"b\\" \\\\"'
    for bad in ("a\nb", "\x1b", "\x7f"):
        with pytest.raises(NotSupported):
            hmp_text.quoted(bad)


def test_hmp_errors() -> None:
    assert hmp_text.error_in("") == hmp_text.error_in("\r\n") == ""
    assert hmp_text.error_in("Error: Snapshot 'x' does not exist in one or more devices\r\n") == (
        "Snapshot 'x' does not exist in one or more devices"
    )
    assert hmp_text.error_in("Size mismatch: pc.ram\r\nError: Error -22 while loading VM state\r\n") == (
        "Size mismatch: pc.ram; Error -22 while loading VM state"
    )

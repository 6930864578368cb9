"""How much memory is free."""

from __future__ import annotations

import os

import pytest

from qsnap.host.memory import available_bytes

pytestmark = pytest.mark.no_qemu


def test_there_is_memory() -> None:
    assert 0 < available_bytes() < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

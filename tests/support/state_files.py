"""State files made on the spot."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

from qsnap.inventory import state_file
from qsnap.inventory.state_file import STREAM_OFFSET, Content

DATE = datetime(2026, 11, 24, 1, 2, 3, 456789, UTC)


def written(path: Path, content: Content) -> Path:
    """A sparse state file around a stream of holes, between its first bytes and its last."""
    with path.open("wb") as file:
        file.truncate(state_file.file_size(content.vm_state_size))
        os.pwrite(file.fileno(), b"}", STREAM_OFFSET + content.vm_state_size - 1)
        os.pwrite(file.fileno(), b"QEVM\0\0\0\3"[: content.vm_state_size], STREAM_OFFSET)
        for offset, data in state_file.envelope(content):
            os.pwrite(file.fileno(), data, offset)
    return path

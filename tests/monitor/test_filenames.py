"""The path of an image, out of what QEMU calls its file name."""

from __future__ import annotations

import pytest

from qsnap.monitor.qmp.replies import image_path

pytestmark = pytest.mark.no_qemu


def test_image_paths() -> None:
    assert image_path("/a/b") == "/a/b"
    assert image_path('json:{"driver": "qcow2", "file": {"driver": "file", "filename": "/x"}}') == "/x"
    for odd in ("json:", "json:[]", 'json:{"file": "node"}', "json:{" * 5000, "nbd://host/x"):
        assert image_path(odd) in ("", "nbd://host/x")

"""A file that is replaced as a whole: whoever reads it finds the old contents or the new, also after a power cut."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def replace_file(path: Path, contents: bytes, prepare: Callable[[int], None]) -> None:
    """Put *contents* in the place of the file at *path*, if there is one. A link leads to what is replaced.

    :param prepare: is given the new file, open, to set its mode and owner; it is of mode 0600.
    :raise OSError: it cannot be written; what stood there stands.
    """
    path = path.resolve()
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name[:200]}.", delete=False) as file:
        try:
            file.write(contents)
            prepare(file.fileno())
            file.flush()
            os.fsync(file.fileno())
            Path(file.name).rename(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise

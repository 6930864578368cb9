"""For mkdocs: the README is the site's first page, and the changelog one of it."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_TOP = Path(__file__).resolve().parent.parent


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add both, with the links as they are inside of docs."""
    for name, source in (("index.md", "README.md"), ("changelog.md", "CHANGELOG.md")):
        text = (_TOP / source).read_text().replace("](docs/", "](").replace("](CHANGELOG.md)", "](changelog.md)")
        files.append(File.generated(config, name, content=text))
    return files

"""Docs and code check each other: exit codes, commands, options, scripts, files."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml

import qsnap
from qsnap.cli import child, cli
from qsnap.cli.commands import job
from qsnap.errors import EXIT_TABLE
from qsnap.upkeep.retention import PERIODS
from support.guest import cli as run_cli

pytestmark = pytest.mark.no_qemu

Named = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
ROOT = Path(__file__).resolve().parents[2]
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
README = PAGES[ROOT / "README.md"]
DOCS = "\n".join(PAGES.values())
REFERENCE = PAGES[ROOT / "docs" / "reference.md"]


def test_the_reference_is_what_the_script_writes() -> None:
    """Options, exit codes and JSON documents: scripts/docs writes them anew."""
    subprocess.run([sys.executable, ROOT / "scripts" / "docs", "--check"], check=True, timeout=60)
    for table in (EXIT_TABLE, job.EXIT_TABLE):
        assert all(f"| {code} | {meaning} |" in REFERENCE for code, meaning in table)


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 160


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", PAGES[target], re.M)
            assert anchor in {re.sub(r"[^\w -]", "", heading).replace(" ", "-").lower() for heading in headings}, link


def test_the_site_has_every_page_and_builds_without_a_warning(tmp_path: Path) -> None:
    nav = re.findall(r"[\w-]+\.md", str(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(nav) == sorted(["index.md", "changelog.md", *(path.name for path in PAGES if path.parent != ROOT)])
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert 'src="demo.svg"' in (tmp_path / "index.html").read_text()


def test_the_exit_table_is_in_the_help() -> None:
    text = run_cli("--help").out
    for code, meaning in EXIT_TABLE:
        assert re.search(rf"^ *{re.escape(code)} +{re.escape(meaning.replace('**', '').replace('`', ''))}$", text, re.M)


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_commands_are_in_the_docs(name: str) -> None:
    assert f"qsnap {name}" in DOCS


def options_of(command: click.Command) -> set[str]:
    return {
        name
        for item in command.params
        if isinstance(item, click.Option) and not item.hidden
        for name in (*item.opts, *item.secondary_opts)
        if name.startswith("--")
    }


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_options_are_in_the_docs(name: str) -> None:
    missing = {option for option in options_of(cli.commands[name]) if option not in DOCS}
    assert missing <= {"--qemu", "--help"}


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_documents_are_in_the_docs(name: str) -> None:
    """What a command prints with --json is in the table of documents."""
    explained = re.findall(r"^\| ([\w, -]+) \| \[\w+\]\(#", REFERENCE, re.M)
    commands = {command for cell in explained for command in cell.split(", ")}
    assert (name in commands) is ("--json" in options_of(cli.commands[name]))


def test_options_in_the_docs_exist() -> None:
    known = {option for command in cli.commands.values() for option in options_of(command)}
    others = set(re.findall(r'"(--qsnap-[a-z-]+)"', (ROOT / "qsnap" / "pytest_plugin.py").read_text()))
    for script in (path for kind in ("prove-*", "bench-*") for path in (ROOT / "scripts").glob(kind)):
        others |= set(re.findall(r'"(--[a-z-]+)"', script.read_text()))
    shown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", DOCS))
    assert shown <= known | others | {"--now", "--diff"}  # of systemctl, and of ansible-playbook


@pytest.mark.parametrize("name", sorted(cli.commands))
def test_which_commands_take_the_common_options(name: str) -> None:
    of_output = {"--json", "--quiet", "--verbose", "--config", "--progress"}
    of_vm = {"--monitor", "--vm", "--timeout", "--lock-wait", "--state-dir", "--ignore-unseen", "--all", "--jobs"}
    of_one = of_output | of_vm - {"--all", "--jobs"}
    taken = {
        "vms": of_output,
        "boot": of_output,
        "export": of_one,
        "completion": set(),
        "demo": set(),
        "help": set(),
        "run": of_one,
        "ensure": of_one,
    }.get(name, of_output | of_vm)
    assert options_of(cli.commands[name]) & (of_output | of_vm) == taken
    table = REFERENCE.split("## Common options\n\n")[1].split("\n\n")[1]
    assert set(re.findall(r"`(--[a-z-]+)", table)) == of_output | of_vm


def test_where_the_docs_say_it_is_decided() -> None:
    """Each function that the table of the design names is in that file."""
    named = re.findall(r"`([\w/]+\.py)`: ((?:`[\w.]+`(?:, )?)+)", PAGES[ROOT / "docs" / "design.md"])
    assert len(named) > 15
    for path, names in named:
        found = ast.parse((ROOT / "qsnap" / path).read_text()).body
        known = {one.name: one for one in found if isinstance(one, Named)}
        known |= {
            f"{name}.{one.name}": one for name, kind in known.items() for one in kind.body if isinstance(one, Named)
        }
        assert set(re.findall(r"[\w.]+", names)) <= known.keys(), path


def test_files_that_the_docs_name_exist() -> None:
    for name in re.findall(r"scripts/[\w-]+", DOCS):
        assert (ROOT / name).exists(), name
    laid_out = PAGES[ROOT / "docs" / "design.md"].split("```text\nqsnap/\n")[1].split("```")[0]
    for name in re.findall(r"[\w/]+\.py|^  \w+/", laid_out, re.M):
        assert (ROOT / "qsnap" / name.strip()).exists(), name


def test_the_library_example_names_what_there_is() -> None:
    example = PAGES[ROOT / "docs" / "python.md"].split("```python")[1].split("```")[0]
    for name in re.findall(r"qsnap\.(\w+)\(", example):
        assert name in qsnap.__all__
    for name in qsnap.__all__:
        assert getattr(qsnap, name)


def test_the_changelog_has_an_unreleased_block_on_top_and_this_version_below() -> None:
    headings = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == "Unreleased"
    assert re.fullmatch(rf"{re.escape(qsnap.__version__)} - \d{{4}}-\d\d-\d\d", headings[1])


def test_the_codes_of_jobs() -> None:
    assert {int(code) for code, _ in job.EXIT_TABLE[:5]} == {
        job.FAILED_AFTER, child.TIMED_OUT, job.FAILED_BEFORE, child.NOT_EXECUTABLE, child.NOT_FOUND,
    }  # fmt: skip


def test_the_policy_options_are_the_periods() -> None:
    names = {period.name for period in PERIODS}
    found = {
        option.removeprefix("--keep-within-") for option in options_of(cli.commands["prune"]) if "-within-" in option
    }
    assert found == names

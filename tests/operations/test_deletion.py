"""Deleting many: what it costs in commands, and what it says of each tag. On real QEMU."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from support.guest import Guest, both_monitors, cli, deliver, finish, start_cli, tags
from support.proxy import Intercept, Proxy, deed


@pytest.fixture
def series(guest: Guest, tmp_path: Path) -> list[str]:
    """Snapshots of one series, oldest first, made without qsnap."""
    names = [f"n-20260101T0000{second:02d}" for second in range(16)]
    for name in names:
        assert guest.qmp.hmp(f"savevm {name}") == ""
    assert tags(tmp_path / "disk1.qcow2") == names
    return names


def commands_of(proxy: Proxy, *arguments: str) -> int:
    """How many commands a run of qsnap sends."""
    proxy.commands.clear()
    cli(*arguments, monitor=proxy.address)
    return len(proxy.commands)


@both_monitors
def test_how_many_commands_a_deletion_takes(
    guest: Guest, series: list[str], tmp_path: Path, intercept: Intercept, transport: str
) -> None:
    """One look at the VM serves all tags; each takes its own deletion, and one look at what has become of it."""
    proxy = intercept(guest)
    each = 4  # the job, its end, its dismissal, the tables; by HMP two lines, and behind each one that ends the answer
    one = commands_of(proxy, "delete", series[0])
    assert one <= (32 if transport == "qmp" else 56), proxy.commands
    four = commands_of(proxy, "delete", *series[1:5])
    assert four <= one + 3 * each, proxy.commands
    pruned = commands_of(proxy, "prune", "--prefix", "n", "--keep-last", "3")
    assert pruned <= one + 7 * each + (12 if transport == "qmp" else 24), proxy.commands  # it looks once more
    for disk in ("disk0.qcow2", "disk1.qcow2"):
        assert tags(tmp_path / disk) == series[-3:]
    guest.assert_running()


@both_monitors
def test_an_interrupt_between_two_says_what_went(
    guest: Guest, series: list[str], tmp_path: Path, intercept: Intercept
) -> None:
    """What QEMU has begun it finishes: that is among it."""
    seen = []

    def interrupt(message: dict[str, Any]) -> None:
        if deed(message) == "snapshot-delete":
            seen.append(message)
            if len(seen) == 3:
                deliver(process, signal.SIGINT)

    process = start_cli("delete", *series[:6], monitor=intercept(guest, on_command=interrupt).address)
    run = finish(process)
    assert run.code == 130, run.err
    assert f"deleted by then: {', '.join(series[:3])}; the guest is running\n" in run.err
    assert tags(tmp_path / "disk0.qcow2") == tags(tmp_path / "disk1.qcow2") == series[3:]
    guest.assert_running()


@both_monitors
def test_a_tag_that_another_client_deletes_meanwhile(
    guest: Guest, series: list[str], tmp_path: Path, intercept: Intercept
) -> None:
    """What is read back after one tag is the look for the next: of that it is said that it is not there."""

    def meddle(message: dict[str, Any]) -> None:
        if deed(message) == "snapshot-delete":
            assert guest.qmp.hmp(f"delvm {series[1]}") == ""

    run = cli("delete", *series[:3], monitor=intercept(guest, on_command=meddle).address, expect=3)
    assert f"no snapshot {series[1]!r} on any device" in run.err
    assert tags(tmp_path / "disk0.qcow2") == series[3:]

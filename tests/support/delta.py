"""Loads of what differs, for their tests: a guest whose RAM is written from outside, and what QEMU has in it."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from random import Random
from typing import Any

import qsnap
from support.guest import Guest, cli

PAGE = 4096
MIB = 1 << 20


def seeded(seed: int) -> Random:
    return Random(seed)  # noqa: S311 (the same in every run)


def ram(guest: Guest, *ranges: tuple[int, int]) -> str:
    """A digest of RAM as QEMU has it: of (address, bytes), by default of all that the counting guest has."""
    digest = hashlib.sha256()
    path = guest.directory / "ram"
    for begin, size in ranges or [(0, 32 * MIB)]:
        guest.qmp("pmemsave", val=begin, size=size, filename=str(path))
        digest.update(path.read_bytes())
        path.unlink()
    return digest.hexdigest()


def host_address(guest: Guest, address: int) -> int:
    return int(guest.qmp.hmp(f"gpa2hva {address:#x}").rpartition(" is ")[2], 16)


def scribble(guest: Guest, dice: Random, *addresses: int, pages: int = 200) -> None:
    """Have other contents in pages behind each address: what was zero is not, and the other way round."""
    guest.qmp("stop")
    with Path(f"/proc/{guest.pid}/mem").open("r+b", buffering=0) as memory:
        for begin in addresses or (4 * MIB,):
            base = host_address(guest, begin)
            for page in dice.sample(range(16 * MIB // PAGE), pages):
                memory.seek(base + page * PAGE + dice.choice([0, 77, PAGE - 1]))
                memory.write(dice.choice([b"\0", b"x"]))
            memory.seek(base + dice.randrange(8 * MIB))
            memory.write(bytes(PAGE * 3 + 1))
    guest.qmp("cont")


def load(guest: Guest, tag: str, *more: str) -> Any:
    return cli("load", tag, "--json", *more, monitor=guest.address).json


def loaded_by_qemu(guest: Guest, tag: str) -> None:
    """Load it by what is no delta, and leave the guest paused."""
    guest.qmp("stop")
    if tag.startswith("live"):
        assert load(guest, tag, "--full")["method"] == "full"
    else:
        assert guest.qmp.hmp(f"loadvm {tag}") == ""


def in_process(guest: Guest, tag: str = "t", timeout_s: float | None = None, **how: Any) -> qsnap.LoadResult:
    """A load by the library, so that its inside can be tampered with."""

    async def loaded() -> qsnap.LoadResult:
        async with qsnap.connect(guest.address, timeout_s=timeout_s) as vm:
            return await vm.load(tag, **how)

    return asyncio.run(loaded())

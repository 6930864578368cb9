"""A QMP server of our own, for what QEMU says only now and then."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from qsnap.monitor.address import UnixAddress
from support.guest import DEADLINE_S

VERSION = {"qemu": {"major": 7, "minor": 2, "micro": 3}, "package": ""}
GREETING = json.dumps({"QMP": {"version": VERSION, "capabilities": []}}).encode() + b"\r\n"

#: What stands among the commands for a file that was handed over.
FILE = "(a file)"
#: What is sent for a command; None: ``{}`` is returned.
Answer = Callable[[dict[str, Any]], bytes | None]


def returned(message: dict[str, Any], value: object) -> bytes:
    number = {"id": message["id"]} if "id" in message else {}  # negotiating has none
    return json.dumps({"return": value, **number}).encode() + b"\r\n"


def failed(message: dict[str, Any], kind: str) -> bytes:
    return json.dumps({"error": {"class": kind, "desc": "why"}, "id": message["id"]}).encode() + b"\r\n"


def event(name: str, second: int = 5, **data: object) -> bytes:
    stamp = {"seconds": second, "microseconds": 250_000}
    return json.dumps({"event": name, "timestamp": stamp, "data": data}).encode() + b"\r\n"


class Server:
    """It greets, and answers. After an empty answer it closes the connection.

    :ivar asked: the commands, in their order.
    :ivar clients: who has come.
    """

    def __init__(self, path: Path) -> None:
        self.address = UnixAddress(str(path))
        self.greeting = GREETING
        self.answer: Answer = lambda _: None
        self.asked: list[dict[str, Any]] = []
        self.clients: list[asyncio.StreamWriter] = []
        self.ended = asyncio.Semaphore(0)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.clients.append(writer)
        with suppress(ConnectionError):
            writer.write(self.greeting)
            await self._talk(reader, writer)
        writer.close()
        self.ended.release()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while said := await reader.read(1 << 16):
            # The library ends no line, and may ask two questions at once; with a file it sends a blank
            for text in said.decode().replace("}{", "}\n{").splitlines():
                if text.startswith(" "):
                    self.asked.append({"execute": FILE})
                if not text.strip():
                    continue
                message = json.loads(text)
                self.asked.append(message)
                reply = None if message["execute"] == "qmp_capabilities" else self.answer(message)
                if reply == b"":
                    return
                writer.write(returned(message, {}) if reply is None else reply)

    async def has_ended(self) -> None:
        async with asyncio.timeout(DEADLINE_S):
            await self.ended.acquire()


@asynccontextmanager
async def serving(directory: Path) -> AsyncIterator[Server]:
    """A server; nothing is at work any more when it has ended."""
    one = Server(directory / "monitor")
    listening = await asyncio.start_unix_server(one.serve, one.address.path)
    try:
        yield one
    finally:
        listening.close()
    async with asyncio.timeout(DEADLINE_S):
        await listening.wait_closed()
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others)

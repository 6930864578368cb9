"""After a load: tell the network where the guest is again, and set the guest's clock through its agent.

A guest that is put back goes on with the clock that it had when it was saved. QEMU's guest agent (qemu-ga) sets it, if
the guest has one and a socket leads to it: ``-chardev socket,id=ga,path=PATH,server=on,wait=off -device virtio-serial
-device virtserialport,chardev=ga,name=org.qemu.guest_agent.0``.

Sources: qga/qapi-schema.json (guest-sync, guest-set-time); `info qtree` and `info chardev`, seen on 5.2 to 11.1.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from contextlib import suppress
from typing import Any

from qsnap.errors import QsnapError
from qsnap.monitor import Monitor

_AGENT = "org.qemu.guest_agent.0"
#: Seconds that the agent has for its answers.
AGENT_S = 5.0


async def announce(monitor: Monitor) -> None:
    """Have QEMU send a packet from each network card of the guest, so that switches learn where it is."""
    with suppress(QsnapError):
        await monitor.human_answer("announce_self")


async def set_clock(monitor: Monitor) -> str:
    """Set the guest's clock to the host's through the guest agent; why that was not possible, "" if it was."""
    socket = agent_socket(await monitor.human_answer("info qtree"), await monitor.human_answer("info chardev"))
    if socket is None:
        return "QEMU has no guest agent's port with a UNIX socket"
    try:
        async with asyncio.timeout(AGENT_S):
            await _set_time(socket)
    except TimeoutError:
        return f"no guest agent answers at {socket}"
    except (OSError, ValueError) as error:
        return f"the guest agent at {socket}: {getattr(error, 'strerror', None) or error}"
    return ""


def agent_socket(qtree: str, chardevs: str) -> str | None:
    """The path of the socket that leads to the guest agent, by the texts of `info qtree` and `info chardev`."""
    for device in re.split(r"^\s*dev: ", qtree, flags=re.M):
        if f'name = "{_AGENT}"' in device:
            chardev = re.search(r'chardev = "([^"]+)"', device)
            row = chardev and re.search(rf"^{re.escape(chardev[1])}: filename=(.*?)\r?$", chardevs, re.M)
            found = row and re.search(r"unix:(.+?)(,server(=on)?)?$", row[1])
            return found[1] if found else None
    return None


async def _set_time(path: str) -> None:
    """Speak with the agent: what is left of another client's talk is read away first.

    :raise OSError: nobody listens there.
    :raise ValueError: it does not understand, or refuses.
    """
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        token = int.from_bytes(os.urandom(4)) >> 1

        async def ask(command: str, **arguments: int) -> None:
            writer.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
            await writer.drain()

        await ask("guest-sync", id=token)
        while (await _answer(reader)).get("return") != token:
            pass
        await ask("guest-set-time", time=time.time_ns())
        answer = await _answer(reader)
        if "return" not in answer:
            raise ValueError(str(answer.get("error", {}).get("desc", answer)))
    finally:
        writer.close()


async def _answer(reader: asyncio.StreamReader) -> dict[str, Any]:
    line = (await reader.readline()).lstrip(b"\xff")
    if not line:
        raise ValueError("it hung up")
    answer = json.loads(line)
    if not isinstance(answer, dict):
        raise ValueError("its answer is not a document")  # noqa: TRY004 (of what came, not of an argument)
    return answer

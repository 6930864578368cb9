"""Two guests that count in step over a channel between their serial ports, and what each knows of the other.

Neither ever has seen a count that the other has not sent yet. After a load that must still be so: if the two are of
different moments, it is not.
"""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import qsnap.guest
from support.guest import GUESTS, Guest, blockdev, cli, disk_device, tool, until

#: The guest's own count, and the last one that it has seen of the other's.
COUNT, SEEN = 0x600, 0x604
#: Seconds without a message after which there is none on its way; the guests send one every 0.055 s.
_QUIET_S = 0.3


class Channel:
    """Passes on what the guests send each other.

    :ivar is_open: False: what they send is lost.
    """

    def __init__(self, sockets: tuple[socket.socket, socket.socket]) -> None:
        self._sockets = sockets
        self.is_open = True
        self._end = os.pipe()
        self._thread = threading.Thread(target=self._pass_on, daemon=True)
        self._thread.start()

    def _pass_on(self) -> None:
        one, other = self._sockets
        to = {one: other, other: one}
        with suppress(OSError):
            while True:
                ready, _, _ = select.select([*map(socket.socket.fileno, to), self._end[0]], [], [])
                if self._end[0] in ready:
                    return
                for source in (sock for sock in to if sock.fileno() in ready):
                    if not (data := source.recv(4096)):
                        return
                    if self.is_open:
                        to[source].sendall(data)

    def close(self) -> None:
        os.write(self._end[1], b"x")
        self._thread.join(10)
        for sock in self._sockets:
            sock.close()
        for end in self._end:
            os.close(end)


class Pair:
    """The two guests, "one" and "two"."""

    def __init__(self, launch: Callable[..., Guest], directory: Path, memory: str = "16") -> None:
        self.guests: dict[str, Guest] = {}
        sockets = []
        lines = []
        for name in ("one", "two"):
            image, line = directory / f"{name}.qcow2", directory / f"{name}.line"
            qsnap.guest.make_disk(image, qemu_img=tool("qemu-img"), sector=(GUESTS / "instep.bin").read_bytes())
            self.guests[name] = launch(
                *blockdev("a", image), *disk_device("a"),
                "-chardev", f"socket,id=line,path={line},server=on,wait=off", "-serial", "chardev:line", memory=memory,
            )  # fmt: skip
            sockets.append(socket.socket(socket.AF_UNIX))
            sockets[-1].connect(str(line))
            lines += [f"[vm.{name}]", f'monitor = "{self.guests[name].address}"']
        self.channel = Channel((sockets[0], sockets[1]))
        self.config = directory / "config.toml"
        self.config.write_text("\n".join(lines) + "\n")

    def qsnap(self, *args: str, expect: int = 0) -> str:
        """Run qsnap with this config file; what it prints."""
        return cli(*args, expect=expect, env={"QSNAP_CONFIG": str(self.config)}).out

    def both(self, *args: str) -> str:
        """The same with both VMs, together."""
        return self.qsnap(*args, "--together", *(word for name in self.guests for word in ("--vm", name)))

    def counts(self) -> list[int]:
        return [guest.word(COUNT) for guest in self.guests.values()]

    def go_on(self, steps: int = 200) -> None:
        """Let them count so many steps from now on."""
        begun = self.counts()
        until(
            f"{steps} steps", lambda: all(now >= then + steps for now, then in zip(self.counts(), begun, strict=True))
        )

    def fall_silent(self) -> None:
        """Lose all that they send, until nothing is on its way: a load does not take that back."""
        self.channel.is_open = False
        ended = threading.Event()
        while True:
            before = [(guest.word(COUNT), guest.word(SEEN)) for guest in self.guests.values()]
            ended.wait(_QUIET_S)
            if before == [(guest.word(COUNT), guest.word(SEEN)) for guest in self.guests.values()]:
                return

    def put_in_step(self, tag: str) -> None:
        """Load both from a save that was of one moment."""
        self.fall_silent()
        self.both("load", tag)
        self.channel.is_open = True

    def contradictions(self) -> list[str]:
        """What one has seen of the other that the other has not sent; the guests stand still."""
        one, two = self.guests.values()
        return [
            f"{name} has seen {seen}, and the other is at {count}"
            for name, seen, count in (
                ("one", one.word(SEEN), two.word(COUNT)),
                ("two", two.word(SEEN), one.word(COUNT)),
            )
            if seen > count
        ]

    def close(self) -> None:
        self.channel.close()


def round_trip(pair: Pair, tag: str, *how: str) -> list[str]:
    """Save both together, let them go on, and load both: the contradictions that there are then; they run again."""
    pair.go_on()
    before = pair.counts()
    pair.both("save", tag, *how)
    after = pair.counts()
    pair.go_on()
    return _loaded(pair, tag, before, after)


def apart(pair: Pair, tag: str, *how: str) -> list[str]:
    """The same with a save of each alone, one after the other."""
    pair.go_on()
    before = pair.counts()
    for name in pair.guests:
        pair.qsnap("save", tag, "--vm", name, *how)
        pair.go_on()
    return _loaded(pair, tag, before, pair.counts(), "--force")


def _loaded(pair: Pair, tag: str, before: list[int], after: list[int], *how: str) -> list[str]:
    pair.fall_silent()
    pair.both("load", tag, "--paused", *how)
    loaded = pair.counts()
    assert all(least <= now <= most for least, now, most in zip(before, loaded, after, strict=True)), (
        f"not the moment of the save: {before} {loaded} {after}"
    )
    found = pair.contradictions()
    pair.channel.is_open = True
    pair.qsnap("resume", *(word for name in pair.guests for word in ("--vm", name)))
    if not found:
        pair.go_on()
    return found

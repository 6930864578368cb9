"""A monitor that answers with mutations of what a real QEMU once answered: recorded, mutated by a seed, replayed.

A :class:`Conversation` is what one command of qsnap's said and heard, as its own debug log shows it. A
:class:`Replayer` plays it to another run of that command, and spoils some of the answers on the way.
"""

from __future__ import annotations

import json
import logging
import random
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

ESCAPE = "\x1b[2J\x1b]0;x\x07\x9b31m\u202e"
#: What stands for a value of any kind. Dates: behind the year 9999, before the year 1; of clocks: beyond 64 bits.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 1 << 31, 1 << 63, 1 << 70, -(1 << 70), 1e308, 0.5, 253402300800, -62135596801,
    "", "x", "x" * 300, "\ud800", "a\udc80b", ESCAPE, "\0", "\n", "[red]x", "é日", "running", "paused", "../../x",
    [], {}, [[]], [None], {"": None}, [{}],
)  # fmt: skip
TEXTS = tuple(value for value in VALUES if isinstance(value, str))
DEEP = 3000
MIB = 1 << 20


class Conversation(NamedTuple):
    """What was said between qsnap and a monitor.

    :ivar said: a command each, and what came between it and its answer, the answer last.
    """

    is_human: bool
    said: list[tuple[Any, list[Any]]]


@contextmanager
def recorded(*, is_human: bool) -> Iterator[Conversation]:
    """Record what qsnap says in the block, in this process."""
    name = "qsnap.hmp" if is_human else "qsnap.qmp"
    messages: list[tuple[str, Any]] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            way, _, text = record.getMessage().partition(" ")
            messages.append((way, json.loads(text)))

    logger, ear = logging.getLogger(name), Ear()
    logger.addHandler(ear)
    logger.setLevel(logging.DEBUG)
    talk = Conversation(is_human, [])
    try:
        yield talk
    finally:
        logger.removeHandler(ear)
        logger.setLevel(logging.NOTSET)
    open_commands: dict[Any, tuple[Any, list[Any]]] = {}
    events: list[Any] = []
    for way, message in messages:
        key = message.get("id") if isinstance(message, dict) else None
        if way == "->":
            open_commands[key] = (message, [])
        elif isinstance(message, dict) and "event" in message:
            events.append(message)
        elif key in open_commands:
            command, answers = open_commands.pop(key)
            answers += [*events, message]
            events = []
            talk.said.append((command, answers))


def _kind(command: Any) -> str:
    """What makes two commands the same: what is different in each run is left out."""
    if isinstance(command, str):
        return command.split("identity=")[0]
    arguments = {
        name: value for name, value in command.get("arguments", {}).items() if name not in ("job-id", "identity")
    }
    return f"{command.get('execute')} {json.dumps(arguments, sort_keys=True)}"


class Spoiled(Exception):
    """The connection is to be closed now."""


class Replayer:
    """A server that plays a conversation, spoiled; :meth:`play` gives it the next one."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp:127.0.0.1:{self._listener.getsockname()[1]}"
        self._play: tuple[Conversation, Callable[[int], random.Random | None], str] | None = None
        self._count = 0
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def play(
        self, talk: Conversation, version: tuple[int, int, int], spoils: Callable[[int], random.Random | None]
    ) -> None:
        """Play *talk* from its beginning, once or in several connections.

        :param spoils: whether the n-th answer is spoiled: by what it returns then.
        """
        self._play, self._count = (talk, spoils, ".".join(map(str, version))), 0

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._serve, args=(client, self._play), daemon=True).start()

    def _serve(self, client: socket.socket, play: Any) -> None:
        with client, suppress(OSError, Spoiled, ValueError):
            _Player(client, *play, count=self._next).run()

    def _next(self) -> int:
        with self._lock:
            self._count += 1
            return self._count


class _Player:
    """One connection."""

    def __init__(
        self, client: socket.socket, talk: Conversation, spoils: Callable[[int], random.Random | None], version: str,
        *, count: Callable[[], int],
    ) -> None:  # fmt: skip
        self._client = client
        self._talk = talk
        self._spoils = spoils
        self._count = count
        self._version = version
        self._left: dict[str, list[tuple[Any, list[Any]]]] = {}
        for command, answers in talk.said:
            self._left.setdefault(_kind(command), []).append((command, answers))
        #: What is different in this run, by what it was in the recorded one.
        self._names: dict[str, str] = {}

    def run(self) -> None:
        if self._talk.is_human:
            self._send(f"QEMU {self._version} monitor - type 'help' for more information\r\n(qemu) ".encode())
        else:
            major, minor, micro = map(int, self._version.split("."))
            version = {"qemu": {"major": major, "minor": minor, "micro": micro}, "package": ""}
            self._answer({"QMP": {"version": version, "capabilities": ["oob"]}}, None)
        pending = ""
        decoder = json.JSONDecoder()
        while data := self._client.recv(65536):
            pending = (pending + data.decode(errors="replace")).lstrip(" ")
            while pending:
                if self._talk.is_human:
                    line, newline, rest = pending.partition("\n")
                    if not newline:
                        break
                    self._hear_line(line)
                else:
                    try:
                        message, end = decoder.raw_decode(pending)
                    except ValueError:
                        break
                    rest = pending[end:].lstrip()
                    self._hear(message)
                pending = rest

    def _send(self, data: bytes) -> None:
        self._client.sendall(data)

    def _recorded(self, command: Any) -> list[Any]:
        kind = _kind(command)
        same = self._left.get(kind) or next(
            (left for other, left in self._left.items() if other.split(" ")[0] == kind.split(" ")[0]), None
        )
        if not same:
            return []
        then, answers = same.pop(0) if len(same) > 1 else same[0]
        if isinstance(command, dict):
            for name in ("job-id", "identity"):
                if name in command.get("arguments", {}) and name in then.get("arguments", {}):
                    self._names[then["arguments"][name]] = command["arguments"][name]
        elif "identity=" in command:
            self._names[then.partition("identity=")[2]] = command.partition("identity=")[2]
        return answers

    def _here(self, value: Any) -> Any:
        text = json.dumps(value)
        for then, now in self._names.items():
            text = text.replace(then, now)
        return json.loads(text)

    def _hear(self, message: dict[str, Any]) -> None:
        answers = self._recorded(message) or [{"return": {}, "id": None}]
        for answer in answers:
            found = self._here(answer)
            if "event" not in found:
                found["id"] = message.get("id")
            self._answer(found, self._spoils(self._count()))

    def _answer(self, value: Any, chance: random.Random | None) -> None:
        if chance is None:
            self._send(json.dumps(value).encode() + b"\r\n")
            return
        others = [answer for _, answers in self._talk.said for answer in answers]
        for data in spoiled_message(value, others, chance):
            self._send(data)

    def _hear_line(self, line: str) -> None:
        if line.startswith("print "):
            number = line.split(" ")[1]
            self._send(f"{line}\r\n{number}\r\n(qemu) ".encode())
            return
        answers = self._recorded(line) if line else [""]
        text = self._here(answers[-1]) if answers else ""
        chance = self._spoils(self._count()) if line else None
        if chance is not None:
            others = [answers[-1] for _, answers in self._talk.said]
            text = spoiled_text(text, others, chance)
        self._send(
            f"{line}\r\n{text}".replace("\r\n", "\n").replace("\n", "\r\n").encode(errors="surrogatepass") + b"(qemu) "
        )


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of each value inside *value*."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def changed(value: Any, others: list[Any], chance: random.Random) -> Any:
    """*value* with something inside it changed."""
    value = json.loads(json.dumps(value))
    found = [path for path in places(value) if path[0] != "id"]
    if not found:
        return value
    *above, last = chance.choice(found)
    inside = value
    for key in above:
        inside = inside[key]
    match chance.randrange(10):
        case 0:
            del inside[last]
        case 1 if isinstance(inside, list):
            inside += inside * 3
        case 2 if others:
            there = list(places(other := chance.choice(others)))
            for key in chance.choice(there) if there else ():
                other = other[key]
            inside[last] = other
        case 3:
            inside[last] = chance.choice(VALUES)
        case _ if isinstance(inside[last], int):
            factor = chance.choice((-1, 0, 1, 1 << 20, 1 << 40, 1 << 70))
            inside[last] = inside[last] * factor + chance.choice((-1, 0, 1, 253402300800, -62135596801))
        case _ if isinstance(inside[last], str):
            inside[last] = chance.choice((inside[last], "")) + chance.choice(TEXTS)
        case _:
            inside[last] = chance.choice(([], {}))
    return value


def spoiled_message(value: Any, others: list[Any], chance: random.Random) -> Iterator[bytes]:
    """What comes over QMP in place of the message *value*.

    :raise Spoiled: the connection is to be closed.
    """
    data = json.dumps(value).encode() + b"\r\n"
    kind = chance.randrange(100)
    if kind < 60:
        for _ in range(chance.choice((1, 1, 2, 5))):
            value = changed(value, others, chance)
        yield json.dumps(value).encode() + b"\r\n"
    elif kind < 66:
        yield json.dumps({**chance.choice(others), "id": value.get("id")}).encode() + b"\r\n"
    elif kind < 72:
        description = chance.choice(("no", ESCAPE, "\ud800", "a 'not found' b", ""))
        error = chance.choice(
            ({"class": "GenericError", "desc": description}, {"class": "CommandNotFound", "desc": "x"}, {}, ESCAPE)
        )
        yield json.dumps({"error": error, "id": value.get("id")}).encode() + b"\r\n"
    elif kind < 80:
        stamp: dict[str, Any] = chance.choice(
            (
                {},
                {"timestamp": {}},
                {"timestamp": None},
                {"timestamp": {"seconds": "x", "microseconds": -1}},
                {"timestamp": {"seconds": 1 << 90, "microseconds": 0}},
            )
        )
        for name in ("STOP", "RESUME", "JOB_STATUS_CHANGE", 5, ESCAPE):
            yield json.dumps({"event": name, "data": chance.choice(VALUES), **stamp}).encode() + b"\r\n"
        yield data
    elif kind < 84:
        yield data[: chance.randrange(len(data))]
        raise Spoiled
    elif kind < 86:
        yield data[: chance.randrange(len(data))]  # and no more: it is silent from now on
    elif kind < 92:
        yield (
            chance.choice(
                (
                    b"garbage",
                    b"\x00\xff\xfe",
                    b"{\r\n",
                    b'{\r\n    "return": {}\r\n}',
                    b"[1]",
                    b"{}",
                    b"",
                    b"9" * 5000,
                    b"[" * DEEP + b"]" * DEEP,
                    b'{"a":' * DEEP,
                )
            )
            + b"\r\n"
        )
    elif kind < 94:
        value["return"] = {"status": "x" * (11 * MIB)}
        yield json.dumps(value).encode() + b"\r\n"
    elif kind < 97:
        yield data + data
    else:
        raise Spoiled


def spoiled_text(text: str, others: list[str], chance: random.Random) -> str:
    """What comes over HMP in place of the answer *text*.

    :raise Spoiled: the connection is to be closed.
    """
    kind = chance.randrange(100)
    lines = text.split("\n")
    at = chance.randrange(len(lines))
    if kind < 20:
        words = lines[at].split(" ")
        words[chance.randrange(len(words))] = str(chance.choice(VALUES)).replace("\r", "")
        lines[at] = " ".join(words)
    elif kind < 30:
        del lines[at]
    elif kind < 40:
        lines[at] = lines[at][: chance.randrange(len(lines[at]) + 1)]
    elif kind < 50:
        lines.insert(
            at, chance.choice((ESCAPE, "Error: " + ESCAPE, "(qemu) ", "unknown command: 'x'", "\ud800", "x" * 5000))
        )
    elif kind < 60:
        lines[at] = "".join(
            chance.choice("0123456789") * chance.choice((1, 30)) if c.isdigit() else c for c in lines[at]
        )
    elif kind < 70:
        return chance.choice(others)
    elif kind < 78:
        return chance.choice(("", "\n", "x", ESCAPE, "Error: x\n", "x" * MIB))
    elif kind < 86:
        lines += lines * 3
    elif kind < 96:
        chance.shuffle(lines)
    else:
        raise Spoiled
    return "\n".join(lines)

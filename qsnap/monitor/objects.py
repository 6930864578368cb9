"""QEMU's tree of objects, over any monitor: the marks that qsnap sets there, and the models of devices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence

from qsnap.errors import CommandFailed, NotSupported
from qsnap.model.qemu import Peripheral

#: The QOM paths below which devices are that the user has made: with an id, and without.
_PERIPHERALS = ("/machine/peripheral", "/machine/peripheral-anon")


def _peripherals(parent: str, properties: Mapping[str, str]) -> Iterator[Peripheral]:
    """The devices below one of :data:`_PERIPHERALS`, from the types of its properties."""
    for name, kind in properties.items():
        if kind.startswith("child<"):
            yield Peripheral(path=f"{parent}/{name}", model=kind.removeprefix("child<").removesuffix(">"))


class Objects(ABC):
    """The verbs of :class:`qsnap.monitor.Monitor` that go by QEMU's objects, for a monitor that can list and read them.

    :ivar qdev_types: the models of the devices that have been asked for, by id or path; "" for one that is not told.
    """

    def __init__(self) -> None:
        self.qdev_types: dict[str, str] = {}

    @abstractmethod
    async def list_objects(self, path: str) -> Mapping[str, str]:
        """The types of the children of an object, by name.

        :raise CommandFailed: there is no such object.
        """

    @abstractmethod
    async def read_property(self, path: str, name: str) -> str:
        """A property of an object, as text.

        :raise CommandFailed: there is no such object, or it has no such property.
        """

    @abstractmethod
    async def add_mark(self, name: str, text: str) -> None:
        """Make an object without effect, which keeps a text."""

    @abstractmethod
    async def delete_object(self, name: str) -> None:
        """Delete an object that a user made."""

    async def peripherals(self) -> Sequence[Peripheral]:
        """The devices that the user has given the guest."""
        return [one for parent in _PERIPHERALS for one in _peripherals(parent, await self.list_objects(parent))]

    async def learn_qdev_type(self, qdev: str) -> None:
        """Query the model of a device, unless it is known."""
        if qdev in self.qdev_types:
            return
        path = qdev if qdev.startswith("/") else f"/machine/peripheral/{qdev}"
        try:
            self.qdev_types[qdev] = await self.read_property(path, "type")
        except (NotSupported, CommandFailed):
            self.qdev_types[qdev] = ""

    async def marks(self, prefixes: tuple[str, ...]) -> Sequence[str]:
        try:
            names = await self.list_objects("/objects")
        except CommandFailed as error:
            if "not found" not in error.reason:
                raise
            return ()  # there are no objects yet (-preconfig)
        return [name for name in names if name.startswith(prefixes)]

    async def mark(self, name: str) -> str | None:
        if name not in await self.marks((name,)):
            return None
        try:
            return await self.read_property(f"/objects/{name}", "identity")
        except CommandFailed as error:
            if "not found" not in error.reason:
                raise
            # It is an object of another type, or was deleted meanwhile
            return "" if "identity" in error.reason else None

    async def set_mark(self, name: str, text: str) -> bool:
        try:
            await self.add_mark(name, text)
        except CommandFailed as error:
            if "duplicate property" in error.reason:
                return False
            raise
        return True

    async def clear_mark(self, name: str) -> None:
        try:
            await self.delete_object(name)
        except CommandFailed as error:
            if "not found" not in error.reason:
                raise

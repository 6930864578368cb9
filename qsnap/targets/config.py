"""The config file: names for VMs, where their monitors are, and defaults for options.

::

    default-vm = "web"              # meant where no other is named

    [defaults]                      # of every VM
    timeout = 600                   # seconds

    [vm.web]
    monitor = "~/vm/web.qmp"        # relative to this file; without it, the running VM of that -name
    exclude = ["scratch"]           # as --exclude scratch
    vmstate = "root"                # as --vmstate root
    no-replace = true               # as --no-replace
    safe-replace = true             # as --safe-replace
    prepare = false                 # as --no-prepare
    lock-wait = 60                  # as --lock-wait 60
    live = "auto"                   # as --live=auto; true, as --live
    state-dir = "/var/vm/states"    # as --state-dir; relative to this file
    ignore-unseen = true            # as --ignore-unseen
    save-current = true             # as --save-current

The command line overrides ``[vm.NAME]``, and that overrides ``[defaults]``. An unknown key is an error that names the
key, because a misspelt default would silently have no effect.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, structs

from qsnap.errors import BadUsage
from qsnap.model import typed
from qsnap.monitor.address import Address, expanded, parse_address


class Settings(msgspec.Struct, frozen=True):
    """Defaults of options; None for an option that is not set."""

    timeout: float | None = None
    vmstate: str | None = None
    exclude: tuple[str, ...] | None = None
    no_replace: bool | None = None
    safe_replace: bool | None = None
    prepare: bool | None = None
    lock_wait: float | None = None
    live: bool | Literal["auto"] | None = None
    state_dir: str | None = None
    ignore_unseen: bool | None = None
    save_current: bool | None = None

    def over(self, others: Settings) -> Settings:
        """These defaults, completed from *others* where they are not set."""
        return structs.replace(
            others, **{name: value for name, value in structs.asdict(self).items() if value is not None}
        )


class ConfiguredVM(msgspec.Struct, frozen=True):
    """One ``[vm.NAME]``.

    :ivar monitor: None means the running VM of that name.
    """

    name: str
    monitor: Address | None
    settings: Settings


class Config(msgspec.Struct, frozen=True):
    """A config file, checked."""

    default_vm: str | None = None
    defaults: Settings = Settings()
    vms: Mapping[str, ConfiguredVM] = {}

    def settings(self, name: str | None) -> Settings:
        """The defaults for the VM with that name in this file, or for a VM that it does not name."""
        found = self.vms.get(name) if name is not None else None
        return found.settings.over(self.defaults) if found else self.defaults


def default_path() -> Path:
    """The default path of the file: ``~/.config/qsnap/config.toml``, or as XDG_CONFIG_HOME says."""
    home = os.environ.get("XDG_CONFIG_HOME", "").strip()
    return Path(home or expanded("~/.config"), "qsnap", "config.toml")


def load(path: str | Path | None = None) -> Config:
    """Read the file at *path*; None means the default file, which need not exist.

    :raise BadUsage: it cannot be read, or has an unknown key or an invalid value.
    """
    where = Path(expanded(str(path))) if path is not None else default_path()
    try:
        text = where.read_text(encoding="utf-8")
    except OSError as error:
        if path is None and isinstance(error, (FileNotFoundError, NotADirectoryError)):
            return Config()
        raise BadUsage(f"the config file {where} cannot be read: {error.strerror}") from error
    except ValueError as error:  # no UTF-8, or a path with a NUL
        raise BadUsage(f"the config file {where} cannot be read: {error}") from error
    return parse(text, where)


def parse(text: str, path: Path) -> Config:
    """The meaning of *text*, as the file at *path*."""
    import tomllib

    try:
        document = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise BadUsage(f"{path}: {error}") from error
    return _Reader(path).config(document)


class _Reader:
    """Checks a document key by key."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def config(self, document: Mapping[str, Any]) -> Config:
        self._known(document, (), ("default-vm", "defaults", "vm"))
        tables = self._table(document, ("vm",))
        return Config(
            default_vm=self._value(document, (), "default-vm", _NAME, "the name of a VM"),
            defaults=self._settings(self._table(document, ("defaults",)), ("defaults",), OPTIONS),
            vms={name: self._vm(name, self._table(tables, ("vm", name))) for name in tables},
        )

    def _vm(self, name: str, table: Mapping[str, Any]) -> ConfiguredVM:
        where = ("vm", name)
        if not name:
            raise self._error(where, "needs a name")
        settings = self._settings(table, where, ("monitor", *OPTIONS))
        monitor = self._value(table, where, "monitor", str, "a string, as after -m")
        if monitor is None:
            return ConfiguredVM(name, None, settings)
        try:
            address = parse_address(monitor, relative_to=str(self._path.absolute().parent))
        except BadUsage as error:
            raise self._error((*where, "monitor"), f"is not valid: {error}") from error
        return ConfiguredVM(name, address, settings)

    def _settings(self, table: Mapping[str, Any], where: tuple[str, ...], known: Iterable[str]) -> Settings:
        self._known(table, where, known)
        values = {key.replace("-", "_"): self._value(table, where, key, *good) for key, good in OPTIONS.items()}
        if values["state_dir"]:
            values["state_dir"] = expanded(values["state_dir"], str(self._path.absolute().parent))
        return Settings(**values)

    def _value(self, table: Mapping[str, Any], where: tuple[str, ...], key: str, good: Any, meaning: str) -> Any:  # noqa: ANN401
        if key not in table:
            return None
        try:
            return typed.convert(table[key], good)
        except msgspec.ValidationError as error:
            raise self._error((*where, key), f"must be {meaning}") from error

    def _table(self, outer: Mapping[str, Any], where: tuple[str, ...]) -> Mapping[str, Any]:
        table = outer.get(where[-1], {})
        if not isinstance(table, dict):
            raise self._error(where, f"must be a table: [{_written(where)}]")
        return table

    def _known(self, table: Mapping[str, Any], where: tuple[str, ...], known: Iterable[str]) -> None:
        for key in table:
            if key not in known:
                from difflib import get_close_matches

                near = get_close_matches(key, known, 1)
                guess = f"; did you mean {near[0]!r}?" if near else f"; known here: {', '.join(known)}"
                raise self._error((*where, key), f"is not known{guess}")

    def _error(self, keys: tuple[str, ...], what: str) -> BadUsage:
        return BadUsage(f"{self._path}: {_written(keys)} {what}")


def _written(keys: tuple[str, ...]) -> str:
    """A key as TOML writes it."""
    return ".".join(key if key.replace("-", "").replace("_", "").isalnum() else f"{key!r}" for key in keys)


_NAME = Annotated[str, Meta(min_length=1)]

#: The keys that are options: which values are good, and in words.
OPTIONS: Mapping[str, tuple[Any, str]] = {
    "timeout": (Annotated[float, Meta(gt=0, lt=1e12)], "a number of seconds above 0"),
    "vmstate": (_NAME, "the name of a node"),
    "exclude": (tuple[_NAME, ...], 'a list of nodes, as ["scratch"]'),
    "no-replace": (bool, "true or false"),
    "safe-replace": (bool, "true or false"),
    "prepare": (bool, "true or false"),
    "lock-wait": (Annotated[float, Meta(ge=0, lt=1e12)], "a number of seconds, or 0"),
    "live": (bool | Literal["auto"], 'true, false or "auto"'),
    "state-dir": (_NAME, "the name of a directory"),
    "ignore-unseen": (bool, "true or false"),
    "save-current": (bool, "true or false"),
}

"""Which files belong to a VM, by their names and by what they say; and what is told of those that cannot be seen."""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from qsnap.errors import NotSupported
from qsnap.inventory import descriptors
from qsnap.inventory.devices import survey
from qsnap.inventory.state_file import Content
from qsnap.inventory.state_store import PART_SUFFIX, SUFFIX, LeftBehind, StateStore
from qsnap.model.checks import Device
from qsnap.model.qemu import BlockGraph, BlockNode, NodeSnapshot
from support.fake_proc import IS_ROOT, NOBODY, as_nobody
from support.graphs import graph, node
from support.guest import open_files
from support.state_files import DATE, written

pytestmark = pytest.mark.no_qemu

CLOCK = 7_000_000
#: A process that is not there: what it has open cannot be seen, and its images are found by their names.
GONE = 1 << 30


def row(tag: str, *, clock: int = CLOCK, size: int = 0) -> NodeSnapshot:
    return NodeSnapshot(tag=tag, id="1", vm_state_size=size, date=DATE, vm_clock_ns=clock)


def disk(name: str, filename: str | Path, *rows: NodeSnapshot, driver: str = "file") -> list[BlockNode]:
    """A node, and the one below it that stores its image."""
    above = node(name, snapshots=rows, children=(("file", f"{name}-file"),))
    return [above, node(f"{name}-file", driver, filename=str(filename))]


def devices(of: BlockGraph) -> tuple[Device, ...]:
    return survey(of).devices


def state(path: Path, tag: str, image: str | Path, clock: int = CLOCK) -> Path:
    return written(path, Content(tag, str(image), 9, DATE, clock))


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Path]:
    """An image that this process has open, as a QEMU has."""
    path = tmp_path / "vm"
    written(path, Content("t", str(path), 9, DATE, CLOCK))  # any image that can be known by what is in it
    with path.open("r+b"):
        yield path


@pytest.fixture
def states(tmp_path: Path) -> Path:
    """A directory for state files."""
    path = tmp_path / "states"
    path.mkdir()
    return path


def test_where_a_file_belongs(image: Path, states: Path) -> None:
    """Beside the image, or in the directory that was chosen, under a name that no other image's has."""
    one = graph(*disk("a", image))
    beside, chosen = StateStore(os.getpid()), StateStore(os.getpid(), states)
    far = StateStore(None)
    assert beside.path_for(one, "a", "t") == image.with_name("vm.t.qsnap")
    path = chosen.path_for(one, "a", "t")
    assert path.parent == states
    assert re.fullmatch(r"vm-[0-9a-f]{8}\.t\.qsnap", path.name)
    assert chosen.beside(one, "a", "", ".x", always=True) == image.with_name("vm.x")
    assert beside.all_beside(one, devices(one), ".x") == (image.with_name("vm.x"),)
    image.with_name("qsnap").touch()  # a name that is looked for to see whether any could be found
    assert (beside.unseen_images(one, devices(one)), chosen.unseen(one, devices(one))) == ((), ())
    both = chosen.all_beside(one, devices(one), ".x")
    assert both == (image.with_name("vm.x"), path.with_name(path.name.replace(".t.qsnap", ".x")))
    # From where the image cannot be seen: by the name that QEMU has for it
    assert StateStore(None, states).path_for(one, "a", "t") == path
    assert StateStore(None, states).all_beside(one, devices(one), ".x") == both[1:]
    assert far.all_beside(one, devices(one), ".x") == ()
    with pytest.raises(NotSupported, match="beside the image of a: it cannot be seen from here"):
        far.path_for(one, "a", "t")


def test_what_an_image_is_called(image: Path) -> None:
    """As a state file names it. A QEMU of another user's is not believed about what it has not open."""
    of = graph(*disk("a", image), *disk("b", "nbd://x", driver="nbd"), *disk("c", "", driver="nbd"), node("d"))
    image.with_name("link").symlink_to(image)
    link = graph(*disk("a", image.with_name("link")))
    assert StateStore(os.getpid()).identity(link, "a") == image
    assert StateStore(None).identity(link, "a") == image.with_name("link")
    assert [str(StateStore(None).identity(of, name)) for name in "bcd"] == ["nbd:/x", "c", "d"]
    assert StateStore(GONE, None, NOBODY).identity(of, "a") == Path(f"~{NOBODY}", str(image).lstrip("/"))
    assert StateStore(GONE).identity(of, "b") == Path("nbd:/x"), "of nobody knows whom, of nothing of this machine"
    if IS_ROOT:
        os.chown(image, NOBODY, NOBODY)
        assert StateStore(GONE, None, NOBODY).identity(of, "a") == image


def test_why_no_file_is_put_beside_an_image(image: Path, states: Path) -> None:
    """What lies in no directory is not missed where another one was chosen."""
    overlay = "/var/tmp/vl.ABCDEF"
    of = graph(
        *disk("a", image), *disk("b", "/none"),
        node("c", filename=overlay, children=(("backing", "a"), ("file", "c-file"))),
        node("c-file", "file", filename=overlay),
        *disk("d", "/dev/sr0", driver="host_cdrom"), *disk("e", "nbd://x", driver="nbd"), node("f"),
    )  # fmt: skip
    store = StateStore(os.getpid())
    assert [store.why_unseen(of, name) for name in "abcdef"] == [
        f"{image} is seen",
        "it cannot be seen from here",
        "it is the temporary overlay of snapshot=on, a file without a name, and gone when QEMU ends",
        "it is on the block device /dev/sr0, beside which no files belong",
        "it is not in a file of this machine (driver nbd)",
        "it cannot be seen from here",
    ]
    assert store.unseen_images(of, devices(of)) == ("/none", overlay, "d", "e", "f")
    assert StateStore(os.getpid(), states).unseen_images(of, devices(of)) == ("/none", "f")
    assert store.way(of, "a") is not None
    assert store.way(of, "e") is None


def test_the_block_device_of_an_image() -> None:
    """There is nothing beside it, but it can be read."""
    with Path("/dev/null").open("rb") as device:
        of = graph(*disk("a", "/dev/null", driver="host_device"))
        store = StateStore(os.getpid())
        assert store.image(of, "a") is None
        assert store.way(of, "a") is not None
        assert str(store.way(of, "a")).startswith(f"/proc/{os.getpid()}/fd/"), device


def test_which_files_are_ours(image: Path, states: Path) -> None:
    """Those under a name of their own; and whatever is under such a name where the disks have a tag without RAM."""
    tags = ("t", "other", "garbage", "pipe", "empty", "none")
    of = graph(*disk("a", image, *map(row, tags), row("full", size=5)))
    store = StateStore(os.getpid(), states)

    def name(tag: str) -> Path:
        return image.with_name(f"vm.{tag}.qsnap")

    def chosen(tag: str) -> Path:
        return store.path_for(of, "a", tag)

    state(name("t"), "t", "/copied/from/elsewhere")
    state(chosen("t"), "t", image)
    state(image.with_name(chosen("t").name), "t", image)
    state(name("gone"), "gone", image)
    state(name("other"), "t", image)
    for tag in "garbage", "full", "unknown":
        name(tag).write_bytes(b"no image")
    name("empty").touch()
    os.mkfifo(name("pipe"))
    # Copies, and those of others
    state(image.with_name("backup.qsnap"), "t", image)
    state(chosen("gone"), "gone", "/somebody/else/s")
    state(states / "vm-00000000.t.qsnap", "t", image)
    state(name("t2"), "t", image)

    found = {Path(file.path): file for file in store.files(of, devices(of))}
    whole = {name("t"), chosen("t"), image.with_name(chosen("t").name), name("gone")}
    troubles = {
        name("other"): "it holds the state of 't'",
        name("garbage"): "it is not one, or has lost its end",
        name("empty"): "it is empty",
        name("pipe"): "it cannot be read: it is not a regular file",
    }
    assert {path: file.trouble for path, file in found.items()} == {**dict.fromkeys(whole, ""), **troubles}
    assert {path for path, file in found.items() if file.is_whole} == whole
    assert all(file.is_readable for file in found.values())
    other = found[name("other")]
    assert (other.holds, other.disk_tag, other.image) == ("t", "other", str(image))
    assert found[name("garbage")].holds == ""


@pytest.mark.skipif(not IS_ROOT, reason="only root can become another user")
def test_a_file_that_may_not_be_read() -> None:
    """It may be one, whatever the disks say: where the state is in the image, too."""
    with tempfile.TemporaryDirectory(prefix="qs-") as name, (Path(name) / "vm").open("wb"):
        image = Path(name) / "vm"
        image.parent.chmod(0o755)
        of = graph(*disk("a", image, row("t"), row("full", size=5)))
        for tag in "t", "full":
            state(image.with_name(f"vm.{tag}.qsnap"), tag, image).chmod(0)
        closed = image.with_name("closed")
        closed.mkdir(0)
        with as_nobody():
            found = StateStore(os.getpid()).files(of, devices(of))
            assert StateStore(os.getpid(), closed).unseen(of, devices(of)) == (str(closed),)
            assert StateStore(os.getpid(), image.with_name("none")).unseen(of, devices(of)) == ()
    assert [(file.disk_tag, file.is_readable) for file in found] == [("full", False), ("t", False)]
    assert {(file.trouble, file.is_whole) for file in found} == {("it may not be read by this user", True)}


def test_a_file_that_has_lost_its_end(image: Path, states: Path) -> None:
    """Its tag is in its name, where that is still one of ours; or at its beginning, where no more is lost."""
    of = graph(*disk("a", image))
    store = StateStore(os.getpid(), states)
    for path, size in (
        (image.with_name("vm.a b.qsnap"), 1 << 16), (store.path_for(of, "a", "c/d"), 1 << 16),
        (image.with_name("copy.e.qsnap"), 1 << 16), (image.with_name("vm.f.qsnap"), -1),
    ):  # fmt: skip
        state(path, "f", image)
        os.truncate(path, size if size > 0 else path.stat().st_size + size)
    found = store.files(of, devices(of))
    assert sorted((one.disk_tag, one.trouble, one.is_whole) for one in found) == [
        (tag, "it is cut short", False) for tag in ("a b", "c/d", "f")
    ]
    assert {one.image for one in found} == {str(image)}


def moved(image: Path) -> Path:
    """The image under another name in another directory."""
    directory = image.with_name("elsewhere")
    directory.mkdir()
    return image.rename(directory / "new")


def test_what_stayed_behind_when_an_image_was_renamed(image: Path, states: Path) -> None:
    """It is what belongs to that snapshot by its clock, and lies where QEMU may lead us."""
    old = image
    disks = disk("a", old, row("t"))
    of = graph(*disks)
    store, chosen = StateStore(os.getpid()), StateStore(os.getpid(), states)
    path, there = store.path_for(of, "a", "t"), chosen.path_for(of, "a", "t")

    def left(store: StateStore = store, tag: str = "t") -> LeftBehind | None:
        again = graph(*disks)
        return store.left_behind(again, devices(again), tag)

    state(path, "t", old)
    assert left() is None, "it was not renamed"
    new = moved(image)
    behind = left()
    assert behind == LeftBehind(path, new, new.with_name("new.t.qsnap"))
    assert behind.sentence("It") == (
        f"It lies at {path}, and the image was renamed since QEMU opened it: it is {new} now. "
        f"Rename it too: mv {path} {new}.t.qsnap"
    )
    assert left(tag="u") is None
    state(path, "t", old, clock=CLOCK + 5_000_000)
    assert left() is None, "of another moment"
    state(path, "u", old)
    assert left() is None, "of another tag"
    path.write_bytes(b"no image")
    assert left() is None
    path.unlink()
    assert left() is None
    path.symlink_to(state(there, "t", old))
    assert left() is None, "a link is not followed"
    in_directory = left(chosen)
    assert in_directory == LeftBehind(there, new, None)
    assert in_directory.cure == f"give {new} the name that it had: its files in {states} go by that"
    if IS_ROOT:
        os.chown(there, NOBODY, NOBODY)
        assert left(chosen) is None, "of a user who does not own the image"


def test_notes_that_stayed_behind(image: Path) -> None:
    """Where none lie beside the image as it is called now."""
    disks = [*disk("a", image), *disk("b", "/none"), *disk("c", "nbd://x", driver="nbd")]
    store = StateStore(os.getpid())
    notes = image.with_name("vm.x")

    def left() -> list[LeftBehind]:
        of = graph(*disks)
        return [*store.left_beside(of, devices(of), ".x")]

    notes.touch()
    assert left() == []
    new = moved(image)
    assert left() == [LeftBehind(notes, new, new.with_name("new.x"))]
    new.with_name("new.x").touch()
    assert left() == []
    new.with_name("new.x").unlink()
    notes.unlink()
    assert left() == []


def test_unfinished_files_are_removed(image: Path, states: Path) -> None:
    """Ours; not those that somebody is writing, and not those of an image whose name does not begin so."""
    of = graph(*disk("a", image))
    store = StateStore(os.getpid(), states)
    gone = [image.with_name(f"vm.t{PART_SUFFIX}"), store.path_for(of, "a", "t").with_suffix(PART_SUFFIX)]
    stay = [image.with_name(name) for name in (f"vm2.t{PART_SUFFIX}", f"vm.held{PART_SUFFIX}", f"vm.t{SUFFIX}")]
    stay.append(states / f"vm.t{PART_SUFFIX}x")
    for path in (*gone, *stay):
        path.touch()
    before = open_files()
    with stay[1].open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        store.remove_parts(of, devices(of))
    assert [path for path in gone if path.exists()] == []
    assert [path for path in stay if not path.exists()] == []
    assert open_files() == before


def test_no_file_stays_open(image: Path) -> None:
    """Whatever is wrong with it: qsnap's process may be one that serves for years."""
    of = graph(*disk("a", image, row("t")))
    store = StateStore(os.getpid())
    path = state(image.with_name("vm.t.qsnap"), "t", image)
    before = open_files()
    (file,) = store.files(of, devices(of))
    os.close(store.opened(file))
    assert open_files() == before
    if IS_ROOT:
        os.chown(path, NOBODY, NOBODY)
        with pytest.raises(PermissionError, match=f"it belongs to user {NOBODY}, and the images to user 0"):
            store.opened(file)
        assert open_files() == before


def test_an_image_is_looked_for_once_in_a_look(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that cannot be seen; the next look looks again."""
    disks = [*disk("a", image), *disk("b", "/none")]
    store, asked = StateStore(os.getpid()), []
    ways = descriptors.ways

    def counted(pid: int | None, of: BlockGraph, node: str) -> object:
        asked.append(node)
        return ways(pid, of, node)

    monkeypatch.setattr(descriptors, "ways", counted)
    for number in (1, 2):
        of = graph(*disks)
        for _ in range(2):
            assert [store.image(of, "a"), store.image(of, "b")] == [image, None]
            assert "seen" in store.why_unseen(of, "b")
        assert sorted(asked) == ["a"] * number + ["b"] * number

"""State files: where they lie, and which snapshot each belongs to.

There is no database. A file lies beside the image that would hold the state, or in a directory of the user's choice,
under a name that is made from the image's name and the tag. The file itself records its image, and the tag under which
the disks hold its snapshot. The pair is known by that tag and by the guest's clock, which stands in the disks' snapshot
tables too. qsnap ignores copies under other names.

A snapshot in an image cannot be renamed. So that a live save can replace another and always keep one, the disks may
hold the new one under a second name, TAG.qsnap-2: when the older one is deleted, that *is* TAG.
"""

from __future__ import annotations

import errno
import os
import shlex
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from urllib.parse import quote_from_bytes, unquote_to_bytes

import msgspec

from qsnap.errors import BadUsage, NotSupported
from qsnap.host import files, trust
from qsnap.inventory import descriptors, state_file
from qsnap.inventory import devices as rules
from qsnap.inventory.state_part import remove_unused
from qsnap.model.checks import Device
from qsnap.model.qemu import BlockGraph
from qsnap.model.snapshots import StateFile

#: The suffix of a state file's name, and that of an incomplete one.
SUFFIX = ".qsnap"
PART_SUFFIX = ".qsnap-part"
#: The most bytes of a file name on Linux.
_NAME_MAX = 255
#: The errors for a file that exists and cannot be read.
_MAY_NOT = (errno.EACCES, errno.EIO)


class LeftBehind(msgspec.Struct, frozen=True):
    """A file of this VM that stayed behind when its image was renamed or moved while QEMU had that open.

    :ivar path: the path of the file.
    :ivar image: the present path of the image.
    :ivar place: where the file belongs now; None if no name for it would fit.
    """

    path: Path
    image: Path
    place: Path | None

    @property
    def clause(self) -> str:
        """A clause that says where the file lies, and why."""
        return f"lies at {self.path}, and the image was renamed since QEMU opened it: it is {self.image} now"

    @property
    def cure(self) -> str:
        """What to do about it."""
        if self.place is not None:
            return f"rename it too: mv {shlex.quote(str(self.path))} {shlex.quote(str(self.place))}"
        return f"give {self.image} the name that it had: its files in {self.path.parent} go by that"

    def sentence(self, subject: str) -> str:
        """Both clauses as a sentence for people."""
        return f"{subject} {self.clause}. {self.cure[0].upper()}{self.cure[1:]}"


class StateStore:
    """The places of one VM's state files.

    :param pid: the QEMU process; None if it is not on this machine.
    :param listener: the user who listens at its socket; None if unknown.
    :ivar state_dir: the directory that the user chose; None for the images' own.
    :ivar ignores_unseen: the user said to ignore what cannot be seen from here.
    :raise BadUsage: the way to *state_dir* leads over another user's symbolic link.
    """

    def __init__(
        self,
        pid: int | None,
        state_dir: Path | None = None,
        listener: int | None = None,
        *,
        ignores_unseen: bool = False,
    ) -> None:
        self._pid = pid
        self._listener = listener
        self._owners: set[int] = set()
        self._seen_of: BlockGraph | None = None
        self._seen: dict[str, Path | str] = {}
        self.state_dir = None if state_dir is None else _real(state_dir)
        self.ignores_unseen = ignores_unseen

    def ignoring_unseen(self) -> StateStore:
        """A copy of this store that ignores what it cannot see."""
        return StateStore(self._pid, self.state_dir, self._listener, ignores_unseen=True)

    def path_for(self, graph: BlockGraph, vmstate: str, disk_tag: str) -> Path:
        """The path of the state file of a snapshot that the disks hold as *disk_tag*.

        :param vmstate: the node that would hold the state.
        :raise NotSupported: the image cannot be seen from here, and no directory was chosen.
        """
        return self.beside(graph, vmstate, _ending(disk_tag), SUFFIX)

    def beside(self, graph: BlockGraph, node: str, end: str, suffix: str, *, always: bool = False) -> Path:
        """The path of a file that belongs to a node's image, made from the image's name, *end* and *suffix*.

        :param always: if the image can be seen, beside it, whatever directory was chosen.
        :raise NotSupported: the image cannot be seen from here, and no directory was chosen.
        """
        image = self.image(graph, node)
        if image is not None and (always or self.state_dir is None):
            return image.with_name(_fitting(image.name + end, suffix))
        if self.state_dir is not None:
            return self.state_dir / _fitting(_unique(self.identity(graph, node)) + end, suffix)
        (name,) = rules.displayed([node], rules.survey(graph).devices)
        raise NotSupported(
            f"no file can be put beside the image of {name}: {self.why_unseen(graph, node)}; "
            "choose a directory: --state-dir DIR"
        )

    def all_beside(self, graph: BlockGraph, devices: Iterable[Device], suffix: str) -> tuple[Path, ...]:
        """The paths of the files with that *suffix* that this VM may have, whether they exist or not."""
        images = self._images(graph, devices)
        paths = [image.with_name(_fitting(image.name, suffix)) for image, is_seen in images.items() if is_seen]
        if self.state_dir is not None:
            paths += [self.state_dir / _fitting(_unique(image), suffix) for image in images]
        return tuple(paths)

    def image(self, graph: BlockGraph, node: str) -> Path | None:
        """The real path of a node's image, if it can be seen and QEMU may lead us there: :mod:`qsnap.host.trust`."""
        found = self._image(graph, node)
        return found if isinstance(found, Path) else None

    def why_unseen(self, graph: BlockGraph, node: str) -> str:
        """Why there is no :meth:`image`."""
        found = self._image(graph, node)
        return f"{found} is seen" if isinstance(found, Path) else found

    def _image(self, graph: BlockGraph, node: str) -> Path | str:
        """The path, or why it cannot be seen. It is looked up once for each graph."""
        if self._seen_of is not graph:
            self._seen_of, self._seen = graph, {}
        if node not in self._seen:
            try:
                self._seen[node] = self._looked_up(graph, node)
            except OSError as error:
                self._seen[node] = str(error.strerror)
        return self._seen[node]

    def _looked_up(self, graph: BlockGraph, node: str) -> Path:
        file = rules.protocol(graph, node)
        if why := _why_no_file(graph, node):
            raise FileNotFoundError(errno.ENOENT, why)
        ways = descriptors.ways(self._pid, graph, node)
        image = trust.image(self._user, file.filename if file else "", ways)
        self._owners.add(files.status(image).st_uid)
        return image

    @cached_property
    def _user(self) -> int | None:
        """The user to whom the QEMU belongs.

        :raise OSError: that user is unknown.
        """
        return None if self._pid is None else trust.user_of(self._pid, self._listener)

    def way(self, graph: BlockGraph, node: str) -> Path | None:
        """A path by which this process may open a node's image or block device; None if it cannot be seen."""
        return descriptors.way(self._pid, graph, node) or descriptors.block_device(self._pid, graph, node)

    def identity(self, graph: BlockGraph, node: str) -> Path:
        """The image's name as a state file records it: its real path, or the name that QEMU uses.

        Another user's QEMU whose image we cannot see must not claim the name of a third user's image.
        """
        return self.image(graph, node) or self._name_of_unseen(graph, node)

    def _name_of_unseen(self, graph: BlockGraph, node: str) -> Path:
        file = rules.protocol(graph, node)
        name = (file and file.filename) or node
        try:
            user = self._user
        except OSError:
            user = self._listener
        return Path(name) if trust.is_believed(user) else Path(f"~{user}", name.lstrip("/"))

    def opened(self, file: StateFile) -> int:
        """Open a state file, for a QEMU to read and write.

        :raise OSError: it cannot be opened, or belongs to a user who does not own the VM's images.
        """
        opened = files.opened(Path(file.path), os.O_RDWR)
        try:
            info = os.fstat(opened)
            owners = self._owners | trust.owners(self._user)
            # The owner of a directory can link another user's file into it, if fs.protected_hardlinks is 0
            if info.st_uid not in (owners if info.st_nlink == 1 else self._owners):
                images = ", ".join(map(str, sorted(self._owners)))
                reason = f"it belongs to user {info.st_uid}, and the images to user {images}"
                raise PermissionError(errno.EPERM, reason, file.path)
        except BaseException:
            os.close(opened)
            raise
        return opened

    def files(self, graph: BlockGraph, devices: Iterable[Device]) -> tuple[StateFile, ...]:
        """The state files of this VM, in the order of their names."""
        devices = tuple(devices)
        images = self._images(graph, devices)
        nodes = {device.image for device in devices if device.image}
        rows = [row for node in nodes for row in graph.nodes[node].snapshots]
        tags = dict.fromkeys(row.tag for row in rows)
        stateless = tags.keys() - {row.tag for row in rows if row.vm_state_size}
        expected = {path: (image, tag) for image in images for tag in tags for path in self._expected(image, tag)}
        found = []
        for path in dict.fromkeys((*self._listed(images, SUFFIX), *sorted(self._unlisted(images, expected)))):
            trouble, holds = "it is not one, or has lost its end", ""
            try:
                file = _looked_at(path)
                if file is not None and path in expected and file.disk_tag != expected[path][1]:
                    holds, file = file.disk_tag, None
                    trouble = f"it holds the state of {holds!r}"
            except OSError as error:
                file, trouble = None, _why_unread(path, error)
            # If the snapshot has its state in the image, this file is the user's; unless we cannot tell.
            if file is None and path in expected and (trouble == _CLOSED or expected[path][1] in stateless):
                file = _unread(path, *expected[path], trouble, holds)
            if file is not None and self._is_ours(file, images):
                found.append(file)
        return tuple(found)

    def unseen(self, graph: BlockGraph, devices: Iterable[Device]) -> tuple[str, ...]:
        """Places of files that qsnap cannot look for: the images beside which they may lie, and directories.

        Directories chosen by other runs are not included.
        """
        devices = tuple(devices)
        closed = (path for path in self._directories(self._images(graph, devices)) if not _is_open(path))
        return (*self.unseen_images(graph, devices), *map(str, closed))

    def unseen_images(self, graph: BlockGraph, devices: Iterable[Device]) -> tuple[str, ...]:
        """The images whose directories cannot be seen from here; and images without a directory, if no --state-dir was
        given."""
        nodes = dict.fromkeys(device.image for device in devices if device.image)
        has_place = {node for node in nodes if self.state_dir is None or not _why_no_file(graph, node)}
        unseen = [node for node in nodes if node in has_place and self.image(graph, node) is None]
        return tuple((file and file.filename) or node for node in unseen for file in [rules.image_file(graph, node)])

    def left_behind(self, graph: BlockGraph, devices: Iterable[Device], disk_tag: str) -> LeftBehind | None:
        """The state file of a tag that stayed at its former place when its image was renamed; None if there is none."""
        for image, old, node in self._renamed(graph, devices):
            clocks = {row.vm_clock_ns // 1_000_000 for row in graph.nodes[node].tagged(disk_tag)}
            for path in self._expected(old, disk_tag) if clocks else ():
                if not self._is_left(path, disk_tag, clocks):
                    continue
                beside = old.with_name(_fitting(old.name + _ending(disk_tag), SUFFIX))
                place = image.with_name(_fitting(image.name + _ending(disk_tag), SUFFIX)) if path == beside else None
                return LeftBehind(path, image, place)
        return None

    def left_beside(self, graph: BlockGraph, devices: Iterable[Device], suffix: str) -> Iterator[LeftBehind]:
        """Files with that suffix beside the former names of images, if there are none beside the present names."""
        for image, old, _ in self._renamed(graph, devices):
            path, place = (one.with_name(_fitting(one.name, suffix)) for one in (old, image))
            if not os.path.lexists(place) and self._may_be_named(path):
                yield LeftBehind(path, image, place)

    def _is_left(self, path: Path, disk_tag: str, clocks: Collection[int]) -> bool:
        """Whether a state file with that tag and one of these clocks (in ms) lies there, or an unreadable one."""
        if not self._may_be_named(path):
            return False
        try:
            file = _looked_at(path)
        except OSError as error:
            return error.errno in _MAY_NOT
        return file is not None and file.disk_tag == disk_tag and file.vm_clock_ns // 1_000_000 in clocks

    def _may_be_named(self, path: Path) -> bool:
        """Whether a file lies there, and belongs to a user to whose files this QEMU may lead us."""
        try:
            return files.status(path).st_uid in self._owners | trust.owners(self._user)
        except OSError:
            return False

    def _renamed(self, graph: BlockGraph, devices: Iterable[Device]) -> Iterator[tuple[Path, Path, str]]:
        """The images that were renamed since QEMU opened them: the present path, the former one, the node."""
        for node in dict.fromkeys(device.image for device in devices if device.image):
            file, image = rules.image_file(graph, node), self.image(graph, node)
            if file is None or image is None:
                continue
            old = Path(file.filename)
            # A relative name does not tell its directory; assume the present one.
            old = Path(os.path.realpath(old.parent), old.name) if old.is_absolute() else image.with_name(old.name)
            if Path(os.path.realpath(old)) != image:
                yield image, old, node

    def remove_parts(self, graph: BlockGraph, devices: Iterable[Device]) -> None:
        """Remove the unfinished files of this VM's live saves. No live save must be under way.

        Names of other VMs' images may begin like ours: a file that somebody is writing stays.
        """
        images = self._images(graph, devices)
        own = {f"{base}." for image in images for base in (image.name, _unique(image))}
        for path in self._listed(images, PART_SUFFIX):
            if any(map(path.name.startswith, own)):
                with suppress(OSError):
                    remove_unused(path)

    def _images(self, graph: BlockGraph, devices: Iterable[Device]) -> dict[Path, bool]:
        """The identity of each image, and whether the image can be seen."""
        nodes = dict.fromkeys(d.image for d in devices if d.image)
        images = {node: self.image(graph, node) for node in nodes}
        return {image or self._name_of_unseen(graph, node): image is not None for node, image in images.items()}

    def _directories(self, images: Mapping[Path, bool]) -> Sequence[Path]:
        directories = dict.fromkeys(image.parent for image, is_seen in images.items() if is_seen)
        if self.state_dir is not None:
            directories[self.state_dir] = None
        return tuple(directories)

    def _listed(self, images: Mapping[Path, bool], suffix: str) -> Iterator[Path]:
        for directory in self._directories(images):
            with suppress(OSError):  # a missing directory, or one that may not be listed: see _unlisted
                yield from sorted(path for path in directory.iterdir() if path.name.endswith(suffix))

    def _unlisted(self, images: Mapping[Path, bool], expected: Iterable[Path]) -> Iterator[Path]:
        """The *expected* paths whose directories may be searched, but not listed."""
        closed = {path for path in self._directories(images) if not os.access(path, os.R_OK, effective_ids=True)}
        return (path for path in expected if path.parent in closed)

    def _expected(self, image: Path, disk_tag: str) -> Iterator[Path]:
        """The possible paths of an image's state file for that tag."""
        ending = _ending(disk_tag)
        yield image.with_name(_fitting(image.name + ending, SUFFIX))
        for directory in {image.parent, *([self.state_dir] if self.state_dir is not None else [])}:
            yield directory / _fitting(_unique(image) + ending, SUFFIX)

    def _is_ours(self, file: StateFile, images: Iterable[Path]) -> bool:
        """Whether a file has the path of a state file with that tag for one of our images.

        A file under any other name is a copy, even if it names our image.
        """
        path, ending = Path(file.path), _ending(file.disk_tag)
        for image in images:
            if path == image.with_name(_fitting(image.name + ending, SUFFIX)):
                return True  # whatever image it names, because it may have been moved or copied together with its image
            if path.name == _fitting(_unique(image) + ending, SUFFIX) and Path(file.image) == image:
                return True  # in the user's directory, which may be the image's
        return False


def _why_no_file(graph: BlockGraph, node: str) -> str:
    """Why a node's image does not lie in a directory; "" if it does, or if QEMU does not tell."""
    protocol = rules.protocol(graph, node)
    if protocol is None:
        return ""
    if graph.nodes[node].is_temporary:
        return "it is the temporary overlay of snapshot=on, a file without a name, and gone when QEMU ends"
    if protocol.driver in ("host_device", "host_cdrom"):
        return f"it is on the block device {protocol.filename}, beside which no files belong"
    return "" if protocol.driver == "file" else f"it is not in a file of this machine (driver {protocol.driver})"


#: The store for a VM without state files, or when they do not matter.
NO_STORE = StateStore(None, ignores_unseen=True)


def _real(state_dir: Path) -> Path:
    """The real path of a directory that the user named, if it exists."""
    try:
        return files.resolved(state_dir)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise BadUsage(f"{state_dir} cannot be the directory for state files: {error.strerror}") from error
        return state_dir.absolute()  # reported when it is used


def _unique(image: Path) -> str:
    """A unique name for an image in a directory for several VMs, whose images may have the same name."""
    import hashlib

    return f"{image.name}-{hashlib.sha256(os.fsencode(image)).hexdigest()[:8]}"


def _ending(disk_tag: str) -> str:
    """The part of a file name that stands for a tag: its UTF-8 bytes, as in QEMU, whatever the locale."""
    tag = quote_from_bytes(disk_tag.encode(errors="surrogateescape"), safe=" +,=@()[]{}~!#$&':;")
    return f".{tag}"


def _fitting(name: str, suffix: str) -> str:
    """The name of a file. A long name is cut, and a checksum makes it unique."""
    room = _NAME_MAX - max(len(PART_SUFFIX), len(suffix))
    if len(os.fsencode(name)) > room:
        import hashlib

        digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
        name = os.fsdecode(os.fsencode(name)[: room - len(digest) - 1]) + f"~{digest}"
    return name + suffix


def read(path: Path) -> StateFile | None:
    """The state file at *path*; None if there is none, or it cannot be read."""
    try:
        return _looked_at(path)
    except OSError:
        return None


def _looked_at(path: Path) -> StateFile | None:
    """The state file at *path*; None if it is not a state file.

    :raise OSError: there is no file, or it cannot be read.
    """
    file = files.opened(path)

    def pread(size: int, offset: int) -> bytes:
        return os.pread(file, size, offset)

    try:
        info = os.fstat(file)
        content = state_file.content_of(pread)
        image = content.image if content else state_file.image_of(pread)
    finally:
        os.close(file)
    if content is None:
        return _cut_short(path, info, image) if image is not None else None
    return StateFile(
        path=str(path),
        size=info.st_size,
        disk_tag=content.tag,
        image=content.image,
        vm_state_size=content.vm_state_size,
        date=content.date,
        vm_clock_ns=content.vm_clock_ns,
        is_whole=(is_whole := info.st_size >= state_file.file_size(content.vm_state_size)),
        trouble="" if is_whole else "it is cut short",
    )


_CLOSED = "it may not be read by this user"


def _why_unread(path: Path, error: OSError) -> str:
    """Why the file cannot be read."""
    if error.errno in _MAY_NOT:
        return _CLOSED
    return "it is a symbolic link" if path.is_symlink() else f"it cannot be read: {error.strerror}"


def _unread(path: Path, image: Path, disk_tag: str, trouble: str, holds: str) -> StateFile | None:
    """A state file that cannot be read; None if it does not exist, or if even that is unknown."""
    try:
        info = path.lstat()
    except OSError:
        return None
    return StateFile(
        path=str(path),
        size=info.st_size,
        disk_tag=disk_tag,
        image=str(image),
        vm_state_size=0,
        date=datetime.fromtimestamp(info.st_mtime, UTC),
        vm_clock_ns=0,
        is_whole=trouble == _CLOSED,
        is_readable=trouble != _CLOSED,
        trouble="it is empty" if stat.S_ISREG(info.st_mode) and not info.st_size else trouble,
        is_link=stat.S_ISLNK(info.st_mode),
        holds=holds,
    )


def _is_open(directory: Path) -> bool:
    """Whether a file in the directory can be looked up by its name; True also if there is no directory."""
    try:
        (directory / "qsnap").lstat()
    except OSError as error:
        return error.errno not in _MAY_NOT
    return True


def _cut_short(path: Path, info: os.stat_result, image: str) -> StateFile | None:
    """A state file that lost its end, which holds the tag. The tag comes from its name, unless that was changed."""
    for base in (Path(image).name, _unique(Path(image))):
        if path.name.startswith(f"{base}."):
            tag = unquote_to_bytes(path.name[len(base) + 1 : -len(SUFFIX)]).decode(errors="surrogateescape")
            return StateFile(
                path=str(path),
                size=info.st_size,
                disk_tag=tag,
                image=image,
                vm_state_size=0,
                date=datetime.fromtimestamp(info.st_mtime, UTC),
                vm_clock_ns=0,
                is_whole=False,
                trouble="it is cut short",
            )
    return None

"""Where a folder lies: its file system, what is free there, and who else may see it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

MOUNTS = Path("/proc/mounts")

# File systems that several machines share, as Linux names them.
NETWORK = (
    *("afs", "beegfs", "ceph", "cifs", "daos", "dvs", "glusterfs", "gpfs", "lustre", "mfs"),
    *("nfs", "nfs4", "orangefs", "panfs", "pvfs2", "quobyte", "smb3", "sshfs", "wekafs"),
)
# Folders that every node has one of its own of.
OWN_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm", "/run")
OWN_TYPES = ("ramfs", "tmpfs")


@dataclass(frozen=True, slots=True)
class Place:
    """A folder and its file system's type, "" where the system does not tell."""

    folder: Path
    type: str

    @property
    def network(self) -> bool:
        """Whether it is a file system that machines share.

        >>> [Place(Path("/a"), kind).network for kind in ("nfs4", "fuse.sshfs", "ext4")]
        [True, True, False]
        """
        return self.type.removeprefix("fuse.") in NETWORK

    @property
    def own(self) -> str:
        """Say why it is most likely a node's own: a folder or a type of file system; or "".

        A network file system may be mounted below /tmp.

        >>> [Place(Path("/tmp/a"), kind).own for kind in ("ext4", "tmpfs", "lustre")]
        ['/tmp', 'tmpfs', '']
        """
        if self.network:
            return ""
        if self.type in OWN_TYPES:
            return self.type
        parents = [str(self.folder), *map(str, self.folder.parents)]
        return next((name for name in OWN_FOLDERS if name in parents), "")


def place(folder: Path) -> Place:
    """Find out where a folder lies, or would, links followed."""
    resolved = folder.expanduser().resolve()
    try:
        mounts = MOUNTS.read_text(encoding="utf-8", errors="replace")
    except OSError:
        mounts = ""
    return Place(resolved, mount_type(mounts, resolved))


def mount_type(mounts: str, folder: Path) -> str:
    r"""Find the type of the file system that holds a folder in the text of /proc/mounts.

    >>> mounts = "/dev/sda / ext4 rw 0 0\nserver:/a /my\\040home nfs4 rw 0 0\n"
    >>> mount_type(mounts, Path("/my home/run")), mount_type(mounts, Path("/my"))
    ('nfs4', 'ext4')
    """
    best, found = -1, ""
    parents = {str(folder), *map(str, folder.parents)}
    for line in mounts.splitlines():
        _, point, kind, *_ = [*line.split(), "", "", ""]
        point = point.replace("\\040", " ")
        # Of two on the same point the later one covers the earlier.
        if point in parents and len(point) >= best:
            best, found = len(point), kind
    return found


@dataclass(frozen=True, slots=True)
class Free:
    """What a user may still put on a file system; ``files`` is None where it has no such limit."""

    bytes: int
    files: int | None


def free(folder: Path) -> Free:
    """Ask how much is free where a folder lies, the nearest that exists.

    Raises:
        OSError: the file system does not answer.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    stat = os.statvfs(there)
    return Free(stat.f_bavail * stat.f_frsize, stat.f_favail if stat.f_files else None)

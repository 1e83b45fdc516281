"""File systems: the type at a folder, its free space, and whether machines share it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

# Those that several machines share, as Linux names them.
NETWORK = (
    *("afs", "beegfs", "ceph", "cifs", "daos", "dvs", "glusterfs", "gpfs", "lustre", "mfs"),
    *("nfs", "nfs4", "orangefs", "panfs", "pvfs2", "quobyte", "smb3", "sshfs", "wekafs"),
)
# Folders that every node has one of its own of.
OWN_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm", "/run")
OWN_TYPES = ("ramfs", "tmpfs")


@dataclass(frozen=True, slots=True)
class Location:
    """A folder, links followed, and its file system's type, "" where it is unknown."""

    folder: Path
    type: str

    @property
    def network(self) -> bool:
        """True if it is on a file system that machines share.

        >>> [Location(Path("/a"), kind).network for kind in ("nfs4", "fuse.sshfs", "ext4")]
        [True, True, False]
        """
        return self.type.removeprefix("fuse.") in NETWORK

    @property
    def own(self) -> str:
        """The reason why it is most likely a node's own, as "below /tmp" or "on tmpfs"; or "".

        A network file system may be mounted below /tmp.

        >>> [Location(Path("/tmp/a"), kind).own for kind in ("ext4", "tmpfs", "lustre")]
        ['below /tmp', 'on tmpfs', '']
        """
        if self.network:
            return ""
        if self.type in OWN_TYPES:
            return f"on {self.type}"
        parents = [str(self.folder), *map(str, self.folder.parents)]
        return next((f"below {name}" for name in OWN_FOLDERS if name in parents), "")


def locate_folder(folder: Path) -> Location:
    """Return the file system of a folder, which need not exist yet."""
    resolved = folder.expanduser().resolve()
    try:
        mounts = Path("/proc/mounts").read_text(encoding="utf-8", errors="replace")
    except OSError:
        mounts = ""
    return Location(resolved, mount_type(mounts, resolved))


def mount_type(mounts: str, folder: Path) -> str:
    r"""Return the type of the file system that holds a folder, from the text of /proc/mounts.

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


def free_space(folder: Path) -> tuple[int, int | None]:
    """Return the bytes and files that a user may still put where a folder lies, or would.

    Files are None where the file system has no such limit.

    Raises:
        OSError: the file system does not answer.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    stat = os.statvfs(there)
    return stat.f_bavail * stat.f_frsize, stat.f_favail if stat.f_files else None

"""What the Hub on loopback holds: git repositories, their commits and files, and who may see them.

Ids of blobs, trees and commits are those that git would give. A large file is in git as an LFS pointer, so
that its blob id is the pointer's, and its own SHA-256 stands beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from functools import cached_property
from pathlib import PurePosixPath
from typing import Literal, Protocol, TypeAlias

Buffer: TypeAlias = "bytes | bytearray | memoryview"
Gate: TypeAlias = Literal[False, "auto", "manual"]


class Content(Protocol):
    """The bytes of a file, made when they are asked for. `read` returns exactly `nbytes` bytes."""

    @property
    def size(self) -> int: ...

    @property
    def sha256(self) -> str: ...

    def read(self, offset: int, nbytes: int) -> Buffer: ...


class Stored:
    """The bytes of a file, held in memory."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    def read(self, offset: int, nbytes: int) -> Buffer:
        return memoryview(self.data)[offset : offset + nbytes]


@dataclass(frozen=True)
class Blob:
    """One version of a file; `lfs` says that git holds only a pointer to it."""

    content: Content
    lfs: bool

    @cached_property
    def pointer(self) -> bytes:
        oid, size = self.content.sha256, self.content.size
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n".encode()

    @cached_property
    def oid(self) -> str:
        return git_id("blob", self.pointer if self.lfs else self.bytes())

    @property
    def etag(self) -> str:
        return f'"{self.content.sha256 if self.lfs else self.oid}"'

    def bytes(self) -> bytes:
        return bytes(self.content.read(0, self.content.size))


@dataclass(frozen=True)
class Commit:
    id: str
    files: Mapping[str, Blob]
    title: str
    date: str
    parent: Commit | None

    def history(self) -> Iterator[Commit]:
        commit: Commit | None = self
        while commit is not None:
            yield commit
            commit = commit.parent

    def last_change_of(self, path: str) -> Commit:
        """The newest commit in which what is under `path` differs from the commit before."""
        return next(c for c in self.history() if c.parent is None or c.under(path) != c.parent.under(path))

    def under(self, path: str) -> dict[str, str]:
        return {p: b.oid for p, b in self.files.items() if p == path or p.startswith(path + "/")}

    def folders(self) -> set[str]:
        return {str(folder) for path in self.files for folder in PurePosixPath(path).parents} - {"."}


@dataclass(frozen=True)
class User:
    name: str
    orgs: frozenset[str] = frozenset()
    can_write: bool = True

    def owns(self, repo_id: str) -> bool:
        namespace = repo_id.partition("/")[0]
        return namespace == self.name or namespace in self.orgs

    def may_write(self, repo_id: str) -> bool:
        return self.can_write and self.owns(repo_id)


@dataclass
class Repo:
    id: str
    private: bool = False
    gated: Gate = False
    #: Users outside of the namespace who may read a gated or private repository.
    readers: set[str] = field(default_factory=set)
    #: False: the Hub says nothing of LFS, as some mirrors do.
    lfs_metadata: bool = True
    branches: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    #: LFS storage, by SHA-256, and the parts of uploads under way.
    objects: dict[str, Content] = field(default_factory=dict)
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)

    def add(self, files: Mapping[str, Blob], branch: str, title: str) -> Commit:
        """A new commit with exactly these files at the tip of a branch; a new branch starts from `main`."""
        parent = self.tip(branch)
        moment = datetime(2025, 1, 1, tzinfo=timezone.utc) + timedelta(minutes=len(self.commits))
        who = f"hub <hub@localhost> {int(moment.timestamp())} +0000"
        lines = [f"tree {tree_id(files)}", *([f"parent {parent.id}"] if parent else [])]
        lines += [f"author {who}", f"committer {who}", "", title, ""]
        oid = git_id("commit", "\n".join(lines).encode())
        commit = Commit(oid, dict(files), title, f"{moment:%Y-%m-%dT%H:%M:%S.000Z}", parent)
        self.commits[commit.id] = self.branches[branch] = commit
        self.objects |= {blob.content.sha256: blob.content for blob in files.values() if blob.lfs}
        return commit

    def admits(self, user: User | None) -> bool:
        """Whether somebody may read it even if it is gated or private."""
        return user is not None and (user.owns(self.id) or user.name in self.readers)

    def tip(self, branch: str) -> Commit | None:
        return self.branches.get(branch) or self.branches.get("main")

    def at(self, revision: str) -> Commit | None:
        return self.branches.get(revision) or self.tags.get(revision) or self.commits.get(revision)


def git_id(kind: str, data: bytes) -> str:
    return hashlib.sha1(b"%s %d\0" % (kind.encode(), len(data)) + data, usedforsecurity=False).hexdigest()


def tree_id(files: Mapping[str, Blob], folder: str = "") -> str:
    """The id of the git tree of a folder ("" is the root)."""
    prefix = f"{folder}/" if folder else ""
    entries: dict[str, tuple[str, str]] = {}
    for path, blob in files.items():
        if path.startswith(prefix):
            name, slash, _ = path[len(prefix) :].partition("/")
            if not slash:
                entries[name] = ("100644", blob.oid)
            elif f"{name}/" not in entries:
                entries[f"{name}/"] = ("40000", tree_id(files, prefix + name))
    lines = (
        f"{mode} {name.rstrip('/')}\0".encode() + bytes.fromhex(oid)
        for name, (mode, oid) in sorted(entries.items(), key=lambda entry: entry[0].encode())
    )
    return git_id("tree", b"".join(lines))

"""The newest releases of packages, and their files, without downloading wheels that have gigabytes."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import urllib.request
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYTHON = "3.12"
PLATFORM = "x86_64-manylinux_2_40"

_KEPT = ("UV_CACHE_DIR", "UV_SYSTEM_CERTS")  # neither changes what is found
_BLOCK = 1 << 17
_TIMEOUT = 60


@dataclass(frozen=True)
class Release:
    """What is published: ``name``, ``version``, and the files of its wheel, or else of its sdist."""

    name: str
    version: str
    files: zipfile.ZipFile | tarfile.TarFile

    def read(self, path: str) -> str | None:
        """A file's text; None if there is no such file."""
        try:
            if isinstance(self.files, zipfile.ZipFile):
                return self.files.read(path).decode()
            file = self.files.extractfile(f"{self.files.getnames()[0].split('/')[0]}/{path}")
            return file.read().decode() if file else None
        except KeyError:
            return None


def newest(names: Iterable[str]) -> list[Release]:
    """The newest releases on the public index.

    Raises:
        OSError: the index cannot be reached.
    """
    with ThreadPoolExecutor() as threads:
        return list(threads.map(_opened, tomllib.loads(_lock(names))["packages"]))


def _lock(names: Iterable[str]) -> str:
    """A pylock.toml of the newest releases. No settings are taken that may add an index, or a folder."""
    environment = {k: v for k, v in os.environ.items() if k in _KEPT or not k.startswith(("UV_", "PIP_"))}
    command = [str(Path(sys.executable).with_name("uv")), "pip", "compile", "-", "--quiet", "--no-config"]
    command += ["--no-deps", "--no-header", "--no-python-downloads", "--format", "pylock.toml"]
    command += ["--python-version", PYTHON, "--python-platform", PLATFORM]
    done = subprocess.run(
        command, env=environment, input="\n".join(names), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise OSError(done.stderr.strip())
    return done.stdout


def _opened(package: dict[str, Any]) -> Release:
    if wheels := package.get("wheels"):
        files: zipfile.ZipFile | tarfile.TarFile = zipfile.ZipFile(_Remote(wheels[0]["url"]))
    else:
        with urllib.request.urlopen(package["sdist"]["url"], timeout=_TIMEOUT) as answer:  # noqa: S310
            files = tarfile.open(fileobj=io.BytesIO(answer.read()))  # noqa: SIM115 - as long as the release
    return Release(package["name"], package["version"], files)


class _Remote(io.RawIOBase):
    """A file behind a URL, of which only the blocks that are read are fetched."""

    def __init__(self, url: str) -> None:
        self._url = url
        with self._open(method="HEAD") as answer:
            self._size = int(answer.headers["Content-Length"])
        self._at = 0
        self._blocks: dict[int, bytes] = {}

    def _open(self, method: str = "GET", **headers: str) -> HTTPResponse:
        request = urllib.request.Request(self._url, headers=headers, method=method)  # noqa: S310
        return urllib.request.urlopen(request, timeout=_TIMEOUT)  # type: ignore[no-any-return] # noqa: S310

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        end = self._size if size is None or size < 0 else min(self._at + size, self._size)
        first, last = self._at // _BLOCK, (end + _BLOCK - 1) // _BLOCK
        data = b"".join(self._block(number) for number in range(first, last))
        data = data[self._at - first * _BLOCK :][: max(end - self._at, 0)]
        self._at += len(data)
        return data

    def _block(self, number: int) -> bytes:
        if number not in self._blocks:
            last = min((number + 1) * _BLOCK, self._size) - 1
            with self._open(Range=f"bytes={number * _BLOCK}-{last}") as answer:
                if answer.status != 206:
                    raise OSError(f"{self._url} cannot be read in parts.")
                self._blocks[number] = answer.read()
        return self._blocks[number]

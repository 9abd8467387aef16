"""The newest release of a package, and its files, without downloading it: an engine's wheel has gigabytes."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPResponse
from pathlib import Path

PYTHON = "3.12"
#: pip takes each tag as it is, so that older systems' wheels are found only if their tags are named, too.
PLATFORMS = ("manylinux2014_x86_64", *(f"manylinux_2_{minor}_x86_64" for minor in range(17, 50)))

_KEPT = ("PIP_CERT", "PIP_CACHE_DIR")  # neither changes what is found
_BLOCK = 1 << 17
_TIMEOUT = 60


@dataclass(frozen=True)
class Release:
    """A wheel: the ``name`` and ``version`` that it has, and its files."""

    name: str
    version: str
    wheel: zipfile.ZipFile

    def read(self, path: str) -> str | None:
        """A file's text; None if the wheel has no such file."""
        try:
            return self.wheel.read(path).decode()
        except KeyError:
            return None


def newest(name: str) -> Release:
    """The newest release on the public index.

    Raises:
        OSError: the index cannot be reached, or has no wheel of the newest release.
    """
    target = ["--python-version", PYTHON]
    for platform in PLATFORMS:
        target += ["--platform", platform]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as threads:
        report = Path(folder, "report.json")
        install = ["install", "--dry-run", "--ignore-installed", "--target", folder, "--report", str(report)]
        install += ["--no-deps", "--only-binary", ":all:", *target, name]
        versions = threads.submit(_pip, ["index", "versions", *target, name])
        _pip(install)
        (found,) = json.loads(report.read_text())["install"]
        listed = re.match(r"\S+ \((\S+)\)", versions.result())
    version = found["metadata"]["version"]
    if listed and listed[1] != version:
        raise OSError(
            f"{name} {listed[1]} has no wheel for Linux and Python {PYTHON}; {version} is the last."
        )
    return Release(name, version, zipfile.ZipFile(_Remote(found["download_info"]["url"])))


def _pip(arguments: list[str]) -> str:
    """What pip prints. It takes no settings that may add an index, or a folder of wheels."""
    environment = {k: v for k, v in os.environ.items() if k in _KEPT or not k.startswith("PIP_")}
    environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    command = [sys.executable, "-m", "pip", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(done.stderr.strip())
    return done.stdout


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

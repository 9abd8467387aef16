"""The check of our engines against new releases finds what changed, here in a small wheel made by hand."""

from __future__ import annotations

import io
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CI = Path(__file__).parents[1] / ".ci"

BASE = """
from abc import ABC, abstractmethod
from dataclasses import dataclass

GROUP = "engine.plugins"

@dataclass
class Info:
    step: int

class Base(ABC):
    @abstractmethod
    def start(self): ...
    @abstractmethod
    async def send(self, weights, step=None): ...

class Engine(Base):
    def shutdown(self): ...

def register(name, cls, *, force=False): ...

def load(source, *, prefetch=False):
    loader(source, named, prefetch=prefetch)
"""

OURS = """
class Ours(Engine):
    def start(self): ...
    async def send(self, weights, step=None): ...

def around(original, source, **options): ...
"""


@pytest.fixture
def ci() -> Iterator[dict[str, Any]]:
    """The modules in .ci, which are no package."""
    sys.path.insert(0, str(CI))
    try:
        import check_engines
        import contracts
        import releases

        yield {"broken": check_engines.broken, **vars(contracts), **vars(releases)}
    finally:
        sys.path.remove(str(CI))


def faults(ci: dict[str, Any], theirs: str, ours: str = OURS) -> list[str]:
    """What the check says of a release whose one module is ``theirs``."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as wheel:
        wheel.writestr("engine/base.py", theirs)
        wheel.writestr("engine/__init__.py", "from .base import Engine, register\n")
    release = ci["Release"]("engine", "1.1", zipfile.ZipFile(file))
    by, at, there = "ours.py", "engine/base.py", "engine/__init__.py"
    reliances = (
        ci["Equals"](by, at, "GROUP", "engine.plugins"),
        ci["Has"](by, at, "Info", "step"),
        ci["Takes"](by, there, "register", "name, cls, *, force"),
        ci["Extends"]("ours.py:Ours", there, "Engine"),
        ci["Wraps"]("ours.py:around", at, "load"),
        ci["Calls"](by, at, "load", "loader(_, _, prefetch=_)"),
    )
    found: list[str] = ci["broken"]("engine 1.1", reliances, release, _Ours(ours))
    return found


class _Ours:
    def __init__(self, text: str) -> None:
        self.text = text

    def read(self, path: str) -> str | None:
        return self.text if path == "ours.py" else None


def test_a_release_that_fits_is_none_of_its_faults(ci: dict[str, Any]) -> None:
    assert faults(ci, BASE) == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("def start(self)", "def begin(self)", "Engine.begin is abstract, and we do not have it"),
        ("def shutdown", "@abstractmethod\n    def shutdown", "Engine.shutdown is abstract, and we"),
        ("weights, step=None", "tensors, step=None", "Engine.send has the parameter tensors, where"),
        ("step=None): ...", "step=None, *, mesh): ...", "Engine.send has the parameter mesh, and ours"),
        ("weights, step=None", "weights", "Engine.send has no parameter"),
        ("async def send", "def send", "Engine.send is a function, and ours async"),
        ("(name, cls, *", "(key, cls, *", "register takes (key, cls), not (name, cls)"),
        ("cls, *, force=False", "cls", "register takes no force="),
        ("force=False", "force=False, scope", "register wants scope, too"),
        ("def register", "def add", "register is no function there any more"),
        ("step: int", "number: int", "Info has no step any more"),
        ('"engine.plugins"', '"engine.hooks"', "GROUP is 'engine.hooks', not 'engine.plugins'"),
        ("GROUP", "PLUGINS", "GROUP is not there any more"),
        ("def load(source", "def load(model, source", "load has the parameter model, where ours does not"),
        ("source, named, prefetch", "source, prefetch", "does not call loader(_, _, prefetch=_): loader("),
        ("loader(source", "read(source", "no such call"),
        ("class Engine(Base)", "class Motor(Base)", "Engine is no class there any more"),
    ],
)  # fmt: skip
def test_a_change_is_found(ci: dict[str, Any], old: str, new: str, said: str) -> None:
    assert old in BASE
    ours = OURS.replace("step=None", "step") if said.endswith("no parameter") else OURS
    found = faults(ci, BASE.replace(old, new), ours)
    assert any(said in line for line in found), found
    for line in found:
        assert line.startswith("engine 1.1: engine/"), "which release, and where"
        assert "ours.py" in line, "and which of our modules relies on it"


def test_a_file_that_is_gone_is_a_fault(ci: dict[str, Any]) -> None:
    release = ci["Release"]("engine", "2", zipfile.ZipFile(io.BytesIO(b"PK\5\6" + bytes(18))))
    (line,) = ci["broken"](
        "engine 2", (ci["Has"]("ours.py", "engine/base.py", "Info"),), release, _Ours(OURS)
    )
    assert line == "engine 2: engine/base.py is not there any more. ours.py relies on Info in it."


def test_a_module_of_ours_that_is_gone_is_a_fault(ci: dict[str, Any]) -> None:
    release = ci["Release"]("engine", "2", zipfile.ZipFile(io.BytesIO(b"PK\5\6" + bytes(18))))
    (line,) = ci["broken"]("engine 2", (ci["Has"]("old.py", "engine/base.py", "Info"),), release, _Ours(OURS))
    assert line == "engine 2: engine/base.py: old.py relies on it and is not there."


def test_an_sdist_is_read_too(ci: dict[str, Any]) -> None:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as sdist:
        for name, text in {"PKG-INFO": "Name: engine", "engine/base.py": BASE}.items():
            member = tarfile.TarInfo(f"engine-1.1/{name}")
            member.size = len(text)
            sdist.addfile(member, io.BytesIO(text.encode()))
    file.seek(0)
    with tarfile.open(fileobj=file) as sdist:
        release = ci["Release"]("engine", "1.1", sdist)
        assert release.read("engine/base.py") == BASE
        assert release.read("engine/none.py") is None


def test_a_wheel_is_read_by_parts(ci: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as wheel:
        wheel.writestr("engine/kernels.so", bytes(range(256)) * 20_000)
        wheel.writestr("engine/base.py", BASE)
    data, fetched = file.getvalue(), []

    class Answer(io.BytesIO):
        def __init__(self, data: bytes, status: int) -> None:
            super().__init__(data)
            self.status, self.headers = status, {"Content-Length": str(len(data))}

    def answer(_: object, method: str = "GET", **headers: str) -> Answer:
        if method == "HEAD":
            return Answer(data, 200)
        first, last = map(int, headers["Range"].removeprefix("bytes=").split("-"))
        fetched.append(last + 1 - first)
        return Answer(data[first : last + 1], 206)

    monkeypatch.setattr(ci["_Remote"], "_open", answer)
    release = ci["Release"]("engine", "1.1", zipfile.ZipFile(ci["_Remote"]("")))
    assert release.read("engine/base.py") == BASE
    assert release.read("engine/none.py") is None
    assert sum(fetched) < len(data) / 10
    assert release.files.testzip() is None
    assert sum(fetched) == len(data), "no byte twice"

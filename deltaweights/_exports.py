"""Public names, written once.

A package's ``__init__.py`` lists them under ``if TYPE_CHECKING:`` as ``from .module import name as name``.
Type checkers read these lines as re-exports, in any kind of install. At run time they tell where each name
comes from; it is imported on first use, so that importing the package stays quick.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

_LINE = re.compile(r"^    from (\.[\w.]+) import (\w+) as \2$", re.MULTILINE)


def exports(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """``__getattr__``, ``__dir__`` and ``__all__`` for the package of this name, from its source.

    Raises:
        ImportError: the source is not there, as in a program frozen without it.
    """
    spec: Any = sys.modules[package].__spec__
    try:
        # Not the loader's get_source: what it imports would take a tenth of the time that the package takes.
        source = spec.loader.get_data(spec.origin).decode()
    except (AttributeError, OSError, UnicodeDecodeError) as error:
        raise ImportError(f"{package} needs its own source: include its .py files", name=package) from error
    modules = {name: module for module, name in _LINE.findall(source)}

    def find(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name)
        value = getattr(import_module(modules[name], package), name)
        setattr(sys.modules[package], name, value)
        return value

    return find, lambda: sorted(modules), sorted(modules)

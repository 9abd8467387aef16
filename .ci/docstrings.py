"""For mkdocstrings: turns into Markdown what our docstrings have besides, and warns of missing docstrings.

Roles such as ``:func:`name``` become code. `mkdocs build --strict` fails on the warnings.
"""

from __future__ import annotations

import logging
import re
from typing import Any

import griffe

_LOG = logging.getLogger("mkdocs.plugins.deltaweights")
_ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`\.*([^`]+)`")


class Docstrings(griffe.Extension):
    """Loaded by its path, from mkdocs.yml."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = _ROLE.sub(r"`\1`", obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        for module in (pkg, pkg["torch"]):
            for name in module.exports or ():
                if not str(name).startswith("__") and not module[str(name)].has_docstring:
                    _LOG.warning("%s.%s is public and has no docstring", module.path, name)

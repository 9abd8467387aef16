"""What our engines rely on in a release, checked by its source: nothing of it is imported.

Each class is one kind of thing that is relied on. Its ``broken`` says in a line what changed. ``by`` is our
module, or ``module:name`` in it, and ``at`` theirs. A name has dots: ``Class.method``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol, TypeAlias

Function: TypeAlias = "ast.FunctionDef | ast.AsyncFunctionDef"
Definition: TypeAlias = "ast.ClassDef | Function"

_DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_LONGEST_WAY = 8  # re-exports, or bases, one after another


class Files(Protocol):
    """A release, or our own tree."""

    def read(self, path: str) -> str | None:
        """A file's text; None if there is none."""


@dataclass(frozen=True)
class Tree:
    """The files under a folder."""

    root: Path

    def read(self, path: str) -> str | None:
        file = self.root / path
        return file.read_text() if file.is_file() else None


@dataclass(frozen=True)
class Takes:
    """We call their function ``name`` with ``parameters``, written as in a ``def``, without ``self``."""

    by: str
    at: str
    name: str
    parameters: str

    def broken(self, theirs: Files, _: Files) -> Iterator[str]:
        found = find(theirs, self.at, self.name)
        if not isinstance(found, _FUNCTIONS):
            yield f"{self.name} is no function there any more"
            return
        ours = _parameters(_defined(f"def f({self.parameters}): ..."))
        has = _parameters(found, "." in self.name)
        if has.positional[: len(ours.positional)] != ours.positional and not has.takes_more:
            yield f"{self.name} takes ({', '.join(has.positional)}), not ({', '.join(ours.positional)})"
        for keyword in ours.keywords - set(has.positional) - has.keywords:
            if not has.takes_keywords:
                yield f"{self.name} takes no {keyword}="
        for name in sorted(has.required - set(ours.positional) - ours.keywords):
            yield f"{self.name} wants {name}, too"


@dataclass(frozen=True)
class Extends:
    """Our class ``by`` extends their class ``name``: it has every abstract method, and what it overrides
    takes what theirs takes."""

    by: str
    at: str
    name: str

    def broken(self, theirs: Files, ours: Files) -> Iterator[str]:
        (at, found), own = _located(theirs, self.at, self.name), find(ours, *_place(self.by))
        if not isinstance(found, ast.ClassDef) or not isinstance(own, ast.ClassDef):
            yield f"{self.name} is no class there any more" if own else "our class is not there"
            return
        mine = _methods(ours, _place(self.by)[0], own)
        for name, method in sorted(_methods(theirs, at, found).items()):
            if name in mine:
                yield from _unlike(f"{self.name}.{name}", method, mine[name], is_method=True)
            elif _decorated(method) & {"abstractmethod", "abstractproperty"}:
                yield f"{self.name}.{name} is abstract, and we do not have it"


@dataclass(frozen=True)
class Wraps:
    """Our function ``by`` takes what their function ``name`` takes, after the function that it wraps."""

    by: str
    at: str
    name: str

    def broken(self, theirs: Files, ours: Files) -> Iterator[str]:
        found, own = find(theirs, self.at, self.name), find(ours, *_place(self.by))
        if not isinstance(found, _FUNCTIONS) or not isinstance(own, _FUNCTIONS):
            yield f"{self.name} is no function there any more" if own else "our function is not there"
            return
        del own.args.args[:1]
        yield from _unlike(self.name, found, own, is_method=False)


@dataclass(frozen=True)
class Has:
    """Their class ``name`` has these attributes, methods or fields, itself or by its bases."""

    by: str
    at: str
    name: str
    attributes: str = ""

    def broken(self, theirs: Files, _: Files) -> Iterator[str]:
        at, found = _located(theirs, self.at, self.name)
        if found is None:
            yield f"{self.name} is not there any more"
        elif isinstance(found, ast.ClassDef):
            has = {one for _, cls in _family(theirs, at, found) for one in _attributes(cls)}
            for name in sorted(set(self.attributes.split()) - has):
                yield f"{self.name} has no {name} any more"


@dataclass(frozen=True)
class Calls:
    """Their function ``name`` calls one of ours as ``pattern`` says, whose arguments are ``_``."""

    by: str
    at: str
    name: str
    pattern: str

    def broken(self, theirs: Files, _: Files) -> Iterator[str]:
        found = find(theirs, self.at, self.name)
        wanted = next(node for node in ast.walk(ast.parse(self.pattern)) if isinstance(node, ast.Call))
        if found is None:
            yield f"{self.name} is not there any more"
            return
        calls = [node for node in ast.walk(found) if isinstance(node, ast.Call)]
        named = [call for call in calls if _called(call) == _called(wanted)]
        if not any(_form(call) == _form(wanted) for call in named):
            has = "; ".join(ast.unparse(call) for call in named) or "no such call"
            yield f"{self.name} does not call {self.pattern}: {has}"


@dataclass(frozen=True)
class Equals:
    """Their constant ``name`` has this value."""

    by: str
    at: str
    name: str
    value: str

    def broken(self, theirs: Files, _: Files) -> Iterator[str]:
        for node in _body(_parsed(theirs, self.at)):
            if isinstance(node, ast.Assign) and [ast.unparse(one) for one in node.targets] == [self.name]:
                if ast.unparse(node.value) != repr(self.value):
                    yield f"{self.name} is {ast.unparse(node.value)}, not {self.value!r}"
                return
        yield f"{self.name} is not there any more"


Reliance: TypeAlias = "Takes | Extends | Wraps | Has | Calls | Equals"


def find(files: Files, path: str, name: str) -> Definition | None:
    """A class or function by its dotted name, also where the module imports it from another."""
    return _located(files, path, name)[1]


def _located(files: Files, path: str, name: str) -> tuple[str, Definition | None]:
    """With the module that defines it."""
    for _ in range(_LONGEST_WAY):
        first, *rest = name.split(".")
        body = list(_body(_parsed(files, path)))
        for node in body:
            if isinstance(node, _DEFINITIONS) and node.name == first:
                return path, _inner(node, rest)
        origin = _imports(path, body).get(first)
        if origin is None:
            break
        module, theirs = origin
        name = ".".join([theirs, *rest])
        path = next((one for one in _files_of(module) if files.read(one) is not None), "")
    return path, None


def _inner(node: Definition, names: list[str]) -> Definition | None:
    for name in names:
        inside = [one for one in node.body if isinstance(one, _DEFINITIONS) and one.name == name]
        if not inside:
            return None
        node = inside[0]
    return node


@cache
def _tree(text: str) -> ast.Module:
    return ast.parse(text)


def _parsed(files: Files, path: str) -> ast.Module:
    return _tree(files.read(path) or "")


def _body(module: ast.Module) -> Iterator[ast.stmt]:
    """A module's statements, with those that an ``if`` or a ``try`` holds."""
    for node in module.body:
        yield node
        if isinstance(node, (ast.If, ast.Try)):
            yield from (
                inner for inner in ast.walk(node) if isinstance(inner, ast.stmt) and inner is not node
            )


def _imports(path: str, body: list[ast.stmt]) -> dict[str, tuple[str, str]]:
    """For each name that a module imports: from which module, and its name there."""
    folder = path.split("/")[:-1]
    found: dict[str, tuple[str, str]] = {}
    for node in body:
        if isinstance(node, ast.ImportFrom):
            above = folder[: len(folder) - node.level + 1] if node.level else []
            module = "/".join([*above, *(node.module or "").split(".")]).strip("/")
            found |= {alias.asname or alias.name: (module, alias.name) for alias in node.names}
    return found


def _files_of(module: str) -> tuple[str, str]:
    return f"{module}.py", f"{module}/__init__.py"


def _place(by: str) -> tuple[str, str]:
    module, _, name = by.partition(":")
    return module, name


def _family(files: Files, path: str, cls: ast.ClassDef) -> list[tuple[str, ast.ClassDef]]:
    """The class and its bases, as far as the release has them."""
    found = [(path, cls)]
    for where, one in found:
        for base in one.bases if len(found) < _LONGEST_WAY else []:
            name = ast.unparse(base.value if isinstance(base, ast.Subscript) else base)
            home, parent = _located(files, where, name)
            if isinstance(parent, ast.ClassDef):
                found.append((home, parent))
    return found


def _methods(files: Files, path: str, cls: ast.ClassDef) -> dict[str, Function]:
    """A class's methods and its bases', the nearest of each name."""
    found: dict[str, Function] = {}
    for _, one in _family(files, path, cls):
        for node in one.body:
            if isinstance(node, _FUNCTIONS):
                found.setdefault(node.name, node)
    return found


def _attributes(cls: ast.ClassDef) -> set[str]:
    """What a class defines, and what its methods assign to ``self``."""
    found = {node.name for node in cls.body if isinstance(node, _DEFINITIONS)}
    for node in ast.walk(cls):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    for line in cls.body:
        targets = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


@dataclass(frozen=True)
class _Parameters:
    positional: tuple[str, ...]
    keywords: frozenset[str]
    required: frozenset[str]
    takes_more: bool
    takes_keywords: bool


def _parameters(function: Function, is_method: bool = False) -> _Parameters:
    given = function.args
    every = [one.arg for one in (*given.posonlyargs, *given.args)]
    required = every[: len(every) - len(given.defaults)]
    if is_method and "staticmethod" not in _decorated(function) and every[:1] in (["self"], ["cls"]):
        every, required = every[1:], required[1:]
    wanted = [
        one.arg for one, value in zip(given.kwonlyargs, given.kw_defaults, strict=True) if value is None
    ]
    return _Parameters(
        tuple(every),
        frozenset(one.arg for one in given.kwonlyargs),
        frozenset([*required, *wanted]),
        given.vararg is not None,
        given.kwarg is not None,
    )


def _unlike(name: str, theirs: Function, ours: Function, *, is_method: bool) -> Iterator[str]:
    """How our function does not take what theirs takes."""
    has, own = _parameters(theirs, is_method), _parameters(ours, is_method)
    if type(theirs) is not type(ours) or _kind(theirs) != _kind(ours):
        yield f"{name} is {_kind(theirs)}, and ours {_kind(ours)}"
    for place, one in enumerate(has.positional):
        if one not in own.positional[place : place + 1] and not own.takes_more:
            yield f"{name} has the parameter {one}, where ours does not"
    for one in sorted(has.keywords - own.keywords - set(own.positional)):
        if not own.takes_keywords:
            yield f"{name} has the parameter {one}, and ours does not"
    for one in sorted(own.required - set(has.positional) - has.keywords) if not has.takes_keywords else ():
        yield f"{name} has no parameter {one} any more, which ours wants"


def _kind(function: Function) -> str:
    kinds = _decorated(function) & {"classmethod", "staticmethod", "property"}
    return " ".join([*sorted(kinds), "async" if isinstance(function, ast.AsyncFunctionDef) else "a function"])


def _decorated(node: Definition) -> set[str]:
    return {ast.unparse(one).rpartition(".")[2] for one in node.decorator_list}


def _defined(text: str) -> Function:
    return next(node for node in ast.walk(ast.parse(text)) if isinstance(node, _FUNCTIONS))


def _called(call: ast.Call) -> str:
    return ast.unparse(call.func).rpartition(".")[2]


def _form(call: ast.Call) -> tuple[int, set[str | None]]:
    return len(call.args), {keyword.arg for keyword in call.keywords}

"""The house: which names are public, who may import whom, and what importing costs."""

from __future__ import annotations

import ast
import compileall
import inspect
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import deltaweights
import deltaweights.engines
import deltaweights.torch

PACKAGE = Path(deltaweights.__file__).parent
PUBLIC: list[Any] = [
    deltaweights,
    pytest.param(deltaweights.torch, marks=pytest.mark.skipif(not find_spec("torch"), reason="needs torch")),
    pytest.param(
        deltaweights.engines, marks=pytest.mark.skipif(not find_spec("torch"), reason="needs torch")
    ),
]

#: For each folder, what stands in it, lowest rank first. Each may import from lower ranks only.
RANKS: dict[str, tuple[str, ...]] = {
    "": (
        "_exports _version dtypes errors pages recent words",
        "metrics",
        "workers",
        "canonical entries",
        "adapters",
        "codec manifest storage",
        "checkpoint executors signing",
        "payload",
        "changes license match",
        "lineage",
        "card inputs",
        "delta",
        "bom compare diff inspect patch",
        "compact estimate plan report verify",
        "batch push sign torch",
        "attest",
        "engines",
        "cli",
        "__init__ __main__",
    ),
    "batch": ("base_cache jobs results", "job", "running", "__init__"),
    "card": ("front_matter links", "writing", "__init__"),
    "changes": ("grouping", "grid", "measures", "palette sentences", "picture", "__init__"),
    "checkpoint": ("header index other_formats", "checkpoint", "gathered oddities", "__init__"),
    "cli": (
        "layout machines options",
        "rendering",
        "streams",
        "logs usage",
        "progress",
        "session",
        "batches lineage signatures",
        "weight_streams",
        "commands",
        "__init__",
    ),
    "codec": (
        "constants convert kernel_arrays opaque processor tables working_memory",
        "quantized",
        "kernels library",
        "cache",
        "build",
        "jit",
        "compiled",
        "methods",
        "low_rank rows",
        "predictions",
        "__init__",
    ),
    "codec/build": (
        "c_compiler signatures targets",
        "bitcode vector_operations",
        "machine_code",
        "library",
        "__init__ __main__",
    ),
    "codec/kernels": (
        "kernel vectors",
        "arithmetic simd xxh3",
        "runs",
        "difference low_rank standalone",
        "low_rank_fit",
        "subset",
        "rows",
        "__init__",
    ),
    "codec/low_rank": ("blas efforts prediction", "fit writing", "search", "__init__"),
    "codec/methods": (
        "entropy ulp",
        "planes",
        "floats words",
        "drift exponent_window sparse without_zstd",
        "chunk",
        "__init__",
    ),
    "delta": (
        "digests entry opening shards faults",
        "bases encoding pointer signed",
        "recipes",
        "target_recipe",
        "rebuilt",
        "chain",
        "pinned sampling target writer",
        "encoder",
        "encoding_tasks",
        "__init__",
    ),
    "engines": (
        "decoding disk_updates placement pointer required_keys verl",
        "host_mirror vllm_loader",
        "follower",
        "sglang vllm_transfer",
        "vllm",
        "__init__",
    ),
    "engines/disk_updates": (
        "checksums encodings",
        "layout",
        "folder writing",
        "chain model_folder",
        "importing writer",
        "exporting",
        "__init__",
    ),
    "executors": ("carrying kept", "executor", "ray_executor", "__init__"),
    "license": ("table", "rules", "bom cards", "__init__"),
    "license/bom": ("facts", "cyclonedx spdx", "__init__"),
    "lineage": (
        "choosing directions",
        "documents sampling",
        "measures structure",
        "scale",
        "geometry",
        "doubts pairs",
        "verdicts",
        "__init__",
    ),
    "match": (
        "similarity",
        "vectors",
        "layouts",
        "candidates",
        "runs",
        "advice parts",
        "names",
        "duplicates low_rank quantized references",
        "__init__",
    ),
    "payload": ("chunks faults", "reader writer", "whole", "__init__"),
    "report": (
        "spectrum",
        "movement tokens",
        "maps overlaps reading",
        "measures page",
        "comparison_page results",
        "making",
        "side_by_side",
        "__init__",
    ),
    "signing": (
        "bundle extra",
        "keys statement",
        "signers trust",
        "signature",
        "attestation",
        "__init__",
    ),
    "storage": (
        "traffic",
        "hub_errors patience source system",
        "destination file_names local read_ahead",
        "hub_client output remote",
        "hub hub_upload store",
        "joined location",
        "pinned unlocked",
        "__init__",
    ),
    "storage/store": ("errors", "client", "source upload", "files", "folder unlocked", "__init__"),
    "torch": ("boxes tensors wholeness wrappers", "dcp models stream", "__init__"),
    "torch/dcp": ("record", "base", "folder write", "storage", "__init__"),
    "torch/models": (
        "memory pretrained training_state",
        "conversion layout run_folder",
        "load",
        "checkpoints from_pretrained save",
        "callback",
        "__init__",
    ),
    "torch/stream": (
        "gpu_kernels records",
        "gpu heads transport",
        "state",
        "cast payloads split",
        "pieces",
        "following publishing",
        "__init__",
    ),
    "torch/stream/following": (
        "gpu_replay held history mirror position",
        "replay",
        "writing",
        "prepared",
        "subscriber",
        "__init__",
    ),
    "torch/stream/publishing": ("division kept ranks", "publisher", "__init__"),
}


def _rank(folder: str, name: str) -> int:
    return next(rank for rank, names in enumerate(RANKS[folder]) if name in names.split())


@pytest.mark.parametrize("package", PUBLIC)
def test_public_names_are_those_that_a_type_checker_reads(package: ModuleType) -> None:
    """And each is what the module has that the line names."""
    lines = list(_re_exports(package))
    assert package.__all__ == dir(package) == sorted(name for _, name in lines)
    for module, name in lines:
        if name != "DeltaCallback" or find_spec("transformers"):
            assert getattr(package, name) is getattr(import_module(module, package.__name__), name)
    with pytest.raises(AttributeError, match="no_such_name"):
        package.no_such_name  # noqa: B018


def test_a_star_imports_every_public_name() -> None:
    names: dict[str, object] = {}
    exec("from deltaweights import *", names)  # noqa: S102
    assert set(names) - {"__builtins__"} == set(dir(deltaweights))


def test_a_package_without_its_source_says_so(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "deltaweights", ignore=shutil.ignore_patterns("*.so", "*.pyc"))
    assert compileall.compile_file(tmp_path / "deltaweights" / "__init__.py", quiet=1, legacy=True)
    (tmp_path / "deltaweights" / "__init__.py").unlink()
    command = [sys.executable, "-c", "import deltaweights"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env={})
    assert "ImportError: deltaweights needs its own source" in done.stderr


@pytest.mark.parametrize("package", PUBLIC)
def test_public_names_are_documented(package: ModuleType) -> None:
    """Classes and functions, and what classes have that is public, by docstrings; other names by ``#:``."""
    for module, name in _re_exports(package):
        path = PACKAGE.joinpath(*f"{package.__name__}{module}".split(".")[1:]).with_suffix(".py")
        source = path.read_text()
        (*_, node) = (node for node in ast.parse(source).body if name in _names_of(node))  # after overloads
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            members = [node, *(node.body if isinstance(node, ast.ClassDef) else [])]
            functions = [one for one in members if isinstance(one, (ast.ClassDef, ast.FunctionDef))]
            assert not [
                one.name
                for one in functions
                if not one.name.startswith("_") and not _is_override(one) and not ast.get_docstring(one)
            ]
        elif name != "__version__":
            assert source.splitlines()[node.lineno - 2].startswith("#: "), name


@pytest.mark.parametrize("package", PUBLIC)
def test_public_signatures_say_what_they_take_and_give(package: ModuleType) -> None:
    """No dictionary of anything, no options of any name."""
    for module, name in _re_exports(package):
        if name == "DeltaCallback" and not find_spec("transformers"):
            continue
        value = getattr(package, name)
        functions = [value, *vars(value).values()] if isinstance(value, type) else [value]
        for function in filter(inspect.isfunction, functions):
            hints = str(inspect.signature(function))
            assert not re.search(r"dict\[str, Any\]|\*\*\w+: '?Any|Unset", hints), (module, function, hints)
        if is_dataclass(value):
            assert not [field for field in fields(value) if re.search("Any|Unset", str(field.type))]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=str)
def test_imports_go_one_way(path: Path) -> None:
    importer = _parts(path)
    for imported in _imports(path):
        common = next(k for k, (a, b) in enumerate(zip(importer, imported, strict=False)) if a != b)
        folder, one, other = "/".join(importer[:common]), importer[common], imported[common]
        assert _rank(folder, other) < _rank(folder, one), f"{'.'.join(importer)} imports {'.'.join(imported)}"


def test_the_table_of_ranks_is_the_house() -> None:
    for folder in {path.parent for path in PACKAGE.rglob("*.py")}:
        files = {path.stem for path in folder.glob("*.py")}
        rooms = {path.name for path in folder.iterdir() if any(path.glob("*.py"))}
        ranked = " ".join(RANKS[folder.relative_to(PACKAGE).as_posix().removeprefix(".")]).split()
        assert sorted(ranked) == sorted((files if folder == PACKAGE else files | {"__init__"}) | rooms)


def test_the_design_document_names_rooms_and_modules_that_exist() -> None:
    text = (PACKAGE.parent / "docs" / "design.md").read_text()
    house = text.partition("## The house\n")[2].partition("```\n")[2].partition("```\n")[0]
    named = set(re.findall(r"\b([a-z_]+(?:\.py|/))", house)) - {"deltaweights/"}
    rooms = {f"{path.parent.name}/" for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE}
    modules = {path.name for path in PACKAGE.rglob("*.py")}
    assert named <= rooms | modules
    assert rooms <= named


def test_no_two_public_classes_share_a_name() -> None:
    """A reader who greps for a name finds one thing."""
    found: dict[str, list[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(_place(path))
    assert {name: places for name, places in found.items() if len(places) > 1} == {}


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        ("import deltaweights", ["numpy", "torch", "huggingface_hub", "rich", "msgspec", "zstandard"]),
        ("import deltaweights.cli", ["numpy", "torch", "huggingface_hub"]),
        (
            "from deltaweights import apply_delta, plan_apply, verify_delta, open_target",
            ["torch", "huggingface_hub", "deltaweights.codec.low_rank.search"],
        ),
        ("from deltaweights import make_delta", ["torch", "huggingface_hub"]),
        ("import deltaweights.torch", ["numpy", "torch", "huggingface_hub"]),
        ("import deltaweights.engines", ["numpy", "torch", "huggingface_hub"]),
        pytest.param(
            "from deltaweights.torch import DeltaCheckpointer, load_into, save_delta",
            ["transformers"],
            marks=pytest.mark.skipif(not find_spec("torch"), reason="needs torch"),
        ),
    ],
)
def test_heavy_imports_are_lazy(code: str, unwanted: list[str]) -> None:
    script = f"{code}; import sys, json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert not set(unwanted) & set(json.loads(done.stdout))


def test_only_the_command_line_prints() -> None:
    for path in PACKAGE.rglob("*.py"):
        if _room(path) != "cli" and path.stem != "__main__":
            calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
            assert not [c for c in calls if isinstance(c.func, ast.Name) and c.func.id in ("print", "exit")]


def _re_exports(package: ModuleType) -> Iterator[tuple[str, str]]:
    """The lines of a package under ``if TYPE_CHECKING:``, as module and name."""
    assert package.__file__
    body = ast.parse(Path(package.__file__).read_text()).body
    (block,) = (node for node in body if isinstance(node, ast.If))
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname == alias.name, "a re-export has `as`"
            yield f"{'.' * node.level}{node.module}", alias.name


def _names_of(node: ast.stmt) -> set[str]:
    """What a statement at the top of a module defines."""
    if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _is_override(node: ast.ClassDef | ast.FunctionDef) -> bool:
    """Whether torch documents it: a method of its storage readers and writers."""
    if not find_spec("torch"):
        return False
    from torch.distributed.checkpoint.storage import StorageReader, StorageWriter

    return hasattr(StorageReader, node.name) or hasattr(StorageWriter, node.name)


def _place(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def _room(path: Path) -> str:
    return Path(path.relative_to(PACKAGE).parts[0]).stem


def _parts(path: Path) -> list[str]:
    return [*path.relative_to(PACKAGE).parts[:-1], path.stem]


def _imports(path: Path) -> Iterator[list[str]]:
    """The modules that a module imports at run time, relative imports resolved."""
    here = _parts(path)[:-1]
    tree = ast.parse(path.read_text())
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and id(node) not in typing_only:
            base = [*here[: len(here) - node.level + 1], *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                yield _module([*base, alias.name]) or _module(base) or base
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("deltaweights") for alias in node.names)


def _module(parts: list[str]) -> list[str] | None:
    """The module of that name, a room's being its `__init__`, if there is one."""
    place = PACKAGE.joinpath(*parts)
    if (place / "__init__.py").exists():
        return [*parts, "__init__"]
    return parts if place.with_suffix(".py").exists() else None

"""The house: which names are public, who may import whom, and what importing costs."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import deltaweights
import deltaweights.torch

PACKAGE = Path(deltaweights.__file__).parent

#: For each folder, what stands in it, lowest rank first. Each may import from lower ranks only.
RANKS: dict[str, tuple[str, ...]] = {
    "": (
        "dtypes errors _version workers",
        "canonical",
        "codec manifest storage",
        "checkpoint",
        "payload",
        "license match",
        "delta",
        "bom diff inspect patch",
        "compact plan verify",
        "push torch",
        "cli",
        "__init__ __main__",
    ),
    "checkpoint": ("header", "checkpoint", "__init__"),
    "cli": ("commands", "__init__"),
    "codec": (
        "constants convert kernel_arrays opaque processor tables working_memory",
        "kernels library",
        "cache",
        "build",
        "jit",
        "compiled",
        "methods",
        "rows",
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
        "difference standalone",
        "subset",
        "rows",
        "__init__",
    ),
    "codec/methods": (
        "entropy ulp",
        "planes",
        "floats words",
        "drift exponent_window sparse without_zstd",
        "chunk",
        "__init__",
    ),
    "delta": (
        "opening shards faults",
        "recipes",
        "target_recipe",
        "rebuilt",
        "chain",
        "target writer",
        "__init__",
    ),
    "license": ("table", "rules", "bom cards", "__init__"),
    "license/bom": ("facts", "cyclonedx spdx", "__init__"),
    "match": ("names", "duplicates", "__init__"),
    "payload": ("chunks faults", "reader writer", "whole", "__init__"),
    "storage": (
        "hub_errors system",
        "file_names source",
        "hub_client output read_ahead",
        "hub hub_upload",
        "location",
        "__init__",
    ),
    "torch": ("tensors", "dcp models stream", "__init__"),
    "torch/dcp": ("boxes", "record", "base", "folder write", "storage", "__init__"),
    "torch/models": ("layout load memory", "checkpoints save", "callback", "__init__"),
    "torch/stream": (
        "gpu_kernels records",
        "gpu transport",
        "state",
        "kept payloads",
        "gpu_replay publisher",
        "replay",
        "subscriber",
        "__init__",
    ),
}


def _rank(folder: str, name: str) -> int:
    return next(rank for rank, names in enumerate(RANKS[folder]) if name in names.split())


def test_public_names_are_these() -> None:
    assert deltaweights.__all__ == [
        "ApplyReport",
        "BaseMismatchError",
        "CheckpointError",
        "DeltaError",
        "DeltaWeightsError",
        "DiskSpaceError",
        "FormatVersionError",
        "HeaderError",
        "LicenseNotAcceptedError",
        "Manifest",
        "ManifestError",
        "OutputError",
        "PayloadError",
        "Plan",
        "Problem",
        "PushReport",
        "Target",
        "TensorView",
        "VerifyReport",
        "__version__",
        "apply_delta",
        "compact_deltas",
        "make_delta",
        "open_target",
        "plan_apply",
        "push_delta",
        "verify_delta",
    ]


def test_public_names_for_torch_are_these() -> None:
    assert deltaweights.torch.__all__ == [
        "DeltaCallback",
        "DeltaCheckpointer",
        "DeltaPublisher",
        "DeltaStorageReader",
        "DeltaStorageWriter",
        "DeltaSubscriber",
        "LoadReport",
        "PublishReport",
        "SyncReport",
        "list_checkpoints",
        "load_into",
        "load_state_dict",
        "save_delta",
        "write_files",
    ]
    assert dir(deltaweights.torch) == sorted(deltaweights.torch.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        deltaweights.torch.no_such_name  # noqa: B018


def test_public_names_exist() -> None:
    assert all(getattr(deltaweights, name) is not None for name in deltaweights.__all__)
    assert dir(deltaweights) == sorted(deltaweights.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        deltaweights.no_such_name  # noqa: B018


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
            ["torch", "huggingface_hub"],
        ),
        ("from deltaweights import make_delta", ["torch", "huggingface_hub"]),
        ("import deltaweights.torch", ["numpy", "torch", "huggingface_hub"]),
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

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

#: A module may import from its own room and from rooms of a lower rank, never up or sideways.
RANKS = {
    "errors": 0,
    "_version": 0,
    "checkpoint": 1,
    "codec": 1,
    "manifest": 1,
    "pipeline": 1,
    "license_table": 1,
    "license": 2,
    "card": 3,
    "match": 2,
    "target": 2,
    "chain": 3,
    "duplicates": 3,
    "bom": 4,
    "diff": 4,
    "patch": 4,
    "summary": 4,
    "compact": 5,
    "plan": 5,
    "verify": 5,
    "push": 6,
    "torch": 6,
    "cli": 7,
    "__main__": 8,
    "__init__": 8,
}


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
        "open_chain",
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


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.stem)
def test_imports_go_one_way(path: Path) -> None:
    room = _room(path)
    for imported in _imported_rooms(path):
        assert imported == room or RANKS[imported] < RANKS[room], f"{room} imports {imported}"


def test_every_module_has_a_rank() -> None:
    assert {_room(path) for path in PACKAGE.rglob("*.py")} == set(RANKS)


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


def _room(path: Path) -> str:
    return Path(path.relative_to(PACKAGE).parts[0]).stem


def _imported_rooms(path: Path) -> Iterator[str]:
    """The rooms that a module imports from at run time, relative imports resolved."""
    here = path.relative_to(PACKAGE).parts[:-1]
    tree = ast.parse(path.read_text())
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and id(node) not in typing_only:
            folder = here[: len(here) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            for name in names:
                yield [*folder, *name.split(".")][0]
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("deltaweights") for alias in node.names)

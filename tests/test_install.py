"""What pyproject.toml asks for is what the package imports."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

import deltaweights

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PACKAGE = Path(deltaweights.__file__).parent
PROJECT = Path(__file__).parents[1] / "pyproject.toml"

#: The extras that a room, or a module, may import from; everything else is a dependency.
EXTRAS = {
    "codec": ("jit",),
    "engines/sglang.py": ("sglang",),
    "engines/verl.py": ("verl",),
    "delta/target.py": ("torch",),  # TensorView.torch() imports it when it is called
    "engines": ("slime", "torch", "vllm"),
    "executors/ray_executor.py": ("ray",),
    "license/bom": ("bom",),
    "metrics.py": ("metrics",),
    "signing": ("sign",),
    "torch": ("torch", "transformers"),
}
#: torch for CUDA brings the Triton that fits it.
BROUGHT = {"torch": {"triton"}}

#: Names that are not the distribution's.
DISTRIBUTIONS = {
    "cyclonedx": "cyclonedx-python-lib",
    "opentelemetry": "opentelemetry-api",
    "OpenSSL": "pyopenssl",
    "packageurl": "packageurl-python",
    "yaml": "pyyaml",
}

MODULES = sorted(PACKAGE.rglob("*.py"))
TESTS_FOLDER = Path(__file__).parent
TESTS = [
    p
    for p in sorted(TESTS_FOLDER.rglob("*.py"))
    if p.relative_to(TESTS_FOLDER).parts[0] not in ("codec", "engines", "torch")
]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_import_is_declared(path: Path) -> None:
    project = tomllib.loads(PROJECT.read_text())["project"]
    module = path.relative_to(PACKAGE)
    declared = _names(project["dependencies"]) | BROUGHT.get(module.parts[0], set())
    for place, extras in EXTRAS.items():
        if module.is_relative_to(place):
            for extra in extras:
                declared |= _names(project["optional-dependencies"][extra])
    assert _imported(path) <= declared


def test_the_build_backend_asks_for_the_same_compiler() -> None:
    project = tomllib.loads(PROJECT.read_text())["project"]
    backend = (PROJECT.parent / "packaging" / "kernels_backend.py").read_text()
    (asked,) = re.findall(r"^_COMPILER = (\[.*\])$", backend, re.MULTILINE)
    assert set(project["optional-dependencies"]["jit"]) <= set(ast.literal_eval(asked))


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(TESTS_FOLDER)))
def test_only_the_tests_of_torch_and_of_the_codec_import_them(path: Path) -> None:
    """The others run without it, and Triton must not be loaded before its interpreter is chosen."""
    loaded = {name.partition(".")[0] for node in ast.parse(path.read_text()).body for name in _modules(node)}
    assert not loaded & {"accelerate", "llvmlite", "numba", "torch", "transformers", "triton"}


def _modules(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []


def test_the_test_sees_imports() -> None:
    assert _imported(PACKAGE / "license" / "cards.py") == {"pyyaml"}


def _names(requirements: list[str]) -> set[str]:
    return {_normal(re.split(r"[^\w.-]", requirement)[0]) for requirement in requirements}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _imported(path: Path) -> set[str]:
    """The distributions whose modules a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return {DISTRIBUTIONS.get(name, _normal(name)) for name in found - sys.stdlib_module_names}

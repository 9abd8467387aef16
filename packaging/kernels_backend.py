"""The build backend: setuptools', with the codec's kernels built into each wheel.

`pip install .` builds them for this machine's processor, and for the oldest that they can run on. A release
names a platform in the environment variable DELTAWEIGHTS_PLATFORM, and gets a wheel for all its processors,
wherever it is built.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_sdist,
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

_ROOT = Path(__file__).resolve().parent.parent
_C_COMPILER = _ROOT / "deltaweights" / "codec" / "build" / "c_compiler.py"
_COMPILER = ["llvmlite>=0.45,<0.51", "numba>=0.62,<0.69", "numpy", "wheel", "xxhash", "zstandard"]
#: The tags of a release's wheels. Of the C library, kernels need three functions that every one has.
_TAGS = {
    "linux-x86_64": ("manylinux_2_17_x86_64", "musllinux_1_1_x86_64"),
    "linux-arm64": ("manylinux_2_17_aarch64", "musllinux_1_1_aarch64"),
    "macos-arm64": ("macosx_11_0_arm64",),
}
#: Ends well if a library was built from the sources beside it in the wheel.
_IS_FIT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from deltaweights.codec import library
path = Path(library.__file__).parent / "prebuilt" / sys.argv[2]
sys.exit(not (path.is_relative_to(Path(sys.argv[1]).resolve()) and library.is_current(path, [])))
"""
_Settings = Mapping[str, str | list[str] | None] | None


def get_requires_for_build_wheel(config_settings: _Settings = None) -> list[str]:
    """What builds the kernels; the package ziglang links them where there is no C compiler."""
    _refuse_windows()
    is_local = "DELTAWEIGHTS_PLATFORM" not in os.environ and sys.platform == "linux"
    return [*_COMPILER, *([] if is_local and _compiler_links() else ["ziglang<0.18"])]


def build_wheel(
    wheel_directory: str, config_settings: _Settings = None, metadata_directory: str | None = None
) -> str:
    """A wheel for one platform; returns its name."""
    _refuse_windows()
    platform = os.environ.get("DELTAWEIGHTS_PLATFORM")
    with tempfile.TemporaryDirectory() as work:
        shutil.rmtree(_ROOT / "build" / "lib", ignore_errors=True)  # else it brings modules that are no more
        settings: Any = config_settings  # which setuptools types as less
        plain: str = build_meta.build_wheel(work, settings, metadata_directory)
        library = _built_kernels(platform)
        _run("-m", "wheel", "unpack", "--dest", work, str(Path(work, plain)))
        (unpacked,) = (path for path in Path(work).iterdir() if path.is_dir())
        folder = unpacked / "deltaweights" / "codec" / "prebuilt"
        folder.mkdir()
        shutil.copy(library, folder)
        _run("-c", _IS_FIT, str(unpacked), library.name)
        (about,) = unpacked.glob("*.dist-info/WHEEL")
        about.write_text(_for_platform(about.read_text(), platform))
        _run("-m", "wheel", "pack", "--dest-dir", wheel_directory, str(unpacked))
    tag = ".".join(_tags(platform))
    return plain.replace("-any.whl", f"-{tag}.whl")


def build_editable(
    wheel_directory: str, config_settings: _Settings = None, metadata_directory: str | None = None
) -> str:
    """As setuptools does: kernels come from where the sources are, or are compiled when first used."""
    _refuse_windows()
    settings: Any = config_settings
    name: str = build_meta.build_editable(wheel_directory, settings, metadata_directory)
    return name


def _refuse_windows() -> None:
    if sys.platform == "win32":
        raise SystemExit(
            "deltaweights does not support Windows yet: it needs file locks, and ways of writing, that only "
            "POSIX systems have. Install it in the Windows Subsystem for Linux."
        )


def _built_kernels(platform: str | None) -> Path:
    """The library for a platform, or for this processor, built where it is not there already."""
    arguments = ["--if-needed", "--show"]
    arguments += ["--platform", platform, "--levels", "all"] if platform else ["--levels", "lowest,best"]
    if find_spec("numba") is None:
        raise SystemExit("Building a wheel of deltaweights needs Numba, which is not installed.")
    done = _run("-m", "deltaweights.codec.build", *arguments)
    return Path(done.strip().splitlines()[-1])


def _for_platform(about: str, platform: str | None) -> str:
    """A wheel's WHEEL file, for another platform than any."""
    lines = [line for line in about.splitlines() if line and not line.startswith("Tag:")]
    lines = ["Root-Is-Purelib: false" if line.startswith("Root-Is-Purelib") else line for line in lines]
    return "\n".join([*lines, *(f"Tag: py3-none-{tag}" for tag in _tags(platform)), ""])


def _tags(platform: str | None) -> tuple[str, ...]:
    if platform or sys.platform == "darwin":
        return _TAGS[platform or "macos-arm64"]
    return (sysconfig.get_platform().replace("-", "_").replace(".", "_"),)


def _compiler_links() -> bool:
    """Whether there is a C compiler that can link: one may be there in name only."""
    compiler = run_path(str(_C_COMPILER))["c_compiler"]()
    if compiler is None:
        return False
    with tempfile.TemporaryDirectory() as work:
        command = [
            compiler,
            "-shared",
            "-nostdlib",
            "-x",
            "c",
            os.devnull,
            "-o",
            str(Path(work, "nothing.so")),
        ]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _run(*arguments: str) -> str:
    """Run Python, from the sources; its output. What it says on stderr goes to the user."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(_ROOT), *filter(None, sys.path)])}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout

"""How much memory a piece of Python takes at most: measured in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MIB = 1 << 20

# ru_maxrss starts with the parent's own peak.
_PEAK = """
import re as _re
print("\\npeak:", _re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


def peak_memory(code: str, *args: str | os.PathLike[str], timeout: float = 30) -> int:
    """Run ``code`` (``sys.argv[1:]`` is ``args``) and return the most bytes of memory that it had at a time.

    Fails where it ends with an error or takes more than ``timeout`` seconds.
    """
    if not Path("/proc/self/status").exists():
        pytest.skip("the system does not tell a process's peak")
    command = [sys.executable, "-c", code + _PEAK, *args]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout.rpartition("peak:")[2]) << 10

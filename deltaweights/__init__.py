"""Publish a fine-tune as what it adds to its base, and get it back byte for byte."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .errors import (
    BaseMismatchError,
    CheckpointError,
    DeltaError,
    DeltaWeightsError,
    DiskSpaceError,
    FormatVersionError,
    HeaderError,
    LicenseNotAcceptedError,
    ManifestError,
    OutputError,
    PayloadError,
)

if TYPE_CHECKING:
    from .compact import compact_deltas
    from .delta.target import Target, TensorView, open_target
    from .diff import make_delta
    from .manifest import Manifest
    from .patch import ApplyReport, apply_delta
    from .plan import Plan, plan_apply
    from .push import PushReport, push_delta
    from .verify import Problem, VerifyReport, verify_delta

__all__ = [
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

#: Imported on first use, so that ``import deltaweights`` stays quick.
_LAZY = {
    "ApplyReport": "patch",
    "Manifest": "manifest",
    "Plan": "plan",
    "Problem": "verify",
    "PushReport": "push",
    "Target": "delta.target",
    "TensorView": "delta.target",
    "VerifyReport": "verify",
    "apply_delta": "patch",
    "compact_deltas": "compact",
    "make_delta": "diff",
    "open_target": "delta.target",
    "plan_apply": "plan",
    "push_delta": "push",
    "verify_delta": "verify",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

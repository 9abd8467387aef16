"""Every error that deltaweights raises on purpose.

::

    DeltaWeightsError
    ├── CheckpointError         a base or target that cannot be read
    │   └── HeaderError         a .safetensors header that breaks the format's rules
    ├── DeltaError              the delta itself
    │   ├── ManifestError       deltaweights.json is missing, damaged or self-contradictory
    │   │   └── FormatVersionError  written in a format that this version does not know
    │   └── PayloadError        encoded bytes that do not decode to what the manifest promises
    ├── BaseMismatchError       the base given is not the one that the delta was made from
    ├── LicenseNotAcceptedError  a license that is not an open one, and that nobody accepted
    └── OutputError             the place to write to cannot be used
        └── DiskSpaceError      it is too small

An error says *what* went wrong, *why*, and what to do about it (*fix*), one line each; the command
line prints just these lines.
"""

from __future__ import annotations


class DeltaWeightsError(Exception):
    """Base of the tree. ``str(error)`` is the lines *what*, *why*, *fix*, without the empty ones."""

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        super().__init__(what, why, fix)
        self.what = what
        self.why = why
        self.fix = fix

    def __str__(self) -> str:
        return "\n".join(line for line in (self.what, self.why, self.fix) if line)


class CheckpointError(DeltaWeightsError):
    """A base or target checkpoint that cannot be read."""


class HeaderError(CheckpointError):
    """A .safetensors header that breaks the format's rules."""


class DeltaError(DeltaWeightsError):
    """A delta that is incomplete, damaged or hostile."""


class ManifestError(DeltaError):
    """A manifest that is missing, damaged or contradicts itself."""


class FormatVersionError(ManifestError):
    """A manifest of a format version that this version of deltaweights does not know."""


class PayloadError(DeltaError):
    """Encoded bytes that do not decode to what they should."""


class BaseMismatchError(DeltaWeightsError):
    """The base given is not the base that the delta was made from."""


class LicenseNotAcceptedError(DeltaWeightsError):
    """Somebody has to accept a license first. Raised by the command line only."""


class OutputError(DeltaWeightsError):
    """The output folder cannot be used as asked."""


class DiskSpaceError(OutputError):
    """The output's file system has too little free space."""

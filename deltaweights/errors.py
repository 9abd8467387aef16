"""Every error that deltaweights raises on purpose.

::

    DeltaWeightsError
    ├── CheckpointError         a base or target that cannot be read
    │   ├── HeaderError         a .safetensors header that breaks the format's rules
    │   ├── HubReadError        (also a HubError)
    │   └── NotPublishedError   a weight stream, or a step of one, that is not there yet
    ├── DeltaError              the delta itself
    │   ├── ManifestError       deltaweights.json is missing, damaged or self-contradictory
    │   │   └── FormatVersionError  written in a format that this version does not know
    │   ├── PayloadError        encoded bytes that do not decode to what the manifest promises
    │   └── SignatureError      a delta or a stream's head that is not signed by whom it must be
    ├── SigningError            a signature that cannot be made, or a key that cannot be read
    ├── ExecutorError           the machines that tasks were given to
    ├── BaseMismatchError       the base given is not the one that the delta was made from
    ├── LicenseNotAcceptedError  a license that is not an open one, and that nobody accepted
    ├── OutputError             the place to write to cannot be used
    │   ├── DiskSpaceError      it is too small
    │   └── HubWriteError       (also a HubError)
    └── HubError                the Hub, or another place far away, does not give or take what it should;
                                what may pass by itself is ``retryable``

What else may pass by itself is a :class:`NotPublishedError`; no other error does.

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


class NotPublishedError(CheckpointError):
    """A weight stream, or a step of one, that is not there yet. The same call goes well once it is."""

    retryable = True


class HubError(DeltaWeightsError):
    """The Hub, or another place that is read or written over a network, does not do what it is asked for.

    Attributes:
        retryable: whether the same call may go well later: there was no connection, no answer in time, too
            many requests, or an error of the server. Else somebody has to act first: log in, ask for access,
            correct a name. An error of any other kind stays what it is, too.

    Each request to the Hub was made again by then, for up to two minutes. Who can wait longer writes::

        while True:
            try:
                report = subscriber.sync(model)
                break
            except HubError as error:
                if not error.retryable:
                    raise
                time.sleep(60)
    """

    def __init__(self, what: str, why: str = "", fix: str = "", *, retryable: bool = False) -> None:
        super().__init__(what, why, fix)
        self.retryable = retryable


class HubReadError(HubError, CheckpointError):
    """Files far away that cannot be read."""


class DeltaError(DeltaWeightsError):
    """A delta that is incomplete, damaged or hostile."""


class ManifestError(DeltaError):
    """A manifest that is missing, damaged or contradicts itself."""


class FormatVersionError(ManifestError):
    """A manifest of a format version that this version of deltaweights does not know."""


class PayloadError(DeltaError):
    """Encoded bytes that do not decode to what they should."""


class SignatureError(DeltaError):
    """A delta, or the head of a weight stream, that is not signed by whom it must be, or a signature of
    something else."""


class SigningError(DeltaWeightsError):
    """A signature that cannot be made, or a key or certificate that cannot be used."""


class ExecutorError(DeltaWeightsError):
    """The machines that tasks were given to: a cluster that cannot be reached, a worker that died too often
    or is unlike this machine. What is done stays done: the same call goes on."""


class BaseMismatchError(DeltaWeightsError):
    """The base given is not the base that the delta was made from."""


class LicenseNotAcceptedError(DeltaWeightsError):
    """Somebody has to accept a license first. Raised by the command line and in batches only."""


class OutputError(DeltaWeightsError):
    """The output folder cannot be used as asked."""


class DiskSpaceError(OutputError):
    """The output's file system has too little free space."""


class HubWriteError(HubError, OutputError):
    """Files far away that cannot be written."""

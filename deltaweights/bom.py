"""Bills of materials: what a delta says of itself, for platforms that read CycloneDX or SPDX.

The room :mod:`.license.bom` has the facts that go into either format, and a writer for each.
"""

from __future__ import annotations

import logging
from datetime import datetime, timezone
from typing import Literal, TypeAlias

from .delta.opening import read_manifest
from .errors import DeltaWeightsError
from .license.bom.facts import Facts, read_facts
from .storage import Location, open_source

_log = logging.getLogger(__name__)

Format: TypeAlias = Literal["cyclonedx", "spdx"]

#: Stands for "not known": a delta does not say when it was made.
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


def bom_of(delta: Location, format: Format = "cyclonedx", *, created: datetime = EPOCH) -> bytes:
    """Describe the target, its base and the delta between them. Reads the manifest and license texts only.

    Args:
        format: ``cyclonedx`` (version 1.7, JSON) or ``spdx`` (version 3.0.1, JSON-LD).
        created: the time that the document gives for itself; whole seconds, time zone aware.

    Returns:
        The document, in ASCII. Equal arguments and an equal delta give equal bytes.

    Raises:
        CheckpointError: there is nothing at ``delta``, or it cannot be read.
        DeltaError: the delta is damaged.
        DeltaWeightsError: the libraries for bills of materials are not installed, or there is too much to
            list.
    """
    with open_source(delta) as source:
        _log.info("describing %s as %s", source.where, format)
        facts = read_facts(source, read_manifest(source), created)
    return _write(facts, format).encode("ascii")


def _write(facts: Facts, format: Format) -> str:
    try:
        if format == "spdx":
            from .license.bom.spdx import write_spdx as write
        else:
            from .license.bom.cyclonedx import write_cyclonedx as write
    except ImportError as error:
        raise DeltaWeightsError(
            "Bills of materials need libraries that are not installed",
            f"{error}.",
            "Install them: pip install cyclonedx-python-lib packageurl-python spdx-python-model",
        ) from error
    return write(facts)

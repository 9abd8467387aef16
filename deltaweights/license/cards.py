"""Reads model cards and license files of checkpoints."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Literal

from ..checkpoint import Checkpoint
from ..manifest import FileRecord, License
from ..storage import Source
from .rules import MAX_TEXT_BYTES, resolve

CARD_NAME = "README.md"
_HUB = "https://huggingface.co/"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_MAX_CARD_BYTES = 1 << 22
_MAX_FIELD = 1000  # characters

#: The fields at the top of a card. (huggingface_hub can parse them too, but takes 0.1 s to load.)
FRONT_MATTER = re.compile(r"\s*---(\r\n?|\n)(?P<fields>.*?)(\r\n?|\n)---[ \t]*(\r?\n|$)", re.DOTALL)

#: The names of files with license texts.
LICENSE_FILE = re.compile(r"(LICEN[CS]E|COPYING)([._-].*)?", re.IGNORECASE)
_OTHER_TEXT = re.compile(r"(NOTICE|USE_POLICY)([._-].*)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class LicenseTexts:
    """A side's license, the texts to publish with a delta (by path), the conflicts in it, and the card's
    ``base_model``."""

    license: License
    texts: dict[str, bytes]
    conflicts: tuple[str, ...]
    base_models: tuple[str, ...]


def read_license(
    checkpoint: Checkpoint, side: Literal["base", "target"], override: str | None = None
) -> LicenseTexts:
    """Read the license that a checkpoint's model card and its LICENSE and NOTICE files state.

    Args:
        side: "base" or "target", for messages.
        override: a license id that replaces the card's.
    """
    source = checkpoint.source
    fields = _card_fields(source)
    id, name, link = (_text(fields.get(key)) for key in ("license", "license_name", "license_link"))
    if override:
        id, name, link = override, None, None
    stored: dict[str, bytes] = {}
    licenses: dict[str, bytes] = {}
    records = []
    room = MAX_TEXT_BYTES
    for path in checkpoint.other_files:
        if not (LICENSE_FILE.fullmatch(path) or _OTHER_TEXT.fullmatch(path)) or source.sizes[path] > room:
            continue
        room -= source.sizes[path]
        content = _content(source, path)
        digest = hashlib.sha256(content).hexdigest()
        # The base's file names are untrusted: only plain characters, and not too many.
        place = f"licenses/{digest[:16]}-{re.sub(r'[^A-Za-z0-9._-]', '_', path)[:100]}"
        stored[place] = content
        records.append(FileRecord(place, len(content), digest))
        if LICENSE_FILE.fullmatch(path):
            licenses[path] = content
    license, conflicts = resolve(side, License(id, name, link, tuple(records)), licenses)
    return LicenseTexts(license, stored, conflicts, base_models_of(fields.get("base_model")))


def recall_license(
    checkpoint: Checkpoint, side: Literal["base", "target"], stated: License, texts: dict[str, bytes]
) -> LicenseTexts:
    """Return a side's license as an earlier delta's manifest states it.

    Args:
        checkpoint: the side itself; only its card's ``base_model`` is read.
        stated: the manifest's record.
        texts: the contents of ``stated.files``, by their path in the delta.
    """
    names = {path: path.partition("-")[2] for path in texts}
    licenses = {names[path]: text for path, text in texts.items() if LICENSE_FILE.fullmatch(names[path])}
    _, conflicts = resolve(side, stated, licenses)
    return LicenseTexts(stated, texts, conflicts, read_base_models(checkpoint.source))


def _content(source: Source, path: str) -> bytes:
    return b"".join(source.blocks(path))


def read_card(source: Source) -> tuple[str, str]:
    """A checkpoint's model card: its front matter, and the text below; of a gigantic one, the beginning."""
    content = b""
    for block in source.blocks(CARD_NAME) if CARD_NAME in source.sizes else ():
        content += block
        if len(content) > _MAX_CARD_BYTES:
            break
    card = content[:_MAX_CARD_BYTES].decode("utf-8-sig", errors="replace")
    found = FRONT_MATTER.match(card)
    return (found["fields"], card[found.end() :]) if found else ("", card)


def _card_fields(source: Source) -> dict[str, object]:
    import yaml  # type: ignore[import-untyped]

    front_matter, _ = read_card(source)
    try:
        # Not ModelCard: one odd field would hide all others. BaseLoader makes only text, lists and maps.
        fields = yaml.load(front_matter, Loader=yaml.BaseLoader)  # noqa: S506
    except (yaml.YAMLError, RecursionError, TypeError):
        return {}  # an unreadable card states no license, but the license files still count
    return fields if isinstance(fields, dict) else {}


def _text(value: object) -> str | None:
    """A card field as text: some cards give a list instead of one value."""
    values = value if isinstance(value, list) else [value]
    texts = [one for one in values if isinstance(one, str) and one not in ("", "~", "null")]
    if len(texts) < len(values):
        return None  # nothing, or a nested value, which cannot be a license
    return " AND ".join(texts)[:_MAX_FIELD].encode("utf-8", "replace").decode() or None


def read_base_models(source: Source) -> tuple[str, ...]:
    """The Hub ids that a checkpoint's model card names as its ``base_model``."""
    return base_models_of(_card_fields(source).get("base_model"))


def base_models_of(value: object) -> tuple[str, ...]:
    """Hub ids of ``base_model``, which is one or a list of them; trainers write paths there too."""
    values = value if isinstance(value, list) else [value]
    texts = (one.strip() for one in values if isinstance(one, str))
    ids = (text.removeprefix(_HUB).rstrip("/") for text in texts)
    return tuple(id for id in ids if _HUB_ID.fullmatch(id))[:100]

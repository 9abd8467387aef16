"""Reads model cards and license files of checkpoints, and writes a delta's model card."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any, Literal

from ..checkpoint import Checkpoint
from ..manifest import BaseRecord, FileRecord, License, Manifest, TargetRecord
from ..storage import Source
from .rules import MAX_TEXT_BYTES, displays, expression_of, resolve, terms_of
from .table import Terms

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
    return LicenseTexts(license, stored, conflicts, _base_models(fields.get("base_model")))


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
    return LicenseTexts(
        stated, texts, conflicts, _base_models(_card_fields(checkpoint.source).get("base_model"))
    )


def _content(source: Source, path: str) -> bytes:
    return b"".join(source.blocks(path))


def _card_fields(source: Source) -> dict[str, object]:
    if source.sizes.get(CARD_NAME, _MAX_CARD_BYTES + 1) > _MAX_CARD_BYTES:
        return {}
    import yaml  # type: ignore[import-untyped]

    block = FRONT_MATTER.match(_content(source, CARD_NAME).decode("utf-8-sig", errors="replace"))
    try:
        # Not ModelCard: one odd field would hide all others. BaseLoader makes only text, lists and maps.
        fields = yaml.load(block["fields"], Loader=yaml.BaseLoader) if block else None  # noqa: S506
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


def _base_models(value: object) -> tuple[str, ...]:
    """Hub ids of ``base_model``, which is one or a list of them; trainers write paths there too."""
    values = value if isinstance(value, list) else [value]
    texts = (one.strip() for one in values if isinstance(one, str))
    ids = (text.removeprefix(_HUB).rstrip("/") for text in texts)
    return tuple(id for id in ids if _HUB_ID.fullmatch(id))[:100]


def prepare() -> None:
    """Import the modules that :func:`write_card` needs. This is slow, so it runs while other threads work."""
    from huggingface_hub import ModelCardData  # noqa: F401


def write_card(manifest: Manifest) -> bytes:
    """The delta's own model card, as Markdown with the Hub's front matter."""
    from huggingface_hub import ModelCardData  # ModelCard would also import the Hub's client

    base = manifest.base
    data = ModelCardData(
        base_model=base.repo_id,
        library_name="deltaweights",
        tags=["deltaweights", "delta", "safetensors"],
        ignore_metadata_errors=True,
        **_license_fields(manifest),
    )
    if base.repo_id:
        data["base_model_relation"] = "finetune"
    return f"---\n{data.to_yaml()}\n---\n\n{_card_text(manifest)}".encode()


def _license_fields(manifest: Manifest) -> dict[str, Any]:
    """The license of base and target together, in the Hub's terms: ids of its list, or ``other`` with a short
    name and a URL. (The Hub accepts a link to a file only if it is ``LICENSE``, but the delta has several
    texts.)"""
    sides = [(side, one) for side in (manifest.target, manifest.base) for one in terms_of(side.license)]
    every = terms_of(manifest.target.license, manifest.base.license)
    if all(one.hub for one in every):
        ids = list(dict.fromkeys(one.hub for one in every))
        return {"license": ids if ids[1:] else ids[0]} if ids else {}
    urls = (_license_url(side, one) for side, one in sides if not one.hub)
    name = "-and-".join(_short_name(one) for one in every)
    return {"license": "other", "license_name": name, "license_link": next(filter(None, urls), None)}


def _short_name(terms: Terms) -> str:
    name = terms.hub or next(iter(terms.aliases), terms.spdx.removeprefix("LicenseRef-"))
    return re.sub(r"[^a-z0-9.-]+", "-", name.lower())


def _license_url(side: BaseRecord | TargetRecord, terms: Terms) -> str | None:
    link = side.license.link or ""
    if re.match(r"https?://", link):
        return link
    names = [file.path.partition("-")[2] for file in side.license.files]
    name = next((name for name in names if name == link or LICENSE_FILE.fullmatch(name)), None)
    if side.repo_id and name:
        return f"{_HUB}{side.repo_id}/blob/{side.revision or 'main'}/{name}"
    return terms.source or None


def _card_text(manifest: Manifest) -> str:
    base, target = manifest.base, manifest.target
    base_name = base.repo_id or "its base"
    name = target.repo_id or "this model"
    base_argument = "" if base.repo_id else " --base PATH_OF_THE_BASE"
    revision = f" at commit `{base.revision}`" if base.revision else ""
    ratio = manifest.delta_bytes / max(1, manifest.target_bytes)
    display = "".join(f"**{text}**\n\n" for text in displays(base.license))
    together = expression_of(target.license, base.license) or "not stated"
    return f"""# {target.repo_id or "A fine-tune"}, as a delta of {base_name}

{display}This is not a whole model: it holds what {name} adds to {base_name}{revision}. Together they give the
model's files back, byte for byte, by the program deltaweights:

```
deltaweights apply PATH_OF_THIS_DELTA -o OUT{base_argument}
```

| | |
|---|---|
| Target | {len(target.files)} files, {manifest.target_bytes:,} bytes |
| Delta | {manifest.delta_bytes:,} bytes ({ratio:.1%} of the target) |
| License of the base | {_license_text(base.license)} |
| License of the target | {_license_text(target.license)} |
| Both together | {_plain(together)} |

The base stays where it is, under its own license; the texts that came with it are in `licenses/`. Every
rebuilt file is checked against the SHA-256 in `deltaweights.json` before it gets its name.
{_obligations(manifest)}"""


def _obligations(manifest: Manifest) -> str:
    parts = []
    for side, license in (("base", manifest.base.license), ("target", manifest.target.license)):
        if license.obligations:
            lines = "\n".join(f"- {_plain(text)}" for text in license.obligations)
            parts.append(f"\nWhat the {side}'s license asks (listed, not legal advice):\n\n{lines}\n")
    return "".join(parts)


def _license_text(license: License) -> str:
    known = [text for text in (license.name or license.id, license.link) if text]
    return _plain(", ".join(known) or expression_of(license) or "not stated")


def _plain(text: str) -> str:
    """Text from a card, on one line and without markup."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(text.split()))

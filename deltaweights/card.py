"""Model cards and license files: read from a checkpoint, written for a delta."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace

from .checkpoint import Checkpoint, Source
from .manifest import FileRecord, License, Manifest

CARD_NAME = "README.md"
_MAX_CARD_BYTES = 1 << 22
_MAX_FIELD = 1000  # characters
_LICENSE_FILE = re.compile(r"(LICEN[CS]E|NOTICE|USE_POLICY|COPYING)([._-].*)?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class LicenseTexts:
    """A license as a checkpoint states it, and the texts to publish with a delta, by their path there."""

    license: License
    texts: dict[str, bytes]


def read_license(checkpoint: Checkpoint, override: str | None = None) -> LicenseTexts:
    """The license that a checkpoint's model card and its LICENSE and NOTICE files state.

    Args:
        override: a license id that takes the place of the card's.
    """
    fields = _card_fields(checkpoint.source)
    text = {key: _text(fields.get(key)) for key in ("license", "license_name", "license_link")}
    texts: dict[str, bytes] = {}
    records = []
    for path in checkpoint.other_files:
        if _LICENSE_FILE.fullmatch(path) and checkpoint.source.sizes[path] <= _MAX_CARD_BYTES:
            content = _content(checkpoint.source, path)
            digest = hashlib.sha256(content).hexdigest()
            # The base's names are anyone's: only plain characters, and not too many.
            stored = f"licenses/{digest[:16]}-{re.sub(r'[^A-Za-z0-9._-]', '_', path)[:100]}"
            texts[stored] = content
            records.append(FileRecord(stored, len(content), digest))
    license = License(text["license"], text["license_name"], text["license_link"], tuple(records))
    if override:
        license = replace(license, id=override, name=None, link=None)
    return LicenseTexts(license, texts)


def _content(source: Source, path: str) -> bytes:
    return b"".join(source.blocks(path))


def _card_fields(source: Source) -> dict[str, object]:
    if source.sizes.get(CARD_NAME, _MAX_CARD_BYTES + 1) > _MAX_CARD_BYTES:
        return {}
    import yaml  # type: ignore[import-untyped]
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    block = REGEX_YAML_BLOCK.search(_content(source, CARD_NAME).decode("utf-8", errors="replace"))
    try:
        # Not ModelCard: one odd field would hide all. BaseLoader makes nothing but text, lists and maps.
        fields = yaml.load(block[2], Loader=yaml.BaseLoader) if block else None  # noqa: S506
    except (yaml.YAMLError, RecursionError, TypeError):
        return {}  # a card that nobody can read states no license; the license files still count
    return fields if isinstance(fields, dict) else {}


def _text(value: object) -> str | None:
    """A card field as text: some cards give a list where one value is meant."""
    values = value if isinstance(value, list) else [value]
    texts = [one for one in values if isinstance(one, str) and one not in ("", "~", "null")]
    if len(texts) < len(values):
        return None  # nothing, or something nested, which no license is
    return " AND ".join(texts)[:_MAX_FIELD].encode("utf-8", "replace").decode() or None


def write_card(manifest: Manifest) -> bytes:
    """The delta's own model card, as Markdown with the Hub's front matter."""
    from huggingface_hub import ModelCard, ModelCardData

    base, target = manifest.base, manifest.target
    license = target.license if target.license.id else base.license
    data = ModelCardData(
        base_model=base.repo_id,
        license=license.id,
        license_name=license.name,
        license_link=license.link,
        library_name="deltaweights",
        tags=["deltaweights", "delta", "safetensors"],
        ignore_metadata_errors=True,
    )
    if base.repo_id:
        data["base_model_relation"] = "finetune"
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_card_text(manifest)}")).encode()


def _card_text(manifest: Manifest) -> str:
    base, target = manifest.base, manifest.target
    base_name = base.repo_id or "its base"
    name = target.repo_id or "this model"
    base_argument = "" if base.repo_id else " --base PATH_OF_THE_BASE"
    revision = f" at commit `{base.revision}`" if base.revision else ""
    ratio = manifest.delta_bytes / max(1, manifest.target_bytes)
    return f"""# {target.repo_id or "A fine-tune"}, as a delta of {base_name}

This is not a whole model: it holds what {name} adds to {base_name}{revision}. Together they give the model's
files back, byte for byte.

```
pip install deltaweights
deltaweights apply PATH_OF_THIS_DELTA -o OUT{base_argument}
```

| | |
|---|---|
| Target | {len(target.files)} files, {manifest.target_bytes:,} bytes |
| Delta | {manifest.delta_bytes:,} bytes ({ratio:.1%} of the target) |
| License of the base | {_license_text(base.license)} |
| License of the target | {_license_text(target.license)} |

The base stays where it is, under its own license; the texts that came with it are in `licenses/`. Every
rebuilt file is checked against the SHA-256 in `deltaweights.json` before it gets its name.
"""


def _license_text(license: License) -> str:
    known = [text for text in (license.name or license.id, license.link) if text]
    return ", ".join(known) or "not stated"

"""Writes a delta's card: the fine-tune's own page, with what a delta's reader has to know above it."""

from __future__ import annotations

import json
import re
from urllib.parse import quote

from ..changes import PICTURE_NAME, describe_changes, grid_of
from ..license.cards import CARD_NAME, LICENSE_FILE, base_models_of, read_card
from ..license.rules import displays, expression_of, terms_of
from ..license.table import Terms
from ..manifest import BaseRecord, License, Manifest, TargetRecord
from ..storage import Source
from ..words import counted
from .front_matter import Field, dump, plain, read_fields, texts, true_tags
from .links import Finder, relocate, relocated

_HUB = "https://huggingface.co/"
_TAGS = ("deltaweights", "delta", "safetensors")
_RELATIONS = ("finetune", "adapter", "quantized", "merge")

#: What is copied of the fine-tune's text, in characters.
_MAX_TEXT = 200_000
_MAX_CONFIG_BYTES = 1 << 20

#: A title, with lines of HTML and pictures above it.
_HEAD = re.compile(r"(?:[ \t]*(?:(?:<|!\[|\[!\[)[^\n]*)?\n){0,40} {0,3}# [^\n]+")
_VOID = ("br", "hr", "img", "source")

#: What stands for a delta's place until it has one on the Hub.
_UNPLACED = "PATH_OF_THIS_DELTA"
_USE = re.compile(
    rb"<!-- how to use (?P<place>[\w./@-]{1,500}) -->.*?<!-- end of how to use it -->", re.DOTALL
)


def write_card(manifest: Manifest, target: Source | None = None) -> bytes:
    """The delta's own model card, as Markdown with the Hub's front matter.

    Args:
        target: the target's files. Name, text and metadata of its card are kept; None: there is none.
    """
    own = {file.path for file in manifest.target.files if file.stored != "base"}
    front_matter, text = read_card(target) if target and CARD_NAME in own else ("", "")
    find = _finder(manifest)
    kept = read_fields(front_matter, lambda link: relocated(link, find, is_shown=True) or link)
    shortened, text = len(text) > _MAX_TEXT, plain(text[:_MAX_TEXT])
    if shortened:
        text = text.rpartition("\n")[0]
    text = relocate(text, find)
    head, text = _head_of(text)
    parts = [
        head or ("" if text else _title(manifest)),
        *(f"**{line}**" for line in displays(manifest.base.license)),
        _what_it_is(manifest),
        _changes(manifest),
        _how_to_use(manifest, _transformers_arguments(manifest, target)),
        _facts(manifest),
        _obligations(manifest),
        "---" if text else "",
        f"*The model's own page follows. It is longer: all of it is in {CARD_NAME} of the rebuilt model.*"
        if shortened
        else "",
        text,
    ]
    body = "\n\n".join(filter(None, parts))
    return f"---\n{dump(_fields(manifest, kept))}---\n\n{body}\n".encode(errors="replace")


def address_card(card: bytes, place: str) -> bytes:
    """The card of a delta that is at ``place``, a Hub id: so its commands can be copied."""

    def addressed(part: re.Match[bytes]) -> bytes:
        return part[0].replace(part["place"], place.encode())

    return _USE.sub(addressed, card, count=1)


# Front matter ------------------------------------------------------------------------------------------


def _fields(manifest: Manifest, kept: dict[str, Field]) -> dict[str, Field]:
    base = manifest.base.repo_id
    stated = base_models_of(texts(kept.pop("base_model", None)))
    relation = next(iter(texts(kept.pop("base_model_relation", None))), None)
    fields: dict[str, Field] = {}
    if base or stated:
        fields["base_model"] = base or (stated if stated[1:] else stated[0])
    if relation in _RELATIONS and (base in stated if base else stated):
        fields["base_model_relation"] = relation
    elif base:
        fields["base_model_relation"] = "finetune"
    library = texts(kept.pop("library_name", None))
    tags = [tag for tag in true_tags(texts(kept.pop("tags", None))) if tag not in library]
    fields |= _license_fields(manifest)
    fields["library_name"] = "deltaweights"
    fields["tags"] = list(dict.fromkeys([*tags, *_TAGS]))
    return fields | {name: value for name, value in kept.items() if not name.startswith("license")}


def _license_fields(manifest: Manifest) -> dict[str, Field]:
    """The license of base and target together, in the Hub's terms: ids of its list, or ``other`` with a short
    name and a URL. (The Hub accepts a link to a file only if it is ``LICENSE``, but the delta has several
    texts.)"""
    sides = [(side, one) for side in (manifest.target, manifest.base) for one in terms_of(side.license)]
    every = terms_of(manifest.target.license, manifest.base.license)
    ids = list(dict.fromkeys(one.hub for one in every))
    if all(ids):
        return {"license": ids if ids[1:] else ids[0]} if ids else {}
    name = "-and-".join(_short_name(one) for one in every)
    urls = (_license_url(side, one) for side, one in sides if not one.hub)
    url = next(filter(None, urls), None)
    fields: dict[str, Field] = {"license": "other", "license_name": name}
    return fields | ({"license_link": url} if url else {})


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


# Text --------------------------------------------------------------------------------------------------


def _finder(manifest: Manifest) -> Finder:
    """Where the target's files are: in the delta as they are, else in the repository of target or base."""
    files = {file.path: file for file in manifest.target.files}
    folders = {path.rpartition("/")[0] for path in files}

    def find(path: str, is_shown: bool) -> str | None:
        file = files.get(path)
        if file and file.stored == "verbatim":
            return file.source
        kind = "resolve" if is_shown else "tree" if path in folders else "blob"
        if manifest.target.repo_id:
            return _at(manifest.target, f"/{kind}/{{}}/{path}")
        if file and file.stored == "base" and manifest.base.repo_id:
            return _at(manifest.base, f"/{kind}/{{}}/{file.source}")
        return None

    return find


def _at(side: BaseRecord | TargetRecord, rest: str) -> str:
    """A URL of a side's repository; ``{}`` in ``rest`` stands for its revision."""
    return f"{_HUB}{side.repo_id}{rest.replace('{}', side.revision or 'main', 1)}"


def _head_of(text: str) -> tuple[str, str]:
    """The title that a text begins with, with pictures above it that leave no tag open; and the rest."""
    found = _HEAD.match(text)
    head = found[0] if found else ""
    opened = [tag.casefold() for tag in re.findall(r"<(\w+)", head) if tag.casefold() not in _VOID]
    closed = [tag.casefold() for tag in re.findall(r"</(\w+)", head)]
    if sorted(opened) != sorted(closed) or head.count("<!--") != head.count("-->"):
        head = ""
    return head.strip(), text[len(head) :].strip()


def _title(manifest: Manifest) -> str:
    target, base = manifest.target.repo_id, manifest.base.repo_id
    name = _plain(target) if target else f"A model made from {_plain(base)}" if base else "A model"
    return f"# {name}, as a delta"


def _what_it_is(manifest: Manifest) -> str:
    base, target = manifest.base, manifest.target
    name = _plain(target.repo_id) if target.repo_id else "this model"
    if base.repo_id:
        its_base = f"its base, [{_plain(base.repo_id)}]({_HUB}{quote(base.repo_id)})"
        if base.revision:
            its_base += f" at commit `{base.revision}`"
    else:
        its_base = "its base"
    if not manifest.needs_base:
        what = f"It holds all of {name}, and needs no base."
    else:
        what = f"It holds what {name} adds to {its_base}, which stays where it is."
    return (
        f"**This is a delta, not a whole model.** {what} The program deltaweights gives the model's files "
        "back, byte for byte, and checks the SHA-256 of each."
    )


def _how_to_use(manifest: Manifest, transformers: str | None) -> str:
    by_id = manifest.base.repo_id or not manifest.needs_base
    option, argument = ("", "") if by_id else (" --base PATH_OF_THE_BASE", ', base="PATH_OF_THE_BASE"')
    model = f"""
To load it as a model of transformers, without a rebuilt copy on the disk:

```python
from deltaweights.torch import from_pretrained

model = from_pretrained("{_UNPLACED}"{argument}{transformers})
```
"""
    return f"""<!-- how to use {_UNPLACED} -->
```sh
deltaweights apply {_UNPLACED} -o OUT{option}
```
{"" if transformers is None else model}
In Python, its files, or its tensors one by one:

```python
from deltaweights import apply_delta, open_target

apply_delta("{_UNPLACED}", "OUT"{argument})

with open_target("{_UNPLACED}"{argument}) as target:
    for name in target:
        print(name, target.dtype(name), target.shape(name))
```
<!-- end of how to use it -->"""


def _transformers_arguments(manifest: Manifest, target: Source | None) -> str | None:
    """What ``from_pretrained`` needs besides the place; None for what is no model of transformers."""
    size = target.sizes.get("config.json") if target else None
    if target is None or size is None or size > _MAX_CONFIG_BYTES:
        return None
    try:
        config = json.loads(b"".join(target.blocks("config.json")))
    except (ValueError, RecursionError):
        return None
    if not isinstance(config, dict) or not config.get("architectures") or not config.get("model_type"):
        return None
    return ", trust_remote_code=True" if config.get("auto_map") else ""


def _changes(manifest: Manifest) -> str:
    """What the fine-tune changed, in words, and as the picture in the delta."""
    said = " ".join(map(_plain, describe_changes(manifest.tensors, grid_of(manifest.tensors))))
    if not any(file.path == PICTURE_NAME for file in manifest.files):
        return said
    return f"{said}\n\n![Bits a weight in the delta, by layer and module]({PICTURE_NAME})"


def _facts(manifest: Manifest) -> str:
    base, target, whole = manifest.base, manifest.target, manifest.license
    ratio = manifest.delta_bytes / max(1, manifest.target_bytes)
    together = expression_of(target.license, base.license) or "not stated"
    folders = ["`licenses/`"] if base.license.files or target.license.files else []
    places = " and ".join([*folders, *([f"`{whole.notice}`"] if whole and whole.notice else [])])
    more = f"\n| License texts and notices | {places} |" if places else ""
    if target.left_out:
        more += f"\n| Left out | {counted(len(target.left_out), 'file')}, listed in `deltaweights.json` |"
    return f"""| | |
|---|---|
| Model | {counted(len(target.files), "file")}, {counted(manifest.target_bytes, "byte")} |
| Delta | {counted(manifest.delta_bytes, "byte")} ({ratio:.1%} of the model) |
| License of the base | {_license_text(base.license)} |
| License of the model | {_license_text(target.license)} |
| Both together | {_plain(together)} |{more}"""


def _obligations(manifest: Manifest) -> str:
    parts = []
    for side, license in (("base", manifest.base.license), ("model", manifest.target.license)):
        if license.obligations:
            lines = "\n".join(f"- {_plain(text)}" for text in license.obligations)
            parts.append(
                f"<details><summary>What the {side}'s license asks (listed, not legal advice)</summary>"
                f"\n\n{lines}\n\n</details>"
            )
    return "\n\n".join(parts)


def _license_text(license: License) -> str:
    known = [text for text in (license.name or license.id, license.link) if text]
    return _plain(", ".join(known) or expression_of(license) or "not stated")


def _plain(text: str) -> str:
    """Text from elsewhere, on one line and without markup."""
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", " ".join(plain(text).split()))

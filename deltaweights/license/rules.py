"""Which license each side is under, what it asks, and whether it was accepted.

Pure functions of texts and records: they read no file and ask nobody. What is known of licenses is in
table.py; nothing here is legal advice.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import msgspec

from ..errors import LicenseNotAcceptedError
from ..manifest import BaseRecord, DeltaLicense, FileRecord, License, Manifest, TargetRecord
from .table import KNOWN, LISTED, UNKNOWN, Terms

#: The delta's own notice. At the top of the folder, where people and scanners look for it.
NOTICE_NAME = "NOTICE"

#: License texts and notices of one side have no more bytes than this, together.
MAX_TEXT_BYTES = 1 << 22

#: Below ``apply``'s output: a place that is no part of any checkpoint, where no file of a target can be.
_LANDING = ".deltaweights/licenses"

_BY_NAME = {
    name.casefold(): terms
    for terms in (*LISTED, *reversed(KNOWN))  # of two versions, the one that the table gives first
    for name in (terms.spdx, terms.hub, *terms.aliases)
    if name
}

_WORDS = re.compile(r"[a-z]+|\d+(?:\.\d+)*")
_EMPTY_WORDS = {"the", "license", "licence", "version", "v", "community", "agreement"}

#: What joins licenses in an expression, and names none.
_OPERATORS = {"and", "or", "with"}

#: Lines in which two copies of one license text may differ: titles and copyright.
_LEFT_OUT = re.compile(
    r"copyright (\(c\)|©|\d{4}|[\[{]).*|\(c\) \d{4}.*|all rights reserved\.?"
    r"|(the )?mit license( \(mit\))?|(the )?(bsd )?[23]-clause( bsd)? license|(new |simplified )?bsd license"
)


# Which license it is -----------------------------------------------------------------------------------


def find_terms(name: str) -> Terms:
    """The license that a card or an SPDX expression calls ``name``; a made-up entry if it is not known."""
    if name.casefold() in _BY_NAME:
        return _BY_NAME[name.casefold()]
    words = " ".join(name.removeprefix("LicenseRef-").split())
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", words)[:100].strip("-.") or "unnamed"
    return Terms(f"LicenseRef-{slug}", words, "restricted", obligations=(UNKNOWN,))


def terms_of(*licenses: License) -> tuple[Terms, ...]:
    """Everything that ``licenses`` stand for together, each once; empty if nothing is stated."""
    return _once(terms for license in licenses for terms in _terms_of(license))


def expression_of(*licenses: License) -> str | None:
    """The same as an SPDX expression; None if nothing is stated."""
    return _expression(terms_of(*licenses))


def _terms_of(license: License) -> Iterable[Terms]:
    if license.expression is not None:
        return map(find_terms, license.expression.split(" AND "))
    return _stated(license)


def _claimed(license: License, texts: Mapping[str, bytes]) -> tuple[Terms, ...]:
    """All that is said of a license anywhere: so that no one word of a manifest makes it an open one."""
    whole = tuple(_terms_of(license))
    stated = _stated(license)
    name = [] if stated and _says_the_same(license.name or "", stated) else [license.name or ""]
    known = [recognize(texts[file.path]) for file in license.files if file.path in texts]
    more = [*stated, *map(_find_by_name, filter(None, name)), *filter(None, known)]
    if license.expression and license.files and (not known or any(known)):
        more = [one for one in more if one.spdx != "LicenseRef-other"]  # the texts tell which one
    return _once([*whole, *(one for one in more if not _is_among(one, whole))])


def _says_the_same(name: str, stated: Iterable[Terms]) -> bool:
    """Whether a card's ``license_name`` adds nothing: ``Apache License 2.0`` beside ``apache-2.0``."""
    own = set(_WORDS.findall(name.casefold())) - _EMPTY_WORDS
    names = (" ".join(_names(terms)) for terms in stated)
    return any(own <= set(_WORDS.findall(words)) for words in names)


def _find_by_name(name: str) -> Terms:
    whole = (terms for terms in (*LISTED, *KNOWN) if terms.name.casefold() == name.casefold())
    return next(whole, None) or find_terms(name)


def _stated(license: License) -> tuple[Terms, ...]:
    """What the card says. On the Hub, ``unknown`` means nothing, and ``other`` that the name tells."""
    ids = [id for id in (license.id or "").split(" AND ") if id.casefold() not in ("", "unknown")]
    names = [license.name if license.name and id.casefold() == "other" else id for id in ids]
    return _once(map(find_terms, names or filter(None, [license.name])))


def _once(terms: Iterable[Terms]) -> tuple[Terms, ...]:
    found: dict[str, Terms] = {}
    for one in terms:
        found.setdefault(one.spdx.casefold(), one)
    return tuple(found.values())


def _expression(terms: Iterable[Terms]) -> str | None:
    return " AND ".join(one.spdx for one in terms) or None


def recognize(text: bytes) -> Terms | None:
    """The license whose text this is. Known by its first lines, with the date; or by all of it, where people
    like to change it, as with MIT and Apache."""
    joined = " ".join(_plain_lines(text))
    digest = hashlib.sha256(joined.encode()).hexdigest()
    start = joined.removeprefix("creative commons ") + " "
    for terms in KNOWN:
        if digest in terms.digests or (terms.title and start.startswith(" ".join(terms.title) + " ")):
            return terms
    return None


def _other_version(text: bytes) -> Terms | None:
    """The license whose title this text has, though with another date."""
    title = tuple(_plain_lines(text)[:1])
    return next((terms for terms in KNOWN if len(terms.title) > 1 and terms.title[:1] == title), None)


def _plain_lines(data: bytes) -> list[str]:
    """A license text without markup, case, numbers of lists, and the lines in which copies differ."""
    text = data.decode("utf-8-sig", "replace").casefold().replace("https://", "http://")
    text = re.sub("[\u201c\u201d]", '"', re.sub("[\u2018\u2019`]", "'", text))
    lines = (" ".join(re.sub(r"[*#>\\]+", " ", line).split()) for line in text.splitlines())
    plain = (re.sub(r"^(\d+\.|[-•]) ", "", line) for line in lines)
    return [line for line in plain if line.strip("=-_ ") and not _LEFT_OUT.fullmatch(line)]


# What a delta is under ---------------------------------------------------------------------------------


def resolve(side: str, stated: License, texts: Mapping[str, bytes]) -> tuple[License, tuple[str, ...]]:
    """Put together what the card of a side states and what its license texts are.

    Args:
        side: ``base`` or ``target``, for messages.
        stated: the card's words.
        texts: the license texts, by the names that their files had.

    Returns:
        ``stated`` with expression and obligations, and what does not fit together.
    """
    card = _stated(stated)
    found = {name: recognize(text) for name, text in texts.items()}
    known = [terms for terms in found.values() if terms]
    conflicts = [
        f"The {side}'s {name} has the title of the {terms.name}, but is not the version that is known here: "
        "what is listed may not be what it asks."
        for name, text in texts.items()
        if not found[name] and (terms := _other_version(text))
    ]
    if _expression(card) in (None, "LicenseRef-other"):  # the texts have to tell
        unknown = [_unknown_text(text) for name, text in texts.items() if not found[name]]
        every = _once(known or unknown or card)
    else:
        every = _once([*(one for one in card if not _is_among(one, known)), *known])
        if known and not any(_is_among(one, known) for one in card):
            conflicts.append(
                f"The {side} is stated to be under {_expression(card)}, but its files hold the text of "
                f"{_expression(_once(known))}."
            )
    obligations = [text if len(every) == 1 else f"{o.name}: {text}" for o in every for text in o.obligations]
    expression = _expression(every)
    return replace(stated, expression=expression, obligations=tuple(obligations)), tuple(conflicts)


def _is_among(one: Terms, others: Iterable[Terms]) -> bool:
    """Whether ``others`` hold this license, or another version that cards call by the same name."""
    return any(one.spdx == other.spdx or (one.hub and one.hub == other.hub) for other in others)


def _unknown_text(text: bytes) -> Terms:
    """A license that nobody names: its text tells it apart."""
    return find_terms(f"LicenseRef-text-{hashlib.sha256(text).hexdigest()[:12]}")


def combine(
    base: BaseRecord, target: TargetRecord, conflicts: Iterable[str] = (), named_bases: Sequence[str] = ()
) -> DeltaLicense | None:
    """What the delta as a whole is under; None if nothing is stated, and nothing does not fit together.

    Args:
        conflicts: those found so far.
        named_bases: what the target's card gives as its ``base_model``.
    """
    every = (*conflicts, *_conflicts(base, target), *_wrong_base(base, named_bases))
    expression = expression_of(target.license, base.license)
    return DeltaLicense(expression, every, NOTICE_NAME) if expression or every else None


def _conflicts(base: BaseRecord, target: TargetRecord) -> Iterator[str]:
    theirs, ours = terms_of(base.license), terms_of(target.license)
    kept = [one for one in theirs if one.kind != "permissive" and not _is_among(one, ours)]
    if kept and ours:
        yield (
            f"The target is stated to be under {_expression(ours)}, but its base is under "
            f"{_expression(kept)}, which still applies."
        )
    if not base.license.files:
        for one in kept:
            yield f"The base came without the text of its license, {one.name}: pass it on too."
    name = _letters((target.repo_id or "").rpartition("/")[2])
    for one in theirs:
        if name and not name.startswith(_letters(one.prefix)):
            yield f'The target is {target.repo_id}; its base asks for a name that begins with "{one.prefix}".'


def _wrong_base(base: BaseRecord, named_bases: Sequence[str]) -> Iterator[str]:
    if base.repo_id and named_bases and base.repo_id.casefold() not in map(str.casefold, named_bases):
        yield f"The target's card names {', '.join(named_bases)} as its base, not {base.repo_id}."


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.casefold())


def notice_text(base: BaseRecord, target: TargetRecord) -> bytes:
    """The delta's NOTICE file: what was changed, the notices that the licenses want, and what they ask."""
    both = terms_of(base.license, target.license)
    parts = [
        f"This delta holds what {target.repo_id or 'a fine-tuned model'} adds to its base, "
        f"{base.repo_id or 'another model'}. The base is no part of it.\n"
        "Changes: the model's files were changed or added by its makers, but for those that\n"
        'deltaweights.json lists as stored "base".',
        *(one.notice for one in both),
        *displays(base.license),
        _notice_of("base", base.license),
        _notice_of("target", target.license),
        *(_list(f"{one.name} asks (listed, not legal advice):", one.obligations) for one in both),
    ]
    return ("\n\n".join(filter(None, parts)) + "\n").encode()


def displays(license: License) -> list[str]:
    """The words that a license wants to see in the documentation of what was made with it."""
    return list(dict.fromkeys(one.display for one in terms_of(license) if one.display))


def _notice_of(side: str, license: License) -> str:
    names = ", ".join(f"{one.name} ({one.spdx})" for one in terms_of(license))
    texts = "; its texts, in the delta:" if license.files else ""
    heading = f"License of the {side}: {names or 'not stated'}{texts}"
    return _list(heading, (file.path for file in license.files))


def _list(heading: str, lines: Iterable[str]) -> str:
    return "\n".join([heading, *(f"- {line}" for line in lines)])


# What a reader of a delta has to know ------------------------------------------------------------------


def text_records(manifest: Manifest) -> tuple[FileRecord, ...]:
    """The delta's files that are license texts and notices, each once; but for what is too long to be one."""
    paths = {file.path for side in (manifest.base, manifest.target) for file in side.license.files}
    if manifest.license:
        paths.add(manifest.license.notice or "")
    sizes = itertools.accumulate(file.size if file.path in paths else 0 for file in manifest.files)
    within = [file for file, size in zip(manifest.files, sizes, strict=True) if size <= 3 * MAX_TEXT_BYTES]
    return tuple(file for file in within if file.path in paths)


def landing_place(path: str) -> str:
    """Where ``apply`` puts the delta's text ``path``, below its output."""
    return f"{_LANDING}/{path.removeprefix('licenses/')}"


def unaccepted(
    manifest: Manifest, accepted: Iterable[str] = (), texts: Mapping[str, bytes] | None = None
) -> tuple[Terms, ...]:
    """The licenses that somebody has to accept before using the delta, and that ``accepted`` does not name.

    Open licenses, and sides that state none, need no acceptance; any other license does, known here or not.
    All that the manifest says counts: expression, id and name; and what the texts are.

    Args:
        accepted: SPDX ids, ids of the Hub, or what a card gives as ``license_name``, in upper or lower case;
            an element may hold several, with white space or ``AND`` between them.
        texts: the license texts in the delta, by path, as far as they were read.
    """
    given = {name.casefold() for text in accepted for name in text.split()} - _OPERATORS
    sides = (manifest.base.license, manifest.target.license)
    both = _once(terms for side in sides for terms in _claimed(side, texts or {}))
    return tuple(terms for terms in both if not terms.is_open and not given & _names(terms))


def not_accepted(missing: Sequence[Terms], fix: str) -> LicenseNotAcceptedError:
    """The error for licenses that nobody has accepted. ``fix`` says how to."""
    return LicenseNotAcceptedError(
        f"The license was not accepted: {', '.join(terms.name for terms in missing)}",
        "It is not an open license, or not known to be one. No weights were read, nothing was written.",
        fix,
    )


def _names(terms: Terms) -> set[str]:
    return {name.casefold() for name in (terms.spdx, terms.hub, terms.name, *terms.aliases) if name}


@dataclass(frozen=True, slots=True)
class StatedLicense:
    """One license of a side.

    Attributes:
        id: its SPDX id, or ``LicenseRef-`` and a name where SPDX has none.
        name: what people call it.
        open: whether it needs no acceptance.
        dated: the date of this version; empty where it has none.
        source: where its text is published; empty where that is not known.
    """

    id: str
    name: str
    open: bool
    dated: str
    source: str


@dataclass(frozen=True, slots=True)
class SideLicense:
    """The license of the base or of the target.

    Attributes:
        repo_id, revision: the side's Hub id and commit, where they are known.
        id, name, link: the words of its model card.
        expression: card and texts together, as an SPDX expression; None if nothing is stated.
        licenses: each license of the expression.
        obligations: what they ask, for people to read.
        files: the license texts that lie in the delta.
    """

    repo_id: str | None
    revision: str | None
    id: str | None
    name: str | None
    link: str | None
    expression: str | None
    licenses: tuple[StatedLicense, ...]
    obligations: tuple[str, ...]
    files: tuple[FileRecord, ...]


@dataclass(frozen=True, slots=True)
class LicenseText:
    """A license text or notice in a delta: path, size in bytes and SHA-256 in hex; its ``text`` if it was
    asked for, else None."""

    path: str
    size: int
    sha256: str
    text: str | None = None


@dataclass(frozen=True, slots=True)
class LicenseReport:
    """What a delta says of licenses.

    Attributes:
        base, target: each side's license.
        expression: both together, as an SPDX expression; None if nothing is stated.
        conflicts: what does not fit together, for people to read.
        notice: the path of the delta's NOTICE file; None if it has none.
        to_accept: SPDX ids of the licenses that somebody has to accept before using the delta.
        texts: the license texts in the delta; None where nobody asked for them (:func:`license_of` does).
    """

    base: SideLicense
    target: SideLicense
    expression: str | None
    conflicts: tuple[str, ...]
    notice: str | None
    to_accept: tuple[str, ...]
    texts: tuple[LicenseText, ...] | None = None

    def to_dict(self) -> dict[str, object]:
        """The same, ready for JSON. What was not asked for is absent."""
        fields: dict[str, object] = msgspec.to_builtins(replace(self, texts=None))
        del fields["texts"]
        if self.texts is not None:
            texts = [asdict(text) for text in self.texts]
            fields["texts"] = [{k: v for k, v in text.items() if v is not None} for text in texts]
        return fields


def describe(manifest: Manifest, texts: Mapping[str, bytes] | None = None) -> LicenseReport:
    """All that the manifest says of licenses; and what has to be accepted, as :func:`unaccepted` says for the
    license texts in the delta, by path."""
    whole = manifest.license or DeltaLicense()
    return LicenseReport(
        base=_describe_side(manifest.base),
        target=_describe_side(manifest.target),
        expression=expression_of(manifest.target.license, manifest.base.license),
        conflicts=whole.conflicts,
        notice=whole.notice,
        to_accept=tuple(terms.spdx for terms in unaccepted(manifest, (), texts)),
    )


def _describe_side(side: BaseRecord | TargetRecord) -> SideLicense:
    license = side.license
    every = terms_of(license)
    return SideLicense(
        repo_id=side.repo_id,
        revision=side.revision,
        id=license.id,
        name=license.name,
        link=license.link,
        expression=_expression(every),
        licenses=tuple(
            StatedLicense(one.spdx, one.name, one.is_open, one.dated, one.source) for one in every
        ),
        obligations=license.obligations or tuple(text for one in every for text in one.obligations),
        files=license.files,
    )

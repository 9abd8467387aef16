"""Publishes a delta on the Hub: checked first, then in one commit."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from tempfile import TemporaryDirectory

from .card import address_card
from .checkpoint import Checkpoint
from .checkpoint.oddities import tell
from .delta.opening import read_manifest
from .delta.target_recipe import TargetRecipe
from .errors import (
    BaseMismatchError,
    CheckpointError,
    DeltaError,
    HubReadError,
    ManifestError,
    OutputError,
    SignatureError,
)
from .license.cards import CARD_NAME, LICENSE_FILE
from .license.rules import describe, recognize, terms_of, text_records
from .manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest
from .metrics import timed_operation
from .signing import ATTESTATION_NAME, SIGNATURE_NAME, UNSIGNED_NAMES, SignedFiles, open_bundle
from .signing.attestation import states_rebuilt
from .signing.statement import signed_digests
from .storage import HubSource, LocalSource, Location, Source, open_output, open_source, sha256_of, store_url
from .storage.hub_client import Downloader, Repository
from .storage.hub_upload import (
    Outgoing,
    find_branch,
    require_login,
    require_published,
    require_repo_id,
    upload,
)
from .verify import verify_delta
from .workers import Meter, ProgressCallback

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PushReport:
    """The result of :func:`push_delta`.

    Attributes:
        repo_id: the repository, by its present name if it was renamed.
        commit: the commit that holds the delta.
        url: its page, or that of the pull request.
        private: whether only its owners and invited users can read it.
        uploaded: paths of files added or replaced; empty if the Hub already had them all.
        removed: files of an earlier delta that were removed.
        nbytes: size of the files uploaded.
        conflicts: conflicts between the licenses, from the manifest.
    """

    repo_id: str
    commit: str
    url: str
    private: bool
    uploaded: tuple[str, ...]
    removed: tuple[str, ...]
    nbytes: int
    conflicts: tuple[str, ...]


@timed_operation("push")
def push_delta(
    delta: Location | LocalSource,
    repo_id: str,
    *,
    private: bool = True,
    revision: str | None = None,
    message: str | None = None,
    create_pr: bool = False,
    accept_conflicts: bool = False,
    progress: ProgressCallback | None = None,
) -> PushReport:
    """Publish a delta on the Hub: the files that its manifest lists, the manifest, the model card, and its
    signature and attestation, if it has them. A signed card stays as it is.

    They become visible together, in one commit. After an interruption, run it again: it resumes with the
    missing files. Files that only an earlier delta has are removed; all others stay.

    Args:
        delta: a folder, or an open one (closed at the end). Its files are checked against its manifest before
            and during the upload. Or the URL of a store: they are copied to a temporary folder first.
        repo_id: ``org/name``. The repository is created if there is none; an existing one stays private or
            public.
        private: create a private repository, and refuse a public one.
        revision: the branch, created from the main branch if there is none; if None, the main branch.
        message: the commit's message.
        create_pr: open a pull request to the main branch instead.
        accept_conflicts: publish to everybody (``private=False``) despite conflicting licenses.
        progress: called with a phase, bytes done and total bytes: "verify delta" and "upload".

    Raises:
        CheckpointError: there is no such folder.
        DiskSpaceError: the temporary folder has no room for a delta from a store.
        DeltaError: the delta is incomplete or damaged, names another base than it was made from, holds
            copies of files of its base, or lacks the text of its base's license; or there are conflicts.
        SignatureError: its signature or its attestation is of another delta.
        OutputError: the repository cannot be written to as asked, or a file was changed meanwhile.
    """
    _check_place(repo_id, revision, create_pr)
    with _at_hand(delta) as source:
        manifest = read_manifest(source)
        require_login()
        _check_whole(source, progress)
        _check_copies(manifest)
        _check_license_text(source, manifest)
        _check_base(source, manifest)
        signatures = _signatures(source, manifest)
        conflicts = describe(manifest).conflicts
        if conflicts and not private and not accept_conflicts:
            raise _unsettled(conflicts)
        branch = find_branch(repo_id, revision, private=private)
        repository = branch.repository
        place = f"{repository.repo_id}@{branch.name}" if branch.name else repository.repo_id
        files = list(_files(source, manifest, place, signatures))
        new = [file for file in files if not file.is_in(repository)]
        nbytes = sum(file.size for file in new)
        old = _left_over(repository, files)
        there = len(files) - len(new)
        _log.info("pushing %s to %s: %d files, %d are there", source.where, branch.url, len(files), there)
        commit, url = repository.commit, branch.url
        if new or old:
            meter = Meter(progress, "upload", nbytes)
            text = message or _message(manifest)
            made = upload(branch, new, old, message=text, create_pr=create_pr, sent=meter.add)
            commit, url = made.id, made.pull_request or branch.url
            require_published(repository.repo_id, made.revision or commit, files)
    uploaded = tuple(file.path for file in new)
    return PushReport(repository.repo_id, commit, url, branch.is_private, uploaded, old, nbytes, conflicts)


@contextmanager
def _at_hand(delta: Location | LocalSource) -> Iterator[LocalSource]:
    """The delta on a disk of this machine, where an upload can read it again after an error."""
    if isinstance(delta, LocalSource) or not store_url(delta):
        with delta if isinstance(delta, LocalSource) else LocalSource(delta) as source:
            yield source
        return
    with TemporaryDirectory(prefix="deltaweights-") as folder:
        with open_source(delta) as far, open_output(folder) as here:
            paths = [*(file.path for file in read_manifest(far).files), CARD_NAME, MANIFEST_NAME]
            paths += UNSIGNED_NAMES
            there = [path for path in dict.fromkeys(paths) if path in far.sizes]
            here.require_space(sum(far.sizes[path] for path in there))
            for path in there:
                with here.create(path) as file:
                    file.write_blocks(far.blocks(path))
                    file.commit()
        with LocalSource(folder) as source:
            source.where = far.where
            yield source


def _check_place(repo_id: str, revision: str | None, create_pr: bool) -> None:
    require_repo_id(repo_id)
    if revision and create_pr:
        raise OutputError(
            "A pull request goes to the main branch", "A branch was given too.", "Leave out one of the two."
        )


def _check_whole(source: Source, progress: ProgressCallback | None) -> None:
    """Raise :class:`DeltaError` if the delta's files are not those in the manifest."""
    assert source.root is not None
    report = verify_delta(source.root, progress=progress)
    wrong = [problem for problem in report.problems if problem.kind != "extra"]  # extras stay here
    if wrong:
        first = wrong[0]
        more = f", and {len(wrong) - 1} more." if wrong[1:] else "."
        raise DeltaError(
            f"{source.where} is not a whole delta",
            f"{first.path}: {first.kind}: {first.detail}{more}",
            "Run the diff again; `verify_delta` lists all problems.",
        )
    if CARD_NAME not in source.sizes:
        raise DeltaError(
            f"{source.where} has no model card", f"{CARD_NAME} is missing.", "Run the diff again."
        )


def _check_base(source: Source, manifest: Manifest) -> None:
    """Raise :class:`DeltaError` where the repository that the manifest names as the base is another one, as
    far as its headers and the SHA-256 that it publishes tell; warn where it cannot be read."""
    named = manifest.base
    if named.repo_id is None:
        return
    at = f"{named.repo_id}{f'@{named.revision}' if named.revision else ''}"
    try:
        with Checkpoint(HubSource(named.repo_id, named.revision), may_lack=True) as base:
            TargetRecipe(source, manifest, base).check_published()
    except HubReadError as error:
        tell([f"The base {at} could not be compared: {error.what}."])
    except (BaseMismatchError, CheckpointError) as error:
        raise DeltaError(
            f"{at} is not the base that this delta was made from",
            error.why,
            "Run the diff again, and name the right one: base_repo=ORG/NAME, base_revision=COMMIT",
        ) from error


def _check_copies(manifest: Manifest) -> None:
    """Raise :class:`DeltaError` if the delta holds a file of its base instead of a reference to it.

    The manifest does not show copies inside tensors or archives."""
    base = {(record.size, record.sha256) for record in manifest.base.files if record.size}
    texts = {record.path for record in text_records(manifest)}
    copies = {
        record.path
        for record in manifest.files
        if (record.size, record.sha256) in base and record.path not in texts
    }
    alone = {entry.file for entry in manifest.tensors if entry.payload_bytes and not entry.shared_bytes}
    for file in manifest.target.files:
        is_held = file.stored == "zstd" or (file.stored == "tensors" and file.path in alone)
        if is_held and (file.size, file.sha256) in base:
            copies.add(file.source)
    if copies:
        first, *more = sorted(copies)
        raise DeltaError(
            "The delta holds copies of its base's files",
            f"{first} is one" + (f", and {len(more)} more are." if more else "."),
            "Make it with `make_delta`, which refers to the base's files instead.",
        )


def _check_license_text(source: Source, manifest: Manifest) -> None:
    """Raise :class:`DeltaError` if the base states a license and the delta lacks its text."""
    stated = terms_of(manifest.base.license)
    names = (record.path.partition("-")[2] for record in manifest.base.license.files)
    if not stated or any(map(LICENSE_FILE.fullmatch, names)):
        return
    texts = [recognize(b"".join(source.blocks(record.path))) for record in text_records(manifest)]
    here = {terms.spdx for terms in texts if terms}
    lacking = [terms for terms in stated if terms.spdx not in here]
    if lacking:
        where = f" ({lacking[0].source})" if lacking[0].source else ""
        raise DeltaError(
            f"The delta lacks the text of its base's license: {lacking[0].name}",
            "That text must accompany everything made from the base.",
            f"Put it into the folder of base or target as LICENSE.base{where}, and run the diff again.",
        )


def _unsettled(conflicts: tuple[str, ...]) -> DeltaError:
    return DeltaError(
        "The licenses do not fit together",
        " ".join(conflicts),
        "Resolve the conflict and pass accept_conflicts=True, or push privately: leave out private=False.",
    )


def _files(
    source: LocalSource, manifest: Manifest, place: str, signatures: dict[str, bytes]
) -> Iterator[Outgoing]:
    """The files to publish: those that the manifest lists, the model card, the signatures, the manifest.

    The card says how to use the delta at ``place``, where it will be, unless it is signed as it is."""
    for record in manifest.files:
        yield Outgoing(record.path, source.full_path(record.path), record.size, record.sha256)
    card = b"".join(source.blocks(CARD_NAME))
    own = {CARD_NAME: card if SIGNATURE_NAME in signatures else address_card(card, place)}
    for path, content in (own | signatures | {MANIFEST_NAME: manifest.to_json()}).items():
        yield Outgoing(path, content, len(content), hashlib.sha256(content).hexdigest())


def _signatures(source: Source, manifest: Manifest) -> dict[str, bytes]:
    """The signature and the attestation, if there are any. Who signed is not asked, but what.

    Raises:
        SignatureError: signature or attestation is of another delta, or the signature of another page.
    """
    there = sorted(UNSIGNED_NAMES & source.sizes.keys())
    bundles = {name: open_bundle(source, name) for name in there}
    if (bundle := bundles.get(SIGNATURE_NAME)) is not None:
        signed = SignedFiles(bundle.where, "", signed_digests(bundle.payload, bundle.where))
        signed.require(manifest)
        if signed.digests.get(CARD_NAME) != sha256_of(source.blocks(CARD_NAME)):
            raise SignatureError(
                f"{bundle.where} is not of this delta's page", f"{CARD_NAME} was changed.", "Sign it again."
            )
    if (bundle := bundles.get(ATTESTATION_NAME)) is not None:
        states_rebuilt(bundle, source, manifest)
    return {name: b"".join(source.blocks(name)) for name in there}


def _left_over(repository: Repository, files: list[Outgoing]) -> tuple[str, ...]:
    """The files of the delta now in the repository that the new one does not have."""
    there = repository.files.get(MANIFEST_NAME)
    manifest = next(file for file in files if file.path == MANIFEST_NAME)
    if there is None or there.size > MAX_MANIFEST_BYTES or manifest.is_in(repository):
        return ()
    try:
        data = b"".join(Downloader(repository).fetch(MANIFEST_NAME, 0, there.size))
        earlier = {record.path for record in Manifest.from_json(data).files} | UNSIGNED_NAMES
    except (ManifestError, CheckpointError):  # no readable delta
        return ()
    return tuple(sorted((earlier & set(repository.files)) - {file.path for file in files}))


def _message(manifest: Manifest) -> str:
    base = manifest.base.repo_id or "its base"
    return f"What {manifest.target.repo_id or 'the target'} adds to {base}"

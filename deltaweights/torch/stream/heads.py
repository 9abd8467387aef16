"""Signed heads: a publisher signs each head of its stream, a subscriber takes those of keys it knows only.

A head names its record by SHA-256, and that its payload files and the records before it. So who signs a head
signs all that leads to its state.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from msgspec import UNSET

from ...errors import OutputError, SignatureError, SigningError
from ...signing.keys import KeyFile, is_signed, key_id, load_private, load_public, sign_bytes
from ...signing.signers import KeySigner
from ...signing.trust import TrustedKey
from .records import MOST_KEYS, SIGNED_VERSION, STREAM_NAME, Head, StateReference, write_json

if TYPE_CHECKING:
    from ...signing.keys import PrivateKey, PublicKey

_log = logging.getLogger("deltaweights")

#: What the signature of a head is a signature of, besides its bytes.
HEAD_TYPE = "application/vnd.deltaweights.stream-head.v1+json"

#: Who signs a stream: a key, or several, each of which signs every head, while keys are changed.
StreamSigners: TypeAlias = KeySigner | Sequence[KeySigner]

#: Who must have signed: a public key, by its PEM file, or several, of which one suffices. A signer stands for
#: its own public key.
StreamKeys: TypeAlias = "TrustedKey | KeySigner | KeyFile | Sequence[TrustedKey | KeySigner | KeyFile]"

_FIX = "Ask whoever publishes the stream who signs it; do not follow it until that is settled."


def _signed_part(head: Head) -> bytes:
    """What the signatures of a head are of: its JSON without them."""
    return write_json(replace(head, signatures=UNSET))


def require_name(name: str | None) -> None:
    """Raise :class:`ValueError` for what cannot be the name of a stream."""
    if name is not None and not STREAM_NAME.fullmatch(name):
        raise ValueError(f"stream_name is {name[:200]!r}, not at most 200 letters, digits and .:/_-")


@dataclass
class HeadSigner:
    """Signs heads.

    Args:
        signers: who signs.
        name: the stream's; None: that of the stream that is continued, or a random one.

    Raises:
        SigningError: a key cannot be read, or there is none, or there are too many.
    """

    signers: StreamSigners
    name: str | None = None
    _keys: dict[str, PrivateKey] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        given = [self.signers] if isinstance(self.signers, KeySigner) else list(self.signers)
        require_name(self.name)
        self._keys = {}
        for one in given:
            key = load_private(one.private_key, one.password)
            self._keys[key_id(key.public_key())] = key
        if not 0 < len(self._keys) <= MOST_KEYS:
            raise SigningError(
                f"A stream cannot be signed by {len(self._keys)} keys",
                f"It is signed by 1 to {MOST_KEYS}.",
                "Pass the key in use; and the next one, while keys are changed.",
            )

    def sign(self, head: Head) -> bytes:
        """The head with its signatures, as JSON."""
        if self.name is None:
            self.name = secrets.token_hex(8)
        named = replace(head, format_version=SIGNED_VERSION, stream=self.name, keys=tuple(sorted(self._keys)))
        body = _signed_part(named)
        signatures = tuple(sign_bytes(self._keys[name], HEAD_TYPE, body).hex() for name in sorted(self._keys))
        return write_json(replace(named, signatures=signatures))

    def vouches_for(self, head: Head, where: str) -> bool:
        """Whether a stream that is there can be continued: one of these keys has signed its head.

        Raises:
            OutputError: it is signed by one of them as another stream.
        """
        try:
            HeadTrust({name: key.public_key() for name, key in self._keys.items()}).check(head, where)
        except SignatureError as error:
            _log.warning("%s begins anew, with an anchor: %s. %s", where, error.what, error.why)
            return False
        if self.name not in (None, head.stream):
            raise OutputError(
                f"The stream at {where} has another name",
                f"It is {head.stream!r}, not {self.name!r}.",
                "Choose a different location, or leave out the name.",
            )
        self.name = str(head.stream)
        return True


class HeadTrust:
    """Checks heads, and remembers the newest one.

    Args:
        keys: public keys, by their ids.
        name: the stream's; None: that of the first head.
        least: the least number of a state that is taken.
    """

    def __init__(self, keys: Mapping[str, PublicKey], name: str | None = None, least: int = 0) -> None:
        self._keys = keys
        self._name = name
        self._least = least
        self._newest: StateReference | None = None

    @classmethod
    def of(cls, required: StreamKeys, name: str | None, least: int) -> HeadTrust:
        """For keys in PEM files.

        Raises:
            SigningError: one cannot be read, or there is none.
        """
        is_one = isinstance(required, (str, os.PathLike, TrustedKey, KeySigner))
        given: list[Any] = [required] if is_one else list(required)  # type: ignore[arg-type]
        keys = [_public(one) for one in given]
        if not keys:
            raise SigningError("No key is trusted", "The list of keys is empty.", "Name one.")
        require_name(name)
        return cls({key_id(key): key for key in keys}, name, least)

    def check(self, head: Head, where: str, *, may_go_back: bool = False) -> None:
        """Check who signed a head, of which stream, and that it is no earlier one than the last.

        Args:
            where: its name in messages.
            may_go_back: take an earlier one, too.

        Raises:
            SignatureError: nobody who is trusted has signed it; a signature by one of them is wrong; it is of
                another stream, or an earlier head, or another one of the same number.
        """
        if not head.keys or not head.signatures:
            raise _refused(where, "Its head is not signed")
        known = [name for name in head.keys if name in self._keys]
        if not known:
            raise _refused(where, f"Its head is signed by {', '.join(f'{one[:16]}…' for one in head.keys)}")
        body = _signed_part(head)
        for name, signature in zip(head.keys, head.signatures, strict=True):
            if name in known and not is_signed(self._keys[name], bytes.fromhex(signature), HEAD_TYPE, body):
                raise _refused(where, f"The signature of its head by {name[:16]}… is not of that head")
        if self._name not in (None, head.stream):
            raise _refused(where, f"It is the stream {head.stream!r}, not {self._name!r}")
        if not may_go_back:
            self._require_later(head.newest, where)
        self._name, self._newest = str(head.stream), head.newest

    def _require_later(self, newest: StateReference, where: str) -> None:
        least = self._least if self._newest is None else max(self._least, self._newest.number)
        if newest.number < least:
            raise _refused(where, f"Its head is at state {newest.number}, after one at {least}")
        if self._newest is not None and newest.number == self._newest.number and newest != self._newest:
            raise _refused(where, f"Two heads of it are at state {newest.number}, and they differ")


def _public(one: TrustedKey | KeySigner | KeyFile) -> PublicKey:
    if isinstance(one, KeySigner):
        return load_private(one.private_key, one.password).public_key()
    return load_public(one.public_key if isinstance(one, TrustedKey) else one)


def _refused(where: str, why: str) -> SignatureError:
    return SignatureError(f"The stream at {where} is not signed as it must be", f"{why}.", _FIX)

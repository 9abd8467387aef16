"""Signed streams: who signs heads, who takes them, and everything that is refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from deltaweights import (
    DeltaError,
    FormatVersionError,
    KeySigner,
    OutputError,
    SignatureError,
    SigningError,
    TrustedKey,
)
from deltaweights.storage import hub_client
from deltaweights.torch import DeltaPublisher, DeltaSubscriber
from deltaweights.torch.stream.heads import HEAD_TYPE, HeadTrust
from deltaweights.torch.stream.records import HEAD_NAME, read_head

from ...hub_server import HubServer
from .streams import Net, bits, train

if not importlib.util.find_spec("model_signing"):
    pytest.skip("needs the extra sign", allow_module_level=True)

from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from ...signing.keys import KeyPair, write_pair

FIXTURE = Path(__file__).parents[2] / "fixtures" / "stream-v3"


@pytest.fixture(scope="session", params=["ed25519", "p256", "p521"])
def any_keys(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    made: dict[str, Any] = {
        "ed25519": ed25519.Ed25519PrivateKey.generate,
        "p256": lambda: ec.generate_private_key(ec.SECP256R1()),
        "p521": lambda: ec.generate_private_key(ec.SECP521R1()),
    }
    return write_pair(tmp_path_factory.mktemp("keys"), "stream", made[request.param]())


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    return write_pair(tmp_path_factory.mktemp("keys"), "stream", ed25519.Ed25519PrivateKey.generate())


@pytest.fixture(scope="session")
def others(tmp_path_factory: pytest.TempPathFactory) -> KeyPair:
    return write_pair(tmp_path_factory.mktemp("keys"), "other", ed25519.Ed25519PrivateKey.generate())


def published(place: Path | str, *signers: KeyPair, steps: int = 2, name: str | None = "run") -> Net:
    """A stream with so many states after the base; the model as it is then."""
    model = Net()
    signer = [KeySigner(one.private) for one in signers] or None
    with DeltaPublisher(place, model, signer=signer, stream_name=name if signers else None) as publisher:
        for step in range(1, steps + 1):
            train(model, step)
            publisher.publish(step, model)
    return model


@pytest.mark.parametrize("kind", ["folder", "url", "hub"])
def test_a_signed_stream_is_followed(
    kind: str,
    any_keys: KeyPair,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    place = str(tmp_path / "stream") if kind == "folder" else f"memory://{tmp_path.name}/stream"
    if kind == "hub":
        hub: HubServer = request.getfixturevalue("hub")
        monkeypatch.setattr(hub_client, "RETRY_DELAYS", (0.0,) * 8)
        monkeypatch.setenv("HF_TOKEN", hub.add_user("org"))
        place = "hf://org/stream"
    model = published(place, any_keys)
    for required in (any_keys.public, str(any_keys.public), TrustedKey(any_keys.public), None):
        engine = Net(3)
        subscriber = DeltaSubscriber(
            place, require_signature=required, stream_name="run" if required else None
        )
        subscriber.sync(engine)
        assert bits(engine) == bits(model)
        assert subscriber.newest().step == 2


def test_unsigned_heads_and_those_of_other_keys_are_refused(
    keys: KeyPair, others: KeyPair, tmp_path: Path
) -> None:
    published(tmp_path / "unsigned")
    published(tmp_path / "signed", keys)
    for place, key, why in (("unsigned", keys, "is not signed"), ("signed", others, "is signed by")):
        engine = Net()
        before = bits(engine)
        refuses(DeltaSubscriber(tmp_path / place, require_signature=key.public), engine, why)
        assert bits(engine) == before
    with pytest.raises(SigningError, match="No key"):
        DeltaSubscriber(tmp_path / "signed", require_signature=[])


def refuses(subscriber: DeltaSubscriber, engine: Net, why: str) -> None:
    """Whatever the subscriber is asked for."""
    calls = (lambda: subscriber.sync(engine), subscriber.newest, subscriber.states, subscriber.empty_state)
    for call in calls:
        with pytest.raises(SignatureError, match=why):
            call()


def test_every_flipped_bit_of_a_signed_head_is_found(any_keys: KeyPair, tmp_path: Path) -> None:
    published(tmp_path / "stream", any_keys, steps=0)
    data = (tmp_path / "stream" / HEAD_NAME).read_bytes()
    trust = HeadTrust.of(any_keys.public, "run", 0)
    trust.check(read_head(data, "head"), "head")
    for place in range(8 * len(data)):
        changed = bytearray(data)
        changed[place // 8] ^= 1 << place % 8
        with pytest.raises(DeltaError):
            trust.check(read_head(bytes(changed), "head"), "head")


def test_what_a_signed_head_leads_to_is_covered(keys: KeyPair, tmp_path: Path) -> None:
    """Every bit of its record and of its payloads, by SHA-256."""
    stream = tmp_path / "stream"
    published(stream, keys, steps=1)
    engine = Net(3)
    before = bits(engine)
    files = [path for path in stream.iterdir() if path.name != HEAD_NAME]
    assert len(files) == 4
    for path in files:
        data = path.read_bytes()
        for place in (0, len(data) // 2, len(data) - 1):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            try:
                DeltaSubscriber(stream, require_signature=keys.public).sync(engine)
            except DeltaError:
                assert bits(engine) == before
            else:  # it was led there by other files
                assert "update" in path.name or path.name < "0000000001"
                engine = Net(3)
        path.write_bytes(data)


def test_an_earlier_head_is_refused(keys: KeyPair, tmp_path: Path) -> None:
    """Also one that the same key signed."""
    stream, model = tmp_path / "stream", Net()
    with DeltaPublisher(stream, model, signer=KeySigner(keys.private)) as publisher:
        heads = [(stream / HEAD_NAME).read_bytes()]
        for step in range(1, 4):
            train(model, step)
            publisher.publish(step, model)
            heads.append((stream / HEAD_NAME).read_bytes())
    subscriber = DeltaSubscriber(stream, require_signature=keys.public)
    assert subscriber.newest().step == 3  # seen, not taken
    engine = Net(3)
    for head in heads[:3]:
        (stream / HEAD_NAME).write_bytes(head)
        refuses(subscriber, engine, "after one at 3")
    with pytest.raises(SignatureError, match="after one at 3"):  # another process remembers it
        DeltaSubscriber(stream, require_signature=keys.public, last_number=3).newest()
    back = DeltaSubscriber(stream, require_signature=keys.public, last_number=3, allow_rollback=True)
    assert back.newest().step == 2
    (stream / HEAD_NAME).write_bytes(heads[3])
    assert subscriber.sync(engine).step == 3


def test_two_heads_of_one_number_are_refused(keys: KeyPair, tmp_path: Path) -> None:
    """As where a key is used by two publishers, or was stolen."""
    one, other = tmp_path / "one", tmp_path / "other"
    published(one, keys)
    shutil.copytree(one, other)
    subscriber = DeltaSubscriber(one, require_signature=keys.public)
    for place in (one, other):
        model = Net()
        DeltaSubscriber(place).sync(model)
        with DeltaPublisher(place, model, signer=KeySigner(keys.private)) as publisher:
            train(model, 3 if place == one else 4)
            publisher.publish(3, model)
    subscriber.sync(Net())
    shutil.rmtree(one)
    shutil.copytree(other, one)
    with pytest.raises(SignatureError, match="they differ"):
        subscriber.sync(Net())


def test_another_stream_of_the_same_key_is_refused(keys: KeyPair, tmp_path: Path) -> None:
    published(tmp_path / "one", keys, name="one")
    published(tmp_path / "two", keys, steps=5, name="two")
    named = DeltaSubscriber(tmp_path / "one", require_signature=keys.public, stream_name="one")
    unnamed = DeltaSubscriber(tmp_path / "one", require_signature=keys.public)
    assert unnamed.newest().step == 2
    shutil.rmtree(tmp_path / "one")
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    for subscriber in (named, unnamed):
        with pytest.raises(SignatureError, match="stream 'two', not 'one'"):
            subscriber.newest()


def test_keys_are_changed_while_a_stream_goes_on(keys: KeyPair, others: KeyPair, tmp_path: Path) -> None:
    """Subscribers learn the new key, the publisher signs with both, then with the new one alone."""
    stream, model = tmp_path / "stream", Net()
    old, new = KeySigner(keys.private), KeySigner(others.private)
    follower = DeltaSubscriber(stream, require_signature=[keys.public, others.public])
    late = DeltaSubscriber(stream, require_signature=keys.public)
    engine = Net()
    for step, signer in enumerate(([old], [old, new], [new]), 1):
        with DeltaPublisher(stream, model, signer=signer, anchor_every=None) as publisher:
            train(model, step)
            assert not publisher.publish(step, model).anchor_bytes
        assert follower.sync(engine).step == step
        assert bits(engine) == bits(model)
        if step < 3:
            assert late.newest().step == step
    with pytest.raises(SignatureError, match="is signed by"):
        late.newest()
    head = json.loads((stream / HEAD_NAME).read_bytes())
    assert len(head["keys"]) == len(head["signatures"]) == 1


def test_a_signature_cannot_be_taken_off(keys: KeyPair, others: KeyPair, tmp_path: Path) -> None:
    """The keys that sign are signed, too."""
    published(tmp_path / "stream", keys, others)
    path = tmp_path / "stream" / HEAD_NAME
    for remaining in (0, 1):
        head = json.loads(path.read_bytes())
        one = {"keys": [head["keys"][remaining]], "signatures": [head["signatures"][remaining]]}
        changed = json.dumps(head | one, separators=(",", ":"), sort_keys=True).encode() + b"\n"
        for key in (keys, others):
            with pytest.raises(SignatureError):
                HeadTrust.of(key.public, None, 0).check(read_head(changed, "head"), "head")


def test_what_nobody_vouches_for_is_not_continued(
    keys: KeyPair, others: KeyPair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A publisher that signs begins anew after unsigned states, and those of other keys."""
    for place, before in (("unsigned", ()), ("signed", (others,))):
        stream = tmp_path / place
        model = published(stream, *before)
        with DeltaPublisher(stream, model, signer=KeySigner(keys.private)) as publisher:
            assert "begins anew" in caplog.text
            train(model, 3)
            publisher.publish(3, model)
        newest = json.loads((stream / HEAD_NAME).read_bytes())["newest"]["number"]
        assert newest == 4
        first = json.loads((stream / f"{newest - 1:010d}.json").read_bytes())
        assert (first["previous"], first["last_anchor"], bool(first["anchor"])) == (None, None, True)
        engine = Net(3)
        DeltaSubscriber(stream, require_signature=keys.public).sync(engine)
        assert bits(engine) == bits(model)
        caplog.clear()


def test_a_signed_stream_is_not_continued_unsigned(keys: KeyPair, tmp_path: Path) -> None:
    model = published(tmp_path / "stream", keys)
    with pytest.raises(OutputError, match="is signed"):
        DeltaPublisher(tmp_path / "stream", model)
    with pytest.raises(OutputError, match="another name"):
        DeltaPublisher(tmp_path / "stream", model, signer=KeySigner(keys.private), stream_name="other")


def test_names_and_keys_that_cannot_be(keys: KeyPair, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stream_name"):
        DeltaPublisher(tmp_path / "s", Net(), signer=KeySigner(keys.private), stream_name="a b")
    with pytest.raises(ValueError, match="stream_name"):
        DeltaSubscriber(tmp_path / "s", require_signature=keys.public, stream_name="a" * 201)
    with pytest.raises(ValueError, match="without require_signature"):
        DeltaSubscriber(tmp_path / "s", stream_name="run")  # a name that nobody signed proves nothing
    with pytest.raises(SigningError, match="needs a signer"):
        DeltaPublisher(tmp_path / "s", Net(), stream_name="run")
    with pytest.raises(SigningError, match="0 keys"):
        DeltaPublisher(tmp_path / "s", Net(), signer=[])
    with pytest.raises(SigningError, match="Cannot read"):
        DeltaPublisher(tmp_path / "s", Net(), signer=KeySigner(tmp_path / "none"))
    with pytest.raises(SigningError, match="Cannot read"):
        DeltaSubscriber(tmp_path / "s", require_signature=tmp_path / "none")
    many = [
        KeySigner(write_pair(tmp_path, f"{k}", ed25519.Ed25519PrivateKey.generate()).private)
        for k in range(9)
    ]
    with pytest.raises(SigningError, match="9 keys"):
        DeltaPublisher(tmp_path / "s", Net(), signer=many)
    with DeltaPublisher(tmp_path / "s", Net(), signer=many[:8], stream_name="n" * 200):
        assert (tmp_path / "s" / HEAD_NAME).stat().st_size <= 4096


CHANGES: dict[str, dict[str, Any]] = {
    "no keys": {"keys": [], "signatures": []},
    "more keys": {"keys": ["0" * 64, "1" * 64]},
    "keys twice": {"keys": ["0" * 64] * 2, "signatures": ["00" * 64] * 2},
    "nine keys": {"keys": [f"{k:064x}" for k in range(9)], "signatures": ["00" * 64] * 9},
    "a short key": {"keys": ["00"]},
    "a name that is none": {"stream": "a b"},
    "a long name": {"stream": "a" * 201},
    "no text": {"stream": 1},
    "an odd signature": {"signatures": ["0" * 17]},
    "no signature": {"signatures": ["zz" * 64]},
    "another one": {"signatures": ["00" * 64]},
    "an unsigned version": {"format_version": 1},
}


@pytest.mark.parametrize("name", CHANGES)
def test_hostile_heads_are_refused(name: str, keys: KeyPair, tmp_path: Path) -> None:
    published(tmp_path / "stream", keys, steps=0)
    path = tmp_path / "stream" / HEAD_NAME
    head = json.loads(path.read_bytes()) | CHANGES[name]
    path.write_bytes(json.dumps(head, separators=(",", ":"), sort_keys=True).encode() + b"\n")
    with pytest.raises(DeltaError):
        DeltaSubscriber(tmp_path / "stream", require_signature=keys.public).newest()


def test_a_signature_of_other_bytes_or_for_another_purpose_is_none(keys: KeyPair, tmp_path: Path) -> None:
    """Made by the right key, of the head itself, but not as a head's."""
    from deltaweights.signing.keys import load_private, sign_bytes

    published(tmp_path / "stream", keys, steps=0)
    path = tmp_path / "stream" / HEAD_NAME
    head = json.loads(path.read_bytes())
    body = {name: value for name, value in head.items() if name != "signatures"}
    text = json.dumps(body, separators=(",", ":"), sort_keys=True).encode() + b"\n"
    key = load_private(keys.private)
    for kind, is_right in ((HEAD_TYPE, True), ("application/vnd.in-toto+json", False)):
        head["signatures"] = [sign_bytes(key, kind, text).hex()]
        path.write_bytes(json.dumps(head, separators=(",", ":"), sort_keys=True).encode() + b"\n")
        subscriber = DeltaSubscriber(tmp_path / "stream", require_signature=keys.public)
        if is_right:
            assert subscriber.newest().step == 0
        else:
            with pytest.raises(SignatureError, match="is not of that head"):
                subscriber.newest()


def test_a_frozen_signed_stream_is_read(tmp_path: Path) -> None:
    """By the document alone, and by us. Whoever knows no keys reads it, too."""
    data = (FIXTURE / "stream" / HEAD_NAME).read_bytes()
    head = json.loads(data)
    assert head["format_version"] == 3
    signed = {name: value for name, value in head.items() if name != "signatures"}
    body = json.dumps(signed, separators=(",", ":"), sort_keys=True).encode() + b"\n"
    kind = b"application/vnd.deltaweights.stream-head.v1+json"
    message = b" ".join((b"DSSEv1", b"%d" % len(kind), kind, b"%d" % len(body), body))
    key: Any = load_pem_public_key((FIXTURE / "key.pub.pem").read_bytes())
    key.verify(bytes.fromhex(head["signatures"][0]), message)  # Ed25519
    subscriber = DeltaSubscriber(
        FIXTURE / "stream", require_signature=FIXTURE / "key.pub.pem", stream_name="fixture"
    )
    assert subscriber.sync(subscriber.empty_state()).step == 1
    subscriber = DeltaSubscriber(FIXTURE / "stream")
    assert subscriber.sync(subscriber.empty_state()).step == 1
    assert issubclass(FormatVersionError, DeltaError)

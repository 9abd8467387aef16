"""What engines and bridges take only where it is signed."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from deltaweights import DeltaError, KeySigner, SignatureError, SigningError, make_delta, sign_delta
from deltaweights.cli.commands import app
from deltaweights.engines import serve_folder, sglang
from deltaweights.engines.pointer import open_pointed
from deltaweights.engines.required_keys import KEYS_VARIABLE
from deltaweights.torch import DeltaSubscriber, from_pretrained, load_into, load_state_dict, write_files

if not importlib.util.find_spec("model_signing"):
    pytest.skip("needs the extra sign", allow_module_level=True)

from ..checkpoints import bf16, weights, write_safetensors
from ..signing.keys import KeyPair, write_pair
from .test_disk_import import BASE, FIXTURES, base_state, bits


@pytest.fixture
def keys(tmp_path: Path) -> KeyPair:
    return write_pair(tmp_path, "signer")


@pytest.fixture
def others(tmp_path: Path) -> KeyPair:
    return write_pair(tmp_path, "other")


def run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_bridges_sign_what_they_write_and_check_what_they_read(
    keys: KeyPair, others: KeyPair, tmp_path: Path
) -> None:
    """Updates on disk to a signed stream, which goes on signed, and back."""
    updates, stream = tmp_path / "updates", tmp_path / "stream"
    shutil.copytree(FIXTURES / "xor-adler32", updates)
    last = max(updates.glob("weight_v*"))
    shutil.move(last, tmp_path / "later")
    importing = ("stream", "import", updates, stream, "--base", BASE, "--stream-name", "run")
    assert run(*importing, "--private-key", keys.private).exit_code == 0
    shutil.move(tmp_path / "later", last)
    done = run(*importing, "--private-key", others.private)
    assert (done.exit_code, "not signed as it must be" in done.output) == (1, True), done.output
    assert run(*importing[:-2]).exit_code == 1  # it would end the signatures
    assert run(*importing, "--private-key", keys.private, "--private-key", others.private).exit_code == 0
    state = base_state()
    step = DeltaSubscriber(stream, require_signature=others.public, stream_name="run").sync(state).step
    assert step == int(last.name.removeprefix("weight_v"))
    exporting = ("stream", "export", stream, "--base", BASE)
    done = run(*exporting, "-o", tmp_path / "out", "--public-key", keys.public, "--stream-name", "run")
    assert done.exit_code == 0, done.output
    for wrong in (("--public-key", BASE), ("--public-key", keys.public, "--stream-name", "other")):
        assert run(*exporting, "-o", tmp_path / "none", *wrong).exit_code == 1
    assert not (tmp_path / "none").exists()
    assert bits(state)


@pytest.fixture
def served(keys: KeyPair, tmp_path: Path) -> Path:
    """A pointer folder of a signed delta."""
    write_safetensors(tmp_path / "base" / "model.safetensors", {"w": bf16(weights((2, 3), 1))})
    write_safetensors(tmp_path / "tuned" / "model.safetensors", {"w": bf16(weights((2, 3), 2))})
    make_delta(tmp_path / "base", tmp_path / "tuned", tmp_path / "delta")
    sign_delta(tmp_path / "delta", KeySigner(keys.private))
    key = keys.public
    serve_folder(tmp_path / "delta", tmp_path / "served", base=tmp_path / "base", require_signature=key)
    return tmp_path / "served"


def test_pointer_folders(
    served: Path, keys: KeyPair, others: KeyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SignatureError):
        serve_folder(
            tmp_path / "delta", tmp_path / "no", base=tmp_path / "base", require_signature=others.public
        )
    assert not (tmp_path / "no").exists()
    open_pointed(served, require_signature=keys.public).close()
    with pytest.raises(SignatureError):
        open_pointed(served, require_signature=others.public)
    monkeypatch.setenv(KEYS_VARIABLE, str(others.public))
    with pytest.raises(SignatureError):
        next(sglang._decoded(str(served)))
    for empty in ("", ":"):  # such as of another variable that is not set
        monkeypatch.setenv(KEYS_VARIABLE, empty)
        with pytest.raises(SigningError, match="names no key"):
            next(sglang._decoded(str(served)))
    monkeypatch.setenv(KEYS_VARIABLE, f"{others.public}:{keys.public}")
    assert [name for name, _ in sglang._decoded(str(served))] == ["w"]
    shard = next((tmp_path / "delta").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    with pytest.raises(DeltaError, match="not the file that was signed"):
        next(sglang._decoded(str(served)))


def test_loaders_of_torch(served: Path, keys: KeyPair, others: KeyPair, tmp_path: Path) -> None:
    """Nothing is loaded, and nothing written, of what others signed; and what is loaded has its SHA-256."""
    from torch import nn, zeros

    delta, base = tmp_path / "delta", tmp_path / "base"
    assert list(load_state_dict(delta, base, require_signature=keys.public)) == ["w"]
    model = nn.Module()
    model.register_buffer("w", zeros(2, 3))
    with pytest.raises(SignatureError):
        load_into(model, delta, base, require_signature=others.public)
    assert not model.w.any()  # type: ignore[operator]
    with pytest.raises(SignatureError):
        load_state_dict(delta, base, require_signature=others.public)
    with pytest.raises(SignatureError):
        write_files(delta, tmp_path / "files", base, require_signature=others.public)
    assert not (tmp_path / "files").exists()
    if importlib.util.find_spec("transformers"):
        with pytest.raises(SignatureError):
            from_pretrained(delta, base, require_signature=others.public)
    load_into(model, delta, base, require_signature=keys.public)
    assert model.w.any()  # type: ignore[operator]

"""Weight streams made of updates on disk: frozen ones of independent code, damaged ones, odd ones."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from deltaweights import CheckpointError, DeltaError, DeltaWeightsError
from deltaweights.checkpoint import open_checkpoint
from deltaweights.engines import ImportReport, import_stream
from deltaweights.engines.disk_updates.folder import VersionFolder
from deltaweights.engines.disk_updates.model_folder import load_tensors
from deltaweights.torch import DeltaSubscriber
from deltaweights.torch.tensors import byte_view
from deltaweights.workers import Workers

from . import independent_disk_updates as independent
from .independent_disk_updates import Stored

FIXTURES = Path(__file__).parents[1] / "fixtures" / "disk-updates"
BASE = FIXTURES / "base"

SETS = [f"{encoding}-{kind}" for encoding in independent.ENCODINGS for kind in independent.CHECKSUMS]


def base_state(base: Path = BASE) -> dict[str, Tensor]:
    with open_checkpoint(base) as model, Workers(1) as workers:
        return load_tensors(model, workers)


def bits(state: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: byte_view(tensor).numpy().tobytes() for name, tensor in state.items()}


def take(directory: Path, stream: Path, base: Path = BASE) -> ImportReport:
    return import_stream(directory, stream, base, threads=1)


def followed(stream: Path, base: Path = BASE) -> tuple[int, dict[str, bytes]]:
    """The stream's newest step and bytes."""
    state = base_state(base)
    return DeltaSubscriber(stream, threads=1).sync(state).step, bits(state)


def _bits(state: dict[str, Stored]) -> dict[str, bytes]:
    return {name: tensor.data for name, tensor in state.items()}


@pytest.mark.parametrize("name", SETS)
def test_frozen_versions_give_the_states_that_they_always_gave(name: str, tmp_path: Path) -> None:
    """Version by version, as they come; the fourth is a full checkpoint."""
    if name.endswith("blake3"):
        pytest.importorskip("blake3")
    digests = json.loads((FIXTURES / "states.json").read_text())
    follower, subscriber = base_state(), DeltaSubscriber(tmp_path / "stream", threads=1)
    for version in range(1, 6):
        folder = independent.folder_of(tmp_path / "updates", version)
        shutil.copytree(independent.folder_of(FIXTURES / name, version), folder)
        report = take(tmp_path / "updates", tmp_path / "stream")
        assert (report.versions, report.version) == ((version,), version)
        assert subscriber.sync(follower).step == version
        found = {name: hashlib.sha256(data).hexdigest() for name, data in bits(follower).items()}
        assert found == digests[version]
    assert take(tmp_path / "updates", tmp_path / "stream").versions == ()
    late = {name: tensor.zero_() for name, tensor in base_state().items()}
    assert DeltaSubscriber(tmp_path / "stream", threads=1).sync(late).from_anchor
    assert bits(late) == bits(follower)
    records = [json.loads(path.read_text()) for path in sorted((tmp_path / "stream").glob("0*.json"))]
    assert [record["step"] for record in records if record["anchor"]] == [0, 4]


@pytest.mark.parametrize("name", ["xor-xxh3-128", "overwrite-adler32"])
def test_a_flipped_byte_anywhere_is_refused_or_changes_nothing(name: str, tmp_path: Path) -> None:
    """A version without padding: what a flip leaves intact is the state itself."""
    state = base_state()
    with VersionFolder(FIXTURES / name, 1) as whole:
        for key in whole.tensors:
            whole.apply_to(key, byte_view(state[key]).numpy())
        expected, names = bits(state), set(whole.tensors)
    source = independent.folder_of(FIXTURES / name, 1)
    folder = independent.folder_of(tmp_path, 1)
    shutil.copytree(source, folder)
    refused = unchanged = 0
    for path in sorted(source.iterdir()):
        data = path.read_bytes()
        for place in range(len(data)):
            (folder / path.name).write_bytes(data[:place] + bytes([data[place] ^ 0x04]) + data[place + 1 :])
            try:
                found = _applied(tmp_path)
            except DeltaWeightsError:
                refused += 1
            else:
                assert found == expected, (path.name, place)
                unchanged += 1
        (folder / path.name).write_bytes(data)
    assert names
    assert refused > 20 * unchanged
    assert _applied(tmp_path) == expected


def _applied(directory: Path) -> dict[str, bytes]:
    """The state after version 1, if it is an update from version 0."""
    state = {name: bytearray(tensor.data) for name, tensor in independent.first_state().items()}
    with VersionFolder(directory, 1) as folder:
        if folder.update is None or folder.tensors.keys() - state.keys():
            raise DeltaError("refused")
        for name in folder.tensors:
            folder.apply_to(name, np.frombuffer(state[name], np.uint8))
    return {name: bytes(data) for name, data in state.items()}


def test_a_damaged_version_stops_the_import_at_the_one_before(tmp_path: Path) -> None:
    """Nothing of it is published; once it is mended, the import goes on."""
    shutil.copytree(FIXTURES / "xor-adler32", tmp_path / "updates")
    shard = independent.folder_of(tmp_path / "updates", 2) / "model-00001-of-00002.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    with pytest.raises(DeltaError, match=r"Tensor 'mask' in .*weight_v000002 is damaged"):
        take(tmp_path / "updates", tmp_path / "stream")
    states = independent.next_states()
    assert followed(tmp_path / "stream") == (1, _bits(states[1]))
    shard.write_bytes(data)
    assert take(tmp_path / "updates", tmp_path / "stream").versions == (2, 3, 4, 5)
    assert followed(tmp_path / "stream") == (5, _bits(states[5]))


def test_a_damaged_index_stops_the_import_at_the_version_before_too(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "xor-adler32", tmp_path / "updates")
    index = independent.folder_of(tmp_path / "updates", 3) / "model.safetensors.index.json"
    index.write_text("{")
    with pytest.raises(DeltaError, match="weight_v000003 is damaged"):
        take(tmp_path / "updates", tmp_path / "stream")
    assert followed(tmp_path / "stream") == (2, _bits(independent.next_states()[2]))


def test_an_unfinished_version_is_left_for_later(tmp_path: Path) -> None:
    """Its index is not there yet, but for a temporary name."""
    shutil.copytree(FIXTURES / "xor-adler32", tmp_path / "updates")
    index = independent.folder_of(tmp_path / "updates", 5) / "model.safetensors.index.json"
    index.rename(index.with_suffix(".json.tmp"))
    assert take(tmp_path / "updates", tmp_path / "stream").versions == (1, 2, 3, 4)
    index.with_suffix(".json.tmp").rename(index)
    assert take(tmp_path / "updates", tmp_path / "stream").versions == (5,)


def test_a_missing_version_is_an_error_unless_a_full_checkpoint_comes(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "xor-adler32", tmp_path / "updates")
    shutil.rmtree(independent.folder_of(tmp_path / "updates", 1))
    assert take(tmp_path / "updates", tmp_path / "stream").versions == (4, 5)
    assert followed(tmp_path / "stream") == (5, _bits(independent.next_states()[5]))
    shutil.rmtree(independent.folder_of(tmp_path / "updates", 4))
    with pytest.raises(
        DeltaError, match=r"weight_v000002 cannot follow version 0\n.*version 1, which is not"
    ):
        take(tmp_path / "updates", tmp_path / "other")


def test_a_wrong_base_is_refused_by_the_checksums(tmp_path: Path) -> None:
    other = tmp_path / "other"
    independent.write_safetensors(other / "model.safetensors", independent.first_state(7), {})
    for name in ("xor-xxh3-128", "overwrite-xxh3-128"):
        with pytest.raises(DeltaError, match="made against other weights than version 0 has here"):
            take(FIXTURES / name, tmp_path / name, other)
        assert followed(tmp_path / name, other)[0] == 0
    less = {name: tensor for name, tensor in independent.first_state().items() if name != "steps"}
    independent.write_safetensors(tmp_path / "less" / "model.safetensors", less, {})
    with pytest.raises(CheckpointError, match=r"'steps' in .* does not fit the base\n.*lacks it"):
        take(FIXTURES / "xor-adler32", tmp_path / "stream", tmp_path / "less")
    with pytest.raises(CheckpointError, match="There is no folder"):
        take(tmp_path / "nowhere", tmp_path / "stream")


def test_a_full_checkpoint_of_one_file_needs_no_index(tmp_path: Path) -> None:
    state = independent.first_state(3)
    folder = independent.folder_of(tmp_path / "updates", 3)
    independent.write_safetensors(folder / "model.safetensors", state, {"format": "pt"})
    assert take(tmp_path / "updates", tmp_path / "stream").versions == (3,)
    assert followed(tmp_path / "stream") == (3, _bits(state))


def test_a_full_checkpoint_of_other_tensors_is_refused(tmp_path: Path) -> None:
    state = independent.first_state(3)
    less = {name: tensor for name, tensor in state.items() if name != "steps"}
    longer = {**state, "steps": Stored("I64", [3], bytes(24))}
    for other, why in ((less, "This version lacks it"), (longer, r"It is I64 of shape \[3\] here")):
        shutil.rmtree(tmp_path / "updates", ignore_errors=True)
        independent.write_checkpoint(tmp_path / "updates", 1, other)
        with pytest.raises(CheckpointError, match=why):
            take(tmp_path / "updates", tmp_path / "stream")


def test_a_model_in_several_files_is_read_by_its_index(tmp_path: Path) -> None:
    """Weights that no engine would load may lie beside them."""
    state = independent.first_state()
    folder = independent.write_checkpoint(tmp_path / "models", 0, state)
    independent.write_safetensors(folder / "consolidated.safetensors", {"other": state["steps"]}, {})
    assert take(FIXTURES / "xor-adler32", tmp_path / "stream", folder).version == 5
    assert followed(tmp_path / "stream") == (5, _bits(independent.next_states()[5]))


_CHANGES = {
    "a file outside its folder": ("model-00000-of-00002.safetensors", "../model-00000-of-00002.safetensors"),
    "an absolute file": ("model-00000-of-00002.safetensors", "/model-00000-of-00002.safetensors"),
    "a file of another kind": ("model-00000-of-00002.safetensors", "model.bin"),
    "shards from 1": ("model-00000-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    "shards of several counts": ("model-00000-of-00002.safetensors", "model-00000-of-00003.safetensors"),
    "a shard in more digits than its name has": (
        "model-00000-of-00002.safetensors",
        "model-000000-of-00002.safetensors",
    ),
    "a tensor in another file": ('"steps": "model-00000', '"steps": "model-00001'),
    "a tensor that no file has": ('"steps": "model', '"stops": "model'),
    "another version": ('"version": "000001"', '"version": "000002"'),
    "a base that comes later": ('"base_version": "000000"', '"base_version": "000001"'),
    "no base": ('"base_version": "000000", ', ""),
    "another encoding": ('"xor"', '"xor2"'),
    "another compression": ('"zstd"', '"lz4"'),
    "no compression": ('"compression_format": "zstd", ', ""),
    "another checksum": ('"adler32"', '"crc32"'),
    "a checksum of another length": ('"adler32"', '"xxh3-128"'),
    "no map": ('"weight_map"', '"weights"'),
    "a version that is no number": ('"version": "000001"', '"version": 1'),
    "not JSON": ("{", "["),
    "nested without end": ("{", "[" * 100_000),
}


@pytest.mark.parametrize("what", _CHANGES)
def test_an_index_that_the_format_does_not_allow_is_refused(what: str, tmp_path: Path) -> None:
    before, after = _CHANGES[what]
    folder = independent.folder_of(tmp_path, 1)
    shutil.copytree(independent.folder_of(FIXTURES / "xor-adler32", 1), folder)
    index = folder / "model.safetensors.index.json"
    text = index.read_text()
    assert before in text
    index.write_text(text.replace(before, after, 1))
    with pytest.raises(DeltaError, match="damaged"):
        VersionFolder(tmp_path, 1)


def test_unknown_keys_are_passed_over(tmp_path: Path) -> None:
    """As the format's own readers do: writers may note there what they like."""
    folder = independent.folder_of(tmp_path, 1)
    shutil.copytree(independent.folder_of(FIXTURES / "xor-adler32", 1), folder)
    index = folder / "model.safetensors.index.json"
    fields = json.loads(index.read_text())
    fields["metadata"]["run"] = {"name": "seven"}
    index.write_text(json.dumps({**fields, "more": [1]}))
    shard = folder / "model-00000-of-00002.safetensors"
    tensors, digests = independent.read_safetensors(shard)
    independent.write_safetensors(shard, tensors, {**digests, "__version__": "000001"})
    assert _applied(tmp_path) == _bits(independent.next_states()[1])


def test_files_that_the_index_does_not_name_are_refused(tmp_path: Path) -> None:
    """The format's readers would apply them."""
    folder = independent.folder_of(tmp_path, 1)
    shutil.copytree(independent.folder_of(FIXTURES / "xor-adler32", 1), folder)
    shutil.copy(folder / "model-00000-of-00002.safetensors", folder / "more.safetensors")
    with pytest.raises(DeltaError, match=r"file 'more\.safetensors', which its index does not name"):
        VersionFolder(tmp_path, 1)


@pytest.mark.parametrize("digests", [{}, {"more": "0" * 8}, {"steps": "0" * 7}, {"steps": "Z" * 8}])
def test_each_tensor_has_its_checksum(digests: dict[str, str], tmp_path: Path) -> None:
    old = independent.first_state()
    new = {**old, "steps": old["steps"]._replace(data=bytes(16))}
    folder = independent.write_update(tmp_path, 1, old, new, "xor", "adler32")
    shard = folder / "model-00000-of-00001.safetensors"
    independent.write_safetensors(shard, independent.read_safetensors(shard)[0], digests)
    with pytest.raises(DeltaError, match=r"Its checksum of 'steps' is .*, which is no adler32"):
        VersionFolder(tmp_path, 1)


@pytest.mark.parametrize(
    "frame",
    [
        Stored("I8", [9], bytes(9)),
        Stored("U8", [3, 3], bytes(9)),
        Stored("U8", [9000], bytes(9000)),
    ],
)
def test_a_frame_is_a_row_of_bytes_that_the_tensor_can_need(frame: Stored, tmp_path: Path) -> None:
    old = independent.first_state()
    folder = independent.write_update(
        tmp_path, 1, old, {**old, "steps": old["steps"]._replace(data=bytes(16))}
    )
    shard = folder / "model-00000-of-00001.safetensors"
    independent.write_safetensors(shard, {"steps": frame}, {"steps": "0" * 32})
    with pytest.raises(DeltaError, match=r"row of bytes|can need"):
        _applied(tmp_path)


def test_an_index_without_end_is_not_read(tmp_path: Path) -> None:
    folder = independent.folder_of(tmp_path, 1)
    folder.mkdir()
    with open(folder / "model.safetensors.index.json", "wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(DeltaError, match="It has 1073741824 bytes"):
        VersionFolder(tmp_path, 1)

"""A flipped bit, a cut file, a wrong base: the error names who is to blame, and no wrong file gets a name."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deltaweights import (
    BaseMismatchError,
    CheckpointError,
    DeltaError,
    DeltaWeightsError,
    Manifest,
    ManifestError,
    Problem,
    apply_delta,
    make_delta,
    open_target,
    verify_delta,
)
from deltaweights.checkpoint import open_checkpoint

from .checkpoints import (
    Array,
    bf16,
    contents,
    digests,
    f32,
    payload_places,
    random_array,
    weights,
    write_safetensors,
)
from .conftest import Trio

_MANIFEST, _CARD = "deltaweights.json", "README.md"


@pytest.fixture
def own(trio: Trio, tmp_path: Path) -> Trio:
    """A copy of the trio, to be damaged."""
    for folder in trio:
        shutil.copytree(folder, tmp_path / folder.name)
    return Trio(*(tmp_path / folder.name for folder in trio))


# The delta


@pytest.mark.slow
def test_apply_with_any_flipped_bit_in_the_delta_fails_or_is_exact(own: Trio, tmp_path: Path) -> None:
    right, out = contents(own.target), tmp_path / "out"
    failed = 0
    for path, position, bit in _places(own.delta, 250):
        with _flipped(path, position, bit):
            error = _apply(own, out)
            place = path, position, bit
            if error:
                failed += 1
                assert isinstance(error, DeltaError), place
                assert error.what, place
                assert error.why, place
                assert contents(out).items() <= right.items(), place
            else:
                assert path.name != _MANIFEST
                assert contents(out) == right, place
            assert {left.name for left in out.glob(".deltaweights/*")} <= {"licenses"}
            shutil.rmtree(out, ignore_errors=True)
    assert failed > 150


def test_verify_reports_any_flipped_bit_in_the_delta(own: Trio) -> None:
    for path, position, bit in _places(own.delta, 250):
        with _flipped(path, position, bit):
            relative = path.relative_to(own.delta).as_posix()
            if relative == _MANIFEST:
                with pytest.raises(ManifestError, match="damaged"):
                    verify_delta(own.delta)
            elif relative != _CARD:  # which anybody may edit on the Hub
                problems = verify_delta(own.delta).problems
                assert [(p.place, p.path, p.kind) for p in problems] == [("delta", relative, "different")]
    assert verify_delta(own.delta).ok


def test_a_flipped_bit_in_the_payloads_is_blamed_on_the_delta(own: Trio, tmp_path: Path) -> None:
    """Chunk records hold checksums of the base, and a wrong one must not accuse the base."""
    choice = random.Random(1)
    for path, name, start, end in payload_places(own.delta):
        if start == end:
            continue
        first = choice.randrange(start, min(start + 24, end))  # in the first chunk's record
        anywhere = choice.randrange(start, end)
        for place in (first, anywhere):
            with _flipped(path, place, choice.randrange(8)):
                error = _apply(own, tmp_path / "out")
                if error:
                    assert isinstance(error, DeltaError), (name, place)
                    assert path.name in str(error), (name, place)
            shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_a_delta_cut_anywhere_is_refused_before_anything_is_written(own: Trio, tmp_path: Path) -> None:
    for path, length in _cuts(own.delta):
        whole = path.read_bytes()
        path.write_bytes(whole[:length])
        with pytest.raises(DeltaError) as refused:
            apply_delta(own.delta, tmp_path / "out", base=own.base)
        assert refused.value.why, (path, length)
        with pytest.raises(DeltaError):
            open_target(own.delta, own.base)
        assert not (tmp_path / "out").exists()
        path.write_bytes(whole)
    apply_delta(own.delta, tmp_path / "out", base=own.base)


def test_a_delta_without_one_of_its_files_is_refused(own: Trio, tmp_path: Path) -> None:
    for relative, content in contents(own.delta).items():
        if relative != _CARD:
            (own.delta / relative).unlink()
            with pytest.raises(DeltaError):
                apply_delta(own.delta, tmp_path / "out", base=own.base)
            assert not (tmp_path / "out").exists()
            (own.delta / relative).write_bytes(content)


# The base


def test_a_flipped_bit_in_any_tensor_of_the_base_is_refused_by_name(own: Trio, tmp_path: Path) -> None:
    choice = random.Random(2)
    manifest = Manifest.from_json((own.delta / _MANIFEST).read_bytes())
    used = {entry.base.name for entry in manifest.tensors if entry.base}
    seen = set()
    for path, name, start, end in _tensors(own.base):
        if name in used and end > start:
            seen.add(name)
            for position in (start, choice.randrange(start, end), end - 1):
                with _flipped(path, position, choice.randrange(8)):
                    with pytest.raises(BaseMismatchError) as refused:
                        apply_delta(own.delta, tmp_path / "out", base=own.base)
                    assert name in refused.value.why
                    assert refused.value.fix
                    assert not (tmp_path / "out").exists()
                    with pytest.raises(BaseMismatchError):
                        verify_delta(own.delta, base=own.base)
    assert len(seen) > 5


def test_a_flipped_bit_that_the_sample_misses_is_found_in_its_chunk(tmp_path: Path) -> None:
    trio = _large_tensor(tmp_path)
    ((path, name, start, end),) = _tensors(trio.base)
    choice = random.Random(3)
    out, missed = tmp_path / "out", 0
    for _ in range(12):
        with _flipped(path, choice.randrange(start, end), choice.randrange(8)):
            with pytest.raises(BaseMismatchError, match=name) as refused:
                apply_delta(trio.delta, out, base=trio.base)
            missed += "sampled" not in refused.value.why
            assert not list(tmp_path.glob("out/**/*.safetensors"))
            assert not (out / ".deltaweights").exists()
    assert missed >= 3
    apply_delta(trio.delta, out, base=trio.base)
    assert digests(out) == digests(trio.target)


def test_finished_shards_stay_when_the_base_turns_out_wrong(tmp_path: Path) -> None:
    trio = _large_tensor(tmp_path, shards=3)
    path, name, _, end = next(
        place for place in _tensors(trio.base) if place[0].name == "model-2.safetensors"
    )
    position = next(p for p in range(end - 1, 0, -4096) if _is_missed_by_the_sample(trio, tmp_path, path, p))
    with _flipped(path, position, 0), pytest.raises(BaseMismatchError, match=name):
        apply_delta(trio.delta, tmp_path / "out", base=trio.base, threads=1)
    finished = digests(tmp_path / "out")
    assert set(finished) == {"model-0.safetensors", "model-1.safetensors"}
    report = apply_delta(trio.delta, tmp_path / "out", base=trio.base)
    assert set(report.kept) == set(finished)
    assert digests(tmp_path / "out") == digests(trio.target)


def test_a_flipped_bit_in_a_header_of_the_base_is_refused_or_changes_nothing(
    own: Trio, tmp_path: Path
) -> None:
    """Only ``__metadata__`` and the like, which the delta does not need, may change unnoticed."""
    choice = random.Random(4)
    for path in sorted(own.base.glob("*.safetensors")):
        length = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        for position in [*range(8), *(choice.randrange(length) for _ in range(60))]:
            with _flipped(path, position, choice.randrange(8)):
                error = _apply(own, tmp_path / "out")
            if error:
                assert isinstance(error, BaseMismatchError | CheckpointError)
                assert error.why
                assert not (tmp_path / "out").exists()
            else:
                assert contents(tmp_path / "out") == contents(own.target)
                shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        ({"layer.1": bf16(weights((64, 32), 1) * 1.001)}, "layer.1"),
        ({"layer.1": None}, "has no tensor 'layer.1'"),
        ({"layer.1": None, "layer.2": None}, r"has no tensor 'layer.[12]' \(1 more"),
        ({"layer.1": bf16(weights((32, 64), 1))}, r"'layer.1' is BF16 \[32, 64\], not BF16 \[64, 32\]"),
        ({"layer.1": bf16(weights((65, 32), 1))}, r"\[65, 32\], not"),
        ({"layer.1": f32(weights((64, 32), 1))}, "is F32"),
        ({"layer.1": random_array("F16", (64, 32))}, "is F16"),
        ({f"layer.{k}": bf16(weights((64, 32), k + 50)) for k in range(4)}, "Of 4 tensors sampled, 4 differ"),
        ({"layer.0": None, "model.layer.0": bf16(weights((64, 32), 0))}, "has no tensor 'layer.0'"),
    ],
)
def test_a_wrong_base_is_refused_before_anything_is_written(
    tmp_path: Path, edit: dict[str, Array | None], why: str
) -> None:
    right = {f"layer.{k}": bf16(weights((64, 32), k)) for k in range(4)}
    new = {name: bf16(weights((64, 32), k) * 1.01) for k, name in enumerate(right)}
    trio = Trio(tmp_path / "base", tmp_path / "target", tmp_path / "delta")
    write_safetensors(trio.base / "model.safetensors", right)
    write_safetensors(trio.target / "model.safetensors", new)
    make_delta(trio.base, trio.target, trio.delta)
    wrong = {name: array for name, array in (right | edit).items() if array}
    write_safetensors(tmp_path / "wrong" / "model.safetensors", wrong)

    with pytest.raises(BaseMismatchError, match=why) as refused:
        apply_delta(trio.delta, tmp_path / "out", base=tmp_path / "wrong")
    assert refused.value.what
    assert refused.value.fix
    assert not (tmp_path / "out").exists()
    with pytest.raises(BaseMismatchError, match=why):
        verify_delta(trio.delta, base=tmp_path / "wrong")


def test_a_file_that_the_target_takes_from_the_base_must_be_the_same(own: Trio, tmp_path: Path) -> None:
    for content in (b'{"model_type": "qwen3"}', b"", None):
        (own.base / "config.json").unlink(missing_ok=True)
        if content is not None:
            (own.base / "config.json").write_bytes(content)
        with pytest.raises(BaseMismatchError, match=r"config\.json"):
            apply_delta(own.delta, tmp_path / "out", base=own.base)
        assert not (tmp_path / "out").exists()


def test_tensors_and_files_that_only_the_base_has_do_not_matter(own: Trio, tmp_path: Path) -> None:
    (own.base / "LICENSE").unlink()
    (own.base / "more.txt").write_text("more")
    write_safetensors(own.base / "more.safetensors", {"other": bf16(weights((3,), 5))})
    apply_delta(own.delta, tmp_path / "out", base=own.base)
    assert contents(tmp_path / "out") == contents(own.target)


# Verify reports everything


def test_verify_reports_all_that_is_missing_extra_and_different(own: Trio) -> None:
    for folder in (own.delta, own.target):
        shards = sorted(folder.glob("*.safetensors"))
        shards[0].unlink()
        shards[1].write_bytes(shards[1].read_bytes()[:-1])
        _flip(shards[2], shards[2].stat().st_size - 1, 0)
        (folder / "extra").mkdir()
        for k in range(2):
            (folder / "extra" / f"{k}.txt").write_text("extra")
    problems = verify_delta(own.delta, target=own.target).problems
    names = {"delta": "delta-0000{}-of-00003.safetensors", "target": "model-0000{}-of-00003.safetensors"}
    for place, name in names.items():
        found = [(p.kind, p.path) for p in problems if p.place == place]
        assert sorted(found) == [
            ("different", name.format(2)),
            ("different", name.format(3)),
            ("extra", "extra/0.txt"),
            ("extra", "extra/1.txt"),
            ("missing", name.format(1)),
        ]
    assert list(problems) == sorted(problems)
    assert all(p.detail for p in problems)


@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "header"])
def test_verify_with_the_base_reports_all_damage_to_the_delta_too(own: Trio, damage: str) -> None:
    """The rebuilding meets the damage again; that must not hide the rest of the report."""
    shards = sorted(own.delta.glob("*.safetensors"))
    for path in (shards[0], own.delta / "files" / "notes.txt"):
        if damage == "delete":
            path.unlink()
        elif damage == "cut":
            path.write_bytes(path.read_bytes()[:-1])
        else:
            _flip(path, 0 if damage == "header" else path.stat().st_size - 1, 1)
    problems = verify_delta(own.delta, base=own.base).problems
    kind = "missing" if damage == "delete" else "different"
    assert {p.path: p.kind for p in problems if p.place == "delta"} == {
        shards[0].name: kind,
        "files/notes.txt": kind,
    }
    rebuilt = {p.path for p in problems if p.place == "rebuilt"}
    assert rebuilt == {"model-00001-of-00003.safetensors", "notes.txt"}


def test_problems_are_plain_values() -> None:
    one = Problem("delta", "a", "missing", "x")
    assert one == Problem("delta", "a", "missing", "x")
    assert one < Problem("delta", "b", "extra", "x")


# Files that change while they are read


@pytest.mark.parametrize("side", ["base", "target"])
def test_a_file_cut_while_diff_reads_it_gives_our_error(own: Trio, tmp_path: Path, side: str) -> None:
    folder = own.base if side == "base" else own.target

    def cut(phase: str, done: int, total: int) -> None:
        for path in folder.glob("*.safetensors"):
            with open(path, "r+b") as file:
                file.truncate(5000)

    with pytest.raises(CheckpointError, match="ends too early"):
        make_delta(own.base, own.target, tmp_path / "new", progress=cut)
    assert not (tmp_path / "new" / _MANIFEST).exists()


def test_a_delta_that_changes_while_apply_reads_it_gives_our_error(own: Trio, tmp_path: Path) -> None:
    def cut(phase: str, done: int, total: int) -> None:
        if phase == "apply":
            for path in own.delta.glob("*.safetensors"):
                with open(path, "r+b") as file:
                    file.truncate(3000)

    with pytest.raises(DeltaWeightsError):
        apply_delta(own.delta, tmp_path / "out", base=own.base, progress=cut)
    assert contents(tmp_path / "out").items() <= contents(own.target).items()


def _apply(trio: Trio, out: Path) -> DeltaWeightsError | None:
    """Run apply. Returns our error if there is one; any other goes through."""
    try:
        apply_delta(trio.delta, out, base=trio.base)
    except DeltaWeightsError as error:
        return error
    return None


def _places(folder: Path, count: int) -> Iterator[tuple[Path, int, int]]:
    """``count`` bits of the folder's files, every file among them: (file, byte, bit)."""
    choice = random.Random(0)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for k in range(count):
        path = files[k % len(files)]
        size = path.stat().st_size
        # Half of them near the start, where headers and tables are.
        yield path, choice.randrange(min(size, 2000) if k % 2 else size), choice.randrange(8)


def _cuts(folder: Path) -> Iterator[tuple[Path, int]]:
    """Lengths to cut every file of a delta to, but for its model card."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != _CARD:
            size = path.stat().st_size
            header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
            lengths = {0, 1, 7, 8, 9, header - 1, header, header + 1, size // 2, size - 8, size - 1}
            yield from ((path, length) for length in sorted(lengths) if 0 <= length < size)


def _flip(path: Path, position: int, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ (1 << bit)]))


@contextmanager
def _flipped(path: Path, position: int, bit: int) -> Iterator[None]:
    """One bit of a file is wrong in the ``with`` block."""
    _flip(path, position, bit)
    yield
    _flip(path, position, bit)


def _tensors(folder: Path) -> list[tuple[Path, str, int, int]]:
    """Every tensor of a checkpoint: its file, name, and where its bytes start and end in the file."""
    with open_checkpoint(folder) as checkpoint:
        return [
            (
                folder / tensor.shard.path,
                tensor.info.name,
                tensor.shard.header.data_start + tensor.info.start,
                tensor.shard.header.data_start + tensor.info.end,
            )
            for tensor in checkpoint.tensors
        ]


def _large_tensor(folder: Path, shards: int = 1) -> Trio:
    """A pair whose tensors, one a shard, have 1000 chunks in all: more than are sampled."""
    trio = Trio(folder / "base", folder / "target", folder / "delta")
    for k in range(shards):
        old = weights((1000 // shards, 2048), k)
        write_safetensors(trio.base / f"model-{k}.safetensors", {f"layer.{k}": bf16(old)})
        moved = bf16(old + weights(old.shape, 100 + k, 2e-4))
        write_safetensors(trio.target / f"model-{k}.safetensors", {f"layer.{k}": moved})
    make_delta(trio.base, trio.target, trio.delta, chunk_bytes=4096)
    return trio


def _is_missed_by_the_sample(trio: Trio, folder: Path, path: Path, position: int) -> bool:
    with _flipped(path, position, 0), pytest.raises(BaseMismatchError) as refused:
        apply_delta(trio.delta, folder / "trial", base=trio.base, threads=1)
    shutil.rmtree(folder / "trial", ignore_errors=True)
    return "sampled" not in refused.value.why

"""Reports of deltas with their base: figures against the weights themselves, and the words that follow."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from deltaweights import BaseMismatchError, DeltaReport, make_delta, report_delta, verify_delta
from deltaweights.codec.low_rank.blas import one_blas_thread
from deltaweights.report import making, reading
from deltaweights.storage import total_traffic

from ..checkpoints import bf16, f32, weights, write_safetensors
from ..conftest import Trio
from ..finetunes import HIDDEN, LAYERS, VOCAB, layer_of, llama, moved, write_finetune


def report_of(folder: Path, update: Any, **options: Any) -> DeltaReport:
    base, target = write_finetune(folder, update, **options)
    make_delta(base, target, folder / "delta", chunk_bytes=4096)
    return report_delta(folder / "delta", base=base)


def attention_of_the_last_half(name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
    return moved(values) if "self_attn" in name and layer_of(name) >= LAYERS // 2 else values


def test_figures_of_every_tensor_are_those_of_its_weights(tmp_path: Path) -> None:
    """With chunks that cut rows anywhere, and with one thread or several."""
    old = llama()
    report = report_of(tmp_path, lambda name, values: moved(values), base=old, convert=f32)
    tensors = {tensor["name"]: tensor["movement"] for tensor in report.to_dict()["tensors"]}  # type: ignore[attr-defined]
    assert set(tensors) == set(old)
    for name, base in old.items():
        moves = (moved(base) - base).astype(np.float64)
        found = tensors[name]
        assert found["elements"] == base.size
        assert found["moved"] == np.count_nonzero(moves)
        assert found["norm"] == pytest.approx(np.linalg.norm(moves), rel=1e-5)
        assert found["base_norm"] == pytest.approx(np.linalg.norm(base), rel=1e-5)
        assert found["largest"] == pytest.approx(np.abs(moves).max(), rel=1e-6)
        assert ("share_8" in found) == (base.ndim == 2)
        if base.ndim == 2:
            with one_blas_thread:
                values = np.linalg.svd(moves, compute_uv=False) ** 2
            assert found["share_8"] == pytest.approx(values[:8].sum() / values.sum(), rel=0.02)
            assert found["effective_rank"] == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=0.02)
    again = report_delta(tmp_path / "delta", base=tmp_path / "base", threads=3)
    assert again.to_dict() == report.to_dict()


def test_words_say_where_it_moved(tmp_path: Path) -> None:
    sentences = report_of(tmp_path, attention_of_the_last_half).sentences
    assert "Attention of layers 3 to 5 moved most." in sentences
    assert "MLP, norms, embeddings and head are untouched." in sentences
    assert "Layers 0 to 2 are untouched." in sentences


def test_words_weigh_by_how_far_it_moved(tmp_path: Path) -> None:
    """All of it moved, the MLP of two layers ten times as far."""

    def update(name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
        return moved(values, 1e-2 if "mlp" in name and layer_of(name) in (1, 2) else 1e-3)

    sentences = report_of(tmp_path, update, convert=f32).sentences
    assert "MLP of layers 1 and 2 moved most." in sentences
    assert not any("untouched" in text for text in sentences)


def test_an_update_in_few_directions_is_said_to_be(tmp_path: Path) -> None:
    low = weights((640, 5), 1, 0.03) @ weights((5, 640), 2, 0.03)

    def update(name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
        return values + low

    base = {f"model.layers.{n}.mlp.up_proj.weight": weights((640, 640), n) for n in range(2)}
    sentences = report_of(tmp_path, update, base=base, convert=f32).sentences
    assert any(re.match(r"(99\..*|100)% of it lies in 8 directions of each matrix", s) for s in sentences)
    noise = report_of(tmp_path / "noise", lambda name, values: moved(values), base=base, convert=f32)
    assert not any("directions" in text for text in noise.sentences)


def write_tokenizer(folder: Path) -> None:
    vocab = {f"Ġword{k}": k for k in range(VOCAB - 1)}
    tokenizer = {
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
        "decoder": {"type": "ByteLevel"},
        "added_tokens": [{"id": VOCAB - 1, "content": "<|im_start|>", "special": True}],
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def test_rows_of_embeddings_that_moved_are_named_by_their_tokens(tmp_path: Path) -> None:
    def update(name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
        if name != "model.embed_tokens.weight":
            return values
        new = values.copy()
        new[VOCAB - 1] += 0.5
        new[17] += 0.1
        return new

    base, target = write_finetune(tmp_path, update)
    write_tokenizer(target)
    make_delta(base, target, tmp_path / "delta", chunk_bytes=4096)
    report = report_delta(tmp_path / "delta", base=base)
    (embedding,) = [table for table in report.tables if table.moved]
    assert (embedding.tensor, embedding.rows, embedding.moved) == ("model.embed_tokens.weight", VOCAB, 2)
    assert [(row.row, row.token) for row in embedding.strongest] == [(299, "<|im_start|>"), (17, " word17")]
    assert embedding.strongest[0].norm == pytest.approx(0.5 * HIDDEN**0.5, rel=0.01)
    assert any("2 of the 300 rows of model.embed_tokens.weight moved; row 299" in s for s in report.sentences)


@pytest.mark.parametrize("chunk_bytes", [4096, 1 << 16])
def test_every_status_has_a_report(trio: Trio, chunk_bytes: int, tmp_path: Path) -> None:
    make_delta(trio.base, trio.target, tmp_path / "delta", chunk_bytes=chunk_bytes)
    report = report_delta(tmp_path / "delta", base=trio.base)
    found = report.to_dict()
    tensors = {tensor["name"]: tensor for tensor in found["tensors"]}  # type: ignore[attr-defined]
    assert tensors["model.wide"]["movement"]["moved"] == 0  # of another dtype, and equal once converted
    assert tensors["model.embed"]["movement"]["elements"] == 400 * 64  # those of the base
    for name in ("model.added", "model.gone", "ema.layers.1.weight", "model.empty"):
        assert "movement" not in tensors[name]
    assert tensors["tower.a.weight"]["movement"]["moved"] > 50
    json.dumps(found, allow_nan=False)
    assert report.html()
    assert report.svg()


def test_without_the_base_the_manifest_tells(trio: Trio) -> None:
    report = report_delta(trio.delta)
    assert not report.has_base
    found = report.to_dict()
    assert not any("movement" in tensor for tensor in found["tensors"])  # type: ignore[attr-defined]
    layer = next(one for one in found["layers"] if one["stack"] == "model.layers")  # type: ignore[attr-defined]
    assert layer["changed_share"] == pytest.approx(0.83, abs=0.01)
    assert {"stack", "layer", "module", "part", "bits_per_weight", "payload_share"} <= set(layer)


def test_a_wrong_base_is_refused(trio: Trio) -> None:
    with pytest.raises(BaseMismatchError):
        report_delta(trio.delta, base=trio.target)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_every_chunk_of_the_base_is_checked(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those of tensors that did not change, and if the sample that is checked first misses them."""

    def update(tensor: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
        return moved(values) if "mlp" in tensor else values

    report_of(tmp_path, update)
    old = llama()
    old[name].flat[1] += 1
    arrays = {tensor: bf16(values) for tensor, values in old.items()}
    write_safetensors(tmp_path / "base" / "model.safetensors", arrays)
    monkeypatch.setattr(making, "check_base", lambda *_, **__: None)
    with pytest.raises(BaseMismatchError):
        report_delta(tmp_path / "delta", base=tmp_path / "base")


def test_a_delta_on_the_hub_is_read_once(shelf: Any) -> None:
    """With the base, hardly more bytes are fetched than to verify it. Without the base, no weights."""
    traffic = []
    for work in (
        lambda: verify_delta("org/delta", base="org/base"),
        lambda: report_delta("org/delta", base="org/base"),
    ):
        before = total_traffic()
        work()
        traffic.append(total_traffic().since(before).read)
    assert (
        0 < traffic[1] <= 1.1 * traffic[0]
    )  # one tensor is coded without its base, which verify does not read
    shelf.log.clear()
    report_delta("org/delta")
    assert not [line for line in shelf.log if ".safetensors" in str(line)]


def test_what_is_not_finite_is_counted(tmp_path: Path) -> None:
    def update(name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
        new = values.copy()
        new.flat[3] = np.nan
        new.flat[5] = np.inf
        return new

    with np.errstate(invalid="ignore"):
        report = report_of(tmp_path, update, convert=f32)
    for tensor in report.to_dict()["tensors"]:  # type: ignore[attr-defined]
        assert tensor["movement"]["not_finite"] == 2
    json.dumps(report.to_dict(), allow_nan=False)


def test_long_rows_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table whose rows are longer than a batch, and so are cut by several."""
    monkeypatch.setattr(reading, "_MOST_AT_ONCE", 4096)
    base = {"model.embed_tokens.weight": weights((5, 600_000), 1)}

    def update(name: str, values: NDArray[np.float32]) -> NDArray[np.float32]:
        new = values.copy()
        new[3, 1::1000] += 0.25
        return new

    report = report_of(tmp_path, update, base=base)
    (table,) = report.tables
    assert [row.row for row in table.strongest] == [3]
    assert table.strongest[0].norm == pytest.approx(0.25 * 600**0.5, rel=0.01)


def test_scalars_and_nothing_have_reports(tmp_path: Path) -> None:
    tensors = {"a": f32(weights(())), "b": f32(weights((0, 4))), "c": bf16(weights((3, 1, 2)))}
    for side in ("base", "target"):
        write_safetensors(tmp_path / side / "model.safetensors", tensors)
    make_delta(tmp_path / "base", tmp_path / "target", tmp_path / "delta")
    report = report_delta(tmp_path / "delta", base=tmp_path / "base")
    assert report.sentences[0] == "No weight moved."
    assert report.html()
    for side in ("base", "target"):
        write_safetensors(tmp_path / side / "model.safetensors", {"b": tensors["b"]})
    make_delta(tmp_path / "base", tmp_path / "target", tmp_path / "empty")
    for base in (None, tmp_path / "base"):
        empty = report_delta(tmp_path / "empty", base=base)
        assert empty.html()
        assert empty.svg()


def test_batches_that_are_sketched_are_all_over_a_matrix() -> None:
    assert reading._sample(5) == frozenset(range(5))
    for batches in (6, 7, 100, 1001):
        chosen = reading._sample(batches)
        assert chosen == reading._sample(batches)
        assert len(chosen) == -(-batches // 4)
        assert chosen <= set(range(batches))
    assert max(reading._sample(1001)) - min(reading._sample(1001)) > 900


def test_of_many_experts_some_tell_the_spectrum(tmp_path: Path) -> None:
    """The module has one still, and every expert all other figures."""
    base = {
        f"model.layers.{n}.mlp.experts.{k}.up_proj.weight": weights((32, 48), 100 * n + k)
        for n in range(2)
        for k in range(20)
    }
    report = report_of(tmp_path, lambda name, values: moved(values), base=base, convert=f32)
    found: Any = report.to_dict()
    movements = [tensor["movement"] for tensor in found["tensors"]]
    assert len(movements) == 40
    assert all(one["norm"] > 0 for one in movements)
    assert 2 <= sum("share_8" in one for one in movements) <= 16
    assert [one["module"] for one in found["layers"]] == ["mlp.experts.*.up_proj"] * 2
    assert all(0 < one["share_8"] < 1 for one in found["layers"])

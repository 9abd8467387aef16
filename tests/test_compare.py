"""compare: from folders, the Hub and stores, with what cards and configs say, in Python and on the command
line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from deltaweights import compare_models, make_delta
from deltaweights.cli.commands import app
from deltaweights.errors import CheckpointError, DeltaWeightsError
from deltaweights.lineage import doubts
from deltaweights.storage import total_traffic

from .checkpoints import contents
from .conftest import Trio
from .hub_server import HubServer
from .lineage.families import Weights, draw_model, rename_layers, tune, write_model

BASE = draw_model(0, 96, layers=6, vocabulary=1000)
TUNED, SIBLING = tune(BASE, 1, 2e-3), tune(BASE, 2, 2e-3)


def publish(hub: HubServer, folder: Path, name: str, model: Weights, **beside: Any) -> None:
    hub.add_repo(name, contents(write_model(folder / name, model, shards=2, **beside)))


@pytest.fixture
def shelf(hub: HubServer, tmp_path: Path) -> HubServer:
    """A Hub with a base, two fine-tunes and a stranger. The fine-tunes' cards name the base."""
    card = "---\nbase_model: org/base\n---\n"
    publish(hub, tmp_path, "org/base", BASE, config={"vocab_size": 1000})
    publish(hub, tmp_path, "org/tuned", TUNED, card=card, config={"vocab_size": 1000, "rope_theta": 1e6})
    publish(hub, tmp_path, "org/sibling", SIBLING, card=card)
    publish(hub, tmp_path, "org/stranger", draw_model(7, 96, layers=6, vocabulary=1000))
    return hub


def verdicts(found: Any) -> dict[str, str]:
    return {one.name: one.verdict for one in found.candidates}


def test_models_on_the_hub_are_compared_by_a_sample(shelf: HubServer) -> None:
    names = ["org/sibling", "org/stranger", "org/base"]
    found = compare_models("org/tuned", names, sample_bytes=90_000)
    assert [one.name for one in found.candidates] == ["org/base", "org/sibling", "org/stranger"]
    assert verdicts(found) == {"org/base": "fine-tune", "org/sibling": "sibling", "org/stranger": "unrelated"}
    base = found.candidates[0]
    assert base.repo_id == "org/base"
    assert [one.field for one in base.config] == ["rope_theta"]
    assert [layer.name for layer in base.layers] == ["0", "1", "2", "3", "4", "5", ""]
    assert found.sampled_bytes < 100_000
    assert found.model_bytes > 1_500_000
    # Two headers, a look at each tensor's middle (of the model for each candidate), and the sample.
    assert all(shelf.weight_bytes(name) < 400_000 for name in names)
    assert shelf.weight_bytes("org/tuned") < 600_000


def test_pruned_layers_are_found_over_a_network(shelf: HubServer, tmp_path: Path) -> None:
    pruned = rename_layers(TUNED, lambda layer: layer // 2 if layer % 2 else None)
    publish(shelf, tmp_path, "org/pruned", pruned)
    assert verdicts(compare_models("org/pruned", ["org/base"])) == {"org/base": "fine-tune"}


def test_a_base_is_suggested_by_what_the_model_names(shelf: HubServer, tmp_path: Path) -> None:
    found = compare_models("org/tuned", suggest_base=True)
    assert verdicts(found) == {"org/base": "fine-tune"}
    assert found.candidates[0].basis == "documents"
    # One that is named and one that is given are the same.
    assert verdicts(compare_models("org/tuned", ["org/base"], suggest_base=True)) == {"org/base": "fine-tune"}
    config = {"_name_or_path": "org/gone"}
    publish(
        shelf,
        tmp_path,
        "org/more",
        tune(BASE, 4, 2e-3),
        card="---\nbase_model: [org/base]\n---\n",
        config=config,
    )
    found = compare_models("org/more", suggest_base=True)
    assert verdicts(found) == {"org/base": "fine-tune"}
    assert [lost.name for lost in found.unavailable] == ["org/gone"]
    assert "no such repository" in found.unavailable[0].why


def test_a_card_that_names_a_stranger_is_not_believed(shelf: HubServer, tmp_path: Path) -> None:
    publish(shelf, tmp_path, "org/liar", TUNED, card="---\nbase_model: org/stranger\n---\n")
    assert verdicts(compare_models("org/liar", suggest_base=True)) == {"org/stranger": "unrelated"}


def test_where_nothing_can_be_suggested_it_says_why(shelf: HubServer, tmp_path: Path) -> None:
    with pytest.raises(DeltaWeightsError, match="names no model that it was made from"):
        compare_models("org/base", suggest_base=True)
    with pytest.raises(DeltaWeightsError, match="nothing to compare with"):
        compare_models("org/base")
    place = write_model(tmp_path / "lost", TUNED, card="---\nbase_model: org/gone\n---\n")
    with pytest.raises(CheckpointError, match=r"No model that .* names can be read\norg/gone: "):
        compare_models(place, suggest_base=True)


def test_offline_it_says_that_the_hub_is_not_asked(
    tmp_path: Path, shelf: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    place = write_model(tmp_path / "model", TUNED, card="---\nbase_model: org/base\n---\n")
    with pytest.raises(CheckpointError, match=r"(?i)offline"):
        compare_models(place, suggest_base=True)


def test_cards_and_configs_tell_which_came_first(tmp_path: Path) -> None:
    """Where weights do not: the updates are too small for such small models."""
    base = draw_model(3, 32)
    one, other = tune(base, 1, 1e-5), tune(base, 2, 1e-5)
    write_model(tmp_path / "base", base, config={"transformers_version": "4.8.2"})
    write_model(tmp_path / "one", one, card="---\nbase_model: org/base\n---\n")
    write_model(
        tmp_path / "other", other, config={"_name_or_path": "org/base", "transformers_version": "5.0.0"}
    )

    def told(model: str, candidate: str) -> tuple[str, str | None]:
        (found,) = compare_models(tmp_path / model, [tmp_path / candidate]).candidates
        return found.verdict, found.basis

    assert told("one", "base") == told("other", "base") == ("fine-tune", "documents")
    assert told("one", "other") == ("sibling", "documents")
    assert told("base", "one") == ("cannot tell", "documents")
    (tmp_path / "other" / "config.json").write_text('{"transformers_version": "4.57.1"}')
    assert told("other", "base") == ("fine-tune", "assumed")
    assert told("base", "other") == ("cannot tell", None)


@pytest.mark.parametrize(
    "text", ["[" * 5000, "[]", "{", '{"a": 1e999}', '{"_name_or_path": ["x"]}', "\xff", ""]
)
def test_configs_of_any_kind_are_read(tmp_path: Path, text: str) -> None:
    base, tuned = (
        write_model(tmp_path / "base", BASE),
        write_model(tmp_path / "tuned", TUNED, config={"a": 1}),
    )
    (base / "config.json").write_bytes(text.encode("latin-1"))
    assert [one.verdict for one in compare_models(tuned, [base]).candidates] == ["fine-tune"]


def test_tokenizers_are_compared(tmp_path: Path) -> None:
    base, tuned = write_model(tmp_path / "base", BASE), write_model(tmp_path / "tuned", TUNED)

    def told() -> str:
        return compare_models(tuned, [base]).candidates[0].tokenizer

    assert told() == "absent"
    for place in (base, tuned):
        (place / "tokenizer.json").write_text("x" * 100_000)
    assert told() == "same"
    (tuned / "tokenizer.json").write_text("x" * 99_999 + "y")
    assert told() == "different"


def test_what_is_read_is_about_one_percent(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = {f"layers.{k}.weight": rng.standard_normal((2048, 2048), np.float32) for k in range(6)}
    tuned = {
        name: value + rng.standard_normal(value.shape, np.float32) * 0.05 for name, value in base.items()
    }
    places = [write_model(tmp_path / name, model) for name, model in (("base", base), ("tuned", tuned))]
    before = total_traffic()
    found = compare_models(places[1], places[:1])
    read = total_traffic().since(before).read
    assert found.candidates[0].verdict == "fine-tune"
    assert read < 0.015 * 2 * found.model_bytes


def test_deltas_adapters_and_too_many_candidates_are_refused(trio: Trio, tmp_path: Path) -> None:
    (shard,) = write_model(tmp_path / "adapter", BASE).glob("*.safetensors")
    shard.rename(shard.with_name("adapter_model.safetensors"))
    with pytest.raises(CheckpointError, match="is a PEFT adapter, not a whole model"):
        compare_models(tmp_path / "adapter", [trio.base])
    with pytest.raises(CheckpointError, match="is a delta, not a model"):
        compare_models(trio.target, [trio.delta])
    with pytest.raises(ValueError, match="33 candidates"):
        compare_models(trio.target, [trio.base] * 33)


def test_the_command_line_shows_a_table_and_reasons(tmp_path: Path) -> None:
    names = "base", "tuned", "sibling\x1b[31m"
    places = [
        write_model(tmp_path / name, model, config={"a\x1b": name})
        for name, model in zip(names, (BASE, TUNED, SIBLING), strict=True)
    ]
    base, tuned, sibling = map(str, places)
    done = CliRunner().invoke(app, ["compare", tuned, base, sibling])
    assert done.exit_code == 0, done.output
    assert f"{base}: fine-tune\n- The weights are of one origin: their cosine is 0.99" in done.stdout
    assert "sibling\\x1b[31m: sibling" in done.stdout
    assert "\x1b" not in done.stdout
    shown = CliRunner().invoke(app, ["compare", tuned, base, sibling, "--json"])
    found = json.loads(shown.stdout)
    assert {Path(one["name"]).name[:7]: one["verdict"] for one in found["candidates"]} == {
        "base": "fine-tune",
        "sibling": "sibling",
    }
    assert found["bytes_read"] > found["sampled_bytes"] > 0
    assert CliRunner().invoke(app, ["compare", tuned]).exit_code == 2


def warned(caplog: pytest.LogCaptureFixture, pair: tuple[Path | str, Path | str], delta: Path) -> list[str]:
    """What ``diff`` warns of, for a base and a target."""
    caplog.clear()
    make_delta(pair[0], pair[1], delta, force=True)
    return [one.getMessage() for one in caplog.records if one.name == "deltaweights.inputs"]


def test_diff_notices_a_swapped_base_by_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tuned = tune(BASE, 1, 5e-3)
    one, two = (write_model(tmp_path / name, model) for name, model in (("one", BASE), ("two", tuned)))
    assert warned(caplog, (one, two), tmp_path / "delta") == []
    (line,) = warned(caplog, (two, one), tmp_path / "delta")
    assert "have grown beyond the target's" in line
    assert "Are the two swapped?" in line


def test_diff_doubts_a_stranger_far_away(
    shelf: HubServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doubts, "FAR_PART", 0.1)  # a part of large models is enough
    assert warned(caplog, ("org/base", "org/tuned"), tmp_path / "delta") == []
    (line,) = warned(caplog, ("org/stranger", "org/tuned"), tmp_path / "delta")
    assert "have nothing in common with the target's: is this the base" in line

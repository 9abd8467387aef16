"""The delta's model card: what the Hub's own library reads in it, and the commands for its readers."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from deltaweights import Manifest
from deltaweights.card import write_card
from deltaweights.license.table import KNOWN, LISTED
from deltaweights.manifest import (
    BaseRecord,
    BaseTensor,
    FileRecord,
    License,
    TargetRecord,
    TensorEntry,
    Tool,
)

from ..conftest import Trio


def test_the_hub_reads_base_license_and_library() -> None:
    assert _fields(write_card(EXAMPLE)) == {
        "base_model": "org/base",
        "base_model_relation": "finetune",
        "license": "other",
        "license_name": "mit-and-qwen",
        "license_link": "https://example.org/LICENSE",
        "library_name": "deltaweights",
        "tags": ["deltaweights", "delta", "safetensors"],
    }


def test_the_card_is_written_as_the_hubs_library_would() -> None:
    for manifest in (EXAMPLE, _with(base_id=None, base=License(), target=License())):
        written = write_card(manifest).decode()
        assert str(ModelCard(written)) == written


def test_a_target_that_states_no_license_shows_the_bases() -> None:
    fields = _fields(write_card(_with(target=License())))
    assert (fields["license"], fields["license_name"]) == ("other", "qwen")
    assert fields["license_link"] == "https://example.org/LICENSE"


def test_where_nothing_is_known_nothing_is_claimed() -> None:
    manifest = _with(base_id=None, base=License(), target=License())
    assert set(_fields(write_card(manifest))) == {"library_name", "tags"}


def test_the_text_says_how_to_rebuild_and_under_which_licenses() -> None:
    text = ModelCard(write_card(EXAMPLE).decode()).text
    assert "deltaweights apply" in text
    assert "--base" not in text, "the base is found by its id"
    assert "org/base" in text
    assert "a" * 40 in text
    assert "qwen, https://example.org/LICENSE" in text
    assert "| License of the model | mit |" in text


def test_without_a_hub_id_the_command_asks_for_the_base() -> None:
    assert "--base" in ModelCard(write_card(_with(base_id=None)).decode()).text


def test_the_card_in_the_delta_is_the_manifests(trio: Trio) -> None:
    manifest = Manifest.from_json((trio.delta / "deltaweights.json").read_bytes())
    assert (trio.delta / "README.md").read_bytes() == write_card(manifest)
    fields = _fields(write_card(manifest))
    assert (fields["license"], fields["license_name"]) == ("other", "qwen")
    assert f"{manifest.target_bytes:,} bytes" in ModelCard.load(trio.delta / "README.md").text


HUB_IDS = {terms.hub for terms in (*KNOWN, *LISTED) if terms.hub}
texts = st.text(st.characters(codec="utf-8"), max_size=12)


@given(
    st.none() | texts.filter(bool),
    st.none() | texts.filter(bool),
    st.none() | texts.filter(bool),
    texts,
    texts,
)
def test_any_text_in_a_field_comes_back_from_the_front_matter(
    id: str | None, name: str | None, link: str | None, base: str, target: str
) -> None:
    """No value can break out of its field and state another license, and the Hub takes what is written."""
    manifest = _with(base_id=base, target_id=target, base=License(), target=License(id or "mit", name, link))
    fields = _fields(write_card(manifest))
    assert fields["library_name"] == "deltaweights"
    assert set(fields) <= {
        *("base_model", "base_model_relation", "library_name", "tags"),
        *("license", "license_name", "license_link"),
    }
    if "license" in fields:
        stated = fields["license"] if isinstance(fields["license"], list) else [fields["license"]]
        assert {"other", *HUB_IDS}.issuperset(stated)
        assert re.fullmatch(r"[a-z0-9.-]+", fields.get("license_name", "x"))
        assert re.match(r"https?://", fields.get("license_link", "https://"))


@pytest.mark.parametrize(
    ("base", "target", "expected"),
    [
        (License("apache-2.0"), License("mit"), {"license": ["mit", "apache-2.0"]}),
        (License("apache-2.0"), License("apache-2.0"), {"license": "apache-2.0"}),
        (License("llama3.1"), License("llama3.1"), {"license": "llama3.1"}),
        (License("apache-2.0"), License(), {"license": "apache-2.0"}),
        (License("unknown"), License("mit"), {"license": "mit"}),
        (
            License(
                "other", "qwen", "LICENSE", (FileRecord("licenses/0123456789abcdef-LICENSE", 1, "0" * 64),)
            ),
            License("mit"),
            {
                "license": "other",
                "license_name": "mit-and-qwen",
                "license_link": f"https://huggingface.co/org/base/blob/{'a' * 40}/LICENSE",
            },
        ),
        (
            License("other", "qwen-research", "LICENSE"),
            License("other", "My license"),
            {
                "license": "other",
                "license_name": "my-license-and-qwen-research",
                "license_link": "https://huggingface.co/Qwen/Qwen2.5-3B/blob/main/LICENSE",
            },
        ),
        (
            License("other", "deepseek", "LICENSE-MODEL"),
            License(),
            {
                "license": "other",
                "license_name": "deepseek",
                "license_link": "https://github.com/deepseek-ai/DeepSeek-V3/blob/main/LICENSE-MODEL",
            },
        ),
    ],
)
def test_the_front_matter_states_base_and_target_together(
    base: License, target: License, expected: dict[str, Any]
) -> None:
    fields = _fields(write_card(_with(base=base, target=target)))
    assert {key: value for key, value in fields.items() if key.startswith("license")} == expected


def test_what_the_license_wants_to_see_is_in_the_card() -> None:
    text = ModelCard(write_card(EXAMPLE).decode()).text
    assert "**Built with Qwen**" in text
    license = replace(EXAMPLE.base.license, obligations=("Keep | this\nline (1).",))
    assert "\n- Keep \\| this line (1).\n" in ModelCard(write_card(_with(base=license)).decode()).text


def _fields(card: bytes) -> dict[str, Any]:
    """The front matter as the Hub's library reads it."""
    data: Any = ModelCard(card.decode()).data
    return dict(data.to_dict())


EXAMPLE = Manifest(
    base=BaseRecord("org/base", "a" * 40, License("other", "qwen", "https://example.org/LICENSE"), files=()),
    target=TargetRecord("me/tuned", None, License("mit"), files=()),
    tensors=(
        TensorEntry("w", "m.safetensors", "BF16", (4,), "changed", BaseTensor("w", "BF16", (4,)), 8, 1, 10),
    ),
    files=(),
    tool=Tool("deltaweights", "1"),
    chunk_bytes=4096,
)


def _with(**changes: Any) -> Manifest:
    """The example with other ids (``base_id``, ``target_id``) or licenses (``base``, ``target``)."""
    base, target = EXAMPLE.base, EXAMPLE.target
    return replace(
        EXAMPLE,
        base=replace(
            base, repo_id=changes.get("base_id", base.repo_id), license=changes.get("base", base.license)
        ),
        target=replace(
            target,
            repo_id=changes.get("target_id", target.repo_id),
            license=changes.get("target", target.license),
        ),
    )

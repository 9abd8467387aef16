"""The delta's model card: what the Hub's own library reads in it, and the commands for its readers."""

from __future__ import annotations

import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from hypothesis import given
from hypothesis import strategies as st

from deltaweights import Manifest, make_delta
from deltaweights.checkpoint import open_checkpoint
from deltaweights.license.cards import FRONT_MATTER, LicenseTexts, read_license, write_card
from deltaweights.license.table import KNOWN, LISTED
from deltaweights.manifest import BaseRecord, FileRecord, License, TargetRecord, Tool

from ..checkpoints import bf16, safetensors_bytes, weights
from ..conftest import Trio

# Writing ---------------------------------------------------------------------------------------------


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


PIECES = st.lists(st.sampled_from(["\n", "\r\n", "\r", "a: b", " ", "\t", "-", "---"]), max_size=4).map(
    "".join
)


@pytest.mark.skipif(huggingface_hub.__version__ < "2", reason="its older expression differs in blank lines")
@given(st.builds("{}---{}---{}".format, PIECES, PIECES, PIECES))
def test_the_fields_are_where_the_hubs_library_finds_them(card: str) -> None:
    ours, theirs = FRONT_MATTER.match(card), REGEX_YAML_BLOCK.search(card)
    assert (ours and ours["fields"]) == (theirs and theirs[2])


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
    assert "| License of the target | mit |" in text


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


# Reading ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("front_matter", "expected"),
    [
        ("license: apache-2.0", ("apache-2.0", None, None)),
        (
            "license: other\nlicense_name: qwen\nlicense_link: LICENSE",
            ("other", "qwen", "LICENSE"),
        ),
        ("license: [mit, apache-2.0]", ("mit AND apache-2.0", None, None)),
        ("license: 2.0", ("2.0", None, None)),
        ("license: null", (None, None, None)),
        ("license: []", (None, None, None)),
        ("tags: [x]", (None, None, None)),
        ("license: mit  # a comment\nlanguage:\n- en\n- no\nmodel-index: []", ("mit", None, None)),
    ],
)
def test_the_license_is_read_from_the_front_matter(
    tmp_path: Path, front_matter: str, expected: tuple[str | None, ...]
) -> None:
    license = _license_of(tmp_path, f"---\n{front_matter}\n---\n# A model\n".encode())
    assert (license.id, license.name, license.link) == expected


@pytest.mark.parametrize("newline", [b"\n", b"\r\n"])
def test_line_ends_of_windows_are_fine(tmp_path: Path, newline: bytes) -> None:
    card = newline.join([b"---", b"license: mit", b"---", b"text"])
    assert _license_of(tmp_path, card).id == "mit"


@pytest.mark.parametrize(
    "card",
    [
        b"# No front matter\n",
        b"---\nlicense: [mit\n---\n",
        b"---\nlicense: {mit\n---\n",
        b"---\n- a\n- list\n---\n",
        b"---\n\xff\xfe\x00\n---\n",
        b"---\nlicense: !!python/object/apply:os.getcwd []\n---\n",
        b"---\n? [a, b]\n: c\n---\n",
    ],
    ids=lambda card: repr(card[:30]),
)
def test_a_broken_card_states_no_license_and_is_no_error(tmp_path: Path, card: bytes) -> None:
    assert _license_of(tmp_path, card).id is None


@given(
    st.text(st.characters(codec="utf-8"), max_size=60)
    | st.text("[]{}:-!&*'\"\n licensemt0|>?#%@", max_size=40)
)
def test_no_front_matter_at_all_is_an_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    license = _license_of(tmp_path_factory.mktemp("model"), f"---\n{text}\n---\n".encode())
    if license.id is not None:
        license.id.encode()


def test_a_byte_order_mark_hides_no_field(tmp_path: Path) -> None:
    card = "\ufeff---\nlicense: mit\nbase_model: org/base\n---\n"
    found = _read_card(tmp_path, card)
    assert (found.license.id, found.base_models) == ("mit", ("org/base",))


@pytest.mark.parametrize(
    "path", ["./base", "../base", "/home/u/base", "~/base", "/models/base", ".cache/base"]
)
def test_a_path_as_base_model_is_no_hub_id(tmp_path: Path, path: str) -> None:
    assert _read_card(tmp_path, f"---\nbase_model: {path}\n---\n").base_models == ()
    found = _read_card(tmp_path, f"---\nbase_model: [{path}, https://huggingface.co/org/base/]\n---\n")
    assert found.base_models == ("org/base",)


def _read_card(folder: Path, card: str) -> LicenseTexts:
    (folder / "m.safetensors").write_bytes(safetensors_bytes({}))
    (folder / "README.md").write_text(card, encoding="utf-8")
    with open_checkpoint(folder) as checkpoint:
        return read_license(checkpoint, "target")


def test_a_card_nested_like_a_bomb_is_no_error(tmp_path: Path) -> None:
    """Ten aliases of ten aliases of …: a few hundred bytes that would be gigabytes, written out."""
    lines = ["a0: &a0 lol"] + [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, 7)]
    card = "---\n" + "\n".join(lines) + "\nlicense: *a6\n---\n"
    assert len(_license_of(tmp_path, card.encode()).id or "") < 10_000


def test_a_gigantic_card_is_not_read(tmp_path: Path) -> None:
    assert _license_of(tmp_path, b"---\nlicense: mit\n---\n" + bytes(5 << 20)).id is None


def test_reading_a_card_prints_and_warns_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _license_of(tmp_path, b"# no front matter\n")
        _license_of(tmp_path, b"---\nmodel-index: 5\n---\n")
    assert capfd.readouterr() == ("", "")


def test_a_broken_card_in_the_base_does_not_refuse_the_delta(tmp_path: Path) -> None:
    for side in ("base", "target"):
        (tmp_path / side).mkdir()
        (tmp_path / side / "m.safetensors").write_bytes(safetensors_bytes({"a": bf16(weights((3,)))}))
        (tmp_path / side / "README.md").write_text("---\nlicense: [mit\n---\n")
    make_delta(tmp_path / "base", tmp_path / "target", tmp_path / "delta")
    assert _fields((tmp_path / "delta" / "README.md").read_bytes())["library_name"] == "deltaweights"


# Helpers ---------------------------------------------------------------------------------------------


def _fields(card: bytes) -> dict[str, Any]:
    """The front matter as the Hub's library reads it."""
    data: Any = ModelCard(card.decode()).data
    return dict(data.to_dict())


def _license_of(folder: Path, card: bytes) -> License:
    (folder / "m.safetensors").write_bytes(safetensors_bytes({"a": bf16(weights((3,)))}))
    (folder / "README.md").write_bytes(card)
    with open_checkpoint(folder) as checkpoint:
        return read_license(checkpoint, "base").license


EXAMPLE = Manifest(
    base=BaseRecord("org/base", "a" * 40, License("other", "qwen", "https://example.org/LICENSE"), files=()),
    target=TargetRecord("me/tuned", None, License("mit"), files=()),
    tensors=(),
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

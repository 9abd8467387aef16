"""Model cards and license files, read."""

from __future__ import annotations

import warnings
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from hypothesis import given
from hypothesis import strategies as st

from deltaweights import make_delta
from deltaweights.checkpoint import open_checkpoint
from deltaweights.license.cards import FRONT_MATTER, LicenseTexts, read_license
from deltaweights.manifest import License

from ..checkpoints import bf16, safetensors_bytes, weights

PIECES = st.lists(st.sampled_from(["\n", "\r\n", "\r", "a: b", " ", "\t", "-", "---"]), max_size=4).map(
    "".join
)


@pytest.mark.skipif(huggingface_hub.__version__ < "2", reason="its older expression differs in blank lines")
@given(st.builds("{}---{}---{}".format, PIECES, PIECES, PIECES))
def test_the_fields_are_where_the_hubs_library_finds_them(card: str) -> None:
    ours, theirs = FRONT_MATTER.match(card), REGEX_YAML_BLOCK.search(card)
    assert (ours and ours["fields"]) == (theirs and theirs[2])


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


def test_of_a_gigantic_card_the_beginning_is_read(tmp_path: Path) -> None:
    assert _license_of(tmp_path, b"---\nlicense: mit\n---\n" + bytes(5 << 20)).id == "mit"
    assert _license_of(tmp_path, b"---\n" + bytes(5 << 20) + b"\nlicense: mit\n---\n").id is None


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
    assert b"library_name: deltaweights" in (tmp_path / "delta" / "README.md").read_bytes()


def _license_of(folder: Path, card: bytes) -> License:
    (folder / "m.safetensors").write_bytes(safetensors_bytes({"a": bf16(weights((3,)))}))
    (folder / "README.md").write_bytes(card)
    with open_checkpoint(folder) as checkpoint:
        return read_license(checkpoint, "base").license

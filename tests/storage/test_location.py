"""What a location may look like: paths, Hub ids and URLs of stores; others are refused with what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deltaweights import CheckpointError, OutputError, apply_delta, compact_deltas, make_delta, plan_apply
from deltaweights.cli.commands import app
from deltaweights.storage import OutputFolder, open_source

from ..conftest import Trio

NO_OUTPUTS = ("hf://org/name", "file:///tmp/x", Path("s3://b/x"))

URLS = (*NO_OUTPUTS, "https://localhost/x", "weird+scheme://x")


@pytest.mark.parametrize("url", URLS, ids=str)
@pytest.mark.parametrize(
    "write",
    [
        lambda trio, url: make_delta(trio.base, trio.target, url),
        lambda trio, url: apply_delta(trio.delta, url, base=trio.base),
        lambda trio, url: compact_deltas([trio.delta], url, base=trio.base),
        lambda trio, url: plan_apply(trio.delta, base=trio.base, out=url),
    ],
)
def test_these_urls_are_none_to_write_to(
    write: Callable[[Trio, str | Path], object],
    url: str | Path,
    trio: Trio,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((OutputError, CheckpointError)) as caught:
        write(trio, url)
    assert str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("url", ["s3://bucket/x", *NO_OUTPUTS], ids=str)
def test_a_url_is_no_folder_of_this_machine(url: str | Path) -> None:
    with pytest.raises(OutputError, match="is a URL, not a folder"):
        OutputFolder(url)


@pytest.mark.parametrize(
    ("url", "advice"),
    [
        ("https://huggingface.co/org/name", "Write it as org/name"),
        ("https://huggingface.co/org/name/tree/v1", "Write it as org/name@v1"),
        ("s3:/bucket/x", "Pass it as a string"),
        ("file:///tmp/x", "Write it as a path"),
        ("hf:/org/name", "Write it as hf://org/name"),
    ],
)
def test_a_url_is_nothing_to_read_from(url: str, advice: str) -> None:
    with pytest.raises(CheckpointError, match="is a URL") as caught:
        open_source(url)
    assert advice in caught.value.fix


@pytest.mark.parametrize("name", ["run:1", "a:b/c", "x:"])
def test_a_colon_makes_no_url(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with OutputFolder(name) as folder:
        assert folder.root == Path(name)


@pytest.mark.parametrize("name", ["./mymodel", "mymodel", "a/b/c", "../x/y", "~/nothing-there"])
def test_a_path_that_is_nowhere_is_no_hub_id_either(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the Hub is not asked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError) as caught:
        open_source(name)
    assert caught.value.what == f"There is no file or folder {name}"
    assert "a repository on the Hub" in caught.value.why
    assert "org/name" in caught.value.why


def test_an_empty_path_is_not_the_present_folder(
    trio: Trio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variable that is not set must not lead there."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="A path is empty"):
        make_delta("", trio.target, "delta")
    with pytest.raises(OutputError, match="The output's path is empty"):
        make_delta(trio.base, trio.target, "")
    result = CliRunner().invoke(app, ["apply", str(trio.delta), "-o", "", "--accept-license", "qwen"])
    assert "The output's path is empty" in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_url_is_shown_as_it_was_given(trio: Trio) -> None:
    result = CliRunner().invoke(app, ["diff", str(trio.base), str(trio.target), "-o", "https://localhost/x"])
    assert "error: https://localhost/x cannot be written to" in result.stderr

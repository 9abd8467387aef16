"""The on-disk cache of compiled kernels: found again, made anew where damaged, never taken from strangers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("llvmlite", reason="only compiled kernels are cached")
from deltaweights.codec import cache


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where files are cached."""
    tmp_path.chmod(0o755)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
    found = cache._place()
    assert found is not None
    return found


def _makes(content: bytes) -> bool:
    """Whether the cache has this content made, and does not find any."""
    made = []

    def make() -> bytes:
        made.append(True)
        return content

    assert cache.kept("a file", make) == content
    return bool(made)


def test_what_was_made_is_found_again(place: Path) -> None:
    assert _makes(b"content")
    assert not _makes(b"content")
    assert len(list(place.iterdir())) == 1


def test_a_damaged_file_is_made_anew(place: Path) -> None:
    assert _makes(b"content")
    (file,) = place.iterdir()
    whole = file.read_bytes()
    for damaged in (b"", whole[:-1], whole[:35] + bytes([whole[35] ^ 1]) + whole[36:]):
        file.write_bytes(damaged)
        assert _makes(b"content")
        assert file.read_bytes() == whole


def test_what_was_made_is_found_again_whatever_the_user_lets_others_do(place: Path) -> None:
    usual = os.umask(0)
    try:
        assert _makes(b"content")
        assert not _makes(b"content")
    finally:
        os.umask(usual)


@pytest.mark.parametrize("name", ["XDG_CACHE_HOME", "NUMBA_CACHE_DIR", "HOME"])
def test_a_relative_path_is_no_place(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The working folder may be a model that somebody else made."""
    monkeypatch.chdir(tmp_path)
    for other in ("XDG_CACHE_HOME", "NUMBA_CACHE_DIR"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv(name, "here")
    found = cache._place()
    assert found is None or found.is_relative_to(tmp_path / "home")


def test_links_of_the_user_are_followed(place: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "cache").symlink_to("elsewhere")
    assert _makes(b"content")
    assert not _makes(b"content")
    assert list((tmp_path / "elsewhere").iterdir())


def test_links_in_a_circle_are_not_followed_for_ever(place: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").symlink_to("other")
    (tmp_path / "other").symlink_to("cache")
    assert _makes(b"content")
    assert _makes(b"content")


def test_without_a_place_to_write_to_it_works_all_the_same(place: Path) -> None:
    place.parent.write_text("a file where the folder should be")
    assert _makes(b"content")
    assert _makes(b"content")


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    for name in ("XDG_CACHE_HOME", "NUMBA_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    assert _makes(b"content")


@pytest.mark.parametrize("name", cache.NUMBA_SETTINGS)
def test_kernels_made_under_other_settings_are_others(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow ones, made to look for a mistake in somebody's program, must not stay for everybody."""
    monkeypatch.delenv(name, raising=False)
    usual = cache._folder.__wrapped__()
    monkeypatch.setenv(name, "1")
    assert cache._folder.__wrapped__() != usual


def _own(path: Path) -> None:
    os.chown(path, 65534, 65534)


def _file(place: Path) -> Path:
    (file,) = place.iterdir()
    return file


def _link_file(path: Path) -> None:
    file = _file(path)
    file.rename(path.parent / "elsewhere")
    file.symlink_to(path.parent / "elsewhere")


def _others_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))
    os.chown(path, 65534, 65534, follow_symlinks=False)


def _link_in_shared_folder(path: Path) -> None:
    root = path.parent
    root.rename(root.with_name("mine"))
    shared = root.with_name("shared")
    shared.mkdir()
    (shared / "link").symlink_to(root.with_name("mine"))
    shared.chmod(0o777)
    root.symlink_to(shared / "link")


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda place: _file(place).chmod(0o666), id="a file that others can write"),
        pytest.param(lambda place: place.chmod(0o777), id="a folder that others can write"),
        pytest.param(lambda place: place.parent.chmod(0o777), id="a folder above that others can write"),
        pytest.param(lambda place: place.parent.chmod(0o775), id="a folder above that a group can write"),
        pytest.param(lambda place: _own(_file(place)), id="another user's file"),
        pytest.param(_own, id="another user's folder"),
        pytest.param(lambda place: _own(place.parent), id="another user's folder above"),
        pytest.param(_link_file, id="a link instead of the file"),
        pytest.param(_others_link, id="another user's link instead of the folder"),
        pytest.param(_link_in_shared_folder, id="a link in a folder that others can write"),
    ],
)
def test_what_others_could_have_put_there_is_not_used(place: Path, spoil: Callable[[Path], None]) -> None:
    assert _makes(b"content")
    assert not _makes(b"content")
    try:
        spoil(place)
    except PermissionError:
        pytest.skip("only root can give files away")
    assert _makes(b"content")


def test_a_shared_folder_with_the_sticky_bit_may_be_on_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root has such a folder")
    tmp_path.chmod(0o1777)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "mine"))
    assert _makes(b"content")
    assert not _makes(b"content")

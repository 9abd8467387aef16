"""Headers of .safetensors files: nothing is lost, and the safetensors library agrees on what is valid."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from deltaweights import HeaderError, apply_delta, make_delta
from deltaweights.checkpoint import (
    MAX_HEADER_BYTES,
    Header,
    TensorInfo,
    build_header,
    parse_header,
    read_shard,
)
from deltaweights.dtypes import DTYPE_BITS
from deltaweights.storage import LocalSource

from ..checkpoints import Array, random_array, safetensors_bytes
from ..memory import peak_memory

WHERE = "somewhere/model.safetensors"

library_deserialize: Callable[[bytes], list[tuple[str, dict[str, Any]]]] = deserialize

names = st.text(st.characters(codec="utf-8"), max_size=12).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
metadata = st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=8), st.text(max_size=8), max_size=3)


@st.composite
def arrays(draw: st.DrawFn) -> Array:
    """A tensor of any dtype; the shapes of 4- and 6-bit types fill whole bytes."""
    dtype = draw(st.sampled_from(sorted(DTYPE_BITS)))
    shape: tuple[int, ...] = draw(shapes)
    if math.prod(shape) * DTYPE_BITS[dtype] % 8:
        shape = (*shape, 4)
    return random_array(dtype, shape, seed=draw(st.integers(0, 100)))


tensor_maps = st.dictionaries(names, arrays(), max_size=6)


@st.composite
def infos(draw: st.DrawFn) -> list[TensorInfo]:
    """Tensors of known and unknown dtypes, one after the other."""
    found, position = [], 0
    for name, array in draw(tensor_maps).items():
        unknown = draw(st.booleans())
        length = draw(st.integers(0, 50)) if unknown else len(array.data)
        dtype = "F2_E1M0" if unknown else array.dtype
        found.append(TensorInfo(name, dtype, array.shape, position, position + length))
        position += length
    return found


# What is valid ---------------------------------------------------------------------------------------


@given(infos(), metadata)
def test_a_built_header_parses_to_what_it_was_built_from(
    tensors: list[TensorInfo], metadata: dict[str, str]
) -> None:
    raw = build_header(tensors, metadata)
    header = parse_header(raw, len(raw) + _end(tensors), WHERE)
    assert header == Header(raw, tuple(tensors), metadata)
    assert header.data_start == len(raw)
    assert header.file_size == len(raw) + _end(tensors)


@given(infos(), metadata, st.integers(0, 3000))
def test_a_header_is_padded_to_the_length_asked_for(
    tensors: list[TensorInfo], metadata: dict[str, str], room: int
) -> None:
    shortest = build_header(tensors, metadata)
    assert len(shortest) % 8 == 0
    raw = build_header(tensors, metadata, room)
    assert len(raw) == max(room, len(shortest))
    assert parse_header(raw, len(raw) + _end(tensors), WHERE).tensors == tuple(tensors)


@given(tensor_maps, metadata)
def test_the_safetensors_library_reads_what_we_build(
    tensors: dict[str, Array], metadata: dict[str, str]
) -> None:
    header = _parse(safetensors_bytes(tensors, metadata))
    data = b"".join(array.data for array in tensors.values())
    assert _library(build_header(header.tensors, metadata) + data) == tensors


@given(
    tensor_maps,
    st.none() | metadata,
    st.text(" \t\r\n", max_size=9),
    st.sampled_from([None, 0, 1, 3]),
)
def test_we_read_every_file_as_the_safetensors_library_does(
    tensors: dict[str, Array], metadata: dict[str, str] | None, padding: str, indent: int | None
) -> None:
    file = safetensors_bytes(tensors, metadata, padding=padding, indent=indent)
    assert _ours(file) == _library(file) == tensors
    assert _parse(file).metadata == (metadata or {})


EVERY_DTYPE_AND_SHAPE = [
    (dtype, shape)
    for dtype, bits in DTYPE_BITS.items()
    for shape in [(), (0,), (3, 0, 2), (4,), (2, 3, 4)]
    if math.prod(shape) * bits % 8 == 0  # the format knows no half bytes
]


@pytest.mark.parametrize(("dtype", "shape"), EVERY_DTYPE_AND_SHAPE)
def test_every_dtype_and_shape(dtype: str, shape: tuple[int, ...]) -> None:
    tensors = {"a": random_array(dtype, shape), "b": random_array(dtype, (8,))}
    file = safetensors_bytes(tensors)
    assert _ours(file) == _library(file) == tensors
    info = _parse(file).tensors[0]
    assert (info.numel, info.nbytes) == (math.prod(shape), math.prod(shape) * DTYPE_BITS[dtype] // 8)


ONE = '"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}'
ODD = {
    "no tensors": ("{}", 0),
    "only metadata": ('{"__metadata__":{"format":"pt"}}', 0),
    "metadata null": ('{"__metadata__":null,' + ONE + "}", 3),
    "metadata empty": ('{"__metadata__":{},' + ONE + "}", 3),
    "metadata last": ("{" + ONE + ',"__metadata__":{"z":"1","a":"2"}}', 3),
    "white space before": (" \n\t{" + ONE + "}", 3),
    "white space after": ("{" + ONE + "}\r\n\t   ", 3),
    "white space within": ('{ "a" :\n{"dtype" : "U8","shape": [ 3 ] ,"data_offsets":[0 ,3]} }', 3),
    "fields in another order": ('{"a":{"data_offsets":[0,3],"shape":[3],"dtype":"U8"}}', 3),
    "a field more": ('{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3],"note":[1,{"x":null}]}}', 3),
    "names not in the data's order": (
        '{"b":{"dtype":"U8","shape":[2],"data_offsets":[3,5]},' + ONE + "}",
        5,
    ),
    "empty tensors between": (
        '{"z":{"dtype":"F32","shape":[0],"data_offsets":[3,3]},'
        + ONE
        + ',"y":{"dtype":"F32","shape":[4,0],"data_offsets":[0,0]}}',
        3,
    ),
    "unicode names": (
        '{"权重/ß 😀":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}',
        3,
    ),
    "escaped names": ('{"\\u0000\\ud83d\\ude00\\"\\\\":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}', 3),
    "an empty name": ('{"":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}', 3),
    "a name with slashes and dots": ('{"../a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}', 3),
    "64 dimensions": (f'{{"a":{{"dtype":"U8","shape":[{"1," * 63}3],"data_offsets":[0,3]}}}}', 3),
}


@pytest.mark.parametrize("text_and_size", ODD.values(), ids=ODD)
def test_odd_but_valid_headers_are_read_as_the_library_reads_them(text_and_size: tuple[str, int]) -> None:
    file = _file(*text_and_size)
    assert _ours(file) == _library(file)
    assert _parse(file).raw + file[_parse(file).data_start :] == file


@pytest.mark.parametrize("text_and_size", ODD.values(), ids=ODD)
def test_odd_but_valid_headers_come_back_from_a_delta(text_and_size: tuple[str, int], tmp_path: Path) -> None:
    file = _file(*text_and_size)
    (tmp_path / "base.safetensors").write_bytes(_file("{" + ONE + "}", 3))
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "model.safetensors").write_bytes(file)
    make_delta(tmp_path / "base.safetensors", tmp_path / "target", tmp_path / "delta")
    apply_delta(tmp_path / "delta", tmp_path / "out", base=tmp_path / "base.safetensors")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == file


def test_tensors_are_in_the_order_of_their_bytes() -> None:
    header = _parse(_file(*ODD["names not in the data's order"]))
    assert [tensor.name for tensor in header.tensors] == ["a", "b"]


def test_a_dtype_that_nobody_knows_is_carried_as_bytes() -> None:
    header = _parse(_file('{"a":{"dtype":"F1_E1M0","shape":[100],"data_offsets":[0,13]}}', 13))
    assert header.tensors == (TensorInfo("a", "F1_E1M0", (100,), 0, 13),)


def test_the_table_of_dtypes_is_the_librarys() -> None:
    with pytest.raises(SafetensorError, match="unknown variant") as caught:
        library_deserialize(_file('{"a":{"dtype":"?","shape":[],"data_offsets":[0,0]}}', 0))
    assert set(re.findall(r"`([A-Z0-9_]+)`", str(caught.value))) == set(DTYPE_BITS)


# What is refused -------------------------------------------------------------------------------------

DEEP = "[" * 100_000 + "]" * 100_000
BROKEN = {
    "not JSON": ('{"a"', 0, "not valid JSON"),
    "empty": ("", 0, "not valid JSON"),
    "two values": ("{} {}", 0, "not valid JSON"),
    "a byte order mark": ("\ufeff{}", 0, "not valid JSON"),
    "a control character": ('{"a\n":{}}', 0, "not valid JSON"),
    "a gigantic number": ('{"a":' + "9" * 10_000 + "}", 0, "entry is not an object"),
    "NaN": ('{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3],"x":NaN}}', 3, "not valid JSON"),
    "Infinity": ('{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3],"x":-Infinity}}', 3, "not valid JSON"),
    "a list": ("[]", 0, "not an object"),
    "a string": ('"{}"', 0, "not an object"),
    "deep": (DEEP, 0, "not an object"),
    "deep in a tensor": ('{"a":{"x":' + DEEP + "}}", 0, "nested too deeply"),
    "a name twice": ("{" + ONE + "," + ONE + "}", 3, "'a' occurs twice"),
    "metadata twice": ('{"__metadata__":{},"__metadata__":{}}', 0, "'__metadata__' occurs twice"),
    "metadata a number": ('{"__metadata__":1}', 0, "__metadata__ is not"),
    "metadata zero": ('{"__metadata__":0}', 0, "__metadata__ is not"),
    "metadata false": ('{"__metadata__":false}', 0, "__metadata__ is not"),
    "metadata a list": ('{"__metadata__":[]}', 0, "__metadata__ is not"),
    "metadata an empty string": ('{"__metadata__":""}', 0, "__metadata__ is not"),
    "metadata of numbers": ('{"__metadata__":{"a":1}}', 0, "__metadata__ is not"),
    "metadata with half a surrogate pair": ('{"__metadata__":{"a":"\\ud800"}}', 0, "not valid JSON"),
    "half a surrogate pair": (
        '{"\\ud800":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}',
        3,
        "not valid JSON",
    ),
    "an entry null": ('{"a":null}', 0, "'a': its entry is not an object"),
    "no dtype": ('{"a":{"shape":[3],"data_offsets":[0,3]}}', 3, "dtype is not a string"),
    "dtype a number": ('{"a":{"dtype":8,"shape":[3],"data_offsets":[0,3]}}', 3, "dtype is not a string"),
    "no shape": ('{"a":{"dtype":"U8","data_offsets":[0,3]}}', 3, "its shape is not"),
    "negative shape": ('{"a":{"dtype":"U8","shape":[-3],"data_offsets":[0,3]}}', 3, "its shape is not"),
    "fractional shape": ('{"a":{"dtype":"U8","shape":[3.0],"data_offsets":[0,3]}}', 3, "its shape is not"),
    "boolean shape": ('{"a":{"dtype":"U8","shape":[3,true],"data_offsets":[0,3]}}', 3, "its shape is not"),
    "shape beyond 64 bits": (
        '{"a":{"dtype":"U8","shape":[0,18446744073709551616],"data_offsets":[0,0]}}',
        0,
        "its shape is not",
    ),
    "no offsets": ('{"a":{"dtype":"U8","shape":[3]}}', 3, "its data_offsets are not"),
    "one offset": ('{"a":{"dtype":"U8","shape":[3],"data_offsets":[3]}}', 3, "its data_offsets are not"),
    "falling offsets": (
        '{"a":{"dtype":"U8","shape":[3],"data_offsets":[3,0]}}',
        3,
        "its data_offsets are not",
    ),
    "too short for its shape": (
        '{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,23]}}',
        23,
        r"F32 of shape \[2, 3\] does not fill its 23 bytes exactly",
    ),
    "a shape that overflows": (
        '{"a":{"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0]}}',
        0,
        "does not fill its 0 bytes exactly",
    ),
    "half a byte": ('{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,2]}}', 2, "does not fill its 2 bytes"),
    "too many dimensions": (
        f'{{"a":{{"dtype":"U8","shape":[{"1," * 64}3],"data_offsets":[0,3]}}}}',
        3,
        "65 dimensions, more than 64",
    ),
    "a gap": ('{"a":{"dtype":"U8","shape":[3],"data_offsets":[1,4]}}', 4, "starts at byte 1, not at 0"),
    "an overlap": (
        "{" + ONE + ',"b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}}',
        4,
        "starts at byte 2, not at 3",
    ),
    "the same bytes twice": (
        "{" + ONE + ',"b":{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}',
        3,
        "starts at byte 0, not at 3",
    ),
    "beyond the file": ("{" + ONE + "}", 2, "but the file has"),
    "bytes left over": ("{" + ONE + "}", 4, "but the file has"),
    "far beyond the file": (
        '{"a":{"dtype":"U8","shape":[18446744073709551615],"data_offsets":[0,18446744073709551615]}}',
        0,
        "but the file has",
    ),
}


@pytest.mark.parametrize("case", BROKEN.values(), ids=BROKEN)
def test_a_broken_header_is_refused_and_the_message_says_why(case: tuple[str, int, str]) -> None:
    text, size, why = case
    with pytest.raises(HeaderError, match=why) as caught:
        _parse(_file(text, size))
    assert caught.value.what == f"{WHERE} has a broken safetensors header"
    assert caught.value.why.endswith(".")
    assert caught.value.fix


#: Where we are stricter: a tensor's name that occurs twice, which the library resolves silently, and
#: more dimensions than any framework has.
STRICTER = {"a name twice", "too many dimensions"}


@pytest.mark.parametrize("case", sorted(BROKEN))
def test_the_library_refuses_it_too(case: str) -> None:
    text, size, _ = BROKEN[case]
    if case in STRICTER:
        library_deserialize(_file(text, size))
    else:
        with pytest.raises(SafetensorError):
            library_deserialize(_file(text, size))


def test_bad_utf8_is_refused() -> None:
    text = b'{"\xff":1}'
    with pytest.raises(HeaderError, match="not valid JSON"):
        parse_header(len(text).to_bytes(8, "little") + text, 8 + len(text), WHERE)


@given(tensor_maps, st.data())
def test_whatever_we_accept_of_a_damaged_header_the_library_accepts(
    tensors: dict[str, Array], data: st.DataObject
) -> None:
    file = bytearray(safetensors_bytes(tensors, {"format": "pt"}))
    end = 8 + int.from_bytes(file[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        byte = data.draw(st.sampled_from(b'0123456789[]{}",:aFU. \x00\xff'))
        file[data.draw(st.integers(8, end - 1))] = byte
    try:
        ours = _ours(bytes(file))
    except HeaderError:
        return
    if all(array.dtype in DTYPE_BITS for array in ours.values()):
        assert _library(bytes(file)) == ours


#: What a header repeats: tens of megabytes that would be gigabytes as Python's own objects.
BOMBS = {
    "lists": ('{"x":{"a":[', "[],", "[]]}}"),
    "lists as a shape": ('{"x":{"dtype":"U8","shape":[', "[],", "[]]}}"),
    "lists as metadata": ('{"__metadata__":{"a":[', "[],", "[]]}}"),
    "zeros": ('{"x":[', "0,", "0]}"),
    "white space": ("{", " ", "}"),
    "wide text": ('{"x":{"a":"\U0001f600', "a", '"}}'),
}


@pytest.mark.parametrize("parts", BOMBS.values(), ids=BOMBS)
def test_a_header_costs_little_more_than_its_bytes(parts: tuple[str, str, str], tmp_path: Path) -> None:
    before, unit, after = parts
    text = (before + unit * (40_000_000 // len(unit)) + after).encode()
    raw = len(text).to_bytes(8, "little") + text
    assert _peak_of_reading(raw, tmp_path) < len(raw) * 2.5


@pytest.mark.parametrize("key", ["name", "field", "metadata"])
def test_a_header_of_too_many_names_is_refused_before_they_fill_the_memory(key: str, tmp_path: Path) -> None:
    pairs = ",".join(f'"{k}":{"{}" if key == "name" else chr(34) * 2}' for k in range(2_000_000))
    text = {"name": "{%s}", "field": '{"x":{%s}}', "metadata": '{"__metadata__":{%s}}'}[key] % pairs
    raw = len(text).to_bytes(8, "little") + text.encode()
    with pytest.raises(HeaderError, match="more names than its tensors need"):
        parse_header(raw, len(raw), WHERE)
    assert _peak_of_reading(raw, tmp_path) < len(raw) + (250 << 20)


def test_no_more_tensors_than_are_expected_are_read() -> None:
    file = safetensors_bytes({name: random_array("U8", (3,)) for name in "abc"}, {"format": "pt"})
    raw = _parse(file).raw
    assert len(parse_header(raw, len(file), WHERE, 3).tensors) == 3
    with pytest.raises(HeaderError, match="more names"):
        parse_header(raw, len(file), WHERE, 2)


@pytest.mark.parametrize("length", range(8))
def test_a_file_too_short_for_its_length_is_refused(length: int, tmp_path: Path) -> None:
    with pytest.raises(HeaderError, match="shorter than 8 bytes"):
        _read(tmp_path, bytes(length))


def test_a_cut_file_is_refused_at_every_length(tmp_path: Path) -> None:
    file = safetensors_bytes({"a": random_array("BF16", (3, 2)), "b": random_array("U8", (1,))})
    for length in range(len(file)):
        with pytest.raises(HeaderError):
            _read(tmp_path, file[:length])
    assert _read(tmp_path, file).file_size == len(file)


@pytest.mark.parametrize("length", [MAX_HEADER_BYTES + 1, 2**31, 2**63, 2**64 - 1])
def test_a_gigantic_header_is_refused_before_it_is_read(length: int, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        file.write(length.to_bytes(8, "little"))
        file.truncate(8 + MAX_HEADER_BYTES + 10)  # sparse: it takes up no space
    with pytest.raises(HeaderError, match=f"header of {length} bytes"):
        read_shard(LocalSource(tmp_path), "model.safetensors")


def test_a_git_lfs_pointer_is_named_as_such(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    with pytest.raises(HeaderError, match="Git LFS pointer") as caught:
        _read(tmp_path, pointer)
    assert "git lfs pull" in caught.value.fix


# Helpers ---------------------------------------------------------------------------------------------


def _peak_of_reading(raw: bytes, folder: Path) -> int:
    """How many bytes of memory a process takes, beyond its usual ones, to read this header or refuse it."""
    file = folder / "model.safetensors"
    file.write_bytes(raw)
    return peak_memory(_READ, file) - peak_memory(_READ, os.devnull)


_READ = """
import sys
from deltaweights.checkpoint import parse_header
from deltaweights.errors import HeaderError
raw = open(sys.argv[1], "rb").read()
try: parse_header(raw, len(raw), "x")
except HeaderError: pass
"""


def _end(tensors: list[TensorInfo]) -> int:
    return tensors[-1].end if tensors else 0


def _file(text: str, data_size: int) -> bytes:
    """A file with this header text, and data."""
    raw = text.encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(range(data_size))


def _parse(file: bytes) -> Header:
    return parse_header(file[: 8 + int.from_bytes(file[:8], "little")], len(file), WHERE)


def _read(folder: Path, content: bytes) -> Header:
    (folder / "model.safetensors").write_bytes(content)
    source = LocalSource(folder)
    try:
        return read_shard(source, "model.safetensors").header
    finally:
        source.close()


def _ours(file: bytes) -> Mapping[str, Array]:
    header = _parse(file)
    data = file[header.data_start :]
    return {t.name: Array(t.dtype, t.shape, data[t.start : t.end]) for t in header.tensors}


def _library(file: bytes) -> Mapping[str, Array]:
    """What the safetensors library reads."""
    return {
        name: Array(view["dtype"], tuple(view["shape"]), bytes(view["data"]))
        for name, view in library_deserialize(file)
    }

"""The dtypes of safetensors: one table of their sizes, layouts, and names in NumPy and torch."""

from __future__ import annotations

from typing import NamedTuple


class Dtype(NamedTuple):
    """A dtype.

    Attributes:
        bits: the size of an element.
        numpy: NumPy's name for it (little-endian), if it has one.
        torch: torch's name for it, if any version has it.
        exponent, mantissa: their bits, for floats with a sign; 0 for others.
    """

    bits: int
    numpy: str | None = None
    torch: str | None = None
    exponent: int = 0
    mantissa: int = 0

    @property
    def is_integer(self) -> bool:
        """Whether it is an integer dtype wider than a byte."""
        return self.bits > 8 and self.numpy is not None and self.numpy[1] in "iu"

    @property
    def itemsize(self) -> int | None:
        """Bytes of an element; None if elements do not fill bytes."""
        return None if self.bits % 8 else self.bits // 8


#: By safetensors codes, in the order in which safetensors writes the tensors of a file: wide elements first,
#: so that all are aligned. Unlisted dtypes are treated as plain bytes, and their tensors' sizes follow from
#: the offsets.
DTYPES = {
    "U64": Dtype(64, "<u8", "uint64"),
    "I64": Dtype(64, "<i8", "int64"),
    "F64": Dtype(64, "<f8", "float64", 11, 52),
    "C64": Dtype(64, "<c8", "complex64"),
    "F32": Dtype(32, "<f4", "float32", 8, 23),
    "U32": Dtype(32, "<u4", "uint32"),
    "I32": Dtype(32, "<i4", "int32"),
    "BF16": Dtype(16, None, "bfloat16", 8, 7),
    "F16": Dtype(16, "<f2", "float16", 5, 10),
    "U16": Dtype(16, "<u2", "uint16"),
    "I16": Dtype(16, "<i2", "int16"),
    "F8_E5M2FNUZ": Dtype(8, None, "float8_e5m2fnuz"),
    "F8_E4M3FNUZ": Dtype(8, None, "float8_e4m3fnuz"),
    "F8_E8M0": Dtype(8, None, "float8_e8m0fnu"),
    "F8_E4M3": Dtype(8, None, "float8_e4m3fn", 4, 3),
    "F8_E5M2": Dtype(8, None, "float8_e5m2", 5, 2),
    "I8": Dtype(8, "|i1", "int8"),
    "U8": Dtype(8, "|u1", "uint8"),
    "F6_E3M2": Dtype(6),
    "F6_E2M3": Dtype(6),
    "F4": Dtype(4, None, "float4_e2m1fn_x2"),
    "BOOL": Dtype(8, "|b1", "bool"),
}

#: Bits of an element, by code.
DTYPE_BITS = {code: dtype.bits for code, dtype in DTYPES.items()}

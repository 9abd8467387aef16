"""Counts, shares and lists, as people write them; text from elsewhere, made harmless."""

from __future__ import annotations

import re
from collections.abc import Sequence

#: Controls, marks of direction, separators of lines, characters of no width, halves of surrogate pairs.
UNSEEN = re.compile(
    "[\\x00-\\x1f\\x7f-\\x9f\\xad\\u061c\\u115f\\u1160\\u180e\\u200b-\\u200f\\u2028-\\u202e\\u2060-\\u206f\\u3164\\ufeff"
    "\\ud800-\\udfff\\ufff9-\\ufffb\\ufffe\\uffff\\U000e0000-\\U000e007f]"
)


def counted(count: int, noun: str) -> str:
    """A count of things, as in ``1 file`` and ``2 files``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def listed(names: Sequence[str], most: int) -> str:
    """The first ``most`` of some names, as in ``a``, ``a and b`` and ``a, b and 3 more``."""
    more = len(names) - most
    shown = names if more <= 0 else [*names[:most], f"{more} more"]
    *first, last = shown
    return f"{', '.join(first)} and {last}" if first else last


def percent(share: float) -> str:
    """A share from 0 to 1, as in ``27%``, ``2.1%`` or ``0.0031%``. Only nothing is 0%, only all 100%."""
    if 0 < share < 5e-7:
        return "less than 0.0001%"
    if 0.995 <= share < 1:
        return f"{min(100 * share, 99.99):.4g}%"
    return f"{100 * share:.0f}%" if share >= 0.0995 or share == 0 else f"{100 * share:.2g}%"


def plain(text: str) -> str:
    """The text without characters that control a terminal, turn its direction, or are not seen: these are
    shown as ``\\x1b`` or ``\\u202e``."""
    return UNSEEN.sub(lambda found: _escaped(ord(found[0])), text)


def _escaped(code: int) -> str:
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def shortened(text: str, most: int) -> str:
    """The text in at most ``most`` characters: the middle of a long one is left out, since names differ most
    at both ends."""
    if len(text) <= most:
        return text
    return f"{text[: most // 2]}…{text[len(text) - (most - 1 - most // 2) :]}"


def size(nbytes: int) -> str:
    """Bytes, as in ``4.2 MB``."""
    return "1 byte" if nbytes == 1 else scaled(nbytes, ("bytes", "KB", "MB", "GB", "TB"))


def scaled(number: float, units: Sequence[str]) -> str:
    """Three figures, in the unit (each a thousand of the one before) that suits them."""
    *smaller, largest = units
    for unit in smaller:
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == units[0] else f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} {largest}"

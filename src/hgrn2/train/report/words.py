"""Format text and numbers for the page: escaped, with control characters made visible."""

from __future__ import annotations

import html
import itertools
import unicodedata
from typing import Any

from hgrn2.quantities import plural

# line ends and tabs are layout; joiners shape letters and emoji
_KEPT = frozenset("\n\t\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}")
_CONTROLS = (
    *("NUL", "SOH", "STX", "ETX", "EOT", "ENQ", "ACK", "BEL", "BS", "TAB", "LF", "VT", "FF", "CR", "SO", "SI"),
    *("DLE", "DC1", "DC2", "DC3", "DC4", "NAK", "SYN", "ETB", "CAN", "EM", "SUB", "ESC", "FS", "GS", "RS", "US"),
)
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def plain(text: object) -> str:
    """Return escaped text for attributes and titles; invisible characters are replaced by their names."""
    return "".join(html.escape(_name(c) if _is_unseen(c) else c) for c in str(text))


def rich(text: object) -> str:
    """Return escaped text for the body; invisible characters are replaced by their marked-up names."""
    parts = []
    for unseen, characters in itertools.groupby(str(text), _is_unseen):
        if unseen:
            parts.append(f'<span class="unseen">{" ".join(map(_name, characters))}</span>')
        else:
            parts.append(html.escape("".join(characters), quote=False))
    return "".join(parts)


def _is_unseen(c: str) -> bool:
    return c not in _KEPT and unicodedata.category(c) in _UNSEEN


def _name(c: str) -> str:
    """Return the name of a character, e.g. ESC for the escape character and U+202E for a direction mark."""
    code = ord(c)
    return _CONTROLS[code] if code < len(_CONTROLS) else f"U+{code:04X}"


def compact(value: float) -> str:
    """Return a number in three digits with a unit: 950, 12.3k, 1.55M."""
    for factor, sign in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        # 999.5 and more of the smaller unit would round to 1000
        if abs(value) >= factor * 0.9995:
            return f"{value / factor:.3g}{sign}"
    return f"{value:.3g}"


def size(num_bytes: float) -> str:
    """Return a size in decimal units: 900 bytes, 12 kB, 9.7 MB."""
    if num_bytes < 1000:
        return plural(int(num_bytes), "byte")
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if num_bytes >= factor * 0.9995:
            return f"{num_bytes / factor:.3g} {unit}"
    return f"{num_bytes / 1e3:.3g} kB"


def duration(seconds: float) -> str:
    """Return a duration in words: 45 s, 5 min 14 s, 2 h 3 min."""
    if seconds < 59.5:
        return f"{seconds:.2g} s" if seconds < 9.5 else f"{seconds:.0f} s"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} days {hours % 24} h"
    return f"{hours} h {minute} min" if hours else f"{minute} min {second} s"


def number(value: Any, form: str = ",.3f") -> str:
    """Return a formatted number, or "not finite" for None."""
    return format(value, form) if isinstance(value, int | float) and not isinstance(value, bool) else "not finite"

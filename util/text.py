"""Text from files, made safe for terminals, pictures and pages."""

from __future__ import annotations

import unicodedata

# Control and format characters, such as those of escape sequences and of right-to-left overrides; halves of surrogate
# pairs; separators of lines and paragraphs.
UNPRINTABLE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
JOINERS = "\u200c\u200d"  # format characters that some scripts and emoji need, and that are harmless


def printable(text: object) -> str:
    r"""Return a text as one line in which control characters are replaced by escapes, such as \n or \x1b."""
    text = str(text)
    if text.isascii() and text.isprintable():
        return text
    return "".join(map(_escaped, text))


def counted(number: int, one: str, many: str = "") -> str:
    """Return a number with its noun, "1 box" or "2 boxes"; `many` replaces the plural, such as "boxes have"."""
    ending = "es" if one.endswith(("s", "x", "tch")) else "s"
    plural = f"{one[:-1]}ies" if one.endswith("y") else f"{one}{ending}"
    return f"{number:,} {one if number == 1 else many or plural}"


def _escaped(character: str) -> str:
    if unicodedata.category(character) not in UNPRINTABLE or character in JOINERS:
        return character
    return character.encode("unicode_escape").decode()

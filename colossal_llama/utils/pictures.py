"""Names that users chose, drawn with matplotlib: in fonts that have their characters, and never as markup."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

# Beginnings of the names of fonts that are tried first where the usual one lacks characters: the common ones
# of Chinese, Japanese and Korean. All other installed fonts come after them.
_PREFERRED = (
    "Noto Sans",
    "Source Han Sans",
    "WenQuanYi",
    "Droid Sans Fallback",
    "PingFang",
    "Hiragino",
    "Microsoft YaHei",
    "SimHei",
    "Malgun Gothic",
    "Arial Unicode",
)
# Fonts with boxes for all characters.
_PLACEHOLDERS = ("Last Resort", ".LastResort", "Adobe Blank", "Unicode BMP Fallback")


@contextmanager
def fonts_for(texts: Iterable[str]) -> Iterator[None]:
    """While a picture is drawn and saved: adds installed fonts for characters that the usual one lacks."""
    from matplotlib import rc_context

    fonts = _find_fonts(frozenset("".join(texts)))
    with rc_context({"font.family": [*_families(), *fonts]} if fonts else {}):
        yield


def readable(name: str) -> str:
    """A name as it can be drawn now: characters that no font has are written as `\\u4e2d`.

    `$` would begin a formula, and a label that begins with `_` would be left out of a legend.
    """
    shown = "".join(
        character if character.isprintable() and _is_drawable(character) else _escape(character)
        for character in name
    ).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def legend_columns(labels: Sequence[str], width: float, most: int) -> int:
    """Columns of a legend below the panels of a picture that is `width` inches wide; at most `most`."""
    # About what a letter takes in the usual size, and the line and the gaps beside a label.
    column = 0.085 * max(map(len, labels), default=0) + 0.75
    return max(1, min(len(labels), most, int(width / column)))


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def _is_drawable(character: str) -> bool:
    return any(ord(character) in _usual_characters(family) for family in _families())


def _families() -> list[str]:
    from matplotlib import rcParams

    return list(rcParams["font.family"])


@cache
def _usual_characters(family: str) -> frozenset[int]:
    return frozenset(_characters_of(_file_of(family)))


def _file_of(family: str) -> str | None:
    """The file that matplotlib draws a family with."""
    from matplotlib.font_manager import FontProperties, fontManager

    try:
        return fontManager.findfont(FontProperties(family=[family]), fallback_to_default=False)
    except ValueError:
        return None


def _characters_of(path: str | None) -> set[int]:
    from matplotlib.font_manager import get_font

    try:
        return set(get_font(path).get_charmap()) if path is not None else set()
    except (OSError, RuntimeError):  # a font that is gone or damaged has none
        return set()


@cache
def _find_fonts(characters: frozenset[str]) -> list[str]:
    """Names of installed fonts that have, together, what the usual ones lack; as far as there are any."""
    from matplotlib.font_manager import FontEntry, fontManager

    def order(font: FontEntry) -> tuple[int, str]:
        places = (place for place, part in enumerate(_PREFERRED) if font.name.startswith(part))
        return next(places, len(_PREFERRED)), font.name

    missing = {ord(each) for each in characters if each.isprintable() and not _is_drawable(each)}
    found: list[str] = []
    for font in sorted(fontManager.ttflist, key=order):
        if not missing:
            break
        if font.name in found or font.name.startswith(_PLACEHOLDERS):
            continue
        if missing & _characters_of(font.fname):
            # Of a family's files, the one that is drawn with may be another.
            covered = missing & _characters_of(_file_of(font.name))
            found += [font.name] if covered else []
            missing -= covered
    return found

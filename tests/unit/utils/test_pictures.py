"""Names in pictures: fonts that have their characters, escapes where none has, and no markup."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager

from colossal_llama.utils import pictures
from colossal_llama.utils.pictures import fonts_for, legend_columns, readable

CHINESE = "维基"


def draw(names: list[str], path: Path) -> list[str]:
    """Draws a legend of names; warnings are errors. Returns the labels."""
    figure = Figure(figsize=(3, 2))
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in names:
            axis.plot([0, 1], label=readable(name))
        legend = axis.legend()
        axis.set_title(readable(names[0]))
        figure.savefig(path)
    return [text.get_text() for text in legend.get_texts()]


@pytest.fixture
def without_chinese(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Only the fonts that matplotlib brings."""
    own = Path(matplotlib.get_data_path())
    monkeypatch.setattr(
        fontManager, "ttflist", [font for font in fontManager.ttflist if own in Path(font.fname).parents]
    )
    yield from forgotten()


def forgotten() -> Iterator[None]:
    pictures._find_fonts.cache_clear()
    fontManager._findfont_cached.cache_clear()
    yield
    pictures._find_fonts.cache_clear()
    fontManager._findfont_cached.cache_clear()


def make_font(path: Path, name: str, characters: str) -> None:
    """A font with a square for each character."""
    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for point in ((100, 800), (900, 800), (900, 0)):
        pen.lineTo(point)
    pen.closePath()
    square = pen.glyph()
    glyphs = [".notdef", *(f"u{ord(character):04X}" for character in characters)]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(glyphs)
    builder.setupCharacterMap({ord(c): glyph for c, glyph in zip(characters, glyphs[1:], strict=True)})
    builder.setupGlyf(dict.fromkeys(glyphs, square))
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 100)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": name, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)


def test_an_installed_font_is_used(
    without_chinese: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, characters in (("Zz One", "维基百"), ("Zz Two", "科")):
        make_font(tmp_path / f"{name}.ttf", name, characters)
        fontManager.addfont(tmp_path / f"{name}.ttf")
    before = list(matplotlib.rcParams["font.family"])
    with fonts_for(["en", "维基百科"]):
        assert matplotlib.rcParams["font.family"] == [*before, "Zz One", "Zz Two"]
        assert draw(["维基百科 en", "中科"], tmp_path / "a.png") == ["维基百科 en", r"\u4e2d科"]
    assert matplotlib.rcParams["font.family"] == before


def test_without_a_font_the_characters_are_escaped(without_chinese: None, tmp_path: Path) -> None:
    with fonts_for(["zh/维基", "en"]):
        assert matplotlib.rcParams["font.family"] == matplotlib.rcParamsDefault["font.family"]
        assert draw(["zh/维基", "en"], tmp_path / "a.png") == [r"zh/\u7ef4\u57fa", "en"]


def test_names_are_no_markup(tmp_path: Path) -> None:
    names = ["a$x^{$b", "_hidden", "two\nlines", "français"]
    assert draw(names, tmp_path / "a.png") == [r"a\$x^{\$b", " _hidden", r"two\nlines", "français"]


@given(st.text(min_size=1, max_size=12))
def test_any_name_can_be_drawn(name: str) -> None:
    figure = Figure(figsize=(2, 1))
    canvas = FigureCanvasAgg(figure)
    with warnings.catch_warnings(), fonts_for([name]):
        warnings.simplefilter("error")
        figure.text(0, 0, readable(name))
        canvas.draw()


def test_a_legend_is_not_wider_than_its_picture() -> None:
    assert legend_columns(["smoothed", "evaluation"] * 5, 16, most=7) == 7
    assert legend_columns(["a" * 60] * 5, 16, most=7) == 2
    assert legend_columns(["a" * 999], 5, most=7) == 1

"""Words in any script, by hand, and as `\\w+` has them where it has them whole."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.lamp.words import words


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("It's 5 p.m., _so_", ["It", "s", "5", "p", "m", "_so_"]),
        # Devanagari: vowel signs and the virama are marks; the danda ends a sentence.
        ("हिन्दी में समाचार।", ["हिन्दी", "में", "समाचार"]),
        ("cafe\u0301 caf\u00e9", ["cafe\u0301", "caf\u00e9"]),
        # A red heart is a sign and a variation selector; so is what makes a key of a digit.
        ("\u2764\ufe0f 1\ufe0f\u20e3", ["1"]),
        # Han, with a full stop of its own; Latin between stays whole.
        ("今天天气好。iPhone15发布", [*"今天天气好", "iPhone15", *"发布"]),
        ("カタカナとひらがな", [*"カタカナとひらがな"]),
        # Thai: vowels over and under a letter belong to it; the baht is a sign.
        ("ดีครับ ฿100", ["ดี", "ค", "รั", "บ", "100"]),
        ("한국어 뉴스", ["한국어", "뉴스"]),
    ],
)
def test_by_hand(text: str, wanted: list[str]) -> None:
    assert words(text) == wanted


def spaced(character: str) -> bool:
    name = unicodedata.name(character, "")
    marks = unicodedata.category(character).startswith("M")
    scripts = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "IDEOGRAPHIC")
    scripts += ("HENTAIGANA", "HALFWIDTH KATAKANA")
    return not marks and not name.startswith(scripts)


@settings(max_examples=300)
@given(st.text(st.characters(max_codepoint=0xFFFF).filter(spaced)))
def test_other_texts_as_before(text: str) -> None:
    """Neighbours among such texts are those of cache keys with the same `history.VERSION`."""
    assert words(text) == re.findall(r"\w+", text)

"""The words of a text, in any script.

A word is a run of letters, digits and underscores, with the marks on them: without its vowel signs
a Hindi word is another word. In scripts without blanks between words each character, with its
marks, is a word: Thai, Lao, Myanmar, Khmer, kana and Han. (Korean has blanks.)
"""

import re
import unicodedata
from functools import cache

# Unicode's blocks of these scripts; \w below leaves out signs that are no letters.
_WITHOUT_BLANKS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf"
    "\u4e00-\u9fff\ua9e0-\ua9ff\uaa60-\uaa7f\uf900-\ufaff\uff66-\uff9f\U0001b000-\U0001b16f"
    "\U00020000-\U0003ffff"
)
_ASCII = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """The words in order, in their case; for text without marks and such scripts, runs of `\\w`."""
    return (_ASCII if text.isascii() else _any_script()).findall(text)


@cache
def _any_script() -> re.Pattern[str]:
    # `re` knows no class of marks. Variation selectors (the one in a red heart) change no word.
    marks = "".join(
        chr(code)
        for code in range(0x300, 0x20000)
        if unicodedata.category(chr(code)) in ("Mn", "Mc") and not 0xFE00 <= code <= 0xFE0F
    )
    letter = rf"[^\W{_WITHOUT_BLANKS}]"
    alone = rf"(?=\w)[{_WITHOUT_BLANKS}]"
    return re.compile(rf"{letter}(?:{letter}|[{marks}])*|{alone}[{marks}]*")

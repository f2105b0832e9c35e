"""Escape: names, settings and generated text come from strangers; in a report they are text and nothing else.

HTML is escaped by the template engine. Here characters that change how other text looks (control, bidirectional,
invisible) become visible in all outputs, and everything that Markdown could take for markup becomes an entity.
"""

import re
import unicodedata
from typing import Any

from markupsafe import Markup

_HARMLESS = frozenset("\n\t")
_MARKUP = re.compile(r"[&<>*_`\[\]\\|#!@~${}]|(?<=:)//|(?i:www)(?=\.)|(?m:^(?:[-+=](?=[-+= ]|$)|\d+[.)](?= |$)))")


class Verbatim(str):
    """Text that we made and that a Markdown template takes as it is."""

    __slots__ = ()


def visible(text: str) -> str:
    """`text` with control, bidirectional, invisible and private characters written out, e.g. ⟨U+202E⟩."""
    return "".join(char if _is_plain(char) else f"⟨U+{ord(char):04X}⟩" for char in text)


def _is_plain(char: str) -> bool:
    if char in _HARMLESS:
        return True
    category = unicodedata.category(char)
    return category[0] != "C" and category not in ("Zl", "Zp") and char not in "\u034f\u115f\u1160\u3164\uffa0"


def html_finalize(value: Any) -> Any:
    """For jinja's `finalize`: runs before autoescape; what is marked as markup already stays."""
    if isinstance(value, Markup):
        return value
    return visible(value) if isinstance(value, str) else value


def markdown_finalize(value: Any) -> Any:
    """For jinja's `finalize` in Markdown: everything but Verbatim becomes inert one-line text."""
    if value is None:
        return ""
    return value if isinstance(value, Verbatim) else markdown(str(value))


def markdown(text: str) -> Verbatim:
    """`text` on one line, with all that Markdown or GitHub would act upon as character references."""
    one_line = " ".join(visible(text).split())
    return Verbatim(_MARKUP.sub(lambda match: "".join(f"&#{ord(char)};" for char in match[0]), one_line))


def fenced(text: str, language: str = "") -> Verbatim:
    """`text` as a Markdown code block whose fence is longer than any in it."""
    text = visible(text).strip("\n")
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Verbatim(f"{fence}{language}\n{text}\n{fence}")

"""Owns HTML and SVG as text: elements whose content is escaped unless it is markup already.

Input: anything; texts may be hostile.
"""

from collections.abc import Iterable
from html import escape

from ensemblekit.errors import printable

_VOID = {"meta", "br"}


class Markup(str):
    """A text that is HTML already, and goes into a page as it is."""

    __slots__ = ()


Child = str | None
Attribute = str | float | bool | None


def tag(name: str, /, *children: Child, **attributes: Attribute) -> Markup:
    """One element.

    Args:
        name: Of the element.
        children: Texts, which are escaped, and markup, which is not; None is left out.
        attributes: `class_` is `class`, `aria_sort` is `aria-sort`; None and False leave it out.

    >>> tag("td", "a < b", class_="name", hidden=True)
    '<td class="name" hidden>a &lt; b</td>'
    """
    start = name + "".join(_attribute(key, value) for key, value in attributes.items())
    return Markup(f"<{start}>" if name in _VOID else f"<{start}>{join(children)}</{name}>")


def join(children: Iterable[Child]) -> Markup:
    """Several children, one after the other."""
    return Markup("".join(_child(child) for child in children if child is not None))


def _child(child: str) -> str:
    return child if isinstance(child, Markup) else escape(printable(child))


def _attribute(key: str, value: Attribute) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    if value is True:
        return f" {name}"
    shown = f"{value:.6g}" if isinstance(value, float) else printable(str(value))
    return f' {name}="{escape(shown)}"'

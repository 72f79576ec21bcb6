"""HTML that cannot forget to escape: everything is text unless it was made by `tag`."""

from __future__ import annotations

import html


class Html(str):
    """Markup that is safe as it is."""

    __slots__ = ()


def tag(name: str, *children: str, **attributes: str) -> Html:
    """One element; children that are not `Html`, and all attribute values, are escaped.
    `class_` and `data_x` become `class` and `data-x`."""
    attributes_text = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(value, quote=True)}"'
        for key, value in attributes.items()
    )
    if name in ("br", "meta", "link"):
        return Html(f"<{name}{attributes_text}>")
    return Html(f"<{name}{attributes_text}>{join(*children)}</{name}>")


def join(*children: str) -> Html:
    """Elements and texts side by side."""
    return Html("".join(c if isinstance(c, Html) else html.escape(c) for c in children))

"""Fills the generated parts of a page when the site is built, and refuses pages that load anything from elsewhere."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from docs.tables import filled

# Pages may link to anywhere. What a browser loads by itself must lie in the site.
_LOADED = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?(?:https?:)?//[^>]*>|"""
    r"""<link\b(?=[^>]*\brel=["']?(?:stylesheet|preconnect|preload|icon))[^>]*\bhref=["']?(?:https?:)?//[^>]*>""",
    re.IGNORECASE,
)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Puts the tables where the page names them."""
    try:
        return filled(markdown)
    except KeyError as error:
        raise PluginError(f"{page.file.src_uri}: {error.args[0]}") from error


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Hands the page on if it loads nothing from another server."""
    found = _LOADED.search(output)
    if found:
        raise PluginError(f"{page.file.src_uri} loads something from elsewhere: {found[0]}")
    return output

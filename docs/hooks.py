"""What mkdocs does beside its plugins: links that are right in the repository are made right on the site."""

from __future__ import annotations

from typing import Any


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The notebooks lie beside docs/ in the repository, and within it (docs/notebooks, a link) on the site."""
    return markdown.replace("](../notebooks/", "](notebooks/")

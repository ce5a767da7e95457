"""Words of a model card: nothing in them that Markdown or HTML acts on, and no folder of this machine."""

from __future__ import annotations

import re
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

__all__ = ["cell", "public_text", "published"]


def cell(value: object) -> str:
    """Text for a cell of a table or a line: on one line, with nothing in it that Markdown or HTML would act on."""
    text = " ".join(str(value).split())
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("|", r"\|")


def public_text(text: str) -> str:
    """The last name of a path that says where things lie on this machine; any other text as it is."""
    for flavour, start in ((PurePosixPath, r"/|~|\.\.?/"), (PureWindowsPath, r"[A-Za-z]:[\\/]|\\\\")):
        if re.match(start, text):
            return flavour(text).name
    return text


def published(value: Any) -> Any:
    """Settings without the folders of this machine."""
    if isinstance(value, dict):
        return {name: published(item) for name, item in value.items()}
    if isinstance(value, list):
        return [published(item) for item in value]
    return public_text(value) if isinstance(value, str) else value

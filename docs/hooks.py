"""For `make docs`: what a page links to outside of docs/ is named there without a link."""

import re


def on_page_markdown(markdown: str, **_: object) -> str:
    return re.sub(r"(?<!!)\[([^\]]+)\]\(\.\./[^)]*\)", r"\1", markdown)

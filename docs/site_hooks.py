"""For mkdocs: a block's second word, such as `bash real`, is for tests/test_readmes.py alone."""

import re


def on_page_markdown(markdown: str, **_: object) -> str:
    return re.sub(r"^```(\w+) \w+$", r"```\1", markdown, flags=re.MULTILINE)

"""MEASURED.md: each proof and measurement writes its own part of it, and no other."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

PAGE = Path(__file__).resolve().parent / "MEASURED.md"


def write(name: str, text: str) -> None:
    """Put `text` between the page's marks of that name; raises ValueError if it has none."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    head, found, rest = PAGE.read_text().partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{PAGE} has no part {name}")
    day = f"{datetime.now(UTC):%Y-%m-%d}"
    PAGE.write_text(f"{head}{begin}Of {day}:\n\n{text.strip()}\n{end}{tail}")

"""MEASURED.md: each proof and measurement writes its own part of it, and no other."""

from datetime import UTC, datetime
from pathlib import Path

PAGE = Path(__file__).resolve().parent / "MEASURED.md"


def write(name: str, text: str) -> None:
    """Put `text` between the page's marks of that name; raises ValueError if it has none."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    head, rest = PAGE.read_text().split(begin)
    _, tail = rest.split(end)
    PAGE.write_text(f"{head}{begin}Of {datetime.now(UTC):%Y-%m-%d}:\n\n{text.strip()}\n{end}{tail}")

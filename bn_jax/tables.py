"""Writes tables as text: Markdown for readers, CSV for programs."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Makes a Markdown table of cells, without a newline at its end."""
    lines = [_line(head), "|---" * len(head) + "|"]
    for cells in rows:
        lines.append(_line(cells))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def csv_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Makes a CSV of rows, each {column: value} with the same columns; '' without rows."""
    if not rows:
        return ""
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()

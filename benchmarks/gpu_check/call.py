"""One call of the check: parts in turn within a budget; results on the disk after each part."""

import json
import pathlib
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks import fair
from bn_jax.workdir import files

HEAD = ("part", "what", "figure", "card")


class Call:
    """A call's budget and its results, DIR/call_N.json and DIR/call_N.md.

    Args:
      number: 1 or 2.
      out: folder of the results; created if absent.
      budget: seconds from now to the end of the call.
      smoke: whether sizes are tiny and the figures mean nothing.
      pack: folder that says which commit was packed, where there is no repository.
    """

    def __init__(
        self,
        number: int,
        out: pathlib.Path,
        budget: float,
        *,
        smoke: bool,
        pack: pathlib.Path | None = None,
    ):
        self.number = number
        self.out = out
        self.budget = budget
        self.smoke = smoke
        self.card: dict[str, Any] = {}
        self.parts: dict[str, dict[str, Any]] = {}
        self.pack = pack
        self._end = time.monotonic() + budget
        out.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        """Seconds until the call must have ended."""
        return self._end - time.monotonic()

    def part(
        self, name: str, limit: float, least: float, run: Callable[[float], Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Runs a part, or drops it where fewer than `least` seconds are left; writes the results.

        Args:
          name: of the part.
          limit: seconds that it may take.
          least: seconds without which it is not begun.
          run: called with the time (of time.monotonic) at which the part must have ended. Returns
            what is recorded: JSON, of which `rows` is a list of (what, figure) for the table.

        An error ends the part, not the call: it is recorded as `failed`.
        """
        start = time.monotonic()
        if self.left() < least:
            said = f"{self.left():.0f} s left, {least:.0f} needed"
            return self.record(name, {"dropped": said, "rows": [["not run", said]]})

        print(f"{name}: at most {min(limit, self.left()):.0f} s", flush=True)
        try:
            result = dict(run(start + min(limit, self.left())))
        except Exception as error:
            traceback.print_exc()
            said = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            result = {"failed": said, "rows": [["failed", said]]}
        result["seconds"] = round(time.monotonic() - start, 1)
        return self.record(name, result)

    def record(self, name: str, result: dict[str, Any]) -> dict[str, Any]:
        """Adds or replaces a part's result, and writes both files."""
        self.parts[name] = result
        content = {
            "call": self.number,
            "smoke": self.smoke,
            "budget_seconds": self.budget,
            "seconds_left": round(self.left(), 1),
            "card": self.card,
            "machine": self.machine(),
            "parts": self.parts,
        }
        text = json.dumps(content, indent=1) + "\n"
        files.write_atomic(self.out / f"call_{self.number}.json", text.encode())
        table = self.table()
        files.write_atomic(self.out / f"call_{self.number}.md", table.encode())
        return result

    def machine(self) -> dict[str, Any]:
        """Hardware, versions and commit."""
        found = fair.machine()
        file = self.pack / "commit" if self.pack else None
        if found["commit"] == "unknown" and file and file.is_file():
            found["commit"] = f"{file.read_text().strip()}, as packed"
        return found

    def table(self) -> str:
        """The rows of all parts as Markdown, with the card beside every figure."""
        card = describe(self.card)
        title = f"# GPU check, call {self.number}"
        if self.smoke:
            title += ": a smoke run, whose figures mean nothing"
        lines = [title, "", f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
        for name, result in self.parts.items():
            for what, figure in result.get("rows", []):
                lines.append(f"| {name} | {what} | {figure} | {card} |")
        machine = self.machine()
        versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
        lines += ["", f"{machine['hardware']}; {versions}; commit {machine['commit']}."]
        return "\n".join(lines) + "\n"


def describe(card: Mapping[str, Any]) -> str:
    """The card in a few words: its name and the bandwidth that was measured."""
    if not card:
        return "not known"
    return f"{card['name']}, {card['bytes_a_second'] / 1e9:,.0f} GB/s copied"

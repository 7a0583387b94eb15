"""Lists the deliberate differences from the paper: `python docs/differences.py [--write]`.

They are the sentences in the code that begin with "Differs from the paper:". With --write the list
in docs/experiments.md, between two markers, is brought up to date.
"""

import io
import pathlib
import sys
import textwrap
import tokenize
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "experiments.md"
WORDS = "Differs from the paper:"
BEGIN, END = "<!-- differences: begin -->", "<!-- differences: end -->"


def texts(source: str) -> Iterator[str]:
    """Strings and blocks of comments of a Python file, without their quotes and hashes."""
    block: list[str] = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            block.append(token.string.lstrip("# "))
        elif token.type != tokenize.NL:
            yield "\n".join(block)
            block = []
            if token.type == tokenize.STRING:
                yield textwrap.dedent(token.string.strip("rbf").strip("\"'"))


def sentences(source: str) -> list[str]:
    """Each sentence that begins with WORDS, in one line, without these words."""
    found = []
    for text in texts(source):
        for paragraph in text.split("\n\n"):
            for rest in " ".join(paragraph.split()).split(WORDS)[1:]:
                found.append(rest.strip().split(". ")[0].rstrip(".") + ".")
    return found


def table(root: pathlib.Path = ROOT) -> str:
    """The differences of `bn_jax` and `configs` as Markdown: each with the files that say it."""
    places: dict[str, list[str]] = {}
    for folder in ("bn_jax", "configs"):
        for path in sorted((root / folder).rglob("*.py")):
            for sentence in sentences(path.read_text()):
                places.setdefault(sentence, []).append(f"`{path.relative_to(root).as_posix()}`")
    lines = [f"* {text[:1].upper()}{text[1:]} ({', '.join(p)})" for text, p in places.items()]
    return "\n".join(textwrap.fill(line, 100, subsequent_indent="  ") for line in sorted(lines))


def updated(document: str) -> str:
    """The document with the list of today between its markers."""
    before, rest = document.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        DOCUMENT.write_text(updated(DOCUMENT.read_text()))
    else:
        print(table())

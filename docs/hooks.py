"""Hooks of the documentation site (mkdocs.yml): pages that lie outside docs/, and links to them.

README.md is the start page, and PAGES are pages of the navigation; the site also has tables and
pictures under results/. A link to anything else in the checkout (a script, a folder) becomes plain
text, because the site has documents and no code.
"""

import pathlib
import posixpath
import re

from mkdocs.structure.files import File, InclusionLevel

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGES = {
    "README.md": "index.md",
    "launch/README.md": "launch.md",
    "results/README.md": "published.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
}
# Pages with wide tables give the room of their table of contents to them.
WIDE = re.compile(r"(claims|launch|results/\w+/fig[34])\.md")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)]*)?\)")
CODE = re.compile(r"<pre.*?</pre>|<code>[^<]*</code>", re.DOTALL)
OPTION = re.compile(r"(?<![\w-])--\w[\w.-]*")


def on_files(files, config):
    """Adds the pages and pictures from outside docs/."""
    for path, uri in PAGES.items():
        text = links((ROOT / path).read_text(), path)
        files.append(File.generated(config, uri, content=text))
    for path in sorted((ROOT / "results").rglob("*")):
        uri = path.relative_to(ROOT).as_posix()
        if path.suffix == ".png":
            files.append(File.generated(config, uri, abs_src_path=str(path)))
        elif path.suffix == ".md" and uri not in PAGES:
            text, apart = links(path.read_text(), uri), InclusionLevel.NOT_IN_NAV
            files.append(File.generated(config, uri, content=text, inclusion=apart))
    return files


def on_page_markdown(markdown, page, config, files):
    """Changes the links of a page of docs/ to those of the site, and makes room for wide tables."""
    if WIDE.fullmatch(page.file.src_uri):
        page.meta["hide"] = ["toc"]
    here = (ROOT / "docs" / page.file.src_uri).is_file()
    return links(markdown, f"docs/{page.file.src_uri}") if here else markdown


def on_page_content(html, page, config, files):
    """Lets lines of code break after commas, but not after the hyphens of `--workdir`."""

    def mark(code: re.Match) -> str:
        marked = OPTION.sub(r'<span class="option">\g<0></span>', code[0])
        return re.sub(r",(?=\w)", ",<wbr>", marked)

    return CODE.sub(mark, html)


def links(markdown: str, path: str) -> str:
    """Changes the links in the text of the file `path` to those of the site."""
    here = posixpath.dirname(uri_of(path) or path)

    def turn(match: re.Match) -> str:
        image, text, target, anchor = match.group(1, 2, 3, 4)
        if "://" in target:
            return match[0]
        place = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
        if not (ROOT / place).exists():
            return match[0]  # mkdocs reports it
        uri = uri_of(place)
        return (
            f"{image}[{text}]({posixpath.relpath(uri, here or '.')}{anchor or ''})" if uri else text
        )

    return LINK.sub(turn, markdown)


def uri_of(place: str) -> str | None:
    """Returns where the site has a file of the checkout; None if it does not have it."""
    if place in PAGES:
        return PAGES[place]
    if place.startswith("docs/") and place.endswith(".md"):
        return place.removeprefix("docs/")
    return place if place.startswith("results/") and place.endswith((".md", ".png")) else None

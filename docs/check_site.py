"""Checks a built site: nothing is loaded from another host, and what a page shows is there.

Usage: `python docs/check_site.py site`. Prints what it found and exits with 1, or a line saying how much it read.
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# attributes through which a browser fetches something while it shows a page; links to follow are not among them
FETCHED = {
    "link": ("href",), "script": ("src",), "img": ("src", "srcset"), "source": ("src", "srcset"), "iframe": ("src",), "embed": ("src",),
    "video": ("src", "poster"), "audio": ("src",), "object": ("data",), "use": ("href", "xlink:href"), "image": ("href", "xlink:href"),
    "form": ("action",),
}
# of <link>, only these fetch
LOADING = {"stylesheet", "icon", "preload", "prefetch", "preconnect", "dns-prefetch", "modulepreload", "manifest", "shortcut"}
REMOTE = re.compile(r"^\s*(?:[a-z][a-z0-9+.-]*:)?//", re.IGNORECASE)
IN_STYLE = re.compile(r"""(?:@import\s+(?:url\()?|url\()\s*["']?\s*((?:https?:)?//[^"')\s]+)""", re.IGNORECASE)
IN_SCRIPT = re.compile(r"""(?:fetch|import|importScripts|Worker|open|src\s*=)\s*\(?\s*["'`]((?:https?:)?//[^"'`]+)""")
# The bundle of the theme can fetch two things, each only on a page with a certain element; such elements must not appear.
TRIGGERS = {"mermaid": "the theme would load a drawing library from another host", "md-source": "the theme would ask a code host for numbers"}
BUNDLE = re.compile(r"assets/javascripts/")


class Page(HTMLParser):
    """Collects what one page fetches."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.fetched: list[str] = []
        self.classes: set[str] = set()
        self.styles: list[str] = []
        self.scripts: list[str] = []
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the addresses of a tag."""
        given = {name: value or "" for name, value in attrs}
        self._inside = tag if tag in {"style", "script"} else self._inside
        self.classes |= set(given.get("class", "").split())
        self.styles.append(given.get("style", ""))
        if tag == "link" and not LOADING & set(given.get("rel", "").lower().split()):
            return
        for name in FETCHED.get(tag, ()):
            if given.get(name):
                self.fetched += [part.split()[0] for part in given[name].split(",") if part.strip()] if name == "srcset" else [given[name].strip()]

    def handle_endtag(self, tag: str) -> None:
        """Leave a style or a script."""
        if tag == self._inside:
            self._inside = ""

    def handle_data(self, data: str) -> None:
        """Keep the text of styles and scripts."""
        if self._inside == "style":
            self.styles.append(data)
        elif self._inside == "script":
            self.scripts.append(data)


def check_page(path: Path, site: Path) -> list[str]:
    """Faults of one page."""
    page, name = Page(), path.relative_to(site)
    page.feed(path.read_text(encoding="utf-8"))
    found = [f"{name}: loads {url}" for url in page.fetched if REMOTE.match(url)]
    found += [f"{name}: loads {url} in a style" for text in page.styles for url in IN_STYLE.findall(text)]
    found += [f"{name}: loads {url} in a script" for text in page.scripts for url in IN_SCRIPT.findall(text)]
    found += [f"{name}: has an element of class {c}: {why}" for c, why in TRIGGERS.items() if c in page.classes]
    for url in page.fetched:
        parts = urlsplit(url)
        if not parts.scheme and not parts.netloc and parts.path and path.name != "404.html":
            target = (path.parent / unquote(parts.path)) if not parts.path.startswith("/") else site / unquote(parts.path).lstrip("/")
            if not target.exists():
                found.append(f"{name}: {url} is not in the site")
    return found


def check_file(path: Path, site: Path) -> list[str]:
    """Faults of a style sheet, a script or a picture."""
    text, name = path.read_text(encoding="utf-8", errors="replace"), path.relative_to(site)
    pattern = IN_SCRIPT if path.suffix == ".js" else IN_STYLE
    if path.suffix == ".js" and BUNDLE.search(name.as_posix()):
        return []
    found = [f"{name}: loads {url}" for url in pattern.findall(text)]
    if path.suffix == ".svg":
        found += [f"{name}: loads {url}" for url in re.findall(r"""<(?:image|use|script)\b[^>]*\bhref=["']((?:https?:)?//[^"']+)""", text)]
    return found


def check(site: Path) -> tuple[list[str], int]:
    """All faults, and how many files were read."""
    found, count = [], 0
    for path in sorted(site.rglob("*")):
        if path.suffix == ".html":
            found += check_page(path, site)
        elif path.suffix in {".css", ".js", ".svg"}:
            found += check_file(path, site)
        else:
            continue
        count += 1
    return found, count


def main(argv: list[str]) -> int:
    """Check the site in the folder that is named."""
    site = Path(argv[0] if argv else "site")
    if not (site / "index.html").is_file():
        print(f"{site} holds no index.html: build the site first (make docs)")
        return 1
    found, count = check(site)
    print("\n".join(found) if found else f"{count} files of the site read: nothing is loaded from another host, nothing is missing")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

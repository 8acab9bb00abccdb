"""What the site takes from the repository around `docs/`: some pages, and links to files that are no pages.

mkdocs calls the two functions. A link out of `docs/` must name a file that exists. If that is a page of the site, the
link goes there; otherwise its text stays, as the site does not hold the file.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",
}
"""Files of the repository that are pages, and the names that these have on the site."""

_LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<path>[^)#:\s]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turns links to files of the repository into links to pages, or into their texts."""
    uri = page.file.src_uri
    pages = {page: source for source, page in PAGES.items()}
    folder = posixpath.dirname(pages.get(uri, f"docs/{uri}"))

    def resolved(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, link["path"]))
        if not (ROOT / target).exists():
            raise PluginError(f"{uri} links to {link['path']}, which does not exist")
        inside = PAGES.get(target) or target.removeprefix("docs/")
        if files.get_file_from_path(inside) is None:
            return link["text"]
        way = posixpath.relpath(inside, posixpath.dirname(uri) or ".")
        return f"[{link['text']}]({way}{link['anchor'] or ''})"

    return _LINK.sub(resolved, markdown)

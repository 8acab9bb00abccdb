"""The documentation site builds without a warning, and loads nothing from other servers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOADED = re.compile(r"<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)=[\"']?(?:https?:)?//")
"""A tag that makes a browser load a file from another server; `<a>` links load nothing until the reader follows
them."""
QUOTED = re.compile(r"`([^`]+)`")


def build(folder: Path, target: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    built = build(ROOT, tmp_path)
    assert built.returncode == 0, built.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert {"index.html", "quickstart.html", "security.html", "architecture.html"} <= {page.name for page in pages}
    assert not [page.name for page in pages if LOADED.search(page.read_text(encoding="utf-8"))]


def test_the_messages_in_the_troubleshooting_page_occur_in_the_code() -> None:
    source = "\n".join(file.read_text() for folder in ("peers", "splitnet") for file in (ROOT / folder).rglob("*.py"))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # Joins literals that continue on the next line.
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = [quoted for row in re.findall(r"^\| ([^|]*) \|", page, re.MULTILINE) for quoted in QUOTED.findall(row)]
    assert len(messages) > 30
    # Dots and example names are placeholders for values that the code fills in.
    parts = [part.strip() for message in messages for part in re.split(r"\.\.\.|\d+\.\.\d+|\S+:\d+|line N", message)]
    assert not [part for part in parts if len(part) > 5 and part not in source]


@pytest.mark.default_cases(text=("[gone](gone.md)",))
@pytest.mark.parametrize(
    "text", ["[gone](gone.md)", "[gone](../gone.py)", "[no such part](../ARCHITECTURE.md#nowhere)"]
)
def test_a_broken_link_fails_the_build(tmp_path: Path, text: str) -> None:
    for name in ("ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "README.md"):
        (tmp_path / name).write_text("# Here\n")
    docs = tmp_path / "docs"
    (docs / ".site").mkdir(parents=True)
    hook = "docs/.site/repository_pages.py"
    (tmp_path / hook).write_text((ROOT / hook).read_text())
    checks = "validation: {links: {not_found: warn, anchors: warn}}\n"
    (tmp_path / "mkdocs.yml").write_text(f"site_name: test\nplugins: []\nhooks: [{hook}]\n{checks}")
    (docs / "page.md").write_text("# Page\n\n[fine](../ARCHITECTURE.md#here)\n")
    assert build(tmp_path, tmp_path / "site").returncode == 0
    (docs / "page.md").write_text(f"# Page\n\n{text}\n")
    assert build(tmp_path, tmp_path / "site").returncode != 0

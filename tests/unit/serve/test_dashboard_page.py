"""The files of the dashboard: they cannot run a text of a peer, or send requests to other hosts."""

from __future__ import annotations

import re
from importlib import resources

import pytest

from splitnet.serve.dashboard import HEADERS, MEDIA_TYPES

FILES = {file.name: file.read_text(encoding="utf-8") for file in (resources.files("splitnet.serve") / "page").iterdir()}
SVG_NAMESPACE = "http://www.w3.org/2000/svg"
FORBIDDEN = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|createContextualFragment|DOMParser"
)


def test_every_file_has_a_media_type() -> None:
    assert {"dashboard.html", "dashboard.css", "dashboard.js"} <= FILES.keys()
    assert {name[name.rfind(".") :] for name in FILES} <= MEDIA_TYPES.keys()


@pytest.mark.parametrize("name", sorted(FILES))
def test_no_text_becomes_html_and_no_file_names_another_host(name: str) -> None:
    text = FILES[name].replace(SVG_NAMESPACE, "")
    assert not FORBIDDEN.search(text)
    assert not re.search(r"(https?:)?//[a-z]+[.:]|@import|url\(", text)


def test_the_page_has_no_code_or_style_of_its_own() -> None:
    page = FILES["dashboard.html"]
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", page)
    assert all(re.search(r'\ssrc="/page/', tag) for tag in re.findall(r"<script[^>]*>", page))
    named = set(re.findall(r'(?:src|href)="/page/([^"]+)"', page))
    named |= {name for text in FILES.values() for name in re.findall(r'from "\./([^"]+)"', text)}
    assert named == FILES.keys() - {"dashboard.html"}


def test_security_policy_allows_only_own_scripts() -> None:
    policy = HEADERS["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy

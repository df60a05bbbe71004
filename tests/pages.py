"""Reads reports strictly, and checks what holds for each of them."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "img", "path", "hr", "input"}


class Page(HTMLParser):
    """Reads a page strictly: every element is closed in its turn, no attribute is given twice, no id is used twice."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.stack == []
        ids = [attributes["id"] for _, attributes in self.elements if "id" in attributes]
        assert len(ids) == len(set(ids))

    def handle_starttag(self, tag, attrs):
        assert len(attrs) == len(dict(attrs))
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.stack[-1] if self.stack else "", data))

    def text(self) -> str:
        return "".join(data for tag, data in self.texts if tag not in ("script", "style"))


def check_headings(page: Page, text: str, least: int) -> None:
    assert text.startswith('<!DOCTYPE html>\n<html lang="en">')
    assert len(text.encode()) < 500_000
    headings = [tag for tag, _ in page.elements if tag in ("h1", "h2")]
    assert headings.count("h1") == 1
    assert headings.count("h2") >= least
    labelled = {attributes["aria-labelledby"] for tag, attributes in page.elements if tag == "section"}
    assert labelled <= {attributes.get("id") for _, attributes in page.elements}


def check_pictures(page: Page, count: int) -> None:
    pictures = [attributes for _, attributes in page.elements if attributes.get("role") == "img"]
    assert len(pictures) == count
    assert all(len(attributes["aria-label"]) > 20 for attributes in pictures)


def check_self_contained(page: Page, text: str) -> None:
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text)
    for tag, attributes in page.elements:
        assert tag in {"link"} or not {"src", "href", "action", "data"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
    assert [a for tag, a in page.elements if tag == "link"] == [{"rel": "icon", "href": "data:,"}]
    policy = next(a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none';")
    assert [tag for tag, _ in page.elements].count("script") == 2

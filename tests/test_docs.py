"""The README and the pages under docs/: links lead somewhere, made pages are current, examples run."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown.extensions.toc import slugify
from transformers import AutoModelForCausalLM, AutoTokenizer

import iapt
from iapt.config.paths import CONFIG_DIR
from iapt.methods.registry import METHODS
from iapt.model.backbone import TINY_DIR
from scripts import methods_page, settings_page

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
NAV = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]


def prose(page: Path) -> str:
    """A page without its code blocks, whose brackets are no links."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^    .*$", "", text, flags=re.MULTILINE))


def links(page: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, those alone that GitHub and MkDocs form alike."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    on_github = {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}
    return on_github & {slugify(title, "-") for title in titles}


def in_nav(entry: Any) -> Iterator[str]:
    if isinstance(entry, str):
        yield entry
    else:
        for inner in entry.values() if isinstance(entry, dict) else entry:
            yield from in_nav(inner)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_link_is_dead(page: Path) -> None:
    dead = []
    for link in links(page):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.is_relative_to(ROOT) or not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert not dead


def test_links_are_found() -> None:
    assert {"docs/methods.md", "LICENSE"} <= set(links(ROOT / "README.md"))
    assert "labels" in anchors(ROOT / "docs" / "methods.md")


def test_links_of_pages_stay_among_the_pages() -> None:
    # What lies outside of docs/ is no part of the site.
    outside = [(p.name, link) for p in PAGES if p.parent.name == "docs" for link in links(p) if link.startswith("..")]
    assert not outside


def test_every_page_is_in_the_nav_once() -> None:
    assert sorted(in_nav(NAV)) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def test_paths_that_pages_name_exist() -> None:
    named = {
        (page.name, path)
        for page in PAGES
        for path in re.findall(
            r"`((?:iapt|configs|scripts|tests|docs)/[\w./]+\.\w+)`", page.read_text(encoding="utf-8")
        )
    }
    assert len(named) > 20
    missing = [(name, path) for name, path in named if "NAME" not in path and not (ROOT / path).exists()]
    assert not missing


@pytest.mark.parametrize("module", [settings_page, methods_page], ids=lambda module: module.__name__)
def test_made_pages_are_current(module: Any) -> None:
    assert module.PAGE.read_text(encoding="utf-8") == module.render(), "make docs"


def test_made_pages_have_every_method() -> None:
    names = {path.stem for path in (CONFIG_DIR / "method").glob("*.yaml")}
    assert {entry.name for entry in methods_page.entries()} == names
    assert f"{len(names)} methods are shipped" in (ROOT / "README.md").read_text(encoding="utf-8")
    settings = settings_page.PAGE.read_text(encoding="utf-8")
    assert names <= set(re.findall(r"^### (\w+)$", settings, flags=re.MULTILINE))


def test_messages_that_are_explained_exist() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^### `(.+)`$", text, flags=re.MULTILINE)
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "iapt").rglob("*.py"))
    assert len(messages) > 10
    assert [message for message in messages if message not in source] == []


def test_the_example_of_a_method_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    [block] = re.findall(r"^```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)
    (tmp_path / "example_of_a_method.py").write_text(block, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        example = importlib.import_module("example_of_a_method")
        lm, tokenizer = AutoModelForCausalLM.from_pretrained(TINY_DIR), AutoTokenizer.from_pretrained(TINY_DIR)
        model = iapt.attach(lm, {"name": "mine"}, tokenizer=tokenizer)
        assert model.method is not None
        trained = sum(parameter.numel() for parameter in model.method.trainable().values())
        assert trained == METHODS["mine"].count(example.MineConfig(name="mine"), model.backbone)
    finally:
        METHODS.pop("mine", None)
        sys.modules.pop("example_of_a_method", None)

"""mkdocs makes a site of docs/ without a warning, and every link of its pages leads somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
from support import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("site")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(directory)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return directory


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, str]:
    return {
        path: path.read_text(encoding="utf-8") for path in site.rglob("*.html") if path.name != "404.html"
    }


def test_every_page_is_there(site: Path, pages: dict[Path, str]) -> None:
    for page in (ROOT / "docs").glob("*.md"):
        assert site / page.with_suffix(".html").name in pages
    assert site / "clone" / "CHANGELOG.html" in pages
    assert not list(site.rglob("*.py"))


def test_links_in_the_site_lead_somewhere(site: Path, pages: dict[Path, str]) -> None:
    anchors = {page: set(re.findall(r'\bid="([^"]+)"', text)) for page, text in pages.items()}
    for page, text in pages.items():
        for link in re.findall(r'(?:href|src)="([^"]+)"', text):
            path, _, anchor = unquote(link).partition("#")
            if re.match(r"[a-z]+:", path) or (not path and not anchor):
                continue
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.relative_to(site)}: {link}"
            # Bootstrap's own controls have no place to go to.
            if anchor and target in anchors and not anchor.startswith(("mkdocs_", "navbar")):
                assert anchor in anchors[target], f"{page.relative_to(site)}: {link}"


def test_no_markdown_is_left_in_pages(site: Path, pages: dict[Path, str]) -> None:
    """What mkdocs reads otherwise than GitHub: blocks of code in lists, pipes in code in tables."""
    for page, text in pages.items():
        prose = re.sub(r"<pre>.*?</pre>", "", text, flags=re.DOTALL)
        for pattern in (r"```", r"<code>\w+\n", r"<code>[^<]*\\\|", r"<p>[^<]*\n[-*] ", r"<p>\|"):
            found = re.search(rf".*{pattern}.*", prose)
            assert not found, f"{page.relative_to(site)}: {found[0].strip()[:200]}"

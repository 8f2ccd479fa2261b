"""Chinese and English prose from Debian's documentation packages, as JSONL: corpora and held-out text.

Each page is split into sections; a section is a record, its category the package. Sections that are not
translated (fewer than a third of the characters of the Chinese pages are Chinese) and sections that occur
before are left out. Held-out text is chosen by page: no page is in both.

Licences, as the packages state them: debian-handbook GPL-2+ or CC-BY-SA-3.0; debian-reference and maint-guide
GPL-2+; gimp-help GFDL-1.2+; kicad-doc GPL-3+ or CC-BY-3.0+.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

# language -> (package, where its pages are)
PAGES = {
    "zh": [
        ("debian-handbook", "usr/share/doc/debian-handbook/html/zh-CN/*.html*"),
        ("debian-reference-zh-cn", "usr/share/debian-reference/*.zh-cn.html*"),
        ("maint-guide-zh-cn", "usr/share/doc/maint-guide-zh-cn/html/*.html*"),
        ("gimp-help-zh-cn", "usr/share/gimp/2.0/help/zh_CN/*.html*"),
        ("kicad-doc-zh", "usr/share/doc/kicad/help/zh/**/*.html*"),
    ],
    "en": [
        ("debian-handbook", "usr/share/doc/debian-handbook/html/en-US/*.html*"),
        ("debian-reference-en", "usr/share/debian-reference/*.en.html*"),
        ("maint-guide", "usr/share/doc/maint-guide/html/*.html*"),
        ("gimp-help-en", "usr/share/gimp/2.0/help/en/*.html*"),
        ("kicad-doc-en", "usr/share/doc/kicad/help/en/**/*.html*"),
    ],
}
PACKAGES = sorted({package for pages in PAGES.values() for package, _ in pages})
BLOCKS = {"p", "div", "li", "dt", "dd", "td", "th", "tr", "pre", "table", "ul", "ol", "dl", "br", "section"}
HEADINGS = {"h1", "h2", "h3"}
SKIPPED = {"script", "style", "head", "nav", "svg"}
CHINESE = re.compile(r"[\u4e00-\u9fff]")
MIN_CHARACTERS, MAX_CHARACTERS = 60, 4000


class _Sections(HTMLParser):
    """The text of a page, cut at its headings."""

    def __init__(self) -> None:
        super().__init__()
        self.sections: list[list[str]] = [[]]
        self.skipping = 0

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag in SKIPPED:
            self.skipping += 1
        elif tag in HEADINGS:
            self.sections.append([])
        elif tag in BLOCKS:
            self.sections[-1].append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in SKIPPED:
            self.skipping = max(0, self.skipping - 1)
        elif tag in BLOCKS | HEADINGS:
            self.sections[-1].append("\n")

    def handle_data(self, data: str) -> None:
        if not self.skipping:
            self.sections[-1].append(re.sub(r"\s+", " ", data))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--packages_dir", type=Path, help="the .deb files; missing ones come by apt")
    source.add_argument(
        "--records_dir", type=Path, help="*.jsonl in place of the packages; a text is a page then"
    )
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="gets LANGUAGE/ and held_out/LANGUAGE/"
    )
    parser.add_argument("--held_out_share", type=float, default=0.05, help="share of the pages, 0 to 1")
    args = parser.parse_args()
    if args.packages_dir:
        fetch(args.packages_dir)
    for language in PAGES:
        records: dict[bool, list[dict[str, str]]] = {False: [], True: []}
        seen: set[str] = set()
        found = (
            read_records(args.packages_dir, language)
            if args.packages_dir
            else read_jsonl(args.records_dir, language)
        )
        for page, record in found:
            if record["target"] not in seen:
                seen.add(record["target"])
                records[is_held_out(page, args.held_out_share)].append(record)
        for held_out, part in records.items():
            directory = args.output_dir / ("held_out" if held_out else ".") / language
            directory.mkdir(parents=True, exist_ok=True)
            with open(directory / "sections.jsonl", "w", encoding="utf-8") as file:
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in part)
            size = sum(len(record["target"].encode()) for record in part)
            print(f"{directory}: {len(part):,} sections, {size:,} bytes")


def fetch(directory: Path) -> None:
    """Downloads the packages that are not there yet."""
    directory.mkdir(parents=True, exist_ok=True)
    missing = [package for package in PACKAGES if not list(directory.glob(f"{package}_*.deb"))]
    if missing:
        subprocess.run(["apt-get", "download", *missing], cwd=directory, check=True)


def read_records(packages_dir: Path, language: str) -> Iterator[tuple[str, dict[str, str]]]:
    """(name of the page, record) in a fixed order."""
    for package, pattern in PAGES[language]:
        (archive,) = packages_dir.glob(f"{package}_*.deb")
        with tempfile.TemporaryDirectory() as root:
            subprocess.run(["dpkg-deb", "--extract", str(archive), root], check=True)
            for path in sorted(Path(root).glob(pattern)):
                for text in read_sections(path):
                    if language == "en" or len(CHINESE.findall(text)) * 3 >= len(text):
                        yield (
                            f"{package}/{path.name}",
                            {"source": "", "target": text, "category": package.partition("-")[0]},
                        )


def read_jsonl(directory: Path, language: str) -> Iterator[tuple[str, dict[str, str]]]:
    """As `read_records`, of records that are there; those of a language are found by their characters."""
    for path in sorted(directory.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if bool(CHINESE.search(record["target"])) == (language == "zh"):
                yield record["target"], record


def read_sections(path: Path) -> Iterator[str]:
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    parser = _Sections()
    parser.feed(content.decode("utf-8", "replace"))
    for pieces in parser.sections:
        lines = [line.strip() for line in "".join(pieces).split("\n")]
        text = ""
        for line in filter(None, lines):
            if len(text) + len(line) > MAX_CHARACTERS and len(text) >= MIN_CHARACTERS:
                yield text
                text = ""
            text += ("\n" if text else "") + line
        if len(text) >= MIN_CHARACTERS:
            yield text


def is_held_out(page: str, share: float) -> bool:
    """By a hash of the page's name without its language, so that translations of a page stay together."""
    name = re.sub(r"\.(zh-cn|en)\b|-(zh-cn|zh|en)\b", "", page)
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") < share * 2**64


if __name__ == "__main__":
    main()

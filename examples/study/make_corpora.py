"""Prose of several languages from Debian's documentation packages, as JSONL: corpora and held-out text.

Each page is split into sections; a section is a record, its category the package. Sections that are not
translated (fewer than a third of the characters of the Chinese or Russian pages are of that script; German
pages with more English than German words of grammar) and sections that occur before are left out. Held-out
text is chosen by page: no page is in both.

Licences, as the packages state them: debian-handbook GPL-2+ or CC-BY-SA-3.0; debian-reference, maint-guide,
developers-reference, debian-policy and git-doc GPL-2 or later; gimp-help GFDL-1.2+; kicad-doc GPL-3+ or
CC-BY-3.0+; apache2-doc Apache-2.0.
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
    # More English, for a base model that is trained from nothing.
    "more_en": [
        ("developers-reference", "usr/share/developers-reference/*.html*"),
        ("debian-policy", "usr/share/doc/debian-policy/**/*.html*"),
        ("git-doc", "usr/share/doc/git-doc/**/*.html*"),
        ("apache2-doc", "usr/share/doc/apache2-doc/manual/en/**/*.html*"),
    ],
    "de": [
        ("debian-handbook", "usr/share/doc/debian-handbook/html/de-DE/*.html*"),
        ("debian-reference-de", "usr/share/debian-reference/*.de.html*"),
        ("maint-guide-de", "usr/share/doc/maint-guide-de/html/*.html*"),
        ("gimp-help-de", "usr/share/gimp/2.0/help/de/*.html*"),
        ("kicad-doc-de", "usr/share/doc/kicad/help/de/**/*.html*"),
    ],
    "ru": [
        ("debian-handbook", "usr/share/doc/debian-handbook/html/ru-RU/*.html*"),
        ("developers-reference-ru", "usr/share/developers-reference/ru/*.html*"),
        ("maint-guide-ru", "usr/share/doc/maint-guide-ru/html/*.html*"),
        ("gimp-help-ru", "usr/share/gimp/2.0/help/ru/*.html*"),
        ("kicad-doc-ru", "usr/share/doc/kicad/help/ru/**/*.html*"),
    ],
}
BLOCKS = {"p", "div", "li", "dt", "dd", "td", "th", "tr", "pre", "table", "ul", "ol", "dl", "br", "section"}
HEADINGS = {"h1", "h2", "h3"}
SKIPPED = {"script", "style", "head", "nav", "svg"}
SCRIPTS = {"zh": re.compile(r"[\u4e00-\u9fff]"), "ru": re.compile(r"[\u0400-\u04ff]")}
GERMAN = re.compile(r"\b(?:der|die|das|und|ist|ein|eine|den|mit|zu|wird)\b", re.IGNORECASE)
ENGLISH = re.compile(r"\b(?:the|and|is|of|a|to|with|this|be)\b", re.IGNORECASE)
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
    parser.add_argument(
        "--languages", nargs="+", choices=tuple(PAGES), default=["zh", "en"], help="default: zh en"
    )
    args = parser.parse_args()
    if args.packages_dir:
        fetch(args.packages_dir, args.languages)
    for language in args.languages:
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


def fetch(directory: Path, languages: list[str]) -> None:
    """Downloads the packages that are not there yet."""
    directory.mkdir(parents=True, exist_ok=True)
    packages = sorted({package for language in languages for package, _ in PAGES[language]})
    missing = [package for package in packages if not list(directory.glob(f"{package}_*.deb"))]
    if missing:
        subprocess.run(["apt-get", "download", *missing], cwd=directory, check=True)


def read_records(packages_dir: Path, language: str) -> Iterator[tuple[str, dict[str, str]]]:
    """(name of the page, record) in a fixed order."""
    for package, pattern in PAGES[language]:
        (archive,) = packages_dir.glob(f"{package}_*.deb")
        with tempfile.TemporaryDirectory() as root:
            subprocess.run(["dpkg-deb", "--extract", str(archive), root], check=True)
            for path in sorted(filter(Path.is_file, Path(root).glob(pattern))):
                for text in read_sections(path):
                    if is_translated(text, language):
                        yield (
                            f"{package}/{path.name}",
                            {"source": "", "target": text, "category": package.partition("-")[0]},
                        )


def is_translated(text: str, language: str) -> bool:
    """Whether a section of a language's pages is in that language; of English pages always."""
    if language in SCRIPTS:
        return len(SCRIPTS[language].findall(text)) * 3 >= len(text)
    return language != "de" or len(GERMAN.findall(text)) > len(ENGLISH.findall(text))


def read_jsonl(directory: Path, language: str) -> Iterator[tuple[str, dict[str, str]]]:
    """As `read_records`, of records that are there; those of a language are found by their characters."""
    for path in sorted(directory.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if bool(SCRIPTS["zh"].search(record["target"])) == (language == "zh"):
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
    name = re.sub(r"\.(zh-cn|en|de|ru)\b|-(zh-cn|zh|en|de|ru)\b", "", page)
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") < share * 2**64


if __name__ == "__main__":
    main()

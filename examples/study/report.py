"""Tables and pictures of a study, from what run_study.py left, or from the figures of an earlier report.

Writes study.json and the pictures. The tables go to a Markdown page, whose other text is left alone, between
lines like these; pictures are expected beside it:

    <!-- table: results -->
    <!-- end -->
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from colossal_llama.utils.arguments import ArgumentParser
from colossal_llama.utils.console import log
from colossal_llama.utils.errors import UserError, run_command
from colossal_llama.utils.files import read_json_object, write_json, write_text_atomically
from colossal_llama.utils.settings import add_settings, flag, parse_settings

JSON_FILE = "study.json"
TABLE = re.compile(r"(<!-- table: (\w+) -->\n)(.*?)(<!-- end -->)", flags=re.DOTALL)


@dataclass(frozen=True)
class ReportSettings:
    """Where the figures are, and where what is made of them goes."""

    work_dir: Path | None = flag(None, "work directory of run_study.py", type=Path)
    study: Path | None = flag(None, "a study.json, in place of --work_dir", type=Path)
    output_dir: Path = flag(None, "directory for the pictures", type=Path, required=True)
    json_file: Path | None = flag(
        None, "where the figures go (default: study.json in --output_dir)", type=Path
    )
    page: Path | None = flag(None, "Markdown page whose tables are refreshed", type=Path)


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="report.py", description=__doc__)
    add_settings(parser, ReportSettings, check=_find_problems)
    return parser


def _find_problems(settings: ReportSettings) -> list[str]:
    problems = []
    if (settings.work_dir is None) == (settings.study is None):
        problems.append("give either --work_dir or --study")
    if settings.page is not None and not settings.page.is_file():
        problems.append(f"--page {settings.page}: no such file")
    return problems


def refresh(page: str, tables: dict[str, str]) -> str:
    """The page with its tables in place of what was between the markers.

    Raises:
        UserError: the page asks for a table that there is not.
    """
    if unknown := {name for _, name, _, _ in TABLE.findall(page)} - tables.keys():
        raise UserError(f"no such table: {', '.join(sorted(unknown))}; there are {', '.join(tables)}")
    return TABLE.sub(lambda found: f"{found[1]}{tables[found[2]]}\n{found[4]}", page)


def main() -> None:
    settings = parse_settings(build_parser(), ReportSettings)

    from drawings import draw_all
    from tables import make_tables

    settings.output_dir.mkdir(parents=True, exist_ok=True)
    if settings.work_dir is None:
        study = read_json_object(settings.study)
    else:
        from collect import collect

        study = collect(settings.work_dir.resolve())
        file = settings.json_file or settings.output_dir / JSON_FILE
        write_json(file, study)
        log(f"Figures: {file}")
    for path in draw_all(study, settings.output_dir):
        log(f"Picture: {path}")
    if settings.page is not None:
        page = settings.page.read_text(encoding="utf-8")
        write_text_atomically(settings.page, refresh(page, make_tables(study)))
        log(f"Page: {settings.page}")


if __name__ == "__main__":
    run_command(main)

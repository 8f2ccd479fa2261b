"""Makes a results file from what the benchmarks handed in: a table, what an earlier file had, then their own
output.
"""

from __future__ import annotations

import datetime
import json
import re
import shutil
from pathlib import Path
from typing import Any

from figures import format_value, installed_versions, this_machine

from colossal_llama.utils.arguments import ArgumentParser, existing_directory
from colossal_llama.utils.console import log
from colossal_llama.utils.errors import run_command
from colossal_llama.utils.files import write_text_atomically

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "colossalai", "transformers", "tokenizers", "datasets", "numpy", "pyarrow", "accelerate")
NUMBER = re.compile(r"([\d,.]+)((?: [^ (|]+)?)")
OPTIONAL = ("trl", "liger-kernel", "flash-attn")


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="write_results.py", description=__doc__)
    parser.add_argument(
        "--work_dir",
        type=existing_directory,
        required=True,
        help="directory with records.jsonl, scaling.png, and each script's NAME.txt, .status and .seconds",
    )
    parser.add_argument(
        "--output_file", type=Path, help="default: benchmarks/results/<date>-<machine kind>.md"
    )
    parser.add_argument(
        "--earlier_file",
        type=Path,
        help="results to put beside these (default: the newest others of this kind of machine)",
    )
    parser.add_flag("--toy", default=False, help="the figures are of toy shapes and mean nothing")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    machine = this_machine()
    output = args.output_file
    if output is None:
        name = f"{datetime.date.today().isoformat()}-{machine.kind}.md"
        output = ROOT / "benchmarks" / "results" / name
    records_file = args.work_dir / "records.jsonl"
    records = []
    if records_file.is_file():
        records = [json.loads(line) for line in records_file.read_text(encoding="utf-8").splitlines()]
    device = machine.gpu or "no GPU"
    lines = [
        f"# {machine.cores} CPU cores, {machine.memory_gb} GB, {device}, {datetime.date.today().isoformat()}",
        "",
        f"Written by `benchmarks/run.sh{' --toy' if args.toy else ''}`. {_versions()}.",
        "",
        *_introduction(args.toy, machine.gpu),
        "",
        "| what | command | measured | promised | met |",
        "| --- | --- | --- | --- | --- |",
        *(_row(record, args.toy) for record in records),
    ]
    earlier = args.earlier_file or _find_earlier(output, machine.kind)
    if earlier is not None and not args.toy:
        lines += ["", *_then_and_now(earlier, records)]
    output.parent.mkdir(parents=True, exist_ok=True)
    picture = args.work_dir / "scaling.png"
    if picture.is_file():
        shutil.copyfile(picture, output.with_suffix(".png"))
        lines += ["", f"![Cost as the work grows]({output.with_suffix('.png').name})"]
    for status in sorted(args.work_dir.glob("*.status"), key=lambda path: path.stat().st_mtime_ns):
        lines += ["", *_raw_output(status)]
    write_text_atomically(output, "\n".join(lines) + "\n")
    log(f"Results: {output}")


def _versions() -> str:
    return ", ".join(f"{name} {value}" for name, value in installed_versions(*PACKAGES, *OPTIONAL).items())


def _introduction(toy: bool, gpu: str | None) -> list[str]:
    lines = ["Sides of a comparison take turns in one run: their ratios count, single seconds less."]
    if toy:
        lines = ["**Toy shapes: these figures show that the scripts run, and nothing else.**"]
    if gpu is None:
        lines.append("This machine has no GPU: no GPU figure exists.")
    lines.append(
        "Not measured: the original suite's data preparation (25 × is promised); it is not among the "
        "packages that can be installed beside this one."
    )
    return lines


def _row(record: dict[str, Any], toy: bool) -> str:
    met = {True: "yes", False: "**no**", None: ""}[record.get("met")]
    if toy and met:
        met = "toy"
    cells = [record["title"], f"`{record['command']}`", format_value(record), record.get("promised", ""), met]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _find_earlier(output: Path, kind: str) -> Path | None:
    found = sorted((ROOT / "benchmarks" / "results").glob(f"*_{kind}.md"))  # their names begin with the date
    return next((path for path in reversed(found) if path.name != output.name), None)


def _then_and_now(earlier: Path, records: list[dict[str, Any]]) -> list[str]:
    """The figures that are in both, with the ratio of their values."""
    then = {}
    _, _, table = earlier.read_text(encoding="utf-8").partition("| --- |")
    for line in table.partition("\n\n")[0].splitlines()[1:]:
        cells = [cell.strip() for cell in line.split(" | ")]
        then[_comparable(cells[0].removeprefix("| ").replace("\\|", "|"))] = cells[2]
    rows = []
    for record in records:
        before = NUMBER.match(then.get(_comparable(record["title"]), ""))
        if before and record["value"] is not None and before[2].strip() == record["unit"].split(" ")[0]:
            value = float(before[1].replace(",", ""))
            ratio = f"{record['value'] / value:.3f}" if value else ""
            now = format_value({**record, "count": 0, "note": ""})
            rows.append(f"| {record['title']} | {before[0].strip()} | {now} | {ratio} |")
    return [
        "## Then and now",
        "",
        f"Then is [{earlier.name}]({earlier.name}). Seconds of another day or machine differ by themselves: "
        "ratios count.",
        "",
        "| what | then | now | now / then |",
        "| --- | ---: | ---: | ---: |",
        *rows,
    ]


def _comparable(title: str) -> str:
    """Titles of before there was a choice of engines name none."""
    return title.replace(", hf:", ":")


def _raw_output(status: Path) -> list[str]:
    code, text = status.read_text().strip(), status.with_suffix(".txt").read_text(encoding="utf-8")
    seconds = status.with_suffix(".seconds").read_text().strip()
    ending = "" if code == "0" else f", **failed with exit code {code}**"
    return [f"## {status.stem}, {seconds} s{ending}", "", "```text", text.strip(), "```"]


if __name__ == "__main__":
    run_command(main)

"""Measures the starts of new rows on a model: step-0 tables, and held-out curves of short trainings.

A call measures one case, a base model with an extended vocabulary and text; the results file has all cases of
the work directory. A call that was killed goes on where it was: what is done is not done again.

starts_of_new_rows.sh makes the cases of docs/vocabulary.md, from corpora and base models on.
"""

from __future__ import annotations

import datetime
import json
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from figures import installed_versions, this_machine

from colossal_llama.model.initializations import INITIALIZATIONS
from colossal_llama.utils.arguments import ArgumentParser, directory_list, existing_directory, positive_int
from colossal_llama.utils.console import log
from colossal_llama.utils.errors import UserError, run_command
from colossal_llama.utils.files import write_json, write_text_atomically

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "colossalai", "transformers", "tokenizers")
SETS = ("new", "old")
SHOWN = [("mean", way, calibrated) for way in ("mean", "half") for calibrated in (False, True)]
CASE_FILE, CURVES_FILE = "case.json", "curves.json"
TABLE_FILE = Path("table") / "initializations.json"


@dataclass(frozen=True)
class Way:
    """A start that is trained from; its text is INPUT+OUTPUT, with +calibrated behind it or not."""

    init_input: str
    init_output: str
    calibrated: bool

    @classmethod
    def parse(cls, text: str) -> Way:
        words = text.strip().split("+")
        calibrated = words[-1] == "calibrated"
        ways = words[: len(words) - calibrated]
        if len(ways) != 2 or not set(ways) <= set(INITIALIZATIONS):
            raise ValueError("INPUT+OUTPUT or INPUT+OUTPUT+calibrated, of " + ", ".join(INITIALIZATIONS))
        return cls(*ways, calibrated)

    def __str__(self) -> str:
        return "+".join([self.init_input, self.init_output, *(["calibrated"] if self.calibrated else [])])


def _ways(text: str) -> list[Way]:
    return [Way.parse(part) for part in text.split(",") if part.strip()]


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="starts_of_new_rows.py", description=__doc__)
    parser.add_argument("--work_dir", type=Path, required=True, help="directory for what is made on the way")
    parser.add_argument("--output_file", type=Path, help="default: benchmarks/results/<date>_starts.md")
    case = parser.add_argument_group("the case; without --name, only the results file is written")
    case.add_argument("--name", help="of the case, in tables")
    case.add_argument("--base", type=existing_directory, help="base model with its tokenizer")
    case.add_argument("--tokenizer", type=existing_directory, help="extended tokenizer")
    case.add_argument("--corpus", type=existing_directory, help="JSONL: frequencies, and what is trained on")
    case.add_argument("--held_out", type=directory_list, help="JSONL directories NEW,OLD: two sets")
    case.add_argument(
        "--held_out_bytes",
        type=_numbers,
        default=[40_000, 40_000],
        help="NEW,OLD: bytes of the two sets that are taken, as sections at equal distances",
    )
    case.add_argument("--num_positions", type=positive_int, default=4096, help="as of measure_init.py")
    case.add_argument("--dtype", default="source", help="as of measure_init.py")
    case.add_argument("--init_input", default=",".join(INITIALIZATIONS), help="as of measure_init.py")
    case.add_argument("--init_output", default=",".join(INITIALIZATIONS), help="as of measure_init.py")
    curves = parser.add_argument_group("trainings")
    curves.add_argument(
        "--starts", type=_ways, default=[], help="comma list of INPUT+OUTPUT[+calibrated]; none: no training"
    )
    curves.add_argument("--steps", type=_numbers, default=[0, 25, 50, 100], help="where curves are reported")
    curves.add_argument("--seeds", type=_numbers, default=[1, 2], help="comma list")
    curves.add_argument("--lr", type=float, default=1e-3, help="constant after 10 steps of warm-up")
    curves.add_argument("--batch_size", type=positive_int, default=2, help="rows of a step")
    curves.add_argument("--max_length", type=positive_int, default=512, help="tokens of a row")
    curves.add_argument("--mixed_precision", default="bf16", help="as of train.py")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    output = args.output_file
    if output is None:
        output = ROOT / "benchmarks" / "results" / f"{datetime.date.today().isoformat()}_starts.md"
    args.work_dir.mkdir(parents=True, exist_ok=True)
    if args.name is not None:
        missing = [name for name in ("base", "tokenizer", "corpus", "held_out") if not getattr(args, name)]
        if missing:
            raise UserError(f"--name {args.name}: needs " + ", ".join(f"--{name}" for name in missing))
        if len(args.held_out) != 2 or len(args.held_out_bytes) != 2:
            raise UserError("--held_out, --held_out_bytes: two values each, NEW,OLD")
        measure(args, args.work_dir / args.name)
    cases = list(read_cases(args.work_dir))
    text = as_markdown(cases)
    write_text_atomically(output.with_suffix(".json"), json.dumps(cases) + "\n")
    write_text_atomically(output, text)
    log(text)
    log(f"Written: {output}")


def measure(args: Any, work: Path) -> None:
    """What a case still lacks."""
    held_out = [work / "held_out" / name for name in SETS]
    for source, target, size in zip(args.held_out, held_out, args.held_out_bytes, strict=True):
        if not (target / "sections.jsonl").exists():
            take_sections(source, target, size)
    command = " ".join(["python benchmarks/starts_of_new_rows.py", *map(shlex.quote, sys.argv[1:])])
    write_json(work / CASE_FILE, {"name": args.name, "command": command, "steps": args.steps})
    if not (work / TABLE_FILE).exists():
        run(
            "colossal_llama/model/measure_init.py",
            source_model_and_tokenizer_path=args.base,
            target_tokenizer_path=args.tokenizer,
            data_input_dirs=args.corpus,
            held_out=",".join(map(str, held_out)),
            output_dir=work / TABLE_FILE.parent,
            num_positions=args.num_positions,
            dtype=args.dtype,
            init_input=args.init_input,
            init_output=args.init_output,
        )
    for seed in args.seeds:
        for way in args.starts:
            train(args, way, seed, work)


def take_sections(source: Path, target: Path, size: int) -> None:
    """Records of a directory, at equal distances, of about `size` bytes in all."""
    lines = [line for path in sorted(source.glob("*.jsonl")) for line in path.read_bytes().splitlines()]
    sizes = [len(json.loads(line)["target"].encode()) for line in lines]
    step = max(1, round(sum(sizes) / size))
    target.mkdir(parents=True, exist_ok=True)
    (target / "sections.jsonl").write_bytes(b"".join(line + b"\n" for line in lines[::step]))


def train(args: Any, way: Way, seed: int, work: Path) -> None:
    """Trains from a start, and keeps the bits per byte of each evaluation in curves.json."""
    curves = read_json(work / CURVES_FILE, [])
    if any(curve["start"] == str(way) and curve["seed"] == seed for curve in curves):
        return
    model = work / "models" / str(way)
    if not (model / "config.json").exists():
        run(
            f"colossal_llama/model/{'calibrate_output' if way.calibrated else 'init_model'}.py",
            source_model_and_tokenizer_path=args.base,
            target_tokenizer_path=args.tokenizer,
            target_model_path=model,
            init_input=way.init_input,
            init_output=way.init_output,
            **(
                {"data_input_dirs": args.corpus, "num_positions": args.num_positions}
                if way.calibrated
                else {}
            ),
        )
    for name, source in (("corpus", args.corpus), *((name, work / "held_out" / name) for name in SETS)):
        if not (work / "data" / name / "arrow").exists():
            run(
                "prepare_pretrain_dataset.py",
                data_input_dirs=source,
                tokenizer_dir=model,
                data_output_dirs=work / "data" / name,
                max_length=args.max_length,
                num_spliced_dataset_bins=1,
            )
    directory = work / "runs" / f"{way}_{seed}"
    shutil.rmtree(directory, ignore_errors=True)
    run(
        "train.py",
        pretrained=model,
        dataset=work / "data" / "corpus" / "arrow",
        eval_dataset=[work / "data" / name / "arrow" for name in SETS],
        eval_interval=25,
        eval_at_start=True,
        plugin="zero2",
        mixed_precision=args.mixed_precision,
        batch_size=args.batch_size,
        accumulation_steps=1,
        max_length=args.max_length,
        max_steps=max(args.steps),
        num_epochs=100,
        lr=args.lr,
        lr_schedule="constant",
        warmup_steps=10,
        seed=seed,
        num_workers=0,
        save_interval=0,
        skip_save_each_epoch=True,
        save_dir=directory,
        tensorboard_dir=directory / "logs",
        config_file=directory / "config.json",
    )
    metrics = [json.loads(line) for line in (directory / "logs" / "metrics.jsonl").read_text().splitlines()]
    bits = {
        str(record["step"]): {name: record[f"eval_bits_per_byte/{name}"] for name in SETS}
        for record in metrics
        if f"eval_bits_per_byte/{SETS[0]}" in record
    }
    tokens = args.batch_size * args.max_length
    write_json(
        work / CURVES_FILE,
        [*curves, {"start": str(way), "seed": seed, "tokens": tokens, "lr": args.lr, "bits_per_byte": bits}],
    )
    shutil.rmtree(directory)


def run(script: str, **flags: Any) -> None:
    words = [sys.executable, str(ROOT / script)]
    for name, value in flags.items():
        words.append(f"--{name}")
        if value is not True:
            words += map(str, value if isinstance(value, list) else [value])
    log(" ".join(words[1:]))
    subprocess.run(words, check=True)


def read_json(path: Path, default: Any) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else default


def read_cases(work_dir: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(work_dir.glob(f"*/{CASE_FILE}")):
        content = read_json(path, {})
        table = read_json(path.parent / TABLE_FILE, None)
        if table is not None:
            yield {**content, "table": table, "curves": read_json(path.parent / CURVES_FILE, [])}


def as_markdown(cases: list[dict[str, Any]]) -> str:
    machine = this_machine()
    lines = [
        f"# Starts of new rows, {datetime.date.today().isoformat()}",
        "",
        f"Written by `benchmarks/starts_of_new_rows.py` on {machine.cores} CPU cores. "
        + ", ".join(f"{name} {version}" for name, version in installed_versions(*PACKAGES).items())
        + ".",
        "",
        "Bits per byte of held-out text; lower is better. New text is what the vocabulary was extended for, "
        "old text is that of the base model.",
    ]
    for case in cases:
        lines += [
            "",
            f"## {case['name']}",
            "",
            f"```bash\n{case['command']}\n```",
            "",
            *_table(case["table"]),
        ]
        if case["curves"]:
            lines += ["", *_curves(case["curves"], case["steps"])]
    return "\n".join(lines) + "\n"


def _table(table: dict[str, Any]) -> Iterator[str]:
    """Input ways down, output ways across; plain / calibrated in each cell."""
    results = table["results"]
    bits = {
        (start["init_input"], start["init_output"], start["calibrated"]): start["bits_per_byte"]
        for start in results
    }
    inputs = list(dict.fromkeys(start["init_input"] for start in results))
    outputs = list(dict.fromkeys(start["init_output"] for start in results))
    best = min(results, key=lambda start: start["bits_per_byte"]["new"])
    yield (
        f"Before training; the base with its own tokenizer: new {table['base']['new']:.3f}, old "
        f"{table['base']['old']:.3f}. New text, as made / calibrated:"
    )
    yield ""
    yield _row(["input rows \\ output rows", *outputs])
    yield _row(["---"] * (len(outputs) + 1))
    for init_input in inputs:
        cells = []
        for init_output in outputs:
            pair = [f"{bits[init_input, init_output, calibrated]['new']:.3f}" for calibrated in (False, True)]
            if (best["init_input"], best["init_output"]) == (init_input, init_output):
                pair[best["calibrated"]] = f"**{pair[best['calibrated']]}**"
            cells.append(" / ".join(pair))
        yield _row([init_input, *cells])
    yield ""
    gains = [bits[key[0], key[1], True]["new"] - bits[key]["new"] for key in bits if not key[2]]
    worse = sum(gain >= 0 for gain in gains)
    yield (
        f"Calibration changes these by {min(gains):+.3f} to {max(gains):+.3f} (median "
        f"{statistics.median(gains):+.3f}; worse in {worse} of {len(gains)}). Changes against mean rows for "
        "both, with 95 % intervals over sections:"
    )
    yield ""
    yield _row(["input rows", "output rows", "calibrated", "new", "change", "old", "change"])
    yield _row(["---"] * 7)
    for start in results:
        key = (start["init_input"], start["init_output"], start["calibrated"])
        if start is best or key in SHOWN:
            cells = [cell for name in SETS for cell in (f"{bits[key][name]:.3f}", _change(start, name))]
            yield _row([*key[:2], "yes" if key[2] else "no", *cells])


def _change(start: dict[str, Any], name: str) -> str:
    change = start["change"][name]
    return (
        "" if not change or change == [0.0] * 3 else f"{change[0]:+.3f} [{change[1]:+.3f}, {change[2]:+.3f}]"
    )


def _curves(curves: list[dict[str, Any]], steps: list[int]) -> Iterator[str]:
    seeds = sorted({curve["seed"] for curve in curves})
    yield (
        f"After steps of {curves[0]['tokens']:,} tokens, lr {curves[0]['lr']:g}, same data; mean of seeds "
        f"{', '.join(map(str, seeds))}, and in brackets how far they are apart; new text, then old text:"
    )
    yield ""
    yield _row(["start", *(f"{name}, {step}" for name in SETS for step in steps)])
    yield _row(["---"] * (1 + len(SETS) * len(steps)))
    for start in dict.fromkeys(curve["start"] for curve in curves):
        of_start = [curve["bits_per_byte"] for curve in curves if curve["start"] == start]
        cells = []
        for name in SETS:
            for step in steps:
                values = [bits[str(step)][name] for bits in of_start if str(step) in bits]
                spread = f" ({max(values) - min(values):.3f})" if len(values) > 1 and step else ""
                cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "")
        yield _row([start, *cells])


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    run_command(main)

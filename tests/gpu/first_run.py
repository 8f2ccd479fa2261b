"""The first quarter of an hour on a GPU: `run.sh` starts this.

python tests/gpu/first_run.py [--toy] [--output FILE] [--only PART …] [--seconds N] [--list]
"""

from __future__ import annotations

import argparse
import datetime
import shutil
import sys
import tempfile
from pathlib import Path

from bench import Bench
from parts import parts


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tests/gpu/run.sh", description=__doc__.split("\n")[0])
    parser.add_argument("--toy", action="store_true", help="tiny shapes on the CPU: shows that it runs")
    parser.add_argument("--output", type=Path, help="results file (default: gpu_results_<date>.md here)")
    names = [part.name for part in parts()]
    parser.add_argument("--only", nargs="+", choices=names, metavar="PART", help=f"of {', '.join(names)}")
    parser.add_argument("--seconds", type=float, default=1800, help="for everything (default: 1800)")
    parser.add_argument("--list", action="store_true", help="names the parts and their time, runs nothing")
    return parser


def main() -> int:
    args = build_parser().parse_args()
    chosen = [part for part in parts() if not args.only or part.name in args.only]
    if args.list:
        for part in chosen:
            print(f"{part.name}: {part.why} (at most {part.seconds:.0f} s)")
        return 0
    output = args.output or Path(f"gpu_results_{datetime.date.today().isoformat()}.md")
    work = Path(tempfile.mkdtemp(prefix="gpu-first-run-"))
    try:
        bench = Bench(work, output.absolute(), args.toy)
        bench.remove_nvcc()
        right = bench.run_parts(chosen, args.seconds)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"Results: {output}")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())

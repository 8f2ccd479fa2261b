"""Runs the scripts of two commits in the same way on this machine, and compares all that they write.

    python tests/golden/compare_commits.py OLD [NEW] [--only PATTERN] [--list]

OLD and NEW are commits; NEW is the working tree when not given. The inputs, the environment, the libraries
and the names of directories are the same for both, so floats are compared bit for bit. Pictures, times,
speeds and library versions are left out. A command with a flag that OLD does not know is skipped. The exit
code is 1 when anything differs. A full run takes about a quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

sys.path.extend(str(Path(__file__).resolve().parents[1] / part) for part in ("", "distributed"))

from golden.commands import ROOT, Case, make_working_directory, preparation_cases, script_environment
from golden.contents import compare_directories
from golden.float_commands import float_cases, make_models


@dataclass
class Result:
    """What a command said, without the places and times that no output depends on."""

    returncode: int
    stdout: str
    stderr: str


@dataclass
class Side:
    """A commit's code, and where its outputs are while it does not run."""

    name: str
    code: Path
    outputs: Path

    def run(self, case: Case, work: Path) -> list[Result]:
        """Runs the commands of a case in `work`, the same path for both sides."""
        self.outputs.rename(work)
        try:
            results = []
            for command in case.commands:
                (work / case.name).parent.mkdir(parents=True, exist_ok=True)
                finished = command.run(work, script_environment(self.code), self.code)
                texts = (
                    text.replace(str(self.code), "<clone>") for text in (finished.stdout, finished.stderr)
                )
                results.append(Result(finished.returncode, *texts))
                if finished.returncode and not command.fails:
                    break
            return results
        finally:
            work.rename(self.outputs)


def unknown_flags(results: list[Result]) -> str | None:
    """The flags that a script refused because it does not know them."""
    found = re.search(r"unknown arguments: .*", results[-1].stderr)
    return found.group() if found and results[-1].returncode == 2 else None


def compare_results(case: Case, old: list[Result], new: list[Result]) -> str | None:
    """The first difference in exit codes and in the streams that are compared."""
    for command, a, b in zip(case.commands, old, new, strict=False):
        if a.returncode != b.returncode:
            worse = a if a.returncode else b
            return f"exit code {a.returncode} in old, {b.returncode} in new: {_what_failed(worse.stderr)}"
        if bool(a.returncode) != command.fails:
            return f"exit code {a.returncode} on both sides: {_what_failed(a.stderr)}"
        for stream in command.streams:
            lines = [getattr(result, stream).splitlines() for result in (a, b)]
            for number in range(max(map(len, lines))):
                ours, theirs = (part[number] if number < len(part) else "(nothing)" for part in lines)
                if ours != theirs:
                    return f"{stream} line {number + 1}: {ours!r} in old, {theirs!r} in new"
    return None


def _what_failed(text: str) -> str:
    """The first line that names an error, rather than a launcher's last words."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:") or re.match(r"[\w.]*Error:", line)]
    return [*(errors[:1] or lines[-1:]), "(nothing on stderr)"][0]


def select(cases: list[Case], pattern: str | None) -> tuple[list[Case], set[str]]:
    """The cases to run, in order, and the names of those that were asked for: others make their inputs."""
    by_name = {case.name: case for case in cases}
    asked = {name for name in by_name if pattern is None or re.search(pattern, name)}
    wanted, left = set(), list(asked)
    while left:
        name = left.pop()
        if name not in wanted:
            wanted.add(name)
            left += by_name[name].needs
    ordered, left_cases = [], [case for case in cases if case.name in wanted]
    while left_cases:
        done = {case.name for case in ordered}
        case = next(case for case in left_cases if done.issuperset(case.needs))
        ordered.append(case)
        left_cases.remove(case)
    return ordered, asked


def check_out(stack: ExitStack, commit: str, directory: Path) -> Path:
    """A worktree of a commit, removed when `stack` ends."""

    def git(*words: object) -> None:
        subprocess.run(["git", "-C", str(ROOT), *map(str, words)], check=True, capture_output=True, text=True)

    git("worktree", "add", "--detach", directory, commit)
    stack.callback(git, "worktree", "remove", "--force", directory)
    return directory


def compare(old: Side, new: Side, cases: list[Case], work: Path) -> int:
    """Prints a line for each case; returns the number of those that differ."""
    width = max(len(case.name) for case in cases)
    print(f"{'command':<{width}}  files  seconds  result")
    skipped: set[str] = set()
    num_different = num_files = 0
    for case in cases:
        started = time.monotonic()
        missing = skipped.intersection(case.needs)
        if missing:
            skipped.add(case.name)
            print(f"{case.name:<{width}}  {'-':>5}  {'-':>7}  skipped: needs {', '.join(sorted(missing))}")
            continue
        results = [side.run(case, work) for side in (old, new)]
        files, difference = 0, None
        unknown, unknown_to_new = map(unknown_flags, results)
        if unknown and not unknown_to_new:
            skipped.add(case.name)
            verdict = f"skipped: old says {unknown}"
        else:
            difference = compare_results(case, *results)
            if difference is None:
                files, difference = compare_directories(*(side.outputs / case.name for side in (old, new)))
            verdict = f"DIFFERENT: {difference}" if difference else "equal"
        num_files += files
        num_different += difference is not None
        seconds = time.monotonic() - started
        print(f"{case.name:<{width}}  {files or '-':>5}  {seconds:7.1f}  {verdict}", flush=True)
        if difference:
            print("\n".join(f"    {command}" for command in case.commands))
    counts = f"{num_different or 'none'} different, {len(skipped)} skipped"
    print(f"{len(cases)} commands, {num_files} files: {counts}")
    return num_different


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", nargs="?", help="commit to compare with")
    parser.add_argument("new", nargs="?", help="commit to compare; the working tree when not given")
    parser.add_argument("--only", metavar="PATTERN", help="regular expression of names; their inputs too")
    parser.add_argument("--list", action="store_true", help="print the commands and stop")
    args = parser.parse_args()
    cases, asked = select([*preparation_cases(), *float_cases()], args.only)
    if not cases:
        parser.error(f"--only {args.only}: no command has such a name; --list shows them")
    if args.list:
        for case in cases:
            print(case.name + ("" if case.name in asked else " (for others)"))
            print("\n".join(f"    {command}" for command in case.commands))
        return 0
    if args.old is None:
        parser.error("OLD is required")
    with ExitStack() as stack:
        directory = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="compare-commits-"))
        ).resolve()
        sides = []
        for name, commit in (("old", args.old), ("new", args.new)):
            code = check_out(stack, commit, directory / f"{name}-code") if commit else ROOT
            sides.append(Side(name, code, directory / name))
        make_working_directory(sides[0].outputs)
        make_models(sides[0].outputs)
        shutil.copytree(sides[0].outputs, sides[1].outputs)
        started = time.monotonic()
        different = compare(*sides, cases, directory / "work")
        print(f"{(time.monotonic() - started) / 60:.1f} minutes")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())

"""Runs the parts of `run.sh` case by case, each part within its time; results are on disk after each case."""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    *("torch", "triton", "colossalai", "transformers", "tokenizers", "peft", "datasets", "numpy", "pyarrow"),
    *("flash-attn", "apex", "liger-kernel", "bitsandbytes", "nvidia-nccl-cu12", "nvidia-nccl-cu13"),
)
# Of a failing command's output, what the results file has.
TAIL_CHARACTERS = 3000
CUDA_FACT = "torch's CUDA, found, GPUs"
OK, FAILED, LATE, SKIPPED, NOT_RUN = "ok", "FAILED", "TIME LIMIT", "skipped", "not run: no time left"


class Failed(Exception):
    """A case that failed; `output` is the end of what its command said."""

    def __init__(self, message: str, output: str = "") -> None:
        super().__init__(message)
        self.output = output


class Skipped(Exception):
    """A case that this machine can't run, and why."""


class TimeIsUp(Failed):
    """A command was stopped at the time limit of its part."""


# Name -> what returns a sentence about what it found, or raises one of the above.
Case = tuple[str, Callable[[], str]]


@dataclass(frozen=True)
class Part:
    """Some cases that belong together.

    Attributes:
        why: what it would mean if they failed.
        seconds: that it may take.
    """

    name: str
    why: str
    seconds: float
    cases: Callable[[Bench], Iterable[Case]]


@dataclass
class Result:
    part: str
    case: str
    status: str
    seconds: float
    detail: str
    output: str = ""


@dataclass
class Bench:
    """The machine, a directory to work in, and what has come of it so far.

    Attributes:
        toy: tiny shapes, and the CPU in place of a GPU.
        output: the results file, Markdown; beside it, with `.json` in its name, the same for programs.
        environment: what commands get besides.
        nvcc_mark: a file that is there once something has called nvcc; see `remove_nvcc`.
    """

    work: Path
    output: Path
    toy: bool = False
    results: list[Result] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    nvcc_mark: Path | None = None
    deadline: float = float("inf")

    def run_parts(self, parts: Sequence[Part], seconds: float) -> bool:
        """Runs what fits into `seconds`; returns whether nothing failed."""
        end = time.monotonic() + seconds
        for part in parts:
            self.deadline = min(end, time.monotonic() + part.seconds)
            print(f"== {part.name}: {part.why}", flush=True)
            for name, action in self._cases_of(part):
                self.results.append(self._run_case(part, name, action))
                result = self.results[-1]
                print(f"{name}: {result.status} ({result.seconds:.0f} s) {result.detail}", flush=True)
                self.write()
        self.write()
        return not any(result.status in (FAILED, LATE, NOT_RUN) for result in self.results)

    def remove_nvcc(self) -> None:
        """Commands find an nvcc that fails and leaves a mark, no CUDA_HOME, and a `python` in any case."""
        self.nvcc_mark, bin_dir = self.work / "nvcc_was_called", self.work / "bin"
        bin_dir.mkdir(exist_ok=True)
        commands = {
            "nvcc": f"touch {shlex.quote(str(self.nvcc_mark))}; exit 1",
            "python": f'exec {shlex.quote(sys.executable)} "$@"',
        }
        for name, line in commands.items():
            (bin_dir / name).write_text(f"#!/bin/sh\n{line}\n", encoding="utf-8")
            (bin_dir / name).chmod(0o755)
        self.environment["PATH"] = f"{bin_dir}{os.pathsep}{os.environ.get('PATH', '')}"
        for name in ("CUDA_HOME", "CUDA_PATH"):
            self.environment[name] = str(self.work / "no_cuda_home")

    def _cases_of(self, part: Part) -> Iterator[Case]:
        """A part whose preparation fails is a case that fails."""
        try:
            yield from part.cases(self)
        except Exception as error:
            yield "preparation", lambda error=error: _raise(error)

    def _run_case(self, part: Part, name: str, action: Callable[[], str]) -> Result:
        if time.monotonic() >= self.deadline:
            return Result(part.name, name, NOT_RUN, 0.0, "")
        started = time.monotonic()
        status, detail, output = OK, "", ""
        try:
            detail = action()
        except Skipped as reason:
            status, detail = SKIPPED, str(reason)
        except TimeIsUp as error:
            status, detail, output = LATE, str(error), error.output
        except Failed as error:
            status, detail, output = FAILED, str(error), error.output
        except Exception as error:
            status, detail = FAILED, f"{type(error).__name__}: {error}"
            output = traceback.format_exc()[-TAIL_CHARACTERS:]
        return Result(part.name, name, status, time.monotonic() - started, detail, output)

    def command(self, words: Sequence[object], cpu: bool = False, **variables: str) -> str:
        """Runs a command until it ends or the part's time is over; returns what it said.

        Args:
            cpu: it sees no GPU.

        Raises:
            Failed: with the end of its output.
        """
        environment = {**os.environ, **self.environment, **variables}
        if cpu:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        log = self.work / "command.log"
        with open(log, "w", encoding="utf-8", errors="replace") as file:
            process = subprocess.Popen(
                [str(word) for word in words],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=environment,
                start_new_session=True,
            )
            try:
                code = process.wait(timeout=max(0.1, self.deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                code = None
            finally:
                # A launcher's workers are in its group; none may keep the GPU.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        said = log.read_text(encoding="utf-8", errors="replace")
        if code is None:
            raise TimeIsUp("stopped at the time limit of this part", said[-TAIL_CHARACTERS:])
        if self.nvcc_mark is not None and self.nvcc_mark.exists():
            self.nvcc_mark.unlink()
            raise Failed("nvcc was called", said[-TAIL_CHARACTERS:])
        if code:
            raise Failed(f"exit code {code}: {last_words(said)}", said[-TAIL_CHARACTERS:])
        return said

    # ------------------------------------------------------------------ the results file

    def write(self) -> None:
        data = {"environment": self.facts, "toy": self.toy, "results": [asdict(r) for r in self.results]}
        self.output.parent.mkdir(parents=True, exist_ok=True)
        aside = self.output.with_suffix(".unfinished")
        aside.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        aside.replace(self.output.with_suffix(".json"))
        aside.write_text("\n".join(self._markdown()) + "\n", encoding="utf-8")
        aside.replace(self.output)

    @functools.cached_property
    def facts(self) -> dict[str, str]:
        return machine_facts()

    @functools.cached_property
    def num_gpus(self) -> int:
        return int(self.facts[CUDA_FACT].split()[-1])

    def _markdown(self) -> Iterator[str]:
        counts = {status: sum(result.status == status for result in self.results) for status in (OK, FAILED)}
        yield f"# First run on a GPU, {datetime.date.today().isoformat()}"
        yield ""
        yield f"Written by `tests/gpu/run.sh`. {counts[OK]} of {len(self.results)} cases are right."
        if self.toy:
            yield "**Toy shapes: these results show that the script runs, and nothing else.**"
        yield ""
        yield "| machine | |"
        yield "| --- | --- |"
        for name, value in self.facts.items():
            yield f"| {name} | {_cell(value)} |"
        yield ""
        yield "| part | case | result | s | |"
        yield "| --- | --- | --- | --- | --- |"
        for result in self.results:
            cells = (result.part, result.case, result.status, f"{result.seconds:.0f}", result.detail)
            yield "| " + " | ".join(map(_cell, cells)) + " |"
        for result in self.results:
            if result.output:
                yield from ("", f"## {result.part}: {result.case}", "", "```", result.output.strip(), "```")


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _raise(error: Exception) -> str:
    raise error


def last_words(said: str) -> str:
    """The line that says most: the last that names an error, or the last."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:") or "Error" in line.split(":")[0]]
    own = [line for line in errors if "ChildFailedError" not in line]
    return ([*lines[-1:], *own] or ["it said nothing"])[-1][:300]


def machine_facts() -> dict[str, str]:
    """Software and hardware, as far as they can be asked."""
    facts = {"Python": platform.python_version(), "system": platform.platform()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts[package] = importlib.metadata.version(package)
    asked = "name,driver_version,memory.total,compute_cap"
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, check=False)
        facts["GPUs"] = "; ".join(answer.stdout.split("\n")).strip("; ") or answer.stderr.strip()
    else:
        facts["GPUs"] = "no nvidia-smi"
    code = "import torch; print(torch.version.cuda, torch.cuda.is_available(), torch.cuda.device_count())"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    facts[CUDA_FACT] = answer.stdout.strip() or answer.stderr.strip()[-200:]
    facts["CPU cores"] = str(len(os.sched_getaffinity(0)))
    for name in sorted(os.environ):
        if name.startswith(("NCCL_", "CUDA_", "TORCH_", "PYTORCH_")):
            facts[name] = os.environ[name]
    return facts

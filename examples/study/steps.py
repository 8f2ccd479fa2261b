"""Steps of a study: commands that run once, are measured, and continue after a stop."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from colossal_llama.utils.console import log
from colossal_llama.utils.errors import UserError
from colossal_llama.utils.files import read_json, remove_path, write_json

ROOT = Path(__file__).resolve().parents[2]
RECORDS, LOGS = "steps", "logs"
STOPPED_EXIT_CODE = 143


def nothing() -> None:
    """For steps that leave nothing to tidy up."""


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        kind: of work, for the estimate of what is left.
        command: its words, found when its turn comes: a script of the clone first, or `-m` and a module.
            Paths are relative to the work directory.
        outputs: what it writes, below the work directory; removed before it starts anew.
        needs: names of steps whose results it reads.
        size: amount of work, in units that are the same for all steps of the kind.
        resume: more words for the command if an interrupted run can be continued; none: it starts anew.
        continues: a stopped command finds by itself what it has done already.
        finish: what is tidied up after it.
    """

    name: str
    kind: str
    command: Callable[[], list[str]]
    outputs: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    size: float = 1.0
    resume: Callable[[], list[str]] = list
    continues: bool = False
    finish: Callable[[], None] = field(default=nothing)


class Runner:
    """Runs steps in a work directory, each once.

    A finished step has a record, which names the command; a step whose command, or that of a step that it
    needs, is another now runs again.

    Args:
        threads: of each command.
    """

    def __init__(self, work_dir: Path, threads: int) -> None:
        self.work_dir = work_dir
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
            "OMP_NUM_THREADS": str(threads),
            # Threads that wait don't spin: on a machine with other work, spinning makes steps several times
            # as slow, and on a quiet one it wins little.
            "OMP_WAIT_POLICY": "PASSIVE",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "MPLBACKEND": "Agg",
        }
        self.keys: dict[str, str] = {}
        for name in (RECORDS, LOGS):
            (work_dir / name).mkdir(parents=True, exist_ok=True)

    def run_all(self, steps: Sequence[Step]) -> None:
        """Runs what is not done, in order.

        Raises:
            UserError: a command failed; the message has the end of what it wrote.
        """
        for number, step in enumerate(steps):
            words = step.command()
            key = self._key(step, words)
            self.keys[step.name] = key
            if (self._record(step.name) or {}).get("key") == key:
                log(f"[{number + 1}/{len(steps)}] {step.name}: done before")
                continue
            log(f"[{number + 1}/{len(steps)}] {step.name}; {self._describe_rest(steps[number:])}")
            self._run(step, words, key)

    def _key(self, step: Step, words: Sequence[str]) -> str:
        depends_on = [words, [self.keys[name] for name in step.needs]]
        return hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:16]

    def _record_file(self, name: str) -> Path:
        return self.work_dir / RECORDS / f"{name}.json"

    def _record(self, name: str) -> dict[str, Any] | None:
        path = self._record_file(name)
        return read_json(path) if path.is_file() else None

    def _run(self, step: Step, words: list[str], key: str) -> None:
        started_file = self._record_file(step.name).with_suffix(".started")
        interrupted = started_file.is_file() and started_file.read_text(encoding="utf-8") == key
        self._record_file(step.name).unlink(missing_ok=True)
        added = step.resume() if interrupted else []
        if not added and not (interrupted and step.continues):
            for name in step.outputs:
                remove_path(self.work_dir / name)
        started_file.write_text(key, encoding="utf-8")
        script = [str(ROOT / words[0]) if words[0].endswith(".py") else words[0]]
        log(f"  python {shlex.join([*words, *added])}")
        log_file = self.work_dir / LOGS / f"{step.name}.log"
        started = time.time()
        with open(log_file, "ab" if added else "wb") as output:
            status, usage = self._wait(
                subprocess.Popen(
                    [sys.executable, *script, *words[1:], *added],
                    cwd=self.work_dir,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
            )
        seconds = time.time() - started
        if status:
            end = log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
            raise UserError(
                f"{step.name}: its command ended with exit code {status}; all it wrote is in {log_file}, the "
                "end of it:\n" + "\n".join(f"    {line}" for line in end),
                exit_code=1 if status > 0 else STOPPED_EXIT_CODE,
            )
        step.finish()
        # Peak memory is that of the largest process; Linux counts it in KiB.
        record = {
            "name": step.name,
            "kind": step.kind,
            "command": words,
            "size": step.size,
            "continued": bool(added),
            "seconds": round(seconds, 2),
            "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
            "peak_memory_bytes": usage.ru_maxrss * 1024,
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "key": key,
        }
        write_json(self._record_file(step.name), record)
        started_file.unlink()
        log(f"  {seconds:.1f} s, {record['peak_memory_bytes'] / 2**30:.2f} GiB")

    @staticmethod
    def _wait(process: subprocess.Popen) -> tuple[int, Any]:
        """Exit code and resources; a request to stop is passed on, and the command ends in its own way."""

        def pass_on(number: int, frame: Any) -> None:
            process.send_signal(signal.SIGTERM)

        before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            _, status, usage = os.wait4(process.pid, 0)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        process.returncode = os.waitstatus_to_exitcode(status)
        return process.returncode, usage

    def _describe_rest(self, steps: Sequence[Step]) -> str:
        """What is left, by kind, with the time that it should take where a step of the kind was measured."""
        records = [read_json(path) for path in sorted((self.work_dir / RECORDS).glob("*.json"))]
        seconds, sizes = Counter[str](), Counter[str]()
        for record in records:
            seconds[record["kind"]] += record["seconds"]
            sizes[record["kind"]] += record["size"]
        parts = []
        for kind, count in Counter(step.kind for step in steps).items():
            text = f"{count} x {kind}"
            if sizes[kind]:
                size = sum(step.size for step in steps if step.kind == kind)
                text += f" (about {timedelta(seconds=round(seconds[kind] / sizes[kind] * size))})"
            parts.append(text)
        return "left: " + ", ".join(parts)


def remove_step_directories(save_dir: Path, keep: str | None = None) -> None:
    """Checkpoints with optimizer states, which only a resumed run needs; the model itself stays."""
    for directory in save_dir.glob("epoch-*_step-*"):
        if directory.name != keep:
            shutil.rmtree(directory)

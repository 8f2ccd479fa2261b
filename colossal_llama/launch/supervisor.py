"""Runs `colossalai run`, passes stop signals on to every host, and ends what a failed host leaves behind."""

from __future__ import annotations

import contextlib
import os
import queue
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from glob import escape, iglob

from colossal_llama.launch.host_processes import HostProcesses
from colossal_llama.launch.messages import lose_terminal, say_error
from colossal_llama.launch.relay import OutputRelay
from colossal_llama.utils.arguments import number
from colossal_llama.utils.errors import UserError

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# After SIGKILL to the processes of every host, `colossalai run` gets this long to notice.
KILL_GRACE_SECONDS = 3.0


def name_of(stop_signal: signal.Signals) -> str:
    return "Ctrl-C" if stop_signal == signal.SIGINT else stop_signal.name


def exit_code_of(stop_signal: signal.Signals) -> int:
    return 128 + stop_signal


def handle_stop_signals(handle: Callable[[signal.Signals], None]) -> None:
    """Calls `handle` for each stop signal, except those that are ignored, as under nohup or after `&`."""
    for stop_signal in STOP_SIGNALS:
        if signal.getsignal(stop_signal) != signal.SIG_IGN:
            signal.signal(stop_signal, lambda received, _: handle(signal.Signals(received)))


def ignore_stop_signals() -> None:
    """For the end of the process: Python removes its handlers first, and a signal would then kill it."""
    for stop_signal in STOP_SIGNALS:
        signal.signal(stop_signal, signal.SIG_IGN)


@dataclass(frozen=True)
class GracePeriods:
    """What the other hosts get when the processes of one host have failed.

    Attributes:
        failure_seconds: to end by themselves.
        stop_seconds: then, to end on request: longer than the 30 s that torchrun allows its workers.
    """

    failure_seconds: float = 60
    stop_seconds: float = 45

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> GracePeriods:
        """Reads `FAILURE_GRACE_SECONDS` and `STOP_GRACE_SECONDS`; empty means the default."""
        variables = {"failure_seconds": "FAILURE_GRACE_SECONDS", "stop_seconds": "STOP_GRACE_SECONDS"}
        values, problems = {}, []
        for field, variable in variables.items():
            text = environ.get(variable)
            if not text:
                continue
            try:
                values[field] = number(float, minimum=0)(text)
            except ValueError:
                problems.append(f"{variable} {text}: is not a number of seconds")
        if problems:
            raise UserError(problems)
        return cls(**values)


class Supervisor:
    """One run of a launcher, from its start to its exit code.

    Signals, reports of the relay, timers and the launcher's end are events in one queue, and the main thread
    handles one at a time.

    Args:
        processes: what the launcher starts on the hosts.
        save_dir: where checkpoints are looked for.
    """

    def __init__(self, processes: HostProcesses, save_dir: str, grace: GracePeriods) -> None:
        self._processes, self._save_dir, self._grace = processes, save_dir, grace
        # NOTE: `put` of this queue may be called in a signal handler.
        self._events: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._launcher: subprocess.Popen | None = None
        self._has_ended = False
        self._killed_launcher = False
        self._stopped_by: signal.Signals | None = None
        self._has_saved = False
        self._failed_host: str | None = None

    def run(self, command: Sequence[str], environment: Mapping[str, str]) -> int:
        """Runs the launcher's command to its end; returns the exit code for this process.

        Raises:
            UserError: there is no such command.
        """
        if shutil.which(command[0], path=environment.get("PATH")) is None:
            raise UserError(f"{command[0]}: not on PATH; activate the project's environment")
        handle_stop_signals(lambda received: self._events.put(partial(self._on_stop_signal, received)))
        relay = OutputRelay()
        self._launcher = self._start(command, environment, relay)
        waiting = self._start_thread(self._wait_for_launcher)
        reading = self._start_thread(self._read_reports, relay)
        while not self._has_ended:
            self._events.get()()
        waiting.join()
        self._kill_launcher_group()
        code = self._launcher.wait()
        self._processes.close()
        relay.wait()
        reading.join()
        while not self._events.empty():
            self._events.get()()
        return self._finish(1 if self._killed_launcher else code if code >= 0 else 128 - code)

    def _start(
        self, command: Sequence[str], environment: Mapping[str, str], relay: OutputRelay
    ) -> subprocess.Popen:
        """In a session of its own: Ctrl-C reaches this process alone, which passes it on as SIGTERM."""
        with relay.input:
            return subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=relay.input,
                start_new_session=True,
            )

    @staticmethod
    def _start_thread(target: Callable, *args: object) -> threading.Thread:
        thread = threading.Thread(target=target, args=args, daemon=True)
        thread.start()
        return thread

    def _wait_for_launcher(self) -> None:
        # Not reaped yet, its number still belongs to its process group, which may have other members.
        os.waitid(os.P_PID, self._launcher.pid, os.WEXITED | os.WNOWAIT)
        self._events.put(self._on_launcher_end)

    def _read_reports(self, relay: OutputRelay) -> None:
        relay.read_reports(
            on_failed_host=lambda host: self._events.put(partial(self._on_failed_host, host)),
            on_stopped=lambda: self._events.put(self._on_saved),
        )

    def _after(self, seconds: float, action: Callable[[], None]) -> None:
        timer = threading.Timer(seconds, self._events.put, [partial(self._unless_ended, action)])
        timer.daemon = True
        timer.start()

    def _unless_ended(self, action: Callable[[], None]) -> None:
        if not self._has_ended:
            action()

    def _kill_launcher_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._launcher.pid, signal.SIGKILL)

    # What happens

    def _on_launcher_end(self) -> None:
        self._has_ended = True

    def _on_saved(self) -> None:
        self._has_saved = True

    def _on_stop_signal(self, received: signal.Signals) -> None:
        if received == signal.SIGHUP:
            lose_terminal()
            if self._stopped_by == signal.SIGHUP:
                return  # the terminal's shell and the kernel each send one
        if self._has_ended:
            return
        if self._stopped_by is not None:
            say_error(f"{name_of(received)} again: killing the processes of every host")
            self._processes.kill()
        else:
            self._stopped_by = received
            say_error(f"{name_of(received)}: telling every host to save and stop; a second signal kills")
            self._processes.save_and_stop()

    def _on_failed_host(self, host: str) -> None:
        """The first host is the cause. The others may wait for it, and `colossalai run` waits for all."""
        if self._failed_host is not None:
            return
        self._failed_host = host
        if self._stopped_by is None:
            say_error(f"error: {host}: its processes have ended with an error; their messages are above")
        self._after(self._grace.failure_seconds, self._end_launchers)

    def _end_launchers(self) -> None:
        say_error(
            f"error: not all hosts have ended {self._grace.failure_seconds:g} s after {self._failed_host}: "
            "stopping them"
        )
        self._processes.end_launchers()
        self._after(self._grace.stop_seconds, self._kill_processes)

    def _kill_processes(self) -> None:
        say_error(
            f"error: not all hosts have ended {self._grace.stop_seconds:g} s after that: killing what is left"
        )
        self._processes.kill()
        self._after(KILL_GRACE_SECONDS, self._kill_launcher)

    def _kill_launcher(self) -> None:
        self._killed_launcher = True
        self._kill_launcher_group()

    # What the run comes to

    def _finish(self, code: int) -> int:
        if self._stopped_by is not None and code != 0:
            self._report_stop(self._stopped_by)
            return exit_code_of(self._stopped_by)
        if self._failed_host is not None:
            report_checkpoint(self._save_dir)
        return code

    def _report_stop(self, stopped_by: signal.Signals) -> None:
        name = name_of(stopped_by)
        if self._has_saved:
            say_error(f"{name}: every process has saved and exited with code {exit_code_of(signal.SIGTERM)}")
        else:
            say_error(f"{name}: training has ended without saving: it had not begun, or was killed")
        report_checkpoint(self._save_dir)


def report_checkpoint(save_dir: str) -> None:
    newest = newest_checkpoint(save_dir) or "none yet"
    say_error(f"Last complete checkpoint: {newest}; the same command continues from there")


def newest_checkpoint(save_dir: str) -> str | None:
    """The complete checkpoint with the highest step."""
    # NOTE: `training.checkpoint.directories` would load torch.
    found = {}
    for marker in iglob(os.path.join(escape(save_dir), "epoch-*_step-*", "COMPLETE")):
        checkpoint = os.path.dirname(marker)
        step = checkpoint.rpartition("_step-")[2]
        if step.isdecimal():
            found[int(step)] = checkpoint
    return found[max(found)] if found else None

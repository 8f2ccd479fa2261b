"""The relay of a launcher's output: everything is copied, and reports are found in pieces of messages."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT

from colossal_llama.launch.relay import OutputRelay, find_report

STOPPED = b"Stopped by SIGTERM after step 5; continue with --load_checkpoint latest"
FAILED = b"Error: failed to run torchrun --x y on host-b, is localhost: False, exception: bad exit code"


@pytest.mark.parametrize(
    ("line", "report"),
    [
        (STOPPED, b"stopped"),
        (FAILED, b"failed host-b"),
        (b"exitco" + FAILED, b"failed host-b"),
        (b"failed to make it writable, and continue with --load_checkpoint latest", None),
        (b"step 5, loss 2.1", None),
        (b"", None),
    ],
)
def test_reports_of_lines(line: bytes, report: bytes | None) -> None:
    assert find_report(line + b"\n") == report


PIECES = st.text(st.characters(codec="utf-8"), max_size=40).map(str.encode)


@given(cut=st.integers(0, len(STOPPED)), piece=PIECES)
def test_a_message_that_another_hosts_output_cuts_in_two_is_found(cut: int, piece: bytes) -> None:
    lines = (STOPPED[:cut] + piece + b"\n" + STOPPED[cut:]).split(b"\n")
    assert any(find_report(line) == b"stopped" for line in lines)
    if piece.strip() and b"\n" not in piece:
        assert find_report(STOPPED[:cut] + piece + STOPPED[cut:]) == b"stopped"


@given(cut=st.integers(0, FAILED.index(b" on host-b")), piece=PIECES)
def test_a_failed_host_is_found_however_its_command_is_cut(cut: int, piece: bytes) -> None:
    text = FAILED[:cut] + piece + b"\n" + FAILED[cut:]
    assert b"failed host-b" in map(find_report, text.split(b"\n"))


def read_reports(relay: OutputRelay) -> list[str]:
    found: list[str] = []
    relay.read_reports(on_failed_host=found.append, on_stopped=lambda: found.append("(stopped)"))
    return found


def test_everything_is_copied_byte_by_byte(capfdbinary: pytest.CaptureFixture) -> None:
    relay = OutputRelay()
    said = b"\xe6\x89\x80 \xff\0 \r 50 %\n" + STOPPED + b"\n\n" + FAILED
    with relay.input:
        relay.input.write(said)
    assert read_reports(relay) == ["(stopped)", "host-b"]
    relay.wait()
    assert capfdbinary.readouterr().out == said + b"\n"


def start_relay(output: int, reports: int) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "colossal_llama.launch.relay", str(reports)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=output,
        pass_fds=[reports],
    )


def test_it_reads_on_when_nobody_listens() -> None:
    """The terminal and the supervisor are gone; the launcher must not notice."""
    (reading, output), (reports_reading, reports) = os.pipe(), os.pipe()
    relay = start_relay(output, reports)
    for file in (reading, output, reports_reading, reports):
        os.close(file)
    relay.communicate((STOPPED + b"\n") * 10_000)
    assert relay.returncode == 0


def test_signals_do_not_end_it(tmp_path: Path) -> None:
    with open(tmp_path / "output", "wb") as output:
        relay = start_relay(output.fileno(), output.fileno())
    relay.stdin.write(b"ready\n")
    relay.stdin.flush()
    while not (tmp_path / "output").stat().st_size:
        assert relay.poll() is None
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        relay.send_signal(number)
    relay.communicate(b"last\n")
    assert relay.returncode == 0
    assert (tmp_path / "output").read_bytes() == b"ready\nlast\n"

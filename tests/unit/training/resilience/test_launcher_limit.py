"""torchrun kills its workers 30 s after a signal: a save that takes about as long is worth a warning."""

from __future__ import annotations

import inspect

import pytest

from colossal_llama.training.resilience.interruption import TORCHRUN_LIMIT_SECONDS, warn_of_launcher_limit


@pytest.mark.parametrize(
    ("seconds", "launched", "warned"), [(20, True, False), (25, True, True), (25, False, False)]
)
def test_warning(seconds, launched, warned, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if launched:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    warn_of_launcher_limit(seconds)
    message = capsys.readouterr().err
    assert ("a save takes 25 s, and torchrun kills its workers 30 s after a SIGTERM" in message) == warned
    assert bool(message) == warned


def test_the_limit_is_torchs():
    from torch.distributed.elastic.multiprocessing.api import PContext

    assert inspect.signature(PContext.close).parameters["timeout"].default == TORCHRUN_LIMIT_SECONDS

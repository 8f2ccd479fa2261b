"""The recording accelerator finds what a GPU would do in the wrong order, and nothing else."""

from __future__ import annotations

import pytest
import torch
from stand_ins.streams import recorded_streams


@pytest.fixture
def recorder():
    from colossal_llama.upstream.cpu_accelerator import install_cpu_accelerator
    from colossal_llama.upstream.lean_imports import lean_imports

    with lean_imports():
        install_cpu_accelerator()
    with recorded_streams() as recorder:
        yield recorder


def reduce_on_another_stream(wait_before: bool) -> tuple[torch.Tensor, object]:
    """Gradients that another stream divides, as ZeRO's overlapped reduction does."""
    from colossalai.accelerator import get_accelerator

    accelerator = get_accelerator()
    gradients = torch.ones(4) * 2
    stream = accelerator.Stream()
    if wait_before:
        stream.wait_stream(accelerator.current_stream())
    with accelerator.stream(stream):
        gradients.div_(2)
    return gradients, stream


def test_a_read_that_nothing_orders(recorder):
    gradients, _ = reduce_on_another_stream(wait_before=True)
    assert recorder.races == []
    gradients.sum()
    (race,) = recorder.races
    assert race.startswith("aten.sum.default reads what aten.div_.")


def test_a_write_before_the_value_is_there(recorder):
    reduce_on_another_stream(wait_before=False)
    assert len(recorder.races) >= 1


@pytest.mark.parametrize("how", ["stream", "event", "device", "host"])
def test_what_orders_them(recorder, how):
    from colossalai.accelerator import get_accelerator

    accelerator = get_accelerator()
    gradients, stream = reduce_on_another_stream(wait_before=True)
    if how == "stream":
        accelerator.current_stream().wait_stream(stream)
    elif how == "event":
        accelerator.current_stream().wait_event(stream.record_event())
    elif how == "device":
        accelerator.synchronize()
    else:
        stream.synchronize()
    gradients.sum()
    assert recorder.races == []


def test_an_event_orders_what_came_before_it_alone(recorder):
    from colossalai.accelerator import get_accelerator

    accelerator = get_accelerator()
    gradients, stream = reduce_on_another_stream(wait_before=True)
    event = stream.record_event()
    with accelerator.stream(stream):
        gradients.mul_(3)
    accelerator.current_stream().wait_event(event)
    gradients.sum()
    assert len(recorder.races) == 1


def test_operations_that_raise_under_deterministic_algorithms(recorder):
    torch.ones(4, dtype=torch.int64).cumsum(0)
    assert recorder.nondeterministic == set()
    torch.ones(4).cumsum(0)
    assert recorder.nondeterministic == {"aten.cumsum.default"}


def test_reading_on_both_streams_is_no_race(recorder):
    from colossalai.accelerator import get_accelerator

    accelerator = get_accelerator()
    values, stream = torch.ones(4) * 2, accelerator.Stream()
    stream.wait_stream(accelerator.current_stream())
    with accelerator.stream(stream):
        values.sum()
    values.sum()
    assert recorder.races == []
    values.zero_()
    assert len(recorder.races) == 1

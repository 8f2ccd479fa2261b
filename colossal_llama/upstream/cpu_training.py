"""All cures that training without a GPU takes: any layout can be rehearsed on a laptop, through gloo."""

from __future__ import annotations

from colossal_llama.upstream.cpu_accelerator import install_cpu_accelerator
from colossal_llama.upstream.gloo_collectives import compose_missing_collectives
from colossal_llama.upstream.pipeline_p2p_names import define_hccl_names
from colossal_llama.upstream.zero_device_check import skip_zero_device_check


def enable_cpu_training() -> None:
    """Call it before the booster is imported, once or often; not where CUDA is available."""
    install_cpu_accelerator()
    compose_missing_collectives()
    define_hccl_names()
    skip_zero_device_check()

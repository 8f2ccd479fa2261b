"""Continual pre-training and supervised fine-tuning of LLaMA with ColossalAI's booster plugins."""

from __future__ import annotations

from colossal_llama.training.arguments import parse_settings
from colossal_llama.training.settings import RunSettings
from colossal_llama.utils.errors import run_command


def main() -> int:
    settings = parse_settings()
    from colossal_llama.upstream.quiet import quieten_libraries

    quieten_libraries()
    return dry_run(settings) if settings.output.dry_run else train(settings)


def dry_run(settings: RunSettings) -> int:
    """Checks arguments, model configuration and data in one process, and prints the plan."""
    from colossal_llama.training.plan import planned_world_size
    from colossal_llama.training.run import Run
    from colossal_llama.utils.console import log

    world_size = planned_world_size(settings.layout)
    run = Run.prepare(settings, world_size)
    run.rehearse()
    log(run.describe())
    return 0


def train(settings: RunSettings) -> int:
    """The run itself; returns the exit code."""
    from colossal_llama.training.process import start_process
    from colossal_llama.training.resilience.interruption import STOPPED_EXIT_CODE
    from colossal_llama.training.resilience.peers import watched_peers

    stop = start_process(settings.optimizer)
    with watched_peers():
        import torch.distributed as dist

        from colossal_llama.training.run import Run

        completed = Run.prepare(settings, dist.get_world_size()).train(stop)
    return 0 if completed else STOPPED_EXIT_CODE


if __name__ == "__main__":
    run_command(main, exit_at_once=True)

"""Continual pre-training and supervised fine-tuning of LLaMA with ColossalAI's booster plugins."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

from colossal_llama.training.arguments import build_parser
from colossal_llama.utils.errors import UserError, run_command


def main() -> int:
    args = build_parser().parse_args()
    from colossal_llama.training.setup import quieten_libraries, start_process

    quieten_libraries()
    if args.dry_run:
        return dry_run(args)
    from colossal_llama.training.peers import watched_peers

    stop = start_process(args)
    with watched_peers():
        return train(args, stop)


def dry_run(args: argparse.Namespace) -> int:
    """Checks in one process what a run checks before its first step, and prints the plan."""
    from colossal_llama.training.plan import check_layout, dry_run_world_size, format_plan, make_plan
    from colossal_llama.training.setup import check_run, open_inputs
    from colossal_llama.utils.console import log

    world_size = dry_run_world_size(args)
    inputs = open_inputs(args)
    problems = check_layout(args, inputs.config, world_size)
    if problems:
        raise UserError(problems)
    plan = make_plan(args, inputs.config, inputs.source, world_size)
    check_run(args, inputs, plan)
    log(format_plan(plan, args))
    return 0


def train(args: argparse.Namespace, stop) -> int:
    """The run itself; returns the exit code."""
    import torch.distributed as dist

    from colossal_llama.training import setup
    from colossal_llama.training.checkpoint import CheckpointWriter
    from colossal_llama.training.curves import draw_curves
    from colossal_llama.training.interruption import STOPPED_EXIT_CODE
    from colossal_llama.training.metrics import MetricsWriter
    from colossal_llama.training.plan import check_layout, global_batch_line, make_plan
    from colossal_llama.training.state import TrainState
    from colossal_llama.training.strategy import Strategy
    from colossal_llama.training.trainer import Trainer
    from colossal_llama.utils.console import log

    is_main = dist.get_rank() == 0
    inputs = setup.open_inputs(args)
    problems = check_layout(args, inputs.config, dist.get_world_size())
    if problems:
        raise UserError(problems)
    plan = make_plan(args, inputs.config, inputs.source, dist.get_world_size())
    log(global_batch_line(plan, args))
    with contextlib.ExitStack() as cleanup:
        setup.lock_save_dir(args, cleanup)
        checkpoint, stage_weights = setup.find_checkpoint(args)
        settings = setup.describe_run(args, inputs, plan)
        if checkpoint is None:
            setup.refuse_used_save_dir(args)
        else:
            setup.check_resumable(checkpoint, settings)
            setup.keep_warm_up(args, checkpoint, plan)
            stage_weights = setup.find_adapter_base(args, checkpoint)
        settings["stage_weights"] = None if stage_weights is None else str(stage_weights.absolute())
        files = setup.prepare_files_together(args, inputs, checkpoint, stage_weights)
        strategy = Strategy(args)
        log(setup.describe_kernels(strategy))
        setup.boost_model(args, strategy, inputs, checkpoint, stage_weights, files)
        setup.check_adapter_base(args, strategy.parameter_dtype, strategy.loaded_sums, checkpoint, settings)
        writer = CheckpointWriter(
            args.save_dir,
            strategy,
            files,
            plan.schedule,
            args.save_total_limit,
            settings,
            args.async_save,
        )
        state = TrainState() if checkpoint is None else writer.load(checkpoint)
        if checkpoint is not None:
            setup.continue_at_same_row(checkpoint, state, plan, len(inputs.source), args.num_epochs)
            log(f"Resumed from {checkpoint}: step {state.step}, epoch {state.epoch}, row {state.position}")
            setup.warn_of_later_checkpoints(args, state)
        metrics = None
        if is_main and not args.benchmark:
            setup.write_configuration(args, settings)
            weights = stage_weights or Path(args.pretrained)
            metrics = MetricsWriter(args.tensorboard_dir, state.step, settings, weights)
            cleanup.callback(metrics.close)
        meter = setup.make_meter(args)
        trainer = Trainer(
            args,
            strategy,
            inputs.source,
            inputs.evaluation_sets,
            setup.collator_settings(args, strategy, inputs),
            plan.schedule,
            state,
            None if args.benchmark else writer,
            metrics,
            stop,
            meter,
        )
        completed = trainer.run()
        if meter is not None:
            log(setup.report_benchmark(meter, strategy, inputs))
        elif completed:
            final = setup.save_final_modeling(writer)
            if is_main:
                metrics.close()
                draw_curves(args.tensorboard_dir)
            log(trainer.summary())
            log(f"Model: {final}")
        else:
            log(trainer.summary())
            log(
                f"Stopped by {stop.reason or 'another rank'} after step {state.step}; continue with "
                "--load_checkpoint latest"
            )
    return 0 if completed else STOPPED_EXIT_CODE


if __name__ == "__main__":
    run_command(main, exit_at_once=True)

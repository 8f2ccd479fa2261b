"""Low-level ZeRO refuses every device that is not called cuda or npu.

Broken in: colossalai 0.5.0, `LowLevelZeroOptimizer._sanity_checks`, for no other reason than the name.
Shows as: an assertion while boosting with zero2, or 3d with ZeRO, on a CPU.
Cure: keep the check of dtypes, leave out that of the device.
"""

from __future__ import annotations


def skip_zero_device_check() -> None:
    """Replaces the check by one of dtypes alone."""
    from colossalai.zero.low_level.low_level_optim import LowLevelZeroOptimizer

    def check_dtypes(self: LowLevelZeroOptimizer) -> None:
        for group in self.optim.param_groups:
            for param in group["params"]:
                if not getattr(param, "skip_zero_check", False) and param.dtype != self._dtype:
                    raise TypeError(f"ZeRO needs one dtype: {self._dtype} and {param.dtype} are mixed")

    LowLevelZeroOptimizer._sanity_checks = check_dtypes

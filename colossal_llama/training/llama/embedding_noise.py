"""NEFTune: uniform noise on the embeddings of the training input (Jain et al., 2023, arXiv:2310.05914)."""

from __future__ import annotations

import torch


class EmbeddingNoise:
    """Noise in [-1, 1] * alpha / sqrt(L * d), with L a row's real tokens and d the width; none on padding.

    The noise of a step is a function of (seed, step, data-parallel rank) and the order of its forward
    passes, so it is the same on all tensor parallel ranks and needs no state of its own to resume exactly.
    """

    def __init__(self, alpha: float, seed: int) -> None:
        self.alpha, self.seed = alpha, seed
        self._generator: torch.Generator | None = None
        self._step_seed = seed

    def start_step(self, step: int, dp_rank: int) -> None:
        mixed = (self.seed * 1_000_003 + step) * 1_000_003 + dp_rank
        self._step_seed = mixed % (2**63 - 1)
        self._generator = None

    def __call__(self, embeddings: torch.Tensor, is_real: torch.Tensor) -> torch.Tensor:
        """Noise for [batch, sequence, width] embeddings; `is_real` [batch, sequence] is False on padding."""
        if self._generator is None:
            self._generator = torch.Generator(embeddings.device).manual_seed(self._step_seed)
        uniform = torch.rand(
            embeddings.shape, generator=self._generator, device=embeddings.device, dtype=torch.float32
        )
        num_real = is_real.sum(dim=1, keepdim=True).clamp(min=1)
        scale = self.alpha / torch.sqrt(num_real * float(embeddings.size(-1)))
        noise = (uniform * 2 - 1) * (scale * is_real)[..., None]
        return noise.to(embeddings.dtype)

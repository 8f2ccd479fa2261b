"""What trains: all weights, the embeddings alone, or adapters, with or without the embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from colossal_llama.tokenizer.tokenizer_files import REPORT_FILE
from colossal_llama.utils.arguments import non_negative_int, number
from colossal_llama.utils.settings import OnResume, flag


@dataclass(frozen=True)
class AdaptationSettings:
    """Which weights train, and what is added to the model for it."""

    freeze_non_embeds_params: bool = flag(
        False, "train the input and output embeddings only (aligns a new vocabulary)"
    )
    lora_rank: int = flag(0, "rank of LoRA adapters; 0 = off", type=non_negative_int)
    lora_embeddings: str | None = flag(
        None,
        "with LoRA: train the whole input and output embeddings too, or freeze them (default: freeze; "
        "to be given for a model with an extended vocabulary)",
        choices=("train", "freeze"),
        unset_means="freeze",
    )
    merge_lora: bool = flag(
        False, "save LoRA merged into the weights, not as an adapter", on_resume=OnResume.FREE
    )
    use_neft: bool = flag(False, "NEFTune noise on the embeddings")
    neft_alpha: float = flag(
        5.0, "NEFTune noise: alpha / sqrt(tokens * width)", type=number(float, minimum=0)
    )

    @property
    def trains_embeddings_beside_lora(self) -> bool:
        return self.lora_rank > 0 and self.lora_embeddings == "train"

    def conflicts(self, models: dict[str, str | None]) -> list[str]:
        """Contradictions between these flags, each with its remedy.

        Args:
            models: flag -> path of each model directory that is given; the first with an extended vocabulary
                counts.
        """
        problems = []
        if self.use_neft and self.neft_alpha == 0:
            problems.append("--neft_alpha 0: gives no noise; leave --use_neft out")
        if not self.lora_rank:
            if self.merge_lora:
                problems.append("--merge_lora: needs --lora_rank above 0")
            if self.lora_embeddings:
                problems.append(f"--lora_embeddings {self.lora_embeddings}: needs --lora_rank above 0")
            return problems
        if self.freeze_non_embeds_params:
            problems.append(
                "--lora_rank and --freeze_non_embeds_params: choose one; LoRA trains adapters, and with "
                "--lora_embeddings train the embeddings beside them"
            )
        for name, path in models.items():
            if path is not None and (Path(path) / REPORT_FILE).is_file():
                problems.extend(self.forgotten_rows(f"--{name} {path}"))
                break
        return problems

    def forgotten_rows(self, extended: str) -> list[str]:
        """LoRA alone would leave the rows of new pieces as they were initialised: the user decides.

        Args:
            extended: flag and value that name a model with an extended vocabulary.
        """
        if not self.lora_rank or self.lora_embeddings is not None:
            return []
        return [
            f"--lora_embeddings: has to be given with --lora_rank {self.lora_rank}, since {extended} has an "
            f"extended vocabulary ({REPORT_FILE}); `train` trains the whole embeddings beside the adapters, "
            "`freeze` leaves them, and the rows of the new pieces, as they are"
        ]

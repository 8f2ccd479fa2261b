"""What trains: all weights, the embeddings or their new rows alone, or adapters, with or without the
embeddings; and the rate and the decay that embeddings and norms train with.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from colossal_llama.tokenizer.tokenizer_files import REPORT_FILE
from colossal_llama.utils.arguments import non_negative_int, number
from colossal_llama.utils.settings import OnResume, flag

# Value of `--freeze_non_embeds_params`.
NEW_ROWS = "new_rows"


@dataclass(frozen=True)
class AdaptationSettings:
    """Which weights train, and what is added to the model for it."""

    freeze_non_embeds_params: bool | str = flag(
        False,
        "train the input and output embeddings only (aligns a new vocabulary): all their rows, or with "
        "`new_rows` those of the new pieces alone, while every other weight stays as it is",
        words=(NEW_ROWS,),
    )
    lr_embeddings: float | None = flag(
        None,
        "peak learning rate of the input and output embeddings; the schedule has the same shape "
        "(default: as --lr)",
        type=number(float, minimum=0),
    )
    no_decay: list[str] | None = flag(
        None,
        "weights without weight decay (default: none)",
        nargs="*",
        choices=("norms", "embeddings"),
        unset_means=(),
        unordered=True,
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

    @property
    def trains_new_rows_alone(self) -> bool:
        return self.freeze_non_embeds_params == NEW_ROWS

    def decays(self, kind: str) -> bool:
        """Whether weights of a kind that `--no_decay` knows have weight decay."""
        return kind not in (self.no_decay or ())

    def conflicts(self, models: dict[str, str | None]) -> list[str]:
        """Contradictions between these flags, each with its remedy.

        Args:
            models: flag -> path of each model directory that is given; the first with an extended vocabulary
                counts.
        """
        problems = []
        if self.use_neft and self.neft_alpha == 0:
            problems.append("--neft_alpha 0: gives no noise; leave --use_neft out")
        if self.lr_embeddings is not None and self.lora_rank and not self.trains_embeddings_beside_lora:
            problems.append(
                f"--lr_embeddings {self.lr_embeddings:g}: with --lora_rank {self.lora_rank} the embeddings "
                "are frozen; add --lora_embeddings train, or leave it out"
            )
        pretrained = models.get("pretrained")
        if self.trains_new_rows_alone and pretrained is not None and Path(pretrained).is_dir():
            problems.extend(self.missing_report(f"--pretrained {pretrained}", Path(pretrained) / REPORT_FILE))
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

    def missing_report(self, model: str, report: Path | None) -> list[str]:
        """Only the report of an extension says which rows are new.

        Args:
            model: flag and value that name the model.
            report: where the report has to be; None where the hub has none.
        """
        if not self.trains_new_rows_alone or (report is not None and report.is_file()):
            return []
        return [
            f"--freeze_non_embeds_params {NEW_ROWS}: {model} has no {REPORT_FILE}, which says which rows are "
            "new; give a model whose vocabulary was extended with init_tokenizer.py and init_model.py, or "
            "train all rows of the embeddings with --freeze_non_embeds_params True"
        ]

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

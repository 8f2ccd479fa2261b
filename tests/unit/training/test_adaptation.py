"""What trains: contradictions between adapters, frozen weights and noise, and models that were extended."""

from __future__ import annotations

from pathlib import Path

import pytest

from colossal_llama.tokenizer.tokenizer_files import REPORT_FILE
from colossal_llama.training.adaptation import AdaptationSettings

NO_MODELS: dict[str, str | None] = {"pretrained": "some/model", "load_checkpoint": None}


@pytest.fixture
def extended(tmp_path: Path) -> Path:
    (tmp_path / REPORT_FILE).write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    "settings",
    [
        AdaptationSettings(),
        AdaptationSettings(freeze_non_embeds_params=True, use_neft=True),
        AdaptationSettings(neft_alpha=0),
        AdaptationSettings(lr_embeddings=0.0, no_decay=["norms", "embeddings"]),
        AdaptationSettings(lora_rank=8, lora_embeddings="train", lr_embeddings=1e-4),
        AdaptationSettings(freeze_non_embeds_params="new_rows", lr_embeddings=1e-4),
        AdaptationSettings(lora_rank=8, merge_lora=True),
        AdaptationSettings(lora_rank=8, lora_embeddings="train", use_neft=True),
    ],
)
def test_what_goes_together(settings: AdaptationSettings) -> None:
    assert settings.conflicts(NO_MODELS) == []


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (AdaptationSettings(use_neft=True, neft_alpha=0), "--neft_alpha 0: gives no noise"),
        (AdaptationSettings(merge_lora=True), "--merge_lora: needs --lora_rank above 0"),
        (AdaptationSettings(lora_embeddings="freeze"), "--lora_embeddings freeze: needs --lora_rank above 0"),
        (AdaptationSettings(lora_rank=8, freeze_non_embeds_params=True), "--lora_rank and --freeze_non_"),
        (AdaptationSettings(lora_rank=8, freeze_non_embeds_params="new_rows"), "--lora_rank and --freeze"),
        (
            AdaptationSettings(lora_rank=8, lr_embeddings=1e-4),
            "--lr_embeddings 0.0001: with --lora_rank 8 the",
        ),
    ],
)
def test_a_contradiction(settings: AdaptationSettings, problem: str) -> None:
    (found,) = settings.conflicts(NO_MODELS)
    assert found.startswith(problem)


def test_contradictions_are_reported_together() -> None:
    settings = AdaptationSettings(use_neft=True, neft_alpha=0, merge_lora=True, lora_embeddings="train")
    assert len(settings.conflicts(NO_MODELS)) == 3


def test_the_first_extended_model_asks_for_its_embeddings(extended: Path) -> None:
    lora = AdaptationSettings(lora_rank=8)
    both = {"pretrained": str(extended), "load_checkpoint": str(extended)}
    (problem,) = lora.conflicts(both)
    assert f"--pretrained {extended} has an extended vocabulary" in problem
    (problem,) = lora.conflicts({**both, "pretrained": "some/model"})
    assert f"--load_checkpoint {extended} has an extended vocabulary" in problem
    for choice in ("train", "freeze"):
        assert AdaptationSettings(lora_rank=8, lora_embeddings=choice).conflicts(both) == []
    assert AdaptationSettings().conflicts(both) == []


@pytest.mark.parametrize(
    ("settings", "train"),
    [
        (AdaptationSettings(), False),
        (AdaptationSettings(lora_embeddings="train"), False),
        (AdaptationSettings(lora_rank=8), False),
        (AdaptationSettings(lora_rank=8, lora_embeddings="freeze"), False),
        (AdaptationSettings(lora_rank=8, lora_embeddings="train"), True),
    ],
)
def test_embeddings_train_beside_adapters_on_request(settings: AdaptationSettings, train: bool) -> None:
    assert settings.trains_embeddings_beside_lora is train


def test_new_rows_need_a_report_of_them(extended: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    settings = AdaptationSettings(freeze_non_embeds_params="new_rows")
    other = tmp_path_factory.mktemp("model")
    (problem,) = settings.conflicts({"pretrained": str(other)})
    assert problem.startswith(f"--freeze_non_embeds_params new_rows: --pretrained {other} has no vocab")
    assert settings.conflicts({"pretrained": str(extended)}) == []
    for frozen in (False, True):
        assert AdaptationSettings(freeze_non_embeds_params=frozen).conflicts({"pretrained": str(other)}) == []

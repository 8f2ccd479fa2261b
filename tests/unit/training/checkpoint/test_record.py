"""The record of a run: written and read back without a change, whatever version wrote it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plugin_cases import make_config

from colossal_llama.training.arguments import parse_settings
from colossal_llama.training.checkpoint.record import (
    MODEL_FIELDS,
    RunRecord,
    SavedRun,
    installed_versions,
    model_facts,
    state_json,
)
from colossal_llama.training.checkpoint.resume import check_resumable
from colossal_llama.training.state import TrainState
from colossal_llama.utils.errors import UserError

# `running_states.json` as version 0.1.0 wrote it before records were objects.
SAVED: dict[str, Any] = {
    "state": {
        "step": 7,
        "epoch": 0,
        "position": 112,
        "tokens": 7168,
        "schedule_offset": 0,
        "evaluation_due": False,
    },
    "arguments": {
        "accumulation_steps": 8,
        "async_save": True,
        "batch_size": 1,
        "benchmark": False,
        "bucketed": False,
        "config_file": "config_file",
        "dataset": ["data/arrow"],
        "deterministic": False,
        "dry_run": False,
        "enable_sequence_parallelism": False,
        "eval_dataset": None,
        "eval_interval": 0,
        "freeze_non_embeds_params": False,
        "grad_clip": 1.0,
        "isolate_documents": True,
        "load_checkpoint": None,
        "lora_embeddings": None,
        "lora_rank": 4,
        "lr": 0.0003,
        "max_length": 64,
        "max_steps": -1,
        "merge_lora": False,
        "microbatch_size": 1,
        "mixed_precision": "bf16",
        "neft_alpha": 5.0,
        "num_epochs": 1,
        "num_samples": 500,
        "num_workers": 2,
        "pad_token": "eos",
        "padding_mode": "max_length",
        "plugin": "3d",
        "pp": 1,
        "pretrained": "model",
        "save_dir": "checkpoint_dir",
        "save_interval": 1000,
        "save_total_limit": 0,
        "seed": 42,
        "skip_save_each_epoch": False,
        "sp": 1,
        "sp_mode": "split_gather",
        "tensorboard_dir": "logs_dir",
        "tp": 1,
        "trust_remote_code": False,
        "use_flash_attn": False,
        "use_grad_checkpoint": False,
        "use_neft": False,
        "warmup_steps": None,
        "weight_decay": 0.1,
        "zero_cpu_offload": False,
        "zero_stage": 2,
    },
    "layout": {
        "world_size": 2,
        "plugin": "3d",
        "tp": 1,
        "pp": 1,
        "sp": 1,
        "sp_mode": "split_gather",
        "enable_sequence_parallelism": False,
        "zero_stage": 2,
    },
    "data": {"fingerprint": "random-500-64-2000-42", "rows": 500, "tokens": 32000},
    "rows_per_step": 16,
    "total_steps": 31,
    "model": {
        "vocab_size": 2000,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
    },
    "versions": {"python": "3.11.7", "torch": "2.5.1", "colossalai": "0.5.0", "colossal_llama": "0.1.0"},
    "stage_weights": None,
    "adapter_base": {"dtype": "torch.bfloat16", "sum": 12.25},
}
FLAGS = "--benchmark --plugin 3d --zero_stage 2 --mixed_precision bf16 --max_length 64 --lora_rank 4"

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
FACTS = st.dictionaries(st.text(), JSON_VALUES, max_size=4)
RECORDS = st.builds(
    RunRecord,
    arguments=FACTS,
    layout=FACTS,
    data=FACTS,
    rows_per_step=st.integers(1),
    total_steps=st.integers(0),
    model=FACTS,
    versions=st.dictionaries(st.text(), st.text(), max_size=3),
    stage_weights=st.none() | st.text(),
    adapter_base=st.none() | FACTS,
)


def read(directory: Path, value: Any) -> SavedRun:
    (directory / "running_states.json").write_text(json.dumps(value))
    return SavedRun.read(directory)


@given(RECORDS)
def test_a_record_is_read_as_it_was_written(record: RunRecord) -> None:
    assert RunRecord.from_json(json.loads(json.dumps(record.to_json()))) == record


@given(RECORDS, st.dictionaries(st.text(min_size=20), JSON_VALUES, max_size=2))
def test_what_a_later_version_adds_is_passed_over(record: RunRecord, more: dict[str, Any]) -> None:
    assert RunRecord.from_json({**more, **record.to_json()}) == record


def test_a_saved_record_comes_out_as_it_went_in(tmp_path: Path) -> None:
    """Byte for byte: earlier versions read what this one writes."""
    saved = read(tmp_path, SAVED)
    assert saved.state == TrainState(step=7, position=112, tokens=7168)
    assert json.dumps(state_json(saved.record, saved.state)) == json.dumps(SAVED)


def test_a_saved_run_continues_with_its_flags(tmp_path: Path) -> None:
    settings = parse_settings(["--pretrained", "some/model", *FLAGS.split()])
    saved, layout = read(tmp_path, SAVED), settings.layout.on(2)
    assert SAVED["arguments"].keys() <= settings.flags().keys()  # later ones count as their default
    now = replace(saved.record, arguments=settings.as_json(), layout=layout.as_json())
    check_resumable(saved, now, settings, layout)
    assert list(now.to_json()) == list(saved.record.to_json())


def test_records_of_the_first_versions_are_read(tmp_path: Path) -> None:
    later = ("model", "versions", "total_steps", "stage_weights", "adapter_base")
    record = read(tmp_path, {name: part for name, part in SAVED.items() if name not in later}).record
    assert (record.model, record.versions, record.total_steps) == ({}, {}, 0)
    assert (record.stage_weights, record.adapter_base) == (None, None)
    assert "adapter_base" not in record.to_json()


@pytest.mark.parametrize("missing", ["state", "arguments", "layout", "data", "rows_per_step"])
def test_a_file_that_is_no_record_is_named(missing: str, tmp_path: Path) -> None:
    value = {name: part for name, part in SAVED.items() if name != missing}
    with pytest.raises(UserError, match=rf"running_states\.json: not the record of a run .*{missing}"):
        read(tmp_path, value)


def test_a_state_of_another_shape_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not the record of a run of this suite"):
        read(tmp_path, {**SAVED, "state": {"steps": 7}})


def test_facts_of_a_model_and_the_machine() -> None:
    facts = model_facts(make_config())
    assert tuple(facts) == MODEL_FIELDS
    assert (facts["vocab_size"], facts["num_key_value_heads"]) == (128, 4)
    assert installed_versions().keys() >= {"python", "torch", "transformers"}
    json.dumps([facts, installed_versions()])

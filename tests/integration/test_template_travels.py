"""From conversations to a served answer: the template of the data is in the model, and is found there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import gguf
import pyarrow as pa
import pyarrow.parquet as pq
from gguf.vocab import SpecialVocab
from launch import train
from support import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

QUESTION, ANSWER = "What is the sky?", "The sky is blue, and it is high."
TALKS = [
    [
        ("system", "Be brief."),
        ("human", " Where is 长江?"),
        ("gpt", "In China.\n"),
        ("human", "▁?"),
        ("gpt", " Yes"),
    ],
    *[[("human", QUESTION), ("gpt", ANSWER)]] * 40,
    [("human", ""), ("gpt", "<think>\n</think> What?")],
]
ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def run_script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def as_chat(talk: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": ROLES[role], "content": content} for role, content in talk]


def test_from_parquet_to_a_served_answer(tmp_path: Path, tiny_model_dir: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    config_file = model / "tokenizer_config.json"
    config = {**json.loads(config_file.read_text()), "model_max_length": 10**30, "chat_template": "{{ 1 }}"}
    config_file.write_text(json.dumps(config))
    (model / "chat_template.jinja").write_text("{{ messages }}")  # would be taken in place of what is written
    raw = tmp_path / "raw"
    raw.mkdir()
    conversations = [[{"from": role, "value": content} for role, content in talk] for talk in TALKS]
    pq.write_table(pa.table({"id": range(len(TALKS)), "conversations": conversations}), raw / "talks.parquet")

    data = tmp_path / "data"
    prepared = run_script(
        "prepare_sft_dataset.py",
        *(
            "--data_input_dirs",
            raw,
            "--tokenizer_dir",
            model,
            "--data_output_dirs",
            data,
            "--max_length",
            250,
        ),
        *("--llama_version", 2, "--num_spliced_dataset_bins", 1, "--num_workers", 1),
    )
    assert "slow tokenizer" not in prepared.stderr
    stats = json.loads((data / "stats.json").read_text())
    assert stats["template"] == "colossal"
    assert stats["input_formats"] == {"sharegpt": 1}
    assert stats["records"]["kept"] == len(TALKS)
    run = train(
        tmp_path,
        1,
        *("--pretrained", model, "--dataset", data / "arrow", "--max_length", 250, "--plugin", "ddp"),
        *("--mixed_precision", "fp32", "--batch_size", 4, "--accumulation_steps", 1, "--num_epochs", 8),
        *("--lr", 1e-2, "--save_interval", 0, "--padding_mode", "longest", "--skip_save_each_epoch"),
    )
    assert run.returncode == 0, run.output[-3000:]
    assert "Chat template: colossal, as in the data" in run.output

    trained = run.save_dir / "modeling"
    saved = json.loads((trained / "tokenizer_config.json").read_text())
    text = saved.pop("chat_template")
    del config["chat_template"]
    assert saved == config
    assert not (trained / "chat_template.jinja").exists()
    tokenizer = AutoTokenizer.from_pretrained(trained)
    rows = datasets.load_from_disk(str(data / "arrow" / "part-00000"))
    found = {(tuple(row["input_ids"]), tuple(row["labels"])) for row in rows}
    expected = set()
    for talk in TALKS:
        out = tokenizer.apply_chat_template(
            as_chat(talk), return_dict=True, return_assistant_tokens_mask=True
        )
        labels = (
            i if mask else -100 for i, mask in zip(out["input_ids"], out["assistant_masks"], strict=True)
        )
        expected.add((tuple(out["input_ids"]), tuple(labels)))
    assert found == expected

    # Answers: transformers with nothing added, ours, and where both of them stop.
    question = [{"role": "user", "content": QUESTION}]
    assert GenerationConfig.from_pretrained(trained).eos_token_id == tokenizer.eos_token_id
    talker = pipeline("text-generation", model=str(trained), device="cpu")
    (generated,) = talker(question, max_new_tokens=60)
    # The pipeline decodes prompt and answer together, and keeps the space that LLaMA-2 begins a text with.
    assert generated["generated_text"][-1] == {"role": "assistant", "content": f" {ANSWER}"}
    (raw / "ask.jsonl").write_text(json.dumps({"prompt": QUESTION}))
    answered = run_script(
        "inference_example.py",
        *(
            "--model_path",
            trained,
            "--input_file",
            raw / "ask.jsonl",
            "--do_sample",
            False,
            "--device",
            "cpu",
        ),
    )
    answer = json.loads(answered.stdout)
    assert (answer["answer"], answer["stopped_by"]) == (ANSWER, "end")
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
    ids = AutoModelForCausalLM.from_pretrained(trained).generate(prompt, max_new_tokens=60)
    assert ids[0, -1] == tokenizer.eos_token_id
    assert ids.shape[1] - prompt.shape[1] == answer["num_tokens"]

    # GGUF: what llama.cpp's converter reads and writes.
    vocabulary = SpecialVocab(trained)
    assert vocabulary.chat_template == text
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    vocabulary.add_to_gguf(writer, quiet=True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    field = gguf.GGUFReader(tmp_path / "model.gguf").fields["tokenizer.chat_template"]
    assert field.contents() == text

    # lm-evaluation-harness --apply_chat_template.
    from lm_eval.models.huggingface import HFLM

    harness = HFLM(pretrained=str(trained), device="cpu")
    assert harness.tok_encode(harness.apply_chat_template(question)) == prompt[0].tolist()

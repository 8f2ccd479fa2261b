"""What training saves beside the weights, in real runs: all that loads can be saved, and is the same."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from corpus import sample_texts
from launch import train
from support import ROOT, load_script

MAX_LENGTH = 250
FEW_STEPS = ["--max_steps", 1, "--batch_size", 2, "--accumulation_steps", 1, "--save_interval", 0]
DDP = ["--plugin", "ddp", "--mixed_precision", "fp32"]
# As a well-known upload of LLaMA-2 has it: it loads, and transformers refuses to save it.
SAMPLING_WITHOUT_DO_SAMPLE = {
    "_from_model_config": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "temperature": 0.9,
    "top_p": 0.6,
}
QUESTION, ANSWER = "What is the sky?", "The sky is blue, and it is high."
CHAT_TEMPLATE = (
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|reserved_special_token_0|>\n"
    "{% endgeneration %}{% else %}{{ m['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{% endif %}"
)


def copy_model(source: Path, target: Path, **generation: object) -> Path:
    shutil.copytree(source, target)
    if generation:
        (target / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    return target


def flags_for(training_inputs, model: Path) -> list[str]:
    flags = training_inputs.flags()
    return [flags[0], str(model), *flags[2:]]


def test_sampling_defaults_without_sampling_are_no_end_of_a_run(tmp_path, training_inputs):
    from transformers import GenerationConfig

    model = copy_model(training_inputs.model, tmp_path / "model", **SAMPLING_WITHOUT_DO_SAMPLE)
    flags = [*flags_for(training_inputs, model), *FEW_STEPS, *DDP]
    run = train(tmp_path, 2, *flags)
    assert run.returncode == 0, run.output[-3000:]
    for name in ("temperature 0.9", "top_p 0.6"):
        assert f"{model / 'generation_config.json'}: {name} has no meaning" in run.output
    for directory in (run.save_dir / "modeling", run.save_dir / "epoch-0_step-1" / "modeling"):
        saved = GenerationConfig.from_pretrained(directory)
        assert (saved.temperature, saved.top_p, saved.do_sample) == (1.0, 1.0, False)
        assert (saved.bos_token_id, saved.eos_token_id, saved.pad_token_id) == (1, 2, 0)


@pytest.mark.parametrize("dry_run", [True, False])
def test_what_can_not_be_saved_is_refused_before_the_first_step(tmp_path, training_inputs, dry_run):
    model = copy_model(training_inputs.model, tmp_path / "model", eos_token_id=2, max_new_tokens=-5)
    flags = [*flags_for(training_inputs, model), *FEW_STEPS, *DDP]
    if dry_run:
        command = [sys.executable, str(ROOT / "train.py"), *map(str, flags), "--dry_run"]
        finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert finished.returncode == 2
        output = finished.stderr
    else:
        run = train(tmp_path, 2, *flags, timeout=60)  # nobody waits for the others
        assert run.returncode != 0
        assert not list(run.save_dir.glob("epoch-*"))
        output = run.output
    assert output.count(f"error: {model / 'generation_config.json'}: ") == 1
    assert "max_new_tokens" in output
    assert 'train.py", line' not in output, "no traceback of ours"


@pytest.mark.parametrize("lora", [[], ["--lora_rank", 2, "--lora_embeddings", "freeze"]])
def test_a_tokenizer_is_saved_byte_for_byte(tmp_path, training_inputs, lora):
    from transformers import AutoTokenizer

    model = copy_model(training_inputs.model, tmp_path / "model")
    others = {
        "vocabulary_extension.json": "{}",
        "chat_template.jinja": "{{ messages }}",
        "additional_chat_templates/tools.jinja": "{{ tools }}",
        "tokenization_own.py": "# code\n",
    }
    for name, content in others.items():
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(content)
    run = train(tmp_path, 1, *flags_for(training_inputs, model), *FEW_STEPS, *DDP, *lora)
    assert run.returncode == 0, run.output[-3000:]
    names = ["tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", *others]
    before = [AutoTokenizer.from_pretrained(training_inputs.model, use_fast=fast) for fast in (False, True)]
    texts = [*sample_texts(40, seed=3), "a", "  two", "人工智能", "x</s> y"]
    agreed = [text for text in texts if before[0](text).input_ids == before[1](text).input_ids]
    assert len(agreed) > 40
    for directory in (run.save_dir / "modeling", run.save_dir / "epoch-0_step-1" / "modeling"):
        for name in names:
            assert (directory / name).read_bytes() == (model / name).read_bytes(), name
        assert not (directory / "tokenizer.json").exists(), "nothing that the source has not"
        slow = AutoTokenizer.from_pretrained(directory, use_fast=False)
        fast = AutoTokenizer.from_pretrained(directory)
        for text in agreed:
            assert slow(text).input_ids == fast(text).input_ids == before[1](text).input_ids, text


@pytest.fixture(scope="module")
def llama3_model(tmp_path_factory, llama3_tokenizer_dir: Path) -> Path:
    """LLaMA-3's shape: the answers of its chat end with `<|eot_id|>`, its EOS is `<|end_of_text|>`."""
    from transformers import AutoTokenizer

    directory = tmp_path_factory.mktemp("llama3") / "model"
    shutil.copytree(llama3_tokenizer_dir, directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    maker = load_script(ROOT / "examples" / "make_base_model.py")
    maker.make_model(
        directory, len(tokenizer), hidden_size=64, num_layers=2, num_heads=4, max_positions=256, seed=0
    )
    for name in ("config.json", "generation_config.json"):
        content = json.loads((directory / name).read_text())
        content |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        (directory / name).write_text(json.dumps(content))
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": CHAT_TEMPLATE}))
    return directory


@pytest.mark.parametrize(
    ("kind", "prepare_flags", "end"),
    [
        ("version 2", ["--llama_version", "2"], "</s>"),
        ("version 3", ["--llama_version", "3"], "<|eot_id|>"),
        ("chat template", ["--chat_template"], "<|reserved_special_token_0|>"),
    ],
)
def test_generate_ends_where_an_answer_ends(kind, prepare_flags, end, tmp_path, tiny_model_dir, llama3_model):
    """A model that knows one answer by heart, and nothing but `max_new_tokens` given to `generate`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    model_dir = tiny_model_dir if kind == "version 2" else llama3_model
    raw = tmp_path / "raw"
    raw.mkdir()
    messages = [{"from": "human", "content": QUESTION}, {"from": "assistant", "content": ANSWER}]
    line = json.dumps({"messages": messages}) + "\n"
    (raw / "data.jsonl").write_text(line * 40)
    script, flags = str(ROOT / "prepare_sft_dataset.py"), ["--num_workers", "1", *prepare_flags]
    flags += ["--data_input_dirs", str(raw), "--tokenizer_dir", str(model_dir)]
    flags += ["--data_output_dirs", str(tmp_path / "data"), "--max_length", str(MAX_LENGTH)]
    flags += ["--num_spliced_dataset_bins", "1"]
    subprocess.run([sys.executable, script, *flags], check=True, capture_output=True)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    end_id = tokenizer.convert_tokens_to_ids(end)
    prepared_file = tmp_path / "data" / "arrow" / "part-00000" / "prepared.json"
    prepared = json.loads(prepared_file.read_text())
    assert prepared.get("end_of_turn_ids") == (None if kind == "chat template" else [end_id])
    run = train(
        tmp_path,
        1,
        *("--pretrained", model_dir, "--dataset", tmp_path / "data" / "arrow", "--max_length", MAX_LENGTH),
        *(
            "--batch_size",
            4,
            "--accumulation_steps",
            1,
            "--num_epochs",
            6,
            "--lr",
            1e-2,
            "--save_interval",
            0,
        ),
        *("--padding_mode", "longest", "--skip_save_each_epoch", *DDP),
    )
    assert run.returncode == 0, run.output[-3000:]
    trained = run.save_dir / "modeling"
    source_eos = GenerationConfig.from_pretrained(model_dir).eos_token_id
    expected = source_eos if end_id == source_eos else [source_eos, end_id]
    assert GenerationConfig.from_pretrained(trained).eos_token_id == expected
    if end_id == source_eos:
        name = "generation_config.json"
        assert (trained / name).read_bytes() == (model_dir / name).read_bytes()

    model = AutoModelForCausalLM.from_pretrained(trained)
    import datasets

    (row,) = datasets.load_from_disk(str(prepared_file.parent)).select([0])
    first_answer = next(i for i, label in enumerate(row["labels"]) if label != -100)
    prompt = torch.tensor([row["input_ids"][:first_answer]])
    ids = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=100)[0].tolist()
    assert ids[-1] == end_id
    assert len(ids) < len(prompt[0]) + 100
    assert tokenizer.decode(ids[first_answer:-1], skip_special_tokens=True).strip() == ANSWER

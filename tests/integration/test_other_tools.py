"""What `train.py` leaves, in others' tools: lm-evaluation-harness, transformers, safetensors, peft, gguf."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
from corpus import sample_texts
from gguf.vocab import SentencePieceVocab, SpecialVocab
from launch import train
from peft import AutoPeftModelForCausalLM
from safetensors import safe_open
from safetensors.torch import load_file
from support import ROOT, load_script
from training_inputs import prepare
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from colossal_llama.inference.loading import load_model
from colossal_llama.inference.settings import ModelSettings

TASK = ROOT / "examples" / "evaluation" / "local_multiple_choice.yaml"
LETTERS = "ABCD"


def read_questions(name: str) -> list[dict[str, str]]:
    lines = (TASK.parent / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def render(question: dict[str, str]) -> str:
    choices = "".join(f"\n{letter}. {question[letter]}" for letter in LETTERS)
    return f"{question['question']}{choices}\nAnswer:"


FLAGS = ["--plugin", "ddp", "--mixed_precision", "fp32", "--batch_size", 2, "--accumulation_steps", 1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`modeling/` of a run that learned the answers to every other question."""
    directory = tmp_path_factory.mktemp("evaluated")
    texts = [f"{render(question)} {question['answer']}" for question in read_questions("questions.jsonl")]
    maker = load_script(ROOT / "examples" / "make_base_model.py")
    letters = [f"Answer: {letter}" for letter in LETTERS]
    maker.make_tokenizer(sample_texts(200, seed=1) + texts + 50 * letters, directory / "model", 700)
    maker.make_model(
        directory / "model", 700, hidden_size=64, num_layers=2, num_heads=4, max_positions=2048, seed=0
    )
    (directory / "raw").mkdir()
    with open(directory / "raw" / "answers.jsonl", "w", encoding="utf-8") as file:
        for text in 16 * texts[::2]:
            record = {"source": text[:-2], "target": text[-2:], "category": "unknown"}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    data = prepare(directory / "raw", directory / "model", directory / "data", 1, "--max_length", "512")
    run = train(
        directory / "run",
        1,
        *("--pretrained", directory / "model", "--dataset", data, "--max_length", 512),
        *(*FLAGS, "--lr", 5e-3, "--num_epochs", 5, "--save_interval", 0),
    )
    assert run.returncode == 0, run.output[-3000:]
    return run.save_dir / "modeling"


@pytest.fixture(scope="module")
def adapter(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`modeling/` of a short LoRA run on top of the checkpoint."""
    directory = tmp_path_factory.mktemp("adapter")
    data = checkpoint.parents[2] / "data" / "arrow"
    run = train(
        directory,
        1,
        *("--pretrained", checkpoint, "--dataset", data, "--max_length", 512, *FLAGS),
        *("--lora_rank", 4, "--lr", 1e-2, "--max_steps", 4, "--save_interval", 0),
    )
    assert run.returncode == 0, run.output[-3000:]
    return run.save_dir / "modeling"


def score(model: torch.nn.Module, tokenizer, prompt: str) -> list[float]:
    """Log-probabilities of the four letters as the token after a prompt."""
    ids = tokenizer(prompt)["input_ids"]
    letter_ids = []
    for letter in LETTERS:
        with_letter = tokenizer(f"{prompt} {letter}")["input_ids"]
        assert with_letter[:-1] == ids, "a letter is one token: its logit is all there is to it"
        letter_ids.append(with_letter[-1])
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1]
    return torch.log_softmax(logits.float(), -1)[letter_ids].tolist()


@pytest.mark.parametrize("num_fewshot", [0, 5])
def test_harness_scores_first_token_logits(num_fewshot: int, checkpoint: Path, tmp_path: Path) -> None:
    """Every log-likelihood and the accuracy, zero-shot and 5-shot."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    result = subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "run", "--model", "hf"),
            *("--model_args", f"pretrained={checkpoint},dtype=float32", "--device", "cpu"),
            *("--tasks", "local_multiple_choice", "--include_path", str(TASK.parent)),
            *("--num_fewshot", str(num_fewshot), "--batch_size", "4"),
            *("--output_path", str(tmp_path / "results"), "--log_samples"),
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    (results_file,) = tmp_path.glob("results/*/results_*.json")
    (samples_file,) = tmp_path.glob("results/*/samples_*.jsonl")
    results = json.loads(results_file.read_text(encoding="utf-8"))
    samples = [json.loads(line) for line in samples_file.read_text(encoding="utf-8").splitlines()]
    samples.sort(key=lambda sample: sample["doc_id"])

    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    shots = [f"{render(shot)} {shot['answer']}\n\n" for shot in read_questions("fewshot.jsonl")[:num_fewshot]]
    questions, answers = read_questions("questions.jsonl"), []
    assert len(samples) == len(questions)
    for question, sample in zip(questions, samples, strict=True):
        expected = score(model, tokenizer, "".join(shots) + render(question))
        found = [float(response[0][0]) for response in sample["resps"]]
        assert found == pytest.approx(expected, abs=1e-4)
        answers.append(LETTERS[expected.index(max(expected))])
    correct = [answer == question["answer"] for answer, question in zip(answers, questions, strict=True)]
    accuracy = sum(correct) / len(correct)
    assert results["results"]["local_multiple_choice"]["acc,none"] == pytest.approx(accuracy)
    if num_fewshot == 0:  # as it was trained: a model with one answer for everything would show little
        assert len(set(answers)) > 1
        assert 0.5 <= accuracy < 1


def test_transformers_and_safetensors_find_everything(checkpoint: Path) -> None:
    model, report = AutoModelForCausalLM.from_pretrained(
        checkpoint, torch_dtype="auto", output_loading_info=True
    )
    assert not any(report.values()), report
    tensors = load_file(checkpoint / "model.safetensors")
    state = model.state_dict()
    assert tensors.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in tensors.items())
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    config, generation = model.config, model.generation_config
    assert config.architectures == ["LlamaForCausalLM"]
    assert (
        (generation.bos_token_id, generation.eos_token_id)
        == (config.bos_token_id, config.eos_token_id)
        == (1, 2)
    )


def test_peft_loads_the_adapter(adapter: Path, checkpoint: Path) -> None:
    """By its own record of the base model; and merged, which is what `inference_example.py` does."""
    ids = torch.tensor([[1, 400, 401, 402]])
    adapted = AutoPeftModelForCausalLM.from_pretrained(adapter).eval()
    assert adapted.peft_config["default"].base_model_name_or_path == str(checkpoint)
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(checkpoint).eval()(ids).logits
        expected = adapted(ids).logits
        merged = load_model(ModelSettings(str(adapter), device="cpu", dtype="fp32")).model(ids).logits
    assert (expected - plain).abs().max() > 1e-3
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=1e-4)


def test_gguf_knows_every_tensor_and_token(checkpoint: Path) -> None:
    """llama.cpp's converter asks this package for the names of tensors and for the vocabulary."""
    config = AutoConfig.from_pretrained(checkpoint)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    unknown = [
        name
        for name in load_file(checkpoint / "model.safetensors")
        if names.get_name(name, try_suffixes=(".weight",)) is None
    ]
    assert not unknown
    vocabulary = SentencePieceVocab(checkpoint)
    assert vocabulary.vocab_size == config.vocab_size
    pieces = [text.decode() for text, _, _ in vocabulary.all_tokens()]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert pieces == tokenizer.convert_ids_to_tokens(range(config.vocab_size))
    special = SpecialVocab(checkpoint, n_vocab=config.vocab_size)
    assert {"bos": 1, "eos": 2}.items() <= special.special_token_ids.items()
    assert special.add_special_token["bos"] is True

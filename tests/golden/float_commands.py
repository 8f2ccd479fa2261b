"""Commands whose outputs hold floats, and user mistakes: compared on one machine, not stored."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from golden.commands import (
    LLAMA2,
    ONE,
    SMALL,
    TALKS,
    TWO_DIRS,
    Case,
    Command,
    make_model,
    prepare_case,
    training_flags,
)

BASE, SFT, EXTENDED = "data/base", "data/sft-llama2", "data/pretrain-chunk"
EXTENDED_MODEL = "models/llama2"
COMMON = [
    *("--lr", 1e-3, "--warmup_steps", 2, "--num_epochs", 2, "--max_length", 96),
    *("--save_interval", 2, "--skip_save_each_epoch"),
]
SHORT = ["--max_steps", 4]
FP32, BF16, FP16 = (["--mixed_precision", name] for name in ("fp32", "bf16", "fp16"))


def make_models(directory: Path) -> None:
    """Adds random models of the base tokenizers to `inputs`; what they answer depends on the question."""
    inputs = directory / "inputs"
    make_model(inputs / "llama2", inputs / "model", 361, 32, num_layers=2, initializer_range=0.2)
    make_model(
        inputs / "llama2", inputs / "model-tied", 361, 32, num_layers=2, initializer_range=0.2, tied=True
    )
    make_model(inputs / "llama3", inputs / "model-llama3", 406, 32, num_layers=1, initializer_range=0.2)


def model_cases() -> list[Case]:
    def extend(name: str, source: str, tokenizer: str, *flags: object) -> Case:
        command = Command(
            "colossal_llama/model/init_model.py",
            *("--source_model_and_tokenizer_path", source, "--target_tokenizer_path", tokenizer),
            *("--target_model_path", name, *flags),
        )
        return Case(name, [command], [tokenizer])

    base = Command(
        "examples/make_base_model.py",
        *("--data_input_dirs", TWO_DIRS, "--output_dir", "models/base", "--vocab_size", 420),
        *("--hidden_size", 16, "--num_layers", 1, "--num_heads", 2),
    )
    return [
        Case("models/base", [base]),
        extend(EXTENDED_MODEL, "inputs/model", LLAMA2),
        extend("models/llama2-bf16", "inputs/model", LLAMA2, "--dtype", "bf16", "--pad_to_multiple_of", 64),
        extend("models/llama3-fp16", "inputs/model-llama3", "tokenizers/llama3-add", "--dtype", "fp16"),
        prepare_case("base", "pretrain", "inputs/llama2", TWO_DIRS, *SMALL, *ONE),
    ]


def rows(batch: int, accumulation: int) -> list[object]:
    return ["--batch_size", batch, "--accumulation_steps", accumulation]


def three_d(*flags: object) -> list[object]:
    return ["--plugin", "3d", *flags]


def train(
    name: str,
    processes: int,
    flags: Sequence[object],
    *continued: tuple[int, Sequence[object]],
    data: str = BASE,
    parts: Sequence[str] = ("",),
    model: str = "inputs/model",
    needs: Sequence[str] = (),
) -> Case:
    """A run, and runs that continue it: (processes, flags), with `--load_checkpoint latest` unless told."""
    name = f"training/{name}"
    commands = []
    for number, (count, more) in enumerate([(processes, flags), *continued]):
        words = [*training_flags(name, [f"{data}/arrow{part}" for part in parts], model), *COMMON, *more]
        if number and "--load_checkpoint" not in more:
            words += ["--load_checkpoint", "latest"]
        if "--max_steps" not in more:
            words += SHORT
        commands.append(Command("train.py", *words, processes=count if count > 1 else 0))
    needed = [data, *([model] if model.startswith("models/") else []), *needs]
    return Case(name, commands, needed)


ZERO2, ZERO2_CPU, DDP = (["--plugin", name] for name in ("zero2", "zero2_cpu", "ddp"))
SEQUENCE = ["--enable_sequence_parallelism", "--sp_mode"]
LORA = ["--lora_rank", 4]
PIPELINE = ["--pp", 2, "--microbatch_size", 2]
FLASH = ["--use_grad_checkpoint", "--use_flash_attn"]


def layout_cases() -> list[Case]:
    """Every plugin, layout and precision."""
    return [
        train("ddp-fp32", 1, [*DDP, *FP32, *rows(4, 2)]),
        train("ddp-bf16", 1, [*DDP, *BF16, *rows(4, 2)]),
        train("ddp-fp16", 1, [*DDP, *FP16, *rows(4, 2)]),
        train("ddp-x2-fp32", 2, [*DDP, *FP32, *rows(2, 2)]),
        train("ddp-x2-bf16", 2, [*DDP, *BF16, *rows(2, 2)]),
        train("zero2-fp32", 2, [*ZERO2, *FP32, *rows(2, 2)]),
        train("zero2-bf16", 2, [*ZERO2, *BF16, *rows(2, 2)]),
        train("zero2-fp16", 2, [*ZERO2, *FP16, *rows(2, 2)]),
        train("zero2_cpu-fp32", 2, [*ZERO2_CPU, *FP32, *rows(2, 2)]),
        train("zero2_cpu-fp16", 2, [*ZERO2_CPU, *FP16, *rows(2, 2)]),
        train("3d-zero0-bf16", 2, [*three_d("--zero_stage", 0), *BF16, *rows(2, 2)]),
        train("3d-zero1-bf16", 2, [*three_d("--zero_stage", 1), *BF16, *rows(2, 2)]),
        train("3d-zero2-fp16", 2, [*three_d("--zero_stage", 2), *FP16, *rows(2, 2)]),
        train("3d-offload-bf16", 2, [*three_d("--zero_cpu_offload"), *BF16, *rows(2, 2)]),
        train("3d-tp2-zero0-fp32", 2, [*three_d("--tp", 2, "--zero_stage", 0), *FP32, *rows(4, 2)]),
        train("3d-tp2-zero1-bf16", 2, [*three_d("--tp", 2), *BF16, *rows(4, 2)]),
        train("3d-tp2-zero2-fp16", 2, [*three_d("--tp", 2, "--zero_stage", 2), *FP16, *rows(4, 2)]),
        train("3d-pp2-zero0-bf16", 2, [*three_d(*PIPELINE, "--zero_stage", 0), *BF16, *rows(4, 2)]),
        train("3d-pp2-zero1-fp32", 2, [*three_d(*PIPELINE), *FP32, *rows(4, 2)]),
        train("3d-pp2-fp16", 2, [*three_d(*PIPELINE), *FP16, *rows(4, 2)]),
        train("3d-tp2-pp2-bf16", 4, [*three_d("--tp", 2, *PIPELINE), *BF16, *rows(4, 2)]),
        train(
            "split_gather-zero2-bf16",
            2,
            [*three_d("--tp", 2, "--zero_stage", 2), *SEQUENCE, "split_gather", *BF16, *rows(4, 2)],
        ),
        train("all_to_all-fp32", 2, [*three_d("--sp", 2), *SEQUENCE, "all_to_all", *FP32, *rows(4, 2)]),
    ]


def feature_cases() -> list[Case]:
    """What changes the training itself, on the cheapest layout that shows it."""
    sft_rows = ["--max_length", 512, *rows(4, 1)]
    evaluated = ["--eval_dataset", *(f"{BASE}/arrow/part-0000{number}" for number in (2, 1))]
    return [
        train("freeze", 1, [*DDP, *FP32, *rows(4, 2), "--freeze_non_embeds_params"]),
        train("freeze-tp2", 2, [*three_d("--tp", 2), *BF16, *rows(4, 2), "--freeze_non_embeds_params"]),
        train("lora", 2, [*ZERO2, *BF16, *rows(2, 2), *LORA]),
        train("lora-merged", 1, [*three_d(), *FP32, *rows(4, 2), *LORA, "--merge_lora"]),
        train(
            "lora-embeddings",
            1,
            [*ZERO2, *BF16, *rows(4, 2), *LORA, "--lora_embeddings", "train", "--merge_lora"],
            data=EXTENDED,
            model=EXTENDED_MODEL,
        ),
        train(
            "lora-embeddings-frozen",
            1,
            [*DDP, *FP32, *rows(4, 2), *LORA, "--lora_embeddings", "freeze"],
            data=EXTENDED,
            model=EXTENDED_MODEL,
        ),
        train("tied", 2, [*ZERO2, *BF16, *rows(2, 2)], model="inputs/model-tied"),
        train("tied-tp2", 2, [*three_d("--tp", 2), *FP32, *rows(4, 2)], model="inputs/model-tied"),
        train(
            "tied-pp2",
            2,
            [*three_d(*PIPELINE, "--zero_stage", 0), *FP32, *rows(4, 2)],
            model="inputs/model-tied",
        ),
        train("extended", 1, [*DDP, *FP32, *rows(4, 2)], data=EXTENDED, model=EXTENDED_MODEL),
        train("neft", 1, [*DDP, *FP32, *rows(4, 2), "--use_neft", "--neft_alpha", 7]),
        train("neft-tp2", 2, [*three_d("--tp", 2), *BF16, *rows(4, 2), "--use_neft"]),
        train("bucketed", 1, [*DDP, *FP32, *rows(8, 2), "--bucketed", "--max_steps", 9]),
        train("grad-checkpoint", 1, [*DDP, *FP32, *rows(4, 2), *FLASH]),
        train("evaluated", 2, [*ZERO2, *BF16, *rows(2, 2), *evaluated, "--eval_interval", 2]),
        train(
            "evaluated-pp2",
            2,
            [*three_d("--pp", 2), *FP32, *rows(4, 2), *FLASH, *evaluated[:2], "--eval_interval", 3],
        ),
        train("longest", 1, [*DDP, *FP32, *rows(4, 2), "--padding_mode", "longest", "--pad_token", "unk"]),
        train("not-isolated", 1, [*DDP, *FP32, *rows(4, 2), "--no-isolate_documents"]),
        train("no-clip", 1, [*ZERO2, *FP16, *rows(4, 2), "--grad_clip", 0, "--weight_decay", 0]),
        train("sft", 1, [*DDP, *FP32, *sft_rows], data=SFT, model=EXTENDED_MODEL),
        train(
            "limits",
            1,
            [*DDP, *FP32, *rows(2, 1), "--save_total_limit", 1, "--no-async_save", *["--seed", 7]],
        ),
        train("epochs", 1, [*DDP, *FP32, *rows(8, 4), "--max_steps", -1, "--save_interval", 0]),
        train(
            "stage",
            1,
            [*DDP, *FP32, *rows(4, 2), "--load_checkpoint", "training/ddp-fp32/checkpoints/modeling"],
            needs=["training/ddp-fp32"],
        ),
    ]


def resume_cases() -> list[Case]:
    """Stopped and resumed on the same layout, and on others."""
    first = ["--max_steps", 3]
    whole = ["--max_steps", 6]
    zero2 = [*ZERO2, *BF16, *rows(2, 2), "--use_neft"]
    tp2 = [*three_d("--tp", 2), *FP16, *rows(4, 2)]

    def from_step(name: str) -> list[object]:
        return ["--load_checkpoint", f"training/{name}/checkpoints/epoch-0_step-2"]

    return [
        train("resumed", 1, [*DDP, *FP32, *rows(4, 2), *first], (1, [*DDP, *FP32, *rows(4, 2), *whole])),
        train(
            *("resumed-step", 2, [*zero2, *first]),
            (2, [*zero2, *whole, *from_step("resumed-step")]),
        ),
        train("resumed-tp2", 2, [*tp2, *first], (2, [*tp2, *whole])),
        train(
            *("resumed-lora", 1, [*ZERO2, *BF16, *rows(4, 2), *LORA, *first]),
            (1, [*ZERO2, *BF16, *rows(4, 2), *LORA, *whole]),
        ),
        train(
            "other-layouts",
            2,
            [*ZERO2, *FP32, *rows(2, 2), "--max_steps", 2],
            (2, [*three_d("--tp", 2, "--zero_stage", 2), *FP32, *rows(4, 2), "--max_steps", 4]),
            (1, [*DDP, *FP32, *rows(8, 1), "--max_steps", 5]),
            (2, [*three_d("--pp", 2), *FP32, *rows(4, 2), "--max_steps", 6]),
        ),
    ]


def inference_cases() -> list[Case]:
    base, tuned = "training/ddp-fp32", "training/sft"

    def ask(
        name: str, run: str, *flags: object, stdin: str = "", modeling: str = "checkpoints/modeling"
    ) -> Case:
        command = Command(
            "inference_example.py",
            *("--model_path", f"{run}/{modeling}", "--max_new_tokens", 24, *flags),
            stdin=stdin,
            streams=["stdout"],
        )
        return Case(f"inference/{name}", [command], [run])

    greedy = ["--do_sample", False]
    question = ["--input_txt", "What do bees collect?", "--input_txt", "法国的首都是哪里？"]
    prompts = '{"prompt": "The moon"}\n{"prompt": "长江是"}\n'
    return [
        ask("greedy-sft", tuned, *greedy, *question),
        ask("greedy-pretrained", base, *greedy, *question, "--prompt_style", "pretrained"),
        ask("sampled", tuned, *question, "--temperature", 1, "--seed", 3),
        ask("chat", tuned, *greedy, "--chat", stdin="What is this?\nWhy?\nclear\n你好\nexit\n"),
        ask("file", tuned, *greedy, *("--input_file", "-", "--input_format", "jsonl"), stdin=prompts),
        ask("adapter", "training/lora", *greedy, *question),
        ask("bf16", base, *greedy, *question, "--dtype", "bf16"),
    ]


def plan_cases() -> list[Case]:
    """`--dry_run`, as one process and as one of many."""

    def plan(name: str, world_size: int, *flags: object) -> Case:
        words = [*training_flags(f"plans/{name}", [f"{BASE}/arrow"]), *COMMON, *flags, "--dry_run"]
        command = Command("train.py", *words, world_size=world_size, streams=["stdout"])
        return Case(f"plans/{name}", [command], [BASE])

    return [
        plan("ddp", 1, *DDP, *rows(4, 2)),
        plan("gemini", 4, "--plugin", "gemini", *rows(1, 1)),
        plan("3d", 8, *three_d("--tp", 2, "--pp", 2), *BF16, *rows(4, 1)),
    ]


def mistake_cases() -> list[Case]:
    """Exit code and both streams of what users get wrong."""
    pretrain, sft = "prepare_pretrain_dataset.py", "prepare_sft_dataset.py"
    extend, model = "colossal_llama/tokenizer/init_tokenizer.py", "colossal_llama/model/init_model.py"
    run = [*training_flags("mistakes/train", [f"{BASE}/arrow"]), *COMMON]
    prepared = ["--tokenizer_dir", "inputs/llama2", "--data_output_dirs", "mistakes/data", *ONE]
    sources = ["--source_tokenizer_dir", "inputs/llama2", "--expand_tokens_file", "inputs/pieces.jsonl"]
    target = ["--target_tokenizer_dir", "mistakes/tokenizer"]
    mistakes: dict[str, tuple[Sequence[object], Sequence[str]]] = {
        "unknown-flag": (["train.py", "--no_such_flag", 1], []),
        "bad-values": (["train.py", "--lr", "abc", "--plugin", "nope", "--pretrained", "/missing"], []),
        "no-flags": (["train.py"], []),
        "missing-data": (["train.py", *run, *DDP, "--dataset", "nowhere"], []),
        "layout": (["train.py", *run, *three_d("--tp", 3, "--pp", 5), "--batch_size", 5], [BASE]),
        "precision": (["train.py", *run, "--plugin", "gemini", *FP32], [BASE]),
        "max-length": (["train.py", *run, *DDP, *FP32, "--max_length", 50], [BASE]),
        "tokenizer": (["train.py", *run, *DDP, *FP32, "--dataset", f"{EXTENDED}/arrow"], [BASE, EXTENDED]),
        "no-checkpoint": (["train.py", *run, *DDP, *FP32, "--load_checkpoint", "inputs/history"], [BASE]),
        "lora-without-choice": (
            ["train.py", *run, *DDP, *LORA, "--pretrained", EXTENDED_MODEL, "--dataset", f"{EXTENDED}/arrow"],
            [EXTENDED, EXTENDED_MODEL],
        ),
        "resumed-with-other-flags": (
            [
                *("train.py", *training_flags("training/ddp-fp32", [f"{BASE}/arrow"]), *COMMON, *DDP, *FP32),
                *(*rows(4, 2), "--lr", 5e-4, "--seed", 1, "--load_checkpoint", "latest"),
            ],
            ["training/ddp-fp32"],
        ),
        "used-save-dir": (
            [
                *("train.py", *training_flags("training/ddp-fp32", [f"{BASE}/arrow"]), *COMMON),
                *(*DDP, *FP32, *rows(4, 2)),
            ],
            ["training/ddp-fp32"],
        ),
        "pretrain-flags": ([pretrain, "--data_input_dirs", "nowhere", "--num_spliced_dataset_bins", 0], []),
        "pretrain-record": ([pretrain, "--data_input_dirs", TALKS, *prepared], []),
        "pretrain-output": (
            [pretrain, "--data_input_dirs", "inputs/history", *prepared, *USED_OUTPUT],
            [BASE],
        ),
        "sft-version": ([sft, "--data_input_dirs", TALKS, *prepared], []),
        "sft-record": ([sft, "--data_input_dirs", "inputs/history", *prepared, "--llama_version", 2], []),
        "tokenizer-flags": ([extend, "--source_tokenizer_dir", "nowhere", "--unreachable", "maybe"], []),
        "tokenizer-unreachable": ([extend, *sources, *target, "--unreachable", "error"], []),
        "tokenizer-target": ([extend, *sources, "--target_tokenizer_dir", "inputs/llama2"], []),
        "tokenizer-pieces": (
            [extend, *sources[:2], *target, "--expand_tokens_file", "inputs/history/records.jsonl"],
            [],
        ),
        "model-target": (
            [
                *(model, "--source_model_and_tokenizer_path", "inputs/model"),
                *("--target_tokenizer_path", "inputs/llama3", "--target_model_path", "inputs/model"),
            ],
            [],
        ),
        "model-other-tokenizer": (
            [
                *(model, "--source_model_and_tokenizer_path", "inputs/model"),
                *("--target_tokenizer_path", "inputs/llama3", "--target_model_path", "mistakes/model"),
            ],
            [],
        ),
        "inference-model": (["inference_example.py", "--model_path", "nowhere", "--input_txt", "x"], []),
        "inference-flags": (["inference_example.py", "--temperature", -1, "--top_p", 3], []),
        "pieces-flags": (
            [
                "colossal_llama/tokenizer/learn_pieces.py",
                *("--data_input_dirs", "nowhere", "--source_tokenizer_dir", "inputs/llama2"),
                *("--output_file", "mistakes/pieces.jsonl", "--num_tokens", 0),
            ],
            [],
        ),
        "comparison-flags": (
            [
                "colossal_llama/tokenizer/compare_tokenizers.py",
                *("--tokenizer_dirs", "nowhere", "--data_input_dirs", TALKS),
            ],
            [],
        ),
    }
    return [
        Case(f"mistakes/{name}", [Command(*words, streams=["stdout", "stderr"], fails=True)], needs)
        for name, (words, needs) in mistakes.items()
    ]


USED_OUTPUT = ["--data_output_dirs", BASE]


def float_cases() -> list[Case]:
    return [
        *model_cases(),
        *layout_cases(),
        *feature_cases(),
        *resume_cases(),
        *inference_cases(),
        *plan_cases(),
        *mistake_cases(),
    ]

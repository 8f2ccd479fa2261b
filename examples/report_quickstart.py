"""What came out of quickstart.sh: losses, the comparison of the models, the answers, and what to try next.

Reads the questions and the answers that are expected from stdin, one per line. Exit code 1 if a loss did not
fall or if an answer is another one.
"""

from __future__ import annotations

import json
import shlex
import sys
from argparse import ArgumentParser
from pathlib import Path

from colossal_llama.utils.console import format_table

# What the models of the comparison are, in its order.
MODELS = ("base", "extended", "trained")


def loss_line(title: str, metrics_file: Path) -> tuple[str, bool]:
    """The first and the last loss of a run, and whether it fell."""
    with metrics_file.open(encoding="utf-8") as file:
        records = [record for record in map(json.loads, file) if "loss" in record]
    first, last = records[0], records[-1]
    ends = (f"{each['loss']:.3f} at step {each['step']}" for each in (first, last))
    return f"{title}: loss {', '.join(ends)}", last["loss"] < 0.9 * first["loss"]


def comparison_table(json_file: Path) -> str:
    """The models on the held-out text: how well they know it, and how many tokens they need for it."""
    results = json.loads(json_file.read_text(encoding="utf-8"))["results"]
    rows = [
        (name, f"{each['bits_per_byte']:.3f}", f"{each['tokens_per_character']:.3f}")
        for name, each in zip(MODELS, (each for each in results if each["category"] is None), strict=True)
    ]
    return format_table(["model, on held-out text", "bits per byte", "tokens per character"], rows)


def next_commands(output: str) -> list[tuple[str, list[str]]]:
    """What to try with the results, each with its command."""
    return [
        (
            "Talk to the model",
            ["python", "inference_example.py", "--model_path", f"{output}/sft/modeling", "--chat"],
        ),
        ("Look at the curves of both trainings in a browser", ["tensorboard", "--logdir", output]),
        (
            "See what became of each new piece of the vocabulary",
            [
                *("python", "colossal_llama/evaluation/ledger.py"),
                *("--base_model", f"{output}/base_model", "--model", f"{output}/pretrain/modeling"),
                *("--data_input_dirs", f"{output}/pretrain_data/held_out"),
                *("--dataset", f"{output}/pretrain_data/arrow", "--output_dir", f"{output}/ledger"),
            ],
        ),
        (
            "Check a training for a cluster, with its flags, without starting it",
            [
                *("python", "train.py", "--pretrained", f"{output}/model"),
                *("--dataset", f"{output}/pretrain_data/arrow", "--max_length", "512"),
                *("--plugin", "zero2", "--mixed_precision", "bf16", "--dry_run"),
            ],
        ),
    ]


def shown(words: list[str]) -> str:
    return "    " + " ".join(word if word.startswith("--") else shlex.quote(word) for word in words)


def wrong_answers(pairs: list[tuple[str, str]], answers: list[str]) -> int:
    return sum(answer != expected for answer, (_, expected) in zip(answers, pairs, strict=True))


def report(output: str, pairs: list[tuple[str, str]], seconds: int, activate: str | None) -> int:
    directory = Path(output)
    lines, fell = zip(
        *(
            loss_line(title, directory / logs / "metrics.jsonl")
            for title, logs in (("Pre-training", "pretrain_logs"), ("Fine-tuning", "sft_logs"))
        ),
        strict=True,
    )
    print("", *lines, sep="\n")
    comparison = directory / "comparison" / "comparison.json"
    if comparison.is_file():
        print("", comparison_table(comparison), sep="\n")
    answers = [
        (directory / "answers" / f"{number}.txt").read_text(encoding="utf-8").strip()
        for number in range(1, len(pairs) + 1)
    ]
    print()
    for (question, _), answer in zip(pairs, answers, strict=True):
        print(f"Question: {question}\nAnswer:   {answer}")
    print("", f"Curves: {output}/pretrain_logs/training_curves.png", sep="\n")
    print(f"        {output}/sft_logs/training_curves.png")
    if comparison.is_file():
        print(f"Comparison: {output}/comparison/comparison.md, {output}/comparison/comparison.png")

    wrong = wrong_answers(pairs, answers)
    problems = [
        f"{line.split(':')[0]}: the loss did not fall"
        for line, good in zip(lines, fell, strict=True)
        if not good
    ]
    if wrong:
        problems.append(f"{wrong} of {len(pairs)} answers differ from the sample")
    if problems:
        sys.stdout.flush()
        for problem in problems:
            print(f"error: {problem}", file=sys.stderr)
        return 1

    print("\nWhat to try next:")
    if activate is not None:
        print(shown(["source", activate]))
    for title, command in next_commands(output):
        print(f"  {title}:\n{shown(command)}")
    print("  The same with your own model and text: README.md, The pipeline with your own data")
    print(f"\nAll {len(pairs)} answers are those of the sample. Time of this run without set-up: {seconds} s")
    return 0


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", required=True, help="directory of quickstart.sh")
    parser.add_argument("--seconds", type=int, required=True, help="how long it took")
    parser.add_argument(
        "--activate", help="script that activates the environment, if it is not the active one"
    )
    args = parser.parse_args()
    lines = sys.stdin.buffer.read().decode().splitlines()
    return report(
        args.output_dir, list(zip(lines[::2], lines[1::2], strict=True)), args.seconds, args.activate
    )


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")
    sys.exit(main())

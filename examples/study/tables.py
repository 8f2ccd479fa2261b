"""The tables of docs/study.md, from the figures that collect.py has read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any

from drawings import CURVES, LANGUAGE_NAMES, REPLAY, RESULTS

GIB = 2**30
ROUNDING = 0.001  # bits per byte; scores are computed in bf16


def make_tables(study: dict[str, Any]) -> dict[str, str]:
    """Name of the table -> Markdown."""
    return {name: make(study) for name, make in TABLES.items()}


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], numbers_from: int = 1) -> str:
    """A table whose columns are right-aligned from `numbers_from` on."""
    rule = ["---" if number < numbers_from else "---:" for number in range(len(header))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))


def arms_table(study: dict[str, Any]) -> str:
    rows = [(f"`{arm['name']}`", arm["question"], arm["about"]) for arm in study["arms"]]
    return markdown(("arm", "question", "what"), rows, numbers_from=3)


def text_table(study: dict[str, Any]) -> str:
    rows = []
    for part, languages in study["text"]["parts"].items():
        for language, sizes in languages.items():
            tokens = [
                f"{study['text']['tokens'][vocabulary][language]:,}" if part == "training" else ""
                for vocabulary in ("base", "extended")
            ]
            of = ", ".join(f"{name} {counts[1] / 1000:,.0f}" for name, counts in sizes["categories"].items())
            rows.append(
                (
                    f"{part}, {LANGUAGE_NAMES[language]}",
                    of,
                    f"{sizes['sections']:,}",
                    f"{sizes['bytes']:,}",
                    *tokens,
                )
            )
    header = (
        "part",
        "packages, KB of text",
        "sections",
        "bytes",
        "tokens, base vocabulary",
        "tokens, extended",
    )
    return markdown(header, rows, numbers_from=2)


def tokenizers_table(study: dict[str, Any]) -> str:
    rows = []
    for each in study["tokenizers"]:
        bill = each["extension"] or {}
        rows.append(
            (
                f"`{each['tokenizer']}`",
                f"{each['vocabulary_size']:,}",
                f"{each['compression_rate']:.3f}",
                f"{bill['saved_share']:.1%}" if bill else "",
                f"{bill['compute_share'] - 1:+.1%}" if bill else "",
                _millions(bill["learning_tokens"]) if bill else "",
                _millions(bill["payback_tokens"]) if bill else "",
            )
        )
    return markdown(
        (
            "tokenizer",
            "vocabulary",
            "tokens per character",
            "tokens saved",
            "FLOPs for the same text",
            "estimated: tokens until the new rows are learned",
            "tokens until paid for",
        ),
        rows,
    )


def _millions(tokens: float | None) -> str:
    return "never" if tokens is None else f"{tokens / 1e6:.2f} million"


def rate_table(study: dict[str, Any]) -> str:
    looks = study["rate"]["looks"]
    if not looks:
        return f"The rate was given: {study['rate']['chosen']:g}."
    rows = []
    for look in looks:
        chosen = look["rate"] == study["rate"]["chosen"]
        mark = "**" if chosen else ""
        rows.append(
            (
                f"{mark}{look['rate']:g}{mark}",
                f"{look['zh_start']:.3f}",
                f"{look['zh_end']:.3f}",
                f"{look['en_start']:.3f}",
                f"{look['en_end']:.3f}",
                f"{look['zh_end'] + look['en_end']:.3f}",
            )
        )
    steps = study["rate"]["steps"]
    return markdown(
        (
            "rate",
            "Chinese, step 0",
            f"Chinese, step {steps}",
            "English, step 0",
            f"English, step {steps}",
            "sum at the end",
        ),
        rows,
    )


def results_table(study: dict[str, Any]) -> str:
    return kinds_table(study, [each["kind"] for each in study["models"]])


def kinds_table(study: dict[str, Any], kinds: Sequence[str], merges: bool = False) -> str:
    found = {each["kind"]: each for each in study["models"]}
    wanted = [kind for kind in kinds if kind in found]
    if merges:
        wanted += [kind for kind in found if kind.startswith("merged_")]
    rows = []
    for kind in wanted:
        cells = [f"`{kind}`"]
        for language in LANGUAGE_NAMES:
            figures = found[kind]["sets"][language]
            cells.append(_with_spread(figures["seeds"]))
            cells.append("" if kind == "base" else _change(figures["base_change"], figures["base_interval"]))
        rows.append(cells)
    return markdown(("model", "Chinese", "against the base", "English", "against the base"), rows)


def _with_spread(seeds: Sequence[float]) -> str:
    """Mean over seeds, and how far they are from it."""
    spread = f" ± {(max(seeds) - min(seeds)) / 2:.3f}" if len(seeds) > 1 else ""
    return f"{mean(seeds):.3f}{spread}"


def _change(change: float, interval: Sequence[float] | None) -> str:
    limits = "" if interval is None else f" [{interval[0]:+.3f}, {interval[1]:+.3f}]"
    return f"{change:+.3f}{limits}"


def extension_table(study: dict[str, Any]) -> str:
    """The arms of the vocabulary, with what each has read and computed."""
    found = {each["kind"]: each for each in study["models"]}
    rows = []
    for kind, what in (
        ("base_vocabulary", "the base's vocabulary"),
        ("wsd_branch", "extended, the same bytes of Chinese"),
        ("extended", "extended, the same tokens (FLOPs)"),
        ("wsd", "extended, the same tokens, wsd"),
    ):
        runs = [run for run in study["runs"] if run["kind"] == kind]
        if kind not in found or not runs:
            continue
        figures = found[kind]["sets"]["zh"]
        rows.append(
            (
                f"{what} (`{kind}`)",
                f"{mean(run['tokens'] for run in runs):,.0f}",
                f"{mean(run['chinese_bytes'] for run in runs) / 1000:,.1f}",
                f"{mean(run['flops'] for run in runs):.2e}" if "flops" in runs[0] else "",
                _with_spread(figures["seeds"]),
                _change(figures["base_change"], figures["base_interval"]),
            )
        )
    return markdown(
        (
            "trained",
            "tokens",
            "KB of Chinese",
            "FLOPs",
            "Chinese, bits per byte",
            "against the untrained base",
        ),
        rows,
    )


def break_even_table(study: dict[str, Any]) -> str:
    found = study["break_even"]
    if not found:
        return "Not measured: it needs `extended` and `base_vocabulary`."
    rows = [
        (
            f"{point['step']:,}",
            f"{point['tokens']:,.0f}",
            f"{point['base']:.3f}",
            f"{point['extended']:.3f}",
            f"{point['extended'] - point['base']:+.3f}",
        )
        for point in found["points"]
    ]
    crossing = found["tokens"]
    if crossing is not None:
        sentence = f"The curves cross after about {crossing:,.0f} tokens."
    elif found["points"][-1]["extended"] < found["points"][-1]["base"]:
        sentence = "The extended vocabulary is ahead from the start."
    else:
        sentence = "The extended vocabulary is not ahead at any step of these runs."
    table = markdown(("step", "tokens", "base vocabulary", "extended", "difference"), rows, numbers_from=0)
    return f"{table}\n\n{sentence}"


def replay_table(study: dict[str, Any]) -> str:
    return kinds_table(study, ("base", "no_replay", "extended", "much_replay"), merges=True)


def starts_table(study: dict[str, Any]) -> str:
    """Each start before and after training."""
    found = {each["kind"]: each for each in study["models"]}
    rows = []
    for start, arm in (
        ("start_mean", "mean_rows"),
        ("start_calibrated", "extended"),
        ("start_half", "half_rows"),
        ("start_calibrated", "new_rows_first"),
    ):
        if start not in found:
            continue
        cells = [f"`{arm}`"]
        for language in LANGUAGE_NAMES:
            cells.append(f"{found[start]['sets'][language]['bits_per_byte']:.3f}")
            cells.append(_with_spread(found[arm]["sets"][language]["seeds"]) if arm in found else "")
        rows.append(cells)
    return markdown(("arm", "Chinese, step 0", "trained", "English, step 0", "trained"), rows)


def schedule_table(study: dict[str, Any]) -> str:
    found = {each["kind"]: each for each in study["models"]}
    rows = []
    for kind in ("extended", "wsd", "wsd_branch"):
        runs = [run for run in study["runs"] if run["kind"] == kind]
        if kind in found and runs:
            cells = [f"`{kind}`", f"{mean(run['tokens'] for run in runs):,.0f}"]
            cells += [_with_spread(found[kind]["sets"][language]["seeds"]) for language in LANGUAGE_NAMES]
            rows.append(cells)
    return markdown(("run", "tokens", "Chinese", "English"), rows)


def differences_table(study: dict[str, Any]) -> str:
    """What is called a difference: 0 is outside of the interval, and all seeds have the same sign."""
    rows = []
    for each in study["differences"]:
        cells = [f"`{each['first']}` - `{each['second']}`"]
        for language in LANGUAGE_NAMES:
            figures = each["sets"][language]
            seeds = ", ".join(f"{value:+.3f}" for value in figures["seeds"])
            mark = "**" if is_difference(figures) else ""
            cells.append(f"{mark}{_change(figures['change'], figures['interval'])}{mark}")
            cells.append(seeds)
        rows.append(cells)
    return markdown(("difference", "Chinese", "its seeds", "English", "its seeds"), rows)


def is_difference(figures: dict[str, Any]) -> bool:
    interval, seeds = figures["interval"], figures["seeds"]
    if interval is None or interval[0] <= 0 <= interval[1] or abs(figures["change"]) < ROUNDING:
        return False
    return all(seed * figures["change"] > 0 for seed in seeds)


def ledger_table(study: dict[str, Any]) -> str:
    ledger = study["ledger"]
    if not ledger:
        return "No ledger: it needs the arm `extended`."
    rows = []
    for group in ledger["groups"]:
        span = f"{group['from']:,} to {group['to']:,}"
        if group["to"] == 0:
            span = "never"
        elif group["to"] >= 10**8:
            span = f"{group['from']:,} and more"
        saved = group["base_nats"] - group["nats"]
        has = group["compared"] > 0
        rows.append(
            (
                span,
                f"{group['pieces']:,}",
                f"{group['compared']:,}",
                f"{group['nats']:.2f}" if has else "",
                f"{group['base_nats']:.2f}" if has else "",
                f"{saved:+.2f}" if has else "",
            )
        )
    summary = ledger["summary"]
    facts = (
        f"{summary['pieces']:,} new pieces; {summary['compared']:,} of them compared on test text, "
        f"{summary['worse_than_the_base']:,} worse than the tokens that they replace; "
        f"{summary['hardly_moved']:,} hardly moved; median cosine of the input rows with their start "
        f"{summary['median_input_cosine']:.4f}."
    )
    table = markdown(
        (
            "occurrences in the training text",
            "pieces",
            "occurrences compared",
            "nats of the piece",
            "nats of the base's tokens",
            "saved",
        ),
        rows,
    )
    return f"{facts}\n\n{table}"


def bill_table(study: dict[str, Any]) -> str:
    """What --dry_run estimated beside what runs took: whole commands, with start, evaluations and saves.

    Speeds are those of the fastest run: others may have shared the machine, or been halted.
    """
    rows = []
    for arm, estimate in study["estimates"].items():
        runs = [run for run in study["runs"] if run["kind"] == arm]
        if not runs:
            continue
        per_token = estimate.get("flops_per_token", 0)
        speed = max(run["tokens_per_second"] for run in runs)
        whole = max(run["tokens"] / run["seconds"] for run in runs)
        rows.append(
            (
                f"`{arm}`",
                f"{estimate['parameters'] / 1e6:.1f}",
                f"{(estimate['bytes'] + estimate.get('bytes_for_saves', 0)) / GIB:.2f}",
                f"{max(run['peak_memory_bytes'] for run in runs) / GIB:.2f}",
                f"{estimate.get('flops', 0):.2e}",
                f"{per_token * mean(run['tokens'] for run in runs):.2e}",
                f"{speed:,.0f}",
                f"{per_token * speed / 1e9:,.0f}",
                f"{whole:,.0f}",
            )
        )
    return markdown(
        (
            "arm",
            "million parameters",
            "GiB estimated",
            "GiB at the peak",
            "FLOPs estimated",
            "FLOPs of the tokens read",
            "tokens/s in a step",
            "GFLOP/s",
            "tokens/s of the command",
        ),
        rows,
    )


def time_table(study: dict[str, Any]) -> str:
    """What the commands took, by kind of work."""
    rows = []
    steps = study["steps"]
    for kind in dict.fromkeys(step["kind"] for step in steps):
        members = [step for step in steps if step["kind"] == kind]
        rows.append(
            (
                kind,
                f"{len(members)}",
                f"{sum(step['seconds'] for step in members) / 60:,.1f}",
                f"{max(step['peak_memory_bytes'] for step in members) / GIB:.2f}",
            )
        )
    total = sum(step["seconds"] for step in steps)
    rows.append(("all", f"{len(steps)}", f"{total / 60:,.1f}", ""))
    return markdown(("work", "commands", "minutes", "GiB at the peak"), rows)


def environment_table(study: dict[str, Any]) -> str:
    found, settings = study["environment"], study["settings"]
    rows = [
        ("date", study["date"]),
        ("processor", f"{found['cpu']}, {found['cores']} cores, {settings['threads']} threads"),
        ("Python", found["python"]),
        *((name, text) for name, text in found["versions"].items()),
        ("a run", f"{settings['steps']} steps of {settings['tokens_of_step']:,} tokens"),
        ("seeds", ", ".join(map(str, settings["seeds"]))),
        ("peak learning rate", f"{study['rate']['chosen']:g}"),
    ]
    return markdown(("", ""), rows, numbers_from=2)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "arms": arms_table,
    "text": text_table,
    "tokenizers": tokenizers_table,
    "rate": rate_table,
    "results": results_table,
    "extension": extension_table,
    "break_even": break_even_table,
    "replay": replay_table,
    "starts": starts_table,
    "schedule": schedule_table,
    "differences": differences_table,
    "ledger": ledger_table,
    "bill": bill_table,
    "time": time_table,
    "environment": environment_table,
    "picture_results": lambda study: f"![Change of bits per byte against the base model, by arm]({RESULTS})",
    "picture_curves": lambda study: f"![Bits per byte of validation text during training]({CURVES})",
    "picture_replay": lambda study: f"![Chinese learned against English forgotten]({REPLAY})",
}

"""initializations.md: the starts that `measure_init.py` tried, as a table."""

from __future__ import annotations

from colossal_llama.evaluation.start_measurement import Measured, Start


def best_start(measured: Measured) -> Start:
    """The one with the fewest bits per byte on the first set."""
    first = next(iter(measured.base))
    return min(measured.starts, key=lambda start: start.bits_per_byte[first])


def as_markdown(measured: Measured, command: str) -> str:
    """The table, the best first, and the command that makes the best start."""
    sets = list(measured.base)
    best = best_start(measured)
    header = ["input rows", "output rows", "calibrated", "tied", *sets, f"change on {sets[0]}"]
    rows = [["base, its own tokenizer", "", "", "", *(f"{measured.base[name]:.3f}" for name in sets), ""]]
    for start in sorted(measured.starts, key=lambda start: start.bits_per_byte[sets[0]]):
        figures = [f"{start.bits_per_byte[name]:.3f}" for name in sets]
        if start is best:
            figures[0] = f"**{figures[0]}**"
        change = start.change[sets[0]]
        told = "" if change is None else f"{change[0]:+.3f} [{change[1]:+.3f}, {change[2]:+.3f}]"
        words = ["yes" if value else "no" for value in (start.calibrated, start.tied)]
        rows.append([start.init_input, start.init_output, *words, *figures, told])
    lines = [header, ["---"] * len(header), *rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    documents = ", ".join(f"{name}: {count:,}" for name, count in measured.num_documents.items())
    return (
        "# Starts of new rows\n\n"
        "Bits per byte of held-out text before training; lower is better. The change is against mean rows "
        f"for input and output, with its 95 % interval over documents ({documents}). Calibrated at "
        f"{measured.num_positions:,} positions of the corpus.\n\n{table}\n\nThe best start on {sets[0]}:\n\n"
        f"```bash\n{command}\n```\n"
    )

"""The pictures of docs/study.md: white background, so that they are readable on light and dark pages."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

LANGUAGE_NAMES = {"zh": "Chinese", "en": "English"}
CURVES, RESULTS, REPLAY = "study_curves.png", "study_results.png", "study_replay.png"
SIZE, DPI = (11, 4.6), 110


def draw_all(study: dict[str, Any], directory: Path) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}
    paths = []
    with plt.rc_context({"font.size": 9, "figure.facecolor": "white", **style}):
        for name, draw in ((CURVES, draw_curves), (RESULTS, draw_results), (REPLAY, draw_replay)):
            figure = draw(plt, study)
            figure.savefig(directory / name, dpi=DPI, facecolor="white", metadata={"Software": None})
            plt.close(figure)
            paths.append(directory / name)
    return paths


def colours(study: dict[str, Any]) -> dict[str, Any]:
    """Kind of run -> line; a branch has the colour of its trunk."""
    names = [arm["name"] for arm in study["arms"]]
    return {name: f"C{number}" for number, name in enumerate(names)} | {
        f"{name}_branch": f"C{number}" for number, name in enumerate(names)
    }


def draw_curves(plt: Any, study: dict[str, Any]) -> Any:
    """Validation text during training: a line is the mean over seeds, its band reaches from seed to seed."""
    figure, panels = plt.subplots(1, 2, figsize=SIZE, layout="constrained")
    colour_of = colours(study)
    for panel, (language, name) in zip(panels, LANGUAGE_NAMES.items(), strict=True):
        for kind in dict.fromkeys(run["kind"] for run in study["runs"]):
            by_step: dict[int, list[tuple[float, float]]] = {}
            for run in study["runs"]:
                if run["kind"] == kind:
                    for point in run["curve"]:
                        by_step.setdefault(point["step"], []).append((point["tokens"], point[language]))
            points = sorted(by_step.items())
            tokens = [mean(each[0] for each in found) / 1000 for _, found in points]
            values = [[each[1] for each in found] for _, found in points]
            branch = kind.endswith("_branch")
            panel.plot(
                tokens,
                [mean(each) for each in values],
                color=colour_of[kind],
                linestyle=":" if branch else "-",
                marker="s" if branch else "o",
                markersize=3,
                label=kind,
            )
            lowest, highest = [min(each) for each in values], [max(each) for each in values]
            panel.fill_between(tokens, lowest, highest, color=colour_of[kind], alpha=0.15, linewidth=0)
        panel.set(title=f"{name}, validation text", xlabel="thousand tokens", ylabel="bits per byte")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)), frameon=False)
    return figure


def draw_results(plt: Any, study: dict[str, Any]) -> Any:
    """Test text after training: the change against the base, its interval over documents, and each seed."""
    models = [each for each in study["models"] if each["kind"] != "base"]
    figure, panels = plt.subplots(
        1, 2, figsize=(SIZE[0], 1.2 + 0.26 * len(models)), layout="constrained", sharey=True
    )
    places = range(len(models), 0, -1)
    (base,) = (each for each in study["models"] if each["kind"] == "base")
    for panel, (language, name) in zip(panels, LANGUAGE_NAMES.items(), strict=True):
        start = base["sets"][language]["bits_per_byte"]
        for place, model in zip(places, models, strict=True):
            figures = model["sets"][language]
            colour = "C0" if figures["base_change"] <= 0 else "C3"
            if figures["base_interval"]:
                panel.plot(figures["base_interval"], (place, place), color=colour, linewidth=1.5)
            panel.plot(figures["base_change"], place, "o", color=colour, markersize=5)
            seeds = [value - start for value in figures["seeds"]]
            panel.plot(seeds, [place] * len(seeds), "|", color="black", markersize=7)
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set(
            title=f"{name}: base {start:.3f} bits per byte", xlabel="change of bits per byte; left is better"
        )
    panels[0].set_yticks(list(places), [model["kind"] for model in models])
    return figure


def draw_replay(plt: Any, study: dict[str, Any]) -> Any:
    """What was learned against what was forgotten; lines reach from seed to seed."""
    figure, panel = plt.subplots(figsize=(7, 4.8), layout="constrained")
    wanted = ("no_replay", "extended", "much_replay")
    for number, model in enumerate(
        each for each in study["models"] if each["kind"] in wanted or each["kind"].startswith("merged_")
    ):
        merged = model["kind"].startswith("merged_")
        english, chinese = (model["sets"][language] for language in ("en", "zh"))
        marker = "s" if merged else "o"
        panel.plot(english["seeds"], chinese["seeds"], color=f"C{number}", linewidth=1)
        place = mean(english["seeds"]), mean(chinese["seeds"])
        panel.plot(*place, marker, markersize=6, color=f"C{number}")
        panel.annotate(model["kind"], place, xytext=(6, 4), textcoords="offset points", fontsize=8)
    panel.margins(x=0.2, y=0.1)
    panel.set(xlabel="English, bits per byte", ylabel="Chinese, bits per byte")
    panel.set_title("Down and left is better")
    return figure

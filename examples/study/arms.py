"""The arms of the study: what is trained, and what for. This list is the only place that says so."""

from __future__ import annotations

from dataclasses import dataclass

# Steps of a run are cut into: warm-up, and with wsd the decay at the end.
WARMUP_SHARE, DECAY_SHARE = 0.05, 0.2
# Rates that a short look at the first arm chooses from, and its steps.
RATES, LOOK_STEPS = (1e-4, 3e-4, 1e-3), 20
# Shares of the trained model in merges with the start, and the arms that are merged.
MERGE_SHARES, MERGED_ARMS = (0.5, 0.75), ("extended", "no_replay")
BASELINE = "extended"


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Attributes:
        question: of the study, which it belongs to.
        about: how it differs from the baseline, for people.
        vocabulary: whose tokens it reads, "base" or "extended".
        start: directory of the model that it starts from, below the work directory.
        english: share of the tokens.
        schedule: "cosine" over the whole run, or "wsd" with a branch.
        rows_first: share of the tokens that train the new rows alone, in a stage before all else.
    """

    name: str
    question: str
    about: str
    vocabulary: str = "extended"
    start: str = "starts/calibrated"
    english: float = 0.05
    schedule: str = "cosine"
    rows_first: float = 0.0


ARMS = (
    Arm("extended", "all", "the baseline: new pieces, calibrated rows, 5 % English, cosine"),
    Arm(
        "base_vocabulary",
        "does extension pay?",
        "the tokenizer and the model as they were",
        vocabulary="base",
        start="base",
    ),
    Arm("no_replay", "what does replay buy?", "no English", english=0.0),
    Arm("much_replay", "what does replay buy?", "25 % English", english=0.25),
    Arm("mean_rows", "which start?", "mean rows, not calibrated", start="starts/mean"),
    Arm(
        "half_rows",
        "which start?",
        "half-sum output rows, untied, calibrated",
        start="starts/half",
    ),
    Arm(
        "wsd",
        "which schedule?",
        "wsd; a branch decays where the text is as much as base_vocabulary reads",
        schedule="wsd",
    ),
    Arm(
        "new_rows_first",
        "which start?",
        "the new rows alone for 20 % of the tokens, then all weights",
        rows_first=0.2,
    ),
)

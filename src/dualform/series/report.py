"""The report on a model of sequences, as a page of Markdown."""

from collections.abc import Sequence
from typing import Any

REPORT_FILE, SCORES_FILE = "report.md", "report.json"
_CAPTIONS = {
    "confusion": "What each true class, a row, was said to be.",
    "calibration": "A model that is calibrated lies on the dashed line: of what it says with probability 0.8, four in "
    "five are right.",
    "numbers": "What the model says against what is true.",
    "hardest": "The sequences on which the model is most wrong.",
    "training": "The losses while it was trained. With label smoothing the loss of what is learned does not reach 0.",
}


def written(about: dict[str, Any], pictures: Sequence[str]) -> str:
    """The page; ``about`` is what ``report.json`` holds, ``pictures`` are those beside it, without ``.png``."""
    counts = f"Learned from {about['learned']} sequences; every figure below is of the {about['test']} others."
    lines = [f"# {about['target']}", "", counts, "", *_table(summary(about)), ""]
    lines += [f"Note: {note}." for note in about["notes"]]
    for name in pictures:
        lines += [f"## {name.capitalize()}", "", _CAPTIONS[name], "", f"![{name}]({name}.png)", ""]
    if about["step"] is not None:
        watched = f"`dualform watch model --time COLUMN --step {about['step']:g}`"
        lines += [f"Times count in steps of {about['step']:g}; a stream is read with {watched}.", ""]
    lines += ["## What it costs", "", *_table(costs(about["cost"])), ""]
    return "\n".join(lines)


def summary(about: dict[str, Any]) -> list[tuple[str, str]]:
    """The scores, in words and figures."""
    scores = about["scores"]
    if about["task"] == "classes":
        return [
            ("accuracy", f"{scores['accuracy']:.3f}"),
            ("always the most frequent class", f"{scores['most_frequent']:.3f}"),
            ("accuracy, mean over classes", f"{scores['balanced_accuracy']:.3f}"),
            ("log loss, nats", f"{scores['log_loss']:.3f}"),
            ("distance from calibration", f"{scores['calibration_error']:.3f}"),
        ]
    low, high = scores["band"]
    return [
        ("root mean squared error", f"{scores['rmse']:.4g}"),
        ("always the mean", f"{scores['rmse_of_mean']:.4g}"),
        ("mean absolute error", f"{scores['mae']:.4g}"),
        ("R squared", "-" if scores["r2"] is None else f"{scores['r2']:.3f}"),
        ("nine of ten errors are between", f"{low:.4g} and {high:.4g}"),
    ]


def costs(cost: dict[str, Any]) -> list[tuple[str, str]]:
    """What it costs to run the model on this machine."""
    rows = [("parameters", f"{cost['parameters']:,}")]
    if "sequence_us" in cost:
        return [*rows, (f"a sequence of {cost['length']} steps", f"{cost['sequence_us']:,.0f} µs")]
    return [
        *rows,
        ("one more step of one stream", f"{cost['step_us']:,.0f} µs"),
        ("one more step of 1,000 streams", f"{cost['step_us_1000']:,.0f} µs"),
        ("state of a stream", f"{cost['state_bytes']:,} bytes"),
    ]


def _table(rows: Sequence[tuple[str, str]]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]

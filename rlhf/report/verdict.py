"""What a run did, in a few sentences: how it ended, what moved, and what went wrong."""

import math
from collections import Counter
from dataclasses import dataclass

from rlhf.orchestrator.run.diagnosis import Diagnosis
from rlhf.report.comparison import CERTAIN
from rlhf.report.measures import RESULTS, Points, direction, measured
from rlhf.report.run_record import RunRecord

EXPLAINING = ("kl/ref_per_response", "response/length", "response/truncated", "groups/zero_std")
"""Metrics whose change is worth a sentence beside that of the results."""
EVALUATED = "eval/"
"""Metrics of the same held-out rows each time, which are comparable one by one."""
MOST_RESULTS = 3
UNTOLD = {"resume", "checkpoint", "replacement", "repair", "diagnosis"}
"""Kinds of events that are no trouble, and of those that were true early in a run: what holds at its end is among the
diagnosis's causes."""
SHOWN_EVENTS = 3
SHOWN_OF_TEXT = 240


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Sentences for a person."""

    ended: str
    moved: tuple[str, ...]
    wrong: tuple[str, ...]
    """Empty where nothing is known to be wrong."""

    @property
    def line(self) -> str:
        """All that matters most, in one line."""
        moved = "; ".join(self.moved[:2]) or "no metric has two values to compare"
        wrong = f"Wrong: {self.wrong[0]}" if self.wrong else "Nothing is known to be wrong"
        more = f" (and {len(self.wrong) - 1} more)" if len(self.wrong) > 1 else ""
        return f"{self.ended}. {moved}. {wrong}{more}."


def judge(run: RunRecord, diagnosis: Diagnosis) -> Verdict:
    """The verdict on a run whose folder shows `diagnosis`."""
    moved = [sentence for name in _shown(run) if (sentence := movement(name, run.series(name))) is not None]
    ended, _, error = diagnosis.headline.partition("\n")
    wrong = [error.rstrip(".")] if error else []
    if diagnosis.advice is not None:
        wrong.append(diagnosis.advice.rstrip("."))
    wrong += [cause.rstrip(".") for cause in diagnosis.causes]
    wrong += _from_events(run)
    wrong += [note.rstrip(".") for note in run.notes]
    return Verdict(ended=_capital(ended), moved=tuple(moved), wrong=tuple(wrong))


def movement(name: str, points: Points) -> str | None:
    """How a metric changed from the first to the last steps; None with fewer than two values."""
    if len(points) < 2:
        return None
    end, start = measured(points, name, 0), measured([*reversed(points)], name, 0)
    assert end is not None
    assert start is not None
    first, last = start.last, end.last
    values = f"from {first:.4g} to {last:.4g}"
    if first == last:
        return f"{name} stayed at {last:.4g}"
    if (start.error is None or end.error is None) and not name.startswith(EVALUATED):
        return f"{name} went {values} (one step each: too few to tell it from noise)"
    noise = math.hypot(start.error or 0.0, end.error or 0.0)
    if abs(last - first) <= CERTAIN * noise:
        return f"{name} did not move beyond its noise ({first:.4g} at first, {last:.4g} at the end)"
    return f"{name} {'rose' if last > first else 'fell'} {values}"


def _shown(run: RunRecord) -> list[str]:
    known = set(run.metrics)
    results = [name for name in RESULTS if name in known and direction(name, [run])]
    return results[:MOST_RESULTS] + [name for name in EXPLAINING if name in known]


def _from_events(run: RunRecord) -> list[str]:
    """The last events that report trouble, each text once, with how often it came."""
    texts = [_text(event.get("text")) for event in run.events if str(event.get("kind")) not in UNTOLD]
    counts = Counter(texts)
    latest = list(dict.fromkeys(reversed(texts)))
    shown = [f"{text} ({counts[text]} times)" if counts[text] > 1 else text for text in latest[:SHOWN_EVENTS]]
    hidden = len(latest) - len(shown)
    return [*shown, *([f"{hidden} more kinds of events"] if hidden else [])]


def _text(value: object) -> str:
    text = " ".join(str(value).split()).rstrip(".")
    return text if len(text) <= SHOWN_OF_TEXT else f"{text[:SHOWN_OF_TEXT]}..."


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]

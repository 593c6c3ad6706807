"""Words that the code, its help, its messages and its docs use no more: each has a term of the field in its place."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXTS = [
    *sorted(ROOT.glob("rlhf/**/*.py")),
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(path for path in ROOT.glob("examples/*") if path.is_file()),
    *sorted(ROOT.glob("configs/**/*.yaml")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "Makefile", "mkdocs.yml")),
]
OLD_NAMES = {
    ROOT / "rlhf" / "config" / "renamed.py",
    ROOT / "rlhf" / "orchestrator" / "run" / "metrics_file.py",
}
"""Files that read a setting or a metric under its old name, so that they must spell it."""

RETIRED = {
    "crew": "workers",
    "spared": "surviving workers",
    "persevere": "run_with_restarts",
    "foreseen": "memory_forecast",
    "foresight": "memory forecast",
    "cluster_at_hand": "detect_cluster",
    "mend": "fix",
    "mends": "fixes",
    "mended": "fixed",
    "mending": "fixes",
    "seat": "bundle, worker slot",
    "seats": "bundles, worker slots",
    "seated": "started",
    "spoken": "non-empty",
    "figures": "metrics, numbers",
    "whoever": "the process that",
    "fleet": "engines",
    "blame": "name",
    "hear": "observe",
    "trainee": "trained model",
    "begin_anew": "reset",
    "is_well": "is_healthy",
    "baselined": "advantages",
    "above_mean": "group_mean_baseline",
    "above_others": "leave_one_out",
    "drop_equal_groups": "dynamic_sampling",
    "freeze_policy_steps": "critic_warmup_steps",
    "kl_stop": "target_kl",
    "sampler/log_prob_gap": "mismatch/log_prob",
    "groups/equal": "groups/zero_std",
    "time/measure": "time/log_probs",
    "behaviour": "behavior",
    "labelled": "labeled",
    "normalise": "normalize",
    "tokenised": "tokenized",
    "optimisation": "optimization",
    "licence": "license",
    "colour": "color",
    "favour": "favor",
}
"""Retired word -> what stands in its place. Whole words, in any case."""
CLASSES = (
    *("Script", "Crew", "Spared", "Standing", "RestingPool", "WakingPolicy", "Sameness", "Standstill", "GapWatch"),
    *("LossMetrics", "Course", "Portions", "Passes", "Limits", "Seat", "TraineeSpec", "FollowingCopy", "Judged"),
)
"""Retired names of classes, in this case alone."""


def test_there_is_something_to_read() -> None:
    assert len(TEXTS) > 250


@pytest.mark.parametrize("word", RETIRED)
def test_a_retired_word_is_used_no_more(word: str) -> None:
    pattern = re.compile(rf"(?<![\w/]){re.escape(word)}(?![\w/])", re.IGNORECASE)
    assert found_in(pattern, without=OLD_NAMES) == [], f"say {RETIRED[word]}"


@pytest.mark.parametrize("name", CLASSES)
def test_a_retired_class_is_named_no_more(name: str) -> None:
    assert found_in(re.compile(rf"(?<!\w){name}[(\]`.]"), without=set()) == []


def found_in(pattern: re.Pattern[str], without: set[Path]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in TEXTS
        if path not in without
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if pattern.search(line)
    ]


def test_a_retired_word_would_be_found() -> None:
    assert found_in(re.compile(r"\bLoop\b"), without=set())

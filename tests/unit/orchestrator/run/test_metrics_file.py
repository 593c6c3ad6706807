"""metrics.jsonl as a reader finds it, with old names and torn lines."""

import json
from pathlib import Path

from rlhf.orchestrator.run.metrics_file import RENAMED_METRICS, read_metrics


def test_old_names_are_read_as_the_new_ones_with_one_warning_each(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    rows = [{"step": n, "time/measure": n / 10, "sampler/kl": 0.5, "time/learn": 1.0} for n in (1, 2)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "ti')
    warnings: list[str] = []
    assert read_metrics(file, warnings.append) == [
        {"step": n, "time/log_probs": n / 10, "mismatch/kl": 0.5, "time/learn": 1.0} for n in (1, 2)
    ]
    assert warnings == [
        f"{file}: sampler/kl is now mismatch/kl. The next version will not read the old name",
        f"{file}: time/measure is now time/log_probs. The next version will not read the old name",
    ]


def test_current_names_are_read_without_a_word(tmp_path: Path) -> None:
    warnings: list[str] = []
    file = tmp_path / "metrics.jsonl"
    assert read_metrics(file, warnings.append) == []
    file.write_text('{"step": 1, "time/log_probs": null}\n')
    assert read_metrics(file, warnings.append) == [{"step": 1, "time/log_probs": None}]
    assert warnings == []


def test_no_new_name_is_an_old_one() -> None:
    assert not {*RENAMED_METRICS} & {*RENAMED_METRICS.values()}

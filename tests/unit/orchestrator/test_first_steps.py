"""A run says in its first steps what keeps it from learning."""

import json
from pathlib import Path

import numpy as np
import pytest

from rlhf.engines.fakes import FakeTrainEngine
from rlhf.types import Head, Role
from tests.unit.orchestrator.support import TOKENIZER, sft_run

pytestmark = pytest.mark.timeout(60)


def test_parameters_that_do_not_move_are_counted_and_the_cause_is_named(tmp_path: Path) -> None:
    run = sft_run(tmp_path / "a")
    run.engines[Role.POLICY] = FakeTrainEngine(np.zeros(TOKENIZER.num_tokens), Head.LOG_PROBS, lr=0.0)
    run.run()
    shown = run.out.getvalue()
    assert "unmoved: policy: 1 of its parameters did not change in the first update (events.jsonl names them)" in shown
    assert "table" not in shown, "a model has hundreds of names"
    assert shown.count("diagnosis: after step 1: the learning rate of the policy is 0 because") == 1
    events = [json.loads(line) for line in (tmp_path / "a" / "events.jsonl").read_text().splitlines()]
    assert [event["parameters"] for event in events if event["kind"] == "unmoved"] == [["table"]]

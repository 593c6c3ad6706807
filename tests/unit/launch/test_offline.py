"""What the loop is given."""

from dataclasses import replace
from typing import Any, cast

import pytest

from rlhf.actors.groups import WorkerGroup
from rlhf.actors.launch_spec import Workers
from rlhf.actors.waiting import RemoteCalls
from rlhf.algorithms import build_algorithm
from rlhf.algorithms.kto import KTO
from rlhf.config.commands import RowKind
from rlhf.config.loading.load import load_config
from rlhf.launch.class_weights import weigh_classes
from rlhf.launch.methods import EVALUATORS, OfflineEvaluator
from rlhf.launch.offline import assemble_offline
from rlhf.orchestrator.data import DataSplit
from rlhf.types import Role
from tests.unit.algorithms.build import group, rollout


def test_held_out_responses_weigh_what_those_trained_on_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though labels are in another proportion there."""
    config = load_config("kto", ["--policy.model", "m", "--data.path", "x.jsonl"], {})
    train = [replace(group([rollout([1])], [0.0], name=f"t{n}"), labels=(n < 2,)) for n in range(8)]
    held_out = [replace(group([rollout([1])], [0.0], name=f"h{n}"), labels=(n < 2,)) for n in range(4)]
    given = DataSplit(train=tuple(train), held_out=tuple(held_out), fingerprint="", dropped={})
    weighed = weigh_classes(config.algo, train)
    seen: list[KTO] = []
    evaluator: Any = lambda _models, algorithm, *_: seen.append(algorithm)  # noqa: E731
    evaluators = cast(dict[tuple[RowKind, str], OfflineEvaluator], EVALUATORS)
    monkeypatch.setitem(evaluators, (RowKind.LABELED, "policy"), evaluator)
    groups = {Role.POLICY: WorkerGroup([], RemoteCalls())}
    workers = Workers(device="cpu", groups=groups, engines=None, rewards={})
    assemble_offline(config, weighed, build_algorithm(weighed), given, workers, None)
    assert seen[0]._section == weighed
    assert (weighed.desirable_weight, weighed.undesirable_weight) == (3.0, 1.0)

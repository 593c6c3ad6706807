"""An algorithm from outside the package: the one that docs/adding_an_algorithm.md shows."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf.algorithms import build_algorithm
from rlhf.algorithms.base import Outputs
from rlhf.algorithms.needs import needs_of, sft_needs
from rlhf.config.algo import CustomSection, SftSection
from rlhf.errors import ConfigError
from rlhf.types import Head, Reward, Role, ScoredGroup
from tests.unit.algorithms.build import prompt, rollout, tensor_batch

PAGE = Path(__file__).parents[3] / "docs" / "adding_an_algorithm.md"


UNFINISHED = """
from rlhf.algorithms.base import Algorithm, Needs
from rlhf.types import Head, Role, Signal

class Alike:
    def keep(self, group): return True

class Half(Algorithm):
    def keep(self, group): return True

class Needless(Algorithm):
    def __init__(self, section): pass
    def credit(self, examples, signals): ...
    def objectives(self): ...

class Standing(Needless):
    needs = Needs(trains={Role.POLICY: Head.LOG_PROBS})

class Heir(Standing): pass

class Asking(Needless):
    def __init__(self, section):
        self.needs = Needs(trains={Role.POLICY: Head.LOG_PROBS}, signals=frozenset({Signal.VALUES}))

class Dreaming(Needless):
    def __init__(self, section):
        self.needs = Needs(trains={Role.POLICY: Head.LOG_PROBS}, signals=frozenset({Signal.RETURNS}))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's folder that holds the page's file."""
    shown = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert shown is not None
    (tmp_path / "best_of_group.py").write_text(shown[1], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield tmp_path
    sys.path[:] = path
    for name in ("best_of_group", "unfinished"):
        sys.modules.pop(name, None)


def group(*scores: float) -> ScoredGroup:
    return ScoredGroup(
        prompt=prompt(),
        responses=tuple(rollout([7] * (i + 1), name=f"a{i}") for i in range(len(scores))),
        texts=("",) * len(scores),
        rewards=tuple(Reward(total=score) for score in scores),
    )


def test_the_shown_algorithm_learns_the_best_answer(folder: Path) -> None:
    section = CustomSection(algorithm="best_of_group:BestOfGroup", settings={"margin": 0.5})
    algorithm = build_algorithm(section)
    assert algorithm.keep(group(0.0, 1.0))
    assert not algorithm.keep(group(0.0, 0.4))
    examples = algorithm.select([group(0.0, 2.0, 1.0)])
    assert [example.id for example in examples] == ["a1"]
    (experience,), metrics = algorithm.credit(examples, [{}])
    assert metrics.sums["reward/best"] == 2.0
    (sequence,) = experience.sequences
    assert sequence.loss_mask.tolist() == [False, False, False, True, True]
    log_probs = torch.full((5,), -1.5, requires_grad=True)
    output = algorithm.objectives()[Role.POLICY](
        Outputs(predictions=log_probs), tensor_batch(sequence.loss_mask.tolist(), [5])
    )
    output.loss.backward()
    assert output.loss.item() == pytest.approx(1.5)
    assert log_probs.grad is not None
    assert np.allclose(log_probs.grad.numpy(), [0, 0, 0, -0.5, -0.5])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent:Thing", "absent cannot be imported"),
        ("best_of_group:Absent", "best_of_group has no class Absent"),
        ("best_of_group:join", "best_of_group has no class join"),
        ("unfinished:Half", "unfinished:Half has no credit, objectives"),
        ("unfinished:Alike", "unfinished:Alike is not an Algorithm; derive it from"),
        ("unfinished:Needless", "unfinished:Needless does not set `needs`"),
        ("unfinished:Asking", "needs.signals: values comes from the critic; add it to needs.trains"),
        ("unfinished:Dreaming", "needs.signals: no model computes returns; choose from old_log_probs, values, "),
    ],
)
def test_what_is_no_algorithm_is_refused(folder: Path, name: str, message: str) -> None:
    (folder / "unfinished.py").write_text(UNFINISHED)
    with pytest.raises(ConfigError, match=message):
        build_algorithm(CustomSection(algorithm=name))


@pytest.mark.parametrize("name", ["Standing", "Heir"])
def test_needs_may_be_those_of_the_class_or_of_another_of_the_users(name: str, folder: Path) -> None:
    (folder / "unfinished.py").write_text(UNFINISHED)
    algorithm = build_algorithm(CustomSection(algorithm=f"unfinished:{name}"))
    assert algorithm.needs.trains == {Role.POLICY: Head.LOG_PROBS}


def test_an_algorithm_may_be_made_of_one_of_ours(folder: Path) -> None:
    (folder / "unfinished.py").write_text("from rlhf.algorithms.sft import SFT\n\nclass Own(SFT): pass\n")
    section = CustomSection(algorithm="unfinished:Own")
    assert build_algorithm(section).needs == needs_of(section) == sft_needs(SftSection())

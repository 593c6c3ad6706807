"""Which algorithms need no old log-probs before credit, and what their losses do without."""

from dataclasses import replace

import pytest
import torch

from rlhf.algorithms import build_algorithm
from rlhf.algorithms.base import LossOutput, Outputs
from rlhf.algorithms.needs import needs_of
from rlhf.config.algo import (
    AlgorithmSection,
    CispoSection,
    CriticFreeSection,
    DapoSection,
    FixedKl,
    GrpoSection,
    GspoSection,
    MaskedWeights,
    OnlineDpoSection,
    OnlineKtoSection,
    PpoSection,
    RlooSection,
)
from rlhf.types import Role, Signal
from tests.unit.algorithms.build import tensor_batch


@pytest.mark.parametrize(
    ("section", "is_late"),
    [
        (GrpoSection(), True),
        (GspoSection(kl=FixedKl(coef=0.1)), True),
        (RlooSection(kl=FixedKl(coef=0.1)), False),
        (RlooSection(kl=FixedKl(coef=0.0)), True),
        (DapoSection(truncated="mask"), False),
        (PpoSection(kl=FixedKl(coef=0.0)), True),
        (PpoSection(), False),
        (OnlineDpoSection(), True),
        (OnlineDpoSection(reference="behavior"), False),
        (OnlineKtoSection(), False),
    ],
)
def test_who_needs_no_old_log_probs_before_credit(section: AlgorithmSection, is_late: bool) -> None:
    """A KL in the reward is of the old policy; tokens that are not learned from have no log-probs in that pass."""
    assert needs_of(section).late_old_log_probs is is_late


@pytest.mark.parametrize(
    "section",
    [
        GrpoSection(kl=FixedKl(coef=0.1), entropy_coef=0.01),
        GspoSection(),
        CispoSection(correction=MaskedWeights()),
        RlooSection(kl=FixedKl(coef=0.1), kl_placement="loss", kl_estimator="k2", aggregation_tokens=4),
        PpoSection(kl=FixedKl(coef=0.0), token_level=False),
    ],
)
def test_a_first_pass_is_one_whose_old_log_probs_were_measured(section: CriticFreeSection | PpoSection) -> None:
    """Loss, gradient and metrics are the same, to the bit."""
    generator = torch.Generator().manual_seed(5)
    mask, lengths = [False, True, True, False, True, True, True, False], [4, 4]
    columns = {
        name: torch.randn(8, generator=generator) for name in ("sampler_log_probs", "ref_log_probs", "advantages")
    }
    start = torch.where(torch.tensor(mask), torch.randn(8, generator=generator), 0.0)

    def run(*, is_first: bool) -> tuple[LossOutput, torch.Tensor]:
        predictions = start.clone().requires_grad_()
        batch = tensor_batch(mask, lengths, coefficients={"kl": 0.1, "penalty": 0.5}, **columns)  # type: ignore[arg-type]
        if not is_first:
            batch = replace(batch, signals={**batch.signals, Signal.OLD_LOG_PROBS: start})
        objective = build_algorithm(section).objectives()[Role.POLICY]
        outputs = Outputs(predictions=predictions, entropy=predictions.square())
        got = objective(outputs, replace(batch, is_first_pass=is_first))
        got.loss.backward()
        assert predictions.grad is not None
        return got, predictions.grad

    (late, its_gradient), (measured, gradient) = run(is_first=True), run(is_first=False)
    assert torch.equal(late.loss, measured.loss)
    assert torch.equal(its_gradient, gradient)
    assert gradient.any()
    assert late.metrics == measured.metrics
    assert late.metrics.sums["policy/ratio"] == 1.0


def test_only_a_first_pass_does_without() -> None:
    """Old log-probs that were forgotten are an error: the ratio would be 1 in every epoch."""
    batch = tensor_batch([True], [1], advantages=torch.ones(1), sampler_log_probs=torch.zeros(1))
    objective = build_algorithm(GrpoSection()).objectives()[Role.POLICY]
    outputs = Outputs(predictions=torch.zeros(1, requires_grad=True), entropy=torch.zeros(1))
    with pytest.raises(ValueError, match=f"needs {Signal.OLD_LOG_PROBS}"):
        objective(outputs, batch)

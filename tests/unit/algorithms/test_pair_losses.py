"""Every loss on pairs: golden values, hand-computed cases, gradients, and what it does at the ends of its range."""

import math

import pytest
import torch

from rlhf.algorithms.pair_losses import PAIR_LOSSES, Pairs, Side, log_odds
from rlhf.config.algo import DpoSection, PairLossSection
from rlhf.config.algo.preference import (
    ApoDownLoss,
    ApoZeroLoss,
    CdpoLoss,
    CpoLoss,
    DiscopopLoss,
    DpoLoss,
    HingeLoss,
    IpoLoss,
    LengthNormalizedLoss,
    LengthPenalizedLoss,
    OrpoLoss,
    RdpoLoss,
    RpoLoss,
    SimpoLoss,
    SlicLoss,
)
from tests.unit.algorithms.pair_support import pairs

ALL: list[PairLossSection] = [
    *(DpoLoss(), CdpoLoss(label_noise=0.2), RdpoLoss(label_noise=0.2), IpoLoss(beta=0.5), HingeLoss(), SimpoLoss()),
    *(SlicLoss(), OrpoLoss(), CpoLoss(), ApoZeroLoss(), ApoDownLoss(), RpoLoss(), LengthPenalizedLoss()),
    *(LengthNormalizedLoss(), DiscopopLoss()),
]


def loss_of(section: PairLossSection, given: Pairs) -> torch.Tensor:
    loss: torch.Tensor
    (loss,) = PAIR_LOSSES[section.type](given, section)
    return loss


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def nls(x: float) -> float:
    """-log sigmoid."""
    return math.log1p(math.exp(-x))


def test_every_type_of_the_settings_has_its_loss() -> None:
    (union,) = (field for name, field in DpoSection.model_fields.items() if name == "loss")
    assert {section.type for section in ALL} == set(PAIR_LOSSES)
    assert union.discriminator == "type"
    for section in ALL:
        assert DpoSection.model_validate({"loss": {"type": section.type}}).loss.type == section.type


@pytest.mark.parametrize(
    ("policy", "ref", "margin", "loss"),
    [((-8.2, -9.5), (-8.5, -9.1), 0.7, 0.659), ((-6.2, -7.8), (-6.5, -7.1), 1.0, 0.6444)],
)
def test_golden_dpo(policy: tuple[float, float], ref: tuple[float, float], margin: float, loss: float) -> None:
    given = pairs(policy, ref)
    assert given.h.item() == pytest.approx(margin)
    assert loss_of(DpoLoss(beta=0.1), given).item() == pytest.approx(loss, abs=5e-4)
    assert loss_of(DpoLoss(beta=0.1), given).item() == pytest.approx(nls(0.1 * margin), rel=1e-6)


@pytest.mark.parametrize(("logit", "loss", "gradient"), [(0.0, 0.693147, -0.5), (2.0, 0.127, -0.119)])
def test_golden_gradient_on_the_logit(logit: float, loss: float, gradient: float) -> None:
    """With beta 1 the logit is h, and chosen carries its gradient."""
    given = pairs((-5.0 + logit, -3.0), (-5.0, -3.0))
    got = loss_of(DpoLoss(beta=1.0), given)
    assert got.item() == pytest.approx(loss, abs=5e-4)
    got.backward()
    assert given.chosen.log_probs.grad is not None
    assert given.rejected.log_probs.grad is not None
    assert given.chosen.log_probs.grad.item() == pytest.approx(gradient, abs=5e-4)
    assert given.rejected.log_probs.grad.item() == pytest.approx(-gradient, abs=5e-4)


LR_W, LR_L = 0.75, -1.25
H = LR_W - LR_L
POLICY, REF = (-2.25, -4.25), (-3.0, -3.0)
MEANS = (-0.5, -1.5)
BY_HAND: list[tuple[PairLossSection, tuple[float, float], tuple[float, float], tuple[float, float], float]] = [
    (DpoLoss(beta=0.3), POLICY, REF, (3, 5), nls(0.3 * H)),
    (CdpoLoss(beta=0.3, label_noise=0.2), POLICY, REF, (3, 5), 0.8 * nls(0.6) + 0.2 * nls(-0.6)),
    (RdpoLoss(beta=0.3, label_noise=0.2), POLICY, REF, (3, 5), (0.8 * nls(0.6) - 0.2 * nls(-0.6)) / 0.6),
    (IpoLoss(beta=0.5), POLICY, REF, (3, 5), (H - 1.0) ** 2),
    (HingeLoss(beta=0.3), POLICY, REF, (3, 5), 1 - 0.6),
    (HingeLoss(beta=0.6), POLICY, REF, (3, 5), 0.0),
    (SimpoLoss(beta=2.0, gamma=0.5), MEANS, (0, 0), (3, 5), nls(2.0 * 1.0 - 0.5)),
    (SlicLoss(delta=3.0, nll_coef=0.1), POLICY, (0, 0), (3, 5), 3.0 - 2.0 + 0.225 / 3),
    (SlicLoss(delta=1.0, nll_coef=0.1, nll_average=False), POLICY, (0, 0), (3, 5), 0.225),
    (
        OrpoLoss(beta=0.1),
        (math.log(0.5), math.log(0.2)),
        (0, 0),
        (3, 5),
        math.log(2) + 0.1 * nls(math.log(1.0) - math.log(0.25)),
    ),
    (CpoLoss(beta=0.3, nll_coef=0.5), POLICY, (0, 0), (3, 5), nls(0.6) + 0.5 * 2.25 / 3),
    (CpoLoss(beta=0.3, nll_coef=0.5, nll_average=False), POLICY, (0, 0), (3, 5), nls(0.6) + 0.5 * 2.25),
    (ApoZeroLoss(beta=0.3), POLICY, REF, (3, 5), 1 - sigmoid(0.3 * LR_W) + sigmoid(0.3 * LR_L)),
    (ApoDownLoss(beta=0.3), POLICY, REF, (3, 5), sigmoid(0.3 * LR_W) + 1 - sigmoid(0.3 * H)),
    (RpoLoss(beta=0.3, nll_coef=2.0), POLICY, REF, (3, 5), nls(0.6) + 2.0 * 2.25 / 3),
    (LengthPenalizedLoss(beta=0.3, length_coef=0.05), POLICY, REF, (3, 5), nls(0.6 - 0.05 * 2)),
    (LengthPenalizedLoss(beta=0.3, length_coef=0.05), POLICY, REF, (9, 5), nls(0.6 + 0.05 * 4)),
    (LengthNormalizedLoss(beta=5.0), POLICY, REF, (3, 5), nls(5.0 * H)),
    (
        DiscopopLoss(beta=0.3, tau=0.5),
        POLICY,
        REF,
        (3, 5),
        (1 - sigmoid(1.2)) * nls(0.6) + sigmoid(1.2) * math.exp(-0.6),
    ),
]


@pytest.mark.parametrize(("section", "policy", "ref", "lengths", "expected"), BY_HAND)
def test_by_hand(
    section: PairLossSection,
    policy: tuple[float, float],
    ref: tuple[float, float],
    lengths: tuple[float, float],
    expected: float,
) -> None:
    assert loss_of(section, pairs(policy, ref, lengths)).item() == pytest.approx(expected, rel=1e-6)


def test_every_loss_is_computed_by_hand_somewhere() -> None:
    assert {section.type for section, *_ in BY_HAND} == set(PAIR_LOSSES)


@pytest.mark.parametrize("section", ALL, ids=lambda section: section.type)
@pytest.mark.parametrize("lengths", [(1.0, 1.0), (7.0, 2.0)])
def test_gradients_by_finite_differences(section: PairLossSection, lengths: tuple[float, float]) -> None:
    generator = torch.Generator().manual_seed(3)
    said = -3 * torch.rand(4, 5, dtype=torch.float64, generator=generator) - 0.1
    chosen, rejected, ref_chosen, ref_rejected = said.unbind()

    def loss(lp_w: torch.Tensor, lp_l: torch.Tensor) -> torch.Tensor:
        sides = [
            Side(log_probs=lp, log_ratios=lp - ref, lengths=torch.full((5,), length))
            for lp, ref, length in zip((lp_w, lp_l), (ref_chosen, ref_rejected), lengths, strict=True)
        ]
        made: torch.Tensor = PAIR_LOSSES[section.type](Pairs(chosen=sides[0], rejected=sides[1]), section)
        return made

    assert torch.autograd.gradcheck(loss, (chosen.clone().requires_grad_(), rejected.clone().requires_grad_()))


@pytest.mark.parametrize("section", ALL, ids=lambda section: section.type)
@pytest.mark.parametrize("far", [-5000.0, -300.0, -90.0, -1e-9, 0.0])
@pytest.mark.parametrize("turned", [False, True])
def test_finite_far_out_in_float32(section: PairLossSection, far: float, turned: bool) -> None:
    """Also where one side is certain (log-prob 0), and where the pair is far on the wrong side."""
    values = (far, -1.0) if turned else (-1.0, far)
    sides = [torch.tensor([value], dtype=torch.float32, requires_grad=True) for value in values]
    made = [Side(log_probs=lp, log_ratios=lp + 1.0, lengths=torch.ones(1)) for lp in sides]
    loss = loss_of(section, Pairs(chosen=made[0], rejected=made[1]))
    loss.backward()
    assert loss.isfinite()
    assert all(side.grad is not None and side.grad.isfinite() for side in sides)


@pytest.mark.parametrize("section", ALL, ids=lambda section: section.type)
def test_which_way_each_side_is_pushed(section: PairLossSection) -> None:
    """At the start chosen goes up and rejected down. Not so by APO-down, whose two terms cancel on chosen, and by
    DiscoPOP, which is not monotone."""
    given = pairs((-1.0, -1.1), (-1.0, -1.1), (4, 4))
    loss_of(section, given).backward()
    assert given.chosen.log_probs.grad is not None
    assert given.rejected.log_probs.grad is not None
    up, down = -given.chosen.log_probs.grad.item(), given.rejected.log_probs.grad.item()
    signs = {"apo-down": (0, 1), "discopop": (-1, -1)}.get(section.type, (1, 1))
    assert (round(math.copysign(abs(up) > 1e-12, up)), round(math.copysign(abs(down) > 1e-12, down))) == signs


def test_discopop_has_a_hollow_left_of_the_start() -> None:
    """As the loss was found: it falls from far left to z = -0.12, rises to 0.07, and falls from there."""
    z = torch.tensor([-0.5, -0.119, 0.072, 0.5], dtype=torch.float64)
    side = Side(log_probs=z, log_ratios=z, lengths=torch.ones(4))
    zero = Side(log_probs=0 * z, log_ratios=0 * z, lengths=torch.ones(4))
    far, hollow, ridge, right = PAIR_LOSSES["discopop"](
        Pairs(chosen=side, rejected=zero), DiscopopLoss(beta=1.0)
    ).tolist()
    assert far > hollow
    assert hollow < ridge
    assert ridge > right


def test_apo_down_takes_a_chosen_answer_down_that_is_ahead_already() -> None:
    given = pairs((-1.0, -30.0), (-2.0, -2.0))
    loss_of(ApoDownLoss(beta=0.5), given).backward()
    assert given.chosen.log_probs.grad is not None
    assert given.chosen.log_probs.grad.item() > 0


def test_robust_dpo_is_unbiased_and_conservative_dpo_is_not() -> None:
    """Over labels that are flipped with probability e, rDPO's mean is DPO's loss of the clean label."""
    e, clean, flipped = 0.2, pairs((-1.0, -3.0)), pairs((-3.0, -1.0))
    wanted = loss_of(DpoLoss(beta=0.4), clean).item()

    def mean(section: PairLossSection) -> float:
        return (1 - e) * loss_of(section, clean).item() + e * loss_of(section, flipped).item()

    assert mean(RdpoLoss(beta=0.4, label_noise=e)) == pytest.approx(wanted)
    assert mean(CdpoLoss(beta=0.4, label_noise=e)) > wanted + 0.05


def test_ipo_is_a_square_with_its_minimum_at_one_over_two_beta() -> None:
    """The sign is positive: published texts have a leading minus, which has no minimum."""
    at = {h: loss_of(IpoLoss(beta=0.25), pairs((h, 0.0))).item() for h in (0.0, 1.0, 2.0, 3.0)}
    assert at == pytest.approx({0.0: 4.0, 1.0: 1.0, 2.0: 0.0, 3.0: 1.0})


def test_a_longer_chosen_answer_teaches_r_dpo_less() -> None:
    def pull(lengths: tuple[float, float]) -> float:
        given = pairs((-1.0, -1.0), (-1.0, -1.0), lengths)
        loss_of(LengthPenalizedLoss(beta=0.1, length_coef=0.05), given).backward()
        assert given.chosen.log_probs.grad is not None
        return -given.chosen.log_probs.grad.item()

    assert pull((40, 10)) < pull((10, 10)) < pull((10, 40))


@pytest.mark.parametrize("p", [1e-30, 1e-3, 0.5, 0.999, 1 - 1e-5])
def test_log_odds_in_float32(p: float) -> None:
    got = log_odds(torch.tensor(math.log(p), dtype=torch.float32)).item()
    assert got == pytest.approx(math.log(p / (1 - p)), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("kind", ["cdpo", "rdpo"])
@pytest.mark.parametrize("noise", [0.5, 0.7, 1.0, -0.1, math.nan])
def test_noise_of_a_half_or_more_is_refused(kind: str, noise: float) -> None:
    with pytest.raises(ValueError, match="label_noise"):
        DpoSection.model_validate({"loss": {"type": kind, "label_noise": noise}})


@pytest.mark.parametrize("section", ALL, ids=lambda section: section.type)
def test_which_losses_need_a_reference(section: PairLossSection) -> None:
    free = section.type in {"simpo", "slic", "orpo", "cpo"}
    assert section.uses_reference is not free
    assert section.model_copy(update={"humanline": True}).uses_reference
    assert section.averages_tokens is (section.type in {"simpo", "orpo", "ipo", "ln-dpo"})

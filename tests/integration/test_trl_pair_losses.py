"""Our losses on pairs against TRL's own code, on the same numbers: values and gradients.

As in `test_trl_losses`, TRL's methods are called on trainers that were never initialized. Where the two differ:

- R-DPO: TRL has none.
- RPO: TRL averages the likelihood over the tokens of the batch, we over each chosen answer and then over pairs (Pang et
  al. 2024, equation 1). Compared on a single pair, where that is the same.
- CPO and SLiC: TRL's likelihood is, again, over the tokens of the batch. The preference terms are compared; SLiC's is
  TRL's hinge loss of CPO.
- ORPO: TRL's likelihood is over prompt and answer, ours and the paper's over the answer. Its odds ratio is compared.
- Online DPO: TRL's loss stands inside a training step of its trainer. Its DPO is the one compared here; its IPO is on
  sums of log-probs where its own offline trainer, and we, average them.
"""

import warnings
from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch

from rlhf.algorithms.pair_losses import PAIR_LOSSES, Pairs, Side
from rlhf.config.algo import PairLossSection
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
    OrpoLoss,
    RdpoLoss,
    RpoLoss,
    SimpoLoss,
    SlicLoss,
)
from tests.integration.test_trl_losses import OneProcess
from tests.unit.algorithms.pair_support import experience, learn, pair

if TYPE_CHECKING:
    from types import ModuleType

pytestmark = pytest.mark.timeout(300)

PROMPT, ANSWER = 2, 6
BETA = 0.3


@pytest.fixture(scope="module")
def trl() -> "ModuleType":
    """The package with its trainers of pairs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what TRL and its own imports warn of is not ours
        import trl  # noqa: PLC0415
        import trl.experimental.cpo  # noqa: PLC0415
        import trl.experimental.orpo  # noqa: PLC0415

        trl.DPOTrainer  # noqa: B018  imported when first asked for
    package: ModuleType = trl
    return package


@dataclass(frozen=True)
class Given:
    """Pairs as TRL holds them: all chosen answers, then all rejected ones, padded to `ANSWER` tokens."""

    log_probs: torch.Tensor
    ref_log_probs: torch.Tensor
    lengths: torch.Tensor

    @property
    def mask(self) -> torch.Tensor:
        return torch.arange(ANSWER)[None] < self.lengths[:, None]


def given(lengths: list[tuple[int, int]], seed: int = 0) -> Given:
    generator = torch.Generator().manual_seed(seed)
    shape = (2 * len(lengths), ANSWER)
    own, ref = (-1.5 + 0.7 * torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    # Ours travel in float32: so that both see the same numbers.
    return Given(
        log_probs=own.requires_grad_(),
        ref_log_probs=ref.float().double(),
        lengths=torch.tensor([c for c, _ in lengths] + [r for _, r in lengths]),
    )


def ours(section: PairLossSection, data: Given) -> torch.Tensor:
    count = len(data.lengths) // 2
    rows = [(i, count + i) for i in range(count)]
    sizes = data.lengths.tolist()
    experiences = [
        experience(pair(f"p{i}", sizes[i], sizes[j]), [data.ref_log_probs[k, : sizes[k]].tolist() for k in (i, j)])
        for i, j in rows
    ]
    said = [[data.log_probs[k, : sizes[k]] for k in both] for both in rows]
    return learn(section, experiences, said)[0]


def theirs(trl: "ModuleType", data: Given, settings: dict[str, object]) -> torch.Tensor:
    """DPOTrainer's loss. Its model says log-probs shifted by one, 0 outside the answers."""
    bare = trl.DPOTrainer.__new__(trl.DPOTrainer)
    constants: dict[str, object] = {
        "aux_loss_enabled": False,
        "ld_alpha": None,
        "precompute_ref_logps": True,
        "f_divergence_type": "reverse_kl",
        "label_smoothing": 0.0,
        "use_weighting": False,
        "beta": BETA,
        "loss_types": ["sigmoid"],
        "loss_weights": [1.0],
        "accelerator": OneProcess(),
        "model": SimpleNamespace(training=False),
        "args": SimpleNamespace(discopop_tau=0.05),
        "_total_train_tokens": 0,
        "_metrics": {"eval": defaultdict(list)},
    }
    vars(bare).update(constants | settings)
    bare.accelerator.device = torch.device("cpu")
    count, mask = len(data.lengths), data.mask
    padding = torch.zeros(count, PROMPT - 1, dtype=torch.float64)
    log_probs = torch.cat([padding, torch.where(mask, data.log_probs, 0.0)], dim=1)
    zeros = torch.zeros_like(log_probs).detach()
    outputs = SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    ref = torch.where(mask, data.ref_log_probs, 0.0).sum(dim=1)
    inputs = {
        "input_ids": torch.zeros(count, PROMPT + ANSWER, dtype=torch.long),
        "completion_mask": torch.cat([torch.zeros(count, PROMPT, dtype=torch.long), mask.long()], dim=1),
        "ref_chosen_logps": ref[: count // 2],
        "ref_rejected_logps": ref[count // 2 :],
    }
    loss: torch.Tensor = bare._compute_loss(lambda **_: outputs, inputs, return_outputs=False)
    return loss


def same_gradient(mine: torch.Tensor, theirs: torch.Tensor, data: Given) -> None:
    """The same loss and the same gradient."""
    gradients = [torch.autograd.grad(loss, data.log_probs, retain_graph=True)[0] for loss in (mine, theirs)]
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-5, abs=1e-7)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-7)
    assert gradients[0].abs().sum() > 0.001


DPO: dict[str, tuple[PairLossSection, dict[str, object]]] = {
    "dpo": (DpoLoss(beta=BETA), {}),
    "hinge": (HingeLoss(beta=BETA), {"loss_types": ["hinge"]}),
    "ipo": (IpoLoss(beta=BETA), {"loss_types": ["ipo"]}),
    "rdpo": (RdpoLoss(beta=BETA, label_noise=0.2), {"loss_types": ["robust"], "label_smoothing": 0.2}),
    "apo-zero": (ApoZeroLoss(beta=BETA), {"loss_types": ["apo_zero"]}),
    "apo-down": (ApoDownLoss(beta=BETA), {"loss_types": ["apo_down"]}),
    "ln-dpo": (LengthNormalizedLoss(beta=BETA), {"loss_types": ["sigmoid_norm"]}),
    "discopop": (DiscopopLoss(beta=BETA), {"loss_types": ["discopop"]}),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", DPO)
def test_losses_of_the_dpo_trainer(trl: "ModuleType", name: str, seed: int) -> None:
    section, settings = DPO[name]
    data = given([(6, 2), (1, 1), (3, 5), (2, 6)], seed)
    same_gradient(ours(section, data), theirs(trl, data, settings), data)


def test_likelihood_of_chosen(trl: "ModuleType") -> None:
    data = given([(5, 3)])
    settings: dict[str, object] = {"loss_types": ["sigmoid", "sft"], "loss_weights": [1.0, 0.7]}
    same_gradient(ours(RpoLoss(beta=BETA, nll_coef=0.7), data), theirs(trl, data, settings), data)


def whole_answers() -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of chosen and rejected answers, some of which are nearly certain."""
    chosen = torch.tensor([-0.01, -0.7, -3.0, -9.0], dtype=torch.float64, requires_grad=True)
    return chosen, torch.tensor([-2.0, -0.5, -0.02, -7.0], dtype=torch.float64, requires_grad=True)


CPO: dict[str, tuple[PairLossSection, dict[str, object]]] = {
    "cpo": (CpoLoss(beta=BETA, nll_coef=0.0), {"loss_type": "sigmoid"}),
    "cdpo": (CdpoLoss(beta=BETA, label_noise=0.2), {"loss_type": "sigmoid", "label_smoothing": 0.2}),
    "simpo": (SimpoLoss(beta=BETA, gamma=0.8), {"loss_type": "simpo", "simpo_gamma": 0.8}),
    "slic": (SlicLoss(delta=1.0, nll_coef=0.0), {"loss_type": "hinge", "beta": 1.0}),
}


@pytest.mark.parametrize("name", [*CPO, "orpo"])
def test_losses_without_a_reference(trl: "ModuleType", name: str) -> None:
    """On log-probs of whole answers, or on the means that both hand to their losses."""
    chosen, rejected = whole_answers()
    section, settings = CPO.get(name, (OrpoLoss(beta=BETA), {}))
    sides = [Side(log_probs=side, log_ratios=side, lengths=torch.ones(4)) for side in (chosen, rejected)]
    mine = PAIR_LOSSES[name](Pairs(chosen=sides[0], rejected=sides[1]), section)
    one = SimpleNamespace(device=torch.device("cpu"))
    if name == "orpo":
        bare = trl.experimental.orpo.ORPOTrainer.__new__(trl.experimental.orpo.ORPOTrainer)
        vars(bare).update(beta=BETA, accelerator=one)
        found = -chosen - bare.odds_ratio_loss(chosen, rejected)[0]
    else:
        bare = trl.experimental.cpo.CPOTrainer.__new__(trl.experimental.cpo.CPOTrainer)
        vars(bare).update({"alpha": 0.0, "beta": BETA, "label_smoothing": 0.0, "accelerator": one} | settings)
        found = bare.cpo_loss(chosen, rejected)[0]
    torch.testing.assert_close(mine, found.double(), rtol=1e-5, atol=1e-7)
    gradients = [torch.autograd.grad(loss.sum(), (chosen, rejected), retain_graph=True) for loss in (mine, found)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)

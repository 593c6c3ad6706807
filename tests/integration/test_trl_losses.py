"""Our losses against TRL's own code, on the same numbers.

TRL's losses are methods of its trainers. They are called on a trainer that was never initialized and has only what the
loss reads; log-probs are given instead of computed. What has no loss of its own there (advantages, importance weights,
which TRL computes between generation and loss) is compared with the formula in the unit tests.
"""

import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from rlhf.algorithms import build_algorithm
from rlhf.algorithms.base import Outputs, TensorBatch
from rlhf.algorithms.kto import KTO
from rlhf.config.algo import (
    CispoSection,
    CriticFreeSection,
    DrGrpoSection,
    FixedKl,
    GrpoSection,
    GspoSection,
    KtoSection,
    RlooSection,
)
from rlhf.orchestrator.step.batching import MicroBatchLimits, build_batches, plan_batches
from rlhf.types import Denominators, Example, FloatArray, Role, Signal, Signals
from tests.unit.algorithms.build import group, rollout

if TYPE_CHECKING:
    from types import ModuleType

pytestmark = pytest.mark.timeout(300)

NUM_ANSWERS, NUM_TOKENS = 5, 7
COLUMNS = ("log_probs", "old_log_probs", "ref_log_probs", "entropy")


@pytest.fixture(scope="module")
def trl() -> "ModuleType":
    """The package with its trainers, imported once: that takes half a minute."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what TRL and its own imports warn of is not ours
        import trl  # noqa: PLC0415

        for trainer in ("GRPOTrainer", "RLOOTrainer", "DPOTrainer", "KTOTrainer"):
            getattr(trl, trainer)  # imported when first asked for
    package: ModuleType = trl
    return package


class OneProcess:
    """What TRL's losses ask of an accelerator."""

    num_processes = 1
    sync_gradients = True

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def gather_for_metrics(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def reduce(self, tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        return tensor


@dataclass(frozen=True)
class Sampled:
    """Answers [B, T] as TRL holds them: padded, one with a gap that a tool wrote, one of a single token. None is empty:
    TRL's means over answers count those, ours do not."""

    log_probs: torch.Tensor
    old_log_probs: torch.Tensor
    ref_log_probs: torch.Tensor
    entropy: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor


def sampled(*, seed: int = 0) -> Sampled:
    generator = torch.Generator().manual_seed(seed)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    lengths = torch.tensor([7, 1, 4, 5, 3])
    mask = torch.arange(NUM_TOKENS)[None] < lengths[:, None]
    mask[0, 2:4] = False
    columns = {name: -1.0 + 0.4 * numbers(NUM_ANSWERS, NUM_TOKENS) for name in COLUMNS}
    columns["log_probs"].requires_grad_()
    return Sampled(**columns, advantages=numbers(NUM_ANSWERS), mask=mask)


def packed(data: Sampled, *, kl: float = 0.0, weights: torch.Tensor | None = None) -> TensorBatch:
    """The same answers as one micro-batch of ours, which is the whole step; padding is what is not learned from."""
    advantages = data.advantages[:, None].expand(-1, NUM_TOKENS) * (1.0 if weights is None else weights)
    return TensorBatch(
        lengths=torch.full((NUM_ANSWERS,), NUM_TOKENS),
        loss_mask=data.mask.flatten(),
        example_index=torch.arange(NUM_ANSWERS),
        targets=torch.zeros(NUM_ANSWERS),
        margins=torch.zeros(NUM_ANSWERS),
        denominators=Denominators(
            tokens=float(data.mask.sum()),
            sequences=float(data.mask.any(dim=1).sum()),
            examples=float(NUM_ANSWERS),
        ),
        signals={
            Signal.OLD_LOG_PROBS: data.old_log_probs.flatten(),
            Signal.SAMPLER_LOG_PROBS: data.old_log_probs.flatten(),  # importance weights of 1
            Signal.REF_LOG_PROBS: data.ref_log_probs.flatten(),
            Signal.ADVANTAGES: advantages.flatten(),
        },
        coefficients={"kl": kl},
    )


def ours(section: CriticFreeSection, data: Sampled, weights: torch.Tensor | None = None) -> torch.Tensor:
    batch = packed(data, kl=section.kl.coef, weights=weights)
    outputs = Outputs(predictions=data.log_probs.flatten(), entropy=data.entropy.flatten())
    return build_algorithm(section).objectives()[Role.POLICY](outputs, batch).loss


@dataclass
class Bare:
    """What a loss of TRL's critic-free trainers reads of its trainer."""

    data: Sampled
    loss_type: str = "bnpo"
    importance_sampling_level: str = "token"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    beta: float = 0.0
    delta: float | None = None
    entropy_coef: float = 0.0
    weights: torch.Tensor | None = None
    attributes: dict[str, Any] = field(default_factory=dict)

    def loss(self, trainer: type) -> torch.Tensor:
        data = self.data
        bare: Any = object.__new__(trainer)
        constants: dict[str, object] = {
            "aux_loss_enabled": False,
            "top_entropy_quantile": 1.0,
            "off_policy_mask_threshold": None,
            "use_adaptive_entropy": False,
            "max_completion_length": NUM_TOKENS,
            "accelerator": OneProcess(),
            "model": SimpleNamespace(training=False),
            "args": SimpleNamespace(delta=self.delta, use_bias_correction_kl=True, steps_per_generation=1),
            "_entropy_bonus_enabled": self.entropy_coef > 0.0,
            "_metrics": {"eval": defaultdict(list)},
            "_get_per_token_logps_and_entropies": lambda *_, **__: (data.log_probs, data.entropy, None),
            "use_vllm": self.weights is not None,
            "vllm_importance_sampling_correction": True,
        }
        names = ("loss_type", "importance_sampling_level", "epsilon_low", "epsilon_high", "beta", "entropy_coef")
        vars(bare).update(constants, **{name: vars(self)[name] for name in names})
        mask = data.mask.long()
        inputs = {
            "prompt_ids": torch.zeros(NUM_ANSWERS, 1, dtype=torch.long),
            "prompt_mask": torch.ones(NUM_ANSWERS, 1, dtype=torch.long),
            "completion_ids": torch.zeros_like(mask),
            "completion_mask": mask,
            "advantages": data.advantages,
            "old_per_token_logps": data.old_log_probs,
            "ref_per_token_logps": data.ref_log_probs,
            "old_logps": (data.old_log_probs * mask).sum(dim=1),
            "importance_sampling_ratio": self.weights,
            "num_items_in_batch": mask.sum(),
        }
        loss: torch.Tensor = bare._compute_loss(None, inputs)
        return loss


def same_gradient(mine: torch.Tensor, theirs: torch.Tensor, data: Sampled) -> None:
    """The same loss and the same gradient."""
    gradients = [torch.autograd.grad(loss, data.log_probs, retain_graph=True)[0] for loss in (mine, theirs)]
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-5, abs=1e-7)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-7)
    assert gradients[0].abs().sum() > 0.01


MEAN = "seq-mean-token-mean"
GRPO: dict[str, tuple[CriticFreeSection, dict[str, Any]]] = {
    "token mean": (GrpoSection(), {"loss_type": "bnpo"}),
    "sequence mean": (GrpoSection(aggregation=MEAN), {"loss_type": "grpo"}),
    "kl in the loss": (GrpoSection(kl=FixedKl(coef=0.3)), {"beta": 0.3}),
    "entropy": (GrpoSection(entropy_coef=0.1), {"entropy_coef": 0.1}),
    "dual clip": (GrpoSection(dual_clip=1.4), {"delta": 1.4}),
    "dapo": (GrpoSection(clip_high=0.28), {"loss_type": "dapo", "epsilon_high": 0.28}),
    "dr-grpo": (DrGrpoSection(aggregation_tokens=NUM_TOKENS), {"loss_type": "dr_grpo"}),
    "gspo": (
        GspoSection(),
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon_low": 3e-4,
            "epsilon_high": 4e-4,
        },
    ),
    "gspo, wide": (
        GspoSection(clip_low=0.2, clip_high=0.2),
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    ),
    # TRL's bound is the largest weight itself.
    "cispo": (CispoSection(), {"loss_type": "cispo", "epsilon_high": 1.2}),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", GRPO)
def test_grpo_and_its_family(trl: "ModuleType", name: str, seed: int) -> None:
    section, settings = GRPO[name]
    data = sampled(seed=seed)
    same_gradient(ours(section, data), Bare(data, **settings).loss(trl.GRPOTrainer), data)


def test_importance_weights(trl: "ModuleType") -> None:
    """TRL multiplies the loss by them, we the advantages."""
    data = sampled()
    weights = torch.rand(NUM_ANSWERS, NUM_TOKENS, dtype=torch.float64) * 2
    same_gradient(ours(GrpoSection(), data, weights), Bare(data, weights=weights).loss(trl.GRPOTrainer), data)


@pytest.mark.parametrize("seed", [0, 1])
def test_rloo(trl: "ModuleType", seed: int) -> None:
    """TRL's RLOO clips the whole answer's ratio: ours does with these settings."""
    data = sampled(seed=seed)
    section = RlooSection(ratio="sequence", aggregation=MEAN)
    same_gradient(ours(section, data), Bare(data).loss(trl.RLOOTrainer), data)


def judged(seed: int, labels: Sequence[bool]) -> tuple[list[Example], list[Signals]]:
    """Answers of 1 to 5 tokens to prompts of their own as KTO selects them, each beside another prompt too, and random
    log-probs by policy and reference."""
    rng = np.random.default_rng(seed)
    groups = [
        group([rollout([n + 1] * (1 + n % 5), name=f"a{n}")], [float(good)], labels=[good], name=f"p{n}")
        for n, good in enumerate(labels)
    ]
    groups = [
        replace(one, prompt=replace(one.prompt, token_ids=np.array([100 + n, 1], dtype=np.int64)))
        for n, one in enumerate(groups)
    ]
    examples = KTO(KtoSection()).select(groups)

    def said(example: Example, shift: float) -> tuple[FloatArray, ...]:
        return tuple(
            np.where(s.loss_mask, rng.normal(-2.0 + shift, 0.6, len(s)), 0.0).astype(np.float32)
            for s in example.sequences
        )

    return examples, [{Signal.OLD_LOG_PROBS: said(e, 0.3), Signal.REF_LOG_PROBS: said(e, 0.0)} for e in examples]


def fused_outputs(log_probs: torch.Tensor) -> SimpleNamespace:
    """[B, L] log-probs as TRL's fused head gives them: of each token but the first."""
    zeros = torch.zeros_like(log_probs[:, 1:]).detach()
    return SimpleNamespace(log_probs=log_probs[:, 1:], entropy=zeros, mean_logits=zeros)


@pytest.mark.parametrize("labels", [(True, False, True, True, False), (False, True), (True,) * 3, (False,) * 4])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.7, 0.6)])
def test_kto(trl: "ModuleType", labels: tuple[bool, ...], weights: tuple[float, float]) -> None:
    """z0 from the same mismatched answers, the loss, its gradient, and the figures."""
    section = KtoSection(beta=0.3, class_weights="given", desirable_weight=weights[0], undesirable_weight=weights[1])
    algorithm = KTO(section)
    examples, signals = judged(len(labels), labels)
    experiences, credited = algorithm.credit(examples, signals)
    plan = plan_batches(experiences, MicroBatchLimits(num_ranks=1, max_tokens_per_micro_batch=1000))
    (batch,) = build_batches(plan, experiences, Role.POLICY)
    flat = torch.tensor(
        np.concatenate([s[Signal.OLD_LOG_PROBS][0] for s in signals]), dtype=torch.float64, requires_grad=True
    )
    outputs = Outputs(predictions=flat, entropy=torch.zeros_like(flat))
    tensors = TensorBatch.from_numpy(batch, torch.device("cpu"))
    mine = algorithm.objectives()[Role.POLICY](outputs, tensors).loss

    masks = [torch.tensor(example.sequences[0].loss_mask) for example in examples]
    rows = flat.split([len(one) for one in masks])
    said = pad_sequence([row * one for row, one in zip(rows, masks, strict=True)], batch_first=True)
    mask = pad_sequence([one.long() for one in masks], batch_first=True)

    def sums(arrays: Sequence[tuple[FloatArray, ...]], index: int) -> torch.Tensor:
        return torch.tensor([float(a[index].astype(np.float64).sum()) for a in arrays], dtype=torch.float64)

    old, ref = [s[Signal.OLD_LOG_PROBS] for s in signals], [s[Signal.REF_LOG_PROBS] for s in signals]
    bare = trl.KTOTrainer.__new__(trl.KTOTrainer)
    vars(bare).update(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda tensor: tensor),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=True,
        loss_type="kto",
        beta=section.beta,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        _compute_kl_logps=lambda *_: sums(old, 1),
    )
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "label": torch.tensor(labels),
        "ref_logps": sums(ref, 0),
        "ref_KL_logps": sums(ref, 1),
    }

    theirs = bare._compute_loss(lambda **_: fused_outputs(said), inputs, return_outputs=False)
    figures = bare._metrics["train"]
    gradients = [torch.autograd.grad(loss, flat, retain_graph=True)[0] for loss in (mine, theirs)]
    assert mine.item() == pytest.approx(theirs.item(), rel=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-8)
    assert credited.sums["kto/z0"] == pytest.approx(figures["kl"][0], rel=1e-5)
    for name, label in (("desirable", "chosen"), ("undesirable", "rejected")):
        if figures[f"rewards/{label}"]:
            assert credited.sums[f"labels/{name}_reward"] == pytest.approx(figures[f"rewards/{label}"][0], rel=1e-5)
            assert credited.sums[f"labels/{name}_log_prob"] == pytest.approx(figures[f"logps/{label}"][0], rel=1e-5)

"""The algorithms by the type of their config sections: the class of each, and what a run must start for it. Imports no
torch: `rlhf check` and `rlhf plan` ask for nothing else."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import singledispatch

from rlhf.config.algo import (
    AlgorithmSection,
    Correction,
    CriticFreeSection,
    CustomSection,
    DpoSection,
    KtoSection,
    NashMdSection,
    OnlineDpoSection,
    OnlineKtoSection,
    PpoSection,
    PrmSection,
    RatioToSampler,
    RemaxSection,
    RmSection,
    SftSection,
)
from rlhf.errors import ConfigError
from rlhf.types import SCORED_BY, Head, Role, Signal

CLASSES: Mapping[str, str] = {
    "sft": "sft:SFT",
    "rm": "rm:RM",
    "prm": "prm:PRM",
    "ppo": "ppo:PPO",
    "grpo": "grpo:GRPO",
    "rloo": "rloo:RLOO",
    "reinforce++": "reinforce:Reinforce",
    "reinforce++-baseline": "reinforce:ReinforceBaseline",
    "remax": "remax:ReMax",
    "dr-grpo": "grpo:DrGRPO",
    "dapo": "grpo:DAPO",
    "gspo": "grpo:GSPO",
    "cispo": "grpo:CISPO",
    "dpo": "dpo:DPO",
    "online-dpo": "online_dpo:OnlineDPO",
    "nash-md": "nash_md:NashMD",
    "kto": "kto:KTO",
    "online-kto": "online_kto:OnlineKTO",
    "custom": "custom:custom",
}
"""Section type -> module of rlhf.algorithms and class, which is made from the section alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmaReference:
    """A reference that follows the policy: after every `every_steps` steps it becomes decay * itself + (1 - decay) *
    the policy. Decay 0 copies the policy."""

    every_steps: int
    decay: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Which models a run must start for an algorithm. `trains` maps each trained role to its model's head; `signals`
    are the per-token arrays that models compute before credit, out of those in `rlhf.types.SCORED_BY`.

    `late_old_log_probs`: `credit` does not read the old log-probs. Where a rollout batch is one optimizer step, they
    come from the pass that learns.
    `ema_reference`: the reference is a copy of the policy that follows it; the policy's own processes hold it, and no
    reference is started. `greedy_baseline`: one more response per prompt is sampled greedily and scored. `mixture`: the
    share of the reference in the geometric mixture that responses are sampled from; `opponents`: how many of the last
    responses of each group are sampled from it, None for all.
    """

    trains: Mapping[Role, Head]
    signals: frozenset[Signal] = frozenset()
    online: bool = True
    late_old_log_probs: bool = False
    ema_reference: EmaReference | None = None
    greedy_baseline: bool = False
    mixture: float = 0.0
    opponents: int | None = None

    def __post_init__(self) -> None:
        """Raises ConfigError where no model of the run could compute a signal."""
        for signal in self.signals:
            role = SCORED_BY.get(signal)
            if role is None:
                choices = ", ".join(SCORED_BY)
                raise ConfigError(f"needs.signals: no model computes {signal}; choose from {choices}.")
            if role is not Role.REFERENCE and role not in self.trains:
                raise ConfigError(f"needs.signals: {signal} comes from the {role}; add it to needs.trains.")

    @property
    def exported_role(self) -> Role:
        """The role whose model a run exports at its end: the first of `trains`."""
        return next(iter(self.trains))


POLICY: Mapping[Role, Head] = {Role.POLICY: Head.LOG_PROBS}


@singledispatch
def needs_of(section: AlgorithmSection) -> Needs:
    """What the algorithm of a section needs. That of the user's own, which only its class knows, is built for it. A
    class calls the function of its own kind instead: the user's own may be made of it.

    Raises ConfigError where the user's own algorithm cannot be built.
    """
    raise TypeError(f"{section.type} is no algorithm")


@needs_of.register
def sft_needs(section: SftSection) -> Needs:
    return Needs(trains=POLICY, online=False)


@needs_of.register
def rm_needs(section: RmSection) -> Needs:
    return Needs(trains={Role.REWARD: Head.SCORES}, online=False)


@needs_of.register
def prm_needs(section: PrmSection) -> Needs:
    return Needs(trains={Role.REWARD: Head.TOKEN_SCORES}, online=False)


@needs_of.register
def dpo_needs(section: DpoSection) -> Needs:
    return Needs(trains=POLICY, signals=_reference(section.loss.uses_reference), online=False)


@needs_of.register(KtoSection)
@needs_of.register(OnlineKtoSection)
def kto_needs(section: KtoSection | OnlineKtoSection) -> Needs:
    signals = frozenset({Signal.OLD_LOG_PROBS, Signal.REF_LOG_PROBS})
    return Needs(trains=POLICY, signals=signals, online=isinstance(section, OnlineKtoSection))


@needs_of.register
def nash_md_needs(section: NashMdSection) -> Needs:
    signals = frozenset({Signal.OLD_LOG_PROBS, Signal.REF_LOG_PROBS})
    return Needs(trains=POLICY, signals=signals, mixture=section.mixture, opponents=1)


@needs_of.register
def online_dpo_needs(section: OnlineDpoSection) -> Needs:
    own = Signal.OLD_LOG_PROBS if section.reference == "behavior" else Signal.REF_LOG_PROBS
    # Log-probs of a mixture say nothing about how well sampler and trainer agree on the policy's.
    from_policy = not section.mixture
    return Needs(
        trains=POLICY,
        signals=frozenset({own} | ({Signal.OLD_LOG_PROBS} if from_policy else set())),
        late_old_log_probs=own is not Signal.OLD_LOG_PROBS,
        ema_reference=ema_reference(section),
        mixture=section.mixture,
    )


@needs_of.register
def critic_free_needs(section: CriticFreeSection) -> Needs:
    signals = old_policy_signals(section.correction) | _reference(section.uses_reference)
    return Needs(
        trains=POLICY,
        signals=signals,
        late_old_log_probs=credits_without_old_policy(section),
        greedy_baseline=isinstance(section, RemaxSection),
    )


@needs_of.register
def ppo_needs(section: PpoSection) -> Needs:
    signals = old_policy_signals(section.correction) | {Signal.VALUES} | _reference(section.uses_reference)
    return Needs(
        trains={**POLICY, Role.CRITIC: Head.VALUES},
        signals=signals,
        late_old_log_probs=credits_without_old_policy(section),
    )


@needs_of.register
def custom_needs(section: CustomSection) -> Needs:
    from rlhf.algorithms.custom import custom  # noqa: PLC0415  imports torch

    return custom(section).needs


def old_policy_signals(correction: Correction) -> frozenset[Signal]:
    """What the trainer computes about the old policy: its log-probs, unless the sampler's take their place."""
    return frozenset() if isinstance(correction, RatioToSampler) else frozenset({Signal.OLD_LOG_PROBS})


def credits_without_old_policy(section: CriticFreeSection | PpoSection) -> bool:
    """Whether rewards hold no KL, which is of the old policy, and every token that was sampled is learned from: the
    learning pass computes no log-probs of others."""
    kl_in_reward = section.uses_reference and section.kl_placement == "reward"
    return not kl_in_reward and section.truncated == "learn"


def _reference(is_used: bool) -> frozenset[Signal]:
    return frozenset({Signal.REF_LOG_PROBS} if is_used else ())


def ema_reference(section: OnlineDpoSection) -> EmaReference | None:
    """How the reference follows the policy, where it does."""
    if section.reference == "refresh":
        return EmaReference(every_steps=section.reference_every_steps)
    return EmaReference(every_steps=1, decay=section.reference_decay) if section.reference == "ema" else None

"""Why a run does not learn, as far as its metrics tell: the cause first, one line each."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from rlhf.types import Json

STEPS = (1, 3, 10)
"""The steps after which a run is looked at: a mistake in its settings shows at once."""
WINDOW = 10
"""Steps that are looked at in a run that is older."""
ALL = 0.99
"""A share from which on it is called all."""
NEARLY_ALL = 0.95
"""A share of groups with equal rewards from which on what is learned comes from few responses."""
LEAST_LR = 1e-9
"""A learning rate below which a step of Adam, which is about as large as the rate, is lost in the rounding of most
float32 weights: those of 0.02 are 2e-9 apart."""
SOURCE = "reward/source/"
TRAINED = ("policy", "reward")

Metrics = Mapping[str, Json]
Config = Mapping[str, Json]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """One reason why a run does not learn, or learns from something else than is meant."""

    kind: str
    """The same for the same reason: truncated, labels, format, never_rewarded, constant_reward, equal_groups,
    few_unequal_groups, empty, one_label, zero_gradient, no_update, learning_rate, mismatch."""
    text: str
    """One line: what is wrong, its consequence, what to do."""


def find_causes(steps: Sequence[Metrics], config: Config) -> list[Cause]:
    """What is wrong in all of `steps`, the metrics of consecutive steps as metrics.jsonl has them. Empty where nothing
    is known to be wrong.

    Args:
        steps: the steps to look at, usually the first ones or the last ones of a run.
        config: the resolved config as nested mappings, as config.yaml has it.
    """
    if not steps:
        return []
    look = _Look(steps, config)
    rewards = list(islice(_reward_causes(look), 1))
    gradient = [] if rewards and look.is_all_zero("policy/grad_norm") else list(_gradient_causes(look))
    truncated = list(_truncated(look)) if not any(cause.kind == "truncated" for cause in rewards) else []
    return [*rewards, *truncated, *gradient, *_learning_rate(look), *_mismatch(look)]


class CauseWatch:
    """Says after steps 1, 3 and 10 what is wrong, each reason once."""

    def __init__(self, config: Config, note: Callable[[str, str], None]) -> None:
        """`note` records an event: its kind and its text."""
        self._config = config
        self._note = note
        self._steps: list[Metrics] = []
        self._said: set[str] = set()

    def observe(self, step: int, metrics: Metrics) -> None:
        """Look at a finished step. Steps are counted from 1; a resumed run is looked at from where it continues."""
        if step > STEPS[-1]:
            return
        self._steps.append(metrics)
        for cause in find_causes(self._steps, self._config) if step in STEPS else ():
            if cause.kind not in self._said:
                self._said.add(cause.kind)
                self._note("diagnosis", f"after step {step}: {cause.text}")


class _Look:
    """The steps and the config, asked for single facts."""

    def __init__(self, steps: Sequence[Metrics], config: Config) -> None:
        self.steps = steps
        self._config = config

    def values(self, name: str) -> list[float]:
        """A metric in the steps that have it."""
        return [float(value) for step in self.steps if isinstance(value := step.get(name), int | float)]

    def is_all(self, name: str) -> bool:
        """Whether a share was 1 in each of the steps."""
        values = self.values(name)
        return bool(values) and min(values) >= ALL

    def is_all_zero(self, name: str) -> bool:
        """Whether a metric was 0 in each of the steps."""
        values = self.values(name)
        return bool(values) and not any(values)

    def setting(self, key: str) -> Json:
        """A setting by its dotted key; None where the config has none."""
        value: Json = dict(self._config)
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    @property
    def is_equal(self) -> bool:
        """Whether no response was better than those it is compared with: then nothing is learned from them."""
        groups = self.values("groups/zero_std")
        return self.is_all("groups/zero_std") if groups else self.is_all_zero("reward/std")

    @property
    def consequence(self) -> str:
        """What equal rewards mean for the run."""
        if not self.is_equal:
            return ""
        what = "all advantages are 0" if self.values("groups/zero_std") else "all rewards are equal"
        return f", so that {what} and nothing is learned"


def _reward_causes(look: _Look) -> Iterator[Cause]:
    """Why rewards do not tell responses apart, the cause of the others first."""
    if look.is_all("response/empty"):
        yield Cause(
            kind="empty",
            text="every response is empty: the model ends at once. Look at the prompts (data.template, "
            "data.prompt_format), or train it on demonstrations first (sft).",
        )
    if look.is_all("labels/one_sided"):
        yield Cause(
            kind="one_label",
            text="all responses of a step have the same label, so that nothing tells good from bad. Raise the batch "
            "size, or look at the labels.",
        )
    if not look.is_equal:
        yield from _few_unequal(look)
        return
    if look.is_all("response/truncated"):
        yield from _truncated(look)
    if look.is_all_zero("data/labeled") and look.is_all_zero("reward/mean"):
        yield Cause(
            kind="labels",
            text=f"no row has a label and every reward is 0{look.consequence}. If the reward compares with an answer, "
            "name its column (data.label_key).",
        )
    sources = sorted({name for step in look.steps for name in step if name.startswith(SOURCE)})
    silent = [name.removeprefix(SOURCE) for name in sources if look.is_all_zero(name)]
    silent = [name for name in silent if "/" not in name]
    for name in (name for name in silent if "format" in name):
        yield Cause(
            kind="format",
            text=f"no response has the format that the reward `{name}` asks for{look.consequence}. Ask for it in the "
            "prompt (data.prompt_format), or train on demonstrations that have it first (sft).",
        )
    if look.is_all_zero("reward/mean") and look.is_all_zero("reward/std"):
        of = f" `{silent[0]}`" if len(silent) == 1 else ""
        yield Cause(
            kind="never_rewarded",
            text=f"the reward{of} is 0 for every response{look.consequence}. Either no response is right (take easier "
            "prompts or a better model), or the reward does not find what is right: read rollouts/*.jsonl.",
        )
    if look.is_all_zero("reward/std"):
        yield Cause(
            kind="constant_reward",
            text=f"every response of a step has the same reward ({look.values('reward/mean')[-1]:.4g})"
            f"{look.consequence}. Either the task is solved, or the reward does not look at the response.",
        )
    yield Cause(
        kind="equal_groups",
        text=f"all responses to the same prompt have the same reward, though prompts differ{look.consequence}. Either "
        "prompts are all too hard or too easy, or responses are alike (rollout.temperature "
        f"{look.setting('rollout.temperature')}, rollout.group_size {look.setting('rollout.group_size')}).",
    )


def _few_unequal(look: _Look) -> Iterator[Cause]:
    """A step learns from the few groups whose rewards differ."""
    shares = look.values("groups/zero_std")
    if not shares or min(shares) < NEARLY_ALL:
        return
    yield Cause(
        kind="few_unequal_groups",
        text=f"in {100 * sum(shares) / len(shares):.0f}% of the groups all rewards are equal, so that a step learns "
        "from the few others. Take prompts that are neither too hard nor too easy, raise rollout.group_size, or sample "
        "until enough groups differ (algo.dynamic_sampling).",
    )


def _truncated(look: _Look) -> Iterator[Cause]:
    """All responses were cut."""
    if look.is_all("response/truncated"):
        limits = []
        if not look.is_all("agent/out_of_turns"):
            limits.append(f"at {look.setting('rollout.max_response_tokens')} tokens (rollout.max_response_tokens)")
        if any(look.values("agent/out_of_turns")):
            limits.append(f"after {look.setting('rollout.max_turns')} turns (rollout.max_turns)")
        masked = look.setting("algo.truncated") == "mask"
        left_out = ", and algo.truncated: mask leaves out all of them" if masked else ""
        yield Cause(
            kind="truncated",
            text=f"all responses were cut {' or '.join(limits)}, none ended by itself"
            f"{look.consequence or left_out}. Raise the limit, unless the reward is meant for texts that are cut.",
        )


def _gradient_causes(look: _Look) -> Iterator[Cause]:
    """Why there is no gradient although rewards tell responses apart."""
    if look.is_all_zero("updates/applied"):
        skipped = any(look.values("updates/skipped"))
        why = "every gradient was not finite" if skipped else "no example was selected to learn from"
        yield Cause(kind="no_update", text=f"no optimizer step was made: {why}. See the warnings in events.jsonl.")
        return
    for role in TRAINED:
        if not look.is_all_zero(f"{role}/grad_norm"):
            continue
        why = "no token that is trained on has an advantage or a loss"
        if look.is_all_zero("advantages/std"):
            why = "all advantages are 0, although rewards differ"
        if look.is_all("response/truncated") and look.setting("algo.truncated") == "mask":
            why = "all responses were cut, and algo.truncated: mask leaves them out"
        yield Cause(
            kind="zero_gradient",
            text=f"the gradient of the {role} is 0 because {why}: no weight changes. "
            "Look at reward/std, groups/zero_std and advantages/std in metrics.jsonl.",
        )


def _learning_rate(look: _Look) -> Iterator[Cause]:
    """Steps that are too small to change weights."""
    for role in TRAINED:
        rates = look.values(f"{role}/lr")
        if not rates or max(rates) >= LEAST_LR:
            continue
        peak = look.setting(f"{role}.lr")
        small = isinstance(peak, int | float) and peak < LEAST_LR
        why = f"{role}.lr is {peak:g}" if small else f"the warm-up is that long ({role}.warmup_ratio"
        if not small:
            why += f" {look.setting(f'{role}.warmup_ratio')} of all optimizer steps)"
        advice = f"Raise {role}.lr; 1e-6 is usual" if small else f"Lower {role}.warmup_ratio"
        yield Cause(
            kind="learning_rate",
            text=f"the learning rate of the {role} is {rates[-1]:.2g} because {why}: too small to change float32 "
            f"weights. {advice}.",
        )


def _mismatch(look: _Look) -> Iterator[Cause]:
    """The sampler's and the trainer's log-probs of the same tokens differ."""
    limit, values = look.setting("train.mismatch_warn"), look.values("mismatch/log_prob")
    if not values or not isinstance(limit, int | float) or not limit or min(values) <= limit:
        return
    stale = look.setting("rollout.max_lag")
    why = (
        f"responses are up to {stale} versions old (rollout.max_lag)"
        if stale
        else "the rollout engine computes in another precision or does not have the policy's weights"
    )
    yield Cause(
        kind="mismatch",
        text=f"sampler and trainer differ by {values[-1]:.2g} nats a token (train.mismatch_warn {limit:g}): {why}, so "
        "that training is off-policy. Compare policy.dtype with rollout.engine, and see mismatch/* in docs/metrics.md.",
    )

"""Rules of the critic-free family, and of importance correction, which PPO shares: combinations that make no sense,
each with the reason."""

from collections.abc import Iterator

from rlhf.config.algo import (
    CriticFreeSection,
    MaskedWeights,
    NoCorrection,
    PolicyGradientSection,
    PpoSection,
    RatioToSampler,
    TruncatedWeights,
)
from rlhf.config.commands import OnlineConfig
from rlhf.config.problems import Problem
from rlhf.config.rules.narrow import for_algorithm

WITHOUT_GROUPS = {"reinforce++", "remax"}
"""Members whose baseline does not use the other responses to the prompt; each token has an advantage of its own."""
FIXED = {
    "dr-grpo": ("scale", "none", "with it, it is GRPO"),
    "gspo": ("ratio", "sequence-mean", "with another, it is GRPO"),
    "cispo": ("loss", "cispo", "with another, it is GRPO"),
}
"""Type -> the setting that defines it, its value, and what the member would be otherwise."""


def group_size(config: OnlineConfig, algo: CriticFreeSection) -> Iterator[Problem]:
    """There are enough responses for a baseline."""
    group_size = config.rollout.group_size
    keys = ("rollout.group_size", "algo.type")
    if algo.type not in WITHOUT_GROUPS and group_size < 2:
        text = f"{algo.type.upper()} needs >= 2 (got 1): the baseline is made of the responses to the same prompt."
        yield Problem(keys=keys, text=text)
    elif algo.dynamic_sampling and group_size < 2:
        text = (
            "a group of 1 response has zero standard deviation, and algo.dynamic_sampling would leave out every prompt."
        )
        yield Problem(keys=("rollout.group_size", "algo.dynamic_sampling"), text=text)
    if algo.scale in {"batch", "batch-rewards"} and config.examples_per_step < 2:
        text = (
            "1 response in a step is its own mean over the batch: its advantage is always 0. Raise it, or set "
            "scale none."
        )
        yield Problem(keys=("rollout.batch_size", "rollout.group_size", "algo.scale"), text=text)


def members(_config: OnlineConfig, algo: CriticFreeSection) -> Iterator[Problem]:
    """A member keeps the setting that defines it."""
    if algo.type in FIXED:
        name, value, reason = FIXED[algo.type]
        got = algo.model_dump()[name]
        if got != value:
            text = f"must be {value} for {algo.type} (got {got}); {reason}. Use algo.type grpo."
            yield Problem(keys=(f"algo.{name}", "algo.type"), text=text)
    if algo.type in WITHOUT_GROUPS and algo.scale == "group":
        text = (
            f"{algo.type} does not compare the responses to one prompt, and group is their standard deviation. "
            "Use batch or none."
        )
        yield Problem(keys=("algo.scale", "algo.type"), text=text)
    if algo.std == "sample" and algo.scale == "none":
        yield Problem(
            keys=("algo.std", "algo.scale"),
            text="not used: scale none does not divide by a standard deviation. Remove it.",
        )


def surrogates(_config: OnlineConfig, algo: CriticFreeSection) -> Iterator[Problem]:
    """Ratio, clipping and aggregation fit together."""
    if algo.loss == "cispo" and algo.ratio != "token":
        text = f"cispo weights each token by its own ratio (got {algo.ratio}). Use token, or loss clip."
        yield Problem(keys=("algo.ratio", "algo.loss"), text=text)
    elif algo.ratio != "token" and algo.type in WITHOUT_GROUPS:
        text = f"{algo.type} gives each token an advantage of its own, and needs a ratio for each token. Use token."
        yield Problem(keys=("algo.ratio", "algo.type"), text=text)
    elif algo.ratio != "token" and algo.aggregation != "seq-mean-token-mean":
        text = (
            f"a response that has one ratio ({algo.ratio}) is one action, which {algo.aggregation} would weight by its "
            "length. Use seq-mean-token-mean."
        )
        yield Problem(keys=("algo.aggregation", "algo.ratio"), text=text)
    if algo.kl_estimator == "k1" and algo.kl_placement == "loss":
        text = "k1 has no gradient in expectation inside the loss; use k2 or k3."
        yield Problem(keys=("algo.kl_estimator", "algo.kl_placement"), text=text)


def lengths(config: OnlineConfig, algo: CriticFreeSection) -> Iterator[Problem]:
    """Length settings that are given have an effect."""
    longest = config.rollout.max_response_tokens
    limit, buffer = algo.overlong_limit or longest, algo.overlong_buffer
    if buffer is not None and buffer >= limit:
        text = f"{buffer} >= {limit} tokens: every response would be penalized. Lower it."
        yield Problem(keys=("algo.overlong_buffer", "algo.overlong_limit", "rollout.max_response_tokens"), text=text)
    elif buffer and limit - buffer >= longest:
        text = f"penalizes responses above {limit - buffer} tokens, and none has more than {longest}. Lower it."
        yield Problem(keys=("algo.overlong_limit", "rollout.max_response_tokens"), text=text)
    elif buffer == 0 and limit != longest:
        text = "not used: algo.overlong_buffer 0 does not penalize length. Remove it, or set that."
        yield Problem(keys=("algo.overlong_limit", "algo.overlong_buffer"), text=text)
    if algo.aggregation != "seq-mean-token-sum-norm" and algo.aggregation_tokens not in (None, longest):
        text = f"not used by {algo.aggregation}. Remove it, or use seq-mean-token-sum-norm."
        yield Problem(keys=("algo.aggregation_tokens", "algo.aggregation"), text=text)
    default = CriticFreeSection.model_fields["max_sampling_rounds"].default
    if not algo.dynamic_sampling and algo.max_sampling_rounds != default:
        text = "not used without algo.dynamic_sampling, which alone samples again. Remove it, or set that."
        yield Problem(keys=("algo.max_sampling_rounds", "algo.dynamic_sampling"), text=text)


def dual_clips(_config: OnlineConfig, algo: PpoSection | CriticFreeSection) -> Iterator[Problem]:
    """A dual clip bounds a clipped loss."""
    if algo.dual_clip > 0.0 and algo.loss != "clip":
        text = f"{algo.loss} has no minimum that a dual clip could bound. Set it to 0."
        yield Problem(keys=("algo.dual_clip", "algo.loss"), text=text)
    elif 0.0 < algo.dual_clip <= 1.0:
        text = (
            f"must be > 1, or 0 for none (got {algo.dual_clip:g}): at 1 or less, tokens with negative advantage "
            "would have no gradient."
        )
        yield Problem(keys=("algo.dual_clip",), text=text)


def truncated_responses(_config: OnlineConfig, algo: PpoSection) -> Iterator[Problem]:
    """What is done with truncated responses fits together."""
    if algo.truncated == "bootstrap" and not algo.token_level:
        text = "the critic's value at the last token needs an action for each token. Set algo.token_level true."
        yield Problem(keys=("algo.truncated", "algo.token_level"), text=text)
    if algo.truncated_penalty > 0.0 and algo.truncated != "learn":
        text = f"not used: algo.truncated {algo.truncated} does not use the score of a truncated response. Set it to 0."
        yield Problem(keys=("algo.truncated_penalty", "algo.truncated"), text=text)


def corrections(config: OnlineConfig, algo: PolicyGradientSection) -> Iterator[Problem]:
    """Importance weights are ratios between the distribution that was sampled and the one that is trained."""
    correction, rollout = algo.correction, config.rollout
    if isinstance(correction, NoCorrection):
        return
    if isinstance(correction, TruncatedWeights) and correction.cap < 1.0:
        text = f"must be >= 1 (got {correction.cap:g}): below 1, even the weights of equal policies would be truncated."
        yield Problem(keys=("algo.correction.cap",), text=text)
    if isinstance(correction, MaskedWeights) and not correction.low <= 1.0 <= correction.high:
        text = f"the band [{correction.low:g}, {correction.high:g}] leaves out the ratio of equal policies, 1."
        yield Problem(keys=("algo.correction.low", "algo.correction.high"), text=text)
    for key, value, whole in (("top_p", rollout.top_p, 1.0), ("top_k", float(rollout.top_k), 0.0)):
        if value != whole:
            text = (
                f"{value:g} samples from a part of the vocabulary, but the engine's log-probs are over "
                f"all of it: importance weights would be wrong. Set it to {whole:g}, or algo.correction.type to none."
            )
            yield Problem(keys=(f"rollout.{key}", "algo.correction.type"), text=text)


def mismatch_limits(config: OnlineConfig, algo: PolicyGradientSection) -> Iterator[Problem]:
    """Limits on the mismatch need something to compare."""
    if not isinstance(algo.correction, RatioToSampler):
        return
    for name in ("mismatch_warn", "mismatch_stop", "mismatch_band"):
        given, default = getattr(config.train, name), type(config.train).model_fields[name].default
        if given not in (default, 0.0):
            text = (
                f"{given:g} has no effect: algo.correction ratio uses the sampler's log-probs as the old log-probs, "
                "and the trainer computes none to compare them with. Remove it, or choose another correction."
            )
            yield Problem(keys=(f"train.{name}", "algo.correction.type"), text=text)


def uncorrected_lag(config: OnlineConfig, algo: PolicyGradientSection) -> Iterator[Problem]:
    """Advice: off-policy responses that are learned from as if they were on-policy."""
    lag = config.rollout.max_lag
    if isinstance(algo.correction, NoCorrection) and lag > 0:
        text = (
            f"{lag} lets responses be {lag} versions old (off-policy), and algo.correction none does not correct "
            "for it."
        )
        yield Problem(keys=("rollout.max_lag", "algo.correction.type"), text=text)


GRPO_RULES = (
    for_algorithm(CriticFreeSection, group_size, members, surrogates, lengths, dual_clips),
    for_algorithm(PpoSection, dual_clips, truncated_responses),
    for_algorithm(PolicyGradientSection, corrections, mismatch_limits),
)
GRPO_ADVICE = (for_algorithm(PolicyGradientSection, uncorrected_lag),)

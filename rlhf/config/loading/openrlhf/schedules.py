"""Shapes of the learning rate, by the names that OpenRLHF takes from transformers."""

from collections.abc import Mapping, Sequence

from rlhf.config.loading.openrlhf.entries import Given, Joint, Outcome

SCHEDULES: Mapping[str, Mapping[str, str]] = {
    "cosine_with_min_lr": {"lr_schedule": "cosine"},
    "cosine": {"lr_schedule": "cosine", "min_lr_ratio": "0"},
    "linear": {"lr_schedule": "linear", "min_lr_ratio": "0"},
    "constant_with_warmup": {"lr_schedule": "constant"},
    "constant": {"lr_schedule": "constant", "warmup_ratio": "0"},
}
"""Their name -> keys of a model that learns, with their values."""


def schedule(roles: Sequence[str]) -> Joint:
    """The entry of a flag that names the schedule of those of `roles` that the command trains."""

    def rule(given: Given) -> Outcome:
        learning = [role for role in roles if f"{role}.lr_schedule" in given.known]
        settings = SCHEDULES.get(given.words[0])
        if not learning:
            return Outcome(nothing="this command trains no such model")
        if settings is None:
            text = f"must be one of {', '.join(SCHEDULES)} (got {given.words[0]})."
            return Outcome(problem=text, spoils=tuple(f"{role}.lr_schedule" for role in learning))
        return Outcome(settings=tuple((f"{role}.{key}", value) for role in learning for key, value in settings.items()))

    return Joint(rule, f"`{roles[0]}.lr_schedule`, of {', '.join(SCHEDULES)}")

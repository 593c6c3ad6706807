"""Renamed settings. For one more version the old name is read too, with a warning that names the new one."""

import warnings
from collections.abc import Collection, Mapping
from typing import TypeVar

T = TypeVar("T")

RENAMED_KEYS: Mapping[str, str] = {
    "rollout.num_samples": "rollout.group_size",
    "algo.drop_equal_groups": "algo.dynamic_sampling",
    "algo.freeze_policy_steps": "algo.critic_warmup_steps",
    "algo.kl_stop": "algo.target_kl",
}
RENAMED_VALUES: Mapping[str, Mapping[object, str]] = {
    "algo.reference": {"behaviour": "behavior"},
    "kind": {"labelled": "labeled"},
}
"""Key -> old value -> new value."""


class RenamedSettingWarning(FutureWarning):
    """A setting was given under its old name, which the next version will not read."""


def warn_renamed(old: str, new: str) -> None:
    """Warn that `old` was given where `new` is meant."""
    warnings.warn(f"{old}: renamed; use {new}. The next version will not read the old name.", RenamedSettingWarning, 3)


def current_key(key: str, known: Collection[str]) -> str:
    """The present name of a dotted key, where `known` has it; the key itself if it was not renamed."""
    new = RENAMED_KEYS.get(key, key)
    return new if new in known and key not in known else key


def current_value(key: str, value: T) -> T | str:
    """The present name of a value of that dotted key; the value itself if it was not renamed."""
    return RENAMED_VALUES.get(key, {}).get(value, value) if isinstance(value, str) else value


def current_fields(values: Mapping[str, object], known: Collection[str]) -> dict[str, object]:
    """The keyword arguments of a section with the fields `known`, under their present names. Warns of each old one."""
    result = dict(values)
    for old, new in ((old.rpartition(".")[2], new.rpartition(".")[2]) for old, new in RENAMED_KEYS.items()):
        if old in result and old not in known and new in known and new not in result:
            warn_renamed(old, new)
            result[new] = result.pop(old)
    for key in RENAMED_VALUES:
        name = key.rpartition(".")[2]
        if name in result and name in known and (new_value := current_value(key, result[name])) is not result[name]:
            warn_renamed(f"{name} {result[name]}", str(new_value))
            result[name] = new_value
    return result


def with_current_names(settings: Mapping[str, T]) -> dict[str, T | str]:
    """Settings that an earlier version saved, by dotted key, under the present names. Warns of nothing."""
    renamed = {RENAMED_KEYS.get(key, key): value for key, value in settings.items()}
    return {key: current_value(key, value) for key, value in renamed.items()}

"""Kinds of rollout engines: named, described and opened in one place each."""

import typing

import pytest

from rlhf.config.rollout import ENGINES, EngineName, RolloutSection
from rlhf.engines.rollout.open_engine import OPENERS, engine_kind, require_engine
from rlhf.errors import ConfigError


def test_every_engine_has_traits_and_is_opened() -> None:
    assert {"auto", *ENGINES} == set(typing.get_args(EngineName))
    assert ENGINES.keys() == OPENERS.keys()


@pytest.mark.parametrize("kind", ENGINES)
def test_what_an_engine_cannot_do_is_refused_with_one_that_can(kind: typing.Literal["vllm", "transformers"]) -> None:
    section, traits = RolloutSection(engine=kind), ENGINES[kind]
    assert engine_kind(section) == kind
    for asked, can in (
        ({"mixture": True}, traits.mixes),
        ({"adapters": True}, traits.max_adapter_rank > 0),
        ({"on_gpu": True}, traits.on_gpu),
    ):
        if can:
            require_engine(section, **asked)
            continue
        with pytest.raises(ConfigError, match=rf"^rollout\..*{kind}.*({'|'.join(ENGINES.keys() - {kind})})"):
            require_engine(section, **asked)

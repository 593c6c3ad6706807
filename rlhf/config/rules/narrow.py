"""Rules that hold for some methods or some algorithms only."""

from collections.abc import Callable, Iterator
from typing import TypeVar

from rlhf.config.algo import AlgorithmSection
from rlhf.config.commands import OnlineConfig, TrainConfig
from rlhf.config.problems import Problem

C = TypeVar("C", bound=TrainConfig)
A = TypeVar("A", bound=AlgorithmSection)
Rule = Callable[[TrainConfig], Iterator[Problem]]


def for_config(kind: type[C], *rules: Callable[[C], Iterator[Problem]]) -> Rule:
    """Rules of the methods whose config is a `kind`."""

    def narrowed(config: TrainConfig) -> Iterator[Problem]:
        if isinstance(config, kind):
            for rule in rules:
                yield from rule(config)

    return narrowed


def for_algorithm(kind: type[A], *rules: Callable[[OnlineConfig, A], Iterator[Problem]]) -> Rule:
    """Rules of online methods whose algorithm's section is a `kind`."""

    def narrowed(config: TrainConfig) -> Iterator[Problem]:
        if isinstance(config, OnlineConfig) and isinstance(config.algo, kind):
            for rule in rules:
                yield from rule(config, config.algo)

    return narrowed

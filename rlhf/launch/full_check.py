"""Every problem of a run at once: of its settings, of what this machine lacks for them, and, where one of these was
found, everything else that the run would find before it starts Ray."""

from collections.abc import Callable, Collection, Mapping, Sequence

from rlhf.algorithms.needs import needs_of
from rlhf.config.commands import OnlineConfig, TrainConfig
from rlhf.config.loading.load import read_config
from rlhf.config.problems import Problem
from rlhf.config.reward import RewardSection
from rlhf.config.rules.all_rules import advice_on, problems_of
from rlhf.errors import DataError
from rlhf.importing import importing
from rlhf.launch.check import (
    RowProblems,
    data_files,
    data_problems,
    described,
    is_quick,
    surroundings,
    try_user_code,
)
from rlhf.launch.findings import Findings
from rlhf.launch.model_checks import TOO_LONG, within_context
from rlhf.launch.preflight import MAX_ROWS, can_load, loading_quietly
from rlhf.launch.run_folder import require_folder

ROW_SETTINGS = ("data", "rollout.max_prompt_tokens", "rollout.tools", "rollout.environment")
"""What decides how rows become tokens, beside the tokenizer."""


def checked_config(command: str, argv: Sequence[str], environ: Mapping[str, str]) -> tuple[TrainConfig, list[str]]:
    """The resolved config of a run, checked as far as possible without starting anything, and warnings, one line each.

    Raises:
        ConfigError: with every problem. Its subclass DataError or ModelError if all problems are of that class.
        CheckpointError: there is no other problem, and the run's folder cannot be written or its disk is full.
    """
    read = read_config(command, argv, environ)
    found = Findings()
    found.add(read.problems)
    if read.config is None:
        found.settle()
    assert read.config is not None, "without one there are problems"
    config = read.config.resolved()
    wrong = {problem.keys[0] for problem in problems_of(read.config)}
    _require_possible(config, environ, found, read.report, Doubts(read.is_spoiled, wrong))
    return config, read.report(advice_on(config))


def check_config(config: TrainConfig, environ: Mapping[str, str]) -> list[str]:
    """Check a resolved config. Returns warnings, one line each.

    Raises:
        ConfigError: with every problem. Its subclass DataError or ModelError if all problems are of that class.
        CheckpointError: there is no other problem, and the run's folder cannot be written or its disk is full.
    """

    def report(problems: Sequence[Problem]) -> list[str]:
        return [f"{problem.keys[0]}: {problem.text}" for problem in problems]

    found, problems = Findings(), list(problems_of(config))
    found.add(report(problems))
    wrong = {problem.keys[0] for problem in problems}
    _require_possible(config, environ, found, report, Doubts(lambda key: False, wrong))
    return report(advice_on(config))


class Doubts:
    """The settings at which something is wrong, so that what follows from their values says nothing."""

    def __init__(self, is_spoiled: Callable[[str], bool], wrong: Collection[str]) -> None:
        """`is_spoiled`: whether a key's value was invalid, and a default is in its place. `wrong`: keys of problems."""
        self.is_spoiled = is_spoiled
        self.wrong = set(wrong)

    def __call__(self, key: str) -> bool:
        """Whether something is wrong at, below or above a key."""
        return self.is_spoiled(key) or any(
            f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}.") for other in self.wrong
        )


def _require_possible(
    config: TrainConfig,
    environ: Mapping[str, str],
    found: Findings,
    report: Callable[[Sequence[Problem]], list[str]],
    doubts: Doubts,
) -> None:
    """Raise what was found, what this machine lacks for the config, and what is wrong with the rows; if there is
    anything, then with everything else that the run would find before it starts Ray. `report` makes lines."""
    for problem in surroundings(config, environ):
        if lines := report([problem]):
            found.add(lines, problem.error)
            doubts.wrong.add(problem.keys[0])
    rows = RowProblems() if doubts.is_spoiled("data") else data_problems(config, doubts.is_spoiled)
    if not found and not rows.lines:
        require_folder(config, environ)
        return
    is_read = _look_further(config, environ, found, doubts)
    found.add([] if is_read else rows.wrong, DataError)
    found.add(rows.lacking, DataError)
    found.settle()


def _look_further(config: TrainConfig, environ: Mapping[str, str], found: Findings, doubts: Doubts) -> bool:
    """Look at all that does not follow from what is wrong already. Returns whether rows were tokenized, with lengths
    that fit into the models' contexts."""
    if isinstance(config, OnlineConfig) and doubts("reward"):
        config = config.model_copy(update={"reward": RewardSection()})
    if doubts("algo") or not can_load():
        try_user_code(config, found, doubts)
        return False
    with importing():
        from rlhf.launch.prepare import Scope, gather  # noqa: PLC0415  comes with the training libraries

    known = described(config, environ)
    if doubts(config.rows_per_step[0]):
        config = _with_small_steps(config)
    fitting = within_context(config, known.values())
    if fitting is not config:
        doubts.wrong -= set(TOO_LONG)
    needs = needs_of(config.algo)
    reader = needs.exported_role.value
    named = [name for name, section in config.models.items() if section.model is not None]
    scope = Scope(
        models=not any(name not in known or doubts(f"{name}.model") for name in named),
        rows=reader in known
        and not any(map(doubts, (f"{reader}.model", *ROW_SETTINGS)))
        and is_quick(config, data_files(config)[0]),
        max_rows=MAX_ROWS,
        is_spoiled=doubts,
    )
    with loading_quietly():
        return gather(fitting, needs, found, scope).tokenizer is not None


def _with_small_steps(config: TrainConfig) -> TrainConfig:
    """A config whose steps read one row: where their size is in doubt, so is whether the rows suffice."""
    name, _, key = config.rows_per_step[0].partition(".")
    return config.model_copy(update={name: getattr(config, name).model_copy(update={key: 1})})

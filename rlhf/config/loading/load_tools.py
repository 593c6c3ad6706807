"""Settings of the commands around training, from their arguments and an optional file."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from rlhf.config.base import Section
from rlhf.config.commands import COMMANDS, METHODS, RowKind
from rlhf.config.loading.flags import Flags
from rlhf.config.loading.layers import InFlag, Layer, Setting, file_layer
from rlhf.config.loading.merge import Merged, Schema
from rlhf.config.loading.stray_words import refused
from rlhf.config.problems import Problem
from rlhf.config.rules.online import episode_problems
from rlhf.config.rules.placement import adapters_sent, colocation, engine_nodes, weight_sync
from rlhf.config.tools import (
    BenchConfig,
    CompareConfig,
    CurateConfig,
    DataConfig,
    DoctorConfig,
    ExampleConfig,
    ReportConfig,
    RewardTryConfig,
    RoundsConfig,
    SampleConfig,
    SamplingConfig,
)
from rlhf.errors import ConfigError

S = TypeVar("S", bound=Section)


def load_sample(argv: Sequence[str], environ: Mapping[str, str]) -> SampleConfig:
    """The options of `rlhf sample MODEL [CONFIG.yaml]`. Raises ConfigError with every problem."""
    return _load(SampleConfig, argv, environ, ("model",), _sample_problems)


def load_curate(argv: Sequence[str], environ: Mapping[str, str]) -> CurateConfig:
    """The options of `rlhf curate METHOD SAMPLES`. Raises ConfigError with every problem."""
    return _load(CurateConfig, argv, environ, ("method", "samples"), _curate_problems)


def load_rounds(argv: Sequence[str], environ: Mapping[str, str]) -> RoundsConfig:
    """The options of `rlhf rounds METHOD [CONFIG.yaml]`. Raises ConfigError with every problem."""
    return _load(RoundsConfig, argv, environ, ("method",), _rounds_problems)


def load_data_report(argv: Sequence[str], environ: Mapping[str, str]) -> DataConfig:
    """The options of `rlhf data KIND`. Raises ConfigError with every problem."""
    if argv and argv[0] in COMMANDS:
        kind = METHODS[COMMANDS[argv[0]].method].rows
        raise ConfigError(f"data: {argv[0]} is a method, whose rows are {kind}. Write `rlhf data {kind} ...`.")
    return _load(DataConfig, argv, environ, ("kind",), _data_problems)


def load_bench(argv: Sequence[str], environ: Mapping[str, str]) -> BenchConfig:
    """The options of `rlhf bench sync [CONFIG.yaml]`. Raises ConfigError with every problem."""
    return _load(BenchConfig, argv, environ, ("what",), _bench_problems)


def load_doctor(argv: Sequence[str], environ: Mapping[str, str]) -> DoctorConfig:
    """The options of `rlhf doctor [RUN]`. Raises ConfigError with every problem."""
    return _load(DoctorConfig, argv, environ, ("run",), lambda _: iter(()))


def load_compare(argv: Sequence[str], environ: Mapping[str, str]) -> CompareConfig:
    """The options of `rlhf compare RUN RUN ...`. Raises ConfigError with every problem."""
    return _load(CompareConfig, argv, environ, ("runs",), _compare_problems)


def load_report(argv: Sequence[str], environ: Mapping[str, str]) -> ReportConfig:
    """The options of `rlhf report RUN [RUN ...]`. Raises ConfigError with every problem."""
    return _load(ReportConfig, argv, environ, ("runs",), _report_problems)


def load_example(argv: Sequence[str], environ: Mapping[str, str]) -> ExampleConfig:
    """The options of `rlhf example NAME`. Raises ConfigError with every problem."""
    return _load(ExampleConfig, argv, environ, ("name",), lambda config: _missing("name", config.name, "stories."))


def load_reward_try(argv: Sequence[str], environ: Mapping[str, str]) -> RewardTryConfig:
    """The options of `rlhf reward try FUNCTION`. Raises ConfigError with every problem."""
    return _load(RewardTryConfig, argv, environ, ("what", "function"), _reward_try_problems)


def _load(
    section: type[S],
    argv: Sequence[str],
    environ: Mapping[str, str],
    names: Sequence[str],
    rule: Callable[[S], Iterator[Problem]],
) -> S:
    """Arguments that are not flags set `names` in order, and a list takes all that are left; the first one that ends in
    .yaml is a config file."""
    schema = Schema(section)
    flags = Flags(argv, schema.fields, takes_file=True)
    files = [word for word in flags.positionals if word.endswith((".yaml", ".yml"))]
    words = [word for word in flags.positionals if word not in files]
    layers = [file_layer(Path(name), environ, schema.fields) for name in files[:1]]
    given = Layer()
    for name in names[: len(words)]:
        is_list = schema.fields[name].is_list
        taken = [words.pop(0) for _ in range(len(words) if is_list else 1)]
        given.settings.append(Setting((name,), [*taken] if is_list else taken[0], InFlag()))
    # What follows a command's own arguments was most likely meant as its rows.
    has_rows = any(setting.key == "data.path" for layer in (*layers, flags.layer) for setting in layer.settings)
    rows = None if has_rows or "data.path" not in schema.fields else "data.path"
    strays = refused((*words, *files[1:]), flags, schema.fields, rows)
    merged = Merged(schema, [*layers, given, strays, flags.layer])
    problems = [*merged.problems]
    if merged.config is not None:
        problems += merged.report(list(rule(merged.config)))
    if problems or merged.config is None:
        raise ConfigError(problems)
    return merged.config


def _missing(key: str, value: object, need: str) -> Iterator[Problem]:
    if value is None:
        yield Problem(keys=(key,), text=f"missing; {need}")


def _sampling_problems(config: SamplingConfig) -> Iterator[Problem]:
    yield from _missing("data.path", config.data.path, "name a file, a folder or a hub data set.")
    if config.temperature == 0.0 and config.num_samples > 1:
        text = f"0 makes all {config.num_samples} responses to a prompt equal; need > 0, or num_samples 1."
        yield Problem(keys=("temperature", "num_samples"), text=text)


def _sample_problems(config: SampleConfig) -> Iterator[Problem]:
    yield from _missing("model", config.model, "name a model, a folder or a hub name.")
    yield from _missing("out", config.out, "name the file of samples, as --out samples.jsonl.")
    yield from _sampling_problems(config)
    yield from episode_problems(config.rollout, config.reward, config.data)


def _curate_problems(config: CurateConfig) -> Iterator[Problem]:
    yield from _missing("method", config.method, "one of best-of-n, rejection, raft, rft, conditional, pairs.")
    yield from _missing("samples", config.samples, "name the file that `rlhf sample` wrote.")
    yield from _missing("out", config.out, "name the file of rows, as --out data.jsonl.")
    if config.threshold is not None and config.quantile is not None:
        yield Problem(keys=("quantile", "threshold"), text="threshold is given too. Use one of them.")
    if config.method in ("rejection", "rft") and config.threshold is None and config.quantile is None:
        text = "missing; give the least reward of a good response (or --quantile)."
        yield Problem(keys=("threshold", "quantile", "method"), text=text)
    unread = {
        "conditional": ("threshold", "quantile", "max_per_prompt", "min_margin"),
        "pairs": ("threshold", "quantile", "max_per_prompt"),
    }.get(str(config.method), ("min_margin",))
    yield from _unread(config, unread, f"curate {config.method}")
    if config.method != "conditional":
        yield from _unread(config, ("prompt_format",), f"curate {config.method}")


def _rounds_problems(config: RoundsConfig) -> Iterator[Problem]:
    yield from _missing("method", config.method, "sft or dpo.")
    yield from _missing("model", config.model, "name the first policy, a folder or a hub name.")
    yield from _sampling_problems(config)
    if not config.reward.all_sources:
        yield Problem(keys=("reward",), text="none given; set one of model, function, url, rules, sources.")
    if config.thresholds and config.quantiles:
        yield Problem(keys=("quantiles", "thresholds"), text="thresholds are given too. Use one of them.")
    for key, given in (("thresholds", config.thresholds), ("quantiles", config.quantiles)):
        if len(given) > config.num_rounds:
            text = f"{len(given)} for {config.num_rounds} rounds."
            yield Problem(keys=(key, "num_rounds"), text=text)
        if list(given) != sorted(given):
            yield Problem(keys=(key,), text=f"must not decrease from round to round (got {list(given)}).")
    if not all(0.0 <= quantile <= 1.0 for quantile in config.quantiles):
        yield Problem(keys=("quantiles",), text=f"must be in [0, 1] (got {list(config.quantiles)}).")
    if config.method == "dpo" and config.num_samples < 2:
        yield Problem(keys=("num_samples",), text=f"a pair needs 2 responses (got {config.num_samples}).")
    unread = ("min_margin", "reference") if config.method == "sft" else ("thresholds", "quantiles", "max_per_prompt")
    yield from _unread(config, unread, f"rounds {config.method}")


def _data_problems(config: DataConfig) -> Iterator[Problem]:
    yield from _missing("kind", config.kind, f"one of {', '.join(RowKind)}.")
    yield from _missing("data.path", config.data.path, "name a file, a folder or a hub data set.")


def _compare_problems(config: CompareConfig) -> Iterator[Problem]:
    if len(config.runs) < 2:
        yield Problem(keys=("runs",), text=f"need the folders of two runs or more (got {len(config.runs)}).")


def _report_problems(config: ReportConfig) -> Iterator[Problem]:
    if not config.runs:
        yield Problem(keys=("runs",), text="missing; name the folder of a run, or of several.")


def _reward_try_problems(config: RewardTryConfig) -> Iterator[Problem]:
    yield from _missing("what", config.what, "try.")
    yield from _missing("function", config.function, "name it, as module:name or file.py:name.")
    yield from _missing("data.path", config.data.path, "name a file, a folder or a hub data set.")


def _bench_problems(config: BenchConfig) -> Iterator[Problem]:
    yield from _missing("what", config.what, "sync.")
    for rule in (colocation, engine_nodes, weight_sync, adapters_sent):
        yield from rule(config)


def _unread(config: Section, keys: Sequence[str], command: str) -> Iterator[Problem]:
    """Settings that were given and that the command does not read."""
    changed = config.model_dump(include=set(keys), exclude_defaults=True)
    for key in changed:
        yield Problem(keys=(key,), text=f"not read by {command}. Remove it.")

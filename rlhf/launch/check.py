"""Finds what is wrong with a run before anything is started. Imports no torch and no ray."""

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from rlhf.algorithms.needs import needs_of
from rlhf.config.algo import CustomSection
from rlhf.config.commands import OnlineConfig, TrainConfig, method_of
from rlhf.config.data import DataSection
from rlhf.config.environment_name import needed_package
from rlhf.config.json_file import ModelFileError
from rlhf.config.loading.user_function import find_module, problem_of
from rlhf.config.model_files import (
    ModelFacts,
    describe_model,
    described_folder,
    local_folder,
    quantized,
    read_model,
    trusted_commit,
    untrusted,
)
from rlhf.config.models import ModelSection, TrainedModelSection
from rlhf.config.problems import Problem
from rlhf.config.reward import CodeSource, EndpointSource, FunctionSource, HttpSource, JudgeSource, RewardSection
from rlhf.config.rollout import RolloutSection
from rlhf.config.rules.trackers import tracker_problems
from rlhf.config.tokenizer_files import require_tokenizer
from rlhf.errors import ConfigError, DataError, ModelError
from rlhf.launch.findings import Findings
from rlhf.launch.model_checks import misfits, too_long
from rlhf.launch.run_folder import folder_problems
from rlhf.launch.unfit_rows import unfit_rows
from rlhf.orchestrator.data.layout import find_files, held_out_split, training_split
from rlhf.orchestrator.data.load import check_rows, look_at_rows
from rlhf.orchestrator.data.problems import Problems
from rlhf.orchestrator.data.sources import Place, place_of
from rlhf.orchestrator.data.split import too_few_rows
from rlhf.planning.roles import require_sections

MAX_QUICK_BYTES = 16 * 1024 * 1024
"""A check reads the rows of files up to this size. The run reads larger files, before it starts anything."""
COMPRESSED = {".gz", ".parquet"}
MAX_COMPRESSION = 8
"""A compressed file counts as so many times its size."""


def try_rewards(config: TrainConfig) -> list[str]:
    """Call the reward functions of a checked config in their child processes: on the first rows where `data_problems`
    reads them. Returns a line for each function.

    Raises:
        ConfigError: a function cannot be used, or it is not clear what its parameters should get.
        RewardError: a function fails.
    """
    if not isinstance(config, OnlineConfig) or not any(isinstance(s, FunctionSource) for s in config.reward_sources):
        return []
    from rlhf.launch.reward_trial import prompts_of, try_functions  # noqa: PLC0415  slow to import

    files, _ = data_files(config)
    records = look_at_rows(config.data, method_of(config).rows).records if files and is_quick(config, files) else ()
    return try_functions(config.reward, prompts_of(records))


def try_world(config: TrainConfig) -> list[str]:
    """Load the tools and the environment of a checked config in a process of their own. Returns a line about them.
    Raises ConfigError with everything that is wrong with them."""
    if not isinstance(config, OnlineConfig) or not config.rollout.has_episodes:
        return []
    from rlhf.launch.agents import describe_world, load_world  # noqa: PLC0415  slow to import

    world = load_world(config.rollout)
    assert world is not None, "it has episodes"
    return [describe_world(config.rollout, world)]


def try_user_code(
    config: TrainConfig, found: Findings, is_spoiled: Callable[[str], bool] = lambda key: False
) -> list[str]:
    """Both of these. Returns their lines; what fails goes to `found`."""
    lines = None if is_spoiled("reward") else found.attempt(partial(try_rewards, config))
    more = None if is_spoiled("rollout") else found.attempt(partial(try_world, config))
    return [*(lines or ()), *(more or ())]


def require_context(config: TrainConfig, environ: Mapping[str, str]) -> None:
    """Raise ConfigError where sequences are longer than the context of a model on this machine, of which a plan needs
    config.json alone."""
    if problems := [f"{problem.keys[0]}: {problem.text}" for problem in too_long(config, described(config, environ))]:
        raise ConfigError(problems)


def described(config: TrainConfig, environ: Mapping[str, str]) -> dict[str, ModelFacts]:
    """What the small files of the models on this machine say, by role, where they can be read."""
    facts: dict[str, ModelFacts] = {}
    for role, section in config.models.items():
        with suppress(ModelFileError):  # who needs the model says what is wrong with it
            folder = None if section.model is None else described_folder(section.model, environ)
            if folder is not None:
                facts[role] = describe_model(folder)
    return facts


def surroundings(config: TrainConfig, environ: Mapping[str, str]) -> Iterator[Problem]:
    """What a config needs that this machine lacks: files, models, functions, variables, packages."""
    yield from _models(config, environ)
    yield from _packages(config.models)
    yield from tracker_problems(config.log, environ)
    yield from _own_algorithm(config)
    yield from folder_problems(config)
    if isinstance(config, OnlineConfig):
        yield from _rewards(config.reward, environ)
        yield from _world(config.rollout)


def data_files(config: TrainConfig) -> tuple[list[Path], list[str]]:
    """The data files of a run, and a line for each path without any."""
    files: list[Path] = []
    problems: list[str] = []
    paths = (
        (config.data.path, training_split(config.data)),
        (config.data.eval_path, held_out_split(config.data)),
        (config.algo.pretraining_path, training_split(DataSection())),
    )
    for path, wanted in paths:
        try:
            if path is not None and place_of(path) is Place.FILES:
                files += [source.path for source in find_files(path, wanted, Problems(0))]
        except DataError as error:
            problems += error.problems
    return files, problems


def is_quick(config: TrainConfig, files: Sequence[Path]) -> bool:
    """Whether a check reads the rows: only those of small files on this machine."""
    paths = [path for path in (config.data.path, config.data.eval_path) if path is not None]
    return (
        all(place_of(path) is Place.FILES for path in paths)
        and (find_spec("pyarrow") is not None or not any(".parquet" in file.suffixes for file in files))
        and sum(file.stat().st_size * _growth(file) for file in files) <= MAX_QUICK_BYTES
    )


def _growth(file: Path) -> int:
    return MAX_COMPRESSION if file.suffix.lower() in COMPRESSED else 1


def why_not_read(config: TrainConfig) -> str:
    """Why a check does not read the rows of a config, where it is not `is_quick`."""
    for path in (config.data.path, config.data.eval_path):
        match None if path is None else place_of(path):
            case Place.HUB:
                return f"rows: no file or folder {path} here, so the run downloads that data set from the hub"
            case Place.SAVED:
                return f"rows: {path} is a folder of the library datasets; the run reads it before it starts anything"
    mib = MAX_QUICK_BYTES // 2**20
    sizes = f"up to {mib} MiB ({mib // MAX_COMPRESSION} MiB of .parquet and .gz)"
    return f"rows: only files {sizes} are read; the run reads all before it starts anything"


@dataclass(frozen=True, slots=True, kw_only=True)
class RowProblems:
    """What is wrong with data files and their rows, as far as it is known without a tokenizer, a line for each."""

    wrong: Sequence[str] = ()
    """Files that are missing, and rows that are wrong: a tokenizer would find more of these."""
    lacking: Sequence[str] = ()
    """What the good rows are too few for, or lack for the reward sources."""

    @property
    def lines(self) -> list[str]:
        return [*self.wrong, *self.lacking]


def data_problems(config: TrainConfig, is_spoiled: Callable[[str], bool] = lambda key: False) -> RowProblems:
    """Data files that are missing, and wrong rows of small files. `is_spoiled` says of a key whether its value was
    invalid, so that nothing can be told from the default in its place."""
    files, problems = data_files(config)
    if problems or not files or not is_quick(config, files):
        return RowProblems(wrong=problems)
    rows = look_at_rows(config.data, method_of(config).rows)
    lacking: list[str] = []
    key, size = config.rows_per_step
    if not rows.problems and len(rows.records) < size and config.data.eval_path is None and not is_spoiled(key):
        lacking.append(too_few_rows(len(rows.records), key, size))
    if not is_spoiled("reward"):
        good = ((record.id, record.label, record.metadata) for record in rows.records)
        lacking += unfit_rows(config.data, config.reward_sources, good)
    return RowProblems(wrong=rows.problems, lacking=lacking)


def data_notes(config: TrainConfig) -> list[str]:
    """What is not read of the rows of a checked config, one line each, where `data_problems` reads them."""
    files, _ = data_files(config)
    if not is_quick(config, files):
        return []
    rows = check_rows(config.data, method_of(config).rows)
    by_name = any(isinstance(source, FunctionSource | HttpSource) for source in config.reward_sources)
    by_name |= isinstance(config, OnlineConfig) and config.rollout.gives_reward
    keys = {source.tests_key or "" for source in config.reward_sources if isinstance(source, CodeSource)}
    keys |= {source.rubric_key for source in config.reward_sources if isinstance(source, JudgeSource)}
    lines = (line for unread in rows.unread for line in unread.lines(None if by_name else keys))
    return list(dict.fromkeys([*rows.notes, *lines]))


def _models(config: TrainConfig, environ: Mapping[str, str]) -> Iterator[Problem]:
    """Every model's folder, each once; then whether the models work together."""
    facts: dict[str, ModelFacts | None] = {}
    for role, section in config.models.items():
        if section.model is None or section.model in facts:
            continue
        facts[section.model] = None
        try:
            folder = local_folder(section.model, environ)
            if folder is not None:
                facts[section.model] = read_model(folder)
                if role == "policy":
                    require_tokenizer(folder)
        except ModelFileError as error:
            yield Problem(keys=(f"{role}.model",), text=str(error), error=ModelError)
        fact = facts[section.model]
        if fact and fact.has_own_code and trusted_commit(section.trust_remote_code, section.model) is None:
            yield Problem(keys=(f"{role}.model",), text=untrusted(section.model), error=ModelError)
        if fact and fact.quantization is not None:
            yield Problem(keys=(f"{role}.model",), text=quantized(section.model, fact.quantization), error=ModelError)
        if fact and isinstance(section, TrainedModelSection) and (text := _unknown_targets(section, fact)):
            yield Problem(keys=(f"{role}.lora.targets",), text=text, error=ModelError)
    yield from misfits(config, facts)


def _unknown_targets(section: TrainedModelSection, fact: ModelFacts) -> str | None:
    """Why adapters cannot be added to the layers that are named; None if they can, or if nothing is known about the
    model's layers."""
    known = fact.linear_layers
    unknown = sorted(set(section.lora.targets) - set(known or ()))
    if known is None or not section.lora.rank or not unknown:
        return None
    return f"no linear layers called {', '.join(unknown)}; have {', '.join(sorted(known))}."


def _own_algorithm(config: TrainConfig) -> Iterator[Problem]:
    """The module of the user's own algorithm can be found, and the config has a section for each model it needs."""
    if not isinstance(config.algo, CustomSection):
        return
    module = config.algo.algorithm.partition(":")[0]
    if find_module(module, [str(Path.cwd()), *sys.path]) is None:
        text = f"no module {module} in {Path.cwd()} or on the Python path."
        yield Problem(keys=("algo.algorithm",), text=text)
        return
    try:
        require_sections(config, needs_of(config.algo))
    except ConfigError as error:
        for text in error.problems:
            key, _, rest = text.partition(": ")
            yield Problem(keys=(key,), text=rest)


def _packages(models: Mapping[str, ModelSection]) -> Iterator[Problem]:
    """Packages that only some models need are installed."""
    for role, model in models.items():
        if model.quantization != "none" and find_spec("bitsandbytes") is None:
            text = "bitsandbytes is not installed. Run `pip install bitsandbytes`."
            yield Problem(keys=(f"{role}.quantization",), text=text)


def _rewards(section: RewardSection, environ: Mapping[str, str]) -> Iterator[Problem]:
    """The user's function can be found and called; a sandbox's command, a service's token and certificate exist."""
    listed = bool(section.sources)
    for n, source in enumerate(section.all_sources):
        where = f"reward.sources.{n}" if listed else "reward"
        if isinstance(source, FunctionSource | CodeSource) and source.function is not None:
            text = problem_of(source.function, [str(Path.cwd()), *sys.path])
            if text is not None:
                yield Problem(keys=(f"{where}.function",), text=text)
        if isinstance(source, CodeSource) and source.command and shutil.which(source.command[0]) is None:
            yield Problem(keys=(f"{where}.command",), text=f'no program "{source.command[0]}" on this machine.')
        if isinstance(source, EndpointSource):
            if text := _address_problem(source):
                yield Problem(keys=(f"{where}.url",), text=text)
            if source.auth_env is not None and source.auth_env not in environ:
                text = "names an environment variable that is not set; it takes the variable's name, not the token."
                yield Problem(keys=(f"{where}.auth_env",), text=text)
            if source.ca_file is not None and not Path(source.ca_file).expanduser().is_file():
                yield Problem(keys=(f"{where}.ca_file",), text=f"no such file: {source.ca_file}.")


def _world(section: RolloutSection) -> Iterator[Problem]:
    """Tools, environment and agent can be found. What they are is known once a process of their own has loaded them."""
    named = [(f"rollout.tools.{n}", name) for n, name in enumerate(section.tools)]
    named += [("rollout.environment", name) for name in section.environment]
    named += [] if section.agent is None else [("rollout.agent", section.agent)]
    for key, name in named:
        library, _, adapted = name.partition("://")
        text = _missing_package(library) if adapted else problem_of(name, [str(Path.cwd()), *sys.path])
        if text is not None:
            yield Problem(keys=(key,), text=text)


def _missing_package(library: str) -> str | None:
    """Why an environment or agent of a library cannot be loaded; None where its package is there."""
    package = needed_package(library)
    if package is None or find_spec(package) is not None:
        return None
    return f"{package} is not installed. Run `pip install 'rlhf[{library}]'`."


def _address_problem(source: EndpointSource) -> str | None:
    """Why a service's address is refused. A name that this machine cannot resolve is accepted."""
    if urlsplit(source.url).scheme != "http":
        return None  # without a name lookup
    from rlhf.engines.rewards.address import check_address  # noqa: PLC0415  slow to import

    try:
        check_address(source.url, allow_plain_http=source.allow_plain_http)
    except ConfigError as error:
        if not isinstance(error.__cause__, OSError):  # the node that calls the service may resolve the name
            return error.problems[0].removeprefix("reward.url: ")
    return None

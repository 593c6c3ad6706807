"""The data of a run: read, checked and tokenized before anything starts."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from rlhf.config.commands import OnlineConfig, RowKind, TrainConfig, method_of
from rlhf.config.data import DataSection
from rlhf.config.reward import Source
from rlhf.config.rollout import EpisodeSection
from rlhf.engines.base import Tokenizer
from rlhf.environments.spec import Described
from rlhf.errors import DataError
from rlhf.launch.agents import (
    describe_episodes,
    episode_prompts,
    first_of_each,
    load_world,
    missing_columns,
    require_reset,
    require_template,
)
from rlhf.launch.check import try_rewards
from rlhf.launch.findings import Findings
from rlhf.launch.reward_trial import try_functions
from rlhf.launch.schedule import unlearned
from rlhf.launch.unfit_rows import unfit_rows
from rlhf.orchestrator.data import DataSplit, load_groups, load_prompts
from rlhf.types import Prompt, ScoredGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class RunData:
    """The data of a run: prompts for online methods, groups of responses for offline ones."""

    prompts: DataSplit[Prompt] | None = None
    groups: DataSplit[ScoredGroup] | None = None
    texts: DataSplit[ScoredGroup] | None = None
    """Pretraining text for the ptx loss."""
    tried: Sequence[str] = ()
    """A line for each reward function: one row with its scores; and one for tools and environment."""
    world: Described | None = None
    """Tools and environment of the run."""

    @property
    def fingerprint(self) -> str:
        return "-".join(split.fingerprint for split in (self.prompts, self.groups, self.texts) if split is not None)

    @property
    def template(self) -> str:
        """How the rows became prompts: `chat` through the chat template, `plain` as text, `auto` some of each."""
        splits = [split for split in (self.prompts, self.groups) if split is not None]
        prompts = (item.prompt if isinstance(item, ScoredGroup) else item for split in splits for item in split.train)
        kinds = {"chat" if "messages" in prompt.metadata else "plain" for prompt in prompts}
        return kinds.pop() if len(kinds) == 1 else "auto"

    @property
    def num_looked_at(self) -> int:
        """Rows that were tokenized, also those that are held out or left out."""
        splits = [split for split in (self.prompts, self.groups) if split is not None]
        return sum(len(split.train) + len(split.held_out) + sum(split.dropped.values()) for split in splits)

    @property
    def num_rows(self) -> int:
        """Rows in an epoch."""
        return len(self.prompts.train) if self.prompts is not None else len(self.groups.train if self.groups else ())


def load_data(config: TrainConfig, tokenizer: Tokenizer, max_rows: int | None = None) -> RunData:
    """Read, check and tokenize every row; with `max_rows`, tokenize only so many of each file set, evenly spaced.

    Raises:
        DataError: rows are wrong, lack a column that a reward source needs, or are fewer than one step uses.
        ConfigError: a reward function cannot be called with these rows, or tools or environment cannot be loaded.
        ModelError: the chat template does not take tools or several turns.
        RewardError: a reward function fails on them.
    """
    if isinstance(config, OnlineConfig):
        return _online_data(config, tokenizer, max_rows)
    groups = load_groups(config.data, tokenizer, method_of(config).rows, max_rows)
    data = RunData(groups=groups)
    if max_rows is None or data.num_looked_at < max_rows:
        groups.require(config.train.batch_size, "train.batch_size")
    return data


def _online_data(config: OnlineConfig, tokenizer: Tokenizer, max_rows: int | None) -> RunData:
    found = Findings()
    world = found.attempt(partial(load_world, config.rollout))
    if found:  # how rows become prompts is not known
        found.attempt(partial(try_rewards, config))
        found.settle()
    limit = config.rollout.max_prompt_tokens
    read = partial(load_world_prompts, config.data, config.rollout, tokenizer, limit, world, max_rows)
    prompts = found.attempt(partial(read, sources=config.reward.all_sources))
    tried = found.attempt(partial(_tried, config, prompts))
    texts = found.attempt(partial(_texts, config, tokenizer, max_rows))
    told = None if world is None else found.attempt(partial(describe_episodes, config, world, tokenizer))
    tried = [*(tried or ()), *(told or ())]
    data = RunData(prompts=prompts, texts=texts, tried=tried, world=world)
    if prompts is not None and (max_rows is None or data.num_looked_at < max_rows):
        found.attempt(partial(prompts.require, config.rollout.batch_size, "rollout.batch_size"))
        if wrong := unlearned(config, len(prompts.train)):
            found.add([wrong])
    found.settle()
    return data


def _tried(config: OnlineConfig, prompts: DataSplit[Prompt] | None) -> list[str]:
    """Try the reward functions with the first prompts; with the first rows where prompts could not be read."""
    return try_rewards(config) if prompts is None else try_functions(config.reward, prompts.train)


def _texts(config: OnlineConfig, tokenizer: Tokenizer, max_rows: int | None) -> DataSplit[ScoredGroup] | None:
    """Pretraining text for the ptx loss; None where a run has none."""
    if config.algo.pretraining_path is None:
        return None
    section = DataSection(
        path=config.algo.pretraining_path,
        max_tokens=config.data.max_tokens,
        max_row_bytes=config.data.max_row_bytes,
        overlong="truncate",
    )
    return load_groups(section, tokenizer, RowKind.TEXTS, max_rows)


def load_world_prompts(
    data: DataSection,
    section: EpisodeSection,
    tokenizer: Tokenizer,
    max_prompt_tokens: int,
    world: Described | None,
    max_rows: int | None = None,
    *,
    sources: Sequence[Source] = (),
) -> DataSplit[Prompt]:
    """The rows as prompts, with everything that reward `sources` need; tools and environments are tried with the chat
    template and each one's first row.

    Raises:
        DataError: rows are wrong, or lack a column that the environment or a source needs.
        ConfigError: the environment cannot begin with the first row.
        ModelError: the chat template does not take tools or several turns.
    """
    if world is not None:
        require_template(world, tokenizer)
    episodes = None if world is None else episode_prompts(section, world)
    # An environment and a loop get a row's columns, which may be all that differs between tasks.
    prompts = load_prompts(data, tokenizer, max_prompt_tokens, max_rows, episodes, by_columns=section.gives_reward)
    every = (*prompts.train, *prompts.held_out)
    lacking = [] if world is None else missing_columns(world, every)
    lacking += unfit_rows(data, sources, ((prompt.id, prompt.label, prompt.metadata) for prompt in every))
    if lacking:
        raise DataError(lacking)
    for prompt in () if world is None else first_of_each(world, prompts.train):
        require_reset(section, prompt)
    return prompts

"""The settings of the commands around training: sampling, curating samples, rounds, and looking at data."""

import string
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, FiniteFloat, NonNegativeFloat, NonNegativeInt, PositiveInt

from rlhf.config.base import Section
from rlhf.config.data import DataSection
from rlhf.config.models import DtypeName, TrainedModelSection
from rlhf.config.reward import RewardSection
from rlhf.config.rollout import EngineName, RolloutSection
from rlhf.config.run import ClusterSection


def _rows_file(name: str | None) -> str | None:
    if name is not None and not name.endswith(".jsonl"):
        raise ValueError(f'must end in .jsonl (got "{name}").')
    return name


class SamplingConfig(Section):
    """How answers are sampled and scored."""

    data: DataSection = DataSection()
    reward: RewardSection = RewardSection()
    num_samples: PositiveInt = 4
    """Answers to each prompt."""
    max_prompts: PositiveInt | None = None
    """Use the first prompts only."""
    max_prompt_tokens: PositiveInt = 512
    """Longest prompt."""
    max_tokens: PositiveInt = 512
    """Longest answer; one that reaches it is truncated, and marked as such."""
    temperature: float = Field(1.0, ge=0.0, le=2.0)
    """Divides the logits; 0 is greedy."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """Sample from the smallest set of tokens with this probability."""
    top_k: NonNegativeInt = 0
    """Sample from the k likeliest tokens; 0 from all."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Decides the samples."""
    chunk_size: PositiveInt = 64
    """Prompts whose answers are sampled, scored and written at once."""
    engine: EngineName = "auto"
    """auto is vllm where it is installed, else transformers."""
    dtype: DtypeName = "auto"
    """Number format; auto is float32 on CPU and bfloat16 on GPUs."""
    tensor_parallel_size: PositiveInt = 1
    """GPUs that the vLLM engine is spread over."""
    max_num_seqs: PositiveInt = 64
    """Answers that the engine works on at once."""
    gpu_memory_utilization: float = Field(0.85, gt=0.0, le=1.0)
    """Share of a GPU's memory that the vLLM engine may take."""
    kv_cache_gib: float = Field(1.0, gt=0.0)
    """KV cache of a vLLM engine on CPU, in GiB."""
    debug: bool = False
    """Show tracebacks."""


class SampleConfig(SamplingConfig):
    """Answers of a model to every prompt of a data set, scored, as rows."""

    model: str | None = None
    """Folder or hub name of the model; usually the first argument."""
    out: Annotated[str | None, AfterValidator(_rows_file)] = None
    """File of samples (.jsonl). One that the same command left unfinished is continued."""


def _checked_format(text: str) -> str:
    fields = [(name, conversion) for _, name, _, conversion in string.Formatter().parse(text) if name is not None]
    if sorted(fields, key=str) != [("prompt", None), ("reward", None)]:
        raise ValueError("must hold {prompt} and {reward} exactly once each, as {reward:.1f} for one digit.")
    try:
        text.format(prompt="", reward=0.5)
    except ValueError as error:
        raise ValueError(f"{error}.") from error
    return text


class SelectionConfig(Section):
    """Which samples become training data."""

    max_per_prompt: PositiveInt | None = None
    """Most answers kept of one prompt, best first; by default 1 for best-of-n, all for rejection."""
    min_margin: NonNegativeFloat = 0.0
    """Least difference in reward between the two answers of a pair (pairs)."""
    keep_truncated: bool = False
    """Keep answers that reached the length limit; trained on, they teach to stop in the middle."""


class CurateConfig(SelectionConfig):
    """Training data from scored samples."""

    method: Literal["best-of-n", "rejection", "raft", "rft", "conditional", "pairs"] | None = None
    """How to choose; usually the first argument. raft is best-of-n, rft is rejection."""
    samples: str | None = None
    """File or glob of samples, as `rlhf sample` writes them; usually the second argument."""
    out: Annotated[str | None, AfterValidator(_rows_file)] = None
    """File of rows to train on (.jsonl)."""
    threshold: FiniteFloat | None = None
    """Least reward of an answer that is kept (best-of-n, rejection)."""
    quantile: float | None = Field(None, ge=0.0, le=1.0)
    """Instead of threshold: keep answers at or above this quantile of all rewards."""
    overwrite: bool = False
    """Replace the file if it exists."""
    prompt_format: Annotated[str, AfterValidator(_checked_format)] = "[reward {reward:.1f}] {prompt}"
    """Prompt that says the reward, from 0 (worst) to 1 (best); of messages, the last one's text (conditional)."""
    debug: bool = False
    """Show tracebacks."""


class RoundsConfig(SamplingConfig, SelectionConfig):
    """Sample, choose and train in rounds; each round's model is the next one's policy."""

    method: Literal["sft", "dpo"] | None = None
    """sft is expert iteration (ReST), dpo is iterative DPO; usually the first argument."""
    model: str | None = None
    """Folder or hub name of the first policy."""
    folder: str = "runs/rounds"
    """Folder with a folder for each round. Rounds that are finished there are not done again."""
    num_rounds: PositiveInt = 3
    """Rounds of sampling and training."""
    train: str | None = None
    """Config file for `rlhf train`; policy.model, reference.model, data.path, run.dir and run.name are set by the
    round."""
    thresholds: tuple[FiniteFloat, ...] = ()
    """sft: least reward of an answer that is kept, one a round; fewer than rounds: the last one stays."""
    quantiles: tuple[float, ...] = ()
    """sft: instead of thresholds, the quantile of a round's rewards; 0.5 keeps the better half."""
    start_from: Literal["previous", "first"] = "previous"
    """Model that a round's training starts from: the previous round's, or the first one again."""
    reference: Literal["previous", "first"] = "previous"
    """dpo: the reference is the round's own policy, or the first one."""


class DataConfig(Section):
    """What is in a data set, and what is wrong with it."""

    kind: Literal["prompts", "demonstrations", "preferences", "labeled", "steps"] | None = None
    """What the rows are read as; usually the first argument."""
    data: DataSection = DataSection()
    tokenizer: str | None = None
    """Folder or hub name of a model: lengths are counted in its tokens, else in characters."""
    max_prompt_tokens: PositiveInt = 512
    """Longest prompt that a run would sample answers to (prompts)."""
    as_json: bool = False
    """Print the report as JSON (short: --json)."""
    debug: bool = False
    """Show tracebacks."""


class BenchConfig(Section):
    """How fast a policy's weights reach the rollout engines of this cluster, beside the collectives that a sync cannot
    do without: gathering the shards, and sending what was gathered."""

    what: Literal["sync"] | None = None
    """What to measure; usually the first argument."""
    sizes: tuple[PositiveInt, ...] = (25, 200)
    """Millions of parameters of the models that are made for it, where policy.model names none."""
    repeats: PositiveInt = 5
    """Syncs of each model, after one to warm up; figures are medians."""
    folder: str = "runs/bench"
    """Folder for the models that are made, and for the processes' logs. All nodes must see it."""
    policy: TrainedModelSection = TrainedModelSection()
    rollout: RolloutSection = RolloutSection()
    cluster: ClusterSection = ClusterSection()
    as_json: bool = False
    """Print the figures as JSON (short: --json)."""


class PlanConfig(Section):
    """Where a run's models would live, what they would hold and how long a step would take. Starts nothing."""

    cluster: str | None = None
    """Cluster to plan for, as 16x8xH100 (nodes x devices x kind) or 8xA100; by default the one at hand."""
    prompt_tokens: PositiveInt | None = None
    """Mean prompt, for times; by default the longest that the config admits."""
    response_tokens: PositiveInt | None = None
    """Mean answer, for times; by default the longest that the config admits."""
    suggest: bool = False
    """Search the cluster for faster placements of the same run, and name the best three."""
    calibration: str | None = None
    """Folder of a run that `rlhf plan --calibrate` was given: its factors correct this plan."""
    as_json: bool = False
    """Print the plan as JSON (short: --json)."""


class CalibrateConfig(Section):
    """What a finished run measured beside what was planned for it; the factors are kept in its folder."""

    calibrate: str | None = None
    """Folder of the run."""
    cluster: str | None = None
    """Cluster that it ran on, as 2x8xH100; by default the one at hand."""
    debug: bool = False
    """Show tracebacks."""


class DoctorConfig(Section):
    """Whether this machine has what a run needs; with a run's folder, what happened to that run."""

    run: str | None = None
    """Folder of a run; usually the first argument."""
    debug: bool = False
    """Show tracebacks."""


class ChaosConfig(Section):
    """A run under faults beside the same run without: whether it ends, and with the same weights. The run saves every
    step; faults come one at a time, with a saved step in between."""

    num_faults: PositiveInt = 6
    """Faults, each for another process and phase until all have met."""
    kinds: tuple[Literal["kill", "stop", "tear"], ...] = ("kill",)
    """kill is SIGKILL; stop is SIGSTOP, which its victim cannot even notice; tear kills the driver and damages its
    newest checkpoint."""
    chaos_seed: NonNegativeInt = 0
    """Decides which faults come."""
    apart_s: NonNegativeFloat = 0.0
    """Least seconds between the start of the run, or a fault, and the next fault."""
    delay_s: NonNegativeFloat = 0.1
    """Most seconds between the beginning of the phase that a fault comes in, and the fault; 0: before anybody is asked
    in it."""
    against: str | None = None
    """Folder of a run that the same command finished without faults; by default it runs first."""

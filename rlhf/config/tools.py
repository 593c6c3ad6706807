"""The settings of the commands around training: sampling, curating samples, rounds, data reports, planning and
the quickstart."""

import string
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, FiniteFloat, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from rlhf.config.base import Section
from rlhf.config.commands import RowKind
from rlhf.config.data import DataSection
from rlhf.config.import_name import ImportName
from rlhf.config.models import DtypeName, TrainedModelSection
from rlhf.config.path_text import PathText
from rlhf.config.reward import RewardSection
from rlhf.config.rollout import EngineName, EpisodeSection, RolloutSection
from rlhf.config.run import ClusterSection


def _rows_file(name: str | None) -> str | None:
    if name is not None and not name.endswith(".jsonl"):
        raise ValueError(f'must end in .jsonl (got "{name}").')
    return name


class SamplingConfig(Section):
    """How responses are sampled and scored."""

    data: DataSection = DataSection()
    reward: RewardSection = RewardSection()
    num_samples: PositiveInt = 4
    """Responses to each prompt."""
    max_prompts: PositiveInt | None = None
    """Use only the first prompts."""
    max_prompt_tokens: PositiveInt = 512
    """Longest prompt, in tokens."""
    max_tokens: PositiveInt = 512
    """Longest response, in tokens. A response that reaches it is truncated, and marked as truncated."""
    temperature: float = Field(1.0, ge=0.0, le=2.0)
    """The logits are divided by it; 0 is greedy."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """Nucleus sampling: sample from the smallest set of tokens with at least this probability."""
    top_k: NonNegativeInt = 0
    """Sample from the k most likely tokens; 0 samples from all."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of sampling."""
    chunk_size: PositiveInt = 64
    """Prompts whose responses are sampled, scored and written together."""
    engine: EngineName = "auto"
    """auto is vllm where it is installed, else transformers."""
    dtype: DtypeName = "auto"
    """Number format; auto is float32 on CPU and bfloat16 on GPUs."""
    tensor_parallel_size: PositiveInt = 1
    """Tensor parallelism: GPUs that the vLLM engine is spread over."""
    max_num_seqs: PositiveInt | Literal["auto"] = "auto"
    """Responses that the engine decodes at the same time; auto is 64 on CPU and 512 on GPUs."""
    gpu_memory_utilization: float = Field(0.85, gt=0.0, le=1.0)
    """Share of a GPU's memory that the vLLM engine may use."""
    kv_cache_gib: float = Field(1.0, gt=0.0)
    """KV cache of a vLLM engine on CPU, in GiB."""
    debug: bool = False
    """Show tracebacks."""


class SampleConfig(SamplingConfig):
    """A model's scored responses to every prompt of a data set, as rows."""

    model: PathText | None = None
    """Folder or hub name of the model; usually the first argument."""
    rollout: EpisodeSection = EpisodeSection()
    out: Annotated[PathText | None, AfterValidator(_rows_file)] = None
    """File of samples (.jsonl). A file that the same command left unfinished is continued."""


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
    """Most responses kept for one prompt, best first; by default 1 for best-of-n, all for rejection."""
    min_margin: NonNegativeFloat = 0.0
    """Least difference in reward between the two responses of a pair (pairs)."""
    keep_truncated: bool = False
    """Keep responses that reached the length limit. A model trained on them learns to stop in the middle."""


class CurateConfig(SelectionConfig):
    """Training data from scored samples."""

    method: Literal["best-of-n", "rejection", "raft", "rft", "conditional", "pairs"] | None = None
    """How to choose; usually the first argument. raft is best-of-n, rft is rejection."""
    samples: PathText | None = None
    """File or glob of samples, as `rlhf sample` writes them; usually the second argument."""
    out: Annotated[PathText | None, AfterValidator(_rows_file)] = None
    """File of rows to train on (.jsonl)."""
    threshold: FiniteFloat | None = None
    """Least reward of a response that is kept (best-of-n, rejection)."""
    quantile: float | None = Field(None, ge=0.0, le=1.0)
    """Instead of threshold: keep responses at or above this quantile of all rewards."""
    overwrite: bool = False
    """Replace the file if it exists."""
    prompt_format: Annotated[str, AfterValidator(_checked_format)] = "[reward {reward:.1f}] {prompt}"
    """Prompt that states the reward, from 0 (worst) to 1 (best). Of messages, it is the text of the last one
    (conditional)."""
    debug: bool = False
    """Show tracebacks."""


class RoundsConfig(SamplingConfig, SelectionConfig):
    """Sample, choose and train in rounds (expert iteration, iterative DPO): each round's model is the policy of the
    next."""

    method: Literal["sft", "dpo"] | None = None
    """sft is expert iteration (ReST, RAFT), dpo is iterative DPO; usually the first argument."""
    model: PathText | None = None
    """Folder or hub name of the first policy."""
    folder: PathText = "runs/rounds"
    """Folder with one folder for each round. Rounds that are finished in it are not repeated."""
    num_rounds: PositiveInt = 3
    """Rounds of sampling and training."""
    train: PathText | None = None
    """Config file for `rlhf train`. The round sets policy.model, reference.model, data.path, run.dir and run.name."""
    thresholds: tuple[FiniteFloat, ...] = ()
    """sft: least reward of a response that is kept, one for each round. If there are fewer than rounds, the last one
    stays."""
    quantiles: tuple[float, ...] = ()
    """sft: instead of thresholds, the quantile of a round's rewards; 0.5 keeps the better half."""
    start_from: Literal["previous", "first"] = "previous"
    """Model that a round's training starts from: that of the previous round, or the first one again."""
    reference: Literal["previous", "first"] = "previous"
    """dpo: the reference model is the round's own policy before training (previous), or the first policy."""


class DataConfig(Section):
    """What is in a data set, and what is wrong with it."""

    kind: RowKind | None = None
    """What the rows are read as; usually the first argument."""
    data: DataSection = DataSection()
    tokenizer: PathText | None = None
    """Folder or hub name of a model whose tokenizer counts lengths; if not given, lengths are in characters."""
    max_prompt_tokens: PositiveInt = 512
    """Longest prompt that a run would sample responses to (prompts)."""
    as_json: bool = False
    """Print the report as JSON (short: --json)."""
    debug: bool = False
    """Show tracebacks."""


class RewardTryConfig(Section):
    """A reward function called on rows of a data set, in its own process, as a run calls it: what each parameter gets,
    the scores and the time."""

    what: Literal["try"] | None = None
    """What to do; usually the first argument."""
    function: ImportName | None = None
    """The function, as module:name or folder/file.py:name; usually the second argument."""
    data: DataSection = DataSection()
    responses: tuple[str, ...] = ()
    """Responses to score, each for every row. By default the row's label, if it has one, and "No.". Repeatable."""
    num_rows: PositiveInt = 3
    """How many rows, from the first."""
    timeout_s: PositiveFloat = 60.0
    """Longest time for one call."""
    memory_gib: PositiveFloat | None = None
    """Most memory that the function's process may allocate."""
    network: bool = True
    """Whether the function reaches the network; false needs user namespaces."""
    debug: bool = False
    """Show tracebacks."""


class BenchConfig(Section):
    """How fast weights reach the rollout engines of this cluster, compared with the collectives that a sync consists
    of: gathering the shards, and sending what was gathered."""

    what: Literal["sync"] | None = None
    """What to measure; usually the first argument."""
    sizes: tuple[PositiveInt, ...] = (25, 200)
    """Millions of parameters of the models that are made for the measurement, if policy.model names none."""
    repeats: PositiveInt = 5
    """Syncs of each model, after one for warm-up; the results are medians."""
    folder: PathText = "runs/bench"
    """Folder for the models that are made, and for the workers' logs. All nodes must see it."""
    policy: TrainedModelSection = TrainedModelSection()
    rollout: RolloutSection = RolloutSection()
    cluster: ClusterSection = ClusterSection()
    as_json: bool = False
    """Print the results as JSON (short: --json)."""


class PlanConfig(Section):
    """Where a run's models are placed, how much memory they need and how long a step takes. Starts nothing."""

    cluster: str | None = None
    """Cluster to plan for, as 16x8xH100 (nodes x GPUs x kind) or 8xA100; by default the current one."""
    prompt_tokens: PositiveInt | None = None
    """Mean prompt length, for time estimates; by default the longest that the config allows."""
    response_tokens: PositiveInt | None = None
    """Mean response length, for time estimates; by default the longest that the config allows."""
    suggest: bool = False
    """Search the cluster for faster placements of the same run, and show the best three."""
    calibration: PathText | None = None
    """Folder of a run that was calibrated with `rlhf plan --calibrate`: its factors correct this plan."""
    as_json: bool = False
    """Print the plan as JSON (short: --json)."""


class CalibrateConfig(Section):
    """What a finished run measured, next to what was planned for it. The factors are kept in the run's folder."""

    calibrate: PathText | None = None
    """Folder of the run."""
    cluster: str | None = None
    """Cluster that the run used, as 2x8xH100; by default the current one."""
    debug: bool = False
    """Show tracebacks."""


class DoctorConfig(Section):
    """Whether this machine has what a run needs; with a run's folder, what happened to that run."""

    run: PathText | None = None
    """Folder of a run; usually the first argument."""
    debug: bool = False
    """Show tracebacks."""


class CompareConfig(Section):
    """Runs side by side: the values of their metrics at the end and at best, the settings in which they differ, and
    which run did best, by how much."""

    runs: tuple[PathText, ...] = ()
    """Folders of the runs, at least two; usually the arguments."""
    metrics: tuple[str, ...] = ()
    """Metrics to show, by their names in metrics.jsonl; by default those that say how a run did. Repeatable."""
    as_json: bool = False
    """Print the comparison as JSON (short: --json)."""
    debug: bool = False
    """Show tracebacks."""


class ReportConfig(Section):
    """One HTML file about a run, or about several next to each other: what moved and what is wrong, curves of every
    metric, responses with their rewards, the time of a step, events, settings that differ. It loads nothing, and can be
    mailed."""

    runs: tuple[PathText, ...] = ()
    """Folders of the runs; usually the arguments."""
    out: PathText | None = None
    """The file; by default report.html in the run's folder, for several runs report.html here."""
    steps: tuple[PositiveInt, ...] = ()
    """Steps whose responses are all in the page, beside those of the first, middle and last steps. Repeatable."""
    responses_mib: float = Field(2.0, ge=0.0, le=200.0)
    """Room for other responses, in MiB: spread over the run, as many as fit."""
    debug: bool = False
    """Show tracebacks."""


class ChaosConfig(Section):
    """A run with injected faults, compared with the same run without: whether it ends, and with the same weights. The
    run saves every step. Faults come one at a time, with a saved step in between."""

    num_faults: PositiveInt = 6
    """Number of faults. Each hits another process in another phase, until all combinations are done."""
    kinds: tuple[Literal["kill", "stop", "tear"], ...] = ("kill",)
    """kill is SIGKILL; stop is SIGSTOP, which the process cannot notice; tear kills the driver and damages its newest
    checkpoint."""
    chaos_seed: NonNegativeInt = 0
    """Seed of the choice of faults."""
    apart_s: NonNegativeFloat = 0.0
    """Least time between the start of the run, or a fault, and the next fault."""
    delay_s: NonNegativeFloat = 0.1
    """Most time between the beginning of the phase and the fault in it; 0: before the phase calls any worker."""
    against: PathText | None = None
    """Folder of a run that the same command finished without faults; by default that run is made first."""


class GenerateConfig(Section):
    """Sampling responses from a trained model."""

    model: PathText | None = None
    """Folder or hub name of the model; usually the first argument."""
    prompt: tuple[str, ...] = ()
    """A prompt. Repeatable."""
    prompts: PathText | None = None
    """File of prompts: one on each line, or the rows of a data set."""
    template: Literal["auto", "chat", "plain"] | None = None
    """chat renders a prompt through the chat template, plain puts it into prompt_format, auto is chat where the model
    has a chat template. By default as in the run that trained the model, where this is a run's model, else auto."""
    chat_template: str | None = None
    """Chat template in place of the tokenizer's default: the name of another one of its templates, or a .jinja
    file; by default that of the run."""
    prompt_format: str | None = None
    """Text around a prompt that is not rendered as chat, e.g. "Question: {prompt}\\nAnswer:"; by default that of the
    run."""
    rollout: EpisodeSection = EpisodeSection()
    max_tokens: PositiveInt = 256
    """Longest response, in tokens; of several turns with what tools and environments return."""
    temperature: float = Field(1.0, ge=0.0, le=2.0)
    """The logits are divided by it; 0 is greedy."""
    num_samples: PositiveInt = 1
    """Responses to each prompt."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of sampling."""
    engine: EngineName = "auto"
    """auto is vllm where it is installed, else transformers."""
    debug: bool = False
    """Show tracebacks."""


class QuickstartConfig(Section):
    """The three steps of RLHF on a tiny model that is made for it."""

    folder: PathText = "runs/quickstart"
    """Folder for everything that is made; an earlier quickstart in it is replaced."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of every random choice."""
    debug: bool = False
    """Show tracebacks."""


class ExampleConfig(Section):
    """The model and the rows that the CPU configs in configs/ use: a tiny Llama that writes stories for children. They
    are made on the spot and need no hub; the same seed makes the same."""

    name: Literal["stories"] | None = None
    """Which example; usually the first argument."""
    folder: PathText = "runs/stories"
    """Folder for everything that is made; an earlier example in it is replaced."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of every random choice."""
    debug: bool = False
    """Show tracebacks."""

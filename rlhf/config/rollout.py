"""How responses are sampled."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from rlhf.config.base import Section
from rlhf.config.environment_name import AgentName, EnvironmentName
from rlhf.config.import_name import ImportName


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineTraits:
    """What a kind of rollout engine can do. Its name is also that of the package that it needs."""

    mixes: bool
    """It can mix the logits of two models (algo.mixture)."""
    max_adapter_rank: int
    """Highest rank of LoRA adapters that it adds to a model at every token; 0: it takes merged weights only."""
    on_gpu: bool
    """It can receive weights on a GPU."""
    stored_names: bool
    """It takes weights under the names and in the shapes of a checkpoint; else under those of transformers' model."""
    spreads: bool
    """One engine can be spread over several GPUs."""
    continuous: bool
    """Requests join those that it decodes already (continuous batching); else they wait for the end of a batch."""
    records_experts: bool
    """It says which experts it used for each token (rollout.router_replay)."""
    cpu_process_gib: float
    """Memory of its process on a CPU, without weights and KV cache: the libraries."""
    cpu_weight_copies: float
    """Memory of the weights on a CPU, as a multiple of their size."""


EngineName = Literal["auto", "vllm", "transformers"]
ENGINES: Mapping[str, EngineTraits] = {
    "vllm": EngineTraits(
        mixes=False,
        max_adapter_rank=512,
        on_gpu=True,
        stored_names=True,
        spreads=True,
        continuous=True,
        records_experts=True,
        cpu_process_gib=0.75,
        # Linear layers multiply by packed copies, and loading leaves holes between these.
        cpu_weight_copies=1.5,
    ),
    "transformers": EngineTraits(
        mixes=True,
        max_adapter_rank=0,
        on_gpu=False,
        stored_names=False,
        spreads=False,
        continuous=False,
        records_experts=False,
        cpu_process_gib=0.55,
        cpu_weight_copies=1.0,
    ),
}
"""The kinds of engines. auto is the first one that is installed."""


def engines_that(can: Callable[[EngineTraits], object]) -> list[str]:
    """The names of the engines that can do something."""
    return [name for name, traits in ENGINES.items() if can(traits)]


class EngineSection(Section):
    """Which engines sample responses, and how."""

    engine: EngineName = "auto"
    """Rollout engine. auto is vllm where it is installed, else transformers. Only transformers can mix two models
    (algo.mixture)."""
    num_engines: PositiveInt = 1
    """Engines, which share the prompts of a step."""
    tensor_parallel_size: PositiveInt = 1
    """Tensor parallelism: GPUs that share the work of each layer in one vLLM engine."""
    pipeline_parallel_size: PositiveInt = 1
    """Pipeline parallelism: stages of layers, one after the other, that one vLLM engine is split into. Each has
    tensor_parallel_size GPUs, and the engine has both numbers' product."""
    num_nodes_per_engine: PositiveInt = 1
    """Nodes that one vLLM engine is spread over, with equally many of its GPUs on each: for a model that one node does
    not hold. With as many pipeline stages as nodes, each stage is on one node."""
    expert_parallel: bool = False
    """Expert parallelism: each of the tensor_parallel_size GPUs of a vLLM engine has whole experts of a mixture of
    experts, in place of a slice of every expert."""
    batch_size: PositiveInt = 64
    """Prompts sampled in one step."""
    group_size: PositiveInt = 1
    """Group size: responses sampled to each prompt."""
    max_prompt_tokens: PositiveInt = 512
    """Longest prompt, in tokens."""
    max_response_tokens: PositiveInt = 512
    """Longest response, in tokens. A response that reaches it is truncated, and counted as truncated."""
    temperature: float = Field(1.0, ge=0.0, le=2.0, allow_inf_nan=False)
    """Sampling temperature. The logits are divided by it when sampling and when log-probs and entropy are computed;
    vLLM takes at most 2."""
    top_p: float = Field(1.0, gt=0.0, le=1.0)
    """Nucleus sampling: sample from the smallest set of tokens with at least this probability."""
    top_k: NonNegativeInt = 0
    """Sample from the k most likely tokens; 0 samples from all."""
    max_lag: NonNegativeInt = 0
    """Asynchronous (off-policy) rollouts: the greatest staleness, in policy versions, of the weights that sample while
    training goes on. 0 is strictly on-policy: sampling and training alternate."""
    order: Literal["fifo", "ready"] = "fifo"
    """Which groups a step learns from. fifo: those whose prompts come first. ready: those that are complete first, so
    that no step waits for the longest response; with max_lag above 0."""
    oversample: float = Field(1.0, ge=1.0, le=4.0, allow_inf_nan=False)
    """Groups to sample for a step, as a multiple of batch_size, with order ready. The step learns from those that are
    complete first. With max_lag 0 the others are aborted and their prompts come again: this favors short responses.
    With max_lag above 0 they go on into the next step."""
    partial: Literal["keep", "abort"] = "keep"
    """Responses that are not complete when new weights arrive, with max_lag above 0. keep: they go on with the new
    weights. abort: they are sampled again, so that each response comes from one version of the weights."""
    kv_cache: Literal["recompute", "keep"] = "recompute"
    """KV cache of responses that go on with new weights. recompute: the new weights compute it again, a prefill of each
    response in progress at each weight sync. keep: they go on with what the older weights computed (PipelineRL); the
    mismatch with the trainer grows, and importance weights correct it (algo.correction)."""
    max_num_seqs: PositiveInt | Literal["auto"] = "auto"
    """Responses that one engine decodes at the same time. auto is 64 on CPU and 512 on GPUs: while weights are read for
    each token, more responses take hardly more time. Those that the KV cache has no room for wait."""
    gpu_memory_utilization: float = Field(0.85, gt=0.0, le=1.0)
    """Share of a GPU's memory that a vLLM engine may use."""
    kv_cache_gib: PositiveFloat = 1.0
    """KV cache of a vLLM engine on CPU, in GiB."""
    enforce_eager: bool = False
    """Do not compile the model and do not capture CUDA graphs."""
    sync_backend: Literal["auto", "gloo", "nccl", "ipc"] = "auto"
    """How weights reach the engines: auto is gloo on CPU, CUDA IPC (ipc) on GPUs that policy and engines share, nccl
    between GPUs."""
    sync_bucket_mib: PositiveFloat = 64.0
    """Size of the buckets that weights are sent in, in MiB; a bucket holds at least one layer."""
    sync_adapters: bool = False
    """Send only the LoRA adapters, which vLLM then applies at every token, instead of weights with the adapters merged
    in: far less to send, but slower sampling."""
    stall_timeout_s: PositiveFloat = 300.0
    """Longest time in which an engine with unfinished requests may produce no token."""
    generate_timeout_s: PositiveFloat = 3600.0
    """Longest time in which an engine with unfinished requests may complete none."""
    sync_timeout_s: PositiveFloat = 120.0
    """Longest time for one weight sync."""

    @property
    def devices_per_engine(self) -> int:
        """GPUs of one engine, on all its nodes together."""
        return self.tensor_parallel_size * self.pipeline_parallel_size


class EpisodeSection(Section):
    """Tools and environments, with which a response has several turns."""

    tools: tuple[ImportName, ...] = ()
    """Python functions, module:name or file.py:name, that the policy may call: a response then has several turns. The
    model learns what they do from type hints and docstrings."""
    environment: tuple[EnvironmentName, ...] = ()
    """Class, module:name or file.py:name, of which each response gets an object of its own: its methods are tools, or
    its method step gets the text of each turn. Of several, the column environment of a row names its own. Environments
    of other libraries: gym://ID, openenv://HOST:PORT, openrlhf://agent_func.py."""
    agent: AgentName | None = None
    """Your own loop, module:name or file.py:name: async def run(session, row) -> reward. Any client of OpenAI's or
    Anthropic's API at session.base_url asks for the policy's turns. Environments of verifiers: verifiers://NAME."""
    max_turns: PositiveInt = 8
    """Turns of the policy in one response, with tools, an environment or an agent. A response that has as many and
    would go on is truncated."""
    max_turn_tokens: PositiveInt | None = None
    """Longest turn, in tokens. max_response_tokens always holds for all turns and what came back together."""
    max_tool_response_tokens: PositiveInt = 256
    """Longest text of a tool or environment that the policy reads, in tokens. The middle of a longer one is left out,
    and the text says so."""
    environment_processes: PositiveInt = 1
    """Processes that run tools and environments, each many at the same time."""
    environment_timeout_s: PositiveFloat = 30.0
    """Longest time for one call of a tool or of an environment's method, and for which an agent may ask for nothing."""
    environment_memory_gib: PositiveFloat | None = None
    """Most memory that a process of tools and environments may allocate, in GiB."""
    environment_network: bool = True
    """Whether tools and environments reach the network. With false they reach only themselves, which needs user
    namespaces; where the kernel has none the run is refused."""
    environment_max_processes: PositiveInt = 256
    """Most processes that may descend from one of tools and environments. One with more is ended, with all of them."""
    environment_retries: NonNegativeInt = 1
    """How often a response begins anew whose environment or agent raised, took too long or died. Tools that fail are
    answers to the policy."""
    on_environment_error: Literal["drop", "fail"] = "drop"
    """What becomes of a response whose environment or agent failed each time. drop: nothing is learned from it. fail:
    the run ends."""

    @property
    def has_episodes(self) -> bool:
        """Whether responses have several turns."""
        return bool(self.tools) or self.gives_reward

    @property
    def gives_reward(self) -> bool:
        """Whether an environment or an agent gives the reward if nothing else does."""
        return bool(self.environment) or self.agent is not None


class RolloutSection(EpisodeSection, EngineSection):
    """How responses are sampled."""

    router_replay: bool = False
    """Compute each token of a response, when it is learned from, with the experts of a mixture of experts that the
    rollout engine used for it (rollout routing replay, R3), so that sampler and trainer agree. Routers still learn."""
    environment_workers: NonNegativeInt = 0
    """Workers that run tools and environments on any node of the cluster, each with environment_processes of its own.
    With 0 they run on the driver's node."""

    def max_num_seqs_on(self, device: str) -> int:
        """`max_num_seqs` on a device (cpu, cuda)."""
        if self.max_num_seqs != "auto":
            return self.max_num_seqs
        return 64 if device == "cpu" else 512

    @property
    def expected_traits(self) -> EngineTraits:
        """What the engine can do, where nothing shows which ones are installed: auto is taken for the first."""
        return next(iter(ENGINES.values())) if self.engine == "auto" else ENGINES[self.engine]


class GroupRolloutSection(RolloutSection):
    """How groups of responses are sampled."""

    group_size: PositiveInt = 8
    """Group size: responses sampled to each prompt."""


class PairRolloutSection(RolloutSection):
    """How responses are sampled that become pairs."""

    group_size: PositiveInt = 2
    """Group size: responses sampled to each prompt; the best and the worst of them become a pair."""
    temperature: float = Field(0.9, ge=0.0, le=2.0, allow_inf_nan=False)
    """Sampling temperature. The logits are divided by it when sampling and when log-probs and entropy are computed;
    vLLM takes at most 2."""


class LabeledRolloutSection(RolloutSection):
    """How responses are sampled that are then labeled. The responses of one step make one optimizer step."""

    batch_size: PositiveInt = 16
    """Prompts sampled in one step."""
    group_size: PositiveInt = 4
    """Group size: responses sampled to each prompt."""

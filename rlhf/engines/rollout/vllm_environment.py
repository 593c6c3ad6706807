"""What vLLM reads from the environment when it is imported."""

import os

from rlhf.engines.rollout.spec import EngineSpec
from rlhf.engines.weight_sync.plugin import ENDS_WITH_PARENT


def set_environment(spec: EngineSpec) -> None:
    """Set it for an engine, or for one part of it. A user's own setting is kept where it works too."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # vLLM has two model runners; `vllm_core` replaces the sampler of the first.
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # On CPU the processes of one engine share the cores; by default vLLM wants a NUMA node for each.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    if spec.device == "cpu":
        # On CPU vLLM cannot load what it compiled ahead of time, and compiles at every start; torch's own cache halves
        # that time.
        os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")
    if spec.section.num_nodes_per_engine > 1:
        # The address on which the other nodes reach this one. vLLM would take that of the way to the internet.
        os.environ["VLLM_HOST_IP"] = spec.part.host
        # The first part serves the store that the ranks meet at, on its node's address and a port that it holds
        # already. Rank 0 would serve it on every address, on a port that may be taken by then.
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = str(True)
        # Where its node's part is killed, a process waits for the other nodes, and not for its parent.
        os.environ[ENDS_WITH_PARENT] = "1"

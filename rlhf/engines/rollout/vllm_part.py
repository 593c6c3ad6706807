"""A part of a vLLM engine that is spread over nodes: the processes of its ranks on one node, which compute what the
first part tells them. vLLM reads the environment when it is imported, so import this module only after the environment
is set (`vllm_environment.py`)."""

from vllm.v1.executor.multiproc_executor import MultiprocExecutor

from rlhf.engines.rollout.spec import EngineSpec
from rlhf.engines.rollout.vllm_arguments import engine_arguments, refusing, usage_context
from rlhf.engines.weight_sync.plugin import register


class VllmPart:
    """vLLM's executor of a node other than the first one's (headless). It takes no calls: its processes get all that
    they do from the first part."""

    def __init__(self, spec: EngineSpec) -> None:
        """Load this node's share of `spec.model`. Waits for the processes of the other nodes, which load theirs. Raises
        ModelError as the first part does."""
        register()
        with refusing(spec.model):
            config = engine_arguments(spec).create_engine_config(usage_context=usage_context(spec), headless=True)
            self._executor = MultiprocExecutor(config, monitor_workers=False)
        self._is_closed = False

    def wait(self) -> bool:
        """Wait until a process of this part ends, which ends the others. Returns whether `close` was called before."""
        self._executor.start_worker_monitor(inline=True)
        return self._is_closed

    def close(self) -> None:
        """End the processes. They wait for the first part, and would not see that this one is closed."""
        self._is_closed = True
        for worker in self._executor.workers:
            worker.proc.terminate()
        self._executor.shutdown()

"""The receiving processes of the weight sync's benchmark: bare ones, and vLLM engines."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch._C._distributed_c10d import TCPStore
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.config.rollout import RolloutSection
from rlhf.engines.models.fresh_model import train_tokenizer
from rlhf.engines.rollout.spec import EngineSpec
from rlhf.engines.weight_sync.base import Info
from rlhf.engines.weight_sync.gloo import GlooReceiver
from rlhf.engines.weight_sync.gloo_group import GlooGroup, GlooInitInfo, GlooUpdateInfo

SHAPES = {  # millions of parameters -> hidden size, layers, vocabulary
    1: (128, 4, 1024),
    25: (512, 7, 8192),
    200: (1024, 14, 16384),
}
TIMEOUT_S = 120.0


def make_config(millions: int) -> LlamaConfig:
    hidden, layers, vocabulary = SHAPES[millions]
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=2816 * hidden // 1024,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        tie_word_embeddings=True,
    )


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    millions: int
    num_receivers: int
    repeats: int
    bucket_bytes: int
    folder: Path
    """Of models that vLLM loads."""
    is_vllm: bool


class MemoryMark:
    """What this process holds at most from now on, beyond what it holds now."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
        self._before = self._peak()

    def extra(self) -> int:
        """Bytes."""
        return self._peak() - self._before

    @staticmethod
    def _peak() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024


class Receiver:
    """What a rollout engine does with weights, without the engine: check them and copy them into a model."""

    def __init__(self, case: Case) -> None:
        with torch.device("meta"):
            model = LlamaForCausalLM(make_config(case.millions)).requires_grad_(False)
        model.to_empty(device="cpu")
        self._parameters = {name: parameter.fill_(0.0) for name, parameter in model.named_parameters()}
        self._link: GlooReceiver | None = None
        self._group: GlooGroup | None = None
        self._digest = ""

    def init_weight_transfer(self, info: Info) -> None:
        self._link = GlooReceiver(GlooInitInfo(**info))  # type: ignore[arg-type]

    def start_weight_update(self) -> None:
        pass

    def update_weights(self, info: Info) -> None:
        assert self._link is not None
        self._digest = self._link.receive(GlooUpdateInfo(**info), self._load)  # type: ignore[arg-type]

    def finish_weight_update(self, version: int, digest: str) -> str:
        assert digest == self._digest, version
        return self._digest

    def join_raw(self, port: int, rank: int, world_size: int, sizes: Sequence[int]) -> None:
        self._sizes = sizes
        self._buffer = torch.ones(max(sizes), dtype=torch.uint8)
        store = TCPStore("127.0.0.1", port)
        self._group = GlooGroup(store, rank, world_size, TIMEOUT_S)

    def receive_raw(self) -> None:
        assert self._group is not None
        for size in self._sizes:
            self._group.broadcast(self._buffer[:size]).wait()

    def receive_parameter(self, name: str, shape: Sequence[int]) -> None:
        assert self._group is not None
        arrived = torch.empty(*shape)
        self._group.broadcast(arrived).wait()
        self._load([(name, arrived)])

    def mark_memory(self) -> None:
        self._mark = MemoryMark()

    def extra_memory(self) -> int:
        return self._mark.extra()

    def _load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in tensors:
            self._parameters[name].copy_(tensor)


class VllmReceiver(Receiver):
    """A vLLM engine in this process."""

    def __init__(self, case: Case) -> None:
        from rlhf.engines.rollout.vllm_engine import VllmRolloutEngine  # noqa: PLC0415  - takes seconds

        section = RolloutSection(max_num_seqs=8, kv_cache_gib=0.3, enforce_eager=True)
        model = str(case.folder / str(case.millions))
        spec = EngineSpec(section=section, model=model, dtype="float32", device="cpu")
        self._engine = VllmRolloutEngine(spec, name="receiver")

    def init_weight_transfer(self, info: Info) -> None:
        self._engine.init_weight_transfer(info)

    def start_weight_update(self) -> None:
        self._engine.start_weight_update()

    def update_weights(self, info: Info) -> None:
        self._engine.update_weights(info)

    def finish_weight_update(self, version: int, digest: str) -> str:
        return self._engine.finish_weight_update(version, digest)


def make_model(case: Case) -> None:
    """A folder that vLLM can load."""
    folder = case.folder / str(case.millions)
    LlamaForCausalLM(make_config(case.millions)).save_pretrained(folder)
    train_tokenizer(["a model that nobody reads"], 300, folder)


def run_receiver(case: Case, pipe: Connection) -> None:
    receiver = VllmReceiver(case) if case.is_vllm else Receiver(case)
    pipe.send("ready")
    while (call := pipe.recv()) is not None:
        method, arguments = call
        pipe.send(getattr(receiver, method)(*arguments))


class PipeClient:
    """`EngineClient` over pipes to receiving processes."""

    def __init__(self, pipes: Sequence[Connection]) -> None:
        self._pipes = pipes

    @property
    def engine_names(self) -> tuple[str, ...]:
        return tuple(f"receiver-{i}" for i in range(len(self._pipes)))

    def call(self, method: str, arguments: Sequence[tuple[object, ...]], timeout_s: float) -> list[object]:
        for pipe, each in zip(self._pipes, arguments, strict=True):
            pipe.send((method, each))
        return self.results(timeout_s)

    def results(self, timeout_s: float) -> list[object]:
        replies = []
        for pipe in self._pipes:
            assert pipe.poll(timeout_s), "a receiver does not answer"
            replies.append(pipe.recv())
        return replies

    def init_weight_transfer(self, init_infos: Sequence[Info], timeout_s: float) -> None:
        self.call("init_weight_transfer", [(info,) for info in init_infos], timeout_s)

    def start_weight_update(self, timeout_s: float) -> None:
        self.call("start_weight_update", [()] * len(self._pipes), timeout_s)

    def update_weights(self, update_info: Info, timeout_s: float) -> None:
        self.call("update_weights", [(update_info,)] * len(self._pipes), timeout_s)

    def finish_weight_update(self, version: int, digest: str, timeout_s: float) -> dict[str, str]:
        digests = self.call("finish_weight_update", [(version, digest)] * len(self._pipes), timeout_s)
        return dict(zip(self.engine_names, map(str, digests), strict=True))

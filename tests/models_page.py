"""Writes docs/models.md: what becomes of every causal language model that transformers knows, tried with tiny ones.

    python -m tests.models_page docs/models.md [MODEL_TYPE ...]

Each is saved, loaded, tested and exported by the product's own parts; its log-probs of packed sequences are compared
with those of its own forward, each sequence alone.
"""

import json
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import save_file
from torch._C._distributed_c10d import HashStore
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rlhf.config.models import LoraSection, ModelSection
from rlhf.engines.models.heads import LogProbHead, PackedModel
from rlhf.engines.models.loading import LoadedModel, load_model
from rlhf.engines.models.log_probs import LogitsRule
from rlhf.engines.models.packed import PackedInput
from rlhf.engines.models.passes import PackedPass
from rlhf.engines.models.self_test import Examination, SelfTest
from rlhf.engines.process.library_output import silence_libraries
from rlhf.errors import RlhfError
from rlhf.types import Head, PackedTokens
from tests.families import tiny_family
from tests.family_results import sections

CPU = torch.device("cpu")
LENGTHS = (11, 29, 3, 18)
WORKS, UNPACKED, REFUSED = "works", "works unpacked", "refused"
HEADING = """# Models

What becomes of every causal language model of transformers {version}, found by trying a tiny random model of each:
`python -m tests.models_page docs/models.md` writes this page. Each was saved, loaded, put through the
[self-test](architecture.md#self-test-of-a-loaded-model) that every model gets, compared with its own forward pass in
float32 on a CPU (log-probs of packed sequences against each alone: at most 1e-5 nats apart, or 4 times the model's
rounding noise), exported, and the export was loaded and compared.

- **works**: sequences are packed, without padding.
- **works unpacked**: packed sequences would see each other (by the nats that are given), so each gets a forward pass of
  its own. On GPUs with the kernels that a model brings, some of these can be packed; the self-test decides on the
  machine of a run.
- **refused**: exit code 3 before the first step, with the reason. Where no model of a type can be made here, the loader
  got a checkpoint with the type's default config.

Checkpoints that read images too (Qwen3.5, Gemma 3 and 4, Mistral 3) are loaded, sent and exported whole. Their text
part learns; towers get no gradient and stay as they are, and vLLM loads the text part alone. Llama 4 with its tower is
refused. In a mixture of experts, all experts of a layer are one tensor, of which ZeRO-3 gathers the whole, unless
[`expert_parallel_size`](choosing.md) spreads them over processes.

| model type | result | attention | logits | packed sequences differ by | reason |
|---|---|---|---|---|---|
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What became of one model type."""

    family: str
    result: str
    attention: str = ""
    logits: str = ""
    leak: str = ""
    reason: str = ""

    def __str__(self) -> str:
        cells = (self.family, self.result, self.attention, self.logits, self.leak, self.reason)
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def tried(family: str) -> Row:
    """Try one model type."""
    try:
        model = tiny_family(family)
        with torch.no_grad():
            model.eval()(input_ids=torch.arange(4, 20)[None], use_cache=False)
    except Exception:
        return _without_weights(family)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            model.save_pretrained(folder / "saved")
            loaded = _load(folder / "saved")
            packed_model, found = examined(loaded)
            off_by = difference(packed_model)
            if off_by > found.tolerance:
                raise AssertionError(f"{family}: {off_by:.2g} nats from its own forward pass, and not refused")
            _export(loaded, folder / "exported")
        except RlhfError as error:
            return Row(family=family, result=REFUSED, reason=_reason(error, folder))
    is_packed = found.passes == PackedPass.name
    head = packed_model.head
    return Row(
        family=family,
        result=WORKS if is_packed else UNPACKED,
        attention=found.attention,
        logits=_rule(head) if isinstance(head, LogProbHead) else "its own code",
        leak="" if is_packed else f"{found.packing_leak:.2g} nats",
    )


def _without_weights(family: str) -> Row:
    """What the loader says of a checkpoint of a type of which no model can be made. Raises AssertionError where it
    would load it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "saved")
        folder.mkdir()
        architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
        (folder / "config.json").write_text(json.dumps({"model_type": family, "architectures": [architecture]}))
        save_file({"some.weight": torch.zeros(1)}, folder / "model.safetensors")
        try:
            _load(folder)
        except RlhfError as error:
            return Row(family=family, result=REFUSED, reason=_reason(error, folder))
    raise AssertionError(f"{family}: no model can be made of it, and it is loaded")


def _load(folder: Path) -> LoadedModel:
    return load_model(
        ModelSection(), str(folder), Head.LOG_PROBS, where="policy.model", device=CPU, seed=0, new_head=False
    )


def examined(loaded: LoadedModel) -> tuple[PackedModel, SelfTest]:
    """A loaded model after its self-test, and what that found."""
    rule = LogitsRule(chunk_tokens=1024)
    packed_model = PackedModel(loaded.model, Head.LOG_PROBS, rule, where="policy.model").train()
    found = Examination(
        packed_model=packed_model, asked="auto", dtype=torch.float32, device=CPU, where="policy.model", agree=float,
        pace=int,
    ).run()  # fmt: skip
    return packed_model, found


@torch.no_grad()
def difference(packed_model: PackedModel) -> float:
    """Largest difference of log-probs to the model's own forward, each sequence alone, in nats."""
    ids = np.random.default_rng(3).integers(4, 120, sum(LENGTHS))
    packed = PackedTokens(token_ids=ids, lengths=np.array(LENGTHS))
    said = packed_model(PackedInput.from_numpy(packed, CPU))[0]
    own = []
    attention = packed_model.model.config._attn_implementation
    with packed_model.own_forward() as model:
        model.set_attn_implementation("eager")
        for one in torch.from_numpy(ids).split(LENGTHS):
            logits = model.eval()(input_ids=one[None], use_cache=False).logits[0].float()
            known = logits[:-1].log_softmax(-1).gather(-1, one[1:, None])[:, 0]
            own += [known.new_zeros(1), known]
        model.set_attn_implementation(attention)
    return float((said - torch.cat(own)).abs().max())


def _export(loaded: LoadedModel, folder: Path) -> None:
    from rlhf.engines.training.export import check_export, export_model  # noqa: PLC0415  imports DeepSpeed

    with one_rank():
        export_model(loaded, folder, LoraSection())
        check_export(loaded, folder, where="policy.model")


@contextmanager
def one_rank() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _rule(head: LogProbHead) -> str:
    parts = [f"times {head.rule.scale:.4g}"] * (head.rule.scale != 1.0)
    parts += [f"capped at {head.rule.softcap:g}"] * bool(head.rule.softcap)
    return ", ".join(parts)


def _reason(error: RlhfError, folder: Path) -> str:
    line = str(error).splitlines()[0].removeprefix("policy.model: ").replace(str(folder), "")
    return line[:240]


def families() -> list[str]:
    """Every model type that transformers loads as a causal language model."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def page(rows: Sequence[Row]) -> str:
    """The page's text."""
    counts = [f"{sum(row.result == result for row in rows)} {result}" for result in (WORKS, UNPACKED, REFUSED)]
    heading = HEADING.format(version=transformers.__version__)
    summary = f"\n\nOf {len(rows)}: {', '.join(counts)}.\n"
    return heading + "\n".join(map(str, rows)) + summary + sections()


def main(arguments: Sequence[str]) -> None:
    """Write the page, or print the rows of some model types."""
    target, *names = arguments
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    silence_libraries()
    rows = []
    for family in names or families():
        rows.append(tried(family))
        print(rows[-1], flush=True)  # noqa: T201
    if not names:
        Path(target).write_text(page(rows))


if __name__ == "__main__":
    main(sys.argv[1:])

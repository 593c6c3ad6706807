"""What real runs of some families gave (tests/integration/test_family_runs.py), kept for docs/models.md."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

KEPT = Path(__file__).with_name("family_results.jsonl")
KEPT_GAPS = Path(__file__).with_name("family_gaps.jsonl")
HEADING = """
## Runs of some families

Real runs of tiny checkpoints, whole, with their towers for images: `sft`, `dpo` and `grpo` in float32 on a CPU, with
every weight sync verified by its digest. `make model-runs` repeats them. The log-prob gap is the
largest difference of policy and engine at a sampled token; a fresh process computes the logits of the export, which are
compared with those of the last checkpoint; a resumed run ends with the same bytes, or not. A family that is not here
was not run.

| family | `sft`: loss falls by | `dpo`: pairs learned | `grpo` by | log-prob gap | fresh process | resumed | towers |
|---|---|---|---|---|---|---|---|
"""
GAPS_HEADING = """
vLLM computes the linear attention of Qwen3.5 on a CPU in bfloat16 alone. `grpo` with it, in bfloat16: how far policy
and engine are apart at sampled tokens, beside what bfloat16 itself rounds (the same model in transformers, bfloat16
against float32). Both sides round, so on average they may differ by twice as much.

| family | log-prob gap, mean | largest | rounding, mean | largest |
|---|---|---|---|---|
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class GapRow:
    """How far policy and vLLM were from each other in bfloat16, and what bfloat16 itself rounds; in nats."""

    family: str
    mean: float
    """Of the step that differs most."""
    largest: float
    noise: float
    """Mean distance of log-probs in bfloat16 to those in float32."""
    largest_noise: float

    def __str__(self) -> str:
        gaps = (self.mean, self.largest, self.noise, self.largest_noise)
        return "| " + " | ".join([self.family, *(f"{gap:.2g} nats" for gap in gaps)]) + " |"


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyRow:
    """What the runs of one family gave."""

    family: str
    sft: float
    """Nats a token from the first to the last step."""
    dpo: float
    """Share of the last step's pairs whose order was learned."""
    engine: str
    log_prob_gap: float
    """Largest difference of policy and engine over a run, in nats."""
    export_is_equal: bool
    """The logits of the export in a fresh process are those of the checkpoint, bit for bit."""
    resumed_is_equal: bool
    """A resumed run ends with the same bytes."""
    tower: str
    """unchanged; none where there is none."""

    def __str__(self) -> str:
        same = {True: "equal", False: "differs"}
        cells = (
            *(self.family, f"{self.sft:.2f} nats", f"{self.dpo:.0%}", self.engine, f"{self.log_prob_gap:.1g} nats"),
            *(same[self.export_is_equal], same[self.resumed_is_equal], self.tower),
        )
        return "| " + " | ".join(cells) + " |"


Row = FamilyRow | GapRow


def keep_row(file: Path, row: Row) -> None:
    """Write a row to a file, in place of the family's earlier one."""
    rows = {one.family: one for one in read_rows(file, type(row))} | {row.family: row}
    file.write_text("".join(json.dumps(asdict(one)) + "\n" for _, one in sorted(rows.items())))


def read_rows(file: Path, kind: type[Row]) -> list[Row]:
    """The rows of a file; none if there is none."""
    return [kind(**json.loads(line)) for line in file.read_text().splitlines()] if file.exists() else []


def sections() -> str:
    """What the page says of the kept rows."""
    kept: tuple[tuple[str, Path, type[Row]], ...] = ((HEADING, KEPT, FamilyRow), (GAPS_HEADING, KEPT_GAPS, GapRow))
    found = ((heading, read_rows(file, kind)) for heading, file, kind in kept)
    return "".join(heading + "\n".join(map(str, rows)) + "\n" for heading, rows in found if rows)

"""The commands around training: the arguments of each, and what runs it. A command's code is imported when it runs, so
help is instant."""

# ruff: noqa: PLC0415

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rlhf.cli.help import field_help, screen_width
from rlhf.config.base import Section
from rlhf.config.commands import RowKind
from rlhf.config.fields import fields_of
from rlhf.config.loading.load_tools import (
    load_bench,
    load_compare,
    load_curate,
    load_data_report,
    load_doctor,
    load_example,
    load_report,
    load_reward_try,
    load_rounds,
    load_sample,
)
from rlhf.config.tools import (
    BenchConfig,
    CompareConfig,
    CurateConfig,
    DataConfig,
    DoctorConfig,
    ExampleConfig,
    ReportConfig,
    RewardTryConfig,
    RoundsConfig,
    SampleConfig,
)

Environ = Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """A command: its usage, its settings, and what it does with its arguments."""

    usage: str
    config: type[Section]
    run: Callable[[Sequence[str], Environ], int]
    is_bare: bool = False
    """Whether it runs without arguments, instead of showing its help."""


def _sample(argv: Sequence[str], environ: Environ) -> int:
    config = load_sample(argv, environ)
    from rlhf.cli.sample import run_sample

    return run_sample(config)


def _curate(argv: Sequence[str], environ: Environ) -> int:
    config = load_curate(argv, environ)
    from rlhf.cli.curate import run_curate

    return run_curate(config)


def _rounds(argv: Sequence[str], environ: Environ) -> int:
    config = load_rounds(argv, environ)
    from rlhf.cli.rounds import run_rounds

    return run_rounds(config)


def _data(argv: Sequence[str], environ: Environ) -> int:
    config = load_data_report(argv, environ)
    from rlhf.cli.data_report import run_data_report

    return run_data_report(config)


def _bench(argv: Sequence[str], environ: Environ) -> int:
    config = load_bench(argv, environ)
    from rlhf.cli.bench_sync import run_bench_sync

    return run_bench_sync(config)


def _doctor(argv: Sequence[str], environ: Environ) -> int:
    config = load_doctor(argv, environ)
    from rlhf.cli.doctor import run_doctor

    return run_doctor(config, environ)


def _compare(argv: Sequence[str], environ: Environ) -> int:
    config = load_compare(argv, environ)
    from rlhf.cli.compare import run_compare

    return run_compare(config)


def _report(argv: Sequence[str], environ: Environ) -> int:
    config = load_report(argv, environ)
    from rlhf.cli.report import run_report

    return run_report(config)


def _reward(argv: Sequence[str], environ: Environ) -> int:
    config = load_reward_try(argv, environ)
    from rlhf.cli.reward_try import run_reward_try

    return run_reward_try(config)


def _example(argv: Sequence[str], environ: Environ) -> int:
    config = load_example(argv, environ)
    from rlhf.cli.example import run_example

    return run_example(config)


TOOLS: dict[str, Tool] = {
    "sample": Tool(usage="MODEL [CONFIG.yaml] --data.path ROWS --out SAMPLES.jsonl", config=SampleConfig, run=_sample),
    "curate": Tool(
        usage="{best-of-n,rejection,raft,rft,conditional,pairs} SAMPLES --out DATA.jsonl",
        config=CurateConfig,
        run=_curate,
    ),
    "rounds": Tool(usage="{sft,dpo} [CONFIG.yaml] --model MODEL --data.path ROWS", config=RoundsConfig, run=_rounds),
    "data": Tool(usage=f"{{{','.join(RowKind)}}} --data.path ROWS", config=DataConfig, run=_data),
    "reward": Tool(usage="try {module,file.py}:FUNCTION --data.path ROWS", config=RewardTryConfig, run=_reward),
    "bench": Tool(usage="sync [CONFIG.yaml]", config=BenchConfig, run=_bench),
    "report": Tool(usage="RUN [RUN ...]", config=ReportConfig, run=_report),
    "compare": Tool(usage="RUN RUN [RUN ...]", config=CompareConfig, run=_compare),
    "example": Tool(usage="stories", config=ExampleConfig, run=_example),
    "doctor": Tool(usage="[RUN]", config=DoctorConfig, run=_doctor, is_bare=True),
}


def run_tool(verb: str, argv: Sequence[str]) -> int:
    """Run `rlhf VERB ARGV`. Raises RlhfError."""
    return TOOLS[verb].run(argv, os.environ)


def tool_help(verb: str) -> str:
    """Help of `rlhf VERB`: every flag."""
    tool = TOOLS[verb]
    about = (tool.config.__doc__ or "").strip()
    fields = "\n".join(field_help(field, screen_width()) for field in fields_of(tool.config))
    return f"Usage: rlhf {verb} {tool.usage} [options]\n\n{about}\n\n{fields}"

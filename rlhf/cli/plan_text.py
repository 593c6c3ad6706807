"""A plan for people, and for programs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from string import ascii_uppercase

from rich.console import Console
from rich.table import Table

from rlhf.planning.edits import as_flags
from rlhf.planning.hardware import GIB
from rlhf.planning.memory import Memory
from rlhf.planning.model_shape import ModelShape
from rlhf.planning.plan import GroupPlan, Plan
from rlhf.planning.suggest import Suggestion
from rlhf.terminal import counted
from rlhf.types import Json

BAR = 30
FREE = "·"


def show_plan(console: Console, command: str, plan: Plan, advice: Sequence[str], *, others: Sequence[str] = ()) -> None:
    """The placement as a drawing, memory by phase, seconds by phase, `others` that run beside it, and advice."""
    used = f"{plan.placement.num_devices} of {counted(plan.cluster.num_devices, 'device')}"
    console.print(f"[bold]{command}[/bold] on {plan.cluster}: {used} in {counted(len(plan.groups), 'group')}")
    for roles, shape in _models(plan).items():
        active = f", {_count(shape.num_active_parameters)} of them active for a token"
        is_sparse = shape.num_active_parameters < shape.num_parameters
        console.print(f"  {roles}: {_count(shape.num_parameters)} parameters{active if is_sparse else ''}")
    console.print(_drawing(plan))
    console.print(_memory(plan))
    for group in plan.groups:
        line = f"  {_letter(plan, group)} {group.group.name} peaks in {group.peak_phase}: {_parts(group)}"
        console.print(line, soft_wrap=True)
    for node in range(plan.cluster.num_nodes):
        held, more = plan.host_bytes(node), plan.storing_bytes(node)
        if held or more:
            room = plan.cluster.host_gib_per_node
            text = f"holds {held / GIB:.1f} GiB in host memory, and {more / GIB:.1f} more while it resumes or exports"
            console.print(f"  node {node} {text}, of {room:.0f}", soft_wrap=True)
    console.print(
        f"  micro-batches, and sequences, of up to {plan.fitting_tokens:,} tokens fit; this run has up to "
        f"{plan.work.micro_batch_tokens:,}",
        soft_wrap=True,
    )
    console.print(_times(plan))
    console.print(
        f"  a step of {counted(plan.work.learned, 'sequence')} of {plan.work.sequence_tokens:,.0f} tokens takes "
        f"{plan.step_s:,.1f} s: {plan.tokens_per_s:,.0f} tokens/s; devices idle {plan.idle_share:.0%} of it",
        soft_wrap=True,
    )
    for line in others:
        console.print(f"  {line}", markup=False, soft_wrap=True)
    for line in advice:
        console.print(f"  ! {line}", markup=False, soft_wrap=True)


def show_suggestions(console: Console, plan: Plan, found: Sequence[Suggestion]) -> None:
    """The best placements that a search found, and why."""
    if not found:
        faster = "No faster placement was found: this one is as good as any."
        console.print(faster if plan.fits else "No placement of this run fits on the cluster.")
        return
    console.print("\n[bold]Suggestions[/bold]")
    for rank, suggestion in enumerate(found, 1):
        other = suggestion.plan
        console.print(
            f"{rank}. {other.step_s:,.1f} s a step ({plan.step_s / other.step_s:.2f} x), {other.placement.num_devices} "
            f"devices, idle {other.idle_share:.0%}: {_reason(other)}",
            soft_wrap=True,
        )
        console.print(f"   {as_flags(suggestion.edits)}", markup=False, soft_wrap=True)


def as_json(plan: Plan, found: Sequence[Suggestion]) -> dict[str, Json]:
    """The plan as JSON: bytes and seconds."""
    return {
        "cluster": str(plan.cluster),
        "num_devices": plan.placement.num_devices,
        "fits": plan.fits,
        "models": {
            str(role): {"parameters": shape.num_parameters, "active_parameters": shape.num_active_parameters}
            for role, shape in plan.shapes.items()
        },
        "groups": [_group_json(group) for group in plan.groups],
        "seconds": dict(plan.seconds),
        "step_s": plan.step_s,
        "tokens_per_s": plan.tokens_per_s,
        "idle_share": plan.idle_share,
        "fitting_tokens": plan.fitting_tokens,
        "suggestions": [
            {"flags": as_flags(suggestion.edits), "step_s": suggestion.plan.step_s} for suggestion in found
        ],
    }


def _group_json(group: GroupPlan) -> dict[str, Json]:
    return {
        "roles": [str(role) for role in group.group.roles],
        "num_devices": group.group.shape.num_devices,
        "nodes": [bundle.node for bundle in group.bundles],
        "bytes": {phase: round(total) for phase, total in group.totals.items()},
        "peak_phase": group.peak_phase,
        "capacity": round(group.capacity),
        "host_bytes": round(group.host_bytes),
        "exporting_bytes": round(group.exporting_bytes),
        "resuming_bytes": round(group.resuming_bytes),
        "seconds": dict(group.seconds),
    }


def _models(plan: Plan) -> dict[str, ModelShape]:
    """The sizes of the run's models, by the names of the roles that share one."""
    roles: dict[ModelShape, list[str]] = {}
    for role, shape in plan.shapes.items():
        roles.setdefault(shape, []).append(str(role))
    return {", ".join(names): shape for shape, names in roles.items()}


def _count(number: float) -> str:
    """A number of parameters, in three digits."""
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:,.0f}"


def _letter(plan: Plan, group: GroupPlan) -> str:
    return ascii_uppercase[plan.groups.index(group)]


def _drawing(plan: Plan) -> Table:
    """A row for each node, or for several equal nodes; a letter for each device."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2))
    rows: list[tuple[int, int, str]] = []
    for node in range(plan.cluster.num_nodes):
        letters = "".join(
            _letter(plan, group) * bundle.num_devices
            for group in plan.groups
            for bundle in group.bundles
            if bundle.node == node
        )
        devices = " ".join(letters.ljust(plan.cluster.devices_per_node, FREE))
        if rows and rows[-1][2] == devices:
            rows[-1] = (rows[-1][0], node, devices)
        else:
            rows.append((node, node, devices))
    for first, last, devices in rows:
        table.add_row(f"  node {first}" if first == last else f"  nodes {first}-{last}", devices)
    for group in plan.groups:
        table.add_row("", f"{_letter(plan, group)} = {group.group.name}")
    return table


def _memory(plan: Plan) -> Table:
    phases = list(plan.groups[0].memory)
    table = Table(title="GiB of one device, by phase", title_justify="left", title_style="", box=None, padding=(0, 2))
    table.add_column("")
    for phase in phases:
        table.add_column(phase, justify="right")
    table.add_column("has", justify="right")
    for group in plan.groups:
        cells = []
        for phase in phases:
            text = f"{group.totals[phase] / GIB:.1f}"
            style = ("bold red" if not group.fits else "bold") if phase == group.peak_phase else ""
            cells.append(f"[{style}]{text}[/]" if style else text)
        table.add_row(f"  {_letter(plan, group)}", *cells, f"{group.capacity / GIB:.1f}")
    return table


def _parts(group: GroupPlan) -> str:
    """What uses a device's memory at the group's peak, largest first."""
    sums: dict[str, float] = {}
    for role, held in group.memory[group.peak_phase].items():
        for name, amount in _named(held).items():
            label = name if len(group.memory[group.peak_phase]) == 1 or name == "process" else f"{role} {name}"
            sums[label] = sums.get(label, 0.0) + amount
    largest = sorted(sums.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {amount / GIB:.1f}" for name, amount in largest if amount / GIB >= 0.05)


def _named(held: Memory) -> Mapping[str, float]:
    return {name.replace("_", " "): amount for name, amount in asdict(held).items()}


def _times(plan: Plan) -> Table:
    table = Table(title="Seconds of a step", title_justify="left", title_style="", box=None, padding=(0, 2))
    for name in ("", "s", ""):
        table.add_column(name, justify="right" if name else "left")
    longest = max(plan.seconds.values())
    for phase, seconds in plan.seconds.items():
        if seconds:
            table.add_row(phase, f"{seconds:,.1f}", "█" * max(1, round(BAR * seconds / longest)))
    return table


def _reason(plan: Plan) -> str:
    """The groups, and the phase that takes longest."""
    groups = ", ".join(f"{group.group.name} {group.group.shape.num_devices}" for group in plan.groups)
    slowest = max(plan.seconds, key=lambda phase: plan.seconds[phase])
    return f"{groups}; {slowest} takes {plan.seconds[slowest] / plan.step_s:.0%}"

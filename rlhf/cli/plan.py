"""`rlhf plan`: what a run would look like on a cluster, from its config and its models' config.json files alone."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from rlhf.algorithms.needs import needs_of
from rlhf.cli.detect_cluster import detect_cluster
from rlhf.cli.plan_text import as_json, show_plan, show_suggestions
from rlhf.config.commands import OnlineConfig, TrainConfig
from rlhf.config.json_file import ModelFileError
from rlhf.config.model_files import described_folder, read_config_json
from rlhf.config.tools import PlanConfig
from rlhf.engines.models.hub import HUB_TIMEOUT_S
from rlhf.errors import ConfigError, ModelError
from rlhf.planning.advice import advice_on, episode_processes
from rlhf.planning.calibration import NONE, Calibration
from rlhf.planning.edits import as_flags
from rlhf.planning.fixes import Planner, suggest_fixes, suggest_placement_fixes
from rlhf.planning.hardware import parse_cluster
from rlhf.planning.plan import Plan
from rlhf.planning.planner import plan_run
from rlhf.planning.roles import local_config_json, place, sections, shapes_of
from rlhf.planning.suggest import suggest
from rlhf.planning.workload import Lengths
from rlhf.terminal import rich_console, tell, write

CALIBRATION = "calibration.json"
"""File that `--calibrate` writes to a run's folder."""


def config_json(model: str, where: str) -> Mapping[str, object]:
    """Like `local_config_json`; a hub model downloads its config.json alone. Raises ModelError."""
    try:
        if described_folder(model, os.environ) is None:
            return read_config_json(_downloaded(model, where))
    except ModelFileError as error:
        raise ModelError(f"{where}: {error}") from error
    return local_config_json(model, where)


def _downloaded(model: str, where: str) -> Path:
    """The folder of a hub model's config.json. Raises ModelError."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415  slow to import
    from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415

    tell([f"rlhf: {model} is not here; asking the hub for its config.json."])
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it logs every attempt
    try:
        return Path(snapshot_download(model, allow_patterns=["config.json"], etag_timeout=HUB_TIMEOUT_S))
    except (OSError, HfHubHTTPError) as error:
        text = f"{where}: {model} is not here, and the hub gave no config.json. Name a folder that holds one."
        raise ModelError(text) from error


def unplaced(error: ConfigError, config: TrainConfig, planner: Planner) -> ConfigError:
    """What does not fit where, and the nearest settings that can be placed."""
    edits = suggest_placement_fixes(config, planner)
    advice = (
        f"This can be placed: {as_flags(edits)}" if edits else "Ask for fewer devices, or merge roles with --colocate."
    )
    return ConfigError([*error.problems, f"placement: {advice}"])


def run_plan(command: str, config: TrainConfig, options: PlanConfig) -> int:
    """Print the plan of a resolved config. The exit code is that of a wrong config if the run does not fit.

    Raises:
        ConfigError: the placement finds no room on the cluster.
        ModelError: a model's size is unknown.
    """
    needs = needs_of(config.algo)
    cluster = (
        detect_cluster(config, place(config, needs)) if options.cluster is None else parse_cluster(options.cluster)
    )
    shapes = shapes_of(config, needs, config_json)
    roles = tuple(sections(config, needs))
    calibration = NONE if options.calibration is None else Calibration.read(Path(options.calibration) / CALIBRATION)
    lengths = Lengths(prompt=options.prompt_tokens, response=options.response_tokens)

    def planner(candidate: TrainConfig) -> Plan:
        return plan_run(candidate, needs, shapes, cluster, lengths=lengths, calibration=calibration)

    if options.suggest and not config.is_online:
        raise ConfigError(f"--suggest: {command} has no placements to search, since it does not sample. Leave it out.")
    try:
        plan = planner(config)
    except ConfigError as error:
        raise unplaced(error, config, planner) from error
    edits = None if plan.fits else suggest_fixes(config, planner)
    found = suggest(config, planner, cluster, roles) if options.suggest and isinstance(config, OnlineConfig) else []
    if plan.fits:
        found = [suggestion for suggestion in found if suggestion.plan.step_s < plan.step_s]
    if options.as_json:
        write(json.dumps(as_json(plan, found), indent=1) + "\n")
    else:
        console = rich_console()
        others = episode_processes(config)
        show_plan(console, command, plan, advice_on(plan, config, edits), others=others)
        if options.suggest:
            show_suggestions(console, plan, found)
    return 0 if plan.fits else ConfigError.exit_code

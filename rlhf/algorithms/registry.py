"""The algorithms, by the type of their config sections."""

from collections.abc import Callable, Mapping

from rlhf.algorithms.base import Algorithm
from rlhf.algorithms.custom import custom
from rlhf.algorithms.dpo import DPO
from rlhf.algorithms.grpo import CISPO, DAPO, GRPO, GSPO, DrGRPO
from rlhf.algorithms.kto import KTO
from rlhf.algorithms.nash_md import NashMD
from rlhf.algorithms.online_dpo import OnlineDPO
from rlhf.algorithms.online_kto import OnlineKTO
from rlhf.algorithms.ppo import PPO
from rlhf.algorithms.prm import PRM
from rlhf.algorithms.reinforce import Reinforce, ReinforceBaseline
from rlhf.algorithms.remax import ReMax
from rlhf.algorithms.rloo import RLOO
from rlhf.algorithms.rm import RM
from rlhf.algorithms.sft import SFT

ALGORITHMS: Mapping[str, Callable[..., Algorithm]] = {
    "sft": SFT,
    "rm": RM,
    "prm": PRM,
    "ppo": PPO,
    "grpo": GRPO,
    "rloo": RLOO,
    "reinforce++": Reinforce,
    "reinforce++-baseline": ReinforceBaseline,
    "remax": ReMax,
    "dr-grpo": DrGRPO,
    "dapo": DAPO,
    "gspo": GSPO,
    "cispo": CISPO,
    "dpo": DPO,
    "online-dpo": OnlineDPO,
    "nash-md": NashMD,
    "kto": KTO,
    "online-kto": OnlineKTO,
    "custom": custom,
}
"""Section type -> algorithm, made from its section alone."""

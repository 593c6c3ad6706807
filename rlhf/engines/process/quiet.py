"""The chatter of libraries, turned off: what a run says is for the run to say."""

import os
from logging import ERROR, getLogger

import torch
from transformers.utils import logging


def quiet_libraries() -> None:
    """No progress bars and load reports of transformers, no guess of DeepSpeed's at the accelerator, no offer of
    bitsandbytes' to fetch kernels of others, and no line for each attempt to reach the hub."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    for library in ("bitsandbytes", "huggingface_hub"):
        getLogger(library).setLevel(ERROR)

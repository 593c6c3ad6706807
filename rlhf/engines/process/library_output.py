"""Turns off the console output of libraries, so that a run's own output stays readable."""

import os
from logging import ERROR, getLogger

import torch
from transformers.utils import logging


def silence_libraries() -> None:
    """Turn off transformers' progress bars and load reports, DeepSpeed's accelerator message, bitsandbytes' hints about
    other kernels, and the log line for each request to the hub."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    for library in ("bitsandbytes", "huggingface_hub"):
        getLogger(library).setLevel(ERROR)

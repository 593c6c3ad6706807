"""Requests to the model hub that the hub's own library sends again, which it only logs."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from rlhf.repair import Repair, Repaired, RepairKind

LOGGER = "huggingface_hub.utils._http"
MARK = "[Retry "
"""What the library's line about another try contains."""


class _Retries(logging.Handler):
    """Tells of each try, without the library's words: these contain whole addresses, which may be signed."""

    def __init__(self, repaired: Repaired) -> None:
        super().__init__(logging.WARNING)
        self._repaired = repaired

    def emit(self, record: logging.LogRecord) -> None:
        if MARK in record.getMessage():
            text = "hub: a request to the model hub failed and was sent again"
            self._repaired(Repair(kind=RepairKind.DOWNLOAD, where="hub", text=text))


@contextmanager
def telling_hub_retries(repaired: Repaired) -> Iterator[None]:
    """Inside, `repaired` is told of each request to the hub that is sent again, however quiet the library is."""
    logger, handler = logging.getLogger(LOGGER), _Retries(repaired)
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before

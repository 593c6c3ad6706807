"""When each bucket of a weight sync was gathered and sent."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from rlhf.engines.weight_sync.gloo import GlooSender
from rlhf.engines.weight_sync.source import Gather

WIDTH = 80
POLL_S = 0.0005


@dataclass
class Span:
    """From the start of some transfers to the end of the last."""

    bucket: int
    what: str
    works: Sequence[dist.Work]
    start_s: float = field(default_factory=time.perf_counter)
    end_s: float | None = None


class TimelineSender(GlooSender):
    """The product's sender; `watched` sends once more and looks when its transfers begin and end."""

    _spans: list[Span] | None = None

    def watched(self, version: int) -> str:
        """Send, and draw what happened."""
        spans: list[Span] = []
        self._spans = spans
        with watching(spans):
            start_s = time.perf_counter()
            self.send(version)
        self._spans = None
        return draw(spans, start_s)

    def _gather(self, index: int) -> Gather:
        gather = super()._gather(index)
        if self._spans is not None:
            self._spans.append(Span(index, "gather", list(getattr(gather, "_works", []))))
        return gather

    def _broadcast(self, buffer: torch.Tensor) -> dist.Work:
        work = super()._broadcast(buffer)
        if self._spans is not None:
            num_sent = sum(span.what == "send" for span in self._spans)
            self._spans.append(Span(num_sent, "send", [work]))
        return work


@contextmanager
def watching(spans: Sequence[Span]) -> Iterator[None]:
    """Inside, a thread looks for transfers that have ended."""
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(POLL_S):
            for span in list(spans):
                if span.end_s is None and all(work.is_completed() for work in span.works):
                    span.end_s = time.perf_counter()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        time.sleep(10 * POLL_S)
        is_over.set()
        thread.join()


def draw(spans: Sequence[Span], start_s: float) -> str:
    """A line a transfer."""
    total_s = max(span.end_s or start_s for span in spans) - start_s
    lines = [f"{'':>16}  0 {'':{WIDTH - 12}} {total_s:7.3f} s"]
    for span in spans:
        assert span.end_s is not None, f"{span.what} of bucket {span.bucket} did not end"
        first, last = (round(WIDTH * (at - start_s) / total_s) for at in (span.start_s, span.end_s))
        bar = " " * first + ("=" if span.what == "gather" else "#") * max(1, last - first)
        lines.append(f"{span.what:>8} {span.bucket + 1:7d}  {bar}")
    return "\n".join(lines)

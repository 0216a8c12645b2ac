"""What each request came to: into the metrics, the ledger and the access log, in one call."""

from __future__ import annotations

from typing import Protocol

from sutazai.core.request import Request, Usage
from sutazai.telemetry.logs import AccessLog
from sutazai.telemetry.metrics import Metrics


class Ledger(Protocol):
    """Where usage is added up."""

    def note(self, key_id: str, tenant: str, model: str, *, error: bool, input_tokens: int, output_tokens: int) -> None:
        """Count one request."""


class Accounts:
    """Notes every inference request once, at its end."""

    def __init__(self, metrics: Metrics, ledger: Ledger, access_log: AccessLog | None) -> None:
        self._metrics = metrics
        self._ledger = ledger
        self._access_log = access_log

    def note(
        self,
        request: Request,
        node: str,
        status: int,
        now: float,
        first_at: float,
        chunks: int,
        usage: Usage | None,
        error: str,
    ) -> None:
        """
        Count a request.

        Args:
            node: empty where none was reached; then the model is not a label either, for clients choose that name.
            status: what the client got; 499 where it left.
            now: monotonic seconds, as is `first_at`, which is 0.0 where nothing was answered.
            chunks: parts of the answer, the estimate of its tokens where a stream did not tell its usage.
        """
        duration_s = now - request.arrived_at
        ttft_s = first_at - request.arrived_at if first_at else None
        input_tokens, output_tokens = 0, 0
        if usage is not None:
            input_tokens, output_tokens = usage.input_tokens, usage.output_tokens
        elif request.stream:
            output_tokens = chunks
        series = self._metrics.series(node, request.model if node else "")
        series.statuses[status] = series.statuses.get(status, 0) + 1
        series.duration.observe(duration_s)
        series.input_tokens += input_tokens
        series.output_tokens += output_tokens
        if ttft_s is not None:
            series.ttft.observe(ttft_s)
            if request.stream and output_tokens > 1:
                series.per_token.observe((now - first_at) / (output_tokens - 1))
        failed = status >= 400
        self._ledger.note(
            request.key_id,
            request.tenant,
            request.model if node else "",
            error=failed,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
        )
        if self._access_log is not None:
            self._access_log.note(request, node, status, duration_s, ttft_s, (input_tokens, output_tokens), error)

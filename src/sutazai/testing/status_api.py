"""Health, metrics and slots: what vLLM and llama.cpp tell of themselves outside OpenAI's API."""

from __future__ import annotations

from collections.abc import Mapping

from sutazai.testing.machine import Inference, Machine, Other
from sutazai.testing.received import Received
from sutazai.testing.steps import Steps, document, whole

METRICS_TYPE = "text/plain; version=0.0.4"


class VllmStatus:
    """vLLM's own addresses."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def inference(self) -> Mapping[str, Inference]:
        """None."""
        return {}

    def other(self) -> Mapping[tuple[str, str], Other]:
        """By method and path."""
        return {
            ("GET", "/health"): lambda _: whole(200, "", b""),
            ("GET", "/version"): lambda _: document(200, {"version": "0.11.0"}),
            ("GET", "/metrics"): self._metrics,
        }

    def _metrics(self, _: Received) -> Steps:
        tally, labels = self._machine.tally, f'{{engine="0",model_name="{self._machine.models[0]}"}}'
        text = (
            _gauge("vllm:num_requests_running", labels, tally.active)
            + _gauge("vllm:num_requests_waiting", labels, tally.waiting)
            + _gauge("vllm:kv_cache_usage_perc", labels, min(1.0, tally.active / self._machine.slots))
        )
        return whole(200, METRICS_TYPE, text.encode())


class LlamaCppStatus:
    """llama.cpp's own addresses."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def inference(self) -> Mapping[str, Inference]:
        """None."""
        return {}

    def other(self) -> Mapping[tuple[str, str], Other]:
        """By method and path."""
        return {
            ("GET", "/health"): lambda _: document(200, {"status": "ok"}),
            ("GET", "/props"): self._props,
            ("GET", "/slots"): self._slots,
            ("GET", "/metrics"): self._metrics,
        }

    def _props(self, _: Received) -> Steps:
        props = {
            "default_generation_settings": {"n_ctx": self._machine.context_tokens},
            "total_slots": self._machine.slots,
            "model_alias": self._machine.models[0],
            "model_path": f"/models/{self._machine.models[0]}.gguf",
            "build_info": "b0-unknown",
        }
        return document(200, props)

    def _slots(self, _: Received) -> Steps:
        active, context = self._machine.tally.active, self._machine.context_tokens
        slots = [
            {"id": number, "n_ctx": context, "speculative": False, "is_processing": number < active}
            for number in range(self._machine.slots)
        ]
        return document(200, slots)

    def _metrics(self, _: Received) -> Steps:
        tally = self._machine.tally
        text = _gauge("llamacpp:requests_processing", "", tally.active) + _gauge(
            "llamacpp:requests_deferred", "", tally.waiting
        )
        return whole(200, METRICS_TYPE, text.encode())


def _gauge(name: str, labels: str, value: float) -> str:
    return f"# TYPE {name} gauge\n{name}{labels} {value}\n"

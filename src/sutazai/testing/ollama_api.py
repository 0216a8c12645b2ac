"""What answers below `/api` on an Ollama, as far as clients and gateways use it; the forms are in `ollama_forms`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta

import msgspec

from sutazai.testing.machine import Inference, Machine, Other, size_bytes, vector, words
from sutazai.testing.ollama_forms import (
    NDJSON_TYPE,
    Body,
    Options,
    Talk,
    common,
    described,
    listed,
    ndjson,
    progress,
)
from sutazai.testing.received import Received
from sutazai.testing.script import Answer
from sutazai.testing.steps import End, Head, LoadOptions, Part, Steps, TakeSlot, document, pause, whole

VERSION = "0.11.0"


class OllamaApi:
    """What answers below `/api`."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def inference(self) -> Mapping[str, Inference]:
        """By path; the method is POST."""
        return {
            "/api/chat": _on_body(self._chat),
            "/api/generate": _on_body(self._generate),
            "/api/embed": _on_body(self._embed),
            "/api/embeddings": _on_body(self._embeddings),
        }

    def other(self) -> Mapping[tuple[str, str], Other]:
        """By method and path."""
        return {
            ("GET", "/"): _greet,
            ("HEAD", "/"): _greet,
            ("GET", "/api/version"): lambda _: document(200, {"version": VERSION}),
            ("GET", "/api/tags"): self._tags,
            ("GET", "/api/ps"): self._ps,
            ("POST", "/api/show"): _on_plain_body(self._show),
            ("POST", "/api/pull"): _on_plain_body(self._pull),
            ("DELETE", "/api/delete"): _on_plain_body(self._delete),
            ("POST", "/api/copy"): _on_plain_body(self._copy),
        }

    def _chat(self, body: Body, answer: Answer) -> Steps:
        prompt = " ".join(message.content or "" for message in body.messages)
        return self._talk(body, prompt, answer, chat=True, empty=not body.messages)

    def _generate(self, body: Body, answer: Answer) -> Steps:
        prompt = f"{body.system or ''} {body.prompt or ''}"
        return self._talk(body, prompt, answer, chat=False, empty=not body.prompt)

    def _talk(self, body: Body, prompt: str, answer: Answer, *, chat: bool, empty: bool) -> Steps:
        if not body.model:
            return document(400, {"error": "model is required"})
        if not self._machine.has(body.model):
            return _missing(body.model)
        if empty and body.drops_model:
            self._machine.capacity.unload(self._machine.wire_name(body.model))
            return document(200, common(body.model, chat, "") | {"done": True, "done_reason": "unload"})
        if empty:
            return self._load_only(body, chat=chat)
        talk = Talk(body, words(prompt), answer, chat=chat)
        steps = talk.streamed() if body.stream is not False else talk.whole()
        return self._on_slot(body, steps)

    def _on_slot(self, body: Body, steps: Steps) -> Steps:
        yield self._slot(body)
        yield from steps

    def _load_only(self, body: Body, *, chat: bool) -> Steps:
        yield self._slot(body)
        yield from document(200, common(body.model, chat, "") | {"done": True, "done_reason": "load"})

    def _slot(self, body: Body) -> TakeSlot:
        options = body.options or Options()
        others = (options.num_batch, options.num_gpu, options.main_gpu, options.num_thread, options.use_mmap)
        wish = LoadOptions(
            options.num_ctx or self._machine.context_tokens,
            others if any(other is not None for other in others) else (),
        )
        return TakeSlot(self._machine.wire_name(body.model), wish, keep_loaded=not body.drops_model)

    def _embed(self, body: Body, answer: Answer) -> Steps:
        texts = (body.input,) if isinstance(body.input, str) else body.input
        result = {
            "model": body.model,
            "embeddings": [vector(text) for text in texts],
            "total_duration": 1_000_000,
            "load_duration": 1_000,
            "prompt_eval_count": sum(words(text) for text in texts),
        }
        return self._embedded(body, result, answer)

    def _embeddings(self, body: Body, answer: Answer) -> Steps:
        return self._embedded(body, {"embedding": vector(body.prompt) if body.prompt else []}, answer)

    def _embedded(self, body: Body, result: object, answer: Answer) -> Steps:
        if not self._machine.has(body.model):
            yield from _missing(body.model)
            return
        yield self._slot(body)
        yield from pause(answer.first_token_s)
        yield from document(200, result)

    def _tags(self, _: Received) -> Steps:
        return document(200, {"models": [listed(model) for model in self._machine.models]})

    def _ps(self, _: Received) -> Steps:
        expires_at = (datetime.now(UTC) + timedelta(minutes=5)).isoformat()
        running = [
            listed(model) | {"expires_at": expires_at, "size_vram": size_bytes(model), "context_length": context}
            for model, context in self._machine.capacity.loaded().items()
        ]
        return document(200, {"models": running})

    def _show(self, body: Body) -> Steps:
        model = body.model or body.name
        if not self._machine.has(model):
            return _missing(model)
        return document(200, described(model))

    def _pull(self, body: Body) -> Steps:
        if body.stream is False:
            return self._pulled_whole(body.model or body.name)
        return self._pulled(body.model or body.name)

    def _pulled(self, model: str) -> Steps:
        yield Head(200, NDJSON_TYPE)
        yield Part(ndjson({"status": "pulling manifest"}))
        if not self._can_pull(model):
            yield Part(ndjson({"error": "pull model manifest: file does not exist"}))
            yield End()
            return
        for record in progress(self._machine.wire_name(model)):
            yield from pause(self._machine.pull_s / 5)
            yield Part(ndjson(record))
        for status in ("verifying sha256 digest", "writing manifest", "success"):
            if status == "success":
                self._machine.add(model)
            yield Part(ndjson({"status": status}))
        yield End()

    def _pulled_whole(self, model: str) -> Steps:
        if not self._can_pull(model):
            yield from document(500, {"error": "pull model manifest: file does not exist"})
            return
        yield from pause(self._machine.pull_s)
        self._machine.add(model)
        yield from document(200, {"status": "success"})

    def _can_pull(self, model: str) -> bool:
        registry = self._machine.registry
        return registry is None or self._machine.wire_name(model) in map(self._machine.wire_name, registry)

    def _delete(self, body: Body) -> Steps:
        model = body.model or body.name
        if not self._machine.has(model):
            return _missing(model)
        self._machine.remove(model)
        return whole(200, "", b"")

    def _copy(self, body: Body) -> Steps:
        if not self._machine.has(body.source):
            return _missing(body.source)
        self._machine.add(body.destination)
        return whole(200, "", b"")


def _on_body(handler: Callable[[Body, Answer], Steps]) -> Inference:
    """The handler, fed with the decoded body. Ollama reads JSON whatever the content type says."""

    def answered(received: Received, answer: Answer) -> Steps:
        try:
            body = msgspec.json.decode(received.body, type=Body)
        except msgspec.DecodeError as error:
            return document(400, {"error": str(error)})
        return handler(body, answer)

    return answered


def _on_plain_body(handler: Callable[[Body], Steps]) -> Other:
    read = _on_body(lambda body, _: handler(body))
    return lambda received: read(received, Answer())


def _greet(_: Received) -> Steps:
    return whole(200, "text/plain; charset=utf-8", b"Ollama is running")


def _missing(model: str) -> Steps:
    return document(404, {"error": f"model '{model}' not found"})

"""
The forms of Ollama's own API: what requests hold, what answers look like, whole and line by line.

Source: Ollama's `docs/api.md` and `api/types.go`; shapes as version 0.11 sends them.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import msgspec

from sutazai.testing.machine import digest, limited, size_bytes
from sutazai.testing.script import Answer
from sutazai.testing.steps import End, Head, Part, Steps, document, pause

NDJSON_TYPE = "application/x-ndjson"
DETAILS = {
    "parent_model": "",
    "format": "gguf",
    "family": "llama",
    "families": ["llama"],
    "parameter_size": "8.0B",
    "quantization_level": "Q4_K_M",
}


class Options(msgspec.Struct, frozen=True):
    """The options that matter here; all but the last force a reload when they change."""

    num_ctx: int | None = None
    num_batch: int | None = None
    num_gpu: int | None = None
    main_gpu: int | None = None
    num_thread: int | None = None
    use_mmap: bool | None = None
    num_predict: int | None = None


class Message(msgspec.Struct, frozen=True):
    """One message of a chat."""

    role: str = ""
    content: str | None = ""


class Body(msgspec.Struct, frozen=True):
    """Any request; each address has its own few of these fields."""

    model: str = ""
    name: str = ""
    """The older word for `model`."""
    source: str = ""
    destination: str = ""
    messages: tuple[Message, ...] = ()
    prompt: str | None = ""
    system: str | None = ""
    input: str | tuple[str, ...] = ()
    stream: bool | None = True
    logprobs: bool | None = False
    keep_alive: float | str | None = None
    options: Options | None = None

    @property
    def drops_model(self) -> bool:
        """The client wants the model out of memory after this."""
        return self.keep_alive in {0, "0", "0s", "0m"}


class Talk:
    """One chat or completion."""

    def __init__(self, body: Body, prompt_words: int, answer: Answer, *, chat: bool) -> None:
        self._body = body
        self._prompt_words = prompt_words
        self._answer = answer
        self._chat = chat
        self._tokens, self._cut_short = limited(answer, (body.options or Options()).num_predict)

    def streamed(self) -> Steps:
        """One line for each token."""
        yield from pause(self._answer.first_token_s)
        yield Head(200, NDJSON_TYPE)
        for number, record in enumerate(self._records()):
            if number:
                yield from pause(self._answer.between_s)
            yield Part(ndjson(record), is_token=True)
        yield Part(ndjson(common(self._body.model, self._chat, "") | self._ending()))
        yield End()

    def whole(self) -> Steps:
        """All in one piece, after the same time."""
        answer = self._answer
        count = len(answer.thinking) + len(self._tokens)
        yield from pause(answer.first_token_s + answer.between_s * max(0, count - 1))
        record = common(self._body.model, self._chat, "".join(self._tokens), "".join(answer.thinking))
        if self._chat and answer.tool_calls:
            record["message"]["tool_calls"] = self._calls()
        yield from document(200, record | self._logprobs(self._tokens) | self._ending())

    def _records(self) -> Iterable[dict[str, Any]]:
        for thought in self._answer.thinking:
            yield common(self._body.model, self._chat, "", thought) | {"done": False}
        for token in self._tokens:
            yield common(self._body.model, self._chat, token) | self._logprobs((token,)) | {"done": False}
        for call in self._calls() if self._chat else ():
            record = common(self._body.model, self._chat, "") | {"done": False}
            record["message"]["tool_calls"] = [call]
            yield record

    def _calls(self) -> list[dict[str, object]]:
        return [
            {"function": {"index": index, "name": call.name, "arguments": call.arguments}}
            for index, call in enumerate(self._answer.tool_calls)
        ]

    def _logprobs(self, tokens: Iterable[str]) -> dict[str, object]:
        if not self._body.logprobs:
            return {}
        return {"logprobs": [{"token": token, "logprob": -0.5, "top_logprobs": []} for token in tokens]}

    def _ending(self) -> dict[str, object]:
        """What the last line says."""
        answer = self._answer
        ending: dict[str, object] = {"done": True, "done_reason": "length" if self._cut_short else "stop"}
        if not self._chat:
            ending["context"] = [1, 2, 3]
        count = len(answer.thinking) + len(self._tokens)
        eval_s = answer.between_s * count
        if not answer.tells_usage:
            return ending
        return ending | {
            "total_duration": int((answer.first_token_s + eval_s) * 1e9) + 3_000,
            "load_duration": 1_000,
            "prompt_eval_count": self._prompt_words if answer.prompt_tokens is None else answer.prompt_tokens,
            "prompt_eval_duration": int(answer.first_token_s * 1e9) + 1_000,
            "eval_count": count,
            "eval_duration": int(eval_s * 1e9) + 1_000,
        }


def ndjson(record: object) -> bytes:
    """A line of a stream."""
    return msgspec.json.encode(record) + b"\n"


def common(model: str, chat: bool, text: str, thinking: str = "") -> dict[str, Any]:
    """The part that all lines of an answer have in common."""
    record: dict[str, Any] = {"model": model, "created_at": datetime.now(UTC).isoformat()}
    thoughts = {"thinking": thinking} if thinking else {}
    if chat:
        return record | {"message": {"role": "assistant", "content": text} | thoughts}
    return record | {"response": text} | thoughts


def listed(model: str) -> dict[str, object]:
    """A model as `/api/tags` lists it."""
    return {
        "name": model,
        "model": model,
        "modified_at": "2026-01-02T03:04:05Z",
        "size": size_bytes(model),
        "digest": digest(model),
        "details": DETAILS,
    }


def described(model: str) -> dict[str, object]:
    """A model as `/api/show` describes it."""
    return {
        "modelfile": f"FROM {model}",
        "parameters": 'stop "<|end|>"',
        "template": "{{ .Prompt }}",
        "details": DETAILS,
        "model_info": {
            "general.architecture": "llama",
            "general.parameter_count": 8_000_000_000,
            "llama.context_length": 131_072,
            "llama.embedding_length": 8,
        },
        "capabilities": ["completion", "tools"],
        "modified_at": "2026-01-02T03:04:05Z",
    }


def progress(model: str) -> Iterable[dict[str, object]]:
    """One layer, fetched in five parts."""
    total = size_bytes(model)
    for fifth in range(1, 6):
        yield {
            "status": f"pulling {digest(model)[:12]}",
            "digest": f"sha256:{digest(model)}",
            "total": total,
            "completed": total * fifth // 5,
        }

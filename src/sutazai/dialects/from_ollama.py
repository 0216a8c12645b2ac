"""
Answers of an Ollama node, said in the words of the OpenAI API.

A stream is translated line by line; an answer in one piece is collected and translated at its end. Calls of
tools get ids made of the request's, so that the same answer always becomes the same bytes.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from typing import Final

import msgspec
from msgspec import Raw

from sutazai.core.request import Dialect, Endpoint, Operation, Usage
from sutazai.dialects import openai_shapes as openai
from sutazai.dialects.errors import error_message, stream_error
from sutazai.dialects.framing import Collected, Lines, Untranslatable
from sutazai.dialects.logprobs import for_openai_chat, for_openai_completion
from sutazai.dialects.ollama_answers import Answer, Message, ToolCall, Vectors

SYSTEM_FINGERPRINT: Final = "fp_ollama"
_PREFIX: Final = {Operation.CHAT: "chatcmpl-", Operation.COMPLETION: "cmpl-", Operation.EMBEDDING: "embd-"}
_DONE: Final = b"data: [DONE]\n\n"


_answer = msgspec.json.Decoder(Answer)
_vectors = msgspec.json.Decoder(Vectors)
_numbers = msgspec.json.Decoder(list[float])
_encode = msgspec.json.Encoder().encode


class RepliesFromOllama:
    """
    Translates one answer; `feed` it as it comes, then `finish`.

    `feed` returns what can be sent now, often nothing. Both raise `Untranslatable`. An error in a stream is
    passed on as a last event; what comes after it is dropped.
    """

    content_type: bytes
    usage: Usage | None
    """Tokens the answer took; None until the node told."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        model: str,
        request_id: str,
        created: int,
        stream: bool,
        include_usage: bool = False,
        in_base64: bool = False,
    ) -> None:
        """
        Args:
            endpoint: the client's.
            model: the name to tell the client.
            request_id: the root of all ids in the answer.
            created: Unix seconds.
            stream: whether the client asked for a stream.
            include_usage: whether a stream ends with a chunk that tells its tokens.
            in_base64: whether embeddings are sent as base64 of little-endian float32.
        """
        self.content_type = b"text/event-stream" if stream else b"application/json"
        self.usage = None
        self._endpoint = endpoint
        self._request_id = request_id
        self._in_base64 = in_base64
        self._head = {
            "id": _PREFIX[endpoint.operation] + request_id,
            "object": "",
            "created": created,
            "model": model,
            "system_fingerprint": SYSTEM_FINGERPRINT,
        }
        self._chunks = _Chunks(self._head, endpoint.operation, request_id, include_usage) if stream else None
        self._lines = Lines()
        self._body = Collected()

    @classmethod
    def for_request(
        cls, endpoint: Endpoint, body: bytes, *, model: str, request_id: str, created: int
    ) -> RepliesFromOllama:
        """The translator for the answer to the request `body`. Raises `BadRequest`."""
        if endpoint is Endpoint.OPENAI_EMBEDDING:
            in_base64 = openai.read_embedding(body).encoding_format == "base64"
            return cls(
                endpoint,
                model=model,
                request_id=request_id,
                created=created,
                stream=False,
                in_base64=in_base64,
            )
        is_chat = endpoint is Endpoint.OPENAI_CHAT
        asked: openai.Sampling = openai.read_chat(body) if is_chat else openai.read_completion(body)
        options = asked.stream_options
        return cls(
            endpoint,
            model=model,
            request_id=request_id,
            created=created,
            stream=asked.stream is True,
            include_usage=options is not None and options.include_usage is True,
        )

    def feed(self, data: bytes) -> bytes:
        """The next piece of the node's body, split anywhere."""
        if self._chunks is None:
            self._body.add(data)
            return b""
        return b"".join([self._line(line) for line in self._lines.feed(data)])

    def finish(self) -> bytes:
        """The node's body is complete: the rest of the translated one, all of it where there is no stream."""
        if self._chunks is not None:
            rest = self._line(self._lines.rest())
            if not self._chunks.ended:
                raise Untranslatable("The answer broke off before its last line.")
            return rest
        body = self._body.take()
        if self._endpoint.operation is Operation.EMBEDDING:
            return self._embeddings(body)
        return self._whole(_decoded(body), body)

    def _line(self, line: bytes) -> bytes:
        chunks = self._chunks
        if chunks is None or chunks.ended or not line.strip():
            return b""
        answer = _decoded(line)
        if answer.done:
            self.usage = _usage(answer)
        return chunks.of(answer, line)

    def _whole(self, answer: Answer, body: bytes) -> bytes:
        if answer.error is not None:
            raise Untranslatable(error_message(body))
        if not answer.done:
            raise Untranslatable("The answer was not complete.")
        self.usage = usage = _usage(answer)
        if self._endpoint.operation is Operation.CHAT:
            kind, choice = "chat.completion", _chat_choice(answer, self._request_id)
        else:
            kind, choice = "text_completion", _text_choice(answer)
        whole = self._head | {"object": kind, "choices": [choice], "usage": usage_in_words(usage)}
        return _encode(whole)

    def _embeddings(self, body: bytes) -> bytes:
        try:
            answer = _vectors.decode(body)
            vectors = [_in_base64(vector) if self._in_base64 else vector for vector in answer.embeddings]
        except (
            msgspec.DecodeError,
            UnicodeDecodeError,
            RecursionError,
            struct.error,
            OverflowError,
        ) as error:
            raise Untranslatable(f"The embeddings could not be read: {error}") from error
        tokens = answer.prompt_eval_count or 0
        self.usage = Usage(tokens, 0)
        entries = [{"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(vectors)]
        return _encode(
            {
                "object": "list",
                "data": entries,
                "model": self._head["model"],
                "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
            }
        )


class _Chunks:
    """The lines of one stream into chunks."""

    def __init__(self, head: dict[str, object], operation: Operation, request_id: str, include_usage: bool) -> None:
        self.ended = False
        """Whether the last chunk was made: nothing may follow it."""
        self._is_chat = operation is Operation.CHAT
        self._head = head | {"object": "chat.completion.chunk" if self._is_chat else "text_completion"}
        self._request_id = request_id
        self._include_usage = include_usage
        self._begun = False
        self._calls = 0
        self._offset = 0
        """Characters answered so far, where a completion counts them for its logprobs."""

    def of(self, answer: Answer, line: bytes) -> bytes:
        """The chunks that one line becomes."""
        if answer.error is not None:
            self.ended = True
            return stream_error(Dialect.OPENAI, 502, error_message(line), "node_error")
        chunks = self._chat(answer) if self._is_chat else self._text(answer)
        if not answer.done:
            return b"".join(chunks)
        self.ended = True
        if self._include_usage:
            chunks.append(self._event([], usage_in_words(_usage(answer))))
        return b"".join([*chunks, _DONE])

    def _chat(self, answer: Answer) -> list[bytes]:
        message = answer.message or Message()
        chunks = []
        if not self._begun:
            self._begun = True
            chunks.append(self._delta({"role": "assistant", "content": ""}))
        logprobs = for_openai_chat(answer.logprobs)
        delta: dict[str, object] = {}
        if message.thinking:
            delta["reasoning_content"] = message.thinking
        if message.content or (logprobs is not None and not delta):
            delta["content"] = message.content or ""
        if delta:
            chunks.append(self._delta(delta, logprobs))
        if message.tool_calls:
            chunks.append(self._delta({"tool_calls": self._new_calls(message.tool_calls)}))
        if answer.done:
            chunks.append(self._delta({}, None, _finish_reason(answer, called=self._calls > 0)))
        return chunks

    def _text(self, answer: Answer) -> list[bytes]:
        chunks = []
        text = answer.response or ""
        if text or answer.logprobs:
            chunks.append(
                self._choice({"text": text, "index": 0}, for_openai_completion(answer.logprobs, self._offset))
            )
            self._offset += len(text)
        if answer.done:
            chunks.append(self._choice({"text": "", "index": 0}, None, _finish_reason(answer, called=False)))
        return chunks

    def _new_calls(self, calls: Sequence[ToolCall]) -> list[dict[str, object]]:
        first = self._calls
        self._calls += len(calls)
        return [{"index": first + at, **_call(call, self._request_id, first + at)} for at, call in enumerate(calls)]

    def _delta(
        self, delta: dict[str, object], logprobs: dict[str, object] | None = None, reason: str | None = None
    ) -> bytes:
        return self._choice({"index": 0, "delta": delta}, logprobs, reason)

    def _choice(
        self, choice: dict[str, object], logprobs: dict[str, object] | None = None, reason: str | None = None
    ) -> bytes:
        return self._event([choice | {"logprobs": logprobs, "finish_reason": reason}], None)

    def _event(self, choices: list[dict[str, object]], usage: dict[str, int] | None) -> bytes:
        chunk = self._head | {"choices": choices}
        if self._include_usage:
            chunk["usage"] = usage
        return b"data: " + _encode(chunk) + b"\n\n"


def usage_in_words(usage: Usage) -> dict[str, int]:
    """The `usage` of an OpenAI answer."""
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
    }


def _decoded(line: bytes) -> Answer:
    try:
        return _answer.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Untranslatable(f"The answer could not be read: {error}") from error


def _usage(answer: Answer) -> Usage:
    return Usage(answer.prompt_eval_count or 0, answer.eval_count or 0)


def _finish_reason(answer: Answer, *, called: bool) -> str:
    if answer.done_reason == "length":
        return "length"
    return "tool_calls" if called else "stop"


def _call(call: ToolCall, request_id: str, index: int) -> dict[str, object]:
    try:
        arguments = bytes(call.function.arguments).decode()
    except UnicodeDecodeError as error:
        raise Untranslatable(f"The arguments of a tool call could not be read: {error}") from error
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": f"call_{request_id}_{index}", "type": "function", "function": function}


def _chat_choice(answer: Answer, request_id: str) -> dict[str, object]:
    said = answer.message or Message()
    calls = [_call(call, request_id, index) for index, call in enumerate(said.tool_calls or ())]
    message: dict[str, object] = {"role": "assistant", "content": said.content or (None if calls else "")}
    if said.thinking:
        message["reasoning_content"] = said.thinking
    if calls:
        message["tool_calls"] = calls
    return {
        "index": 0,
        "message": message,
        "logprobs": for_openai_chat(answer.logprobs),
        "finish_reason": _finish_reason(answer, called=bool(calls)),
    }


def _text_choice(answer: Answer) -> dict[str, object]:
    return {
        "index": 0,
        "text": answer.response or "",
        "logprobs": for_openai_completion(answer.logprobs, 0),
        "finish_reason": _finish_reason(answer, called=False),
    }


def _in_base64(vector: Raw) -> str:
    """A JSON list of numbers as base64 of little-endian float32, which OpenAI's own clients ask for."""
    numbers = _numbers.decode(vector)
    return base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()

"""
Answers of an OpenAI node (vLLM, llama.cpp and their like), said in the words of the Ollama API.

Events become lines of JSON. Ollama sends a tool call only when it is complete, so the pieces of one are
collected. Durations are what was seen here, or what llama.cpp measured itself.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable, Sequence
from typing import Final

import msgspec
from msgspec import Raw

from sutazai.core.request import Dialect, Endpoint, Operation, Usage
from sutazai.dialects.errors import error_message, stream_error
from sutazai.dialects.framing import MAX_REPLY_BYTES, Collected, Events, Untranslatable
from sutazai.dialects.logprobs import Likely, for_ollama
from sutazai.dialects.openai_answers import (
    Answer,
    Embeddings,
    Message,
    Timings,
    ToolCall,
)
from sutazai.dialects.openai_shapes import QUOTE

_NS_PER_S: Final = 1_000_000_000
_NS_PER_MS: Final = 1_000_000
_FAULTS: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)

_answer = msgspec.json.Decoder(Answer)
_embeddings = msgspec.json.Decoder(Embeddings)
_arguments = msgspec.json.Decoder(dict[str, Raw])
_text = msgspec.json.Decoder(str)
_encode = msgspec.json.Encoder().encode


def load_reply(endpoint: Endpoint, model: str, created_at: str) -> bytes:
    """
    The answer to a request that only loads a model, for nodes that have theirs loaded always.

    Args:
        endpoint: one of the Ollama API.
        model: the name to tell the client.
        created_at: RFC 3339.
    """
    if endpoint is Endpoint.OLLAMA_EMBED:
        return _encode({"model": model, "embeddings": []})
    if endpoint is Endpoint.OLLAMA_EMBEDDINGS:
        return _encode({"embedding": []})
    head = {"model": model, "created_at": created_at}
    return _encode(head | _said(endpoint, Message()) | {"done": True, "done_reason": "load"})


class RepliesFromOpenAI:
    """
    Translates one answer; `feed` it as it comes, then `finish`.

    `feed` returns what can be sent now, often nothing. Both raise `Untranslatable`. An error in a stream is
    passed on as a last line; what comes after it is dropped.
    """

    content_type: bytes
    usage: Usage | None
    """Tokens the answer took; None until the node told."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        model: str,
        stream: bool,
        now: Callable[[], float],
        clock: Callable[[], str],
    ) -> None:
        """
        To be made when the request is sent: durations count from here.

        Args:
            endpoint: the client's.
            model: the name to tell the client.
            stream: whether the client gets a stream.
            now: monotonic seconds.
            clock: the time of day, as RFC 3339.
        """
        self.content_type = b"application/x-ndjson" if stream else b"application/json; charset=utf-8"
        self.usage = None
        self._endpoint = endpoint
        self._model = model
        self._clock = clock
        self._stream = stream
        self._events = Events()
        self._body = Collected()
        self._calls = _Calls()
        self._timing = _Timing(now)
        self._reason: str | None = None
        self._ended = False

    def feed(self, data: bytes) -> bytes:
        """The next piece of the node's body, split anywhere."""
        if self._stream:
            return b"".join([self._event(event) for event in self._events.feed(data)])
        self._body.add(data)
        return b""

    def finish(self) -> bytes:
        """The node's body is complete: the rest of the translated one, all of it where there is no stream."""
        if not self._stream:
            body = self._body.take()
            is_embedding = self._endpoint.operation is Operation.EMBEDDING
            return self._vectors(body) if is_embedding else self._whole(body)
        rest = b"".join([self._event(event) for event in self._events.rest()])
        if self._ended:
            return rest
        if self._reason is None:
            raise Untranslatable("The answer broke off before its end.")
        return rest + self._end()

    def _event(self, event: bytes) -> bytes:
        """The lines that one event becomes."""
        if self._ended:
            return b""
        if event.strip() == b"[DONE]":
            return self._end()
        answer = _decoded(event)
        if answer.is_error:
            self._ended = True
            return stream_error(Dialect.OLLAMA, 502, error_message(event), "node_error")
        self._count(answer)
        if not answer.choices:
            return b""
        choice = answer.choices[0]
        said = choice.said
        line = b""
        if said.content or said.thinking or said.tool_calls:
            self._timing.token()
        if said.content or said.thinking:
            logprobs = None if choice.logprobs is None else choice.logprobs.likely()
            line = self._line(_said(self._endpoint, said), logprobs)
        self._calls.add(said.tool_calls or ())
        if choice.finish_reason is not None:
            self._reason = choice.finish_reason
            line += self._called()
        return line

    def _end(self) -> bytes:
        """The last lines."""
        self._ended = True
        called = self._called()
        fields = _said(self._endpoint, Message()) | self._last_fields()
        return called + self._encoded(fields) + b"\n"

    def _called(self) -> bytes:
        calls = self._calls.take(cut=self._reason == "length")
        if not calls:
            return b""
        return self._line(_said(self._endpoint, Message(), calls), None)

    def _whole(self, body: bytes) -> bytes:
        answer = _decoded(body)
        if answer.is_error:
            raise Untranslatable(error_message(body))
        if not answer.choices:
            raise Untranslatable("The answer had no choices.")
        self._count(answer)
        choice = answer.choices[0]
        self._reason = choice.finish_reason
        self._calls.add(choice.said.tool_calls or ())
        fields = _said(self._endpoint, choice.said, self._calls.take(cut=self._reason == "length"))
        if choice.logprobs is not None:
            fields["logprobs"] = for_ollama(choice.logprobs.likely())
        return self._encoded(fields | self._last_fields())

    def _vectors(self, body: bytes) -> bytes:
        try:
            answer = _embeddings.decode(body)
            entries = sorted(answer.data, key=lambda entry: entry.index)
            vectors = [_numbers(entry.embedding) for entry in entries]
        except (*_FAULTS, ValueError, struct.error) as error:
            raise Untranslatable(f"The embeddings could not be read: {error}") from error
        tokens = (answer.usage and answer.usage.prompt_tokens) or 0
        self.usage = Usage(tokens, 0)
        if self._endpoint is Endpoint.OLLAMA_EMBEDDINGS:
            if not vectors:
                raise Untranslatable("The answer had no embedding.")
            return _encode({"embedding": vectors[0]})
        head: dict[str, object] = {"model": self._model, "embeddings": vectors}
        return _encode(
            head | {"total_duration": self._timing.total_ns(), "load_duration": 0, "prompt_eval_count": tokens}
        )

    def _count(self, answer: Answer) -> None:
        """Keep what the node tells of its work."""
        counts, timings = answer.usage, answer.timings
        if timings is not None:
            self._timing.measured = timings
        if counts is not None:
            self.usage = Usage(counts.prompt_tokens or 0, counts.completion_tokens or 0)
        elif timings is not None:
            self.usage = Usage(timings.prompt_n + timings.cache_n, timings.predicted_n)

    def _last_fields(self) -> dict[str, object]:
        usage = self.usage or Usage()
        prompt_ns, answer_ns = self._timing.split_ns()
        return {
            "done": True,
            "done_reason": "length" if self._reason == "length" else "stop",
            "total_duration": self._timing.total_ns(),
            "load_duration": 0,
            "prompt_eval_count": usage.input_tokens,
            "prompt_eval_duration": prompt_ns,
            "eval_count": usage.output_tokens,
            "eval_duration": answer_ns,
        }

    def _line(self, fields: dict[str, object], logprobs: Sequence[Likely] | None) -> bytes:
        fields = fields | {"done": False}
        if logprobs:
            fields["logprobs"] = for_ollama(logprobs)
        return self._encoded(fields) + b"\n"

    def _encoded(self, fields: dict[str, object]) -> bytes:
        return _encode({"model": self._model, "created_at": self._clock()} | fields)


class _Calls:
    """Tool calls put together from their pieces."""

    def __init__(self) -> None:
        self._pieces: dict[int, tuple[str, list[str]]] = {}
        self._size = 0

    def add(self, calls: Sequence[ToolCall]) -> None:
        """Raises `Untranslatable` past the limit. Calls without an index are whole and stand in order."""
        for place, call in enumerate(calls):
            function = call.function
            if function is None:
                continue
            index = place if call.index is None else call.index
            name, arguments = self._pieces.setdefault(index, (function.name or "", []))
            arguments.append(function.arguments or "")
            self._pieces[index] = (name or function.name or "", arguments)
            self._size += len(arguments[-1])
        if self._size > MAX_REPLY_BYTES:
            raise Untranslatable(f"The tool calls were larger than {MAX_REPLY_BYTES} bytes.")

    def take(self, *, cut: bool) -> list[dict[str, object]]:
        """The calls; nothing is left. The last one of a `cut` answer may be incomplete: it is dropped."""
        calls: list[dict[str, object]] = []
        for index, (name, pieces) in sorted(self._pieces.items()):
            try:
                arguments = _arguments.decode("".join(pieces).strip() or "{}")
            except _FAULTS as error:
                if cut:
                    continue
                raise Untranslatable(f"The arguments of a call of {name!r} were not JSON: {error}") from error
            calls.append({"function": {"index": index, "name": name, "arguments": arguments}})
        self._pieces = {}
        return calls


class _Timing:
    """How long the parts of an answer took."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._started = now()
        self._first: float | None = None
        self.measured: Timings | None = None
        """What the node itself measured, which is better."""

    def token(self) -> None:
        """Something of the answer came."""
        if self._first is None:
            self._first = self._now()

    def total_ns(self) -> int:
        """Since the request was sent."""
        return round((self._now() - self._started) * _NS_PER_S)

    def split_ns(self) -> tuple[int, int]:
        """Reading the prompt, and answering; all is answering where nobody saw a first token."""
        if self.measured is not None:
            return round(self.measured.prompt_ms * _NS_PER_MS), round(self.measured.predicted_ms * _NS_PER_MS)
        first = self._started if self._first is None else self._first
        return round((first - self._started) * _NS_PER_S), round((self._now() - first) * _NS_PER_S)


def _decoded(body: bytes) -> Answer:
    try:
        return _answer.decode(body)
    except _FAULTS as error:
        raise Untranslatable(f"The answer could not be read: {error}") from error


def _said(endpoint: Endpoint, said: Message, calls: Sequence[object] = ()) -> dict[str, object]:
    """What was said, where the client looks for it."""
    more: dict[str, object] = {"thinking": said.thinking} if said.thinking else {}
    if endpoint is not Endpoint.OLLAMA_CHAT:
        return {"response": said.content or "", **more}
    if calls:
        more["tool_calls"] = calls
    return {"message": {"role": "assistant", "content": said.content or "", **more}}


def _numbers(vector: Raw) -> Raw | tuple[float, ...]:
    """A vector as JSON has it; base64 of little-endian float32 is unpacked."""
    if memoryview(vector)[0] != QUOTE:
        return vector
    packed = base64.b64decode(_text.decode(vector), validate=True)
    return struct.unpack(f"<{len(packed) // 4}f", packed)

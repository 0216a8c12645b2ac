"""
What a fake server is told to do: give an `Answer`, or show a `Fault`.

A fault bends the steps of a healthy answer, so each one works on every API, streamed or not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import msgspec

from sutazai.testing.received import Received
from sutazai.testing.steps import (
    JSON_TYPE,
    Bend,
    CloseIdle,
    Cut,
    End,
    Head,
    Part,
    Raw,
    Step,
    Steps,
    TrickledHead,
    Wait,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call that the model asks for."""

    name: str
    arguments: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A healthy answer. An embedding takes its delay from it, and nothing else."""

    tokens: tuple[str, ...] = ("Hel", "lo")
    """Each is one event of a stream. A client's limit (`max_tokens`, `num_predict`) cuts them short."""
    first_token_s: float = 0.0
    """From the moment a slot was free."""
    between_s: float = 0.0
    thinking: tuple[str, ...] = ()
    """Thoughts before the tokens; each is one event and counts as a token."""
    tool_calls: tuple[ToolCall, ...] = ()
    """Calls after the tokens."""
    prompt_tokens: int | None = None
    """What the usage says of the prompt; None counts its words."""
    tells_usage: bool = True
    """False leaves the counts out, as some servers do."""


@dataclass(frozen=True, slots=True)
class Fault:
    """
    Something that goes wrong, made by one of the methods below.

    `after` is in tokens: the fault comes instead of whatever follows that many, and before the end in any
    case. An answer in one piece breaks in its middle. `answer` is what would have come without the fault.

    Nothing here refuses a connection, for that comes before any request: `FakeNode.stop` does.
    """

    name: str
    bend: Bend
    answer: Answer = Answer()

    @staticmethod
    def reset_before_head() -> Fault:
        """The connection is reset when the request has been read."""
        return Fault("reset before the head", lambda _: iter((Cut.RESET,)))

    @staticmethod
    def close_before_head() -> Fault:
        """The connection is closed when the request has been read."""
        return Fault("closed before the head", lambda _: iter((Cut.CLOSE,)))

    @staticmethod
    def stall_before_head(answer: Answer = Answer()) -> Fault:
        """Nothing ever comes; the slot is held until the client gives up."""
        return Fault("stalled before the head", _stalled_before_head, answer)

    @staticmethod
    def status(
        status: int,
        body: bytes = b'{"error":"this fault was asked for"}',
        *,
        retry_after_s: int | None = None,
    ) -> Fault:
        """An error status at once, without taking a slot; the body is taken to be JSON."""
        extra = () if retry_after_s is None else (("Retry-After", str(retry_after_s)),)
        head = Head(status, JSON_TYPE, len(body), extra=extra)
        return Fault(f"status {status}", lambda _: iter((head, Part(body), End())))

    @staticmethod
    def reset_mid_stream(after: int, answer: Answer = Answer()) -> Fault:
        """The connection is reset."""
        return Fault("reset mid-stream", lambda steps: _broken(steps, after, Cut.RESET), answer)

    @staticmethod
    def truncate(after: int, answer: Answer = Answer()) -> Fault:
        """The connection is closed, though the body is not complete."""
        return Fault("truncated", lambda steps: _broken(steps, after, Cut.CLOSE), answer)

    @staticmethod
    def stall_mid_stream(after: int, answer: Answer = Answer()) -> Fault:
        """Nothing comes any more; the slot is held until the client gives up."""
        return Fault("stalled mid-stream", lambda steps: _broken(steps, after, Cut.SILENCE), answer)

    @staticmethod
    def error_mid_stream(after: int, message: str = "the model broke down", answer: Answer = Answer()) -> Fault:
        """The server tells of an error inside the stream, as an event, and ends it properly."""
        return Fault("error mid-stream", lambda steps: _told(steps, after, message), answer)

    @staticmethod
    def unfinished(after: int, answer: Answer = Answer()) -> Fault:
        """A stream ends properly as HTTP, but its last event (`[DONE]`, `"done": true`) never came."""
        return Fault("unfinished", lambda steps: _broken(steps, after, End()), answer)

    @staticmethod
    def garbage() -> Fault:
        """What comes is not HTTP."""
        return Fault("garbage", lambda _: iter((Raw(b"\x16\x03\x01\x00no HTTP at all\r\n\r\n"), Cut.CLOSE)))

    @staticmethod
    def garbage_mid_stream(after: int, answer: Answer = Answer()) -> Fault:
        """What comes next is no HTTP chunk."""
        broken = Raw(b"zz\r\nno chunk at all\r\n")
        return Fault("garbage mid-stream", lambda steps: _broken(steps, after, broken, Cut.SILENCE), answer)

    @staticmethod
    def nonsense_mid_stream(after: int, answer: Answer = Answer()) -> Fault:
        """One event that is no JSON, in a body that is else well formed; then the rest as if nothing were."""
        return Fault("nonsense mid-stream", lambda steps: _with_nonsense(steps, after), answer)

    @staticmethod
    def wrong_length(by_bytes: int, answer: Answer = Answer()) -> Fault:
        """
        `Content-Length` says that many bytes more than come (or fewer, where negative); nothing is chunked.

        Where it says more, the server believes that it has sent all, and the connection stays.
        """
        return Fault("wrong length", lambda steps: _misstated(steps, by_bytes), answer)

    @staticmethod
    def slow_head(byte_s: float, answer: Answer = Answer()) -> Fault:
        """The head comes byte by byte, that many seconds apart."""
        return Fault("slow head", lambda steps: _slow_headed(steps, byte_s), answer)

    @staticmethod
    def big_head(size_bytes: int, answer: Answer = Answer()) -> Fault:
        """The head has one more header, that large."""
        return Fault("big head", lambda steps: _big_headed(steps, size_bytes), answer)

    @staticmethod
    def close_idle(after_s: float = 0.0, answer: Answer = Answer()) -> Fault:
        """A healthy answer; afterwards the connection is closed, though nothing announced it."""
        return Fault("closed when idle", lambda steps: _closed_when_idle(steps, after_s), answer)

    @staticmethod
    def odd_pieces(size_bytes: int, answer: Answer = Answer()) -> Fault:
        """A healthy body in chunks of that size wherever the cut falls, each in its own turn of the loop."""
        return Fault("odd pieces", lambda steps: _recut(steps, size_bytes), answer)


Outcome: TypeAlias = Answer | Fault
Planned: TypeAlias = Outcome | Callable[[Received], Outcome]
"""What a script holds: the outcome itself, or a function of the request."""


def _stalled_before_head(steps: Steps) -> Steps:
    for step in steps:
        if isinstance(step, Head):
            break
        yield step
    yield Cut.SILENCE


def _broken(steps: Steps, after: int, *ending: Step) -> Steps:
    """The beginning of the steps, then the ending."""
    tokens, in_one_piece = 0, False
    for step in steps:
        if isinstance(step, Head):
            in_one_piece = step.length is not None
        elif isinstance(step, Part):
            if in_one_piece:
                yield Part(step.data[: len(step.data) // 2])
                break
            if tokens >= after:
                break
            tokens += step.is_token
        elif isinstance(step, End):
            break
        yield step
    yield from ending


def _told(steps: Steps, after: int, message: str) -> Steps:
    """The beginning of the steps, then an error in the form of the stream."""
    content_type = ""
    for step in _broken(steps, after, End()):
        if isinstance(step, Head):
            content_type = step.content_type
        elif isinstance(step, End):
            yield Part(_error_event(content_type, message))
        yield step


def _error_event(content_type: str, message: str) -> bytes:
    if "event-stream" in content_type:
        error = {"error": {"message": message, "type": "server_error", "code": 500}}
        return b"data: " + msgspec.json.encode(error) + b"\n\n"
    return msgspec.json.encode({"error": message}) + b"\n"


def _with_nonsense(steps: Steps, after: int) -> Steps:
    tokens, content_type, told = 0, "", False
    for step in steps:
        if isinstance(step, Head):
            content_type = step.content_type
        elif isinstance(step, Part | End) and tokens >= after and not told:
            told = True
            yield Part(b"data: {no json\n\n" if "event-stream" in content_type else b"{no json\n")
        tokens += isinstance(step, Part) and step.is_token
        yield step


def _misstated(steps: Steps, by_bytes: int) -> Steps:
    """All of the body at once, under a length that is not its own."""
    body, status, content_type = b"", 200, ""
    for step in steps:
        if isinstance(step, Head):
            status, content_type = step.status, step.content_type
        elif isinstance(step, Part):
            body += step.data
        elif isinstance(step, End):
            break
        else:
            yield step
    yield Head(status, content_type, len(body) + by_bytes)
    yield Raw(body)
    yield End()


def _slow_headed(steps: Steps, byte_s: float) -> Steps:
    for step in steps:
        yield TrickledHead(step, byte_s) if isinstance(step, Head) else step


def _big_headed(steps: Steps, size_bytes: int) -> Steps:
    for step in steps:
        if isinstance(step, Head):
            extra = (*step.extra, ("X-Big", "x" * size_bytes))
            yield Head(step.status, step.content_type, step.length, step.closes, extra)
        else:
            yield step


def _closed_when_idle(steps: Steps, after_s: float) -> Steps:
    yield from steps
    yield CloseIdle(after_s)


def _recut(steps: Steps, size_bytes: int) -> Steps:
    """Parts of another size; what is left goes out before any pause."""
    rest = b""
    for step in steps:
        if isinstance(step, Part):
            rest += step.data
            while len(rest) >= size_bytes:
                yield Part(rest[:size_bytes])
                yield Wait(0)
                rest = rest[size_bytes:]
            continue
        if rest:
            yield Part(rest)
            rest = b""
        yield step

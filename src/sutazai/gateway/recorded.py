"""
The parts of the cache that belong to one request: noting its answer down, waiting for the store, giving an answer.

`Cached` decides; what is here lives as long as a request does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sutazai.core.errors import SutazaiError
from sutazai.core.request import Head, Request, Usage
from sutazai.policy.cacheability import may_be_replaced
from sutazai.ports.cache import Answer
from sutazai.ports.inference import Call, Inference, Reply

if TYPE_CHECKING:
    from sutazai.gateway.cached import Cached
    from sutazai.gateway.second_tier import Search, SecondTier

HIT_L1, HIT_L2, STALE, MISS, COALESCED = b"hit-l1", b"hit-l2", b"stale", b"miss", b"coalesced"


class Recording:
    """One answer on its way to the client, noted down; also its call, where more than the client holds it."""

    _call: Call | None = None
    _head: Head | None = None
    _is_over = False
    _size_bytes = 0
    is_kept = False

    def __init__(
        self,
        cached: Cached,
        request: Request,
        reply: Reply,
        stale: Answer | None,
        *,
        leads: bool,
        is_renewal: bool = False,
    ) -> None:
        self._cached = cached
        self._reply = reply
        self._stale = stale
        self._parts: list[bytes] | None = []
        """What was said so far; None where it is not to be kept."""
        self._forgets = cached.forgets
        self.request = request
        self.leads = leads
        self.is_renewal = is_renewal

    def begin(self, inner: Inference) -> Call:
        """Ask; the call ends the recording too."""
        call = inner.start(self.request, self)
        if self._is_over:
            call.cancel()
        else:
            self._call = call
        return self

    # Reply

    def head(self, head: Head) -> None:
        if self._is_over:
            return
        self._note_head(head)
        self._head = head
        self._reply.head(head)

    def chunk(self, data: bytes) -> None:
        if self._is_over:
            return
        parts = self._parts
        if parts is not None:
            parts.append(data)
            self._size_bytes += len(data)
            if self._size_bytes > self._cached.rules.max_answer_bytes:
                self._parts = None
        self._reply.chunk(data)

    def end(self, usage: Usage | None) -> None:
        if self._is_over:
            return
        head = self._head
        if head is not None:
            self._keep(head, usage)
        self._finish()
        self._reply.end(usage)

    def whole(self, head: Head, body: bytes, usage: Usage | None) -> None:
        if self._is_over:
            return
        self._note_head(head)
        if self._parts is not None:
            self._parts = [body]
            self._keep(head, usage)
        self._finish()
        self._reply.whole(head, body, usage)

    def fail(self, error: SutazaiError) -> None:
        if self._is_over:
            return
        self._finish()
        stale = self._stale
        if stale is None or self._head is not None or not may_be_replaced(error):
            self._reply.fail(error)
            return
        self._cached.stale += 1
        give(stale, self._reply, STALE, self._cached.age_s(stale))

    # Call

    def cancel(self) -> None:
        if not self._is_over:
            self._finish()
            if self._call is not None:
                self._call.cancel()

    def pause(self) -> None:
        if self._call is not None:
            self._call.pause()

    def resume(self) -> None:
        if self._call is not None:
            self._call.resume()

    # parts

    def _note_head(self, head: Head) -> None:
        if head.status != 200 or head.cache == COALESCED:
            self._parts = None  # another records what it shares
        if head.cache != COALESCED:
            head.cache = MISS

    def _keep(self, head: Head, usage: Usage | None) -> None:
        parts = self._parts
        if parts is not None and self._forgets == self._cached.forgets:
            self.is_kept = self._cached.record(self.request, head.content_type, head.node, parts, usage)

    def _finish(self) -> None:
        self._is_over = True
        self._parts = None
        self._cached.ended(self)


class Seeking:
    """A request that waits for what the store says: its call meanwhile, and in front of the next one afterwards."""

    _call: Call | None = None
    _is_over = False
    _is_paused = False

    def __init__(
        self, cached: Cached, second: SecondTier, request: Request, reply: Reply, stale: Answer | None
    ) -> None:
        self._cached = cached
        self._request = request
        self._reply = reply
        self._stale = stale
        self._forgets = cached.forgets
        self._search: Search | None = second.seek(request, self)

    # Seeker

    def told(self, answer: Answer | None, *, leads: bool) -> None:
        cached, request = self._cached, self._request
        self._search = None
        if answer is not None and self._forgets != cached.forgets:
            answer = None  # it may be one of those that were forgotten meanwhile
        if answer is not None and cached.is_young_enough(answer, request):
            self._is_over = True
            cached.hits_l2 += 1
            cached.fill(request.fingerprint, answer)
            give(answer, self._reply, HIT_L2, cached.age_s(answer))
            return
        call = cached.ask(request, self._reply, answer or self._stale, leads=leads)
        if self._is_over:
            call.cancel()
            return
        self._call = call
        if self._is_paused:
            call.pause()

    # Call

    def cancel(self) -> None:
        if self._is_over:
            return
        self._is_over = True
        if self._search is not None:
            self._search.leave(self)
        if self._call is not None:
            self._call.cancel()

    def pause(self) -> None:
        self._is_paused = True
        if self._call is not None:
            self._call.pause()

    def resume(self) -> None:
        self._is_paused = False
        if self._call is not None:
            self._call.resume()


class Nobody:
    """The reply of an answer that is made only to be kept."""

    def head(self, head: Head) -> None:
        return

    def chunk(self, data: bytes) -> None:
        return

    def end(self, usage: Usage | None) -> None:
        return

    def whole(self, head: Head, body: bytes, usage: Usage | None) -> None:
        return

    def fail(self, error: SutazaiError) -> None:
        return


def give(answer: Answer, reply: Reply, cache: bytes, age_s: float) -> None:
    """Answer from what was kept, in the form in which it came. It took no tokens."""
    extra = b"age: %d\r\n" % age_s
    if not answer.is_stream:
        (body,) = answer.parts
        head = Head(answer.status, answer.content_type, len(body), answer.node, "cached", cache, extra)
        reply.whole(head, body, Usage())
        return
    reply.head(Head(answer.status, answer.content_type, None, answer.node, "cached", cache, extra))
    for part in answer.parts:
        reply.chunk(part)
    reply.end(Usage())

"""
The stage that makes one call to a node out of several requests: embeddings and completions.

It stands outside of the waiting room, so that a batch is one unit of admission and takes one slot. Requests share a
call only within one tenant and one priority, because that is what the waiting room counts by; and only where every
field but the inputs is equal. When they leave is said in `policy.batching`, how bodies are merged in
`dialects.batches`. Chats are not merged: no API has a form for that, and the engines batch them themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Protocol

from sutazai.core.errors import NodeFault, SutazaiError
from sutazai.core.request import Endpoint, Head, Request, Usage
from sutazai.dialects.batches import MERGED_PATHS, Share, merged, share_of, split
from sutazai.dialects.framing import Collected, Untranslatable
from sutazai.policy.batching import BatchRules, Gathering, Size, parted
from sutazai.ports.inference import Call, Inference, Reply


class Timer(Protocol):
    """Something that will be called later."""

    def cancel(self) -> None:
        """Call it not."""


class Batched:
    """Lets requests of one kind share calls while the model is busy with that kind."""

    def __init__(
        self,
        inner: Inference,
        rules: BatchRules,
        *,
        takes_arrays: Callable[[str, Endpoint], bool],
        has_idle_node: Callable[[str], bool],
        later: Callable[[float, Callable[[], None]], Timer],
        clock: Callable[[], float],
    ) -> None:
        """
        Make the stage.

        Args:
            takes_arrays: whether every node with the model answers several inputs in one call at that endpoint.
            has_idle_node: whether a node with the model works on nothing at all.
            later: the event loop's `call_later`: calls after so many seconds.
            clock: monotonic seconds.
        """
        self.inner = inner
        self.rules = rules
        self.later = later
        self.clock = clock
        self.has_idle_node = has_idle_node
        self._takes_arrays = takes_arrays
        self._groups: dict[Hashable, Group] = {}
        self.batches = 0
        """Calls that several requests shared; those of a batch that is asked again in parts are not counted."""
        self.batched_requests = 0
        """Requests that shared them."""
        self.bisections = 0
        """Times that a batch failed for what may be the fault of one input, and was asked again in parts."""

    def start(self, request: Request, reply: Reply) -> Call:
        rules = self.rules
        endpoint = request.endpoint
        if endpoint.path not in MERGED_PATHS or request.stream or request.loads_only or rules.max_requests < 2:
            return self.inner.start(request, reply)
        share = share_of(endpoint, request.body) if self._takes_arrays(request.model, endpoint) else None
        if share is None:
            return self.inner.start(request, reply)
        size = Size(len(share.inputs), share.size_bytes)
        if size.is_alone(rules):
            return self.inner.start(request, reply)
        key = (share.kind, endpoint.path, request.model, request.tenant, request.priority, request.allowance)
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = Group(self, key)
        member = Member(group, request, reply, share)
        group.arrive(member, size)
        return member

    def adopt(self, rules: BatchRules) -> None:
        """New settings; who waits already leaves as he would have."""
        self.rules = rules

    @property
    def waiting(self) -> int:
        """Requests that gather now."""
        return sum(group.waiting for group in self._groups.values())

    def forget(self, key: Hashable, group: Group) -> None:
        """A group is over. For `Group` alone."""
        if self._groups.get(key) is group:  # its last answer may have brought the first request of the next
            del self._groups[key]


class Group:
    """The requests of one kind, and the calls that they share."""

    __slots__ = ("_gathering", "_key", "_stage", "_timer")

    def __init__(self, stage: Batched, key: Hashable) -> None:
        self._stage = stage
        self._key = key
        self._gathering: Gathering[Member] = Gathering()
        self._timer: Timer | None = None

    @property
    def waiting(self) -> int:
        """Requests that gather now."""
        return self._gathering.waiting

    def arrive(self, member: Member, size: Size) -> None:
        """A request; it leaves at once or waits."""
        stage, gathering = self._stage, self._gathering
        is_idle = gathering.under_way > 0 and stage.has_idle_node(member.request.model)
        self._send(gathering.arrive(member, size, stage.rules, is_idle=is_idle))
        self._watch()

    def withdraw(self, member: Member) -> None:
        """One that waited left."""
        self._gathering.withdraw(member)
        self._watch()

    def returned(self) -> None:
        """A call came back, whatever it brought: whoever waits leaves."""
        self._send(self._gathering.returned())
        self._watch()
        if self._gathering.is_over:
            self._stage.forget(self._key, self)

    def ask_again(self, parts: Sequence[Sequence[Member]], turn: int) -> None:
        """Calls for the parts of a batch that failed; the batch itself is still to be `returned`."""
        stage = self._stage
        stage.bisections += 1
        self._gathering.also(len(parts))
        for part in parts:
            self._ask(part, turn)

    def _send(self, leaving: Sequence[list[Member]]) -> None:
        if not leaving:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for members in leaving:
            for member in members:
                member.waits = False
        stage = self._stage
        for members in leaving:
            if len(members) > 1:
                stage.batches += 1
                stage.batched_requests += len(members)
            self._ask(members, 1)

    def _ask(self, members: Sequence[Member], turn: int) -> None:
        """One call. An answer within the call before may have made callers leave: they are not asked for."""
        members = [member for member in members if not member.done]
        if len(members) > 1:
            Batch(self, members, turn).send(self._stage)
        elif members:
            members[0].send(self._stage, turn)
        else:
            self.returned()

    def _watch(self) -> None:
        """Have a timer while anybody waits, and none else."""
        waiting = self._gathering.waiting > 0
        if waiting and self._timer is None:
            self._timer = self._stage.later(self._stage.rules.max_wait_s, self._waited)
        elif not waiting and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _waited(self) -> None:
        self._timer = None
        self._send(self._gathering.waited())


class Member:
    """
    One request in the stage: `Call` to its caller and, where it is asked alone, `Reply` to the node.

    Alone its body and its answer pass untouched. Its caller is told before the next call is made, because what that
    sets off may make him leave, and who left is told nothing.

    In a batch `pause` and `resume` do nothing: a part is small and arrives whole, so there is nothing to hold back;
    and to stop reading from the node would let one slow caller make its neighbours wait.
    """

    # what every one begins with
    _batch: Batch | None = None
    _call: Call | None = None
    _is_asked = False
    _paused = False
    done = False
    """Answered, or its caller left."""
    waits = True
    """It gathers with others."""

    def __init__(self, group: Group, request: Request, reply: Reply, share: Share) -> None:
        self.request = request
        self.share = share
        self._group = group
        self._reply = reply

    def send(self, stage: Batched, turn: int) -> None:
        """Ask it alone; after the first `turn` some time has passed, which is not the node's."""
        self._batch = None
        self._is_asked = True
        request = self.request if turn == 1 else replace(self.request, arrived_at=stage.clock())
        call = stage.inner.start(request, self)
        if self.done:
            call.cancel()  # within `start` it was answered, or its caller left
            return
        self._call = call
        if self._paused:
            call.pause()

    def join(self, batch: Batch) -> None:
        """It is asked together with others."""
        self._batch = batch

    def take(self, head: Head, body: bytes, usage: Usage | None) -> None:
        """Its part of a common answer."""
        self.done = True
        self._reply.whole(head, body, usage)

    def refuse(self, error: SutazaiError) -> None:
        """The common call failed."""
        self.done = True
        self._reply.fail(error)

    # Call

    def cancel(self) -> None:
        if self.done:
            return
        self.done = True
        if self.waits:
            self._group.withdraw(self)
        elif self._batch is not None:
            self._batch.leave()
        elif self._is_asked:
            call, self._call = self._call, None
            if call is not None:
                call.cancel()
            self._group.returned()

    def pause(self) -> None:
        self._paused = True
        if self._call is not None:
            self._call.pause()

    def resume(self) -> None:
        self._paused = False
        if self._call is not None:
            self._call.resume()

    # Reply

    def head(self, head: Head) -> None:
        if not self.done:
            self._reply.head(head)

    def chunk(self, data: bytes) -> None:
        if not self.done:
            self._reply.chunk(data)

    def end(self, usage: Usage | None) -> None:
        if not self.done:
            self.done = True
            self._reply.end(usage)
            self._group.returned()

    def whole(self, head: Head, body: bytes, usage: Usage | None) -> None:
        if not self.done:
            self.done = True
            self._reply.whole(head, body, usage)
            self._group.returned()

    def fail(self, error: SutazaiError) -> None:
        if not self.done:
            self.done = True
            self._reply.fail(error)
            self._group.returned()


class Batch:
    """One call for several requests: `Reply` to the node, which cuts the answer in parts."""

    # what every one begins with
    _call: Call | None = None
    _head: Head | None = None
    _over = False

    def __init__(self, group: Group, members: Sequence[Member], turn: int) -> None:
        """Make it; `turn` counts the calls that the first of the members shared, from 1."""
        self._group = group
        self._members = members
        self._turn = turn
        self._listening = len(members)
        self._body = Collected()
        for member in members:
            member.join(self)

    def send(self, stage: Batched) -> None:
        """Ask for all of them."""
        call = stage.inner.start(self._request(stage.clock()), self)
        if self._over:
            call.cancel()  # within `start` it was answered, or all left
        else:
            self._call = call

    def leave(self) -> None:
        """A caller left: its part will be dropped, and the call ended with the last of them."""
        self._listening -= 1
        if self._listening or self._over:
            return
        call = self._close()
        if call is not None:
            call.cancel()
        self._group.returned()

    # Reply

    def head(self, head: Head) -> None:
        self._head = head

    def chunk(self, data: bytes) -> None:
        if self._over:
            return
        try:
            self._body.add(data)
        except Untranslatable as error:
            call = self._close()
            if call is not None:
                call.cancel()
            self._refuse(self._fault(error))

    def end(self, _usage: Usage | None) -> None:
        if self._head is not None:
            self._answer(self._head, self._body.take())

    def whole(self, head: Head, body: bytes, _usage: Usage | None) -> None:
        self._head = head
        self._answer(head, body)

    def fail(self, error: SutazaiError) -> None:
        if self._over:
            return
        self._close()
        parts = parted(error, [member for member in self._members if not member.done])
        if parts:
            self._group.ask_again(parts, self._turn + 1)
            self._group.returned()
        else:
            self._refuse(error)

    # parts

    def _request(self, now: float) -> Request:
        """
        What the node is asked.

        The time until which it is of use is that of the most patient caller. Nobody else may share its answer as a
        whole, so it has no fingerprint.
        """
        first = self._members[0].request
        deadlines = [member.request.deadline_at for member in self._members]
        return replace(
            first,
            id=f"{first.id}.b{self._turn}",
            body=merged(first.endpoint, [member.share for member in self._members]),
            arrived_at=now,
            fingerprint=b"",
            conversation=b"",
            deadline_at=max(deadlines) if all(deadlines) else 0.0,
        )

    def _answer(self, head: Head, body: bytes) -> None:
        if self._over:
            return
        self._close()
        members = self._members
        try:
            ids = [member.request.id for member in members]
            parts = split(members[0].request.endpoint, body, [member.share for member in members], ids)
        except Untranslatable as error:
            self._refuse(self._fault(error))
            return
        reason = f"{head.reason}; one of {len(members)} in a batch"
        for member, part in zip(members, parts, strict=True):
            if not member.done:
                own = Head(head.status, head.content_type, len(part.body), head.node, reason, head.cache, head.extra)
                member.take(own, part.body, part.usage)
        self._group.returned()

    def _refuse(self, error: SutazaiError) -> None:
        for member in self._members:
            if not member.done:
                member.refuse(error)
        self._group.returned()

    def _fault(self, error: Untranslatable) -> NodeFault:
        node = self._head.node if self._head is not None else ""
        return NodeFault(f"The node {node} gave an answer that made no sense: {error}", node=node)

    def _close(self) -> Call | None:
        """The call is over; what is left of it."""
        self._over = True
        call, self._call = self._call, None
        return call

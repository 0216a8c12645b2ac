"""
Conversations that the platform keeps: a client sends what is new, and the gateway puts what was said before it.

A turn is kept in one piece, question and answer, and before the client hears the end of the answer: who got the end
can be sure that the next turn, in whatever gateway, knows of it. Of a turn that broke off nothing is kept.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime, timedelta

import structlog

from sutazai.core.errors import BadRequest, Conflict, NodeFault, NotFound, RateLimited, TooLarge
from sutazai.core.mark import Mark
from sutazai.core.node import Health
from sutazai.core.request import Endpoint, Head, Request
from sutazai.core.session import Message, Session
from sutazai.dialects.assembled import Assembled
from sutazai.dialects.conversation import Question, UpToDone, instructions, remembered
from sutazai.dialects.framing import Collected, Untranslatable
from sutazai.gateway.fleet import Fleet
from sutazai.gateway.pulled import Pulled
from sutazai.policy.trimming import estimated_tokens, fitting, room_for_history
from sutazai.ports.inference import Inference
from sutazai.ports.sessions import SessionStore
from sutazai.settings.model import Sessions as Rules

log = structlog.get_logger("sutazai.sessions")

SWEEP_S = 60.0
SWEPT_AT_ONCE = 500
"""Sessions deleted in one transaction."""
USUAL_CONTEXT_TOKENS = 4096
"""What Ollama loads models with when nobody asks."""
FULL_FOR_S = 60.0
"""When to try again where a tenant has as many sessions as it may."""

_ID = re.compile(r"sess_[0-9a-f]{32}")


class Sessions:
    """All conversations, for whoever may see them: a tenant sees its own alone."""

    created = 0
    """Sessions made here."""
    kept = 0
    """Turns that were kept."""
    conflicts = 0
    """Turns that were not, because another came first."""
    swept = 0
    """Sessions deleted because their time was over."""

    def __init__(
        self,
        store: SessionStore,
        answers: Inference,
        *,
        rules: Rules,
        context_tokens: Callable[[str], int],
        wall: Callable[[], datetime],
    ) -> None:
        """
        Make it.

        Args:
            context_tokens: how much a model sees at once: see `shortest_context`.
            wall: the time now, with its zone.
        """
        self.store = store
        self.answers = answers
        self.rules = rules
        self.context_tokens = context_tokens
        self.wall = wall
        self.asking: set[str] = set()
        """Sessions with a turn under way in this gateway."""

    async def create(
        self, tenant: str, *, model: str, system: str, metadata: Mapping[str, str], ttl_s: float | None
    ) -> Session:
        """Begin a conversation. Raises `BadRequest`, `RateLimited` or `StoreUnavailable`."""
        rules = self.rules
        if ttl_s is not None and not 0 < ttl_s <= rules.ttl_s:
            raise BadRequest(f"ttl_s must be above 0 and at most {rules.ttl_s:g} seconds.", where="ttl_s")
        if len(system.encode()) > rules.max_bytes:
            raise TooLarge(f"system was larger than {rules.max_bytes} bytes, the limit of `sessions.max_bytes`.")
        now = self.wall()
        ttl_s = ttl_s or rules.ttl_s
        session = Session(
            id=f"sess_{int(now.timestamp() * 1000):012x}{secrets.token_hex(10)}",
            tenant=tenant,
            model=model,
            system=system,
            metadata=metadata,
            ttl_s=ttl_s,
            created_at=now,
            expires_at=now + timedelta(seconds=ttl_s),
        )
        if not await self.store.create(session, at_most=rules.max_per_tenant):
            raise RateLimited(
                f"There were {rules.max_per_tenant} sessions already, the limit of `sessions.max_per_tenant`. Delete "
                "some, or give them a shorter ttl_s.",
                retry_after_s=FULL_FOR_S,
            )
        self.created += 1
        return session

    async def get(self, tenant: str, session_id: str) -> Session:
        """One session. Raises `NotFound`, for one of another tenant likewise."""
        session = await self.store.get(tenant, session_id) if _ID.fullmatch(session_id) else None
        if session is None or session.expires_at <= self.wall():
            raise _unknown(session_id)
        return session

    async def page(self, tenant: str, *, before: str, limit: int, seen: Mark | None = None) -> Sequence[Session]:
        """Sessions that live, newest first, from `before` on; empty = from the newest. `seen`: see `ports/marks.py`."""
        return await self.store.page(tenant, now=self.wall(), before=before, limit=limit, seen=seen)

    async def messages(self, tenant: str, session_id: str) -> Sequence[Message]:
        """What was said, oldest first. Raises `NotFound`."""
        return await self.store.history(await self.get(tenant, session_id))

    async def delete(self, tenant: str, session_id: str) -> None:
        """Forget it. Raises `NotFound`."""
        if not _ID.fullmatch(session_id) or not await self.store.delete(tenant, session_id):
            raise _unknown(session_id)

    async def ask(self, session_id: str, request: Request) -> Turn:
        """
        Begin a turn.

        Args:
            request: `tenant` and who asks are known; `body` holds the new messages alone. Becomes the whole request.

        Raises `NotFound`, `BadRequest`, `Conflict` (another turn is under way here) and `StoreUnavailable`. The
        caller closes the turn on every path.
        """
        session = await self.get(request.tenant, session_id)
        if session.id in self.asking:
            self.conflicts += 1
            raise Conflict(f"The session {session.id} answers another turn now; send this one after it.")
        self.asking.add(session.id)
        try:
            question = Question(request.body, session.model)
            history = await self.store.history(session)
            news = _numbered(question.messages, after=history[-1].number if history else 0)
            self._check_room([*history, *news])
            request.endpoint = Endpoint.OPENAI_CHAT
            request.model, request.stream = question.model, question.stream
            request.conversation = session.id.encode()
            request.body = self._whole_body(session, question, [*history, *news])
            turn = Turn(self, session, history, news, request)
        except BaseException:
            self.asking.discard(session.id)
            raise
        turn.begin()
        return turn

    async def keep(self, session: Session, history: Sequence[Message], news: Sequence[Message]) -> None:
        """Add a turn to the session as it was read. Raises `Conflict`, `NotFound` or `StoreUnavailable`."""
        rules = self.rules
        fits = fitting([*history, *news], tokens=float("inf"), count=rules.max_messages, size_bytes=rules.max_bytes)
        old = {message.number for message in history}
        kept = [message for message in fits if message.number in old]
        expires_at = self.wall() + timedelta(seconds=session.ttl_s)
        after = replace(session, version=session.version + 1, messages=len(fits), expires_at=expires_at)
        try:
            await self.store.append(after, kept, [message for message in fits if message.number not in old])
        except Conflict:
            self.conflicts += 1
            raise
        self.kept += 1

    async def run(self) -> None:
        """Delete sessions whose time is over, until cancelled."""
        while True:
            await asyncio.sleep(SWEEP_S)
            try:
                await self.sweep()
            except Exception as error:  # the border of one turn
                log.warning("sessions not swept", why=str(error))

    async def sweep(self) -> None:
        """Delete all whose time is over, some at a time. Raises `StoreUnavailable`."""
        now = self.wall()
        while True:
            gone = await self.store.sweep(now, limit=SWEPT_AT_ONCE)
            self.swept += gone
            if gone < SWEPT_AT_ONCE:
                return

    def _check_room(self, messages: Sequence[Message]) -> None:
        """Raise `TooLarge` where the newest round, which is never cut, is more than a session may hold."""
        rules = self.rules
        least = fitting(messages, tokens=0)
        if len(least) >= rules.max_messages:
            raise TooLarge(
                f"The last question and what followed were {len(least)} messages, and the answer would be one "
                f"more than `sessions.max_messages` ({rules.max_messages}) allows. Ask something new, or begin a new "
                "session."
            )
        size_bytes = sum(len(message.body) for message in least)
        if size_bytes > rules.max_bytes:
            raise TooLarge(
                f"The last question and what followed were {size_bytes} bytes, more than `sessions.max_bytes` "
                f"({rules.max_bytes}) allows. Ask something new, or begin a new session."
            )

    def _whole_body(self, session: Session, question: Question, messages: Sequence[Message]) -> bytes:
        """The request with all that was said before and fits."""
        first = [instructions(session.system)] if session.system else []
        fixed = sum(map(estimated_tokens, first)) + (estimated_tokens(question.tools) if question.tools else 0)
        room = room_for_history(
            self.context_tokens(question.model), answer_tokens=question.answer_tokens, fixed_tokens=fixed
        )
        return question.among([*first, *(message.body for message in fitting(messages, tokens=room))])


class Turn:
    """One question of a session and its answer. Read by one task, and closed by it."""

    def __init__(
        self,
        sessions: Sessions,
        session: Session,
        history: Sequence[Message],
        news: Sequence[Message],
        request: Request,
    ) -> None:
        self._sessions = sessions
        self._session = session
        self._history = history
        self._news = news
        self._pulled = Pulled()
        self.request = request

    def begin(self) -> None:
        """Hand the request to the gateway. For `Sessions` alone."""
        self._pulled.begin(self._sessions.answers, self.request)

    async def until_part(self) -> None:
        """Return when there is something of the answer, or its failure. May be cancelled and called again."""
        await self._pulled.until_part()

    async def head(self) -> Head:
        """The beginning of the answer. Raises what the request failed with."""
        return await self._pulled.until_head()

    async def whole(self) -> bytes:
        """The body of an answer that does not stream, once the turn is kept. Raises what hindered that."""
        body = Collected()
        with _told(await self.head()):
            while data := await self._pulled.part():
                body.add(data)
            whole = body.take()
            answer = remembered(whole)
        await self._keep(answer)
        return whole

    async def parts(self) -> AsyncIterator[bytes]:
        """A stream's parts; the last once the turn is kept. Raises what hindered that, in place of the last."""
        assembled, tail = Assembled(Endpoint.OPENAI_CHAT), UpToDone()
        head = await self.head()
        wrong: Untranslatable | None = None
        while data := await self._pulled.part():
            if wrong is None:
                try:
                    assembled.feed(data)
                except Untranslatable as error:  # an error that the node told; the client hears it too
                    wrong = error
            if ready := tail.pass_on(data):
                yield ready
        with _told(head):
            if wrong is not None:
                raise wrong
            answer = remembered(assembled.finish())
        await self._keep(answer)
        yield tail.rest

    def close(self) -> None:
        """End it, wherever it is: what was not kept by now is not kept. Any number of times."""
        self._pulled.cancel()
        self._sessions.asking.discard(self._session.id)

    async def _keep(self, answer: bytes) -> None:
        news = [*self._news, *_numbered([("assistant", answer)], after=self._news[-1].number)]
        await self._sessions.keep(self._session, self._history, news)


def shortest_context(fleet: Fleet, model: str) -> int:
    """The context length, in tokens, that a model has on every node that is up; a usual one where none tells."""
    lengths = []
    for state in fleet.candidates(model):
        if state.health is Health.UP:
            loaded = (state.loaded or {}).get(model)
            info = state.models.get(model) or state.models.get(f"{model}:latest")
            lengths.append((loaded.context_tokens if loaded else 0) or (info.context_tokens if info else 0))
    return min(filter(None, lengths), default=USUAL_CONTEXT_TOKENS)


@contextmanager
def _told(head: Head) -> Iterator[None]:
    """Raise `Untranslatable` as a fault of the node."""
    try:
        yield
    except Untranslatable as error:
        raise NodeFault(f"{error} Nothing of the turn was kept; send it again.", node=head.node) from error


def _numbered(messages: Sequence[tuple[str, bytes]], *, after: int) -> list[Message]:
    return [
        Message(number=number, role=role, tokens=estimated_tokens(body), body=body)
        for number, (role, body) in enumerate(messages, after + 1)
    ]


def _unknown(session_id: str) -> NotFound:
    return NotFound(f"No session {session_id[:64]!r} is here; `GET /v1/sessions` lists those that are.")

"""
The waiting room in front of routing: who finds every slot taken waits here for a fair turn, or is sent away early.

What is decided lies in `policy/admission.py`. Here are the clock, the replies and the calls. A request for a model that
nobody waits for and that some node has room for passes through without anything wrapped around it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from math import inf

import structlog

from sutazai.core.errors import Overloaded, SutazaiError, TooManyWaiting
from sutazai.core.request import Head, Place, Request, Usage
from sutazai.gateway.routed import SWEEP_S, Routed, Run
from sutazai.policy.admission import BYTES_PER_TOKEN, AdmissionRules, Shed, WaitingRoom
from sutazai.policy.drain import Drain
from sutazai.policy.line import Ticket
from sutazai.policy.routing import Room
from sutazai.ports.inference import Call, Reply

log = structlog.get_logger("sutazai.admitted")

DOUBT = 1.25
"""A request is sent away on an estimate only when that is past its time by this factor."""
LEAST_RETRY_S = 1.0


class Admitted:
    """Lets requests in to `Routed`, in a fair order and never more than there are slots for."""

    def __init__(
        self, routed: Routed, rules: AdmissionRules, *, weight: Callable[[str], float] = lambda _tenant: 1.0
    ) -> None:
        """
        Make the stage; it takes over the callbacks of `routed`.

        Args:
            weight: of a tenant; twice the weight is twice the tokens while all wait.
        """
        self.joined = 0
        """Requests that had to wait."""
        self.served = 0
        """Of those, handed to a node."""
        self.left = 0
        """Of those, gone before their turn because the client left or an operator said so."""
        self.expired = 0
        """Of those, told that their time was over."""
        self.shed_greedy = 0
        """Sent away because their tenant had more waiting than others."""
        self.shed_full = 0
        """Sent away because the line was full and all had equally much in it."""
        self.refused_late = 0
        """Sent away on arrival because their turn would have come too late."""
        self._routed = routed
        self._fleet = routed.fleet
        self._waiting_room: WaitingRoom[Waiting] = WaitingRoom(rules, weight=weight)
        self._shares = self._waiting_room.shares
        self._lines = self._waiting_room.lines
        self._waiting: dict[str, Waiting] = {}
        """By the id of the request, in the order of arrival."""
        self._drains: dict[str, Drain] = {}
        self._ended: dict[str, int] = {}
        """Requests that ended since the last sweep, by model."""
        self._swept_at = self._fleet.clock()
        self._serving = False
        self._room_again = False
        routed.listen(on_room=self.serve, on_end=self._note_end)

    def start(self, request: Request, reply: Reply) -> Call:
        if request.model in self._lines or 0.0 < request.deadline_at <= request.arrived_at:
            return self._hold(request, reply)
        if not self._shares.waiting:
            return self._routed.try_start(request, reply) or self._hold(request, reply)
        self._shares.admit_at_once(request.tenant)
        call = self._routed.try_start(request, reply) or self._hold(request, reply)
        self.serve()  # who waited for a node to load its model need not any more, if this took the slot there
        return call

    def adopt(self, rules: AdmissionRules) -> None:
        """New settings, for those who wait too; nobody is sent away because a line may now be shorter."""
        self._waiting_room.rules = rules

    @property
    def waiting(self) -> int:
        """Requests that wait, those that wait to be tried again included."""
        return len(self._waiting) + self._routed.waiting

    def waiting_by_model(self) -> dict[str, int]:
        """How many wait for their first try, of models that somebody waits for."""
        return {model: line.count for model, line in self._lines.items()}

    def place_of(self, request_id: str) -> Place | None:
        """Where a request stands in line; None for one that does not wait."""
        waiting = self._waiting.get(request_id)
        return None if waiting is None else self._place(waiting)

    def serve(self) -> None:
        """Hand those who wait to whatever has room for them."""
        if not self._waiting:
            return
        self._room_again = True
        if self._serving:
            return  # a request that ends at once frees its slot and calls this again: one more turn below
        self._serving = True
        try:
            while self._waiting and self._room_again:
                self._room_again = False
                self._serve_once()
        finally:
            self._serving = False

    def sweep(self) -> None:
        """Charge for what was given, answer those whose time is over, and look for room that came by itself."""
        now = self._fleet.clock()
        self._note_drain(now)
        for run in self._routed.runs:
            if run.attempts:
                self._charge_up_to(run, run.estimated + self._waiting_room.tokens(0, run.chunks))
        self._expire(now)
        self.serve()

    async def run(self) -> None:
        """Sweep until cancelled."""
        while True:
            await asyncio.sleep(SWEEP_S)
            try:
                self.sweep()
            except Exception:  # the border of one turn
                log.exception("sweep failed")

    # waiting

    def _hold(self, request: Request, reply: Reply) -> Call:
        """No node has room now, or others wait already: let it wait, or say why not."""
        now = self._fleet.clock()
        waiting = Waiting(self, request, reply, now)
        place = waiting.place = self._place(waiting)
        if request.avoid:  # the same question is at a node already: asking a second time is not worth a wait
            reply.fail(Overloaded("No second node had room.", retry_after_s=LEAST_RETRY_S))
            return waiting
        refusal = self._too_late(request, place, now)
        if refusal is not None:
            self.refused_late += 1
            reply.fail(refusal)
            return waiting
        shed = self._waiting_room.join(waiting)
        if not shed or shed[0].ticket is not waiting:
            self.joined += 1
            self._waiting[request.id] = waiting
        for each in shed:
            self._send_away(each)
        return waiting

    def _too_late(self, request: Request, place: Place, now: float) -> SutazaiError | None:
        """Why it is no use to wait; None where it may be."""
        rules = self._waiting_room.rules
        left_s = request.deadline_at - now if request.deadline_at else inf
        if left_s <= 0.0:
            return Overloaded("The deadline of the request had passed before it could be sent.", retry_after_s=0.0)
        limit_s = min(left_s, rules.max_wait_s)
        drain = self._drains.get(request.model)
        if place.eta_s is None or place.eta_s <= DOUBT * limit_s or drain is None or not drain.is_sure:
            return None
        what = "its deadline" if left_s < rules.max_wait_s else f"the {rules.max_wait_s:g} s that a request may wait"
        return Overloaded(
            f"{place.position - 1} requests are waiting before this one, and its turn would have come in about "
            f"{place.eta_s:.0f} s, after {what}; come back later.",
            retry_after_s=max(place.eta_s - limit_s, LEAST_RETRY_S),
            extra=place.header_lines,
        )

    def _send_away(self, shed: Shed[Waiting]) -> None:
        waiting = shed.ticket
        model = waiting.request.model
        count = self._count(model)
        retry_after_s = self._retry_after_s(model)
        extra = waiting.place.header_lines
        self._waiting.pop(waiting.request.id, None)
        if shed.is_greedy:
            self.shed_greedy += 1
            message = f"{count} requests are waiting already, and most of them are yours; come back later."
            waiting.fail(TooManyWaiting(message, retry_after_s=retry_after_s, extra=extra))
        else:
            self.shed_full += 1
            message = f"{count} requests are waiting already; come back later."
            waiting.fail(Overloaded(message, retry_after_s=retry_after_s, extra=extra))

    def leave(self, waiting: Waiting) -> None:
        """It waits no more. For `Waiting` alone."""
        if self._waiting.get(waiting.request.id) is waiting:  # sent away from one line, it may wait in another model's
            del self._waiting[waiting.request.id]
            self.left += 1
            self._waiting_room.leave(waiting)

    def _expire(self, now: float) -> None:
        late = [waiting for waiting in self._waiting.values() if self._is_late(waiting, now)]
        for waiting in late:
            if self._waiting.get(waiting.request.id) is waiting:  # it may have left as another was told
                self._tell_late(waiting, now)

    def _is_late(self, waiting: Waiting, now: float) -> bool:
        is_past = 0.0 < waiting.request.deadline_at < now
        return is_past or now - waiting.joined_at > self._waiting_room.rules.max_wait_s

    def _tell_late(self, waiting: Waiting, now: float) -> None:
        """Its time is over: answer it."""
        del self._waiting[waiting.request.id]
        self._waiting_room.leave(waiting)
        self.expired += 1
        is_past = 0.0 < waiting.request.deadline_at < now
        limit = f"within {self._waiting_room.rules.max_wait_s:g} s"
        message = f"No slot became free {'before the deadline of the request' if is_past else limit}; come back later."
        retry_after_s = self._retry_after_s(waiting.request.model)
        waiting.fail(Overloaded(message, retry_after_s=retry_after_s, extra=waiting.place.header_lines))

    # serving

    def _serve_once(self) -> None:
        full: set[str] = set()
        fleet, waiting_room = self._fleet, self._waiting_room

        def room(model: str) -> Room:
            return Room.NONE if model in full else fleet.room(model)

        now = fleet.clock()
        while (waiting := waiting_room.pick(now, room)) is not None:
            request = waiting.request
            if self._is_late(waiting, now):
                self._tell_late(waiting, now)
                continue
            state = fleet.choose(request, (), now)
            if state is None:
                full.add(request.model)
                continue
            del self._waiting[request.id]
            self.served += 1
            charged = waiting_room.take(waiting, now)
            run = self._routed.enter(request, waiting)
            run.estimated = run.charged = charged
            waiting.begin(run)
            run.send(state, now)
        self._refuse_hopeless()

    def _refuse_hopeless(self) -> None:
        """Tell those who wait for a model that no node has any more."""
        for model in list(self._lines):
            refusal = self._routed.refusal(model)
            if refusal is None:
                continue
            # all are out before the first is told: a client that asks again at once must not join them
            hopeless = self._waiting_room.empty(model)
            for waiting in hopeless:
                del self._waiting[waiting.request.id]
            for waiting in hopeless:
                waiting.fail(refusal)

    # what was given

    def _note_end(self, run: Run, usage: Usage | None) -> None:
        model = run.request.model
        self._ended[model] = self._ended.get(model, 0) + 1
        if run.charged or self._shares.waiting:
            taken = usage or Usage(len(run.request.body) // BYTES_PER_TOKEN, run.chunks)
            self._charge_up_to(run, self._waiting_room.tokens(taken.input_tokens, taken.output_tokens))
            if run.estimated:
                self._waiting_room.settle(run.request.tenant, run.estimated)

    def _charge_up_to(self, run: Run, due: float) -> None:
        tokens = due - run.charged
        if not self._shares.waiting:
            run.forgiven = True
        if tokens > 0.0 or not run.forgiven:
            self._waiting_room.charge(run.request.tenant, tokens)
        run.charged = due

    # how fast it goes

    def _note_drain(self, now: float) -> None:
        elapsed_s, self._swept_at = now - self._swept_at, now
        ended, self._ended = self._ended, {}
        in_flight: dict[str, int] = {}
        for run in self._routed.runs:
            model = run.request.model
            in_flight[model] = in_flight.get(model, 0) + bool(run.node)
        for model in {*in_flight, *ended} - self._drains.keys():
            self._drains[model] = Drain()
        for model, drain in self._drains.items():
            drain.note(
                in_flight=in_flight.get(model, 0),
                ended=ended.get(model, 0),
                elapsed_s=elapsed_s,
                is_waited_for=model in self._lines,
            )

    def _place(self, waiting: Waiting) -> Place:
        position = self._waiting_room.position(waiting)
        drain = self._drains.get(waiting.request.model)
        eta_s = position / drain.per_s if drain is not None and drain.is_known else None
        return Place(position, eta_s)

    def _retry_after_s(self, model: str) -> float:
        """When those who wait now will have had their turn or given up: sooner there is hardly a place."""
        drain = self._drains.get(model) or Drain()
        drained_s = self._count(model) / drain.per_s
        return max(min(drained_s, self._waiting_room.rules.max_wait_s), LEAST_RETRY_S)

    def _count(self, model: str) -> int:
        line = self._lines.get(model)
        return 0 if line is None else line.count


class Waiting(Ticket):
    """One request that had to wait: `Call` to the client side, and `Reply` to its run so as to say how it waited."""

    __slots__ = ("_admitted", "_paused", "_reply", "_run", "chunk", "end", "fail", "place")

    def __init__(self, admitted: Admitted, request: Request, reply: Reply, now: float) -> None:
        super().__init__(request, now)
        self._admitted = admitted
        self._reply = reply
        self._run: Run | None = None
        self._paused = False
        self.place = Place(0, None)
        """Where it stood when it came."""
        # what is passed on as it is costs nothing this way
        self.chunk = reply.chunk
        self.end = reply.end
        self.fail = reply.fail

    def begin(self, run: Run) -> None:
        """Its turn has come; the run is about to be sent."""
        self._run = run
        if self._paused:
            run.pause()

    # Call

    def cancel(self) -> None:
        if self._run is not None:
            self._run.cancel()
        else:
            self._admitted.leave(self)

    def pause(self) -> None:
        self._paused = True
        if self._run is not None:
            self._run.pause()

    def resume(self) -> None:
        self._paused = False
        if self._run is not None:
            self._run.resume()

    # Reply

    def head(self, head: Head) -> None:
        head.extra += self.place.header_lines
        self._reply.head(head)

    def whole(self, head: Head, body: bytes, usage: Usage | None) -> None:
        head.extra += self.place.header_lines
        self._reply.whole(head, body, usage)

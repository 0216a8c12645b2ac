"""Who is next, who is sent away, and that it is fair: the waiting room as a pure thing."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sutazai.core.request import Endpoint, Priority, Request
from sutazai.policy.admission import BYTES_PER_TOKEN, AdmissionRules, WaitingRoom
from sutazai.policy.drain import GUESSED_SERVICE_S, Drain
from sutazai.policy.line import Ticket
from sutazai.policy.routing import Room
from sutazai.policy.shares import Shares

RULES = AdmissionRules(
    max_waiting=100,
    max_waiting_bytes=10**9,
    max_wait_s=120.0,
    output_weight=2.0,
    promote_after_s=30.0,
    swap_patience_s=10.0,
)
HIGH, NORMAL, LOW = Priority
numbers = itertools.count(1)


def ticket(
    tenant: str = "x",
    model: str = "m",
    *,
    priority: Priority = NORMAL,
    tokens: int = 1,
    at: float = 0.0,
) -> Ticket:
    """A request whose input is estimated at so many tokens."""
    body = bytes(tokens * BYTES_PER_TOKEN)
    request = Request(f"r{next(numbers)}", Endpoint.OPENAI_CHAT, model, True, body, tenant, "", at)
    request.priority = priority
    return Ticket(request, at)


def waiting_room(rules: AdmissionRules = RULES, weights: Mapping[str, float] | None = None) -> WaitingRoom[Ticket]:
    return WaitingRoom(rules, weight=lambda tenant: (weights or {}).get(tenant, 1.0))


def warm(_model: str) -> Room:
    return Room.WARM


def serve(room: WaitingRoom[Ticket], now: float = 0.0, space: Callable[[str], Room] = warm) -> Ticket:
    """Pick and take the next one, whose estimate is the truth."""
    found = room.pick(now, space)
    assert found is not None
    room.settle(found.request.tenant, room.take(found, now))
    return found


def serve_all(room: WaitingRoom[Ticket], now: float = 0.0) -> list[Ticket]:
    return [serve(room, now) for _ in range(room.shares.waiting)]


def of(tickets: list[Ticket]) -> str:
    """The tenants, in order."""
    return "".join(each.request.tenant for each in tickets)


# order


def test_one_tenant_is_served_in_order_of_arrival() -> None:
    room = waiting_room()
    tickets = [ticket() for _ in range(5)]
    for each in tickets:
        room.join(each)

    assert serve_all(room) == tickets


def test_tenants_take_turns_however_many_each_has_waiting() -> None:
    room = waiting_room()
    for tenant in "xxxxxxyz":
        room.join(ticket(tenant))

    assert of(serve_all(room)) == "xyzxxxxx"


def test_who_was_given_less_goes_first() -> None:
    """x has had a long answer meanwhile; y gets as much before x is served again."""
    room = waiting_room()
    for tenant in "xyxyyy":
        room.join(ticket(tenant, tokens=10))
    first = serve(room)
    room.charge("x", room.tokens(0, 10))

    assert first.request.tenant == "x"
    assert of([serve(room) for _ in range(4)]) == "yyyx"


def test_a_tenant_of_twice_the_weight_gets_twice_as_much() -> None:
    room = waiting_room(weights={"y": 2.0})
    for tenant in "xxxxxxyyyyyy":
        room.join(ticket(tenant, tokens=10))

    assert Counter(of([serve(room) for _ in range(6)])) == {"x": 2, "y": 4}


def test_a_higher_class_goes_first_whoever_was_given_what() -> None:
    room = waiting_room()
    for tenant, priority in (("x", LOW), ("y", NORMAL), ("z", HIGH)):
        room.join(ticket(tenant, priority=priority))
    room.charge("z", 1000.0)

    assert of(serve_all(room)) == "zyx"


def test_a_class_that_was_passed_over_for_long_sends_its_first_up() -> None:
    room = waiting_room()
    low = [ticket("x", priority=LOW) for _ in range(3)]
    for each in low:
        room.join(each)
    order = []
    for second in range(100):
        room.join(ticket("y", at=float(second)))
        order.append(serve(room, float(second)))

    assert [order.index(each) for each in low] == [30, 60, 90]


def test_requests_do_not_go_up_by_age_alone() -> None:
    """The long backlog of one tenant would else go before whatever others ask."""
    room = waiting_room()
    old = [ticket("x") for _ in range(50)]
    for each in old:
        room.join(each)
    assert serve(room, 200.0) is old[0]
    room.join(ticket("y", at=200.0))
    room.join(ticket("y", at=200.0))

    assert of([serve(room, 300.0) for _ in range(4)]) == "xyxy"


def test_a_steady_flow_of_high_requests_does_not_starve_a_low_one() -> None:
    """Nor do those for another model on the same nodes."""
    for model in ("m", "n"):
        room = waiting_room()
        low = ticket("x", priority=LOW)
        room.join(low)
        now, served = 0.0, None
        while served is not low:
            now += 1.0
            room.join(ticket("y", model, priority=HIGH, at=now))
            room.join(ticket("y", model, priority=HIGH, at=now))
            served = serve(room, now)

            assert now < 100.0
        assert now > RULES.promote_after_s


def test_who_was_away_does_not_come_back_with_a_claim() -> None:
    """x was served a lot while y did not ask; now they take turns."""
    room = waiting_room()
    for _ in range(50):
        room.join(ticket("x", tokens=100))
    for _ in range(40):
        serve(room)
    for _ in range(10):
        room.join(ticket("y", tokens=100))

    assert Counter(of([serve(room) for _ in range(10)])) == {"x": 5, "y": 5}


def test_what_was_given_while_nobody_waited_is_held_against_nobody() -> None:
    room = waiting_room()
    room.charge("x", 10_000.0)
    for tenant in "xyxy":
        room.join(ticket(tenant))

    assert of(serve_all(room)) == "xyxy"


def test_what_was_charged_too_much_is_given_back_at_once() -> None:
    """The estimate of x's input was far from the truth; it goes before those who were given more."""
    room = waiting_room()
    for tenant in "xxyyzz":
        room.join(ticket(tenant, tokens=10))
    assert of([serve(room) for _ in range(3)]) == "xyz"
    room.pick(0.0, warm)  # whoever is next was looked for meanwhile
    room.charge("z", -9.0)

    assert of(serve_all(room)) == "zxy"


def test_the_floor_falls_with_what_is_given_back() -> None:
    shares = Shares(lambda _tenant: 1.0)
    for tenant in "xy":
        shares.come(tenant)
    shares.charge("x", 10.0)
    shares.charge("y", 20.0)
    before = shares.floor()
    shares.charge("y", -15.0)

    assert (before, shares.floor()) == (10.0, 5.0)


def test_a_tenant_served_without_waiting_while_others_wait_starts_where_they_are() -> None:
    shares = Shares(lambda _tenant: 1.0)
    share = shares.come("x")
    shares.charge("x", 100.0)
    shares.admit_at_once("y")
    shares.charge("y", 10.0)

    assert share.counter == 100.0
    assert shares.of("y").counter == 110.0


def test_tenants_that_came_once_are_forgotten() -> None:
    shares = Shares(lambda _tenant: 1.0)
    for number in range(5000):
        share = shares.come(f"t{number}")
        shares.charge(f"t{number}", 10.0)
        shares.go(share)

    assert len(shares._shares) < 3000


# fairness: the bound


@dataclass(slots=True, eq=False)
class Running:
    """A request at the simulated node."""

    tenant: str
    estimate: float
    """Charged when it was admitted."""
    input_tokens: int
    output_tokens: int
    charged: float
    given: int = 0


class Node:
    """Serves tenants that always have someone waiting, and counts what each was truly given."""

    def __init__(
        self, tenants: int, slots: int, sizes: list[tuple[int, int, int]], weights: Mapping[str, float]
    ) -> None:
        """
        A node that nobody asked yet.

        Args:
            sizes: of requests, over and over: estimated input, true input, output.
        """
        self.room = waiting_room(weights=weights)
        self.slots = slots
        self.sizes = itertools.cycle(sizes)
        self.running: list[Running] = []
        self.served = {f"t{number}": 0.0 for number in range(tenants)}
        for tenant in self.served:
            self.room.join(ticket(tenant, tokens=1))

    def admit(self) -> None:
        while len(self.running) < self.slots:
            estimate, input_tokens, output_tokens = next(self.sizes)
            found = self.room.pick(0.0, warm)
            assert found is not None
            tenant = found.request.tenant
            self.room.join(ticket(tenant, tokens=estimate))
            charged = self.room.take(found, 0.0)
            self.served[tenant] += input_tokens
            self.running.append(Running(tenant, charged, input_tokens, output_tokens, charged))

    def give(self, most: int) -> None:
        """Each gets some tokens; who has all of them is settled."""
        for one in list(self.running):
            tokens = min(most, one.output_tokens - one.given)
            one.given += tokens
            self.served[one.tenant] += RULES.output_weight * tokens
            if one.given == one.output_tokens:
                self.charge(one, self.room.tokens(one.input_tokens, one.output_tokens))
                self.room.settle(one.tenant, one.estimate)
                self.running.remove(one)

    def sweep(self) -> None:
        for one in self.running:
            self.charge(one, one.estimate + self.room.tokens(0, one.given))

    def charge(self, one: Running, due: float) -> None:
        self.room.charge(one.tenant, due - one.charged)
        one.charged = due


sizes = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 50), st.integers(0, 40)), min_size=1, max_size=20)


@given(
    tenants=st.integers(2, 5),
    slots=st.integers(1, 6),
    sizes=sizes,
    pace=st.integers(1, 10),
    sweep_each=st.integers(1, 8),
    weights=st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=5, max_size=5),
)
@settings(max_examples=150, deadline=None)
def test_tenants_that_always_wait_are_given_alike_within_the_bound(
    tenants: int, slots: int, sizes: list[tuple[int, int, int]], pace: int, sweep_each: int, weights: list[float]
) -> None:
    """
    However different their requests and however wrong the estimates.

    The bound is that of VTC (Sheng et al., OSDI 2024, theorem 4.4): 2 * max(w_in * longest input, w_out * tokens at the
    node at once), here divided by the weights.
    """
    shares = {f"t{number}": weights[number] for number in range(tenants)}
    node = Node(tenants, slots, sizes, shares)
    longest_input = max(max(estimate, true) for estimate, true, _ in sizes)
    at_once = slots * (longest_input + max(output for _, _, output in sizes))
    bound = 2.0 * max(longest_input, RULES.output_weight * at_once) / min(shares.values())
    for step in range(300):
        node.admit()
        node.give(pace)
        if step % sweep_each == 0:
            node.sweep()
        given_now = [node.served[tenant] / shares[tenant] for tenant in node.served]

        assert max(given_now) - min(given_now) <= bound


# between models


class Swapping:
    """A node with one slot that holds one model in memory, and its clock."""

    def __init__(self, service_s: float) -> None:
        self.room = waiting_room()
        self.service_s = service_s
        self.now = 0.0
        self.loaded = "a"
        self.loads = 0
        self.waits: dict[str, list[float]] = {"a": [], "b": [], "c": []}

    def space(self, model: str) -> Room:
        return Room.WARM if model == self.loaded else Room.COLD

    def ask(self, model: str, tenant: str = "x") -> None:
        self.room.join(ticket(tenant, model, at=self.now))

    def work(self) -> str:
        """Serve one request from beginning to end; the model that it was for."""
        found = serve(self.room, self.now, self.space)
        model = found.request.model
        self.waits[model].append(self.now - found.joined_at)
        self.loads += model != self.loaded
        self.loaded = model
        self.now += self.service_s
        return model


def test_what_needs_no_load_goes_first() -> None:
    node = Swapping(service_s=1.0)
    for model in "bababa":
        node.ask(model)

    assert "".join(node.work() for _ in range(6)) == "aaabbb"
    assert node.loads == 1


def test_of_two_models_that_always_wait_each_stays_as_long_as_the_other_is_patient() -> None:
    """AAAB, not ABAB: one load in ten seconds where each request takes one."""
    node = Swapping(service_s=1.0)
    for _ in range(100):
        node.ask("a")
        node.ask("b")
    order = "".join(node.work() for _ in range(100))

    assert node.loads <= 100 / RULES.swap_patience_s + 1
    assert max(len(list(same)) for _, same in itertools.groupby(order)) <= RULES.swap_patience_s + 1
    assert order.count("b") >= 40


@given(
    service_s=st.sampled_from([0.5, 1.0, 3.0, 8.0]),
    when=st.lists(st.integers(0, 60), min_size=1, max_size=5, unique=True),
)
@settings(deadline=None)
def test_the_first_of_a_cold_model_waits_no_longer_than_the_patience_and_one_service(
    service_s: float, when: list[int]
) -> None:
    node = Swapping(service_s)
    due = dict.fromkeys(when, False)
    node.ask("a")
    while node.now < 100.0:
        node.ask("a")
        for at, asked in due.items():
            if not asked and node.now >= at and "b" not in node.room.lines:
                due[at] = True
                node.ask("b")
        node.work()

    assert len(node.waits["b"]) >= 1
    assert max(node.waits["b"]) <= RULES.swap_patience_s + service_s


def test_a_model_without_room_is_passed_over_without_end() -> None:
    """It has no slot; the others must not wait for it."""
    room = waiting_room()
    room.join(ticket(model="full"))
    room.join(ticket(model="free"))

    found = room.pick(1000.0, lambda model: Room.NONE if model == "full" else Room.COLD)

    assert found is not None
    assert found.request.model == "free"
    assert room.pick(1000.0, lambda _model: Room.NONE) is None


# bounds


def test_a_greedy_tenant_loses_its_newest_for_the_request_of_another() -> None:
    room = waiting_room(replace(RULES, max_waiting=4))
    greedy = [ticket("x") for _ in range(4)]
    for each in greedy:
        assert room.join(each) == []
    modest = ticket("y")
    (shed,) = room.join(modest)

    assert shed.ticket is greedy[-1]
    assert shed.is_greedy
    assert of(serve_all(room)) == "xyxx"


def test_of_a_greedy_tenant_the_lowest_class_goes_first() -> None:
    room = waiting_room(replace(RULES, max_waiting=3))
    tickets = [ticket("x", priority=priority) for priority in (LOW, HIGH, NORMAL)]
    for each in tickets:
        room.join(each)
    (shed,) = room.join(ticket("y"))

    assert shed.ticket is tickets[0]


def test_a_greedy_tenant_gets_no_further_place_and_is_told_so() -> None:
    room = waiting_room(replace(RULES, max_waiting=4))
    for tenant in "xxxy":
        room.join(ticket(tenant))
    newcomer = ticket("x")
    (shed,) = room.join(newcomer)

    assert shed.ticket is newcomer
    assert shed.is_greedy


def test_where_all_have_equally_few_nobody_is_greedy() -> None:
    room = waiting_room(replace(RULES, max_waiting=3))
    for tenant in "xyz":
        room.join(ticket(tenant))
    for tenant in "xw":
        newcomer = ticket(tenant)
        (shed,) = room.join(newcomer)

        assert shed.ticket is newcomer
        assert not shed.is_greedy


def test_a_tenant_alone_is_not_greedy() -> None:
    room = waiting_room(replace(RULES, max_waiting=2))
    for _ in range(2):
        room.join(ticket())

    assert [shed.is_greedy for shed in room.join(ticket())] == [False]


def test_an_urgent_request_takes_the_place_of_one_of_its_own_tenant_that_is_not() -> None:
    room = waiting_room(replace(RULES, max_waiting=2))
    low, high = ticket(priority=LOW), ticket(priority=HIGH)
    for each in (ticket(), low):
        room.join(each)
    (shed,) = room.join(high)

    assert shed.ticket is low
    assert serve(room) is high


def test_bodies_that_wait_are_bounded_together() -> None:
    """Two large ones make room for a tenant that had none."""
    room = waiting_room(replace(RULES, max_waiting_bytes=4000))
    large = [ticket("x", tokens=250) for _ in range(4)]
    for each in large:
        room.join(each)
    shed = room.join(ticket("y", tokens=400))

    assert [each.ticket for each in shed] == [large[3], large[2]]
    assert room.lines["m"].size_bytes <= 4000


def test_a_body_larger_than_the_line_gets_no_place() -> None:
    room = waiting_room(replace(RULES, max_waiting_bytes=4000))
    (shed,) = room.join(ticket(tokens=1001))

    assert not shed.is_greedy
    assert not room.lines


def test_a_line_of_no_places_takes_nobody() -> None:
    room = waiting_room(replace(RULES, max_waiting=0))

    assert len(room.join(ticket())) == 1
    assert not room.lines


# position


def test_the_position_is_that_of_fair_turns_to_come() -> None:
    """x came with many; y waits for one of them only, or two."""
    room = waiting_room()
    many = [ticket("x") for _ in range(10)]
    for each in many:
        room.join(each)
    newcomer = ticket("y")
    foretold = room.position(newcomer)
    room.join(newcomer)

    assert foretold == room.position(newcomer) == 2
    assert [room.position(each) for each in many[:3]] == [1, 3, 4]
    assert room.position(ticket("y", priority=LOW)) == 12
    assert room.position(ticket(model="other")) == 1


@given(tenants=st.text("xyz", min_size=1, max_size=12))
def test_without_newcomers_positions_come_true(tenants: str) -> None:
    """For requests alike, give or take the tenants, for turns within a round are not foretold."""
    room = waiting_room()
    tickets = [ticket(tenant) for tenant in tenants]
    for each in tickets:
        room.join(each)
    foretold = {each: room.position(each) for each in tickets}
    order = serve_all(room)

    assert all(abs(foretold[each] - turn) <= 2 for turn, each in enumerate(order, 1))


# everything, in any order


class RoomMachine(RuleBasedStateMachine):
    """Whatever joins, leaves or is served: counts stay true and nothing stays behind."""

    def __init__(self) -> None:
        super().__init__()
        self.bounds = replace(RULES, max_waiting=6, max_waiting_bytes=400)
        self.room = waiting_room(self.bounds, {"x": 3.0})
        self.waiting: list[Ticket] = []
        self.now = 0.0

    @rule(
        tenant=st.sampled_from("xyz"),
        model=st.sampled_from("mn"),
        priority=st.sampled_from(Priority),
        tokens=st.integers(0, 40),
    )
    def joins(self, tenant: str, model: str, priority: Priority, tokens: int) -> None:
        newcomer = ticket(tenant, model, priority=priority, tokens=tokens, at=self.now)
        shed = [each.ticket for each in self.room.join(newcomer)]
        assert newcomer not in shed or shed == [newcomer]
        self.waiting = [each for each in [*self.waiting, newcomer] if each not in shed]

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leaves(self, data: st.DataObject) -> None:
        gone = data.draw(st.sampled_from(self.waiting))
        self.waiting.remove(gone)
        self.room.leave(gone)

    @precondition(lambda self: self.waiting)
    @rule(space=st.dictionaries(st.sampled_from("mn"), st.sampled_from(Room)))
    def is_served(self, space: dict[str, Room]) -> None:
        found = self.room.pick(self.now, lambda model: space.get(model, Room.WARM))
        able = [each for each in self.waiting if space.get(each.request.model, Room.WARM) is not Room.NONE]

        assert (found is None) == (not able)
        if found is not None:
            same = [each for each in able if each.request.model == found.request.model]
            assert found.rank == min(each.rank for each in same)
            peers = {each.request.tenant for each in same if each.rank == found.rank}
            assert self.counter(found.request.tenant) == min(map(self.counter, peers))
            self.room.take(found, self.now)
            self.waiting.remove(found)

    @rule(tenant=st.sampled_from("xyzw"), tokens=st.integers(-20, 100))
    def is_charged(self, tenant: str, tokens: int) -> None:
        before = self.counter(tenant)
        self.room.charge(tenant, tokens)

        assert self.counter(tenant) >= before or tokens < 0

    @rule(seconds=st.sampled_from([0.0, 1.0, 11.0, 31.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(model=st.sampled_from("mn"))
    def a_model_goes(self, model: str) -> None:
        gone = self.room.empty(model)
        assert set(gone) == {each for each in self.waiting if each.request.model == model}
        self.waiting = [each for each in self.waiting if each not in gone]

    @invariant()
    def counts_are_true(self) -> None:
        assert self.room.shares.waiting == len(self.waiting)
        assert self.room.lines.keys() == {each.request.model for each in self.waiting}
        for model, line in self.room.lines.items():
            here = [each for each in self.waiting if each.request.model == model]
            assert set(line) == set(here)
            assert line.count == len(here) <= self.bounds.max_waiting
            assert line.size_bytes == sum(each.size_bytes for each in here) <= self.bounds.max_waiting_bytes
            assert len(line.owners) == len({each.request.tenant for each in here})
            assert all(1 <= self.room.position(each) <= len(here) for each in here)

    @invariant()
    def the_floor_is_what_the_lowest_was_surely_given(self) -> None:
        shares = {self.room.shares.of(each.request.tenant) for each in self.waiting}
        lowest = min((share.counter for share in shares), default=0.0)

        assert not shares or self.room.shares.floor() in {one.sure for one in shares if one.counter == lowest}

    def counter(self, tenant: str) -> float:
        return self.room.shares.of(tenant).counter


TestRoom = RoomMachine.TestCase
TestRoom.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


# how fast it goes


def test_before_anything_ended_the_rate_is_a_cautious_guess() -> None:
    drain = Drain()
    drain.note(in_flight=4, ended=0, elapsed_s=1.0, is_waited_for=True)

    assert not drain.is_known
    assert drain.per_s == 4 / GUESSED_SERVICE_S


def test_the_rate_of_a_quiet_time_is_not_taken_for_what_the_pool_can_do() -> None:
    """One request a minute, each of two seconds, on a pool that could work on four."""
    drain = Drain()
    for _ in range(10):
        for _ in range(8):
            drain.note(in_flight=1, ended=0, elapsed_s=0.25, is_waited_for=False)
        drain.note(in_flight=0, ended=1, elapsed_s=0.25, is_waited_for=False)
        for _ in range(240):
            drain.note(in_flight=0, ended=0, elapsed_s=0.25, is_waited_for=False)
    drain.note(in_flight=4, ended=0, elapsed_s=0.01, is_waited_for=True)

    assert drain.is_known
    assert drain.per_s == pytest.approx(2.0, rel=0.05)


def test_while_somebody_waits_the_rate_is_what_was_seen() -> None:
    drain = Drain()
    for _ in range(400):
        drain.note(in_flight=8, ended=2, elapsed_s=0.25, is_waited_for=True)

    assert drain.per_s == pytest.approx(8.0, rel=0.01)


def test_a_pool_that_became_slower_is_noticed() -> None:
    drain = Drain()
    for ended in [2] * 400 + [0, 1] * 240:
        drain.note(in_flight=8, ended=ended, elapsed_s=0.25, is_waited_for=True)

    assert drain.per_s == pytest.approx(2.0, rel=0.3)

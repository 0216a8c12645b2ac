"""Equal requests share one call: each hears the same bytes in order, and none can disturb another."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.stages import Asked, Client, Node, a_request

from sutazai.core.errors import FellBehind, NodeUnreachable
from sutazai.core.request import Head, Priority, Request, Usage
from sutazai.gateway.coalesced import BEHIND_BYTES, JOINABLE_BYTES, Coalesced
from sutazai.ports.inference import Call, Reply

SAME = b"1" * 32
READ_ALREADY_BYTES = 100
"""What may come of a node at a time after it was paused."""
GONE = NodeUnreachable("It was reset.", node="a")


def same(**wishes: object) -> Request:
    request = a_request(fingerprint=SAME)
    for name, value in wishes.items():
        setattr(request, name, value)
    return request


def ask(coalesced: Coalesced, request: Request | None = None) -> Client:
    client = Client()
    client.call = coalesced.start(request or same(), client)
    return client


@pytest.fixture
def node() -> Node:
    return Node()


@pytest.fixture
def coalesced(node: Node) -> Coalesced:
    return Coalesced(node)


class Answering:
    """An inference that has answered before `start` returns."""

    def __init__(self, act: Callable[[Asked], None]) -> None:
        self.asked: list[Asked] = []
        self._act = act

    def start(self, request: Request, reply: Reply) -> Call:
        asked = Asked(request, reply)
        self.asked.append(asked)
        self._act(asked)
        return asked


def test_a_hundred_equal_requests_at_once_ask_one_node_once(node: Node, coalesced: Coalesced) -> None:
    clients = [ask(coalesced) for _ in range(100)]
    node.last.stream(b"a", b"b", usage=Usage(3, 4))

    assert len(node.asked) == 1
    assert {client.body for client in clients} == {b"ab"}
    assert [client.cache for client in clients] == [b"bypass"] + [b"coalesced"] * 99
    assert coalesced.coalesced == 99
    assert coalesced.flights == 0


def test_the_tokens_are_counted_once(node: Node, coalesced: Coalesced) -> None:
    streams = [ask(coalesced) for _ in range(3)]
    node.last.stream(b"a", usage=Usage(3, 4))
    wholes = [ask(coalesced) for _ in range(3)]
    node.last.whole(b"{}", usage=Usage(5, 6))

    assert [client.ends for client in streams] == [[Usage(3, 4)], [Usage()], [Usage()]]
    assert [client.ends for client in wholes] == [[Usage(5, 6)], [Usage()], [Usage()]]


def test_requests_without_a_fingerprint_pass_untouched(node: Node, coalesced: Coalesced) -> None:
    client = Client()
    call = coalesced.start(a_request(), client)

    assert node.last.reply is client
    assert call is node.last


@pytest.mark.parametrize("wish", [b"no-store", b"no-cache", b"max-age=0", b"max-age=5, no-cache"])
def test_who_wants_an_answer_of_his_own_neither_joins_nor_is_joined(
    wish: bytes, node: Node, coalesced: Coalesced
) -> None:
    clients = [ask(coalesced), ask(coalesced, same(cache_control=wish)), ask(coalesced, same(cache_control=wish))]
    clients.append(ask(coalesced, same(cache_control=b"max-age=60")))

    assert len(node.asked) == 3
    assert coalesced.coalesced == 1


def test_a_late_joiner_gets_what_was_said_so_far_at_once(node: Node, coalesced: Coalesced) -> None:
    first = ask(coalesced)
    node.last.head()
    for part in (b"a", b"b", b"c"):
        node.last.chunk(part)
    late = ask(coalesced)

    assert (late.parts, late.cache) == ([b"abc"], b"coalesced")
    node.last.chunk(b"d")
    node.last.end()
    assert first.parts == [b"a", b"b", b"c", b"d"]
    assert late.body == b"abcd"


def test_lines_that_are_meant_for_the_first_reach_nobody_else(node: Node, coalesced: Coalesced) -> None:
    """Stages further out write into the head they get."""

    class Writing(Client):
        def head(self, head: Head) -> None:
            head.extra += b"x-ratelimit-remaining-tokens: 5\r\n"
            Client.head(self, head)

    first = Writing()
    coalesced.start(same(), first)
    second = ask(coalesced)
    node.last.head()
    third = ask(coalesced)

    assert first.heads[0].extra
    assert [second.heads[0].extra, third.heads[0].extra] == [b"", b""]


def test_an_error_reaches_everybody_and_the_next_asks_anew(node: Node, coalesced: Coalesced) -> None:
    clients = [ask(coalesced) for _ in range(3)]
    node.last.head()
    node.last.fail(GONE)
    ask(coalesced)

    assert [client.error for client in clients] == [GONE] * 3
    assert len(node.asked) == 2


def test_the_first_may_leave_and_the_others_hear_on(node: Node, coalesced: Coalesced) -> None:
    first, second = ask(coalesced), ask(coalesced)
    first.leave()
    node.last.stream(b"a", usage=Usage(1, 2))

    assert not node.last.cancelled
    assert (second.body, second.ends) == (b"a", [Usage(1, 2)])
    assert second.cache == b"bypass"  # nobody else is there to have been first


def test_the_last_who_leaves_ends_the_call(node: Node, coalesced: Coalesced) -> None:
    clients = [ask(coalesced) for _ in range(3)]
    for client in clients:
        assert not node.last.cancelled
        client.leave()

    assert node.last.cancelled
    assert coalesced.flights == 0
    ask(coalesced)
    assert len(node.asked) == 2


def test_a_slow_listener_slows_nobody_and_falls_behind_alone(node: Node, coalesced: Coalesced) -> None:
    fast, slow = ask(coalesced), ask(coalesced)
    assert slow.call is not None
    slow.call.pause()
    node.last.head()
    part = bytes(64 * 1024)
    for _ in range(BEHIND_BYTES // len(part)):
        node.last.chunk(part)
    assert slow.ends == []
    node.last.chunk(b"one more")

    assert isinstance(slow.error, FellBehind)
    assert slow.parts == []
    assert not node.last.paused
    node.last.end()
    assert len(fast.body) == BEHIND_BYTES + 8
    assert fast.ends == [None]


def test_a_slow_listener_that_reads_again_gets_all_in_order(node: Node, coalesced: Coalesced) -> None:
    fast, slow = ask(coalesced), ask(coalesced)
    assert slow.call is not None
    node.last.head()
    node.last.chunk(b"a")
    slow.call.pause()
    node.last.chunk(b"b")
    node.last.chunk(b"c")
    node.last.end(Usage(1, 2))
    assert (slow.parts, slow.ends) == ([b"a"], [])
    slow.call.resume()

    assert slow.parts == fast.parts == [b"a", b"b", b"c"]
    assert slow.ends == [Usage()]


def test_who_pauses_again_while_catching_up_gets_no_more(node: Node, coalesced: Coalesced) -> None:
    class Cautious(Client):
        def chunk(self, data: bytes) -> None:
            Client.chunk(self, data)
            assert self.call is not None
            self.call.pause()

    cautious = Cautious()
    cautious.call = coalesced.start(same(), cautious)
    cautious.call.pause()
    ask(coalesced)
    node.last.stream(b"a", b"b", b"c")
    cautious.call.resume()
    assert cautious.parts == [b"a"]
    cautious.call.resume()
    cautious.call.resume()

    assert cautious.parts == [b"a", b"b", b"c"]
    assert cautious.ends == [Usage()] or cautious.ends == [None]


def test_the_node_is_paused_only_while_nobody_reads(node: Node, coalesced: Coalesced) -> None:
    one, other = ask(coalesced), ask(coalesced)
    assert one.call is not None
    assert other.call is not None
    seen: list[bool] = []

    def look() -> None:
        seen.append(node.last.paused)

    one.call.pause()
    look()
    other.call.pause()
    look()
    late = ask(coalesced)
    look()
    late.leave()
    look()
    one.call.resume()
    look()
    one.leave()
    look()

    assert seen == [False, True, False, True, False, True]


def test_an_answer_that_grew_large_is_joined_no_more(node: Node, coalesced: Coalesced) -> None:
    first = ask(coalesced)
    node.last.head()
    for _ in range(JOINABLE_BYTES // 2**20 + 1):
        node.last.chunk(bytes(2**20))
    ask(coalesced)

    assert len(node.asked) == 2
    node.asked[0].end()
    assert len(first.body) > JOINABLE_BYTES
    third = ask(coalesced)
    assert len(node.asked) == 2
    node.asked[1].stream(b"x")
    assert third.body == b"x"


def test_who_reads_slowly_alone_never_falls_behind(node: Node, coalesced: Coalesced) -> None:
    """The node is paused for it; what had been read already is kept, however much it is."""
    alone = ask(coalesced)
    assert alone.call is not None
    node.last.head()
    alone.call.pause()
    node.last.chunk(bytes(BEHIND_BYTES + 1))
    node.last.end()
    assert alone.ends == []
    alone.call.resume()

    assert len(alone.body) == BEHIND_BYTES + 1
    assert alone.ends == [None]


@pytest.mark.parametrize(
    ("first", "second", "joins"),
    [
        ({}, {}, True),
        ({"priority": Priority.HIGH}, {}, True),
        ({"priority": Priority.LOW}, {}, False),
        ({}, {"deadline_at": 5.0}, True),
        ({"deadline_at": 5.0}, {}, False),
        ({"deadline_at": 5.0}, {"deadline_at": 5.0}, True),
        ({"deadline_at": 5.0}, {"deadline_at": 4.0}, True),
        ({"deadline_at": 5.0}, {"deadline_at": 6.0}, False),
    ],
)
def test_nobody_joins_what_is_less_urgent_or_ends_sooner(
    first: dict[str, object], second: dict[str, object], joins: bool, node: Node, coalesced: Coalesced
) -> None:
    ask(coalesced, same(**first))
    ask(coalesced, same(**second))
    ask(coalesced, same(**second))

    assert len(node.asked) == 1 if joins else 2


def test_an_answer_within_start_reaches_its_one_listener() -> None:
    answering = Answering(lambda asked: asked.whole(b"{}", usage=Usage(1, 2)))
    coalesced = Coalesced(answering)
    clients = [ask(coalesced), ask(coalesced)]

    assert [client.body for client in clients] == [b"{}", b"{}"]
    assert len(answering.asked) == 2
    assert not any(asked.cancelled for asked in answering.asked)


def test_who_asks_again_from_within_the_end_asks_anew(node: Node, coalesced: Coalesced) -> None:
    """A connection takes its next request while it is told of the end of the last."""
    again: list[Client] = []

    class Eager(Client):
        def end(self, usage: Usage | None) -> None:
            Client.end(self, usage)
            again.append(ask(coalesced))

    eager = Eager()
    coalesced.start(same(), eager)
    node.last.stream(b"a")

    assert len(node.asked) == 2
    assert again[0].heads == []


def test_who_joins_from_within_a_part_hears_that_part_once(node: Node, coalesced: Coalesced) -> None:
    joined: list[Client] = []

    class Calling(Client):
        def chunk(self, data: bytes) -> None:
            Client.chunk(self, data)
            if not joined:
                joined.append(ask(coalesced))

    calling = Calling()
    coalesced.start(same(), calling)
    node.last.stream(b"a", b"b")

    assert joined[0].body == calling.body == b"ab"


class CoalescedMachine(RuleBasedStateMachine):
    """Any order of joining, leaving, pausing and answering, over three kinds of question."""

    @initialize(seed=st.integers(0, 2**16))
    def begin(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.node = Node()
        self.coalesced = Coalesced(self.node)
        self.clients: list[tuple[Client, Asked]] = []
        self.said: dict[Asked, bytes] = {}
        self.headed: set[Asked] = set()
        self.failed: set[Asked] = set()
        self.paused: set[Client] = set()
        self.slow: set[Client] = set()
        """Those who were ever paused."""

    def open_calls(self) -> list[Asked]:
        return [asked for asked in self.node.asked if not asked.over]

    def present(self) -> list[Client]:
        return [client for client, _ in self.clients if not client.left and not client.ends]

    @rule(kind=st.sampled_from([b"1" * 32, b"2" * 32, b"3" * 32]))
    def join(self, kind: bytes) -> None:
        before = len(self.node.asked)
        client = Client()
        client.call = self.coalesced.start(a_request(fingerprint=kind), client)
        assert len(self.node.asked) - before <= 1
        mine = [asked for asked in self.node.asked if asked.request.fingerprint == kind and not asked.over]
        self.clients.append((client, mine[-1]))
        self.said.setdefault(mine[-1], b"")

    @precondition(lambda self: self.present())
    @rule()
    def leave(self) -> None:
        self.random.choice(self.present()).leave()

    @precondition(lambda self: self.present())
    @rule()
    def pause(self) -> None:
        client = self.random.choice(self.present())
        assert client.call is not None
        client.call.pause()
        self.paused.add(client)
        self.slow.add(client)

    @precondition(lambda self: self.paused)
    @rule()
    def resume(self) -> None:
        client = self.random.choice([client for client, _ in self.clients if client in self.paused])
        self.paused.discard(client)
        assert client.call is not None
        client.call.resume()

    @precondition(lambda self: self.open_calls())
    @rule(size=st.sampled_from([1, 7, 300_000, 1_500_000]))
    def say(self, size: int) -> None:
        asked = self.random.choice(self.open_calls())
        if asked.paused:
            size = min(size, READ_ALREADY_BYTES)
        self.begin_answer(asked)
        data = bytes([len(self.said[asked]) % 251]) * size
        self.said[asked] += data
        asked.chunk(data)

    @precondition(lambda self: self.open_calls())
    @rule(fails=st.booleans())
    def finish(self, fails: bool) -> None:
        asked = self.random.choice(self.open_calls())
        if fails:
            self.failed.add(asked)
            asked.fail(GONE)
        else:
            self.begin_answer(asked)
            asked.end(Usage(1, 2))

    @precondition(lambda self: any(asked not in self.headed for asked in self.open_calls()))
    @rule()
    def say_all(self) -> None:
        asked = self.random.choice([asked for asked in self.open_calls() if asked not in self.headed])
        self.headed.add(asked)
        self.said[asked] = b"all"
        asked.whole(b"all", usage=Usage(1, 2))

    def begin_answer(self, asked: Asked) -> None:
        if asked not in self.headed:
            self.headed.add(asked)
            asked.head()

    @invariant()
    def everybody_hears_the_same(self) -> None:
        for client, asked in self.clients:
            said = self.said[asked]
            assert said.startswith(client.body)
            assert len(client.ends) <= 1
            if client.left or isinstance(client.error, FellBehind):
                continue
            if client not in self.paused:
                assert client.body == said
                assert bool(client.ends) == asked.over
                assert (client.error is GONE) == (asked in self.failed)

    @invariant()
    def only_who_paused_can_fall_behind(self) -> None:
        for client, asked in self.clients:
            if isinstance(client.error, FellBehind):
                assert client in self.slow
                assert len(self.said[asked]) > BEHIND_BYTES

    @invariant()
    def a_call_ends_when_all_have_left(self) -> None:
        for asked in self.node.asked:
            mine = [client for client, theirs in self.clients if theirs is asked]
            gone = [client for client in mine if client.left or isinstance(client.error, FellBehind)]
            if asked.cancelled:
                assert len(gone) == len(mine)
            elif not asked.over:
                assert len(gone) < len(mine)
                here = [client for client in mine if client not in gone]
                assert asked.paused == all(client in self.paused for client in here)

    @invariant()
    def memory_is_bounded(self) -> None:
        held = 0
        for flight in self.coalesced._flights.values():
            assert sum(map(len, flight._parts)) <= JOINABLE_BYTES
            held += sum(sum(map(len, listener._behind or ())) for listener in flight._listeners)
        most = BEHIND_BYTES + 50 * READ_ALREADY_BYTES
        assert held <= most * len(self.present())

    @invariant()
    def nothing_is_left_behind(self) -> None:
        assert self.coalesced.flights <= len(self.open_calls())


CoalescedMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAnyOrder = CoalescedMachine.TestCase

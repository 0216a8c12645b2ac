"""Who leaves when, and how those whose call failed are parted."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sutazai.core.errors import (
    NodeRejected,
    NodeTimeout,
    NodeUnreachable,
    Overloaded,
    SutazaiError,
    TooLarge,
    UnknownModel,
)
from sutazai.policy.batching import MAX_BATCH_BYTES, BatchRules, Gathering, Size, parted

RULES = BatchRules(max_requests=4, max_wait_s=0.1)
ONE = Size(1, 10)


def _rejected(status: int) -> NodeRejected:
    return NodeRejected("No.", node="a", status=status)


def _busy() -> Gathering[str]:
    """One call under way, nobody waiting."""
    gathering: Gathering[str] = Gathering()
    gathering.arrive("first", ONE, RULES, is_idle=False)
    return gathering


def test_where_nothing_is_under_way_a_request_leaves_at_once() -> None:
    gathering: Gathering[str] = Gathering()

    leaving = gathering.arrive("a", ONE, RULES, is_idle=False)

    assert list(leaving) == [["a"]]
    assert gathering.under_way == 1


def test_behind_a_call_requests_gather_and_leave_together_when_it_returns() -> None:
    gathering = _busy()
    waits = [gathering.arrive(name, ONE, RULES, is_idle=False) for name in "ab"]

    leaving = gathering.returned()

    assert not any(waits)
    assert list(leaving) == [["a", "b"]]
    assert gathering.under_way == 1


def test_as_many_as_a_call_takes_leave_without_waiting_for_another_to_return() -> None:
    gathering = _busy()
    for name in "abc":
        gathering.arrive(name, ONE, RULES, is_idle=False)

    leaving = gathering.arrive("d", ONE, RULES, is_idle=False)

    assert list(leaving) == [["a", "b", "c", "d"]]
    assert gathering.under_way == 2


def test_who_has_too_many_inputs_for_those_that_wait_sends_them_off_and_waits() -> None:
    gathering = _busy()
    gathering.arrive("a", Size(2, 10), RULES, is_idle=False)

    leaving = gathering.arrive("b", Size(3, 10), RULES, is_idle=False)

    assert list(leaving) == [["a"]]
    assert gathering.waiting == 1


def test_texts_that_are_large_together_do_not_share_a_call() -> None:
    gathering = _busy()
    gathering.arrive("a", Size(1, MAX_BATCH_BYTES), RULES, is_idle=False)

    leaving = gathering.arrive("b", ONE, RULES, is_idle=False)

    assert list(leaving) == [["a"]]


def test_a_node_that_does_nothing_is_given_all_who_wait() -> None:
    gathering = _busy()
    gathering.arrive("a", ONE, RULES, is_idle=False)

    leaving = gathering.arrive("b", ONE, RULES, is_idle=True)

    assert list(leaving) == [["a", "b"]]


def test_who_left_is_not_sent_and_makes_room_for_another() -> None:
    gathering = _busy()
    gathering.arrive("a", Size(3, 10), RULES, is_idle=False)
    gathering.withdraw("a")

    kept = gathering.arrive("b", Size(3, 10), RULES, is_idle=False)

    assert not kept
    assert list(gathering.returned()) == [["b"]]


def test_nothing_leaves_where_all_who_waited_left() -> None:
    gathering = _busy()
    gathering.arrive("a", ONE, RULES, is_idle=False)
    gathering.withdraw("a")

    assert not gathering.returned()
    assert gathering.is_over


def test_a_request_that_fills_a_call_is_alone() -> None:
    assert Size(4, 10).is_alone(RULES)
    assert Size(1, MAX_BATCH_BYTES + 1).is_alone(RULES)
    assert not Size(3, MAX_BATCH_BYTES).is_alone(RULES)


def test_a_refused_batch_is_halved() -> None:
    assert parted(_rejected(400), "abcde") == ["abc", "de"]
    assert parted(TooLarge("Too many tokens."), "ab") == ["a", "b"]


def test_after_a_status_of_500_each_is_asked_alone() -> None:
    """llama.cpp says so to one embedding that is too long."""
    assert parted(_rejected(500), "abc") == [["a"], ["b"], ["c"]]


def test_what_is_no_fault_of_an_input_is_everybodys() -> None:
    errors: list[SutazaiError] = [_rejected(status) for status in (401, 403, 404, 408, 429, 502, 503)]
    errors += [NodeTimeout("Silent.", node="a"), NodeUnreachable("Cut.", node="a")]
    errors += [Overloaded("Full.", retry_after_s=1), UnknownModel("m", ())]

    assert not any(parted(error, "abcd") for error in errors)


def test_the_last_of_a_batch_is_asked_again_for_the_fault_may_be_that_of_one_who_left() -> None:
    assert parted(_rejected(400), "a") == ["a"]
    assert parted(_rejected(500), "a") == [["a"]]


@given(st.integers(2, 64), st.data())
def test_halving_finds_each_guilty_one_within_log2_rounds(count: int, data: st.DataObject) -> None:
    guilty = data.draw(st.sets(st.integers(0, count - 1), min_size=1))
    found, groups, rounds = [], [list(range(count))], 0

    while groups:
        again: list[list[int]] = []
        for group in groups:
            if guilty.isdisjoint(group):
                continue
            if len(group) == 1:
                found += group
            else:
                again += [list(part) for part in parted(_rejected(400), group)]
        groups, rounds = again, rounds + 1

    assert sorted(found) == sorted(guilty)
    assert rounds <= (count - 1).bit_length() + 1


class AnyOrder(RuleBasedStateMachine):
    """Nobody is lost, sent twice or sent with too many; while nothing is under way nobody waits."""

    def __init__(self) -> None:
        super().__init__()
        self.gathering: Gathering[int] = Gathering()
        self.sizes: dict[int, Size] = {}
        self.waiting: list[int] = []
        self.under_way = 0

    @rule(inputs=st.integers(1, 3), size_bytes=st.integers(1, MAX_BATCH_BYTES), is_idle=st.booleans())
    def arrive(self, inputs: int, size_bytes: int, is_idle: bool) -> None:
        entry = len(self.sizes)
        self.sizes[entry] = Size(inputs, size_bytes)
        self.waiting.append(entry)
        self._left(self.gathering.arrive(entry, self.sizes[entry], RULES, is_idle=is_idle))

    @precondition(lambda self: self.under_way)
    @rule()
    def returned(self) -> None:
        self.under_way -= 1
        self._left(self.gathering.returned())

    @rule()
    def waited(self) -> None:
        self._left(self.gathering.waited())
        assert not self.waiting

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        entry = data.draw(st.sampled_from(self.waiting))
        self.waiting.remove(entry)
        self.gathering.withdraw(entry)

    def _left(self, calls: object) -> None:
        assert isinstance(calls, tuple | list)
        for call in calls:
            self.under_way += 1
            assert call == self.waiting[: len(call)]
            assert 0 < sum(self.sizes[entry].inputs for entry in call) <= RULES.max_requests
            assert sum(self.sizes[entry].bytes for entry in call) <= MAX_BATCH_BYTES
            del self.waiting[: len(call)]

    @invariant()
    def who_waits_is_behind_a_call(self) -> None:
        assert self.gathering.waiting == len(self.waiting)
        assert self.gathering.under_way == self.under_way
        assert self.under_way or not self.waiting
        assert self.gathering.is_over == (not self.under_way)


TestAnyOrder = AnyOrder.TestCase

"""
Who shares a call to a node, and when the call leaves: Nagle's rule.

A model that works on nothing of a kind lets nobody wait. While a call of the kind is under way the next ones gather,
and leave together when it returns, when they are enough, or when the first of them has waited long enough. So the
busier the model, the larger the batches, and no delay is added where none is there already.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from sutazai.core.errors import BadRequest, NodeRejected, SutazaiError, UnknownModel, WrongMethod

MAX_BATCH_BYTES = 4 * 1024 * 1024
"""Texts in one call, together: with larger ones the call itself costs nothing in comparison."""

_NOT_OF_THE_INPUT = frozenset({401, 403, 404, 408, 429})
"""Refusals of a node that are about the key, the model or the moment: others would hear the same."""

T = TypeVar("T", bound=Hashable)
E = TypeVar("E")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRules:
    """What the settings say about batches."""

    max_requests: int
    """Inputs in one call; 1 = no batches."""
    max_wait_s: float


@dataclass(slots=True)
class Size:
    """What a request brings into a call. Not frozen, because one is made for every request."""

    inputs: int
    bytes: int

    def is_alone(self, rules: BatchRules) -> bool:
        """Whether there would be no room beside it."""
        return self.inputs >= rules.max_requests or self.bytes > MAX_BATCH_BYTES


class Gathering(Generic[T]):
    """
    Requests of one kind: calls under way, and who waits to leave together.

    Each list of requests that a method returns is one call to be made now, and counts as under way until
    `returned` is told of it. While nothing is under way, nobody waits.
    """

    __slots__ = ("_bytes", "_inputs", "_waiting", "under_way")

    def __init__(self) -> None:
        self.under_way = 0
        """Calls."""
        self._waiting: dict[T, Size] = {}
        self._inputs = 0
        self._bytes = 0

    @property
    def waiting(self) -> int:
        """Requests."""
        return len(self._waiting)

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left of it."""
        return not self._waiting and not self.under_way

    def arrive(self, entry: T, size: Size, rules: BatchRules, *, is_idle: bool) -> Sequence[list[T]]:
        """
        One more. It is not to be `is_alone`.

        Args:
            is_idle: a node could begin with it at once, whatever else is under way.
        """
        if not self.under_way:
            self.under_way = 1
            return ([entry],)
        leaving = [] if self._fits(size, rules) else [self._leave()]
        self._waiting[entry] = size
        self._inputs += size.inputs
        self._bytes += size.bytes
        if is_idle or self._inputs >= rules.max_requests:
            leaving.append(self._leave())
        return leaving

    def returned(self) -> Sequence[list[T]]:
        """A call came back, however it went."""
        self.under_way -= 1
        return self.waited()

    def waited(self) -> Sequence[list[T]]:
        """The first of them has waited for long enough."""
        return (self._leave(),) if self._waiting else ()

    def also(self, calls: int) -> None:
        """So many more calls are under way: a batch was parted and is asked again."""
        self.under_way += calls

    def withdraw(self, entry: T) -> None:
        """It does not wait any longer."""
        size = self._waiting.pop(entry)
        self._inputs -= size.inputs
        self._bytes -= size.bytes

    def _fits(self, size: Size, rules: BatchRules) -> bool:
        return self._inputs + size.inputs <= rules.max_requests and self._bytes + size.bytes <= MAX_BATCH_BYTES

    def _leave(self) -> list[T]:
        leaving = list(self._waiting)
        self._waiting.clear()
        self._inputs = self._bytes = 0
        self.under_way += 1
        return leaving


def parted(error: SutazaiError, entries: Sequence[E]) -> Sequence[Sequence[E]]:
    """
    How those who still wait for a shared call that failed are to be asked again; empty where the error is everybody's.

    A refusal is that of one input, which halving finds in log2 rounds. A status of 500 may be: llama.cpp says it to
    an embedding that is too long. But it may also be a sick node, so all are asked once more, each alone, which is no
    more than they would have cost without a batch. One who is left over is asked too: the input may have been that of
    another, who is gone.
    """
    if isinstance(error, NodeRejected) and error.status == 500:
        return [[entry] for entry in entries]
    if not _is_of_the_input(error):
        return ()
    middle = (len(entries) + 1) // 2
    return [part for part in (entries[:middle], entries[middle:]) if part]


def _is_of_the_input(error: SutazaiError) -> bool:
    if isinstance(error, NodeRejected):
        return 400 <= error.status < 500 and error.status not in _NOT_OF_THE_INPUT
    return isinstance(error, BadRequest) and not isinstance(error, UnknownModel | WrongMethod)

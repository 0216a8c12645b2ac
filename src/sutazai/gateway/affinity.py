"""
Which node knows what: conversations, and beginnings of requests.

A model server keeps what it computed for the beginning of a request and need not compute it again. So a request is
worth more at the node that had its conversation, or a request with the same beginning, before. What is remembered here
is a guess about other programs' caches: bounded, forgotten oldest first, lost on restart, and never shared among
tenants. Where nothing is remembered of a conversation, its home is computed from its name alone, so that several
gateways agree without talking.

Source: rendezvous hashing (Thaler and Ravishankar, "Using name-based mappings to increase hit rates"): the node with
the highest hash of conversation and node; where one leaves, only its own conversations move.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Generic, TypeVar

from sutazai.core.node import Health, NodeState
from sutazai.core.request import Operation, Request
from sutazai.policy.routing import RoutingRules

Key = TypeVar("Key")
Value = TypeVar("Value")
UP, EMBEDDING = Health.UP, Operation.EMBEDDING
FIRST_BLOCK = 1024
"""Bytes; bodies that are shorter are not worth it. The next beginnings are twice as long each."""
LAST_BLOCK = 8192
MAX_CONVERSATIONS = 10_000
MAX_BEGINNINGS = 20_000
MAX_NODES = 4
"""Nodes remembered for one beginning: a common one is soon everywhere."""


class Affinity:
    """The memory of one gateway, and what it says of the request that a node is being chosen for."""

    def __init__(self) -> None:
        self.request: Request | None = None
        """The last one that was considered, until it was given to a node."""
        self.kept_conversations = 0
        """Requests that went to the node which had their conversation."""
        self.kept_beginnings = 0
        """Further requests that went to a node which had one with the same beginning."""
        self._had = ""
        self._home = ""
        self._hashes: Sequence[int] = ()
        self._shares: Mapping[str, float] = {}
        self._conversations = Recent[tuple[str, bytes], str](MAX_CONVERSATIONS)
        self._beginnings = Recent[int, tuple[str, ...]](MAX_BEGINNINGS)

    def favour(
        self, request: Request, candidates: Sequence[NodeState], rules: RoutingRules
    ) -> Mapping[str, float] | None:
        """What the candidates are favoured for by this request: load, by name. None where there is nothing."""
        self.request = request
        self._had = self._home = ""
        if request.conversation:
            self._find_home(request, candidates)
        self._hashes = ()
        if not _is_choice(candidates, rules):
            self._shares = {}
            return None
        favour: dict[str, float] = {}
        if rules.prefix_weight and request.endpoint.operation is not EMBEDDING:  # engines keep nothing of those
            self._hashes = hashes = beginnings_of(request)
            self._shares = favour = self._known(hashes, rules.prefix_weight / min(len(request.body), LAST_BLOCK))
        if self._home:
            favour = {**favour, self._home: favour.get(self._home, 0.0) + rules.affinity_weight}
        return favour

    def given(self, request: Request, node: str) -> str:
        """The request that was considered last went to this node; returns what spoke for the node, or nothing."""
        self.request = None
        beginnings = self._beginnings
        for hashed in self._hashes:
            nodes = beginnings.get(hashed)
            if nodes is None:
                beginnings.put(hashed, (node,))
            elif node not in nodes:
                beginnings.put(hashed, (node, *nodes[: MAX_NODES - 1]))
        if request.conversation:
            self._conversations.put((request.tenant, request.conversation), node)
            if node == self._had:
                self.kept_conversations += 1
                return "has the conversation, "
        if node in self._shares:
            self.kept_beginnings += 1
            return "knows the beginning, "
        return "home of the conversation, " if node == self._home else ""

    def _find_home(self, request: Request, candidates: Sequence[NodeState]) -> None:
        up = [state.node.name for state in candidates if state.health is UP and not state.draining]
        had = self._conversations.get((request.tenant, request.conversation))
        if had is not None and had in up:
            self._had = self._home = had
        else:
            self._home = home_of(request.conversation, up)

    def _known(self, hashes: Sequence[int], per_byte: float) -> dict[str, float]:
        """By node, what the longest beginning is worth that it was given."""
        worth: dict[str, float] = {}
        size_bytes = FIRST_BLOCK
        for hashed in hashes:
            nodes = self._beginnings.get(hashed)
            if nodes is None:
                break  # nobody knows a longer one either
            for node in nodes:
                worth[node] = size_bytes * per_byte
            size_bytes *= 2
        return worth


class Recent(Generic[Key, Value]):
    """
    A bounded table that forgets what was not used for long.

    Two dictionaries, younger and older: what is used moves to the younger one, and when that is full it becomes the
    older one, whose entries are forgotten. Cheaper than to keep an exact order.
    """

    def __init__(self, most: int) -> None:
        self._half = most // 2
        self._younger: dict[Key, Value] = {}
        self._older: dict[Key, Value] = {}

    def __len__(self) -> int:
        return len(self._younger) + len(self._older)

    def get(self, key: Key) -> Value | None:
        """The value; it counts as used."""
        value = self._younger.get(key)
        if value is None and (value := self._older.pop(key, None)) is not None:
            self.put(key, value)
        return value

    def put(self, key: Key, value: Value) -> None:
        """Keep the value, for a while."""
        if len(self._younger) >= self._half and key not in self._younger:
            self._older, self._younger = self._younger, {}
        self._older.pop(key, None)
        self._younger[key] = value


def home_of(conversation: bytes, nodes: Sequence[str]) -> str:
    """The node that a conversation belongs to where nothing else is known; the same for every gateway."""
    return max(nodes, key=lambda node: _weight(conversation, node), default="")


def _weight(conversation: bytes, node: str) -> bytes:
    return blake2b(b"%b\0%b" % (node.encode(), conversation), digest_size=8).digest()


def beginnings_of(request: Request) -> Sequence[int]:
    """Hashes of the first 1024, 2048, 4096, ... bytes of the body. They hold the tenant and the model."""
    body = request.body
    size_bytes = len(body)
    hashed, begin, end = hash((request.tenant, request.model)), 0, FIRST_BLOCK
    found: list[int] = []
    while end <= size_bytes and end <= LAST_BLOCK:
        hashed = hash((hashed, body[begin:end]))
        found.append(hashed)
        begin, end = end, end * 2
    return found


def _is_choice(candidates: Sequence[NodeState], rules: RoutingRules) -> bool:
    """Whether more than one has room."""
    roomy = 0
    for state in candidates:
        if state.in_flight < state.slots + rules.head_start and state.health is UP:
            roomy += 1
            if roomy > 1:
                return True
    return False

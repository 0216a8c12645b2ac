"""
Everything that can go wrong, as one tree.

SutazaiError
├── BadRequest             the client's request was not understood
│   ├── UnknownModel       no node has the model that was asked for
│   ├── WrongMethod        the address does not answer to this method
│   └── TooLarge           a body, head or batch was over its limit
├── Unauthorized           no key, or one that is not known
├── Forbidden              the key or the origin may not do this
├── Misdirected            the tenant's data is kept in another region
├── NotFound               nothing lives at this address
│   └── UnknownAgent       no agent of that name is registered
├── Conflict               somebody else changed the same thing meanwhile
├── Overloaded             the pool had no room; try again later
├── RateLimited            the key or its tenant took more than it may
│   ├── TooManyWaiting     too many of the tenant's own requests wait already
│   └── BudgetSpent        the month's tokens or money are used up
├── FellBehind             the client read a shared answer too slowly
├── NoHealthyNode          every node with the model is down
├── Cancelled              an operator ended the request
├── ShuttingDown           the gateway is stopping
├── NodeFault              a node failed to answer
│   ├── NodeUnreachable    the connection was refused, reset or cut
│   ├── NodeTimeout        the node kept silent for too long
│   └── NodeRejected       the node answered with an error status
├── SettingsError          the settings hold mistakes (all of them listed)
├── StoreUnavailable       the database did not answer
│   └── QueueUnavailable   the broker of the queues did not answer
├── AgentCrashed           the process of an agent ended before its result
└── EngineFault            the embedded engine could not start

Messages say what happened in the past tense and what to do about it. Status codes live in `edge/errors.py`.
"""

from __future__ import annotations

from collections.abc import Sequence


class SutazaiError(Exception):
    """The root of the tree."""

    message: str

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class BadRequest(SutazaiError):
    """The client's request was not understood."""

    def __init__(self, message: str, *, where: str | None = None) -> None:
        super().__init__(message)
        self.where = where
        """The field at fault, as a JSON path such as `messages[0].role`."""


class UnknownModel(BadRequest):
    """No node has the model that was asked for."""

    def __init__(self, model: str, nearest: Sequence[str]) -> None:
        hint = f" Did you mean {' or '.join(nearest)}?" if nearest else " `GET /v1/models` lists what is there."
        super().__init__(f"The model {model[:200]!r} is on no node.{hint}", where="model")
        self.model = model
        self.nearest = tuple(nearest)


class WrongMethod(BadRequest):
    """The address does not answer to this method."""

    def __init__(self, message: str, *, allowed: str) -> None:
        super().__init__(message)
        self.allowed = allowed
        """Methods for the `Allow` header, separated by commas."""


class TooLarge(BadRequest):
    """A body, head or batch was over its limit."""


class Unauthorized(SutazaiError):
    """No key came with the request, or one that is not known."""


class Forbidden(SutazaiError):
    """The key or the origin may not do this."""


class Misdirected(SutazaiError):
    """The tenant's data is kept in another region, or nobody said in which."""


class NotFound(SutazaiError):
    """Nothing lives at this address."""


class Overloaded(SutazaiError):
    """The pool had no room for the request."""

    def __init__(self, message: str, *, retry_after_s: float, extra: bytes = b"") -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.extra = extra
        """Header lines that tell how the line stands, each with its line end."""


class UnknownAgent(NotFound):
    """No agent of that name is registered."""

    def __init__(self, name: str, nearest: Sequence[str]) -> None:
        hint = f" Did you mean {' or '.join(nearest)}?" if nearest else " `GET /v1/agents` lists those that are."
        super().__init__(f"No agent {name[:200]!r} was registered.{hint}")
        self.name = name
        self.nearest = tuple(nearest)


class Conflict(SutazaiError):
    """Somebody else changed the same thing meanwhile."""


class RateLimited(SutazaiError):
    """The key or its tenant took more than it may."""

    def __init__(self, message: str, *, retry_after_s: float, extra: bytes = b"") -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.extra = extra
        """Header lines that tell how the limits stand, each with its line end."""


class TooManyWaiting(RateLimited):
    """Too many of the tenant's own requests wait already."""


class BudgetSpent(RateLimited):
    """The month's tokens or money are used up."""


class FellBehind(SutazaiError):
    """The client read a shared answer so slowly that what it missed could not be kept."""


class NoHealthyNode(SutazaiError):
    """Every node that has the model is down."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Cancelled(SutazaiError):
    """An operator ended the request."""


class ShuttingDown(SutazaiError):
    """The gateway is stopping and the request could not be finished in time."""


class NodeFault(SutazaiError):
    """A node failed to answer."""

    def __init__(self, message: str, *, node: str) -> None:
        super().__init__(message)
        self.node = node


class NodeUnreachable(NodeFault):
    """The connection to a node was refused, reset or cut."""


class NodeTimeout(NodeFault):
    """A node kept silent for too long."""

    def __init__(self, message: str, *, node: str, connecting: bool = False) -> None:
        super().__init__(message, node=node)
        self.connecting = connecting
        """It did not even accept the connection, so it cannot have begun the work."""


class NodeRejected(NodeFault):
    """A node answered with an error status."""

    def __init__(
        self,
        message: str,
        *,
        node: str,
        status: int,
        body: bytes = b"",
        is_verbatim: bool = False,
        retry_after_s: float = 0.0,
    ) -> None:
        super().__init__(message, node=node)
        self.status = status
        self.body = body
        """What the node said, in its own dialect."""
        self.is_verbatim = is_verbatim
        """The node speaks the client's dialect, so `body` can be passed on as it is."""
        self.retry_after_s = retry_after_s


class SettingsError(SutazaiError):
    """The settings hold mistakes; `mistakes` lists all of them, a sentence each."""

    def __init__(self, mistakes: Sequence[str]) -> None:
        super().__init__("\n".join(mistakes))
        self.mistakes = tuple(mistakes)


class StoreUnavailable(SutazaiError):
    """The database did not answer."""


class QueueUnavailable(StoreUnavailable):
    """The broker of the queues did not answer."""


class AgentCrashed(SutazaiError):
    """The process of an agent ended before it had a result."""


class EngineFault(SutazaiError):
    """The embedded engine could not start or ended unexpectedly."""

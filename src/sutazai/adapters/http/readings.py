"""What is made of a node's bytes: counted, or translated."""

from __future__ import annotations

from typing import Protocol

from sutazai.core.request import Endpoint, Usage
from sutazai.dialects.usage import UsageScan, usage_of_whole


class Replies(Protocol):
    """A translation of the answers of one dialect into another."""

    content_type: bytes
    usage: Usage | None

    def feed(self, data: bytes) -> bytes:
        """What the client may have for these bytes. Raises `Untranslatable`, a `ValueError`."""

    def finish(self) -> bytes:
        """The rest, at the end of the node's answer. Raises `Untranslatable`."""


class Untouched:
    """A stream passes as it is; its tokens are counted."""

    __slots__ = ("_feed", "_scan")
    content_type: bytes | None = None
    is_verbatim = True

    def __init__(self, endpoint: Endpoint) -> None:
        self._scan = UsageScan(endpoint)
        self._feed = self._scan.feed

    def feed(self, data: bytes) -> bytes:
        self._feed(data)
        return data

    def finish(self) -> bytes:
        return b""

    def result(self) -> Usage | None:
        return self._scan.result()


class UntouchedWhole:
    """
    An answer that does not stream passes as it is; its tokens are counted at its end.

    Mostly it comes in one piece, which is parsed; of a larger one the pieces are searched.
    """

    __slots__ = ("_endpoint", "_first", "_scan")
    content_type: bytes | None = None
    is_verbatim = True

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._first = b""
        self._scan: UsageScan | None = None

    def feed(self, data: bytes) -> bytes:
        if self._scan is not None:
            self._scan.feed(data)
        elif not self._first:
            self._first = data
        else:
            self._scan = UsageScan(self._endpoint)
            self._scan.feed(self._first)
            self._scan.feed(data)
        return data

    def finish(self) -> bytes:
        return b""

    def result(self) -> Usage | None:
        return usage_of_whole(self._endpoint, self._first) if self._scan is None else self._scan.result()


class Translated:
    """The node speaks another dialect than the client, or another form of it."""

    __slots__ = ("_replies", "content_type", "feed", "finish", "is_verbatim")

    def __init__(self, replies: Replies, *, is_verbatim: bool = False) -> None:
        self._replies = replies
        self.is_verbatim = is_verbatim
        self.content_type: bytes | None = replies.content_type
        self.feed = replies.feed
        self.finish = replies.finish

    def result(self) -> Usage | None:
        return self._replies.usage

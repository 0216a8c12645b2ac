"""How likely each token was, in the three forms that answers have for it."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


class Likely(msgspec.Struct, frozen=True):
    """A token and the natural logarithm of its probability, as OpenAI's chats and Ollama have it."""

    token: str
    logprob: float
    written: list[int] | None = msgspec.field(name="bytes", default=None)
    """Its bytes, where the node tells them."""
    top_logprobs: list[Likely] | None = None


class OfCompletion(msgspec.Struct, frozen=True):
    """
    The form of OpenAI's completions: three lists, equally long.

    llama.cpp answers completions in the form of chats, which is `content`.
    """

    content: list[Likely] | None = None
    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float] | None] | None = None

    def likely(self) -> list[Likely]:
        """The tokens one by one; a first one of which nothing is known is left out."""
        if self.content is not None:
            return self.content
        tokens, logprobs = self.tokens or [], self.token_logprobs or []
        others = self.top_logprobs or [None] * len(tokens)
        return [
            Likely(token, logprob, None, [Likely(name, value) for name, value in (other or {}).items()])
            for token, logprob, other in zip(tokens, logprobs, others, strict=False)
            if logprob is not None
        ]


def for_openai_chat(tokens: Sequence[Likely] | None) -> dict[str, object] | None:
    """The `logprobs` of a choice of a chat; None where nothing is known."""
    if not tokens:
        return None
    entries = [
        _entry(token) | {"top_logprobs": [_entry(other) for other in token.top_logprobs or ()]} for token in tokens
    ]
    return {"content": entries, "refusal": None}


def for_openai_completion(tokens: Sequence[Likely] | None, offset: int) -> dict[str, object] | None:
    """The `logprobs` of a choice of a completion; `offset` is the number of characters answered before."""
    if not tokens:
        return None
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.token)
    return {
        "tokens": [token.token for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [{other.token: other.logprob for other in token.top_logprobs or ()} for token in tokens],
        "text_offset": offsets,
    }


def for_ollama(tokens: Sequence[Likely]) -> list[dict[str, object]]:
    """The `logprobs` of a line of Ollama's; `top_logprobs` only where there are any."""
    entries = []
    for token in tokens:
        others = [_entry(other) for other in token.top_logprobs or ()]
        entries.append(_entry(token) | ({"top_logprobs": others} if others else {}))
    return entries


def _entry(token: Likely) -> dict[str, object]:
    written = list(token.token.encode()) if token.written is None else token.written
    return {"token": token.token, "logprob": token.logprob, "bytes": written}

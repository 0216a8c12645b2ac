"""
The little that the gateway must know of a request, read from its bytes in one decoding.

This runs for every request, so it costs about what the JSON parser costs: see `openai_shapes` for how. What
is checked here once is not checked again on the way: a body that passes has the types that its API asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import msgspec

from sutazai.core.errors import BadRequest
from sutazai.core.request import Endpoint
from sutazai.dialects import ollama_shapes, openai_shapes

MAX_MODEL_CHARACTERS: Final = 256


class Asked(msgspec.Struct, frozen=True, gc=False):
    """What a request asks for, as far as routing and counting need it."""

    model: str
    stream: bool
    context_tokens: int = 0
    """Ollama's `num_ctx`; 0 where the client did not say."""
    has_load_options: bool = False
    """Whether options are there that would reload the model on an Ollama node; `num_ctx` is one."""
    include_usage: bool = False
    """Whether the client of an OpenAI stream wants a last chunk with the tokens it took."""
    loads_only: bool = False
    """Ollama's way to load a model: a request without messages, prompt or input."""
    is_deterministic: bool = False
    """Whether the same request again would be answered the same: temperature 0, a seed, or an embedding."""


def read(endpoint: Endpoint, body: bytes) -> Asked:
    """What `body` asks for. Raises `BadRequest`, and nothing else for any bytes at all."""
    asked = _READERS[endpoint.path](body)
    if 0 < len(asked.model) <= MAX_MODEL_CHARACTERS and asked.model.isprintable():
        return asked
    raise _bad_name(asked.model)


def is_load_request(endpoint: Endpoint, body: bytes) -> bool:
    """Whether `body` only asks to load a model, as `Asked.loads_only` tells too. Raises `BadRequest`."""
    return read(endpoint, body).loads_only


def _bad_name(model: str) -> BadRequest:
    if not model:
        return BadRequest("model is empty; name one that `GET /v1/models` lists.", where="model")
    if len(model) > MAX_MODEL_CHARACTERS:
        return BadRequest(
            f"model has {len(model)} characters; at most {MAX_MODEL_CHARACTERS} are allowed.", where="model"
        )
    return BadRequest("model has control characters; send the plain name.", where="model")


def _openai_chat(body: bytes) -> Asked:
    chat = openai_shapes.read_chat(body)
    options = chat.stream_options
    include_usage = options is not None and options.include_usage is True
    is_deterministic = chat.temperature == 0 or chat.seed is not None
    return Asked(chat.model, chat.stream is True, 0, False, include_usage, False, is_deterministic)


def _openai_completion(body: bytes) -> Asked:
    asked = openai_shapes.read_completion(body)
    options = asked.stream_options
    include_usage = options is not None and options.include_usage is True
    is_deterministic = asked.temperature == 0 or asked.seed is not None
    return Asked(asked.model, asked.stream is True, 0, False, include_usage, False, is_deterministic)


def _openai_embedding(body: bytes) -> Asked:
    return Asked(openai_shapes.read_embedding(body).model, False, is_deterministic=True)


def _ollama_chat(body: bytes) -> Asked:
    chat = ollama_shapes.read_chat(body)
    return _with_options(chat, chat.stream is not False, not chat.messages)


def _ollama_generate(body: bytes) -> Asked:
    generate = ollama_shapes.read_generate(body)
    return _with_options(generate, generate.stream is not False, ollama_shapes.is_blank(generate.prompt))


def _ollama_embed(body: bytes) -> Asked:
    embed = ollama_shapes.read_embed(body)
    return _with_options(embed, False, ollama_shapes.is_blank(embed.input), is_embedding=True)


def _ollama_embeddings(body: bytes) -> Asked:
    embeddings = ollama_shapes.read_embeddings(body)
    return _with_options(embeddings, False, ollama_shapes.is_blank(embeddings.prompt), is_embedding=True)


def _with_options(asked: ollama_shapes.Common, stream: bool, loads_only: bool, *, is_embedding: bool = False) -> Asked:
    options = asked.options
    if options is None:
        return Asked(asked.model, stream, 0, False, False, loads_only, is_embedding and not loads_only)
    is_deterministic = is_embedding or options.temperature == 0 or options.seed is not None
    return Asked(
        asked.model,
        stream,
        options.context_tokens,
        options.forces_a_load,
        False,
        loads_only,
        is_deterministic and not loads_only,
    )


# By path, because the hash of a string is kept and that of an enum member is computed in Python each time.
_READERS: Final[Mapping[str, Callable[[bytes], Asked]]] = {
    Endpoint.OPENAI_CHAT.path: _openai_chat,
    Endpoint.OPENAI_COMPLETION.path: _openai_completion,
    Endpoint.OPENAI_EMBEDDING.path: _openai_embedding,
    Endpoint.OLLAMA_CHAT.path: _ollama_chat,
    Endpoint.OLLAMA_GENERATE.path: _ollama_generate,
    Endpoint.OLLAMA_EMBED.path: _ollama_embed,
    Endpoint.OLLAMA_EMBEDDINGS.path: _ollama_embeddings,
}

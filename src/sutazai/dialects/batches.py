"""
Several requests in one body, and one answer in several.

Only requests whose fields are all known here are merged: an unknown one could make the answer to an input depend on
its neighbours. Vectors are cut out of the answer as they stand, in numbers or base64, and never read.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Final, TypeVar

import msgspec
from msgspec import Raw

from sutazai.core.request import Endpoint, Usage
from sutazai.dialects.complaints import FAULTS
from sutazai.dialects.framing import Untranslatable
from sutazai.dialects.from_ollama import usage_in_words
from sutazai.dialects.openai_answers import Counts
from sutazai.dialects.openai_shapes import BRACE, BRACKET, QUOTE

Kind = tuple[bytes | tuple[str, bytes], ...]
Fields = dict[str, Raw]
E = TypeVar("E")

_UNSET: Final[Mapping[str, frozenset[bytes]]] = {
    "n": frozenset({b"1", b"null"}),
    "stream": frozenset({b"false", b"null"}),
    "echo": frozenset({b"false", b"null"}),
    "best_of": frozenset({b"1", b"null"}),
    "logprobs": frozenset({b"null"}),
    "suffix": frozenset({b'""', b"null"}),
}
"""With another value of one of them a completion has more to it than one text for each prompt."""
_SHARED_EMBEDDING: Final = frozenset({"model", "encoding_format", "dimensions", "user", "options", "keep_alive"})
_SHARED_EMBED: Final = frozenset({"model", "truncate", "dimensions", "options", "keep_alive"})
_SHARED_COMPLETION: Final = _UNSET.keys() | {
    "model",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "seed",
    "stop",
    "user",
    "presence_penalty",
    "frequency_penalty",
    "repeat_penalty",
    "repetition_penalty",
    "logit_bias",
    "response_format",
    "ignore_eos",
}

_TOKENS: Final = re.compile(rb"\[\s*-?[0-9]")
_NOTHING: Final = re.compile(rb'""|\[\s*\]')
_QUOTES: Final = 2


@dataclass(slots=True)
class Share:
    """What one request brings into a common body. Not frozen, because one is made for every request."""

    kind: Kind
    """Equal for those that may share one: every field but the inputs, in one order and form."""
    fields: Fields
    """The same as they came."""
    inputs: Sequence[Raw]
    size_bytes: int
    """Of the inputs."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one request gets of a common answer."""

    body: bytes
    usage: Usage | None
    """Its tokens; those of all parts add up to what the node told. None where it told nothing."""


_encode = msgspec.json.Encoder().encode
_encode_sorted = msgspec.json.Encoder(order="sorted").encode
_fields = msgspec.json.Decoder(Fields)
_entries = msgspec.json.Decoder(list[Fields])
_raws = msgspec.json.Decoder(list[Raw])
_any = msgspec.json.Decoder()
_counts = msgspec.json.Decoder(Counts | None)
_whole_number = msgspec.json.Decoder(int | None)


def share_of(endpoint: Endpoint, body: bytes) -> Share | None:
    """What a request that `reading` accepted brings into a common body; None where it is to be asked alone."""
    form = _FORMS.get(endpoint.path)
    if form is None:
        return None
    try:
        fields = _fields.decode(body)
        value = fields.pop(form.inputs, None)
        if value is None or not fields.keys() <= form.shared:
            return None
        inputs, shape = _inputs_of(value)
        if not inputs or not form.may_join(value, fields):
            return None
        named = [(name, _canonical(raw)) for name, raw in fields.items()]
    except FAULTS:
        return None  # an option too large for a number, or nested too deeply: the node may make sense of it
    named.sort()
    return Share((shape, *named), fields, inputs, memoryview(value).nbytes)


def merged(endpoint: Endpoint, parts: Sequence[Share]) -> bytes:
    """One body with all inputs of requests of one kind, in their order."""
    inputs = [one for part in parts for one in part.inputs]
    return _encode({**parts[0].fields, _FORMS[endpoint.path].inputs: inputs})


def split(endpoint: Endpoint, body: bytes, parts: Sequence[Share], ids: Sequence[str]) -> list[Part]:
    """
    What each request gets of the answer to `merged`.

    Args:
        ids: of the requests, from which those in their answers are made.

    Raises:
        Untranslatable: there is not exactly one answer for each input.
    """
    try:
        return _FORMS[endpoint.path].split(body, parts, ids)
    except FAULTS as error:
        raise Untranslatable(f"The answer to {len(parts)} requests could not be read: {error}") from error


def shares(total: int, weights: Sequence[int]) -> list[int]:
    """`total` divided in proportion to `weights`, each part within 1 of its due, together exactly `total`."""
    whole = sum(weights)
    if not whole:
        weights, whole = [1] * len(weights), len(weights)
    found, passed, given = [], 0, 0
    for weight in weights:
        passed += weight
        due = total * passed // whole
        found.append(due - given)
        given = due
    return found


# requests


def _inputs_of(value: Raw) -> tuple[Sequence[Raw], bytes]:
    """The inputs, and whether they are texts or tokens; none where they are mixed or one is empty."""
    size_bytes = memoryview(value).nbytes
    if memoryview(value)[0] == QUOTE:
        return ((value,) if size_bytes > _QUOTES else ()), b"texts"
    if memoryview(value)[0] != BRACKET:
        return (), b""
    inputs: Sequence[Raw] = (value,) if _TOKENS.match(value) else _raws.decode(value)
    starts = {memoryview(one)[0] for one in inputs}
    if starts not in ({QUOTE}, {BRACKET}) or any(_NOTHING.fullmatch(one) for one in inputs):
        return (), b""
    return inputs, b"texts" if starts == {QUOTE} else b"tokens"


def _canonical(value: Raw) -> bytes:
    """The same for objects and lists that differ only in form; numbers stay as they were written."""
    return _encode_sorted(_any.decode(value)) if memoryview(value)[0] in {BRACE, BRACKET} else bytes(value)


def _any_may_join(_value: Raw, _fields: Fields) -> bool:
    return True


def _is_plain_completion(prompt: Raw, fields: Fields) -> bool:
    """One text that asks for one text."""
    return memoryview(prompt)[0] == QUOTE and all(
        name not in fields or bytes(fields[name]) in unset for name, unset in _UNSET.items()
    )


def _weight(one: Raw) -> int:
    """How much of all tokens is likely due to it: the length of a text, the count of tokens."""
    if memoryview(one)[0] == BRACKET:
        return bytes(one).count(b",") + 1
    return memoryview(one).nbytes - _QUOTES


# answers


def _split_embedding(body: bytes, parts: Sequence[Share], ids: Sequence[str]) -> list[Part]:
    fields = _fields.decode(body)
    entries = _in_order(_entries.decode(_required(fields, "data")), parts)
    for entry in entries:
        _check_vector(_required(entry, "embedding"))
    found = []
    usages = _divided(_told(fields), [_asked(part) for part in parts])
    for mine, usage, request_id in zip(_cut(entries, parts), usages, ids, strict=True):
        data = [{**entry, "index": index} for index, entry in enumerate(mine)]
        own = _own(fields, f"embd-{request_id}") | {"data": data}
        if usage is not None:
            own["usage"] = {"prompt_tokens": usage.input_tokens, "total_tokens": usage.input_tokens}
        found.append(Part(_encode(own), usage))
    return found


def _split_embed(body: bytes, parts: Sequence[Share], _ids: Sequence[str]) -> list[Part]:
    """Times are those of all together, because that is how long each of them took."""
    fields = _fields.decode(body)
    vectors = _raws.decode(_required(fields, "embeddings"))
    _check_count(len(vectors), parts)
    for vector in vectors:
        _check_vector(vector)
    usages = _divided(_told_by_ollama(fields), [_asked(part) for part in parts])
    found = []
    for mine, usage in zip(_cut(vectors, parts), usages, strict=True):
        own: dict[str, object] = {**fields, "embeddings": mine}
        if usage is not None:
            own["prompt_eval_count"] = usage.input_tokens
        found.append(Part(_encode(own), usage))
    return found


def _split_completion(body: bytes, parts: Sequence[Share], ids: Sequence[str]) -> list[Part]:
    """Each prompt has one choice. llama.cpp measures a `timings` for one of them alone: nobody gets it."""
    fields = _fields.decode(body)
    choices = _in_order(_entries.decode(_required(fields, "choices")), parts)
    fields.pop("timings", None)
    said = [_weight(_required(choice, "text")) for choice in choices]
    usages = [_told(choice) for choice in choices]
    if None in usages:
        shared = _divided(_told(fields), [_asked(part) for part in parts], said)
    else:
        shared = [_as_usage(usage) for usage in usages]
    found = []
    for choice, usage, request_id in zip(choices, shared, ids, strict=True):
        choice.pop("usage", None)
        own = _own(fields, f"cmpl-{request_id}") | {"choices": [{**choice, "index": 0}]}
        if usage is not None:
            own["usage"] = usage_in_words(usage)
        found.append(Part(_encode(own), usage))
    return found


def _in_order(entries: list[Fields], parts: Sequence[Share]) -> list[Fields]:
    """The entries by their `index`, one for each input; as they stand where none has one."""
    _check_count(len(entries), parts)
    numbers = [_whole_number.decode(entry.get("index", b"null")) for entry in entries]
    if all(number is None for number in numbers):
        return entries
    by_number = dict(zip(numbers, entries, strict=True))
    if by_number.keys() != set(range(len(entries))):
        raise Untranslatable(f"It did not number its {len(entries)} answers from 0.")
    return [by_number[number] for number in range(len(entries))]


def _check_count(count: int, parts: Sequence[Share]) -> None:
    wanted = sum([len(part.inputs) for part in parts])
    if count != wanted:
        raise Untranslatable(f"It gave {count} answers to {wanted} inputs.")


def _check_vector(vector: Raw) -> None:
    if memoryview(vector)[0] not in {BRACKET, QUOTE} or _NOTHING.fullmatch(vector):
        raise Untranslatable("It gave something that is no vector.")


def _required(fields: Fields, name: str) -> Raw:
    if name not in fields:
        raise Untranslatable(f"It gave an answer without {name}.")
    return fields[name]


def _cut(entries: Sequence[E], parts: Sequence[Share]) -> list[Sequence[E]]:
    """To each request as many as it has inputs."""
    found, start = [], 0
    for part in parts:
        end = start + len(part.inputs)
        found.append(entries[start:end])
        start = end
    return found


def _asked(part: Share) -> int:
    return sum(map(_weight, part.inputs))


def _told(fields: Fields) -> Counts | None:
    """The `usage` of an OpenAI answer; None where there is none to be understood."""
    try:
        counts: Counts | None = _counts.decode(fields.get("usage", b"null"))
    except FAULTS:
        return None
    return counts


def _told_by_ollama(fields: Fields) -> Counts | None:
    try:
        count = _whole_number.decode(fields.get("prompt_eval_count", b"null"))
    except FAULTS:
        return None
    return None if count is None else Counts(count)


def _as_usage(counts: Counts | None) -> Usage | None:
    """Never below 0, whatever the node says: limits would give it back to the tenant."""
    if counts is None:
        return None
    return Usage(max(0, counts.prompt_tokens or 0), max(0, counts.completion_tokens or 0))


def _divided(counts: Counts | None, asked: Sequence[int], said: Sequence[int] | None = None) -> Sequence[Usage | None]:
    """What the node counted for all, divided by the length of what each asked and of what each was told."""
    whole = _as_usage(counts)
    if whole is None:
        return [None] * len(asked)
    inputs = shares(whole.input_tokens, asked)
    outputs = shares(whole.output_tokens, asked if said is None else said)
    return [Usage(*pair) for pair in zip(inputs, outputs, strict=True)]


def _own(fields: Fields, own_id: str) -> dict[str, object]:
    """What surrounds an answer, with an id of its own where it has one."""
    return {**fields, "id": own_id} if "id" in fields else dict(fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Form:
    """One endpoint whose requests can be merged."""

    inputs: str
    """The field that holds them."""
    shared: AbstractSet[str]
    """Other fields that may be there."""
    may_join: Callable[[Raw, Fields], bool]
    """Whether a request with these inputs and shared fields can be merged."""
    split: Callable[[bytes, Sequence[Share], Sequence[str]], list[Part]]


_FORMS: Final[Mapping[str, _Form]] = {
    Endpoint.OPENAI_EMBEDDING.path: _Form(
        inputs="input", shared=_SHARED_EMBEDDING, may_join=_any_may_join, split=_split_embedding
    ),
    Endpoint.OLLAMA_EMBED.path: _Form(inputs="input", shared=_SHARED_EMBED, may_join=_any_may_join, split=_split_embed),
    Endpoint.OPENAI_COMPLETION.path: _Form(
        inputs="prompt", shared=_SHARED_COMPLETION, may_join=_is_plain_completion, split=_split_completion
    ),
}
MERGED_PATHS: Final = frozenset(_FORMS)
"""Of the endpoints whose requests can be merged."""

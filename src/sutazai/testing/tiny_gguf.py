"""
Tiny, complete language models as GGUF files: for a first try, and for tests that want a real engine.

Two kinds, both of the llama architecture with a byte-level BPE tokenizer and a chat template inside:

- `write_bigram`: weights worked out by hand so that the network *is* a bigram model of a corpus. Row i of the
  embedding is the unit vector e_i, attention and feed-forward are zero, the last norm turns e_i into
  sqrt(width) * e_i, and row j of the output holds ln P(j | i) / sqrt(width). Readable, quick, and with known
  probabilities.
- `write_random`: Gaussian weights of any size. Its text is noise, its arithmetic real: for load and memory.

The same arguments give the same bytes. Needs `gguf` and `numpy`, which are test dependencies.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import gguf
import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

Matrix = npt.NDArray[np.float16]

TRIAL_NAME = "sutazai-trial"

TRIAL_CORPUS = (
    "Hello! I am a tiny trial model that ships with SutazAI.",
    "Hello! I am a tiny trial model that ships with SutazAI.",
    "Hello! I am a tiny trial model that ships with SutazAI; my few sentences show how all fits together.",
    "This answer came through gateway and queue from an engine below.",
    "Real models are GGUF files: download some, then name them under engine in your settings.",
    "Ollama or vLLM runs already? List its address below nodes.",
    "SutazAI lets many clients share one pool fairly.",
    "Each request goes to whichever node is free; others wait for their turn.",
)
"""One answer a line: what SutazAI is, and how to go on from here. Few words have two successors, so that what
the model strings together still reads well."""

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"

CALL = ("<tool_call>", '\n{"name": "', '", "arguments": {', "\n</tool_call>")
"""Tokens of their own, so that a forced tool call fits into a small `max_tokens`."""

JSON_STRINGS = ("sample", "text", "value")
"""What a JSON string holds where a grammar demands one."""

CHAT_TEMPLATE = """\
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{- (messages[0].content or '') + '\\n\\n' }}{% endif %}
{{- 'You may call these functions:\\n<tools>' }}
{%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{% endfor %}
{{- '\\n</tools>\\nA call is one JSON object between tags:\\n' }}
{{- '<tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\\n' + (messages[0].content or '') + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + (message.content or '') + '\\n</tool_response><|im_end|>\\n' }}
{%- elif message.role != 'system' or not loop.first %}
{{- '<|im_start|>' + message.role }}
{%- if message.content %}{{- '\\n' + message.content }}{% endif %}
{%- if message.tool_calls %}
{%- for call in message.tool_calls %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}
{{- '}\\n</tool_call>' }}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""
"""ChatML. llama.cpp learns the form of a tool call by rendering it, so the tags and the JSON here decide what
`tool_choice: required` makes the model write."""

WORD = re.compile(r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")
"""How GPT-2 cuts text before merging, as far as English without apostrophes needs it."""

JSON_HABITS = {
    **dict.fromkeys((*CALL[2:], '"', ":"), 1e-5),
    **dict.fromkeys("}]", 1e-6),
    **dict.fromkeys("{,", 5e-7),
    **dict.fromkeys("0123456789[tfn", 5e-8),
}
"""Counts for what may follow any token: too rare to be seen in free text, yet under a JSON grammar, which
forbids most of the rest, likely enough that strings, numbers and lists end soon."""

SELDOM = 1e-3
"""The count of what only a grammar brings up: a tool call where the turn would end, a string said twice."""

NEVER = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The dimensions of a network."""

    layers: int
    embd: int
    """Width of the residual stream."""
    ffn: int
    """Width of the feed-forward layers."""
    heads: int
    kv_heads: int
    head_dim: int
    context_tokens: int


class Tokenizer:
    """A byte-level BPE like GPT-2's: bytes, merges learned from a text, and phrases that are never split."""

    def __init__(self, text: str, *, phrases: Sequence[str] = ()) -> None:
        self.merges = list(_learn_merges(text))
        self.tokens = [*BYTES, *(a + b for a, b in self.merges), *phrases, TURN_END, TURN_START]
        self.types = [gguf.TokenType.NORMAL] * (len(BYTES) + len(self.merges))
        self.types += [gguf.TokenType.USER_DEFINED] * len(phrases) + [gguf.TokenType.CONTROL] * 2
        self.ids = {token: number for number, token in enumerate(self.tokens)}
        self._ranks = {pair: rank for rank, pair in enumerate(self.merges)}

    def encode(self, text: str) -> list[int]:
        """The ids of a text without special tokens."""
        return [self.ids[part] for word in WORD.findall(text) for part in self._split(word)]

    def _split(self, word: str) -> tuple[str, ...]:
        parts = _spell(word)
        while len(parts) > 1:
            best = min(pairwise(parts), key=lambda pair: self._ranks.get(pair, math.inf))
            if best not in self._ranks:
                break
            parts = _merge(parts, best)
        return parts


def write_bigram(path: Path, corpus: Sequence[str] = TRIAL_CORPUS, name: str = TRIAL_NAME) -> None:
    """
    Write a model that speaks like `corpus`, whose items are its answers.

    After a newline or any token unknown to the corpus it begins an item, as often as that item is there;
    within an item it knows only the last word. Items must not lead in a circle, or temperature 0 never ends.
    """
    words = Tokenizer("\n".join((*corpus, *JSON_STRINGS)), phrases=CALL)
    width = -(-len(words.tokens) // 64) * 64
    shape = Shape(layers=1, embd=width, ffn=32, heads=1, kv_heads=1, head_dim=32, context_tokens=131_072)
    chances = _bigram_counts(corpus, words)
    chances /= chances.sum(axis=1, keepdims=True)
    embedding = np.eye(len(words.tokens), width, dtype=np.float16)
    output = np.zeros_like(embedding)
    output[:, : len(words.tokens)] = np.log(chances).T / math.sqrt(width)
    weights = {name: np.zeros(size, np.float16) for name, size in _matrices(shape).items()}
    _write(path, name, shape, words, {**weights, "token_embd": embedding, "output": output})


def write_random(
    path: Path,
    name: str = "random",
    *,
    layers: int = 4,
    embd: int = 256,
    heads: int = 4,
    kv_heads: int = 2,
    ffn: int = 704,
    seed: int = 1,
) -> None:
    """
    Write a model with Gaussian weights, about `2 * layers * embd * (3 * embd + 3 * ffn)` bytes.

    `embd` is a multiple of `heads`, and `heads` of `kv_heads`.
    """
    words = Tokenizer("\n".join(TRIAL_CORPUS))
    shape = Shape(
        layers=layers,
        embd=embd,
        ffn=ffn,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=embd // heads,
        context_tokens=131_072,
    )
    rng = np.random.default_rng(seed)
    ends = {"token_embd": (len(words.tokens), embd), "output": (len(words.tokens), embd)}
    weights = {name: _gaussian(rng, size) for name, size in {**_matrices(shape), **ends}.items()}
    _write(path, name, shape, words, weights)


def _gaussian(rng: np.random.Generator, size: tuple[int, int]) -> Matrix:
    return (rng.standard_normal(size, np.float32) / math.sqrt(size[1])).astype(np.float16)


def _bigram_counts(corpus: Sequence[str], words: Tokenizer) -> npt.NDArray[np.float64]:
    """Row i: how often each token follows token i."""
    size = len(words.tokens)
    starts, counts = np.zeros(size), np.zeros((size, size))
    for line in corpus:
        ids = [*words.encode(line), words.ids[TURN_END]]
        starts[ids[0]] += 1
        for last, following in pairwise(ids):
            counts[last, following] += 1
        counts[ids[-2], words.ids[CALL[0]]] += SELDOM
    _add_json(counts, words)
    unseen = counts.sum(axis=1) < SELDOM
    counts[unseen] = starts
    counts += NEVER
    for token, count in JSON_HABITS.items():
        counts[:, words.ids[token]] += count
    return counts


def _add_json(counts: npt.NDArray[np.float64], words: Tokenizer) -> None:
    """Short strings between quotes, and tool calls that end the turn."""
    (quote,) = words.encode('"')
    for string in JSON_STRINGS:
        (word,) = words.encode(string)
        counts[[quote, words.ids[CALL[1]]], word] = counts[word, quote] = 1
        counts[word, word] = SELDOM
    opening, name, _, closing = (words.ids[part] for part in CALL)
    counts[opening, name] = counts[closing, words.ids[TURN_END]] = 1


def _matrices(shape: Shape) -> dict[str, tuple[int, int]]:
    """The weights of the layers by name, as (outputs, inputs)."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    one_layer = {
        "attn_q": (queries, shape.embd),
        "attn_k": (keys, shape.embd),
        "attn_v": (keys, shape.embd),
        "attn_output": (shape.embd, queries),
        "ffn_gate": (shape.ffn, shape.embd),
        "ffn_up": (shape.ffn, shape.embd),
        "ffn_down": (shape.embd, shape.ffn),
    }
    return {f"blk.{layer}.{part}": size for layer in range(shape.layers) for part, size in one_layer.items()}


def _write(path: Path, name: str, shape: Shape, words: Tokenizer, weights: Mapping[str, Matrix]) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_license("apache-2.0")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    _add_shape(writer, shape)
    _add_tokenizer(writer, words)
    ones = np.ones(shape.embd, np.float32)
    norms = [f"blk.{layer}.{part}_norm" for layer in range(shape.layers) for part in ("attn", "ffn")]
    for tensor in [*norms, "output_norm"]:
        writer.add_tensor(f"{tensor}.weight", ones)
    for tensor, matrix in weights.items():
        writer.add_tensor(f"{tensor}.weight", matrix)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_shape(writer: gguf.GGUFWriter, shape: Shape) -> None:
    writer.add_context_length(shape.context_tokens)
    writer.add_embedding_length(shape.embd)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)


def _add_tokenizer(writer: gguf.GGUFWriter, words: Tokenizer) -> None:
    end = words.ids[TURN_END]
    writer.add_vocab_size(len(words.tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    writer.add_token_merges([" ".join(pair) for pair in words.merges])
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_eot_token_id(end)
    writer.add_pad_token_id(end)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _byte_tokens() -> list[str]:
    """GPT-2's printable character for each byte: its own where it has one, else the next from 256 on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = (chr(code) for code in range(256, 512))
    return [chr(byte) if byte in shown else next(hidden) for byte in range(256)]


BYTES = _byte_tokens()


def _learn_merges(text: str) -> Iterator[tuple[str, str]]:
    """The most frequent pair, merged, again and again, until every word of the text is one token."""
    words = Counter(_spell(word) for word in WORD.findall(text))
    while True:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, times in words.items():
            for pair in pairwise(word):
                pairs[pair] += times
        if not pairs:
            return
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        yield best
        words = Counter({_merge(word, best): times for word, times in words.items()})


def _spell(word: str) -> tuple[str, ...]:
    return tuple(BYTES[byte] for byte in word.encode())


def _merge(parts: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return tuple(merged)

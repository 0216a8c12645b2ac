"""Which coding an answer is sent in, and that it can be read."""

from __future__ import annotations

import gzip
import random
from collections.abc import Callable
from typing import Any

import brotli  # type: ignore[import-untyped]
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from sutazai.edge.compress import CODINGS, MAX_INLINE_BYTES, Compressor, best_of, is_compressible

JSON = b"application/json"
TEXT = b'{"word": "hello", "again": "hello"}' * 200


def unpacked(coding: bytes, body: bytes) -> bytes:
    readers: dict[Any, Callable[[], bytes]] = {
        b"zstd": lambda: zstandard.ZstdDecompressor().decompress(body),
        b"br": lambda: brotli.decompress(body),
        b"gzip": lambda: gzip.decompress(body),
    }
    return readers[coding]()


@pytest.mark.parametrize(
    ("accepted", "coding"),
    [
        (b"", b""),
        (b"gzip", b"gzip"),
        (b"gzip, deflate", b"gzip"),
        (b"gzip, deflate, br", b"br"),
        (b"gzip, deflate, br, zstd", b"zstd"),
        (b"GZip;Q=1", b"gzip"),
        (b"x-gzip", b"gzip"),
        (b"*", b"zstd"),
        (b"*;q=0.5, zstd;q=0", b"br"),
        (b"br;q=0.1, gzip;q=0.9", b"gzip"),
        (b"br;q=0.5,gzip;q=0.5", b"br"),
        (b"zstd ; q = 0.001 , gzip;q=0", b"zstd"),
        (b"gzip;q=0", b""),
        (b"identity", b""),
        (b"identity;q=1, gzip;q=0.5", b""),
        (b"identity;q=0.5, gzip;q=0.5", b"gzip"),
        (b"identity;q=0, gzip", b"gzip"),
        (b"*;q=0", b""),
        (b"deflate, compress", b""),
        (b"gzip;q=2", b""),
        (b"gzip;q=0.1234", b""),
        (b"gzip;level=9", b""),
        (b",,;, gzip", b"gzip"),
    ],
)
def test_the_coding_is_the_one_that_the_client_likes_best(accepted: bytes, coding: bytes) -> None:
    assert best_of(accepted) == coding


@given(st.binary(max_size=60) | st.text("gzipbrstd*;q=0.1, ", max_size=60).map(str.encode))
def test_any_header_leads_to_a_coding_or_to_none(accepted: bytes) -> None:
    compressor = Compressor(from_bytes=0)

    assert compressor.coding_for(accepted) == best_of(accepted) == compressor.coding_for(accepted)
    assert best_of(accepted) in {b"", *CODINGS}


@pytest.mark.parametrize("coding", CODINGS)
@given(body=st.binary(max_size=5000))
def test_what_is_packed_can_be_unpacked(coding: bytes, body: bytes) -> None:
    assert unpacked(coding, CODINGS[coding](body)) == body


@pytest.mark.parametrize("coding", CODINGS)
def test_a_compressed_answer_says_so_and_is_counted(coding: bytes) -> None:
    compressor = Compressor(from_bytes=1024)
    lines, small = compressor.pack(coding, JSON, TEXT)

    assert lines == b"content-encoding: %b\r\nvary: accept-encoding\r\n" % coding
    assert unpacked(coding, small) == TEXT
    assert (compressor.answers, compressor.saved_bytes) == (1, len(TEXT) - len(small))


@pytest.mark.parametrize(
    ("accepted", "content_type", "body"),
    [
        (b"", JSON, TEXT),
        (b"gzip", JSON, TEXT[:1023]),
        (b"gzip", b"text/event-stream", TEXT),
        (b"gzip", b"image/png", TEXT),
        (b"gzip", JSON, random.Random(1).randbytes(5000)),
        (b"gzip", JSON, TEXT + b" " * MAX_INLINE_BYTES),
    ],
    ids=["not accepted", "small", "stream", "picture", "random", "huge"],
)
def test_what_is_not_worth_it_is_sent_as_it_is(accepted: bytes, content_type: bytes, body: bytes) -> None:
    compressor = Compressor(from_bytes=1024)
    lines, sent = compressor.pack(accepted, content_type, body)

    assert lines == b""
    assert sent is body
    assert compressor.answers == 0


async def test_where_there_is_time_a_huge_body_is_compressed_too() -> None:
    body = TEXT + b" " * MAX_INLINE_BYTES
    small = await Compressor(from_bytes=0).apply(b"br", body)

    assert len(small) < len(body) / 10
    assert unpacked(b"br", small) == body


@pytest.mark.parametrize(
    ("content_type", "is_it"),
    [
        (b"application/json", True),
        (b"application/json; charset=utf-8", True),
        (b"application/x-ndjson", True),
        (b"text/html; charset=utf-8", True),
        (b"image/svg+xml", True),
        (b"text/event-stream; charset=utf-8", False),
        (b"application/octet-stream", False),
        (b"image/webp", False),
        (b"", False),
    ],
)
def test_text_becomes_smaller_and_pictures_do_not(content_type: bytes, is_it: bool) -> None:
    assert is_compressible(content_type) is is_it

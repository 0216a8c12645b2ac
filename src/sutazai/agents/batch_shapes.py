"""What is written down of a batch job: its input, how far it is, and what came of it."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct, field

from sutazai.ports.agent import CHAT
from sutazai.ports.objects import object_name

BATCH = "batch"
BATCH_CHUNK = "batch_chunk"
WINDOW = "24h"
WINDOW_S = 86_400

NO_NUL = r"^[^\x00]*$"
Metadata = Annotated[
    dict[
        Annotated[str, Meta(min_length=1, max_length=64, pattern=NO_NUL)],
        Annotated[str, Meta(max_length=512, pattern=NO_NUL)],
    ],
    Meta(max_length=16),
]


class BatchJob(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is asked for: the body of `POST /v1/batches` too."""

    input_file_id: Annotated[str, Meta(pattern="^file-[0-9a-f]{32}$")]
    endpoint: Annotated[str, Meta(max_length=100, pattern=NO_NUL)]
    completion_window: Annotated[str, Meta(max_length=20, pattern=NO_NUL)] = WINDOW
    metadata: Metadata | None = None


class Complaint(Struct, frozen=True, kw_only=True):
    """Why a batch job failed, in OpenAI's form."""

    code: str
    message: str
    line: int | None = None
    """In the input file, from 1."""
    param: str | None = None


class BatchProgress(Struct, frozen=True, kw_only=True):
    """How far it is."""

    stage: str
    """`validating`, `in_progress` or `finalizing`, as OpenAI's status."""
    total: int = 0
    completed: int = 0
    failed: int = 0
    in_progress_at: int | None = None
    """Unix seconds, as all times in OpenAI's form."""
    finalizing_at: int | None = None
    model: str | None = None
    """That all lines name; None where they name several, or none."""


class BatchResult(Struct, frozen=True, kw_only=True):
    """What came of it."""

    errors: list[Complaint] = field(default_factory=list)
    """Why no line was answered; empty where lines were."""
    output_file_id: str | None = None
    error_file_id: str | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    model: str | None = None
    is_expired: bool = False
    """Some lines were not begun within the window."""
    cancelling_at: int | None = None
    """When it was called off; None where it was not."""
    in_progress_at: int | None = None
    finalizing_at: int | None = None


class Piece(Struct, frozen=True, kw_only=True):
    """Some lines of the input file that follow each other."""

    start: int
    """Byte in the file."""
    length: int
    """In bytes."""
    first_line: int
    """From 1."""
    lines: int
    """How many are requests; the others are blank."""


class Chunk(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The input of a `batch_chunk`."""

    batch: Annotated[str, Meta(pattern="^[0-9a-f]{32}$")]
    """The id of the batch job without what comes before the digits."""
    input_file_id: Annotated[str, Meta(pattern="^file-[0-9a-f]{32}$")]
    piece: Piece
    endpoint: str = CHAT
    """Of the batch job, and so of its lines."""


class Part(Struct, frozen=True):
    """An object that holds answers of a chunk."""

    name: str
    lines: list[int]
    """Whose answers."""


class ChunkKept(Struct):
    """The checkpoint of a chunk."""

    parts: list[Part] = field(default_factory=list)
    completed: int = 0
    failed: int = 0
    input_tokens: int = 0
    """Of the answers in the parts."""
    output_tokens: int = 0


class ChunkDone(Struct, frozen=True):
    """How many lines of a chunk have an answer, and how many an error; its progress and its result."""

    completed: int = 0
    failed: int = 0


def folder_of(tenant: str, batch: str, *name: str) -> str:
    """Where the answers of a batch job are until its files are written, or one of the objects there."""
    return object_name(tenant, "batches", batch, *name)


def file_at(tenant: str, file_id: str) -> str:
    """The object that holds a file's bytes."""
    return object_name(tenant, "files", file_id)

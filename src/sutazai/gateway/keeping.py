"""
Models on all nodes at once: fetched, copied, removed, with one progress for the whole pool.

Only nodes that keep models themselves (Ollama) take part; others serve what they were started with.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, cast

from sutazai.core.errors import BadRequest, NodeRejected, NodeTimeout, NoHealthyNode, SutazaiError, UnknownModel
from sutazai.core.node import Health, NodeKind
from sutazai.gateway.experience import LATEST
from sutazai.gateway.fleet import Fleet
from sutazai.policy.nearest import nearest
from sutazai.ports.nodes import ModelKeeper

Record = Mapping[str, Any]
QUEUED_RECORDS = 256
DELETE_LIMIT_S = 30.0


class Progress:
    """What the pulls of all nodes come to, in the form of one of Ollama's progress records."""

    def __init__(self, nodes: list[str]) -> None:
        self._latest: dict[str, Record] = {node: {} for node in nodes}
        self._layers: dict[str, dict[str, tuple[int, int]]] = {}

    def note(self, node: str, record: Record) -> dict[str, Any]:
        """Take one node's record in; returns the merged one."""
        self._latest[node] = record
        digest = record.get("digest")
        if not isinstance(digest, str):
            return {"status": str(record.get("status", "")), "nodes": self._nodes()}
        layers = self._layers.setdefault(digest, {})
        layers[node] = (int(record.get("completed") or 0), int(record.get("total") or 0))
        return {
            "status": str(record.get("status", "")),
            "digest": digest,
            "total": sum(total for _, total in layers.values()),
            "completed": sum(completed for completed, _ in layers.values()),
            "nodes": self._nodes(),
        }

    def _nodes(self) -> dict[str, str]:
        return {node: str(record.get("status", "waiting")) for node, record in self._latest.items()}


class Keeping:
    """Model keeping for the whole pool."""

    def __init__(
        self,
        fleet: Fleet,
        *,
        look_again: Callable[[], Awaitable[None]],
        forget: Callable[[str], Awaitable[None]],
    ) -> None:
        """
        Make it.

        Args:
            look_again: probes the nodes, so that what was fetched can be asked for at once.
            forget: drops kept answers of a model by that name, which may be another model now.
        """
        self._fleet = fleet
        self._look_again = look_again
        self._forget = forget

    async def pull(self, model: str, *, insecure: bool) -> AsyncGenerator[dict[str, Any], None]:
        """
        Fetch a model on every node at once; yields merged progress, at the end `success` or an `error`.

        Raises `BadRequest` where no node keeps models. Closing the iterator stops every pull.
        """
        keepers = self._keepers()
        progress = Progress(list(keepers))
        records: asyncio.Queue[tuple[str, Record | SutazaiError | None]] = asyncio.Queue(QUEUED_RECORDS)

        async def follow(node: str, keeper: ModelKeeper) -> None:
            last: Record = {}
            try:
                async with aclosing(cast("Any", keeper.pull(model, insecure=insecure))) as pulling:
                    async for record in pulling:
                        last = record
                        await records.put((node, record))
                done = last.get("status") == "success"
                await records.put((node, None if done else SutazaiError("It stopped before the end.")))
            except SutazaiError as error:
                await records.put((node, error))
            except Exception as error:  # the border of a task: a node may send anything
                await records.put((node, SutazaiError(f"Its progress was not understood: {error!r}")))

        tasks = [asyncio.create_task(follow(*entry), name=f"pull on {entry[0]}") for entry in keepers.items()]
        failed: dict[str, str] = {}
        try:
            under_way = len(tasks)
            while under_way:
                node, record = await records.get()  # each pull has its own limit on silence
                if record is None:
                    under_way -= 1
                elif isinstance(record, SutazaiError):
                    under_way -= 1
                    failed[node] = record.message
                elif record.get("status") != "success":
                    yield progress.note(node, record)
                else:
                    progress.note(node, record)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await self._changed(model)
        if failed:
            yield {"error": _failures(failed), "nodes": failed}
        else:
            yield {"status": "success"}

    async def delete(self, model: str) -> list[str]:
        """Remove a model from every node that has it; returns those nodes. Raises `UnknownModel`."""
        return await self._everywhere(model, lambda keeper: keeper.delete(model), changes=model)

    async def copy(self, source: str, destination: str) -> list[str]:
        """Give a model a second name wherever it is; returns those nodes. Raises `UnknownModel`."""
        return await self._everywhere(source, lambda keeper: keeper.copy(source, destination), changes=destination)

    async def _everywhere(
        self, model: str, act: Callable[[ModelKeeper], Awaitable[None]], *, changes: str
    ) -> list[str]:
        having = {state.node.name for state in self._fleet.candidates(model)}
        keepers = {name: keeper for name, keeper in self._keepers().items() if name in having}
        if not keepers:
            raise UnknownModel(model, nearest(model, self._fleet.models()))

        async def bounded(node: str, keeper: ModelKeeper) -> None:
            try:
                async with asyncio.timeout(DELETE_LIMIT_S):
                    await act(keeper)
            except TimeoutError as error:
                raise NodeTimeout(f"It did not answer within {DELETE_LIMIT_S:g} s.", node=node) from error

        results = await asyncio.gather(*map(bounded, keepers, keepers.values()), return_exceptions=True)
        failed = {
            node: getattr(result, "message", None) or repr(result)
            for node, result in zip(keepers, results, strict=True)
            if isinstance(result, BaseException)
        }
        await self._changed(changes)
        if failed:
            raise NodeRejected(_failures(failed), node=next(iter(failed)), status=502)
        return list(keepers)

    async def _changed(self, model: str) -> None:
        """The name may stand for something else now."""
        await self._look_again()
        short = model.removesuffix(LATEST)
        for name in (short, short + LATEST):
            await self._forget(name)

    def _keepers(self) -> dict[str, ModelKeeper]:
        ollama = [state for state in self._fleet.states() if state.node.kind is NodeKind.OLLAMA]
        if not ollama:
            raise BadRequest(
                "No node of this pool keeps models: only Ollama nodes can fetch, copy and delete them. "
                "Others serve the models they were started with."
            )
        up = [state for state in ollama if state.health is Health.UP]
        if not up:
            raise NoHealthyNode("Every Ollama node of the pool is down.", retry_after_s=5)
        return {state.node.name: cast("ModelKeeper", self._fleet.client(state.node.name)) for state in up}


def _failures(failed: Mapping[str, str]) -> str:
    return "; ".join(f"{node}: {why}" for node, why in failed.items())

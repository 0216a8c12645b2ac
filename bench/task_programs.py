"""
The programs of `bench.task_queues`: `python -m bench.task_programs CONTESTANT submit|work COUNT`.

Each task appends one byte to the file in `BENCH_DONE`. What is submitted is durable and confirmed before the producer
counts it. Runs in the environment of the contestant, so each imports only what it needs.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

DATABASE = os.environ.get("BENCH_DATABASE", "")
BROKER = os.environ.get("BENCH_BROKER", "")
AT_ONCE = 64
_DONE = os.open(os.environ["BENCH_DONE"], os.O_WRONLY | os.O_APPEND | os.O_CREAT) if "BENCH_DONE" in os.environ else -1


def tick() -> None:
    """The work of a task."""
    os.write(_DONE, b".")


class Ours:
    """SutazAI, on the table queue or through RabbitMQ."""

    async def submit(self, count: int) -> list[float]:
        """Latencies in seconds."""
        from sutazai.adapters.postgres.stores import open_stores  # noqa: PLC0415
        from sutazai.core.task import TaskDraft  # noqa: PLC0415
        from sutazai.settings.model import Database  # noqa: PLC0415
        from sutazai.settings.secret import Secret  # noqa: PLC0415
        from sutazai.tasks.gather import Gathered  # noqa: PLC0415

        async with open_stores(Database(url=Secret(DATABASE)), Path("/nowhere")) as stores:
            gathered = Gathered(stores.tasks)
            running = asyncio.create_task(gathered.run(), name="write submissions")
            try:
                return await _crowd(count, lambda: gathered.submit(TaskDraft(tenant="a", agent="tick")))
            finally:
                running.cancel()

    async def work(self, count: int) -> None:
        """Until ended."""
        from contextlib import AsyncExitStack  # noqa: PLC0415

        from sutazai.adapters.postgres.stores import open_stores  # noqa: PLC0415
        from sutazai.ports.agent import TASK_PROCESSING, Agent  # noqa: PLC0415
        from sutazai.settings.model import Database  # noqa: PLC0415
        from sutazai.settings.secret import Secret  # noqa: PLC0415
        from sutazai.tasks.context import Surroundings  # noqa: PLC0415
        from sutazai.tasks.results import Results  # noqa: PLC0415
        from sutazai.tasks.worker import Worker, WorkerRules  # noqa: PLC0415
        from sutazai.testing.objects import MemoryObjects  # noqa: PLC0415

        async def run(_: Any, __: Any) -> None:
            tick()

        known = {
            "tick": Agent(
                name="tick",
                run=run,
                input_type=Any,
                output_type=Any,
                describes="Ticks.",
                queue=TASK_PROCESSING,
                concurrency=256,
            )
        }
        async with open_stores(Database(url=Secret(DATABASE)), Path("/nowhere")) as stores, AsyncExitStack() as stack:
            no_models: Any = None
            around = Surroundings(
                store=stores.tasks,
                models=no_models,
                messages=stores.messages,
                agents=known,
                results=Results(MemoryObjects(), max_inline_bytes=2**18),
                default_model="",
                wall=lambda: datetime.now(UTC),
            )
            queue: Any = stores.queue
            group = await stack.enter_async_context(asyncio.TaskGroup())
            group.create_task(stores.queue.run())
            if BROKER:
                from sutazai.adapters.rabbitmq.queue import open_rabbitmq  # noqa: PLC0415
                from sutazai.settings.model import Rabbitmq  # noqa: PLC0415
                from sutazai.tasks.relay import Relay  # noqa: PLC0415

                queue = await stack.enter_async_context(open_rabbitmq(Rabbitmq(url=Secret(BROKER))))
                group.create_task(Relay(stores.queue, queue, [TASK_PROCESSING]).run())
            rules = WorkerRules(name="bench", slots={TASK_PROCESSING: 256})
            worker = Worker(queue, around, rules, mine=frozenset(known), random=random.random)
            group.create_task(worker.run())


class Procrastinate:
    """Procrastinate on PostgreSQL."""

    def _app(self) -> Any:
        import procrastinate  # noqa: PLC0415

        app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=DATABASE, max_size=10))

        @app.task(name="tick", queue="bench")  # type: ignore[untyped-decorator]
        async def run() -> None:
            tick()

        return app, run

    async def submit(self, count: int) -> list[float]:
        """Latencies in seconds."""
        app, run = self._app()
        async with app.open_async():
            await app.schema_manager.apply_schema_async()
            return await _crowd(count, run.defer_async)

    async def work(self, count: int) -> None:
        """Until ended."""
        app, _ = self._app()
        async with app.open_async():
            await app.run_worker_async(queues=["bench"], concurrency=256, fetch_job_polling_interval=0.1)


class Taskiq:
    """taskiq on RabbitMQ; its queue is durable, its acknowledgements come after the task."""

    def _broker(self) -> Any:
        from taskiq.acks import AcknowledgeType  # noqa: PLC0415
        from taskiq_aio_pika import AioPikaBroker  # noqa: PLC0415

        broker = AioPikaBroker(BROKER)

        @broker.task(task_name="tick")  # type: ignore[untyped-decorator]
        async def run() -> None:
            tick()

        return broker, run, AcknowledgeType

    async def submit(self, count: int) -> list[float]:
        """Latencies in seconds."""
        broker, run, _ = self._broker()
        await broker.startup()
        try:
            return await _crowd(count, run.kiq)
        finally:
            await broker.shutdown()

    async def work(self, count: int) -> None:
        """Until ended."""
        from taskiq.api import run_receiver_task  # noqa: PLC0415

        broker, _, _ = self._broker()
        broker.is_worker_process = True
        await run_receiver_task(broker, run_startup=True, max_async_tasks=256)


class Blocking:
    """Celery and Dramatiq, which submit one after another in a thread."""

    def __init__(self, name: str) -> None:
        self._name = name

    async def submit(self, count: int) -> list[float]:
        """Latencies in seconds."""
        send = celery_app().send_task if self._name == "celery" else dramatiq_actor().send
        taken = []
        for _ in range(count):
            began = time.perf_counter()
            send("tick") if self._name == "celery" else send()
            taken.append(time.perf_counter() - began)
        return taken

    async def work(self, count: int) -> None:
        """Until ended."""
        raise SystemExit("run by its own command")


def celery_app() -> Any:
    """Celery with confirms, late acknowledgements and a quorum queue."""
    import celery  # noqa: PLC0415
    from kombu import Queue  # noqa: PLC0415

    app = celery.Celery("bench", broker=BROKER)
    app.conf.update(
        task_acks_late=True,
        task_ignore_result=True,
        worker_prefetch_multiplier=32,
        task_default_queue="bench_celery",
        task_queues=[Queue("bench_celery", queue_arguments={"x-queue-type": "quorum"})],
        broker_transport_options={"confirm_publish": True},
        worker_detect_quorum_queues=True,
    )
    app.task(name="tick")(tick)
    return app


def dramatiq_actor() -> Any:
    """Dramatiq with confirms."""
    import dramatiq  # noqa: PLC0415
    from dramatiq.brokers.rabbitmq import RabbitmqBroker  # noqa: PLC0415

    broker = RabbitmqBroker(url=BROKER, confirm_delivery=True)
    dramatiq.set_broker(broker)
    return dramatiq.actor(tick, actor_name="tick", queue_name="bench_dramatiq")


async def _crowd(count: int, submit: Any) -> list[float]:
    taken: list[float] = []
    left = iter(range(count))

    async def one() -> None:
        for _ in left:
            began = time.perf_counter()
            await submit()
            taken.append(time.perf_counter() - began)

    await asyncio.gather(*(one() for _ in range(AT_ONCE)))
    return taken


def _loop_factory() -> Any:
    """Of uvloop, which our commands and taskiq's run on where it is installed; each contestant gets it alike."""
    try:
        import uvloop  # noqa: PLC0415
    except ImportError:
        return None
    return uvloop.new_event_loop


CONTESTANTS: dict[str, Any] = {
    "ours": Ours(),
    "procrastinate": Procrastinate(),
    "taskiq": Taskiq(),
    "celery": Blocking("celery"),
    "dramatiq": Blocking("dramatiq"),
}

if BROKER and os.environ.get("BENCH_APP") == "celery":
    app = celery_app()
if BROKER and os.environ.get("BENCH_APP") == "dramatiq":
    actor = dramatiq_actor()

if __name__ == "__main__":
    contestant = CONTESTANTS[sys.argv[1]]
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        if sys.argv[2] == "submit":
            latencies = sorted(runner.run(contestant.submit(int(sys.argv[3]))))
            print(latencies[len(latencies) // 2], latencies[int(len(latencies) * 0.99)])
        else:
            runner.run(contestant.work(int(sys.argv[3])))

"""`sutazai up` and `sutazai gateway`: the programs that stay."""

from __future__ import annotations

import asyncio
import errno
import os
import resource
import signal
import sys
from pathlib import Path

import uvloop

from sutazai.bootstrap import Gateway, open_gateway
from sutazai.bootstrap.rules import log_form
from sutazai.cli.memory import settle_memory
from sutazai.cli.printing import complain
from sutazai.core.errors import SettingsError, SutazaiError
from sutazai.settings.load import data_dir, find, load
from sutazai.settings.model import Settings
from sutazai.telemetry.logs import configure

USAGE_ERROR = 2


def up(config: Path | None = None) -> int:
    """
    Run everything on this machine: gateway, database, and a model if there is none.

    Example: `sutazai up`, then `curl http://127.0.0.1:10010/v1/models`

    Parameters
    ----------
    config
        Settings file. Left out: $SUTAZAI_CONFIG, ./sutazai.toml, or the one of the user.
    """
    return _serve(config, with_engine=True)


def gateway(config: Path | None = None) -> int:
    """
    Run the gateway alone, in front of the nodes that the settings name.

    Run as many as you like behind a load balancer. Example: `sutazai gateway --config /etc/sutazai/sutazai.toml`

    Parameters
    ----------
    config
        Settings file. Left out: $SUTAZAI_CONFIG, ./sutazai.toml, or the one of the user.
    """
    return _serve(config, with_engine=False)


def _serve(config: Path | None, *, with_engine: bool) -> int:
    try:
        path = config or find(os.environ, Path.cwd())
        settings = load(path, os.environ)
    except SettingsError as error:
        sys.stderr.write("".join(f"{mistake}\n" for mistake in error.mistakes))
        return USAGE_ERROR
    configure(form=log_form(settings), level=settings.logs.level)
    _raise_file_limit()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_run(settings, path, with_engine=with_engine))
    except BaseExceptionGroup as group:
        return _explained(group, settings)
    except (SutazaiError, OSError) as error:
        return _explained(error, settings)
    return 0


def _explained(error: BaseException, settings: Settings) -> int:
    """Say why it could not start or go on; anything unforeseen is raised again."""
    known, others = _sorted_out(error)
    if others:
        raise error
    for one in known:
        sys.stderr.write(f"{_in_words(one, settings) if isinstance(one, OSError) else one}\n")
    return 1


def _in_words(error: OSError, settings: Settings) -> str:
    if error.filename is not None:
        return (
            f"{error.filename} could not be used: {error.strerror}. Check who may write there, or `database.data_dir`."
        )
    where = f"{settings.server.host}:{settings.server.port}"
    if error.errno == errno.EADDRINUSE:
        return f"Another program listens on {where} already. Stop it, or choose another `server.port`."
    return f"Could not listen on {where}: {error}"


def _sorted_out(error: BaseException) -> tuple[list[BaseException], list[BaseException]]:
    """Errors that have a sentence for the user, and the others."""
    if isinstance(error, BaseExceptionGroup):
        sorted_out = [_sorted_out(one) for one in error.exceptions]
        return [one for known, _ in sorted_out for one in known], [one for _, others in sorted_out for one in others]
    return ([error], []) if isinstance(error, SutazaiError | OSError) else ([], [error])


async def _run(settings: Settings, path: Path | None, *, with_engine: bool) -> None:
    """Serve until SIGTERM or SIGINT; a second one ends at once."""
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()

    def stop() -> None:
        if stopping.is_set():
            os._exit(130)
        stopping.set()

    loop.add_signal_handler(signal.SIGTERM, stop)
    loop.add_signal_handler(signal.SIGINT, stop)
    folder = data_dir(settings, os.environ, os.geteuid() == 0)
    async with open_gateway(
        settings,
        data_dir=folder,
        settings_path=path,
        environ=os.environ,
        with_engine=with_engine,
        with_worker=with_engine and settings.tasks.worker,
    ) as opened:
        loop.add_signal_handler(signal.SIGHUP, opened.reload)
        settle_memory()
        _greet(settings, opened)
        await stopping.wait()
        sys.stderr.write("Stopping: finishing what is under way.\n")


def _raise_file_limit() -> None:
    """Each client and each node connection is a file; the usual soft limit of 1024 is soon reached."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _greet(settings: Settings, opened: Gateway) -> None:
    host = f"[{settings.server.host}]" if ":" in settings.server.host else settings.server.host
    models = sorted(opened.fleet.listed_models())
    lines = [f"SutazAI listens on http://{host}:{opened.port}  (OpenAI: /v1, Ollama: /api)"]
    if models:
        lines.append(f"Models: {', '.join(models[:10])}{' ...' if len(models) > 10 else ''}")
    else:
        lines.append("No node answers yet. Name one in sutazai.toml, or start Ollama; `sutazai doctor` says more.")
    if opened.trial_model:
        lines.append(
            f"{opened.trial_model} is a toy that ships with SutazAI, for trying out: its answers mean little. For a "
            "real model start Ollama and `sutazai models pull llama3.2`, or name a GGUF file in sutazai.toml:\n"
            '  [engine]\n  models = ["/path/to/model.gguf"]'
        )
    complain("\n".join(lines))

"""
The contestants: how each is configured, started on loopback with one worker, and ended.

All get the same two nodes (one stub behind two ports) and choose by fewest connections or what comes nearest.
nginx does no more than that: no keys, no log, no count of tokens. The vLLM router runs without them too,
LiteLLM with one key and no database, their cheapest ways; ours has everything on, and its log goes to a file.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from bench.machine import mark, processes_of
from bench.payload import CHAT_PATH, MODEL, SMALL_BYTES, chat_body

OURS = "sutazai"
NGINX = "nginx"
VLLM_ROUTER = "vllm-router"
LITELLM = "litellm"

_ROOT = Path(__file__).resolve().parent.parent
_PEERS_VENV = _ROOT / ".venv-bench"
_LOCK = _ROOT / "bench" / "requirements.lock"
_STOP_LIMIT_S = 15.0
_LOG_LIMIT_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where a load goes: a contestant, or the stub node itself."""

    name: str
    port: int
    key: str = "none"


class StartFailed(Exception):
    """A contestant did not answer in time; the message ends with the last lines of its log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How one is run."""

    argv: Sequence[str]
    env: dict[str, str]
    key: str = "none"
    key_argv: Sequence[str] = ()
    """Once it runs, makes a key and prints it as JSON, in place of `key`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A contestant that could be started."""

    name: str
    prepare: Callable[[Path, int, Sequence[int]], Launch]
    """Writes the settings into a folder, for a port and the ports of the nodes."""
    start_limit_s: float = 20.0
    is_slow: bool = False
    """Does a hundred requests a second, so it gets fewer and longer rounds."""


@dataclass(slots=True, kw_only=True)
class Contestant:
    """One that runs and answers."""

    target: Target
    process: subprocess.Popen[bytes]
    log: Path
    is_slow: bool

    def is_alive(self) -> bool:
        """Whether it still runs: one that crashed is left out of the rest."""
        return self.process.poll() is None

    def cpu_s(self) -> float:
        """CPU time of all its processes so far."""
        return sum(process.cpu_s for process in processes_of(self.target.name, self.process.pid))

    def main_pid(self) -> int:
        """The process that does the work: the one that used most CPU."""
        return max(processes_of(self.target.name, self.process.pid), key=lambda process: process.cpu_s).pid

    def last_words(self) -> str:
        """The end of its log."""
        return self.log.read_bytes()[-400:].decode(errors="replace").strip()

    def trim_log(self) -> None:
        """Empty a log that grew large; a million lines are not kept."""
        if self.log.stat().st_size > _LOG_LIMIT_BYTES:
            os.truncate(self.log, 0)


def recipes() -> tuple[Recipe, ...]:
    """All of them, ours first."""
    return (
        Recipe(name=OURS, prepare=_prepare_ours, start_limit_s=60),
        Recipe(name=NGINX, prepare=_prepare_nginx),
        Recipe(name=VLLM_ROUTER, prepare=_prepare_vllm_router, start_limit_s=60),
        Recipe(name=LITELLM, prepare=_prepare_litellm, start_limit_s=180, is_slow=True),
    )


def search_path() -> str:
    """Where programs are looked for. Debian keeps nginx where only root looks."""
    return f"{os.environ['PATH']}:/usr/sbin"


def require_tools() -> None:
    """Raises `SystemExit` naming what to install where a program is missing."""
    packages = {"nginx": "nginx-light", "wrk": "wrk", "taskset": "util-linux"}
    if missing := [package for tool, package in packages.items() if shutil.which(tool, path=search_path()) is None]:
        raise SystemExit(f"Programs were missing. Install them with: apt-get install {' '.join(missing)}")


def install_peers() -> None:
    """Make the environment of LiteLLM, the vLLM router and the plot, unless it is there as locked."""
    stamp = _PEERS_VENV / "lock.sha256"
    digest = hashlib.sha256(_LOCK.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == digest:
        return
    print(
        f"Installing LiteLLM and the vLLM router into {_PEERS_VENV.name} (once, about a minute) ...",
        flush=True,
    )
    subprocess.run([sys.executable, "-m", "venv", "--clear", _PEERS_VENV], check=True, timeout=120)
    install = [str(_PEERS_VENV / "bin" / "pip"), "install", "--quiet", "--require-hashes", "-r", str(_LOCK)]
    subprocess.run(install, check=True, timeout=1200)
    stamp.write_text(digest)


def peers_python() -> Path:
    """The interpreter that has matplotlib."""
    return _PEERS_VENV / "bin" / "python"


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running(recipe: Recipe, *, nodes: Sequence[int], folder: Path, core: int) -> Iterator[Contestant]:
    """
    Start one pinned to a core, and wait until it answers a chat; end it however the block ends.

    Raises `StartFailed`.
    """
    folder.mkdir(mode=0o755)
    port = free_port()
    launch = recipe.prepare(folder, port, nodes)
    env = {
        "PATH": search_path(),
        "HOME": str(folder),
        "LANG": "C.UTF-8",
        **mark(recipe.name),
        **launch.env,
    }
    log = folder / "output.log"
    argv = ["taskset", "-c", str(core), *launch.argv]
    with log.open("ab") as output:
        # A session of its own: Ctrl-C reaches the benchmark alone, which then ends this one in order.
        process = subprocess.Popen(argv, env=env, cwd=folder, stdout=output, stderr=output, start_new_session=True)
    target = Target(name=recipe.name, port=port, key=launch.key)
    contestant = Contestant(target=target, process=process, log=log, is_slow=recipe.is_slow)
    try:
        _wait_until_ready(contestant, launch, env, give_up_at=time.monotonic() + recipe.start_limit_s)
        yield contestant
    finally:
        _stop(contestant)


def _wait_until_ready(contestant: Contestant, launch: Launch, env: dict[str, str], *, give_up_at: float) -> None:
    while not _is_listening(contestant.target.port):
        _check_alive(contestant, give_up_at)
    if launch.key_argv:
        made = subprocess.run(launch.key_argv, env=env, capture_output=True, timeout=60, check=False)
        if made.returncode != 0:
            raise StartFailed(f"made no key: {made.stderr.decode(errors='replace')[-400:]}")
        contestant.target = replace(contestant.target, key=str(json.loads(made.stdout)["key"]))
    while not _answers_a_chat(contestant):
        _check_alive(contestant, give_up_at)


def _check_alive(contestant: Contestant, give_up_at: float) -> None:
    if not contestant.is_alive() or time.monotonic() > give_up_at:
        what = "did not answer in time" if contestant.is_alive() else "ended"
        raise StartFailed(f"{what}: {contestant.last_words()}")
    time.sleep(0.2)


def _is_listening(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _answers_a_chat(contestant: Contestant) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", contestant.target.port, timeout=5)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {contestant.target.key}"}
    try:
        connection.request("POST", CHAT_PATH, chat_body(SMALL_BYTES), headers)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _stop(contestant: Contestant) -> None:
    process = contestant.process
    try:
        process.terminate()
        process.wait(_STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        print(f"{contestant.target.name} did not stop within {_STOP_LIMIT_S:g} s and was killed.", flush=True)
    finally:
        # An impatient second Ctrl-C ends the wait above, never this.
        process.kill()
        process.wait()
        for left in processes_of(contestant.target.name, process.pid):
            os.kill(left.pid, signal.SIGKILL)


def ours(name: str, *more: str, slots: int = 100_000) -> Recipe:
    """Ours once more, under another name and with further lines of settings."""
    return Recipe(
        name=name,
        prepare=lambda folder, port, nodes: _prepare_ours(folder, port, nodes, more, slots),
        start_limit_s=60,
    )


def make_key(folder: Path, name: str, tenant: str) -> str:
    """A key for a tenant, of the gateway of ours that was started in that folder."""
    env = {"PATH": search_path(), "HOME": str(folder), "SUTAZAI_CONFIG": str(folder / "sutazai.toml")}
    argv = [str(Path(sys.executable).parent / "sutazai"), "keys", "create", name, "--tenant", tenant, "--json"]
    made = subprocess.run(argv, env=env, capture_output=True, timeout=60, check=True)
    return str(json.loads(made.stdout)["key"])


def _prepare_ours(
    folder: Path, port: int, nodes: Sequence[int], more: Sequence[str] = (), slots: int = 100_000
) -> Launch:
    lines = [
        f'server = {{ host = "127.0.0.1", port = {port} }}',
        "auth = { required = true }",
        f"database = {{ data_dir = {json.dumps(str(folder / 'state'))} }}",
        "discovery = { ollama = false }",
        'engine = { enabled = "never" }',
        'logs = { access = true, format = "json" }',
        *(f'[[nodes]]\nurl = "http://127.0.0.1:{node}"\nkind = "openai"\nslots = {slots}' for node in nodes),
        *more,
    ]
    settings = folder / "sutazai.toml"
    settings.write_text("\n".join(lines) + "\n")
    program = str(Path(sys.executable).parent / "sutazai")
    return Launch(
        argv=[program, "gateway"],
        env={"SUTAZAI_CONFIG": str(settings)},
        key_argv=[program, "keys", "create", "bench", "--json"],
    )


def _prepare_nginx(folder: Path, port: int, nodes: Sequence[int]) -> Launch:
    # The body buffer is larger than the largest prompt, so that none is written to a disk.
    settings = f"""
        daemon off; worker_processes 1; worker_rlimit_nofile 16384;
        pid {folder}/nginx.pid; error_log {folder}/error.log warn;
        {"user root;" if os.geteuid() == 0 else ""}
        events {{ worker_connections 8192; }}
        http {{
            access_log off; client_body_buffer_size 256k; keepalive_requests 1000000000;
            client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
            uwsgi_temp_path {folder}; scgi_temp_path {folder};
            upstream nodes {{
                least_conn; {" ".join(f"server 127.0.0.1:{node} max_fails=0;" for node in nodes)}
                keepalive 512; keepalive_requests 1000000000;
            }}
            server {{
                listen 127.0.0.1:{port} backlog=4096;
                location / {{
                    proxy_pass http://nodes; proxy_http_version 1.1; proxy_set_header Connection "";
                    proxy_buffering off; proxy_read_timeout 300s;
                }}
            }}
        }}
    """
    path = folder / "nginx.conf"
    path.write_text(settings)
    return Launch(argv=["nginx", "-e", str(folder / "error.log"), "-p", str(folder), "-c", str(path)], env={})


def _prepare_vllm_router(folder: Path, port: int, nodes: Sequence[int]) -> Launch:
    argv = [str(_PEERS_VENV / "bin" / "vllm-router"), "--host", "127.0.0.1", "--port", str(port)]
    argv += ["--policy", "power_of_two", "--log-level", "error", "--max-concurrent-requests", "10000"]
    argv += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())]
    argv += ["--worker-urls", *(f"http://127.0.0.1:{node}" for node in nodes)]
    return Launch(argv=argv, env={})


def _prepare_litellm(folder: Path, port: int, nodes: Sequence[int]) -> Launch:
    def entry(node: int) -> dict[str, object]:
        where = {"model": f"openai/{MODEL}", "api_base": f"http://127.0.0.1:{node}/v1", "api_key": "none"}
        return {"model_name": MODEL, "litellm_params": where}

    key = f"sk-{secrets.token_hex(32)}"  # it does not start without one
    settings = {
        "model_list": [entry(node) for node in nodes],
        "general_settings": {"master_key": key},
        "litellm_settings": {"telemetry": False},
        "router_settings": {"routing_strategy": "least-busy"},
    }
    # JSON is YAML too.
    path = folder / "litellm.yaml"
    path.write_text(json.dumps(settings))
    program = str(_PEERS_VENV / "bin" / "litellm")
    return Launch(
        argv=[
            program,
            "--config",
            str(path),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--num_workers",
            "1",
        ],
        # Its table of prices would otherwise be fetched from the network.
        env={"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "False", "LITELLM_LOG": "ERROR"},
        key=key,
    )

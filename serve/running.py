"""A running model server: started on an exported model, watched until it is ready, stopped with all that it started.

The server runs in a session of its own, so Ctrl-C reaches only this process, which ends it: SIGTERM, and after a grace
period SIGKILL for all that it started. That happens too when this process is itself killed (serve/leash.py).

Refuses, in one line and before anything is started: a missing or damaged file, the wrong runtime for its format, a
port that is taken, a runtime that is not installed, a model that this machine has no memory for. A server that dies
while loading becomes the line that says why.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from lrqat.errors import LrqatError, at_least
from serve.launch import examine, llamacpp_command, reason, vllm_command
from serve.leash import hold, kill_session

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8000
START_SECONDS = 600.0
GRACE_SECONDS = 10.0  # between SIGTERM and SIGKILL; vLLM takes 2
POLL_SECONDS = 0.05
PROGRESS_SECONDS = 10.0
HEALTH_SECONDS = 2.0  # one request
LINE = 160  # characters of a log line that progress shows
ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # listen there, connect here


@dataclass
class Server:
    """A running server; a context manager that stops it.

    Attributes:
        exported: what is served.
        runtime: "llama.cpp" or "vllm".
        model: its name in requests.
        chat: it has a chat template.
        host: address to connect to.
        port: its port.
        log: the server's own log.
        pid: the server's process, leader of its session.
        leash: ends it when this process does; ends when it does.
    """

    exported: Path
    runtime: str
    model: str
    chat: bool
    host: str
    port: int
    log: Path
    pid: int
    leash: subprocess.Popen[bytes] = field(repr=False)

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Base address; the OpenAI endpoints lie below it at /v1."""
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"

    @property
    def curl(self) -> str:
        """A shell command that asks the model something."""
        path, body = "completions", {"model": self.model, "prompt": "The capital of France is", "max_tokens": 32}
        if self.chat:
            message = {"role": "user", "content": "What is the capital of France?"}
            path, body = "chat/completions", {"model": self.model, "messages": [message], "max_tokens": 32}
        data = shlex.quote(json.dumps(body))
        return f"curl {self.url}/v1/{path} -H 'Content-Type: application/json' -d {data}"

    def healthy(self) -> bool:
        """It answers, and the model is loaded."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=HEALTH_SECONDS)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.client.OK and not self.ended()
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def ended(self) -> bool:
        """It is no more, without having been asked to stop."""
        return self.leash.poll() is not None

    def wait_until_healthy(self, limit: float) -> None:
        """Return when the model is loaded; one line on stderr now and then until it is."""
        began = said = time.monotonic()
        while not self.healthy():
            if self.ended():
                raise LrqatError(self.obituary())
            now = time.monotonic()
            if now - began > limit:
                raise LrqatError(
                    f"{self.exported}: {self.runtime} is not ready after {limit:g} s; "
                    f"see {self.log}, or allow more with --timeout"
                )
            if now - said >= PROGRESS_SECONDS:
                said = now
                print(f"{now - began:4.0f} s  {(_lines(self.log) or ['no output yet'])[-1][:LINE]}", file=sys.stderr)
            time.sleep(POLL_SECONDS)
        print(f"ready after {time.monotonic() - began:.1f} s", file=sys.stderr)

    def stop(self) -> None:
        """Ask it to end; after a grace period it is killed, at once if this is interrupted."""
        if self.leash.stdin is None or self.leash.stdin.closed:
            return
        try:
            self.leash.stdin.close()
            self.leash.wait()
        finally:
            kill_session(self.pid)
            self.leash.wait()

    def obituary(self) -> str:
        """One line on a server that ended by itself."""
        status = self.leash.wait()
        number = -status if status < 0 else status - 128
        if number == signal.SIGKILL:
            return f"{self.exported}: {self.runtime} was killed by SIGKILL (out of memory?); see {self.log}"
        how = f"was killed by {signal.Signals(number).name}" if number > 0 else f"stopped with status {status}"
        return f"{self.exported}: {self.runtime} {how}: {reason(_lines(self.log))}; see {self.log}"


def start(
    exported: Path,
    runtime: str | None = None,
    *,
    host: str = DEFAULT_HOST,
    port: int = 0,
    threads: int | None = None,
    python: str | None = None,
    dtype: str | None = None,
    ctx: int | None = None,
    log: Path | None = None,
    timeout: float = START_SECONDS,
    dense: bool = False,
    gpu_share: float | None = None,
) -> Server:
    """Start a server and return when its model is loaded.

    Args:
        exported: a GGUF file, or a Hugging Face directory with a quantization_config.
        runtime: "llama.cpp" or "vllm"; default: the one that reads the format.
        host: address to listen on.
        port: 0 for a free one.
        threads: CPU threads; default: what llama.cpp chooses, one a core for vLLM.
        python: vLLM: an interpreter whose environment has it; default: this one.
        dtype: vLLM: "float16" or "bfloat16".
        ctx: positions of the context; default: the model's own.
        log: takes what the server writes; default: a new temporary file.
        timeout: seconds that loading may take.
        dense: a directory may be a model that is not quantized.
        gpu_share: vLLM on a GPU: share of its memory; default: vLLM's own, nearly all.
    """
    exported = Path(exported)
    runtime, chat = examine(exported, runtime, dense=dense)
    at_least("--threads", threads, 1)
    at_least("--ctx", ctx, 1)
    for name, choice in (("python", python), ("dtype", dtype)):
        if choice is not None and runtime != "vllm":
            raise LrqatError(f"--{name}: {exported} is served by llama.cpp, which has no such choice; leave it out")
    port = claim_port(host, port)
    path = exported.resolve()
    model = path.stem if runtime == "llama.cpp" else path.name
    if runtime == "llama.cpp":
        command, environment = llamacpp_command(path, model, host, port, threads, ctx), dict(os.environ)
    else:
        python = python or sys.executable
        command, environment = vllm_command(path, model, host, port, threads, ctx, python, dtype, gpu_share)
    if log is None:
        handle, name = tempfile.mkstemp(prefix="lrqat-serve-", suffix=".log")
        os.close(handle)
        log = Path(name)
    with open(log, "wb") as stream:
        print(f"{shlex.join(command)}\nlog: {log}", file=sys.stderr)
        leash = hold(command, GRACE_SECONDS, stream, environment)
    assert leash.stdout is not None
    with leash.stdout as told:
        pid = int(told.readline() or leash.pid)  # no line: the command cannot be run, and the log says why
    server = Server(exported, runtime, model, chat, ANY_ADDRESS.get(host, host), port, log, pid, leash)
    try:
        server.wait_until_healthy(timeout)
    except BaseException:
        kill_session(pid)  # no request is lost, and vLLM would not listen
        server.stop()
        raise
    return server


def claim_port(host: str, port: int) -> int:
    """`port`, or a free one for 0; refused when nothing can listen there."""
    if not 0 <= port <= 65535:
        raise LrqatError(f"--port: expected 0 to 65535, got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise LrqatError(f"--host {host}: {getattr(error, 'strerror', None) or error}; give an address") from None
    with socket.socket(family, kind, protocol) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            raise LrqatError(f"{host}:{port}: {why}; give another --port (0 finds a free one)") from None
        if not ipaddress.ip_address(address[0]).is_loopback:
            print(f"warning: {host} is reachable from other machines, and no key is asked for", file=sys.stderr)
        return int(probe.getsockname()[1])


def _lines(log: Path) -> list[str]:
    return [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]

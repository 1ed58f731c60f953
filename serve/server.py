"""`lrqat-serve`: an exported model behind an OpenAI-compatible HTTP server, on this machine only unless told otherwise.

    .gguf file                                     llama.cpp: `llama-server` of PATH, else the xllamacpp package's
    directory whose config has quantization_config vLLM, in the environment of --python

The server runs in a session of its own, so Ctrl-C reaches only this process, which ends it: SIGTERM, and after a grace
period SIGKILL for all that it started. That happens too when this process is itself killed (serve/leash.py).

Refuses, in one line and before anything is started: a missing or damaged file, the wrong runtime for its format, a
port that is taken, a runtime that is not installed. A server that dies while loading becomes the line that says why.
"""

from __future__ import annotations

import argparse
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
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from lrqat.command import common_flags, run, with_recipe
from lrqat.errors import LrqatError
from serve.launch import DEFAULT_DTYPE, examine, llamacpp_command, reason, vllm_command
from serve.leash import kill_session

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8000
START_SECONDS = 600.0
GRACE_SECONDS = 10.0  # between SIGTERM and SIGKILL; vLLM takes 2
POLL_SECONDS = 0.1
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
            return connection.getresponse().status == http.client.OK and self.leash.poll() is None
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def wait_until_healthy(self, limit: float) -> None:
        """Return when the model is loaded; one line on stderr now and then until it is."""
        began = said = time.monotonic()
        while not self.healthy():
            if self.leash.poll() is not None:
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
    """
    exported = Path(exported)
    runtime, chat = examine(exported, runtime)
    for name, value in (("threads", threads), ("ctx", ctx)):
        if value is not None and value < 1:
            raise LrqatError(f"--{name}: expected at least 1, got {value}")
    for name, choice in (("python", python), ("dtype", dtype)):
        if choice is not None and runtime != "vllm":
            raise LrqatError(f"--{name}: {exported} is served by llama.cpp, which has no such choice; leave it out")
    port = claim_port(host, port)
    path = exported.resolve()
    model = path.stem if runtime == "llama.cpp" else path.name
    if runtime == "llama.cpp":
        command, environment = llamacpp_command(path, model, host, port, threads, ctx), dict(os.environ)
    else:
        command, environment = vllm_command(path, model, host, port, threads, ctx, python or sys.executable, dtype)
    if log is None:
        handle, name = tempfile.mkstemp(prefix="lrqat-serve-", suffix=".log")
        os.close(handle)
        log = Path(name)
    with open(log, "wb") as stream:
        print(f"{shlex.join(command)}\nlog: {log}", file=sys.stderr)
        leash = subprocess.Popen(
            [sys.executable, "-IS", str(Path(__file__).with_name("leash.py")), str(GRACE_SECONDS), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stream,
            env=environment,
            start_new_session=True,
        )
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


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `lrqat-serve`: 0 when asked to stop, 1 when the server ended by itself."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return run(lambda: _main(make_parser().parse_args(with_recipe(arguments))))


def make_parser() -> argparse.ArgumentParser:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="lrqat-serve",
        description="Serve an exported model through an OpenAI-compatible HTTP server until Ctrl-C.",
        epilog="example:\n  lrqat-serve smollm2-q4_0.gguf --port 8080",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common_flags(parser)
    parser.add_argument("exported", type=Path, help="what lrqat-export wrote: a .gguf file or a directory")
    parser.add_argument("--runtime", choices=("llama.cpp", "vllm"), help="default: the one that reads the format")
    parser.add_argument("--host", default=DEFAULT_HOST, help=f"address to listen on ({DEFAULT_HOST}: this machine)")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help=f"0 finds a free one ({DEFAULT_PORT})")
    parser.add_argument("--ctx", type=int, metavar="N", help="positions of the context (default: the model's own)")
    parser.add_argument("--python", help="vllm: an interpreter whose environment has vLLM (default: this one)")
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), help=f"vllm: to serve in ({DEFAULT_DTYPE})")
    parser.add_argument("--log", type=Path, metavar="FILE", help="the server's own log (default: a temporary file)")
    parser.add_argument(
        "--timeout",
        type=float,
        metavar="SECONDS",
        default=START_SECONDS,
        help=f"seconds that loading may take ({START_SECONDS:g})",
    )
    return parser


def _main(args: argparse.Namespace) -> int:
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup asks
            signal.signal(number, signal.default_int_handler)
    flags = ("host", "port", "threads", "python", "dtype", "ctx", "log", "timeout")
    with start(args.exported, args.runtime, **{name: getattr(args, name) for name in flags}) as server:
        row = {"url": server.url, "model": server.model, "pid": server.pid, "log": str(server.log), "curl": server.curl}
        try:
            print(json.dumps(row) if args.json else f"{server.url}\n{server.curl}", flush=True)
            server.leash.wait()
        except KeyboardInterrupt:
            print("stopping", file=sys.stderr)
            return 0
        print(f"error: {server.obituary()}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

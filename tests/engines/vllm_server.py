"""A vLLM server in processes of its own, on the CPU, for tests."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

#: The plug-ins: ours, also where the package is not installed, and what lets vLLM run on this machine.
_PLUGINS = {
    "deltaweights-here": "deltaweights = deltaweights.engines.vllm:register",
    "vllm-on-cpu": "on_cpu = tests.engines.on_cpu:register",
}


def environment(folder: Path) -> dict[str, str]:
    """The environment of a process with vLLM, whose plug-ins are described in ``folder``."""
    for name, line in _PLUGINS.items():
        described = folder / f"{name.replace('-', '_')}-0.dist-info"
        described.mkdir(parents=True, exist_ok=True)
        (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")
        (described / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{line}\n")
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return kept | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)]),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
    }


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


class RefusedError(Exception):
    """The server answered with an error."""


class VllmServer:
    """A server of ``model``; a context manager, in which it answers.

    Args:
        options: on the command line.
        ranks: how many tensor-parallel ranks.
    """

    def __init__(self, model: Path, folder: Path, *options: str, ranks: int = 1) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "server.log"
        self._port = free_port()
        self._command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
            "--served-model-name", "model", "--port", str(self._port), "--host", "127.0.0.1",
            "--dtype", "float32", "--enforce-eager", "--max-model-len", "64", "--max-num-seqs", "4",
            "--tensor-parallel-size", str(ranks), "--skip-tokenizer-init", "--disable-log-stats", *options,
        ]  # fmt: skip
        self._env = environment(folder / "plugins")
        self._env["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(str(rank) for rank in range(ranks))
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> VllmServer:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, env=self._env, stdout=log, stderr=log, start_new_session=True
            )
        try:
            while not self._answers():
                assert self._process.poll() is None, self.log.read_text()[-4000:]
                time.sleep(0.5)
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()

    def kill(self) -> None:
        """End all its processes at once, as a machine does that fails."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _answers(self) -> bool:
        try:
            self.get("health")
        except (urllib.error.URLError, ConnectionError, RefusedError):
            return False
        return True

    def get(self, path: str) -> Any:
        return self._call(path, None)

    def post(self, path: str, **fields: object) -> Any:
        return self._call(path, json.dumps(fields).encode())

    def _call(self, path: str, data: bytes | None) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port}/{path}", data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:  # noqa: S310
                body = answer.read()
        except urllib.error.HTTPError as error:
            raise RefusedError(error.read().decode()) from error
        return json.loads(body) if body else None

    def checksums(self) -> dict[str, str]:
        """The SHA-256 of every parameter of every rank."""
        found: dict[str, str] = self.post("weight_checker", action="checksum")["checksums"]
        return found

    def generate(self, tokens: int = 4) -> list[int]:
        """The most likely tokens after a prompt."""
        answer = self.post(
            "v1/completions", model="model", prompt=[1, 2, 3], max_tokens=tokens, temperature=0,
            ignore_eos=True, return_token_ids=True, detokenize=False,
        )  # fmt: skip
        ids: list[int] = answer["choices"][0]["token_ids"]
        return ids

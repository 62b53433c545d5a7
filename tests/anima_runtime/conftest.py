"""Stand-ins for Hugging Face and ModelScope, servers on this machine that answer as a test tells them; and kernels."""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from huggingface_hub import constants

# A file's content, the number of an error, or a function that returns one of them or writes an answer by itself.
Answer = bytes | int | Callable[[BaseHTTPRequestHandler], "bytes | int | None"]


class FakeHub:
    """Answers a GET by its path as `answers` says, else with 404; notes every request."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.asked: list[str] = []
        self.tokens: set[str | None] = set()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.asked.append(self.path)
                hub.tokens.add(self.headers["Authorization"])
                answer = hub.answers.get(self.path, 404)
                answer = answer(self) if callable(answer) else answer
                if answer is None:
                    return
                content = answer if isinstance(answer, bytes) else b""
                self.send_response(answer if isinstance(answer, int) else 200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        return Handler


@pytest.fixture
def hubs(monkeypatch: pytest.MonkeyPatch, tmp_path):
    """(Hugging Face, ModelScope), with nothing on them; the cache folder is in tmp_path."""
    hugging_face, modelscope = FakeHub(), FakeHub()
    monkeypatch.setenv("HF_ENDPOINT", hugging_face.address)
    monkeypatch.setenv("MODELSCOPE_DOMAIN", modelscope.address)
    monkeypatch.delenv("MODELSCOPE_ENDPOINT", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf_home"))
    yield hugging_face, modelscope
    for hub in (hugging_face, modelscope):
        hub.server.shutdown()
        hub.server.server_close()


@pytest.fixture
def draw():
    """draw(3, 4): normally distributed float64 numbers, other ones at each call."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def interpreter():
    """Kernels run in Triton's interpreter, see tests/conftest.py; on a card tests/test_cuda.py runs whole blocks."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("Triton's interpreter is for machines without a card")

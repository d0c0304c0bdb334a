"""A small server that W&B's real client takes for W&B: it keeps what it is sent, and can refuse or die."""

from __future__ import annotations

import gzip
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Received:
    """What a viewer of the run would see."""

    address: str = ""
    refuses_keys: bool = False
    dies_after_start: bool = False
    num_requests: int = 0
    runs: list[dict[str, Any]] = field(default_factory=list)  # variables of UpsertBucket
    history: dict[int, dict[str, Any]] = field(default_factory=dict)  # by W&B's own line number
    summary: dict[str, Any] = field(default_factory=dict)
    alerts: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = None
    dead: threading.Event = field(default_factory=threading.Event)

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """W&B's answer to a GraphQL request."""
        if "upsertBucket" in query:
            self.runs.append(variables)
            project = {"id": "p", "name": variables.get("project") or "distft", "entity": {"id": "e", "name": "lab"}}
            name = variables.get("name") or self.runs[0]["name"]
            lines = len(self.history)
            bucket = {"id": "b", "name": name, "displayName": name, "config": "{}", "project": project}
            return {"upsertBucket": {"bucket": {**bucket, "historyLineCount": lines}, "inserted": lines == 0}}
        if "notifyScriptableRunAlert" in query:
            self.alerts.append(variables)
            return {"notifyScriptableRunAlert": {"success": True}}
        if "createRunFiles" in query:
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}}
        if "createArtifact(" in query:
            latest = {"id": "a", "versionIndex": 0}
            artifact = {"id": "a", "state": "COMMITTED", "artifactSequence": {"id": "s", "latestArtifact": latest}}
            return {"createArtifact": {"artifact": artifact}}
        if "ArtifactType" in query:
            return {"project": None}
        if "viewer" in query:
            return {"viewer": {"id": "v", "entity": "lab", "username": "ada", "flags": "{}", "teams": {"edges": []}}}
        return {}

    def stream(self, body: dict[str, Any]) -> None:
        files = body.get("files", {})
        history = files.get("wandb-history.jsonl", {"offset": 0, "content": []})
        for number, line in enumerate(history["content"], start=history["offset"]):
            self.history[number] = json.loads(line)
        for line in files.get("wandb-summary.json", {"content": []})["content"]:
            self.summary = json.loads(line)
        self.exit_code = body.get("exitcode", self.exit_code)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    received: Received

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        received = self.received
        received.num_requests += 1
        if received.dead.is_set():
            self.close_connection = True
            return
        if received.refuses_keys:
            self.send(401, {"errors": [{"message": "user is not logged in"}]})
            return
        asked = json.loads(body)
        if self.path == "/graphql":
            self.send(200, {"data": received.answer(asked["query"], asked.get("variables") or {})})
            if received.runs and received.dies_after_start:
                received.dead.set()
        else:
            received.stream(asked)
            self.send(200, {"exitcode": None, "limits": {}})

    def send(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        return


@contextmanager
def serving(refuses_keys: bool = False, dies_after_start: bool = False) -> Iterator[Received]:
    received = Received(refuses_keys=refuses_keys, dies_after_start=dies_after_start)
    handler = type("Bound", (Handler,), {"received": received})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    received.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield received
    finally:
        server.shutdown()
        server.server_close()

"""A stand-in for the server of Weights & Biases: takes the start of a run and what follows. Not collected by pytest."""

import http.server
import json
import threading
from typing import Any


class Server(http.server.ThreadingHTTPServer):
    """`kind`: ok; refusing (status 401, as with a wrong key); silent (never answers). `records` counts uploads of records."""

    daemon_threads = True

    def __init__(self, kind: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.kind, self.lines, self.stopped = kind, [], threading.Event()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    lines: list[str]
    """Lines of wandb-history.jsonl that have arrived."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def stop(self) -> None:
        """From now on connections are refused, and those that are open get no answer."""
        self.kind = "silent"
        self.shutdown()
        self.server_close()

    def server_close(self) -> None:
        self.stopped.set()
        super().server_close()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.server.kind == "silent":
            self.server.stopped.wait(60)
            return
        if self.server.kind == "refusing":
            self._answer(401, {"data": None})
        elif self.path == "/graphql":
            query = json.loads(body)
            self._answer(200, {"data": _data(query["operationName"], query.get("variables") or {})})
        else:
            if self.path.endswith("/file_stream"):
                history = json.loads(body).get("files", {}).get("wandb-history.jsonl", {})
                self.server.lines += history.get("content", [])
            self._answer(200, {})

    do_GET = do_PUT = do_POST

    def _answer(self, status: int, document: dict[str, Any]) -> None:
        content = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        return None


def _data(operation: str, variables: dict[str, Any]) -> dict[str, Any]:
    if operation == "RunResumeStatus":
        return {"model": {"bucket": None}}
    if operation == "UpsertBucket":
        project = {"id": "1", "name": variables.get("project") or "project", "entity": {"id": "2", "name": "somebody"}}
        bucket = {"id": "3", "name": variables.get("name"), "displayName": "", "description": "", "config": "{}", "sweepName": None,
                  "project": project, "historyLineCount": 0}  # fmt: skip
        return {"upsertBucket": {"bucket": bucket, "inserted": True}}
    if operation == "CreateRunFiles":
        return {"createRunFiles": {"runID": "3", "uploadHeaders": [], "files": []}}
    return {}

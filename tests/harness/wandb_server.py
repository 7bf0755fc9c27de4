"""A server that does what W&B's client needs to log a run, except for artifacts."""

import contextlib
import gzip
import json
import math
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class WandbServer(ThreadingHTTPServer):
    """Keeps what is logged: ``lines`` by file, names of ``uploaded`` files and ``views``.

    Args:
        broken_after: the number of requests after which every answer is an error.
    """

    def __init__(self, broken_after=math.inf):
        super().__init__(("127.0.0.1", 0), Handler)
        self.broken_after, self.asked, self.lines, self.uploaded, self.views = broken_after, 0, {}, set(), []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def handle_one_request(self):
        with contextlib.suppress(ConnectionError, json.JSONDecodeError):  # of a client that a test kills
            super().handle_one_request()

    def do_POST(self):
        asked = json.loads(self.body())
        if self.path == "/graphql":
            self.answer(self.graphql(asked["query"], asked.get("variables")))
            return
        for name, part in asked.get("files", {}).items():
            lines = self.server.lines.setdefault(name, [])
            lines[part["offset"] :] = part["content"]
        self.answer({"limits": {}})

    def do_PUT(self):
        self.body()
        self.server.uploaded.add(self.path.removeprefix("/upload/"))
        self.answer({})

    def body(self):
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(content) if self.headers.get("Content-Encoding") == "gzip" else content

    def answer(self, value):
        self.server.asked += 1
        content = json.dumps(value).encode()
        self.send_response(500 if self.server.asked > self.server.broken_after else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def graphql(self, query, variables):
        project = {"id": "p", "name": "dhtm", "entity": {"id": "e", "name": "us"}}
        if "upsertBucket(" in query:
            bucket = {"id": "b", "name": variables["name"], "config": "{}", "project": project, "historyLineCount": 0}
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        if "RunResumeStatus" in query:
            return {"data": {"model": {**project, "bucket": None}}}
        if "createRunFiles(" in query:
            files = [{"name": name, "uploadUrl": f"{self.server.url}/upload/{name}"} for name in variables["files"]]
            return {"data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}}
        if "upsertView(" in query:
            self.server.views.append(variables)
            return {"data": {"upsertView": {"view": {"id": "v", "name": variables["name"]}, "inserted": True}}}
        if "viewer" in query:
            viewer = {"id": "v", "username": "we", "entity": "us", "flags": "{}", "teams": {"edges": []}}
            return {"data": {"viewer": viewer}}
        return {"data": None, "errors": [{"message": "not supported"}]}

"""A ledger that lives in memory only: nothing it knows is ever written to a file.

Its `birth` is drawn when it starts, so that a ledger that was started anew cannot pass for one that went on. It waits
for requests without polling: between them it does not run at all.
"""

import json
import secrets
from http.server import BaseHTTPRequestHandler, HTTPServer

BIRTH = secrets.token_hex(16)
ACCOUNTS = {}
HISTORY = []


class Handler(BaseHTTPRequestHandler):
    def answer(self, value, code=200):
        body = json.dumps(value, sort_keys=True).encode() + b"\n"
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.path == "/birth":
            self.answer({"birth": BIRTH})
        elif self.path == "/statement":
            self.answer({"birth": BIRTH, "accounts": ACCOUNTS, "history": HISTORY})
        else:
            self.answer({"error": "not found"}, 404)

    def do_POST(self):
        entry = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        ACCOUNTS[entry["account"]] = ACCOUNTS.get(entry["account"], 0) + entry["amount"]
        HISTORY.append([entry["account"], entry["amount"]])
        self.answer({"balance": ACCOUNTS[entry["account"]], "entries": len(HISTORY)})

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    HTTPServer(("127.0.0.1", 8700), Handler).serve_forever(poll_interval=86400)

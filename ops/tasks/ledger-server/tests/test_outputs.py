"""The ledger must still be the one that was started, and know every entry exactly once and in order."""

import json
import urllib.request
from pathlib import Path

HISTORY = [["rent", 1200], ["food", 310], ["rent", -200], ["food", 42]]
ACCOUNTS = {"rent": 1000, "food": 352}


def ask():
    with urllib.request.urlopen("http://127.0.0.1:8700/statement", timeout=10) as answer:
        return json.load(answer)


def test_same_process_still_serves():
    assert ask()["birth"] == json.loads(Path("/app/birth.json").read_text())["birth"]


def test_every_entry_exactly_once():
    assert ask()["history"] == HISTORY
    assert ask()["accounts"] == ACCOUNTS


def test_statement_file():
    statement = json.loads(Path("/app/statement.json").read_text())
    assert statement["accounts"] == ACCOUNTS
    assert statement["history"] == HISTORY


def test_notes():
    assert Path("/app/notes.txt").read_text() == "rent is settled\n"

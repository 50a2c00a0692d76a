"""The files in `deploy/`: their commands run, and tools of their formats accept them.

A tool that is not installed is skipped.
"""

import re
import shutil
import signal
import socket
import subprocess

import pytest

from fedsplit.cli.systemd import notify
from tests.edge.forked import Program
from tests.edge.tiny_models import make_model
from tests.house.source import ROOT

DEPLOY = ROOT / "deploy"
UNIT = DEPLOY / "systemd" / "fedsplit-trunk.service"


def accepted_by(tool: str, *words: str) -> str:
    """What a tool prints when it accepts files."""
    command = shutil.which(tool)
    if not command:
        pytest.skip(f"{tool} is not installed")
    done = subprocess.run([command, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- systemd --------------------------------------------------------------------------------------


def test_a_trunk_server_reports_to_systemd_that_it_is_ready_and_that_it_stops(
    tmp_path, monkeypatch
):
    make_model(tmp_path / "model")
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(120.0)
        model = ["--model", tmp_path / "model", "--bind", "127.0.0.1:0"]
        with Program("fedsplit", "serve", *model) as server:
            assert systemd.recv(64) == b"READY=1"
            port = int(re.search(r" at 127\.0\.0\.1:(\d+);", server.stdout.readline())[1])
            socket.create_connection(("127.0.0.1", port)).close()
            server.send_signal(signal.SIGTERM)
            assert systemd.recv(64) == b"STOPPING=1"
            assert server.end(30.0)[0] == 0


def test_a_socket_of_systemd_that_is_gone_stops_no_server(monkeypatch, caplog):
    monkeypatch.setenv("NOTIFY_SOCKET", "@fedsplit-test-nobody-listens")
    notify("READY=1")
    assert "does not receive READY=1 at NOTIFY_SOCKET=@fedsplit-test" in caplog.text


def test_the_unit_is_exposed_to_little():
    accepted_by("systemd-analyze", "security", "--offline=true", "--threshold=20", str(UNIT))

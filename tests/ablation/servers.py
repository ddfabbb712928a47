"""Database servers of the tests' own: each in a temporary folder, on a free port, gone with the tests."""

from __future__ import annotations

import contextlib
import getpass
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.ablation.processes import until


@contextlib.contextmanager
def postgresql() -> Iterator[str]:
    """The address of a PostgreSQL server, or a skip."""
    pytest.importorskip("psycopg2")
    if shutil.which("initdb") is None or shutil.which("pg_ctl") is None:
        pytest.skip("no PostgreSQL here")
    with _folder("postgres") as (folder, switch):
        data, port = folder / "data", free_port()
        _run(["initdb", "-D", str(data), "-A", "trust", "-U", "soaa", "--no-sync"], switch)
        options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        _run(["pg_ctl", "-D", str(data), "-l", str(folder / "log"), "-o", options, "-w", "start"], switch)
        try:
            yield f"postgresql+psycopg2://soaa@127.0.0.1:{port}/postgres"
        finally:
            _run(["pg_ctl", "-D", str(data), "-m", "immediate", "-w", "stop"], switch)


@contextlib.contextmanager
def mariadb() -> Iterator[str]:
    """The address of a MariaDB server, which speaks MySQL's protocol, or a skip."""
    pytest.importorskip("pymysql")
    if shutil.which("mariadbd") is None or shutil.which("mariadb-install-db") is None:
        pytest.skip("no MariaDB here")
    with _folder("mysql") as (folder, switch):
        data, port = folder / "data", free_port()
        common = [
            "--no-defaults",
            f"--datadir={data}",
            "--innodb-log-file-size=8M",
            "--innodb-buffer-pool-size=16M",
        ]
        _run(
            ["mariadb-install-db", *common, "--skip-test-db", "--auth-root-authentication-method=normal"],
            switch,
        )
        (folder / "init.sql").write_text(
            "CREATE DATABASE soaa;\n"  # a statement a line: the server reads it so
            "CREATE USER soaa@'127.0.0.1' IDENTIFIED BY 'secret';\n"
            "GRANT ALL ON soaa.* TO soaa@'127.0.0.1';\n"
        )
        server = subprocess.Popen(
            ["mariadbd", *common, f"--port={port}", "--bind-address=127.0.0.1", f"--socket={folder / 'socket'}",
             f"--pid-file={folder / 'pid'}", f"--init-file={folder / 'init.sql'}", "--skip-name-resolve",
             "--innodb-flush-log-at-trx-commit=0", "--skip-log-bin"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **switch,
        )  # fmt: skip
        try:
            if not until(lambda: _answers(port) or server.poll() is not None):
                pytest.fail("MariaDB does not start")
            yield f"mysql+pymysql://soaa:secret@127.0.0.1:{port}/soaa"
        finally:
            server.kill()
            server.wait()


SERVERS = {"postgresql": postgresql, "mariadb": mariadb}


def free_port() -> int:
    """Return a port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(port: int) -> bool:
    import pymysql

    try:
        pymysql.connect(host="127.0.0.1", port=port, user="soaa", password="secret", database="soaa").close()
    except pymysql.err.OperationalError:
        return False
    return True


@contextlib.contextmanager
def _folder(account: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A short path (a socket's may have 107 bytes), and how a program is started in it: no server runs as root."""
    folder = Path(tempfile.mkdtemp(prefix="soaa-db-"))
    switch: dict[str, Any] = {"cwd": folder}
    if os.geteuid() == 0:
        switch["user"] = _account(account)
        shutil.chown(folder, switch["user"])
    try:
        yield folder, switch
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _account(wanted: str) -> str:
    for name in (wanted, "nobody"):
        try:
            return pwd.getpwnam(name).pw_name
        except KeyError:
            continue
    return pytest.skip(f"{getpass.getuser()} is the only account here, and no server runs as root")


def _run(command: list[str], switch: dict[str, Any]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, **switch)
    if done.returncode:
        pytest.fail(f"{command[0]}: {done.stdout}{done.stderr}")

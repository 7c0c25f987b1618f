"""The rendezvous, and what is reported about processes that do not arrive."""

from __future__ import annotations

import os
import socket

import pytest

from nvlm.config.values import ConfigError
from nvlm.processes.groups import meet
from tests.dist.run import run_distributed
from tests.ports import free_port


def one_of(host: str, port: int, world: int, seconds: float) -> str:
    """What one of `world` processes reports."""
    os.environ.update(MASTER_ADDR=host, MASTER_PORT=str(port))
    try:
        store = meet(int(os.environ["RANK"]), world, seconds)
    except ConfigError as error:
        return str(error)
    if os.environ["RANK"] == "0":  # the store is here
        store.wait(["bye"])
    store.set("bye", "")
    return "met"


def test_all_meet():
    assert run_distributed(one_of, 2, "127.0.0.1", free_port(), 2, 30.0) == ["met", "met"]


def test_those_that_came_are_counted():
    port = free_port()
    for said in run_distributed(one_of, 2, "127.0.0.1", port, 3, 4.0):
        assert said.startswith(f"rendezvous at 127.0.0.1:{port}: got 2 of 3 processes within 4 s, expected all of them")


def again(port: int) -> list[bool]:
    """Two runs of a sweep, one after the other, in the same processes: whether each finds the other's leftovers."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    stale, stores = [], []
    for _ in range(2):
        store = meet(int(os.environ["RANK"]), 2, 30.0)
        stores.append(store)
        stale.append(store.check(["first of all"]))
        if store.add("looked", 1) == 2:
            store.set("both looked", "")
        store.get("both looked")
        store.set("first of all", "")
    if store.add("done", 1) < 2 and os.environ["RANK"] == "0":  # the store is here
        store.wait(["bye"])
    store.set("bye", "")
    return stale


def test_a_second_run_meets_anew():
    assert run_distributed(again, 2, free_port()) == [[False, False]] * 2


@pytest.fixture
def occupied():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def test_a_port_that_is_taken_is_said_at_once(occupied):
    [said] = run_distributed(one_of, 1, "127.0.0.1", occupied, 2, 60.0)
    assert said.startswith(f"rendezvous at 127.0.0.1:{occupied}: got ") and "MASTER_PORT=" in said


def nobody_there(port: int) -> str:
    os.environ["RANK"] = "1"
    return one_of("127.0.0.1", port, 2, 0.5)


def test_where_nobody_listens_it_is_said():
    port = free_port()
    [said] = run_distributed(nobody_there, 1, port)
    assert said.startswith(f"rendezvous at 127.0.0.1:{port}: got ") and "refused (process 1 of 2)" in said

"""Time saved: by day and in all, over starts, kills and clocks; and what it is worth."""

from __future__ import annotations

import asyncio
import datetime
import fcntl
import json
import os
import threading
from pathlib import Path

import pytest

from aurora_lit.ipc.engine_status import EngineStatusPage
from aurora_lit.serve.http import savings as module
from aurora_lit.serve.http.savings import Savings

MONDAY = datetime.date(2026, 11, 30)


class Server:
    """An engine whose total begins at 0, and a day; `restarted` has what the file had."""

    def __init__(self, path: Path, *, day: int = 0, price: float = 0.0) -> None:
        self.saved_s, self.day, self.path, self.price = 0.0, day, path, price
        self.savings = Savings(path, saved_s=lambda: self.saved_s, price_per_hour=price, today=self._today)

    def _today(self) -> datetime.date:
        return MONDAY + datetime.timedelta(days=self.day)

    def seconds(self) -> tuple[float, float]:
        report = self.savings.report()
        return report["seconds"], report["seconds_today"]

    def restarted(self, *, day: int) -> Server:
        return Server(self.path, day=day, price=self.price)


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path / "live" / "savings.json")


def test_what_is_saved_is_what_plain_rounds_would_have_taken_less_what_rounds_took(tmp_path: Path) -> None:
    page = EngineStatusPage.create(tmp_path / "status")
    page.write(compared_us=2_000_000, compared_plain_us=5_000_000)
    assert page.read().saved_s == 3.0
    page.write(compared_us=6_000_000)
    assert page.read().saved_s == -1.0


def test_a_day_begins_at_0_and_the_sum_goes_on(server: Server) -> None:
    server.saved_s = 10.0
    assert server.seconds() == (10.0, 10.0)
    server.day = 1
    assert server.seconds() == (10.0, 0.0)
    server.saved_s = 7.0  # speculation lost
    assert server.seconds() == (7.0, -3.0)
    assert server.savings.report()["since"] == "2026-11-30"


def test_a_start_goes_on_where_the_last_server_ended(server: Server) -> None:
    server.saved_s = 10.0
    server.seconds()
    server.savings.keep()
    same_day = server.restarted(day=0)
    same_day.saved_s = 5.0
    assert same_day.seconds() == (15.0, 15.0)
    same_day.savings.keep()
    later = same_day.restarted(day=3)
    later.saved_s = 1.0
    assert later.seconds() == (16.0, 1.0)
    assert later.savings.report()["since"] == "2026-11-30"


def test_servers_on_one_folder_add_to_the_same_sums(server: Server) -> None:
    other = server.restarted(day=0)
    for each, saved_s in ((server, 10.0), (other, 5.0), (server, 11.0)):
        each.saved_s = saved_s
        each.seconds()
        each.savings.keep()
    assert other.seconds() == (15.0, 15.0), "as of the last time that it kept them"
    other.savings.keep()
    assert other.seconds() == server.seconds() == server.restarted(day=0).seconds() == (16.0, 16.0)
    other.day, other.saved_s = 1, 7.0
    assert other.seconds() == (18.0, 2.0)
    other.savings.keep()
    server.day, server.saved_s = 1, 14.0
    assert server.seconds() == (19.0, 3.0)
    server.savings.keep()
    assert server.seconds() == server.restarted(day=1).seconds() == (21.0, 5.0)


def test_nothing_is_lost_where_servers_keep_at_the_same_moment(server: Server) -> None:
    def serve() -> None:
        each = server.restarted(day=0)
        for _ in range(20):
            each.saved_s += 1.0
            each.seconds()
            each.savings.keep()

    threads = [threading.Thread(target=serve) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.restarted(day=0).seconds() == (80.0, 80.0)


def test_a_lock_that_another_keeps_is_waited_for_a_while_and_the_sum_is_kept_later(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_LOCK_EVERY_S", 0.0)
    server.saved_s = 3.0
    server.seconds()
    server.path.parent.mkdir()
    descriptor = os.open(server.path.parent, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    server.savings.keep()
    assert "cannot be written" in caplog.text
    os.close(descriptor)
    server.savings.keep()
    assert server.restarted(day=0).seconds() == (3.0, 3.0)


def test_it_is_kept_while_the_server_runs_and_when_it_ends(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_KEEP_EVERY_S", 0.001)

    async def run() -> None:
        async with server.savings.kept():
            server.saved_s = 10.0
            async with asyncio.timeout(5):
                while not server.path.exists():
                    await asyncio.sleep(0.001)
            monkeypatch.setattr(module, "_KEEP_EVERY_S", 60.0)
            await asyncio.sleep(0.01)
            server.saved_s = 12.0

    asyncio.run(run())
    assert server.restarted(day=0).seconds() == (12.0, 12.0)


def test_nothing_is_written_where_nothing_was_saved(server: Server) -> None:
    server.seconds()
    server.savings.keep()
    assert not server.path.parent.exists()


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"since": "x", "day": "x", "seconds": 1, "seconds_today": 1}', "NaN"]
)
def test_a_file_that_is_none_is_said_and_replaced(server: Server, text: str, caplog: pytest.LogCaptureFixture) -> None:
    server.path.parent.mkdir()
    server.path.write_text(text)
    again = server.restarted(day=1)
    assert "cannot be read" in caplog.text
    again.saved_s = 2.0
    assert again.seconds() == (2.0, 2.0)
    again.savings.keep()
    assert json.loads(server.path.read_text())["seconds"] == 2.0


def test_a_folder_that_cannot_be_written_to_is_said_once_and_the_sum_goes_on(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.path.parent.write_text("a file")
    again = server.restarted(day=0)
    for total_s in (1.0, 2.0):
        again.saved_s = total_s
        assert again.seconds() == (total_s, total_s)
        again.savings.keep()
    assert len(caplog.records) == 1


def test_an_hour_is_worth_its_price(tmp_path: Path) -> None:
    server = Server(tmp_path / "savings.json", price=2.5)
    server.saved_s = 7200.0
    server.seconds()
    server.day = 1
    server.saved_s = 9000.0
    report = server.savings.report()
    assert (report["price_per_hour"], report["worth"], report["worth_today"]) == (2.5, 6.25, 1.25)
    unpriced = Server(tmp_path / "other.json").savings.report()
    assert [unpriced[name] for name in ("price_per_hour", "worth", "worth_today")] == [None] * 3

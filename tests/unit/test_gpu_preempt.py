"""The preempt part with servers that are not there: what is measured when, and what a failure costs."""

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import gpu_preempt
from gpu_part import Part
from gpu_preempt import PreemptBench, rows_of
from gpu_rows import BY_NAME, SPECS
from serving_load import Timing

RATES = {5.0: "5 requests/s", 1.0: "1 request/s", float("inf"): "burst"}
MS = {"plain": 10.0, "idle": 11.0, "slo": 12.0}


class Backlog:
    """Trains two gates a second, by a load's own clock."""

    def __init__(self, server, *, prompt, votes):
        self._server = server
        self.gates_per_s, self.tokens_per_s = 4.0, 1000.0

    def measure_alone(self, steps):
        if self._server.is_broken:
            raise RuntimeError("no progress of training for 60 s")

    def start(self):
        self._server.is_training = True

    def stop(self):
        self._server.is_training = False

    def status(self):
        return self._server.status()

    gates = 0


class Server:
    is_training = is_broken = False
    backlog = None

    def __init__(self, name):
        self.name = self.url = name
        self.http = httpx.Client(
            transport=httpx.MockTransport(lambda _: httpx.Response(200)), base_url="http://server"
        )

    def status(self):
        lease = {"revocations": 3, "revoke_p50_ms": 1.0, "revoke_p99_ms": 2.0}
        return {"lease": lease, "last_step": {}, "last_error": None, "activations": {}}


class Load:
    """What was asked of whom, and whether its trainer was at work."""

    def __init__(self, servers):
        self._servers = {server.url: server for server in servers}
        self.turns = []
        self.fails_in = ()

    def run(self, url, requests, rate, seed):
        turn = (url, RATES[rate], self._servers[url].is_training, seed)
        if turn[:2] == self.fails_in and seed == 1:
            raise RuntimeError("a request failed")
        self.turns.append(turn)
        return [Timing(MS[url], MS[url])] * requests


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_preempt, "Backlog", Backlog)
    sizes = gpu_preempt.SIZES[True]._replace(rounds=2)
    monkeypatch.setitem(gpu_preempt.SIZES, True, sizes)
    options = argparse.Namespace(rows=tmp_path / "rows.json", device="cpu", tiny=True, seconds=300)
    plain, idle, slo = servers = [Server(name) for name in MS]
    load = Load(servers)
    part = Part("preempt", options)
    run = PreemptBench(part, load, plain, [idle, slo], is_first=True)
    return SimpleNamespace(run=run.run, load=load, idle=idle, slo=slo, part=part)


def results(bench):
    found = json.loads(bench.part.options.rows.read_text())
    return {row["name"]: row for row in found["rows"]}, found["reasons"], found["config"]


def test_all_rows_come_and_those_with_bars_first(bench):
    bench.run()
    rows, reasons, config = results(bench)
    assert set(rows) == {spec.name for spec in SPECS if spec.part == "preempt"}
    assert not reasons
    # After three turns to warm up. Of a round the order does not matter.
    kinds = dict.fromkeys((rate, seed % 500) for _, rate, _, seed in bench.load.turns[3:])
    assert list(kinds) == [
        *(("5 requests/s", 0), ("1 request/s", 0), ("burst", 0), ("5 requests/s", 1)),
    ]
    assert rows["ttft_p50_slo"]["n"] == 2 * gpu_preempt.SIZES[True].requests
    assert set(config["status"]) == {
        f"{policy}, {when}"
        for policy in ("idle", "slo")
        for when in ("5 requests a second", "1 request a second")
    }


def test_the_control_serves_an_adapter_and_trains_nothing(bench):
    bench.run()
    rows, _, _ = results(bench)
    turns = [turn for turn in bench.load.turns if turn[1] == "5 requests/s"]
    assert {turn for turn in turns if turn[0] == "idle"} == {
        *(("idle", "5 requests/s", True, seed) for seed in (0, 1)),
        *(("idle", "5 requests/s", False, seed) for seed in (500, 501)),
    }
    assert not any(is_training for server, _, is_training, _ in turns if server == "plain")
    assert rows["ttft_p50_paused"]["value"] == pytest.approx(1.1)
    assert rows["ttft_p50_slo"]["value"] == pytest.approx(1.2)


def test_a_second_round_that_fails_leaves_the_first(bench):
    bench.load.fails_in = ("slo", "5 requests/s")
    bench.run()
    rows, _, config = results(bench)
    assert set(rows) == {spec.name for spec in SPECS if spec.part == "preempt"}
    assert rows["ttft_p50_slo"]["n"] == gpu_preempt.SIZES[True].requests
    assert len(config["shares"]["slo"]) == 1


def test_a_trainer_that_stands_still_costs_its_own_rows(bench):
    bench.slo.is_broken = True
    bench.run()
    rows, reasons, _ = results(bench)
    assert set(reasons) == set(rows_of(["slo"]))
    assert {*rows, *reasons} == {name for name in BY_NAME if BY_NAME[name].part == "preempt"}
    assert all("no progress of training" in why for why in reasons.values())
    assert {server for server, *_ in bench.load.turns} == {"plain", "idle"}

"""The GPU suite without a GPU: its options, parts that hang or fail, its files, and what it asks of a host."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import gpu_host
import gpu_kernels
import gpu_suite
from gpu_kernels import FACTORS, Comparisons, Shard, all_shards, ratio
from gpu_part import Part
from gpu_preempt import rows_of
from gpu_results import markdown, missing, not_run, table
from gpu_rows import BY_NAME, KERNEL_CASES, KERNEL_DTYPES, PARTS, POLICIES, SPECS
from gpu_serve import apart
from gpu_suite import BUDGETS_S, DEADLINE_S, GRACE_S, NOT_RUN, START_S, Suite, parse
from gpu_tests import outcomes, report
from kernel_accuracy import CASES

ROOT = Path(__file__).parents[2]
HANGS = """
import json, os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
rows = sys.argv[sys.argv.index("--rows") + 1]
row = {"name": "ipc_open_ms", "value": 3.0, "unit": "ms", "spread": [2.0, 4.0], "n": 5,
       "against": None, "bar": None, "ok": None, "part": "ipc"}
found = {"rows": [row], "reasons": {"ipc_refusals": "left out"}, "config": {"pid": os.getpid()}}
open(rows, "w").write(json.dumps(found))
time.sleep(600)
"""
FAILS = "import sys; sys.exit('no such thing')"


def options(tmp_path, **changes):
    known = {
        "device": "cuda",
        "tiny": False,
        "out": tmp_path / "out",
        "deadline": 12.0,
        "attention_backend": "triton",
        "commit": "abc",
        "command": "python scripts/gpu_suite.py --bundle b",
    }
    return argparse.Namespace(**known | changes)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (
            ["--only", "ipc,speed"],
            "no part speed; parts are ipc, kernels, tests, step, serve, preempt",
        ),
        (["--device", "cpu"], "--device cpu needs --tiny"),
        (["--deadline", "5"], "--deadline is 5; allowed: 30 to 7200 seconds"),
        (["--device", "tpu"], "invalid choice"),
    ],
)
def test_bad_options_are_refused_by_name(argv, words, capsys):
    with pytest.raises(SystemExit) as error:
        parse(argv)
    assert error.value.code == 2
    assert words in capsys.readouterr().err


def test_defaults_are_all_parts_in_under_nine_minutes():
    found = parse([])
    assert (found.only, found.device) == (list(PARTS), "cuda")
    assert found.deadline == DEADLINE_S["cuda"] < 540
    assert set(BUDGETS_S) == set(PARTS)
    assert START_S + sum(BUDGETS_S.values()) + GRACE_S <= found.deadline


@pytest.mark.parametrize("start_s", [0, START_S, 120])
@pytest.mark.parametrize("grace_s", [0, GRACE_S], ids=["ends in time", "hangs"])
def test_a_slow_start_starves_no_part(tmp_path, start_s, grace_s):
    """Every part takes all of its time; where it hangs, the grace, too."""
    suite = Suite(options(tmp_path, deadline=DEADLINE_S["cuda"]), PARTS)
    elapsed, shares = start_s, []
    for i, part in enumerate(PARTS):
        suite._started = time.monotonic() - elapsed
        seconds = suite.seconds_of(i)
        shares.append(seconds / BUDGETS_S[part])
        elapsed += seconds + grace_s
    assert elapsed <= DEADLINE_S["cuda"]
    if start_s <= START_S and not grace_s:
        assert min(shares) > 0.99
    # Nobody is left with crumbs, whoever comes first.
    assert min(shares) > 0.5
    if not grace_s and start_s > START_S:
        assert max(shares) - min(shares) < 0.01


def test_what_is_left_over_goes_to_those_after_it(tmp_path):
    suite = Suite(options(tmp_path, deadline=DEADLINE_S["cuda"]), PARTS)
    suite._started = time.monotonic() - START_S
    assert suite.seconds_of(1) == pytest.approx(BUDGETS_S["kernels"] + BUDGETS_S["ipc"], abs=0.1)


def test_the_command_is_the_one_that_was_given():
    words = ["--bundle", "my bundle.tar.xz", "--only", "ipc"]
    assert parse(words).command == f"python scripts/gpu_suite.py {words[0]} '{words[1]}' --only ipc"


@pytest.fixture(scope="module")
def hung(tmp_path_factory):
    """A run of two parts: the first hangs and does not listen, the second fails."""
    tmp_path = tmp_path_factory.mktemp("suite")
    scripts = {}
    for part, text in (("ipc", HANGS), ("kernels", FAILS)):
        scripts[part] = tmp_path / f"{part}.py"
        scripts[part].write_text(text)
    # Of them 3.9 for the first part: a busy machine is late by a second before it begins.
    suite = Suite(options(tmp_path, deadline=12), ["ipc", "kernels"], scripts=scripts, grace_s=0.5)
    (tmp_path / "work").mkdir()
    started = time.monotonic()
    suite.run(dict(os.environ), tmp_path / "work")
    return suite, time.monotonic() - started, tmp_path / "out"


def test_a_part_that_hangs_costs_its_own_rows_only(hung):
    suite, seconds, _ = hung
    assert seconds < 12
    rows = {row["name"]: row for row in suite.rows()}
    assert set(rows) == {spec.name for spec in SPECS if spec.part in ("ipc", "kernels")}
    # What it had found is kept, and its own reasons come before ours.
    assert rows["ipc_open_ms"]["value"] == 3.0
    assert rows["ipc_refusals"]["why"] == "left out"
    assert "killed: its time was up" in rows["ipc_leaked_mib"]["why"]
    # It exited by itself, long before its time was up.
    assert rows["kernels_cases"]["why"].endswith("status 1: no such thing")


def test_nothing_of_it_is_left(hung):
    _, _, out = hung
    data = json.loads((out / "gpu_suite.json").read_text())
    assert not psutil.pid_exists(data["config"]["parts"]["ipc"]["pid"])


def test_both_results_are_written_and_say_the_same(hung):
    suite, _, out = hung
    data = json.loads((out / "gpu_suite.json").read_text())
    assert (data["bench"], data["commit"]) == ("gpu_suite", "abc")
    assert {"date", "machine", "versions", "config", "rows"} <= set(data)
    assert data["rows"] == json.loads(json.dumps(suite.rows()))
    page = (out / "gpu_suite.md").read_text()
    assert page == markdown(data)
    assert "| `ipc_open_ms` | opening the base weights' handles | 3 ms | 2 … 4 | 5 |  |  |" in page
    assert "rehearsal" not in page
    assert "* `python scripts/gpu_suite.py --bundle b`, SGLang with" in page
    assert "NVIDIA's Multi-Process Service does not run" in page
    assert sorted(path.name for path in out.iterdir()) == [
        *("gpu_suite.json", "gpu_suite.md", "ipc.log", "kernels.log"),
    ]


def test_a_deadline_that_has_passed_leaves_parts_out(tmp_path):
    suite = Suite(options(tmp_path, deadline=1.0), ["step"], scripts={}, grace_s=0.5)
    suite.run({}, tmp_path)
    assert {row["why"] for row in suite.rows()} == {"left out: the deadline was reached before"}


def test_a_rehearsal_meets_no_bars(tmp_path):
    suite = Suite(options(tmp_path, device="cpu"), ["ipc"], scripts={})
    row = missing(BY_NAME["ipc_leaked_mib"], "") | {"value": 0.0, "spread": [0.0, 0.0], "ok": True}
    suite._found["ipc"] = {"rows": [row], "reasons": {}, "config": {}}
    assert {row["ok"] for row in suite.rows()} == {None}
    suite.options.out.mkdir()
    suite.write()
    assert "no figure here is a GPU's" in (suite.options.out / "gpu_suite.md").read_text()


@pytest.fixture
def part(tmp_path):
    options = argparse.Namespace(
        rows=tmp_path / "rows.json", device="cpu", tiny=True, seconds=30.0, folder=tmp_path
    )
    return Part("ipc", options)


def test_an_attempt_that_fails_says_why_and_the_part_goes_on(part):
    def first():
        part.add("ipc_open_ms", [1.0, 2.0, 6.0])
        raise RuntimeError("the rest\nis missing")

    def inner():
        part.attempt("inner", lambda: sys.exit("gate"), ["ipc_owner_errors"])

    part.attempt("first", first, ["ipc_open_ms", "ipc_refusals"])
    part.attempt("second", lambda: None, ["ipc_leaked_mib"])
    part.attempt("third", lambda: None, ["ipc_leaked_maps"], seconds=60)
    part.attempt("outer", inner, ["ipc_owner_errors", "ipc_wrong_bytes"])
    found = json.loads(part.options.rows.read_text())
    (row,) = found["rows"]
    assert (row["value"], row["n"], row["ok"]) == (2.0, 3, None)
    assert found["reasons"] == {
        "ipc_refusals": "first: RuntimeError: the rest is missing",
        "ipc_leaked_mib": "second ended without it",
        "ipc_leaked_maps": "left out: third takes 60 s, 30 s were left",
        # Whoever was nearest to it knows best.
        "ipc_owner_errors": "inner: SystemExit: gate",
        "ipc_wrong_bytes": "outer ended without it",
    }


def test_an_attempt_tells_whether_it_failed(part):
    assert part.attempt("good", lambda: None, []) == ""
    assert part.attempt("bad", lambda: sys.exit("gate"), []) == "bad: SystemExit: gate"
    assert part.attempt("late", lambda: None, [], seconds=60).startswith("left out: late takes 60")


def test_a_parts_time_begins_with_its_process(tmp_path):
    program = (
        f"import sys, time; sys.path.insert(0, {str(ROOT / 'scripts')!r}); time.sleep(1.5);"
        "from gpu_part import Part; print(Part.from_argv('ipc', 'x').left)"
    )
    words = ["--rows", str(tmp_path / "rows"), "--folder", str(tmp_path), "--seconds", "100"]
    done = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 98.5


def test_a_part_that_is_told_to_end_goes_no_further(part):
    part._is_told = True
    with pytest.raises(SystemExit):
        part.attempt("first", lambda: sys.exit("ended"), ["ipc_open_ms"])


@pytest.mark.parametrize(
    ("name", "value", "ok"),
    [
        ("ipc_leaked_mib", 16.0, True),
        ("ipc_leaked_mib", 17.0, False),
        ("ipc_leaked_mib", float("nan"), False),
        ("sft_reuse_vs_peft", 2.0, True),
        ("sft_reuse_vs_peft", 1.99, False),
        ("ipc_open_ms", 1.0, None),
    ],
)
def test_bars(name, value, ok):
    assert BY_NAME[name].is_met(value) is ok


def test_every_row_has_a_name_of_its_own_and_every_part_has_rows():
    assert len(BY_NAME) == len(SPECS)
    assert {spec.part for spec in SPECS} == set(PARTS)
    assert sorted(rows_of(POLICIES)) == sorted(s.name for s in SPECS if s.part == "preempt")


def test_the_page_of_what_was_not_run_is_that_of_the_rows():
    assert NOT_RUN.read_text() == not_run()


def test_a_table_keeps_its_columns():
    row = missing(SPECS[0], "a | b\nc")
    lines = table([row]).splitlines()
    assert lines[2].count(" | ") == lines[0].count(" | ")
    assert "a \\| b c" in lines[2]


@pytest.mark.parametrize(
    ("error", "plain", "allowed", "is_ok"),
    [
        (1.0, 0.5, 1.1, True),
        (1.2, 0.5, 1.1, False),
        (0.05, 0.0, 0.1, True),
        (0.2, 0.0, 0.1, False),
        (float("nan"), 0.5, 1.1, False),
    ],
)
def test_a_kernels_ratio_is_within_its_bar_exactly_when_it_passes(error, plain, allowed, is_ok):
    comparison = {"max_error": error, "max_plain": plain, "max_allowed": allowed}
    assert (ratio(comparison, "max") <= FACTORS["max"]) is is_ok


def comparison(**changes):
    known = {
        "name": "norms",
        "case": "a case",
        "tensor": "d x",
        "dtype": "bfloat16",
        "ok": True,
        **{f"{kind}_{what}": 0.5 for kind in FACTORS for what in ("error", "plain")},
        **{f"{kind}_allowed": 1.0 for kind in FACTORS},
    }
    return json.dumps(known | changes)


@pytest.fixture
def compared(tmp_path, monkeypatch):
    """The rows of four processes: one hangs after its first comparison, one fails, one has none that is good."""
    monkeypatch.setattr(gpu_kernels, "TIMED_S", 20.0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(4))
    programs = {
        "norms": f"print({comparison()!r})",
        "attention/1x2x64": f"print({comparison()!r})",
        "attention/2x1x64": f"import time; print({comparison()!r}, flush=True); time.sleep(600)",
        "heads": f"print({comparison()!r}); raise SystemExit(3)",
        "gates": f"print({comparison(ok=False, max_error=3.0)!r})",
    }
    options = argparse.Namespace(
        rows=tmp_path / "rows.json", device="cuda", tiny=True, seconds=24.0, folder=tmp_path
    )
    part = Part("kernels", options)
    waiting = [Shard("bfloat16", name) for name in programs]
    run = Comparisons(part, waiting, lambda s: [sys.executable, "-c", programs[s.name]])
    part.attempt("comparisons", run.finish, [name for name in BY_NAME if "kernels_" in name])
    return json.loads(options.rows.read_text())


def test_a_shard_that_hangs_or_fails_costs_its_own_row_only(compared):
    rows = {row["name"]: row for row in compared["rows"]}
    failed = {name: row["value"] for name, row in rows.items() if "_failed_" in name}
    assert failed == {"kernels_failed_norms_bfloat16": 0.0, "kernels_failed_gates_bfloat16": 1.0}
    reasons = compared["reasons"]
    assert reasons["kernels_failed_attention_bfloat16"] == (
        "attention/2x1x64: the part's time was up"
    )
    assert "ended with status 3" in reasons["kernels_failed_heads_bfloat16"]
    # What was compared counts, and what was not is named.
    assert rows["kernels_cases"]["value"] == 5.0
    assert rows["kernels_max_error"]["ok"] is False
    assert "2 of 5 shards incomplete" in rows["kernels_max_error"]["against"]


def test_every_kernel_has_rows_and_every_row_shards():
    first = all_shards(is_small=False)[0]
    assert first.row == "kernels_failed_attention_float32"
    assert list(KERNEL_CASES) == list(CASES)
    assert {shard.row for shard in all_shards(is_small=False)} == {
        f"kernels_failed_{case}_{dtype}" for case in CASES for dtype in KERNEL_DTYPES
    }


PYTEST = """
tests/gpu/test_a.py::test_one PASSED                                     [ 20%]
tests/gpu/test_a.py::test_two[a b-True] FAILED                           [ 40%]
tests/gpu/test_a.py::test_two[a b-True] ERROR                            [ 40%]
tests/gpu/test_b.py::TestPool::runTest SKIPPED (no)                      [ 60%]
tests/gpu/test_b.py::test_three ERROR                                    [ 80%]
=========================== short test summary info ============================
FAILED tests/gpu/test_a.py::test_two[a b-True] - AssertionError
ERROR tests/gpu/test_b.py::test_three - RuntimeError
"""


def test_outcomes_are_read_from_what_pytest_says():
    assert outcomes(PYTEST.splitlines()) == {
        "tests/gpu/test_a.py::test_one": "PASSED",
        "tests/gpu/test_a.py::test_two[a b-True]": "FAILED",
        "tests/gpu/test_b.py::TestPool::runTest": "SKIPPED",
        "tests/gpu/test_b.py::test_three": "ERROR",
    }


@pytest.fixture
def tests_part(tmp_path):
    options = argparse.Namespace(rows=tmp_path / "rows.json", seconds=9.0, device="cuda", tiny=True)
    return Part("tests", options)


def test_failed_gpu_tests_are_counted(tests_part):
    report(tests_part, PYTEST, 1, is_late=False, seconds=5.0)
    (row,) = json.loads(tests_part.options.rows.read_text())["rows"]
    assert (row["value"], row["n"], row["ok"]) == (2.0, 3, False)
    assert row["against"].startswith("1 error, 1 failed, 1 passed, 1 skipped; 5 s")


@pytest.mark.parametrize(
    ("text", "status", "is_late", "words"),
    [
        (PYTEST, -9, True, "after 5 s its time was up: 1 error, 1 failed"),
        ("a.py::b SKIPPED (no)", 0, False, "all 1 tests were skipped"),
        ("usage\nno such option", 4, False, "pytest ended with status 4: no such option"),
        ("", 0, False, "pytest ended with status 0"),
    ],
)
def test_gpu_tests_that_did_not_all_run_give_no_figure(tests_part, text, status, is_late, words):
    with pytest.raises(RuntimeError, match=words):
        report(tests_part, text, status, is_late=is_late, seconds=5.0)


def test_greedy_answers_are_compared_up_to_where_they_part():
    one = [(-1.0, 5, None), (-2.0, 6, None), (-3.0, 7, None)]
    assert apart(one, one) == (0.0, 3)
    other = [(-1.25, 5, None), (-2.5, 9, None), (-9.0, 7, None)]
    assert apart(one, other) == (0.5, 2)


def test_what_a_host_lacks_is_named_with_what_to_do():
    found = {"versions": {"transformers": "5.17.0"}, "plugins": [], "broken": {"zmq": "none"}}
    said = gpu_host.problems(found, "cuda")
    assert said[0] == "zmq cannot be imported: none"
    assert any("--bundle" in line for line in said)
    assert any("transformers is 5.17.0" in line for line in said)
    assert any("--device cpu --tiny" in line for line in said)
    good = {"versions": {}, "plugins": ["alchemist"], "broken": {}, "gpu": {}}
    assert gpu_host.problems(good, "cuda") == []


def test_what_the_suite_can_do_without_does_not_stop_it():
    found = {"versions": {}, "plugins": ["alchemist"], "gpu": {}}
    found["broken"] = dict.fromkeys(("rich", "flashinfer", "pytest"), "none")
    assert gpu_host.problems(found, "cuda") == []
    said = gpu_host.problems(found, "cuda", "flashinfer")
    assert said[0] == "flashinfer cannot be imported: none"
    assert not any("rich" in line for line in said)


def test_results_are_written_without_rich():
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'scripts')!r}); sys.modules['rich'] = None;"
        "import gpu_results; print(*sorted(gpu_results.head('x'))); print(sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    head, modules = done.stdout.splitlines()
    assert head == "bench commit config date machine rows versions"
    assert "'rich" not in modules


def test_imports_that_take_too_long_are_a_named_problem(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_host, "_PROBE", "import time; time.sleep(60)")
    monkeypatch.setattr(gpu_host, "PROBE_S", 0.5)
    monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--out", str(tmp_path / "out")])
    monkeypatch.setattr(gpu_suite.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as error:
        gpu_suite.main()
    assert error.value.code == 2
    said = capsys.readouterr().err
    assert "alchemist cannot be imported: importing it and what it needs took over" in said
    assert "--bundle" in said


def test_flashinfer_is_asked_for_its_paged_kernels(tmp_path, monkeypatch):
    name = "SGLANG_FLASHINFER_USE_PAGED"
    monkeypatch.delenv(name, raising=False)
    assert name not in gpu_host.environment(tmp_path, None, "cuda")
    assert gpu_host.environment(tmp_path, None, "cuda", "flashinfer")[name] == "1"


def test_a_multi_process_service_is_found_by_what_clients_look_for(tmp_path):
    env = {"CUDA_MPS_PIPE_DIRECTORY": str(tmp_path)}
    assert gpu_host.mps(env)["is_running"] is False
    (tmp_path / "control").touch()
    assert gpu_host.mps(env) == {"is_running": True, "pipe_directory": str(tmp_path)}


def test_a_bundle_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no site/sglang in it"):
        gpu_host.unpack_bundle(tmp_path, tmp_path)


def test_the_site_makes_this_checkout_importable_and_its_plugin_known(tmp_path):
    site = gpu_host.make_site(tmp_path)
    program = (
        "import alchemist.protocol.lease as m; from importlib.metadata import entry_points as e;"
        "print(m.__file__, *(p.value for p in e(group='sglang.srt.plugins') if p.name == 'alchemist'))"
    )
    env = gpu_host.environment(site, None, "cpu")
    out = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True
    ).stdout.split()
    assert Path(out[0]).resolve() == ROOT / "protocol" / "lease.py"
    assert out[1:] == ["alchemist.server.plugin:register"]


def test_memory_that_could_not_be_exported_is_not_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    assert "PYTORCH_CUDA_ALLOC_CONF" not in gpu_host.environment(tmp_path, None, "cuda")

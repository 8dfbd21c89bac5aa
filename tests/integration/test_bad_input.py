"""What a person can get wrong: each a clear error that names the thing and what is allowed; nothing is lost."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from live import BOOT_S, ROOT, Server, free_port, wait_for
from remains import query
from stream import Stream

from alchemist.server.main import TINY_MODEL

pytestmark = pytest.mark.server

AT_ONCE = 2
"""Launches at a time: most import SGLang before they can say no."""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Models, data directories and files that no server can use."""
    home = tmp_path_factory.mktemp("bad")
    gpt2 = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 64, "n_layer": 2}
    mistral = {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": 64,
    }
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0], "long_factor": [1.0]}
    llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_parameters": rope}
    for name, config in (("gpt2", gpt2), ("mistral", mistral), ("llama", llama)):
        (home / name).mkdir()
        (home / name / "config.json").write_text(json.dumps(config))
    (home / "file").write_text("not a directory")
    (home / "damaged").mkdir()
    (home / "damaged/ledger.sqlite3").write_bytes(b"not a database at all" * 500)
    return home


@pytest.fixture(scope="module")
def full_disk(tmp_path_factory):
    """A file system of one megabyte with nothing free."""
    with tmpfs(tmp_path_factory.mktemp("full"), "1m") as mount:
        fill(mount / "filler")
        yield mount


@contextlib.contextmanager
def tmpfs(path: Path, size: str) -> Iterator[Path]:
    """A file system of `size` at `path`; skips the test where this process may not mount one."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", path]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a disk that fills up needs the right to mount one: {done.stderr.strip()}")
    try:
        yield path
    finally:
        # Lazy: what a server leaves to its resource tracker takes a moment longer than the server.
        subprocess.run(["umount", "--lazy", path], check=True)


def fill(path: Path) -> None:
    """Make `path` as large as its file system lets it be."""
    with path.open("ab", buffering=0) as file:
        size = 2**16
        while size:
            try:
                file.write(b"\0" * size)
            except OSError:
                size //= 2


@pytest.fixture(scope="module")
def taken_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.fixture(scope="module")
def running(tmp_path_factory):
    """A server whose data directory lies on a small file system."""
    with tmpfs(tmp_path_factory.mktemp("small"), "24m") as mount:
        server = Server(mount / "data", "--train-batch-size", "64", "--train-max-wait", "3600")
        yield server
        assert server.stop() == 0, server.tail()


@pytest.fixture(scope="module")
def launches(home, full_disk, taken_port, running):
    """case → (exit status, standard error and output). `running` holds its data directory meanwhile."""
    cases: dict[str, list[object]] = {
        "architecture": ["--model-path", home / "gpt2"],
        "sliding window": ["--model-path", home / "mistral"],
        "rope": ["--model-path", home / "llama"],
        "no model": ["--model-path", home / "nowhere"],
        "rank over ours": ["--lora-rank", 4096],
        "rank over SGLang's": ["--lora-rank", 16, "--max-lora-rank", 8],
        "port": ["--port", taken_port],
        "data is a file": ["--data-dir", home / "file"],
        "data below a file": ["--data-dir", home / "file/data"],
        "read-only data": ["--data-dir", "/proc/alchemist"],
        "damaged data": ["--data-dir", home / "damaged"],
        "full disk": ["--data-dir", full_disk / "data"],
        "data in use": ["--data-dir", running.data_dir],
        "memory": ["--activation-host-gb", "900TiB"],
        "free memory": ["--activation-host-gb", most_of_memory()],
        "unknown flag": ["--lora-rnak", 8],
        "unknown SGLang flag": ["--max-totl-tokens", 8],
        "negative batch": ["--train-batch-size", -1],
        "negative rate": ["--learning-rate=-0.1"],
        "not a number": ["--beta", "much"],
        "objective": ["--objective", "dpo2"],
        "loss module": ["--objective", "no_such_module:loss"],
        "loss function": ["--objective", "json:no_such_loss"],
        "smoothing": ["--objective", "dpo", "--label-smoothing", 0.5],
        "modules": ["--target-modules", "q_proj,nose"],
        "no key": ["--host", "0.0.0.0"],
        "grpc": ["--grpc-port", free_port()],
        "config file": ["--config", home / "none.yaml"],
    }
    for number, args in enumerate(cases.values()):
        if "--data-dir" not in args:
            args += ["--data-dir", home / f"new{number}"]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(zip(cases, pool.map(launch, cases.values()), strict=True))


def most_of_memory() -> str:
    from alchemist.server.machine_memory import physical_memory_bytes

    return f"{physical_memory_bytes() - 2**20}B"


def launch(args: list[object]) -> tuple[int, str]:
    words = [str(arg) for arg in args]
    done = subprocess.run(
        [sys.executable, "-m", "alchemist.server", *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=500,
        check=False,
    )
    return done.returncode, done.stderr + done.stdout


SAID = {
    "architecture": r"GPT2LMHeadModel cannot be trained; supported: .*Qwen3ForCausalLM",
    "sliding window": r"MistralForCausalLM with sliding_window=64 cannot be trained; supported: full",
    "rope": r"LlamaForCausalLM with rope_type='longrope' cannot be trained; supported: default, ",
    "no model": r"--model-path .*nowhere: there is no model here",
    "rank over ours": r"--lora-rank is 4096; allowed: 1 to 512",
    "rank over SGLang's": r"--lora-rank is 16; allowed: up to --max-lora-rank 8",
    "port": r"--port \d+: cannot listen on 127.0.0.1: Address already in use",
    "data is a file": r"--data-dir .*file: .*(File exists|Not a directory)",
    "data below a file": r"--data-dir .*file/data: .*Not a directory",
    "read-only data": r"--data-dir /proc/alchemist: cannot use",
    "damaged data": r"--data-dir .*damaged: .*is damaged or is not a ledger",
    "full disk": r"--data-dir .*: no space left",
    "data in use": r"--data-dir .*is in use by another server \(process \d+\)",
    "memory": r"--activation-host-gb is '921600.0 GiB'; allowed: auto, or up to the .* GiB",
    "free memory": r"--activation-host-gb is .* GiB; allowed: auto, or up to the .* GiB that are free",
    "unknown flag": r"unknown flag --lora-rnak; did you mean --lora-rank\?",
    "unknown SGLang flag": r"unknown flag --max-totl-tokens; did you mean --max-total-tokens\?",
    "negative batch": r"--train-batch-size is -1; allowed: 1 to 65536",
    "negative rate": r"--learning-rate is -0.1; allowed: above 0",
    "not a number": r"--beta is 'much'; allowed: a number",
    "objective": r"--objective is 'dpo2'; allowed: kto, apo_zero_unpaired, dpo, sft or module:function",
    "loss module": r"--objective no_such_module:loss: No module named 'no_such_module'",
    "loss function": r"--objective json:no_such_loss: .*no_such_loss",
    "smoothing": r"--label-smoothing is 0.5; allowed: 0 or more and below 0.5",
    "modules": r"--target-modules is .*nose.*; allowed: all-linear or some of q_proj",
    "grpc": r"--grpc-port is set; allowed: HTTP/1.1 alone",
    "no key": r"--host 0.0.0.0 is reachable from other machines; allowed without --api-key: 127.0.0.1",
    "config file": r"--config .*none.yaml: .*No such file",
}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", SAID)
def test_a_bad_launch_ends_with_status_2_and_one_clear_line(launches, case):
    status, output = launches[case]
    errors = [line for line in output.splitlines() if line.startswith("alchemist: error: ")]
    assert len(errors) == 1, output
    assert re.search(SAID[case], errors[0]), errors[0]
    assert status == 2
    assert "Traceback" not in output


def test_every_launch_has_a_line_it_must_say(launches):
    assert set(launches) == set(SAID)


@pytest.fixture(scope="module")
def made_with(running, tmp_path_factory):
    """Launches on a copy of the data directory of a server that has trained a version."""
    for rating in ("up", "down"):
        running.vote(running.chat("hello", seed=1)["id"], rating)
    running.flush()
    base = tmp_path_factory.mktemp("made")
    other = base / "other-model"
    shutil.copytree(TINY_MODEL, other)
    weights = next(other.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-4:] = b"\0\0\0\0"
    weights.write_bytes(data)
    cases: dict[str, list[object]] = {
        "model": ["--model-path", other],
        "rank": ["--lora-rank", 8],
        "alpha": ["--lora-alpha", 64],
        "modules": ["--target-modules", "q_proj,v_proj"],
    }
    for name, args in cases.items():
        copy = base / name
        shutil.copytree(running.data_dir, copy)
        args += ["--data-dir", copy]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return dict(zip(cases, pool.map(launch, cases.values()), strict=True))


MADE_WITH = {
    "model": r"was made for the model .*tiny; --model-path .*other-model is another one",
    "rank": r"--lora-rank is 8, but the versions in --data-dir .* were made with 16",
    "alpha": r"--lora-alpha is 64.0, but the versions in --data-dir .* were made with 32.0",
    "modules": r"--target-modules is q_proj,v_proj, but the versions .* were made with q_proj,k_proj",
}


@pytest.mark.parametrize("case", MADE_WITH)
def test_a_data_directory_of_something_else_is_refused(made_with, case):
    status, output = made_with[case]
    errors = [line for line in output.splitlines() if line.startswith("alchemist: error: ")]
    assert len(errors) == 1, output
    assert re.search(MADE_WITH[case], errors[0]), errors[0]
    assert status == 2
    assert "Traceback" not in output


# Over HTTP

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def completion_id(running):
    return running.chat("hello")["id"]


def refused(response, status, named=""):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert named in f"{error['message']} {error['param']}"
    assert "Traceback" not in response.text
    assert 'File "' not in response.text
    return error


@pytest.mark.parametrize(
    ("body", "status", "named"),
    [
        ({"completion_id": "nothing", "rating": "up"}, 404, "nothing"),
        ({"rating": "up"}, 422, "completion_id"),
        ({"completion_id": 7, "rating": "up"}, 422, "completion_id"),
        ({"completion_id": "ID", "rating": "sideways"}, 422, "rating"),
        ({"completion_id": "ID", "rating": 1.5}, 422, "rating"),
        ({"completion_id": "ID", "rating": "up", "tags": "one"}, 422, "tags"),
        ({"completion_id": "ID", "rating": "up", "correction": ["x"]}, 422, "correction"),
        ({"completion_id": "ID", "rating": "up", "surprise": 1}, 422, "surprise"),
        ({"completion_id": "ID", "rating": "up", "id": "a b"}, 422, "id"),
        ([1, 2], 422, ""),
    ],
)
def test_a_wrong_vote_is_refused_by_name(running, completion_id, body, status, named):
    if isinstance(body, dict) and body.get("completion_id") == "ID":
        body = {**body, "completion_id": completion_id}
    refused(running.http.post("/v1/feedback", json=body), status, named)


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe", b'{"completion_id": NaN}', b"[" * 9999])
def test_what_is_not_json_is_refused(running, raw):
    refused(running.http.post("/v1/feedback", content=raw, headers=JSON), 422)


def test_a_huge_body_is_refused(running):
    huge = json.dumps({"completion_id": "x", "rating": "up", "comment": "a" * 2**20}).encode()
    refused(running.http.post("/v1/feedback", content=huge, headers=JSON), 413, "262144")
    chunks = (huge[i : i + 8192] for i in range(0, len(huge), 8192))
    refused(running.http.post("/v1/feedback", content=chunks, headers=JSON), 413, "262144")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("PUT", "/v1/feedback"),
        ("DELETE", "/v1/feedback"),
        ("POST", "/v1/feedback/x"),
        ("GET", "/v1/training/flush"),
        ("DELETE", "/v1/versions"),
        ("POST", "/v1/completions/x/receipt"),
    ],
)
def test_a_wrong_method_is_refused(running, method, path):
    response = running.http.request(method, path)
    refused(response, 405, method)
    assert response.headers["Allow"]


@pytest.mark.parametrize(
    "path",
    [
        "/v1/feedback/nothing",
        "/v1/completions/nothing/receipt",
        "/v1/feedback?after=nothing",
    ],
)
def test_what_is_not_there_answers_404(running, path):
    refused(running.http.get(path), 404, "nothing")


def test_promoting_what_is_not_there_answers_404(running):
    for version in ("v999", "nothing"):
        refused(running.http.post(f"/v1/versions/{version}/promote"), 404, version)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/completions", {"model": "base", "prompt": [99999999], "max_tokens": 1}, 400),
        ("/generate", {"input_ids": [[5, 6], [-1]]}, 400),
        ("/generate", {"text": "hi", "rid": "HEALTH_CHECK_of_mine"}, 400),
        ("/generate", {"text": "hi", "rid": "alchemist-probe-1"}, 400),
        # SGLang would abort every request whose id begins so when this client goes away.
        ("/generate", {"text": "hi", "rid": "a"}, 400),
        ("/v1/completions", {"model": "base", "prompt": "hi", "rid": "\ud800_is_none"}, 400),
        ("/v1/completions", {"model": "base", "prompt": "hi", "extra_key": "\ud800"}, 400),
        (
            "/v1/completions",
            {"model": "base", "prompt": "hi", "custom_params": {"a": "\ud800"}},
            400,
        ),
        ("/v1/responses", {"input": "hi", "model": "v999"}, 400),
        ("/generate", {"text": "hi", "lora_path": []}, 400),
        ("/generate", {"text": "hi", "sampling_params": {"custom_params": "x"}}, 200),
        (
            "/generate",
            {
                "text": "hi",
                "sampling_params": {"custom_params": "x"},
                "alchemist": {"record": False},
            },
            400,
        ),
    ],
)
def test_no_request_ends_the_server(running, path, body, status):
    # In ASCII: a lone surrogate has no other form.
    sent = {"content": json.dumps(body), "headers": {"Content-Type": "application/json"}}
    response = running.http.post(path, **sent)
    assert response.status_code == status, response.text
    assert running.chat("hello")["choices"]


def test_a_version_nobody_has_is_refused(running):
    body = {"model": "v999", "messages": [{"role": "user", "content": "hello"}]}
    response = running.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert "v999" in response.text
    assert "Traceback" not in response.text


def test_a_vote_on_an_answer_that_still_streams_waits_and_joins(running):
    stream = Stream(running, max_tokens=400)
    vote = running.vote(stream.id)
    assert vote["state"] == "waiting"
    stream.wait()
    receipt = running.receipt(stream.id)
    assert len(receipt["response_token_ids"]) == 400
    stored = running.http.get(f"/v1/feedback/{vote['id']}").json()
    assert stored["state"] == "pending"


def test_a_data_directory_that_fills_up_refuses_votes_and_chat_goes_on(running):
    answers = [running.chat("what is 2 plus 3?") for _ in range(3)]
    before = running.training()
    filler = running.data_dir.parent / "filler"
    fill(filler)
    refusals = []
    for _ in range(200):
        body = {"completion_id": answers[0]["id"], "rating": "up", "user": os.urandom(4).hex()}
        response = running.http.post("/v1/feedback", json={**body, "comment": "c" * 4000})
        if response.status_code != 201:
            refusals.append(response)
            break
    assert refusals, "the disk never was full"
    error = refused(refusals[0], 507, "no space left")
    assert error["code"] == "ledger_full"
    again = running.chat("what is 2 plus 3?")
    assert (
        again["choices"][0]["message"]["content"] == answers[0]["choices"][0]["message"]["content"]
    )
    # A step that cannot be written leaves its votes pending.
    assert running.http.post("/v1/training/flush").status_code == 200
    wait_for(lambda: "No space left" in str(running.training()["last_error"]), 120, "a failed step")
    assert running.training()["trained"] == before["trained"]

    filler.unlink()
    stored = running.http.post(
        "/v1/feedback", json={"completion_id": again["id"], "rating": "down"}
    )
    assert stored.status_code == 201, (
        "an answer given while the disk was full can be voted on later"
    )
    status = running.flush()
    assert status["failed"] == before["failed"]
    ids = {v[0] for v in query(running.data_dir, "SELECT id FROM feedback WHERE state='trained'")}
    assert stored.json()["id"] in ids
    assert status["trained"] == len(ids)


def test_activation_memory_for_less_than_a_row_ends_the_launch(tmp_path):
    """How large a row is, only the loaded model says."""
    server = Server(tmp_path / "data", "--activation-host-gb", "100b", wait=False)
    assert server.process.wait(BOOT_S) == 1
    said = server.log.read_text()
    assert re.search(
        r"--activation-host-gb 100 bytes holds no row; one token .* takes \d+ bytes", said
    )
    assert server.children() == []


@pytest.fixture
def small_group():
    """A memory control group of 6 GiB; its file of members."""
    for top, limit in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ):
        folder = top / f"alchemist-test-{os.getpid()}"
        if not (top / "cgroup.procs").exists() or not os.access(top, os.W_OK):
            continue
        folder.mkdir()
        try:
            (folder / limit).write_text(str(6 * 2**30))
            yield folder / "cgroup.procs"
            return
        except OSError:
            continue
        finally:
            folder.rmdir()
    pytest.skip("needs the right to make a memory control group")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("7GiB", r"--activation-host-gb is '7.0 GiB'; allowed: .* 6.0 GiB this machine has"),
        ("6143MiB", r"--activation-host-gb is 6.0 GiB; allowed: .* [45].\d GiB that are free"),
    ],
)
def test_activation_memory_beyond_a_containers_limit(small_group, tmp_path, asked, said):
    """The kernel would kill the server without a word."""
    command = [sys.executable, "-m", "alchemist.server", "--activation-host-gb", asked]
    command += ["--data-dir", str(tmp_path / "data"), "--port", str(free_port())]
    join = f'echo $$ > {small_group} && exec "$@"'
    done = subprocess.run(
        ["sh", "-c", join, "sh", *command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=BOOT_S,
        check=False,
    )
    assert done.returncode == 2
    assert re.search(said, done.stderr), done.stderr

"""`python -m alchemist.server`: check everything that can be checked, then launch SGLang with the plugin in it."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import signal
import socket
import stat
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import psutil
import torch

from alchemist.protocol import objectives
from alchemist.protocol.cuda import require_shareable_allocator
from alchemist.protocol.errors import SharingError
from alchemist.protocol.lease import Lease
from alchemist.protocol.models import UnsupportedModelError, require_supported
from alchemist.server import options, processes
from alchemist.server.config import Config
from alchemist.server.data_dir import check_data_dir, open_ledger
from alchemist.server.errors import EngineFailed, LaunchError, LedgerError
from alchemist.server.ledger import Ledger
from alchemist.server.machine_memory import free_memory_bytes
from alchemist.server.run import Run

logger = logging.getLogger("alchemist")

TINY_MODEL = Path(__file__).parent / "tiny"
_PREFIX = "alchemist-"
_FUSED = {"qkv_proj": {"q_proj", "k_proj", "v_proj"}, "gate_up_proj": {"gate_proj", "up_proj"}}
"""As SGLang also lets one say."""
_MODEL_FLAGS = {"--model-path", "--model"}

KEEP_ALIVE_S = "75"
"""Seconds a quiet connection is kept. After SGLang's five, which are the OpenAI client's too, the next request, often
the vote on an answer that has been read, would now and then meet a connection that is just being closed.
"""


def main(argv: list[str] | None = None) -> None:
    """Serve until a signal (exit status 0), a dead engine (1), or not at all: something cannot be as asked (2)."""
    config, sglang_argv = options.parse(sys.argv[1:] if argv is None else argv, os.environ)
    # Until the event loop takes them, a signal unwinds the stack like Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    status = 0
    try:
        _launch(config, sglang_argv)
    except (LaunchError, LedgerError) as error:
        print(f"alchemist: error: {error}", file=sys.stderr)
        status = 2
    except EngineFailed as error:
        print(f"alchemist: error: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        pass
    _exit(status)


def _exit(status: int) -> NoReturn:
    """End without the interpreter's tear-down: collecting what SGLang leaves takes it many seconds."""
    atexit._run_exitfuncs()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _launch(config: Config, sglang_argv: list[str]) -> None:
    sglang_argv = with_defaults(config, sglang_argv)
    _check_model_path(sglang_argv)
    # Before SGLang is imported: a data directory that cannot be used is told within seconds.
    ledger = open_ledger(config)
    directory = _make_run_directory()
    try:
        _confine(directory)
        os.environ.setdefault("SGLANG_TIMEOUT_KEEP_ALIVE", KEEP_ALIVE_S)
        lease = Lease.create()
        run = Run(directory=directory, config=config.to_json(), lease=lease.segment.handle)
        run.publish()
        server_args = _prepare(sglang_argv)
        _check(config, server_args)
        check_data_dir(config, server_args.model_path, ledger)
        _serve(config, run, lease, ledger, server_args)
    finally:
        ledger.close()
        processes.end_children()
        processes.remove_run(directory)


def _prepare(sglang_argv: list[str]) -> Any:
    """SGLang's resolved arguments, with our plugin loaded: it decides by the run whether to act.

    Raises:
        LaunchError: the model cannot be found, or flags do not go together.
    """
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    load_plugins()
    try:
        return prepare_server_args(sglang_argv)
    except (OSError, ValueError, AssertionError) as error:
        raise LaunchError(" ".join(str(error).split()) or repr(error)) from None


def _confine(directory: str) -> None:
    """Keep SGLang's sockets in our 0700 directory, and off the network."""
    tempfile.tempdir = directory
    # Its rendezvous of one process with itself would listen on every interface.
    os.environ.setdefault("SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE", f"file://{directory}/ranks")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")


def _serve(config: Config, run: Run, lease: Lease, ledger: Ledger, server_args: Any) -> None:
    from sglang.srt.entrypoints.http_server import launch_server

    from alchemist.server import hooks
    from alchemist.server.front import FRONT

    _, missing = hooks.verify(hooks.main_hooks(FRONT))
    if missing:
        raise LaunchError("SGLang functions could not be wrapped: " + ", ".join(missing))
    FRONT.begin(run, lease, ledger)
    _keep_out_of_logs([server_args.api_key, server_args.admin_api_key])
    logger.info("alchemist configuration: %s", config.to_json())
    try:
        launch_server(
            server_args,
            run_scheduler_process_func=processes.run_scheduler,
            run_detokenizer_process_func=processes.run_detokenizer,
        )
    except AssertionError as error:
        # By these SGLang refuses arguments that do not go together.
        raise LaunchError(" ".join(str(error).split()) or repr(error)) from error
    except RuntimeError as error:
        raise EngineFailed(f"SGLang did not start: {error}") from error


def _keep_out_of_logs(keys: list[str | None]) -> None:
    """SGLang logs all of its arguments at launch; keys among them are starred."""
    make = logging.getLogRecordFactory()

    def factory(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        for key in keys:
            if key and isinstance(record.msg, str):
                record.msg = record.msg.replace(f"key={key!r}", "key='***'")
        return record

    logging.setLogRecordFactory(factory)


def with_defaults(config: Config, argv: list[str]) -> list[str]:
    """SGLang's arguments with what we need added where the user has not said otherwise."""
    given = {word.partition("=")[0] for word in argv if word.startswith("--")}
    flags: dict[str, list[str]] = {}
    if not given & _MODEL_FLAGS:
        flags["--model-path"] = [str(TINY_MODEL)]
        flags["--served-model-name"] = ["alchemist-tiny"]
    flags["--enable-lora"] = []
    flags["--max-lora-rank"] = [str(config.lora_rank)]
    flags["--lora-target-modules"] = list(config.target_modules)
    flags["--max-loras-per-batch"] = ["4"]
    # SGLang's own eviction could take the live version; ours runs first, two below this or more. It wants room for all
    # that a batch may have.
    at_once = _value({"--max-loras-per-batch"}, argv, "4")
    loaded = max(num_loaded(config), int(at_once) if at_once.isdigit() else 0)
    flags["--max-loaded-loras"] = [str(loaded)]
    # An idle scheduler that spins would take the time the trainer could use.
    flags["--sleep-on-idle"] = []
    if torch.cuda.is_available():
        # Hooks run in eager prefill only.
        flags["--disable-prefill-cuda-graph"] = []
        if not config.no_train:
            # The trainer's context and step need room beside what SGLang takes.
            flags["--mem-fraction-static"] = ["0.8"]
    else:
        flags["--device"] = ["cpu"]
        flags["--dtype"] = ["float32"]
        flags["--attention-backend"] = ["torch_native"]
        flags["--lora-backend"] = ["torch_native"]
        # There is nothing to overlap with: a first token would wait for the next forward.
        flags["--disable-overlap-schedule"] = []
        # Only a limit here: the tokens below are what is taken. A small one fails when others take memory meanwhile.
        flags["--mem-fraction-static"] = ["0.5"]
        flags["--max-total-tokens"] = ["32768"]
        flags["--max-running-requests"] = ["16"]
        flags["--sampling-backend"] = ["pytorch"]
    extra = [
        word for flag, values in flags.items() if flag not in given for word in (flag, *values)
    ]
    return [*argv, *extra]


def _value(flags: set[str], argv: list[str], default: str) -> str:
    """What the user gave for one of `flags`, last."""
    words = [part for word in argv for part in word.split("=", 1)]
    given = [value for flag, value in pairwise(words) if flag in flags]
    return given[-1] if given else default


def num_loaded(config: Config) -> int:
    """Adapters that are loaded at once: what is kept, one that is being proven, and one to spare."""
    return max(config.keep_versions, config.max_staleness + 1) + 2


def _check(config: Config, server_args: Any) -> None:
    """Everything that would otherwise fail a minute from now, or fail unclearly.

    Raises:
        LaunchError: says what and what is allowed.
    """
    from sglang.srt.environ import envs

    from alchemist.server.routes import require_safe_bind

    try:
        require_safe_bind(server_args.host, server_args.api_key)
    except ValueError as error:
        raise LaunchError(str(error)) from None
    for name, wanted in (
        ("tp_size", 1),
        ("pp_size", 1),
        ("dp_size", 1),
        ("tokenizer_worker_num", 1),
    ):
        if getattr(server_args, name) != wanted:
            flag = name.replace("_", "-")
            raise LaunchError(f"--{flag} is {getattr(server_args, name)}; allowed: {wanted}")
    for what, is_asked in (
        ("--grpc-port", server_args.grpc_port is not None),
        ("--grpc-mode", server_args.grpc_mode),
        ("--smg-grpc-mode", server_args.smg_grpc_mode),
        ("--enable-http2", server_args.enable_http2),
        ("SGLANG_RUST_SERVER", envs.SGLANG_RUST_SERVER.get()),
    ):
        if is_asked:
            raise LaunchError(
                f"{what} is set; allowed: HTTP/1.1 alone, which is where keys are checked and feedback is taken"
            )
    if server_args.lora_paths:
        raise LaunchError(
            "--lora-paths is set; allowed: the adapters that this server trains, alone"
        )
    served = set(server_args.lora_target_modules or ())
    for fused, parts in _FUSED.items():
        served |= parts if fused in served else set()
    if not served & {"all"} and not served >= set(config.target_modules):
        raise LaunchError(
            f"--lora-target-modules is {' '.join(sorted(served))}; "
            f"allowed: all, or at least --target-modules ({' '.join(config.target_modules)})"
        )
    if server_args.max_loaded_loras is not None and server_args.max_loaded_loras < num_loaded(
        config
    ):
        raise LaunchError(
            f"--max-loaded-loras is {server_args.max_loaded_loras}; allowed: {num_loaded(config)} or more, "
            "for --keep-versions and --max-staleness"
        )
    if server_args.max_lora_rank < config.lora_rank:
        raise LaunchError(
            f"--lora-rank is {config.lora_rank}; allowed: up to --max-lora-rank {server_args.max_lora_rank}"
        )
    if objectives.is_function(config.objective):
        try:
            objectives.load_function(config.objective)
        except ValueError as error:
            raise LaunchError(f"--{error}") from None
    free = free_memory_bytes()
    if config.activation_host_bytes > free and config.record != "none" and not config.no_train:
        raise LaunchError(
            f"--activation-host-gb is {config.activation_host_bytes / 2**30:.1f} GiB; "
            f"allowed: auto, or up to the {free / 2**30:.1f} GiB that are free"
        )
    _check_model(config, server_args)
    _check_port(server_args.host, server_args.port)
    if not config.no_train:
        _check_device(config, server_args)


def _check_device(config: Config, server_args: Any) -> None:
    """What a GPU's memory must be to be shared, and SGLang's passes to be recorded."""
    if server_args.device not in ("cpu", "cuda"):
        raise LaunchError(
            f"--device is {server_args.device}; allowed: cpu, cuda (or any with --no-train)"
        )
    if server_args.device == "cpu":
        return
    try:
        require_shareable_allocator()
    except SharingError as error:
        raise LaunchError(f"{error} (or add --no-train)") from None
    refused = {
        "--enable-memory-saver is set": server_args.enable_memory_saver,
        "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING is set": server_args.post_capture_kv_sizing_planned(),
    }
    if config.record != "none":
        if config.activation_dtype == "fp8" and torch.cuda.get_device_capability() < (8, 9):
            raise LaunchError(
                "--activation-dtype is fp8; allowed on this GPU: auto (it has no float8)"
            )
        prefill = server_args.cuda_graph_config.prefill.backend
        refused |= {
            f"the prefill CUDA graph's backend is {prefill}": prefill != "disabled",
            "--enable-torch-compile is set": server_args.enable_torch_compile,
            "--enable-two-batch-overlap is set": server_args.enable_two_batch_overlap,
            "--speculative-algorithm is set": server_args.speculative_algorithm is not None,
        }
    for what, is_refused in refused.items():
        if is_refused:
            raise LaunchError(f"{what}; allowed: not with training on what was served (--no-train)")


def _check_model_path(argv: list[str]) -> None:
    path = _value(_MODEL_FLAGS, argv, "")
    looks_local = path.startswith((".", "/", "~"))
    if looks_local and not (Path(path).expanduser() / "config.json").is_file():
        raise LaunchError(f"--model-path {path}: there is no model here (config.json is missing)")


def _check_model(config: Config, server_args: Any) -> None:
    if config.no_train:
        return
    from transformers import AutoConfig

    # The trainer reads the model's own configuration.
    for flag, value, default in (
        ("--json-model-override-args", server_args.json_model_override_args, "{}"),
        ("--revision", server_args.revision, None),
    ):
        if value not in (default, None, ""):
            raise LaunchError(
                f"{flag} is {value}; allowed: a model directory that says so itself (or add --no-train)"
            )
    path = server_args.model_path
    try:
        model = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise LaunchError(f"--model-path {path}: {first}") from None
    try:
        require_supported(model)
    except UnsupportedModelError as error:
        raise LaunchError(
            f"--model-path {path}: {error} (or add --no-train to serve it without learning)"
        ) from None
    # SGLang makes float16 of float32 unless it is told otherwise.
    is_wide = server_args.dtype == "auto" and model.dtype in (torch.float16, torch.float32, None)
    if server_args.dtype in ("half", "float16") or is_wide:
        raise LaunchError(
            f"--dtype {server_args.dtype} serves this model in float16, in which gradients are too small to be held; "
            "allowed: --dtype bfloat16 or float32 (or add --no-train)"
        )


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise LaunchError(f"--port {port}: cannot listen on {host}: {error.strerror}") from None


def _make_run_directory() -> str:
    """A 0700 directory for sockets; those of servers that were killed are removed on the way."""
    base = Path(tempfile.gettempdir())
    for old in base.glob(f"{_PREFIX}[0-9]*-*"):
        pid = old.name.removeprefix(_PREFIX).split("-")[0]
        # Ours is not made yet: in a container the one before may have had our number.
        is_dead = pid.isdigit() and (int(pid) == os.getpid() or not psutil.pid_exists(int(pid)))
        with contextlib.suppress(OSError):
            # Not through a link: what it led to would be removed.
            found = old.lstat()
            if is_dead and stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid():
                processes.remove_run(old)
    return tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-")

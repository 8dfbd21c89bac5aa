"""What the host has, what is missing for the suite, and the environment its parts run in.

Only the standard library is imported: this is what says that something else is not there.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ROOMS = ("protocol", "server", "trainer", "kernels")
_DISTRIBUTIONS = {
    "torch": "torch",
    "triton": "triton",
    "sglang": "sglang",
    "sgl_kernel": "sglang-kernel",
    "flashinfer": "flashinfer_python",
    "transformers": "transformers",
    "peft": "peft",
    "accelerate": "accelerate",
}
_MODULES = (
    "msgspec",
    "zmq",
    "fastapi",
    "uvicorn",
    "httpx",
    "psutil",
    "yaml",
    "aiohttp",
    "rich",
    "pytest",
)
_CUDA_ONLY = ("sgl_kernel", "flashinfer")
_OPTIONAL = ("rich", "flashinfer", "pytest", "peft", "accelerate")
"""Without them the suite runs: a table is not printed, rows of FlashInfer, of PEFT and of `tests/gpu` say why."""
PROBE_S = 120.0
"""To import everything from a disk that has none of it cached."""
_PINS = {"sglang": "0.5.17", "transformers": "5.12."}

_PROBE = """
import importlib, importlib.metadata, json, sys, traceback
from alchemist.server import cpu
cpu.prepare()
found = {"versions": {}, "broken": {}}
for module, name in json.loads(sys.argv[1]).items():
    try:
        importlib.import_module(module)
        found["versions"][name or module] = importlib.metadata.version(name) if name else ""
    except BaseException as error:
        found["broken"][module] = f"{type(error).__name__}: {error}"
try:
    import torch
    found["cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        found["gpu"] = {"name": p.name, "gib": round(p.total_memory / 2**30, 1), "sm": f"{p.major}.{p.minor}"}
except BaseException as error:
    found["broken"].setdefault("torch", str(error))
points = importlib.metadata.entry_points(group="sglang.srt.plugins")
found["plugins"] = sorted({point.name for point in points})
print(json.dumps(found))
"""


def unpack_bundle(bundle: Path, folder: Path) -> Path:
    """The `site` folder of a bundle: of a folder that has one, or unpacked from a .tar.xz.

    Raises:
        ValueError: it is neither.
    """
    if bundle.is_file():
        with tarfile.open(bundle) as archive:
            archive.extractall(folder, filter="data")
        bundle = folder
    for site in (bundle / "site", bundle):
        if (site / "sglang").is_dir():
            return site.resolve()
    raise ValueError(f"--bundle {bundle}: there is no site/sglang in it")


def make_site(folder: Path) -> Path:
    """A folder from which `alchemist` can be imported and its plugin found, as if this checkout were installed."""
    site = folder / "alchemist-site"
    info = site / "alchemist_llm-0.1.0.dist-info"
    for path in (site / "alchemist", info):
        path.mkdir(parents=True, exist_ok=True)
    for room in ROOMS:
        link = site / "alchemist" / room
        if not link.is_symlink():
            link.symlink_to(ROOT / room)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    name, version = project["name"], project["version"]
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = []
    for group, points in project["entry-points"].items():
        lines += [f"[{group}]", *(f"{key} = {value}" for key, value in points.items())]
        lines += ["suite = gpu_plugin:register"] if group == "sglang.srt.plugins" else []
        lines.append("")
    (info / "entry_points.txt").write_text("\n".join(lines))
    return site


def environment(
    site: Path, bundle: Path | None, device: str, attention_backend: str = "triton"
) -> dict[str, str]:
    """Of every process of the suite."""
    paths = [str(site), str(ROOT / "scripts"), *([str(bundle)] if bundle else [])]
    paths.append(os.environ.get("PYTHONPATH", ""))
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "PYTHONUNBUFFERED": "1",
        # What an installation has left in the checkout's folder would hide the suite's own plugin.
        "PYTHONSAFEPATH": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    # A process that exports CUDA IPC handles cannot use them.
    env.pop("PYTORCH_CUDA_ALLOC_CONF", None)
    env.pop("PYTORCH_ALLOC_CONF", None)
    if device == "cpu":
        env.setdefault("OMP_NUM_THREADS", "1")
    if attention_backend == "flashinfer":
        # The ragged kernels are FA3's, which no bundle has compiled.
        env.setdefault("SGLANG_FLASHINFER_USE_PAGED", "1")
    if bundle:
        env["TVM_FFI_CACHE_DIR"] = str(bundle / ".tvmcache")
        env.setdefault("FLASHINFER_DISABLE_JIT", "1")
        if Path("/usr/local/cuda").is_dir():
            env.setdefault("CUDA_HOME", "/usr/local/cuda")
    return env


def look(env: Mapping[str, str], device: str) -> dict[str, Any]:
    """What the host has: versions, GPU, driver, clocks as found; `broken`: module → why it cannot be imported."""
    modules: dict[str, str] = dict.fromkeys(_MODULES, "")
    modules |= {m: d for m, d in _DISTRIBUTIONS.items() if device == "cuda" or m not in _CUDA_ONLY}
    command = [sys.executable, "-c", _PROBE, json.dumps(modules)]
    found: dict[str, Any] = {"versions": {}, "plugins": [], "broken": {}}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=env, check=False, timeout=PROBE_S
        )
        found = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        found["broken"]["alchemist"] = f"importing it and what it needs took over {PROBE_S:.0f} s"
    except (IndexError, ValueError):
        found["broken"]["alchemist"] = done.stderr.strip()[-600:]
    found["versions"] = {k: v for k, v in found["versions"].items() if v}
    found["versions"]["python"] = platform.python_version()
    found["smi"] = nvidia_smi() if device == "cuda" else {}
    found["mps"] = mps(env)
    return found


def mps(env: Mapping[str, str]) -> dict[str, Any]:
    """Whether CUDA programs started here would share the GPU through NVIDIA's Multi-Process Service."""
    folder = Path(env.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"))
    # What a client looks for; the daemon itself may be in another container.
    return {"is_running": (folder / "control").exists(), "pipe_directory": str(folder)}


def nvidia_smi() -> dict[str, str]:
    """The first GPU as nvidia-smi has it; empty without one."""
    fields = ("name", "driver_version", "memory.total", "memory.used", "clocks.sm", "clocks.mem")
    fields += ("clocks.max.sm", "power.limit", "temperature.gpu", "mig.mode.current")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return {}
    lines = done.stdout.splitlines()
    values = [value.strip() for value in lines[0].split(",")] if lines else []
    return dict(zip(fields, values, strict=False))


def problems(found: dict[str, Any], device: str, attention_backend: str = "triton") -> list[str]:
    """Why the suite cannot run here, each with what to do about it."""
    needless = {module for module in _OPTIONAL if module != attention_backend}
    broken = {m: why for m, why in found["broken"].items() if m not in needless}
    out = [
        f"{module} cannot be imported: {' '.join(why.split())[:300]}"
        for module, why in broken.items()
    ]
    if broken:
        out.append(
            "give the packages with --bundle FILE.tar.xz|FOLDER, or set PYTHONPATH to its site folder"
        )
    for name, wanted in _PINS.items():
        version = found["versions"].get(name)
        if version and not version.startswith(wanted):
            out.append(
                f"{name} is {version}; this is written for {wanted}: the bundle must come first on PYTHONPATH"
            )
    if "alchemist" not in found["plugins"] and not broken:
        out.append(
            "SGLang would not find the plugin: no entry point alchemist in sglang.srt.plugins"
        )
    if device == "cuda" and "gpu" not in found:
        out.append("torch sees no CUDA device; rehearse without one: --device cpu --tiny")
    return out

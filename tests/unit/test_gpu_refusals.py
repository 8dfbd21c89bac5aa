"""What the launcher refuses on a GPU: by name, before SGLang has loaded anything."""

from types import SimpleNamespace

import pytest

from alchemist.server import main
from alchemist.server.config import Config
from alchemist.server.errors import LaunchError


def arguments(**changes):
    """As SGLang resolves them on a GPU with what the launcher adds."""
    known = {
        "device": "cuda",
        "enable_memory_saver": False,
        "post_capture_kv_sizing_planned": lambda: False,
        "cuda_graph_config": SimpleNamespace(prefill=SimpleNamespace(backend="disabled")),
        "enable_torch_compile": False,
        "enable_two_batch_overlap": False,
        "speculative_algorithm": None,
    }
    return SimpleNamespace(**known | changes)


@pytest.fixture(autouse=True)
def _plain_allocator(monkeypatch):
    for variable in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(variable, raising=False)


BREAKABLE = SimpleNamespace(prefill=SimpleNamespace(backend="breakable"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"device": "xpu"}, "--device is xpu; allowed: cpu, cuda"),
        ({"enable_memory_saver": True}, "--enable-memory-saver is set"),
        ({"post_capture_kv_sizing_planned": lambda: True}, "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING"),
        ({"cuda_graph_config": BREAKABLE}, "backend is breakable"),
        ({"enable_torch_compile": True}, "--enable-torch-compile is set"),
        ({"enable_two_batch_overlap": True}, "--enable-two-batch-overlap is set"),
        ({"speculative_algorithm": "EAGLE"}, "--speculative-algorithm is set"),
    ],
)
def test_what_cannot_be_trained_on_is_named(changes, said):
    with pytest.raises(LaunchError, match=said):
        main._check_device(Config(), arguments(**changes))


def test_the_allocator_is_looked_at(monkeypatch):
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    with pytest.raises(LaunchError, match=r"PYTORCH_ALLOC_CONF.*--no-train"):
        main._check_device(Config(), arguments())


def test_what_only_recording_needs_is_not_asked_for_without_it():
    main._check_device(Config(), arguments())
    main._check_device(Config(record="none"), arguments(cuda_graph_config=BREAKABLE))
    main._check_device(Config(), SimpleNamespace(device="cpu"))


def test_the_names_are_sglangs():
    """Each attribute that is looked at exists in the installed SGLang's arguments."""
    from sglang.srt.model_executor.cuda_graph_config import Backend
    from sglang.srt.server_args import ServerArgs

    fields = ServerArgs.__dataclass_fields__
    for name in arguments().__dict__:
        assert name in fields or callable(getattr(ServerArgs, name, None)), name
    assert Backend.DISABLED == "disabled"
    assert "disable_prefill_cuda_graph" in fields

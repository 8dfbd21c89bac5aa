"""Handles of device memory, as far as a machine without a GPU can tell: their way through messages, the refusals, and
the driver's functions against its own header. What they open is tested in `tests/gpu`.
"""

import ctypes
import os
import re
from pathlib import Path

import psutil
import pytest
import torch
import triton

from alchemist.protocol import cuda
from alchemist.protocol import messages as m
from alchemist.protocol.cuda import CudaHandle, Mapping, require_shareable_allocator
from alchemist.protocol.errors import PeerGoneError, SharingError
from alchemist.protocol.layout import RowLayout
from alchemist.protocol.shm import SegmentHandle, TensorHandle
from alchemist.protocol.tensors import Arena, device_of, share

HEADER = Path(triton.__file__).parent / "backends/nvidia/include/cuda.h"

C_TYPES = {
    "CUdeviceptr": ctypes.c_uint64,
    "CUdeviceptr *": ctypes.POINTER(ctypes.c_uint64),
    "size_t *": ctypes.POINTER(ctypes.c_size_t),
    "void *": ctypes.c_void_p,
    "CUpointer_attribute": ctypes.c_int,
    "CUresult": ctypes.c_int,
    "CUipcMemHandle": cuda._IpcMemHandle,
    "CUipcMemHandle *": ctypes.POINTER(cuda._IpcMemHandle),
    "unsigned int": ctypes.c_uint,
    "const char **": ctypes.POINTER(ctypes.c_char_p),
}
"""What is passed for each type of the header."""


def device_handle(**changes):
    known = {
        "pid": os.getpid(),
        "birth": psutil.Process().create_time(),
        "device": "f4b1ddd8-0b1e-4d07-9a9e-000000000001",
        "handle": bytes(range(64)),
        "nbytes": 1 << 40,
    }
    return CudaHandle(**known | changes)


def test_device_and_host_handles_travel_in_one_message():
    weight = TensorHandle(
        segment=device_handle(), offset=512, shape=[2, 3], dtype="bfloat16", stride=[3, 1]
    )
    gens = Arena("gens", {"gens": ((5,), torch.int64)}).handles["gens"]
    layout = RowLayout(
        num_layers=1,
        hidden_size=4,
        num_heads=2,
        num_kv_heads=1,
        head_dim=2,
        intermediate_size=4,
        has_qk_norm=False,
        dtype="bfloat16",
        cell=2,
    )
    rows = m.SharedRows(host=[gens], gens=gens, cells=gens)
    memory = m.SharedMemory(layout=layout, weights={"w": weight}, k=[weight], v=[], rows=rows)
    hello = m.SchedulerHello(
        tp_rank=0,
        pid=1,
        hooks=[],
        missing=[],
        model_path="m",
        context_length=8192,
        memory=memory,
    )
    back = m.decode_to_main(m.encode(hello))
    assert back == hello
    assert isinstance(back.memory.weights["w"].segment, CudaHandle)
    assert isinstance(back.memory.rows.gens.segment, SegmentHandle)


@pytest.mark.parametrize("variable", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
@pytest.mark.parametrize(
    "value",
    ["expandable_segments:True", "max_split_size_mb:64, expandable_segments : true"],
)
def test_expandable_segments_are_refused_by_name(variable, value):
    with pytest.raises(SharingError, match=f"{variable}.*expandable_segments.*allowed: False"):
        require_shareable_allocator({variable: value})


def test_the_pool_backend_is_refused():
    with pytest.raises(SharingError, match="backend:cudaMallocAsync; allowed: native"):
        require_shareable_allocator({"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"})


@pytest.mark.parametrize(
    "value", ["", "expandable_segments:False", "backend:native,max_split_size_mb:64"]
)
def test_other_allocator_settings_are_fine(value):
    require_shareable_allocator({"PYTORCH_CUDA_ALLOC_CONF": value})


def test_a_dead_owner_is_named_before_the_driver_is_asked():
    with pytest.raises(PeerGoneError, match=str(os.getpid())):
        Mapping(device_handle(birth=1.0))


def test_a_handle_of_the_wrong_length_is_refused():
    with pytest.raises(SharingError, match="3 bytes; allowed: 64"):
        Mapping(device_handle(handle=b"abc"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_without_a_driver_the_refusal_says_so():
    with pytest.raises(SharingError, match=r"libcuda\.so\.1"):
        Mapping(device_handle())
    with pytest.raises(SharingError, match="not visible to the trainer"):
        device_of("no-such-gpu")


def test_host_tensors_move_into_shared_memory():
    given = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}
    shared = share("test", given)
    assert all(torch.equal(shared.tensors[name], given[name]) for name in given)
    assert shared.tensors["a"].data_ptr() != given["a"].data_ptr()
    assert all(isinstance(handle.segment, SegmentHandle) for handle in shared.handles.values())


@pytest.mark.parametrize("name", list(cuda.PROTOTYPES))
def test_the_drivers_functions_take_what_we_pass(name):
    """Against the header that Triton compiles with."""
    text = HEADER.read_text()
    public = name.removesuffix("_v2")
    if public != name:
        assert re.search(rf"#define {public}\s+{name}\b", text)
    declared = re.search(rf"^CUresult CUDAAPI {public}\((.*?)\);", text, re.MULTILINE).group(1)
    types = [re.sub(r"\w+$", "", argument).strip() for argument in declared.split(",")]
    assert [C_TYPES[t] for t in types] == list(cuda.PROTOTYPES[name])


def test_the_drivers_constants_are_the_headers():
    text = HEADER.read_text()
    size = int(re.search(r"#define CU_IPC_HANDLE_SIZE (\d+)", text).group(1))
    assert size == cuda.HANDLE_BYTES == ctypes.sizeof(cuda._IpcMemHandle)
    for name, value in (
        ("CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE", cuda.LEGACY_CUDA_IPC_CAPABLE),
        ("CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS", cuda.LAZY_ENABLE_PEER_ACCESS),
    ):
        assert int(re.search(rf"{name} = (\w+)", text).group(1), 0) == value

"""GPU memory between processes: one physical copy, opened once, nothing left when either side goes, refusals."""

import os
import subprocess
import sys

import msgspec
import pytest
import torch
from gpu_peers import Handles, Peer

from alchemist.protocol.errors import PeerGoneError, SharingError
from alchemist.protocol.tensors import Arena, Importer, share

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SLACK_BYTES = 64 << 20
"""What the driver may keep for itself between two looks at the device's memory."""


def used_bytes() -> int:
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free


def test_another_process_reads_and_writes_the_same_memory():
    whole = torch.arange(24.0, device="cuda", dtype=torch.bfloat16).view(4, 6)
    tensors = {
        "whole": whole,
        "columns": whole[:, 2:4],
        "other": torch.arange(5, device="cuda", dtype=torch.int64),
    }
    before = {name: (t.stride(), t.double().tolist()) for name, t in tensors.items()}
    shared = share("test", tensors)
    assert all(shared.tensors[name] is tensors[name] for name in tensors)
    peer = Peer("read_and_write", shared.handles)
    assert peer.answer() == before
    # Small tensors lie in one allocation of torch's, which is mapped once.
    assert peer.answer() == len({handle.segment.handle for handle in shared.handles.values()})
    peer.end()
    torch.cuda.synchronize()
    expected = torch.arange(24.0).view(4, 6) + 1
    expected[:, 2:4] += 1
    assert torch.equal(whole.float().cpu(), expected)
    assert tensors["other"].tolist() == [1, 2, 3, 4, 5]


def test_weights_of_many_sizes_are_all_right():
    generator = torch.Generator("cuda").manual_seed(1)
    tensors = {
        str(size): torch.rand(size, device="cuda", generator=generator)
        for size in (1, 63, 1 << 10, (1 << 20) + 1, 40 << 20)
    }
    shared = share("test", tensors)
    peer = Peer("stay", shared.handles)
    assert peer.answer() == [float(t[0]) for t in tensors.values()]
    peer.tell("go")
    peer.end()


def test_a_hundred_peers_come_and_go_and_leave_nothing():
    """Every second one is killed with everything mapped."""
    tensor = torch.full((128 << 20,), 3, dtype=torch.uint8, device="cuda")
    shared = share("test", {"t": tensor})
    for number in range(102):
        if number == 2:
            # The first two pay for what stays.
            used, descriptors = used_bytes(), len(os.listdir("/proc/self/fd"))
        peer = Peer("stay", shared.handles)
        assert peer.answer() == [3.0]
        if number % 2:
            peer.kill()
        else:
            peer.tell("go")
            peer.end()
    assert used_bytes() - used < SLACK_BYTES
    assert len(os.listdir("/proc/self/fd")) <= descriptors
    assert bool((tensor == 3).all())


def test_opening_and_closing_in_one_process_leaves_nothing():
    shared = share("test", {"t": torch.full((64 << 20,), 2.0, device="cuda")})
    peer = Peer("open_again_and_again", shared.handles)
    first, early, late = peer.answer()
    peer.end()
    assert first == 2.0
    assert late - early < SLACK_BYTES


def test_a_peer_killed_while_it_reads_does_not_hurt_the_owner():
    tensor = torch.ones(64 << 20, device="cuda")
    peer = Peer("read_for_ever", share("test", {"t": tensor}).handles)
    assert peer.answer() == "reading"
    for _ in range(20):
        tensor.mul_(1.0)
    peer.kill()
    assert float(tensor.sum()) == tensor.numel()
    # The context is as it was: new work and new memory are fine.
    assert int(torch.arange(1000, device="cuda").sum()) == 499500


def test_a_dead_owners_memory_is_refused():
    owner = Peer("own", {})
    handles = msgspec.msgpack.decode(owner.answer(), type=Handles)
    importer = Importer()
    assert importer.open(handles["t"]).tolist() == list(range(8))
    importer.close()
    owner.kill()
    with pytest.raises(PeerGoneError, match="gone"):
        Importer().open(handles["t"])


def test_another_gpus_memory_is_refused():
    handle = share("test", {"t": torch.zeros(4, device="cuda")}).handles["t"]
    strange = msgspec.structs.replace(handle.segment, device="no-such-gpu")
    with pytest.raises(SharingError, match="CUDA_VISIBLE_DEVICES"):
        Importer().open(msgspec.structs.replace(handle, segment=strange))


@pytest.mark.parametrize("variable", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_expandable_segments_are_refused_whoever_set_them(variable):
    """By the memory itself, should nobody have looked at the environment."""
    code = (
        "import torch\n"
        "from alchemist.protocol.errors import SharingError\n"
        "from alchemist.protocol.tensors import share\n"
        "try:\n    share('t', {'t': torch.zeros(1 << 20, device='cuda')})\n"
        "except SharingError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {variable: "expandable_segments:True"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "expandable segments" in done.stdout


def test_locked_host_memory_is_copied_without_waiting():
    arena = Arena("test", {"rows": ((1 << 20,), torch.float32)}, populate=True)
    arena.tensors["rows"].fill_(4.0)
    arena.pin()
    assert arena.tensors["rows"].is_pinned()
    on_device = torch.empty(1 << 20, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_device.copy_(arena.tensors["rows"], non_blocking=True)
        on_device.add_(1.0)
        arena.tensors["rows"].copy_(on_device, non_blocking=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert bool((arena.tensors["rows"] == 5.0).all())

"""Segments: one physical copy between processes, no names, refusals that say why."""

import os
import subprocess
import sys

import msgspec
import pytest
import torch

from alchemist.protocol.errors import PeerGoneError
from alchemist.protocol.shm import SegmentHandle, TensorHandle, attach, create
from alchemist.protocol.tensors import Arena, Importer

_CHILD = """
import sys, msgspec
from alchemist.protocol.shm import TensorHandle
from alchemist.protocol.tensors import Importer
handle = msgspec.json.decode(sys.argv[1], type=TensorHandle)
tensor = Importer().open(handle)
assert tensor[1, 2].item() == 5.0, tensor
tensor[0, 0] = 9.0
"""


def test_a_second_process_sees_and_changes_the_same_memory():
    arena = Arena("t", {"a": ((3,), torch.int64), "b": ((2, 4), torch.bfloat16)})
    arena.tensors["b"][1, 2] = 5.0
    handle = msgspec.json.encode(arena.handles["b"]).decode()
    subprocess.run([sys.executable, "-c", _CHILD, handle], check=True, timeout=120)
    assert arena.tensors["b"][0, 0].item() == 9.0
    assert not arena.tensors["a"].any()


def test_no_name_is_left_in_dev_shm():
    before = set(os.listdir("/dev/shm"))
    segment = create("nameless", 1 << 20, populate=True)
    assert segment.handle.nbytes == 1 << 20
    assert set(os.listdir("/dev/shm")) == before


def test_a_segment_cannot_be_shrunk_under_a_peer():
    segment = create("sealed", 4096)
    with pytest.raises(PermissionError):
        os.ftruncate(segment.handle.fd, 0)


def test_a_dead_owner_is_named():
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    handle = SegmentHandle(pid=child.pid, birth=0.0, fd=3, nbytes=4096)
    child.wait()
    with pytest.raises(PeerGoneError, match=str(child.pid)):
        attach(handle)


def test_a_recycled_pid_is_not_the_owner():
    segment = create("mine", 4096)
    stranger = msgspec.structs.replace(segment.handle, birth=segment.handle.birth - 1000)
    with pytest.raises(PeerGoneError, match="not the one"):
        attach(stranger)


def test_empty_tensors_travel_too():
    arena = Arena("e", {"none": ((0, 4), torch.float32), "some": ((2,), torch.float32)})
    handle = arena.handles["none"]
    assert isinstance(handle, TensorHandle)
    assert Importer().open(handle).shape == (0, 4)

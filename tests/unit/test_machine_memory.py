"""Free memory by control groups: of both versions of their file system, nested, and as a container sees them."""

from __future__ import annotations

import psutil
import pytest

from alchemist.server.machine_memory import free_memory_bytes, physical_memory_bytes

GIB = 2**30
V1 = {
    "limit": "memory.limit_in_bytes",
    "usage": "memory.usage_in_bytes",
    "stat": "cache 7\ntotal_cache 9\ntotal_inactive_file {}\n",
}
V2 = {"limit": "memory.max", "usage": "memory.current", "stat": "anon 7\ninactive_file {}\n"}


def group(folder, names, limit, usage, reclaimable=0):
    """The files of one group, as the kernel shows them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names["limit"]).write_text(f"{limit}\n")
    (folder / names["usage"]).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(names["stat"].format(reclaimable))


def machine(root, lines):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(lines)
    return root / "sys/fs/cgroup"


def seen(root):
    return physical_memory_bytes(root), free_memory_bytes(root)


@pytest.mark.parametrize("version", [1, 2])
def test_a_limit_counts_with_what_is_used_but_for_cached_files(tmp_path, version):
    lines = "5:cpu:/a\n4:memory:/a/b\n0::/a/b\n" if version == 1 else "0::/a/b\n"
    top, names = machine(tmp_path, lines), (V1 if version == 1 else V2)
    top = top / "memory" if version == 1 else top
    group(top / "a/b", names, 2 * GIB, GIB, GIB // 2)
    assert seen(tmp_path) == (2 * GIB, 3 * GIB // 2)


def test_the_tightest_of_nested_groups_decides(tmp_path):
    top = machine(tmp_path, "0::/a/b\n")
    group(top / "a/b", V2, "max", GIB // 4)
    group(top / "a", V2, GIB, GIB // 2)
    assert seen(tmp_path) == (GIB, GIB // 2)
    group(top / "a/b", V2, GIB // 2, GIB // 4)
    assert seen(tmp_path) == (GIB // 2, GIB // 4)


def test_a_container_that_is_told_its_hosts_path(tmp_path):
    top = machine(tmp_path, "4:memory:/docker/0a1b\n")
    group(top / "memory", V1, GIB, 0)
    assert seen(tmp_path) == (GIB, GIB)


def test_a_group_that_is_over_its_limit_has_nothing_left(tmp_path):
    group(machine(tmp_path, "0::/\n"), V2, GIB, 2 * GIB)
    assert free_memory_bytes(tmp_path) == 0


@pytest.mark.parametrize("lines", [None, "0::/a\n", "3:cpuset:/\n"])
def test_without_a_limit_it_is_the_machine(tmp_path, lines):
    if lines is not None:
        group(machine(tmp_path, lines) / "a", V2, "max", GIB)
    machine_has = psutil.virtual_memory()
    physical, free = seen(tmp_path)
    assert physical == machine_has.total
    assert free == pytest.approx(machine_has.available, rel=0.2)

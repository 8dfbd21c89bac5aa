"""Which versions are loaded in the engine, whoever uses them. SGLang's own registry of adapters, without its engine."""

import asyncio
from types import SimpleNamespace

import pytest
from sglang.srt.lora.lora_registry import LoRARef, LoRARegistry

from alchemist.server.publisher import Publisher, PublishRefused
from alchemist.server.unloads import Unloads


class Manager:
    """The part of SGLang's TokenizerManager by which adapters leave: as SGLang does it, without the engine behind."""

    def __init__(self, room):
        self.server_args = SimpleNamespace(max_loaded_loras=room)
        self.lora_registry = LoRARegistry()
        self.lora_ref_cache = {}

    async def add(self, version):
        ref = LoRARef(lora_name=f"v{version}", lora_path="/nowhere")
        await self.lora_registry.register(ref)
        self.lora_ref_cache[ref.lora_name] = ref
        return ref.lora_id

    async def unload_lora_adapter(self, request):
        lora_id = await self.lora_registry.unregister(request.lora_name)
        await self.lora_registry.wait_for_unload(lora_id)
        return SimpleNamespace(success=True, error_message="")


async def make(versions, *, keep, room=10):
    manager = Manager(room)
    publisher = Publisher(manager, keep, 0.1)
    for version in versions:
        publisher.loaded[version] = await manager.add(version)
    return manager, publisher


@pytest.mark.parametrize("drift", [-2, -1, 1, 3])
async def test_a_version_goes_whatever_sglang_counts(drift):
    """A client that goes away leaves SGLang's count of users above what it was; `n` samples, below."""
    manager, publisher = await make([1, 2, 3], keep=2)
    counter = manager.lora_registry._counters[publisher.loaded[1]]
    await counter.increment(drift)
    async with asyncio.timeout(1):
        assert await publisher.retire({3}) == [1]
    assert set(publisher.loaded) == {2, 3}
    assert set(manager.lora_registry.get_all_adapters()) == {"v2", "v3"}


async def test_a_version_in_use_stays():
    _, publisher = await make([1, 2, 3], keep=1)
    with publisher.in_use([1, 2]):
        with publisher.in_use([1]):
            assert await publisher.retire({3}) == []
        assert await publisher.retire({3}) == []
    with pytest.raises(GeneratorExit), publisher.in_use([2]):
        raise GeneratorExit
    assert await publisher.retire({3}) == [1, 2]


async def test_nothing_is_loaded_beyond_what_sglang_may_hold(tmp_path):
    """SGLang would take out the adapter used longest ago, and wait for its users with every other load."""
    _, publisher = await make([1, 2, 3], keep=1, room=3)
    publisher.live = 3
    with (
        publisher.in_use([1, 2]),
        pytest.raises(
            PublishRefused, match="all 3 adapters that may be loaded are in use"
        ) as refused,
    ):
        await publisher.load(4, str(tmp_path))
    assert refused.value.is_busy


def test_an_adapter_leaves_the_scheduler_when_nothing_is_computed_with_it():
    """A request whose client has gone is computed for one more step at least, and SGLang would end by it."""
    unloads = Unloads()
    request = SimpleNamespace(lora_id="one")
    loop = SimpleNamespace(
        running_batch=SimpleNamespace(reqs=[]),
        last_batch=None,
        chunked_req=None,
        waiting_queue=[],
        grammar_manager=SimpleNamespace(grammar_queue=[]),
    )
    gone = []

    def original(_, asked):
        gone.append(asked.lora_id)
        return "done"

    assert unloads.ask(original, loop, request) == "done"
    loop.running_batch.reqs.append(SimpleNamespace(lora_id="two"))
    two = SimpleNamespace(lora_id="two")
    assert unloads.ask(original, loop, two).success
    unloads.go_on(loop)
    assert gone == ["one"]
    loop.waiting_queue.append(loop.running_batch.reqs.pop())
    unloads.go_on(loop)
    assert gone == ["one"]
    loop.waiting_queue.clear()
    unloads.go_on(loop)
    unloads.go_on(loop)
    assert gone == ["one", "two"]

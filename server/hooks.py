"""Every place where Alchemist enters SGLang: target, how, and why. There is no other.

A failed hook is only logged by SGLang, so `verify` looks afterwards whether each target is wrapped by ours.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from alchemist.server import cpu_attention, cpu_lora
from alchemist.server.engine import Engine
from alchemist.server.routes import leave_auth_to_guard

_S = "sglang.srt"


class Hook(NamedTuple):
    target: str
    type: str
    """HookType name: BEFORE, AFTER, AROUND."""
    function: Callable[..., Any]


def scheduler_hooks(engine: Engine) -> list[Hook]:
    """The hooks of a scheduler process."""

    def share_kv(original: Any, pool: Any) -> None:
        original(pool)
        engine.share_kv(pool)

    def attach(result: None, runner: Any, *args: Any, **kwargs: Any) -> None:
        # A draft model's activations are nobody's training data.
        if not runner.is_draft_worker:
            engine.attach(runner, *verify(hooks))

    def forward(original: Any, runner: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
        if not engine.begin_forward(forward_batch):
            return original(runner, forward_batch, *args, **kwargs)
        try:
            return original(runner, forward_batch, *args, **kwargs)
        finally:
            engine.end_forward()

    def sample(original: Any, runner: Any, logits_output: Any, forward_batch: Any) -> Any:
        # Before the sampler: it divides by the temperature in place.
        kept = engine.sampled.before(logits_output.next_token_logits)
        token_ids = original(runner, logits_output, forward_batch)
        if kept is not None:
            engine.sampled.after(forward_batch, kept, token_ids)
        return token_ids

    def process_input_requests(original: Any, scheduler: Any, recv_reqs: Any) -> Any:
        engine.on_requests(scheduler, recv_reqs)
        return original(scheduler, recv_reqs)

    def on_idle(original: Any, scheduler: Any) -> Any:
        # Before the original: it sleeps.
        engine.on_idle(scheduler)
        return original(scheduler)

    def release_kv_cache(
        original: Any, req: Any, tree_cache: Any, *args: Any, **kwargs: Any
    ) -> Any:
        has_finished = req.finished()
        if has_finished:
            engine.finished(req, tree_cache)
        result = original(req, tree_cache, *args, **kwargs)
        if has_finished:
            engine.released(req, tree_cache)
        return result

    def unload_lora_adapter(original: Any, scheduler: Any, request: Any) -> Any:
        return engine.unloads.ask(original, scheduler, request)

    runner = f"{_S}.model_executor.model_runner.ModelRunner"
    scheduler = f"{_S}.managers.scheduler.Scheduler"
    hooks = [
        # The KV pool must be in shared memory before anything takes its addresses.
        Hook(
            f"{_S}.mem_cache.memory_pool.MHATokenToKVPool._create_buffers_normal",
            "AROUND",
            share_kv,
        ),
        # First moment at which the model, its LoRA wrappers and the pools all exist.
        Hook(f"{runner}.alloc_memory_pool", "AFTER", attach),
        # Which tokens a forward computes, and into which slots.
        Hook(f"{runner}.forward", "AROUND", forward),
        # The logprobs of what was sampled, before temperature and penalties.
        Hook(f"{runner}.sample", "AROUND", sample),
        # Once a loop: requests revoke the lease; the row desk is served.
        Hook(f"{scheduler}.process_input_requests", "AROUND", process_input_requests),
        # Nothing left to do: the lease is granted.
        Hook(f"{scheduler}.on_idle", "AROUND", on_idle),
        # An adapter goes when nothing is computed with it.
        Hook(f"{scheduler}.unload_lora_adapter", "AROUND", unload_lora_adapter),
        # A request has ended; its tokens, slots and adapter are still together.
        Hook(f"{_S}.mem_cache.common.release_kv_cache", "AROUND", release_kv_cache),
    ]
    if not torch.cuda.is_available():
        # Adapters on a machine without a GPU, at a price that small models can pay.
        lora = cpu_lora.CpuLora()
        manager = f"{_S}.lora.lora_manager.LoRAManager"
        hooks.append(Hook(f"{manager}.prepare_lora_batch", "AROUND", lora.prepare_batch))
        hooks += [
            Hook(f"{_S}.lora.layers.{name}.apply_lora", "AROUND", lora.apply)
            for name in cpu_lora.LINEARS
        ]
        # Attention, likewise.
        attention = cpu_attention.CpuAttention()
        native = f"{_S}.layers.attention.torch_native_backend.TorchNativeAttnBackend"
        hooks += [
            Hook(f"{native}.init_forward_metadata", "AFTER", attention.begin),
            Hook(f"{native}._run_sdpa_forward_extend", "AROUND", attention.extend),
            Hook(f"{native}._run_sdpa_forward_decode", "AROUND", attention.decode),
        ]
    return hooks


def main_hooks(front: Any) -> list[Hook]:
    """The hooks of the HTTP process; `front` is `front.Front`."""
    serving = f"{_S}.entrypoints.openai"
    return [
        # One judge of keys: ours knows our routes, and answers in OpenAI's envelope.
        Hook(f"{_S}.utils.auth.decide_request_auth", "AROUND", leave_auth_to_guard),
        # A child that fails while starting ends the launch in order; SGLang would kill the whole tree, us included.
        Hook(f"{_S}.entrypoints.engine._set_envs_and_config", "AFTER", front.on_launch),
        # Our routes, guard and tasks join the app before uvicorn runs it.
        Hook(f"{_S}.entrypoints.http_server._setup_and_run_http_server", "BEFORE", front.on_setup),
        # Every request passes here: it is given its version and revokes the lease.
        Hook(
            f"{_S}.managers.tokenizer_manager.TokenizerManager.generate_request",
            "AROUND",
            front.generate,
        ),
        # The request's `model` may pin a version.
        Hook(
            f"{serving}.serving_base.OpenAIServingBase._resolve_lora_path",
            "AROUND",
            front.resolve_model,
        ),
        # Streams name their version too.
        Hook(
            f"{serving}.serving_chat.OpenAIServingChat._generate_chat_stream",
            "AROUND",
            front.stream,
        ),
        # Every choice of several can be voted on.
        Hook(
            f"{serving}.serving_chat.OpenAIServingChat._build_chat_response",
            "AROUND",
            front.name_choices,
        ),
        Hook(
            f"{serving}.serving_completions.OpenAIServingCompletion._build_completion_response",
            "AROUND",
            front.name_choices,
        ),
        Hook(
            f"{serving}.serving_completions.OpenAIServingCompletion._generate_completion_stream",
            "AROUND",
            front.stream,
        ),
    ]


def register(hooks: list[Hook]) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for hook in hooks:
        HookRegistry.register(hook.target, hook.function, HookType[hook.type])


def verify(hooks: list[Hook]) -> tuple[list[str], list[str]]:
    """Targets that are wrapped by our function, and those that are not."""
    found: list[str] = []
    missing: list[str] = []
    for hook in hooks:
        (found if _is_wrapped(hook) else missing).append(hook.target)
    return found, missing


def _is_wrapped(hook: Hook) -> bool:
    try:
        function = pkgutil.resolve_name(hook.target)
    except (ImportError, AttributeError):
        return False
    while function is not None:
        cells = getattr(function, "__closure__", None) or ()
        if any(cell.cell_contents == hook.function for cell in cells):
            return True
        function = getattr(function, "__wrapped__", None)
    return False

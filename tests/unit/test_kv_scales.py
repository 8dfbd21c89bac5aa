"""A KV cache whose numbers mean something only together with scales is refused, never read as if there were none."""

from types import SimpleNamespace

import pytest

from alchemist.server.engine import require_unscaled_kv


def runner(dtype, *, scale=None, is_quantized=False):
    def layer(k_scale):
        return SimpleNamespace(self_attn=SimpleNamespace(attn=SimpleNamespace(k_scale=k_scale)))

    return SimpleNamespace(
        model=SimpleNamespace(model=SimpleNamespace(layers=[layer(None), layer(scale)])),
        token_to_kv_pool=SimpleNamespace(is_quantized_kv_cache=is_quantized),
        server_args=SimpleNamespace(kv_cache_dtype=dtype),
    )


@pytest.mark.parametrize("dtype", ["auto", "bf16", "fp8_e5m2"])
def test_plain_numbers_are_fine(dtype):
    require_unscaled_kv(runner(dtype))


@pytest.mark.parametrize("has", [{"scale": 0.5}, {"is_quantized": True}])
def test_scales_are_refused(has):
    with pytest.raises(
        RuntimeError, match="--kv-cache-dtype is 'mxfp8' with scales; allowed: auto, "
    ):
        require_unscaled_kv(runner("mxfp8", **has))

"""The CUDA forward as operations that AOTInductor can put into a package, Triton kernels included.

It calls the launchers of the eager forward through twins whose kernels `torch.library.wrap_triton` shows to the tracer.
Pointers only: neither tensor descriptors nor Gluon kernels can be packaged. Twin: `cuda_forward.py`. Inference only.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import wrap_triton
from triton.runtime.jit import JITFunction

from sla2_compile.kernels import cuda_forward, triton_mixture, triton_router
from sla2_compile.kernels.attention_stage import Outputs
from sla2_compile.kernels.blocked_routing import kept_block_mask, route_means
from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.launch_arguments import padded_dim
from sla2_compile.kernels.settings import Settings, empty_output, empty_saved
from sla2_compile.kernels.triton_mixture import attention_config
from sla2_compile.kernels.triton_router import Choice

Launcher = TypeVar("Launcher")

# Newer tracers follow every way through a kernel's data flow to find what it writes: 3 ** 32 ways in the router's.
ROUTER_IS_TRACEABLE = torch.__version__ < "2.12"


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    proj_q: Tensor | None,
    proj_k: Tensor | None,
    alpha_logit: Tensor | None,
    alpha_gain: Tensor | None,
    settings: Settings,
) -> Tensor:
    """(B, H, N, D) over (B, N, H, D) storage; see `ops.py` for the arguments. Lengths are numbers.

    Raises:
        NotImplementedError: low-bit formats, or a scale that is not positive.
    """
    if settings.is_low_bit:
        raise NotImplementedError("qk_format, pv_format: expected None in a CUDA package, got a low-bit format")
    if settings.scale <= 0:
        raise NotImplementedError(f"scale: expected a positive number in a CUDA package, got {settings.scale}")
    sparse_lse, tail_lse, kept = empty_saved(q, k, settings)
    route: Callable[..., Choice] = _route
    if ROUTER_IS_TRACEABLE:
        route = functools.partial(traceable(triton_router.route), gluon=False)
    inputs = traceable(cuda_forward.prepare)(
        q, k, v, attn_mask, proj_q, proj_k, alpha_logit, alpha_gain, kept, settings, route, copy_engine=False
    )
    out = empty_output(q)
    config = attention_config(padded_dim(q.shape[3]), q.element_size(), q.device, low_bit=False)
    traceable(triton_mixture.attention)(
        Outputs(out, None, sparse_lse, tail_lse), inputs, settings, dataclasses.replace(config, copy_engine=False)
    )
    return out


def _route(
    q_bar: Tensor,
    k_bar: Tensor,
    n: Tensor,
    proj_q: Tensor | None,
    proj_k: Tensor | None,
    kept: Tensor,
    q_len: int,
    kv_len: int,
    settings: Settings,
    *,
    masked: bool,
) -> Choice:
    """`triton_router.route` in ATen."""
    kept.copy_(route_means(q_bar, k_bar, n, proj_q, proj_k, q_len, kv_len, settings))
    num_nonempty = (n > 0).sum(1).int() if masked else None
    return Choice(_pack_bits(kept_block_mask(kept, num_blocks(kv_len, settings.block_k))), num_nonempty)


def _pack_bits(mask: Tensor) -> Tensor:
    """(..., T) bool as `Choice.bits`."""
    missing = -mask.shape[-1] % 64
    words = F.pad(mask, (0, missing), value=True).long().unflatten(-1, (-1, 32))
    return (words << torch.arange(32, device=mask.device)).sum(-1).int()


@functools.cache
def traceable(launcher: Launcher) -> Launcher:
    """A launcher, and what it calls beside it, with kernels that a tracer sees. In Triton's interpreter, the same."""
    assert isinstance(launcher, types.FunctionType)
    names = dict(launcher.__globals__)
    twin: Any = types.FunctionType(
        launcher.__code__, names, launcher.__name__, launcher.__defaults__, launcher.__closure__
    )
    twin.__kwdefaults__ = launcher.__kwdefaults__
    for name in launcher.__code__.co_names:
        value = names.get(name)
        if isinstance(value, JITFunction):
            names[name] = wrap_triton(value)
        elif isinstance(value, types.FunctionType) and value.__module__.startswith("sla2_compile.kernels.triton_"):
            names[name] = traceable(value)
    return twin

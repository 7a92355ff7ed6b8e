"""The operators `sla2::attention`, `sla2::attention_forward` and `sla2::attention_backward`: schemas, fakes, autograd.

`attention` is what graphs show and people call. It checks its arguments, fills in defaults and calls an
`autograd.Function` over the other two, which are opaque to autograd; with its generated vmap rule this is the one
construction that torch.func, torch.compile, checkpointing and torch.export all accept.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor

from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.dispatch import backward_of, forward_of
from sla2_compile.kernels.reference import interpolate_logit
from sla2_compile.kernels.settings import Settings, empty_output, empty_saved
from sla2_compile.quant.formats import statistics_dtype
from sla2_compile.validation import check_attention_arguments, check_settings

_SETTINGS = (
    "float scale, int sparsity_units, int block_q, int block_k, str feature_map, str? qk_format, str? pv_format, "
    "str tail, str mixing, SymInt[]? token_grid, SymInt exact_prefix, SymInt exact_suffix, bool fake_quant=False"
)
_SETTINGS_NAMES = tuple(part.split()[-1].partition("=")[0] for part in _SETTINGS.split(", "))

_library = torch.library.Library("sla2", "DEF")
_library.define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? attn_mask=None, Tensor? proj_q=None, Tensor? proj_k=None, "
    "Tensor? alpha_logit=None, Tensor? alpha_gain=None, *, float? scale=None, bool enable_gqa=False, "
    "int sparsity_units=750000, int block_q=128, int block_k=64, str feature_map='softmax', str? qk_format=None, "
    "str? pv_format=None, str tail='pooled', str mixing='row', SymInt[]? token_grid=None, SymInt exact_prefix=0, "
    "SymInt exact_suffix=0, bool fake_quant=False) -> Tensor"
)
_library.define(
    "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? attn_mask, Tensor? proj_q, Tensor? proj_k, "
    f"Tensor? alpha_logit, Tensor? alpha_gain, bool save_sparse_out, {_SETTINGS}) -> (Tensor out, Tensor sparse_out, "
    "Tensor sparse_lse, Tensor tail_lse, Tensor kept)"
)
_library.define(
    "attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor? attn_mask, Tensor? alpha_logit, "
    "Tensor? alpha_gain, Tensor out, Tensor sparse_out, Tensor sparse_lse, Tensor tail_lse, Tensor kept, "
    f"{_SETTINGS}) -> (Tensor dq, Tensor dk, Tensor dv, Tensor d_logit, Tensor d_gain)"
)


def settings_of(values: tuple[Any, ...]) -> Settings:
    # The dispatcher leaves out a last argument that is its default.
    return Settings(**dict(zip(_SETTINGS_NAMES[: len(values)], values, strict=True)))


# The precision of every step is the implementation's own choice, so autocast must not reach inside.
def _forward(*args: Any) -> tuple[Tensor, ...]:
    device = args[0].device
    with torch.autocast(device.type, enabled=False):
        settings = settings_of(args[9:])
        return forward_of(device, only_rounds=settings.only_rounds)(*args[:9], settings)


def _backward(*args: Any) -> tuple[Tensor, ...]:
    device = args[0].device
    with torch.autocast(device.type, enabled=False):
        return backward_of(device)(*args[:12], settings_of(args[12:]))


def _forward_fake(q: Tensor, k: Tensor, *args: Any) -> tuple[Tensor, ...]:
    save_sparse_out = args[6]
    sparse_out = empty_output(q) if save_sparse_out else q.new_empty(0)
    return empty_output(q), sparse_out, *empty_saved(q, k, settings_of(args[7:]))


def _backward_fake(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: Any) -> tuple[Tensor, ...]:
    kept = args[7]
    statistics = statistics_dtype(q.dtype)
    return (
        *(empty_output(x) for x in (q, k, v)),
        q.new_empty(kept.shape[:3], dtype=statistics),
        q.new_empty(kept.shape[:2], dtype=statistics),
    )


for _name, _kernel, _fake in (
    ("attention_forward", _forward, _forward_fake),
    ("attention_backward", _backward, _backward_fake),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sla2::{_name}", _fake, lib=_library)


def _register_vmap(op: Any, mask_index: int, batched: tuple[int, ...]) -> None:
    """vmap by folding the mapped dimension into the batch; where a tensor without a batch is mapped too, by a loop.

    Args:
        op: the operator.
        mask_index: position of `attn_mask`, whose batch may be 1.
        batched: positions of all arguments that have a batch dimension, q's first.
    """

    def rule(info: Any, in_dims: Any, *args: Any) -> Any:
        size = info.batch_size
        if any(isinstance(dim, int) and i not in batched for i, dim in enumerate(in_dims)):
            elements = [
                [x.select(dim, i) if isinstance(dim, int) else x for x, dim in zip(args, in_dims, strict=True)]
                for i in range(size)
            ]
            results = [op(*element) for element in elements]
            return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])
        mapped = {
            i: args[i].movedim(in_dims[i], 0) if isinstance(in_dims[i], int) else args[i].expand(size, *args[i].shape)
            for i in batched
            if isinstance(args[i], Tensor)
        }
        folded = list(args)
        for i, x in mapped.items():
            if i == mask_index:
                x = x.expand(-1, mapped[batched[0]].shape[1], -1, -1, -1)
            # An output that was not asked for is empty and has no batch.
            folded[i] = x.flatten(0, 1) if x.dim() > 2 else x[0]
        results = op(*folded)
        unfolded = tuple(x.unflatten(0, (size, x.shape[0] // size)) if x.dim() > 1 else x for x in results)
        return unfolded, tuple(0 if x.dim() > 1 else None for x in results)

    torch.library.register_vmap(op.name(), rule, lib=_library)


_register_vmap(torch.ops.sla2.attention_forward.default, 3, (0, 1, 2, 3))
_register_vmap(torch.ops.sla2.attention_backward.default, 4, (0, 1, 2, 3, 4, 7, 8, 9, 10, 11))


class _Backward(torch.autograd.Function):
    """The backward op, which refuses to be differentiated rather than give a silent zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        return torch.ops.sla2.attention_backward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError("sla2::attention has no second derivative; call backward without create_graph=True")


class _Attention(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        return torch.ops.sla2.attention_forward(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        q, k, v, attn_mask, _, _, alpha_logit, alpha_gain = inputs[:8]
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(q, k, v, attn_mask, alpha_logit, alpha_gain, *output)
        ctx.settings = inputs[9:]

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, *_: Any) -> Any:
        q, k, v, attn_mask, alpha_logit, alpha_gain, *saved = ctx.saved_tensors
        # Who does not differentiate once more need not be refused it.
        differentiates = torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()
        call = _Backward.apply if differentiates else torch.ops.sla2.attention_backward
        dq, dk, dv, d_logit, d_gain = call(grad_out, q, k, v, attn_mask, alpha_logit, alpha_gain, *saved, *ctx.settings)
        # Per batch element up to here, so that vmap can tell its elements apart.
        d_logit = None if alpha_logit is None else d_logit.sum(0).to(alpha_logit.dtype)
        d_gain = None if alpha_gain is None else d_gain.sum(0).to(alpha_gain.dtype)
        return dq, dk, dv, None, None, None, d_logit, d_gain, None, *(None for _ in ctx.settings)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast q, k, v come in its dtype, as for F.scaled_dot_product_attention; learned state stays as it is."""
    device_type = tensors[0].device.type
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x if x.dtype == torch.float64 or not x.is_floating_point() else x.to(dtype) for x in tensors)


@functools.cache
def _register_sharding_rules() -> None:
    # Importing DTensor takes half a second, so it waits until the program has done so.
    from sla2_compile.sharding import register_sharding_rules

    register_sharding_rules()


def attention_implementation(*args: Any, **kwargs: Any) -> Tensor:
    """`sla2::attention`, from its arguments."""
    arguments = forward_arguments(*args, **kwargs)
    needs_grad = arguments[8]
    if not needs_grad and not torch._C._are_functorch_transforms_active():
        # What autograd and torch.func would do costs as much as two launches.
        return torch.ops.sla2.attention_forward(*arguments)[0]
    return _Attention.apply(*arguments)[0]


def forward_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    proj_q: Tensor | None = None,
    proj_k: Tensor | None = None,
    alpha_logit: Tensor | None = None,
    alpha_gain: Tensor | None = None,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    sparsity_units: int = 750_000,
    block_q: int = 128,
    block_k: int = 64,
    feature_map: str = "softmax",
    qk_format: str | None = None,
    pv_format: str | None = None,
    tail: str = "pooled",
    mixing: str = "row",
    token_grid: list[int] | None = None,
    exact_prefix: int = 0,
    exact_suffix: int = 0,
    fake_quant: bool = False,
) -> tuple[Any, ...]:
    """What `sla2::attention_forward` takes for these arguments of `sla2::attention`, which are checked here."""
    if "torch.distributed.tensor" in sys.modules:
        _register_sharding_rules()
    q, k, v = _autocast(q, k, v)
    check_settings(
        sparsity_units=sparsity_units, token_grid=token_grid, exact_prefix=exact_prefix, exact_suffix=exact_suffix,
        block_q=block_q, block_k=block_k, feature_map=feature_map, qk_format=qk_format, pv_format=pv_format,
        tail=tail, mixing=mixing, fake_quant=fake_quant,
    )  # fmt: skip
    check_attention_arguments(
        q, k, v, attn_mask, proj_q, proj_k, alpha_logit, alpha_gain,
        enable_gqa=enable_gqa, mixing=mixing, token_grid=token_grid,
        exact_prefix=exact_prefix, exact_suffix=exact_suffix,
        number_formats=(None, None) if fake_quant else (qk_format, pv_format),
    )  # fmt: skip
    statistics = statistics_dtype(q.dtype)
    if alpha_logit is not None:
        alpha_logit = interpolate_logit(alpha_logit.to(statistics), num_blocks(q.shape[2], block_q))
    if alpha_gain is not None:
        alpha_gain = alpha_gain.to(statistics)
    differentiable = (q, k, v, alpha_logit, alpha_gain)
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in differentiable)
    return (
        q, k, v, attn_mask, proj_q, proj_k, alpha_logit, alpha_gain, needs_grad,
        q.shape[3] ** -0.5 if scale is None else scale, sparsity_units, block_q, block_k, feature_map,
        qk_format, pv_format, tail, mixing, token_grid, exact_prefix, exact_suffix, fake_quant,
    )  # fmt: skip


_library.impl("attention", attention_implementation, "CompositeImplicitAutograd")

"""SLA2 attention as a graph of ATen that does the kept work only, for export: no loop in Python, no look at data.

The heads of k and v are visited by a `scan`, which exporters keep as a loop, so that the keys and values that the query
blocks gather exist for one head at a time: for k and for v `num_kept * block_k / block_q` times the size of that head's
q. Lengths may be symbolic. Twin: `reference.attention`. Inference only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

# Its import registers torch.ops.higher_order.scan.
import torch._higher_order_ops.scan  # isort: skip

from sla2_compile.kernels.blocked import KeyHead, block_head, forward_rows, linear_blocks, visit, with_rounded_values
from sla2_compile.kernels.blocked_routing import route
from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.reference import split_blocks
from sla2_compile.kernels.settings import Settings, row_gain
from sla2_compile.kernels.token_order import inverse_order


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
    *,
    fused: bool,
    loop: bool = True,
) -> Tensor:
    """The output (B, H, N, D), over (B, N, H, D) storage.

    Args:
        q, k, v, attn_mask, proj_q, proj_k, alpha_logit, alpha_gain: as `sla2::attention_forward` takes them.
        settings: the op's.
        fused: leave softmax attention over gathered keys to PyTorch's kernel for the CPU.
        loop: visit one head of k at a time; otherwise all at once, in that many times the memory. Without a loop
            lengths must be numbers.
    """
    (batch, heads, q_len, dim), (_, key_heads, kv_len, _) = q.shape, k.shape
    # With a mask a row may see nothing, for which this operator has no zero.
    if attn_mask is None and _keeps_everything(kv_len, settings):
        return tokens_first(
            F.scaled_dot_product_attention(q, k, v, scale=settings.scale, enable_gqa=heads != key_heads)
        )
    flat, group = batch * key_heads, heads // key_heads
    rows = num_blocks(q_len, settings.block_q)
    inputs = visit(q, k, v, attn_mask, settings)
    gain = row_gain(q, alpha_gain, settings)
    per_head = {
        "q": inputs.q.reshape(flat, group, q_len, dim),
        "k": inputs.k.reshape(flat, kv_len, dim),
        "v": inputs.v.reshape(flat, kv_len, dim),
        "real": inputs.real[:, None].expand(-1, key_heads, -1).flatten(0, 1),
        "n": inputs.n[:, None].expand(-1, key_heads, -1).flatten(0, 1),
        "logit": None if alpha_logit is None else alpha_logit.view(key_heads, group, rows).repeat(batch, 1, 1),
        "gain": None if gain is None else gain.view(key_heads, group).repeat(batch, 1),
    }
    exact = {name: getattr(settings, name) for name in ("exact_prefix", "exact_suffix")}
    masked, has_padding = attn_mask is not None, inputs.has_padding

    def one_head(x: dict[str, Any]) -> Tensor:
        own = dataclasses.replace(settings, exact_prefix=x["exact_prefix"], exact_suffix=x["exact_suffix"])
        head = block_head(x["k"], x["v"], x["real"], x["n"], own, masked=masked, has_padding=has_padding)
        rows = _Rows(x["q"], head, x["n"], x["proj_q"], x["proj_k"], x["logit"], x["gain"], own, fused)
        return rows.forward(x["k"].shape[0])

    shared = {"proj_q": proj_q, "proj_k": proj_k, **exact, "q_len": q_len, "kv_len": kv_len}
    out = _map_heads(one_head, per_head, shared) if loop else _batch_heads(one_head, per_head, shared)
    out = out.view(batch, heads, rows * settings.block_q, dim)
    # Padding by less than nothing, since a slice would have the smaller of two symbolic lengths.
    out = F.pad(out, (0, 0, 0, q_len - rows * settings.block_q))
    return tokens_first(out if inputs.order is None else out[:, :, inverse_order(inputs.order)])


def _keeps_everything(kv_len: int, settings: Settings) -> bool:
    """Whether this is dense attention at full precision."""
    keeps_all = settings.num_kept(kv_len) == num_blocks(kv_len, settings.block_k)
    return statically_known_true(keeps_all) and settings.qk_format is None and settings.pv_format is None


def tokens_first(x: Tensor) -> Tensor:
    """`x` (B, H, N, D) over (B, N, H, D) storage, which models read next."""
    # A copy in any case: asking whether one is needed would fix a symbolic length.
    return x.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


HeadFunction = Callable[[dict[str, Any]], Tensor]


def _map_heads(function: HeadFunction, per_head: dict[str, Tensor | None], shared: dict[str, Any]) -> Tensor:
    """`function` of every head's tensors and of what all heads share, stacked; a loop in the graph."""
    names = [name for name, x in per_head.items() if x is not None]
    others = [name for name, x in shared.items() if isinstance(x, (Tensor, torch.SymInt))]
    constants = {name: x for name, x in {**per_head, **shared}.items() if name not in (*names, *others)}

    def step(count: Tensor, index: Tensor, *operands: Any) -> tuple[Tensor, Tensor]:
        of_head = {name: x.index_select(0, index.view(1))[0] for name, x in zip(names, operands, strict=False)}
        of_all = dict(zip(others, operands[len(names) :], strict=True))
        return count + 1, function({**constants, **of_head, **of_all})

    # Read by index and not scanned, since Inductor would copy in every step all that it scans; and cloned, since a loop
    # takes no two tensors that share memory, as q, k and v of one projection do.
    operands = [per_head[name] for name in names] + [shared[name] for name in others]
    operands = [x.clone(memory_format=torch.contiguous_format) if isinstance(x, Tensor) else x for x in operands]
    q = operands[0]
    count, index = torch.zeros((), dtype=torch.int64, device=q.device), torch.arange(q.shape[0], device=q.device)
    # The operator itself, and not the function around it, which would trace the step with Dynamo.
    _, out = torch.ops.higher_order.scan(step, [count], [index], tuple(operands))
    return out


def _batch_heads(function: HeadFunction, per_head: dict[str, Tensor | None], shared: dict[str, Any]) -> Tensor:
    """The same for all heads at once."""
    mapped = {name: x for name, x in per_head.items() if x is not None}
    missing = {name: None for name in per_head if name not in mapped}
    return torch.vmap(lambda x: function({**missing, **shared, **x}))(mapped)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The query heads that share a head of k and v, and what their rows need."""

    q: Tensor  # (group, N, D)
    head: KeyHead
    n: Tensor  # (T,) real tokens of each key block
    proj_q: Tensor | None
    proj_k: Tensor | None
    logit: Tensor | None  # (group, M)
    gain: Tensor | None  # (group,)
    settings: Settings
    fused: bool

    def forward(self, kv_len: int) -> Tensor:
        """The output (group, M * block_q, D)."""
        settings, q_len = self.settings, self.q.shape[1]
        exact, suffix = settings.exact_queries(q_len, kv_len), settings.exact_suffix
        first, last, rows = exact.num_first, exact.last_start, exact.num_blocks
        kept = route(
            self.q[None], self.head.k_bar[None, None], self.n[None], self.proj_q, self.proj_k, kv_len, settings
        )[0]
        q = split_blocks(self.q, settings.block_q)
        parts = [] if statically_known_true(first == 0) else [self._part(q, kept, 0, first, keeps_all=True)]
        if statically_known_true(last == rows):
            parts.append(self._part(q, kept, first, rows))
        elif not any(isinstance(x, torch.SymInt) for x in (last, rows)):
            parts += [self._part(q, kept, first, last)] if last > first else []
            parts.append(self._part(q, kept, last, rows, keeps_all=True))
        else:
            # How many blocks the suffix touches depends on where it begins: compute as many as it may, then choose.
            some = self._part(q, kept, first, rows)
            start = rows - num_blocks(suffix + settings.block_q - 1, settings.block_q)
            exact_part = self._part(q, kept, start, rows, keeps_all=True)
            row = torch.arange(rows, device=q.device)[start:, None, None]
            parts.append(some[:, : start - first])
            parts.append(torch.where(row >= last, exact_part, some[:, start - first :]))
        out = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        return out.flatten(1, 2)

    def _part(self, q: Tensor, kept: Tensor, start: int, end: int, *, keeps_all: bool = False) -> Tensor:
        """The output (group, end - start, block_q, D) of some query blocks."""
        group, size, block_q, dim = q.shape[0], end - start, *q.shape[2:]
        values = with_rounded_values(self.head, self.settings)
        linear = linear_blocks(self.head, self.settings) if self.settings.tail == "linear" and not keeps_all else None
        out, *_ = forward_rows(
            q[:, start:end].reshape(group * size, block_q, dim),
            self.head,
            values,
            linear,
            kept[:, start:end].flatten(0, 1),
            None if self.logit is None else self.logit[:, start:end].reshape(group * size, 1),
            None if self.gain is None else self.gain[:, None].expand(group, size).reshape(group * size, 1),
            keeps_all,
            self.settings,
            fused=self.fused,
        )
        return out.view(group, size, block_q, dim)

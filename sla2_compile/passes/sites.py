"""`Site`: one attention of a model, what was decided about it and why."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch.fx import GraphModule, Node

from sla2_compile.config import SLA2Config
from sla2_compile.kernels.blocks import delivered_sparsity, exact_query_blocks, max_kept_blocks, num_blocks
from sla2_compile.passes.axes import Axis
from sla2_compile.passes.proposals import Proposal

Verdict = Literal["sla2", "dense"]


@dataclass
class Binding:
    """The module call that a site was traced in, where that module is marked by `prepare`.

    Args:
        name: path of the module, known in dry runs only; blocks that share a graph have none.
        ordinal: which attention call of that module call the site is.
        num_calls: how many it has.
        calibrated_sparsity: what the site's learned state was calibrated for and runs at; None without such state.
    """

    name: str
    ordinal: int
    num_calls: int
    calibrated_sparsity: float | None = None


@dataclass(frozen=True)
class TokenLayout:
    """What the graph shows of a site's sequence.

    Args:
        prefix: the parts that were joined before the video or picture: text.
        suffix: the parts that were joined after it.
        grid: frames, height and width of the video or picture; None where the graph does not show them.
    """

    prefix: tuple[Axis, ...] = ()
    suffix: tuple[Axis, ...] = ()
    grid: tuple[Axis, Axis, Axis] | None = None


@dataclass
class Site:
    """One attention in a traced graph, called as scaled dot product attention or spelled otherwise.

    Args:
        name: path of the module that owns the call (`blocks.0.attn1`); `#1` and so on for its further calls.
        owner: the graph that holds `node`.
        node: the attention node; after the rewrite, the one that replaced it. Where the site stays dense and is spelled
            otherwise, the node that gives its output.
        arguments: its arguments by the names of F.scaled_dot_product_attention, nodes and constants; empty where the
            graph does not hold all of it.
        q_shape: (B, H, N, D) of the queries, plain or symbolic integers; of another rank where it is no batch of heads.
        kv_len: number of keys.
        layout: what the graph shows of its tokens.
        query_mask: (B, 1, N, 1) bool, True where a query sees its keys, the others give 0; None where all do.
        proposal: how the model spells it, and the SDPA node that would stand for it; None where it calls SDPA itself.
        verdict: "sla2" or "dense"; "dense" until `decide` has seen it.
        reason: why, in plain words.
        asked_for: the config names it or it is long enough, so `strict` insists on it.
        config: what it is converted with; differs from the user's where a setting does not apply here.
        binding: the marked module call it belongs to; None where there is none.
    """

    name: str
    owner: GraphModule
    node: Node
    arguments: dict[str, Any]
    q_shape: tuple[Any, ...]
    kv_len: Any
    proposal: Proposal | None = None
    query_mask: Node | None = None
    layout: TokenLayout = TokenLayout()
    verdict: Verdict = "dense"
    reason: str = "not looked at"
    asked_for: bool = False
    config: SLA2Config | None = None
    binding: Binding | None = None

    @property
    def requested_sparsity(self) -> float:
        """What the config asks for; 0 where the site stays dense."""
        return self.config.sparsity if self.config is not None and self.verdict == "sla2" else 0.0

    @property
    def formats(self) -> str:
        """Low-bit formats of Q K^T and P V, "" where there are none."""
        if self.config is None or self.verdict == "dense":
            return ""
        formats = (("QK", self.config.qk_format), ("PV", self.config.pv_format))
        named = [f"{product} {name}" for product, name in formats if name is not None]
        return ", ".join(named) + (" (fake-quantised)" if named and self.config.fake_quant else "")

    @property
    def has_own_sparsity(self) -> bool:
        """Whether a pattern of the config chose its sparsity."""
        patterns = () if self.config is None else self.config.site_sparsity
        return any(fnmatchcase(self.name, pattern) for pattern, _ in patterns)

    @property
    def delivered_sparsity(self) -> float:
        """Fraction of block pairs that skip the exact branch, after rounding and exact tokens; 0 where dense."""
        if self.config is None or self.verdict == "dense":
            return 0.0
        return delivered_sparsity(size_hint(self.q_shape[2]), size_hint(self.kv_len), self.config)

    @property
    def flops_dense(self) -> int:
        """Multiplications and additions of Q K^T and P V over all keys."""
        if len(self.q_shape) != 4:
            return 0
        batch, heads, q_len, dim = map(size_hint, self.q_shape)
        return 4 * batch * heads * q_len * size_hint(self.kv_len) * dim

    @property
    def flops_sla2(self) -> int:
        """The same for the router, the kept blocks and the tail; `flops_dense` where the site stays dense."""
        if self.config is None or self.verdict == "dense":
            return self.flops_dense
        config, (batch, heads, q_len, dim) = self.config, map(size_hint, self.q_shape)
        kv_len = size_hint(self.kv_len)
        rows, total = num_blocks(q_len, config.block_q), num_blocks(kv_len, config.block_k)
        exact = config.exact_prefix, config.exact_suffix
        all_rows = exact_query_blocks(q_len, kv_len, config.block_q, *exact).count
        slots = max_kept_blocks(kv_len, config.block_k, config.sparsity_units, *exact)
        pairs = all_rows * total + (rows - all_rows) * slots
        sparse = 4 * pairs * config.block_q * config.block_k * dim
        router = 2 * rows * total * dim
        pooled = 4 * q_len * total * dim
        linear = 4 * (q_len + kv_len) * dim * dim + (pooled // 2 if config.mixing == "row" else 0)
        tail = pooled if config.tail == "pooled" else linear
        # Padding of the last blocks can make tiny or exact sites exceed dense attention; the estimate says so.
        return batch * heads * (sparse + router + tail)


def size_hint(size: Any) -> int:
    """A plain integer for a size that may be symbolic: the one it was traced with, or the largest it can be."""
    if isinstance(size, int):
        return size
    if size.node.hint is not None:
        return int(size.node.hint)
    bounds = size.node.shape_env.bound_sympy(size.node.expr)
    return int(bounds.upper) if bounds.upper.is_finite and bounds.upper < sys.maxsize else int(bounds.lower)

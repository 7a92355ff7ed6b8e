"""Decide for every site whether it becomes SLA2, with the reason.

Nothing here fixes a symbolic length: comparing lengths adds a guard at most, and a length that only the run knows
leaves the site dense.
"""

from __future__ import annotations

import dataclasses
import math
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, guard_or_false

from sla2_compile.config import SLA2Config
from sla2_compile.passes.edit_graph import example_value
from sla2_compile.passes.read_layout import num_tokens
from sla2_compile.passes.sites import Site, size_hint
from sla2_compile.validation import DTYPES, MAX_HEAD_DIM, MIN_HEAD_DIM


def decide(sites: list[Site], config: SLA2Config) -> int:
    """Set verdict, reason and config of every site; how many become SLA2."""
    for site in sites:
        not_chosen = _not_chosen(site.name, config)
        unfit, too_short = _tensor_obstacle(site), None
        if unfit is None:
            too_short = _too_short(site, config)
        obstacle = not_chosen or unfit or too_short or _call_obstacle(site) or _exact_tokens_obstacle(site, config)
        # Short attention is not what the backend is for, so `strict` minds it only where a pattern names it.
        site.asked_for = not_chosen is None and (bool(config.include) or too_short is None)
        if obstacle is None:
            site.verdict, (site.config, site.reason) = "sla2", _fit_layout(site, _site_config(site.name, config))
        else:
            site.verdict, site.reason = "dense", obstacle
    return sum(site.verdict == "sla2" for site in sites)


def check_patterns(names: list[str], config: SLA2Config) -> None:
    """Raise ValueError for a pattern of the config that matches none of the names of all sites of a model."""
    patterns = {"include": config.include, "exclude": config.exclude, "site_sparsity": dict(config.site_sparsity)}
    for option, given in patterns.items():
        for pattern in given:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"{option}: expected patterns that match attention sites, got {pattern!r}, which matches none of "
                    f"{', '.join(dict.fromkeys(names)) or 'no sites'}; parts of a model that are compiled on their own "
                    "have names of their own"
                )


def _site_config(name: str, config: SLA2Config) -> SLA2Config:
    """The config with the sparsity that the first matching pattern gives this site."""
    for pattern, sparsity in config.site_sparsity:
        if fnmatchcase(name, pattern):
            return dataclasses.replace(config, sparsity=sparsity)
    return config


def _not_chosen(name: str, config: SLA2Config) -> str | None:
    for pattern in config.exclude:
        if fnmatchcase(name, pattern):
            return f"excluded by {pattern!r}"
    if config.include and not any(fnmatchcase(name, pattern) for pattern in config.include):
        return f"not among include={list(config.include)}"
    return None


def _tensor_obstacle(site: Site) -> str | None:
    """What about q, k and v the op cannot take."""
    if not site.arguments:
        assert site.proposal is not None
        return site.proposal.obstacle
    q, k, v = (example_value(site.arguments[name]) for name in ("query", "key", "value"))
    if not q.dim() == k.dim() == v.dim() == 4:
        return f"q, k, v have {q.dim()}, {k.dim()}, {v.dim()} dimensions, expected 4 (batch, heads, tokens, head dim)"
    if q.dtype not in DTYPES:
        return f"dtype {q.dtype} is not a floating one that the op takes"
    if any(free_unbacked_symbols(x.shape[dim]) for x in (q, k, v) for dim in (0, 1, 3)):
        return "its batch, heads or head dim are known only at run time (an unbacked symbol)"
    # A head dim belongs to the model, not to the input: fixing a symbolic one is right, unlike a length.
    dim = int(q.shape[3])
    if not MIN_HEAD_DIM <= dim <= MAX_HEAD_DIM:
        return f"head dim {dim} is outside {MIN_HEAD_DIM} to {MAX_HEAD_DIM}"
    if int(v.shape[3]) != dim:
        return f"v's head dim {int(v.shape[3])} differs from q's {dim}"
    if not guard_or_false(q.shape[0] == k.shape[0]) or not guard_or_false(k.shape[0] == v.shape[0]):
        return "q, k and v have different batch sizes, which attention broadcasts"
    if not guard_or_false(k.shape[1] == v.shape[1]):
        return "k and v have different numbers of heads"
    if not site.arguments["enable_gqa"] and not guard_or_false(q.shape[1] == k.shape[1]):
        return "q and k have different numbers of heads, which attention broadcasts"
    return None


def _call_obstacle(site: Site) -> str | None:
    """What about the call's other arguments the op cannot take."""
    arguments = site.arguments
    if site.proposal is not None and site.proposal.obstacle is not None:
        return site.proposal.obstacle
    if isinstance(arguments["dropout_p"], Node) or arguments["dropout_p"] != 0:
        return "dropout in training"
    if arguments["is_causal"] is not False:
        return "causal"
    if isinstance(arguments["scale"], Node):
        return "its scale is computed at run time"
    if arguments["attn_mask"] is None:
        return None
    return _mask_obstacle(example_value(arguments["attn_mask"]), site.kv_len)


def _mask_obstacle(mask: Tensor, kv_len: Any) -> str | None:
    if mask.dtype.is_floating_point:
        return f"an additive mask or bias of shape {_shape(mask)}"
    is_padding = mask.dim() == 4 and guard_or_false(mask.shape[1] == 1) and guard_or_false(mask.shape[2] == 1)
    if not is_padding or not guard_or_false(mask.shape[3] == kv_len):
        return f"a mask of shape {_shape(mask)}; expected one for the keys alone, (batch, 1, 1, keys)"
    return None


def _too_short(site: Site, config: SLA2Config) -> str | None:
    q_len, kv_len = site.q_shape[2], site.kv_len
    if not guard_or_false(kv_len >= config.min_seq_len):
        kind = "cross-attention to " if size_hint(q_len) > size_hint(kv_len) else ""
        return f"{kind}{_count(size_hint(kv_len), 'key', 'keys')}, fewer than min_seq_len={config.min_seq_len}"
    if not guard_or_false(q_len >= config.min_seq_len):
        return f"{_count(size_hint(q_len), 'query', 'queries')}, fewer than min_seq_len={config.min_seq_len}"
    return None


def _exact_tokens_obstacle(site: Site, config: SLA2Config) -> str | None:
    exact = config.exact_prefix + config.exact_suffix
    if exact and not guard_or_false(site.kv_len >= exact):
        return f"{size_hint(site.kv_len)} keys, fewer than the {exact} tokens of exact_prefix and exact_suffix"
    return None


def _fit_layout(site: Site, config: SLA2Config) -> tuple[SLA2Config, str]:
    """The config for this site, with the exact tokens and the token grid that fit its sequence; and the reason to show.

    What the user gives goes before what the graph shows.
    """
    reason = "eligible"
    exact_tokens: Any = config.exact_prefix + config.exact_suffix
    if not exact_tokens:
        layout = site.layout
        prefix, suffix = num_tokens(layout.prefix), num_tokens(layout.suffix)
        config = dataclasses.replace(config, exact_prefix=prefix, exact_suffix=suffix)
        exact = [_ends(where, count) for where, count in (("first", prefix), ("last", suffix)) if count]
        reason += f", keeping {' and '.join(exact)} exact" if exact else ""
        # As symbols, so that no guard fixes them.
        exact_tokens = sum(part.size for part in (*layout.prefix, *layout.suffix))
    sizes = config.token_grid or (site.layout.grid and tuple(axis.size for axis in site.layout.grid))
    if sizes is None:
        has_one_order = guard_or_false(site.q_shape[2] == site.kv_len)
        note = "token grid unknown" if has_one_order else "queries and keys are not the same tokens"
        return config, f"{reason}, in raster order ({note})"
    t, h, w = map(size_hint, sizes)
    length = math.prod(sizes) + exact_tokens
    if guard_or_false(site.q_shape[2] == length) and guard_or_false(site.kv_len == length):
        return dataclasses.replace(config, token_grid=(t, h, w)), f"{reason}, in tiles of the {t} x {h} x {w} grid"
    note = f"token grid {t} x {h} x {w} is not that of {size_hint(site.kv_len) - size_hint(exact_tokens)} tokens"
    return dataclasses.replace(config, token_grid=None), f"{reason}, in raster order ({note})"


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _ends(where: str, count: int) -> str:
    return f"the {where} token" if count == 1 else f"the {where} {count} tokens"


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(size_hint(size) for size in x.shape)

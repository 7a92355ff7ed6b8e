"""What the backward's kernels compile to without a GPU: every kernel with the arguments that a launch would give it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton

from sla2_compile.kernels import (
    triton_backward_keys,
    triton_backward_linear_keys,
    triton_backward_linear_queries,
    triton_backward_means,
    triton_backward_queries,
    triton_backward_rows,
    triton_backward_tail,
    triton_inverse_index,
)

# Arguments by name; other pointers have the inputs' dtype, other numbers are int32.
_FLOAT_POINTERS = (
    "sparse_lse_ptr", "tail_lse_ptr", "lse_ptr", "cap_ptr", "offset_ptr", "sparse_cap_ptr", "tail_offset_ptr",
    "weight_ptr", "product_ptr", "rows_ptr", "n_ptr", "k_mean_ptr", "dk_bar_ptr", "dv_bar_ptr", "correction_ptr",
    "partial_ptr", "z_ptr", "dz_ptr", "dk_sum_ptr", "logit_ptr", "gain_ptr", "d_logit_ptr", "d_gain_ptr",
)  # fmt: skip
_INT_POINTERS = (
    "kept_ptr", "bits_ptr", "order_ptr", "count_ptr", "start_ptr", "lists_ptr", "first_part_ptr", "part_key_ptr",
    "num_nonempty_ptr",
)  # fmt: skip
_FLOATS = ("scale", "factor", "value")
# What a plain launch has no use for.
_OPTIONAL = ("real_ptr", "order_ptr", "num_nonempty_ptr", "k_mean_ptr", "correction_ptr")


@dataclass(frozen=True)
class OfflineVariant:
    """Arguments of `ASTSource` and the options of one compilation."""

    name: str
    function: Any  # the jit function
    signature: dict[str, str]
    constexprs: dict[str, Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]  # what divides pointers and strides by 16
    num_warps: int
    num_stages: int


def _variant(
    name: str,
    function: Any,
    dtype: str,
    constants: dict[str, Any],
    *,
    present: tuple[str, ...] = (),
    num_warps: int = 4,
    num_stages: int = 3,
) -> OfflineVariant:
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    constexprs = dict(constants)
    for i, parameter in enumerate(function.params):
        argument = parameter.name
        if parameter.is_constexpr or (argument in _OPTIONAL and argument not in present):
            signature[argument] = "constexpr"
            constexprs.setdefault(argument, None)
        elif argument.endswith("_ptr"):
            kind = "fp32" if argument in _FLOAT_POINTERS else "i32" if argument in _INT_POINTERS else dtype
            signature[argument] = "*i1" if argument == "real_ptr" else "*" + kind
            attributes[i,] = [["tt.divisibility", 16]]
        elif argument in _FLOATS:
            signature[argument] = "fp32"
        else:
            signature[argument] = "i32"
            if argument.endswith(("_sb", "_sh", "_sn")):
                attributes[i,] = [["tt.divisibility", 16]]
    constexprs = {argument: constexprs[argument] for argument, kind in signature.items() if kind == "constexpr"}
    return OfflineVariant(name, function, signature, constexprs, attributes, num_warps, num_stages)


def _attention_variants(dim: int, dtype: str, shared_memory: int, options: dict[str, Any]) -> list[OfflineVariant]:
    """The kernels whose work is matmuls, for one head dim and dtype; `options` names the tail and what is optional."""
    block_d, itemsize = max(16, triton.next_power_of_2(dim)), 4 if dtype == "fp32" else 2
    tail, present = options["tail"], options["present"]
    linear, masked = tail == "linear", "real_ptr" in present
    label = f"{dtype} D={dim} {tail}{''.join(' ' + x.removesuffix('_ptr') for x in present)}"
    sizes = {"D": dim, "BLOCK_D": block_d, "PRECISION": "ieee" if dtype == "fp32" else "tf32"}
    if linear:
        present = (*present, "k_mean_ptr", "correction_ptr")
    queries = triton_backward_queries.queries_config(dim, itemsize, shared_memory)
    tails = triton_backward_tail.tail_config(dim, itemsize, shared_memory)
    keys = triton_backward_keys.keys_config(dim, itemsize, shared_memory)
    found = [
        _variant(
            f"queries {label}",
            triton_backward_queries._queries_kernel,
            dtype,
            sizes
            | {"BLOCK_Q": 128, "BLOCK_K": 64, "ROWS": queries.rows, "KEYS": queries.keys, "MEANS": queries.keys}
            | {"RAGGED": not masked, "POOLED": True, "VALUES": not linear, "ACCUMULATE": linear, "CAP": False}
            | {"STAGES": queries.num_stages},
            present=present,
            num_warps=queries.num_warps,
        ),
        _variant(
            f"tail {label}",
            triton_backward_tail._tail_kernel,
            dtype,
            sizes
            | {"GROUP": 1, "BLOCK_Q": 128, "ROWS": tails.rows, "MEANS": tails.means, "VALUES": not linear}
            | {"STAGES": tails.num_stages},
            present=present,
            num_warps=tails.num_warps,
        ),
        _variant(
            f"keys {label}",
            triton_backward_keys._keys_kernel,
            dtype,
            sizes
            | {"GROUP": 1, "BLOCK_Q": 128, "BLOCK_K": 64, "ROWS": keys.rows, "KEYS": keys.keys, "SPLITS": 8}
            | {"ACCUMULATE": linear, "CAP": False, "STAGES": keys.num_stages},
            present=present,
            num_warps=keys.num_warps,
        ),
    ]
    if not linear:
        return found
    config = triton_backward_linear_keys.linear_config(dim, itemsize, shared_memory)
    values = sizes | {"BLOCK_Q": 128, "BLOCK_K": 64, "ROWS": config.rows, "KEYS": config.rows}
    values |= {"VALUES": config.values, "MAP": "softmax"}
    for name, function in (
        ("linear dq", triton_backward_linear_queries._query_kernel),
        ("linear dH", triton_backward_linear_queries._state_kernel),
        ("linear h", triton_backward_linear_keys._state_kernel),
        ("linear dk dv", triton_backward_linear_keys._gradient_kernel),
    ):
        constants = {p.name: values[p.name] for p in function.params if p.is_constexpr}
        variant = _variant(f"{name} {label}", function, dtype, constants, present=present, num_warps=config.num_warps)
        found.append(variant)
    return found


def offline_variants(shared_memory: int = 227 * 1024) -> list[OfflineVariant]:
    """Every kernel of the backward, for a GPU with so many bytes of shared memory per program."""
    found = [
        _variant("bits", triton_inverse_index._bits_kernel, "i32", {"SLOT_TILE": 16, "WORD_TILE": 16}, num_warps=1),
        _variant("count", triton_inverse_index._count_kernel, "i32", {"ROW_TILE": 256}),
        _variant("plan", triton_inverse_index._plan_kernel, "i32", {"TILE": 1024}),
        _variant("fill", triton_inverse_index._fill_kernel, "i32", {"ROW_TILE": 128}),
        _variant("tail mask", triton_inverse_index._tail_mask_kernel, "bf16", {"TILE": 512}),
    ]
    for dim in (64, 72, 96, 128, 192, 256):
        block_d = triton.next_power_of_2(dim)
        for dtype in ("bf16", "fp16", "fp32"):
            sizes = {"D": dim, "BLOCK_D": block_d}
            rows = sizes | {"BLOCK_Q": 128, "TILE": 16 if dim > 128 else 32, "LINEAR": False, "CAP": False}
            means = sizes | {"BLOCK_K": 64, "TILE": 64}
            parts = sizes | {"BLOCK_K": 64, "KEYS": 32, "SPLITS": 8, "ACCUMULATE": False}
            label = f"{dtype} D={dim}"
            found += [
                _variant(f"rows {label}", triton_backward_rows._rows_kernel, dtype, rows),
                _variant(f"means {label}", triton_backward_means._means_kernel, dtype, means),
                _variant(f"parts {label}", triton_backward_keys._parts_kernel, dtype, parts),
            ]
            found += _attention_variants(dim, dtype, shared_memory, {"tail": "pooled", "present": ()})
            found += _attention_variants(dim, dtype, shared_memory, {"tail": "linear", "present": ()})
    options = {"tail": "pooled", "present": ("real_ptr", "order_ptr")}
    return found + _attention_variants(128, "bf16", shared_memory, options)

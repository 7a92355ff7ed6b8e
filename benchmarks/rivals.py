"""What SLA2 is measured against: PyTorch's dense attention by backend, and FlexAttention over the same kept blocks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from benchmarks.timing import Function
from sla2_compile.config import SLA2Config
from sla2_compile.functional import config_arguments
from sla2_compile.kernels.blocks import num_blocks

FLASH, CUDNN = "SDPA flash", "SDPA cuDNN"
SDPA_BACKENDS = {FLASH: SDPBackend.FLASH_ATTENTION, CUDNN: SDPBackend.CUDNN_ATTENTION}
FLEX = "FlexAttention, kept blocks alone"


def dense_attention(name: str) -> Function:
    """Dense attention by one backend and no other; it raises where that backend cannot run."""
    backend = SDPA_BACKENDS[name]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return attend


def kept_blocks(q: Tensor, k: Tensor, v: Tensor, config: SLA2Config) -> Tensor:
    """(B, H, M, 1 + slots) int32: how many key blocks each query block keeps, then which."""
    gain = torch.ones(q.shape[1], device=q.device) if config.mixing == "row" else None
    *_, kept = torch.ops.sla2.attention_forward(
        q, k, v, None, None, None, None, gain, False, scale=q.shape[3] ** -0.5, **config_arguments(config)
    )
    return kept


def flex_block_mask(q: Tensor, k: Tensor, v: Tensor, config: SLA2Config) -> BlockMask:
    """The kept blocks as FlexAttention takes them: all whole, none to be masked inside."""
    kept = kept_blocks(q, k, v, config)
    count, listed = kept[..., 0].contiguous(), kept[..., 1:]
    # Its transposition of the mask takes the number of key blocks from the last dimension.
    indices = listed.new_zeros(*listed.shape[:-1], num_blocks(k.shape[2], config.block_k))
    indices[..., : listed.shape[-1]] = listed
    return BlockMask.from_kv_blocks(
        torch.zeros_like(count),
        torch.zeros_like(indices),
        count,
        indices,
        BLOCK_SIZE=(config.block_q, config.block_k),
        seq_lengths=(q.shape[2], k.shape[2]),
    )


def flex_attentions(input_sets: list[tuple[Tensor, ...]], config: SLA2Config) -> tuple[Function, list[Any]]:
    """FlexAttention as a function of (q, k, v, mask), compiled on a GPU, and a mask for each input set."""
    masks = [flex_block_mask(q, k, v, config) for q, k, v in input_sets]
    on_gpu = input_sets[0][0].device.type == "cuda"
    # Its default tile of keys is wider than a block of 64, which it refuses.
    options: Any = {"fwd_BLOCK_M": config.block_q, "fwd_BLOCK_N": config.block_k} if on_gpu else None

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
        out = flex_attention(q, k, v, block_mask=mask, kernel_options=options)
        assert isinstance(out, Tensor)
        return out

    return (torch.compile(attend, dynamic=False) if on_gpu else attend), masks

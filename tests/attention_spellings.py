"""Self-attention over (B, N, C) in the many ways that third parties write it, each as a small module."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS, HEAD_DIM = 2, 16
WIDTH = HEADS * HEAD_DIM
SCALE = HEAD_DIM**-0.5

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Spelled(nn.Module):
    """Projections around `attend`, which maps q, k, v of shape (B, N, C) to the output of that shape."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.attend = attend

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(self.to_q(x), self.to_k(x), self.to_v(x))


def bhnd(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)


def bnc(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def merged(x: Tensor) -> Tensor:
    """(B, N, C) as (B*H, N, D), as diffusers does."""
    b, n, _ = x.shape
    return x.reshape(b, n, HEADS, HEAD_DIM).permute(0, 2, 1, 3).reshape(b * HEADS, n, HEAD_DIM)


def unmerged(x: Tensor) -> Tensor:
    _, n, _ = x.shape
    return x.reshape(-1, HEADS, n, HEAD_DIM).permute(0, 2, 1, 3).reshape(-1, n, WIDTH)


def matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(bhnd(q), bhnd(k).transpose(-1, -2)) * SCALE
    return bnc(torch.matmul(scores.softmax(dim=-1), bhnd(v)))


def operator_divided(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = bhnd(q) @ bhnd(k).mT / HEAD_DIM**0.5
    return bnc(F.softmax(scores, -1) @ bhnd(v))


def scale_on_q(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = bhnd(q) * SCALE
    return bnc((q @ bhnd(k).transpose(-2, -1)).softmax(-1) @ bhnd(v))


def scale_on_both_beneath_views(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = bhnd(q * SCALE**0.5), bhnd(k / SCALE**-0.5)
    return bnc((q @ k.permute(0, 1, 3, 2)).softmax(-1) @ bhnd(v))


def scale_in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q = bhnd(q)
    q = q * 1.0
    q *= SCALE
    scores = q @ bhnd(k).transpose(-1, -2)
    return bnc(scores.softmax(-1) @ bhnd(v))


def no_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return bnc((bhnd(q) @ bhnd(k).transpose(-1, -2)).softmax(-1) @ bhnd(v))


def upcast_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = bhnd(q) @ bhnd(k).transpose(-1, -2) * SCALE
    return bnc(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ bhnd(v))


def upcast_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = bhnd(q).float() @ bhnd(k).float().transpose(-1, -2) * SCALE
    return bnc(scores.softmax(-1).type_as(v) @ bhnd(v))


def dropout_off(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    probs = (bhnd(q) @ bhnd(k).transpose(-1, -2) * SCALE).softmax(-1)
    return bnc(F.dropout(F.dropout(probs, 0.1, training=False), 0.0, training=True) @ bhnd(v))


def bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    probs = torch.bmm(merged(q), merged(k).transpose(1, 2)).mul(SCALE).softmax(-1)
    return unmerged(torch.bmm(probs, merged(v)))


def baddbmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = merged(q), merged(k), merged(v)
    empty = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype, device=q.device)
    probs = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=SCALE).softmax(dim=-1)
    return unmerged(torch.bmm(probs, v))


def view_of_merged_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, n, _ = q.shape
    scores = torch.bmm(merged(q) * SCALE, merged(k).transpose(1, 2))
    probs = scores.view(b, HEADS, n, n).softmax(-1).view(b * HEADS, n, n)
    return unmerged(torch.bmm(probs, merged(v)))


def split_probabilities(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, n, _ = q.shape
    probs = torch.bmm(merged(q), merged(k).transpose(1, 2)).mul(SCALE).softmax(-1)
    return bnc(probs.view(b, HEADS, n, n) @ bhnd(v))


def tokens_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As nn.MultiheadAttention has it inside: (N, B*H, D) transposed."""
    b, n, _ = q.shape
    q, k, v = (x.transpose(0, 1).contiguous().view(n, b * HEADS, HEAD_DIM).transpose(0, 1) for x in (q, k, v))
    out = torch.bmm(torch.softmax(torch.bmm(q * SCALE, k.transpose(1, 2)), dim=-1), v)
    return out.transpose(0, 1).contiguous().view(n, b, WIDTH).transpose(0, 1)


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("b h i d, b h j d -> b h i j", bhnd(q), bhnd(k)) * SCALE
    return bnc(torch.einsum("b h i j, b h j d -> b h i d", scores.softmax(-1), bhnd(v)))


def einsum_bnhd(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.unflatten(-1, (HEADS, HEAD_DIM)) for x in (q, k, v))
    probs = torch.einsum("bnhd,bmhd->bhnm", q * SCALE, k).softmax(-1)
    return torch.einsum("bhnm,bmhd->bnhd", probs, v).flatten(2)


def einsum_over_the_first_axis(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("...kd,...qd->...kq", bhnd(k), bhnd(q)) * SCALE
    return bnc(torch.einsum("...kq,...kd->...qd", scores.softmax(dim=-2), bhnd(v)))


def channels_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As the attention block of a VAE: one head, v times the transposed probabilities."""
    scores = torch.bmm(q, k.transpose(1, 2)) * SCALE
    return torch.bmm(v.transpose(1, 2), scores.softmax(2).permute(0, 2, 1)).transpose(1, 2)


def multi_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = k[..., :HEAD_DIM], v[..., :HEAD_DIM]
    scores = torch.einsum("b h i d, b j d -> b h i j", bhnd(q), k) * SCALE
    return bnc(torch.einsum("b h i j, b j d -> b h i d", scores.softmax(-1), v))


def stabilised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = bhnd(q) @ bhnd(k).transpose(-1, -2) * SCALE
    scores = scores - scores.amax(dim=-1, keepdim=True).detach()
    return bnc(scores.softmax(-1) @ bhnd(v))


def repeated_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Grouped-query attention as transformers has it: the heads of k and v are repeated."""
    b, n, _ = q.shape
    k, v = (bhnd(x)[:, :1, None].expand(b, 1, HEADS, n, HEAD_DIM).reshape(b, HEADS, n, HEAD_DIM) for x in (k, v))
    return bnc((bhnd(q) @ k.transpose(2, 3) * SCALE).softmax(-1) @ v)


SPELLINGS: dict[str, Attend] = {
    function.__name__: function
    for function in (
        matmul, operator_divided, scale_on_q, scale_on_both_beneath_views, scale_in_place, no_scale, upcast_softmax,
        upcast_scores, dropout_off, bmm, baddbmm, view_of_merged_scores, split_probabilities, tokens_first, einsum,
        einsum_bnhd, einsum_over_the_first_axis, channels_first, multi_query, stabilised, repeated_heads,
    )
}  # fmt: skip

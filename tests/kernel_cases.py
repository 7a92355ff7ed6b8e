"""Inputs of the kernels and what float64 makes of them, for tests in the interpreter and on a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from sla2_compile.config import SLA2Config
from sla2_compile.kernels import blocked, blocked_backward, reference
from sla2_compile.kernels.blocked_routing import kept_block_mask
from sla2_compile.kernels.blocks import num_blocks
from sla2_compile.kernels.settings import Settings

NAMES = ("dq", "dk", "dv", "d_logit", "d_gain")


@dataclass(frozen=True, kw_only=True)
class Case:
    """Shapes and settings; `learned` gives alpha_logit and, with row mixing and `gain`, alpha_gain their own values."""

    batch: int = 1
    heads: int = 2
    kv_heads: int = 2
    q_len: int = 80
    kv_len: int = 80
    dim: int = 16
    block_q: int = 32
    block_k: int = 16
    sparsity: float = 0.6
    tail: str = "pooled"
    mixing: str = "row"
    feature_map: str = "softmax"
    qk_format: str | None = None
    pv_format: str | None = None
    token_grid: tuple[int, int, int] | None = None
    exact_prefix: int = 0
    exact_suffix: int = 0
    masked: bool = False
    learned: bool = True
    gain: bool = True
    shared: bool = False  # the learned logit is one per head, expanded to the query blocks; gains lie apart in memory
    router: bool = False  # a learned one
    popular: bool = False  # every query likes the same few keys
    equal: bool = False  # all keys and queries are the same: every score of the router is a tie
    fading: bool = False  # each key block a sixteenth of the one before, 24 of them
    magnitude: float = 1.0  # of q and k
    key_offset: float = 0.0  # a mean of the keys for smoothing to remove
    without_keys: bool = False  # the last batch element has no real key
    dtype: torch.dtype = torch.float32

    @property
    def config(self) -> SLA2Config:
        names = {field.name for field in dataclasses.fields(SLA2Config)}
        return SLA2Config(**{name: value for name, value in vars(self).items() if name in names})

    @property
    def settings(self) -> Settings:
        names = {field.name for field in dataclasses.fields(Settings)}
        values = {name: value for name, value in vars(self.config).items() if name in names}
        grid = None if self.token_grid is None else list(self.token_grid)
        scale = self.dim**-0.5
        units = self.config.sparsity_units
        return Settings(**{**values, "scale": scale, "sparsity_units": units, "token_grid": grid})


@dataclass(frozen=True)
class Problem:
    """The op's inputs for a case: q, k, v over (B, N, H, D) storage, and the gradient of the output."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    attn_mask: Tensor | None
    alpha_logit: Tensor | None
    alpha_gain: Tensor | None
    router: tuple[Tensor, Tensor] | None = None

    @property
    def forward_arguments(self) -> tuple[Tensor | None, ...]:
        """What every implementation of the forward takes before its settings."""
        proj_q, proj_k = (None, None) if self.router is None else self.router
        return (self.q, self.k, self.v, self.attn_mask, proj_q, proj_k, self.alpha_logit, self.alpha_gain)

    def to(self, dtype: torch.dtype) -> Problem:
        """The same numbers in another dtype; what is not real, and may be NaN, becomes 0."""

        def convert(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(dtype)

        k, v = (x if self.attn_mask is None else torch.where(self.attn_mask.mT, x, 0) for x in (self.k, self.v))
        return Problem(
            q=self.q.to(dtype),
            k=k.to(dtype),
            v=v.to(dtype),
            grad_out=self.grad_out.to(dtype),
            attn_mask=self.attn_mask,
            alpha_logit=convert(self.alpha_logit),
            alpha_gain=convert(self.alpha_gain),
            router=None if self.router is None else (self.router[0].to(dtype), self.router[1].to(dtype)),
        )


def problem(case: Case, device: str = "cpu", seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def tokens(heads: int, length: int) -> Tensor:
        x = torch.randn(case.batch, length, heads, case.dim, generator=generator)
        return x.to(case.dtype).to(device).transpose(1, 2)

    q, grad_out = tokens(case.heads, case.q_len), tokens(case.heads, case.q_len)
    k, v = tokens(case.kv_heads, case.kv_len), tokens(case.kv_heads, case.kv_len)
    k = k + case.key_offset * torch.randn(case.dim, generator=generator).to(k)
    q, k = (case.magnitude * (x[:, :, :1, :].expand_as(x) if case.equal else x) for x in (q, k))
    if case.fading:
        block = torch.arange(case.kv_len) // case.block_k % 24
        k = k * (0.0625**block).to(k)[:, None]
    if case.popular:
        q = q + 1
        k[:, :, : case.block_k] += 2
    mask = None
    if case.masked:
        mask = torch.rand(case.batch, 1, 1, case.kv_len, generator=generator) < 0.7
        mask[..., -case.block_k :] = False
        mask[..., : case.block_k // 2] = True
        if case.without_keys:
            mask[-1] = False
        k = k.masked_fill(~mask.mT.to(device), torch.nan)
        v = v.masked_fill(~mask.mT.to(device), torch.nan)
        mask = mask.to(device)
    logit = gain = None
    if case.learned:
        logit = torch.randn(case.heads, num_blocks(case.q_len, case.block_q), generator=generator).to(device)
        if case.mixing == "row" and case.gain:
            gain = (torch.rand(case.heads, generator=generator) + 0.5).to(device)
        if case.shared:
            logit = logit[:, :1].expand_as(logit)
            gain = None if gain is None else torch.stack([gain, torch.full_like(gain, torch.nan)], 1)[:, 0]
    router = None
    if case.router:
        router = tuple(torch.randn(case.dim, case.dim, generator=generator).to(device) for _ in range(2))
    return Problem(q, k, v, grad_out, mask, logit, gain, router)


def saved_tensors(case: Case, p: Problem) -> tuple[Tensor, ...]:
    """out, sparse_out, sparse_lse, tail_lse and kept of the forward."""
    return blocked.forward(*p.forward_arguments, True, case.settings)


def backward_arguments(p: Problem, saved: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    return (p.grad_out, p.q, p.k, p.v, p.attn_mask, p.alpha_logit, p.alpha_gain, *saved)


def blocked_gradients(case: Case, p: Problem, saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return blocked_backward.backward(*backward_arguments(p, saved), case.settings)


def reference_gradients(case: Case, p: Problem, kept: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """dq, dk, dv, d logit and d gain by autograd through the reference in `dtype`, for a given choice of blocks."""
    q, k, v = (x.detach().requires_grad_() for x in (p.to(dtype).q, p.to(dtype).k, p.to(dtype).v))
    heads, blocks = kept.shape[1:3]
    logit = torch.zeros(heads, blocks, device=q.device) if p.alpha_logit is None else p.alpha_logit
    logit = logit.to(dtype).requires_grad_()
    gain = torch.ones(heads, device=q.device) if p.alpha_gain is None else p.alpha_gain
    gain = gain.to(dtype).requires_grad_()
    out = reference.attention(
        q,
        k,
        v,
        attn_mask=p.attn_mask,
        alpha_logit=logit,
        alpha_gain=gain,
        config=dataclasses.replace(case.config, qk_format=None, pv_format=None),
        block_mask=kept_block_mask(kept, num_blocks(case.kv_len, case.block_k)),
    )
    grads = torch.autograd.grad(out, (q, k, v, logit, gain), p.grad_out.to(dtype), allow_unused=True)
    return tuple(torch.zeros_like(x) if g is None else g for g, x in zip(grads, (q, k, v, logit, gain), strict=True))


def summed(gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The backward's results as autograd sees them: d logit and d gain summed over the batch."""
    dq, dk, dv, d_logit, d_gain = gradients
    return dq, dk, dv, d_logit.sum(0), d_gain.sum(0)


def relative_errors(gradients: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> dict[str, float]:
    """|| got - expected || / || expected || of each gradient; the norm itself where nothing is expected."""
    errors = {}
    for name, got, want in zip(NAMES, gradients, expected, strict=True):
        got, want = got.double(), want.double()
        size = want.norm().item()
        errors[name] = ((got - want).norm() / (size if size > 1e-6 else 1)).item()
    return errors


def gpu_case(case: Case, dtype: torch.dtype, dim: int) -> Case:
    """A case at the default block sizes, with lengths to match."""
    if case.token_grid is not None:
        sizes = {"q_len": 4 * 15 * 17 + 50, "kv_len": 4 * 15 * 17 + 50, "token_grid": (4, 15, 17)}
        return dataclasses.replace(case, block_q=128, block_k=64, **sizes, dim=dim, dtype=dtype)
    if max(case.q_len, case.kv_len) < 16 or case.q_len > 1000:
        return dataclasses.replace(case, dim=dim, dtype=dtype)
    lengths = {"q_len": 8 * case.q_len + 3, "kv_len": 11 * case.kv_len}
    return dataclasses.replace(case, block_q=128, block_k=64, **lengths, dim=dim, dtype=dtype)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within, new memory holds NaN, so that what no kernel wrote shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


DEFAULT = Case()
CASES = {
    "pooled row": DEFAULT,
    "pooled row, nothing learned": Case(learned=False),
    "pooled row, a logit per head": Case(shared=True),
    "pooled block": Case(mixing="block"),
    "linear block": Case(tail="linear", mixing="block", key_offset=1.0),
    "linear block, a logit per head": Case(tail="linear", mixing="block", shared=True),
    "linear row": Case(tail="linear", key_offset=1.0),
    "linear elu": Case(tail="linear", feature_map="elu"),
    "linear relu, nothing learned": Case(tail="linear", feature_map="relu", mixing="block", learned=False),
    "ragged, lengths differ": Case(q_len=70, kv_len=101),
    "ragged linear": Case(tail="linear", q_len=70, kv_len=101),
    "one short block of each": Case(q_len=5, kv_len=3),
    "one token": Case(q_len=1, kv_len=1, tail="linear"),
    "batch and groups": Case(batch=2, heads=4, kv_heads=2),
    "batch and groups, linear": Case(batch=2, heads=3, kv_heads=1, tail="linear", mixing="block"),
    "masked": Case(batch=2, kv_len=101, masked=True),
    "masked linear": Case(batch=2, kv_len=101, masked=True, tail="linear", mixing="block"),
    "tiles": Case(token_grid=(2, 5, 7), q_len=80, kv_len=80, exact_prefix=4, exact_suffix=6),
    "tiles, masked, linear": Case(token_grid=(2, 5, 7), exact_prefix=4, masked=True, tail="linear"),
    "exact ends": Case(exact_prefix=10, exact_suffix=20, q_len=170, kv_len=170),
    "dense": Case(sparsity=0.0),
    "dense linear": Case(sparsity=0.0, tail="linear", kv_len=77),
    "head dim 24": Case(dim=24),
    "head dim 24, linear": Case(dim=24, tail="linear"),
    "equal blocks": Case(block_q=16, block_k=16),
    "long lists": Case(q_len=1700, kv_len=400, block_q=16, popular=True, heads=1, kv_heads=1, sparsity=0.96),
    "long lists, linear": Case(
        q_len=1700, kv_len=400, block_q=16, popular=True, heads=1, kv_heads=1, sparsity=0.96, tail="linear"
    ),
    "int8 forward": Case(qk_format="int8", key_offset=1.0, kv_len=101),
}
# For the forward alone: what its router and its softmax must stand, and the formats.
FORWARD_CASES = {
    "learned router, groups": Case(router=True, heads=4, kv_heads=2, dim=24, q_len=70, kv_len=101),
    "all scores equal": Case(equal=True, learned=False, exact_suffix=5),
    "huge scores": Case(magnitude=300.0, learned=False),
    "huge scores, linear": Case(magnitude=300.0, tail="linear", mixing="block"),
    "scores of many magnitudes": Case(fading=True, kv_len=470, learned=False),
    "no real key": Case(batch=2, masked=True, without_keys=True),
    "no real key, linear": Case(batch=2, masked=True, without_keys=True, tail="linear", mixing="block"),
    "nothing in the tail": Case(batch=2, masked=True, kv_len=16, q_len=40),
    "more keys than queries": Case(q_len=33, kv_len=200, learned=False),
    **{
        f"qk {qk_format}, pv {pv_format}, {name}": dataclasses.replace(
            case, qk_format=qk_format, pv_format=pv_format, key_offset=2.0
        )
        for qk_format, pv_format in (("int8", None), ("int8", "fp8"), ("fp8", None), ("fp8", "fp8"), (None, "fp8"))
        for name, case in {
            "pooled": Case(learned=False, q_len=70, kv_len=101),
            "masked tiles, linear": Case(token_grid=(2, 5, 7), exact_prefix=4, masked=True, tail="linear", dim=24),
        }.items()
    },
}

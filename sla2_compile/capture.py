"""Capture q, k, v of prepared attention sites while the model runs its own batches, a group of sites at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sla2_compile.config import SLA2Config
from sla2_compile.dry_run import traced, without_trace
from sla2_compile.passes.sites import Site
from sla2_compile.prepare import dense_attention, owner_state, prepared_owners

Store = Literal["host", "device"]


@dataclass(frozen=True)
class SiteKey:
    """A site of a prepared model: its owner's path, and which of the owner's attention calls it is."""

    owner: str
    ordinal: int

    @property
    def name(self) -> str:
        return (self.owner or "root") + (f"#{self.ordinal}" if self.ordinal else "")


@dataclass
class Sample:
    """The inputs of one attention call for one batch element, in the model's order of tokens."""

    q: Tensor  # (H, N, D)
    k: Tensor  # (H_kv, N_kv, D)
    v: Tensor
    real: Tensor | None  # (N_kv,) bool; None: all keys are
    dense: Tensor | None  # (H, N, D) what the model got; kept for held-out batches only
    scale: float | None
    enable_gqa: bool
    config: SLA2Config  # of the site; its token grid fits this sequence

    def to(self, device: torch.device) -> Sample:
        tensors = {name: getattr(self, name) for name in ("q", "k", "v", "real", "dense")}
        return Sample(**{**vars(self), **{name: None if x is None else x.to(device) for name, x in tensors.items()}})


@dataclass
class SiteSize:
    """What the batches bring at a site."""

    key: SiteKey
    num_bytes: float  # of the samples of all batches
    q_shape: tuple[int, ...]  # of the first batch that reaches it, as all that follows
    kv_len: int
    config: SLA2Config
    device: torch.device


class Capture:
    """Runs a prepared model on batches and keeps the inputs of chosen sites.

    Args:
        model: prepared.
        config: settings that decide which sites are converted.
        store: where samples wait: "host" memory, or on the "device" that made them.
    """

    def __init__(self, model: nn.Module, config: SLA2Config, store: Store) -> None:
        self.model = model
        self.store = store
        self.known = {
            SiteKey(name, call.ordinal)
            for name, owner in prepared_owners(model)
            for call in owner_state(owner).settings.calls
        }
        self.sizes: dict[SiteKey, SiteSize] = {}
        self.samples: dict[SiteKey, list[Sample]] = {}
        self._keep_dense = False
        self._share = 0.0  # how many batches the one that is being measured stands for
        self._run = traced(model, config, self._replace, lambda sites: None)

    def measure(self, training: Sequence[Any], held_out: Sequence[Any]) -> list[SiteSize]:
        """What the batches would bring at every site, in the order of execution; runs one of each kind of input."""
        # Held-out samples have the dense output too, which is as large as q: at most half of q, k and v together.
        shares = [(batch, 1.0) for batch in training] + [(batch, 1.5) for batch in held_out]
        kinds: dict[Any, tuple[Any, float]] = {}
        for batch, share in shares:
            first, total = kinds.get(_kind(batch), (batch, 0.0))
            kinds[_kind(batch)] = first, total + share
        self.sizes = {}
        for batch, share in kinds.values():
            self._share = share
            self._call({}, batch)
        return list(self.sizes.values())

    def run(self, batches: Sequence[Any], keys: Sequence[SiteKey], *, keep_dense: bool) -> dict[SiteKey, list[Sample]]:
        """The samples of some sites on some batches."""
        self._keep_dense = keep_dense
        samples: dict[SiteKey, list[Sample]] = {key: [] for key in keys}
        for batch in batches:
            self._call(samples, batch)
        return samples

    def _call(self, samples: dict[SiteKey, list[Sample]], batch: Any) -> None:
        self.samples = samples
        args, kwargs = split_batch(batch)
        try:
            with without_trace(self.model), _named_owners(self.model), warnings.catch_warnings():
                # That state of an earlier calibration does not fit these settings is no news to one that replaces it.
                warnings.filterwarnings("ignore", message="sla2: ")
                self._run(*args, **kwargs)
        finally:
            self.samples = {}

    def _replace(self, site: Site) -> Callable[..., Tensor]:
        assert site.config is not None
        config, key = site.config, None
        if site.binding is not None and site.binding.name:
            key = SiteKey(site.binding.name.removeprefix("."), site.binding.ordinal)

        def run_dense(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, *_: Any, **settings: Any) -> Tensor:
            out = dense_attention(q, k, v, attn_mask, **settings)
            if key in self.known:
                self._record(key, config, q, k, v, attn_mask, out, settings)
            return out

        return run_dense

    def _record(
        self,
        key: SiteKey,
        config: SLA2Config,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None,
        out: Tensor,
        settings: Mapping[str, Any],
    ) -> None:
        if not self.samples:
            size = self.sizes.setdefault(key, SiteSize(key, 0, tuple(q.shape), k.shape[2], config, q.device))
            # Under autocast attention computes in the dtype of its output.
            size.num_bytes += self._share * (q.numel() + k.numel() + v.numel()) * out.element_size()
        if key not in self.samples:
            return
        device = q.device if self.store == "device" else torch.device("cpu")
        for b in range(q.shape[0]):
            q_b, k_b, v_b = (x[b].to(device, out.dtype, copy=True) for x in (q, k, v))
            real = None if attn_mask is None else attn_mask[min(b, attn_mask.shape[0] - 1), 0, 0].to(device, copy=True)
            dense = out[b].to(device, copy=True) if self._keep_dense else None
            self.samples[key].append(
                Sample(q_b, k_b, v_b, real, dense, settings["scale"], settings["enable_gqa"], config)
            )


@contextmanager
def _named_owners(model: nn.Module) -> Iterator[None]:
    """Inside, owners that could share a graph are told apart by their names."""
    states = [(name, owner_state(owner)) for name, owner in prepared_owners(model)]
    for name, state in states:
        state.name = name or "."
    try:
        yield
    finally:
        for _, state in states:
            state.name = ""


def split_batch(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A batch as positional and keyword arguments: `(args, kwargs)`, a tuple or list, a dict, or a single value."""
    if isinstance(batch, (tuple, list)):
        if len(batch) == 2 and isinstance(batch[0], (tuple, list)) and isinstance(batch[1], Mapping):
            return tuple(batch[0]), dict(batch[1])
        return tuple(batch), {}
    return ((), dict(batch)) if isinstance(batch, Mapping) else ((batch,), {})


def _kind(batch: Any) -> Any:
    """What tells kinds of input apart: the shapes of the tensors in a batch, and its flags."""
    leaves = tree_leaves(split_batch(batch))
    return tuple(tuple(x.shape) if isinstance(x, Tensor) else x if isinstance(x, (bool, str)) else None for x in leaves)


def group_sites(sizes: Sequence[SiteSize], memory_gib: float) -> list[list[SiteSize]]:
    """Sites in groups whose samples fit the memory together.

    Raises:
        ValueError: a single site that does not fit.
    """
    limit = memory_gib * 2**30
    groups: list[list[SiteSize]] = [[]]
    used = 0.0
    for size in sizes:
        if size.num_bytes > limit:
            raise ValueError(
                f"memory_gib: expected at least {size.num_bytes / 2**30:.2g} for the samples of {size.key.name} alone, "
                f"got {memory_gib:g}; raise it, or pass fewer batches"
            )
        if used + size.num_bytes > limit and groups[-1]:
            groups.append([])
            used = 0
        groups[-1].append(size)
        used += size.num_bytes
    return [group for group in groups if group]

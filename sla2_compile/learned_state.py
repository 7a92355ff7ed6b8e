"""What is learned at the attention sites of one module: its parameters, and what they were calibrated for.

`prepare` attaches an `OwnerState` to the module that owns the attention, as `<owner>.sla2`. One owner may call
attention several times (`call0`, `call1`) and each call may be calibrated for several sparsities, so the parameters are
`<owner>.sla2.call0_950000.proj_q` and so on, the number being the sparsity in millionths, or `any` before calibration.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sla2_compile.config import Mixing, PVFormat, QKFormat, SLA2Config, Tail

NUM_TENSORS = 4

# Settings that give blocks and masks their meaning: state learned under one choice is only a guess under another.
CONTEXT_FIELDS = ("block_q", "block_k", "feature_map", "qk_format", "pv_format")


@dataclass(frozen=True)
class Entry:
    """One set of parameters of a call, and the sparsity and form it was calibrated for; all None before calibration."""

    sparsity_units: int | None = None
    tail: Tail | None = None
    mixing: Mixing | None = None

    @property
    def key(self) -> str:
        return "any" if self.sparsity_units is None else str(self.sparsity_units)


@dataclass(frozen=True)
class CallSettings:
    """One attention call of an owner that has learned state.

    Args:
        ordinal: which of the owner's attention calls it is.
        num_heads, head_dim: H and D of the queries.
        entries: one uncalibrated entry, or one per calibrated sparsity.
        default_units: the calibrated sparsity, in millionths, used where none is asked for.
        context: (name, value) of the settings it was calibrated with.
    """

    ordinal: int
    num_heads: int
    head_dim: int
    entries: tuple[Entry, ...] = (Entry(),)
    default_units: int | None = None
    context: tuple[tuple[str, Any], ...] = ()

    @property
    def is_calibrated(self) -> bool:
        return self.entries[0].sparsity_units is not None

    def nearest(self, sparsity_units: int) -> Entry:
        """The entry for a sparsity, or the closest one."""
        return min(self.entries, key=lambda entry: abs((entry.sparsity_units or 0) - sparsity_units))

    def module_name(self, entry: Entry) -> str:
        return f"call{self.ordinal}_{entry.key}"


@dataclass(frozen=True)
class LowBit:
    """The low-bit formats that a model is trained for, or runs in; see `SLA2QATConfig`.

    Args:
        qk_format, pv_format: as in `SLA2Config`, at least one of them not None.
        step: "prepare" rounds to the formats in wider arithmetic, "convert" runs the device's low-bit kernels.
    """

    qk_format: QKFormat | None
    pv_format: PVFormat | None
    step: Literal["prepare", "convert"]


@dataclass(frozen=True)
class OwnerSettings:
    """What the parameters of an `OwnerState` mean. Equal for equal blocks, so that they can share compiled code.

    Args:
        num_calls: attention calls of any kind in one call of the owner.
        calls: those that have learned state.
        low_bit: the formats of these calls; None leaves them to the options of torch.compile.
    """

    num_calls: int
    calls: tuple[CallSettings, ...]
    low_bit: LowBit | None = None

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))

    @staticmethod
    @functools.cache
    def from_json(text: str) -> OwnerSettings:
        data = json.loads(text)
        calls = tuple(
            CallSettings(
                **{
                    **call,
                    "entries": tuple(Entry(**entry) for entry in call["entries"]),
                    "context": tuple((name, value) for name, value in call["context"]),
                }
            )
            for call in data["calls"]
        )
        low_bit = data.get("low_bit")
        return OwnerSettings(data["num_calls"], calls, None if low_bit is None else LowBit(**low_bit))


def calibration_context(config: SLA2Config) -> tuple[tuple[str, Any], ...]:
    """The settings that state calibrated under `config` depends on."""
    fields = tuple((name, getattr(config, name)) for name in CONTEXT_FIELDS)
    return (*fields, ("tiled", config.token_grid is not None))


class LearnedParameters(nn.Module):
    """Router and mixing of one attention call at one sparsity.

    Args:
        num_heads, head_dim: H and D of the queries.
        num_query_blocks: columns of `alpha_logit`; 1 is one value per head.
        device: where to put them.

    Attributes:
        proj_q, proj_k: (D, D), the identity at first. Frozen: the hard choice of blocks has no gradient.
        alpha_logit: (H, num_query_blocks), 0 at first.
        alpha_gain: (H,), 1 at first.
    """

    def __init__(
        self, num_heads: int, head_dim: int, num_query_blocks: int = 1, *, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        kind: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self.proj_q = nn.Parameter(torch.eye(head_dim, **kind), requires_grad=False)
        self.proj_k = nn.Parameter(torch.eye(head_dim, **kind), requires_grad=False)
        self.alpha_logit = nn.Parameter(torch.zeros(num_heads, num_query_blocks, **kind))
        self.alpha_gain = nn.Parameter(torch.ones(num_heads, **kind))

    def tensors(self) -> list[Tensor]:
        """In the order in which the marker carries them."""
        return [self.proj_q, self.proj_k, self.alpha_logit, self.alpha_gain]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LearnedParameters:
        def keep_float32(x: Tensor) -> Tensor:
            moved = fn(x)
            # The router chooses wrongly in 16 bits, so `model.to(torch.bfloat16)` moves this state but does not round.
            is_narrowed = moved.is_floating_point() and moved.dtype.itemsize < x.dtype.itemsize
            return x.to(moved.device) if is_narrowed else moved

        super()._apply(keep_float32, recurse)
        return self


class OwnerState(nn.Module):
    """The learned state of a module that calls attention; its `.sla2`.

    Args:
        settings: what the parameters mean.
        device: where to put them.

    Attributes:
        text: the settings as JSON, a constant of every graph that the owner is traced into.
        name: set while a dry run has to tell apart owners that share compiled code; empty otherwise.
    """

    def __init__(self, settings: OwnerSettings, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.name = ""
        self.text = ""
        for call in settings.calls:
            for entry in call.entries:
                parameters = LearnedParameters(call.num_heads, call.head_dim, device=device)
                self.add_module(call.module_name(entry), parameters)
        self.text = settings.to_json()

    @property
    def settings(self) -> OwnerSettings:
        return OwnerSettings.from_json(self.text)

    def parameters_of(self, call: CallSettings, entry: Entry) -> LearnedParameters:
        parameters = self.get_submodule(call.module_name(entry))
        assert isinstance(parameters, LearnedParameters)
        return parameters

    def tensors(self) -> list[Tensor]:
        """All parameters, call by call and entry by entry, as `marked_tensors` reads them."""
        return [tensor for parameters in self.children() for tensor in parameters.tensors()]  # type: ignore[operator]

    def replace_call(self, call: CallSettings, parameters: Iterable[LearnedParameters]) -> None:
        """Put a call's new settings, and the parameters of each of its entries, in the place of its old ones."""
        calls = tuple(call if old.ordinal == call.ordinal else old for old in self.settings.calls)
        new = dict(zip([call.module_name(entry) for entry in call.entries], parameters, strict=True))
        modules = dict(self.named_children())
        self._modules.clear()
        for each in calls:
            for entry in each.entries:
                name = each.module_name(entry)
                self.add_module(name, new[name] if each is call else modules[name])
        self._change(calls=calls)

    def set_default(self, ordinal: int, sparsity_units: int) -> None:
        """Choose the sparsity that a call runs at where the user asks for none."""
        calls = tuple(
            dataclasses.replace(call, default_units=sparsity_units) if call.ordinal == ordinal else call
            for call in self.settings.calls
        )
        self._change(calls=calls)

    def set_low_bit(self, low_bit: LowBit | None) -> None:
        """Choose the formats of all calls; None leaves them to the options of torch.compile."""
        self._change(low_bit=low_bit)

    def _change(self, **fields: Any) -> None:
        self.text = dataclasses.replace(self.settings, **fields).to_json()

    # A tensor, so that every checkpoint format can hold it; without it a checkpoint would lose which form was learned.
    def get_extra_state(self) -> Tensor:
        return torch.frombuffer(bytearray(self.text.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        text = bytes(state.cpu().tolist()).decode()
        if text == self.text:
            return
        settings, device = OwnerSettings.from_json(text), next(self.parameters()).device
        # The parameters themselves are loaded after this, into modules that must exist by then.
        replacement = OwnerState(settings, device=device)
        self._modules.clear()
        for name, child in replacement.named_children():
            self.add_module(name, child)
        self.text = text

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        # Logits per query block are as long as the sequence they were learned on, which the module cannot know before.
        for name, child in self.named_children():
            logit = state_dict.get(f"{prefix}{name}.alpha_logit")
            assert isinstance(child, LearnedParameters)
            if logit is None or logit.shape == child.alpha_logit.shape:
                continue  # the same parameter stays, which an optimizer may hold
            if logit.dim() == 2 and logit.shape[0] == child.alpha_logit.shape[0]:
                child.alpha_logit = nn.Parameter(child.alpha_logit.new_zeros(logit.shape))


def marked_tensors(settings: OwnerSettings, tensors: list[Any], call: CallSettings, entry: Entry) -> list[Any]:
    """The tensors of one entry out of all that a marker carries (see `OwnerState.tensors`)."""
    names = [each.module_name(e) for each in settings.calls for e in each.entries]
    start = NUM_TENSORS * names.index(call.module_name(entry))
    return tensors[start : start + NUM_TENSORS]

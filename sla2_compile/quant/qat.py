"""`SLA2QATConfig`: train prepared attention for low-bit formats with torchao's `quantize_`, then run it in them.

The formats become part of the learned state: they are saved with it, ride the graph with it, and reach the op where
the backend binds it. No module and no parameter is replaced, so it composes with whatever else changes the model.

    quantize_(model, SLA2QATConfig(step="prepare"), filter_fn=is_attention_site)   # forward rounds, backward is 16 bit
    ... train torch.compile(model, backend="sla2") ...
    quantize_(model, SLA2QATConfig(step="convert"), filter_fn=is_attention_site)   # the device's low-bit kernels
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from sla2_compile.config import PVFormat, QKFormat, SLA2Config
from sla2_compile.learned_state import LowBit, OwnerState

try:
    from torchao.core.config import AOBaseConfig
    from torchao.quantization.transform_module import register_quantize_module_handler
except ImportError as error:
    raise ImportError("SLA2QATConfig: expected torchao; pip install 'sla2-compile[quant]'") from error

Step = Literal["prepare", "convert"]


@dataclass
class SLA2QATConfig(AOBaseConfig):
    """Low-bit formats for every prepared attention site that `quantize_` is pointed at.

    Takes effect under `torch.compile(model, backend="sla2")`; elsewhere a prepared model stays dense. Pass
    `filter_fn=is_attention_site`: torchao's own filter sees linear layers only.

    Args:
        qk_format: format of Q K^T, one scale per block of tokens: "int8" or "fp8" (e4m3); None leaves it as it is.
        pv_format: format of P V, one scale per channel of V: "fp8"; None leaves it as it is.
        step: "prepare": the forward rounds to the formats in wider arithmetic, on any device. "convert": it runs the
            device's low-bit kernels, whose results agree with the rounding. Both train: gradients are those of the
            16-bit backward and pass rounding straight through. With both formats None either step removes them.

    Raises:
        ValueError: an unknown format or step.

    Source: arXiv 2602.12675, section 5 (quantization-aware training); its formats are INT8 and FP8.
    """

    qk_format: QKFormat | None = "int8"
    pv_format: PVFormat | None = None
    step: Step = "prepare"

    def __post_init__(self) -> None:
        SLA2Config(qk_format=self.qk_format, pv_format=self.pv_format)
        if self.step not in get_args(Step):
            raise ValueError(
                f"step: expected 'prepare' or 'convert', got {self.step!r}; prepare to train, convert to run"
            )

    @property
    def low_bit(self) -> LowBit | None:
        """What the config makes of a site's state."""
        if self.qk_format is None and self.pv_format is None:
            return None
        return LowBit(self.qk_format, self.pv_format, self.step)


def is_attention_site(module: nn.Module, name: str = "") -> bool:
    """The `filter_fn` for `quantize_` that picks the learned state of every prepared attention site."""
    return isinstance(module, OwnerState)


@register_quantize_module_handler(SLA2QATConfig)
def _set_formats(module: nn.Module, config: SLA2QATConfig) -> nn.Module:
    if not isinstance(module, OwnerState):
        raise ValueError(
            f"filter_fn: expected one that picks prepared attention sites, got one that picks a "
            f"{type(module).__name__} (torchao's default picks linear layers); prepare or calibrate the model, then "
            "pass filter_fn=sla2_compile.quant.is_attention_site"
        )
    module.set_low_bit(config.low_bit)
    return module

"""Low-bit formats of the sparse branch, and the torchao configuration that trains a model for them.

The folder has an `__init__.py`, unlike its neighbours, so that it can hold a public name. torchao, which takes seconds
to import, is loaded when that name is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if __name__ != "sla2_compile.quant":
    # The symlink at the root of a checkout, found by somebody who imports a package of this name.
    raise ImportError(f"expected the import of sla2_compile.quant, got {__name__!r}; take the checkout off sys.path")

if TYPE_CHECKING:
    from sla2_compile.quant.qat import SLA2QATConfig as SLA2QATConfig
    from sla2_compile.quant.qat import is_attention_site as is_attention_site

__all__ = ["SLA2QATConfig", "is_attention_site"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sla2_compile.quant import qat

    return getattr(qat, name)

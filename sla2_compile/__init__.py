"""SLA2 attention for any PyTorch model: `torch.compile(model, backend="sla2")`."""

from sla2_compile.config import SLA2Config
from sla2_compile.explain import Report, explain
from sla2_compile.functional import attention

__all__ = ["Report", "SLA2Config", "attention", "explain"]
__version__ = "0.1.0"

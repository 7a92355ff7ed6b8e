"""SLA2 attention for any PyTorch model: `torch.compile(model, backend="sla2")`."""

from sla2_compile.calibrate import calibrate
from sla2_compile.config import SLA2Config
from sla2_compile.dense import dense
from sla2_compile.explain import Report, explain
from sla2_compile.export import ExportReport, export
from sla2_compile.functional import attention
from sla2_compile.prepare import prepare
from sla2_compile.state_io import load_state, save_state

__all__ = [
    "ExportReport",
    "Report",
    "SLA2Config",
    "attention",
    "calibrate",
    "dense",
    "explain",
    "export",
    "load_state",
    "prepare",
    "save_state",
]
__version__ = "0.1.0"

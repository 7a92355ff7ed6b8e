"""Whether a graph is all of what was compiled, or a part: only a whole model can be said to lack something."""

from __future__ import annotations

import sys
from types import FrameType

from torch.fx import GraphModule

_CALL, _TRACING = "torch._dynamo.eval_frame", "torch._dynamo.convert_frame"


def is_whole_model(gm: GraphModule) -> bool:
    """Whether a graph is all of what was compiled, not a part that graph breaks left.

    Args:
        gm: the graph, as long as Dynamo waits for it to be compiled.
    """
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None:
        return True
    resumed = bool(reason.user_stack) and reason.user_stack[-1].name.startswith("torch_dynamo_resume")
    return not reason.graph_break and not resumed and not _is_called_from_python()


def _is_called_from_python() -> bool:
    """Whether the compiled model, running as Python after a graph break, called what Dynamo traces now.

    Then there are functions of the model's between the call of what was compiled and Dynamo's tracing.
    """
    frame: FrameType | None = sys._getframe()
    is_called = False
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module == _CALL:
            return is_called
        if module == _TRACING:
            # What lies between here and us is the backend.
            is_called = False
        elif not module.startswith("torch."):
            is_called = True
        frame = frame.f_back
    return False

"""Runs the forward of CUDA packages in Triton's interpreter on the CPU, and prints its errors against float64 as JSON.

A process of its own, since TRITON_INTERPRET has to be set before triton is imported.
"""

from __future__ import annotations

import json
import os
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"

import interpreter
import torch
from attention_cases import BOTH_TAILS_AND_MIXINGS, make_case
from tolerances import relative_error

from sla2_compile.exporters.program import attention_from
from sla2_compile.functional import config_arguments
from sla2_compile.kernels import gluon_choose, packaged


def error_of(**settings: object) -> float:
    """Of the packaged forward in float32, on the same numbers as the reference."""
    case = make_case(batch=1, q_len=200, dtype=torch.float32, **settings)  # type: ignore[arg-type]
    router = case.router or (None, None)
    tensors = (case.q, case.k, case.v, case.attn_mask, *router, case.alpha_logit, case.alpha_gain)
    out = attention_from(packaged.forward)(*tensors, **config_arguments(case.config))
    return relative_error(out, case.to(torch.float64).reference())


if __name__ == "__main__":
    interpreter.prepare()
    with torch.no_grad():
        errors = {f"{tail} {mixing}": error_of(tail=tail, mixing=mixing) for tail, mixing in BOTH_TAILS_AND_MIXINGS}
        errors["masked, tiles"] = error_of(masked=True, exact_suffix=8, token_grid=(3, 8, 8))
        # A tracer that takes the router, on a GPU whose kernel for it, a Gluon one, no package can hold nor run here.
        with (
            mock.patch.object(packaged, "ROUTER_IS_TRACEABLE", True),
            mock.patch.object(gluon_choose, "capability", return_value=(9, 0)),
            mock.patch.object(gluon_choose, "MIN_KEY_BLOCKS", 1),
        ):
            errors["router in Triton"] = error_of(tail="pooled", masked=True)
    print(json.dumps(errors))

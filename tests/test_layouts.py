"""No copy is added around a converted site, in any layout: in the graph Inductor gets and in the code it writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from attention_spellings import SPELLINGS, Spelled
from small_models import SMALL, SMALL_OPTIONS, WIDTH, Attention, tokens
from torch import Tensor, nn
from torch._functorch.aot_autograd import aot_module_simplified
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.utils import run_and_get_code
from torch.fx import GraphModule

from sla2_compile.backend import build_backend

COPIES = {"clone", "_to_copy", "copy", "contiguous"}
FORWARD, BACKWARD = torch.ops.sla2.attention_forward.default, torch.ops.sla2.attention_backward.default


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


class SelfAttention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 2, 48, dropout=0.0, batch_first=True).eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: lambda attend=attend: Spelled(attend) for name, attend in SPELLINGS.items()},  # type: ignore[misc]
    "scaled_dot_product_attention": Attention,
    "nn.MultiheadAttention, batch first": lambda: SelfAttention(WIDTH, 2, batch_first=True),
    "nn.MultiheadAttention, tokens first": lambda: SelfAttention(WIDTH, 2),
    "nn.TransformerEncoderLayer": encoder_layer,
}

# Copies that the model itself asks for with .contiguous(); torch's multi_head_attention_forward asks for one.
OWN_COPIES = {"tokens_first": 4, "nn.MultiheadAttention, tokens first": 1}


def graphs_for_inductor(model: nn.Module, x: Tensor) -> list[GraphModule]:
    """The forward graph, and the backward graph where `x` asks for gradients."""
    graphs: list[GraphModule] = []

    def keep(gm: GraphModule, inputs: Sequence[Any]) -> Any:
        graphs.append(gm)
        return gm.forward

    def compile_graph(gm: GraphModule, inputs: Sequence[Any]) -> Any:
        return aot_module_simplified(
            gm, list(inputs), fw_compiler=keep, bw_compiler=keep, decompositions=select_decomp_table()
        )

    out = torch.compile(model, backend=build_backend(SMALL, compile_graph), fullgraph=True)(x)
    if out.requires_grad:
        out.square().sum().backward()
    return graphs


def calls(gm: GraphModule) -> Counter[str]:
    return Counter(str(node.target).removeprefix("aten.").partition(".")[0] for node in gm.graph.nodes)


def copies(gm: GraphModule) -> int:
    found = calls(gm)
    return sum(found[name] for name in COPIES)


@pytest.mark.parametrize("name", MODELS)
def test_the_graph_that_inductor_gets_has_no_copy_that_the_model_did_not_ask_for(name: str) -> None:
    with torch.no_grad():
        (forward,) = graphs_for_inductor(MODELS[name](), tokens().repeat(2, 1, 1))
    assert any(node.target is FORWARD for node in forward.graph.nodes)
    assert copies(forward) == OWN_COPIES.get(name, 0), calls(forward)


@pytest.mark.parametrize("name", ["scaled_dot_product_attention", "bmm", "einsum_bnhd", "baddbmm"])
def test_training_adds_none_either(name: str) -> None:
    forward, backward = graphs_for_inductor(MODELS[name](), tokens().repeat(2, 1, 1).requires_grad_())
    assert any(node.target is BACKWARD for node in backward.graph.nodes)
    assert copies(forward) == copies(backward) == 0, (calls(forward), calls(backward))


@pytest.mark.parametrize(
    "name", ["scaled_dot_product_attention", *(pytest.param(x, marks=pytest.mark.slow) for x in ("bmm", "einsum_bnhd"))]
)
def test_inductor_writes_no_kernel_that_copies(name: str) -> None:
    with torch.no_grad():
        run = torch.compile(MODELS[name](), backend="sla2", options=SMALL_OPTIONS)
        _, (code,) = run_and_get_code(run, tokens().repeat(2, 1, 1))
    assert "torch.ops.sla2.attention_forward.default(" in code
    # Inductor names its kernels after what they compute.
    assert "clone" not in code
    assert "copy" not in code.replace("_to_copy", "")

"""The op as a graph for exporters equals the reference at any length, and does the kept work only."""

from __future__ import annotations

import functools
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import BOTH_TAILS_AND_MIXINGS, Case, make_case
from tolerances import FLOAT64, FLOAT64_INTERPOLATED, relative_error
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from sla2_compile.exporters.program import Inputs, attention_from, export_graph
from sla2_compile.functional import config_arguments
from sla2_compile.kernels import traceable
from sla2_compile.kernels.blocks import max_kept_blocks

NUMBER_FORMATS = [("int8", None), ("int8", "fp8"), (None, "fp8"), ("fp8", "fp8")]


class Attention(nn.Module):
    """The traceable op as a module, with the learned tensors of a case as its own."""

    def __init__(self, case: Case, *, loop: bool = True, fused: bool = True) -> None:
        super().__init__()
        self.attention = attention_from(functools.partial(traceable.forward, loop=loop, fused=fused))
        router = case.router or (None, None)
        for name, x in (("a", router[0]), ("b", router[1]), ("c", case.alpha_logit), ("d", case.alpha_gain)):
            self.register_buffer(name, None if x is None else x.detach())
        self.settings = config_arguments(case.config)
        self.enable_gqa = case.q.shape[1] != case.k.shape[1]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.attention(
            q, k, v, mask, self.a, self.b, self.c, self.d, enable_gqa=self.enable_gqa, **self.settings
        )


def inputs_of(case: Case) -> tuple[Tensor | None, ...]:
    return (*(x.detach() for x in (case.q, case.k, case.v)), case.attn_mask)


def export_attention(case: Case, dynamic_shapes: Any = None, **how: bool) -> ExportedProgram:
    return export_graph(Attention(case, **how), Inputs(inputs_of(case), {}, dynamic_shapes))


@pytest.mark.parametrize("tail, mixing", BOTH_TAILS_AND_MIXINGS)
@pytest.mark.parametrize("kv_heads, masked", list(itertools.product((4, 2), (False, True))))
@pytest.mark.parametrize("exact", [(0, 0), (20, 9)])
@pytest.mark.parametrize("lengths", [(200, 200), (129, 333)])
@pytest.mark.parametrize("loop, fused", [(True, True), (False, True), (True, False)])
@torch.no_grad()
def test_it_equals_the_reference(
    tail: str,
    mixing: str,
    kv_heads: int,
    masked: bool,
    exact: tuple[int, int],
    lengths: tuple[int, int],
    loop: bool,
    fused: bool,
) -> None:
    case = make_case(
        heads=4,
        kv_heads=kv_heads,
        q_len=lengths[0],
        kv_len=lengths[1],
        masked=masked,
        tail=tail,
        mixing=mixing,
        exact_prefix=exact[0],
        exact_suffix=exact[1],
    )
    out = Attention(case, loop=loop, fused=fused)(*inputs_of(case))
    assert relative_error(out, case.reference()) < FLOAT64


@pytest.mark.parametrize("qk_format, pv_format", NUMBER_FORMATS)
@torch.no_grad()
def test_it_rounds_to_low_bit_formats_as_the_op_does(qk_format: Any, pv_format: Any) -> None:
    case = make_case(q_len=200, dtype=torch.float32, qk_format=qk_format, pv_format=pv_format)
    out = Attention(case)(*inputs_of(case))
    assert relative_error(out, case.op()) < 1e-5
    assert relative_error(out, make_case(q_len=200, dtype=torch.float32).op()) > 1e-4


@pytest.mark.parametrize("feature_map", ["softmax", "elu", "relu"])
@torch.no_grad()
def test_it_knows_every_feature_map_in_tile_order(feature_map: Any) -> None:
    case = make_case(q_len=140, tail="linear", token_grid=(4, 4, 8), exact_prefix=12, feature_map=feature_map)
    assert relative_error(Attention(case)(*inputs_of(case)), case.reference()) < FLOAT64


@pytest.mark.parametrize("tail, mixing", [("pooled", "row"), ("linear", "block")])
@torch.no_grad()
def test_a_program_with_a_dynamic_length_equals_the_reference_at_every_length(tail: str, mixing: str) -> None:
    traced = make_case(q_len=130, masked=True, tail=tail, mixing=mixing, exact_suffix=9)
    length = Dim("length", min=65, max=1000)
    program = export_attention(traced, (*[{2: length}] * 3, {3: length}))
    for q_len in (65, 128, 333):
        case = make_case(q_len=q_len, masked=True, tail=tail, mixing=mixing, exact_suffix=9, seed=q_len)
        # What was learned belongs to the program, and its logit is interpolated to each length.
        learned = {name: getattr(traced, name) for name in ("router", "alpha_logit", "alpha_gain")}
        case = Case(**{**vars(case), **learned})
        assert relative_error(program.module()(*inputs_of(case)), case.reference()) < FLOAT64_INTERPOLATED


@torch.no_grad()
def test_a_program_reads_nothing_of_keys_that_are_masked() -> None:
    case = make_case(q_len=200, masked=True)
    clean = Attention(case)(*inputs_of(case))
    q, k, v, mask = inputs_of(case)
    assert mask is not None
    k, v = (x.masked_fill(~mask.mT, float("nan")) for x in (k, v))
    assert torch.equal(Attention(case)(q, k, v, mask), clean)


def sizes_of_values(program: ExportedProgram) -> list[int]:
    """Numbers of elements of all tensors that a program makes, in loops too."""
    graphs = [module for module in program.graph_module.modules() if isinstance(module, GraphModule)]
    values = [node.meta.get("val") for graph in graphs for node in graph.graph.nodes]
    return [x.numel() for x in values if isinstance(x, Tensor)]


def test_a_program_makes_nothing_of_the_size_of_all_scores() -> None:
    num_tokens, heads, dim = 8192, 2, 16
    settings: dict[str, Any] = {"sparsity": 0.97, "block_q": 128, "block_k": 64}
    case = make_case(batch=1, heads=heads, q_len=num_tokens, dim=dim, dtype=torch.float32, learned=False, **settings)
    largest = max(sizes_of_values(export_attention(case, fused=False)))
    kept_scores = num_tokens * 64 * max_kept_blocks(num_tokens, 64, case.config.sparsity_units, 0, 0)
    assert kept_scores <= largest <= 1.1 * max(kept_scores, heads * num_tokens * dim)
    assert largest < num_tokens**2 / 20


def test_the_packaged_triton_kernels_equal_the_reference_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    script = Path(__file__).with_name("interpret_packaged.py")
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    errors = json.loads(result.stdout)
    assert len(errors) == 6
    assert max(errors.values()) < 1e-5, errors


@pytest.fixture
def hopper_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles for sm_90 inside, which tells the tracer what each kernel writes; nothing can run."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Driver:
        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    monkeypatch.setattr(driver, "_active", Driver())


@pytest.mark.usefixtures("hopper_without_a_gpu")
@pytest.mark.parametrize("tail, num_kernels", [("pooled", 2), ("linear", 5)])
def test_a_program_for_cuda_is_made_of_triton_kernels_and_aten_in_the_form_that_inductor_takes(
    tail: Any, num_kernels: int
) -> None:
    from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_functional

    from sla2_compile.kernels import packaged

    module = Attention(make_case(q_len=300, dtype=torch.float32, tail=tail, masked=True))
    module.attention = attention_from(packaged.forward)
    inputs = inputs_of(make_case(q_len=300, dtype=torch.float32, masked=True))
    program = export_graph(module, Inputs(inputs, {})).run_decompositions()
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    # The router has three more where the tracer takes it.
    expected = num_kernels + 3 * packaged.ROUTER_IS_TRACEABLE
    assert targets.count(triton_kernel_wrapper_functional) == expected
    assert not any(getattr(target, "namespace", "") == "sla2" for target in targets)

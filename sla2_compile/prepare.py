"""`prepare`: find the attention sites of a model in one dry run and attach their learned state.

The module that owns an attention gets the state as `.sla2`, and its class is swapped for a subclass whose `forward`
passes its first floating tensor through the marker `sla2::bind` (see bind_op.py), as FSDP2 swaps classes. A forward
hook would not do: where the owner is what is compiled, Dynamo traces its hooks apart from it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sla2_compile.bind_op
import sla2_compile.ops  # noqa: F401  (registers the operators)
from sla2_compile.config import SLA2Config
from sla2_compile.dry_run import traced, without_trace
from sla2_compile.learned_state import CallSettings, OwnerSettings, OwnerState
from sla2_compile.passes.sites import Site

Model = TypeVar("Model", bound=nn.Module)

STATE_NAME = "sla2"


class PreparedModule(nn.Module):
    """Marks the classes that `prepared_class` makes."""

    sla2: OwnerState


# Where the caller is in inference mode, the new parameters are to be trained all the same.
@torch.inference_mode(False)
def prepare(model: Model, *args: Any, config: SLA2Config | None = None, **kwargs: Any) -> Model:
    """Attach learned state, at first neutral, to every attention site that the backend would convert.

    Runs the model once on the inputs with its own dense attention; weights, buffers and random states stay as they are.
    A prepared model computes what it did before, eager and under any backend but `sla2`. Prepare a model before you
    wrap it (FSDP, LoRA, accelerate hooks) and before you make its optimizer.

    Args:
        model: the model, changed in place.
        *args: its inputs.
        config: settings that decide which sites are eligible, as the backend's options; None is `SLA2Config()`.
        **kwargs: its keyword inputs.

    Returns:
        The model: each owner of a site has its state as `.sla2`.

    Raises:
        ValueError: a model that is prepared already, that has no eligible site, or one whose owner cannot be marked.
        TypeError: something that is not a module.

    Source: arXiv 2602.12675, section 4.1 (learnable router) and 4.2 (learnable ratio).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}; state is attached to modules")
    root = getattr(model, "_orig_mod", model)
    if already := [name for name, _ in prepared_owners(root)]:
        raise ValueError(
            f"model: expected a model that is not prepared yet, got one with learned state at {', '.join(already)}; "
            "use it as it is, or build the model anew"
        )
    found = _find(root, SLA2Config() if config is None else config, args, kwargs)
    for name, (settings, device) in found.items():
        attach_state(root.get_submodule(name), OwnerState(settings, device=device))
    return model


def prepared_owners(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every module of `model` with learned state."""
    for name, module in model.named_modules():
        if isinstance(module, PreparedModule):
            yield name, module


def owner_state(owner: nn.Module) -> OwnerState:
    """The learned state of a prepared module."""
    state = owner.get_submodule(STATE_NAME)
    assert isinstance(state, OwnerState)
    return state


def attach_state(owner: nn.Module, state: OwnerState) -> None:
    """Make `owner` carry `state` into every graph that it is traced into."""
    if hasattr(owner, STATE_NAME):
        raise ValueError(
            f"model: expected no attribute {STATE_NAME!r} on {type(owner).__name__}; rename the model's own"
        )
    _check_forward(owner)
    owner.add_module(STATE_NAME, state)
    owner.__class__ = prepared_class(cast(Any, type(owner)))


@functools.cache
def prepared_class(cls: Any) -> type[nn.Module]:
    """The subclass of `cls` that marks its input. One for all instances, so that they share compiled code."""

    # A function, since Dynamo cannot read it off every class.
    original = cls.forward

    # The signature stays visible: pipelines inspect it.
    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = self.sla2
        args, kwargs = _mark(args, kwargs, state.tensors(), state.text, state.name)
        return original(self, *args, **kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        # A class made at run time cannot be pickled or copied by its name.
        parts: Any = cls.__reduce_ex__(self, protocol)
        return (_new_prepared, (cls,), *parts[2:])

    return _subclass(cls, (PreparedModule,), {"forward": forward, "__reduce_ex__": reduce})


def unprepared_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that `prepared_class` made `cls` from, also where FSDP2 swapped it again; others as they are."""
    while issubclass(cls, PreparedModule):
        cls = cls.__bases__[-1]
    return cls


def _new_prepared(cls: Any) -> nn.Module:
    prepared = prepared_class(cls)
    return prepared.__new__(prepared)


def _subclass(cls: type[nn.Module], mixins: tuple[type, ...], body: dict[str, Any]) -> Any:
    # Libraries look classes up by name: diffusers finds the blocks to compile so.
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (*mixins, cls), {**names, **body})


def _mark(
    args: tuple[Any, ...], kwargs: dict[str, Any], state: list[Tensor], text: str, name: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with the first floating tensor passed through the marker."""
    for i, value in enumerate(args):
        if isinstance(value, Tensor) and value.is_floating_point():
            return (*args[:i], torch.ops.sla2.bind.default(value, state, text, name), *args[i + 1 :]), kwargs
    for key, value in kwargs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            return args, {**kwargs, key: torch.ops.sla2.bind.default(value, state, text, name)}
    return args, kwargs


def _check_forward(owner: nn.Module) -> None:
    if "forward" in vars(owner):
        raise ValueError(
            f"model: expected {type(owner).__name__} to use its class's forward, got one set on the instance (a hook "
            "of accelerate or another wrapper); prepare the model before it is wrapped"
        )


@contextmanager
def _every_module_marked(model: nn.Module) -> Iterator[None]:
    """Inside, each module marks its input with its own name, so that the dry run can tell whose every attention is."""
    classes: dict[type[nn.Module], type[nn.Module]] = {}
    originals: list[tuple[nn.Module, type[nn.Module]]] = []
    try:
        for name, module in model.named_modules():
            cls = type(module)
            is_torch_leaf = cls.__module__.startswith("torch.nn.") and not any(module.children())
            if is_torch_leaf or isinstance(module, torch.jit.ScriptModule) or "forward" in vars(module):
                continue
            originals.append((module, cls))
            module.__dict__["_sla2_path"] = name or "."
            module.__class__ = classes.setdefault(cls, _naming_class(cls))
        yield
    finally:
        for module, cls in originals:
            module.__class__ = cls
            del module.__dict__["_sla2_path"]


def _naming_class(cls: type[nn.Module]) -> Any:
    original: Any = cls.forward

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = _mark(args, kwargs, [], "", self._sla2_path)
        return original(self, *args, **kwargs)

    return _subclass(cls, (), {"forward": forward})


def _find(
    model: nn.Module, config: SLA2Config, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, tuple[OwnerSettings, torch.device]]:
    """The settings of every owner by its name, and the device its attention runs on."""
    sites: list[Site] = []
    shapes: dict[int, tuple[tuple[int, ...], torch.device]] = {}

    def replace(site: Site) -> Callable[..., Tensor]:
        def run_dense(q: Tensor, *rest: Any, **settings: Any) -> Tensor:
            shapes[id(site)] = tuple(q.shape), q.device
            return dense_attention(q, *rest, **settings)

        return run_dense

    with without_trace(model), _every_module_marked(model):
        traced(model, config, replace, sites.extend)(*args, **kwargs)
    _check_found(sites)
    found: dict[str, tuple[OwnerSettings, torch.device]] = {}
    for site in sites:
        # A site that the run did not reach has no shape.
        if site.verdict != "sla2" or id(site) not in shapes:
            continue
        assert site.binding is not None
        name, ordinal = site.binding.name.removeprefix("."), site.binding.ordinal
        (_, heads, _, dim), device = shapes[id(site)]
        settings, device = found.get(name, (OwnerSettings(site.binding.num_calls, ()), device))
        if site.binding.num_calls != settings.num_calls:
            raise ValueError(
                f"{site.name}: expected its module to call attention equally often each time, got {settings.num_calls} "
                f"and {site.binding.num_calls} times; leave it out with exclude=[...]"
            )
        if ordinal not in [call.ordinal for call in settings.calls]:
            calls = (*settings.calls, CallSettings(ordinal, heads, dim))
            settings = OwnerSettings(settings.num_calls, tuple(sorted(calls, key=lambda call: call.ordinal)))
        found[name] = settings, device
    return found


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *_: Any, **settings: Any
) -> Tensor:
    """What the model computed before the conversion, from the arguments of `sla2::attention`."""
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=attn_mask, scale=settings["scale"], enable_gqa=settings["enable_gqa"]
    )


def _check_found(sites: list[Site]) -> None:
    if not any(site.verdict == "sla2" for site in sites):
        reasons = "; ".join(f"{site.name}: {site.reason}" for site in sites) or "no attention was found"
        raise ValueError(
            f"model: expected at least one attention site that can become SLA2, got none ({reasons}); "
            "sla2_compile.explain(model, ...) shows them"
        )
    unmarked = [site.name for site in sites if site.verdict == "sla2" and site.binding is None]
    if unmarked:
        raise ValueError(
            f"model: expected the modules that call attention to take a floating tensor, but these do not, or have a "
            f"forward set on the instance: {', '.join(unmarked)}; leave them out with exclude=[...]"
        )

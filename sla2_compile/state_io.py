"""`save_state` and `load_state`: the learned state of a model in a safetensors file, without the model's weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sla2_compile.learned_state import OwnerSettings, OwnerState
from sla2_compile.prepare import STATE_NAME, attach_state, owner_state, prepared_owners, unprepared_class

# Raised when files written before can no longer be read.
FORMAT_VERSION = 1

_KEY = "sla2"


def save_state(model: nn.Module, path: str | Path) -> None:
    """Write the learned state of a prepared model to a safetensors file.

    The file's metadata hold, for every owner of attention, the calls with state, their heads, sparsities, forms,
    default sparsity and the settings they were calibrated with, and the version of this library. Of a sharded model
    (FSDP2) every rank calls this, and the first one writes.

    Args:
        model: prepared, calibrated or not.
        path: of the file, in a folder that exists.

    Raises:
        ValueError: a model that is not prepared, or whose state holds no data; a path that cannot be written.
        TypeError: something that is not a module.
    """
    from sla2_compile import __version__

    root = _module(model)
    owners = {name: owner_state(owner) for name, owner in prepared_owners(root)}
    if not owners:
        raise ValueError("model: expected a prepared model, got one without learned state; call prepare or calibrate")
    tensors = {
        _tensor_name(owner, name): _whole(parameter).detach().contiguous()
        for owner, state in owners.items()
        for name, parameter in state.named_parameters()
    }
    if any(tensor.device.type == "meta" for tensor in tensors.values()):
        raise ValueError("model: expected state with data, got it on the meta device; load or calibrate it first")
    description = {
        "format_version": FORMAT_VERSION,
        "library_version": __version__,
        "owners": {name: json.loads(state.text) for name, state in owners.items()},
        "peers": sorted(_peers(root, owners)),
    }
    if _is_sharded(owners.values()) and torch.distributed.get_rank() != 0:
        return
    save_file, _, unusable = _safetensors()
    try:
        save_file(tensors, str(path), metadata={_KEY: json.dumps(description, sort_keys=True)})
    except unusable as error:
        raise ValueError(f"path: expected a file in a folder that can be written, got {path} ({error})") from error


def load_state(model: nn.Module, path: str | Path) -> None:
    """Give a model the learned state of a file that `save_state` wrote.

    A model that is not prepared becomes so, without a dry run; a prepared one must have the same sites. Its state is
    replaced, so make optimizers afterwards.

    Args:
        model: of the class that the state was learned for, prepared or not.
        path: of the file.

    Raises:
        ValueError: a file without learned state, or sites that do not match: the message lists missing and unexpected;
            a model that is sharded already.
        TypeError: something that is not a module.
    """
    root = _module(model)
    owners, peers, tensors = _read(Path(path))
    modules = dict(root.named_modules(remove_duplicate=False))
    present = {name: owner_state(owner) for name, owner in prepared_owners(root)}
    if _is_sharded(present.values()):
        raise ValueError("model: expected one that is not sharded yet, got DTensors; load its state, then shard it")
    expected = _site_names({name: state.settings for name, state in present.items()})
    given = _site_names(owners)
    if present:
        missing, unexpected = sorted(expected - given), sorted(given - expected)
    else:
        # Without a dry run: modules like the owners that the file knows nothing of may be sites too.
        found = {name: settings for name, settings in owners.items() if name in modules}
        missing = sorted(name or "root" for name in _peers(root, found) - peers)
        unexpected = sorted(given - _site_names(found))
    if missing or unexpected:
        raise ValueError(
            f"path: expected the sites of this model in {path}; missing from the file: {_listed(missing)}; "
            f"unexpected in it: {_listed(unexpected)}. Load it into the model that it was learned for"
        )
    for name, settings in owners.items():
        if name in present and present[name].settings.num_calls != settings.num_calls:
            raise ValueError(
                f"path: expected {present[name].settings.num_calls} attention calls in {name or 'root'}, as in this "
                f"model, got {settings.num_calls}; prepare the model with the inputs that the state was learned with"
            )
        _check_heads(name, present.get(name), settings)
    for name, settings in owners.items():
        state = _new_state(name, settings, tensors)
        if name in present:
            state.to(next(present[name].parameters()).device)
            modules[name].add_module(STATE_NAME, state)
        else:
            device = next((x.device for x in modules[name].parameters()), torch.device("cpu"))
            attach_state(modules[name], state if device.type == "meta" else state.to(device))


def _module(model: Any) -> nn.Module:
    """The model itself, if it was compiled."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}; state belongs to modules")
    root: nn.Module = getattr(model, "_orig_mod", model)
    return root


def _peers(root: nn.Module, owners: Collection[str]) -> set[str]:
    """Names of the modules that are of the same classes as the owners: the other blocks, with state or without."""
    modules = dict(root.named_modules(remove_duplicate=False))
    classes = tuple({unprepared_class(type(modules[name])) for name in owners})
    return {name for name, module in modules.items() if isinstance(module, classes)}


def _is_sharded(states: Iterable[OwnerState]) -> bool:
    return any(hasattr(x, "full_tensor") for state in states for x in state.parameters())


def _whole(x: Tensor) -> Tensor:
    """A DTensor gathered from all ranks; other tensors as they are."""
    whole: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return whole


def _read(path: Path) -> tuple[dict[str, OwnerSettings], set[str], dict[str, Tensor]]:
    """The settings by owner, the names of modules like the owners, and all tensors of a file."""
    _, safe_open, unusable = _safetensors()
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except unusable as error:
        raise ValueError(f"path: expected a safetensors file written by save_state, got {path} ({error})") from error
    if _KEY not in metadata:
        raise ValueError(
            f"path: expected a file written by save_state, got {path}, whose metadata have no {_KEY!r} entry"
        )
    description = json.loads(metadata[_KEY])
    if description["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"path: expected format version {FORMAT_VERSION}, got {description['format_version']}, written by version "
            f"{description['library_version']} of this library; use that version or calibrate anew"
        )
    owners = {name: OwnerSettings.from_json(json.dumps(value)) for name, value in description["owners"].items()}
    return owners, set(description["peers"]), tensors


def _new_state(owner: str, settings: OwnerSettings, tensors: dict[str, Tensor]) -> OwnerState:
    """A state with the file's tensors, each checked for its shape."""
    state = OwnerState(settings)
    for call in settings.calls:
        for entry in call.entries:
            parameters = state.parameters_of(call, entry)
            for name, parameter in list(parameters.named_parameters()):
                key = _tensor_name(owner, f"{call.module_name(entry)}.{name}")
                if key not in tensors:
                    raise ValueError(f"path: expected a tensor {key!r}, got none; the file is damaged")
                value, shape = tensors[key], tuple(parameter.shape)
                # Its columns are the query blocks of the sequence that it was learned on.
                fits = value.shape[:1] == shape[:1] if name == "alpha_logit" else tuple(value.shape) == shape
                if not fits:
                    raise ValueError(
                        f"path: expected {key!r} of shape {shape}, got {tuple(value.shape)}; the file is damaged"
                    )
                setattr(parameters, name, nn.Parameter(value, requires_grad=parameter.requires_grad))
    return state


def _check_heads(name: str, present: OwnerState | None, settings: OwnerSettings) -> None:
    if present is None:
        return
    for ours, theirs in zip(present.settings.calls, settings.calls, strict=True):
        expected, got = (ours.num_heads, ours.head_dim), (theirs.num_heads, theirs.head_dim)
        if expected != got:
            raise ValueError(
                f"path: expected {expected[0]} heads of {expected[1]} in {name or 'root'}, as in this model, got "
                f"{got[0]} of {got[1]}; the state belongs to a model of another size"
            )


def _site_names(owners: dict[str, OwnerSettings]) -> set[str]:
    return {
        (name or "root") + (f"#{call.ordinal}" if call.ordinal else "")
        for name, settings in owners.items()
        for call in settings.calls
    }


def _tensor_name(owner: str, name: str) -> str:
    """As in the model's `state_dict`."""
    return ".".join(part for part in (owner, STATE_NAME, name) if part)


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"


def _safetensors() -> tuple[Callable[..., None], Callable[..., Any], type[Exception]]:
    """Its `save_file` and `safe_open`, and what they raise for files that they cannot use."""
    try:
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError("expected safetensors for learned state; pip install 'sla2-compile[calibrate]'") from error
    return save_file, safe_open, SafetensorError

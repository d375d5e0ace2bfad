"""Weights of a checkpoint whose names are not those of the model in memory.

`save_pretrained` writes the names of the original checkpoint format: transformers 5 keeps a ViT's encoder in
`vit.layers.*` and saves it as `vit.encoder.layer.*` (`core_model_loading.revert_weight_conversion`).
`from_pretrained` converts such names back; `Trainer._load_from_checkpoint` and `_load_best_model` do not: they call
`model.load_state_dict(..., strict=False)` on the file as it is, and every renamed weight keeps the value that it had
before. Here they are converted as `from_pretrained` does.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME


class LoadResult(NamedTuple):
    """What `load_state_dict` returns: names of the model without a value, names of the file without a use."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def load_converted(model: PreTrainedModel, folder: str) -> LoadResult:
    """Load the checkpoint in `folder` into `model`, in place, with the model's own conversion of names and tensors.

    Parameters stay the same objects, so an optimizer that was built over them stays valid. A tensor that is tied to
    a loaded one counts as loaded, since a file holds it once.
    """
    weights = read_weights(folder)
    converted, unexpected = convert(model, weights)
    result = model.load_state_dict(converted, strict=False)
    loaded = {tensor.data_ptr() for name, tensor in _named_tensors(model) if name in converted}
    missing = [name for name, tensor in _named_tensors(model) if _is_lost(name, tensor, result.missing_keys, loaded)]
    return LoadResult(missing, sorted(unexpected))


def refuse_lost_parameters(model: nn.Module, result: LoadResult, folder: str) -> None:
    """Raise `RuntimeError` where a parameter has no value in the checkpoint: training would go on from random ones."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    lost = [name for name in result.missing_keys if name in parameters]
    if not lost:
        return
    message = (
        f"{folder} holds no value for {len(lost)} of the {len(parameters)} parameters of {type(model).__name__}: "
        f"{', '.join(lost[:5])}{', …' if len(lost) > 5 else ''}. "
    )
    if result.unexpected_keys:
        message += f"It holds {', '.join(result.unexpected_keys[:5])}, for which the model has no use. "
    raise RuntimeError(
        message + "Resume with the model that the checkpoint was made of, or start anew from these weights with "
        "from_pretrained instead of resume_from_checkpoint."
    )


def convert(model: PreTrainedModel, weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
    """The weights under the names and in the shapes of `model`, and the names that it has no use for."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    # What the model was loaded with is what it is saved with; a model made from a config has the mapping of its class.
    mapping = copy.deepcopy(getattr(model, "_weight_conversions", None)) or get_model_conversion_mapping(model)
    # The conversion replaces parameters, so it works on a copy of the model without memory.
    skeleton = _without_memory(model)
    info, _ = convert_and_load_state_dict_in_model(
        model=skeleton,
        state_dict=weights,
        load_config=LoadStateDictConfig(weight_mapping=mapping),  # pyright: ignore[reportArgumentType]
    )
    converted = {name: tensor for name, tensor in skeleton.state_dict().items() if not tensor.is_meta}
    return converted, set(info.unexpected_keys)


def read_weights(folder: str) -> dict[str, Tensor]:
    """All tensors of a checkpoint in one file or in shards, safetensors first. Empty where there is none."""
    for single, index in ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        if os.path.isfile(os.path.join(folder, single)):
            return _read([os.path.join(folder, single)])
        if os.path.isfile(os.path.join(folder, index)):
            with open(os.path.join(folder, index), encoding="utf-8") as file:
                shards = set(json.load(file)["weight_map"].values())
            return _read(os.path.join(folder, shard) for shard in sorted(shards))
    return {}


def _read(paths: Iterable[str]) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for path in paths:
        is_safe = path.endswith(".safetensors")
        weights.update(load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True))
    return weights


def _without_memory(model: nn.Module) -> Any:
    """A copy of the model whose parameters and buffers are on the meta device."""
    tensors = {id(tensor): tensor for _, tensor in _named_tensors(model)}
    # deepcopy takes what it finds in `memo` instead of copying.
    memo: dict[int, Any] = {
        key: nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=tensor.requires_grad)
        if isinstance(tensor, nn.Parameter)
        else torch.empty_like(tensor, device="meta")
        for key, tensor in tensors.items()
    }
    return copy.deepcopy(model, memo)


def _named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    # Tied tensors under each of their names, and the buffers that no checkpoint holds, as deepcopy meets them all.
    return [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]


def _is_lost(name: str, tensor: Tensor, missing: list[str], loaded: set[int]) -> bool:
    return name in missing and tensor.data_ptr() not in loaded

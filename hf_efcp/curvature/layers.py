"""Layers that multiply rows by a weight: which modules of a model they are, and their rows."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parameter import UninitializedParameter

from hf_efcp.curvature.structures import Structure, make_structure

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(eq=False)
class Layer:
    """A weight (with its bias) whose gradient is a sum of outer products of output gradients and inputs.

    Args:
        name: of its first module.
        modules: those that use the weight; more than one where linear layers share it.
        weight, bias: parameters; the bias is `None` where it is missing, frozen or shared with others.
        inputs, outputs: structures of the two Kronecker factors; inputs count the bias as one more column.
    """

    name: str
    modules: list[nn.Module]
    weight: Tensor
    bias: Tensor | None
    inputs: Structure
    outputs: Structure

    @property
    def parameters(self) -> list[Tensor]:
        """Weight and, where there is one, bias."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def matrices(self, weight: Tensor, bias: Tensor | None) -> list[Tensor]:
        """(d_o, ·) column blocks of a (d_o, d_i) matrix: views of tensors shaped as weight and bias, if there is one.

        A missing bias counts as zero.
        """
        matrix = weight.T if _is_conv1d_of_transformers(self.modules[0]) else weight.flatten(1)
        if self.bias is None:
            return [matrix]
        return [matrix, matrix.new_zeros(len(matrix), 1) if bias is None else bias.unsqueeze(1)]


@dataclass
class Plan:
    """What becomes of each parameter: layers, and by name the reason why another is in none."""

    layers: list[Layer] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)


def find_layers(model: nn.Module, trained: set[Tensor], structures: tuple[str, str], max_dense_dim: int) -> Plan:
    """The layers of a model among its `trained` parameters.

    A weight that linear layers share is one layer. One that an embedding shares is none: its gradient has a part that
    no input row of the layer tells of. Dense factors wider than `max_dense_dim` become diagonal.
    """
    users: dict[Tensor, list[tuple[str, nn.Module]]] = {}
    names: dict[Tensor, str] = {}
    for prefix, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                users.setdefault(parameter, []).append((prefix, module))
                names.setdefault(parameter, f"{prefix}.{key}" if prefix else key)
    plan, placed = Plan(), set()
    for weight, used_by in users.items():
        if weight not in trained:
            continue
        reason = _why_no_layer(weight, [module for _, module in used_by])
        if reason:
            plan.reasons[names[weight]] = reason
            continue
        name, module = used_by[0]
        bias = module.bias if module.bias is not None and module.bias in trained else None
        if bias is not None and len(users[bias]) > 1:  # pyright: ignore[reportArgumentType]
            bias = None
        d_o, d_i = _dims(module)
        sides = [(structures[0], d_i + (bias is not None)), (structures[1], d_o)]
        inputs, outputs = (
            make_structure("diagonal" if kind == "dense" and dim > max_dense_dim else kind, dim) for kind, dim in sides
        )
        plan.layers.append(Layer(name, [module for _, module in used_by], weight, bias, inputs, outputs))  # pyright: ignore[reportArgumentType]
        placed.update(plan.layers[-1].parameters)
    plan.reasons = {name: reason for name, reason in plan.reasons.items() if model.get_parameter(name) not in placed}
    return plan


def _why_no_layer(weight: Tensor, modules: list[nn.Module]) -> str:
    """Empty where the parameter is the weight of layers of one kind."""
    kinds = sorted({type(module).__name__ for module in modules})
    if isinstance(weight, UninitializedParameter):
        return "not initialized yet"
    if not all(_is_layer(module) for module in modules):
        return f"shared by {' and '.join(kinds)}" if len(modules) > 1 else f"parameter of {kinds[0]}"
    if any(module._parameters.get("weight") is not weight for module in modules):
        return f"bias of {kinds[0]} whose weight is frozen or shared"
    if len({_dims(module) for module in modules}) > 1 or len(kinds) > 1:
        return f"shared by {' and '.join(kinds)} of different kinds"
    if len({module.bias for module in modules}) > 1:
        return "shared by layers with biases of their own"
    return "no entries" if not weight.numel() else ""


def _is_layer(module: nn.Module) -> bool:
    # nn.MultiheadAttention reads the weight of its `NonDynamicallyQuantizableLinear` and never calls it.
    is_linear = isinstance(module, nn.Linear) and type(module).__name__ != "NonDynamicallyQuantizableLinear"
    return is_linear or isinstance(module, _CONVOLUTIONS) or _is_conv1d_of_transformers(module)


def _is_conv1d_of_transformers(module: nn.Module) -> bool:
    """GPT-2's linear layer with a transposed weight; told by name, as transformers may be missing."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _dims(module: nn.Module) -> tuple[int, int]:
    shape = module.weight.shape
    return (shape[1], shape[0]) if _is_conv1d_of_transformers(module) else (shape[0], shape[1:].numel())  # pyright: ignore[reportIndexIssue, reportReturnType]


def input_rows(module: nn.Module, x: Tensor) -> Tensor:
    """(b, t, groups, d) rows that the weight is multiplied by: t tokens or output positions."""
    if not isinstance(module, _CONVOLUTIONS):
        return _batched(x).unsqueeze(2)
    spatial = module.weight.ndim - 2
    x = x if x.ndim == spatial + 2 else x[None]
    # The module's own padding, circular or reflected too, comes first; `unfold` alone would pad with zeros.
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = functional.pad(x, module._reversed_padding_repeated_twice, mode)
    if spatial == 3:
        patches = _volumes(x, module)  # pyright: ignore[reportArgumentType]
    else:
        kernel, stride, dilation = (
            (1,) * (2 - spatial) + of for of in (module.kernel_size, module.stride, module.dilation)
        )
        patches = functional.unfold(x if spatial == 2 else x.unsqueeze(2), kernel, dilation=dilation, stride=stride)
    return patches.unflatten(1, (module.groups, -1)).permute(0, 3, 1, 2)


def _volumes(x: Tensor, module: nn.Conv3d) -> Tensor:
    """(b, channels·k₁k₂k₃, positions), as `functional.unfold` gives in two dimensions."""
    for axis, (size, stride, dilation) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True)
    ):
        x = x.unfold(2 + axis, dilation * (size - 1) + 1, stride)[..., ::dilation]  # a new last axis
    return x.permute(0, 1, 5, 6, 7, 2, 3, 4).flatten(1, 4).flatten(2)


def gradient_rows(module: nn.Module, gradient: Tensor) -> Tensor:
    """(b, t, d_o) rows of the gradient of the module's output."""
    if not isinstance(module, _CONVOLUTIONS):
        return _batched(gradient)
    gradient = gradient if gradient.ndim == module.weight.ndim else gradient[None]
    return gradient.flatten(2).transpose(1, 2)


def _batched(x: Tensor) -> Tensor:
    """(b, t, d) of (d,), (b, d) or (b, *t, d)."""
    x = x if x.ndim > 1 else x[None]
    return x.reshape(len(x), x.shape[1:-1].numel(), x.shape[-1])

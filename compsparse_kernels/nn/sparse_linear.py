"""What the linear layers over a stored pattern share: parameters, initialisation, moves, state dicts, conversion."""

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from compsparse_kernels.layouts import BlockLayout, BlockOrder
from compsparse_kernels.layouts.checks import describe, require

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


# How the values that layers train are stored: for optimizers, which are given bare Parameters. Not an attribute of
# theirs, which would be pickled with them.
LAYOUT_OF_VALUES = WeakTensorKeyDictionary()


class SparseLinear(nn.Module):
    """Base of the layers whose weight is ``values`` over a ``layout``.

    A subclass gives the product and the sampled product of its layout, and the index tensors that store it.
    """

    PATTERN: tuple[str, ...]  # names that index tensors may have in a state dict

    def __init__(self, in_features, out_features, layout, bias, device, dtype):
        super().__init__()
        for name, features in (("in_features", in_features), ("out_features", out_features)):
            require(features == getattr(layout, name), name, f"{getattr(layout, name)}, as in the layout", features)
        require(isinstance(bias, bool), "bias", "True or False", repr(bias), TypeError)
        named = ", ".join(str(one).removeprefix("torch.") for one in DTYPES)
        require(dtype is None or dtype in DTYPES, "dtype", f"one of {named}, or None", dtype, TypeError)
        self.in_features, self.out_features = in_features, out_features
        self.layout = layout
        self.values = nn.Parameter(torch.empty(layout.values_shape, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self._move_layout()
        self.reset_parameters()

    def __setattr__(self, name, value):
        super().__setattr__(name, value)
        if name in ("values", "layout"):
            self._note_layout()

    def __setstate__(self, state):
        super().__setstate__(state)
        self._note_layout()  # copies and pickles have Parameters of their own

    def _note_layout(self):
        values = self._parameters.get("values")
        if values is not None and "layout" in self.__dict__:
            LAYOUT_OF_VALUES[values] = self.layout

    def _product(self, x, values, bias):
        """``x W^T + b``."""
        raise NotImplementedError

    def _sampled(self, a, b):
        """The stored entries of ``a^T b``, in the shape of ``values``; entries that share a value are added up."""
        raise NotImplementedError

    def _pattern(self):
        """The index tensors of the layout, by name."""
        raise NotImplementedError

    def _layout_of(self, pattern, values):
        """The layout that a checkpoint's index tensors and values describe."""
        raise NotImplementedError

    @torch.no_grad()
    def reset_parameters(self):
        """U(-1/sqrt(n), 1/sqrt(n)), as in ``nn.Linear``, where n is the number of inputs that an output really has."""
        if self.values.is_meta:
            return
        device = self.values.device
        ones_in, ones_out = (
            torch.ones(1, n, device=device, dtype=torch.float32) for n in (self.in_features, self.out_features)
        )
        with torch.autocast(device.type, enabled=False):
            uses = self._sampled(ones_out, ones_in)  # 0 in the padding of ragged blocks
            fan_in = self._product(ones_in, (uses > 0).to(uses.dtype), None)
            bound = torch.where(fan_in > 0, fan_in.rsqrt(), 0)
            self.values.uniform_(-1, 1).mul_(self._sampled(bound, ones_in) / uses.clamp(min=1))
        if self.bias is not None:
            self.bias.uniform_(-1, 1).mul_(bound[0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._product(x, self.values, self.bias)

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight ``[out_features, in_features]``, made anew at each access (writing into it is lost)."""
        return self.layout.unpack(self.values)

    @classmethod
    def _copy_of(cls, linear, *args, **options):
        """A layer made by ``cls(in, out, *args)`` with the parameters of ``linear``, on its device."""
        require(isinstance(linear, nn.Linear), "linear", "nn.Linear", type(linear).__name__, TypeError)
        weight, bias = linear.weight.detach(), linear.bias
        options |= {"bias": bias is not None, "device": "meta", "dtype": weight.dtype}
        layer = cls(linear.in_features, linear.out_features, *args, **options).to_empty(device=weight.device)
        with torch.no_grad():
            layer.values.copy_(layer.layout.pack(weight))
            if bias is not None:
                layer.bias.copy_(bias)
                layer.bias.requires_grad_(bias.requires_grad)
        layer.values.requires_grad_(linear.weight.requires_grad)
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """A dense ``nn.Linear`` with the same weight (0 outside the pattern) and bias; an activation stays behind."""
        options = {"bias": self.bias is not None, "device": self.values.device, "dtype": self.values.dtype}
        linear = nn.utils.skip_init(nn.Linear, self.in_features, self.out_features, **options)
        with torch.no_grad():
            linear.weight.copy_(self.weight)
            if self.bias is not None:
                linear.bias.copy_(self.bias)
                linear.bias.requires_grad_(self.bias.requires_grad)
        linear.weight.requires_grad_(self.values.requires_grad)
        return linear.train(self.training)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self._move_layout()
        return self

    def _move_layout(self):
        # A meta tensor has lost its contents and a pattern cannot be initialised again, so it stays where it is.
        if not self.values.is_meta:
            self.layout = self.layout.to(self.values.device)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self._pattern().items():
            # Layers may share a layout, and safetensors refuses tensors that share memory.
            destination[prefix + name] = tensor.clone()

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        own = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        pattern = {name: own.pop(name) for name in self.PATTERN if name in own}
        try:
            if "weight" in own and "values" not in own:
                weight = own.pop("weight")
                require(isinstance(weight, torch.Tensor), "weight", "a tensor", describe(weight))
                own["values"] = self.layout.pack(weight.to(self.layout.device))
            elif pattern:
                self._adopt(pattern, own.get("values"))
            elif strict:
                missing += [prefix + name for name in self._pattern()]
        except (TypeError, ValueError) as error:
            errors.append(f"While loading {prefix.removesuffix('.') or type(self).__name__}: {error}")
            return
        own = {prefix + name: value for name, value in own.items()}
        super()._load_from_state_dict(own, prefix, local_metadata, strict, missing, unexpected, errors)
        self._move_layout()

    def _adopt(self, pattern, values):
        """Take over a checkpoint's pattern; ``values`` gets its shape and stays the same Parameter."""
        for name, tensor in pattern.items():
            require(isinstance(tensor, torch.Tensor), name, "a tensor", describe(tensor))
        mine = self._pattern()
        same = mine.keys() == pattern.keys() and all(_same_numbers(pattern[name], mine[name]) for name in mine)
        if same and (values is None or values.shape == self.values.shape):
            return
        ok = isinstance(values, torch.Tensor)
        require(ok, "values", "a tensor, since the pattern is another one", describe(values))
        layout = self._layout_of({name: tensor.cpu() for name, tensor in pattern.items()}, values)
        wanted = f"tensor {list(layout.values_shape)}, as the pattern says"
        require(values.shape == layout.values_shape, "values", wanted, describe(values))
        self.values.grad = None  # it belongs to the old pattern
        if layout.values_shape != self.layout.values_shape:
            self.values.data = self.values.new_empty(layout.values_shape)
        self.layout = layout
        self._move_layout()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None},"
            f" density={self.layout.density:.3f}"
        )


def _same_numbers(tensor, mine):
    """Are the tensors equal, whatever their dtypes? Neither is narrowed, which would wrap numbers."""
    common = torch.promote_types(tensor.dtype, mine.dtype)
    return torch.equal(tensor.to(mine.device, common), mine.to(common))


def block_pattern(layout):
    """The index tensors that a state dict holds of a :class:`BlockLayout`; the values' shape tells the block's."""
    return dict(zip(("row_ptr", "col_idx", "slot"), layout.by_output, strict=True))


def block_layout_of(pattern, values, out_features, in_features):
    """The inverse of :func:`block_pattern`."""
    require(values.dim() == 3, "values", "3-D tensor", describe(values))
    order = BlockOrder(*(pattern.get(name) for name in ("row_ptr", "col_idx", "slot")))
    return BlockLayout(out_features, in_features, tuple(values.shape[1:]), order)

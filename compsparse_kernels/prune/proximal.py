"""Optimizers that train weights to exact zeros: SGD and AdamW with a proximal map, beta-LASSO; and what makes masks of
the zeros."""

import torch
from torch import nn

from compsparse_kernels.layouts.checks import describe, require
from compsparse_kernels.nn import MaskedLinear
from compsparse_kernels.nn.sparse_linear import LAYOUT_OF_VALUES
from compsparse_kernels.ops import proximal_adamw_, proximal_sgd_
from compsparse_kernels.ops.proximal.api import check_betas, check_nesterov, check_number, check_penalty
from compsparse_kernels.prune.convert import convert
from compsparse_kernels.prune.layers import prunable_layers

UNSUPPORTED = ("maximize", "amsgrad")  # options of torch's optimizers that state dicts may bring


def _check_groups(param, group):
    if group["penalty"] == "group_l1" and param.dim() < 2:
        require(False, "params", "tensors of 2 or more dimensions, as groups are blocks of a matrix", describe(param))
    layout = LAYOUT_OF_VALUES.get(param)
    if group["penalty"] == "group_l1" and group["block_shape"] is not None and param.dim() == 3 and layout is not None:
        wanted = "None for values that are stored as blocks, which are the groups, or as N:M"
        require(False, "block_shape", wanted, f"{group['block_shape']} for those of {layout}")


class _Proximal(torch.optim.Optimizer):
    """What the optimizers share. A subclass makes the step of one parameter, and checks settings of its own."""

    PENALTIES: tuple[str | None, ...] = (None, "l1", "group_l1")

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _check(self, group):
        check_number("lr", group["lr"])
        check_number("weight_decay", group["weight_decay"])
        penalty = group["penalty"]
        require(penalty in self.PENALTIES, "penalty", f"one of {', '.join(map(repr, self.PENALTIES))}", repr(penalty))
        check_penalty(penalty, group["strength"], group["block_shape"], group.get("beta", 0.0))
        for param in group["params"]:
            _check_groups(param, group)

    def _step(self, param, grad, state, group):
        """One step of a contiguous parameter; ``state`` is filled at the first."""
        raise NotImplementedError

    def __setstate__(self, state):
        for group in state["param_groups"]:
            for name in UNSUPPORTED:
                require(not group.get(name), "state_dict", f"{name}=False (there is no {name} here)", group.get(name))
        super().__setstate__(state)
        for group in self.param_groups:  # what torch's own optimizer saved has no penalty
            for name, value in self.defaults.items():
                group.setdefault(name, value)
        for of_param in self.state.values():  # nor is its state contiguous where a parameter is not
            for name, value in of_param.items():
                of_param[name] = value.contiguous() if isinstance(value, torch.Tensor) else value

    @torch.no_grad()
    def step(self, closure=None):
        """One step of every parameter that has a gradient.

        Args:
            closure: computes the loss again and returns it; or None.

        Returns:
            What the closure returned, or None.

        Raises:
            TypeError: where a gradient is sparse.
            ValueError: where ``"group_l1"`` meets a parameter of one dimension, as the values of kind csr are, or a
                ``block_shape`` meets values that are stored as blocks.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                _check_groups(param, group)  # prune.convert may have exchanged it
                if param.is_contiguous():
                    self._step(param, param.grad, self.state[param], group)
                else:  # the state is that of its rows, one after another
                    rows = param.contiguous()
                    self._step(rows, param.grad, self.state[param], group)
                    param.copy_(rows)
        return loss


class _SGD(_Proximal):
    def _check(self, group):
        super()._check(group)
        check_number("momentum", group["momentum"])
        check_number("dampening", group["dampening"], -float("inf"))
        check_nesterov(group["nesterov"], group["momentum"], group["dampening"])

    def _step(self, param, grad, state, group):
        buffer = state.get("momentum_buffer") if group["momentum"] else None
        first = bool(group["momentum"]) and buffer is None
        if first:
            buffer = torch.empty_like(param)
        proximal_sgd_(
            *(param, grad, buffer),
            lr=group["lr"],
            momentum=group["momentum"],
            dampening=group["dampening"],
            weight_decay=group["weight_decay"],
            nesterov=group["nesterov"],
            first=first,
            penalty=group["penalty"],
            strength=group["strength"],
            beta=group.get("beta", 0.0),
            block_shape=group["block_shape"],
        )
        if first:
            state["momentum_buffer"] = buffer  # now that it is written


class ProximalSGD(_SGD):
    r"""SGD whose weights become exactly 0: :math:`w \leftarrow \mathrm{prox}_{\eta\lambda}(w - \eta d)`.

    It minimises the loss plus :math:`\lambda \|w\|_1` (``"l1"``) or
    :math:`\lambda \sum_g \sqrt{n_g} \|w_g\|_2` (``"group_l1"``); :func:`compsparse_kernels.ops.proximal_sgd_` has the
    formulas. Without a penalty the step is that of ``torch.optim.SGD``.

    Args:
        params: parameters or groups of them, as in torch; float32, float64, float16 or bfloat16. Each group may have
            settings of its own: give ``penalty`` to weights, and leave biases and norms without one. The values of a
            :class:`MaskedLinear` are weights like others; in kind ``"block"`` its blocks are the groups of
            ``"group_l1"`` by default.
        lr, momentum, dampening, weight_decay, nesterov: as in ``torch.optim.SGD``.
        penalty: None, ``"l1"`` or ``"group_l1"``.
        strength: :math:`\lambda`, not negative. The threshold of a step is :math:`\eta\lambda`. Momentum that is not
            dampened makes the loss's gradients ``1 / (1 - momentum)`` as large, but not the penalty: what is minimised
            then is the loss plus ``(1 - momentum) / (1 - dampening)`` of it.
        block_shape: of ``"group_l1"``: blocks ``(rows, columns)`` of the weight as a matrix; None for whole rows, that
            is all that feeds one output. Values of kind ``"block"`` and ``"nm"`` are no such matrix, and take None.

    The state is that of ``torch.optim.SGD``: a state dict of either loads into the other. Half precision is computed
    in float32 and rounded once. :func:`freeze` makes masks of the zeros.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Source: Parikh and Boyd, "Proximal Algorithms" (2014), section 4.2 (proximal gradient method); Poggio, "It is
    Compositional Sparsity: a framework for ML", section 5.1 (sparsity pressure).

    Example:
        >>> import torch
        >>> from compsparse_kernels import prune
        >>> layer, x = torch.nn.Linear(16, 4), torch.randn(64, 16)
        >>> optimizer = prune.ProximalSGD(
        ...     [{"params": [layer.weight], "penalty": "l1", "strength": 0.1}, {"params": [layer.bias]}], lr=0.1
        ... )
        >>> for _ in range(100):
        ...     optimizer.zero_grad()
        ...     (layer(x)[:, 0] - x[:, 3]).square().mean().backward()
        ...     optimizer.step()
        >>> layer.weight[0].count_nonzero().item() < 16 and bool(layer.weight[0, 3] > 0.5)
        True
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        penalty: str | None = None,
        strength: float = 0.0,
        block_shape: tuple[int, int] | None = None,
    ):
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "penalty": penalty,
            "strength": strength,
            "block_shape": block_shape,
        }
        super().__init__(params, defaults)


class BetaLasso(_SGD):
    r"""beta-LASSO: SGD with l1, and a threshold that kills what is small.

    .. math::
        w \leftarrow w - \eta (g + \lambda\,\mathrm{sign}(w)), \qquad w \leftarrow w \cdot 1[|w| \ge \beta\lambda]

    In the paper, fully connected nets that are trained so come to have local connections, as a convolution has.

    Args:
        params: parameters or groups of them, as in torch. A group with ``strength=0`` is plain SGD.
        lr: :math:`\eta`.
        strength: :math:`\lambda`, not negative.
        beta: :math:`\beta`, not negative; 50 in the paper's experiments. A dead weight comes to life where one step
            brings it to :math:`\beta\lambda`.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Source: Neyshabur, "Towards Learning Convolutions from Scratch" (2020), algorithm 1.

    Example:
        >>> import torch
        >>> from compsparse_kernels import prune
        >>> layer = torch.nn.Linear(16, 4)
        >>> optimizer = prune.BetaLasso([layer.weight], lr=0.1, strength=0.002, beta=50)
        >>> layer(torch.randn(8, 16)).square().mean().backward()
        >>> optimizer.step()
        >>> alive = layer.weight[layer.weight != 0]
        >>> bool((alive.abs() >= 0.1).all()) and len(alive) < 64
        True
    """

    PENALTIES = ("hard",)

    def __init__(self, params, lr: float = 1e-3, strength: float = 0.0, beta: float = 50.0):
        sgd = {"lr": lr, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False}
        penalty = {"penalty": "hard", "strength": strength, "beta": beta, "block_shape": None}
        super().__init__(params, sgd | penalty)


class ProximalAdamW(_Proximal):
    r"""AdamW whose weights become exactly 0: each step is followed by the proximal map of a penalty.

    :func:`compsparse_kernels.ops.proximal_adamw_` has the formulas. As AdamW's weight decay, the map is decoupled from
    the gradient's scale: the threshold is :math:`\eta\lambda` for every weight. Without a penalty the step is that of
    ``torch.optim.AdamW``.

    Args:
        params, penalty, strength, block_shape: as in :class:`ProximalSGD`; but as a step of AdamW is about ``lr`` long
            whatever the gradient, strengths are to be compared with 1: a weight dies where its mean gradient is smaller
            than ``strength`` times the root of its mean square.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``.

    The state is that of ``torch.optim.AdamW``: a state dict of either loads into the other.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Source: Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019), algorithm 2; the map as in
    :class:`ProximalSGD`.

    Example:
        >>> import torch
        >>> from compsparse_kernels import prune
        >>> layer, x = torch.nn.Linear(16, 4), torch.randn(64, 16)
        >>> optimizer = prune.ProximalAdamW([layer.weight], lr=0.01, penalty="group_l1", strength=0.5)
        >>> for _ in range(100):
        ...     optimizer.zero_grad()
        ...     (layer(x)[:, 0] - x[:, 3]).square().mean().backward()
        ...     optimizer.step()
        >>> layer.weight.any(1).tolist()
        [True, False, False, False]
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        penalty: str | None = None,
        strength: float = 0.0,
        block_shape: tuple[int, int] | None = None,
    ):
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "penalty": penalty,
            "strength": strength,
            "block_shape": block_shape,
        }
        super().__init__(params, defaults)

    def _check(self, group):
        super()._check(group)
        check_betas(group["betas"])
        check_number("eps", group["eps"])

    def _step(self, param, grad, state, group):
        if not state:
            state["step"] = torch.tensor(0.0)  # a tensor, as torch keeps it
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
        proximal_adamw_(
            *(param, grad, state["exp_avg"], state["exp_avg_sq"]),
            step=1 + int(state["step"]),
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            penalty=group["penalty"],
            strength=group["strength"],
            block_shape=group["block_shape"],
        )
        state["step"] += 1


def freeze(model: nn.Module, kind: str = "auto", optimizer: torch.optim.Optimizer | None = None) -> nn.Module:
    """Store what proximal training left: exact zeros become masks, and layers hold the other weights only, in place.

    Layers of type ``nn.Linear`` (not subclasses) in which some weight is 0 become :class:`MaskedLinear`; a
    :class:`MaskedLinear` in which some stored value is 0 is stored anew without it. Others stay as they are. The model
    computes what it did.

    Args:
        model: any module; a linear layer itself is converted too, then use what is returned.
        kind: how to store the masks, see :meth:`MaskLayout.from_mask`.
        optimizer: exchanged and remapped as in :func:`convert`. Without it, make a new one to train on.

    Returns:
        The model.

    Raises:
        TypeError, ValueError: naming the argument, what was wanted and what came.

    Example:
        >>> import torch
        >>> from compsparse_kernels import prune
        >>> model, x = torch.nn.Sequential(torch.nn.Linear(32, 8)), torch.randn(5, 32)
        >>> optimizer = prune.ProximalSGD([model[0].weight], lr=1.0, penalty="l1", strength=0.15)
        >>> model[0].weight.grad = torch.zeros(8, 32)
        >>> optimizer.step()
        >>> y = model(x)
        >>> model = prune.freeze(model, kind="csr")
        >>> type(model[0]).__name__, model[0].values.numel() < 64, torch.allclose(model(x), y, atol=1e-5)
        ('MaskedLinear', True, True)
    """
    require(isinstance(model, nn.Module), "model", "nn.Module", type(model).__name__, TypeError)
    masks = {}
    for name, layer in prunable_layers(model).items():
        alive = layer.weight.detach() != 0
        stored = layer.layout.to_mask() if isinstance(layer, MaskedLinear) else torch.ones_like(alive)
        if not torch.equal(alive, stored):
            masks[name] = alive
    return convert(model, masks, kind, optimizer)

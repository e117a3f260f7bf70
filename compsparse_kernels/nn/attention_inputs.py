"""What ``nn.MultiheadAttention`` takes, as thresholded attention wants it: masks, and nested tensors as sequences."""

from typing import NamedTuple

import torch

from compsparse_kernels.layouts.checks import describe, require


class Sequences(NamedTuple):
    """A nested tensor with its tokens one after another: ``tokens [1, total, width]``, ``bounds`` int64 ``[S + 1]``."""

    tokens: torch.Tensor
    bounds: torch.Tensor


def pack(*nested: torch.Tensor) -> list[Sequences]:
    """Each tensor is packed once, so that what was one object stays one."""
    packed = {id(tensor): _pack(tensor) for tensor in nested}
    return [packed[id(tensor)] for tensor in nested]


def _pack(nested):
    if nested.layout == torch.jagged:
        return Sequences(nested.values().unsqueeze(0), nested.offsets())
    parts = nested.unbind()
    lengths = torch.tensor([0, *map(len, parts)], device=nested.device)
    return Sequences(torch.cat(parts).unsqueeze(0), lengths.cumsum(0))


def unpack(tokens: torch.Tensor, like: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """``tokens [1, total, width]`` as a nested tensor of the layout of ``like``, with its sequences."""
    if like.layout == torch.jagged:
        return torch.nested.nested_tensor_from_jagged(tokens.squeeze(0), bounds)
    return torch.nested.as_nested_tensor(list(tokens.squeeze(0).split(bounds.diff().tolist())))


def padded_weights(support, bounds: torch.Tensor, key_bounds: torch.Tensor) -> torch.Tensor:
    """Weights of packed sequences, ``[S, H, longest Tq, longest Tk]``; 0 where a sequence has ended."""
    _, heads, queries, _ = support.shape
    lengths, key_lengths = bounds.diff(), key_bounds.diff()
    sequence = torch.arange(len(lengths), device=bounds.device).repeat_interleave(lengths)  # of each query
    place = torch.arange(queries, device=bounds.device) - bounds[sequence]
    rows = torch.arange(heads * queries, device=bounds.device).repeat_interleave(support.row_ptr.diff())
    head, query = rows // max(1, queries), rows % max(1, queries)
    of = sequence[query]
    most, most_keys = (int(each.max()) if len(each) else 0 for each in (lengths, key_lengths))
    dense = support.weights.new_zeros(len(lengths), heads, most, most_keys)
    dense[of, head, place[query], support.col_idx - key_bounds[of]] = support.weights
    return dense


def masks_of(attn_mask, key_padding_mask, q, k, batched):
    """The masks of ``nn.MultiheadAttention`` as the op's: ``attn_bias`` (float, or True = may attend) and padding."""
    (batch, heads, queries, _), keys = q.shape, k.shape[2]
    bias = padding = None
    if attn_mask is not None:
        shapes = ((queries, keys), (batch * heads, queries, keys))
        _check_mask("attn_mask", attn_mask, shapes)
        bias = attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (batch, heads))
        bias = ~bias if bias.dtype == torch.bool else bias.to(q.dtype)
    if key_padding_mask is not None:
        _check_mask("key_padding_mask", key_padding_mask, [(batch, keys)] if batched else [(keys,)])
        padding = key_padding_mask.view(batch, keys)
        if padding.dtype != torch.bool:
            bias = add_bias(bias, padding.to(q.dtype)[:, None, None])  # [B, 1, 1, Tk]
            padding = None
    return {"attn_bias": bias, "key_padding_mask": padding}


def add_bias(bias, added):
    """The sum of two biases, the first of which may be bool (true = may attend) or None."""
    if bias is None:
        return added
    return added.where(bias, -torch.inf) if bias.dtype == torch.bool else bias + added


def _check_mask(name, mask, shapes):
    ok = isinstance(mask, torch.Tensor) and (mask.dtype == torch.bool or mask.is_floating_point())
    if not (ok and tuple(mask.shape) in shapes):  # messages are not written before: torch.compile can't, of free sizes
        wanted = f"bool or float tensor {' or '.join(str(list(shape)) for shape in shapes)}"
        require(False, name, wanted, describe(mask), ValueError if isinstance(mask, torch.Tensor) else TypeError)


def check_inputs(query, *others, sizes, batch_first):
    """Query, key and perhaps value: dense or all nested, 2-D or 3-D, with the module's numbers of features."""
    names = ("query", "key", "value")
    batch = 0 if batch_first else 1
    for name, x, features in zip(names, (query, *others), sizes, strict=False):
        ok = isinstance(x, torch.Tensor) and x.dim() in (2, 3)
        if ok and x.is_nested:
            _check_nested(name, x, query, batch_first)
        if not (ok and x.size(-1) == features):
            require(False, name, f"2-D or 3-D tensor [..., {features}]", describe_input(x))
        if x.is_nested != query.is_nested:
            require(False, name, "a nested tensor, like query", describe_input(x))
        if x.dim() != query.dim():
            require(False, name, f"{query.dim()}-D, like query", describe_input(x))
        if x.dim() == 3 and x.size(batch) != query.size(batch):
            require(False, name, f"batch {query.size(batch)}, like query", describe_input(x))
    if len(others) == 2 and not query.is_nested and others[0].shape[:-1] != others[1].shape[:-1]:
        key, value = others
        require(False, "value", f"as many tokens as key, {list(key.shape[:-1])}", describe(value))


def _check_nested(name, x, query, batch_first):
    wanted = "a dense tensor, or a nested one [B, tokens, width] with batch_first=True"
    require(batch_first, name, wanted, "a nested one without batch_first")
    require(x.dim() == 3, name, wanted, f"a {x.dim()}-D nested one")
    require(query.is_nested, name, "a dense tensor, like query", "a nested one")
    require(x.size(0) > 0, name, "at least one sequence", "none")
    whole = x.layout != torch.jagged or (x._ragged_idx == 1 and x.lengths() is None)
    require(whole, name, wanted, "one whose tokens are not one after another")


def describe_input(x) -> str:
    """As ``describe``; a nested tensor has no shape to print."""
    return f"{x.dim()}-D nested tensor" if isinstance(x, torch.Tensor) and x.is_nested else describe(x)

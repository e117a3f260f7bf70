"""Schemas, fakes and the fallback of thresholded attention. Constitution: all backends and tests change with it.

``compsparse::threshold_attention``           the output only, ``[B, H, Tq, Dv]``; the support is not stored
``compsparse::threshold_attention_support``   output, the support by rows ``(b, h, i)``: row_ptr, col_idx, weights
                                              ``[nnz]``, and of each row ``[B, H, Tq]`` log_sum and slope
``compsparse::threshold_attention_backward``  gradients of query, key, value, of the scores of the support ``[nnz]``,
                                              and of each row's cut ``[B, H, Tq]``
``compsparse::threshold_attention_is_dense``  is so much kept, by a look at a few queries, that training by the next two
                                              is faster? CPU kernels alone have them; elsewhere False
``compsparse::threshold_attention_bits``      output, and what makes the weights of scores computed again: a bit for
                                              each key kept, int64 ``[B, H, Tq, ceil(Tk / 64)]``; of each row
                                              ``[B, H, Tq]`` its largest score, one over its sum of exp(score - largest)
``compsparse::threshold_attention_bits_backward``  gradients of query, key and value
``compsparse::threshold_attention_index``     what the screen knows of keys ``[B, Hkv, Tk, D]``: uint8, opaque; empty
                                              where the kernels in use screen without one
``compsparse::threshold_attention_index_``    writes the entries of the keys ``first, first + 1, ...`` into an index

The arguments of the forward ops:

- ``attn_bias`` has four dimensions, each of full size or 1, and is bool (true = may attend) or of the query's dtype;
  the gradient of a bias is summed from that of the scores. ``key_padding_mask [B, Tk]`` is true where a key is ignored.
- ``alibi_slopes`` float32 ``[H]``: ``-slope |i + query_offset - j|`` is added to the scores.
- ``thresholds`` float64 ``[B or 1, H or 1, Tq or 1]`` in place of the number ``threshold`` (rules relative, absolute).
- ``cu_seqlens_q, cu_seqlens_k`` int64 ``[S + 1]`` on the CPU, both or none, with B = 1: tokens of S sequences one after
  another. A query sees the keys of its own sequence; causality, the window and ALiBi count from its beginning, columns
  of the support from the first key of all.
- ``index``: of these keys, or None.
- ``rule`` relative, absolute, topk (``threshold`` keys), topp (a mass of ``threshold``), entmax (``threshold`` is its
  alpha, 2 is sparsemax). ``weighting`` softmax, rectified, shrink; entmax has its own.
- query i sees the keys ``j`` of ``p - window_left .. p + window_right`` with ``p = i + query_offset`` (-1: no bound),
  and ``j <= p`` if ``is_causal``.
- ``dropout_p, seed``: of the weights; which entry is dropped depends on the seed, its row and its column alone.

A ``SymInt`` is an int64 to the kernels; to ``torch.compile`` it is a number that may change without a new graph.
``slope`` is what the backward needs beside the weights (see reference.py).
"""

import torch

from compsparse_kernels.ops.backends import register_triton
from compsparse_kernels.ops.threshold_attention import reference

lib = torch.library.Library("compsparse", "FRAGMENT")
TAGS = (torch.Tag.pt2_compliant_tag,)
INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? attn_bias, Tensor? key_padding_mask, Tensor? alibi_slopes,"
    " Tensor? thresholds, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? index, float threshold, str rule,"
    " str weighting, bool is_causal, int window_left, int window_right, SymInt query_offset, float scale,"
    " float dropout_p, SymInt seed"
)
SUPPORT = "Tensor row_ptr, Tensor col_idx, Tensor weights, Tensor log_sum, Tensor slope"
BITS = "Tensor kept, Tensor top, Tensor inverse"

lib.define(f"threshold_attention({INPUTS}) -> Tensor", tags=TAGS)
lib.define(
    f"threshold_attention_support({INPUTS}) -> (Tensor out, {SUPPORT})", tags=(*TAGS, torch.Tag.dynamic_output_shape)
)
lib.define(
    "threshold_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor row_ptr, Tensor col_idx,"
    " Tensor weights, Tensor slope, float threshold, str rule, str weighting, float scale, float dropout_p,"
    " SymInt seed) -> (Tensor query_grad, Tensor key_grad, Tensor value_grad, Tensor score_grad, Tensor cut_grad)",
    tags=TAGS,
)
lib.define(f"threshold_attention_is_dense({INPUTS}) -> bool", tags=TAGS)
lib.define(f"threshold_attention_bits({INPUTS}) -> (Tensor out, {BITS})", tags=TAGS)
lib.define(
    f"threshold_attention_bits_backward(Tensor grad, Tensor out, {BITS}, {INPUTS}) -> (Tensor query_grad,"
    " Tensor key_grad, Tensor value_grad)",
    tags=TAGS,
)
lib.define("threshold_attention_index(Tensor key) -> Tensor", tags=TAGS)
lib.define("threshold_attention_index_(Tensor(a!) index, Tensor key, SymInt first) -> ()", tags=TAGS)
_OPS = ("", "_support", "_backward", "_is_dense", "_bits", "_bits_backward", "_index", "_index_")
for name in _OPS:
    lib.impl(
        f"threshold_attention{name}", getattr(reference, f"threshold_attention{name}"), "CompositeExplicitAutograd"
    )


def _asked_of_forward(query, key, value, *options):
    return {"tensors": (query, key, value), "rule": options[_RULE_AFTER_VALUE]}


def _asked_of_backward(grad, query, key, value, *options):
    return {"tensors": (grad, query, key, value), "rule": options[_RULE_AFTER_SLOPE]}


_RULE_AFTER_VALUE, _RULE_AFTER_SLOPE = 8, 5
for name, asked in (("", _asked_of_forward), ("_support", _asked_of_forward), ("_backward", _asked_of_backward)):
    op = f"threshold_attention{name}"
    register_triton(lib, op, f"{__package__}.triton", getattr(reference, op), asked)


@torch.library.register_fake("compsparse::threshold_attention", lib=lib)
def _(query, key, value, *options):
    return query.new_empty(*query.shape[:3], value.shape[3])


@torch.library.register_fake("compsparse::threshold_attention_support", lib=lib)
def _(query, key, value, *options):
    survivors = torch.library.get_ctx().new_dynamic_size()
    dtype = reference.sum_dtype(query)
    rows = query.shape[:3]
    return (
        query.new_empty(*rows, value.shape[3]),
        query.new_empty(rows[0] * rows[1] * rows[2] + 1, dtype=torch.int64),
        query.new_empty(survivors, dtype=torch.int32),
        query.new_empty(survivors, dtype=dtype),
        query.new_empty(rows, dtype=dtype),
        query.new_empty(rows, dtype=dtype),
    )


@torch.library.register_fake("compsparse::threshold_attention_backward", lib=lib)
def _(grad, query, key, value, row_ptr, col_idx, weights, *options):
    inputs = (tensor.new_empty(tensor.shape) for tensor in (query, key, value))
    return *inputs, weights.new_empty(weights.shape), weights.new_empty(query.shape[:3])


@torch.library.register_fake("compsparse::threshold_attention_bits", lib=lib)
def _(query, key, value, *options):
    rows = query.shape[:3]
    return (
        query.new_empty(*rows, value.shape[3]),
        query.new_empty(*rows, reference.words_for(key.shape[2]), dtype=torch.int64),
        query.new_empty(rows),
        query.new_empty(rows),
    )


@torch.library.register_fake("compsparse::threshold_attention_bits_backward", lib=lib)
def _(grad, out, kept, top, inverse, query, key, value, *options):
    return tuple(tensor.new_empty(tensor.shape) for tensor in (query, key, value))


@torch.library.register_fake("compsparse::threshold_attention_index", lib=lib)
def _(key):
    return key.new_empty(reference.index_shape(key), dtype=torch.uint8)


@torch.library.register_fake("compsparse::threshold_attention_index_", lib=lib)
def _(index, key, first):
    return None

"""Schemas, fakes and the fallback of thresholded attention. Constitution: all backends and tests change with it.

``compsparse::threshold_attention``           the output only, ``[B, H, Tq, Dv]``; the support is not stored
``compsparse::threshold_attention_support``   output, and the support by rows ``(b, h, i)``: row_ptr, col_idx, weights
``compsparse::threshold_attention_backward``  gradients of query, key, value, and of the scores of the support ``[nnz]``

``attn_bias`` has four dimensions, each of full size or 1, and is bool (true = may attend) or of the query's dtype;
``key_padding_mask [B, Tk]`` is true where a key is ignored. The gradient of a bias is summed from that of the scores.
"""

import torch

from compsparse_kernels.ops.threshold_attention import reference

lib = torch.library.Library("compsparse", "FRAGMENT")
TAGS = (torch.Tag.pt2_compliant_tag,)
INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor? attn_bias, Tensor? key_padding_mask, float threshold, str rule,"
    " bool is_causal, float scale"
)

lib.define(f"threshold_attention({INPUTS}) -> Tensor", tags=TAGS)
lib.define(
    f"threshold_attention_support({INPUTS}) -> (Tensor out, Tensor row_ptr, Tensor col_idx, Tensor weights)",
    tags=(*TAGS, torch.Tag.dynamic_output_shape),
)
lib.define(
    "threshold_attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor row_ptr, Tensor col_idx,"
    " Tensor weights, float scale) -> (Tensor query_grad, Tensor key_grad, Tensor value_grad, Tensor score_grad)",
    tags=TAGS,
)
for name in ("threshold_attention", "threshold_attention_support", "threshold_attention_backward"):
    lib.impl(name, getattr(reference, name), "CompositeExplicitAutograd")


@torch.library.register_fake("compsparse::threshold_attention", lib=lib)
def _(query, key, value, attn_bias, key_padding_mask, threshold, rule, is_causal, scale):
    return query.new_empty(*query.shape[:3], value.shape[3])


@torch.library.register_fake("compsparse::threshold_attention_support", lib=lib)
def _(query, key, value, attn_bias, key_padding_mask, threshold, rule, is_causal, scale):
    survivors = torch.library.get_ctx().new_dynamic_size()
    return (
        query.new_empty(*query.shape[:3], value.shape[3]),
        query.new_empty(query.shape[0] * query.shape[1] * query.shape[2] + 1, dtype=torch.int64),
        query.new_empty(survivors, dtype=torch.int32),
        query.new_empty(survivors),
    )


@torch.library.register_fake("compsparse::threshold_attention_backward", lib=lib)
def _(grad, query, key, value, row_ptr, col_idx, weights, scale):
    return *(tensor.new_empty(tensor.shape) for tensor in (query, key, value)), weights.new_empty(weights.shape)

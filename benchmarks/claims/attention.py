"""Softmax attention of torch with the parameters of ThresholdAttention: the peer of C7 and of the character model."""

import torch.nn.functional as F

from compsparse_kernels import ThresholdAttention


class SoftmaxAttention(ThresholdAttention):
    """Every key, by ``F.scaled_dot_product_attention``; batch first, no masks but causality."""

    def forward(self, query, key, value, is_causal=False, **_):
        q, k, v = self._heads(query, key, value)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        return self.out_proj(attended.transpose(1, 2).flatten(2)), None

"""Thresholded attention in models of transformers, randomly initialised, against their own eager attention."""

import pytest
import torch

from compsparse_kernels.nn import huggingface

transformers = pytest.importorskip("transformers")

TINY = 1e-30  # a threshold that keeps every key
SIZES = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
DTYPE = torch.float64


@pytest.fixture(autouse=True)
def registered():
    """The name again with what keeps every key, so that no test depends on another's options."""
    huggingface.register(threshold=TINY)


def bert(implementation="eager", options=None, kind="BertModel"):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **SIZES, attn_implementation=implementation, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0
    )
    return finished(getattr(transformers, kind), config, options)


def llama(implementation="eager", options=None, **more):
    """Two query heads share a key-value head."""
    torch.manual_seed(0)
    sizes = SIZES | {"num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": None}
    config = transformers.LlamaConfig(**sizes, **more, attn_implementation=implementation, pad_token_id=0)
    return finished(transformers.LlamaForCausalLM, config, options)


def finished(kind, config, options):
    if options is not None:
        config.compsparse_threshold = options
    model = kind(config).to(DTYPE).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(8)  # fresh weights are so small that every attention is nearly uniform
    return model


def tokens(batch=3, count=12, seed=1):
    ids = torch.randint(2, 60, (batch, count), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    return ids, mask


def padded(left):
    ids, mask = tokens()
    hidden = torch.arange(12) >= torch.tensor([[12], [8], [5]])
    hidden = hidden.flip(1) if left else hidden
    return ids.masked_fill(hidden, 0), mask.masked_fill(hidden, 0)


def results(model, ids, mask):
    """Outputs where a token is, and the gradients of all parameters."""
    out = model(input_ids=ids, attention_mask=mask)
    out = (out.last_hidden_state if hasattr(out, "last_hidden_state") else out.logits)[mask.bool()]
    grads = torch.autograd.grad(out.square().mean(), list(model.parameters()), allow_unused=True)
    return out, *(grad for grad in grads if grad is not None)


def compare(make, ids, mask):
    """In float64 outputs and gradients are those of "sdpa", whose softmax is in float64 ("eager" has float32 there, and
    NaN for rows without keys). In float32 the output's error against that is at most twice that of "eager", and one
    rounding; gradients have that test in the room of the op, where no other layer rounds too."""
    exact = results(make("sdpa"), ids, mask)
    torch.testing.assert_close(results(make(huggingface.NAME), ids, mask), exact)
    ours, eager = (results(make(name).float(), ids, mask)[0] for name in (huggingface.NAME, "eager"))
    budget = 2 * (eager - exact[0]).abs().max() + torch.finfo(torch.float32).eps * exact[0].abs().max()
    assert (ours - exact[0]).abs().max() <= budget


@pytest.mark.parametrize("make", [bert, llama])
@pytest.mark.parametrize("inputs", ["whole", "padded right", "padded left"])
def test_keeping_every_key_is_eager_attention(make, inputs):
    ids, mask = tokens() if inputs == "whole" else padded(inputs == "padded left")
    compare(make, ids, mask)


def test_a_sliding_window_stays_one():
    sizes = SIZES | {"num_key_value_heads": 2, "sliding_window": 4, "pad_token_id": 0}

    def mistral(implementation):
        torch.manual_seed(0)
        config = transformers.MistralConfig(**sizes, attn_implementation=implementation)
        return finished(transformers.MistralForCausalLM, config, None)

    compare(mistral, *tokens())


SELECTIONS = [{"threshold": 0.6}, {"threshold": 2, "rule": "topk"}, {"threshold": 0.3, "shrink": True}]


@pytest.mark.parametrize("options", SELECTIONS, ids=str)
def test_the_config_decides_over_what_was_registered(options):
    ids, mask = tokens()
    here = llama(huggingface.NAME, options)(ids, mask).logits
    huggingface.register("other", **options)
    there = llama("other")(ids, mask).logits
    assert torch.equal(here, there)
    assert (here - llama(huggingface.NAME)(ids, mask).logits).abs().max() > 1e-3


def test_options_are_saved_with_the_config(tmp_path):
    model = bert(huggingface.NAME, {"threshold": 0.3, "rule": "topp"})
    model.save_pretrained(tmp_path)
    back = transformers.BertModel.from_pretrained(tmp_path, attn_implementation=huggingface.NAME, dtype=DTYPE)
    ids, mask = tokens()
    torch.testing.assert_close(back(ids, mask).last_hidden_state, model(ids, mask).last_hidden_state)
    assert back.config.compsparse_threshold == {"threshold": 0.3, "rule": "topp"}


def test_a_model_may_change_to_it_and_back():
    ids, mask = tokens()
    model = llama(options={"threshold": 0.6})
    before = model(ids, mask).logits
    model.set_attn_implementation(huggingface.NAME)
    assert (model(ids, mask).logits - before).abs().max() > 1e-3
    model.set_attn_implementation("eager")
    assert torch.equal(model(ids, mask).logits, before)


@pytest.mark.parametrize("threshold", [TINY, 0.3])
@pytest.mark.parametrize("left", [False, True])
def test_generation_with_a_cache_is_that_without(threshold, left):
    ids, mask = padded(True) if left else tokens()
    model = llama(huggingface.NAME, {"threshold": threshold})
    options = {"max_new_tokens": 10, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    runs = [model.generate(ids, attention_mask=mask, use_cache=cached, **options) for cached in (True, False)]
    assert torch.equal(runs[0].sequences, runs[1].sequences) and runs[0].sequences.shape == (3, 22)
    torch.testing.assert_close(runs[0].logits, runs[1].logits)
    every_key = llama("sdpa").generate(ids, attention_mask=mask, **options)
    assert torch.equal(every_key.sequences, runs[0].sequences) == (threshold == TINY)


def test_generation_with_a_static_cache():
    """It has room for more tokens than there are; what is not there yet must not be seen."""
    ids, mask = tokens()
    model = llama(huggingface.NAME, {"threshold": 0.3})
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "disable_compile": True}
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), model.generate(ids, **options))


def test_a_second_chunk_of_a_prompt():
    """More than one query, behind tokens in a cache."""
    ids, mask = tokens()
    model = llama(huggingface.NAME, {"threshold": 0.3})
    whole = model(ids, mask).logits
    first = model(ids[:, :7], mask[:, :7], use_cache=True)
    second = model(ids[:, 7:], mask, past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat((first.logits, second.logits), 1), whole)


def test_dropout_in_training_follows_the_seed():
    ids, mask = tokens()
    model = bert(huggingface.NAME)
    for layer in model.encoder.layer:
        layer.attention.self.dropout.p = 0.5
    outputs = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        outputs.append(model.train()(ids, mask).last_hidden_state)
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


# ---- the function itself


class Plain(torch.nn.Module):
    is_causal = False


def inputs(queries=5, keys=7):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, count, 8, generator=generator, dtype=DTYPE) for count in (queries, keys, keys)]


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_a_position_bias_is_added(mask):
    q, k, v = inputs()
    bias = torch.randn(1, 3, 5, 7, generator=torch.Generator().manual_seed(1), dtype=DTYPE)
    hidden = torch.zeros(2, 1, 5, 7, dtype=DTYPE)
    hidden[1, :, :, 5:] = -torch.inf
    given = {"none": None, "bool": hidden == 0, "float": hidden}[mask]
    out, weights = huggingface.attend(
        Plain(), q, k, v, given, position_bias=bias, output_attentions=True, defaults={"threshold": TINY}
    )
    total = bias if mask == "none" else bias + hidden
    expected = (q @ k.mT / 8**0.5 + total).softmax(-1)
    torch.testing.assert_close(weights, expected)
    torch.testing.assert_close(out, (expected @ v).transpose(1, 2))


def test_a_single_query_sees_every_key():
    q, k, v = inputs(1)
    out, weights = huggingface.attend(Plain(), q, k, v, None, is_causal=True, defaults={"threshold": TINY})
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    assert weights is None


@pytest.mark.parametrize(
    "attempt, error, message",
    [
        (lambda: huggingface.register("sdpa"), ValueError, "name: expected one that transformers has not taken"),
        (lambda: huggingface.register(3), TypeError, "name: expected a string, got int"),
        (lambda: huggingface.register(window=3), ValueError, "options: expected some of threshold, .*, got window"),
        (
            lambda: huggingface.attend(Plain(), *inputs(), None, softcap=30.0),
            ValueError,
            "softcap: expected None .*, got one",
        ),
        (
            lambda: bert(huggingface.NAME, {"alpha": 1})(*tokens()),
            ValueError,
            "config.compsparse_threshold: expected s",
        ),
        (lambda: bert(huggingface.NAME, {"threshold": 2.0})(*tokens()), ValueError, r"threshold: expected a number"),
    ],
)
def test_errors(attempt, error, message):
    with pytest.raises(error, match=message):
        attempt()

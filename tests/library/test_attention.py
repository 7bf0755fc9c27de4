"""What a reducer sees of the attention beside it."""

import pytest
import torch
from test_vit import build, images_for, logits

import dhtm


class Spy(dhtm.Reducer):
    """Reduces nothing and remembers what it was shown."""

    needs = frozenset({"keys", "output"})

    def tokens_after(self, n_tokens, layer, grid):
        return n_tokens

    def forward(self, tokens, regions, attention):
        self.seen = attention
        return tokens, regions


@pytest.mark.parametrize("position", ["after_attention", "before_block"])
@pytest.mark.parametrize("name", ["deit_tiny_distilled", "q/k norm, average pooling"])
def test_a_reducer_sees_the_keys_and_the_output_of_the_attention_before_it(name, position):
    model, inputs = build(name), []
    spy = Spy(layers=(2,))
    spy.position = position
    if position == "before_block":
        with pytest.raises(ValueError, match="Spy acts before a block, where its attention has no output yet"):
            dhtm.patch(model, spy)
        spy.needs = frozenset({"keys"})
    dhtm.patch(model, spy)
    attention = model.blocks[1 if position == "after_attention" else 0].attn
    attention.register_forward_hook(lambda module, args, output: inputs.append((args[0], output)))
    logits(model, images_for(model))
    ((normed, output),) = inputs
    prefix = model.num_prefix_tokens
    with torch.inference_mode():
        _, keys, _ = attention.qkv(normed).unflatten(2, (3, attention.num_heads, -1)).unbind(2)
        keys = attention.k_norm(keys)[:, prefix:].transpose(1, 2)
    torch.testing.assert_close(spy.seen.keys, keys)
    if position == "after_attention":
        torch.testing.assert_close(spy.seen.output, output[:, prefix:])
    assert spy.seen.layer == 2 and spy.seen.cls is None


@pytest.mark.parametrize("position", ["after_attention", "before_block"])
def test_checkpointing_shows_a_reducer_the_same_again(position):
    class Diary(Spy):
        def forward(self, tokens, regions, attention):
            seen.append(attention)
            return tokens, regions

    model, seen, diary = build("deit_tiny"), [], Diary(layers=(2, 4))
    diary.position, diary.needs = position, frozenset({"keys", "cls"})
    dhtm.patch(model, diary).train().set_grad_checkpointing()
    model(images_for(model)).sum().backward()
    assert [attention.layer for attention in seen] == [2, 4, 4, 2]
    for first, again in zip(seen[:2], reversed(seen[2:]), strict=True):
        torch.testing.assert_close(again.keys, first.keys)
        torch.testing.assert_close(again.cls, first.cls)


class Gather(dhtm.Reducer):
    """Averages the first 21 tokens, and remembers what attention it was shown in each layer."""

    needs = frozenset({"cls"})

    def __init__(self, position, proportional=False):
        super().__init__(layers=(2, 4))
        self.position, self.proportional_attention, self.seen = position, proportional, {}

    def tokens_after(self, n_tokens, layer, grid):
        return n_tokens - 20

    def forward(self, tokens, regions, attention):
        self.seen[attention.layer] = attention
        token_map = (torch.arange(tokens.shape[1]) - 20).clamp(min=0).expand(len(tokens), -1)
        new = torch.cat([tokens[:, :21].mean(dim=1, keepdim=True), tokens[:, 21:]], dim=1)
        return new, regions.merge(token_map, tokens.shape[1] - 20)


def probabilities(attention, normed, sizes=None):
    """Unfused attention in float32, [B, heads, S, S], and its values, from the input of timm's module."""
    queries, keys, values = attention.qkv(normed).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    queries, keys = attention.q_norm(queries).float(), attention.k_norm(keys).float()
    scores = torch.einsum("bhqd,bhkd->bhqk", queries, keys) / queries.shape[-1] ** 0.5
    return (scores if sizes is None else scores + sizes.log()[:, None, None]).softmax(-1), values


@pytest.mark.parametrize("proportional", [False, True])
@pytest.mark.parametrize("position", ["after_attention", "before_block"])
@pytest.mark.parametrize("name", ["deit_tiny_distilled", "dinov2 with registers", "q/k norm, average pooling"])
def test_a_reducer_sees_the_attention_of_cls_or_without_one_of_all(name, position, proportional):
    model, inputs = build(name), []
    reducer = Gather(position, proportional)
    dhtm.patch(model, reducer)
    for block in model.blocks:
        block.attn.register_forward_hook(lambda module, args, output: inputs.append((module, args[0], output)))
    logits(model, images_for(model))
    prefix, has_cls = model.num_prefix_tokens, name != "q/k norm, average pooling"
    for layer, (attention, normed, output) in enumerate(inputs, start=1):
        reduced = layer if position == "before_block" else layer - 1  # the last layer that reduced before it, or none
        sizes = torch.ones(normed.shape[:2])
        if proportional and reduced:
            sizes[:, prefix:] = dhtm.regions(model, reduced).sizes
        with torch.inference_mode():
            shares, values = probabilities(attention, normed, sizes)
            expected = attention.proj((shares @ values).transpose(1, 2).flatten(2))
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)  # the attention that the model computes
        reads = layer + 1 if position == "before_block" else layer
        if reads in (2, 4):
            expected = (shares[:, :, 0] if has_cls else shares.mean(2)).mean(1)[:, prefix:]
            torch.testing.assert_close(reducer.seen[reads].cls, expected, rtol=1e-4, atol=1e-6)
            assert reducer.seen[reads].layer == reads and reducer.seen[reads].keys is None


@pytest.mark.parametrize("autocast", [False, True])
def test_the_attention_of_cls_is_float32_in_half_precision(autocast):
    model, inputs = build("deit_tiny"), []
    model, images = (model, images_for(model)) if autocast else (model.bfloat16(), images_for(model).bfloat16())
    reducer = Gather("before_block")
    dhtm.patch(model, reducer)
    attention = model.blocks[0].attn
    attention.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits(model, images)
    with torch.inference_mode():
        weights = [weight.bfloat16() for weight in (attention.qkv.weight, attention.qkv.bias)]
        qkv = torch.nn.functional.linear(inputs[0].bfloat16(), *weights)
        queries, keys, _ = qkv.float().unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        shares = (queries[:, :, :1] @ keys.transpose(-2, -1) / queries.shape[-1] ** 0.5).softmax(-1)
    assert reducer.seen[2].cls.dtype == torch.float32
    torch.testing.assert_close(reducer.seen[2].cls, shares.mean(dim=(1, 2))[:, 1:], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "layers", "expected"),
    [
        ("deit_tiny_distilled", "all", (48, 2, (14, 14), (1, 2, 3, 4, 5))),
        ("dinov2 with registers", (2, 4), (48, 5, (8, 8), (2, 4))),
        ("siglip (attention pooling)", (3,), (48, 0, (14, 14), (3,))),
        ("224x336", (2,), (48, 1, (14, 21), (2,))),
    ],
)
def test_a_reducer_is_told_of_the_model_before_its_tokens_are_planned(name, layers, expected):
    class Told(dhtm.DHTM):
        def attach(self, *model):
            super().attach(*model)
            self.model = model

        def tokens_after(self, n_tokens, layer, grid):
            assert self.model == expected and self.schedule == expected[3] and self.n_prefix == expected[1]
            return super().tokens_after(n_tokens, layer, grid)

    told = Told(k=5, layers=layers)
    dhtm.patch(build(name), told)
    assert told.model == expected

"""The attention that a reducer receives."""

import pytest
import torch
from networks import attend, build, images_for, logits

import dhtm


class Gather(dhtm.Reducer):
    """Averages the first 21 tokens, and records the attention that it receives."""

    def __init__(self, position, needs, proportional=False):
        super().__init__(layers=(2, 4))
        self.position, self.needs, self.proportional_attention, self.seen = position, frozenset(needs), proportional, []

    def tokens_after(self, n_tokens, layer, grid):
        return n_tokens - 20

    def forward(self, tokens, regions, attention):
        self.seen.append(attention)
        token_map = (torch.arange(tokens.shape[1]) - 20).clamp(min=0).expand(len(tokens), -1)
        new = torch.cat([tokens[:, :21].mean(dim=1, keepdim=True), tokens[:, 21:]], dim=1)
        return new, regions.merge(token_map, tokens.shape[1] - 20)


@pytest.mark.parametrize(
    ("needs", "proportional"), [({"keys", "received", "output"}, False), ({"cls"}, True), ({"received", "cls"}, True)]
)
@pytest.mark.parametrize("position", ["after_attention", "before_block"])
@pytest.mark.parametrize("name", ["deit_tiny_distilled", "q/k norm, average pooling", "eva without rotations"])
def test_reducer_receives_the_last_attention(name, position, needs, proportional):
    """The queries include prefix tokens; in a model without CLS, "cls" is the attention of all tokens."""
    model, calls = build(name), []
    before = position == "before_block"
    reducer = Gather(position, needs - {"output"} if before else needs, proportional)
    dhtm.patch(model, reducer)
    for block in model.blocks:
        block.attn.register_forward_hook(lambda module, args, output: calls.append((module, args[0], output)))
    logits(model, images_for(model))
    prefix, seen = model.num_prefix_tokens, {attention.layer: attention for attention in reducer.seen}
    for layer, (attention, normed, output) in enumerate(calls, start=1):
        last = layer if before else layer - 1  # the last layer that may have reduced the tokens of this attention
        sizes = torch.ones(normed.shape[:2])
        if proportional and last:
            sizes[:, prefix:] = dhtm.regions(model, last).sizes
        with torch.inference_mode():
            shares, keys, expected = attend(attention, normed, sizes)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)  # so shares and keys are those of the model
        reader = layer + 1 if before else layer
        if reader in (2, 4):
            expected = {
                "keys": keys[:, :, prefix:],
                "output": output[:, prefix:],
                "cls": (shares.mean(2) if name == "q/k norm, average pooling" else shares[:, :, 0]).mean(1)[:, prefix:],
                "received": shares.mean(dim=(1, 2))[:, prefix:],
            }
            for key, value in expected.items():
                value = value if key in reducer.needs else None
                torch.testing.assert_close(getattr(seen[reader], key), value, rtol=1e-4, atol=1e-6)


def test_reducer_before_a_block_cannot_need_the_attention_output():
    with pytest.raises(ValueError, match="Gather acts before a block, where its attention has no output yet"):
        dhtm.patch(build("deit_tiny"), Gather("before_block", {"output"}))


@pytest.mark.parametrize("autocast", [False, True])
def test_cls_attention_is_float32_in_half_precision(autocast):
    model, inputs = build("deit_tiny"), []
    model, images = (model, images_for(model)) if autocast else (model.bfloat16(), images_for(model).bfloat16())
    reducer = Gather("before_block", {"cls"})
    dhtm.patch(model, reducer)
    attention = model.blocks[0].attn
    attention.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits(model, images)
    with torch.inference_mode():
        shares, _, _ = attend(attention.bfloat16(), inputs[0].bfloat16())
    assert reducer.seen[0].cls.dtype == torch.float32
    torch.testing.assert_close(reducer.seen[0].cls, shares[:, :, 0].mean(1)[:, 1:], rtol=1e-3, atol=1e-6)

"""Encoders of transformers that are copied into timm models give the same features and can be patched."""

import pytest
import torch
import transformers

import dhtm

SMALL = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "image_size": 112}
ENCODERS = {
    "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**SMALL, intermediate_size=96)),
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SMALL)),
    "siglip": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SMALL, intermediate_size=96)),
}


@pytest.mark.parametrize(("name", "size"), [*((name, None) for name in ENCODERS), ("dinov2", 168), ("siglip", 64)])
@torch.inference_mode()
def test_copied_encoder_gives_the_same_features(name, size):
    encoder = ENCODERS[name]().eval()
    for parameter in encoder.parameters():  # the initial biases and layer scales would hide one that is not copied
        torch.nn.init.normal_(parameter, std=0.2)
    images = torch.randn(2, 3, size or 112, size or 112)
    options = {"interpolate_pos_encoding": True} if name != "dinov2" else {}  # DINOv2 always interpolates
    expected = encoder(images, **options).last_hidden_state
    model = dhtm.to_timm(encoder, size)
    torch.testing.assert_close(model.forward_features(images), expected, rtol=1e-4, atol=1e-4)
    dhtm.patch(model, dhtm.DHTM(k=5, layers=(2, 3)))
    assert model.forward_features(images).shape[1] == expected.shape[1] - 10


@torch.inference_mode()
def test_timm_model_in_a_wrapper_can_be_patched():
    config = transformers.TimmWrapperConfig(architecture="deit_tiny_patch16_224", num_labels=7)
    classifier = transformers.AutoModelForImageClassification.from_config(config).eval()
    images = torch.randn(2, 3, 224, 224)
    plain = classifier(images).logits
    dhtm.patch(classifier.timm_model, dhtm.DHTM(k=0))
    assert torch.equal(classifier(images).logits, plain)
    dhtm.unpatch(classifier.timm_model)
    dhtm.patch(classifier.timm_model, dhtm.DHTM(k=40))
    assert classifier(images).logits.shape == (2, 7) and dhtm.regions(classifier.timm_model).n_tokens == 196 - 120


def test_unsupported_encoders_raise():
    giant = transformers.Dinov2Model(transformers.Dinov2Config(**SMALL, use_swiglu_ffn=True))
    with pytest.raises(TypeError, match=r"cannot copy a Dinov2Model into a timm model: it has no 'blocks\.0\.mlp"):
        dhtm.to_timm(giant)
    siglip = transformers.SiglipModel(
        transformers.SiglipConfig(text_config={"num_hidden_layers": 1}, vision_config=SMALL)
    )
    with pytest.raises(TypeError, match=r"cannot copy a SiglipModel into a timm model: it has no 'image_size'$"):
        dhtm.to_timm(siglip)
    encoders = {
        "register_tokens": transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**SMALL)),
        "distillation_token": transformers.DeiTModel(transformers.DeiTConfig(**SMALL)),
    }
    for parameter, encoder in encoders.items():
        with pytest.raises(
            TypeError, match=rf"cannot copy a \w+ into a timm model: it also has 'embeddings.{parameter}"
        ):
            dhtm.to_timm(encoder)
    with pytest.raises(TypeError, match=r"cannot patch a ViTModel: .* copy it into a timm model by dhtm\.to_timm"):
        dhtm.patch(ENCODERS["vit"](), dhtm.DHTM(k=5))

"""A patched model under torch.compile and torch.export gives what it gives eagerly, and its regions with it."""

import onnxruntime
import pytest
import timm
import torch

import baselines
import dhtm

METHODS = {
    "dhtm": lambda: dhtm.DHTM(k=30, layers=(1, 3), proportional_attention=True),
    "dhtm, all pairs": lambda: dhtm.DHTM(k=30, layers=(1, 3), connectivity="all"),
    "dhtm_plus": lambda: dhtm.DHTMPlus(60),
    "dhtm, threshold": lambda: dhtm.DHTM(threshold=[0.9, 0.5], layers=(1, 3)),
    "tome": lambda: baselines.ToMe(13),
    "atc": lambda: baselines.ATC(0.7, layers=(1, 3)),
    "pitome": lambda: baselines.PiToMe(0.9),
    "patch_merger": lambda: baselines.PatchMerger(0.7, layers=(1, 3)),
}
IMAGES = torch.randn(3, 1, 56, 56, generator=torch.Generator().manual_seed(0))


def micro(depth):
    """A small random model for 56×56 grey images, with a grid of 14×14 patches."""
    torch.manual_seed(0)
    size = {"img_size": 56, "patch_size": 4, "in_chans": 1, "embed_dim": 64, "num_heads": 2, "num_classes": 10}
    return timm.create_model("deit_tiny_patch16_224", depth=depth, **size)


@pytest.fixture(params=METHODS)
def model(request):
    torch.compiler.reset()  # every method compiles the same code again, which has a limit
    return dhtm.patch(micro(3).eval(), METHODS[request.param]())


@torch.no_grad()
def test_compiled_in_one_graph(model):
    expected, regions = model(IMAGES), dhtm.regions(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IMAGES), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(dhtm.regions(model).assignment, regions.assignment)
    torch.testing.assert_close(compiled(IMAGES[:2]), expected[:2], rtol=1e-5, atol=1e-5)


@pytest.mark.stress
@torch.no_grad()
def test_compiled_to_machine_code():
    """The default compiler of torch.compile, which takes many seconds for each layer."""
    torch.compiler.reset()
    model = dhtm.patch(micro(1).eval(), dhtm.DHTM(k=30, layers=(1,), proportional_attention=True))
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(IMAGES), model(IMAGES), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_exported_for_any_batch_size_and_loaded_again(model, tmp_path):
    batch = torch.export.Dim("batch", min=1, max=64)
    torch.export.save(torch.export.export(model, (IMAGES,), dynamic_shapes=({0: batch},)), tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for images in (IMAGES, IMAGES[:1], IMAGES.repeat(3, 1, 1, 1)):
        torch.testing.assert_close(loaded(images), model(images), rtol=1e-5, atol=1e-5)
    torch.export.export(model, (IMAGES,))
    assert model.reducer.adaptive or dhtm.count_flops(model).merging > 0, (
        "what the trace left in the model does not matter"
    )


@torch.no_grad()
@pytest.mark.parametrize(
    "method",
    [
        dhtm.DHTM(k=3, layers=(2,), linkage="size", backend="torch"),
        baselines.ToMe(13),
    ],
    ids=["dhtm", "tome"],
)
def test_onnx_gives_the_same_in_another_runtime(method, tmp_path):
    model = dhtm.patch(micro(2).eval(), method)
    batch = torch.export.Dim("batch", min=1, max=64)
    torch.onnx.export(model, (IMAGES,), tmp_path / "model.onnx", dynamo=True, dynamic_shapes=({0: batch},))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for images in (IMAGES, IMAGES[:1], IMAGES.repeat(3, 1, 1, 1)):
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=1e-5, atol=1e-5)


def test_onnx_refuses_what_it_has_no_operator_for(tmp_path):
    model = dhtm.patch(micro(1).eval(), dhtm.DHTM(k=3, layers=(1,), backend="numba"))
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match=r"dhtm\.hierarchical_merge"):
        torch.onnx.export(model, (IMAGES,), tmp_path / "model.onnx", dynamo=True)
    assert not (tmp_path / "model.onnx").exists()


def test_a_compiled_model_trains():
    model = dhtm.patch(micro(2), dhtm.DHTM(k=30, layers=(1,)))
    gradients = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        run(IMAGES).square().sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)

"""A patched model under torch.compile and torch.export gives what it gives eagerly, and its regions with it."""

import onnxruntime
import pytest
import timm
import torch

import baselines
import dhtm
from dhtm.harness.models import backbones  # noqa: F401  timm knows deit_micro by it

METHODS = {
    "dhtm": lambda: dhtm.DHTM(k=30, layers=(1, 3), proportional_attention=True),
    "tome": lambda: baselines.ToMe(13),
}
IMAGES = torch.randn(3, 1, 56, 56, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=METHODS)
def model(request):
    torch.manual_seed(0)
    return dhtm.patch(timm.create_model("deit_micro", depth=3).eval(), METHODS[request.param]())


@torch.no_grad()
def test_compiled_in_one_graph(model):
    expected, regions = model(IMAGES), dhtm.regions(model)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(IMAGES), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(dhtm.regions(model).assignment, regions.assignment)
    torch.testing.assert_close(compiled(IMAGES[:2]), expected[:2], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_exported_for_any_batch_size_and_loaded_again(model, tmp_path):
    batch = torch.export.Dim("batch", min=1, max=64)
    torch.export.save(torch.export.export(model, (IMAGES,), dynamic_shapes=({0: batch},)), tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for images in (IMAGES, IMAGES[:1], IMAGES.repeat(3, 1, 1, 1)):
        torch.testing.assert_close(loaded(images), model(images), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "method", [dhtm.DHTM(k=3, layers=(2,), linkage="size", backend="torch"), baselines.ToMe(13)], ids=["dhtm", "tome"]
)
def test_onnx_gives_the_same_in_another_runtime(method, tmp_path):
    torch.manual_seed(0)
    model = dhtm.patch(timm.create_model("deit_micro", depth=2).eval(), method)
    batch = torch.export.Dim("batch", min=1, max=64)
    torch.onnx.export(model, (IMAGES,), tmp_path / "model.onnx", dynamo=True, dynamic_shapes=({0: batch},))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for images in (IMAGES, IMAGES[:1], IMAGES.repeat(3, 1, 1, 1)):
        (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=1e-5, atol=1e-5)


def test_onnx_refuses_what_it_has_no_operator_for(tmp_path):
    model = dhtm.patch(timm.create_model("deit_micro", depth=1).eval(), dhtm.DHTM(k=3, layers=(1,), backend="numba"))
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match=r"dhtm\.hierarchical_merge"):
        torch.onnx.export(model, (IMAGES,), tmp_path / "model.onnx", dynamo=True)
    assert not (tmp_path / "model.onnx").exists()


def test_a_compiled_model_trains():
    torch.manual_seed(0)
    model = dhtm.patch(timm.create_model("deit_micro", depth=2), dhtm.DHTM(k=30, layers=(1,)))
    gradients = []
    for run in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        run(IMAGES).square().sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)

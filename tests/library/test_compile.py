"""A patched model gives the same outputs under torch.compile, torch.export and ONNX Runtime as in eager mode."""

import functools

import onnxruntime
import pytest
import torch
from networks import METHODS, build, images_for

import baselines
import dhtm

CASES = [(METHODS[name], "112") for name in ("DHTM", "ToMe", "ATC", "PiToMe", "PatchMerger")]
CASES += [(functools.partial(dhtm.DHTM, threshold=[0.9, 0.5]), "112")]
CASES += [(METHODS["DHTM"], name) for name in ("dinov3", "rope, mixed axes for each head", "naflex")]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0].func.__name__} in {case[1]}")
def model(request):
    torch.compiler.reset()  # all cases compile the same code, and recompilations are limited
    method, name = request.param
    return dhtm.patch(build(name, depth=2), method(layers=(1, 2)))


@torch.no_grad()
def test_model_compiles_to_one_graph_for_any_batch_size(model):
    images = images_for(model, 3)
    expected, regions = model(images), dhtm.regions(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch._dynamo.mark_dynamic(images, 0)
    torch.testing.assert_close(compiled(images), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(dhtm.regions(model).assignment, regions.assignment)
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(compiled(images[:2]), expected[:2], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_exported_model_can_be_loaded_and_takes_any_batch_size(model, tmp_path):
    images, batch = images_for(model, 3), torch.export.Dim("batch", min=1, max=64)
    torch.export.save(torch.export.export(model, (images,), dynamic_shapes=({0: batch},)), tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for inputs in (images, images[:1], images.repeat(3, 1, 1, 1)):
        torch.testing.assert_close(loaded(inputs), model(inputs), rtol=1e-4, atol=1e-4)
    assert model.reducer.adaptive or dhtm.count_flops(model).merging > 0, "FLOPs can still be counted after an export"


@pytest.mark.stress
@torch.no_grad()
def test_default_compiler_gives_the_same_logits():
    """torch.compile with its default backend takes many seconds for each layer."""
    torch.compiler.reset()
    model = dhtm.patch(build("112", depth=1), dhtm.DHTM(k=30, layers=(1,), proportional_attention=True))
    images = images_for(model)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(images), model(images), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    "method", [dhtm.DHTM(k=3, layers=(2,), linkage="size", backend="torch"), baselines.ToMe(13)], ids=["dhtm", "tome"]
)
def test_onnx_runtime_gives_the_same_logits(method, tmp_path):
    model = dhtm.patch(build("112", depth=2), method)
    images, batch = images_for(model, 3), torch.export.Dim("batch", min=1, max=64)
    torch.onnx.export(model, (images,), tmp_path / "model.onnx", dynamo=True, dynamic_shapes=({0: batch},))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for inputs in (images, images[:1], images.repeat(3, 1, 1, 1)):
        (logits,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(inputs), rtol=1e-4, atol=1e-4)


def test_onnx_export_with_the_numba_backend_fails(tmp_path):
    model = dhtm.patch(build("112", depth=1), dhtm.DHTM(k=3, layers=(1,), backend="numba"))
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match=r"dhtm\.hierarchical_merge"):
        torch.onnx.export(model, (images_for(model),), tmp_path / "model.onnx", dynamo=True)
    assert not (tmp_path / "model.onnx").exists()


def test_compiled_model_has_the_same_gradients():
    model = dhtm.patch(build("112", depth=2).train(), dhtm.DHTM(k=30, layers=(1,)))
    gradients = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        run(images_for(model)).square().sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)

"""A patched model under torch.compile and torch.export gives what it gives eagerly, and its regions with it."""

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
    torch.compiler.reset()  # every method compiles the same code again, which has a limit
    method, name = request.param
    return dhtm.patch(build(name, depth=2), method(layers=(1, 2)))


@torch.no_grad()
def test_compiled_in_one_graph_for_any_batch_size(model):
    images = images_for(model, 3)
    expected, regions = model(images), dhtm.regions(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch._dynamo.mark_dynamic(images, 0)
    torch.testing.assert_close(compiled(images), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(dhtm.regions(model).assignment, regions.assignment)
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(compiled(images[:2]), expected[:2], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_exported_for_any_batch_size_and_loaded_again(model, tmp_path):
    images, batch = images_for(model, 3), torch.export.Dim("batch", min=1, max=64)
    torch.export.save(torch.export.export(model, (images,), dynamic_shapes=({0: batch},)), tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for some in (images, images[:1], images.repeat(3, 1, 1, 1)):
        torch.testing.assert_close(loaded(some), model(some), rtol=1e-4, atol=1e-4)
    assert model.reducer.adaptive or dhtm.count_flops(model).merging > 0, "what the trace left does not matter"


@pytest.mark.stress
@torch.no_grad()
def test_compiled_to_machine_code():
    """The default compiler of torch.compile, which takes many seconds for each layer."""
    torch.compiler.reset()
    model = dhtm.patch(build("112", depth=1), dhtm.DHTM(k=30, layers=(1,), proportional_attention=True))
    images = images_for(model)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(images), model(images), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    "method", [dhtm.DHTM(k=3, layers=(2,), linkage="size", backend="torch"), baselines.ToMe(13)], ids=["dhtm", "tome"]
)
def test_onnx_gives_the_same_in_another_runtime(method, tmp_path):
    model = dhtm.patch(build("112", depth=2), method)
    images, batch = images_for(model, 3), torch.export.Dim("batch", min=1, max=64)
    torch.onnx.export(model, (images,), tmp_path / "model.onnx", dynamo=True, dynamic_shapes=({0: batch},))
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for some in (images, images[:1], images.repeat(3, 1, 1, 1)):
        (logits,) = session.run(None, {session.get_inputs()[0].name: some.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), model(some), rtol=1e-4, atol=1e-4)


def test_onnx_refuses_what_it_has_no_operator_for(tmp_path):
    model = dhtm.patch(build("112", depth=1), dhtm.DHTM(k=3, layers=(1,), backend="numba"))
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match=r"dhtm\.hierarchical_merge"):
        torch.onnx.export(model, (images_for(model),), tmp_path / "model.onnx", dynamo=True)
    assert not (tmp_path / "model.onnx").exists()


def test_a_compiled_model_trains():
    model = dhtm.patch(build("112", depth=2).train(), dhtm.DHTM(k=30, layers=(1,)))
    gradients = []
    for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        run(images_for(model)).square().sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)

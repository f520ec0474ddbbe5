# SPDX-License-Identifier: Apache-2.0
"""Saved compact models come back as they were, and damaged or foreign ones are refused."""

import copy
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from torch import Tensor, nn

import l0kernels as l0
from l0kernels.bench import zoo
from l0kernels.compact import files

pytest.importorskip("safetensors", reason="needs the extra export")
FORMATS = ["safetensors", "state_dict"]


class Net(nn.Module):
    """Every layout of weights: [out, in], depthwise, [in, out], per channel, and tied ones."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.a = nn.Conv2d(3, 40, 3, padding=1)
        self.norm = nn.BatchNorm2d(40)
        self.depth = nn.Conv2d(40, 40, 3, padding=1, groups=40)
        self.b = nn.Conv2d(40, 34, 3, padding=1, bias=False)
        self.up = nn.ConvTranspose2d(34, 6, 2, stride=2)
        self.grouped = nn.Conv2d(6, 6, 1, groups=3)
        self.fc = nn.Linear(6, 3)
        self.out = nn.Linear(3, 5, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.depth(torch.relu(self.norm(self.a(x)))))
        y = self.grouped(torch.relu(self.up(torch.relu(self.b(y)))))
        return self.out(self.fc(y.mean((2, 3))))


X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def fresh(seed: int = 1) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


@pytest.fixture(scope="module")
def converted() -> nn.Module:
    net = l0.convert(fresh(0), "hard_concrete", example_inputs=(X,), seed=3)
    with torch.no_grad():
        net.l0.log_alpha.copy_(torch.randn(net.l0.count, generator=torch.manual_seed(4)) * 4 - 2)
    return net


@pytest.fixture
def small(converted: nn.Module) -> nn.Module:
    net = l0.compact(converted, (X,))
    assert net.a.out_channels == net.depth.groups < 40 and net.b.out_channels < 34
    return net


@pytest.fixture(params=FORMATS)
def folder(request: pytest.FixtureRequest, small: nn.Module, tmp_path: Path) -> Path:
    l0.save_compact(small, tmp_path / "saved", request.param)
    return tmp_path / "saved"


def test_round_trip(folder, small):
    model = fresh()
    parameters = dict(model.named_parameters())
    assert l0.load_compact(model, folder) is model
    assert str(model) == str(small)
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert model.out.weight is model.embed.weight
    for name, t in small.state_dict().items():
        assert torch.equal(model.state_dict()[name], t)
        assert model.state_dict()[name].stride() == t.stride()
    assert torch.equal(model(X), small(X))


def test_a_loaded_model_trains_and_is_saved_again(folder, tmp_path):
    model = l0.load_compact(fresh(), folder).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
    l0.save_compact(model, tmp_path / "again")
    again = l0.load_compact(fresh(2), tmp_path / "again")
    assert torch.equal(again(X), model.eval()(X))


def test_a_copy_is_saved_alike(small, tmp_path):
    l0.save_compact(copy.deepcopy(small), tmp_path)
    assert torch.equal(l0.load_compact(fresh(), tmp_path)(X), small(X))


def test_a_model_with_full_widths_is_saved_too(tmp_path):
    model = fresh(5)
    l0.save_compact(model, tmp_path)
    assert torch.equal(l0.load_compact(fresh(), tmp_path)(X), model(X))


@pytest.mark.parametrize("name", ["mobilenetv3", "signal", "unet", "gpt2", "llama"])
def test_networks_of_many_kinds_come_back(name, tmp_path):
    entry = zoo.entry(name)
    if not entry.available():
        pytest.skip(f"{name} needs {entry.needs}")
    inputs = entry.example("small", 2)
    net = l0.convert(entry.build("small"), "hard_concrete", example_inputs=inputs)
    with torch.no_grad():
        net.l0.log_alpha.copy_(torch.randn(net.l0.count) * 4 - 1)
    small = l0.compact(net, inputs).eval()
    l0.save_compact(small, tmp_path)
    loaded = l0.load_compact(entry.build("small", seed=1).eval(), tmp_path)
    assert str(loaded) == str(small)
    for a, b in zip(zoo.floating(small(*inputs)), zoo.floating(loaded(*inputs)), strict=True):
        assert torch.equal(a, b)


def test_dtype_mode_and_requires_grad_are_those_of_the_model(folder, small):
    model = fresh().double()
    model.a.weight.requires_grad_(False)
    l0.load_compact(model, folder)
    assert {t.dtype for t in model.parameters()} == {torch.float64}
    assert not model.training and not model.a.weight.requires_grad
    assert torch.equal(model.b.weight, small.b.weight.double())


def test_the_manifest_tells_widths_shapes_and_ties(folder, small):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["l0kernels"] == l0.__version__
    assert manifest["modules"]["b"] == {
        "class": "Conv2d",
        "inputs": small.a.out_channels,
        "outputs": small.b.out_channels,
    }
    assert manifest["modules"]["norm"]["outputs"] == small.a.out_channels
    weight = manifest["tensors"]["b.weight"]
    assert weight["shape"] == list(small.b.weight.shape) and weight["dtype"] == "float32"
    assert manifest["tied"] == {"out.weight": "embed.weight"}
    assert names_in(folder) == {"manifest.json", manifest["file"]}
    digest = hashlib.sha256(tensor_file(folder).read_bytes()).hexdigest()
    assert manifest["sha256"] == digest
    assert manifest["file"].startswith(f"model-{digest[:12]}.")


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def tensor_file(folder: Path) -> Path:
    return folder / json.loads((folder / "manifest.json").read_text())["file"]


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def replace_tensors(folder: Path, name: str, tensor: Tensor) -> None:
    """Other tensors under a hash that is right for them."""
    from safetensors.torch import load_file, save_file

    path = tensor_file(folder)
    save_file(load_file(path) | {name: tensor}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    edit(folder, lambda m: m.update(sha256=digest))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated manifest": (lambda f: truncate(f / "manifest.json"), "expected JSON, got"),
    "binary manifest": (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe"), "expected JSON"),
    "a list": (lambda f: (f / "manifest.json").write_text("[]"), "expected format_version 1"),
    "version": (
        lambda f: edit(f, lambda m: m.update(format_version=2)),
        "expected format_version 1, got 2",
    ),
    "no modules": (
        lambda f: edit(f, lambda m: m.pop("modules")),
        "expected modules of type dict, got None",
    ),
    "width of a wrong type": (
        lambda f: edit(f, lambda m: m["modules"]["a"].update(outputs="9")),
        "module 'a': expected outputs of type int, got '9'",
    ),
    "other file": (
        lambda f: edit(f, lambda m: m.update(file="../model-0123456789ab.pt")),
        "expected file as model-<12 hexadecimal digits> .* got '../model-0123456789ab.pt'",
    ),
    "file of another kind": (
        lambda f: edit(f, lambda m: m.update(file="model-0123456789ab.pkl")),
        r"with a suffix among \['.safetensors', '.pt'\], got 'model-0123456789ab.pkl'",
    ),
    "tied to nothing": (
        lambda f: edit(f, lambda m: m["tied"].update({"out.weight": "gone"})),
        "expected 'out.weight' tied to a tensor, got 'gone'",
    ),
    "tied to a list": (
        lambda f: edit(f, lambda m: m["tied"].update({"out.weight": ["embed.weight"]})),
        r"expected 'out.weight' tied to a tensor, got \['embed.weight'\]",
    ),
    "channels_last of a vector": (
        lambda f: edit(f, lambda m: m["tensors"]["fc.bias"].update(channels_last=True)),
        r"tensor 'fc.bias': expected 4 dimensions for channels_last, got shape \[3\]",
    ),
    "channels_last of a matrix": (
        lambda f: edit(f, lambda m: m["tensors"]["fc.weight"].update(channels_last=True)),
        r"tensor 'fc.weight': expected 4 dimensions for channels_last, got shape \[3, 6\]",
    ),
    "truncated tensors": (
        lambda f: truncate(tensor_file(f)),
        "it is damaged or of another save",
    ),
    "shape beside the manifest": (
        lambda f: replace_tensors(f, "fc.bias", torch.zeros(4)),
        r"tensor 'fc.bias': expected \(\[3\], 'float32'\) as in the manifest, got \(\[4\]",
    ),
    "missing in the file": (
        lambda f: edit(
            f,
            lambda m: m["tensors"].update(more=m["tensors"]["fc.bias"]),
        ),
        "tensor 'more': expected .* got None",
    ),
    "unknown module": (
        lambda f: edit(f, lambda m: m["modules"].update(zz=m["modules"]["a"])),
        "module 'zz': expected Conv2d, got none",
    ),
    "wrong class": (
        lambda f: edit(f, lambda m: m["modules"]["fc"].update({"class": "Conv1d"})),
        "module 'fc': expected Conv1d, got Linear",
    ),
    "wider than the model": (
        lambda f: edit(f, lambda m: m["modules"]["fc"].update(outputs=4)),
        r"module 'fc': expected widths .* at least \(6, 4\) to cut, got \(6, 3\)",
    ),
    "width without features": (
        lambda f: edit(f, lambda m: m["modules"]["b"].update(outputs=0)),
        "module 'b': expected widths",
    ),
    "width that the tensors do not have": (
        lambda f: edit(f, lambda m: m["modules"]["up"].update(outputs=5)),
        "tensor 'up.weight': expected shape",
    ),
    "cut of a layer in groups": (
        lambda f: edit(f, lambda m: m["modules"]["grouped"].update(inputs=3, outputs=3)),
        "tensor 'grouped.weight': expected shape",
    ),
}


def assert_refused(model: nn.Module, folder: Path, error: type[Exception], message: str) -> None:
    before = {name: t.clone() for name, t in model.state_dict().items()}
    shown = str(model)
    with pytest.raises(error, match=message):
        l0.load_compact(model, folder)
    after = model.state_dict()
    assert str(model) == shown and after.keys() == before.keys()
    assert all(torch.equal(after[name], t) for name, t in before.items())


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_and_the_model_untouched(name, small, tmp_path):
    damage, message = DAMAGE[name]
    l0.save_compact(small, tmp_path)
    damage(tmp_path)
    assert_refused(fresh(), tmp_path, ValueError, message)


def test_a_truncated_state_dict_is_refused(small, tmp_path):
    l0.save_compact(small, tmp_path, "state_dict")
    truncate(tensor_file(tmp_path))
    assert_refused(fresh(), tmp_path, ValueError, "it is damaged or of another save")


def test_files_of_two_saves_are_refused(small, tmp_path):
    l0.save_compact(small, tmp_path / "one")
    with torch.no_grad():
        small.fc.bias.add_(1)
    l0.save_compact(small, tmp_path / "two")
    tensor_file(tmp_path / "one").replace(tensor_file(tmp_path / "two"))
    assert_refused(fresh(), tmp_path / "two", ValueError, "of another save")
    (tmp_path / "two" / "manifest.json").replace(tmp_path / "one" / "manifest.json")
    assert_refused(fresh(), tmp_path / "one", FileNotFoundError, r"model-.*\.safetensors")


def test_missing_files(small, tmp_path):
    assert_refused(fresh(), tmp_path, FileNotFoundError, "manifest.json")
    l0.save_compact(small, tmp_path)
    tensor_file(tmp_path).unlink()
    assert_refused(fresh(), tmp_path, FileNotFoundError, r"model-.*\.safetensors")


class Narrow(Net):
    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Parameter(torch.zeros(2))


def test_models_of_another_architecture_are_refused(small, folder):
    assert_refused(Narrow(), folder, ValueError, r"with \['more'\] besides and without \[\]")
    assert_refused(nn.Sequential(), folder, ValueError, "module 'a': expected Conv2d, got none")
    other = fresh()
    other.embed = nn.Embedding(7, 3)
    assert_refused(
        other, folder, ValueError, r"tensor 'embed.weight': expected shape \(7, 3\) .* got \(5, 3\)"
    )
    assert_refused(copy.deepcopy(small), folder.parent / "none", FileNotFoundError, "manifest.json")


def test_models_with_gates_are_refused(converted, folder, tmp_path):
    with pytest.raises(
        ValueError, match="load_compact: expected a plain model, got one with gates"
    ):
        l0.load_compact(converted, folder)
    with pytest.raises(
        ValueError, match="save_compact: expected a plain model, got one with gates"
    ):
        l0.save_compact(converted, tmp_path)


def test_an_untied_model_takes_tied_tensors_as_two(folder, small):
    model = fresh()
    model.out.weight = nn.Parameter(torch.zeros(5, 3))
    l0.load_compact(model, folder)
    assert torch.equal(model.out.weight, small.embed.weight)
    assert model.out.weight.data_ptr() != model.embed.weight.data_ptr()


def test_a_tied_model_takes_no_untied_tensors(small, tmp_path):
    small.out.weight = nn.Parameter(small.embed.weight + 1)
    l0.save_compact(small, tmp_path)
    message = "'out.weight' and 'embed.weight', one tensor in this model, to be one in the file"
    assert_refused(fresh(), tmp_path, ValueError, message)
    model = fresh()
    model.out.weight = nn.Parameter(torch.zeros(5, 3))
    assert torch.equal(l0.load_compact(model, tmp_path)(X), small(X))


class Thrice(nn.Module):
    """One tensor under three names, the first of which is another one in the saved model."""

    def __init__(self, names: str) -> None:
        super().__init__()
        tensors = {name: nn.Parameter(torch.randn(2)) for name in set(names)}
        for attribute, name in zip("abc", names, strict=True):
            setattr(self, attribute, tensors[name])


@pytest.mark.parametrize("names", ["xxy", "xyx", "yxx"])
def test_all_names_of_a_tensor_have_to_be_tied(names, tmp_path):
    l0.save_compact(Thrice(names), tmp_path)
    assert_refused(Thrice("xxx"), tmp_path, ValueError, "one tensor in this model")
    saved, loaded = Thrice(names), Thrice(names)
    l0.save_compact(saved, tmp_path)
    l0.load_compact(loaded, tmp_path)
    assert all(torch.equal(getattr(loaded, n), getattr(saved, n)) for n in "abc")


def test_loading_in_inference_mode_gives_a_model_that_trains(folder, small):
    model = fresh()
    with torch.inference_mode():
        l0.load_compact(model, folder)
    assert torch.equal(model(X), small(X))
    model(X).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_bad_arguments(small, tmp_path):
    with pytest.raises(ValueError, match=r"expected format among \['safetensors', 'state_dict'\]"):
        l0.save_compact(small, tmp_path, "pickle")
    with pytest.raises(TypeError, match="save_compact: expected a torch.nn.Module, got dict"):
        l0.save_compact({}, tmp_path)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="load_compact: expected a torch.nn.Module, got dict"):
        l0.load_compact({}, tmp_path)  # pyright: ignore[reportArgumentType]
    assert list(tmp_path.iterdir()) == []


class WithExtraState(nn.Linear):
    def __init__(self, extra: object) -> None:
        super().__init__(2, 2)
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: object) -> None:
        pass


@pytest.mark.parametrize("extra", [3, torch.tensor(5.0)], ids=["number", "tensor"])
def test_extra_state_is_refused_and_nothing_written(extra, tmp_path):
    message = r"parameters and buffers only in the state_dict, got \['1._extra_state'\]"
    model = nn.Sequential(nn.Linear(2, 2), WithExtraState(extra))
    with pytest.raises(TypeError, match=message):
        l0.save_compact(model, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_tensors_that_a_hook_makes_are_refused(tmp_path):
    model = nn.Linear(2, 2)

    def double(module: nn.Module, state: dict[str, Tensor], *rest: object) -> None:
        state["weight"] = state["weight"] * 2

    model.register_state_dict_post_hook(double)
    with pytest.raises(TypeError, match=r"got \['weight'\]"):
        l0.save_compact(model, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_without_safetensors_the_message_names_the_extra(small, folder, tmp_path, monkeypatch):
    is_state_dict = tensor_file(folder).suffix == ".pt"
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"pip install 'l0kernels\[export\]'.*state_dict"):
        l0.save_compact(small, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    if is_state_dict:
        assert torch.equal(l0.load_compact(fresh(), folder)(X), small(X))
    else:
        assert_refused(fresh(), folder, ImportError, r"l0kernels\[export\]")


def change(small: nn.Module) -> Tensor:
    """Other weights, and what they give."""
    with torch.no_grad():
        small.fc.bias.add_(1)
        return small(X)


@pytest.mark.parametrize("first", FORMATS)
@pytest.mark.parametrize("second", FORMATS)
def test_a_second_save_replaces_the_first(first, second, small, tmp_path):
    l0.save_compact(small, tmp_path, first)
    bystanders = {"model.pt", "model-0123456789ab.pt", "notes.txt"}
    for name in bystanders:
        (tmp_path / name).write_text("mine")
    old, expected = tensor_file(tmp_path), change(small)
    l0.save_compact(small, tmp_path, second)
    assert not old.exists()
    assert names_in(tmp_path) == bystanders | {"manifest.json", tensor_file(tmp_path).name}
    assert torch.equal(l0.load_compact(fresh(), tmp_path)(X), expected)


def test_the_same_model_saved_twice_stays(small, tmp_path):
    l0.save_compact(small, tmp_path)
    before = names_in(tmp_path)
    l0.save_compact(small, tmp_path)
    assert names_in(tmp_path) == before
    assert torch.equal(l0.load_compact(fresh(), tmp_path)(X), small(X))


@pytest.mark.parametrize(
    "manifest", ["{", "[]", '{"format_version": 1, "file": "../model-0123456789ab.pt"}']
)
def test_a_manifest_that_is_not_ours_removes_nothing(manifest, small, tmp_path):
    victim = tmp_path / "model-0123456789ab.pt"
    victim.write_text("mine")
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "manifest.json").write_text(manifest)
    l0.save_compact(small, folder)
    assert victim.read_text() == "mine"
    assert torch.equal(l0.load_compact(fresh(), folder)(X), small(X))


@pytest.mark.parametrize("step", [0, 1], ids=["tensors", "manifest"])
@pytest.mark.parametrize("changed", [True, False])
def test_a_failing_write_leaves_the_old_files(step, changed, small, tmp_path, monkeypatch):
    l0.save_compact(small, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    if changed:
        change(small)
    replace, steps = os.replace, iter(range(2))

    def fail_at_step(*args: Any) -> None:
        if next(steps) == step:
            raise OSError("no space")
        replace(*args)

    monkeypatch.setattr("os.replace", fail_at_step)
    with pytest.raises(OSError, match="no space"):
        l0.save_compact(small, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


class Crash(BaseException):
    """The process ends: nothing is cleaned up after it."""


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("step", ["tensors", "manifest", "removal"])
def test_a_crash_leaves_a_whole_save(step, format, small, tmp_path, monkeypatch):
    l0.save_compact(small, tmp_path)
    old, new = small(X), change(small)
    write_whole = files.write_whole

    def crash(*args: object, **kwargs: object) -> None:
        monkeypatch.setattr(Path, "unlink", lambda *args, **kwargs: None)
        raise Crash

    def write(path: Path, content: Callable[[BinaryIO], object]) -> None:
        if step == ("manifest" if path.name == "manifest.json" else "tensors"):
            crash()
        write_whole(path, content)
        if step == "removal" and path.name == "manifest.json":
            monkeypatch.setattr(Path, "unlink", crash)

    monkeypatch.setattr(files, "write_whole", write)
    with pytest.raises(Crash):
        l0.save_compact(small, tmp_path, format)
    found = l0.load_compact(fresh(), tmp_path)(X)
    assert torch.equal(found, new if step == "removal" else old)

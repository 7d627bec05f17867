"""Networks and encoders as files of other runtimes: loaded there, equal for any number of rows, or not written."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import parapolicy
from parapolicy import export_graph
from parapolicy.cli import main
from parapolicy.engine.openvino import import_openvino
from parapolicy.networks import NETWORKS, Embedding
from tests.helpers import needs, small_policy
from tests.test_toy_network import OBSERVATION, Toy

CAMERA = {"backbone": "resnet18", "norm": "group", "levels": 1, "crop": [13, 13], "keypoints": 4, "features": 8}
SEEING: dict[str, Any] = {
    "observation": {"camera": parapolicy.Feature((16, 16, 3), "image"), "position": (2,)},
    "network": {
        **{"name": "transformer1d", "n_layer": 1, "n_head": 2, "n_emb": 16},
        "encoder": {"cameras": {"camera": CAMERA}},
    },
}


def assert_the_files_are_the_network(policy: parapolicy.Policy, folder: Path, form: str, rows: int = 5) -> None:
    """Loaded anew, with no more than the files say."""
    facts = json.loads((folder / "policy.json").read_text())
    assert facts["spec"] == policy.spec.to_dict()
    assert facts["normalizer"]["action"]["scale"] == policy.normalizer.maps["action"].scale.tolist()
    given: dict[str, Tensor] = {}
    for name in facts["files"]:
        inputs = facts["files"][name]["inputs"]
        given |= {key: torch.randn(rows, *shape[1:]) for key, shape in inputs.items() if key not in given}
        if name == "network":
            given["timestep"] = torch.arange(rows)
        found = load_and_run(folder, name, form, [given[key] for key in inputs], facts["files"][name]["outputs"])
        if name == "encoder":
            expected = policy.network.encode_images({"camera": given["camera"]})["camera"]
            given["camera"] = expected
        else:
            expected = policy.network.predict(
                given["sample"], given["timestep"], {key: given[key] for key in policy.spec.observation}
            )
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def load_and_run(folder: Path, name: str, form: str, given: list[Tensor], outputs: list[str]) -> Tensor:
    if form == "aoti":
        return torch._inductor.aoti_load_package(str(folder / f"{name}.pt2"))(*given)[0]
    arrays = [value.numpy() for value in given]
    if form == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(folder / f"{name}.onnx")
        named = {place.name: array for place, array in zip(session.get_inputs(), arrays, strict=True)}
        return torch.from_numpy(session.run(outputs, named)[0])
    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    model = import_openvino().Core().compile_model(folder / f"{name}.xml", "CPU", settings)
    return torch.from_numpy(model(arrays)[outputs[0]])


@pytest.mark.parametrize(
    ("form", "sees"),
    [
        pytest.param("onnx", False, marks=needs("onnx", "onnxscript", "onnxruntime")),
        pytest.param("onnx", True, marks=[needs("onnx", "onnxscript", "onnxruntime"), pytest.mark.distributed]),
        pytest.param("openvino", True, marks=needs("openvino")),
        pytest.param("aoti", True, marks=pytest.mark.distributed),  # minutes of compiling
    ],
)
def test_the_files_compute_network_and_encoder(
    form: str, sees: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(NETWORKS, "toy", Toy)
    toy = {"observation": OBSERVATION, "network": {"name": "toy", "width": 16}}
    policy = small_policy(**(SEEING if sees else toy))
    (tmp_path / "out").mkdir()  # an empty folder may be there
    found = export_graph.export_graphs(policy, tmp_path / "out", form)
    assert list(found) == (["encoder", "network"] if sees else ["network"])
    assert max(found.values()) < 1e-4
    assert_the_files_are_the_network(policy, tmp_path / "out", form)


@needs("openvino")
def test_the_command_writes_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = str(tmp_path / "policy"), tmp_path / "out"
    parapolicy.save_policy(small_policy(network={"name": "unet1d", "down_dims": [8], "n_groups": 4}), folder)
    main(["export", folder, str(out), "--format", "openvino"])
    assert sorted(path.name for path in out.iterdir()) == ["network.bin", "network.xml", "policy.json"]
    assert capsys.readouterr().out.startswith(f"wrote {out}: network within ")
    for arguments, message in (
        ([str(out)], "exists and is not an empty folder"),
        ([str(tmp_path / "other"), "--sampler", "secant"], r"\['sampler'\] are options of the format fused"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(["export", folder, *arguments, "--format", "openvino"])


class Counts(Toy):
    """Depends on the number of rows, which a trace takes for a constant."""

    def forward(self, x: Tensor, steps: Embedding, condition: Embedding, step: Tensor, element: Tensor) -> Tensor:
        return super().forward(x, steps, condition, step, element) * len(x)


@needs("openvino")
def test_nothing_is_left_of_a_file_that_computes_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(NETWORKS, "toy", Counts)
    policy = small_policy(observation=OBSERVATION, network={"name": "toy", "width": 16})
    with pytest.raises(ValueError, match=r"network\.xml differs from the network by .* at 1 rows"):
        export_graph.export_graphs(policy, tmp_path / "out", "openvino")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("form", "package"), [("onnx", "onnxruntime"), ("openvino", "openvino")])
def test_a_missing_package_is_named(form: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"pip install 'parapolicy\[{form}\]'"):
        export_graph.export_graphs(small_policy(), tmp_path / "out", form)
    assert list(tmp_path.iterdir()) == []


def test_a_key_of_another_input_s_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has the keys \['sample'\]"):
        export_graph.export_graphs(small_policy(observation={"sample": (2,)}), tmp_path / "out", "openvino")

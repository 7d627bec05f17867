"""The commands that look at a checkpoint: inspect, check, convert."""

import contextlib
import dataclasses
import json
import warnings
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import parapolicy
from eval import find_policy
from parapolicy.calibrate import FILE
from parapolicy.cli import COMMANDS, USAGE, as_flags, main
from parapolicy.commands import as_settings
from parapolicy.normalizer import Affine, Normalizer
from parapolicy.planner import made_up_observations
from parapolicy.samplers import Secant
from tests.conftest import ROOT, SHIPPED
from tests.helpers import small_policy
from tests.lerobot_folders import made_up


def respecified(folder: Path, **changes: Any) -> parapolicy.Policy:
    policy = parapolicy.load_policy(folder, device="cpu", engine="eager")
    return dataclasses.replace(policy, spec=dataclasses.replace(policy.spec, **changes))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    parapolicy.save_policy(small_policy(), tmp_path / "policy")
    return tmp_path / "policy"


def test_inspect_tells_what_a_policy_wants_and_gives(capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", str(SHIPPED)])
    shown = capsys.readouterr().out
    for words in (
        "unet1d, 4.56 M parameters",
        "keypoint: state 9x2 float32",
        "agent_pos: state 2 float32, mapped from [13.46, 496.1], [32.94, 511]",
        "16 actions, numbers 1 to 8 are executed; control rate 10 Hz",
        "ddpm, 100 of 100 steps, predicts epsilon, clips to 1",
    ):
        assert words in shown


def test_inspect_takes_every_shipped_policy(capsys: pytest.CaptureFixture[str]) -> None:
    """With a camera or without, with the engine that ``load_policy`` takes here."""
    for folder in sorted(SHIPPED.parent.iterdir()):
        if folder.is_dir():
            main(["inspect", str(folder)])
            shown = capsys.readouterr().out
            assert ("  encoder " in shown) == ("image" in folder.name)
            assert "engine eager" not in shown


def test_inspect_prints_the_same_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", str(SHIPPED), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert [feature["key"] for feature in facts["observation"]] == ["keypoint", "agent_pos"]
    assert facts["executed"] == [1, 9]
    assert facts["warnings"] == []
    assert facts["network"]["parameters"] == sum(
        p.numel() for p in parapolicy.load_policy(SHIPPED, device="cpu", engine="eager").network.parameters()
    )


def test_inspect_says_what_is_not_normalised(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy = parapolicy.load_policy(folder, device="cpu", engine="eager")
    position, action = Affine(torch.ones(2), torch.zeros(2)), Affine(torch.ones(2), torch.zeros(2), torch.zeros(2))
    maps = {**policy.normalizer.maps, "position": position, "action": action}
    parapolicy.save_policy(dataclasses.replace(policy, normalizer=Normalizer(maps)), folder)
    main(["inspect", str(folder)])
    shown = capsys.readouterr().out
    assert "position: state 2 float32, not normalised" in shown
    assert "points: state 3x2 float32, mapped from" in shown
    assert "action       2 numbers, not normalised" in shown
    main(["inspect", str(folder), "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert [("low" in feature, "high" in feature) for feature in facts["observation"]] == [(False, False), (True, True)]
    assert "low" not in facts["action"]


def test_inspect_leaves_out_settings_without_a_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    camera = {"backbone": "resnet18", "norm": "group", "crop": None, "keypoints": 2}
    network = {"name": "unet1d", "diffusion_step_embed_dim": 8, "down_dims": [8, 16], "n_groups": 4}
    network |= {"final_groups": None, "encoder": {"cameras": {"camera": camera}, "shared": True}}
    observation = {"position": (2,), "camera": parapolicy.Feature((40, 40, 3), "image")}
    parapolicy.save_policy(small_policy(observation=observation, network=network), tmp_path / "policy")
    main(["inspect", str(tmp_path / "policy")])
    shown = capsys.readouterr().out
    assert "None" not in shown
    assert "camera: image 40x40x3 uint8\n" in shown
    assert "    camera: backbone=resnet18, norm=group, keypoints=2\n" in shown


def test_inspect_warns_of_what_the_file_does_not_say(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    provenance = {"warnings": ["the camera was upside down"]}
    parapolicy.save_policy(respecified(folder, control_hz=None, provenance=provenance), folder)
    main(["inspect", str(folder)])
    shown = capsys.readouterr().out
    assert "control rate unknown" in shown
    assert "warning: the camera was upside down" in shown
    assert "warning: the file does not say the control rate" in shown


def test_check_runs_every_sampler(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["check", str(folder), "--chunks", "2", "--device", "cpu", "--engine", "eager"])
    shown = capsys.readouterr()
    assert "load_policy takes engine fused" in shown.err
    rows = {line.split()[0]: line.split() for line in shown.out.splitlines()[2:]}
    assert set(rows) == set(parapolicy.list_samplers())
    steps = len(parapolicy.load_policy(folder, device="cpu", engine="eager").schedule)
    assert float(rows["sequential"][1]) == float(rows["sequential"][2]) == steps
    assert float(rows["secant"][1]) < steps
    main(["check", str(folder), "--chunks", "1", "--device", "cpu"])
    assert "engine fused" in capsys.readouterr().out  # the one that load_policy takes
    assert rows["speculative"][3:5] == ["another", "draw"]


def test_check_prints_the_same_as_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["check", str(folder), "--chunks", "1", "--device", "cpu", "--engine", "eager", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["checkpoint"], found["chunks"], found["engine"]) == (str(folder), 1, "eager")
    rows = {row["sampler"]: row for row in found["samplers"]}
    assert set(rows) == set(parapolicy.list_samplers())
    assert rows["secant"]["error_median"] == rows["secant"]["error_max"] > 0
    assert rows["speculative"]["error_median"] is None


def test_convert_keeps_answers_to_the_bit(folder: Path, tmp_path: Path) -> None:
    main(["convert", str(folder), str(tmp_path / "out")])
    before, after = (parapolicy.load_policy(path, device="cpu", engine="eager") for path in (folder, tmp_path / "out"))
    assert before.spec == after.spec
    for observation in made_up_observations(before, 2):
        np.testing.assert_array_equal(before.predict(observation).trajectory, after.predict(observation).trajectory)


def test_averaged_weights_are_taken_where_they_are_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, *_ = made_up(tmp_path / "pretrained_model")
    made_up(tmp_path / "pretrained_model_ema")
    for name, flags in (("plain", []), ("ema", ["--ema"])):
        main(["convert", str(path), str(tmp_path / name), *flags])
        converted, policy = (
            parapolicy.load_policy(folder, device="cpu", ema=ema, engine="eager").network.state_dict()
            for folder, ema in ((tmp_path / name, False), (path, bool(flags)))
        )
        assert all(torch.equal(value, policy[key]) for key, value in converted.items())
    asked, load = [], parapolicy.load_policy

    def note(*arguments: Any, **options: Any) -> parapolicy.Policy:
        asked.append(options["ema"])
        return load(*arguments, **options)

    monkeypatch.setattr(parapolicy, "load_policy", note)
    main(["inspect", str(path), "--ema"])
    main(["check", str(path), "--ema", "--chunks", "1", "--device", "cpu"])
    assert asked == [True, True]


def test_a_calibration_is_written_into_a_folder(tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(b"")
    with pytest.raises(SystemExit, match="is a file, expected a policy folder"):
        main(["calibrate", str(tmp_path / "x.ckpt")])


def test_convert_adds_a_control_rate_and_contradicts_none(folder: Path, tmp_path: Path) -> None:
    parapolicy.save_policy(respecified(folder, control_hz=None), folder)
    with pytest.raises(ValueError, match="control_hz is unknown"):
        parapolicy.Controller(parapolicy.load_policy(folder, device="cpu", engine="eager"))
    main(["convert", str(folder), str(tmp_path / "out"), "--control-hz", "12.5"])
    assert (
        parapolicy.Controller(parapolicy.load_policy(tmp_path / "out", device="cpu", engine="eager")).control_hz == 12.5
    )
    with pytest.raises(SystemExit, match="control_hz is 20, but the file says 12"):
        main(["convert", str(tmp_path / "out"), str(tmp_path / "other"), "--control-hz", "20"])


@pytest.mark.parametrize("command", ["inspect", "check", "convert"])
def test_no_checkpoint_is_a_clear_error(command: str, tmp_path: Path) -> None:
    extra = [str(tmp_path / "out")] if command == "convert" else []
    with pytest.raises(SystemExit, match="error: no checkpoint at"):
        main([command, str(tmp_path / "none"), *extra])


def test_convert_does_not_write_over_anything(folder: Path) -> None:
    with pytest.raises(SystemExit, match="not an empty folder"):
        main(["convert", str(folder), str(folder)])


def test_a_warning_is_printed_without_pythons_file_and_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(COMMANDS, "inspect", lambda _: warnings.warn("the sky is low", stacklevel=1))
    main(["inspect"])
    assert capsys.readouterr().err == "warning: the sky is low\n"


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out == f"parapolicy {metadata.version('parapolicy')}\n"


def test_calibrate_writes_what_collocation_takes_from_then_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "policy"
    parapolicy.save_policy(small_policy(), folder)
    recorded = made_up_observations(small_policy(), 20)
    np.savez(tmp_path / "recorded.npz", **{key: np.stack([each[key] for each in recorded]) for key in recorded[0]})
    given = ["--observations", str(tmp_path / "recorded.npz")]
    monkeypatch.setattr("parapolicy.calibrate.LEAST_DRAWS", 4)
    main(["calibrate", str(folder), "--chunks", "8", "--draws", "4", *given])
    shown = capsys.readouterr().out
    assert "12 nodes" in shown
    assert "DDIM-16" in shown
    monkeypatch.setattr("parapolicy.calibrate.calibrate", lambda policy: pytest.fail("measured again"))
    policy = parapolicy.load_policy(folder, sampler="collocation", nodes=12, device="cpu", engine="eager")
    assert policy.schedule.calibration is not None
    assert policy.predict(made_up_observations(policy, 1)[0]).stats.evaluations < 40
    before = policy.schedule.calibration
    assert set(before.distances) == {12, 15, 19}
    main(["calibrate", str(folder), "--chunks", "4", "--draws", "5", "--keep", *given])
    after = parapolicy.load_policy(folder, device="cpu", engine="eager").schedule.calibration
    assert after is not None
    assert after.nodes == before.nodes
    assert torch.equal(after.response, before.response)
    assert after.distances != before.distances
    for too_little in ([], [*given, "--draws", "3"]):  # made-up observations, few draws
        capsys.readouterr()
        main(["calibrate", str(folder), "--chunks", "4", "--draws", "4", "--keep", *too_little])
        assert "load_policy takes secant for this policy: a distance for 24 nodes counts" in capsys.readouterr().out
        found = parapolicy.load_policy(folder, device="cpu", engine="eager")
        assert found.schedule.calibration is not None
        assert found.schedule.calibration.distances == {}
        assert found.sampler == Secant()
    (folder / FILE).unlink()
    with pytest.raises(SystemExit, match="the policy has no calibration"):
        main(["calibrate", str(folder), "--keep"])


def test_a_calibration_of_other_weights_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARAPOLICY_CACHE", str(tmp_path / "cache"))
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        parapolicy.save_policy(small_policy(), folder)  # random weights each
    main(["calibrate", str(one), "--chunks", "4", "--draws", "2"])
    (one / FILE).rename(other / FILE)
    assert parapolicy.load_policy(other, device="cpu", engine="eager").schedule.calibration is None
    policy = parapolicy.load_policy(other, sampler="collocation", device="cpu", engine="eager")
    assert policy.schedule.calibration is not None
    assert len(list((tmp_path / "cache").glob("calibration-*.safetensors"))) == 1
    monkeypatch.setattr("parapolicy.calibrate.calibrate", lambda policy: pytest.fail("measured again"))
    assert (
        parapolicy.load_policy(other, sampler="collocation", device="cpu", engine="eager").schedule.calibration
        is not None
    )


def test_observations_for_calibration_are_checked(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.npz").write_bytes(b"no zip")
    with pytest.raises(SystemExit, match=r"bad\.npz is not an \.npz file of observations"):
        main(["calibrate", str(folder), "--observations", str(tmp_path / "bad.npz")])
    np.savez(tmp_path / "uneven.npz", a=np.zeros((3, 2)), b=np.zeros((4, 2)))
    with pytest.raises(SystemExit, match=r"arrays of lengths \[3, 4\]"):
        main(["calibrate", str(folder), "--observations", str(tmp_path / "uneven.npz")])


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("eval", "train")])
def test_every_command_has_its_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of eval and train, hydra's, are seen where the wheel is tested."""
    with contextlib.suppress(SystemExit):
        main([command, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: parapolicy {command}")


def test_exit_codes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of docs/commands.md."""

    def interrupted(arguments: Sequence[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "interrupted", interrupted)
    for arguments, code in ((["inspekt"], 2), (["inspect"], 2), (["report", "--nope"], 2), (["interrupted"], 130)):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == code
    shown = capsys.readouterr().err
    assert "error: command is 'inspekt', expected one of" in shown[shown.index(USAGE) + len(USAGE) :]


def test_options_have_one_style(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["port=8000", "api_key=a=b", "sampler=secant"]
    assert as_settings(["--port", "8000", "--api-key=a=b", "sampler=secant"]) == settings
    assert as_settings(["--deadline-ms", "-1"]) == ["deadline_ms=-1"]  # refused where it is read
    with pytest.raises(ValueError, match="the setting 'port' has no value"):
        as_settings(["--port"])
    with pytest.raises(ValueError, match="the setting 'api_key' has no value"):
        as_settings(["--api-key", "--port=8000"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=3").mkdir()
    given = ["lr=3", "sweep/lr=4", "chunks=8", "control_hz=20", "--json"]
    assert as_flags(given) == ["lr=3", "sweep/lr=4", "--chunks=8", "--control-hz=20", "--json"]


def test_a_setting_is_an_option(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["check", str(folder), "chunks=1"])
    assert capsys.readouterr().out.startswith("1 made-up observations")


def test_every_command_is_in_the_overview_and_on_its_page() -> None:
    page = (ROOT / "docs" / "commands.md").read_text()
    for command in COMMANDS:
        assert f"       parapolicy {command} " in USAGE.replace("usage:", "      ")
        assert f"\n  {command} " in USAGE
        assert f"| `{command}` |" in page


def test_a_shipped_policy_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("pusht_lowdim", "checkpoints/pusht_lowdim", str(SHIPPED)):
        assert Path(find_policy(name)) == SHIPPED
    (tmp_path / "pusht_lowdim").mkdir()
    assert find_policy("pusht_lowdim") == "pusht_lowdim"  # what is here comes first
    assert find_policy("hf://owner/name") == "hf://owner/name"
    with pytest.raises(ValueError, match="no checkpoint at 'mine/pusht_lowdim'; give checkpoint=FOLDER"):
        find_policy("mine/pusht_lowdim")

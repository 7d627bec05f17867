"""What the documents and the experiments say can be done: every snippet runs, every command and experiment composes."""

import importlib.util
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

import parapolicy
from envs import ENVS, make_env
from parapolicy.evaluate.run.progress import list_jobs
from parapolicy.evaluate.run.variants import build_variants
from parapolicy.networks import build_network
from parapolicy.spec import Feature
from tests.conftest import ROOT, SHIPPED
from tests.helpers import DDPM_CONFIG, configured, small_policy

DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))
}
EXPERIMENTS = sorted(path.stem for path in ROOT.glob("conf/experiment/*.yaml"))
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)

# First line of a snippet that cannot run here -> the reason. Such a snippet is only compiled.
ONLY_COMPILED: dict[str, str] = {
    "# Files of your own.": "checkpoints of other programs are not shipped",
    "# With LeRobot.": "LeRobot has an environment of its own",
    "# With real-stanford/diffusion_policy or robomimic.": "they are in no environment of ours",
}


class Robot:
    """The robot of docs/embedding.md: Push-T's simulator."""

    def __init__(self) -> None:
        self.env = make_env("pusht", parapolicy.load_policy(SHIPPED, device="cpu", engine="eager").spec)
        self.observation, _ = self.env.reset(seed=0)
        self.actions: list[np.ndarray] = []

    def observe(self) -> dict[str, np.ndarray]:
        return self.observation

    def send(self, action: np.ndarray) -> None:
        self.actions.append(action)
        self.observation = self.env.step(action)[0]


class Countdown:
    """True so many times."""

    def __init__(self, times: int) -> None:
        self.left = times

    def __bool__(self) -> bool:
        self.left -= 1
        return self.left >= 0


def push_t_observation() -> dict[str, Any]:
    observation = Robot().observe()
    return {"keypoints": observation["keypoint"], "agent": observation["agent_pos"]}


def robot_in_a_loop() -> dict[str, Any]:
    return {"parapolicy": parapolicy, "robot": Robot(), "running": Countdown(10)}


# What a document's snippets take for granted; the snippets of one document share their names.
GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "README.md": push_t_observation,
    "docs/embedding.md": robot_in_a_loop,
}


def snippets(document: str) -> list[tuple[int, str]]:
    """Number of the line before it, and text, of each Python block."""
    text = DOCUMENTS[document]
    return [(text[: m.start(2)].count("\n"), m[2]) for m in FENCED.finditer(text) if m[1] == "python"]


def commands(document: str) -> list[str]:
    """Every ``python …`` in a block of the shell or in the text."""
    text = DOCUMENTS[document]
    blocks = "".join(m[2] for m in FENCED.finditer(text) if m[1] != "python").replace("\\\n", " ")
    inline = re.findall(r"`(python [^`]+)`", FENCED.sub("", text))
    return [line for line in blocks.splitlines() if line.startswith("python ")] + [" ".join(c.split()) for c in inline]


def test_python_is_found_in_the_documents() -> None:
    """The patterns above still fit the documents."""
    for document, text in DOCUMENTS.items():
        assert len(snippets(document)) == text.count("```python")
    assert sum(len(snippets(document)) for document in DOCUMENTS) >= 4
    assert sum(len(commands(document)) for document in DOCUMENTS) >= 20


@pytest.mark.parametrize("document", [document for document in DOCUMENTS if snippets(document)])
def test_the_snippets_run(document: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PARAPOLICY_CACHE", str(tmp_path))
    names = GIVEN.get(document, dict)()
    try:
        for line, text in snippets(document):
            code = compile("\n" * line + text, document, "exec")
            if text.partition("\n")[0] not in ONLY_COMPILED:
                exec(code, names)
        if "robot" in names:
            assert len(names["robot"].actions) == 10
    finally:
        for value in names.values():
            if isinstance(value, parapolicy.Controller):
                value.close()


def sampler_lists(*words: str) -> list[list[Any]]:
    """The sampler entries of each job that ``python eval.py`` with these words would run, and of its chunk errors."""
    parsed = OverridesParser.create().parse_overrides(list(words))
    single = [word for word, override in zip(words, parsed, strict=True) if not override.is_sweep_override()]
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = hydra.compose("eval", single, return_hydra_config=True)
    config.hydra.overrides.task = list(words)
    for callback in (config.hydra.get("callbacks") or {}).values():
        assert callable(hydra.utils.get_object(callback._target_))
    errors = OmegaConf.to_container(config.errors.samplers) if config.errors.samplers else []
    return [job["samplers"] for job in list_jobs(config)] + ([errors] if errors else [])


def build(entries: list[Any]) -> None:
    """As eval.py makes them, on a small network."""
    variants = build_variants(small_policy(scheduler=DDPM_CONFIG), entries)
    assert len(variants) == len(entries)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_commands_compose(document: str) -> None:
    for command in commands(document):
        program, *words = shlex.split(command, comments=True)[1:]
        if program == "-m":
            assert importlib.util.find_spec(words[0]) is not None, command
        elif "…" in command:
            continue
        elif program == "eval.py":
            for entries in sampler_lists(*(word for word in words if word != "-m")):
                build(entries)
        elif program == "train.py":
            assert configured("train", *words)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_linked_files_are_there(document: str) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", FENCED.sub("", DOCUMENTS[document])):
        if "://" not in target:
            assert (ROOT / document).parent.joinpath(target).exists(), target


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_experiment_composes_and_its_samplers_build(experiment: str) -> None:
    lists = sampler_lists(f"+experiment={experiment}")
    assert lists
    for entries in lists:
        build(entries)


@pytest.mark.parametrize("card", sorted(ROOT.glob("checkpoints/*/README.md")), ids=lambda card: card.parent.name)
def test_a_model_card_tells_the_hub_what_it_is(card: Path) -> None:
    _, front, text = card.read_text().split("---\n", 2)
    facts = yaml.safe_load(front)
    assert (facts["license"], facts["library_name"], facts["pipeline_tag"]) == ("mit", "parapolicy", "robotics")
    assert {"diffusion-policy", card.parent.name.removesuffix("_lowdim")} <= set(facts["tags"])
    assert text.startswith(f"# {card.parent.name}\n")


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / "conf" / group).glob("*.yaml"))


@pytest.mark.parametrize("choice", choices("env"))
def test_the_environment_s_settings_compose(choice: str) -> None:
    assert configured("eval", f"env={choice}").env.name == choice
    assert choice in ENVS


@pytest.mark.parametrize("choice", choices("data"))
def test_the_data_s_settings_describe_a_policy(choice: str) -> None:
    config = configured("train", f"data={choice}", "data.path=FOLDER")
    settings: Any = OmegaConf.to_container(config, resolve=True)
    data = settings["data"]
    assert data["env"] in ENVS
    spec = parapolicy.PolicySpec(
        observation={
            k: Feature(value["shape"], value.get("kind", "state")) for k, value in data["observation"].items()
        },
        action_dim=data["action"]["shape"][0],
        control_hz=data["control_hz"],
        **settings["policy"],
    )
    assert build_network(spec)
    assert all(value["array"] for value in (*data["observation"].values(), data["action"]))


@pytest.mark.parametrize("choice", choices("hydra/launcher"))
def test_the_launcher_composes(choice: str) -> None:
    assert configured("eval", f"hydra/launcher={choice}")

"""README and docs hold measured numbers in blocks that ``make results`` fills, and nowhere else."""

import re

import pytest

from tests.test_documents import DOCUMENTS, FENCED
from tools.fill_docs import BLOCK, block_names
from tools.make_results import read_table

NUMBER = r"\d[\d,]*(?:\.\d+)?"
MEASURED = re.compile(
    "|".join(
        (
            rf"{NUMBER}\s(?:ms|µs|[kMG]i?B|[MG]i?B/s|GFLOP/s)\b",  # times, memory, rates
            rf"{NUMBER}\s?×(?!\s?\d)",  # speed-ups, not sizes of pictures
            rf"{NUMBER}\stimes\s(?:as|more|less|fewer|faster|slower|the|that|those|its)\b",
            rf"(?!\[-1,\s1\])\[[-+]?{NUMBER},\s[-+]?{NUMBER}\]",  # intervals, not the normalised range
            rf"{NUMBER}\s%(?!\s(?:bootstrap\s)?interval|\spower)",
            rf"\bp\s=\s{NUMBER}",
            r"(?<![\d.])0\.\d{2,}(?![\d.])",  # rewards, rates of success, distances
            rf"(?<![\d.]){NUMBER}e-\d",
            r"\d\.\d+\srounds",
        )
    )
)

# What looks measured and is a setting, a limit, or a fact of a paper: as it stands in the page, by page.
ALLOWED: dict[str, tuple[str, ...]] = {
    "docs/checkpoints.md": (  # bounds that tests hold
        "within 1e-5 (raw network calls",
        "and 1e-4 (chunks of the sequential sampler",
        "at tolerance 0 are within 1e-4 of that",
    ),
    "docs/embedding.md": (
        "interval (5 ms",  # Python's default
        "bins of 1 %",
        "a stall of 300 ms leaves no gap",  # by a test
    ),
    "docs/frontier.md": ("±0.02 for rewards and ±0.05 for success",),  # margins
    "docs/images.md": ("the picture differs by 0.07 of 255 on average",),  # of the simulator, by a test
    "docs/latency.md": (
        "no measurable loss up to 300 ms per chunk, blocking control a small one; at 500 ms",  # of a figure's axis
        "exp(−0.01 i)",
    ),
    "docs/lerobot.md": (  # bounds that tests hold
        "LeRobot's own: to 1e-6",
        "differ by more than 0.05 (normalised)",
        "at most 1e-6 from LeRobot's own chunks",
    ),
    "docs/live.md": ("differ by more than 0.05 (normalised)", "needs 0.31 or newer"),
    "docs/performance.md": (
        "spins for 0.3 ms",
        "is within 1e-5 everywhere",
        "equal to the trained network to 1e-6",
        "of reward within ±0.02 and success within ±0.07",  # margins
    ),
    "docs/samplers.md": (
        "(0.01) of the mean distance",
        "(95 %) over the observations",
        "Chance alone gives 1e-3 and more",
        "0.01 is\n2.5 pixels",
        "Up to 0.01 the actual error",
        "From 0.03 on\nthe estimate",
        "the tolerance of\n0.01",
        "above 10 × tolerance",
        "at tolerance 0.003",
    ),
    "docs/sweeps.md": (
        "(0.03) of reward",
        "(0.05) of success",
        "(0.01) of the mean distance",
    ),
}

BLOCKS = read_table()[1]


def prose(document: str) -> str:
    """A page without blocks, code, addresses and what is allowed."""
    text = BLOCK.sub("", DOCUMENTS[document])
    text = re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`]*`", "", FENCED.sub("", text)))
    for allowed in ALLOWED.get(document, ()):
        assert allowed in text, f"{document} no longer has {allowed!r}: delete the exception"
        text = text.replace(allowed, "")
    return text


def measured(text: str) -> list[str]:
    """What looks like a measured number, each with what stands around it."""
    return [" ".join(text[max(0, m.start() - 30) : m.end() + 20].split()) for m in MEASURED.finditer(text)]


@pytest.mark.parametrize("document", sorted(DOCUMENTS))
def test_measured_numbers_stand_in_blocks(document: str) -> None:
    assert measured(prose(document)) == []


@pytest.mark.parametrize("document", [name for name, text in DOCUMENTS.items() if block_names(text)])
def test_every_block_is_filled_by_a_step(document: str) -> None:
    names = block_names(DOCUMENTS[document])
    assert set(names) <= BLOCKS.keys()
    assert len(names) == len(set(names))
    assert DOCUMENTS[document].count("<!-- end -->") == len(names)


def test_every_block_stands_in_a_page() -> None:
    assert BLOCKS.keys() == {name for text in DOCUMENTS.values() for name in block_names(text)}


@pytest.mark.parametrize(
    "text",
    [
        "a chunk takes 15.6 ms",
        "it is 35× as fast",
        "175 times as fast as",
        "0.962 with all steps",
        "by seed [-0.21, +0.04]",
        "2.9 GiB at peak",
        "an error of 6e-3",
        "in 6.8 rounds",
        "24 % of the products",
        "shown (p = 0.04)",
        "reads 57 GB/s",
    ],
)
def test_a_measured_number_is_found(text: str) -> None:
    assert len(measured(text)) == 1


@pytest.mark.parametrize(
    "text", ["96×96", "torch 2.13", "100 steps at 10 Hz", "95 % intervals", "in [-1, 1], 2026-11-28"]
)
def test_a_size_or_a_version_is_not(text: str) -> None:
    assert measured(text) == []

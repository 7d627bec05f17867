"""The layout of the source: one obvious place for each thing. Imports between packages are checked by lint-imports."""

from collections import defaultdict
from pathlib import Path

from tests.conftest import ROOT

ANYWHERE = {"__init__", "__main__", "base"}
MIRRORS_NETWORKS = Path("parapolicy/engine/lowered")  # a rewritten network has the name of the original


def test_no_two_files_have_one_name() -> None:
    paths = defaultdict(list)
    for folder in ("parapolicy", "envs", "tools"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            relative = path.relative_to(ROOT)
            if path.stem not in ANYWHERE and relative.parent != MIRRORS_NETWORKS:
                paths[path.stem].append(str(relative))
    assert len(paths) > 50  # the folders are where this test looks for them
    assert [places for places in paths.values() if len(places) > 1] == []

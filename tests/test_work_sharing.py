"""The native engine's threads: no races, nothing left behind by a fork, and none that stay for good."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from parapolicy.engine import native_build

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")
HERE = Path(__file__).parent
SANITIZED = ("g++", "-std=c++17", "-pthread", "-O1", "-g", "-fsanitize=thread")
SETTING = """
import os, sys, threading, time, torch
from parapolicy.engine.lowered.fused_unet1d import FusedUnet1D
from parapolicy.networks import ConditionalUnet1D

torch.manual_seed(0)
torch.set_grad_enabled(False)
torch.get_num_threads = lambda: 3
network = FusedUnet1D(ConditionalUnet1D(2, 20, 32, (64, 128)).eval())
tables = network.embed_steps(torch.arange(10)), network.embed_condition({"state": torch.randn(3, 1, 20)})
x, step, element = torch.randn(5, 16, 2), torch.randint(0, 10, (5,)), torch.randint(0, 3, (5,))
compute = lambda: network(x, *tables, step, element)
count = lambda: len(os.listdir("/proc/self/task"))
before = count()
expected = compute()
"""


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", SETTING + code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_no_race(tmp_path: Path) -> None:
    empty, program = tmp_path / "empty.cpp", tmp_path / "check"
    empty.write_text("int main() {}")
    tried = subprocess.run([*SANITIZED, str(empty), "-o", str(program)], capture_output=True, check=False)
    if tried.returncode or subprocess.run([program], capture_output=True, check=False).returncode:
        pytest.skip("no thread sanitizer here")
    sources = [str(native_build.FOLDER / name) for name in ("fused.cpp", "work_sharing.cpp")]
    subprocess.run([*SANITIZED, str(HERE / "work_sharing_check.cpp"), *sources, "-o", str(program)], check=True)
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_several_threads_may_call_at_once() -> None:
    run("""
found = []
threads = [threading.Thread(target=lambda: found.extend(compute() for _ in range(200))) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(found) == 800 and all(torch.equal(y, expected) for y in found)
""")


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_fork_works_on() -> None:
    run("""
assert count() == before + 2
child = os.fork()
if not child:
    assert count() == 1
    assert all(torch.equal(compute(), expected) for _ in range(50))
    os._exit(0 if count() == 3 else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(compute(), expected)
""")


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_threads_end_when_nobody_calls() -> None:
    run("""
assert count() == before + 2
while count() > before:  # they sleep for two seconds first
    time.sleep(0.1)
assert torch.equal(compute(), expected) and count() == before + 2
""")

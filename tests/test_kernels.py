"""The compiled kernels are used where they are what the code expects; else NumPy does it, and a message says why."""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from product_recs.core.kernels import KERNELS_ABI, compiled

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ("_als", "_search")
CC = shutil.which("gcc") or shutil.which("cc")
needs_compiler = pytest.mark.skipif(not CC, reason="there is no compiler here")

# a library that only says what it is: quick to build, and as good as the real one for the question whether it is taken
SAYS = """#include <stdint.h>
#define API __attribute__((visibility("default")))
API int32_t kernels_abi(void) {{ return {abi}; }}
API uint64_t kernels_source(void) {{ return 0x{source}ULL; }}
API int32_t which(void) {{ return {which}; }}
"""


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def build(path, text):
    source = path.with_name("made.c.txt")
    source.write_text(text)
    subprocess.run([CC, "-shared", "-fPIC", "-x", "c", "-o", str(path), str(source)], check=True, timeout=60)
    return path


def says(path, abi=KERNELS_ABI, source="0", which=1):
    return build(path, SAYS.format(abi=abi, source=source, which=which))


def load(folder, name="_search"):
    "What `compiled` gives, and what it warned of."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kernels = compiled(name, folder)
    return kernels, [str(warning.message) for warning in caught]


@pytest.mark.parametrize("name", KERNELS)
def test_the_kernels_of_this_checkout_are_the_ones_that_the_code_expects(name):
    kernels = compiled(name)
    if kernels is None:
        pytest.skip("the kernels were not built")
    kernels.kernels_source.restype = ctypes.c_uint64
    assert kernels.kernels_abi() == KERNELS_ABI
    assert kernels.kernels_source() == int(digest(ROOT / "product_recs" / f"{name}.c"), 16)


@needs_compiler
@pytest.mark.parametrize(
    "fault", ["older interface", "other source", "no symbols", "empty", "cut off", "no library", "other machine"]
)
def test_a_file_that_does_not_fit_is_left_alone_and_named(tmp_path, fault):
    source, library = tmp_path / "_search.c", tmp_path / "_search.abi3.so"
    source.write_text("the source of today")
    good = says(library, source=digest(source)).read_bytes()
    if fault == "older interface":
        says(library, abi=KERNELS_ABI - 1, source=digest(source))
    elif fault == "other source":
        source.write_text("the source of tomorrow")
    elif fault == "no symbols":
        build(library, "int search_top(void) { return 0; }")
    elif fault == "other machine":
        library.write_bytes(
            good[:18] + (183 if good[18] != 183 else 62).to_bytes(2, "little") + good[20:]
        )  # e_machine: AArch64
    else:
        library.write_bytes(
            {"empty": b"", "cut off": good[: len(good) // 2], "no library": b"a file of text\n" * 20}[fault]
        )
    kernels, said = load(tmp_path)
    assert kernels is None and len(said) == 1
    assert str(library) in said[0] and "make kernels" in said[0] and "NumPy" in said[0]


@needs_compiler
def test_a_library_that_was_cut_off_does_not_kill_the_process(tmp_path):
    "The system's loader answers such a file with SIGBUS."
    whole = says(tmp_path / "whole.so").read_bytes()
    for length in range(0, len(whole), max(1, len(whole) // 9)):
        folder = tmp_path / str(length)
        folder.mkdir()
        (folder / "_als.abi3.so").write_bytes(whole[:length])
    program = f"""import pathlib, warnings
warnings.simplefilter("ignore")
from product_recs.core.kernels import compiled
print(*[compiled("_als", folder) for folder in pathlib.Path({str(tmp_path)!r}).iterdir() if folder.is_dir()])"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, f"ended with {run.returncode}"
    assert set(run.stdout.split()) == {"None"} and len(run.stdout.split()) > 8


@needs_compiler
@pytest.mark.parametrize("stale", ["_search.abi3.so", "_search.cpython-311-x86_64-linux-gnu.so"])
def test_of_several_files_the_one_that_fits_is_taken(tmp_path, stale):
    (tmp_path / "_search.c").write_text("the source of today")
    fresh = {"_search.abi3.so", "_search.cpython-311-x86_64-linux-gnu.so"} - {stale}
    says(tmp_path / stale, abi=KERNELS_ABI + 1, which=1)
    says(tmp_path / fresh.pop(), source=digest(tmp_path / "_search.c"), which=2)
    kernels, said = load(tmp_path)
    assert kernels.which() == 2 and said == []


@needs_compiler
def test_in_a_wheel_there_is_no_source_to_compare_with(tmp_path):
    says(tmp_path / "_search.abi3.so", source="1234")
    kernels, said = load(tmp_path)
    assert kernels.which() == 1 and said == []


@needs_compiler
def test_a_stale_library_leaves_training_and_search_to_numpy(tmp_path):
    "The whole package in another place, with kernels of another interface."
    package = tmp_path / "product_recs"
    shutil.copytree(ROOT / "product_recs", package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in KERNELS:
        says(package / f"{name}.abi3.so", abi=KERNELS_ABI + 7)
    program = """import numpy as np
from product_recs.search.exact import Searcher
from product_recs.models.solver import native_kernels
print(native_kernels(), Searcher(np.eye(3, dtype=np.float32)).top(np.eye(3, dtype=np.float32), 1)[0].ravel())
print(native_kernels())"""
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split("\n")[0] == "None [0 1 2]"
    for name in KERNELS:
        assert (
            run.stderr.count(f"{package}/{name}.abi3.so: it has version {KERNELS_ABI + 7} of the interface") == 1
        )  # once, however often they are asked for


@needs_compiler
@pytest.mark.skipif(not shutil.which("make"), reason="there is no make here")
def test_make_builds_the_kernels_again_when_their_source_has_changed(tmp_path):
    for name in ("Makefile", "setup.py", "settings.ini", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(
        ROOT / "product_recs", tmp_path / "product_recs", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    for name in KERNELS:  # the real ones take a minute to build
        (tmp_path / "product_recs" / f"{name}.c").write_text(
            SAYS.format(abi=KERNELS_ABI, source="0", which=1).replace("0x0ULL", "SOURCE_DIGEST")
        )
    here = tmp_path / ".venv"
    here.mkdir()
    for part in ("bin", "lib", "pyvenv.cfg"):
        (here / part).symlink_to(Path(sys.prefix) / part)
    for name in ("settings.ini", "setup.py", "pyproject.toml"):
        os.utime(tmp_path / name, (1, 1))
    (here / ".ready").touch()

    def make():
        done = subprocess.run(
            ["make", "kernels"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        # not the time of modification: setuptools copies that in whole seconds, and a build takes less than one
        return [path.stat().st_ctime_ns for path in sorted((tmp_path / "product_recs").glob("*.so"))]

    def which():
        program = """from product_recs.core.kernels import compiled
print(compiled('_als').which(), compiled('_search').which())"""
        return subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()

    first = make()
    assert len(first) == 2 and which() == ["1", "1"]
    assert make() == first  # nothing changed: nothing is built
    source = tmp_path / "product_recs" / "_search.c"
    source.write_text(source.read_text().replace("which(void) { return 1;", "which(void) { return 2;"))
    os.utime(source, (Path(here / ".kernels").stat().st_mtime + 5,) * 2)
    assert make() != first and which() == ["1", "2"]

"""Package metadata, read from settings.ini so that each fact stands in one place."""

import hashlib
import os
import runpy
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_py import build_py

here = Path(__file__).parent
config = ConfigParser(delimiters=["="], interpolation=None)
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]


def requirements(*jobs: str) -> list[str]:
    return [r for job in jobs for r in shlex.split(cfg[f"{job}_requirements"])]


def digest(path: Path) -> str:
    "Of a C file, as `core.kernels.compiled` compares it with what a library says it was built from."
    return f"0x{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}ULL"


# The row solves of the trainer and the search for the best items: plain C without Python.h, loaded with ctypes, so one
# build serves every Python. Optional: where there is no compiler, the installation goes on and NumPy does the same.
# Never -march=native: the code asks the CPU when it runs.
kernels = [
    Extension(
        f"product_recs.{name}",
        [f"product_recs/{name}.c"],
        define_macros=[("SOURCE_DIGEST", digest(here / "product_recs" / f"{name}.c"))],
        extra_compile_args=[]
        if os.name == "nt"
        else ["-O3", "-std=gnu11", "-fno-math-errno", "-fvisibility=hidden", "-Wno-psabi", "-g0"],
        py_limited_api=True,
        optional=True,
    )
    for name in ("_als", "_search")
]


class BuildWithNotebooks(build_py):
    """The package also holds what `product-recs init` lays into a workspace: the notebooks that run, without outputs,
    the sample and the examples. They are copied when it is built, so that they exist once in the repository."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # there they are taken from nbs/ itself
            return
        release = runpy.run_path(str(here / "product_recs/jobs/release.py"))
        for name, content in release["clone_files"](here).items():
            target = Path(self.build_lib, "product_recs/jobs/workspace", name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
    ],
    packages=find_packages(include=["product_recs", "product_recs.*"]),
    package_data={
        "product_recs": [
            "feedback/migrations/*.py",
            "feedback/migrations/versions/*.py",
            "jobs/workspace/**",
            "web/page/*",
        ]
    },
    ext_modules=kernels,
    cmdclass={"build_py": BuildWithNotebooks},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
    python_requires=f">={cfg['min_python']}",
    install_requires=requirements("serve", "train"),
    extras_require={job: requirements(job)
                    for job in ("index", "jobs", "mlflow", "gpu", "spark", "sample", "docs", "dev")},
    entry_points={
        "console_scripts": [cfg["console_scripts"]],
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],
    },
)

"""Fail if the committed package and notebooks are not what `nbdev_export` and `nbdev_clean` would write.

Works on a copy of the files that git knows, so the working tree is never touched. The export runs twice: over the
package as it is, and after deleting its modules, which catches a module whose notebook is gone.
"""

import filecmp
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

root = Path(__file__).resolve().parent.parent
bin_folder = Path(sys.executable).parent


def tracked() -> list[str]:
    "Files that git knows or would add; every file where this is no git checkout."
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=root, capture_output=True, text=True
    )
    if listed.returncode:
        return [
            str(path.relative_to(root)) for folder in ("nbs", "product_recs") for path in (root / folder).rglob("*.*")
        ] + ["settings.ini", "pyproject.toml"]
    return [name for name in listed.stdout.split("\0") if name and (root / name).is_file()]


def changed(copy: Path, names: list[str]) -> list[str]:
    "What differs between the tree and the copy."
    before = {
        name
        for name in names
        if name.startswith(("nbs/", "product_recs/")) or name in ("pyproject.toml", "settings.ini")
    }
    after = {
        str(path.relative_to(copy))
        for folder in ("nbs", "product_recs")
        for path in (copy / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    after |= {"pyproject.toml", "settings.ini"}
    return sorted(before ^ after) + [
        name for name in sorted(before & after) if not filecmp.cmp(root / name, copy / name, shallow=False)
    ]


names = tracked()
for modules_deleted in (False, True):
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / root.name
        for name in names:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, copy / name)
        if modules_deleted:
            for module in (copy / "product_recs").rglob("*.py"):
                if module.name != "__init__.py" and "migrations" not in module.parts:
                    module.unlink()
        for command in ("nbdev_export", "nbdev_clean"):
            subprocess.run(
                [str(bin_folder / command)],
                cwd=copy,
                check=True,
                env={**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"},
            )
        if different := changed(copy, names):
            print(
                "nbdev_export and nbdev_clean would change these files"
                + (" (after deleting the modules)" if modules_deleted else "")
                + ":"
            )
            print(*different, sep="\n")
            sys.exit("Run `make export`, look at the change, and commit it. A module is edited in its notebook only.")
print("The package and the notebooks are in step.")

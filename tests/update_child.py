"""Kill an update of a workspace at some moments, and end it by the next call; a process of its own: it forks.

    python update_child.py WORKSPACE TEMPLATES MOMENTS

A moment is a file operation below the workspace, as Python's audit events report them. What is printed is JSON: how
many operations an update has, how many of the updates were killed, and the files that differ from an undisturbed one.
"""

import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from product_recs.jobs.update import is_workspace, lay_in

TOUCHES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod")


def files_of(root):
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def operations(root, templates, moment=None):
    "Update in a fork that counts its file operations, and kills itself at one of them; how many there were."
    read, write = os.pipe()
    child = os.fork()
    if not child:
        count = 0

        def heard(event, given):
            nonlocal count
            if event not in TOUCHES or not str(given[0]).startswith(str(root)):
                return
            if count == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

        sys.addaudithook(heard)
        lay_in(root, "2", templates)
        os.write(write, str(count).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        counted = answer.read()
    _, status = os.waitpid(child, 0)
    return int(counted) if status == 0 else None


def main():
    workspace, templates, moments = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve(), int(sys.argv[3])
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder).resolve()
        fine = shutil.copytree(workspace, home / "fine" / workspace.name)
        total = operations(fine, templates)
        expected, killed, different = files_of(fine), 0, set()
        for number in range(moments):
            root = shutil.copytree(workspace, home / str(number) / workspace.name)
            killed += operations(root, templates, number * total // moments) is None
            lay_in(root, "2", templates)
            files = files_of(root)
            different |= {name for name in {*files, *expected} if files.get(name) != expected.get(name)}
            assert is_workspace(root)
    print(json.dumps({"operations": total, "killed": killed, "different": sorted(different)}))


if __name__ == "__main__":
    main()

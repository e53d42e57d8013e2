"""A standalone Spark cluster on loopback, from pyspark's wheel: a master and workers, which a test may kill."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from support import until

PACKAGE = "org.apache.spark.deploy"


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def start(folder, name, *command):
    from pyspark.find_spark_home import _find_spark_home

    home = _find_spark_home()  # the wheel has no start scripts
    environment = os.environ | {
        "SPARK_HOME": home,
        "SPARK_LOCAL_IP": "127.0.0.1",
        "PYSPARK_PYTHON": sys.executable,
        "SPARK_DAEMON_MEMORY": "256m",
        "SPARK_WORKER_DIR": str(folder / name),
    }
    with open(folder / f"{name}.log", "wb") as output:
        return subprocess.Popen(
            [f"{home}/bin/spark-class", *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def kill(process):
    "A worker and its executors, at once."
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Cluster:
    "A master, and workers of one core each."

    def __init__(self, folder: Path, memory: str):
        self.folder, self.memory, self.workers = folder, memory, []
        port, self.shown = free_port(), free_port()
        self.url = f"spark://127.0.0.1:{port}"
        self.master = start(folder, "master", f"{PACKAGE}.master.Master", "--host", "127.0.0.1", "--port", str(port),
                            "--webui-port", str(self.shown))  # fmt: skip

    def add(self):
        name = f"worker{len(self.workers)}"
        self.workers.append(
            start(self.folder, name, f"{PACKAGE}.worker.Worker", self.url, "--host", "127.0.0.1", "--cores", "1",
                  "--memory", self.memory, "--webui-port", "0")
        )  # fmt: skip
        return self.workers[-1]

    def alive(self):
        "How many workers the master has."
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.shown}/json/", timeout=5) as answer:
                return json.load(answer)["aliveworkers"]
        except (OSError, ValueError):  # not up yet
            return 0


@contextmanager
def cluster(folder: Path, workers: int = 2, memory: str = "1g"):
    "A running cluster; it is gone at the end."
    running = Cluster(folder, memory)
    try:
        for _ in range(workers):
            running.add()
        until(lambda: running.alive() == workers, 60)
        yield running
    finally:
        for process in (running.master, *running.workers):
            if process.poll() is None:
                kill(process)

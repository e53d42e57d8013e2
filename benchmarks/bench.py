"""All comparisons, one after the other, and one page about them: benchmarks/results/README.md.

    python benchmarks/bench.py                       every part with its defaults, about 25 minutes on 2 cores
    python benchmarks/bench.py --quick               small sizes, some minutes; into build/bench, the committed figures stay
    python benchmarks/bench.py ranking --rounds 5    one part, with options of its script
    python benchmarks/bench.py page                  the page alone, from the files of figures

A part whose program or library is missing is left out with a message; the page then keeps the figures that were there.
"""
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT/".venv-bench/bin/python"
PARTS = { # the options of each call: as a rule, and in a hurry
    "training": ([[]], [["--sizes", "0.1", "--factors", "64", "--rounds", "1", "--iterations", "8"]]),
    "ranking": ([["--rounds", "3"]], [["--sizes", "23000x64", "--users", "3000", "--rounds", "2"], ["--sizes", "200000x64", "--users", "53"]]),
    "ingest": ([[], ["--ids", "text", "--rounds", "2"]], [["--rows", "1000000", "--rounds", "2"]]),
    "serving": ([[]], [["--rounds", "2", "--seconds", "2"]]),
}
LIBRARIES = {"training": ("numpy", "scipy", "implicit", "irspack", "pyspark"), "ranking": ("numpy", "implicit"), "ingest": ("duckdb", "numpy"), "serving": ("fastapi", "uvicorn", "numpy")}
HEADINGS = {"training": "Training", "ranking": "Ranking", "ingest": "From a CSV to matrices", "serving": "Serving"}


def machine():
    "The processor, its cores and the memory, in words."
    named = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE")*os.sysconf("SC_PHYS_PAGES")/2**30
    return f"{os.cpu_count()} cores of {named[0] if named else platform.processor() or platform.machine()}, {memory:.0f} GiB of memory, Python {platform.python_version()}"


def versions(names):
    "Of libraries, by name; irspack and Spark are in .venv-bench."
    ask = "import importlib.metadata as m, json; print(json.dumps({n: m.version(n) for n in ('irspack', 'pyspark') if any(d.name == n for d in m.distributions())}))"
    peers = json.loads(subprocess.run([PEERS, "-c", ask], capture_output=True, text=True).stdout or "{}") if PEERS.exists() else {}
    return {name: peers.get(name) or importlib.metadata.version(name) for name in names if name in peers or name not in ("irspack", "pyspark")}


def run(part, calls, results):
    "Run one part; whether it went to its end."
    if part == "serving" and not shutil.which("wrk"):
        print("serving is left out: it needs the program wrk (apt-get install wrk)", file=sys.stderr)
        return False
    if part == "training" and not PEERS.exists(): print("training goes without irspack and Spark: make .venv-bench/.ready installs them", file=sys.stderr)
    load, started = os.getloadavg()[0], time.perf_counter()
    environment = os.environ | {"BENCH_RESULTS": str(results), "PYTHONPATH": str(ROOT)}
    for call in calls:
        print(f"\n== {part} {' '.join(call)}".rstrip(), flush=True)
        if subprocess.run([sys.executable, str(ROOT/f"benchmarks/{part}.py"), "--write", *call], env=environment, cwd=ROOT).returncode:
            print(f"{part} stopped; its figures stay as they were", file=sys.stderr)
            return False
    facts = json.loads((results/"runs.json").read_text()) if (results/"runs.json").exists() else {}
    facts[part] = {"date": date.today().isoformat(), "machine": machine(), "versions": versions(LIBRARIES[part]), "load before": round(load, 1), "minutes": round((time.perf_counter() - started)/60, 1)}
    (results/"runs.json").write_text(json.dumps(facts, indent=1) + "\n")
    return True


def between(rows):
    "The median of ratios, with the smallest and the largest."
    rows = sorted(rows)
    return f"{statistics.median(rows):.1f}" + (f" ({rows[0]:.1f} to {rows[-1]:.1f})" if len(rows) > 1 else "")


def training(results):
    for one in results:
        for arm, rounds in one["arms"].items():
            if arm == "rotated": continue
            ratios = {name: [theirs[name]/ours[name] for ours, theirs in zip(one["arms"]["rotated"], rounds) if ours.get(name) and theirs.get(name)] for name in ("wall", "wall to NDCG")}
            data = f"{one['data'].split(':')[0]}, {int(one['data'].split()[-2].replace(',', '')):,} pairs, {one['factors']} factors"
            for name, what in (("wall to NDCG", "to the same NDCG@10"), ("wall", "an iteration")):
                if ratios[name]: yield data, f"{arm} ÷ ours, seconds {what}", between(ratios[name])


def ranking(results):
    for one in results:
        data = f"{one['items']:,} items x {one['factors']} factors, {one['kind']}" + (", one user" if one["one by one"] else "")
        of = "one pass over the factors" if one["one by one"] else "the bare matrix product"
        their = min((arm for arm in one["arms"] if arm.startswith("implicit")), key=lambda arm: one["arms"][arm]["ratio"][0])
        for arm, name in (("ours", "ours"), (their, "implicit")):
            ratio = one["arms"][arm]["ratio"]
            yield data, f"{name} ÷ {of}, seconds", f"{ratio[0]:.2g}" + (f" ({ratio[1]:.2g} to {ratio[2]:.2g})" if len(ratio) > 1 else "")


def ingest(results):
    for one in results:
        for measured, what in (("seconds", "seconds"), ("processor", "CPU seconds")):
            ratios = sorted(mine[measured]/theirs[measured] for mine, theirs in zip(one["found"]["ours"], one["found"]["bare"]))
            yield f"{one['rows']:,} rows, ids: {one['ids']}", f"ours ÷ bare DuckDB, {what}", f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def serving(result):
    for one in result["throughput"]:
        empty, *others = one["rounds"].items()
        for name, rows in others:
            shares = sorted(row[0]/other[0] for row, other in zip(rows, empty[1]))
            yield f"{one['connections']} connections, {result['workers']} workers", f"{name} ÷ empty FastAPI route, requests a second", f"{statistics.median(shares):.2f} ({shares[0]:.2f} to {shares[-1]:.2f})"
    memory = {int(workers): megabytes for workers, megabytes in result["memory"].items()}
    yield "the service", f"MB of {max(memory)} workers ÷ MB of one", f"{memory[max(memory)]/memory[1]:.2f}"


MEANING = {
    "training": "Above 1: ours is quicker. The same objective, data and parameters; the clock stops at the first iteration that has 99 % of the NDCG@10 that every arm has at its end, and judging is outside of it. Spark is timed only.",
    "ranking": "Below 1: quicker than the floor of everybody who scores the whole catalogue, a product that ranks and filters nothing. The lists are exact, the ten best without what the user has seen, and compared with those of `implicit`. "
               "`shop`: factors of an ALS fit, which is what a search meets in practice; `gaussian`: random numbers, the hardest case.",
    "ingest": "1 would be as quick as SQL that reads the file with known types and groups it. Ours also checks each value, names each reject, merges repeated deliveries, fingerprints, and writes three snapshots and two targets.",
    "serving": "1 would be a web framework that answers nothing. Ours writes the request log, the figures and every impression; `cache_size 0` ranks each list anew. Memory below the number of workers: the model is shared.",
}
MORE = {"training-scale": "seconds and memory of training by size, to 50 million pairs", "index": "one user of a million items: exact search and approximate indexes", "quality-gowalla": "quality on Gowalla beside published figures"}


def page(results):
    "Write README.md from the files of figures."
    facts = json.loads((results/"runs.json").read_text()) if (results/"runs.json").exists() else {}
    lines = ["# Measured side by side", "", "Ratios of one run, alternating: the median of the rounds, in brackets the smallest and the largest. `make bench` repeats all of it; ratios travel between machines, seconds do not.", ""]
    for part, heading in HEADINGS.items():
        file = results/f"{part}.json"
        if not file.exists(): continue
        lines += [f"## {heading}", "", MEANING[part], "", "| data | what | ratio |", "|---|---|---|"]
        lines += [f"| {data} | {what} | **{ratio}** |" for data, what, ratio in globals()[part](json.loads(file.read_text()))]
        lines += ["", f"![{heading}]({part}.png)", "", f"All figures: [{part}.md]({part}.md).", ""]
    more = [f"- [{text}]({name}.md)" for name, text in MORE.items() if (results/f"{name}.md").exists()]
    if more: lines += ["## More", "", *more, ""]
    if facts:
        lines += ["## Where and when", "", "| part | date | machine | load before | minutes | libraries |", "|---|---|---|---|---|---|"]
        lines += [f"| {HEADINGS[part]} | {fact['date']} | {fact['machine']} | {fact['load before']} | {fact['minutes']} | {', '.join(f'{name} {version}' for name, version in fact['versions'].items())} |"
                  for part, fact in sorted(facts.items(), key=lambda one: list(PARTS).index(one[0]))]
    (results/"README.md").write_text("\n".join(lines).rstrip() + "\n")
    print(f"\n{results/'README.md'}")


def main(arguments):
    if arguments in (["-h"], ["--help"]): return print(__doc__)
    quick = "--quick" in arguments
    results = ROOT/("build/bench" if quick else "benchmarks/results")
    results.mkdir(parents=True, exist_ok=True)
    name, options = (arguments[0], arguments[1:]) if arguments and not arguments[0].startswith("-") else ("", [])
    if name not in ("", "page", *PARTS): sys.exit(f"{name!r} is no part; there are {', '.join(PARTS)} and page")
    done = [run(part, [options] if name and options else calls[quick], results) for part, calls in PARTS.items() if name in ("", part)]
    page(results)
    if not all(done): sys.exit("not every part ran to its end; the messages above say why")


if __name__ == "__main__": main(sys.argv[1:])

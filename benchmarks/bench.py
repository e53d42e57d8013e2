"""All comparisons, one after the other, and one page about them: benchmarks/results/README.md.

    python benchmarks/bench.py                       every part with its defaults, about 35 minutes on 2 cores
    python benchmarks/bench.py --quick               small sizes, some minutes; into build/bench, the committed figures
    stay
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
PEERS = ROOT / ".venv-bench/bin/python"
PARTS = {  # the options of each call: as a rule, and in a hurry
    "training": ([[]], [["--sizes", "0.1", "--factors", "64", "--rounds", "2", "--iterations", "8"]]),
    "ranking": (
        [["--rounds", "3"]],
        [["--sizes", "23000x64", "--users", "3000", "--rounds", "2"], ["--sizes", "200000x64", "--users", "53"]],
    ),
    "ingest": ([[], ["--ids", "text", "--rounds", "2"]], [["--rows", "1000000", "--rounds", "2"]]),
    "serving": ([[]], [["--rounds", "2", "--seconds", "2"]]),
    "models": ([[]], [["--users", "3000", "--items", "1500", "--rounds", "1", "--seconds", "1", "--iterations", "2"]]),
}
LIBRARIES = {
    "training": ("numpy", "scipy", "implicit", "irspack", "pyspark"),
    "ranking": ("numpy", "implicit"),
    "ingest": ("duckdb", "numpy"),
    "serving": ("fastapi", "uvicorn", "numpy"),
    "models": ("numpy", "scipy", "implicit"),
}
HEADINGS = {
    "training": "Training",
    "ranking": "Ranking",
    "ingest": "From a CSV to matrices",
    "serving": "Serving",
    "models": "Every model, served",
}


def machine():
    "The processor, its cores and the memory, in words."
    named = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        if line.startswith("model name")
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{os.cpu_count()} cores of {named[0] if named else platform.processor() or platform.machine()}, {memory:.0f} "
        f"GiB of memory, Python {platform.python_version()}"
    )


def versions(names):
    "Of libraries, by name; irspack and Spark are in .venv-bench."
    ask = (
        "import importlib.metadata as m, json; print(json.dumps({n: m.version(n) for n in ('irspack', 'pyspark') if "
        "any(d.name == n for d in m.distributions())}))"
    )
    peers = (
        json.loads(subprocess.run([PEERS, "-c", ask], capture_output=True, text=True).stdout or "{}")
        if PEERS.exists()
        else {}
    )
    return {
        name: peers.get(name) or importlib.metadata.version(name)
        for name in names
        if name in peers or name not in ("irspack", "pyspark")
    }


def run(part, calls, results):
    "Run one part; whether it went to its end."
    if part in ("serving", "models") and not shutil.which("wrk"):
        print(f"{part} is left out: it needs the program wrk (apt-get install wrk)", file=sys.stderr)
        return False
    if part == "training" and not PEERS.exists():
        print("training goes without irspack and Spark: make .venv-bench/.ready installs them", file=sys.stderr)
    load, started = os.getloadavg()[0], time.perf_counter()
    environment = os.environ | {"BENCH_RESULTS": str(results), "PYTHONPATH": str(ROOT)}
    for call in calls:
        print(f"\n== {part} {' '.join(call)}".rstrip(), flush=True)
        if subprocess.run(
            [sys.executable, str(ROOT / f"benchmarks/{part}.py"), "--write", *call], env=environment, cwd=ROOT
        ).returncode:
            print(f"{part} stopped; its figures stay as they were", file=sys.stderr)
            return False
    facts = json.loads((results / "runs.json").read_text(encoding="utf-8")) if (results / "runs.json").exists() else {}
    facts[part] = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "versions": versions(LIBRARIES[part]),
        "load before": round(load, 1),
        "minutes": round((time.perf_counter() - started) / 60, 1),
    }
    (results / "runs.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return True


def between(rows, form=".1f"):
    "The median of ratios, with the smallest and the largest."
    rows = sorted(rows)
    return (
        f"**{format(statistics.median(rows), form)}**"
        + (f" ({format(rows[0], form)} to {format(rows[-1], form)})" if len(rows) > 1 else "")
        if rows
        else ""
    )


def training(results):
    wanted = [
        (arm, name, what)
        for arm in ("implicit", "irspack", "spark")
        for name, what in (("wall to NDCG", "to the same NDCG"), ("wall", "an iteration"))
        if any(arm in case["arms"] for case in results) and (arm, name) != ("spark", "wall to NDCG")
    ]
    yield "data", "factors", *(f"{arm} ÷ ours, {what}" for arm, _, what in wanted)
    for case in results:
        ratios = lambda arm, name, arms=case["arms"]: [
            theirs[name] / ours[name]
            for ours, theirs in zip(arms["rotated"], arms.get(arm, []))
            if ours.get(name) and theirs.get(name)
        ]
        yield case["data"], case["factors"], *(between(ratios(arm, name)) for arm, name, _ in wanted)


def ranking(results):
    yield "data", "the floor", "ours ÷ floor", "implicit ÷ floor"
    for case in results:
        their = min(
            (arm for arm in case["arms"] if arm.startswith("implicit")), key=lambda arm: case["arms"][arm]["ratio"][0]
        )
        shown = [
            f"**{ratio[0]:.2g}**" + (f" ({ratio[1]:.2g} to {ratio[2]:.2g})" if len(ratio) > 1 else "")
            for ratio in (case["arms"]["ours"]["ratio"], case["arms"][their]["ratio"])
        ]
        yield (
            f"{case['items']:,} items x {case['factors']} factors, {case['kind']}",
            "one user: one pass over the factors"
            if case["one by one"]
            else f"{case['users']:,} users: the bare matrix product",
            *shown,
        )


def ingest(results):
    yield "data", "ours ÷ bare DuckDB, seconds", "ours ÷ bare DuckDB, CPU seconds"
    for case in results:
        bad = f", {case['bad']:,} bad" if case["bad"] else ""
        yield (
            f"{case['rows']:,} rows, ids: {case['ids']}{bad}",
            *(
                between(
                    [mine[name] / theirs[name] for mine, theirs in zip(case["found"]["ours"], case["found"]["bare"])],
                    ".2f",
                )
                for name in ("seconds", "processor")
            ),
        )


def serving(result):
    yield "what", "ratio"
    for case in result["throughput"]:
        empty, *others = case["rounds"].items()
        for name, rows in others:
            yield (
                f"{name} ÷ empty FastAPI route, requests a second, {case['connections']} connections, "
                f"{result['workers']} workers",
                between([row[0] / other[0] for row, other in zip(rows, empty[1])], ".2f"),
            )
    memory = {int(workers): megabytes for workers, megabytes in result["memory"].items()}
    yield f"MB of {max(memory)} workers ÷ MB of one", f"**{memory[max(memory)] / memory[1]:.2f}**"


def models(result):
    header = "model", "family", "CPU of a request ÷ ALS", "requests a second ÷ ALS", "fold-in of an event, ms"
    yield *header, "model, MB", "fit, s"
    base = next(row["rounds"] for row in result["models"] if row["model"] == "ALS")
    ratios = lambda row, name: [mine[name] / other[name] for mine, other in zip(row["rounds"], base)]
    for row in sorted(result["models"], key=lambda row: statistics.median(ratios(row, "cpu"))):
        name = row["model"] + (", next purchase" if row["task"] == "next_purchase" else "")
        compared = (between(ratios(row, figure), ".2f") for figure in ("cpu", "rate"))
        figures = f"{row['fold_in']:.2f}", f"{row['megabytes']:.1f}", f"{row['fit']:.2f}"
        yield name, row["family"], *compared, *figures


MEANING = {
    "training": (
        "Seconds; above 1, ours is quicker. The same objective, data and parameters; the clock stops at the "
        "first iteration that has 99 % of the NDCG@10 that every arm has at its end, and judging is outside of "
        "it. Nothing was tuned for a size: the shops with 128 and 256 factors learn noise after some "
        "iterations, and there the best iteration of `implicit`, which goes more slowly, is above ours (the "
        "curves show it). Spark is timed only."
    ),
    "ranking": (
        "Seconds; below 1, quicker than the floor of everybody who scores the whole catalogue, a product that "
        "ranks and filters nothing. The lists are exact, the ten best without what the user has seen, and "
        "compared with those of `implicit`. "
        "`shop`: factors of an ALS fit, which is what a search meets in practice; `gaussian`: random numbers, the "
        "hardest case."
    ),
    "ingest": (
        "1 would be as quick as SQL that reads the file with known types and groups it. Ours also checks each "
        "value, names each reject, merges repeated deliveries, fingerprints, and writes three snapshots and two "
        "targets."
    ),
    "serving": (
        "1 would be a web framework that answers nothing. Ours writes the request log, the figures and every "
        "impression; `cache_size 0` ranks each list anew. Memory below the number of workers: the model is "
        "shared."
    ),
    "models": (
        "1 would cost what ALS with 64 factors does. Each model answers over HTTP from a bundle of its own, one "
        "worker, every list ranked anew; what a service does beside the ranking is the same for all. The fold-in makes "
        "somebody who has just bought one more thing ready to be ranked for. The CPU time is what the worker used, and "
        "other work on the machine disturbs it least; requests a second are noisy."
    ),
}
MORE = {
    "training-scale": "seconds and memory of training by size, to 50 million pairs",
    "index": "one user of a million items: exact search and approximate indexes",
    "quality-gowalla": "quality on Gowalla beside published figures",
    "quality-citeulike-cold": "quality on the warm articles of CiteULike, beside ALS by implicit",
    "sequence-amazon-beauty": "what comes next on Amazon Beauty beside published figures",
    "defaults": "defaults of ALS on eleven logs of different shapes",
    "cold-citeulike": "articles that nobody has, beside published figures",
    "cold-groceries": "groceries with few or no buyers, and new households",
    "cold-cost": "what placing new products costs: training, lists, requests",
    "experiments": "experiments: how often the report is wrong when it is read every day",
    "quarter": "a quarter of nights, with faults that were planted",
}


def page(results):
    "Write README.md from the files of figures."
    facts = json.loads((results / "runs.json").read_text(encoding="utf-8")) if (results / "runs.json").exists() else {}
    lines = [
        "# Measured side by side",
        "",
        "Ratios of one run, alternating: the median of the rounds, in brackets the smallest and the largest. `make "
        "bench` repeats all of it; ratios travel between machines, seconds do not.",
        "",
    ]
    for part, heading in HEADINGS.items():
        file = results / f"{part}.json"
        if not file.exists():
            continue
        header, *rows = globals()[part](json.loads(file.read_text(encoding="utf-8")))
        lines += [
            f"## {heading}",
            "",
            MEANING[part],
            "",
            f"| {' | '.join(header)} |",
            "|---" * len(header) + "|",
            *(f"| {' | '.join(map(str, row))} |" for row in rows),
        ]
        lines += [
            "",
            *(f"![{heading}]({name}.png)" for name in (part, f"{part}-scale") if (results / f"{name}.png").exists()),
            "",
            f"All figures: [{part}.md]({part}.md).",
            "",
        ]
    more = [f"- [{text}]({name}.md)" for name, text in MORE.items() if (results / f"{name}.md").exists()]
    if more:
        lines += ["## More", "", *more, ""]
    if facts:
        lines += [
            "## Where and when",
            "",
            "| part | date | machine | load before | minutes | libraries |",
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {HEADINGS[part]} | {fact['date']} | {fact['machine']} | {fact['load before']} | {fact['minutes']} | "
            f"{', '.join(f'{name} {version}' for name, version in fact['versions'].items())} |"
            for part, fact in sorted(facts.items(), key=lambda pair: list(PARTS).index(pair[0]))
        ]
    (results / "README.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    print(f"\n{results / 'README.md'}")


def main(arguments):
    if arguments in (["-h"], ["--help"]):
        return print(__doc__)
    quick = "--quick" in arguments
    results = ROOT / ("build/bench" if quick else "benchmarks/results")
    results.mkdir(parents=True, exist_ok=True)
    name, options = (arguments[0], arguments[1:]) if arguments and not arguments[0].startswith("-") else ("", [])
    if name not in ("", "page", *PARTS):
        sys.exit(f"{name!r} is no part; there are {', '.join(PARTS)} and page")
    done = [
        run(part, [options] if name and options else calls[quick], results)
        for part, calls in PARTS.items()
        if name in ("", part)
    ]
    page(results)
    if not all(done):
        sys.exit("not every part ran to its end; the messages above say why")


if __name__ == "__main__":
    main(sys.argv[1:])

"""Do the intervals of an experiment keep their promise? Simulated experiments whose truth is known, looked at daily.

    python benchmarks/experiments.py [--runs 2000] [--out benchmarks/results]

Each experiment has a control and an arm with as many new users a day, an outcome of yes or no a user, and a look at the
end of every day. "Found" is an interval that leaves out nothing on at least one day; "holds" is one that has the truth
on all days. The usual interval is the one for a single look, 1.96 standard errors; the sequence is what the report of
`product-recs experiment report` shows. With 500 runs, a share of 5 % is known to about 2 points, with 2,000 to one.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np

from product_recs.jobs.lift import ratio_p, ratio_p_of_all_looks, simulate_looks, users_needed
from product_recs.jobs.offpolicy import self_normalised

CASES = (  # what, rates of control and arm, days, new users of each arm a day
    ("A/A, 10 % buy", (0.10, 0.10), 28, 100),
    ("A/A, 2 % buy", (0.02, 0.02), 28, 100),
    ("A/A, a year", (0.10, 0.10), 365, 20),
    ("A/B, +20 %", (0.10, 0.12), 28, 300),
    ("A/B, +20 %, longer", (0.10, 0.12), 84, 100),
    ("A/B, +5 %", (0.10, 0.105), 28, 5000),
)


def looks(runs):
    "One row a case."
    for place, (what, rates, days, daily) in enumerate(CASES):
        outcome = simulate_looks(rates, runs, days, daily, planned=2 * daily * days, seed=place)
        ever, first = outcome["always"].any(1), outcome["always"].argmax(1) + 1
        yield {
            "case": what,
            "days": days,
            "users": 2 * daily * days,
            "usual_found": float(outcome["once"].any(1).mean()),
            "sequence_found": float(ever.mean()),
            "holds": float(outcome["holds"].all(1).mean()),
            "median_day": int(np.median(first[ever])) if rates[0] != rates[1] and ever.any() else None,
        }


def mismatches(runs, seed=0):
    "How often a sample-ratio mismatch is seen, by share of the arm that ought to be a half."
    rng, days = np.random.default_rng(seed), np.arange(1, 29)
    for share in (0.5, 0.48, 0.46):
        arm = rng.binomial(200, share, (runs, 28)).cumsum(1)
        counts = np.stack([200 * days - arm, arm], -1)
        always = np.array([ratio_p_of_all_looks(run, [1, 1])[-1] for run in counts])
        daily = ratio_p(counts, [1, 1]).min(1)
        seen, once = (float((p < 0.001).mean()) for p in (always, daily))
        yield {"share": share, "seen": seen, "chi_square_daily": once}


def choices(runs, seed=0):
    "Three items that 2, 5 and 12 % take, shown with chances of 0.7, 0.2 and 0.1: what is the third one worth?"
    rng, rates, drawn = np.random.default_rng(seed), np.array([0.02, 0.05, 0.12]), np.array([0.7, 0.2, 0.1])
    for users in (500, 2000, 10_000):
        trials = []
        for _ in range(runs):
            items = rng.choice(3, users * 3, p=drawn)
            outcomes = rng.random(len(items)) < rates[items]
            trials.append(self_normalised(outcomes, drawn[items], items == 2, np.repeat(np.arange(users), 3), least=30))
        values = np.array([trial.value for trial in trials])
        inside = np.mean([trial.low <= 0.12 <= trial.high for trial in trials])
        yield {"users": users, "mean": float(values.mean()), "holds": float(inside),
               "effective": float(np.mean([trial.effective for trial in trials]))}


def page(facts):
    "The figures as Markdown."
    lines = ["# Experiments: do the intervals keep their promise?", "",
             f"`python benchmarks/experiments.py --runs {facts['runs']}`: simulated experiments, each looked at every "
             "day; what the columns mean stands in that file.", "",
             "| experiment | days | users | usual interval finds | sequence finds | sequence holds | median day |",
             "|---|---:|---:|---:|---:|---:|---:|"]
    for look in facts["looks"]:
        day = look["median_day"] or ""
        lines.append(f"| {look['case']} | {look['days']} | {look['users']:,} | {look['usual_found']:.1%} | "
                     f"{look['sequence_found']:.1%} | {look['holds']:.1%} | {day} |")
    lines += ["", "Users of both arms that a plan asks for, 80 % power, a baseline of 10 %:", "",
              "| lift | looked at as often as one likes | one look at the end |", "|---:|---:|---:|"]
    lines += [f"| {plan['lift']:.0%} | {plan['all']:,} | {plan['one']:,} |" for plan in facts["plans"]]
    lines += ["", "An arm that ought to have half of the users: how often the mismatch is seen in 28 days, p < 0.001:",
              "",
              "| share | for all looks | chi-square every day |", "|---:|---:|---:|"]
    lines += [f"| {mismatch['share']:.0%} | {mismatch['seen']:.1%} | {mismatch['chi_square_daily']:.1%} |"
              for mismatch in facts["mismatches"]]
    lines += ["", "Another choice of explored places, worth 12 %, valued from logs in which it was made once in ten:",
              "",
              "| users | mean estimate | interval of 95 % holds | effective sample size |", "|---:|---:|---:|---:|"]
    lines += [f"| {choice['users']:,} | {choice['mean']:.2%} | {choice['holds']:.1%} | {choice['effective']:,.0f} |"
              for choice in facts["choices"]]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2000, help="experiments of each case")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    plans = [{"lift": lift} | {way: users_needed(0.1, lift, looks=way) for way in ("all", "one")}
             for lift in (0.05, 0.1, 0.2)]
    facts = {"runs": given.runs, "looks": [*looks(given.runs)], "plans": plans,
             "mismatches": [*mismatches(given.runs)], "choices": [*choices(math.ceil(given.runs / 4))]}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "experiments.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    (given.out / "experiments.md").write_text(page(facts), encoding="utf-8")
    print(page(facts))


if __name__ == "__main__":
    main()

"""`product-recs daily` killed (SIGKILL of its process group) at random moments: each time a re-run must end with the
result of an undisturbed night: the same arrays, verdict, live model and lists, and nothing half."""

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from nightly import kill_at, latest, log_until, result, run_night, shop, write_log


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    draw, wrong = random.Random(given.seed), 0
    with tempfile.TemporaryDirectory() as name:
        root = shop(Path(name) / "shop")
        assert run_night(root).returncode == 0
        write_log(root, log_until("2026-06-24"))
        undisturbed, started = shutil.copytree(root, Path(name) / "undisturbed"), time.monotonic()
        done = run_night(undisturbed)
        assert done.returncode == 0, done.stdout + done.stderr
        lasts, expected = time.monotonic() - started, result(undisturbed)
        print(f"An undisturbed night takes {lasts:.1f} seconds.", flush=True)
        for number in range(given.moments):
            copy, moment = shutil.copytree(root, Path(name) / f"killed{number}"), draw.random() * lasts
            at_work = kill_at(copy, moment)
            nights = sorted(copy.glob("reports/daily/shop/*/night.json"))
            step = next((n for n, entry in latest(copy).steps.items() if entry["state"] == "running"), "between steps")
            step = "before the first step" if len(nights) < 2 else step
            done = run_night(copy)
            outcome = result(copy)
            if latest(copy).status == "nothing new":  # it was over when the kill came
                outcome |= {name: expected[name] for name in ("status", "states", "live is tonight's")}
            differs = [name for name in expected if outcome[name] != expected[name]]
            wrong += bool(differs) or done.returncode != 0
            said = "as undisturbed" if not differs else f"DIFFERS in {', '.join(differs)}"
            spot = step if at_work else "after the end"
            print(f"{number + 1:>3}  killed after {moment:5.1f} s ({spot}): exit {done.returncode}, {said}", flush=True)
            shutil.rmtree(copy)
    print(f"{given.moments - wrong} of {given.moments} moments ended as an undisturbed night.")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())

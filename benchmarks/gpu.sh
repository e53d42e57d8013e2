#!/usr/bin/env bash
# One prepared measurement for a machine with a card of NVIDIA, eight minutes at most: benchmarks/gpu.py says what it does.
#
#   benchmarks/gpu.sh                               with CuPy (pip install cupy-cuda13x) and a C compiler, no network
#   benchmarks/gpu.sh --module numpy --quick        the same steps without a card, in seconds
#   benchmarks/gpu.sh --minutes 5 --out results     the figures in results/gpu.json and results/gpu.md
#
# Python is $PYTHON, or .venv/bin/python where that is there, or python3. The kernels are compiled where they are missing.
set -eu
cd "$(dirname "$0")/.."
python="${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}"
"$python" -c 'import numpy, scipy, threadpoolctl' ||
    { echo "gpu.sh: $python needs numpy, scipy and threadpoolctl" >&2; exit 2; }
for name in _als _search; do
    "$python" -W ignore -c "import sys; from product_recs.core.kernels import compiled; sys.exit(compiled('$name') is None)" && continue
    digest=$("$python" -c "import hashlib; print(hashlib.sha256(open('product_recs/$name.c', 'rb').read()).hexdigest()[:16])")
    "${CC:-cc}" -O3 -std=gnu11 -fno-math-errno -fvisibility=hidden -Wno-psabi -g0 -shared -fPIC \
        -DSOURCE_DIGEST="0x${digest}ULL" -o "product_recs/$name.abi3.so" "product_recs/$name.c" -lm ||
        echo "gpu.sh: $name.c was not compiled; NumPy stands in for our C, and its figures say nothing" >&2
done
minutes=8
for word in "$@"; do [ "${last:-}" = --minutes ] && minutes="$word"; last="$word"; done
# a minute more than the clock of the script, should a step hang
exec timeout "$("$python" -c "print(int(60*float('$minutes') + 60))")" "$python" -u benchmarks/gpu.py "$@"

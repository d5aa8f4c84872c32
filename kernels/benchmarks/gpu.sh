#!/usr/bin/env bash
# GPU tests and benchmarks, on any machine with a CUDA device, PyTorch, Triton and (model) transformers:
#
#   kernels/benchmarks/gpu.sh tests   [pytest's options]              the kernels' tests, on the device
#   kernels/benchmarks/gpu.sh kernels [kernel_times.py's options]     a time a kernel, beside the vendors'; --tune
#   kernels/benchmarks/gpu.sh model   [longcontext.py's options]      end to end, 8k to 128k tokens
#
# Nothing is installed. Each ends within 8 minutes; results are written as they come, and the same command goes on where
# it stopped. JSON and a log go to $OUT if that is set, else to results/ beside this file. Results of earlier runs are
# found in both places.
set -uo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
python=${PYTHON:-python3}
what=${1:-}
shift || true
case "$what" in
  tests | kernels | model) ;;
  *)
    echo "Usage: gpu.sh tests|kernels|model [options]" >&2
    exit 2
    ;;
esac

if ! [[ " $* " =~ " --smoke " || " $* " =~ " --plan " || " $* " =~ " --help " ]]; then
  "$python" -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else 9)'
  code=$?
  if [ $code = 9 ]; then
    echo "gpu.sh $what: no CUDA device was found, and this measures a GPU; nothing was run." >&2
    exit 2
  elif [ $code != 0 ]; then
    echo "gpu.sh $what: $python cannot import torch; set PYTHON to one that can." >&2
    exit 2
  fi
fi

export PYTHONPATH="$root:$root/hooks:$root/kernels:$root/examples${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
out=${OUT:-$here/results}
mkdir -p "$out"
log="$out/gpu_$what.log"

run() {
  case "$what" in
    tests)
      # the repository's pytest settings name plugins that a bare machine lacks; most of the time is compilation
      workers=$("$python" -c 'import os, xdist; print("-n", min(8, os.cpu_count()))' 2>/dev/null)
      (cd "$root" && export PYTHONPATH="$PYTHONPATH:$here:$root/tests" &&
        timeout -k 10 "$1" "$python" -m pytest -c /dev/null --rootdir "$root" -p gpu_tests -p no:cacheprovider -q \
          -W ignore::DeprecationWarning -W ignore::FutureWarning --continue-on-collection-errors $workers \
          $({ grep -rl 'mark\.gpu' tests --include='test_*.py'; ls tests/hooks/test_fused*.py tests/kernels/test_{fused*,kernels,steer*}.py; } | sort -u) \
          "${@:2}")
      ;;
    kernels) timeout -k 10 "$1" "$python" "$here/kernel_times.py" "${@:2}" ;;
    model) timeout -k 10 "$1" "$python" "$here/longcontext.py" "${@:2}" ;;
  esac
}

# 3: a kernel made the device unusable for its process; another process goes on behind that row
deadline=$((SECONDS + 465))
code=3
while [ $code = 3 ] && [ $SECONDS -lt $deadline ]; do
  run $((deadline - SECONDS)) "$@" 2>&1 | tee -a "$log"
  code=${PIPESTATUS[0]}
done
if [ $code = 124 ]; then
  echo "gpu.sh $what: stopped at its time limit; the same command goes on where it stopped." | tee -a "$log" >&2
fi
exit $code

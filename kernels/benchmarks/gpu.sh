#!/usr/bin/env bash
# GPU tests and benchmarks, on any machine with a CUDA device, PyTorch, Triton and (model) transformers:
#
#   kernels/benchmarks/gpu.sh first                                   the first ten minutes on a GPU: is every kernel right
#                                                                     (a minute), a model at 131,072 tokens, kernels at 32,768
#   kernels/benchmarks/gpu.sh tests   [pytest's options]              the kernels' tests, on the device
#   kernels/benchmarks/gpu.sh kernels [kernel_times.py's options]     a time a kernel, beside the vendors'; --tune
#   kernels/benchmarks/gpu.sh model   [longcontext.py's options]      end to end, 8k to 128k tokens
#
# Nothing is installed. Each ends within 8 minutes (first: 10); results are written as they come, and the same command goes on where
# it stopped. JSON and a log go to $OUT if that is set, else to results/ beside this file. Results of earlier runs are
# found in both places.
set -uo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
python=${PYTHON:-python3}
what=${1:-}
shift || true
case "$what" in
  first | tests | kernels | model) ;;
  *)
    echo "Usage: gpu.sh first|tests|kernels|model [options]" >&2
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

# a script within so many seconds; 3: its device was lost, another process goes on behind that row
step() {
  local end=$((SECONDS + $1)) code=3
  while [ $code = 3 ] && [ $((end - SECONDS)) -gt 20 ]; do
    timeout -k 5 $((end - SECONDS)) "$python" "$here/$2" "${@:3}"
    code=$?
  done
  return $code
}

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
    first)
      # what fails is recorded and stepped over; `gpu.sh model` and `gpu.sh kernels` go on from there
      step 100 first_smoke.py --seconds 85
      smoke=$?
      step 170 longcontext.py --lengths 131072 --minutes 2
      for part in "cuDNN|plain|all row statistics|received alone|FlashAttention|FlexAttention" ""; do
        step $((570 - SECONDS)) kernel_times.py --lengths 32768 --only "$part" --minutes 4
      done
      return $smoke
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

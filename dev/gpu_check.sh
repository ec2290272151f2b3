#!/usr/bin/env bash
# gpu_check.sh - everything that needs a GPU, in calls of at most ten minutes each.
#
#   dev/gpu_check.sh build      where nvcc is: the programs, into build/gpu (a GPU is not needed)
#   dev/gpu_check.sh first      on the GPU: does it run, is it right, how fast is it
#   dev/gpu_check.sh second     the same step in PyTorch and ours once more; then compute-sanitizer
#   dev/gpu_check.sh third      PyTorch's slower compiler, larger tests under the sanitizer, a layer by steps
#   dev/gpu_check.sh all        the four of them
#   dev/gpu_check.sh --dry-run first second      only say what would run, and for how long at most
#
# If the GPU is on another machine without nvcc, take build/gpu along. Each stage has a limit of its own and
# one that fails does not stop the others; what is left out is said, with the reason. Results go to $OUT, else
# to dev/gpu_results: CALL.log has the output of every stage, CALL.md the table that a call ends with. Status
# 1: some stage failed. Environment: OUT; PYTHON (python3); BATCH (256); ARCH, of build (sm_80, 90 and 120).
set -u
cd "$(dirname "$0")/.." || exit 1

dry= calls=
for a in "$@"; do
  case $a in
    --dry-run) dry=1 ;;
    --help|-h) sed -n '2,16s/^# \{0,1\}//p' "$0"; exit 0 ;;
    build|first|second|third) calls="$calls $a" ;;
    all) calls="$calls build first second third" ;;
    *) echo "gpu_check: no call $a; there are: build first second third all (--help)" >&2; exit 2 ;;
  esac
done
[ -n "$calls" ] || { echo "gpu_check: which call? build first second third all (--help)" >&2; exit 2; }

G=build/gpu                                         # the programs
results=${OUT:-dev/gpu_results}
python=${PYTHON:-python3}
batch=${BATCH:-256}
PATH=$PATH:/usr/local/cuda/bin
arch=${ARCH:-$(for sm in 80 90 120; do printf ' -gencode arch=compute_%s,code=sm_%s' $sm $sm; done)}
work=$(mktemp -d) || exit 1                         # what nobody will want to see
trap 'rm -rf "$work"' EXIT
has() { command -v "$1" > /dev/null 2>&1; }
missing() {                                         # NAME...: the first of these that is not there
  for m in "$@"; do
    case $m in
      gpu) nvidia-smi > /dev/null 2>&1 || { echo "no GPU (nvidia-smi finds none)"; return; } ;;
      torch) "$python" -c 'import torch; assert torch.cuda.is_available()' 2> /dev/null ||
        { echo "no PyTorch that sees a GPU"; return; } ;;
      profile) "$G/train" --help 2> /dev/null | grep -q -- --profile ||
        { echo "the trainer has no --profile"; return; } ;;
      "$G"/*) [ -x "$m" ] || { echo "no $m: dev/gpu_check.sh build"; return; } ;;
      *) has "$m" || { echo "no $m"; return; } ;;
    esac
  done
}

# ----------------------------------------------------------------------------------------------------------
# One stage: stage NAME SECONDS "WHAT IT NEEDS" "WHAT IT IS" COMMAND, a shell command whose status decides

failed=0 seconds=0 rows=()
stage() {
  local name=$1 limit=$2 needs=$3 what=$4 command=$5 begin=$SECONDS rc skip result last
  seconds=$((seconds + limit))
  if [ -n "$dry" ]; then
    printf '  %-10s %3d s  %s\n' "$name" "$limit" "$what"
    printf '%s\n' "$command" | sed '/^ *$/d; s/^ */                    /'
    return
  fi
  skip=$(missing $needs)
  if [ -n "$skip" ]; then
    printf '%-10s LEFT OUT: %s\n' "$name" "$skip"
    rows+=("| $name | left out: $skip | | $what |")
    return
  fi
  timeout -k 5 "$limit" bash -c "set -eu -o pipefail; $command" > "$work/output" 2>&1
  rc=$?
  { echo "=== $name: status $rc"; tail -c 1000000 "$work/output"; } >> "$log"
  last=$(tail -n 1 "$work/output" | tr -d '|' | cut -c 1-110)
  case $rc in
    0) result=ok ;;
    124|137) result="FAILED, longer than $limit s" failed=1 ;;
    *) result="FAILED, status $rc" failed=1 ;;
  esac
  printf '%-10s %s, %d s: %s\n' "$name" "$result" $((SECONDS - begin)) "$last"
  rows+=("| $name | $result | $((SECONDS - begin)) | $what: $last |")
}

# The step's milliseconds: `measured ours` of the trainer's last log line, which is the mean since the line
# before, so that neither tuning nor the first steps count; `measured torch`: the best of bench_torch's
measured() {
  case $1 in
    ours) [ -s "$work/run/log.csv" ] && awk -F, '
      NR == 1 { for (i = 1; i <= NF; i++) if ($i == "ms_per_step") c = i }
      END { if (NR > 2) print $c }' "$work/run/log.csv" ;;
    torch) ls "$results"/torch*.json > /dev/null 2>&1 && "$python" -c 'import json, sys
print(min(json.load(open(f))["best"]["ms_per_step"] for f in sys.argv[1:]))' "$results"/torch*.json ;;
  esac
}
# NAME MS: ms a step, images/s, MFU, hours, how many times PyTorch's speed
line_of() {
  awk -v name="$1" -v ms="$2" -v B="$batch" -v torch="$torch" 'BEGIN {
    if (ms == "") { printf "| %s | not measured | | | | |\n", name; exit }
    printf "| %s | %.2f | %.0f | %.1f %% | %.2f | %s |\n", name, ms, B / ms * 1e3,
           100 * 20.895 * B / 256 / (ms * 1e-3) / 989.4, ms * 400000 / 3.6e6,
           torch == "" ? "not measured" : sprintf("%.2f", torch / ms) }'
}
report() {
  local ours torch
  ours=$(measured ours) torch=$(measured torch)
  echo "# $1: $(nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,power.limit --format=csv,noheader \
    2> /dev/null | head -n 1 || true), $(date +%Y-%m-%d)"
  echo
  echo "Built from $(cat $G/commit 2> /dev/null || echo 'an unknown commit')."
  echo
  echo "| stage | result | s | what, and its last line |"
  echo "|---|---|---:|---|"
  printf '%s\n' "${rows[@]}"
  echo
  echo "SR-DiT-B/1, batch $batch, one GPU, synthetic data. MFU: of 989.4 dense TFLOP/s, at 20.895 TFLOP a"
  echo "step of 256. Hours: of one such GPU for 400,000 steps."
  echo
  echo "| | ms/step | images/s | MFU | hours | times PyTorch |"
  echo "|---|---:|---:|---:|---:|---:|"
  line_of "train_srdit_cu" "$ours"
  line_of "PyTorch, torch.compile" "$torch"
}

# ----------------------------------------------------------------------------------------------------------
# The calls

# A shard of random numbers of ImageNet's shape; only its size matters
synthetic() {
  cat <<'END'
import array, json, os, random, struct, sys
path, n = sys.argv[1], int(sys.argv[2])
normal = lambda k: array.array("f", (random.gauss(0, 1) for _ in range(k))).tobytes()
parts = [("cls", "F32", [n, 768], lambda: normal(768)),
         ("feats", "I8", [n, 257, 768], lambda: os.urandom(257 * 768)),
         ("labels", "U8", [n], lambda: os.urandom(1)),
         ("latents", "U8", [n, 32, 16, 16], lambda: os.urandom(32 * 16 * 16))]
header = {"__metadata__": dict(format="srdit-data-1", name="synthetic", classes="1000", decoder="invae",
                               latent_scale="0.015625", latent_offset="0")}
at = 0
for name, dtype, shape, make in parts:
    header[name] = dict(dtype=dtype, shape=shape, data_offsets=[at, at + n * len(make())])
    at = header[name]["data_offsets"][1]
text = json.dumps(header).encode()
text += b" " * (-len(text) % 8)
with open(path, "wb") as f:
    f.write(struct.pack("<Q", len(text)) + text)
    for _, _, _, make in parts:
        for _ in range(n):
            f.write(make())
END
}
DATA=$work/synthetic.safetensors
TRAIN="$G/train --model B/1 --data $DATA --batch $batch --save-every 1000000 --sample-steps 1 --overwrite"
SMALL="'65 tokens, path drop'"                      # one of the tests: a step of a small model
SANITIZER="compute-sanitizer --kernel-name kns=_ZN3gpu --report-api-errors no --error-exitcode 9"
HEADLINE="[ -s $DATA ] || $python $work/synthetic.py $DATA 512
  rm -rf $work/run
  $TRAIN --steps 60 --log-every 20 --out $work/run
  cat $work/run/log.csv
  rm -f $work/run/*.safetensors"

call_build() {                                      # (no limit of ten minutes: nothing is lent meanwhile)
  stage programs 1800 "nvcc g++ make" "the trainer and its tests, in bf16 and in float" "
    make NATIVE=no ARCH='$arch' -B train_srdit_cu test_srdit_cu
    mv train_srdit_cu $G/train
    mv test_srdit_cu $G/test_bf16
    make NATIVE=no ARCH='$arch' FP32=1 -B test_srdit_cu
    mv test_srdit_cu $G/test_fp32"
  stage others 900 "nvcc g++ make" "what else runs on the GPU, and the hashes of the emulated instructions" "
    for p in dev/ptx_check dev/bench_gpu dev/norm_versions dev/cuda_on_cpu/selftest; do
      nvcc -std=c++17 -O3 $arch -w \$p.cu -o $G/\$(basename \$p) -lcublasLt
    done
    make -s ptx_check_emu && ./ptx_check_emu > $G/ptx_emulated.txt
    (git rev-parse --short HEAD; git diff --quiet HEAD || echo 'and uncommitted changes') > $G/commit
    du -sh $G"
}
call_first() {
  stage probe 15 gpu "what is there" "
    nvidia-smi; nproc; free -g | head -n 2; $python --version || true
    for p in nvcc compute-sanitizer ncu g++ make; do command -v \$p || echo \"no \$p\"; done
    nvidia-smi --query-gpu=name,clocks.max.sm,power.limit --format=csv,noheader"
  stage ptx 15 "gpu $G/ptx_check" "PTX wrappers against the manual's tables; the same hashes as emulated" "
    $G/ptx_check | tee $work/ptx.txt
    grep hash $work/ptx.txt | while read -r line; do grep -qxF \"\$line\" $G/ptx_emulated.txt ||
      { echo \"emulated, this line differs: \$line\"; exit 1; }; done
    echo 'the emulated hashes are the same'"
  stage selftest 20 "gpu $G/selftest" "the emulator's own tests on the real thing" "$G/selftest"
  stage nano 40 "gpu $G/train" "the default model, whose products have dimensions of 1" "
    $G/train --steps 20 --sample-steps 1 --overwrite --out $work/nano"
  stage small 40 "gpu $G/test_bf16" "bf16 against the CPU: attention on tensor cores" "
    $G/test_bf16 '65 tokens'"
  stage steps 80 "gpu $G/train $python" "60 steps of B/1: the headline" "$HEADLINE"
  stage profile 30 "gpu $G/train profile" "a step's time by component" "
    $TRAIN --steps 12 --profile --out $work/profiled"
  stage ncu 80 "gpu $G/train ncu" "time and bytes of each kernel of two steps: ncu.csv" "
    ncu --target-processes all --clock-control none --cache-control none -s 2600 -c 950 \\
      --metrics gpu__time_duration.sum,dram__bytes_read.sum,dram__bytes_write.sum \\
      --csv --log-file $results/ncu.csv $TRAIN --steps 4 --out $work/ncu"
  stage float 95 "gpu $G/test_fp32" "all tests in float against the CPU" "$G/test_fp32"
  stage bf16 80 "gpu $G/test_bf16" "all tests in bf16" "$G/test_bf16"
  stage gemm 60 "gpu $G/bench_gpu" "cuBLASLt on every matrix product of a step" "$G/bench_gpu --batch $batch"
}
call_second() {
  stage steps 80 "gpu $G/train $python" "60 steps of B/1: the headline, beside PyTorch's" "$HEADLINE"
  stage torch 220 "gpu torch" "the same step in PyTorch: torch.json" "
    $python dev/bench_torch.py --check --batch $batch --json $results/torch.json"
  for tool in memcheck racecheck initcheck synccheck; do
    stage "$tool" 45 "gpu compute-sanitizer $G/test_bf16" "our kernels under it, bf16" "
      $SANITIZER --tool $tool $G/test_bf16 $SMALL"
  done
  stage memfloat 45 "gpu compute-sanitizer $G/test_fp32" "memcheck in float: the plain attention" "
    $SANITIZER --tool memcheck $G/test_fp32 $SMALL"
  stage memproducts 45 "gpu compute-sanitizer $G/test_fp32" "memcheck of products with a dimension of 1" "
    $SANITIZER --tool memcheck $G/test_fp32 'one number'"
}
call_third() {
  stage steps 80 "gpu $G/train $python" "60 steps of B/1: the headline, beside PyTorch's" "$HEADLINE"
  stage torch 300 "gpu torch" "PyTorch with its slower compiler: torch_slow.json" "
    $python dev/bench_torch.py --batch $batch --compile max-autotune-no-cudagraphs \\
      --json $results/torch_slow.json"
  stage norms 30 "gpu $G/norm_versions" "one layer by steps" "$G/norm_versions"
  stage long 90 "gpu compute-sanitizer $G/test_bf16" "racecheck of attention over 257 tokens" "
    $SANITIZER --tool racecheck $G/test_bf16 '257 tokens'"
  stage memself 60 "gpu compute-sanitizer $G/selftest" "memcheck of the emulator's own tests" "
    compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 9 $G/selftest"
}

nvidia_libraries=$("$python" -c 'import nvidia; print(":".join(p + "/cu13/lib" for p in nvidia.__path__))' \
  2> /dev/null)
export LD_LIBRARY_PATH=/usr/local/cuda/lib64:$nvidia_libraries:${LD_LIBRARY_PATH:-}
export OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=500 PYTHONUNBUFFERED=1
export GEMM_PLANS=$results/plans.txt                # so that a later call repeats the choices of the first
synthetic > "$work/synthetic.py"
[ -n "$dry" ] || mkdir -p "$G" "$results" || exit 1
for call in $calls; do
  seconds=0 rows=() log=$results/$call.log
  [ -n "$dry" ] && echo "$call:"
  [ -n "$dry" ] || : > "$log"
  "call_$call"
  if [ "$call" != build ] && [ $seconds -gt 590 ]; then
    echo "gpu_check: the limits of $call add up to $seconds s, more than ten minutes" >&2
    exit 2
  fi
  [ -n "$dry" ] && echo "  at most $seconds s" && continue
  [ "$call" = build ] && continue
  report "$call" > "$results/$call.md"
  tail -n 7 "$results/$call.md"
  echo "report: $results/$call.md"
done
exit $failed

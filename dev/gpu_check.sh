#!/usr/bin/env bash
# gpu_check.sh - everything that needs a GPU, in one go: build, tests, sanitizers, benchmarks, the yardstick.
#
#   dev/gpu_check.sh                       all stages; the report goes to dev/gpu_results/DATE-DEVICE.md
#   dev/gpu_check.sh --dry-run             only say what would run
#   dev/gpu_check.sh --stages build,tests  some of them (a report of the same day is not overwritten)
#   dev/gpu_check.sh --limit 300           seconds a stage may take [900]
#   dev/gpu_check.sh --batch 256 --steps 60       of the whole-step benchmarks
#   dev/gpu_check.sh --out FOLDER          for the report [dev/gpu_results]
#
# A stage that fails does not stop the others. What is left out is said, with the reason. Status 1: some
# failed. Every stage's whole output is kept in build/gpu_check/STAGE.log.
set -u
cd "$(dirname "$0")/.." || exit 1

ALL="build tests ptx selftest memcheck racecheck initcheck gemm profile steps torch"
stages=$ALL dry= limit=900 batch=256 steps=60 out=dev/gpu_results
while [ $# -gt 0 ]; do
  case $1 in
    --dry-run) dry=1; shift; continue ;;
    --help|-h) sed -n '2,13s/^# \{0,1\}//p' "$0"; exit 0 ;;
    --stages|--limit|--batch|--steps|--out) ;;
    *) echo "gpu_check: unknown option $1; try --help" >&2; exit 2 ;;
  esac
  [ $# -ge 2 ] || { echo "gpu_check: $1 needs a value" >&2; exit 2; }
  case $1 in
    --stages) stages=${2//,/ } ;;
    --limit) limit=$2 ;;
    --batch) batch=$2 ;;
    --steps) steps=$2 ;;
    --out) out=$2 ;;
  esac
  shift 2
done
for s in $stages; do
  case " $ALL " in *" $s "*) ;; *) echo "gpu_check: no stage $s; there are: $ALL" >&2; exit 2 ;; esac
done

work=build/gpu_check
mkdir -p "$work" || exit 1
PYTHON=${PYTHON:-python3}
PATH=$PATH:/usr/local/cuda/bin
NVCC=${NVCC:-$(command -v nvcc)}
SANITIZER=${SANITIZER:-$(command -v compute-sanitizer)}
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)
has() { command -v "$1" >/dev/null 2>&1; }
no_gpu= no_nvcc= no_sanitizer= no_torch= no_python=
arch=-arch=native
[ -n "$gpu" ] || no_gpu="no GPU (nvidia-smi names none)" arch=-arch=sm_80
[ -n "$NVCC" ] || no_nvcc="no nvcc"
[ -n "$SANITIZER" ] || no_sanitizer="no compute-sanitizer"
has "$PYTHON" || no_python="no $PYTHON"
"$PYTHON" -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null ||
  no_torch="no PyTorch that sees a GPU"

# ----------------------------------------------------------------------------------------------------------
# One stage: stage NAME REASON-TO-SKIP WHAT COMMAND, a shell command whose status decides

rows=()                                             # the report's table of stages
failed=0
status_of() { cat "$work/$1.status" 2>/dev/null; }
stage() {
  local name=$1 skip=$2 what=$3 command=$4
  case " $stages " in *" $name "*) ;; *) return ;; esac
  if [ -n "$dry" ]; then
    printf '%-10s %s\n' "$name" "$what${skip:+  [would be left out: $skip]}"
    printf '%s\n' "$command" | sed 's/^ */             /'
    return
  fi
  rm -f "$work/$name.status"
  if [ -n "$skip" ]; then
    printf '== %-10s LEFT OUT: %s\n' "$name" "$skip"
    rows+=("| $name | left out: $skip | | $what |")
    return
  fi
  printf '== %-10s %s\n' "$name" "$what"
  local begin=$SECONDS rc
  timeout "$limit" bash -c "set -eu -o pipefail; $command" > "$work/$name.log" 2>&1
  rc=$?
  echo "$rc" > "$work/$name.status"
  tail -n 4 "$work/$name.log" | cut -c 1-150 | sed 's/^/     /'
  if [ $rc -eq 0 ]; then result=ok; else result="FAILED ($rc)"; failed=1; fi
  [ $rc -eq 124 ] && result="FAILED (longer than $limit s)"
  printf '   %-10s %s, %d s\n' "$name" "$result" $((SECONDS - begin))
  rows+=("| $name | $result | $((SECONDS - begin)) | $what |")
}

SMALL="'65 tokens, path drop'"                      # one of the tests: a step of a small model
SANITIZER=${SANITIZER:-compute-sanitizer}
stage build "$no_nvcc" "everything that the other stages run" "
  make FP32=1 -B test_srdit_cu
  cp test_srdit_cu $work/test_fp32
  make -B train_srdit_cu test_srdit_cu
  $NVCC -std=c++17 -O3 $arch -w dev/ptx_check.cu -o $work/ptx_check -lcublasLt
  $NVCC -std=c++17 -O3 $arch dev/bench_gpu.cu -o $work/bench_gpu -lcublasLt
  $NVCC -std=c++17 -O3 $arch dev/cuda_on_cpu/selftest.cu -o $work/selftest -lcublasLt
  make -B sample_cu"
stage tests "$no_gpu" "all CUDA tests: in float against the CPU, then in bf16" "
  $work/test_fp32
  ./test_srdit_cu"
stage ptx "$no_gpu" "PTX wrappers against the manual's tables, and the same hashes as emulated" "
  $work/ptx_check | tee $work/ptx_gpu.txt
  make -s ptx_check_emu && ./ptx_check_emu > $work/ptx_cpu.txt
  grep hash $work/ptx_gpu.txt | while read -r line; do grep -qxF \"\$line\" $work/ptx_cpu.txt ||
    { echo \"emulated, this line differs: \$line\"; exit 1; }; done
  echo 'the emulated hashes are the same'"
stage selftest "$no_gpu" "cuda_on_cpu's own test program on the real thing" "$work/selftest"
stage memcheck "${no_gpu:-$no_sanitizer}" "compute-sanitizer: out of bounds, misaligned" "
  $SANITIZER --tool memcheck --report-api-errors no --error-exitcode 9 $work/selftest
  $SANITIZER --tool memcheck --error-exitcode 9 $work/test_fp32 $SMALL
  $SANITIZER --tool memcheck --error-exitcode 9 ./test_srdit_cu $SMALL"
stage racecheck "${no_gpu:-$no_sanitizer}" "compute-sanitizer: races in shared memory" "
  $SANITIZER --tool racecheck --error-exitcode 9 $work/selftest
  $SANITIZER --tool racecheck --error-exitcode 9 $work/test_fp32 $SMALL
  $SANITIZER --tool racecheck --error-exitcode 9 ./test_srdit_cu $SMALL"
stage initcheck "${no_gpu:-$no_sanitizer}" "compute-sanitizer: reads of memory that nobody wrote" "
  $SANITIZER --tool initcheck --error-exitcode 9 $work/test_fp32 $SMALL
  $SANITIZER --tool initcheck --error-exitcode 9 ./test_srdit_cu $SMALL"
stage gemm "$no_gpu" "cuBLASLt on every matrix product of a step, all proposals timed" "
  $work/bench_gpu --batch $batch"

# A shard of random numbers of ImageNet's shape; only its size matters
cat > "$work/synthetic.py" <<'END'
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
DATA=$work/synthetic.safetensors
TRAIN="./train_srdit_cu --model B/1 --data $DATA --batch $batch --out $work/run"
TRAIN="$TRAIN --save-every 1000000 --sample-steps 1"

# The trainer's own profile where it has one, else nsys. Lines `profile: NAME MS` are set beside the floor.
if ./train_srdit_cu --help 2>/dev/null | grep -q -- --profile; then
  profile="$TRAIN --steps 12 --profile" no_profile=
elif has nsys; then
  profile="nsys profile --force-overwrite true -o $work/steps $TRAIN --steps 12
  nsys stats --report cuda_gpu_kern_sum $work/steps.nsys-rep" no_profile=
else
  profile="(nothing)" no_profile="the trainer has no --profile, and there is no nsys"
fi
stage profile "${no_gpu:-${no_python:-$no_profile}}" "time by component" "
  [ -s $DATA ] || $PYTHON $work/synthetic.py $DATA 512
  $profile"
stage steps "${no_gpu:-$no_python}" "whole training steps of B/1 at batch $batch on synthetic data" "
  [ -s $DATA ] || $PYTHON $work/synthetic.py $DATA 512
  rm -rf $work/run
  $TRAIN --steps $steps --log-every $((steps / 3))
  cat $work/run/log.csv
  rm -f $work/run/*.safetensors"
stage torch "${no_gpu:-$no_torch}" "the same step in PyTorch: dev/bench_torch.py" "
  $PYTHON dev/bench_torch.py --check --batch $batch --json $work/torch.json ${TORCH_FLAGS:-}"
[ -n "$dry" ] && exit 0

# ----------------------------------------------------------------------------------------------------------
# The report

ours= theirs=
# The last line's mean since the line before, so that neither tuning nor the first steps count
[ "$(status_of steps)" = 0 ] && ours=$(awk -F, '
  NR == 1 { for (i = 1; i <= NF; i++) if ($i == "ms_per_step") c = i }
  NR > 1 { ms = $c }
  END { print ms }' "$work/run/log.csv")
[ "$(status_of torch)" = 0 ] && theirs=$("$PYTHON" -c 'import json, sys
print(json.load(open(sys.argv[1]))["best"]["ms_per_step"])' "$work/torch.json")
line_of() {                                         # NAME MS: ms/step, images/s, MFU, hours, ratio
  awk -v name="$1" -v ms="$2" -v B="$batch" -v base="$theirs" 'BEGIN {
    if (ms == "") { printf "| %s | not measured | | | | |\n", name; exit }
    ratio = base == "" ? "n/a" : sprintf("%.2f", base / ms)
    printf "| %s | %.2f | %.0f | %.1f %% | %.2f | %s |\n", name, ms, B / ms * 1e3,
           100 * 20.895 * B / 256 / (ms * 1e-3) / 989.4, ms * 400000 / 3.6e6, ratio }'
}
# The paper study of the step, ms at 798 TFLOP/s and 3.0 TB/s, batch 256
floors() {
  cat <<'END'
GEMM fwd dense blocks;4.67
GEMM dgrad dense blocks;4.67
GEMM wgrad dense blocks;4.67
attention fwd dense;0.68
attention bwd dense;1.52
norm/modulate/residual fwd dense;1.62
norm/modulate/residual bwd dense;1.89
GEMM fwd sparse blocks;2.33
GEMM dgrad sparse blocks;2.33
GEMM wgrad sparse blocks;2.33
attention fwd sparse;0.34
attention bwd sparse;0.67
norm/modulate/residual fwd sparse;0.81
norm/modulate/residual bwd sparse;0.94
fusion_proj;0.41
projector GEMMs;3.63
projector elementwise and cosine loss;1.14
modulation and embedders;0.16
input, patch embed, final layer, losses;0.59
optimizer;1.96
END
}
device=${gpu:-no-gpu}
commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
git diff --quiet HEAD 2>/dev/null || commit="$commit and uncommitted changes"
driver=$(nvidia-smi --query-gpu=driver_version,clocks.max.sm,power.limit --format=csv,noheader 2>/dev/null)
mkdir -p "$out"
base=$out/$(date +%Y-%m-%d)-$(echo "$device" | tr -cs 'A-Za-z0-9\n' -)
report=$base.md
for ((n = 2; ; n++)); do
  [ -e "$report" ] || break
  report=$base-$n.md
done
{
  echo "# $device, $(date +%Y-%m-%d)"
  echo
  echo "Commit $commit. Driver, highest SM clock, power limit: $(echo "${driver:-unknown}" | head -n 1)."
  [ -n "$NVCC" ] && "$NVCC" --version | tail -n 1
  echo
  echo "| stage | result | s | what |"
  echo "|---|---|---:|---|"
  printf '%s\n' "${rows[@]}"
  if [ "$(status_of ptx)" = 0 ]; then echo; echo '```'; cat "$work/ptx_gpu.txt"; echo '```'; fi
  if [ -n "$(status_of gemm)" ]; then echo; echo "## Matrix products"; echo; cat "$work/gemm.log"; fi
  if [ "$(status_of profile)" = 0 ]; then
    echo; echo "## Components"; echo
    echo "| component | floor ms | measured ms |"
    echo "|---|---:|---:|"
    floors | awk -F';' -v log_file="$work/profile.log" 'BEGIN { while ((getline line < log_file) > 0)
        if (match(line, /^profile: .* [0-9.]+$/)) { ms = line; sub(/.* /, "", ms); sub(/^profile: /, "", line)
          sub(/ +[0-9.]+$/, "", line); got[line] = ms; total += ms } }
      { printf "| %s | %.2f | %s |\n", $1, $2, $1 in got ? got[$1] : "n/a"; floor += $2 }
      END { printf "| all | %.2f | %s |\n", floor, total ? total : "n/a" }'
  fi
  echo
  echo "## SR-DiT-B/1, batch $batch, one GPU, synthetic data"
  echo
  echo "MFU: of 989.4 dense TFLOP/s, at 20.895 TFLOP a step of 256. Hours: GPU-hours for 400,000 steps."
  echo
  echo "| | ms/step | images/s | MFU | hours | times PyTorch |"
  echo "|---|---:|---:|---:|---:|---:|"
  line_of "train_srdit_cu" "$ours"
  line_of "PyTorch, torch.compile" "$theirs"
} > "$report"
tail -n 4 "$report"
echo "report: $report"
exit $failed

#!/usr/bin/env bash
# Damaged files against the safetensors reader and all that reads through it (checkpoints to sample from and
# to go on from, data, decoders, reference files), under the address and undefined-behaviour sanitizers. Ends
# with status 1, and the file, where one crashes the reader, or takes it a second or 64 MB.
#
#   dev/fuzz_safetensors.sh [SECONDS]          default 60; FUZZER=libfuzzer or mutator, else what is there
#   dev/fuzz_safetensors.sh --replay FILE ...  run the reader on these files alone
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1:-} in --help|-h) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
if [ "${1:-}" != --replay ] && [[ ! ${1:-60} =~ ^[1-9][0-9]{0,5}$ ]]; then
    echo "error: $1 is no number of seconds from 1 to 999999; --help shows how it is used" >&2
    exit 2
fi
if [ "${1:-}" = --replay ] && [ $# -lt 2 ]; then
    echo "error: --replay needs a file; --help shows how it is used" >&2
    exit 2
fi
case ${FUZZER:=} in
'' | libfuzzer | mutator) ;;
*) echo "error: FUZZER=$FUZZER: there are libfuzzer and mutator" >&2; exit 2 ;;
esac
out=build/fuzz
mkdir -p "$out/seeds" "$out/found"

# Small sound files to begin with: NAME, header, bytes of data
seed() {
    local header=$2 n=${#2} i
    {
        for i in 0 8 16 24 32 40 48 56; do printf "\\x$(printf %02x $((n >> i & 255)))"; done
        printf %s "$header"
        head -c "$3" /dev/zero
    } > "$out/seeds/$1"
}
t() { printf '"%s":{"dtype":"%s","shape":[%s],"data_offsets":[%s]}' "$@"; }
seed empty '{}' 0
seed types "{$(t a F32 2 0,8),$(t b BF16 2,1 8,12),$(t c F16 1,1,3 12,18),$(t d U64 '' 18,26)}" 26
seed spaced '{ "__metadata__" : {"k\u00e9y":"v\n\""} , '"$(t a BOOL 0,7 0,0), $(t b F64 1 0,8) }  " 8
seed checkpoint '{"__metadata__":{"format":"srdit-checkpoint-1","depth":"2","num_f":"1","num_h":"1",
"hidden_size":"4","num_heads":"1","in_channels":"1","input_size":"1","z_dim":"1","projector_dim":"1",
"num_classes":"1","patch_size":"1","switch_off":"rope,cfm","step":"3","lr":"1e-3"},'"$(
    t model.x_embedder.proj.weight F32 4,1,1,1 0,16),$(t model.x_embedder.proj.bias F16 4 16,24)}" 24
seed huge '{"__metadata__":{"format":"srdit-checkpoint-1","depth":"128","num_f":"1","num_h":"1",
"hidden_size":"65536","num_heads":"1024","patch_size":"1024","in_channels":"65536","input_size":"4096",
"z_dim":"65536","projector_dim":"65536","num_classes":"10000000","mlp_ratio":"64"}}' 0
small='"in_channels":"1","input_size":"1","z_dim":"1","num_classes":"1","patch_size":"1","mlp_ratio":"1"'
seed wide '{"__metadata__":{"format":"srdit-checkpoint-1","depth":"64","num_f":"1","num_h":"1",
"hidden_size":"60000","num_heads":"15000","projector_dim":"60000",'"$small"',
"step":"0","steps":"1","batch":"1","seed":"1"}}' 0
seed wide_reference '{"__metadata__":{"format":"srdit-ref-1","depth":"64","num_f":"1","num_h":"1",
"hidden_size":"60000","num_heads":"15000","projector_dim":"60000",'"$small"'},'"$(t in.x F32 100000,0 0,0)}" 0
shard='"__metadata__":{"classes":"3","name":"x","decoder":"pixels","latent_scale":"0.1","train_samples":"2"}'
shard="$shard,$(t latents U8 2,1,2,2 0,8),$(t labels I64 2 8,24)"
seed shard "{$shard,$(t feats I8 2,5,2 24,44),$(t cls F32 2,2 44,60)}" 60
for word in '"__metadata__":{' '"format":"srdit-checkpoint-1"' '"classes":"' '"dtype":"' '"shape":[' \
    '"data_offsets":[' F32 BF16 F16 U8 I64 BOOL 18446744073709551615 9223372036854775808 4294967296 65536 \
    1e308 nan -1 '\u0000' '\ud83d' '\\' '\"' ,0 '},' '"a":{' '"latents":{' '"labels":{' '"feats":{' \
    '"cls":{' '"input_size":"' '"in_channels":"' '"patch_size":"' '"depth":"' '"mlp_ratio":"' \
    '"latent_scale":"' '"train_samples":"' '"switch_off":"' '"hidden_size":"' '"num_heads":"' '"steps":"' \
    '"batch":"' '"format":"srdit-ref-1"' '"kind":"invae"' '"num_groups":"' '"attn_levels":"' '"ch_mult":"' \
    60000 1000000 'ema.' 'model.' 'adam.v.' 'param.' 'decoder.up.1.' 'in.x' 'in.ids_keep' 'sample.eps'
do printf '%s\n' "$word"; done > "$out/words"
sed 's/[\\"]/\\&/g; s/.*/"&"/' "$out/words" > "$out/dictionary"

sanitize="-g -O1 -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all"
flags="-std=gnu11 -w $sanitize"
if [ -z "${FUZZER:-}" ]; then
    FUZZER=mutator
    echo 'int LLVMFuzzerTestOneInput(const char *p, long n) { return p && n < 0; }' > "$out/probe.c"
    clang -fsanitize=fuzzer "$out/probe.c" -o "$out/probe" 2>/dev/null && FUZZER=libfuzzer
fi
${CC:-gcc} $flags dev/fuzz_seeds.c -o "$out/seed" -lm
ASAN_OPTIONS=detect_leaks=0 "$out/seed" "$out/seeds"
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:abort_on_error=1
if [ "$FUZZER" = libfuzzer ]; then
    clang $flags -fsanitize=fuzzer -DLIBFUZZER dev/fuzz_safetensors.c -o "$out/fuzz" -lm
    if [ "${1:-}" = --replay ]; then shift; exec "$out/fuzz" "$@"; fi
    mkdir -p "$out/corpus"
    "$out/fuzz" -max_total_time="${1:-60}" -max_len=49152 -close_fd_mask=1 -print_final_stats=1 -verbosity=0 \
        -dict="$out/dictionary" -artifact_prefix="$out/found/" "$out/corpus" "$out/seeds" 2> "$out/log" || {
        grep -m 1 -E 'runtime error|ERROR: AddressSanitizer|for one (small )?file' "$out/log" ||
            tail -n 20 "$out/log"
        sed -nE 's/^ +#[0-9]+ 0x[0-9a-f]+ (.*/[a-z_]*(srdit|sample|tensors)\.[ch])/    \1/p' "$out/log" |
            head -n 6
        sed -n 's/.*Test unit written to /the file: /p' "$out/log" | head -n 1
        exit 1
    }
    grep '^files read to the end' "$out/log"
    if grep -q '^files read.*!' "$out/log"; then exit 1; fi
    echo "$(sed -n 's/stat::number_of_executed_units: *//p' "$out/log") damaged files (libFuzzer), no crash"
else
    ${CC:-gcc} $flags dev/fuzz_safetensors.c -o "$out/fuzz" -lm
    [ "${1:-}" = --replay ] && { echo "--replay needs clang's libFuzzer" >&2; exit 2; }
    "$out/fuzz" "${1:-60}" "$out/words" "$out/found/crash" "$out"/seeds/* 2> "$out/log" || {
        cat "$out/log"
        echo "the file: $out/found/crash"
        exit 1
    }
    cat "$out/log"
    if grep -q '^files read.*!' "$out/log"; then exit 1; fi
fi

# SR-DiT in C and CUDA. `make help` lists the targets; every probe below can be overridden on the command line.

CC       ?= cc
OPTIMIZE ?= -O3 -march=native
WARN     := -Wall -Wextra

# What this machine has, found by compiling a line, not by guessing.
probe     = $(shell printf '%s\n' '$(1)' > .probe.c && $(CC) $(2) .probe.c -o .probe.out 2>/dev/null && echo yes; rm -f .probe.c .probe.out)
empty_main := int main(void) { return 0; }
# libgomp's threads wait by spinning, which on a machine that is busy with anything else costs more than it saves.
OPENMP   ?= $(if $(call probe,$(empty_main),-fopenmp),yes,no)
NATIVE   ?= $(if $(call probe,$(empty_main),$(OPTIMIZE)),yes,no)
NVCC     ?= $(shell command -v nvcc 2>/dev/null || ls /usr/local/cuda/bin/nvcc 2>/dev/null)

# -fno-math-errno lets sqrt be one instruction, and -fno-trapping-math lets gcc turn a comparison of floats into a
# vector's (AVX2 has no masks): nothing here reads errno or the exception flags. No fast-math: NaN must stay NaN.
# Tuning for AMD's Zen, gcc rounds the products of a sum apart where the sum stands alone (as of one row and one
# vector), so that a row's bits would depend on how many rows are multiplied beside it: never.
FMA      ?= $(if $(call probe,$(empty_main),-Werror --param=avoid-fma-max-bits=0),--param=avoid-fma-max-bits=0)
CFLAGS   := -std=gnu11 -g $(if $(filter yes,$(NATIVE)),$(OPTIMIZE),-O3) -fno-math-errno -fno-trapping-math $(FMA) $(WARN)
CFLAGS   += $(if $(filter yes,$(OPENMP)),-fopenmp,-Wno-unknown-pragmas)
LDLIBS   := -lm -pthread
LIB      := $(wildcard dev/lib/*.h)

.PHONY: all test debug help clean found
.DEFAULT_GOAL := all
all: found train_srdit sample

# The race (dev/speedrun): its header is part of the trainer, and a trainer holds the text it was built from.
LIB      += $(wildcard dev/speedrun/*.h)
SOURCES  := Makefile dev/cuda_on_cpu/emu.mk train_srdit.c train_srdit.cu $(LIB) dev/speedrun/sources.c
EMBED     = -DSOURCES='"build/sources.txt"' -DFLAGS='"$(subst ",,$(1))"'
build/sources.txt: $(SOURCES)
	@mkdir -p build
	@for f in $(SOURCES); do printf '==== %s %s\n' "$$f" $$(wc -c < $$f); cat "$$f"; done > $@.part && mv $@.part $@

train_srdit: train_srdit.c $(LIB) build/sources.txt Makefile
	$(CC) $(CFLAGS) $(call EMBED,$(CC) $(CFLAGS)) train_srdit.c dev/speedrun/sources.c -o $@ $(LDLIBS)

sample: sample.c train_srdit.c $(LIB) Makefile
	$(CC) $(CFLAGS) sample.c -o $@ $(LDLIBS)

# The tests are compiled twice, over the trainer in float and in double, and linked into one program.
build/test_double.o: test_srdit.c sample.c train_srdit.c $(LIB) Makefile
	@mkdir -p build
	$(CC) $(CFLAGS) -DUSE_DOUBLE -c test_srdit.c -o $@
test_srdit: test_srdit.c sample.c train_srdit.c $(LIB) build/test_double.o Makefile
	$(CC) $(CFLAGS) test_srdit.c build/test_double.o -o $@ $(LDLIBS)

test: found test_srdit train_srdit
	./test_srdit

# The same programs with the address and undefined-behaviour sanitizers, in build/debug/
SANITIZE := -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
DEBUGFLAGS = $(filter-out -O3 -g,$(CFLAGS)) $(SANITIZE) -DENTRIES=1
debug: found
	@mkdir -p build/debug
	$(CC) $(DEBUGFLAGS) -DUSE_DOUBLE -c test_srdit.c -o build/debug/test_double.o
	$(CC) $(DEBUGFLAGS) test_srdit.c build/debug/test_double.o -o build/debug/test_srdit $(LDLIBS)
	$(CC) $(DEBUGFLAGS) train_srdit.c -o build/debug/train_srdit $(LDLIBS)
	$(CC) $(DEBUGFLAGS) sample.c -o build/debug/sample $(LDLIBS)
	./build/debug/test_srdit

# How fast samples are read (dev/README.md)
bench_loader: dev/bench_loader.c train_srdit.c $(LIB) Makefile
	$(CC) $(CFLAGS) dev/bench_loader.c -o $@ $(LDLIBS)

# ---- On a GPU. The architecture is that of the GPU that is here; without one, the code is built for two.
GPU_CAP  ?= $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d .)
ARCH     ?= $(if $(GPU_CAP),-gencode arch=compute_$(GPU_CAP)$(COMMA)code=sm_$(GPU_CAP),\
              -gencode arch=compute_80$(COMMA)code=sm_80 -gencode arch=compute_90$(COMMA)code=sm_90)
COMMA    := ,
HOST      = -O3$(if $(filter yes,$(NATIVE)),$(COMMA)-march=native)$(COMMA)-fno-math-errno$(COMMA)-fno-trapping-math$(COMMA)-Wall$(COMMA)-Wextra
HOST     += $(if $(filter yes,$(OPENMP)),-Xcompiler -fopenmp,-Xcompiler -Wno-unknown-pragmas)
NVFLAGS   = -O3 -std=c++17 -lineinfo $(ARCH) -Xcompiler $(HOST) $(if $(FP32),-DFP32)
# Several GPUs: of NCCL the header is needed here; the library is opened by the program, and only where there are
# several ranks. NCCL=/path/to/nccl names the folder that holds include/nccl.h.
TOOLKIT  := $(patsubst %/bin/nvcc,%,$(realpath $(NVCC)))
NCCL     ?= $(TOOLKIT)
NCCL_INC  = $(firstword $(wildcard $(NCCL)/include/nccl.h /usr/include/nccl.h))
NVFLAGS  += $(if $(NCCL_INC),-DNCCL $(if $(filter $(NCCL)/include/nccl.h,$(NCCL_INC)),$(if $(filter-out \
              $(TOOLKIT),$(NCCL)),-I$(NCCL)/include)))
.PHONY: nvcc_found
nvcc_found:
	@$(if $(NVCC),,echo "error: no nvcc. Install the CUDA Toolkit, or say where it is: make NVCC=/path/to/nvcc $(MAKECMDGOALS)"; \
	  echo "       (without a GPU, make train_srdit_emu runs the same file on the CPU)"; exit 1)
	@$(if $(GPU_CAP),echo "GPU: compute capability $(GPU_CAP)",echo "no GPU found here: building for sm_80 and sm_90 (override: ARCH=-arch=sm_XX)")
	@echo "NCCL: $(if $(NCCL_INC),yes ($(NCCL_INC)),no: one GPU only (NCCL=/path/to/nccl))"

train_srdit_cu: train_srdit.cu train_srdit.c $(LIB) build/sources.txt Makefile | nvcc_found
	$(CC) $(call EMBED,$(NVCC) $(NVFLAGS)) -c dev/speedrun/sources.c -o build/sources_cu.o
	$(NVCC) $(NVFLAGS) train_srdit.cu build/sources_cu.o -o $@ -lcublasLt -ldl
sample_cu: sample.cu sample.c train_srdit.cu train_srdit.c $(LIB) Makefile | nvcc_found
	$(NVCC) $(NVFLAGS) sample.cu -o $@ -lcublasLt -ldl
# -diag-suppress 177: a test program does not call everything that it includes
test_srdit_cu: test_srdit.c sample.cu sample.c train_srdit.cu train_srdit.c $(LIB) Makefile | nvcc_found
	@mkdir -p build
	$(NVCC) $(NVFLAGS) -diag-suppress 177 -DTEST_CUDA -x cu -c test_srdit.c -o build/test_cuda.o
	$(NVCC) $(NVFLAGS) -diag-suppress 177 -DUSE_DOUBLE -x cu -c test_srdit.c -o build/test_cuda_double.o
	$(NVCC) $(NVFLAGS) build/test_cuda.o build/test_cuda_double.o -o $@ -lcublasLt -ldl

# ---- The CUDA file without a GPU: train_srdit_emu, test_srdit_emu, test_cuda_on_cpu
include dev/cuda_on_cpu/emu.mk

found:
	@echo "compiler: $(CC) ($(shell $(CC) --version 2>/dev/null | head -n 1))"
	@echo "OpenMP: $(OPENMP)   -march=native: $(NATIVE)   nvcc: $(or $(NVCC),no)"

help:
	@echo "make                 train_srdit and sample, for the CPU"
	@echo "make test            build and run all tests (no Python, no GPU)"
	@echo "make debug           the same under the address and undefined-behaviour sanitizers"
	@echo "make train_srdit_cu  the trainer on an NVIDIA GPU; also sample_cu, test_srdit_cu (FP32=1: all in float)"
	@echo "make train_srdit_emu the same CUDA file run on the CPU, for reading with gdb; also sample_emu, test_srdit_emu"
	@echo "make test_cuda_on_cpu  every kernel by emulation: thread orders, sanitizers, race detector"
	@echo "make test_ranks      several ranks against one, by emulation: shares, resuming, deaths"
	@echo "make bench_loader    how fast batches are read"
	@echo "make clean           remove what was built"
	@echo
	@echo "Overrides: CC=clang  OPENMP=no  NATIVE=no  OPTIMIZE='-O2 -mavx2 -mfma'  NVCC=/path/to/nvcc"
	@echo "           ARCH=-arch=sm_90  CUDA=/path/to/toolkit"
	@echo "           OPTIMIZE='-O2 -DNAIVE': the matrix product as three loops"

clean:
	rm -rf build train_srdit sample test_srdit bench_loader train_srdit_cu sample_cu test_srdit_cu *_emu *_emu_bf16

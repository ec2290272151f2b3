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

# -fno-math-errno lets sqrt be one instruction; nothing here reads errno after it. No fast-math: NaN must stay NaN.
CFLAGS   := -std=gnu11 -g $(if $(filter yes,$(NATIVE)),$(OPTIMIZE),-O3) -fno-math-errno $(WARN)
CFLAGS   += $(if $(filter yes,$(OPENMP)),-fopenmp,-Wno-unknown-pragmas)
LDLIBS   := -lm

.PHONY: all test debug help clean found
all: found train_srdit sample

train_srdit: train_srdit.c Makefile
	$(CC) $(CFLAGS) train_srdit.c -o $@ $(LDLIBS)

sample: sample.c train_srdit.c Makefile
	$(CC) $(CFLAGS) sample.c -o $@ $(LDLIBS)

# The tests are compiled twice, over the trainer in float and in double, and linked into one program.
build/test_double.o: test_srdit.c sample.c train_srdit.c Makefile
	@mkdir -p build
	$(CC) $(CFLAGS) -DUSE_DOUBLE -c test_srdit.c -o $@
test_srdit: test_srdit.c sample.c train_srdit.c build/test_double.o Makefile
	$(CC) $(CFLAGS) test_srdit.c build/test_double.o -o $@ $(LDLIBS)

test: found test_srdit train_srdit
	./test_srdit

# The same programs with the address and undefined-behaviour sanitizers, in build/debug/
SANITIZE := -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
DEBUGFLAGS = $(filter-out -O3 -g,$(CFLAGS)) $(SANITIZE)
debug: found
	@mkdir -p build/debug
	$(CC) $(DEBUGFLAGS) -DUSE_DOUBLE -c test_srdit.c -o build/debug/test_double.o
	$(CC) $(DEBUGFLAGS) test_srdit.c build/debug/test_double.o -o build/debug/test_srdit $(LDLIBS)
	$(CC) $(DEBUGFLAGS) train_srdit.c -o build/debug/train_srdit $(LDLIBS)
	$(CC) $(DEBUGFLAGS) sample.c -o build/debug/sample $(LDLIBS)
	./build/debug/test_srdit

found:
	@echo "compiler: $(CC) ($(shell $(CC) --version 2>/dev/null | head -n 1))"
	@echo "OpenMP: $(OPENMP)   -march=native: $(NATIVE)   nvcc: $(or $(NVCC),no)"

help:
	@echo "make                 train_srdit and sample, for the CPU"
	@echo "make test            build and run all tests (no Python, no GPU)"
	@echo "make debug           the same under the address and undefined-behaviour sanitizers"
	@echo "make clean           remove what was built"
	@echo
	@echo "Overrides: CC=clang  OPENMP=no  NATIVE=no  OPTIMIZE='-O2 -mavx2 -mfma'  NVCC=/path/to/nvcc"

clean:
	rm -rf build train_srdit sample test_srdit train_srdit_cu sample_cu test_srdit_cu train_srdit_emu test_srdit_emu

# emu.mk - CUDA programs run on the CPU, without nvcc and without a GPU; only CUDA's headers are needed.
# The top-level Makefile includes this file, so paths start at the top.
#
#   make train_srdit_emu test_srdit_emu sample_emu     the GPU programs, in float; in bf16: ..._emu_bf16
#   make ptx_check_emu                                 dev/ptx_check.cu on the CPU twins
#   make norm_versions_emu                             dev/norm_versions.cu: its checks, without times
#   make test_cuda_on_cpu                              selftest.cu in every order and under every sanitizer,
#                                                      norm_versions.cu in some, then the trainer's tests
#   make train_srdit_emu MODE=asan                     the same with a sanitizer: asan, tsan, msan (clang++);
#                                                      gdb: with -O0. Objects lie in build/emu-MODE, and the
#                                                      name at the top links to the program made last
MODE     ?= plain
CUDA     ?= /usr/local/cuda
CUDA_INC ?= $(CUDA)/include

EMU     := dev/cuda_on_cpu
EMU_OUT := build/emu-$(MODE)
EMU_MODES := plain gdb asan tsan msan
EMU_FLAGS_plain := -O2 -g
EMU_FLAGS_gdb   := -O0 -g
EMU_FLAGS_asan  := -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
EMU_FLAGS_tsan  := -O1 -g -fsanitize=thread
EMU_FLAGS_msan  := -O1 -g -fsanitize=memory
EMU_WARN  := -Wall -Wextra -Wno-unknown-pragmas
EMU_CXX   ?= $(if $(filter msan,$(MODE)),clang++,g++)
EMU_FLAGS = $(or $(EMU_FLAGS_$(MODE)),$(error MODE is $(MODE); it can be one of: $(EMU_MODES))) $(EMU_WARN)
EMU_CUDA  = -std=gnu++17 -I$(EMU) -isystem $(CUDA_INC)
EMU_DEPEND = -MMD -MP
# Several ranks, where NCCL's header is: between processes of this machine, by a library in NCCL's place
EMU_NCCL  := $(if $(wildcard $(CUDA_INC)/nccl.h),-DNCCL -DNCCL_NAME='"libnccl_cpu.so"')

# Copies that a C++ compiler can take, in a tree of their own: an #include "x.cu" finds the copy first
EMU_COPIES := train_srdit.cu sample.cu test_srdit.c sample.c
emu_copies = $(addprefix $(EMU_OUT)/src/,$(wildcard $(1)))
$(EMU_OUT)/src/%: % $(EMU)/cuda_cpu.sed
	@mkdir -p $(@D)
	(echo '#line 1 "$<"'; sed -E -f $(EMU)/cuda_cpu.sed $<) > $@
.PRECIOUS: $(EMU_OUT)/src/%

# The runtime. Thread sanitizer must not see it (its own bookkeeping is shared by all fibers).
EMU_RUNTIME := $(EMU_OUT)/cuda_cpu.o $(EMU_OUT)/cuda_cpu_blas.o
$(EMU_OUT)/cuda_cpu.o: $(EMU)/cuda_cpu.cpp $(EMU)/cuda_cpu.h $(EMU)/emu.mk
	@mkdir -p $(@D)
	$(EMU_CXX) $(patsubst -fsanitize=thread,-O2,$(EMU_FLAGS)) $(EMU_CUDA) -c $< -o $@
$(EMU_OUT)/cuda_cpu_blas.o: $(EMU)/cuda_cpu_blas.cpp $(EMU)/cuda_cpu.h $(EMU)/emu.mk
	@mkdir -p $(@D)
	$(EMU_CXX) $(patsubst -O2,-O3,$(EMU_FLAGS)) $(EMU_CUDA) -c $< -o $@

# Emulated programs. The tests and the sampler are C files that include the trainer.
EMU_COMPILE = $(EMU_CXX) $(EMU_FLAGS) $(EMU_CUDA) -I. -include cuda_cpu.h $(EMU_DEPEND) $(EMU_NCCL) $(EMU_DEFINES) \
	-x c++ -c $< -o $@
$(EMU_OUT)/%_bf16.o: $(EMU_OUT)/src/%.cu $(EMU)/cuda_cpu.h $(EMU)/emu.mk $(call emu_copies,$(EMU_COPIES))
	$(EMU_COMPILE)
$(EMU_OUT)/%_fp32.o: $(EMU_OUT)/src/%.cu $(EMU)/cuda_cpu.h $(EMU)/emu.mk $(call emu_copies,$(EMU_COPIES))
	$(EMU_COMPILE) -DFP32
$(EMU_OUT)/%_bf16.o: $(EMU_OUT)/src/%.c $(EMU)/cuda_cpu.h $(EMU)/emu.mk $(call emu_copies,$(EMU_COPIES))
	$(EMU_COMPILE)
$(EMU_OUT)/%_fp32.o: $(EMU_OUT)/src/%.c $(EMU)/cuda_cpu.h $(EMU)/emu.mk $(call emu_copies,$(EMU_COPIES))
	$(EMU_COMPILE) -DFP32
$(EMU_OUT)/test_srdit_bf16.o $(EMU_OUT)/test_srdit_fp32.o: EMU_DEFINES = -DTEST_CUDA=
$(EMU_OUT)/selftest.o $(EMU_OUT)/ptx_check.o: $(call emu_copies,dev/ptx_check.cu)
$(EMU_OUT)/norm_versions.o: $(call emu_copies,dev/norm_versions.cu)
$(EMU_OUT)/%.o: $(EMU_OUT)/src/$(EMU)/%.cu $(EMU)/cuda_cpu.h $(EMU)/emu.mk
	$(EMU_COMPILE)
$(EMU_OUT)/%.o: $(EMU_OUT)/src/dev/%.cu $(EMU)/cuda_cpu.h $(EMU)/emu.mk
	$(EMU_COMPILE)

# The tests' second half: the same file over the CPU trainer in double. As C++ too, so that the names agree
# whether or not the file says extern "C".
$(EMU_OUT)/test_srdit_double.o: test_srdit.c $(EMU)/emu.mk
	@mkdir -p $(@D)
	$(EMU_CXX) $(EMU_FLAGS) -std=gnu++17 $(EMU_DEPEND) -DUSE_DOUBLE -x c++ -c $< -o $@
$(EMU_OUT)/test_srdit_fp32 $(EMU_OUT)/test_srdit_bf16: $(EMU_OUT)/test_srdit_double.o

$(EMU_OUT)/libnccl_cpu.so: $(EMU)/nccl_cpu.cpp $(EMU)/emu.mk
	@mkdir -p $(@D)
	$(EMU_CXX) $(EMU_FLAGS) $(EMU_CUDA) -fPIC -shared $< -o $@

# -rdynamic: that library calls the runtime; $ORIGIN: it lies beside the program
$(EMU_OUT)/%: $(EMU_OUT)/%.o $(EMU_RUNTIME)
	$(EMU_CXX) $(EMU_FLAGS) $^ -o $@ -rdynamic -Wl,-rpath,'$$ORIGIN' -lm -ldl -pthread
-include $(wildcard $(EMU_OUT)/*.d)

# The names at the top link to the program of the last MODE asked for
.PHONY: train_srdit_emu test_srdit_emu sample_emu train_srdit_emu_bf16 test_srdit_emu_bf16 sample_emu_bf16
train_srdit_emu train_srdit_emu_bf16: $(if $(EMU_NCCL),$(EMU_OUT)/libnccl_cpu.so)
train_srdit_emu test_srdit_emu sample_emu: %_emu: $(EMU_OUT)/%_fp32
	ln -sf $< $@
train_srdit_emu_bf16 test_srdit_emu_bf16 sample_emu_bf16: %_emu_bf16: $(EMU_OUT)/%_bf16
	ln -sf $< $@
# Several ranks (dev/test_ranks.py), where NCCL's header is
.PHONY: test_ranks
test_ranks: train_srdit_emu train_srdit_emu_bf16
	$(if $(EMU_NCCL),/usr/bin/python3 dev/test_ranks.py,@echo "NCCL: no nccl.h in $(CUDA_INC), so test_ranks is left out")
.PHONY: ptx_check_emu norm_versions_emu
ptx_check_emu norm_versions_emu: %_emu: $(EMU_OUT)/%
	ln -sf $< $@

# Each line is one run; the first that fails stops. Without clang++ or valgrind their runs are left out aloud.
.PHONY: test_cuda_on_cpu
EMU_SELFTEST = $(MAKE) --no-print-directory -s MODE=$(1) build/emu-$(1)/selftest
emu_run = @printf '%-24s ' '$(1)'; $(2) build/emu-$(3)/selftest || exit 1
EMU_NORMS = $(MAKE) --no-print-directory -s MODE=$(1) build/emu-$(1)/norm_versions
norms_run = @printf '%-24s ' '$(1)'; $(2) build/emu-$(3)/norm_versions > build/emu-$(3)/log 2>&1 && \
	tail -n 1 build/emu-$(3)/log || { tail -n 40 build/emu-$(3)/log; exit 1; }
test_cuda_on_cpu:
	@$(call EMU_SELFTEST,plain) && $(call EMU_SELFTEST,asan) && $(call EMU_SELFTEST,tsan)
	$(call emu_run,order fwd,CUDA_CPU_ORDER=fwd,plain)
	$(call emu_run,order rev,CUDA_CPU_ORDER=rev,plain)
	$(call emu_run,order rand 1,CUDA_CPU_ORDER=rand CUDA_CPU_SEED=1,plain)
	$(call emu_run,order rand 2,CUDA_CPU_ORDER=rand CUDA_CPU_SEED=2,plain)
	$(call emu_run,late streams,CUDA_CPU_ASYNC=1,plain)
	$(call emu_run,strict cuBLASLt$(COMMA) sm_86,CUDA_CPU_CUBLAS=strict CUDA_CPU_SM=86 CUDA_CPU_SMS=84,plain)
	$(call emu_run,asan and ubsan,,asan)
	$(call emu_run,asan late streams rev,CUDA_CPU_ORDER=rev CUDA_CPU_ASYNC=1,asan)
	$(call emu_run,tsan,,tsan)
	@if command -v clang++ >/dev/null; then \
		$(call EMU_SELFTEST,msan) && printf '%-24s ' msan && build/emu-msan/selftest; \
	elif command -v valgrind >/dev/null; then \
		printf '%-24s ' valgrind && valgrind -q --error-exitcode=9 build/emu-plain/selftest no-bugs; \
	else echo 'msan, valgrind: left out, since there is neither clang++ nor valgrind'; fi
	@$(call EMU_NORMS,plain) && $(call EMU_NORMS,tsan)
	$(call norms_run,norms,,plain)
	$(call norms_run,norms$(COMMA) order rev,CUDA_CPU_ORDER=rev,plain)
	$(call norms_run,norms$(COMMA) tsan,,tsan)
	@$(MAKE) --no-print-directory -s test_srdit_on_cpu

# The trainer's kernels: everything in float and in bf16, then chosen comparisons (test_srdit_emu WORDS) in the
# other thread orders, with late streams, and under each sanitizer. TSan is the race detector.
.PHONY: test_srdit_on_cpu
EMU_TEST = $(MAKE) --no-print-directory -s MODE=$(1) build/emu-$(1)/test_srdit_$(2)
# $(call trainer_run,what,environment,mode,precision,words)
trainer_run = @printf '%-38s ' '$(1)'; $(2) build/emu-$(3)/test_srdit_$(4) $(5) > build/emu-$(3)/log 2>&1 && \
	tail -n 1 build/emu-$(3)/log || { tail -n 40 build/emu-$(3)/log; exit 1; }
test_srdit_on_cpu:
	@$(call EMU_TEST,plain,fp32) && $(call EMU_TEST,plain,bf16)
	@$(call EMU_TEST,asan,bf16) && $(call EMU_TEST,tsan,bf16)
	$(call trainer_run,trainer in float,,plain,fp32)
	$(call trainer_run,trainer in bf16,,plain,bf16)
	$(call trainer_run,reverse order,CUDA_CPU_ORDER=rev,plain,bf16,"65 tokens")
	$(call trainer_run,random order,CUDA_CPU_ORDER=rand CUDA_CPU_SEED=1,plain,bf16,"65 tokens")
	$(call trainer_run,two multiprocessors,CUDA_CPU_SMS=2,plain,bf16,"65 tokens")
	$(call trainer_run,random order$(COMMA) in float,CUDA_CPU_ORDER=rand CUDA_CPU_SEED=2,plain,fp32,"path drop")
	$(call trainer_run,late streams,CUDA_CPU_ASYNC=1,plain,fp32,"path drop")
	$(call trainer_run,strict cuBLASLt$(COMMA) in float,CUDA_CPU_CUBLAS=strict,plain,fp32,"65 tokens")
	$(call trainer_run,strict cuBLASLt$(COMMA) as sm_86,CUDA_CPU_CUBLAS=strict CUDA_CPU_SM=86,plain,bf16,"tokens")
	$(call trainer_run,strict cuBLASLt$(COMMA) in bf16,CUDA_CPU_CUBLAS=strict,plain,bf16,"no ")
	$(call trainer_run,strict cuBLASLt$(COMMA) one number,CUDA_CPU_CUBLAS=strict,plain,fp32,"one number")
	$(call trainer_run,strict as sm_86$(COMMA) in float,CUDA_CPU_CUBLAS=strict CUDA_CPU_SM=86,plain,fp32,"path drop")
	$(call trainer_run,decoder$(COMMA) reverse order,CUDA_CPU_ORDER=rev,plain,bf16,"the decoder")
	$(call trainer_run,decoder$(COMMA) random order$(COMMA) late,CUDA_CPU_ORDER=rand CUDA_CPU_ASYNC=1,plain,fp32,"the decoder")
	$(call trainer_run,decoder$(COMMA) strict cuBLASLt,CUDA_CPU_CUBLAS=strict,plain,bf16,"the decoder")
	$(call trainer_run,decoder$(COMMA) asan and ubsan,CUDA_CPU_CUBLAS=strict,asan,bf16,"the decoder")
	$(call trainer_run,decoder$(COMMA) tsan,,tsan,bf16,"the decoder")
	$(call trainer_run,sampler$(COMMA) reverse order$(COMMA) late,CUDA_CPU_ORDER=rev CUDA_CPU_ASYNC=1,plain,fp32,"sampler")
	$(call trainer_run,sampler$(COMMA) strict cuBLASLt,CUDA_CPU_CUBLAS=strict,plain,bf16,"sampler")
	$(call trainer_run,sampler$(COMMA) asan and ubsan,,asan,bf16,"sampler")
	$(call trainer_run,sampler$(COMMA) tsan,,tsan,bf16,"sampler")
	$(call trainer_run,cuBLASLt refuses late,CUDA_CPU_CUBLAS=late,plain,bf16,"path drop")
	$(call trainer_run,graphs$(COMMA) late streams,CUDA_CPU_ASYNC=1,plain,fp32,"graphs")
	$(call trainer_run,asan and ubsan$(COMMA) graphs,CUDA_CPU_ASYNC=1,asan,bf16,"graphs$(COMMA) Muon")
	$(call trainer_run,asan and ubsan$(COMMA) stored samples,,asan,bf16,"stored")
	$(call trainer_run,tsan$(COMMA) reading ahead,,tsan,bf16,"loader")
	$(call trainer_run,asan and ubsan,,asan,bf16,"two$(COMMA) path drop")
	$(call trainer_run,asan and ubsan$(COMMA) aligned twice,,asan,bf16,"65 tokens$(COMMA) aligned at 1 and 4")
	$(call trainer_run,asan and ubsan$(COMMA) recipe,,asan,bf16,"srdit13$(COMMA) path")
	$(call trainer_run,asan and ubsan$(COMMA) no decoder,,asan,bf16,"no decoder block")
	$(call trainer_run,asan and ubsan$(COMMA) one token kept,,asan,bf16,"one token")
	$(call trainer_run,asan and ubsan$(COMMA) late streams,CUDA_CPU_ASYNC=1,asan,bf16,"batch 1")
	$(call trainer_run,tsan,,tsan,bf16,"two$(COMMA) path drop")
	$(call trainer_run,tsan$(COMMA) aligned twice,,tsan,bf16,"65 tokens$(COMMA) aligned at 1 and 4")
	$(call trainer_run,tsan$(COMMA) recipe,,tsan,bf16,"srdit13$(COMMA) path")
	$(call trainer_run,tsan$(COMMA) no decoder,,tsan,bf16,"no decoder block")
	$(call trainer_run,tsan$(COMMA) batch 1,,tsan,bf16,"batch 1")
	$(call trainer_run,tsan$(COMMA) as sm_86,CUDA_CPU_SM=86,tsan,bf16,"197 tokens")
	@if command -v clang++ >/dev/null; then $(call EMU_TEST,msan,bf16) && printf '%-38s ' 'msan' && \
		build/emu-msan/test_srdit_bf16 "65 tokens, path" > build/emu-msan/log 2>&1 && tail -n 1 build/emu-msan/log || \
		{ tail -n 40 build/emu-msan/log; exit 1; }; \
	else echo 'msan: left out, since there is no clang++'; fi

# cuda_cpu.sed - what a C++ compiler does not take as it stands in a .cu file: sed -E -f cuda_cpu.sed x.cu
# (GNU sed). Line by line, so that line numbers stay. One __shared__ variable a declaration.

# kernel<<<grid, block, smem, stream>>>(args)  ->  kernel ->*cuda_cpu::config(grid, block, smem, stream)(args)
s/<<</ ->*cuda_cpu::config(/g
s/>>>(\s*(\(|$))/)\1/g
# extern __shared__ T name[];  ->  T *name = the launch's dynamic shared memory, which is aligned enough
s/__shared__\s+(__align__|alignas)\([^)]*\)/__shared__/g
s/extern\s+__shared__\s+(\w[^;=()]*)\s+(\w+)\s*\[\]/\1 *\2 = (\1 *)cuda_cpu::dynamic_shared()/g
# __shared__ T name[dims];  ->  T (&name)[dims] = a place in the block's shared memory
s/__shared__\s+(\w[^;=()]*)\s+(\w+)\s*((\[[^]]*\])*)\s*;/CUDA_CPU_SHARED(\2, \1\3);/g
# libstdc++ spells this attribute without the macro
s/__noinline__/__attribute__((noinline))/g

// cuda_cpu_blas.cpp - the part of cuBLASLt that a trainer uses, as plain loops behind the real prototypes.
//
// D = epilogue(alpha op(A) op(B) + beta C), float or bf16 in and out, summed in float; row- or column-major;
// strided batches; every BIAS, GELU, DGELU and BGRAD epilogue. What the library refuses, or may refuse, is
// refused here too (CUBLAS_STATUS_NOT_SUPPORTED); an attribute that this file does not know ends the program.
//
// No list says what the library takes on which card, so a program must live with a refusal of anything but the
// simplest products. CUDA_CPU_CUBLAS in the environment:
//   kind     what is documented as supported is done (the default)
//   strict   cublasLtMatmulAlgoGetHeuristic refuses what it may refuse somewhere: see `may_be_refused`
//   late     the same products get two proposals, of which cublasLtMatmul refuses the first
#include "cuda_cpu.h"
#include <cublasLt.h>
#include <stdlib.h>
#include <vector>
using namespace cuda_cpu;
using std::vector;

namespace {
// The bits that cublasLtEpilogue_t is made of
enum { BIAS = 4, BGRAD = 16, GELU = 32, DGELU = 64, AUX = 128, BGRADA = 256, BGRADB = 512 };
static_assert(int(CUBLASLT_EPILOGUE_GELU_AUX_BIAS) == (GELU | AUX | BIAS));
static_assert(int(CUBLASLT_EPILOGUE_DGELU_BGRAD) == (DGELU | AUX | BGRAD));
static_assert(int(CUBLASLT_EPILOGUE_BGRADA) == BGRADA && int(CUBLASLT_EPILOGUE_BGRADB) == BGRADB);

struct Product {
    int transpose_a, transpose_b, epilogue, bias_type, aux_type;    // a type of -1: that of D
    cublasComputeType_t compute;
    cudaDataType scale;
    void *bias, *aux;
    int64_t aux_ld, bias_stride, aux_stride;
};
struct Preference { uint32_t align; };              // the least of A, B, C and D, bytes
struct Layout { int type, order, batch; int64_t rows, cols, ld, stride; };
static_assert(sizeof(Product) <= sizeof(cublasLtMatmulDescOpaque_t));
static_assert(sizeof(Layout) <= sizeof(cublasLtMatrixLayoutOpaque_t));
static_assert(sizeof(Preference) <= sizeof(cublasLtMatmulPreferenceOpaque_t));
enum Mood { KIND, STRICT, LATE };

size_t bytes_of(int type) { return type == CUDA_R_32F ? 4 : 2; }
float get(const void *p, int type, int64_t i) {
    return type == CUDA_R_32F ? ((const float *)p)[i] : __bfloat162float(((const __nv_bfloat16 *)p)[i]);
}
void put(void *p, int type, int64_t i, float x) {
    if (type == CUDA_R_32F) ((float *)p)[i] = x;
    else ((__nv_bfloat16 *)p)[i] = __float2bfloat16(x);
}
int64_t place(const Layout &m, int64_t row, int64_t col) {
    return m.order == CUBLASLT_ORDER_ROW ? row * m.ld + col : col * m.ld + row;
}
template <class T> T *of_batch(T *p, int type, int64_t stride, int b) {
    return p ? (T *)((char *)p + (size_t)(b * stride) * bytes_of(type)) : nullptr;
}

// One matrix as floats, column-major, transposed if asked
vector<float> load(const void *p, const Layout &m, int b, bool transpose) {
    vector<float> x((size_t)(m.rows * m.cols));
    const void *from = of_batch(p, m.type, m.stride, b);
    for (int64_t c = 0; c < m.cols; c++)
        for (int64_t r = 0; r < m.rows; r++)
            x[(size_t)(transpose ? r * m.cols + c : c * m.rows + r)] = get(from, m.type, place(m, r, c));
    return x;
}

// y[m] = A[m,K] x[K], A column-major. Private memory: the sanitizers have nothing to find here.
__attribute__((no_sanitize("address", "thread", "undefined")))
void times_vector(float *y, const float *a, const float *x, int64_t m, int64_t K) {
    for (int64_t i = 0; i < m; i++) y[i] = 0;
    int64_t k = 0;
    for (; k + 4 <= K; k += 4) {
        const float *p = a + k * m, *q = p + m, *r = q + m, *s = r + m, *t = x + k;
        for (int64_t i = 0; i < m; i++)
            y[i] += (p[i] * t[0] + q[i] * t[1]) + (r[i] * t[2] + s[i] * t[3]);
    }
    for (; k < K; k++)
        for (int64_t i = 0; i < m; i++) y[i] += a[k * m + i] * x[k];
}

const float ROOT = 0.7978845608f, CUBE = 0.044715f;             // sqrt(2/pi); tanh form, as in the library
float gelu(float x) { return 0.5f * x * (1 + tanhf(ROOT * (x + CUBE * x * x * x))); }
float gelu_slope(float x) {
    float t = tanhf(ROOT * (x + CUBE * x * x * x));
    return 0.5f * (1 + t) + 0.5f * x * (1 - t * t) * ROOT * (1 + 3 * CUBE * x * x);
}

void matmul(const Product &p, float alpha, const void *A, const Layout &la, const void *B, const Layout &lb,
            float beta, const void *C, const Layout &lc, void *D, const Layout &ld) {
    const int64_t m = ld.rows, n = ld.cols, K = p.transpose_a ? la.rows : la.cols;
    for (int batch = 0; batch < ld.batch; batch++) {
        vector<float> a = load(A, la, batch, p.transpose_a);        // [m,K]
        vector<float> b = load(B, lb, batch, p.transpose_b);        // [K,n]
        vector<float> y((size_t)m), sum((size_t)m);
        const void *c = of_batch(C, lc.type, lc.stride, batch);
        void *d = of_batch(D, ld.type, ld.stride, batch);
        void *bias = of_batch(p.bias, p.bias_type, p.bias_stride, batch);
        void *aux = of_batch(p.aux, p.aux_type, p.aux_stride, batch);
        for (int64_t j = 0; j < n; j++) {
            times_vector(y.data(), a.data(), &b[(size_t)(j * K)], m, K);
            for (int64_t i = 0; i < m; i++) {
                float x = alpha * y[(size_t)i];
                if (beta != 0) x += beta * get(c, lc.type, place(lc, i, j));
                if (p.epilogue & BIAS) x += get(bias, p.bias_type, i);
                if (p.epilogue & DGELU) x *= gelu_slope(get(aux, p.aux_type, j * p.aux_ld + i));
                else if (p.epilogue & AUX) put(aux, p.aux_type, j * p.aux_ld + i, x);
                if (p.epilogue & GELU) x = gelu(x);
                put(d, ld.type, place(ld, i, j), x);
                sum[(size_t)i] += x;
            }
        }
        if (p.epilogue & BGRAD)
            for (int64_t i = 0; i < m; i++) put(bias, p.bias_type, i, sum[(size_t)i]);
        if (p.epilogue & (BGRADA | BGRADB))         // the sums of op(A)'s rows, or of op(B)'s columns, over K
            for (int64_t i = 0, rows = p.epilogue & BGRADA ? m : n; i < rows; i++) {
                float x = 0;
                for (int64_t k = 0; k < K; k++)
                    x += p.epilogue & BGRADA ? a[(size_t)(k * m + i)] : b[(size_t)(i * K + k)];
                put(bias, p.bias_type, i, x);
            }
    }
}

bool well_formed(const Layout &m, int batch) {
    bool row = m.order == CUBLASLT_ORDER_ROW;
    return (m.type == CUDA_R_32F || m.type == CUDA_R_16BF) && (row || m.order == CUBLASLT_ORDER_COL) &&
           m.ld >= (row ? m.cols : m.rows) && m.batch == batch && m.rows > 0 && m.cols > 0;
}
bool supported(Product &p, const Layout &a, const Layout &b, const Layout &c, const Layout &d) {
    int64_t m = p.transpose_a ? a.cols : a.rows, ka = p.transpose_a ? a.rows : a.cols;
    int64_t n = p.transpose_b ? b.rows : b.cols, kb = p.transpose_b ? b.cols : b.rows;
    if (p.bias_type < 0) p.bias_type = d.type;
    if (p.aux_type < 0) p.aux_type = d.type;
    for (const Layout *x : {&a, &b, &c, &d})
        if (!well_formed(*x, d.batch)) return false;
    if (m != d.rows || n != d.cols || ka != kb || c.rows != m || c.cols != n) return false;
    if (a.type != b.type || c.type != d.type || (a.type == CUDA_R_32F && d.type != a.type)) return false;
    if (p.scale != CUDA_R_32F) return false;
    if (p.compute != CUBLAS_COMPUTE_32F && p.compute != CUBLAS_COMPUTE_32F_FAST_TF32) return false;
    switch (p.epilogue) {
    case CUBLASLT_EPILOGUE_DEFAULT: return true;
    case CUBLASLT_EPILOGUE_BIAS: case CUBLASLT_EPILOGUE_GELU: case CUBLASLT_EPILOGUE_GELU_BIAS:
    case CUBLASLT_EPILOGUE_GELU_AUX: case CUBLASLT_EPILOGUE_GELU_AUX_BIAS:
    case CUBLASLT_EPILOGUE_DGELU: case CUBLASLT_EPILOGUE_DGELU_BGRAD:
    case CUBLASLT_EPILOGUE_BGRADA: case CUBLASLT_EPILOGUE_BGRADB: break;
    default: return false;
    }
    if (d.order != CUBLASLT_ORDER_COL) return false;
    if (p.epilogue & (BIAS | BGRAD | BGRADA | BGRADB) && (!p.bias || p.bias_type != d.type)) return false;
    if (!(p.epilogue & AUX)) return true;
    return p.aux && p.aux_type == d.type && p.aux_ld >= m && p.aux_ld % 8 == 0 && (uintptr_t)p.aux % 16 == 0;
}

Mood mood() {
    const char *s = getenv("CUDA_CPU_CUBLAS");
    if (!s || !strcmp(s, "kind")) return KIND;
    if (!strcmp(s, "strict")) return STRICT;
    if (!strcmp(s, "late")) return LATE;
    fail("CUDA_CPU_CUBLAS is %s; it can be kind, strict or late", s);
}

// What a library may refuse on some card: a dimension of 1; rows or pointers aligned to no more than 4 bytes
// (an odd leading dimension); every epilogue but BIAS, and that too in batches or into float
bool may_be_refused(const Product &p, const Layout &a, const Layout &b, const Layout &d, uint32_t align) {
    if (d.rows == 1 || d.cols == 1 || (p.transpose_a ? a.rows : a.cols) == 1) return true;
    for (const Layout *x : {&a, &b, &d}) {
        if ((size_t)x->ld * bytes_of(x->type) % 8) return true;
        if (x->batch > 1 && (size_t)x->stride * bytes_of(x->type) % 8) return true;
    }
    if (align % 8) return true;
    if (p.epilogue == CUBLASLT_EPILOGUE_DEFAULT) return false;
    return p.epilogue != CUBLASLT_EPILOGUE_BIAS || d.batch > 1 || d.type == CUDA_R_32F;
}

template <class As, class T> void set(T &to, const void *from, size_t bytes) {
    As value;
    if (bytes != sizeof value) fail("cuBLASLt: an attribute of %zu bytes, not of %zu", bytes, sizeof value);
    memcpy(&value, from, bytes);
    to = (T)value;
}
template <class T> cublasStatus_t create(T **made) {
    *made = (T *)calloc(1, sizeof(T));
    return *made ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_ALLOC_FAILED;
}
template <class T> cublasStatus_t destroy(T *made) {
    free(made);
    return CUBLAS_STATUS_SUCCESS;
}
} // namespace

extern "C" {
size_t cublasLtGetVersion() { return CUBLAS_VERSION; }
cublasStatus_t cublasLtCreate(cublasLtHandle_t *handle) { return create((char **)handle); }
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) { return destroy(handle); }

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *made, cublasComputeType_t compute,
                                        cudaDataType scale) {
    cublasStatus_t status = create(made);
    Product *p = (Product *)*made;
    *p = Product();
    p->compute = compute;
    p->scale = scale;
    p->epilogue = CUBLASLT_EPILOGUE_DEFAULT;
    p->bias_type = p->aux_type = -1;
    return status;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t p) { return destroy(p); }
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t product,
                                              cublasLtMatmulDescAttributes_t which, const void *from,
                                              size_t n) {
    Product *p = (Product *)product;
    switch (which) {
    case CUBLASLT_MATMUL_DESC_TRANSA: set<int32_t>(p->transpose_a, from, n); break;
    case CUBLASLT_MATMUL_DESC_TRANSB: set<int32_t>(p->transpose_b, from, n); break;
    case CUBLASLT_MATMUL_DESC_EPILOGUE: set<uint32_t>(p->epilogue, from, n); break;
    case CUBLASLT_MATMUL_DESC_BIAS_POINTER: set<void *>(p->bias, from, n); break;
    case CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE: set<int32_t>(p->bias_type, from, n); break;
    case CUBLASLT_MATMUL_DESC_BIAS_BATCH_STRIDE: set<int64_t>(p->bias_stride, from, n); break;
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER: set<void *>(p->aux, from, n); break;
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD: set<int64_t>(p->aux_ld, from, n); break;
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_BATCH_STRIDE: set<int64_t>(p->aux_stride, from, n); break;
    case CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_DATA_TYPE: set<int32_t>(p->aux_type, from, n); break;
    case CUBLASLT_MATMUL_DESC_SM_COUNT_TARGET: break;               // speed only
    default: fail("cublasLtMatmulDescSetAttribute: attribute %d is unknown here", which);
    }
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *made, cudaDataType type, uint64_t rows,
                                          uint64_t cols, int64_t ld) {
    cublasStatus_t status = create(made);
    *(Layout *)*made = {type, CUBLASLT_ORDER_COL, 1, (int64_t)rows, (int64_t)cols, ld, 0};
    return status;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t m) { return destroy(m); }
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout,
                                                cublasLtMatrixLayoutAttribute_t which, const void *from,
                                                size_t n) {
    Layout *m = (Layout *)layout;
    switch (which) {
    case CUBLASLT_MATRIX_LAYOUT_TYPE: set<uint32_t>(m->type, from, n); break;
    case CUBLASLT_MATRIX_LAYOUT_ORDER: set<int32_t>(m->order, from, n); break;
    case CUBLASLT_MATRIX_LAYOUT_ROWS: set<uint64_t>(m->rows, from, n); break;
    case CUBLASLT_MATRIX_LAYOUT_COLS: set<uint64_t>(m->cols, from, n); break;
    case CUBLASLT_MATRIX_LAYOUT_LD: set<int64_t>(m->ld, from, n); break;
    case CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT: set<int32_t>(m->batch, from, n); break;
    case CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET: set<int64_t>(m->stride, from, n); break;
    default: fail("cublasLtMatrixLayoutSetAttribute: attribute %d is unknown here", which);
    }
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *made) {
    cublasStatus_t status = create(made);
    ((Preference *)*made)->align = 256;
    return status;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t p) { return destroy(p); }
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t which,
                                                    const void *from, size_t n) {
    Preference *p = (Preference *)preference;
    uint32_t align;
    switch (which) {
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES: case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES:
    case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES: case CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES:
        set<uint32_t>(align, from, n);
        if (align < p->align) p->align = align;
        break;
    default: break;
    }
    return CUBLAS_STATUS_SUCCESS;
}

// There is one algorithm, proposed as numbers 0 and 1 (as if there were two, so that a choice is made)
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t product,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int room,
                                              cublasLtMatmulHeuristicResult_t *results, int *count) {
    Product p = *(Product *)product;
    *count = 0;
    if (room < 1) return CUBLAS_STATUS_INVALID_VALUE;
    if (!supported(p, *(Layout *)a, *(Layout *)b, *(Layout *)c, *(Layout *)d))
        return CUBLAS_STATUS_NOT_SUPPORTED;
    bool doubtful = mood() != KIND && may_be_refused(p, *(Layout *)a, *(Layout *)b, *(Layout *)d,
                                                     ((Preference *)preference)->align);
    if (doubtful && mood() == STRICT) return CUBLAS_STATUS_NOT_SUPPORTED;
    *count = room < 2 ? 1 : 2;
    for (int i = 0; i < *count; i++) {
        memset((void *)&results[i], 0, sizeof *results);
        results[i].algo.data[0] = (uint64_t)i;
        results[i].algo.data[1] = doubtful && i == 0;           // LATE: cublasLtMatmul will not have it
        results[i].wavesCount = 1;
    }
    return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t product, const void *alpha,
                              const void *A, cublasLtMatrixLayout_t a,
                              const void *B, cublasLtMatrixLayout_t b, const void *beta,
                              const void *C, cublasLtMatrixLayout_t c, void *D, cublasLtMatrixLayout_t d,
                              const cublasLtMatmulAlgo_t *algo, void *workspace, size_t,
                              cudaStream_t stream) {
    Product p = *(Product *)product;
    Layout la = *(Layout *)a, lb = *(Layout *)b, lc = *(Layout *)c, ld = *(Layout *)d;
    float al = *(const float *)alpha, be = *(const float *)beta;
    if (!supported(p, la, lb, lc, ld) || (algo && algo->data[1])) return CUBLAS_STATUS_NOT_SUPPORTED;
    const void *pointers[] = {A, B, C, D, p.bias, p.aux, workspace};
    Launch here{{1}, {1}, 0, stream, "cublasLtMatmul", 0, nullptr};
    for (int i = 0; i < 7; i++) check_pointer(here, i, pointers[i]);
    products++;
    on_stream(stream, [=] { matmul(p, al, A, la, B, lb, be, C, lc, D, ld); });
    return CUBLAS_STATUS_SUCCESS;
}
} // extern "C"

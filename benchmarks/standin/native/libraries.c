/* cuBLAS, cuBLASLt and cuDNN where more is asked of them than success; the rest of their functions is generated
 * (../build.py). Products are noted with their size and epilogue, and not computed. */
#include "standin.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* Their headers want more of the toolkit than torch's wheels bring, so types are plain: handles are pointers to ours,
 * enumerations are int, and the few values that matter are named here (cublas_api.h, cublasLt.h, cudnn_backend.h). */
enum {
    SUCCESS = 0,
    ALLOCATION_FAILED = 3,
    EPILOGUE_DEFAULT = 1,        /* CUBLASLT_EPILOGUE_DEFAULT */
    DESCRIPTION_OF_EPILOGUE = 7, /* CUBLASLT_MATMUL_DESC_EPILOGUE */
    HEURISTIC_RESULT_BYTES = 96, /* sizeof(cublasLtMatmulHeuristicResult_t) */
    CUDNN_TYPE_INT64 = 3,
    CUDNN_TYPE_INT32 = 23,
    CUDNN_HEURISTIC_RESULTS = 202, /* CUDNN_ATTR_ENGINEHEUR_RESULTS */
    CUDNN_CONFIGURED_ENGINE = 300, /* CUDNN_ATTR_ENGINECFG_ENGINE */
};

/* -- cuBLAS ----------------------------------------------------------------------------------------------------------*/

typedef struct {
    cudaStream_t stream;
} Handle;

int cublasCreate_v2(Handle **handle) {
    *handle = calloc(1, sizeof **handle);
    return *handle != NULL ? SUCCESS : ALLOCATION_FAILED;
}

int cublasDestroy_v2(Handle *handle) {
    free(handle);
    return SUCCESS;
}

int cublasSetStream_v2(Handle *handle, cudaStream_t stream) {
    handle->stream = stream;
    return SUCCESS;
}

int cublasGetMathMode(Handle *handle, int *mode) {
    *mode = 0;
    return SUCCESS;
}

int cublasGetPointerMode_v2(Handle *handle, int *mode) {
    *mode = 0;
    return SUCCESS;
}

int cublasGemmEx(Handle *handle, int a_op, int b_op, int m, int n, int k, const void *alpha, const void *a, int a_type,
                 int a_ld, const void *b, int b_type, int b_ld, const void *beta, void *c, int c_type, int c_ld,
                 int compute, int algorithm) {
    standin_work(handle->stream, "library cublasGemmEx m %d n %d k %d type %d", m, n, k, a_type);
    return SUCCESS;
}

int cublasGemmStridedBatchedEx(Handle *handle, int a_op, int b_op, int m, int n, int k, const void *alpha,
                               const void *a, int a_type, int a_ld, long long a_stride, const void *b, int b_type,
                               int b_ld, long long b_stride, const void *beta, void *c, int c_type, int c_ld,
                               long long c_stride, int batch, int compute, int algorithm) {
    standin_work(handle->stream, "library cublasGemmStridedBatchedEx m %d n %d k %d type %d batch %d", m, n, k, a_type,
                 batch);
    return SUCCESS;
}

/* -- cuBLASLt --------------------------------------------------------------------------------------------------------*/

#define LT_VERSION 130100

typedef struct {
    int epilogue;
} Product;

typedef struct {
    int type;
    uint64_t rows, columns;
} Layout;

size_t cublasLtGetVersion(void) { return LT_VERSION; }

int cublasLtMatmulDescCreate(Product **description, int compute, int scale) {
    Product *made = calloc(1, sizeof *made);
    if (made == NULL) return ALLOCATION_FAILED;
    made->epilogue = EPILOGUE_DEFAULT;
    *description = made;
    return SUCCESS;
}

int cublasLtMatmulDescSetAttribute(Product *description, int attribute, const void *value, size_t bytes) {
    if (attribute == DESCRIPTION_OF_EPILOGUE) description->epilogue = *(const int32_t *)value;
    return SUCCESS;
}

int cublasLtMatmulDescDestroy(Product *description) {
    free(description);
    return SUCCESS;
}

int cublasLtMatrixLayoutCreate(Layout **layout, int type, uint64_t rows, uint64_t columns, int64_t leading) {
    Layout *made = calloc(1, sizeof *made);
    if (made == NULL) return ALLOCATION_FAILED;
    *made = (Layout){type, rows, columns};
    *layout = made;
    return SUCCESS;
}

int cublasLtMatrixLayoutDestroy(Layout *layout) {
    free(layout);
    return SUCCESS;
}

int cublasLtMatmulPreferenceCreate(void **preference) {
    *preference = calloc(1, 1);
    return SUCCESS;
}

int cublasLtMatmulPreferenceDestroy(void *preference) {
    free(preference);
    return SUCCESS;
}

int cublasLtMatmulAlgoGetHeuristic(void *handle, Product *description, Layout *a, Layout *b, Layout *c, Layout *d,
                                   void *preference, int wanted, void *results, int *found) {
    memset(results, 0, HEURISTIC_RESULT_BYTES); /* one algorithm, without workspace, for everything */
    *found = 1;
    return SUCCESS;
}

int cublasLtMatmul(void *handle, Product *description, const void *alpha, const void *a, Layout *a_layout,
                   const void *b, Layout *b_layout, const void *beta, const void *c, Layout *c_layout, void *d,
                   Layout *d_layout, const void *algorithm, void *workspace, size_t workspace_bytes,
                   cudaStream_t stream) {
    const Layout *out = d_layout, *left = a_layout;
    uint64_t depth = out->rows ? left->rows * left->columns / out->rows : 0;
    standin_work(stream, "library cublasLtMatmul m %lu n %lu k %lu type %d epilogue %d", out->rows, out->columns, depth,
                 left->type, description->epilogue);
    return SUCCESS;
}

/* -- cuDNN's backend: every graph has one engine, which takes it; of its interface only what is read matters ----------*/

int cudnnCreate(Handle **handle) {
    *handle = calloc(1, sizeof **handle);
    return SUCCESS;
}

int cudnnSetStream(Handle *handle, cudaStream_t stream) {
    handle->stream = stream;
    return SUCCESS;
}

int cudnnGetStream(Handle *handle, cudaStream_t *stream) {
    *stream = handle->stream;
    return SUCCESS;
}

int cudnnBackendCreateDescriptor(int kind, void **descriptor) {
    *descriptor = calloc(1, 64);
    return SUCCESS;
}

int cudnnBackendDestroyDescriptor(void *descriptor) {
    free(descriptor);
    return SUCCESS;
}

int cudnnBackendSetAttribute(void *descriptor, int name, int type, int64_t count, const void *values) {
    return SUCCESS;
}

int cudnnBackendFinalize(void *descriptor) { return SUCCESS; }

int cudnnBackendGetAttribute(void *descriptor, int name, int type, int64_t wanted, int64_t *count, void *values) {
    bool is_number = type == CUDNN_TYPE_INT64 || type == CUDNN_TYPE_INT32;
    bool is_result = name == CUDNN_HEURISTIC_RESULTS || name == CUDNN_CONFIGURED_ENGINE;
    if (count != NULL) *count = is_number || is_result; /* no knobs, no notes on behaviour or numerics */
    if (values == NULL || wanted < 1) return SUCCESS;
    /* No workspace, no shared memory, engine 0. */
    if (type == CUDNN_TYPE_INT64) *(int64_t *)values = 0;
    if (type == CUDNN_TYPE_INT32) *(int32_t *)values = 0;
    return SUCCESS;
}

int cudnnBackendExecute(Handle *handle, void *plan, void *pack) {
    standin_work(handle->stream, "library cudnnBackendExecute");
    return SUCCESS;
}

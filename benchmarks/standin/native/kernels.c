/* Kernels that come compiled with torch: their names are registered as its libraries load, and launches are noted. */
#include "standin.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>

#define REGISTERS 64            /* of every kernel, since none is there to ask */
#define SLOTS ((size_t)1 << 19) /* torch 2.13 registers about 70 thousand kernels */

typedef struct {
    const void *host; /* the function that stands for the kernel on the host */
    const char *name;
} Kernel;

static Kernel kernels[SLOTS]; /* a hash table with open addressing */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static Kernel *slot_of(const void *host) {
    size_t at = ((uintptr_t)host * 0x9E3779B97F4A7C15u) >> 45; /* 64 - 45 = 19 bits */
    while (kernels[at].host != NULL && kernels[at].host != host)
        at = (at + 1) % SLOTS;
    return &kernels[at];
}

void __cudaRegisterFunction(void **module, const char *host, char *device_name, const char *name, int thread_limit,
                            void *thread_id, void *block_id, void *block_dim, void *grid_dim, int *warp_size) {
    pthread_mutex_lock(&lock);
    *slot_of(host) = (Kernel){host, name};
    pthread_mutex_unlock(&lock);
}

void **__cudaRegisterFatBinary(void *binary) {
    static void *module;
    return &module;
}

void __cudaRegisterFatBinaryEnd(void **module) {}

void __cudaUnregisterFatBinary(void **module) {}

void __cudaRegisterVar(void **module, char *host, char *device_address, const char *name, int is_extern, size_t bytes,
                       int is_constant, int is_global) {}

char __cudaInitModule(void **module) { return 1; }

/* -- launches --------------------------------------------------------------------------------------------------------*/

static cudaError_t launch(const void *host, dim3 grid, dim3 block, cudaStream_t stream) {
    const char *name = slot_of(host)->name;
    standin_work(stream, "kernel %s grid %u,%u,%u block %u device %d", name != NULL ? name : "?", grid.x, grid.y,
                 grid.z, block.x * block.y * block.z, standin_current_device());
    return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *host) {
    *kernel = (cudaKernel_t)host;
    return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                               cudaStream_t stream) {
    return launch(kernel, grid, block, stream);
}

cudaError_t cudaLaunchKernel(const void *host, dim3 grid, dim3 block, void **arguments, size_t shared,
                             cudaStream_t stream) {
    return launch(host, grid, block, stream);
}

cudaError_t cudaLaunchCooperativeKernel(const void *host, dim3 grid, dim3 block, void **arguments, size_t shared,
                                        cudaStream_t stream) {
    return launch(host, grid, block, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *host, void **arguments) {
    return launch(host, config->gridDim, config->blockDim, config->stream);
}

/* -- what is asked of a kernel ---------------------------------------------------------------------------------------*/

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *host) {
    *attributes = (struct cudaFuncAttributes){
        .maxThreadsPerBlock = 1024,
        .numRegs = REGISTERS,
        .binaryVersion = standin_card()->capability,
        .ptxVersion = standin_card()->capability,
        .maxDynamicSharedSizeBytes = (int)standin_card()->shared_per_block,
    };
    return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void *host, enum cudaFuncAttribute attribute, int value) {
    bool is_too_much =
        attribute == cudaFuncAttributeMaxDynamicSharedMemorySize && (size_t)value > standin_card()->shared_per_block;
    return is_too_much ? standin_fail(cudaErrorInvalidValue) : cudaSuccess;
}

cudaError_t cudaKernelSetAttributeForDevice(cudaKernel_t kernel, enum cudaFuncAttribute attribute, int value,
                                            int device) {
    return cudaFuncSetAttribute(kernel, attribute, value);
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *host, int threads,
                                                                   size_t shared, unsigned flags) {
    *blocks = 1;
    return cudaSuccess;
}

cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *host, int threads, size_t shared) {
    *blocks = 1;
    return cudaSuccess;
}

/* -- modules loaded at run time, and the way to the driver -----------------------------------------------------------*/

cudaError_t cudaLibraryLoadData(cudaLibrary_t *library, const void *code, enum cudaJitOption *jit, void **jit_values,
                                unsigned jit_count, enum cudaLibraryOption *options, void **values, unsigned count) {
    return (cudaError_t)cuLibraryLoadData((CUlibrary *)library, code, NULL, NULL, 0, NULL, NULL, 0);
}

cudaError_t cudaLibraryUnload(cudaLibrary_t library) { return cudaSuccess; }

cudaError_t cudaLibraryGetKernel(cudaKernel_t *kernel, cudaLibrary_t library, const char *name) {
    return (cudaError_t)cuLibraryGetKernel((CUkernel *)kernel, (CUlibrary)library, name);
}

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                             unsigned long long flags, enum cudaDriverEntryPointQueryResult *found) {
    CUdriverProcAddressQueryResult status;
    cuGetProcAddress(name, function, (int)version, flags, &status);
    if (found != NULL) *found = *function != NULL ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return *function != NULL ? cudaSuccess : standin_fail(cudaErrorNotSupported);
}

cudaError_t cudaProfilerStart(void) { return cudaSuccess; }

cudaError_t cudaProfilerStop(void) { return cudaSuccess; }

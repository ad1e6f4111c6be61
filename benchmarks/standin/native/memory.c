/* Device memory is host memory that is mapped and not touched: it costs nothing until something is copied into it.
 *
 * Copies between host and device are made, those within the device and fills are not: no kernel computed what they
 * would copy. So what is read back is what was last copied there, and zeros in memory that nothing was copied to.
 */
#include "standin.h"

#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define PAGE ((size_t)4096)
#define CONTEXT_BYTES (400 * MIB) /* what a CUDA context takes of the memory before anyone allocates */

typedef struct {
    uintptr_t start;
    size_t bytes;
    int device;
    bool is_host; /* pinned */
} Mapping;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Mapping *mappings;
static size_t count, room;
static size_t used[MAX_DEVICES], peak[MAX_DEVICES];
static __thread int current_device;
static __thread cudaError_t last_error = cudaSuccess;

int standin_current_device(void) { return current_device; }

cudaError_t standin_fail(cudaError_t error) {
    last_error = error;
    return error;
}

/* -- errors, the current device --------------------------------------------------------------------------------------*/

cudaError_t cudaGetLastError(void) {
    cudaError_t error = last_error;
    last_error = cudaSuccess;
    return error;
}

cudaError_t cudaPeekAtLastError(void) { return last_error; }

const char *cudaGetErrorName(cudaError_t error) {
    switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorStreamCaptureUnsupported: return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorNotSupported: return "cudaErrorNotSupported";
    default: return "an error of the stand-in device";
    }
}

const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidDevice: return "invalid device ordinal";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorNotSupported: return "operation not supported by the stand-in device";
    default: return "an error of the stand-in device";
    }
}

cudaError_t cudaGetDevice(int *device) {
    *device = current_device;
    return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= standin_card()->devices) return standin_fail(cudaErrorInvalidDevice);
    current_device = device;
    return cudaSuccess;
}

/* -- allocations -----------------------------------------------------------------------------------------------------*/

static void *map(size_t bytes, bool is_host) {
    size_t mapped = (bytes + PAGE - 1) & ~(PAGE - 1);
    pthread_mutex_lock(&lock);
    void *start = NULL;
    if (!is_host && used[current_device] + mapped + CONTEXT_BYTES > standin_card()->memory_bytes) {
        standin_note("oom %zu used %zu device %d", bytes, used[current_device], current_device);
        goto done;
    }
    start = mmap(NULL, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) {
        start = NULL;
        goto done;
    }
    if (count == room) {
        room = room ? 2 * room : 1024;
        mappings = realloc(mappings, room * sizeof *mappings);
        if (mappings == NULL) abort();
    }
    mappings[count++] = (Mapping){(uintptr_t)start, mapped, current_device, is_host};
    if (!is_host) {
        used[current_device] += mapped;
        if (used[current_device] > peak[current_device]) peak[current_device] = used[current_device];
    }
done:
    pthread_mutex_unlock(&lock);
    return start;
}

static void unmap(void *start) {
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < count; i++) {
        if (mappings[i].start != (uintptr_t)start) continue;
        if (!mappings[i].is_host) used[mappings[i].device] -= mappings[i].bytes;
        munmap(start, mappings[i].bytes);
        mappings[i] = mappings[--count];
        break;
    }
    pthread_mutex_unlock(&lock);
}

static bool find(const void *pointer, Mapping *found) {
    bool is_there = false;
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < count && !is_there; i++) {
        if ((uintptr_t)pointer - mappings[i].start < mappings[i].bytes) {
            *found = mappings[i];
            is_there = true;
        }
    }
    pthread_mutex_unlock(&lock);
    return is_there;
}

cudaError_t cudaMalloc(void **pointer, size_t bytes) {
    *pointer = map(bytes, false);
    return *pointer != NULL ? cudaSuccess : standin_fail(cudaErrorMemoryAllocation);
}

cudaError_t cudaFree(void *pointer) {
    if (pointer != NULL) unmap(pointer);
    return cudaSuccess;
}

cudaError_t cudaMallocAsync(void **pointer, size_t bytes, cudaStream_t stream) { return cudaMalloc(pointer, bytes); }

cudaError_t cudaFreeAsync(void *pointer, cudaStream_t stream) { return cudaFree(pointer); }

cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total_bytes) {
    *total_bytes = standin_card()->memory_bytes;
    *free_bytes = *total_bytes - used[current_device] - CONTEXT_BYTES;
    return cudaSuccess;
}

cudaError_t cudaHostAlloc(void **pointer, size_t bytes, unsigned flags) {
    standin_note("host %zu", bytes);
    *pointer = map(bytes, true);
    return *pointer != NULL ? cudaSuccess : standin_fail(cudaErrorMemoryAllocation);
}

cudaError_t cudaFreeHost(void *pointer) { return cudaFree(pointer); }

cudaError_t cudaHostRegister(void *pointer, size_t bytes, unsigned flags) { return cudaSuccess; }

cudaError_t cudaHostUnregister(void *pointer) { return cudaSuccess; }

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *pointer) {
    Mapping found;
    if (!find(pointer, &found)) {
        *attributes = (struct cudaPointerAttributes){.type = cudaMemoryTypeUnregistered, .device = cudaInvalidDeviceId};
        return cudaSuccess;
    }
    *attributes = (struct cudaPointerAttributes){
        .type = found.is_host ? cudaMemoryTypeHost : cudaMemoryTypeDevice,
        .device = found.device,
        .devicePointer = (void *)pointer,
        .hostPointer = found.is_host ? (void *)pointer : NULL,
    };
    return cudaSuccess;
}

/* -- copies and fills ------------------------------------------------------------------------------------------------*/

static const char *direction(enum cudaMemcpyKind kind) {
    switch (kind) {
    case cudaMemcpyHostToDevice: return "to-device";
    case cudaMemcpyDeviceToHost: return "to-host";
    case cudaMemcpyDeviceToDevice: return "within";
    default: return "either";
    }
}

cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind, cudaStream_t stream) {
    if (kind == cudaMemcpyDeviceToDevice) {
        standin_work(stream, "copy %s %zu", direction(kind), bytes);
        return cudaSuccess;
    }
    standin_note("copy %s %zu", direction(kind), bytes);
    memcpy(to, from, bytes);
    return cudaSuccess;
}

cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    return cudaMemcpyAsync(to, from, bytes, kind, NULL);
}

cudaError_t cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device, size_t bytes,
                                cudaStream_t stream) {
    standin_work(stream, "copy peer %zu", bytes);
    return cudaSuccess;
}

cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width,
                              size_t height, enum cudaMemcpyKind kind, cudaStream_t stream) {
    standin_work(stream, "copy %s %zu", direction(kind), width * height);
    for (size_t row = 0; row < height && kind != cudaMemcpyDeviceToDevice; row++)
        memcpy((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width);
    return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void *pointer, int value, size_t bytes, cudaStream_t stream) {
    standin_work(stream, "set %zu", bytes);
    return cudaSuccess;
}

cudaError_t cudaMemset(void *pointer, int value, size_t bytes) { return cudaMemsetAsync(pointer, value, bytes, NULL); }

/* Variables of kernels: there are none, and nothing reads them. */
cudaError_t cudaMemcpyToSymbol(const void *symbol, const void *from, size_t bytes, size_t offset,
                               enum cudaMemcpyKind kind) {
    return cudaSuccess;
}

cudaError_t cudaGetSymbolAddress(void **pointer, const void *symbol) {
    static char variables[64 * KIB];
    *pointer = variables;
    return cudaSuccess;
}

/* -- memory pools: torch asks how much is in them ---------------------------------------------------------------------*/

cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int device) {
    static char the_pool;
    *pool = (cudaMemPool_t)&the_pool;
    return cudaSuccess;
}

cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr attribute, void *value) {
    *(uint64_t *)value = 0;
    return cudaSuccess;
}

cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr attribute, void *value) {
    return cudaSuccess;
}

cudaError_t cudaMemPoolSetAccess(cudaMemPool_t pool, const struct cudaMemAccessDesc *access, size_t entries) {
    return cudaSuccess;
}

cudaError_t cudaMemPoolTrimTo(cudaMemPool_t pool, size_t bytes) { return cudaSuccess; }

/* -- for the tests, through ctypes -----------------------------------------------------------------------------------*/

size_t standin_used(int device) { return used[device]; }

size_t standin_peak(int device) { return peak[device]; }

void standin_reset_peak(int device) { peak[device] = used[device]; }

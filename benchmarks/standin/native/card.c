/* What the driver says of the device: properties and attributes, from STANDIN_* environment variables. */
#include "standin.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define WARP 32
#define THREADS_PER_BLOCK 1024
#define SHARED_PER_BLOCK_DEFAULT (48 * KIB) /* without asking for more */
#define DRIVER_VERSION 13000

static long number(const char *variable, long otherwise) {
    const char *text = getenv(variable);
    return text != NULL && *text != '\0' ? atol(text) : otherwise;
}

static Card read_card(void) {
    /* Without any variable: an H100 SXM. */
    Card card = {
        .devices = (int)number("STANDIN_DEVICES", 1),
        .capability = (int)number("STANDIN_CAPABILITY", 90),
        .multiprocessors = (int)number("STANDIN_MULTIPROCESSORS", 132),
        .threads_per_multiprocessor = (int)number("STANDIN_THREADS_PER_MULTIPROCESSOR", 2048),
        .registers_per_multiprocessor = 65536,
        .memory_bytes = (size_t)number("STANDIN_MEMORY_BYTES", 85029158912),
        .shared_per_multiprocessor = (size_t)number("STANDIN_SHARED_PER_MULTIPROCESSOR", 228 * KIB),
        .shared_per_block = (size_t)number("STANDIN_SHARED_PER_BLOCK", 227 * KIB),
        .l2_bytes = (size_t)number("STANDIN_L2_BYTES", 50 * MIB),
        .memory_bus_bits = (int)number("STANDIN_MEMORY_BUS_BITS", 5120),
        .clock_khz = (int)number("STANDIN_CLOCK_KHZ", 1980000),
        .memory_clock_khz = (int)number("STANDIN_MEMORY_CLOCK_KHZ", 2619000),
    };
    const char *name = getenv("STANDIN_NAME");
    snprintf(card.name, sizeof card.name, "%s", name != NULL ? name : "NVIDIA H100 80GB HBM3");
    if (card.devices > MAX_DEVICES) card.devices = MAX_DEVICES;
    return card;
}

static Card the_card;

__attribute__((constructor(101))) static void read_environment(void) { the_card = read_card(); }

const Card *standin_card(void) { return &the_card; }

cudaError_t cudaGetDeviceCount(int *count) {
    *count = the_card.devices;
    return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int *version) {
    *version = DRIVER_VERSION;
    return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int *version) { return cudaDriverGetVersion(version); }

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
    const Card *card = &the_card;
    if (device < 0 || device >= card->devices) return standin_fail(cudaErrorInvalidDevice);
    *properties = (struct cudaDeviceProp){
        .totalGlobalMem = card->memory_bytes,
        .sharedMemPerBlock = SHARED_PER_BLOCK_DEFAULT,
        .sharedMemPerBlockOptin = card->shared_per_block,
        .sharedMemPerMultiprocessor = card->shared_per_multiprocessor,
        .regsPerBlock = card->registers_per_multiprocessor,
        .regsPerMultiprocessor = card->registers_per_multiprocessor,
        .warpSize = WARP,
        .maxThreadsPerBlock = THREADS_PER_BLOCK,
        .maxThreadsPerMultiProcessor = card->threads_per_multiprocessor,
        .maxBlocksPerMultiProcessor = 32,
        .maxThreadsDim = {1024, 1024, 64},
        .maxGridSize = {2147483647, 65535, 65535},
        .totalConstMem = 64 * KIB,
        .major = card->capability / 10,
        .minor = card->capability % 10,
        .textureAlignment = 512,
        .multiProcessorCount = card->multiprocessors,
        .concurrentKernels = 1,
        .asyncEngineCount = 2,
        .pciBusID = device + 1,
        .unifiedAddressing = 1,
        .managedMemory = 1,
        .cooperativeLaunch = 1,
        .memoryPoolsSupported = 1,
        .memoryBusWidth = card->memory_bus_bits,
        .l2CacheSize = (int)card->l2_bytes,
    };
    snprintf(properties->name, sizeof properties->name, "%s", card->name);
    properties->uuid.bytes[0] = (char)(device + 1);
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    const Card *card = &the_card;
    if (device < 0 || device >= card->devices) return standin_fail(cudaErrorInvalidDevice);
    switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
    case cudaDevAttrMaxBlockDimX:
    case cudaDevAttrMaxBlockDimY: *value = THREADS_PER_BLOCK; break;
    case cudaDevAttrMaxBlockDimZ: *value = 64; break;
    case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
    case cudaDevAttrMaxGridDimY:
    case cudaDevAttrMaxGridDimZ: *value = 65535; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = SHARED_PER_BLOCK_DEFAULT; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = (int)card->shared_per_block; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = (int)card->shared_per_multiprocessor; break;
    case cudaDevAttrTotalConstantMemory: *value = 64 * KIB; break;
    case cudaDevAttrWarpSize: *value = WARP; break;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: *value = card->registers_per_multiprocessor; break;
    case cudaDevAttrClockRate: *value = card->clock_khz; break;
    case cudaDevAttrMemoryClockRate: *value = card->memory_clock_khz; break;
    case cudaDevAttrGlobalMemoryBusWidth: *value = card->memory_bus_bits; break;
    case cudaDevAttrL2CacheSize: *value = (int)card->l2_bytes; break;
    case cudaDevAttrMultiProcessorCount: *value = card->multiprocessors; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = card->threads_per_multiprocessor; break;
    case cudaDevAttrComputeCapabilityMajor: *value = card->capability / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = card->capability % 10; break;
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrMemoryPoolsSupported: *value = 1; break;
    default: *value = 0; /* a feature that the stand-in has not */
    }
    return cudaSuccess;
}

cudaError_t cudaDeviceGetPCIBusId(char *text, int size, int device) {
    snprintf(text, (size_t)size, "0000:%02x:00.0", device + 1);
    return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
    *can = 0; /* as between most cards without NVLink */
    return cudaSuccess;
}

cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) {
    return standin_fail(cudaErrorPeerAccessUnsupported);
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}

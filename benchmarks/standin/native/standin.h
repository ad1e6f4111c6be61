/* What the parts of the stand-in device share. See ../__init__.py for what it is. */
#ifndef STANDIN_H
#define STANDIN_H

#include <stdbool.h>
#include <stddef.h>

#include <cuda.h>
#include <cuda_runtime_api.h>

#define MAX_DEVICES 16
#define KIB ((size_t)1 << 10)
#define MIB ((size_t)1 << 20)

/* One GPU model, the same for every device of the process: read once from the environment (card.c). */
typedef struct {
    char name[128];
    int devices;
    int capability; /* 89 for 8.9 */
    int multiprocessors;
    int threads_per_multiprocessor;
    int registers_per_multiprocessor;
    size_t memory_bytes;
    size_t shared_per_multiprocessor;
    size_t shared_per_block; /* what a kernel gets when it asks for more */
    size_t l2_bytes;
    int memory_bus_bits;
    int clock_khz;
    int memory_clock_khz;
} Card;

const Card *standin_card(void);

/* journal.c: what was asked of the device, a line each, in memory */
void standin_note(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* Work on a stream: a line that says so, and one launch more, now or with each replay of the graph that records it. */
void standin_work(cudaStream_t stream, const char *format, ...) __attribute__((format(printf, 2, 3)));
void standin_count_launches(long launches);
long standin_all_launches(void); /* since the start, whatever was cleared */

/* streams.c: whether a CUDA graph is being recorded from this stream; one more node in it */
bool standin_is_capturing(cudaStream_t stream);
void standin_count_node(void);

/* memory.c: the device of the calling thread */
int standin_current_device(void);

/* The last error of the calling thread, as cudaGetLastError gives it; returns it. */
cudaError_t standin_fail(cudaError_t error);

#endif

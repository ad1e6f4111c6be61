/* The journal: what was asked of the device, a line each; and how many launches that made. Tests read it (../device.py).
 *
 * kernel NAME grid X,Y,Z block N device D     a kernel that came compiled with torch
 * triton NAME grid X,Y,Z block N device D     a kernel made by Triton, launched through the driver
 * library NAME …                              a product or graph of cuBLAS, cuBLASLt, cuDNN
 * copy KIND BYTES, set BYTES, sync, host BYTES (pinned), oom BYTES used BYTES device D
 * graph begin, graph end NODES, graph launch NODES
 *
 * A line of work that a CUDA graph records, and which is done when the graph is launched, begins with "captured".
 */
#include "standin.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LINE 2048 /* names of torch's kernels are long */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char *text;
static size_t length, room;
static long launches, all_launches;

static void append(const char *line) {
    size_t size = strlen(line);
    pthread_mutex_lock(&lock);
    if (length + size + 1 > room) {
        room = 2 * (length + size + 1);
        text = realloc(text, room);
        if (text == NULL) abort();
    }
    memcpy(text + length, line, size);
    length += size;
    text[length++] = '\n';
    pthread_mutex_unlock(&lock);
}

void standin_note(const char *format, ...) {
    char line[LINE];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    append(line);
}

void standin_work(cudaStream_t stream, const char *format, ...) {
    char line[LINE];
    bool captured = standin_is_capturing(stream);
    int prefix = captured ? snprintf(line, sizeof line, "captured ") : 0;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line + prefix, sizeof line - (size_t)prefix, format, arguments);
    va_end(arguments);
    append(line);
    if (captured)
        standin_count_node();
    else
        standin_count_launches(1);
}

void standin_count_launches(long more) {
    __sync_fetch_and_add(&launches, more);
    __sync_fetch_and_add(&all_launches, more);
}

long standin_all_launches(void) { return all_launches; }

/* -- for the tests, through ctypes --------------------------------------------------------------------------------- */

long standin_launches(void) { return launches; }

size_t standin_journal_size(void) { return length; }

/* Copies at most `size` bytes of the journal. */
void standin_read_journal(char *out, size_t size) {
    pthread_mutex_lock(&lock);
    memcpy(out, text, size < length ? size : length);
    pthread_mutex_unlock(&lock);
}

void standin_clear(void) {
    pthread_mutex_lock(&lock);
    length = 0;
    launches = 0;
    pthread_mutex_unlock(&lock);
}

/* Streams, events and CUDA graphs. Work is done in the moment it is asked for, so nothing ever waits; what a graph
 * records is counted, and counted as launched when the graph is. One graph is recorded at a time. */
#include "standin.h"

#include <pthread.h>
#include <stdlib.h>

#define LAUNCH_MILLISECONDS 0.05f /* whatever it does: every candidate is as fast as the others */

typedef struct {
    int priority;
} Stream;

typedef struct {
    long launches; /* before it */
} Event;

typedef struct {
    long nodes;
} Graph;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Graph *recording; /* NULL: no graph is recorded */
static cudaStream_t recorded_stream;
static unsigned long long recording_id;

bool standin_is_capturing(cudaStream_t stream) { return recording != NULL && stream == recorded_stream; }

void standin_count_node(void) {
    pthread_mutex_lock(&lock);
    if (recording != NULL) recording->nodes++;
    pthread_mutex_unlock(&lock);
}

/* -- streams ---------------------------------------------------------------------------------------------------------*/

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    Stream *made = calloc(1, sizeof *made);
    if (made == NULL) return standin_fail(cudaErrorMemoryAllocation);
    made->priority = priority;
    *stream = (cudaStream_t)made;
    return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) {
    return cudaStreamCreateWithPriority(stream, flags, 0);
}

cudaError_t cudaStreamCreate(cudaStream_t *stream) { return cudaStreamCreateWithPriority(stream, 0, 0); }

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
    free(stream);
    return cudaSuccess;
}

cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) {
    *priority = stream != NULL ? ((Stream *)stream)->priority : 0;
    return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t stream) { return cudaSuccess; }

static cudaError_t synchronize(bool is_forbidden) {
    standin_note("sync");
    return is_forbidden ? standin_fail(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return synchronize(standin_is_capturing(stream)); }

cudaError_t cudaDeviceSynchronize(void) { return synchronize(recording != NULL); }

cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags) { return cudaSuccess; }

cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t callback, void *data, unsigned flags) {
    callback(stream, cudaSuccess, data);
    return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void *data) {
    function(data);
    return cudaSuccess;
}

/* -- events ----------------------------------------------------------------------------------------------------------*/

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    *event = (cudaEvent_t)calloc(1, sizeof(Event));
    return *event != NULL ? cudaSuccess : standin_fail(cudaErrorMemoryAllocation);
}

cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }

cudaError_t cudaEventDestroy(cudaEvent_t event) {
    free(event);
    return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
    ((Event *)event)->launches = standin_all_launches();
    return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
    return cudaEventRecord(event, stream);
}

cudaError_t cudaEventQuery(cudaEvent_t event) { return cudaSuccess; }

cudaError_t cudaEventSynchronize(cudaEvent_t event) { return cudaSuccess; }

cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
    long launches = ((Event *)end)->launches - ((Event *)start)->launches;
    *milliseconds = LAUNCH_MILLISECONDS * (float)(launches > 0 ? launches : 1);
    return cudaSuccess;
}

/* -- recording a graph -----------------------------------------------------------------------------------------------*/

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
    pthread_mutex_lock(&lock);
    bool is_free = recording == NULL;
    if (is_free) {
        recording = calloc(1, sizeof *recording);
        if (recording == NULL) abort();
        recorded_stream = stream;
        recording_id++;
    }
    pthread_mutex_unlock(&lock);
    if (!is_free) return standin_fail(cudaErrorIllegalState);
    standin_note("graph begin");
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
    if (!standin_is_capturing(stream)) return standin_fail(cudaErrorIllegalState);
    pthread_mutex_lock(&lock);
    Graph *made = recording;
    recording = NULL;
    pthread_mutex_unlock(&lock);
    standin_note("graph end %ld", made->nodes);
    *graph = (cudaGraph_t)made;
    return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = standin_is_capturing(stream) ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **dependencies,
                                     const cudaGraphEdgeData **edges, size_t *count) {
    cudaStreamIsCapturing(stream, status);
    if (id != NULL) *id = recording_id;
    if (graph != NULL) *graph = (cudaGraph_t)recording;
    if (dependencies != NULL) *dependencies = NULL;
    if (edges != NULL) *edges = NULL;
    if (count != NULL) *count = 0;
    return cudaSuccess;
}

cudaError_t cudaStreamUpdateCaptureDependencies(cudaStream_t stream, cudaGraphNode_t *dependencies,
                                                const cudaGraphEdgeData *edges, size_t count, unsigned flags) {
    return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) { return cudaSuccess; }

/* -- running it ------------------------------------------------------------------------------------------------------*/

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *executable, cudaGraph_t graph, unsigned long long flags) {
    Graph *copy = malloc(sizeof *copy);
    if (copy == NULL) return standin_fail(cudaErrorMemoryAllocation);
    *copy = *(Graph *)graph;
    *executable = (cudaGraphExec_t)copy;
    return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
    long nodes = ((Graph *)executable)->nodes;
    standin_note("graph launch %ld", nodes);
    standin_count_launches(nodes);
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    free(graph);
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
    free(executable);
    return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) {
    *count = (size_t)((Graph *)graph)->nodes; /* torch warns of a graph without any */
    return cudaSuccess;
}

cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t node, cudaGraphNode_t *dependencies, cudaGraphEdgeData *edges,
                                         size_t *count) {
    *count = 0;
    return cudaSuccess;
}

cudaError_t cudaGraphDebugDotPrint(cudaGraph_t graph, const char *path, unsigned flags) { return cudaSuccess; }

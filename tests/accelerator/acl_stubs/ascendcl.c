/* The part of the ACL runtime that torch_npu calls before it runs an operator, with the host's memory as the device's.
   Work is done when a call returns. Compiling and running operators fails, so that nothing passes for computed. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define OK 0
#define FAILED 500000 /* ACL_ERROR_INTERNAL_ERROR */
#define SUCCEEDS(name) int name(void) { return OK; }
#define FAILS(name) int name(void) { return FAILED; }

static int device;
static char something; /* what opaque handles point at */

int aclrtGetDeviceCount(uint32_t *count) { *count = 1; return OK; }
int aclrtGetDevice(int32_t *id) { *id = device; return OK; }
int aclrtSetDevice(int32_t id) { device = id; return OK; }
const char *aclrtGetSocName(void) { return "Ascend910B3"; }
const char *aclGetRecentErrMsg(void) { return "the emulated ACL runtime runs no operators"; }
int aclrtGetCurrentContext(void **context) { *context = &something; return OK; }
int aclrtCreateContext(void **context, int32_t id) { *context = &something; return OK; }
int aclrtGetMemInfo(int attribute, size_t *free_bytes, size_t *total) { *free_bytes = *total = (size_t)8 << 30; return OK; }
int aclGetDeviceCapability(uint32_t id, int kind, int64_t *value) { *value = 20; return OK; }
int aclrtGetSysParamOpt(int option, int64_t *value) { *value = 0; return OK; }
int aclrtCtxGetSysParamOpt(int option, int64_t *value) { *value = 0; return OK; }

static int allocate(void **memory, size_t size) {
    *memory = NULL;
    return posix_memalign(memory, 512, size ? size : 1) ? FAILED : OK;
}
int aclrtMalloc(void **memory, size_t size, int policy) { return allocate(memory, size); }
int aclrtMallocAlign32(void **memory, size_t size, int policy) { return allocate(memory, size); }
int aclrtMallocHost(void **memory, size_t size) { return allocate(memory, size); }
int aclrtFree(void *memory) { free(memory); return OK; }
int aclrtFreeHost(void *memory) { free(memory); return OK; }
int aclrtMemcpy(void *to, size_t limit, const void *from, size_t size, int kind) { memcpy(to, from, size); return OK; }
int aclrtMemcpyAsync(void *to, size_t limit, const void *from, size_t size, int kind, void *stream) {
    memcpy(to, from, size);
    return OK;
}
int aclrtMemset(void *to, size_t limit, int32_t value, size_t size) { memset(to, value, size); return OK; }
int aclrtMemsetAsync(void *to, size_t limit, int32_t value, size_t size, void *stream) {
    memset(to, value, size);
    return OK;
}

int aclrtCreateStream(void **stream) { *stream = &something; return OK; }
int aclrtCreateStreamWithConfig(void **stream, uint32_t priority, uint32_t flag) { *stream = &something; return OK; }
int aclrtCreateEvent(void **event) { *event = &something; return OK; }
int aclrtCreateEventWithFlag(void **event, uint32_t flag) { *event = &something; return OK; }
int aclrtCreateEventExWithFlag(void **event, uint32_t flag) { *event = &something; return OK; }
int aclrtQueryEventStatus(void *event, int *status) { *status = 1; return OK; }
int aclrtEventElapsedTime(float *ms, void *start, void *end) { *ms = 0; return OK; }
int aclrtDeviceCanAccessPeer(int32_t *can, int32_t one, int32_t other) { *can = 0; return OK; }

void *aclCreateDataBuffer(void *data, size_t size) { return &something; }
void *aclCreateTensorDesc(int type, int dimensions, const int64_t *shape, int format) { return &something; }
void *aclopCreateAttr(void) { return &something; }
void aclDestroyTensorDesc(const void *description) {}
void aclopDestroyAttr(const void *attribute) {}
int aclGetTensorDescFormat(const void *description) { return 2; /* ND */ }
int aclGetTensorDescType(const void *description) { return 0; }
size_t aclGetTensorDescNumDims(const void *description) { return 0; }
void aclAppLog(int level, const char *function, const char *file, uint32_t line, const char *format, ...) {}

SUCCEEDS(aclInit) SUCCEEDS(aclFinalize) SUCCEEDS(aclrtResetDevice) SUCCEEDS(aclrtSetCurrentContext)
SUCCEEDS(aclDestroyDataBuffer) SUCCEEDS(aclSetTensorDescName) SUCCEEDS(aclSetTensorFormat)
SUCCEEDS(aclSetTensorPlaceMent) SUCCEEDS(aclSetTensorShape) SUCCEEDS(aclGetTensorDescDimV2)
SUCCEEDS(aclmdlFinalizeDump) SUCCEEDS(aclmdlInitDump) SUCCEEDS(aclmdlSetDump) SUCCEEDS(aclopSetAttrBool)
SUCCEEDS(aclopSetAttrDataType) SUCCEEDS(aclopSetAttrFloat) SUCCEEDS(aclopSetAttrInt) SUCCEEDS(aclopSetAttrListBool)
SUCCEEDS(aclopSetAttrListFloat) SUCCEEDS(aclopSetAttrListInt) SUCCEEDS(aclopSetAttrListListInt)
SUCCEEDS(aclopSetAttrString) SUCCEEDS(aclrtDestroyEvent) SUCCEEDS(aclrtDestroyStream) SUCCEEDS(aclrtProcessReport)
SUCCEEDS(aclrtRecordEvent) SUCCEEDS(aclrtResetEvent) SUCCEEDS(aclrtStreamWaitEvent) SUCCEEDS(aclrtSynchronizeEvent)
SUCCEEDS(aclrtSynchronizeStream) SUCCEEDS(aclrtSynchronizeDevice) SUCCEEDS(aclSetCompileopt)
SUCCEEDS(aclrtSynchronizeStreamWithTimeout) SUCCEEDS(aclrtSynchronizeDeviceWithTimeout)
SUCCEEDS(aclrtDestroyContext) SUCCEEDS(aclopSetCompileFlag) SUCCEEDS(aclrtSetDeviceSatMode)
SUCCEEDS(aclrtSetSysParamOpt) SUCCEEDS(aclrtCtxSetSysParamOpt) SUCCEEDS(aclrtSetOpExecuteTimeOut)
SUCCEEDS(aclrtDestroyStreamForce)
FAILS(aclopCompileAndExecute) FAILS(aclopCompileAndExecuteV2) FAILS(aclopExecuteV2)
FAILS(aclrtBinaryGetFunction) FAILS(aclrtBinaryLoadFromData) FAILS(aclrtGetFunctionAddr)
FAILS(aclrtDeviceEnablePeerAccess) FAILS(aclrtDeviceGetBareTgid) FAILS(aclrtFreePhysical) FAILS(aclrtMallocPhysical)
FAILS(aclrtMapMem) FAILS(aclrtUnmapMem) FAILS(aclrtReserveMemAddress) FAILS(aclrtReleaseMemAddress)
FAILS(aclrtMemExportToShareableHandle) FAILS(aclrtMemImportFromShareableHandle)
FAILS(aclrtMemSetPidToShareableHandle)
FAILS(rtDevBinaryRegister) FAILS(rtFunctionRegister) FAILS(rtGetC2cCtrlAddr) FAILS(rtKernelLaunch)

/* The profiler's reports go nowhere. */
uint64_t MsprofGetHashId(const char *text, size_t length) { return 0; }
uint64_t MsprofSysCycleTime(void) { return 0; }
SUCCEEDS(MsprofRegisterCallback) SUCCEEDS(MsprofReportAdditionalInfo) SUCCEEDS(MsprofReportApi)
SUCCEEDS(MsprofReportCompactInfo)
